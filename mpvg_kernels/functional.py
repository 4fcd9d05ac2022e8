"""The public functions: they check their arguments, settle the output dtype, choose the backend, and call the operator.

Every argument is checked here, once, before anything is allocated, so that each backend gives the same error and no
kernel sees an input that it can't read.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .ops import pe_chain as _pe_chain
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
    """LN'(pos) in pos's shape and dtype, what the next layer's `pos` is in MPVG; normed_pos itself where that is given,
    None where neither is."""


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
    normed_pos: Tensor | None = None,
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
        normed_pos: LN'(pos) itself, in place of pos, pos_weight and pos_bias and of pos's shape and dtype, where it is
            known already (`pe_chain`).
        eps, pos_eps: LN's and LN''s epsilon; pos_eps defaults to eps.
        num_prefix_tokens: the first rows of x (class token, registers) that get no PE.
        out_dtype: y's dtype; else the autocast dtype under autocast, else the stream's.

    Returns:
        PELayerNormOutput(y, stream, pos). The stream has the promoted dtype of x and branch.

    Raises:
        ValueError: a shape or value that does not fit; TypeError: a dtype; both name the argument.
        BackendUnavailableError: the backend asked for can't run on x's device.
    """
    args = x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, normed_pos
    args += eps, pos_eps, num_prefix_tokens, out_dtype
    outputs = _run_in_cpp("pe_layer_norm", args)
    if outputs is not None:
        return PELayerNormOutput._make(outputs)
    args = _prepare(*args)
    y, stream, pos_out = _run(_pe_layer_norm, _pe_layer_norm.PELayerNormFunction, args, in_cpp="pe_layer_norm")
    if x.dim() != 3:
        y, stream = y.view(x.shape), stream.view(x.shape)
    if normed_pos is not None:
        pos_out = normed_pos
    elif pos is not None and pos.dim() != 2:
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
    normed_pos: Tensor | None = None,
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
    args = x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, normed_pos
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
    return _run(_pe_norm_pool, _pe_norm_pool.PENormPoolFunction, args, in_cpp="pe_norm_pool")


