"""MPVG Swin: schemes against their equations, bit equality with timm's Swin, sizes, timm's contract, checkpoints."""

import copy
import dataclasses
import logging
import pickle
import re
from dataclasses import dataclass, field
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from test_mpvg_vit import outputs_and_grads, randomise
from test_position_scheme import schemes
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as timm_filter
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpvg_kernels as mk
from mpvg_kernels.models import NAMED_SCHEMES, MPVGSwinTransformer, PositionScheme, SwinPositionScheme, load_weights

DEPTHS, DIM, HEADS, WINDOWS, CLASSES = (2, 1, 1), 16, (2, 2, 4), (4, 2, 2), 5
GRIDS, WIDTHS = (8, 4, 2), (16, 32, 64)
SMALL = dict(
    img_size=16,
    patch_size=2,
    embed_dim=DIM,
    depths=DEPTHS,
    num_heads=HEADS,
    window_size=WINDOWS,
    num_classes=CLASSES,
    drop_path_rate=0.0,
)
STAGE = (0, 0, 1, 2)  # of each layer
TINY = "mpvg_swin_tiny_patch4_window7_224"
needs_cpp = pytest.mark.skipif("cpp" not in mk.available_backends("cpu"), reason="needs the CPU kernels")


def build(scheme="mpvg", **kwargs) -> MPVGSwinTransformer:
    """A small model through timm's factory: layers 0 and 1 (shifted windows) | PatchMerging, 2 | PatchMerging, 3."""
    return timm.create_model(TINY, scheme=scheme, **{**SMALL, **kwargs})


def timms(table=None, **kwargs) -> SwinTransformer:
    """timm's Swin of the same size; a table is added to its patches by hand, as the original's ape=True does."""
    model = SwinTransformer(**{**SMALL, **kwargs})
    if table is not None:
        model.patch_embed.register_forward_hook(lambda module, inputs, patches: patches + table)
    return model


def images(batch=2, size=(16, 16), dtype=torch.float32, device="cpu"):
    return torch.randn(batch, 3, *size, dtype=dtype).to(device)


# ---- position schemes


def test_names_as_swin_has_them():
    """Swin always pools, and pvg and mpvg include layer 0 (the paper's exception)."""
    flat = {name: dataclasses.astuple(scheme) for name, scheme in NAMED_SCHEMES.items()}
    ours = {name: dataclasses.astuple(SwinPositionScheme.parse(name)) for name in NAMED_SCHEMES}
    from_0 = {name: (*flat[name][:3], 0, *flat[name][4:]) for name in ("pvg", "mpvg")}
    assert ours == {**flat, **from_0, "default": flat["gap"], "lape": flat["lape_gap"]}


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("mpvg", "mpvg"),
        ("mpvg(first_layer=1)", "mpvg(first_layer=1)"),
        ("mpvg(first_layer=0, last=8)", "mpvg(last=8)"),
        ("default", "gap"),
        ("lape(join=share)", "lape_gap(join=share)"),
    ],
)
def test_scheme_text(text, shortest):
    scheme = SwinPositionScheme.parse(text)
    assert str(scheme) == shortest
    assert SwinPositionScheme.parse(shortest) == scheme
    assert type(scheme) is SwinPositionScheme


@given(schemes())
def test_scheme_text_round_trips(scheme):
    """Any scheme of a ViT that Swin can have is the same value there, and its text reads back as that value."""
    if scheme.pool == "avg":
        ours = SwinPositionScheme.parse(scheme)
        assert dataclasses.astuple(ours) == dataclasses.astuple(scheme)
        assert SwinPositionScheme.parse(str(ours)) == ours
        assert PositionScheme.parse(ours) == scheme
    else:
        with pytest.raises(
            ValueError, match="pool='token', but Swin has no class token: its windows and PatchMergings"
        ):
            SwinPositionScheme.parse(scheme)


# ---- what each scheme means


