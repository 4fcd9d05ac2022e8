"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3) in plain PyTorch.

A query looks at a few points of each feature map, around a reference point of its own. Where they lie and what each
counts are linear functions of the query; between pixels values are interpolated, outside of the map they are zero.
Parameters have the names of the published CUDA module, so that its weights load.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DeformableAttention", "reference_points", "sample_levels"]

Grid = tuple[int, int]


def sample_levels(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values at points of several feature maps.

    Args:
        values: one (B, heads, d, H_l, W_l) for each level.
        locations: (B, Q, heads, levels, points, 2), x and y, 0 to 1 from edge to edge of the map.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * d) of the values' dtype: for each query and head the sum over levels and points. Computed in fp32
        at least, as published: in bf16 a position in a map of 128 pixels would be off by a quarter of one.
    """
    batch, queries, heads, _, points = weights.shape
    # (B, Q, heads, levels, points, ...) -> levels of (B * heads, Q, points, ...); grid_sample counts from -1 to 1.
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).unbind(2)
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1, points).unbind(3)
    total = 0
    for value, grid, share in zip(values, grids, shares, strict=True):
        # (B * heads, d, Q, points)
        dtype = torch.promote_types(value.dtype, torch.float32)
        found = F.grid_sample(value.flatten(0, 1).to(dtype), grid.to(dtype), align_corners=False)
        total = total + (found * share).sum(-1)
    return total.to(values[0].dtype).reshape(batch, -1, queries).transpose(1, 2)


def reference_points(grids: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """The centres of all pixels of maps of these (rows, columns), map after map: (Q, 2) fp32, x and y from 0 to 1."""
    points = []
    for rows, columns in grids:
        y, x = torch.meshgrid(
            (torch.arange(rows, device=device) + 0.5) / rows,
            (torch.arange(columns, device=device) + 0.5) / columns,
            indexing="ij",
        )
        points.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(points)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention.

    Args:
        dim: width D of queries, values and output.
        num_levels: feature maps that a query looks at.
        num_heads: heads, which must divide dim * ratio.
        num_points: points of each map, for a head.
        ratio: width of the values inside, relative to dim.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_levels: int,
        num_heads: int = 6,
        num_points: int = 4,
        ratio: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        inner = int(dim * ratio)
        if inner % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the values' width {inner} = {dim} x {ratio:g}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        kwargs = {"device": device, "dtype": dtype}
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples, **kwargs)
        self.attention_weights = nn.Linear(dim, samples, **kwargs)
        self.value_proj = nn.Linear(dim, inner, **kwargs)
        self.output_proj = nn.Linear(inner, dim, **kwargs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: each head begins by looking in a direction of its own, point k at a distance of k pixels."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = 2 * math.pi * torch.arange(self.num_heads) / self.num_heads
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # (heads, 1, points, 2)
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, points: Tensor, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """query (B, Q, D) looks at features (B, sum of rows * columns, D) around points (Q, 2) -> (B, Q, D).

        Args:
            points: reference points, see `reference_points`.
            grids: the (rows, columns) of each level of features.
        """
        heads, levels, count = self.num_heads, self.num_levels, self.num_points
        sizes = [rows * columns for rows, columns in grids]
        if len(grids) != levels or features.shape[1] != sum(sizes):
            raise ValueError(f"features has {features.shape[1]} rows, expected {levels} maps of {list(grids)}")
        value = self.value_proj(features).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # (B, heads, d, rows)
        maps = [part.unflatten(-1, grid) for part, grid in zip(value.split(sizes, -1), grids, strict=True)]
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, count, 2))
        # In fp32: at 16 bits a position in a map of more than some hundred pixels is off by a pixel.
        scale = torch.tensor([[columns, rows] for rows, columns in grids], dtype=torch.float32)
        scale = scale.to(query.device, non_blocking=True)  # else the host waits for the GPU in every call
        locations = points[:, None, None, None] + offsets.float() / scale[:, None]
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * count)).softmax(-1)
        return self.output_proj(sample_levels(maps, locations, weights.unflatten(-1, (levels, count))))
