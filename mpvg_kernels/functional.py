"""The public functions: they check their arguments, settle the output dtype, choose the backend, and call the operator.

Every argument is checked here, once, before anything is allocated, so that each backend gives the same error and no
kernel sees an input that it can't read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .ops import pe_layer_norm as _pe_layer_norm
from .ops import pe_norm_pool as _pe_norm_pool
from .ops.common import Options, dense_rows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PELayerNormOutput(NamedTuple):
    """What `pe_layer_norm` returns."""

    y: Tensor
    """LN(h) + LN'(pos), the shape of x: what the next sub-layer reads."""
    stream: Tensor
    """h = x + branch_scale * branch, the residual stream; x itself without a branch."""
    pos: Tensor | None
    """LN'(pos) in pos's shape and dtype, what the next layer's `pos` is in MPVG; None without pos."""


def pe_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None = None,
    pos_weight: Tensor | None = None,
    pos_bias: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-6,
    pos_eps: float | None = None,
    num_prefix_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> PELayerNormOutput:
    """Dual LayerNorm with residual add, y = LN(x + branch_scale * branch) + LN'(pos), in one pass.

    The norm before each layer's self-attention in MPVG (arXiv 2502.02919).

    Args:
        x: (B, N, D), or (B, ..., D) with more token axes; fp32, bf16 or fp16 (fp64 on `reference` and `cpp`). Read
            without a copy when it is a (B, N, D) view with a contiguous last axis.
        weight: (D,), LN's scale; fp32 or x's dtype.
        bias: (D,) in weight's dtype, or None.
        pos: (N - num_prefix_tokens, D), the position embedding, with or without a leading axis of size 1 and with x's
            token axes; fp32 or x's dtype. None: a plain LayerNorm (with the residual add, if there is a branch).
        pos_weight: (D,), LN''s scale, needed with pos; fp32 or x's dtype.
        pos_bias: (D,) in pos_weight's dtype, or None.
        branch: x's shape, any of x's dtypes: the output of the previous sub-layer, added to x.
        branch_scale: (B,), floating point, without gradient: stochastic depth's factor for each sample.
        eps, pos_eps: LN's and LN''s epsilon; pos_eps defaults to eps.
        num_prefix_tokens: the first rows of x (class token, registers) that get no PE.
        out_dtype: y's dtype; else the autocast dtype under autocast, else the stream's.

    Returns:
        PELayerNormOutput(y, stream, pos). The stream has the promoted dtype of x and branch.

    Raises:
        ValueError: a shape or value that does not fit; TypeError: a dtype; both name the argument.
        BackendUnavailableError: the backend asked for can't run on x's device.
    """
    args = x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias
    args += eps, pos_eps, num_prefix_tokens, out_dtype
    outputs = _run_in_cpp("pe_layer_norm", args)
    if outputs is not None:
        return PELayerNormOutput._make(outputs)
    y, stream, pos_out = _run("pe_layer_norm", _pe_layer_norm, _pe_layer_norm.PELayerNormFunction, _prepare(*args))
    if x.dim() != 3:
        y, stream = y.view(x.shape), stream.view(x.shape)
    if pos is not None and pos.dim() != 2:
        pos_out = pos_out.view(pos.shape)
    return PELayerNormOutput(y, stream, pos_out)