@dataclass
class Equations:
    """A scheme's forward, written out for four layers in three stages.

    A path is a table's name and what the table goes through, in order: a layer's index for its LN', "merge1" and
    "merge2" for the PatchMergings that open stages 1 and 2. layers[l] is the path to layer l's PE, stream[l] the path
    to what is added to the stream before layer l, last the path to what the last norm's own LN' is given.
    """

    add_to_input: bool = True
    layers: dict = field(default_factory=dict)
    stream: dict = field(default_factory=dict)
    last: tuple | None = None


POS_0 = ("pos_embed", "merge1", "merge2")
CHAIN_FROM_0 = {
    0: ("pos_embed", 0),
    1: ("pos_embed", 0, 1),
    2: ("pos_embed", 0, 1, "merge1", 2),
    3: ("pos_embed", 0, 1, "merge1", 2, "merge2", 3),
}
CHAIN_FROM_1 = {
    1: ("pos_embed", 1),
    2: ("pos_embed", 1, "merge1", 2),
    3: ("pos_embed", 1, "merge1", 2, "merge2", 3),
}
FROM_TABLE = {0: ("pos_embed", 0), 1: ("pos_embed", 1), 2: ("pos_embed", "merge1", 2), 3: (*POS_0, 3)}
SHARED = {0: POS_0[:1], 1: POS_0[:1], 2: POS_0[:2], 3: POS_0}
OWN_TABLES = {i: (f"layer_pos_embed.{i}",) for i in (1, 2, 3)}
EQUATIONS = {
    "gap": Equations(),
    "lape_gap": Equations(add_to_input=False, layers=CHAIN_FROM_0),
    "pvg": Equations(layers=CHAIN_FROM_0),
    "mpvg": Equations(layers=CHAIN_FROM_0, last=POS_0),
    "gap_last": Equations(last=POS_0),
    # Table 5
    "mpvg(last=1)": Equations(layers=CHAIN_FROM_0, last=(*CHAIN_FROM_0[1], "merge1", "merge2")),
    "mpvg(last=2)": Equations(layers=CHAIN_FROM_0, last=(*CHAIN_FROM_0[2], "merge2")),
    "mpvg(last=3)": Equations(layers=CHAIN_FROM_0, last=CHAIN_FROM_0[3]),
    # Table 6
    "mpvg(first_layer=1)": Equations(layers=CHAIN_FROM_1, last=POS_0),
    "mpvg(hierarchical=False)": Equations(layers=FROM_TABLE, last=POS_0),
    "mpvg(add_to_input=False)": Equations(add_to_input=False, layers=CHAIN_FROM_0, last=POS_0),
    # combinations
    "mpvg(hierarchical=False, last=2)": Equations(layers=FROM_TABLE, last=(*FROM_TABLE[2], "merge2")),
    "mpvg(first_layer=3)": Equations(layers={3: (*POS_0, 3)}, last=POS_0),
    # LaPE's joins
    "lape_gap(join=share)": Equations(add_to_input=False, stream=SHARED),
    "lape_gap(join=unshare)": Equations(add_to_input=False, stream={0: ("pos_embed",), **OWN_TABLES}),
    "lape_gap(first_layer=2, join=unshare)": Equations(add_to_input=False, stream={2: POS_0[:2], 3: OWN_TABLES[3]}),
    "mpvg(first_layer=1, last=1, join=unshare)": Equations(
        stream=OWN_TABLES, last=(*OWN_TABLES[1], "merge1", "merge2")
    ),
}


