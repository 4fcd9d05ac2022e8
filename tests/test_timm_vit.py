"""from_timm: the same parts and weights under a position scheme, saved and read back; what it refuses."""

import copy
import functools
import logging
from functools import partial

import pytest
import timm
import torch
from test_mpvg_vit import randomise
from timm.layers import GatedMlp, GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

import mpvg_kernels as mk
from mpvg_kernels.models import MPVGVisionTransformer, from_timm

SMALL = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=5)
NAME = "vit_tiny_patch16_224"

# What timm's registered ViTs differ in.
OPTIONS = {
    "plain": {},
    "registers": dict(reg_tokens=2),
    "dinov2": dict(reg_tokens=2, no_embed_class=True, init_values=0.1, mlp_layer=SwiGLUPacked, act_layer="silu"),
    "swiglu": dict(mlp_layer=SwiGLU, act_layer="silu", embed_dim=28, mlp_ratio=2.2, scale_mlp_norm=True),
    "qk_norm": dict(qk_norm=True, scale_attn_norm=True, qkv_bias=False, proj_bias=False),
    "clip": dict(pre_norm=True, norm_layer="layernorm", act_layer="quick_gelu", num_classes=0),
    "dynamic": dict(dynamic_img_size=True, dynamic_img_pad=True, img_size=(16, 24), in_chans=1),
    "rates": dict(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.5),
}


def weights_given(tmp_path, model) -> dict:
    """The arguments by which timm reads `model`'s weights as its own for NAME: there is no network here."""
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    size = (model.in_chans, *model.patch_embed.img_size)
    return dict(file=str(tmp_path / "weights.pth"), input_size=size, num_classes=model.num_classes)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_default_is_timms_model(options, tmp_path):
    """Under scheme="default" with the same weights the outputs are timm's, bit for bit, in training mode too."""
    args = {**SMALL, **options}
    theirs = randomise(timm.create_model(NAME, **args))
    overlay = weights_given(tmp_path, theirs)
    ours = from_timm(NAME, scheme="default", pretrained=True, pretrained_cfg_overlay=overlay, **args)
    assert type(ours) is MPVGVisionTransformer
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    image = torch.randn(2, theirs.in_chans, *theirs.patch_embed.img_size)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        with mk.use_backend("reference"):
            torch.manual_seed(1)
            expected = theirs(image)
            torch.manual_seed(1)
            assert torch.equal(ours(image), expected)


@pytest.mark.parametrize("options", [k for k in OPTIONS if k != "rates"])
def test_saved_folder_reads_back(options, tmp_path):
    model = randomise(from_timm(NAME, scheme="mpvg(last=2)", **{**SMALL, **OPTIONS[options]})).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.scheme == model.scheme
    image = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    theirs = timm.data.resolve_model_data_config(timm.create_model(NAME, device="meta"))
    ours = timm.data.resolve_model_data_config(again)
    assert [ours[k][0] for k in ("mean", "std")] == [theirs[k][0] for k in ("mean", "std")] == [0.5, 0.5]
    assert [ours[k] for k in ("crop_pct", "interpolation")] == [theirs[k] for k in ("crop_pct", "interpolation")]


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_base_patch16_clip_224.openai",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "vit_wee_patch16_reg1_gap_256",
    ],
)
def test_registered_names(name):
    """MPVG's parameters: timm's, without the class token (and its slot), plus a LayerNorm for each layer but the first
    and one for the last norm."""
    model = from_timm(name, device="meta")
    with torch.device("meta"):
        source = timm.create_model(name)
    own = {k: v.shape for k, v in source.named_parameters() if k != "cls_token"}
    own = {k.replace("fc_norm", "norm"): v for k, v in own.items()}
    if source.has_class_token and not source.no_embed_class:
        rows = own["pos_embed"][1]
        own["pos_embed"] = torch.Size((1, rows - 1, source.embed_dim))
    norms = [f"blocks.{i}.norm1" for i in range(1, len(source.blocks))] + ["norm"]
    own |= {f"{n}.pos_{k}": torch.Size((source.embed_dim,)) for n in norms for k in ("weight", "bias")}
    assert {k: v.shape for k, v in model.named_parameters()} == own


