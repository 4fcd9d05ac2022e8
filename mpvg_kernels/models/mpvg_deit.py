"""DeiT (arXiv 2012.12877) with any position scheme: sizes of `MPVGVisionTransformer` in timm's registry.

    model = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg(last=8)", img_size=160, drop_path_rate=0.1)
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .mpvg_vit import MPVGVisionTransformer
from .weights import checkpoint_filter_fn


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """DeiT's preprocessing. No weights are published for these models."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2502.02919",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"mpvg_deit_{size}_patch16_224": _cfg() for size in ("tiny", "small", "base")})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MPVGVisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        MPVGVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **kwargs},
    )


@register_model
def mpvg_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MPVGVisionTransformer:
    """DeiT-Ti (width 192, 3 heads) with a position scheme: 5,721,640 parameters under mpvg, 5,717,416 under default."""
    return _create("mpvg_deit_tiny_patch16_224", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def mpvg_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MPVGVisionTransformer:
    """DeiT-S (width 384, 6 heads) with a position scheme."""
    return _create("mpvg_deit_small_patch16_224", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def mpvg_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MPVGVisionTransformer:
    """DeiT-B (width 768, 12 heads) with a position scheme."""
    return _create("mpvg_deit_base_patch16_224", pretrained, **{"embed_dim": 768, "num_heads": 12, **kwargs})
