"""A run's numbers over its updates, as pictures and as tables: what training logs, and the state of the PE by layer.

Each `Curve` is drawn by `draw` and written in figures by `curve_table`, for one run or for several on the same axes.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # needs no display and has no global state, unlike pyplot

from .figures import LOSS, Figures
from .figures import Figure as Measure
from .record import RunRecord, finite_number, number, series
from .table import Table, figure_of

POINTS = 600
"""Most points of a line in a picture; of a longer one the lowest and highest of each stretch are drawn."""
NAME = 28
"""Most letters of a run's name in a legend."""


class Line(NamedTuple):
    """One quantity of the log: its name in legends and tables, and where it is (lines of which kind, which key)."""

    name: str
    rows: Literal["train", "epochs"]
    key: str


class Curve(NamedTuple):
    """What is drawn on one pair of axes."""

    title: str
    label: str
    lines: tuple[Line, ...]
    spec: str
    """Format of its numbers."""
    best: Callable | None = None
    """min or max, where one of them is what training is for."""
    log: bool = False
    key: str = ""
    """The figure's key, of curves of one."""


def measured(figure: Measure, figures: Figures) -> Curve:
    """A figure over the updates: while training and on the held-out images, as far as a task has it."""
    lines = (
        Line("training (augmented)", "train", figure.key),
        Line("held-out images", "epochs", f"test_{figure.key}"),
        Line("held-out, EMA", "epochs", f"ema_{figure.key}"),
    )
    lines = lines[0 if figure in figures.trained else 1 : 3 if figure in figures.evaluated else 1]
    label = figure.name + (f" ({figure.unit.strip()})" if figure.unit else "")
    return Curve(label[0].upper() + label[1:], label, lines, figure.spec, figure.best, figure is LOSS, figure.key)


OF_TRAINING = (
    Curve("Learning rate", "learning rate", (Line("learning rate", "train", "lr"),), ".3g"),
    Curve("Gradient norm", "gradient norm", (Line("gradient norm", "train", "grad_norm"),), ".4g", log=True),
    Curve("Throughput (images a second)", "images a second", (Line("images a second", "train", "img_s"),), ".0f"),
)


def curves(records: list[RunRecord]) -> list[Curve]:
    """Everything that is drawn of these runs: what any of their tasks measures, and how training went."""
    found: dict[str, Curve] = {}
    for record in records:
        own = record.figures
        for figure in dict.fromkeys((LOSS, own.main, *own.evaluated, *own.trained)):
            found.setdefault(f"{figure.key} {figure.name}", measured(figure, own))
    return [*found.values(), *OF_TRAINING]


class Pos(NamedTuple):
    """A quantity of the `pos` lines of the log."""

    title: str
    label: str
    key: str
    spec: str


POS = (
    Pos("Correlation of LN'(pos) and LN(x)", "correlation", "correlation", ".3f"),
    Pos("Norm of LN'(pos)", "root mean square row norm", "pos_norm", ".3f"),
)


# ---- pictures


