"""MPVG DeiT: schemes against their equations, bit equality with timm's DeiT, timm's options, checkpoints, errors."""

import copy
import logging
import pickle
from dataclasses import dataclass, field
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpvg_kernels as mk
from mpvg_kernels.models import NAMED_SCHEMES, MPVGVisionTransformer, checkpoint_filter_fn, load_weights

DEPTH, DIM, HEADS, CLASSES = 4, 24, 2, 5
SMALL = dict(img_size=16, patch_size=4, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES)
TINY = "mpvg_deit_tiny_patch16_224"


def build(scheme="mpvg", **kwargs) -> MPVGVisionTransformer:
    """A small model through timm's factory."""
    return timm.create_model(TINY, scheme=scheme, **{**SMALL, **kwargs})


def randomise(model: nn.Module) -> nn.Module:
    """Parameters all different and of order one, so that no term of the formula vanishes or is the identity."""
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float(name.endswith("norm.weight") or "norm" in name), std=0.3)
    return model


def images(batch=2, size=(16, 16), channels=3, dtype=torch.float32, device="cpu"):
    return torch.randn(batch, channels, *size, dtype=dtype).to(device)


# ---- what each scheme means


@dataclass
class Equations:
    """A scheme's forward, written out for four layers.

    layers[l] are the LN' that the table pos_embed goes through to become layer l's PE, in order; stream[l] is the table
    that is added to the stream before layer l; last is what the last LayerNorm's own LN' is given: the layers' LN' that
    pos_embed went through, or a table's name.
    """

    class_token: bool = False
    add_to_input: bool = True
    layers: dict = field(default_factory=dict)
    stream: dict = field(default_factory=dict)
    last: tuple | str | None = None


CHAIN_FROM_0 = {0: (0,), 1: (0, 1), 2: (0, 1, 2), 3: (0, 1, 2, 3)}
CHAIN_FROM_1 = {1: (1,), 2: (1, 2), 3: (1, 2, 3)}
OWN_TABLES = {i: f"layer_pos_embed.{i}" for i in (1, 2, 3)}
EQUATIONS = {
    "default": Equations(class_token=True),
    "gap": Equations(),
    "lape": Equations(class_token=True, add_to_input=False, layers=CHAIN_FROM_0),
    "lape_gap": Equations(add_to_input=False, layers=CHAIN_FROM_0),
    "pvg": Equations(layers=CHAIN_FROM_1),
    "mpvg": Equations(layers=CHAIN_FROM_1, last=()),
    "gap_last": Equations(last=()),
    # Table 5
    "mpvg(last=1)": Equations(layers=CHAIN_FROM_1, last=(1,)),
    "mpvg(last=3)": Equations(layers=CHAIN_FROM_1, last=(1, 2, 3)),
    # Table 6
    "mpvg(first_layer=0)": Equations(layers=CHAIN_FROM_0, last=()),
    "mpvg(hierarchical=False)": Equations(layers={1: (1,), 2: (2,), 3: (3,)}, last=()),
    "mpvg(add_to_input=False)": Equations(add_to_input=False, layers=CHAIN_FROM_1, last=()),
    # combinations
    "mpvg(hierarchical=False, last=2)": Equations(layers={1: (1,), 2: (2,), 3: (3,)}, last=(2,)),
    "mpvg(first_layer=2, last=3)": Equations(layers={2: (2,), 3: (2, 3)}, last=(2, 3)),
    # LaPE's joins
    "lape(join=share)": Equations(class_token=True, add_to_input=False, stream={i: "pos_embed" for i in range(DEPTH)}),
    "lape(join=unshare)": Equations(class_token=True, add_to_input=False, stream={0: "pos_embed", **OWN_TABLES}),
    "mpvg(join=share)": Equations(stream={i: "pos_embed" for i in (1, 2, 3)}, last=()),
    "mpvg(last=2, join=unshare)": Equations(stream=OWN_TABLES, last="layer_pos_embed.2"),
}


