"""DeiT (arXiv 2012.12877) with any position scheme: sizes of `MPVGVisionTransformer` in timm's registry.

model = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg(last=8)", img_size=160, drop_path_rate=0.1)
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .factory import create, default_cfg
from .mpvg_vit import MPVGVisionTransformer

default_cfgs = generate_default_cfgs(
    {f"mpvg_deit_{size}_patch16_224": default_cfg() for size in ("tiny", "small", "base")}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MPVGVisionTransformer:
    return create(MPVGVisionTransformer, variant, pretrained, **{"patch_size": 16, "depth": 12, **kwargs})


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
