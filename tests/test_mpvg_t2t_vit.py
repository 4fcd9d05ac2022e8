"""MPVG T2T-ViT: schemes against their equations, the fixed table, the performer, published names, sizes, errors."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from architectures import (
    FAST,
    SLOW,
    Formula,
    check_checkpointing,
    check_compiles,
    check_equations,
    check_exports,
    check_features,
    check_parameter_groups,
    check_published_weights,
    check_saved,
    check_scheme_differences,
    check_sizes,
    randomise,
)
from test_mpvg_vit import DEPTH, EQUATIONS

from mpvg_kernels.models import load_weights
from mpvg_kernels.models.mpvg_t2t_vit import TokenPerformer, sinusoid

NAME = "mpvg_t2t_vit_7_224"
SMALL = dict(img_size=(32, 48), embed_dim=24, depth=DEPTH, num_heads=2, num_classes=5, token_dim=8, token_drop_rate=0.0)
SCHEMES = [scheme for scheme in EQUATIONS if "unshare" not in scheme]


def build(scheme="mpvg", **kwargs):
    return timm.create_model(NAME, scheme=scheme, **{**SMALL, **kwargs})


def random_model(*args, **kwargs):
    """Random parameters; the features small enough that no exp() vanishes."""
    model = randomise(build(*args, **kwargs))
    for performer in (model.patch_embed.proj.attention1, model.patch_embed.proj.attention2):
        performer.kqv.weight.data.mul_(0.1)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 32, 48)


class Plain(Formula):
    """Soft splits, performers with every pair of tokens written out, a plain transformer."""

    def __init__(self, model):
        super().__init__(model, eps=1e-5)

    def performer(self, x, name):
        k, q, v = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.kqv").chunk(3, -1)
        w = self.p[f"{name}.features"]
        k, q = ((x @ w.T - (x * x).sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w)) for x in (k, q))
        weights = q @ k.mT
        y = v + self.linear(weights @ v / (weights.sum(-1, keepdim=True) + 1e-8), f"{name}.proj")
        return y + self.mlp(self.norm(y, f"{name}.norm2"), f"{name}.mlp")

    def soft_split(self, x, kernel, stride, padding):
        x = F.pad(x, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
        return x.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, H, W, C * kernel * kernel)

    def __call__(self, image):
        x = self.soft_split(image, 7, 4, 2)
        for name in ("attention1", "attention2"):
            tokens = self.performer(x.flatten(1, 2), f"patch_embed.proj.{name}")
            x = self.soft_split(tokens.unflatten(1, x.shape[1:3]).permute(0, 3, 1, 2), 3, 2, 1)
        x = self.embed(self.linear(x.flatten(1, 2), "patch_embed.proj.project"))
        for i in range(DEPTH):
            x = self.attend(x, i)
            x = x + self.mlp(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
        return self.head(x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_scheme_is_its_equations(scheme, backend):
    check_equations(random_model(scheme).double(), Plain, images().double())


@pytest.mark.parametrize("backend", SLOW, indirect=True)
def test_mpvg_is_its_equations_in_fp32(backend, device):
    model = random_model("mpvg", img_size=(32, 16)).to(device)
    check_equations(model, Plain, torch.randn(2, 3, 32, 16, device=device))


@pytest.mark.parametrize(
    ("depth", "scheme", "count"),
    [
        (7, "default", 4_310_222),
        (7, "mpvg", 4_313_294),
        (10, "default", 5_889_230),
        (12, "default", 6_941_902),
        (14, "default", 21_545_550),
        (19, "default", 39_177_422),
        (24, "default", 64_105_934),
    ],
)
def test_parameter_counts(depth, scheme, count):
    """The published models' counts, fixed features and table included."""
    with torch.device("meta"):
        model = timm.create_model(f"mpvg_t2t_vit_{depth}_224", scheme=scheme)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.blocks) == depth


