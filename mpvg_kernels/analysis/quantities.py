"""What the position embedding (PE) does in a model, in numbers: pure functions of tensors, each with its definition.

"The paper" is MPVG (arXiv 2502.02919); with its layers l, pos_l = LN'_l(pos_{l-1}) joins LN_l(x) before attention, and
the last norm gives y = LN(x) + LN'(pos_0). Its figures say what is shown and not every step of the arithmetic, and no
code of it is public: where a step is chosen here, the docstring says "ours". The first paragraph of each docstring is
the definition that goes into analysis.json (`DEFINITIONS`).

Shapes: B images, N patch tokens in reading order (no class token or registers), D channels, H heads. All results are
in the inputs' dtype; numbers are scalars (tensors without axes).
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_tokens(tokens: Tensor) -> Tensor:
    """Mean over the images of the layer-normed tokens, LN_l(x) without its PE: the token half of Fig. 2 and 8.

    Args:
        tokens: (B, N, D), or (N, D), which is returned as it is.

    Returns:
        (N, D).
    """
    return tokens if tokens.ndim == 2 else tokens.mean(0)


def pearson(a: Tensor, b: Tensor, dim: int | None = None) -> Tensor:
    """Pearson's correlation coefficient of two tensors of one shape, over all entries or along `dim`.

    NaN where one of them does not vary: there is then no direction to compare.
    """
    if dim is None:
        a, b, dim = a.flatten(), b.flatten(), 0
    a, b = (v - v.mean(dim, keepdim=True) for v in (a, b))
    return (a * b).sum(dim) / (a.square().sum(dim) * b.square().sum(dim)).sqrt()


def correlation(tokens: Tensor, pos: Tensor) -> Tensor:
    """Pearson's correlation, over all N D entries, of the tokens' mean over the images and the PE: LN_l(x) against
    LN'_l(pos), Fig. 4 (which entries are paired is ours: those of one position and channel).

    Near -1 the PE is the tokens' counterweight. The paper reports -0.37, -0.67, -0.82, -0.85, -0.95 in DeiT-Ti's layers
    1, 4, 7, 9, 11.

    Args:
        tokens: (B, N, D) or their mean (N, D).
        pos: (N, D).
    """
    return pearson(mean_tokens(tokens), pos)


def channel_correlation(tokens: Tensor, pos: Tensor) -> Tensor:
    """Pearson's correlation of each channel, over the N positions, of the tokens' mean over the images and the PE
    (ours).

    What is the same at all positions, as the biases of both LayerNorms, does not count here; see `channel_means`.

    Args:
        tokens: (B, N, D) or their mean (N, D).
        pos: (N, D).

    Returns:
        (D,), NaN where a channel is the same at all positions.
    """
    return pearson(mean_tokens(tokens), pos, dim=0)


def channel_means(tokens: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each channel over images and positions, of the tokens and of the PE: the stripes of Fig. 2 and 8.

    Args:
        tokens: (B, N, D) or their mean (N, D).
        pos: (N, D).

    Returns:
        Two of (D,).
    """
    return mean_tokens(tokens).mean(0), pos.mean(0)


def opposite_channels(tokens: Tensor, pos: Tensor) -> Tensor:
    """Share of the channels whose means over images and positions have opposite signs in tokens and PE (ours; the
    paper's heat maps show whole channels of opposite sign).

    Args:
        tokens: (B, N, D) or their mean (N, D).
        pos: (N, D).
    """
    a, b = channel_means(tokens, pos)
    return (a * b < 0).to(a.dtype).mean()


def pos_norm(pos: Tensor) -> Tensor:
    """Root mean square, over the N positions, of the length of the PE's rows: ||LN'_l(pos)||_F / sqrt(N).

    Args:
        pos: (N, D).
    """
    return pos.norm() / math.sqrt(pos.shape[0])


def token_norms(x: Tensor) -> Tensor:
    """Length (L2 norm) of each token: Fig. 7 as maps over the grid of patches.

    Args:
        x: (B, N, D).

    Returns:
        (B, N).
    """
    return x.norm(dim=-1)