def pe_norm_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None = None,
    pos_weight: Tensor | None = None,
    pos_bias: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-6,
    pos_eps: float | None = None,
    num_prefix_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The last LayerNorm with PE and global average pooling: mean_n(LN(h) + LN'(pos)), h = x + branch_scale * branch.

    Reads x once and writes (B, D) (MPVG, arXiv 2502.02919). The mean leaves the prefix tokens out.

    Args: as `pe_layer_norm`.

    Returns:
        (B, D) in out_dtype, else the autocast dtype under autocast, else h's dtype.

    Raises: as `pe_layer_norm`; ValueError also when there is no token to pool (N == num_prefix_tokens).
    """
    args = x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias
    args += eps, pos_eps, num_prefix_tokens, out_dtype
    out = _run_in_cpp("pe_norm_pool", args)
    if out is not None:
        return out
    args = _prepare(*args)
    if args[0].shape[1] == num_prefix_tokens:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has no token to pool: expected more than the "
            f"num_prefix_tokens={num_prefix_tokens}"
        )
    return _run("pe_norm_pool", _pe_norm_pool, _pe_norm_pool.PENormPoolFunction, args)


def _run_in_cpp(name: str, args: tuple):
    """Check and run an ordinary call in C++ (csrc/autograd.cpp); None where it is left to `_prepare` and `_run`."""
    x = args[0]
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    nodes, _ = backends.autograd_nodes()
    if nodes is None:
        return None
    backend = backends.resolve(x.device.type)
    return None if backend == "reference" else getattr(nodes, name)(*args, backend)


def _run(name: str, operator, function: type[torch.autograd.Function], args: tuple):
    """Call the operator on the chosen backend, through autograd only where a gradient can be asked for."""
    *tensors, options = args
    backend = options.backend
    if backend == "reference":
        return operator.reference(*args)
    outputs = _run_in_cpp(name, (*tensors, *options[:4]))  # what was not ordinary may be so now
    if outputs is not None:
        return outputs
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"torch.func transforms do not go through the fused kernels (backend {backend!r}); "
            "call under mpvg_kernels.use_backend('reference')"
        )
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors if t is not None]):
        return function.apply(*args)
    return operator.fused(*args)


def _prepare(
    x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, eps, pos_eps, num_prefix_tokens, out_dtype
) -> tuple:
    """Check the arguments; returns the operator's: x and branch as (B, N, D), pos as (K, D), the Options last."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    dtype, device, shape = x.dtype, x.device, x.shape
    if dtype not in _FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {dtype}")
    if len(shape) < 3:
        raise ValueError(f"x has shape {tuple(shape)}: expected (B, N, D), or (B, ..., D) with more token axes")
    if shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(shape)}: the last axis, D, must not be empty")
    vector = shape[-1:]

    _check_group("weight", weight, "bias", bias, vector, dtype, device)
    h_dtype = dtype
    if branch is not None:
        _check_tensor("branch", branch, device)
        if branch.shape != shape:
            raise ValueError(f"branch has shape {tuple(branch.shape)}: expected x's, {tuple(shape)}")
        if branch.dtype != dtype:
            h_dtype = torch.promote_types(dtype, branch.dtype)
            if branch.dtype not in _FLOATS or h_dtype == torch.float64:
                raise TypeError(f"branch has dtype {branch.dtype}, x {dtype}: both must be float64, or neither")
    if branch_scale is not None:
        _check_branch_scale(branch_scale, branch, x)

    tokens = shape[1]
    if len(shape) > 3:
        if num_prefix_tokens:
            raise ValueError(f"num_prefix_tokens={num_prefix_tokens} needs x of shape (B, N, D), not {tuple(shape)}")
        tokens = math.prod(shape[1:-1])
        x = x.reshape(shape[0], tokens, shape[-1])
        branch = None if branch is None else branch.reshape(x.shape)
    if not isinstance(num_prefix_tokens, int) or not 0 <= num_prefix_tokens <= tokens:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens!r}: expected an integer from 0 to N = {tokens}")

    if pos is not None:
        _check_tensor("pos", pos, device)
        expected = shape[1:] if num_prefix_tokens == 0 else (tokens - num_prefix_tokens, *vector)
        if pos.shape != expected:
            if pos.shape != (1, *expected):
                raise ValueError(
                    f"pos has shape {tuple(pos.shape)}: expected {tuple(expected)} or {(1, *expected)}"
                    f" for x of shape {tuple(shape)} with num_prefix_tokens={num_prefix_tokens}"
                )
        if pos.dim() != 2:
            pos = pos.reshape(tokens - num_prefix_tokens, shape[-1])
        if pos.dtype != dtype and (pos.dtype != torch.float32 or dtype == torch.float64):
            raise TypeError(f"pos has dtype {pos.dtype}: expected {_param_dtypes(dtype)}")
        if pos_weight is None:
            raise ValueError("pos is given without pos_weight, the scale of its LayerNorm: pass pos_weight (D,) too")
        _check_group("pos_weight", pos_weight, "pos_bias", pos_bias, vector, dtype, device)
    elif pos_weight is not None or pos_bias is not None:
        raise ValueError("pos_weight and pos_bias are given without pos: pass pos too, or neither")

    if pos_eps is None:
        pos_eps = eps
    try:
        valid = eps >= 0 and pos_eps >= 0
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"eps={eps!r}, pos_eps={pos_eps!r}: expected numbers of at least 0")

    device_type = device.type
    if out_dtype is None:
        out_dtype = h_dtype
        # (there is no autocast on "meta", not even to ask for)
        if device_type != "meta" and torch.is_autocast_enabled(device_type) and h_dtype != torch.float64:
            out_dtype = torch.get_autocast_dtype(device_type)
    elif out_dtype not in _FLOATS or (out_dtype == torch.float64) != (h_dtype == torch.float64):
        raise TypeError(f"out_dtype={out_dtype}: expected float32, bfloat16 or float16 (float64 for float64 inputs)")

    backend = backends.resolve(device_type)
    if dtype == torch.float64 and backend in ("triton", "cuda"):
        if backends.requested() != "auto":
            raise TypeError(f"x is float64: backend {backend!r} has float32, bfloat16 and float16; use 'reference'")
        backend = "reference"
    if backend != "reference":
        # Kernels step through x and branch by any row strides; the small tensors they read as they lie.
        x, branch = dense_rows(x), None if branch is None else dense_rows(branch)
        branch_scale, weight, bias, pos, pos_weight, pos_bias = [
            t if t is None or t.is_contiguous() else t.contiguous()
            for t in (branch_scale, weight, bias, pos, pos_weight, pos_bias)
        ]
    options = Options(eps, pos_eps, num_prefix_tokens, out_dtype, backend)
    return x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, options


