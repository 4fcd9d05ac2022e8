"""How the architectures enter timm's registry: their default configuration, and the call that builds a model."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

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


def create(architecture: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A registered name's model through timm's factory; kwargs are the architecture's options.

    Raises:
        RuntimeError: pretrained weights are asked for and neither a file nor a state dict is given.
    """
    if pretrained:
        _check_source(variant, kwargs)
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        architecture,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _check_source(variant: str, kwargs: dict[str, Any]) -> None:
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if not any((cfg.state_dict, cfg.file, cfg.url, cfg.hf_hub_id)):
        raise RuntimeError(
            f"No pretrained weights exist for {variant}. Use `pretrained=False`, start from the weights of a timm ViT "
            "by mpvg_kernels.models.from_timm(name, scheme=..., pretrained=True), or from a file by "
            "mpvg_kernels.models.load_checkpoint(model, path)"
        )
