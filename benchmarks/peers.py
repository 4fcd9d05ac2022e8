"""Other libraries' LayerNorms, made to do our operators' work, where they are installed.

None of them has a position embedding or a pool, so each is the plain formula of operators.py with its LayerNorm in the
place of PyTorch's; the add of the PE and the mean stay PyTorch's. flash-attention's also joins the residual branch with
its scale, so there the add is its own too.

    liger       liger-kernel           Triton
    flash_attn  flash-attention        Triton
    quack       quack-kernels          CuTe, Hopper and later
    apex        apex.normalization     CUDA
    apex_fast   apex.contrib           CUDA, for some widths only
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Peer(NamedTuple):
    """How a library normalises: y = norm(v, weight, bias, eps), and where it has one, (y, h) = add_norm(x, branch,
    scale, weight, bias, eps) with h = x + scale * branch."""

    norm: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]] | None = None


def _liger() -> Peer:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return Peer(LigerLayerNormFunction.apply)


def _flash_attn() -> Peer:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def add_norm(x, branch, scale, weight, bias, eps):
        rows = None if scale is None else scale[:, None].expand(x.shape[:2]).contiguous()
        return layer_norm_fn(branch, weight, bias, residual=x, eps=eps, rowscale=rows, prenorm=True)

    return Peer(lambda v, weight, bias, eps: layer_norm_fn(v, weight, bias, eps=eps), add_norm)


def _quack() -> Peer:
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class LayerNorm(torch.autograd.Function):
        """quack has both directions as functions of rows with fp32 weights, and no autograd around them."""

        @staticmethod
        def forward(ctx, v, weight, bias, eps):
            rows, w = v.reshape(-1, v.shape[-1]), weight.float()
            y, rstd, mean = layernorm_fwd(rows, w, bias.float(), eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(rows, w, rstd, mean)
            ctx.dtype = weight.dtype
            return y.view(v.shape)

        @staticmethod
        def backward(ctx, dy):
            rows, w, rstd, mean = ctx.saved_tensors
            dv, dw, db = layernorm_bwd(rows, w, dy.reshape(rows.shape), rstd, mean)
            return dv.view(dy.shape), dw.to(ctx.dtype), db.to(ctx.dtype), None

    return Peer(LayerNorm.apply)


def _apex() -> Peer:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return Peer(lambda v, weight, bias, eps: fused_layer_norm_affine(v, weight, bias, weight.shape, eps))


def _apex_fast() -> Peer:
    from apex.contrib.layer_norm.layer_norm import FastLayerNormFN

    return Peer(FastLayerNormFN.apply)


# name -> (the package that has to be installed, the import)
PEERS = {
    "liger": ("liger_kernel", _liger),
    "flash_attn": ("flash_attn", _flash_attn),
    "quack": ("quack", _quack),
    "apex": ("apex", _apex),
    "apex_fast": ("apex", _apex_fast),
}


def installed() -> list[str]:
    """The peers whose package is there (whether it works is found out when it is loaded)."""
    return [name for name, (package, _) in PEERS.items() if importlib.util.find_spec(package) is not None]


def load(name: str) -> Peer:
    """A peer's functions; ImportError, with a message, where it is not installed or does not import."""
    package, importer = PEERS[name]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")
    return importer()
