"""fuse_norms: timm's own ViTs on the fused norms are the same function, with the same parameters and methods."""

import copy
import pickle

import pytest
import timm
import torch
from architectures import FAST, SLOW
from test_mpvg_vit import CountAdds, randomise
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

import mpvg_kernels as mk
from mpvg_kernels.models import fuse_norms

SMALL = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=5)
VIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
MODELS = {
    "token": (VIT, {}),
    "avg": (VIT, dict(global_pool="avg", fc_norm=False)),
    "avg, fc_norm": (VIT, dict(global_pool="avg")),
    "gap": (VIT, dict(global_pool="avg", fc_norm=False, class_token=False)),
    "prefix pooled": (VIT, dict(global_pool="avg", fc_norm=False, pool_include_prefix=True)),
    "map": (VIT, dict(global_pool="map")),
    "dinov2": (VIT, dict(reg_tokens=2, no_embed_class=True, init_values=0.1, mlp_layer=SwiGLUPacked, act_layer="silu")),
    "clip": (VIT, dict(pre_norm=True, qk_norm=True, norm_layer=nn.LayerNorm)),
    "no PE": (VIT, dict(pos_embed="none", final_norm=False)),
    "rates": (VIT, dict(drop_rate=0.1, patch_drop_rate=0.25, proj_drop_rate=0.3, drop_path_rate=0.5)),
    "no bias": (VIT, dict(norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, bias=False, **kwargs))),
    "distilled": (DISTILLED, dict(drop_path_rate=0.5)),
}


def pair(model: str, **kwargs):
    name, options = MODELS[model]
    theirs = randomise(timm.create_model(name, **{**SMALL, **options, **kwargs}))
    return theirs, fuse_norms(copy.deepcopy(theirs))


