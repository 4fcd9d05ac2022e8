"""What the blocks of every architecture share: how the residual stream travels, and the norms that stand in for timm's.

Between blocks travel (x, branch, branch_scale, pos): the output of a sub-layer is not added to the stream by a kernel
of its own but handed on, and the next fused norm reads both and writes the sum that it normalises. An add of its own
remains only where the stream is wanted as such: at intermediates that are taken out, and at the end of a checkpointed
block, which would else keep two tensors for one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import LayerNorm, get_norm_layer
from timm.models import checkpoint
from torch import Tensor, nn

from ..ops.common import join


def draw_drop_path(drop_path: nn.Module, branch: Tensor) -> Tensor | None:
    """Stochastic depth's factors (B,) for a branch, drawn as timm's DropPath draws them; None where it does nothing."""
    drop_prob = getattr(drop_path, "drop_prob", 0.0)
    if drop_prob == 0.0 or not drop_path.training:
        return None
    keep_prob = 1.0 - drop_prob
    factor = branch.new_empty((branch.shape[0], 1, 1)).bernoulli_(keep_prob)
    if keep_prob > 0.0 and drop_path.scale_by_keep:
        factor.div_(keep_prob)
    return factor.view(-1)


def run_checkpointed(block: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
    """A block under activation checkpointing, with its branch added at the end: (stream, pos).

    The second run leaves the running statistics of BatchNorms alone: they have seen the batch.
    """
    batch_norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    if not batch_norms or torch.compiler.is_compiling():
        return checkpoint(run_and_join, block, *args)
    return checkpoint(run_and_join, block, *args, context_fn=lambda: (nullcontext(), _not_tracking(batch_norms)))


@contextmanager
def _not_tracking(batch_norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    # A momentum of 0 and not track_running_stats=False, under which autograd saves fewer tensors than in the first run.
    before = [(norm.momentum, norm.num_batches_tracked) for norm in batch_norms]
    for norm in batch_norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(batch_norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def run_and_join(block: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
    """A block with its branch added at the end: (stream, pos)."""
    x, branch, branch_scale, pos = block(*args)
    return join(x, branch, branch_scale), pos


def make_layer_norm(norm_layer: Any, dim: int) -> nn.LayerNorm:
    """What `norm_layer` makes, checked to be a LayerNorm that the fused norms can stand for."""
    norm = (get_norm_layer(norm_layer) or LayerNorm)(dim, device="meta")
    if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None:
        raise ValueError(
            f"norm_layer={norm_layer!r} makes {norm}: the fused norms stand for LayerNorm with learned scale only; "
            "leave it out, or pass partial(nn.LayerNorm, eps=...)"
        )
    return norm
