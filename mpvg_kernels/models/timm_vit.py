"""Any of timm's ViTs with a position scheme, through one registered architecture, `mpvg_vit`.

    model = from_timm("vit_small_patch16_224", scheme="mpvg", pretrained=True, num_classes=10)

timm's registered functions keep their arguments to themselves, so they are read from the model that timm makes: every
module of `mpvg_vit`'s own must then be of the same class, with the same settings and shapes, or the model is refused by
what differs. The arguments are plain JSON: a model that is saved through timm's functions reads back through them.

timm's pooled ViTs have their last norm after the pool, position schemes before it: the same parameters, another place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any, Literal

import timm
import torch
from timm.layers import Attention, GluMlp, LayerNorm, Mlp, PatchDropout, PatchEmbed, SwiGLU, SwiGLUPacked
from timm.layers.create_act import get_act_layer
from timm.models import generate_default_cfgs, register_model
from timm.models._pretrained import filter_pretrained_cfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from .factory import create, default_cfg
from .mpvg_vit import MPVGVisionTransformer
from .patches import CheckedPatchEmbed
from .position_scheme import PositionScheme
from .weights import load_weights

__all__ = ["from_timm"]

MLPS = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "leaky_relu", "elu", "mish", "sigmoid", "tanh")

default_cfgs = generate_default_cfgs({"mpvg_vit": default_cfg()})


@register_model
def mpvg_vit(pretrained: bool = False, **kwargs: Any) -> MPVGVisionTransformer:
    """A ViT of any size with a position scheme, ViT-B/16 if no size is given.

    Args: MPVGVisionTransformer's, but that these are text or numbers, so that they are saved:
        norm_eps: LayerNorm's epsilon, in place of norm_layer.
        mlp_layer: "mlp", "swiglu" or "swiglu_packed".
    """
    norm_eps, mlp = kwargs.pop("norm_eps", None), kwargs.get("mlp_layer")
    if norm_eps is not None:
        kwargs["norm_layer"] = partial(LayerNorm, eps=norm_eps)
    if isinstance(mlp, str):
        if mlp not in MLPS:
            raise ValueError(f"mlp_layer={mlp!r}; expected one of {', '.join(MLPS)}")
        kwargs["mlp_layer"] = MLPS[mlp]
    return create(MPVGVisionTransformer, "mpvg_vit", pretrained, **kwargs)


def from_timm(
    name: str,
    scheme: str | dict[str, Any] | PositionScheme = "mpvg",
    *,
    pretrained: bool = False,
    new_pos_norms: Literal["identity", "zero"] = "identity",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> MPVGVisionTransformer:
    """The form that a timm VisionTransformer has under a position scheme.

    Registers, layer scale, qk-norm, SwiGLU, class tokens without a PE slot and the norm before the blocks are kept; the
    class token and the pool are the scheme's. timm's preprocessing stays in `pretrained_cfg`.

    Args:
        name: as timm.create_model takes it: "vit_small_patch16_224", with the tag of weights
            "vit_small_patch16_224.augreg_in1k", or "local-dir:folder".
        scheme: as MPVGVisionTransformer's.
        pretrained: load the weights that timm has for the name, converted as `load_weights` does.
        new_pos_norms: how the PE LayerNorms start then, see `checkpoint_filter_fn`.
        device, dtype: of the parameters.
        kwargs: options for timm.create_model: img_size, num_classes, drop_path_rate, pretrained_cfg_overlay, ...

    Raises:
        ValueError: there is no such model (nearest names listed), or it is none that a position scheme fits; one
            sentence says what is in the way.
    """
    arch = name.partition(".")[0]
    if ":" not in name and not timm.is_model(arch):  # timm itself reads "local-dir:..." and "hf-hub:..."
        near = difflib.get_close_matches(arch, timm.list_models(), 3, 0.6)
        advice = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; {advice}")
    if arch.startswith("mpvg_"):
        raise ValueError(f"{name} has a position scheme already: timm.create_model({name!r}, scheme=...)")
    with torch.device("meta"):
        source = timm.create_model(name, **kwargs)
    _check_kind(name, source)
    cfg = filter_pretrained_cfg(source.pretrained_cfg, remove_source=True, remove_null=True)
    cfg = {k: v for k, v in cfg.items() if k not in ("tag", "custom_load", "state_dict")} | {"architecture": "mpvg_vit"}
    args = _arguments(source) | {"scheme": str(PositionScheme.parse(scheme)), "pretrained_cfg": cfg}
    _check_alike(name, source, timm.create_model("mpvg_vit", **args, device="meta"))
    model = timm.create_model("mpvg_vit", **args, device=device, dtype=dtype)
    if pretrained:
        weights = timm.create_model(name, pretrained=True, **kwargs).state_dict()
        load_weights(model, weights, grid=source.patch_embed.grid_size, new_pos_norms=new_pos_norms)
    return model


def _refuse(name: str, why: str) -> None:
    raise ValueError(f"{name} has no form with a position scheme: {why}")


def _check_kind(name: str, source: nn.Module) -> None:
    """Refuse what the arguments cannot even be read from."""
    if type(source) is not VisionTransformer:
        _refuse(name, f"it is timm's {type(source).__name__}, and from_timm takes the class VisionTransformer only")
    if type(source.patch_embed) is not PatchEmbed:
        _refuse(name, f"patch_embed is {type(source.patch_embed).__name__}, where it needs PatchEmbed")
    for i, block in enumerate(source.blocks):
        if type(block) is not Block:
            _refuse(name, f"blocks.{i} is a {type(block).__name__}, where it needs the pre-norm Block")
    for part, norm in source.named_modules():
        is_norm = part.rpartition(".")[2] in ("norm", "norm1", "norm2", "fc_norm", "norm_pre")
        if is_norm and type(norm) not in (nn.LayerNorm, LayerNorm, nn.Identity):
            _refuse(name, f"{part} is {type(norm).__name__}, where the fused norms need LayerNorm")
    if source.pos_embed is None:
        _refuse(name, "it has no learned position embedding (pos_embed='none')")
    if source.attn_pool is not None:
        _refuse(name, "it pools by attention; global_pool='avg' leaves that out")
    for part, kinds in (("attn", (Attention,)), ("mlp", (Mlp, GluMlp, SwiGLU))):
        module = getattr(source.blocks[0], part)
        if type(module) not in kinds:
            needed = " or ".join(kind.__name__ for kind in kinds)
            _refuse(name, f"blocks.0.{part} is {type(module).__name__}, where it needs {needed}")


def _present(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _arguments(source: VisionTransformer) -> dict[str, Any]:
    """The arguments of `mpvg_vit` that make the parts of a timm model, without the scheme and defaults."""
    block, patches = source.blocks[0], source.patch_embed
    attn, mlp = block.attn, block.mlp
    first = mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1
    ratio = first.out_features / source.embed_dim
    if int(source.embed_dim * ratio) != first.out_features:  # a quotient rounded down
        ratio = math.nextafter(ratio, math.inf)
    args = {
        "img_size": patches.img_size,
        "patch_size": patches.patch_size[0] if len(set(patches.patch_size)) == 1 else patches.patch_size,
        "in_chans": source.in_chans,
        "num_classes": source.num_classes,
        "embed_dim": source.embed_dim,
        "depth": len(source.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": ratio,
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": _present(attn.q_norm),
        "scale_attn_norm": _present(attn.norm),
        "scale_mlp_norm": _present(mlp.norm),
        "proj_bias": attn.proj.bias is not None,
        "init_values": block.ls1.init_values if _present(block.ls1) else None,
        "no_embed_class": source.no_embed_class,
        "reg_tokens": source.num_reg_tokens,
        "pre_norm": _present(source.norm_pre),
        "final_norm": _present(source.norm) or _present(source.fc_norm),
        "pool_include_prefix": source.pool_include_prefix,
        "dynamic_img_size": source.dynamic_img_size,
        "dynamic_img_pad": patches.dynamic_img_pad,
        "drop_rate": source.head_drop.p,
        "pos_drop_rate": source.pos_drop.p,
        "patch_drop_rate": source.patch_drop.prob if isinstance(source.patch_drop, PatchDropout) else 0.0,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": getattr(source.blocks[-1].drop_path1, "drop_prob", 0.0),
        "weight_init": "skip" if source.weight_init_mode == "reset" else source.weight_init_mode,
        "fix_init": source.fix_init,
        "act_layer": next((n for n in ACTIVATIONS if type(mlp.act) is get_act_layer(n)), None),
        "mlp_layer": {Mlp: "mlp", SwiGLU: "swiglu", GluMlp: "swiglu_packed"}[type(mlp)],
        "norm_eps": block.norm1.eps,
    }
    defaults = {k: p.default for k, p in signature(VisionTransformer).parameters.items()}
    defaults |= {"act_layer": "gelu", "mlp_layer": "mlp", "norm_eps": LayerNorm(1).eps}
    return {k: v for k, v in args.items() if v != defaults[k] or k in ("img_size", "in_chans", "num_classes")}


def _check_alike(name: str, source: VisionTransformer, model: MPVGVisionTransformer) -> None:
    """Refuse a timm model with a part that `model`, made from its arguments, does not have as well."""
    found, made = dict(_parts(source)), dict(_parts(model))
    for part in sorted(found.keys() | made.keys()):
        if found.get(part) != made.get(part):
            _refuse(name, f"{part} is {found.get(part)}, and mpvg_vit can have {made.get(part)} there only")


def _parts(model: VisionTransformer) -> Iterator[tuple[str, str]]:
    """Every part that the scheme does not decide, by name: its class, its settings and the shapes of its parameters."""
    for name, module in model.named_modules():
        top = name.partition(".")[0]
        if top in ("", "blocks", "norm", "fc_norm", "layer_pos_embed", "pos_tables") and name.count(".") < 2:
            continue
        kind = "PatchEmbed" if type(module) is CheckedPatchEmbed else type(module).__name__
        if name.endswith((".norm1", ".norm2")) and name.count(".") == 2:
            kind, settings = "LayerNorm", {"eps": module.eps, "bias": module.bias is not None}
        else:
            plain = (bool, int, float, str, tuple)
            settings = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training"}
            settings["parameters"] = {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)}
        yield name, f"{kind} {settings}"
