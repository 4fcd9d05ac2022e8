"""The paper's figures of any model, from a `Summary`: each function gives a matplotlib Figure.

Figure alone and never pyplot: no global state, no display. Few panels a row, to be read on a phone; signed numbers are
red and blue (RdBu), others viridis; what is compared has one colour scale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import quantities as q
from .summary import Summary

ROWS = 7
"""Most layers that a figure with a row for each has; of more, evenly spaced ones, the last among them."""
SIGNED, AMOUNT = "RdBu_r", "viridis"
WIDTH = 6.4


def chosen(values: Sequence[Any], most: int = ROWS) -> list[Any]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def draw(summary: Summary, pictures: Sequence[np.ndarray] = ()) -> dict[str, Figure]:
    """All figures that the model has something for, by file name.

    Args:
        summary: of the model.
        pictures: the first images as they look, (H, W, 3) or (H, W) uint8, in the order in which `summary` had them.
    """
    figures: dict[str, Figure] = {}
    if summary.layers:
        figures["heatmaps"] = heatmaps(summary)
        figures["token_norms"] = token_norms(summary, pictures)
    if summary.with_pos:
        figures["correlation"] = correlation(summary)
        figures["channels"] = channels(summary)
    if summary.last is not None:
        figures["last_norm"] = last_norm(summary)
    if summary.table is not None:
        figures["position_similarity"] = position_similarity(summary)
    if summary.attention:
        figures["attention"] = attention(summary, pictures)
    return figures


def heatmaps(summary: Summary) -> Figure:
    """Fig. 2 and 8: mean over the images of LN_l(x), and LN'_l(pos), by layer; a row a position, a column a channel."""
    norms = chosen(summary.with_pos or summary.layers)
    columns = 2 if summary.with_pos else 1
    figure = Figure((WIDTH, 1.0 + 1.05 * len(norms)), layout="constrained")
    axes = figure.subplots(len(norms), columns, squeeze=False)
    values = [v for norm in norms for v in (norm.tokens, norm.pos) if v is not None]
    limit = _high([value.abs() for value in values])
    for row, norm in zip(axes, norms, strict=True):
        for ax, value in zip(row, (norm.tokens, norm.pos), strict=False):
            image = _matrix(ax, value, limit)
            ax.set_yticks([0, len(value) - 1])
            ax.tick_params(
                labelsize=7, labelbottom=norm is norms[-1] or norm.tokens.shape[1] != norms[-1].tokens.shape[1]
            )
        row[0].set_ylabel(f"{norm.name}\nposition", fontsize=8)
    for ax, title in zip(axes[0], (r"tokens: mean of LN$_l$(x)", r"position embedding: LN'$_l$(pos)"), strict=False):
        ax.set_title(title, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("channel", fontsize=8)
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, extend="both", label="value")
    return figure