def plain_forward(p: dict, image: torch.Tensor, eq: Equations) -> torch.Tensor:
    """Logits in plain PyTorch from the parameters by name; only the equations, none of the model's code."""

    def norm(v, name, prefix=""):
        mean, var = v.mean(-1, keepdim=True), v.var(-1, unbiased=False, keepdim=True)
        return (v - mean) / (var + 1e-5).sqrt() * p[f"{name}.{prefix}weight"] + p[f"{name}.{prefix}bias"]

    def linear(v, name):
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def merge(v, stage):
        name = f"layers.{stage}.downsample"
        v = torch.cat([v[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return norm(v, f"{name}.norm") @ p[f"{name}.reduction.weight"].T

    def layer_name(layer):
        return f"layers.{STAGE[layer]}.blocks.{layer if layer < 2 else 0}"

    def follow(path):
        pos = p[path[0]]
        for step in path[1:]:
            pos = merge(pos, int(step[-1])) if isinstance(step, str) else norm(pos, f"{layer_name(step)}.norm1", "pos_")
        return pos

    def attention(y, layer):
        """Tokens see those of their window; shifted windows start `shift` earlier, those at the border are cut off."""
        name, stage = f"{layer_name(layer)}.attn", STAGE[layer]
        grid, window, shift = GRIDS[stage], WINDOWS[stage], 2 if layer == 1 else 0
        at = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).to(y.device)
        windows = (at - shift).div(window, rounding_mode="floor")
        together = (windows[:, None] == windows).all(-1)
        apart = (at[:, None] - at).clamp(1 - window, window - 1) + window - 1
        bias = p[f"{name}.relative_position_bias_table"][apart[..., 0] * (2 * window - 1) + apart[..., 1]]
        qkv = linear(y.flatten(1, 2), f"{name}.qkv").unflatten(-1, (3, HEADS[stage], -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias.permute(2, 0, 1)
        weights = scores.masked_fill(~together, -torch.inf).softmax(-1)
        return linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.proj").reshape(y.shape)

    x = F.conv2d(image, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=2).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    if eq.add_to_input:
        x = x + p["pos_embed"]
    for i in range(4):
        name = layer_name(i)
        if i >= 2:
            x = merge(x, STAGE[i])
        if i in eq.stream:
            x = x + follow(eq.stream[i])
        y = norm(x, f"{name}.norm1")
        if i in eq.layers:
            y = y + follow(eq.layers[i])
        x = x + attention(y, i)
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    y = norm(x, "norm")
    if eq.last is not None:
        y = y + norm(follow(eq.last), "norm", "pos_")
    return linear(y.mean((1, 2)), "head.fc")


@pytest.mark.parametrize("scheme", EQUATIONS)
def test_scheme_is_its_equations(scheme, backend, device):
    """Logits and the gradient of every parameter; no parameter is left without one."""
    dtype = torch.float32 if backend in ("triton", "cuda") else torch.float64
    tolerance = dict(rtol=1e-3, atol=2e-4) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-11)
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


def test_backends_train_alike(backend, device):
    """Two steps with stochastic depth."""

    def losses(backend):
        torch.manual_seed(3)
        model = build(drop_path_rate=0.4).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        image, target, out = images(2, device=device), torch.arange(2, device=device), []
        with mk.use_backend(backend):
            for _ in range(2):
                loss = F.cross_entropy(model(image), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                out.append(loss.item())
        return out

    torch.testing.assert_close(losses(backend), losses("reference"), rtol=1e-5, atol=0)


def shapes(name, **kwargs):
    with torch.device("meta"):
        return {k: v.shape for k, v in timm.create_model(name, **kwargs).state_dict().items()}


def test_parameters():
    """The paper's count by default; a scheme adds exactly the LNs of the PEs that it has."""
    default = shapes(TINY, scheme="default")
    assert sum(shape.numel() for shape in default.values()) == 28_589_410
    blocks = [f"layers.{i}.blocks.{j}.norm1" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)]
    for scheme, norms in (("gap_last", ["norm"]), ("lape", blocks), ("pvg", blocks), ("mpvg", [*blocks, "norm"])):
        added = {f"{n}.pos_{kind}": default[f"{n}.weight"] for n in norms for kind in ("weight", "bias")}
        assert shapes(TINY, scheme=scheme) == default | added
    own = shapes(TINY, scheme="lape(join=unshare)")
    grids = [(56, 96)] * 2 + [(28, 192)] * 2 + [(14, 384)] * 6 + [(7, 768)] * 2
    assert own == default | {f"layer_pos_embed.{i}": (1, g, g, d) for i, (g, d) in enumerate(grids) if i}


def test_registered_sizes():
    names = [f"mpvg_swin_{size}_patch4_window7_224" for size in ("base", "small", "tiny")]
    assert timm.list_models("mpvg_swin_*") == names
    for name in names:
        ours, theirs = shapes(name, scheme="gap"), shapes(name.removeprefix("mpvg_"))
        assert ours == theirs | {"pos_embed": (1, 56, 56, theirs["patch_embed.norm.weight"][0])}
        cfg, theirs = (timm.get_pretrained_cfg(n).to_dict() for n in (name, name.removeprefix("mpvg_")))
        assert not cfg["url"]
        for key in ("input_size", "pool_size", "crop_pct", "mean", "std", "interpolation", "classifier", "first_conv"):
            assert cfg[key] == theirs[key]


# ---- scheme="gap" is timm's Swin

OPTIONS = {
    "plain": {},
    "stochastic depth": dict(drop_path_rate=0.4),
    "all dropouts": dict(drop_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2),
    "no bias, head size": dict(qkv_bias=False, head_dim=6, mlp_ratio=2.5),
    "padded, not square": dict(img_size=(16, 12), window_size=4),
    "always partition": dict(always_partition=True, window_size=(4, 2)),
    "masks on the way": dict(strict_img_size=False),
    "eps, norms without bias": dict(norm_layer=partial(nn.LayerNorm, eps=1e-3, bias=False)),
    "jax init": dict(weight_init="jax"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_gap_is_timms_swin_bit_for_bit(options, training):
    torch.manual_seed(1)
    ours = build("default", **options)
    table = torch.zeros_like(ours.pos_embed, requires_grad=True)
    torch.manual_seed(1)
    theirs = timms(table, **options)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), f"{name} starts elsewhere"
    randomise(ours)
    state = ours.state_dict()
    table.data.copy_(state.pop("pos_embed"))
    theirs.load_state_dict(state)
    image = images(3, options.get("img_size", (16, 16)))
    with mk.use_backend("reference"):
        out, grads = outputs_and_grads(ours.train(training), image)
        expected, expected_grads = outputs_and_grads(theirs.train(training), image)
    assert torch.equal(out, expected)
    assert torch.equal(grads.pop("pos_embed"), table.grad)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(indices=2, norm=True),
        dict(indices=[0, -2]),
        dict(indices=[1], stop_early=True),
        dict(indices=[0, 1], stop_early=True, norm=True, intermediates_only=True),
    ],
    ids=str,
)
def test_forward_intermediates_are_timms(arguments):
    ours = randomise(build("gap")).eval()
    theirs = timms(ours.pos_embed)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "pos_embed"})
    with mk.use_backend("reference"):
        image = images()
        expected = theirs.eval().forward_intermediates(image, **arguments)
        torch.testing.assert_close(ours.forward_intermediates(image, **arguments), expected, rtol=0, atol=0)