def test_defaults():
    model = timm.create_model(NAME, scheme="default")
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["mean"]) == ((3, 224, 224), 0.9, (0.485, 0.456, 0.406))
    fixed = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", *(f"patch_embed.proj.attention{i}.features" for i in (1, 2))}
    performer = model.patch_embed.proj.attention1
    assert (performer.proj_drop.p, performer.mlp.drop1.p, performer.mlp.drop2.p) == (0.1, 0.0, 0.1)
    assert 0.015 < model.cls_token.std() < 0.025
    norms = [
        module for name, module in model.named_modules() if "norm" in name.rpartition(".")[2] and hasattr(module, "eps")
    ]
    assert {norm.eps for norm in norms} == {1e-5}
    assert len(norms) == 2 * 2 + 2 * 7 + 1
    check_parameter_groups(build("lape"), {"cls_token"}, ("norm.",))


def test_schemes_differ_in_nothing_else():
    check_scheme_differences(build, SCHEMES)


# ---- the fixed table


def written_out(positions, dim):
    """The sinusoid, one number at a time."""
    rows = [
        [(math.cos if j % 2 else math.sin)(pos / 10000 ** (2 * (j // 2) / dim)) for j in range(dim)]
        for pos in positions
    ]
    return torch.tensor([rows])


@pytest.mark.parametrize("weight_init", ["", "skip"])
@pytest.mark.parametrize(
    ("scheme", "kwargs", "positions"),
    [
        ("lape", {}, range(7)),
        ("mpvg", {}, range(1, 7)),
        ("default", dict(no_embed_class=True), range(1, 7)),
        ("default", dict(reg_tokens=2), [0, 0, 0, *range(1, 7)]),
    ],
)
def test_table_is_the_sinusoid(scheme, kwargs, positions, weight_init):
    """A patch has the same row in every scheme: position 0 is the class token's, there or not."""
    model = build(scheme, weight_init=weight_init, **kwargs)
    torch.testing.assert_close(model.pos_embed.data, written_out(positions, 24))
    load_weights(model, model.state_dict())
    model.set_input_size((64, 16))
    torch.testing.assert_close(model.pos_embed.data, written_out([*positions][:-6] + [1, 2, 3, 4], 24))
    assert not model.pos_embed.requires_grad
    model.pos_embed.data.zero_()
    model.init_weights()
    torch.testing.assert_close(model.pos_embed.data, written_out([*positions][:-6] + [1, 2, 3, 4], 24))


def test_table_of_many_patches():
    """In fp32 the angles of late positions would be off by 1e-4."""
    exact = written_out(range(1, 2000), 24).to(torch.float64)
    torch.testing.assert_close(sinusoid(1999, 0, 24), exact, rtol=0, atol=1e-7)


def test_unshared_tables_are_refused():
    with pytest.raises(ValueError, match="fixed sinusoid, so a table of each layer's own would be that table again"):
        build("lape(join=unshare)")


# ---- the performer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_performer_stays_in_fp32_under_autocast(dtype):
    """exp(W x - |x|^2 / 2) of tokens as large as fp16 can't square: finite, and near the fp32 result."""
    performer = TokenPerformer(12, 64, drop=0.0)
    performer.kqv.weight.data.normal_(std=20.0)
    performer.kqv.weight.data[128:].mul_(0.01)  # v
    x = torch.randn(2, 50, 12)
    # each key along a feature, where phi is largest: e^16 for the 32 features of length sqrt(32)
    performer.kqv.weight.data[:128] = 0
    performer.kqv.bias.data[:128] = performer.features[:2].flatten()
    expected = performer(x)
    with torch.autocast("cpu", dtype):
        found = performer(x)
    found.float().square().sum().backward()
    assert performer.norm1.weight.grad.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_features_are_orthogonal():
    for dtype in (torch.float32, torch.bfloat16):
        w = TokenPerformer(12, 64, dtype=dtype).features.float()
        torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.5)


def test_performer_drops():
    performer = TokenPerformer(12, 8)
    x = torch.randn(2, 50, 12)
    assert not torch.equal(performer(x), performer(x))
    performer.eval()
    assert torch.equal(performer(x), performer(x))


# ---- weights


def published():
    """A checkpoint under the names of the published code."""
    torch.manual_seed(3)
    names = {"patch_embed.proj.project": "tokens_to_token.project"}
    for i in (1, 2):
        ours, theirs = f"patch_embed.proj.attention{i}", f"tokens_to_token.attention{i}"
        names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("norm1", "norm2", "kqv", "proj")}
        names |= {f"{ours}.mlp.fc1": f"{theirs}.mlp.0", f"{ours}.mlp.fc2": f"{theirs}.mlp.2"}
        names[f"{ours}.features"] = f"{theirs}.w"
    out, own = {}, random_model("default").state_dict()
    for name, value in own.items():
        module, _, end = name.rpartition(".")
        out[names[name] if name in names else f"{names.get(module, module)}.{end}" if module else name] = value
    assert sum(k.startswith("tokens_to_token.") for k in out) == 2 * (2 * 6 + 1) + 2
    return out, own


def test_published_weights(caplog):
    theirs, own = published()
    check_published_weights(build, theirs, own, caplog, "dropped the class token; recomputed pos_embed for 2x3")
    # in the published files the weights are an EMA's of a model in DataParallel; another grid needs no record of theirs
    model = build("mpvg", img_size=64)
    load_weights(model, {"state_dict_ema": {f"module.{k}": v for k, v in theirs.items()}})
    torch.testing.assert_close(model.pos_embed, written_out(range(1, 17), 24))
    with pytest.raises(ValueError, match=r"pos_embed \(1, 7, 24\) of the checkpoint is not the sinusoid of width 24"):
        load_weights(model, {**theirs, "pos_embed": torch.randn(1, 7, 24)})


def test_qk_scale():
    """The published weights' attention: logits times embed_dim ** -0.5 for head width ** -0.5."""
    model = random_model("default", qk_scale=24**-0.5).double()
    plain = Plain(model)
    for i in range(DEPTH):
        plain.p[f"blocks.{i}.attn.qkv.weight"].data[:24] *= (1 / 2) ** 0.5
    image = images().double()
    torch.testing.assert_close(model(image), plain(image))
    with pytest.raises(ValueError, match="qk_scale=0.1 would be undone by qk_norm=True"):
        build(qk_scale=0.1, qk_norm=True)


# ---- timm's contract


def test_checkpointing():
    check_checkpointing(lambda **kwargs: build("mpvg(last=2)", **kwargs), images(4))


def test_compiles_and_exports():
    check_compiles(random_model("mpvg", depth=2), images(3))
    check_exports(random_model("mpvg", depth=2), images(3))


@pytest.mark.parametrize("scheme", ["default", "mpvg(last=2)"])
def test_saved(scheme, tmp_path):
    again = check_saved(random_model(scheme, qk_scale=0.1), images(), tmp_path)
    assert not again.pos_embed.requires_grad


def test_features():
    check_features(build, images(), 16)


def test_sizes():
    check_sizes(build, ("lape", "mpvg"), (32, 48), (96, 16), 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(img_size=225), "225x225: the sides must be multiples of 16 and 16; .* height 224 or 240"),
        (lambda: build(img_size=(8, 32)), "image size 8x32: .* height 16, width 32"),
        (lambda: build(patch_size=8), "patch_size=8: this architecture's patches come from a stem of stride 16"),
        (lambda: build().set_input_size(patch_size=8), "patch_size=8: this architecture's patches"),
        (lambda: build().set_input_size((40, 32)), "image size 40x32: .* height 32 or 48, width 32"),
        (lambda: build()(torch.randn(1, 3, 48, 32)), "48x32: this model is built for 32x48; resize the image"),
        (lambda: build(dynamic_img_size=True)(torch.randn(1, 3, 33, 32)), "image size 33x32: .* height 32 or 48"),
    ],
)
def test_sizes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