def step(model, image, call=None):
    """Outputs and gradients of a training step, or of one in eval mode."""
    torch.manual_seed(1)
    outputs = (call or model)(image)
    sum(o.square().sum() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])).backward()
    return outputs, {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_same_function_bit_for_bit(model, training):
    """Outputs on `reference`; gradients add up in another order."""
    theirs, ours = pair(model)
    theirs.train(training), ours.train(training)
    image = torch.randn(3, 3, 16, 16)
    with mk.use_backend("reference"):
        (expected, expected_grads), (found, found_grads) = step(theirs, image), step(ours, image)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(found_grads, expected_grads, rtol=1e-3, atol=1e-3)
        torch.manual_seed(2)
        expected = theirs.forward_features(image)
        torch.manual_seed(2)
        assert torch.equal(ours.forward_features(image), expected)


@pytest.mark.parametrize(
    ("model", "backend"),
    [*((m, b) for m in ("token", "gap", "distilled") for b in FAST), *(("gap", b) for b in SLOW)],
    indirect=["backend"],
)
def test_same_function_on_every_backend(model, backend, device):
    theirs, ours = (m.to(device) for m in pair(model, drop_path_rate=0.0))
    image = torch.randn(2, 3, 16, 16, device=device)
    (expected, expected_grads), (found, found_grads) = step(theirs, image), step(ours, image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_grads, expected_grads, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif("cpp" not in mk.available_backends("cpu"), reason="needs the CPU kernels")
@pytest.mark.parametrize("model", ["token", "gap", "distilled", "dinov2"])
def test_accuracy_rule_holds_for_the_model(model):
    """Outputs, and all gradients as one vector: no further from fp64 than timm's own by more than the rule allows."""
    theirs, ours = (m.eval() for m in pair(model))
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(16, 3, 16, 16)

    def both(m, image):
        outputs, grads = step(m, image)
        return outputs.detach().double(), torch.cat([g.flatten().double() for g in grads.values()])

    with mk.use_backend("cpp"):
        results = zip(both(ours, image), both(theirs, image), both(exact, image.double()), strict=True)
    for found, plain, expected in results:
        bound = 1.25 * (plain - expected).norm() + torch.finfo(torch.float32).eps * expected.norm()
        assert (found - expected).norm() <= bound


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_the_very_same(model):
    name, options = MODELS[model]
    theirs = timm.create_model(name, **{**SMALL, **options}).eval()
    before = dict(theirs.named_parameters())
    keys = list(theirs.state_dict())
    ours = fuse_norms(theirs)
    assert ours is theirs and not ours.norm.training and list(ours.state_dict()) == keys
    after = dict(ours.named_parameters())
    assert before.keys() == after.keys() and all(after[k] is before[k] for k in before)
    assert fuse_norms(ours) is ours
    assert isinstance(ours, VisionTransformerDistilled if model == "distilled" else VisionTransformer)


@pytest.mark.parametrize("model", ["token", "avg", "dinov2", "distilled"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(indices=2, norm=True, output_fmt="NLC"),
        dict(indices=[0], stop_early=True, return_prefix_tokens=True, intermediates_only=True),
    ],
    ids=str,
)
def test_forward_intermediates(model, arguments):
    theirs, ours = pair(model)
    image = torch.randn(2, 3, 16, 16)
    with mk.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(
            ours.eval().forward_intermediates(image, **arguments),
            theirs.eval().forward_intermediates(image, **arguments),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("model", ["token", "gap", "distilled"])
def test_checkpointing_and_masks(model):
    theirs, ours = pair(model, drop_path_rate=0.5)
    image = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    theirs, ours = theirs.double(), ours.double()
    kept, results = [], []
    for enable in (False, True):
        ours.zero_grad()
        ours.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(1) or t, lambda t: t):
            results.append(step(ours, image))
        kept.append(len(saved))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)
    assert kept[1] < kept[0] / 2
    ours.set_grad_checkpointing(False)
    with mk.use_backend("reference"), torch.no_grad():
        ours.eval(), theirs.eval()
        assert torch.equal(ours(image, is_causal=True), theirs(image, is_causal=True))


@pytest.mark.skipif("cpp" not in mk.available_backends("cpu"), reason="the plain formula adds; needs the CPU kernels")
@pytest.mark.parametrize(("model", "rows", "adds"), [("token", 17, 1), ("gap", 16, 1), ("distilled", 18, 1)])
def test_residual_adds_are_fused(model, rows, adds):
    """What is left is the position embedding's."""
    theirs, ours = pair(model, drop_path_rate=0.0)
    for m, expected in ((theirs, adds + 2 * SMALL["depth"]), (ours, adds)):
        with mk.use_backend("cpp"), torch.no_grad(), CountAdds((2, rows, 24)) as counter:
            m.eval()(torch.randn(2, 3, 16, 16))
        assert counter.count == expected


def test_timms_methods_still_work(tmp_path):
    theirs, ours = pair("token")
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours)).eval()(image), ours.eval()(image))
    for m in (theirs, ours):
        m.eval().set_input_size((24, 16))
        m.reset_classifier(3, "avg")
    image = torch.randn(2, 3, 24, 16)
    ours.head.load_state_dict(theirs.head.state_dict())
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)
    timm.models.save_for_hf(ours, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is VisionTransformer
    torch.testing.assert_close(again(image), theirs(image), rtol=1e-4, atol=1e-4)
    backbone = fuse_norms(timm.create_model(VIT, **SMALL))
    assert backbone.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert backbone.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 17, 24)


def test_compiles_and_exports():
    theirs, ours = pair("gap")
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.export(ours.eval(), (image,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
        image = torch.randn(5, 3, 16, 16)
        torch.testing.assert_close(program.module()(image), theirs.eval()(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("resnet18"), "fuse_norms: the model is a ResNet; expected timm's VisionTransformer"),
        (lambda: timm.create_model("mpvg_deit_tiny_patch16_224", **SMALL), "is a MPVGVisionTransformer"),
        (
            lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock),
            "blocks.0 is a ParallelScalingBlock, blocks.1 is a ParallelScalingBlock, blocks.2 is a Parallel.*expected",
        ),
        (
            lambda: VisionTransformer(**SMALL, norm_layer="rmsnorm"),
            r"blocks.0.norm1 is RmsNorm\(.*, blocks.0.norm2 is .* and 4 more; expected timm's Block with LayerNorms",
        ),
    ],
)
def test_refused_and_left_alone(make, message):
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        fuse_norms(model)
    assert [type(m) for m in model.modules()] == kinds
