"""Ways a (B, N, D) tensor may lie in memory, or one of two axes: views with any strides, at any address."""

import torch
from torch import Tensor

ALIGNED = 64  # bytes: the widest vectors, and a cache line


def at_address(x: Tensor, offset: int) -> Tensor:
    """A contiguous copy of x that starts `offset` elements past an aligned address."""
    memory = x.new_empty(x.numel() + offset + ALIGNED)
    first = -memory.data_ptr() % ALIGNED // x.element_size() + offset
    return memory[first : first + x.numel()].view(x.shape).copy_(x.detach())


def cropped(x: Tensor, axis: int) -> Tensor:
    """The middle of a longer axis: larger strides, and an address of its own."""
    pad = x.narrow(axis, 0, 1)
    return torch.cat((pad, x, pad), axis).narrow(axis, 1, x.shape[axis]) if x.shape[axis] else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "unaligned": lambda x: at_address(x, 1),
    "cropped rows": lambda x: cropped(x, -1),
    "cropped tokens": lambda x: cropped(x, -2),
    "every other sample": lambda x: torch.stack((x, x), 1)[:, 0],
    "tokens first": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "channels first": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "one sample": lambda x: x[:1].expand(x.shape),
    "one token": lambda x: x[..., :1, :].expand(x.shape),
    "one number": lambda x: _eighths(x.flatten()[:1].view((1,) * x.dim())).expand(x.shape) if x.numel() else x,
}


def _eighths(x: Tensor) -> Tensor:
    """Numbers that add up exactly: sums of one and the same share one rounding error, and no norm averages that."""
    return (x * 8).round() / 8


def with_layout(x: Tensor, layout: str) -> Tensor:
    """A leaf of x's shape in the layout, which needs a gradient if x does."""
    return LAYOUTS[layout](x.detach()).requires_grad_(x.requires_grad)
