"""MPVG ViT-Lite: schemes against their equations, the published weights' names, timm's contract, sizes, errors."""

import pytest
import timm
import torch
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

NAME = "mpvg_vit_lite_7_4_32"
SMALL = dict(img_size=16, embed_dim=24, depth=DEPTH, num_heads=2, num_classes=5, attn_drop_rate=0.0, drop_path_rate=0.0)


def build(scheme="mpvg", **kwargs):
    return timm.create_model(NAME, scheme=scheme, **{**SMALL, **kwargs})


class Plain(Formula):
    """x = x + attn(LN1(x) + pos_l); x = LN2(x); x = x + mlp(x)."""

    def __init__(self, model):
        super().__init__(model, eps=1e-5)

    def __call__(self, image):
        x = self.embed(self.conv(image, "patch_embed.proj", stride=4).flatten(2).mT)
        for i in range(DEPTH):
            x = self.norm(self.attend(x, i), f"blocks.{i}.norm2")
            x = x + self.mlp(x, f"blocks.{i}.mlp")
        return self.head(x)


@pytest.mark.parametrize("scheme", EQUATIONS)
@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_scheme_is_its_equations(scheme, backend):
    check_equations(randomise(build(scheme)).double(), Plain, torch.randn(2, 3, 16, 16).double())


@pytest.mark.parametrize("backend", SLOW, indirect=True)
def test_mpvg_is_its_equations_in_fp32(backend, device):
    model = randomise(build("mpvg", img_size=(8, 12))).to(device)
    check_equations(model, Plain, torch.randn(2, 3, 8, 12, device=device))


@pytest.mark.parametrize(
    ("name", "scheme", "count"),
    [(NAME, "default", 3_740_004), (NAME, "mpvg", 3_743_076), ("mpvg_vit_lite_6_4_32", "default", 3_213_668)],
)
def test_parameter_counts(name, scheme, count):
    with torch.device("meta"):
        model = timm.create_model(name, scheme=scheme)
    assert sum(p.numel() for p in model.parameters()) == count


def test_defaults():
    """The published model's: CIFAR-100's preprocessing, dropout in attention, stochastic depth, wide PE, decayed PE."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, scheme="lape(join=unshare)")
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["crop_pct"]) == ((3, 32, 32), 100, 1.0)
    assert (cfg["mean"], cfg["std"]) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert model.blocks[3].attn.attn_drop.p == 0.1
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 6 for i in range(7)])
    assert not model.cls_token.any()
    for table in (model.pos_embed, *model.layer_pos_embed.values()):
        assert 0.19 < table.std() < 0.21
    assert {norm.eps for block in model.blocks for norm in (block.norm1, block.norm2)} == {model.norm.eps} == {1e-5}
    assert model.blocks[0].attn.qkv.bias is None
    check_parameter_groups(build("lape(join=unshare)"), {"cls_token"}, ("norm.",))


def test_schemes_differ_in_nothing_else():
    check_scheme_differences(build, EQUATIONS)


def published():
    """A checkpoint under the names of the published code."""
    torch.manual_seed(3)
    ours = randomise(build("default")).state_dict()
    names = {
        "cls_token": "classifier.class_emb",
        "pos_embed": "classifier.positional_emb",
        "patch_embed.proj.weight": "tokenizer.conv_layers.0.0.weight",
        "patch_embed.proj.bias": "tokenizer.conv_layers.0.0.bias",
        "norm.weight": "classifier.norm.weight",
        "norm.bias": "classifier.norm.bias",
        "head.weight": "classifier.fc.weight",
        "head.bias": "classifier.fc.bias",
    }
    parts = {"norm1": "pre_norm", "norm2": "norm1", "attn": "self_attn", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    for i in range(DEPTH):
        for part, theirs in parts.items():
            for end in ("weight", "bias", "qkv.weight", "proj.weight", "proj.bias"):
                names[f"blocks.{i}.{part}.{end}"] = f"classifier.blocks.{i}.{theirs}.{end}"
    return {names[k]: v for k, v in ours.items()}, ours


def test_published_weights(caplog):
    theirs, ours = published()
    check_published_weights(
        build, theirs, ours, caplog, "dropped the class token; dropped the class token's row of pos_embed"
    )
    model = build("default")
    load_weights(model, {"state_dict": {f"module.{k}": v for k, v in theirs.items()}})
    torch.testing.assert_close(model.state_dict(), ours, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_autocast_keeps_the_stream_wide(backend, device):
    """The second norm's output is the stream: in bf16 it would lose the small branches of later layers."""
    model = build("mpvg").to(device)
    outputs = []
    model.blocks[1].norm2.register_forward_hook(lambda module, inputs, output: outputs.extend(output))
    with torch.autocast(device, torch.bfloat16):
        model(torch.randn(2, 3, 16, 16, device=device))
    assert [y.dtype for y in outputs] == [torch.float32] * 2


def test_checkpointing():
    check_checkpointing(lambda **kwargs: build("mpvg(last=2)", **kwargs), torch.randn(4, 3, 16, 16))


def test_compiles_and_exports():
    image = torch.randn(3, 3, 16, 16)
    check_compiles(randomise(build("mpvg", depth=2)), image)
    check_exports(randomise(build("mpvg", depth=2)), image)


@pytest.mark.parametrize("scheme", ["default", "mpvg(last=2)", "lape(join=unshare)"])
def test_saved(scheme, tmp_path):
    check_saved(randomise(build(scheme)), torch.randn(2, 3, 16, 16), tmp_path)


def test_features():
    check_features(build, torch.randn(2, 3, 16, 16), 4)


def test_sizes():
    check_sizes(build, ("lape", "mpvg", "lape_gap(join=unshare)"), (16, 16), (32, 8), 4)


def test_sizes_that_do_not_fit():
    with pytest.raises(
        ValueError, match="30x33: the sides must be multiples of 4 and 4; .* height 28 or 32, width 32 or 36"
    ):
        build(img_size=(30, 33))
    model = build(dynamic_img_size=True)
    with pytest.raises(ValueError, match="image size 16x3: .* height 16, width 4"):
        model(torch.randn(1, 3, 16, 3))
    with pytest.raises(
        ValueError, match=r"32x8: this model is built for 16x16; resize the image, call set_input_size\(\(32"
    ):
        build()(torch.randn(1, 3, 32, 8))
    before = model.state_dict()
    for kwargs in (dict(img_size=(18, 16)), dict(patch_size=3)):
        with pytest.raises(ValueError, match=r"image size 1[68]x16: the sides must be multiples of (4 and 4|3 and 3)"):
            model.set_input_size(**kwargs)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