def bias_variance(bias: Tensor) -> Tensor:
    """Variance of a LayerNorm's bias over its D channels (divided by D, not by D - 1: ours): Fig. 6, the last norm's.

    A large one says that the bias does the work that the PE is not given to do. The paper: 0.2387 in PVG, 0.0193 in
    MPVG. There only the sum of LN's and LN''s bias reaches the output: both have one gradient, and where they start
    alike and are not decayed, as here, they stay alike, and their sum has four times the variance of each.

    Args:
        bias: (D,).
    """
    return bias.var(unbiased=False)


def cosine_before_after(before: Tensor, after: Tensor) -> Tensor:
    """Cosine between each token of the stream before the last norm, x, and after it, y = LN(x) or LN(x) + LN'(pos_0):
    Fig. 6 (which vectors are compared is ours). Near 1 the norm leaves the token's direction as it is.

    Args:
        before, after: (B, N, D).

    Returns:
        (B, N).
    """
    return F.cosine_similarity(before, after, dim=-1)


def token_similarity(x: Tensor) -> Tensor:
    """Mean cosine between two different tokens of an image (ours; with Fig. 6, before and after the last norm).

    sum over n != m of u_n . u_m over N (N - 1), with u the tokens at length one.

    Args:
        x: (B, N, D).

    Returns:
        (B,), NaN where an image has one token only.
    """
    n = x.shape[1]
    total = F.normalize(x, dim=-1).sum(1).square().sum(-1)  # the N pairs of a token with itself included
    return (total - n) / (n * (n - 1)) if n > 1 else torch.full_like(total, math.nan)


def position_similarity(pos: Tensor, centred: bool = False) -> Tensor:
    """Cosine between the PE of every two positions, as the ViT paper shows it (arXiv 2010.11929, Fig. 7).

    Args:
        pos: (N, D), the table or LN'_l(pos).
        centred: take the mean over the positions off first (ours): it is the same for all, so that it makes every two
            alike and tells no position from another.

    Returns:
        (N, N).
    """
    u = F.normalize(pos - pos.mean(0) if centred else pos, dim=-1)
    return u @ u.mT


def neighbour_similarity(pos: Tensor, grid: tuple[int, int], centred: bool = True) -> tuple[Tensor, Tensor]:
    """Mean `position_similarity` of positions next to each other, and of all pairs: apart, the PE tells near from far.

    Args:
        pos: (N, D), for a grid of (height, width) patches, height * width = N.
        grid: height and width.
        centred: as in `position_similarity`.

    Returns:
        The mean over horizontal and vertical neighbours, and over all pairs of different positions; NaN without any.
    """
    n = pos.shape[0]
    similarity = position_similarity(pos, centred)
    row, column = torch.arange(n, device=pos.device).div(grid[1], rounding_mode="floor"), torch.arange(n) % grid[1]
    column = column.to(pos.device)
    steps = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    return similarity[steps == 1].mean(), similarity[steps > 0].mean()


def attention_received(weights: Tensor) -> Tensor:
    """Attention that each token receives: the mean of its column of weights over heads and queries, times the number of
    keys, so that 1 is an even share (ours). For models without a class token, whose head reads all tokens alike.

    Args:
        weights: (B, H, Q, K), softmax over K.

    Returns:
        (B, K), with mean 1 over K.
    """
    return weights.mean((1, 2)) * weights.shape[-1]


def class_token_attention(weights: Tensor) -> Tensor:
    """Attention that the class token, the first one, pays to each token: the mean of its row of weights over the heads,
    times the number of keys, so that 1 is an even share (DINO's maps, arXiv 2104.14294, over the mean of the heads).

    Args:
        weights: (B, H, Q, K), softmax over K.

    Returns:
        (B, K).
    """
    return weights[:, :, 0].mean(1) * weights.shape[-1]


DEFINITIONS: dict[str, str] = {
    function.__name__: " ".join(inspect.getdoc(function).partition("\n\n")[0].split())
    for function in (
        *(mean_tokens, correlation, channel_correlation, channel_means, opposite_channels, pos_norm, token_norms),
        *(bias_variance, cosine_before_after, token_similarity, position_similarity, neighbour_similarity),
        *(attention_received, class_token_attention),
    )
}
"""What each number in analysis.json is, by the name of the function that computes it."""
