"""MPVG CeiT: schemes against their equations, batch statistics, published names, timm's contract, sizes, errors."""

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
from torch import nn

NAME = "mpvg_ceit_tiny_patch16_224"
SMALL = dict(img_size=(32, 48), embed_dim=24, depth=DEPTH, num_heads=2, num_classes=5)
# The last layer's LeFF makes patch tokens; with a class token nobody reads them.
UNREAD = f"blocks.{DEPTH - 1}.mlp."


def build(scheme="mpvg", **kwargs):
    return timm.create_model(NAME, scheme=scheme, **{**SMALL, **kwargs})


def images(batch=3):
    return torch.randn(batch, 3, 32, 48)


class Plain(Formula):
    """The stem; layers with LeFF on the patches; with a class token, LCA."""

    def __init__(self, model):
        super().__init__(model, eps=1e-6)

    def batch_norm(self, x, name):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (self.p[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def leff(self, y, name):
        k = int(self.eq.class_token)
        x = y[:, k:].mT.unflatten(2, (2, -1))  # two rows of patches
        x = F.gelu(self.batch_norm(self.conv(x, f"{name}.conv1"), f"{name}.bn1"))
        x = F.gelu(self.batch_norm(self.conv(x, f"{name}.conv2", padding=1, groups=x.shape[1]), f"{name}.bn2"))
        x = self.batch_norm(self.conv(x, f"{name}.conv3"), f"{name}.bn3")
        return torch.cat([y[:, :k], x.flatten(2).mT], 1)

    def lca(self, class_tokens):
        x = torch.stack(class_tokens, 1) + self.p["lca.layer_embed"]
        q, k, v = self.linear(self.norm(x, "lca.norm1"), "lca.attn.qkv").chunk(3, -1)
        x = x[:, -1:] + self.attention(q[:, -1:], k, v, "lca.attn")
        return x + self.mlp(self.norm(x, "lca.norm2"), "lca.mlp")

    def __call__(self, image):
        x = self.batch_norm(self.conv(image, "patch_embed.proj.conv", stride=2, padding=3), "patch_embed.proj.bn")
        x = F.max_pool2d(x, 3, 2, 1)
        x = self.embed(self.conv(x, "patch_embed.proj.proj", stride=4).flatten(2).mT)
        class_tokens = []
        for i in range(DEPTH):
            x = self.attend(x, i)
            x = x + self.leff(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
            class_tokens.append(x[:, 0])
        return self.head(self.lca(class_tokens) if self.eq.class_token else x)


@pytest.mark.parametrize("scheme", EQUATIONS)
@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_scheme_is_its_equations(scheme, backend):
    unread = UNREAD if EQUATIONS[scheme].class_token else ""
    check_equations(randomise(build(scheme)).double(), Plain, images().double(), unread=unread)


@pytest.mark.parametrize("backend", SLOW, indirect=True)
def test_mpvg_is_its_equations_in_fp32(backend, device):
    check_equations(randomise(build("mpvg")).to(device), Plain, images().to(device))


@pytest.mark.parametrize(
    ("size", "scheme", "count"),
    [
        ("tiny", "default", 6_356_904),
        ("tiny", "mpvg", 5_913_960),
        ("small", "default", 24_204_840),
        ("base", "default", 94_405_416),
    ],
)
def test_parameter_counts(size, scheme, count):
    with torch.device("meta"):
        model = timm.create_model(f"mpvg_ceit_{size}_patch16_224", scheme=scheme)
    assert sum(p.numel() for p in model.parameters()) == count


def test_defaults():
    model = timm.create_model(NAME, scheme="lape(join=unshare)")
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["first_conv"]) == ((3, 224, 224), 0.875, "patch_embed.proj.conv")
    for table in (model.pos_embed, model.cls_token, *model.layer_pos_embed.values()):
        assert 0.015 < table.std() < 0.025
    assert not model.lca.layer_embed.any()
    assert {norm.eps for block in (*model.blocks, model.lca) for norm in (block.norm1, block.norm2)} == {1e-6}
    small = build("lape(join=unshare)")
    undecayed = {"cls_token", "pos_embed", *(f"layer_pos_embed.{i}" for i in (1, 2, 3))}
    check_parameter_groups(small, undecayed, ("norm.", "lca."))


def test_schemes_differ_in_nothing_else():
    check_scheme_differences(build, EQUATIONS, ("lca.",))


def test_running_statistics_are_used():
    model = randomise(build("mpvg")).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    image = images()
    torch.testing.assert_close(model(image)[1:], model(image[1:]))


def test_options_reach_class_attention():
    options = dict(mlp_ratio=2.0, qkv_bias=False, qk_norm=True, proj_bias=False, proj_drop_rate=0.1, attn_drop_rate=0.2)
    model = build("lape", **options)
    lca, block = model.lca, model.blocks[0]
    assert lca.mlp.fc1.weight.shape == (48, 24) and lca.mlp.fc1.bias is None and lca.mlp.drop1.p == 0.1
    assert repr(lca.attn).partition("(")[2] == repr(block.attn).partition("(")[2]
    torch.manual_seed(0)
    model = randomise(build("lape", qk_norm=True)).eval()
    image = images()
    model.lca.attn.q_norm.weight.data.mul_(-1)
    before = model(image)
    model.lca.attn.q_norm.weight.data.mul_(-1)
    assert not torch.allclose(model(image), before)


def published():
    """A checkpoint under the names of the published code."""
    torch.manual_seed(3)
    out, own = {}, randomise(build("default")).state_dict()
    for name, value in own.items():
        for ours, theirs in (
            ("patch_embed.proj.proj.", "i2t.proj."),
            ("patch_embed.proj.", "i2t.backbone."),
            ("lca.mlp.", "lca.feedforward."),
            ("lca.layer_embed", "pos_layer_embed"),
            (".mlp.conv", ".leff.conv"),
            (".mlp.bn", ".leff.bn"),
        ):
            name = name.replace(ours, theirs)
        out[name] = value
    assert {"i2t.backbone.conv.weight", "blocks.0.leff.bn2.running_var", "lca.feedforward.fc1.bias"} < set(out)
    return out, own


def test_published_weights(caplog):
    text = "dropped the class token and lca; dropped the class token's row of pos_embed"
    check_published_weights(build, *published(), caplog, text)


def test_timm_knows_the_grid_of_a_checkpoint(tmp_path):
    """The stem's weights do not say how many patches an image has; its stride does."""
    torch.save(published()[0], tmp_path / "ceit.pth")
    overlay = dict(file=str(tmp_path / "ceit.pth"), input_size=(3, 32, 48), num_classes=5)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "img_size": 64})
    assert model.pos_embed.shape == (1, 16, 24)