# ---- forward, forward_features, forward_head


@pytest.mark.parametrize("scheme", ["gap", "mpvg(last=2)"])
def test_forward_is_head_of_features(scheme, backend, device):
    model = randomise(build(scheme)).to(device).eval()
    image = images(device=device)
    features = model.forward_features(image)
    assert features.shape == (2, 2, 2, 64)
    torch.testing.assert_close(model(image), model.forward_head(features), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.forward_head(features, pre_logits=True), features.mean((1, 2)), rtol=1e-4, atol=1e-4
    )
    final, (last,) = model.forward_intermediates(image, indices=1, norm=True)
    torch.testing.assert_close(final, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, features.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


def test_forward_pools_in_the_norm():
    model = build()
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(images())
    assert seen == [(2, 64)]


def test_autocast_rounds_a_pe_once_a_merging():
    """The stream has timm's dtypes; a PE, which is chained through every layer, keeps its own."""
    model, seen = build(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((output[0].dtype, output[3].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)] * 2 + [(torch.bfloat16, torch.float32)] * 2


class CountPlain(TorchDispatchMode):
    """Counts PyTorch's own LayerNorms, and its additions of whole token tensors of any stage."""

    def __init__(self):
        super().__init__()
        self.adds = self.norms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.adds += out.shape in [(2, g, g, d) for g, d in zip(GRIDS, WIDTHS, strict=True)]
        self.norms += func is torch.ops.aten.native_layer_norm.default
        return out


@needs_cpp
@pytest.mark.parametrize(
    ("scheme", "call", "adds"),
    [
        ("mpvg", "forward", 1 + 2),
        ("lape_gap", "forward", 2),
        ("mpvg", "forward_features", 1 + 2),
        ("mpvg", "checkpointed", 1 + 4),
        ("mpvg", "intermediates", 1 + 2 + 1),
    ],
)
def test_norms_and_residual_adds_are_fused(scheme, call, adds):
    """Additions of their own: x + pos, PatchMerging's input, checkpointed block ends, taken intermediates.

    The patch embedding has the only LayerNorm of its own.
    """
    model = build(scheme)
    model.set_grad_checkpointing(call == "checkpointed")
    with mk.use_backend("cpp"), CountPlain() as counter, torch.no_grad():
        if call == "intermediates":
            model.forward_intermediates(images(), indices=[0, 2])
        else:
            getattr(model, "forward" if call == "checkpointed" else call)(images())
    assert (counter.adds, counter.norms) == (adds, 1)


@pytest.mark.parametrize(
    ("scheme", "merged"),
    [
        ("gap", (2, 0)),
        ("mpvg", (2, 4)),
        ("pvg", (2, 2)),
        ("mpvg(hierarchical=False)", (2, 2)),
        ("lape_gap(join=unshare)", (2, 0)),
        ("lape_gap(first_layer=2, join=unshare)", (2, 1)),
    ],
)
def test_no_pe_is_merged_for_nothing(scheme, merged):
    """PatchMergings of (token tensors, PE tables): a table that serves layers and the last norm goes through once."""
    model, batches = build(scheme), []
    for stage in model.layers[1:]:
        stage.downsample.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    model(images())
    assert (batches.count(2), batches.count(1)) == merged


# ---- options of timm's users


@pytest.mark.parametrize("scheme", ["gap", "mpvg", "mpvg(last=2)", "lape_gap(join=unshare)"])
def test_checkpointing_changes_no_gradient(scheme):
    model = randomise(build(scheme, drop_path_rate=0.4))
    image = images(4)
    with mk.use_backend("reference"):
        out, grads = outputs_and_grads(model, image)
        model.zero_grad()
        model.set_grad_checkpointing()
        branches = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, inputs: branches.append(inputs[1]))
        again, grads_again = outputs_and_grads(model, image)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads_again, grads, rtol=1e-4, atol=1e-4)
    assert branches == [None] * 8, "a block was given two tensors, so that both are kept for its second run"


