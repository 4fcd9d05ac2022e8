"""mpvg_kernels: fused kernels for vision transformers with position embeddings, and MPVG models on them."""

__version__ = "0.1.0"

from . import backends, models  # (models: registers the models in timm)
from .backends import BackendUnavailableError, available_backends, show_config, use_backend
from .functional import PELayerNormOutput, pe_chain, pe_layer_norm, pe_norm_pool
from .modules import FusedAddLayerNorm, FusedAddPELayerNorm, FusedPELayerNorm, FusedPELayerNormPool

backends.register_kernels()

__all__ = [
    "BackendUnavailableError",
    "FusedAddLayerNorm",
    "FusedAddPELayerNorm",
    "FusedPELayerNorm",
    "FusedPELayerNormPool",
    "PELayerNormOutput",
    "available_backends",
    "models",
    "pe_chain",
    "pe_layer_norm",
    "pe_norm_pool",
    "show_config",
    "use_backend",
]
