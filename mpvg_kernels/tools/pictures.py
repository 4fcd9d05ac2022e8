"""Pictures that several commands draw: confusion matrix and reliability diagram.

Each function gives a matplotlib Figure; `png` and `save` make a file of it. Figure alone is used and never pyplot, so
that there is no global state and no display is needed. All are narrow enough for a phone: one panel a row.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..train.curves import plain
from ..train.run_folder import whole_file

# Not green and red, which many people can't tell apart; marks and frames say it as well.
RIGHT, WRONG = "C0", "C1"
NUMBERED = 12
"""Most classes whose confusion matrix has a number in each cell."""
NAMED = 40
"""Most classes that a confusion matrix names at its sides; with more it comes with the most confused pairs."""
CELLS = 200
"""Most rows that a confusion matrix is drawn with; of more classes, neighbours share one."""
PAIRS = 15
"""Pairs that are shown beside the matrix of many classes."""


def png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as the bytes of a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write the figure to a PNG file.

    Raises:
        OSError: it can't be written.
    """
    data = png(figure, dpi)
    with whole_file(path, "wb") as file:
        file.write(data)


def short(name: str, length: int = 18) -> str:
    """A class name cut to a length; what is cut is marked, and what matplotlib would take for a formula is not one."""
    return plain(name if len(name) <= length else name[: length - 1].rstrip() + "…")


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The pairs of classes that are mistaken most often.

    Args:
        confusion: (C, C), images by label (row) and prediction (column).

    Returns:
        (label, predicted, images), at most `count` of them, the most first, of equal ones in the classes' order.
    """
    errors = confusion - np.diag(np.diag(confusion))
    flat = errors.ravel()
    order = np.argsort(-flat, kind="stable")[:count]
    return [(*map(int, divmod(i, len(errors))), int(flat[i])) for i in order if flat[i]]


def confusion_matrix(confusion: np.ndarray, class_names: Sequence[str] | None = None, of: str = "images") -> Figure:
    """Who is taken for whom: rows are the labels, columns the predictions, colour the share of the row.

    Few classes have the number of images in every cell, of pixels the share, and their names at the sides. With many
    the colours alone are left, on a logarithmic scale, of more than CELLS classes for several neighbours at a time, and
    under the matrix the pairs that are mistaken most often.

    Args:
        confusion: (C, C) int, images by label and prediction.
        class_names: C names; None takes the classes' numbers.
        of: what is counted, images or pixels.
    """
    confusion = np.asarray(confusion)
    classes = len(confusion)
    names = [short(name) for name in class_names or map(str, range(classes))]
    if classes <= NAMED:
        side = max(4.6, 1.9 + 0.21 * classes)
        figure = Figure((side, side), layout="constrained")
        axes = figure.subplots()
    else:
        pairs = most_confused(confusion, PAIRS)
        height = 0.6 + 0.24 * max(len(pairs), 1)
        figure = Figure((5.6, 5.4 + height), layout="constrained")
        axes, bars = figure.subplots(2, 1, height_ratios=(5.4, height))
        _draw_pairs(bars, pairs, names, of)
    _draw_matrix(figure, axes, confusion, names, of)
    return figure


def _draw_matrix(figure: Figure, axes: Any, confusion: np.ndarray, names: list[str], of: str) -> None:
    classes = len(confusion)
    step = -(-classes // CELLS)
    if step > 1:  # single rows would vanish between the picture's points
        starts = np.arange(0, classes, step)
        confusion = np.add.reduceat(np.add.reduceat(confusion, starts, 0), starts, 1)
    counts = confusion.sum(1, keepdims=True)
    share = 100 * confusion / np.maximum(counts, 1)
    if classes <= NUMBERED:
        scale = {"vmin": 0, "vmax": 100}
    else:  # what is rare is what one looks for
        share = np.ma.masked_equal(share, 0)
        scale = {"norm": LogNorm(0.1, 100, clip=True)}
    image = axes.imshow(share, cmap="Blues" if classes <= NUMBERED else "viridis", interpolation="nearest", **scale)
    label = f"share of the label's {of} (%)"
    figure.colorbar(image, ax=axes, label=label, location="bottom", shrink=0.7, aspect=30, format="%g")
    axes.set(xlabel="predicted", ylabel="label")
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    if classes > NAMED:
        axes.set_ylabel("label (number of the class)" + (f", {step} classes a cell" if step > 1 else ""))
        ticks = [tick for tick in axes.get_yticks() if 0 <= tick < len(confusion)]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [str(round(tick * step)) for tick in ticks])
        return
    size = 9 if classes <= 20 else 7
    turned = classes > NUMBERED or max(map(len, names)) > 3
    axes.set_xticks(range(classes), names, rotation=90 if turned else 0, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    if classes <= NUMBERED:
        for (row, column), count in np.ndenumerate(confusion):
            text = str(count) if of == "images" else f"{share[row, column]:.0f}"
            if text != "0":
                style = {"color": "white" if share[row, column] > 55 else "black"}
                style["fontweight"] = "normal" if row == column else "bold"
                axes.text(column, row, text, ha="center", va="center", fontsize=9, **style)


def _draw_pairs(axes: Any, pairs: list[tuple[int, int, int]], names: list[str], of: str) -> None:
    axes.set_title("most confused: label → predicted", fontsize=10)
    if not pairs:
        axes.axis("off")
        axes.text(0.5, 0.5, f"no {of[:-1]} was mistaken", ha="center", va="center")
        return
    # The names lie on the bars: beside them they would take the width that the matrix needs.
    counts = [images for *_, images in pairs]
    axes.barh(range(len(pairs)), counts, color=WRONG, alpha=0.35)
    for row, (label, predicted, images) in enumerate(pairs):
        text = f"{images}   {names[label]} → {names[predicted]}"
        axes.text(0.01 * counts[0], row, text, va="center", fontsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel(of)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0, 1.02 * counts[0])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def reliability_diagram(bins: Sequence[Mapping[str, float]], ece: float) -> Figure:
    """Accuracy over confidence, and how many images have which confidence (Guo et al. 2017, figure 1).

    Args:
        bins: each with low, high (borders of the confidence, 0 to 1), images, acc and confidence (means, percent; None
            in a bin without images).
        ece: expected calibration error in percent, which is written into the picture.
    """
    figure = Figure((4.6, 5.2), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    filled = [each for each in bins if each["images"]]
    middle = [50 * (each["low"] + each["high"]) for each in filled]
    width = [100 * (each["high"] - each["low"]) for each in filled]
    acc, confidence = ([each[key] for each in filled] for key in ("acc", "confidence"))
    axes.bar(middle, acc, width, color=RIGHT, edgecolor="white", label="accuracy")
    gap = np.subtract(confidence, acc)
    axes.bar(middle, gap, width, acc, fill=False, hatch="////", edgecolor=WRONG, lw=0.8, label="gap to the confidence")
    axes.plot((0, 100), (0, 100), "--", color="0.4", lw=1, label="calibrated")
    axes.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    axes.set_title(f"expected calibration error {ece:.2f} %", fontsize=10)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    below.bar(middle, [each["images"] for each in filled], width, color="0.6", edgecolor="white")
    below.set_yscale("symlog", linthresh=1)
    below.set(ylabel="images", xlabel="confidence (%)")
    for each in (axes, below):
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure
