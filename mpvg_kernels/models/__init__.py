"""Vision transformers whose position embedding travels by a `PositionScheme`; importing this registers them in timm."""

from .mpvg_deit import MPVGVisionTransformer, checkpoint_filter_fn, load_weights
from .position_scheme import NAMED_SCHEMES, PositionScheme

__all__ = ["NAMED_SCHEMES", "MPVGVisionTransformer", "PositionScheme", "checkpoint_filter_fn", "load_weights"]