def _check_tensor(name: str, t: Tensor, device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} and x on {device}: expected one device for all")


def _check_group(
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    vector: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """A LayerNorm's scale and shift: of shape `vector`, on x's device, in float32 or x's dtype, both in the same."""
    _check_tensor(name, weight, device)
    if weight.shape != vector:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: expected {tuple(vector)}, the width of x")
    if weight.dtype != dtype and (weight.dtype != torch.float32 or dtype == torch.float64):
        raise TypeError(f"{name} has dtype {weight.dtype}: expected {_param_dtypes(dtype)}")
    if bias is not None:
        _check_tensor(bias_name, bias, device)
        if bias.shape != vector:
            raise ValueError(f"{bias_name} has shape {tuple(bias.shape)}: expected {tuple(vector)}, the width of x")
        if bias.dtype != weight.dtype:
            raise TypeError(f"{bias_name} has dtype {bias.dtype}: expected {name}'s, {weight.dtype}")


def _check_branch_scale(branch_scale: Tensor, branch: Tensor | None, x: Tensor) -> None:
    if branch is None:
        raise ValueError("branch_scale is given without branch: pass the branch that it scales")
    _check_tensor("branch_scale", branch_scale, x.device)
    if branch_scale.shape != x.shape[:1]:
        raise ValueError(f"branch_scale has shape {tuple(branch_scale.shape)}: expected ({x.shape[0]},), one a sample")
    if branch_scale.dtype not in _FLOATS or (branch_scale.dtype == torch.float64 and x.dtype != torch.float64):
        raise TypeError(f"branch_scale has dtype {branch_scale.dtype}: expected float32 or x's dtype, {x.dtype}")
    if branch_scale.requires_grad:
        raise TypeError("branch_scale requires a gradient and can't have one: pass branch_scale.detach()")


def _param_dtypes(dtype: torch.dtype) -> str:
    return str(dtype) if dtype in (torch.float32, torch.float64) else f"torch.float32 or x's dtype, {dtype}"