# ---- timm's contract


@pytest.mark.parametrize("scheme", ["default", "mpvg"])
def test_checkpointing(scheme):
    """Running statistics too: the second run of a layer must not count its batch again."""
    check_checkpointing(lambda **kwargs: build(scheme, **kwargs), images(4))


def test_compiles_and_exports():
    check_compiles(randomise(build("mpvg", depth=2)), images())
    check_exports(randomise(build("mpvg", depth=2)), images())
    check_exports(randomise(build("lape", depth=2)), images())


@pytest.mark.parametrize("scheme", ["default", "mpvg(last=2)", "lape(join=unshare)"])
def test_saved(scheme, tmp_path):
    model = randomise(build(scheme))
    model(images())  # running statistics of its own
    check_saved(model, images(), tmp_path)


def test_features():
    check_features(build, images(), 16)


def test_pruned_class_attention():
    """LCA reads the layers that are left, with the embeddings that they had; without the norm it is gone."""
    model = randomise(build("default")).eval()
    image = images()
    shallow = build("default", depth=2).eval()
    weights = model.state_dict() | {"lca.layer_embed": model.lca.layer_embed[:, :2]}
    shallow.load_state_dict({k: weights[k] for k in shallow.state_dict()})
    expected = shallow.forward_features(image)
    torch.testing.assert_close(model.forward_intermediates(image, [1], stop_early=True)[0], expected)
    model.prune_intermediate_layers([1])
    torch.testing.assert_close(model.forward_features(image), expected)
    model.prune_intermediate_layers([1], prune_norm=True)
    assert model.lca is None


def test_sizes():
    check_sizes(build, ("lape", "mpvg", "lape_gap(join=unshare)"), (32, 48), (96, 16), 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(img_size=225), "225x225: the sides must be multiples of 16 and 16; .* height 224 or 240"),
        (lambda: build(patch_size=8), "patch_size=8: this architecture's patches come from a stem of stride 16"),
        (lambda: build()(torch.randn(1, 3, 48, 32)), "48x32: this model is built for 32x48; resize the image"),
        (lambda: build("gap", patch_drop_rate=0.1), "patch_drop_rate=0.1: CeiT's LeFF convolves the whole grid"),
        (lambda: build(fix_init=True), "fix_init=True: CeiT's LeFF has BatchNorms"),
        (lambda: build(scale_mlp_norm=True), "scale_mlp_norm=True: LeFF has BatchNorms"),
    ],
)
def test_options_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