@pytest.mark.parametrize("scheme", ["gap", "mpvg", "lape_gap(join=unshare)"])
def test_features_only(scheme):
    torch.manual_seed(0)
    features = build(scheme, features_only=True, out_indices=(0, 1)).eval()
    torch.manual_seed(0)
    model = build(scheme).eval()
    image = images()
    assert features.feature_info.channels() == [16, 32]
    assert features.feature_info.reduction() == [2, 4]
    maps = features(image)
    assert [m.shape for m in maps] == [(2, 16, 8, 8), (2, 32, 4, 4)]
    torch.testing.assert_close(maps, model.forward_intermediates(image, indices=[0, 1], intermediates_only=True))
    assert len(features.model.layers) == 2
    assert sorted(features.model.layer_pos_embed) == (["1", "2"] if "unshare" in scheme else [])
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in features.parameters())


def test_pruning():
    model = randomise(build()).eval()
    image = images()
    expected = model.forward_intermediates(image, indices=[1, 2], norm=True, intermediates_only=True)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    assert model.forward_head(model.forward_features(image)).shape == (2, 2, 2, 64)
    torch.testing.assert_close(
        model.forward_intermediates(image, indices=[1, 2], norm=True, intermediates_only=True), expected
    )
    model.prune_intermediate_layers([1], prune_norm=True)
    torch.testing.assert_close(model(image), expected[0].permute(0, 2, 3, 1))


def test_reset_classifier():
    model, image = build(), images()
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    model.reset_classifier(0)
    assert model(image).shape == (2, 64)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, 2, 2, 64)
    model.reset_classifier(3, "avg")
    assert model(image).shape == (2, 3)
    assert build(num_classes=0, global_pool="")(image).shape == (2, 2, 2, 64)
    with pytest.raises(ValueError, match="global_pool='max' contradicts position scheme mpvg, which pools 'avg'"):
        model.reset_classifier(3, "max")


