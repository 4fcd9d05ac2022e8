"""The operator benchmarks' plots over many sizes: bandwidth under the roof of a copy, and speed-ups as a heat map."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

import mpvg_kernels as mk

MARKERS = "osD^vP*X<>"
OURS = mk.backends.BACKENDS
Row = dict[str, Any]


def roofline(path: str | Path, rows: Sequence[Row], machine: str) -> None:
    """Bandwidth by the byte model over the bytes of a call: a panel for each operator and mode, a copy as the roof.

    These operators compute little for each byte, so what bounds them is the memory's bandwidth, or for small calls the
    time of a launch: that, not arithmetic intensity, is what the x axis is for.
    """
    panels = _grouped(rows, lambda row: f"{row['op']}, {row['mode']}")
    figure, axes = _axes(len(panels), 5.2, 3.6)
    handles: dict[str, Any] = {}
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "copy"))
    for axis, (panel, group) in zip(axes, panels.items(), strict=False):
        roof = sorted((row["bytes"], row["gbps"]) for row in group if row["provider"] == "copy")
        if roof:
            (handles["copy of the same bytes (roof)"],) = axis.plot(
                *zip(*roof, strict=True), color="#c8553d", linestyle=(0, (4, 2)), marker="_", linewidth=1.4, zorder=1
            )
        for at, name in enumerate(names):
            points = sorted((row["bytes"], row["gbps"]) for row in group if row["provider"] == name)
            if points:
                handles[name] = axis.scatter(
                    *zip(*points, strict=True), s=28 if name in OURS else 18, marker=MARKERS[at % len(MARKERS)],
                    color=_color(name, at), zorder=3 if name in OURS else 2, linewidths=0.4, edgecolors="white",
                )  # fmt: skip
        axis.set(xscale="log", xlabel="bytes of a call", ylabel="GB/s")
        axis.set_ylim(bottom=0)
        axis.set_title(panel, fontsize=10, loc="left")
        axis.grid(color="#e6e6e6", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, path, "Bandwidth under the roof", machine, handles)


def heatmap(path: str | Path, rows: Sequence[Row], machine: str) -> None:
    """How many times faster ours are than torch.compile (than eager, where that was timed more often): D over B x N.

    A panel for each of our backends, operator, mode, inputs and dtype. Blue is faster, red slower, white the same.
    """
    import matplotlib.colors

    ours = [row for row in rows if row["provider"] in OURS and row["speedup_eager"]]
    compiled = [row for row in rows if row["provider"] in OURS and row["speedup_compile"]]
    key, baseline = "speedup_eager", "eager PyTorch"
    if len(compiled) >= len(ours):
        ours, key, baseline = compiled, "speedup_compile", "torch.compile"
    if not ours:
        harness.progress(f"nothing was timed beside a baseline: no heat map in {path}")
        return
    panels = _grouped(
        ours, lambda row: f"{row['provider']}, {row['op']}\n{row['mode']}, {row['inputs']}, {row['dtype']}"
    )
    most = max(len({(row["B"], row["N"]) for row in group}) for group in panels.values())
    figure, axes = _axes(len(panels), max(3.4, 0.62 * most + 1.6), 3.2)
    reach = max(1.0, *(abs(math.log2(row[key])) for row in ours))
    norm = matplotlib.colors.TwoSlopeNorm(0.0, -reach, reach)
    for axis, (panel, group) in zip(axes, panels.items(), strict=False):
        widths = sorted({row["D"] for row in group})
        tokens = sorted({(row["B"], row["N"]) for row in group}, key=lambda bn: (bn[0] * bn[1], bn))
        cells = [[math.nan] * len(tokens) for _ in widths]
        for row in group:
            at = widths.index(row["D"]), tokens.index((row["B"], row["N"]))
            cells[at[0]][at[1]] = math.log2(row[key])
            axis.text(at[1], at[0], f"{row[key]:.1f}", ha="center", va="center", fontsize=7)
        image = axis.imshow(cells, cmap="RdBu", norm=norm, aspect="auto")
        axis.set_xticks(range(len(tokens)), [f"{B}x{N}" for B, N in tokens], fontsize=6.5, rotation=90)
        axis.set_yticks(range(len(widths)), widths, fontsize=7.5)
        axis.set(xlabel="batch x tokens", ylabel="width")
        axis.set_title(panel, fontsize=8.5, loc="left")
    bar = figure.colorbar(image, ax=list(axes), label=f"times faster than {baseline}", shrink=0.8)
    ticks = [t for t in range(-math.floor(reach), math.floor(reach) + 1)]
    bar.set_ticks(ticks, labels=[f"{2.0**t:g}" for t in ticks])
    _finish(figure, path, f"Times faster than {baseline}", machine, {})


def _color(name: str, at: int) -> str:
    import matplotlib

    return harness.COLORS.get(name) or matplotlib.colormaps["tab10"].colors[at % 10]


def _grouped(rows: Sequence[Row], key) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _axes(count: int, width: float, height: float):
    """A figure with `count` axes side by side, three in a line, and no others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(count, 3)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines + 1.0), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat[:count]


def _finish(figure, path: str | Path, title: str, machine: str, handles: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    width = figure.get_size_inches()[0]
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=max(1, min(len(handles), int(width / 1.7))),
        frameon=False, fontsize=8.5, title=textwrap.fill(machine, int(17 * width)), title_fontsize=7,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