def test_weights_of_a_pooled_vit_start_as_its_function(tmp_path, caplog):
    """Without a class token and with the norm before the pool, an MPVG with its new LayerNorms at zero is the same."""
    args = dict(class_token=False, global_pool="avg", fc_norm=False)
    theirs = randomise(timm.create_model(NAME, **SMALL, **args)).eval()
    overlay = weights_given(tmp_path, theirs)
    make = lambda **kwargs: from_timm(  # noqa: E731
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **args, **kwargs
    ).eval()
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        model = make(new_pos_norms="zero")
    assert caplog.messages == ["Converted a checkpoint to position scheme mpvg: 3 PE LayerNorms start at zero."]
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(image), theirs(image))
    assert not torch.allclose(make()(image), theirs(image), atol=1e-3)
    model(image).square().sum().backward()
    assert model.norm.pos_bias.grad.any() and model.blocks[2].norm1.pos_bias.grad.any()


def test_a_folder_of_timms(tmp_path):
    theirs = randomise(timm.create_model(NAME, **SMALL)).eval()
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    model = from_timm(f"local-dir:{tmp_path}", scheme="default", pretrained=True).eval()
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(image), theirs(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            dict(name="vit_smal_patch16_224"),
            r"timm has no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_",
        ),
        (dict(name="zzz"), "timm has no model 'zzz'; see timm.list_models"),
        (dict(name="mpvg_deit_tiny_patch16_224"), "mpvg_deit_tiny_patch16_224 has a position scheme already"),
        (dict(name="resnet18"), "resnet18 has no form .*: it is timm's ResNet, .* the class VisionTransformer only"),
        (dict(name="deit_tiny_distilled_patch16_224"), "it is timm's VisionTransformerDistilled"),
        (
            dict(name="vit_small_patch16_18x2_224"),
            "blocks.0 is a ParallelThingsBlock, where it needs the pre-norm Block",
        ),
        (dict(name="vit_base_patch16_xp_224"), "blocks.0 is a ParallelScalingBlock"),
        (dict(name="vit_base_patch16_rpn_224"), "blocks.0 is a ResPostBlock"),
        (dict(norm_layer="rmsnorm"), "norm_pre|blocks.0.norm1 is RmsNorm, where the fused norms need LayerNorm"),
        (dict(pos_embed="none"), "it has no learned position embedding"),
        (dict(name="vit_base_patch16_siglip_224"), "it pools by attention; global_pool='avg' leaves that out"),
        (dict(name="vit_tiny_r_s16_p8_224"), "patch_embed is HybridEmbed, where it needs PatchEmbed"),
        (dict(attn_layer="diff"), "blocks.0.attn is DiffAttention, where it needs Attention"),
        (dict(mlp_layer=GatedMlp), "blocks.0.mlp is GatedMlp, where it needs Mlp or GluMlp or SwiGLU"),
        (dict(mlp_layer=partial(GluMlp, gate_last=True)), "blocks.0.mlp is GluMlp .*'gate_last': True.* mpvg_vit can"),
        (dict(embed_norm_layer="layernorm"), "patch_embed.norm is LayerNorm .* mpvg_vit can have Identity"),
        (dict(patch_drop_rate=0.1), "patch_drop_rate=0.1 drops other tokens in each sample"),
        (dict(scheme="mpgv"), r"unknown position scheme 'mpgv' \(did you mean mpvg"),
        (dict(img_size=18), "image size 18x18: the sides must be multiples of 4 .* height 16 or 20"),
    ],
)
def test_refused(call, message):
    own = call.get("name", NAME) == NAME
    with pytest.raises(ValueError, match=message):
        from_timm(**{"name": NAME, **(SMALL if own else {}), **call})


def test_a_part_that_differs_is_named(monkeypatch):
    """What the arguments do not tell is found by comparing the models, part by part."""
    original = VisionTransformer.__init__

    @functools.wraps(original)
    def odd(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is VisionTransformer:
            self.blocks[1].attn.scale = 2.0

    monkeypatch.setattr(VisionTransformer, "__init__", odd)
    with pytest.raises(ValueError, match=r"blocks.1.attn is Attention .*'scale': 2.0.* mpvg_vit can have Attention"):
        from_timm(NAME, **SMALL)


def test_default_size():
    model = timm.create_model("mpvg_vit", device="meta")
    assert (model.embed_dim, len(model.blocks), model.patch_embed.grid_size) == (768, 12, (14, 14))
    with pytest.raises(ValueError, match="mlp_layer='swigul'; expected one of mlp, swiglu, swiglu_packed"):
        timm.create_model("mpvg_vit", mlp_layer="swigul")
    assert copy.deepcopy(from_timm(NAME, **SMALL, dtype=torch.float64)).norm.weight.dtype == torch.float64