def plain_forward(p: dict, image: torch.Tensor, eq: Equations) -> torch.Tensor:
    """Logits in plain PyTorch from the parameters by name; only the equations, none of the model's code."""

    def norm(v, name, prefix=""):
        mean, var = v.mean(-1, keepdim=True), v.var(-1, unbiased=False, keepdim=True)
        return (v - mean) / (var + 1e-6).sqrt() * p[f"{name}.{prefix}weight"] + p[f"{name}.{prefix}bias"]

    def linear(v, name):
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def chain(layers):
        pos = p["pos_embed"][0]
        for i in layers:
            pos = norm(pos, f"blocks.{i}.norm1", "pos_")
        return pos

    patch = p["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(image, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch).flatten(2).mT
    if eq.class_token:
        x = torch.cat([p["cls_token"].expand(len(x), 1, -1), x], 1)
    if eq.add_to_input:
        x = x + p["pos_embed"]
    for i in range(DEPTH):
        if i in eq.stream:
            x = x + p[eq.stream[i]]
        y = norm(x, f"blocks.{i}.norm1")
        if i in eq.layers:
            y = y + chain(eq.layers[i])
        q, k, v = linear(y, f"blocks.{i}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        y = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(F.gelu(y), f"blocks.{i}.mlp.fc2")
    y = norm(x, "norm")
    if eq.last is not None:
        y = y + norm(p[eq.last][0] if isinstance(eq.last, str) else chain(eq.last), "norm", "pos_")
    return linear(y[:, 0] if eq.class_token else y.mean(1), "head")


@pytest.mark.parametrize("scheme", EQUATIONS)
def test_scheme_is_its_equations(scheme, backend, device):
    """Logits and the gradient of every parameter; no parameter is left without one."""
    dtype = torch.float32 if backend in ("triton", "cuda") else torch.float64
    tolerance = dict(rtol=1e-3, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-11)
    model = randomise(build(scheme)).to(device, dtype)
    assert str(model.scheme) == scheme
    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    image = images(dtype=dtype, device=device)
    expected = plain_forward(params, image, EQUATIONS[scheme])
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()

    logits = model(image)
    (logits * weights).sum().backward()
    torch.testing.assert_close(logits, expected, **tolerance)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, params[name].grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize(("scheme", "count"), [("mpvg", 5_721_640), ("default", 5_717_416)])
def test_parameter_counts(scheme, count):
    with torch.device("meta"):
        model = timm.create_model(TINY, scheme=scheme)
    assert sum(p.numel() for p in model.parameters()) == count


def test_sizes():
    def shapes(name, **kwargs):
        with torch.device("meta"):
            return {k: v.shape for k, v in timm.create_model(name, **kwargs).state_dict().items()}

    for size in ("small", "base"):
        assert shapes(f"mpvg_deit_{size}_patch16_224", scheme="default") == shapes(f"deit_{size}_patch16_224")


def train_losses(scheme, backend, device="cpu", **kwargs):
    """Losses of two SGD steps from a fixed start, on one backend."""
    torch.manual_seed(3)
    model = build(scheme, drop_path_rate=0.2, **kwargs).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    image, target = images(4, device=device), torch.arange(4, device=device) % CLASSES
    losses = []
    with mk.use_backend(backend):
        for _ in range(2):
            loss = F.cross_entropy(model(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", NAMED_SCHEMES)
def test_backends_train_alike(scheme, backend, device):
    torch.testing.assert_close(
        train_losses(scheme, backend, device), train_losses(scheme, "reference", device), rtol=1e-5, atol=0
    )


# ---- scheme="default" is timm's DeiT

OPTIONS = {
    "plain": {},
    "stochastic depth": dict(drop_path_rate=0.4),
    "all dropouts": dict(drop_rate=0.2, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2),
    "patch drop": dict(patch_drop_rate=0.25),
    "layer scale": dict(init_values=0.1, drop_path_rate=0.4),
    "qk norm, no bias": dict(qk_norm=True, qkv_bias=False, scale_mlp_norm=True),
    "registers": dict(reg_tokens=2, no_embed_class=True),
    "pre norm": dict(pre_norm=True),
    "eps": dict(norm_layer=partial(nn.LayerNorm, eps=1e-3)),
    "non-square": dict(img_size=(16, 24), patch_size=(4, 8), in_chans=1),
    "jax init": dict(weight_init="jax"),
}


def pair(**kwargs):
    """Our model under `default` and timm's, built from the same seed."""
    models = []
    for make in (partial(build, "default"), lambda **kw: VisionTransformer(**{**SMALL, **kw})):
        torch.manual_seed(1)
        models.append(make(**kwargs))
    return models


def outputs_and_grads(model, image, call=None):
    torch.manual_seed(2)
    out = model(image) if call is None else call(model, image)
    out.square().sum().backward()
    return out, {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_default_is_timms_deit_bit_for_bit(options, training):
    ours, theirs = pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} starts elsewhere"
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    image = images(3, options.get("img_size", (16, 16)), options.get("in_chans", 3))
    with mk.use_backend("reference"):
        out, grads = outputs_and_grads(ours.train(training), image)
        expected, expected_grads = outputs_and_grads(theirs.train(training), image)
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


@pytest.mark.parametrize("mask", [dict(is_causal=True), dict(attn_mask=torch.ones(17, 17).tril().bool())])
def test_masks_are_timms(mask):
    ours, theirs = pair()
    with mk.use_backend("reference"):
        assert torch.equal(ours(image := images(), **mask), theirs(image, **mask))
        assert not torch.equal(ours(image, **mask), ours(image))


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(indices=2),
        dict(indices=[0, -2], norm=True),
        dict(indices=[1], stop_early=True),
        dict(indices=[1, 2], intermediates_only=True, output_fmt="NLC"),
        dict(indices=[1, 2], return_prefix_tokens=True),
        dict(indices=[1], output_dict=True, return_prefix_tokens=True),
        dict(indices=[1], output_dict=True, intermediates_only=True),
    ],
    ids=str,
)
def test_forward_intermediates_are_timms(arguments, registers):
    ours, theirs = pair(reg_tokens=registers)
    with mk.use_backend("reference"):
        image = images()
        expected = theirs.forward_intermediates(image, **arguments)
        torch.testing.assert_close(ours.forward_intermediates(image, **arguments), expected, rtol=0, atol=0)


# ---- forward, forward_features, forward_head


@pytest.mark.parametrize("scheme", ["default", "lape", "gap", "mpvg", "mpvg(last=2)"])
@pytest.mark.parametrize("kwargs", [{}, dict(reg_tokens=2), dict(reg_tokens=2, no_embed_class=True)], ids=str)
def test_forward_is_head_of_features(scheme, kwargs, backend, device):
    model = randomise(build(scheme, **kwargs)).to(device).eval()
    image = images(device=device)
    features = model.forward_features(image)
    prefix = (scheme in ("default", "lape")) + kwargs.get("reg_tokens", 0)
    assert features.shape == (2, 16 + prefix, DIM)
    torch.testing.assert_close(model(image), model.forward_head(features), rtol=1e-4, atol=1e-4)
    final, (last,) = model.forward_intermediates(image, indices=1, norm=True, output_fmt="NLC")
    torch.testing.assert_close(final, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, features[:, prefix:], rtol=1e-4, atol=1e-4)


def test_class_token_without_a_pos_slot():
    """no_embed_class: the table has rows for patches only, so the class token gets no PE in any layer."""
    model = randomise(build("lape", no_embed_class=True))
    assert model.pos_embed.shape == (1, 16, DIM)
    seen = []
    model.blocks[2].norm1.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, *output)))
    model(images())
    x, branch, _, branch_scale, y, stream, _ = seen[0]
    assert branch_scale is None
    plain = F.layer_norm(stream, (DIM,), model.blocks[2].norm1.weight, model.blocks[2].norm1.bias, 1e-6)
    torch.testing.assert_close(y[:, 0], plain[:, 0])
    assert (y[:, 1:] - plain[:, 1:]).abs().min(0).values.max() > 0.1