def panel(width: float = 4.5, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure with one pair of axes, small enough that its letters can be read on a phone."""
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def draw(axes: Any, curve: Curve, records: list[RunRecord]) -> None:
    """Draw a curve of one run, its lines in colours of their own, or of several runs, a colour for each.

    Where the runs' batches differ, the axis counts images in place of updates. Spikes of the loss, skipped updates and
    where one run was resumed are marked.
    """
    by_images = counts_images(records)
    shown = []
    for i, record in enumerate(records):
        batch = record.setting("batch") if by_images else 1
        count = len(curve.lines)
        for j, line in enumerate(curve.lines, 1 if count == 2 else 0):  # of two the training line is not there
            x, y = _thin(*_with_gaps(record, line))
            if not np.isfinite(y).any():
                continue
            shown.append(y)
            style = _one_run(j, count) if len(records) == 1 else _many_runs(i, j, count)
            label = line.name if len(records) == 1 else shorten(record.label) if style.pop("named") else None
            axes.plot(np.asarray(x) * batch, y, label=label, **style)
        if curve.key == LOSS.key:
            _mark(axes, record, batch, f"C{i}" if len(records) > 1 else "C3", first=i == 0)
    if len(records) == 1:
        for k, step in enumerate(resumed_at(records[0])):
            axes.axvline(step, color="0.5", ls=":", lw=1, label="resumed" if k == 0 else None)
    axes.set(xlabel="images" if by_images else "update", ylabel=curve.label)
    axes.grid(alpha=0.3)
    finite = np.concatenate([*shown, [math.nan]])
    low, high = np.nanmin([*finite, math.inf]), np.nanmax([*finite, 0.0])
    if curve.log and 0 < 10 * low <= high:  # within a decade a log axis has hardly a readable tick
        axes.set_yscale("log")
    if curve.key == "acc" and shown:
        rows = [row for record in records for row in record.evaluated[len(record.evaluated) // 4 :]]
        late = [row["test_acc"] for row in rows if number(row, "test_acc") is not None]
        axes.set_ylim(max(0, min(late, default=10) - 10), 100.5)
    if len(records) > 1 or len(axes.get_legend_handles_labels()[0]) > 1:
        legend(axes)


def legend(axes: Any, columns: int = 2) -> None:
    """Under the axes, where it covers no line."""
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=10)


def plot_curves(record: RunRecord) -> None:
    """Draw curves.png into the run folder: loss and main figure over the updates, training and held-out."""
    own = record.figures
    figure = Figure((10, 3.6), layout="constrained")
    for axes, shown in zip(figure.subplots(1, 2), (LOSS, own.main), strict=True):
        draw(axes, measured(shown, own), [record])
        while figure.legends:  # here there is room inside
            figure.legends[0].remove()
        axes.legend(frameon=False)
    figure.savefig(record.path / "curves.png", dpi=120)


def pos_over_updates(quantity: Pos, record: RunRecord) -> Figure:
    """A quantity of the PE over the updates, a line for each layer, from purple for the first to orange."""
    figure, axes = panel()
    layers = pos_layers(record)
    for i, layer in enumerate(layers):
        points = [(row["step"], found[layer]) for row in record.pos if layer in (found := by_layer(row, quantity.key))]
        # The part of plasma that can be seen on white and on black.
        colour = "C0" if layer == "last" else colormaps["plasma"](0.25 + 0.6 * i / max(len(layers) - 1, 1))
        x, y = _thin([step for step, _ in points], [value for _, value in points])
        axes.plot(x, y, color=colour, marker="." if len(points) < 30 else None, label=layer_name(layer))
    axes.set(xlabel="update", ylabel=quantity.label)
    legend(axes, 3)
    return figure


def pos_by_layer(quantity: Pos, records: list[RunRecord]) -> Figure:
    """A quantity of the PE in the last `pos` line of each run, over the layers."""
    figure, axes = panel()
    layers = all_layers(records)
    for i, record in enumerate(records):
        if not record.pos:
            continue
        found = by_layer(record.pos[-1], quantity.key)
        at = [k for k, layer in enumerate(layers) if layer in found]
        label = shorten(record.label) if len(records) > 1 else None
        axes.plot(at, [found[layers[k]] for k in at], marker="o", color=f"C{i % 10}", label=label)
    step = -(-len(layers) // 14)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="layer", ylabel=quantity.label)
    if quantity.key == "correlation":
        axes.axhline(0, color="0.5", lw=1)
    if len(records) > 1:
        legend(axes)
    return figure


def _one_run(j: int, lines: int) -> dict[str, Any]:
    if lines == 1:
        return {"color": "C0", "lw": 1.2}
    return ({"color": "0.6", "lw": 0.8}, {"color": "C0", "marker": "."}, {"color": "C1", "marker": "."})[j]


def _many_runs(i: int, j: int, lines: int) -> dict[str, Any]:
    style = {"color": f"C{i % 10}", "named": lines == 1 or j == 1}
    if lines == 1:
        return style | {"lw": 1.2}
    return style | ({"lw": 0.8, "alpha": 0.35}, {"lw": 1.5}, {"lw": 1.2, "ls": "--"})[j]


def _mark(axes: Any, record: RunRecord, batch: int, colour: str, first: bool) -> None:
    x, y = series(record.spikes, "loss")
    if x:
        label = "loss spike" if first else None
        axes.plot(np.asarray(x) * batch, y, "v", color=colour, mec="k", mew=0.5, ms=7, label=label)
    if record.skipped:  # their loss may be unknown: on the axis itself
        at = np.asarray([row["step"] for row in record.skipped]) * batch
        label = "skipped updates" if first else None
        transform = axes.get_xaxis_transform()
        axes.plot(at, np.full(len(at), 0.02), "x", color=colour, ms=6, transform=transform, label=label)


def _with_gaps(record: RunRecord, line: Line) -> tuple[list[int], list[float]]:
    """The line's points; nan where the log says that a number was not finite, so that the line has a gap there."""
    rows = [row for row in getattr(record, line.rows) if line.key in row]
    values = [number(row, line.key) for row in rows]
    return [row["step"] for row in rows], [math.nan if value is None else value for value in values]


def _thin(x: list, y: list) -> tuple[list, list]:
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        values = np.asarray([y[i] for i in part])
        finite = part[np.isfinite(values)]
        if len(finite):
            keep |= {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}
        keep |= set(part[~np.isfinite(values)][:1])
    order = sorted(map(int, keep))
    return [x[i] for i in order], [y[i] for i in order]


def shorten(name: str) -> str:
    """A run's name as a legend shows it: of a long one the end, which is what tells runs apart."""
    name = plain(name if len(name) <= NAME else "…" + name[1 - NAME :])
    return "\u200b" + name if name.startswith("_") else name  # matplotlib leaves out what begins with an underscore


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: dollars would enclose a formula, and control characters end an SVG."""
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")


def counts_images(records: list[RunRecord]) -> bool:
    """Whether pictures of these runs count images: their batches are known and differ."""
    batches = {record.setting("batch") for record in records}
    return len(batches) > 1 and all(isinstance(batch, int) for batch in batches)


def resumed_at(record: RunRecord) -> list[int]:
    """The updates that the run went on from."""
    steps = {int(step) for start in record.starts if (step := number(start, "step"))}
    return sorted(step for step in steps if step < record.updates)


# ---- tables


def curve_table(curve: Curve, records: list[RunRecord]) -> Table:
    """A curve's numbers: each line's first and last point, those on the way, and the best with its update."""
    header = ("curve", "first", "at 1/4", "at half", "at 3/4", "last")
    if curve.best:
        header += ("lowest" if curve.best is min else "highest", "at update")
    rows = []
    for record in records:
        for line in curve.lines:
            steps, values = series(getattr(record, line.rows), line.key)
            if not values:
                continue
            points = [figure_of(values[k * (len(values) - 1) // 4], curve.spec) for k in range(5)]
            if curve.best:
                best = curve.best(range(len(values)), key=values.__getitem__)
                points += [figure_of(values[best], curve.spec), str(steps[best])]
            name = line.name if len(records) == 1 else record.label
            if len(records) > 1 and len(curve.lines) > 1:
                name += f": {line.name}"
            rows.append((name, *points))
    return Table(header, rows)


def pos_history(quantity: Pos, record: RunRecord) -> Table:
    """A quantity of the PE by layer at up to five updates, the first and the last one that are logged among them."""
    rows = [record.pos[round(k)] for k in np.linspace(0, len(record.pos) - 1, min(5, len(record.pos)))]
    found = [by_layer(row, quantity.key) for row in rows]
    return Table(
        ("layer", f"update {rows[0]['step']}", *(str(row["step"]) for row in rows[1:])),
        [(layer_name(k), *(figure_of(each.get(k), quantity.spec) for each in found)) for k in pos_layers(record)],
    )


def pos_comparison(quantity: Pos, records: list[RunRecord]) -> Table:
    """A quantity of the PE by layer in the last `pos` line of each run; every run has one."""
    header = ("layer", *(f"{record.label}, update {record.pos[-1]['step']}" for record in records))
    found = [by_layer(record.pos[-1], quantity.key) for record in records]
    rows = [(layer_name(k), *(figure_of(each.get(k), quantity.spec) for each in found)) for k in all_layers(records)]
    return Table(header, rows)


def by_layer(row: dict[str, Any], key: str) -> dict[int | str, float]:
    """The layers and finite values of a `pos` line."""
    pairs = zip(row["layers"], row[key], strict=True)
    return {layer: value for layer, value in pairs if isinstance(layer, int | str) and finite_number(value) is not None}


def pos_layers(record: RunRecord) -> list[int | str]:
    """The layers of the run's last `pos` line."""
    return [layer for layer in record.pos[-1]["layers"] if isinstance(layer, int | str)] if record.pos else []


def all_layers(records: list[RunRecord]) -> list[int | str]:
    """Every layer that any run's PE goes to, in order."""
    layers = {layer for record in records for layer in pos_layers(record)}
    return sorted(layers, key=lambda layer: (isinstance(layer, str), layer))


def layer_name(layer: int | str) -> str:
    """`layer 3`, or `last norm`."""
    return f"{layer} norm" if isinstance(layer, str) else f"layer {layer}"
