"""Vision transformers whose position embedding travels by a `PositionScheme`; importing this registers them in timm."""

from . import mpvg_ceit, mpvg_deit, mpvg_swin, mpvg_t2t_vit, mpvg_vit_lite, timm_vit  # noqa: F401  (register)
from .deformable_attention import DeformableAttention
from .dense import create_dense
from .fuse import fuse_norms
from .mask_rcnn import MaskRCNN
from .mpvg_swin import MPVGSwinTransformer, SwinPositionScheme
from .mpvg_vit import MPVGVisionTransformer
from .mpvg_vit_adapter import MPVGViTAdapter
from .position_scheme import NAMED_SCHEMES, PositionScheme
from .timm_vit import from_timm
from .upernet import UperNet, label_map, segmentation_loss
from .weights import checkpoint_filter_fn, load_checkpoint, load_weights

__all__ = [
    "NAMED_SCHEMES",
    "DeformableAttention",
    "MPVGSwinTransformer",
    "MPVGViTAdapter",
    "MPVGVisionTransformer",
    "MaskRCNN",
    "PositionScheme",
    "SwinPositionScheme",
    "UperNet",
    "checkpoint_filter_fn",
    "create_dense",
    "from_timm",
    "fuse_norms",
    "label_map",
    "load_checkpoint",
    "load_weights",
    "segmentation_loss",
]