def _matrix(ax: Any, value: Tensor, limit: float) -> Any:
    return ax.imshow(value.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")


def correlation(summary: Summary) -> Figure:
    """Fig. 4: correlation of LN'_l(pos) with LN_l(x) by layer; with it the lengths of both, and opposite channels."""
    norms = summary.with_pos
    x = list(range(len(norms)))
    figure = Figure((WIDTH * 0.8, 6.2), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.6, 1, 1))
    top.axhline(0, color="0.5", lw=0.8)
    values = [float(q.correlation(norm.tokens, norm.pos)) for norm in norms]
    top.plot(x, values, marker="o", color="C0")
    for at, value in zip(x, values, strict=True):
        top.annotate(f"{value:+.2f}", (at, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    top.set(ylim=(-1.05, 1.05), ylabel="correlation")
    top.set_title(r"LN'$_l$(pos) against LN$_l$(x): $-$1 is a full counterweight", fontsize=10)
    middle.plot(x, [100 * float(q.opposite_channels(n.tokens, n.pos)) for n in norms], marker="o", color="C1")
    middle.axhline(50, color="0.5", lw=0.8)
    middle.set(ylim=(0, 100), ylabel="opposite\nchannels (%)")
    bottom.plot(x, [float(q.pos_norm(norm.pos)) for norm in norms], marker="o", color="C0", label="LN'(pos)")
    lengths = [float(q.pos_norm(norm.tokens)) for norm in norms]
    bottom.plot(x, lengths, marker="s", color="C1", ls="--", label="mean of LN(x)")
    bottom.set(ylabel="length of a row", xlabel="layer")
    bottom.set_ylim(bottom=0)
    bottom.legend(frameon=False, fontsize=8)
    bottom.set_xticks(x, [str(norm.layer) for norm in norms])
    for ax in (top, middle, bottom):
        ax.grid(alpha=0.3)
    return figure


def channels(summary: Summary) -> Figure:
    """Each channel's mean in the tokens and in the PE: whole channels that point against each other, or do not."""
    norms = chosen(summary.with_pos, 8)
    columns = min(2, len(norms))
    rows = -(-len(norms) // columns)
    figure = Figure((3.1 * columns, 0.5 + 2.6 * rows), layout="constrained")
    every = [q.channel_means(norm.tokens, norm.pos) for norm in norms]
    limits = [1.08 * max(float(pair[i].abs().max()) for pair in every) or 1.0 for i in (0, 1)]
    for i, ax in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= len(norms):
            ax.axis("off")
            continue
        tokens, pos = every[i]
        opposite = tokens * pos < 0
        for mark, colour, which in (("o", "C0", opposite), ("x", "C1", ~opposite)):
            ax.scatter(tokens[which].numpy(), pos[which].numpy(), s=12, marker=mark, color=colour, lw=0.8, alpha=0.8)
        ax.axhline(0, color="0.5", lw=0.8)
        ax.axvline(0, color="0.5", lw=0.8)
        ax.set(xlim=(-limits[0], limits[0]), ylim=(-limits[1], limits[1]))
        ax.set_title(f"{norms[i].name}: {100 * float(opposite.float().mean()):.0f} % opposite", fontsize=9)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=7)
        if i % columns == 0:
            ax.set_ylabel("channel mean of LN'(pos)", fontsize=8)
        if i >= len(norms) - columns:
            ax.set_xlabel("channel mean of LN(x)", fontsize=8)
    figure.suptitle("a point a channel: opposite signs (blue o), the same (orange x)", fontsize=10)
    return figure


def last_norm(summary: Summary) -> Figure:
    """Fig. 6: the last norm's bias, and the cosine of each token before and after it; with it how alike tokens are."""
    last = summary.last
    figure = Figure((WIDTH * 0.8, 6.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    biases = [(bias, name) for bias, name in ((last.bias, "LN"), (last.pos_bias, "LN' of the PE")) if bias is not None]
    if last.pos_bias is not None and last.bias is not None:
        biases.append((last.bias + last.pos_bias, "both together"))
    for (bias, name), colour, style in zip(biases, ("C0", "C1", "0.3"), ("-", "--", ":"), strict=False):
        label = f"{name}, variance {float(q.bias_variance(bias)):.2g}"
        top.plot(np.linspace(0, 100, len(bias)), bias.sort().values.numpy(), color=colour, ls=style, label=label)
    top.set(xlabel="channels in the order of their bias (%)", ylabel="bias")
    top.set_title("bias of the last norm" + ("" if biases else ": it has none"), fontsize=10)
    _histogram(middle, last.cosine, f"mean {float(last.cosine.mean()):.3f}", "C0", [last.cosine])
    middle.set(xlabel="cosine", ylabel="tokens")
    middle.set_title("cosine between a token before and after the last norm", fontsize=10)
    both = [last.similarity_before, last.similarity_after]
    for values, name, colour in zip(both, ("before", "after"), ("C0", "C1"), strict=True):
        _histogram(bottom, values, f"{name}, mean {float(values.mean()):.3f}", colour, both)
    bottom.set(xlabel="mean cosine", ylabel="images")
    bottom.set_title("cosine between two tokens of an image, its mean", fontsize=10)
    for ax in (top, middle, bottom):
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    return figure


def _histogram(ax: Any, values: Tensor, label: str, colour: str, together: Sequence[Tensor]) -> None:
    """Of what is finite, in bins that are the same for all that is compared."""
    every = torch.cat([v.flatten() for v in together])
    every, values = every[every.isfinite()].numpy(), values.flatten()
    if not len(every):
        return
    bins = np.histogram_bin_edges(every, bins=40)
    ax.hist(values[values.isfinite()].numpy(), bins, color=colour, alpha=0.55, label=label)


def token_norms(summary: Summary, pictures: Sequence[np.ndarray] = ()) -> Figure | None:
    """Fig. 7: length of the tokens over the grid, as a share of the map's mean: of the stream by layer, means over the
    images; then of single images before and after the last norm."""
    maps = [(f"into {norm.name}", norm.stream_norms, norm.grid) for norm in chosen(summary.layers, 6)]
    if summary.last is not None:
        end = summary.layers[-1]
        maps.append(("after the last norm", end.output_norms, end.grid))
        maps += [("", None, None)] * (-len(maps) % 3)  # an image and its maps share a row
        for i, picture in enumerate(pictures[: min(2, len(summary.last.shown_before))]):
            maps.append((f"image {i}", picture, None))
            maps.append((f"image {i}, before", summary.last.shown_before[i], end.grid))
            maps.append((f"image {i}, after", summary.last.shown_after[i], end.grid))
    panels = []
    for title, values, grid in maps:
        if values is None or isinstance(values, np.ndarray):
            panels.append((title, values))
        elif grid is not None:
            mean = float(values.mean())
            panels.append((f"{title}\nmean {mean:.3g}", (values / (mean or 1.0)).view(grid)))
    off = _high([(value - 1).abs() for _, value in panels if isinstance(value, Tensor)])
    return _map_grid(panels, 3, "length of a token over the map's mean", cmap=SIGNED, vmin=1 - off, vmax=1 + off)


def position_similarity(summary: Summary) -> Figure:
    """Cosine of the PE of a few positions with all others, the mean PE taken off, in the table and in each norm."""
    table, grid = summary.table
    rows = [("table", table, grid)]
    rows += [(norm.name, norm.pos, norm.grid) for norm in chosen(summary.with_pos, 6) if norm.grid is not None]
    figure = Figure((WIDTH * 0.72, 0.9 + 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (name, pos, (height, width)) in zip(axes, rows, strict=True):
        places = (0, 0), (height // 2, width // 2), (height - 1, width // 2)
        similarity = q.position_similarity(pos, centred=True)
        for ax, (y, x) in zip(row, places, strict=True):
            values = similarity[y * width + x].view(height, width)
            image = ax.imshow(values.numpy(), cmap=SIGNED, vmin=-1, vmax=1, interpolation="nearest")
            ax.plot(x, y, "o", mfc="none", mec="black", ms=7)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    for ax, title in zip(axes[0], ("a corner", "the middle", "an edge"), strict=True):
        ax.set_title(title, fontsize=9)
    figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.7, aspect=40, label="cosine with the marked position"
    ).set_ticks((-1, -0.5, 0, 0.5, 1))
    return figure


def attention(summary: Summary, pictures: Sequence[np.ndarray] = ()) -> Figure | None:
    """Attention by patch, beside the images: what tokens receive, or what the class token pays where there is one."""
    layers = [each for each in chosen(summary.attention, 4) if each.grid is not None]
    panels = []
    for i, picture in enumerate(pictures[: len(summary.attention[0].shown)]):
        panels.append((f"image {i}", picture))
        panels += [(f"layer {each.layer}", each.shown[i].view(each.grid)) for each in layers]
    panels.append((f"mean of {summary.images}", None))
    panels += [(f"layer {each.layer}", each.mean.view(each.grid)) for each in layers]
    what = "attention of the class token" if summary.class_token else "attention received"
    high = _high([value for _, value in panels if isinstance(value, Tensor)])
    return _map_grid(panels, 1 + len(layers), f"{what}, 1 is an even share", cmap=AMOUNT, vmin=0, vmax=high)


def _map_grid(panels: Sequence[tuple[str, Any]], columns: int, label: str, **scale: Any) -> Figure:
    """Maps (tensors) on one colour scale, and images (arrays) as they are; None is an empty panel."""
    rows = -(-len(panels) // columns)
    figure = Figure((1.62 * columns + 0.2, 0.9 + 1.95 * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06)
    image, axes = None, figure.subplots(rows, columns, squeeze=False)
    for i, ax in enumerate(axes.flat):
        title, value = panels[i] if i < len(panels) else ("", None)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=8)
        if value is None:
            ax.axis("off")
        elif isinstance(value, Tensor):
            image = ax.imshow(value.numpy(), interpolation="nearest", **scale)
        else:
            ax.imshow(value, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    if image is not None:
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=40, extend="both", label=label)
    return figure


def _high(values: Sequence[Tensor]) -> float:
    """The end of a colour scale from 0: above all values but outliers."""
    every = torch.cat([value.flatten() for value in values]).numpy() if values else np.zeros(1)
    return float(np.quantile(every, 0.995)) or 1.0
