"""What the figures show and analysis.json holds: `quantities` of what `probe` finds, over any number of images.

summary = summarise(model, batches)
summary.numbers()                    as JSON, each number by the name of the function that defines it
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import quantities as q
from .probe import AttentionProbe, Layer, NormProbe, Probe, norms_of, pos_table, probe, takes_pos

SHOWN = 4
"""Images whose own maps are kept, for the figures."""
Grid = tuple[int, int]


@dataclass
class NormSummary:
    """A norm's quantities over the images; tensors are on the CPU."""

    layer: Layer
    grid: Grid | None
    pos: Tensor | None
    """(N, D), LN'_l(pos)."""
    tokens: Tensor = 0
    """(N, D), `mean_tokens`."""
    stream_norms: Tensor = 0
    """(N,), mean over the images of `token_norms` of the stream before the norm."""
    output_norms: Tensor = 0
    """(N,), of what the norm gives, PE included."""

    @property
    def name(self) -> str:
        return "last norm" if self.layer == "last" else f"layer {self.layer}"


@dataclass
class LastNorm:
    """What is known of the last norm beyond the others (Fig. 6 and 7)."""

    bias: Tensor | None
    pos_bias: Tensor | None
    """(D,), the biases of LN and LN'."""
    cosine: Tensor
    """(images, N), `cosine_before_after`."""
    similarity_before: Tensor
    similarity_after: Tensor
    """(images,), `token_similarity` of the stream, and of what the norm gives."""
    shown_before: Tensor
    shown_after: Tensor
    """(shown, N), `token_norms` of the first images."""


@dataclass
class AttentionSummary:
    """A layer's attention by patch tokens: what the class token pays, or what is received where there is none."""

    layer: int
    grid: Grid | None
    mean: Tensor
    """(N,), over the images."""
    shown: Tensor
    """(shown, N), of the first images."""


@dataclass
class Summary:
    """What `summarise` found."""

    model: str
    """The model's class and position scheme, in words."""
    images: int = 0
    layers: list[NormSummary] = field(default_factory=list)
    """The norm before each layer's attention; the last norm, where there is one, at the end."""
    last: LastNorm | None = None
    attention: list[AttentionSummary] = field(default_factory=list)
    class_token: bool = False
    """Whether `attention` is the class token's."""
    table: tuple[Tensor, Grid] | None = None
    """pos_0 (N, D), and its grid."""

    @property
    def with_pos(self) -> list[NormSummary]:
        return [norm for norm in self.layers if norm.pos is not None]

    def left_out(self) -> list[str]:
        """A sentence for each thing that this model does not have."""
        said = []
        if not self.layers:
            return [f"{self.model} has no transformer layers that are known here, so there is nothing to show of it"]
        if not self.with_pos:
            said.append(
                f"{self.model} has no norm that takes a position embedding: the embedding's heat maps and its "
                "correlation with the tokens are left out"
            )
        elif self.last is not None and self.layers[-1].pos is None:
            said.append(
                f"the last norm of {self.model} takes no position embedding: its heat map and correlation are left out"
            )
        if self.last is None:
            said.append(
                f"{self.model} has no norm between its last layer and the pool: its bias, cosine and token norms are "
                "left out"
            )
        if self.table is None:
            said.append(f"{self.model} has no table of positions: the similarity between positions is left out")
        if not self.attention:
            said.append(f"the attention of {self.model} shows no weights: attention maps are left out")
        return said

    def numbers(self) -> dict[str, Any]:
        """All that is a number, for JSON; maps are lists of rows, None is what there is not."""
        attention = "class_token_attention" if self.class_token else "attention_received"
        maps = {each.layer: _map(each.mean, each.grid) for each in self.attention}
        found: dict[str, Any] = {"images": self.images, "layers": []}
        for norm in self.layers:
            row = {"layer": norm.layer, "grid": norm.grid, "pos_norm": None, "correlation": None}
            if norm.pos is not None:
                row |= {
                    "pos_norm": _number(q.pos_norm(norm.pos)),
                    "correlation": _number(q.correlation(norm.tokens, norm.pos)),
                    "opposite_channels": _number(q.opposite_channels(norm.tokens, norm.pos)),
                    "channel_correlation": _numbers(q.channel_correlation(norm.tokens, norm.pos)),
                    "channel_means": [_numbers(means) for means in q.channel_means(norm.tokens, norm.pos)],
                }
                row["neighbour_similarity"] = _similarity(norm.pos, norm.grid)
            row["token_norms"] = {
                "before": _map(norm.stream_norms, norm.grid),
                "after": _map(norm.output_norms, norm.grid),
            }
            if norm.layer in maps:
                row[attention] = maps[norm.layer]
            found["layers"].append(row)
        found["last_norm"] = found["pos_table"] = None
        if self.table is not None:
            found["pos_table"] = {
                "pos_norm": _number(q.pos_norm(self.table[0])),
                "neighbour_similarity": _similarity(*self.table),
            }
        if (last := self.last) is not None:
            biases = {"tokens": last.bias, "pos": last.pos_bias}
            found["last_norm"] = {
                "bias_variance": {
                    k: None if bias is None else _number(q.bias_variance(bias)) for k, bias in biases.items()
                },
                "cosine_before_after": _spread(last.cosine),
                "token_similarity": {
                    "before": _spread(last.similarity_before),
                    "after": _spread(last.similarity_after),
                },
            }
        return found