def test_autocast_keeps_the_stream_wide(backend, device):
    """Without x + pos the patches would stay bf16 under autocast, and the residual stream with them."""
    for scheme in ("lape_gap", "mpvg"):
        model = build(scheme).to(device)
        outputs = []
        model.blocks[-1].norm2.register_forward_hook(lambda *args, outputs=outputs: outputs.extend(args[-1]))
        with torch.autocast(device, torch.bfloat16):
            logits = model(images(device=device))
        y, stream = outputs
        assert (logits.dtype, y.dtype, stream.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


class CountAdds(TorchDispatchMode):
    """Counts PyTorch's own additions of whole token tensors."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and out.shape == self.shape
        return out


@pytest.mark.skipif("cpp" not in mk.available_backends("cpu"), reason="the plain formula adds; needs the CPU kernels")
@pytest.mark.parametrize(
    ("scheme", "call", "adds"),
    [
        ("mpvg", "forward", 1),
        ("lape_gap", "forward", 0),
        ("mpvg", "forward_features", 1),
        ("mpvg", "checkpointed", 1 + DEPTH),
        ("mpvg", "two intermediates", 1 + 2),
    ],
)
def test_residual_adds_are_fused(scheme, call, adds):
    """Only x + pos, checkpointed block ends and taken intermediates are additions of their own."""
    model = build(scheme)
    model.set_grad_checkpointing(call == "checkpointed")
    with mk.use_backend("cpp"), CountAdds((2, 16, DIM)) as counter, torch.no_grad():
        if call == "two intermediates":
            model.forward_intermediates(images(), indices=[0, 2])
        else:
            getattr(model, "forward" if call == "checkpointed" else call)(images())
    assert counter.count == adds


def test_forward_pools_in_the_norm():
    model = build("mpvg")
    shapes = []
    model.norm.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model(images())
    assert shapes == [(2, DIM)]


# ---- options of timm's users


@pytest.mark.parametrize("scheme", ["default", "mpvg", "mpvg(last=3)", "mpvg(join=unshare)"])
def test_checkpointing_changes_no_gradient(scheme):
    model = randomise(build(scheme, drop_path_rate=0.4))
    image = images(4)
    with mk.use_backend("reference"):
        out, grads = outputs_and_grads(model, image)
        model.zero_grad()
        model.set_grad_checkpointing()
        kept, branches = [], []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, inputs: branches.append(inputs[1]))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            again, grads_again = outputs_and_grads(model, image)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads_again, grads, rtol=1e-4, atol=1e-5)
    assert len(kept) < 40, "the blocks' activations were kept"
    assert branches == [None] * 2 * DEPTH, "a block was given two tensors, so that both are kept for its second run"


@pytest.mark.parametrize("scheme", ["default", "mpvg", "mpvg(last=2)"])
def test_features_only(scheme):
    torch.manual_seed(0)
    features = build(scheme, features_only=True, out_indices=(0, 1))
    torch.manual_seed(0)
    model = build(scheme)
    image = images()
    assert features.feature_info.channels() == [DIM, DIM]
    assert features.feature_info.reduction() == [4, 4]
    maps = features(image)
    assert [m.shape for m in maps] == [(2, DIM, 4, 4)] * 2
    torch.testing.assert_close(maps, model.forward_intermediates(image, indices=[0, 1], intermediates_only=True))
    assert len(features.model.blocks) == 2
    assert isinstance(features.model.norm, nn.Identity)
    torch.testing.assert_close(
        model.get_intermediate_layers(image, n=[1], reshape=True)[0], maps[1], msg="get_intermediate_layers"
    )


@pytest.mark.parametrize(
    ("scheme", "kept"), [("default", 2), ("mpvg", 2), ("mpvg(last=3)", 4), ("mpvg(join=unshare)", 2)]
)
def test_pruning_keeps_what_the_norm_needs(scheme, kept):
    model = randomise(build(scheme)).eval()
    image = images()
    expected = model.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True)
    early = model.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True, stop_early=True)
    torch.testing.assert_close(early, expected)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.blocks) == kept
    assert sorted(model.layer_pos_embed) == (["1"] if "unshare" in scheme else [])
    assert isinstance(model.head, nn.Identity)
    torch.testing.assert_close(
        model.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True), expected
    )
    model.prune_intermediate_layers([0], prune_norm=True)
    stream = model.forward_intermediates(image, indices=[0], intermediates_only=True, output_fmt="NLC")[0]
    torch.testing.assert_close(model(image)[:, model.num_prefix_tokens :], stream)


@pytest.mark.parametrize("scheme", ["default", "mpvg"])
def test_reset_classifier(scheme):
    model = build(scheme)
    image = images()
    tokens = 17 if scheme == "default" else 16
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    model.reset_classifier(0)
    assert model(image).shape == (2, DIM)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, tokens, DIM)
    model.reset_classifier(3, model.scheme.pool)
    assert model(image).shape == (2, 3)
    assert build(scheme, num_classes=0, global_pool="")(image).shape == (2, tokens, DIM)
    other = {"default": "avg", "mpvg": "token"}[scheme]
    with pytest.raises(ValueError, match=f"global_pool='{other}' contradicts position scheme {scheme}, which pools"):
        model.reset_classifier(3, other)


@pytest.mark.parametrize("scheme", ["default", "lape", "mpvg", "lape_gap(join=unshare)"])
def test_other_input_sizes(scheme):
    """set_input_size resamples every table to a grid that is said, and dynamic_img_size does so on the way."""
    model = randomise(build(scheme)).eval()
    image = images(size=(32, 8))  # 8x2 patches: as many as the 4x4 it was built for
    dynamic = build(scheme, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    square = images()
    torch.testing.assert_close(dynamic(square), model(square))
    before = {k: v.clone() for k, v in model.state_dict().items() if "pos_embed" in k}
    model.set_input_size((32, 8))
    for name, table in before.items():
        assert not torch.equal(model.state_dict()[name], table), f"{name} was passed through"
    torch.testing.assert_close(model(image), dynamic(image))
    assert dynamic.forward_intermediates(image, 1)[1][0].shape == (2, DIM, 8, 2)


def test_weight_decay_and_layer_groups():
    model = build("lape(join=unshare)")
    tables = {"pos_embed", *(f"layer_pos_embed.{i}" for i in (1, 2, 3))}
    names = dict(model.named_parameters())
    assert tables | {"cls_token"} <= model.no_weight_decay() & set(names)
    decayed = {
        id(p)
        for group in param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
        for p in group["params"]
        if group["weight_decay"]
    }
    assert all((id(p) in decayed) == (p.ndim > 1 and k not in tables | {"cls_token"}) for k, p in names.items())
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scale[id(names[t])] for t in tables} == {scale[id(names["patch_embed.proj.weight"])]}
    assert len(set(scale.values())) == DEPTH + 2


def test_blocks_are_called_as_modules():
    calls = []
    model = build("mpvg")
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    model(images())
    assert calls == [4] * DEPTH


def test_compiles_without_graph_breaks(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter is not traced by torch.compile")
    torch._dynamo.reset()
    model = randomise(build("mpvg(last=2)", depth=3, drop_path_rate=0.1)).to(device)
    image = images(3, device=device)
    out, grads = outputs_and_grads(model, image)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, grads_again = outputs_and_grads(model, image, lambda _, x: compiled(x))
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads_again, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter is not traced by torch.export")
    model = build("mpvg").to(device).eval()
    image = images(device=device)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=({**batch},), strict=strict)
        image = images(5, device=device)
        torch.testing.assert_close(program.module()(image), model(image))


# ---- state


@pytest.mark.parametrize("scheme", ["default", "mpvg", "lape(join=unshare)"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(scheme, clone):
    model = randomise(build(scheme)).eval()
    twin = clone(model)
    assert twin.scheme == model.scheme
    image = images()
    assert torch.equal(twin(image), model(image))
    other = build(scheme).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(image), model(image))


def test_every_table_starts_as_timms():
    model = build("lape(join=unshare)")
    for table in (model.pos_embed, *model.layer_pos_embed.values()):
        assert 0.015 < table.std() < 0.025


def test_device_and_dtype():
    model = build("mpvg", device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    assert (model.norm.pos_weight == 1).all() and (model.blocks[1].norm1.pos_bias == 0).all()
    assert model(images(dtype=torch.float64)).isfinite().all()


# ---- checkpoints


def timm_weights(**kwargs):
    return randomise(VisionTransformer(**{**SMALL, **kwargs})).state_dict()


def test_class_token_checkpoint_into_a_pooled_model(caplog):
    weights = timm_weights()
    model = randomise(build("mpvg")).eval()
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        load_weights(model, {"model": weights})
    assert caplog.messages == [
        "Converted a checkpoint to position scheme mpvg: dropped the class token; dropped the class token's row of "
        "pos_embed; 4 PE LayerNorms start at the identity."
    ]
    assert torch.equal(model.pos_embed, weights["pos_embed"][:, 1:])
    assert torch.equal(model.blocks[3].norm1.weight, weights["blocks.3.norm1.weight"])
    assert (model.blocks[3].norm1.pos_weight == 1).all() and (model.norm.pos_bias == 0).all()


@pytest.mark.parametrize(
    ("img_size", "grid", "text"), [((16, 16), (2, 8), "from 2x8 to 4x4"), ((32, 24), (4, 4), "from 4x4 to 8x6")]
)
def test_checkpoint_of_another_grid(img_size, grid, text, caplog):
    weights = timm_weights(img_size=(4 * grid[0], 4 * grid[1]))
    for scheme, prefix in (("mpvg", 0), ("default", 1)):
        model = build(scheme, img_size=img_size)
        with caplog.at_level(logging.INFO, "mpvg_kernels"):
            load_weights(model, weights, grid=grid)
        assert f"resampled pos_embed {text}" in caplog.messages[-1]
        table = weights["pos_embed"][:, 1:].reshape(1, *grid, DIM).permute(0, 3, 1, 2)
        expected = F.interpolate(table, [s // 4 for s in img_size], mode="bicubic", antialias=True).flatten(2).mT
        torch.testing.assert_close(model.pos_embed[:, prefix:], expected)
        assert prefix == 0 or torch.equal(model.pos_embed[:, 0], weights["pos_embed"][:, 0])


def test_own_checkpoint_is_loaded_as_it_is(caplog):
    for scheme in ("mpvg", "lape", "lape(join=unshare)"):
        model, other = randomise(build(scheme)), build(scheme)
        with caplog.at_level(logging.INFO, "mpvg_kernels"):
            load_weights(other, model.state_dict())
        assert not caplog.messages
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_unknown_grid_is_refused():
    with pytest.raises(ValueError, match=r"pos_embed with 50 rows \(1 prefix tokens\) is not known.*pass grid=\(rows"):
        load_weights(build("mpvg"), timm_weights(img_size=28))
    with pytest.raises(ValueError, match=r"17 rows, which is no grid of 5x5 patches with or without 1 prefix tokens"):
        load_weights(build("mpvg"), timm_weights(), grid=(5, 5))
    # 196 rows are the recorded 14x14 or the model's 7x28: nobody can tell.
    model = timm.create_model(TINY, depth=2, embed_dim=DIM, num_heads=2, img_size=(112, 448))
    with pytest.raises(ValueError, match=r"may be any of \[\(7, 28\), \(14, 14\)\]"):
        load_weights(model, model.state_dict())


def test_timm_loads_through_the_filter(tmp_path):
    """A weight file given to timm's factory is converted: class token dropped, grid taken from timm's record."""
    torch.save(timm_weights(), tmp_path / "deit.pth")
    overlay = dict(file=str(tmp_path / "deit.pth"), input_size=(3, 16, 16), num_classes=CLASSES)
    args = {**SMALL, "img_size": 32}
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    assert model.pos_embed.shape == (1, 64, DIM)
    expected = build("mpvg", img_size=32)
    load_weights(expected, timm_weights() | torch.load(tmp_path / "deit.pth"), grid=(4, 4))
    assert torch.equal(model.pos_embed, expected.pos_embed)


@pytest.mark.parametrize(
    ("weights", "problems"),
    [
        (
            lambda: timm_weights(depth=5),
            r"12 unexpected \(blocks.4.norm1.weight \(24,\), .*\.\.\.\); build the model with depth=5 to take",
        ),
        (
            lambda: timm_weights(num_classes=3),
            r"2 mis-shaped \(head.weight \(3, 24\), expected \(5, 24\), head.bias.*; build .* with num_classes=3",
        ),
        (
            lambda: build("pvg").state_dict(),
            r"2 missing \(norm.pos_weight \(\d+,\), norm.pos_bias \(\d+,\)\); build .* a position scheme "
            r"with PE LayerNorms in .* only to take them",
        ),
        (
            lambda: nn.Linear(2, 2).state_dict(),
            r"\d+ missing \(pos_embed \(1, 16, 24\), .*2 unexpected \(weight \(2, 2\), bias \(2,\)\)$",
        ),
    ],
)
def test_weights_of_another_model(weights, problems):
    model = build("mpvg")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"another model than this one \(position scheme mpvg, depth 4.*" + problems):
        load_weights(model, weights())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_filter_leaves_the_checkpoint_alone():
    weights = timm_weights()
    before = dict(weights)
    checkpoint_filter_fn(weights, build("mpvg"))
    assert weights == before


def test_no_pretrained_weights():
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {TINY}. Use `pretrained=False`"):
        timm.create_model(TINY, pretrained=True)


# ---- refused


@pytest.mark.parametrize(
    ("scheme", "kwargs", "message"),
    [
        ("mpgv", {}, "unknown position scheme 'mpgv'"),
        ("mpvg", dict(class_token=True), "mpvg pools all tokens, so it takes class_token=False, not True"),
        ("lape", dict(class_token=False), "position scheme lape pools the class token, so it takes class_token=True"),
        ("mpvg", dict(global_pool="token"), "global_pool='token' contradicts position scheme mpvg, which pools 'avg'"),
        ("default", dict(global_pool="avg"), "global_pool='avg' contradicts position scheme default"),
        ("mpvg", dict(global_pool="map"), "global_pool='map' contradicts"),
        ("mpvg", dict(global_pool="max"), "global_pool='max' contradicts"),
        ("mpvg", dict(fc_norm=True), "fc_norm=True norms after the pool"),
        ("mpvg", dict(norm_layer="rmsnorm"), "norm_layer='rmsnorm' makes RmsNorm"),
        ("mpvg", dict(norm_layer=partial(nn.LayerNorm, elementwise_affine=False)), "LayerNorm with learned scale only"),
        ("mpvg", dict(patch_drop_rate=0.1), "patch_drop_rate=0.1 drops other tokens in each sample"),
        ("gap_last", dict(patch_drop_rate=0.1), "position scheme gap_last needs patch_drop_rate=0"),
        ("gap", dict(pool_include_prefix=True), "pool_include_prefix=True: the fused pool leaves prefix tokens out"),
        ("mpvg", dict(pos_embed="none"), "pos_embed='none': a position scheme needs the learned table"),
        ("mpvg", dict(final_norm=False), "final_norm=False removes the norm that position scheme mpvg gives a PE to"),
        ("mpvg", dict(block_fn=nn.Identity), "block_fn is the position scheme's own block"),
        ("mpvg(last=4)", {}, r"last=4, but a model of depth 4 has layers 0 to 3"),
        ("mpvg", dict(depth=1), "first_layer=1, but a model of depth 1"),
    ],
)
def test_refused_options(scheme, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(scheme, **kwargs)