def pe_chain(
    pos: Tensor,
    weights: Sequence[Tensor] | Tensor,
    biases: Sequence[Tensor] | Tensor | None = None,
    *,
    eps: float = 1e-6,
    hierarchical: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The position embeddings of all layers, pos_l = LN'_l(pos_{l-1}) with pos_{-1} = pos, in one pass.

    MPVG's and LaPE's layer-wise embeddings (arXiv 2502.02919): none depends on the image, so that a model can have them
    all before its first layer and give each to its layer as `pe_layer_norm`'s `normed_pos`. A row goes through all
    layers in the dtype of the arithmetic, without being rounded between them.

    Args:
        pos: (K, D), or with more axes before D, of which a first one of size 1 is dropped: (1, K, D), (H, W, D); fp32,
            bf16 or fp16 (fp64 on `reference` and `cpp`).
        weights: the scales of the L LayerNorms: L tensors (D,), or one (L, D); fp32 or pos's dtype.
        biases: their shifts, in the weights' dtype, all or none: L tensors (D,), or one (L, D), or None.
        eps: the epsilon of every LayerNorm.
        hierarchical: False: pos_l = LN'_l(pos), each from pos itself.
        out_dtype: the result's dtype, else pos's, also under autocast.

    Returns:
        (L, K, D), or (L, ..., D) with pos's axes. Take the layers apart by `unbind(0)`: the backward of L indexings
        makes L tensors of the whole size.

    Raises:
        ValueError: a shape or value that does not fit; TypeError: a dtype; both name the argument.
        BackendUnavailableError: the backend asked for can't run on pos's device.
    """
    if not isinstance(pos, Tensor):
        raise TypeError(f"pos must be a tensor, not {type(pos).__name__}")
    dtype, shape = pos.dtype, pos.shape
    if dtype not in _FLOATS:
        raise TypeError(f"pos must be float32, bfloat16, float16 or float64, not {dtype}")
    if len(shape) < 2 or shape[-1] == 0:
        raise ValueError(
            f"pos has shape {tuple(shape)}: expected (K, D), or (..., D) with more axes, and D of at least 1"
        )
    if len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    weight = _stack_vectors("weights", weights, pos)
    if weight.dtype != dtype and (weight.dtype != torch.float32 or dtype == torch.float64):
        raise TypeError(f"weights have dtype {weight.dtype}: expected {_param_dtypes(dtype, 'pos')}")
    bias = None if biases is None else _stack_vectors("biases", biases, pos)
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"biases are for {bias.shape[0]} layers, weights for {weight.shape[0]}: expected one for each")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"biases have dtype {bias.dtype}: expected the weights', {weight.dtype}")
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps={eps!r}: expected a number of at least 0")
    if out_dtype is None:
        out_dtype = dtype
    elif out_dtype not in _FLOATS or (out_dtype == torch.float64) != (dtype == torch.float64):
        raise TypeError(f"out_dtype={out_dtype}: expected float32, bfloat16 or float16 (float64 for float64 inputs)")

    backend = _choose_backend("pos", pos)
    pos = pos.reshape(math.prod(shape[:-1]), shape[-1])
    if backend != "reference":
        pos, weight, bias = [t if t is None or t.is_contiguous() else t.contiguous() for t in (pos, weight, bias)]
    options = _pe_chain.ChainOptions(eps, bool(hierarchical), out_dtype, backend)
    out = _run(_pe_chain, _pe_chain.PEChainFunction, (pos, weight, bias, options))
    return out if len(shape) == 2 else out.view(out.shape[0], *shape)


def _stack_vectors(name: str, vectors: Sequence[Tensor] | Tensor, pos: Tensor) -> Tensor:
    """The L vectors of `pe_chain`'s weights or biases as one (L, D), checked against pos's width and device."""
    D = pos.shape[-1]
    if isinstance(vectors, Tensor):
        if vectors.dim() != 2 or vectors.shape[1] != D or vectors.shape[0] == 0:
            raise ValueError(
                f"{name} has shape {tuple(vectors.shape)}: expected (L, {D}), one row of pos's width for each layer"
            )
        if vectors.device != pos.device:
            raise ValueError(f"{name} is on {vectors.device} and pos on {pos.device}: expected one device for all")
        return vectors
    try:
        vectors = tuple(vectors)
    except TypeError:
        kind = type(vectors).__name__
        raise TypeError(f"{name} must be a sequence of tensors or a tensor (L, D), not {kind}") from None
    if not vectors:
        raise ValueError(f"{name} is empty: expected one tensor for each layer")
    for i, v in enumerate(vectors):
        _check_tensor(f"{name}[{i}]", v, pos.device, "pos")
        if v.shape != pos.shape[-1:]:
            raise ValueError(f"{name}[{i}] has shape {tuple(v.shape)}: expected ({D},), the width of pos")
        if v.dtype != vectors[0].dtype:
            raise TypeError(f"{name}[{i}] has dtype {v.dtype}: expected {name}[0]'s, {vectors[0].dtype}")
    return torch.stack(vectors)


def _choose_backend(name: str, t: Tensor) -> str:
    """The backend of a call whose first tensor is `t`; `auto` takes `reference` for float64 on a GPU."""
    backend = backends.resolve(t.device.type)
    if t.dtype == torch.float64 and backend in ("triton", "cuda"):
        if backends.requested() != "auto":
            raise TypeError(
                f"{name} is float64: backend {backend!r} has float32, bfloat16 and float16; use 'reference'"
            )
        return "reference"
    return backend


def _run_in_cpp(name: str, args: tuple):
    """Check and run an ordinary call in C++ (csrc/autograd.cpp); None where it is left to `_prepare` and `_run`.

    `args` are `_prepare`'s. This is on the way of every call, so it does as little as it can.
    """
    nodes = None if torch.compiler.is_compiling() else backends.autograd_nodes()[0]
    return None if nodes is None else getattr(nodes, name)(*args, backends.eager)


def _run(operator, function: type[torch.autograd.Function], args: tuple, in_cpp: str | None = None):
    """Call the operator on the chosen backend, through autograd only where a gradient can be asked for.

    Args:
        in_cpp: its name in csrc/autograd.cpp, if it has a node there.
    """
    *tensors, options = args
    backend = options.backend
    if backend == "reference":
        return operator.reference(*args)
    if in_cpp is not None:  # what was not ordinary may be so now
        *others, pos, pos_weight, pos_bias = tensors
        placed = (None, None, None, pos) if pos_weight is None else (pos, pos_weight, pos_bias, None)
        outputs = _run_in_cpp(in_cpp, (*others, *placed, *options[:4]))
        if outputs is not None:
            return outputs
    unsupported = _unsupported_derivative(tensors)
    if unsupported:
        raise RuntimeError(
            f"{unsupported} do not go through the fused kernels (backend {backend!r}); "
            "call under mpvg_kernels.use_backend('reference')"
        )
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors if t is not None]):
        return function.apply(*args)
    return operator.fused(*args)


def _unsupported_derivative(tensors: tuple[Tensor | None, ...]) -> str | None:
    """In words, what asks here for derivatives that the kernels lack, and would get none or wrong ones in silence."""
    if _functorch_is_active():
        return "torch.func transforms"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            return "forward-mode derivatives (torch.autograd.forward_ad)"
    return None


@torch.compiler.assume_constant_result
def _functorch_is_active() -> bool:
    """Also in compiled code, which may hold transforms of its own; Dynamo guards on those around it."""
    return torch._C._are_functorch_transforms_active()


def _prepare(
    x,
    branch,
    branch_scale,
    weight,
    bias,
    pos,
    pos_weight,
    pos_bias,
    normed_pos,
    eps,
    pos_eps,
    num_prefix_tokens,
    out_dtype,
) -> tuple:
    """Check the arguments; returns the operator's: x and branch as (B, N, D), pos as (K, D), the Options last.

    To the operators a pos without pos_weight is one that is normalised already.
    """
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

    pos_name = "pos"
    if normed_pos is not None:
        if pos is not None or pos_weight is not None or pos_bias is not None:
            raise ValueError(
                "normed_pos is given with pos, pos_weight or pos_bias: it stands for LN'(pos), pass one or the other"
            )
        pos, pos_name = normed_pos, "normed_pos"
    if pos is not None:
        _check_tensor(pos_name, pos, device)
        expected = shape[1:] if num_prefix_tokens == 0 else (tokens - num_prefix_tokens, *vector)
        if pos.shape != expected:
            if pos.shape != (1, *expected):
                raise ValueError(
                    f"{pos_name} has shape {tuple(pos.shape)}: expected {tuple(expected)} or {(1, *expected)}"
                    f" for x of shape {tuple(shape)} with num_prefix_tokens={num_prefix_tokens}"
                )
        if pos.dim() != 2:
            pos = pos.reshape(tokens - num_prefix_tokens, shape[-1])
        if pos.dtype != dtype and (pos.dtype != torch.float32 or dtype == torch.float64):
            raise TypeError(f"{pos_name} has dtype {pos.dtype}: expected {_param_dtypes(dtype)}")
        if normed_pos is None:
            if pos_weight is None:
                raise ValueError(
                    "pos is given without pos_weight, the scale of its LayerNorm: pass pos_weight (D,) too"
                )
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

    backend = _choose_backend("x", x)
    if backend != "reference":
        # Kernels step through x and branch by any row strides; the small tensors they read as they lie.
        x, branch = dense_rows(x), None if branch is None else dense_rows(branch)
        branch_scale, weight, bias, pos, pos_weight, pos_bias = [
            t if t is None or t.is_contiguous() else t.contiguous()
            for t in (branch_scale, weight, bias, pos, pos_weight, pos_bias)
        ]
    options = Options(eps, pos_eps, num_prefix_tokens, out_dtype, backend)
    return x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, options


def _check_tensor(name: str, t: Tensor, device: torch.device, first: str = "x") -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} and {first} on {device}: expected one device for all")


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


def _param_dtypes(dtype: torch.dtype, first: str = "x") -> str:
    return str(dtype) if dtype in (torch.float32, torch.float64) else f"torch.float32 or {first}'s dtype, {dtype}"