def test_weight_decay_and_layer_groups():
    model = build("lape(join=unshare)")
    tables = {"pos_embed", *(f"layer_pos_embed.{i}" for i in (1, 2, 3))}
    names = dict(model.named_parameters())
    biases = {n for n in names if n.endswith("relative_position_bias_table")}
    assert model.no_weight_decay() == tables | biases
    decayed = {
        id(p)
        for group in param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
        for p in group["params"]
        if group["weight_decay"]
    }
    assert all((id(p) in decayed) == (p.ndim > 1 and k not in tables | biases) for k, p in names.items())
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert (
        {scale[id(names[t])] for t in tables} == {scale[id(names["patch_embed.proj.weight"])]} == {min(scale.values())}
    )
    coarse = model.group_matcher(coarse=True)
    assert all(re.match(coarse["stem"], t) and not re.match(coarse["blocks"], t) for t in tables)


@pytest.mark.parametrize("backend_name", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_compiles_without_graph_breaks(backend_name):
    torch._dynamo.reset()
    model = randomise(build("mpvg(last=2)", drop_path_rate=0.1))
    image = images(3)
    with mk.use_backend(backend_name):
        out, grads = outputs_and_grads(model, image)
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        again, grads_again = outputs_and_grads(model, image, lambda _, x: compiled(x))
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads_again, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend_name", "strict"), [("reference", False), pytest.param("cpp", True, marks=needs_cpp)])
def test_exports(backend_name, strict):
    model = build().eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad(), mk.use_backend(backend_name):
        program = torch.export.export(model, (images(),), dynamic_shapes=({**batch},), strict=strict)
        image = images(5)
        torch.testing.assert_close(program.module()(image), model(image))


# ---- sizes


def resized(table, grid):
    return F.interpolate(table.permute(0, 3, 1, 2), grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


@pytest.mark.parametrize("scheme", ["gap", "mpvg", "mpvg(first_layer=1, last=1, join=unshare)"])
@pytest.mark.parametrize("size", [(32, 8), (20, 12)])
def test_other_input_sizes(scheme, size):
    """set_input_size resamples every table to its stage's grid, and dynamic_img_size does so on the way.

    32x8 has as many patches as the 16x16 that the model was built for; 20x12 pads windows and PatchMergings.
    """
    windows = {"window_size": (2, 2, 1)}
    model = randomise(build(scheme, **windows)).eval()
    dynamic = build(scheme, dynamic_img_size=True, **windows).eval()
    dynamic.load_state_dict(model.state_dict())
    torch.testing.assert_close(dynamic(square := images()), model(square))
    before = {k: v.clone() for k, v in model.state_dict().items() if "pos_embed" in k}
    model.set_input_size(size, **windows)
    grid, stages = (size[0] // 2, size[1] // 2), {}
    for stage in range(3):
        stages[stage] = grid
        grid = tuple((side + 1) // 2 for side in grid)
    for name, table in before.items():
        stage = 0 if name == "pos_embed" else STAGE[int(name[-1])]
        torch.testing.assert_close(model.state_dict()[name], resized(table, stages[stage]))
    image = images(size=size)
    torch.testing.assert_close(model(image), dynamic(image))
    assert dynamic.forward_intermediates(image, [1])[1][0].shape == (2, 32, *stages[1])
    if scheme == "gap":
        theirs = timms(resized(before["pos_embed"], stages[0]), dynamic_img_size=True, **windows)
        theirs.load_state_dict({k: v for k, v in dynamic.state_dict().items() if k != "pos_embed"})
        torch.testing.assert_close(dynamic(image), theirs.eval()(image))


def test_a_size_that_is_set_is_kept():
    """No table changes where no grid does; other options of timm's pass through, and a frozen table stays frozen."""
    model = build("lape(join=unshare)")
    tables = [model.pos_embed, *model.layer_pos_embed.values()]
    model.pos_embed.requires_grad_(False)
    model.set_input_size((16, 16), window_size=2)
    assert all(a is b for a, b in zip(tables, [model.pos_embed, *model.layer_pos_embed.values()], strict=True))
    assert model.blocks[0].window_size == (2, 2)
    model.set_input_size(patch_size=4)
    assert model.pos_embed.shape == (1, 4, 4, DIM) and not model.pos_embed.requires_grad
    assert model.layer_pos_embed["3"].shape == (1, 1, 1, 64) and model.layer_pos_embed["3"].requires_grad
    assert model(images()).shape == (2, CLASSES)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: build(img_size=21),
            r"image of 21x21: patches of 2x2 do not divide it; nearest valid size: 20x20 or 22x22",
        ),
        (lambda: build(img_size=(16, 1)), "image of 16x1: patches of 2x2 do not divide it; nearest valid size: 16x2$"),
        (lambda: build().set_input_size((16, 17)), "image of 16x17: .* nearest valid size: 16x16 or 16x18"),
        (lambda: build().set_input_size(patch_size=(4, 3)), "patches of 4x3 do not divide it; .* 16x15 or 16x18"),
        (
            lambda: build()(images(size=(16, 18))),
            r"image of 16x18: this model takes 16x16; call set_input_size\(img_size\)",
        ),
        (lambda: build(dynamic_img_size=True)(images(size=(17, 18))), "image of 17x18: .* size: 16x18 or 18x18"),
    ],
)
def test_refused_sizes(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# ---- state


def test_copies():
    model = randomise(build("lape(join=unshare)")).eval()
    image = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.scheme == model.scheme
        assert torch.equal(twin(image), model(image))


@pytest.mark.parametrize(
    "scheme", ["mpvg", "mpvg(first_layer=1, last=1, join=unshare)", {"name": "lape", "join": "share"}]
)
def test_a_saved_folder_reads_back(scheme, tmp_path):
    """Scheme, size and windows included; 1x5 windows have as many biases as 2x2 ones, and are not taken for them."""
    model = randomise(build(scheme)).eval()
    model.set_input_size((24, 40), window_size=((2, 14), (3, 5), (1, 5)))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert twin.scheme == model.scheme
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    image = images(size=(24, 40))
    assert torch.equal(twin(image), model(image))


def test_initialisation():
    model = build("lape(join=unshare)")
    for table in (model.pos_embed, *model.layer_pos_embed.values()):
        assert 0.015 < table.std() < 0.025
    model = build("mpvg", device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    model = model.to_empty(device="cpu")
    model.init_weights()
    assert (model.norm.pos_weight == 1).all() and (model.blocks[1].norm1.pos_bias == 0).all()
    assert model(images(dtype=torch.float64)).isfinite().all()
    assert (build(weight_init="skip").pos_embed == 0).all()


# ---- checkpoints


def microsoft(weights: dict, table: torch.Tensor | None = None) -> dict:
    """timm's parameters as the original code names them: its PatchMerging ends a stage, and its head has no fc."""
    out = {
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.ones(2),
    }
    for name, value in weights.items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        out[name.replace("head.fc.", "head.")] = value
    return {"model": out if table is None else {**out, "absolute_pos_embed": table}}


@pytest.mark.parametrize("naming", [dict, microsoft])
def test_checkpoint_without_a_table(naming, caplog):
    weights = randomise(timms()).state_dict()
    model = randomise(build())
    table = model.pos_embed.detach().clone()
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        load_weights(model, naming(weights))
    assert caplog.messages == [
        "Converted a checkpoint to position scheme mpvg: found no PE table and left the model's own; 5 PE LayerNorms "
        "start at the identity."
    ]
    assert torch.equal(model.pos_embed, table)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert (model.blocks[3].norm1.pos_weight == 1).all() and (model.norm.pos_bias == 0).all()


def test_microsofts_absolute_table(caplog):
    weights = randomise(timms(window_size=4)).state_dict()
    table = torch.randn(1, 48, DIM)
    model = build("gap", img_size=(16, 20), window_size=2)
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        load_weights(model, microsoft(weights, table), grid=(6, 8))
    assert caplog.messages == ["Converted a checkpoint to position scheme gap: resampled pos_embed from 6x8 to 8x10."]
    torch.testing.assert_close(model.pos_embed, resized(table.unflatten(1, (6, 8)), (8, 10)))
    expected = timm_filter(weights, timms(window_size=2))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_own_checkpoint_of_another_size(caplog):
    """Its tables say their grids: 8x8 and 16x4 have as many rows."""
    model, other = randomise(build("lape(join=unshare)")), build("lape(join=unshare)", img_size=(32, 8))
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        load_weights(other, model.state_dict())
        assert "resampled pos_embed from 8x8 to 16x4; resampled layer_pos_embed.1" in caplog.messages[0]
        torch.testing.assert_close(other.layer_pos_embed["2"], resized(model.layer_pos_embed["2"], (8, 2)))
        load_weights(twin := build("lape(join=unshare)"), model.state_dict())
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("weights", "problems"),
    [
        (
            lambda: timms(depths=(2, 1, 2)).state_dict(),
            r"13 unexpected \(layers.2.blocks.1.norm1.weight \(64,\), .*; build the model with depths=\(2, 1, 2\) to",
        ),
        (
            lambda: timms(num_classes=3).state_dict(),
            r"2 mis-shaped \(head.fc.weight \(3, 64\), expected \(5, 64\), head.fc",
        ),
        (lambda: timms(embed_dim=32).state_dict(), r"mis-shaped \(patch_embed.proj.weight \(32, 3, 2, 2\), expected"),
        (
            lambda: build("pvg").state_dict(),
            r"2 missing \(norm.pos_weight \(\d+,\), norm.pos_bias \(\d+,\)\); build .* a position scheme "
            r"with PE LayerNorms in .* only to take them",
        ),
        (lambda: build("lape(join=unshare)").state_dict(), r"3 unexpected \(layer_pos_embed.1 \(1, 8, 8, 16\), "),
    ],
)
def test_weights_of_another_model(weights, problems):
    with pytest.raises(ValueError, match=r"another model than this one \(position scheme mpvg, depth 4.*" + problems):
        load_weights(build(), weights())


def test_timm_loads_through_the_filter(tmp_path):
    """A weight file of the original given to timm's factory: the grid is taken from timm's record."""
    weights, table = randomise(timms()).state_dict(), torch.randn(1, 64, DIM)
    torch.save(microsoft(weights, table), tmp_path / "swin.pth")
    overlay = dict(file=str(tmp_path / "swin.pth"), input_size=(3, 16, 16), num_classes=CLASSES)
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "img_size": 32})
    torch.testing.assert_close(model.pos_embed, resized(table.unflatten(1, (8, 8)), (16, 16)))
    assert torch.equal(model.head.fc.weight, weights["head.fc.weight"])


