"""The two numbers that say, by layer, whether the position embedding (PE) does in a model what the paper says it does:
how large LN'_l(pos) is, and how it points against LN_l(x). Cheap enough to be looked at while training.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .probe import NormProbe, evaluating, norms_of, takes_pos, watching
from .quantities import correlation, pos_norm


def has_pos_norms(model: nn.Module) -> bool:
    """Whether `pos_statistics` finds something: a norm with an LN' of its own for a PE."""
    return any(map(takes_pos, norms_of(model).values()))


def pos_statistics(model: nn.Module, x: Tensor) -> dict[str, list[Any]]:
    """Norm of LN'_l(pos) and its correlation with LN_l(x), in each norm that takes a PE.

    One forward pass in eval mode without gradients; the model is left as it was (`probe.evaluating`). Under FSDP2 every
    process has to call it.

    Args:
        model: any; one without such norms costs nothing and gives empty lists.
        x: images (B, C, H, W), as the model takes them.

    Returns:
        Three lists of one length: `layers`, the layers' indices from 0, and "last" for the last norm; `pos_norm`
        (`quantities.pos_norm`), `correlation` (`quantities.correlation` over the batch), floats, None where a number
        is not finite.
    """
    norms = {layer: norm for layer, norm in norms_of(model).items() if takes_pos(norm)}
    layers: list[Any] = []
    rows: list[Tensor] = []

    def tell(seen: NormProbe) -> None:
        layers.append(seen.layer)
        rows.append(torch.stack([pos_norm(seen.pos), correlation(seen.tokens, seen.pos)]))

    if norms:
        with evaluating(model), watching(model, norms, x, tell):
            model(x)
    numbers = torch.stack(rows).tolist() if rows else []  # waits for the device once
    numbers = [[value if math.isfinite(value) else None for value in row] for row in numbers]
    return {"layers": layers, "pos_norm": [row[0] for row in numbers], "correlation": [row[1] for row in numbers]}
