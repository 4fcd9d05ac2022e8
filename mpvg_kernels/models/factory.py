"""How the architectures enter timm's registry: their default configuration, and the call that builds a model."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from .mpvg_vit import MPVGVisionTransformer
from .weights import checkpoint_filter_fn


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """DeiT's preprocessing, changed by kwargs. No weights are published for models with a position scheme."""
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


def create(
    architecture: type[MPVGVisionTransformer], variant: str, pretrained: bool, **kwargs: Any
) -> MPVGVisionTransformer:
    """A registered name's model through timm's factory; kwargs are the architecture's options."""
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        architecture,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
