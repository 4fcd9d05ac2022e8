"""Multi-scale deformable attention against a direct loop over points and pixels, and torch.autograd.gradcheck."""

import math

import pytest
import torch

from mpvg_kernels.models.deformable_attention import DeformableAttention, reference_points, sample_levels

GRIDS = [(4, 6), (2, 3)]


def bilinear(value, x, y):
    """The value (d,) of a map (d, H, W) at x, y in 0..1, pixel by pixel; what lies outside counts as zero."""
    _, rows, columns = value.shape
    x, y = x * columns - 0.5, y * rows - 0.5
    total = torch.zeros(value.shape[0], dtype=value.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < rows and 0 <= column < columns:
                total += value[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def inputs(points=3, heads=2, width=5, queries=7):
    torch.manual_seed(0)
    values = [torch.randn(2, heads, width, *grid, dtype=torch.double) for grid in GRIDS]
    locations = torch.rand(2, queries, heads, len(GRIDS), points, 2, dtype=torch.double) * 1.6 - 0.3  # some outside
    weights = torch.randn(2, queries, heads, len(GRIDS), points, dtype=torch.double)
    return values, locations, weights


def test_samples_against_a_loop():
    values, locations, weights = inputs()
    found = sample_levels(values, locations, weights)
    batch, queries, heads, levels, points, _ = locations.shape
    for b in range(batch):
        for q in range(queries):
            expected = [
                sum(
                    weights[b, q, h, level, p] * bilinear(values[level][b, h], *locations[b, q, h, level, p].tolist())
                    for level in range(levels)
                    for p in range(points)
                )
                for h in range(heads)
            ]
            torch.testing.assert_close(found[b, q], torch.cat(expected))


def test_sample_gradients():
    values, locations, weights = inputs(points=1, heads=1, width=2, queries=2)
    tensors = [t.requires_grad_() for t in (*values, locations, weights)]
    assert torch.autograd.gradcheck(lambda a, b, *rest: sample_levels([a, b], *rest), tensors)


def test_reference_points():
    found = reference_points([(2, 4), (1, 1)])
    assert found.tolist() == [[x, y] for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)] + [[0.5, 0.5]]


def test_module_against_a_loop():
    """Offsets are in pixels of the level, weights a softmax over levels and points of a head."""
    torch.manual_seed(0)
    attn = DeformableAttention(8, 2, num_heads=2, num_points=3, ratio=0.5).double()
    for linear in (attn.sampling_offsets, attn.attention_weights):
        torch.nn.init.normal_(linear.weight)
    query, features = torch.randn(1, 4, 8).double(), torch.randn(1, 24 + 6, 8).double()
    points = torch.rand(4, 2).double()
    found = attn(query, points, features, GRIDS)
    value = attn.value_proj(features)[0].T  # 4 channels: 2 heads of 2
    maps = [value[:, :24].view(4, 4, 6), value[:, 24:].view(4, 2, 3)]
    for q in range(4):
        offsets = attn.sampling_offsets(query[0, q]).view(2, 2, 3, 2)
        weights = attn.attention_weights(query[0, q]).view(2, 6).softmax(-1).view(2, 2, 3)
        heads = []
        for h in range(2):
            total = 0
            for level, (rows, columns) in enumerate(GRIDS):
                for p in range(3):
                    x = (points[q, 0] + offsets[h, level, p, 0] / columns).item()
                    y = (points[q, 1] + offsets[h, level, p, 1] / rows).item()
                    total = total + weights[h, level, p] * bilinear(maps[level][2 * h : 2 * h + 2], x, y)
            heads.append(total)
        expected = attn.output_proj(torch.cat(heads))
        torch.testing.assert_close(found[0, q], expected, rtol=1e-4, atol=1e-5)  # positions are in fp32


def test_starts_as_published():
    """Head h looks in direction h, point k at a distance of k pixels along the longer axis; weights are uniform."""
    attn = DeformableAttention(12, 1, num_heads=4, num_points=2)
    offsets = attn.sampling_offsets.bias.view(4, 2, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(offsets, expected[:, None] * torch.tensor([1.0, 2.0])[:, None], atol=1e-6, rtol=0)
    assert not attn.attention_weights.weight.any() and not attn.sampling_offsets.weight.any()


def test_bad_input():
    with pytest.raises(ValueError, match="num_heads=5 does not divide the values' width 8 = 8 x 1"):
        DeformableAttention(8, 1, num_heads=5)
    with pytest.raises(ValueError, match=r"features has 29 rows, expected 2 maps of \[\(4, 6\), \(2, 3\)\]"):
        DeformableAttention(8, 2, num_heads=2)(torch.randn(1, 1, 8), torch.rand(1, 2), torch.randn(1, 29, 8), GRIDS)