# ---- refused


@pytest.mark.parametrize(
    ("scheme", "kwargs", "message"),
    [
        ("mpgv", {}, r"unknown position scheme 'mpgv' \(did you mean mpvg or pvg\?\)"),
        ("lape(pool=token)", {}, "pool='token', but Swin has no class token"),
        (PositionScheme.parse("lape"), {}, "pool='token', but Swin has no class token"),
        (
            "mpvg",
            dict(global_pool="max"),
            "global_pool='max' contradicts position scheme mpvg, which pools 'avg' in Swin",
        ),
        ("mpvg", dict(norm_layer="rmsnorm"), "norm_layer='rmsnorm' makes RmsNorm"),
        ("mpvg", dict(norm_layer=partial(nn.LayerNorm, elementwise_affine=False)), "LayerNorm with learned scale only"),
        ("mpvg(last=4)", {}, r"mpvg\(last=4\): last=4, but a model of depth 4 has layers 0 to 3"),
        ("mpvg(join=share)", {}, "would add a table to the same tokens twice; set add_to_input=False or first_layer=1"),
    ],
)
def test_refused_options(scheme, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(scheme, **kwargs)


def test_refused_output_format():
    with pytest.raises(ValueError, match="output_fmt='NLC'; expected 'NCHW'"):
        build().forward_intermediates(images(), output_fmt="NLC")


def test_no_pretrained_weights():
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {TINY}. Use `pretrained=False`"):
        timm.create_model(TINY, pretrained=True)