def summarise(model: nn.Module, batches: Iterable[Tensor]) -> Summary:
    """The quantities of a model over images.

    Args:
        model: as `probe` takes it.
        batches: images (B, C, H, W), of one size; not empty.
    """
    scheme = getattr(model, "scheme", None)
    found = Summary(f"{type(model).__name__} ({scheme})" if scheme is not None else type(model).__name__)
    table = pos_table(model)
    found.table = None if table is None else (table[0].cpu(), table[1])
    cosine, before, after, shown = [], [], [], []
    for x in batches:
        seen = probe(model, x)
        found.images += len(x)
        _add_norms(found, seen)
        _add_attention(found, seen)
        if (last := seen.last) is not None:
            cosine.append(q.cosine_before_after(last.stream, last.output))
            before.append(q.token_similarity(last.stream))
            after.append(q.token_similarity(last.output))
            if sum(len(each[0]) for each in shown) < SHOWN:
                shown.append((q.token_norms(last.stream), q.token_norms(last.output)))
    for norm in found.layers:
        norm.tokens, norm.stream_norms, norm.output_norms = (
            (total / found.images).cpu() for total in (norm.tokens, norm.stream_norms, norm.output_norms)
        )
    for each in found.attention:
        each.mean, each.shown = (each.mean / found.images).cpu(), each.shown.cpu()
    if cosine:
        norm = norms_of(model)["last"]
        biases = (norm.bias, norm.pos_bias if takes_pos(norm) else None)
        values = [torch.cat(parts) for parts in (cosine, before, after)]
        values += [torch.cat(parts)[:SHOWN] for parts in zip(*shown, strict=True)]
        biases = (None if bias is None else bias.detach().float().cpu() for bias in biases)
        found.last = LastNorm(*biases, *(value.cpu() for value in values))
    return found


def _add_norms(found: Summary, seen: Probe) -> None:
    norms: list[NormProbe] = [*seen.layers, *([seen.last] if seen.last is not None else [])]
    if not found.layers:
        found.layers = [NormSummary(n.layer, n.grid, None if n.pos is None else n.pos.cpu()) for n in norms]
    for total, norm in zip(found.layers, norms, strict=True):
        total.tokens = total.tokens + norm.tokens.sum(0)
        total.stream_norms = total.stream_norms + q.token_norms(norm.stream).sum(0)
        total.output_norms = total.output_norms + q.token_norms(norm.output).sum(0)


def _add_attention(found: Summary, seen: Probe) -> None:
    def of(each: AttentionProbe) -> Tensor:
        return each.received if each.class_token is None else each.class_token

    if not found.attention:
        found.class_token = any(each.class_token is not None for each in seen.attention)
        found.attention = [AttentionSummary(a.layer, a.grid, of(a).new_zeros(()), of(a)[:0]) for a in seen.attention]
    for total, each in zip(found.attention, seen.attention, strict=True):
        total.mean = total.mean + of(each).sum(0)
        total.shown = torch.cat([total.shown, of(each)])[:SHOWN]


def _number(value: Tensor | float) -> float | None:
    value = float(value)
    return float(f"{value:.6g}") if abs(value) < float("inf") else None  # nan is not less than anything


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _map(values: Tensor, grid: Grid | None) -> list:
    return _numbers(values) if grid is None else [_numbers(row) for row in values.view(grid)]


def _spread(values: Tensor) -> dict[str, float | None]:
    return {"mean": _number(values.mean()), "deviation": _number(values.std(unbiased=False))}


def _similarity(pos: Tensor, grid: Grid | None) -> dict[str, float | None] | None:
    if grid is None:
        return None
    neighbours, pairs = q.neighbour_similarity(pos, grid)
    return {"neighbours": _number(neighbours), "all_pairs": _number(pairs)}
