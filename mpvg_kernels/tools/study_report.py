"""What a study's runs say: the comparisons, a sentence that claims no more than their intervals, study.md, pictures.

`result` makes the dictionary of study.json from numbers alone; everything else here is made from that dictionary.
"""

import itertools
import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..train.record import duration
from ..train.run_folder import whole_file
from ..train.table import Table, figure_of
from .pictures import save
from .statistics import binomial_error, estimate, holm, sign_flip_test, t_test

BASELINES = ("default", "gap")
"""What every scheme is compared with: the paper says that MPVG is above both. Its variants are compared with mpvg."""
LEVEL = 0.95
WIDTH, DPI = 5.4, 140
"""Of the pictures, in inches: on a phone their text is as large as a page's small print."""


def pairs(schemes: Sequence[str]) -> list[tuple[str, str]]:
    """(baseline, scheme) of the comparisons, each once: with `default` and `gap`, and of mpvg's variants with mpvg.

    Where neither `default` nor `gap` is there, the first scheme is the baseline.
    """
    baselines = [name for name in BASELINES if name in schemes] or list(schemes[:1])
    found = []
    for baseline in baselines:
        found += [(baseline, name) for name in schemes if name != baseline and (name, baseline) not in found]
    variants = [name for name in schemes if name.startswith("mpvg(")] if "mpvg" in schemes else []
    return found + [("mpvg", name) for name in variants if ("mpvg", name) not in found]


def compare(accuracies: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    """The paired differences of `pairs`: scheme minus baseline, at the seeds that both have.

    Args:
        accuracies: scheme -> per cent by seed, None where there is none.

    Returns:
        For each: baseline, scheme, differences (by seed, None where there is none), n, mean, sd, low, high (95 %
        interval), t_p, sign_flip_p, holm_p (t_p adjusted for all comparisons). None where one seed alone, or seeds
        without any spread, give no number.
    """
    found = []
    for baseline, scheme in pairs(list(accuracies)):
        both = zip(accuracies[scheme], accuracies[baseline], strict=True)
        differences = [None if None in pair else pair[0] - pair[1] for pair in both]
        there = [difference for difference in differences if difference is not None]
        row = {"baseline": baseline, "scheme": scheme, "differences": differences}
        if there:
            row |= estimate(there)._asdict() | {"t_p": t_test(there), "sign_flip_p": sign_flip_test(there)}
            found.append(row)
    tested = [row for row in found if row["t_p"] is not None]
    for row in found:
        row["holm_p"] = None
    for row, adjusted in zip(tested, holm([row["t_p"] for row in tested]), strict=True):
        row["holm_p"] = adjusted
    return found


def result(
    about: dict[str, Any], schemes: Mapping[str, dict[str, Any]], images: int | None, failed: Mapping[str, str]
) -> dict[str, Any]:
    """What study.json holds.

    Args:
        about: what the study is (recipe, fields, seeds), taken over.
        schemes: scheme -> parameters, and by seed, None where there is none: accuracy (per cent), loss, pos
            (`diagnostics.pos_statistics`), bias_variance.
        images: held-out images, where they could be counted.
        failed: run -> why it failed.
    """
    rows = {}
    for name, found in schemes.items():
        row = dict(found)
        for key in ("accuracy", "loss", "bias_variance"):
            values = [value for value in found[key] if value is not None]
            row[f"{key}_estimate"] = estimate(values)._asdict() if values else None
        row["correlation"] = _by_layer(found["pos"], "correlation")
        row["pos_norm"] = _by_layer(found["pos"], "pos_norm")
        rows[name] = row
    every = [value for found in schemes.values() for value in found["accuracy"] if value is not None]
    mean = sum(every) / len(every)
    known = about | {"test_images": images, "accuracy_of_all": mean}
    known["image_percent"] = 100 / images if images else None
    known["binomial_error"] = binomial_error(mean, images) if images else None
    found = known | {"schemes": rows, "comparisons": compare({n: s["accuracy"] for n, s in schemes.items()})}
    return found | {"claim": claim(found["comparisons"]), "failed": dict(failed)}


def _by_layer(statistics: Sequence[dict[str, list] | None], key: str) -> list[dict[str, Any]]:
    """One quantity of `pos_statistics` by layer: the layer, and its estimate over the seeds."""
    values: dict[Any, list[float]] = {}
    for each in filter(None, statistics):
        for layer, value in zip(each["layers"], each[key], strict=True):
            if value is not None:
                values.setdefault(layer, []).append(value)
    return [{"layer": layer, **estimate(found)._asdict()} for layer, found in values.items()]


# ---- words


def beyond(row: dict[str, Any]) -> bool:
    """Whether the interval of a paired difference leaves out 0."""
    return row["low"] is not None and (row["low"] > 0 or row["high"] < 0)


def claim(comparisons: Sequence[dict[str, Any]]) -> str:
    """What the comparisons allow to say, in a few sentences."""
    with_interval = [row for row in comparisons if row["low"] is not None]
    if not with_interval:
        return "There is no interval of any difference yet: at least two seeds of two schemes are needed."
    baselines = list(dict.fromkeys(row["baseline"] for row in with_interval))
    found = [row for row in with_interval if beyond(row)]
    if not found:
        text = f"No scheme differs from {_listed(baselines, 'or')} beyond the 95 % interval of its paired difference."
    else:
        said = []
        for baseline in baselines:
            theirs = [
                f"{row['scheme']} {row['mean']:+.2f} ({_interval(row)})" for row in found if row["baseline"] == baseline
            ]
            said += [f"against {baseline}, {_listed(theirs)}"] if theirs else []
        names = [f"{row['scheme']} against {row['baseline']}" for row in found if row["holm_p"] <= 1 - LEVEL]
        remaining = f"what remains is {_listed(names)}" if names else "none remains"
        text = (
            f"Paired differences beyond their 95 % interval, in points: {'; '.join(said)}. The other "
            f"{len(with_interval) - len(found)} of {len(with_interval)} comparisons are within theirs. Where nothing "
            f"differs one comparison in twenty looks so; with Holm's correction for all of them {remaining}."
        )
    n = max(row["n"] for row in with_interval)
    least = 2 / 2**n
    if least > 1 - LEVEL:
        text += f" With {n} seeds the exact sign-flip test can't go below {least:g}, and so can't confirm any at 5 %."
    half = plain.median((row["high"] - row["low"]) / 2 for row in with_interval)
    return f"{text} Half the intervals are wider than ±{half:.2f} points: differences that small can't be seen here."


def _listed(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _interval(row: Mapping[str, Any] | None, digits: int = 2) -> str:
    return "-" if row is None or row["low"] is None else f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"


def markdown(found: dict[str, Any]) -> str:
    """study.md."""
    seeds, images = len(found["seeds"]), found["test_images"]
    rows = []
    for name, row in found["schemes"].items():
        mean, loss = row["accuracy_estimate"], row["loss_estimate"]
        if mean is None:
            rows.append((name, "no run finished", *"-----"))
            continue
        each = ", ".join(figure_of(value, ".1f") for value in row["accuracy"])
        cells = (f"{mean['mean']:.2f}", _interval(mean), figure_of(mean["sd"], ".2f"), each)
        rows.append((name, *cells, _mean_and_deviation(loss, ".3f"), f"{row['parameters']:,}"))
    header = ("scheme", "accuracy, %", "95 % interval", "deviation", "by seed", "loss", "parameters")
    title = f"# {found['recipe']}: {len(found['schemes'])} position schemes, {seeds} seed{'s' * (seeds > 1)}"
    parts = [title, found["claim"]]
    size = ""
    if images:
        size = (
            f" There are {images:,} of them: one is {found['image_percent']:.2g} points, and the binomial standard "
            f"error of an accuracy of {found['accuracy_of_all']:.1f} % is {found['binomial_error']:.2g} points."
        )
    parts.append(
        f"Accuracy and loss are those of the last epoch on the held-out images, never of the best epoch.{size}\n\n"
        f"{Table(header, rows).markdown()}\n\n![accuracy of each scheme: every seed, mean and interval](accuracy.png)"
    )
    parts.append(_differences(found))
    parts.append(_position(found))
    parts.append(_limits(found))
    if found["failed"]:
        lines = "\n".join(f"- {run}: {reason}" for run, reason in found["failed"].items())
        parts.append(f"## Runs that failed\n\nThe tables leave them out; the same command tries them again.\n\n{lines}")
    parts.append(_cost(found))
    return "\n\n".join(parts) + "\n"


def _differences(found: dict[str, Any]) -> str:
    tested = sum(row["holm_p"] is not None for row in found["comparisons"])
    text = [
        "## Paired differences",
        "Scheme minus baseline at the same seed, in points, with the mean's 95 % interval by Student's t. p (flip) is "
        "the exact sign-flip test's, p (t) the paired t-test's, p (Holm) the latter adjusted for all "
        f"{tested} comparisons. A dash: the differences are all the same, or there is one alone.",
    ]
    header = ("scheme", "difference", "95 % interval", "without 0", "p (flip)", "p (t)", "p (Holm)")
    for baseline, group in itertools.groupby(found["comparisons"], key=lambda row: row["baseline"]):
        rows = []
        for row in group:
            p_values = (figure_of(row[key], ".3f") for key in ("sign_flip_p", "t_p", "holm_p"))
            without_0 = "-" if row["low"] is None else "yes" if beyond(row) else "no"
            cells = (f"{row['mean']:+.2f}", _interval(row), without_0, *p_values)
            rows.append((row["scheme"], *cells))
        text.append(f"Against `{baseline}`:\n\n{Table(header, rows).markdown()}")
    return "\n\n".join([*text, "![paired differences: every seed, mean and interval](differences.png)"])


def _position(found: dict[str, Any]) -> str:
    title = "## The position embedding in the norms"
    if found["position"]["images"] is None:
        return f"{title}\n\nNot looked at: {found['position']['reason']}."
    layers = layers_of(found)
    rows = []
    for name, row in found["schemes"].items():
        by_layer = {each["layer"]: each for each in row["correlation"]}
        cells = [_mean_and_deviation(by_layer.get(layer), ".2f") for layer in layers]
        rows.append((name, *cells, _mean_and_deviation(row["bias_variance_estimate"], ".1e")))
    header = ("scheme", *(f"layer {layer}" if layer != "last" else "last norm" for layer in layers))
    text = (
        "Correlation between the layer-normed tokens LN_l(x), their mean over the images, and the layer-normed "
        "position embedding LN'_l(pos), from the last weights on "
        f"{found['position']['images']} held-out images; and the variance of the last norm's bias. Mean over the seeds "
        "± deviation; a dash where the scheme gives the norm none. In the paper's DeiT-Ti the correlation falls from "
        "-0.37 in layer 1 to -0.95 in layer 11, and the variance is 0.2387 in PVG and 0.0193 in MPVG. Where the last "
        "norm takes a position embedding it has two biases, LN's and LN''s, with the same gradient: from the same "
        "start and without decay they stay equal, and their sum, which is what the head sees, has four times the "
        "variance given here."
    )
    picture = "![correlation by layer, and variance of the last norm's bias](correlation.png)"
    return "\n\n".join([title, text, Table((*header, "bias variance"), rows).markdown(), picture])


def _mean_and_deviation(row: Mapping[str, Any] | None, form: str) -> str:
    if row is None:
        return "-"
    return f"{row['mean']:{form}}" + (f" ± {row['sd']:{form}}" if row["sd"] is not None else "")


def _limits(found: dict[str, Any]) -> str:
    paper = (
        "The paper's methods are tenths of a point to two points apart on ImageNet-1K and CIFAR-100. Small data and a "
        "small model can't settle that ranking: what is found here, either way, is about this data and this model."
        if found["small"]
        else "The paper's ranking is about its own data, models and recipes; a study of others, or of fewer epochs, "
        "neither confirms nor refutes it."
    )
    lines = [
        "Runs of one seed take the same images in the same order with the same augmentation. Schemes that pool also "
        "begin with the same weights, as an LN' begins at 1 and 0. A class token changes what is drawn after it: pairs "
        "of a pooled scheme with `default` or `lape` share the images, not the initial weights.",
        "The intervals are about the seeds, on these held-out images. Other images would move each accuracy by about "
        "the binomial standard error, and a difference by less, as all schemes are tested on the same ones.",
        "Student's t takes the differences for normal, which a few whole numbers of images are not: an interval that "
        "just leaves out 0 is a hint.",
        paper,
    ]
    return "\n".join(["## What this says, and what it does not", "", *(f"- {line}" for line in lines)])


def _cost(found: dict[str, Any]) -> str:
    cost = found["cost"]
    lines = [f"    {found['command']}", ""]
    if cost["runs"]:
        lines.append(
            f"- Cost: {duration(cost['cpu_s'])} of CPU time, {duration(cost['wall_s'])} of wall time, summed over "
            f"{cost['runs']} runs. What was killed on the way is not counted."
        )
    lines += [f"- Machine: {machine}" for machine in cost["machines"]]
    lines += [f"- Versions: {versions}" for versions in cost["versions"]]
    return "\n".join(["## Command and cost", "", *lines])


# ---- pictures


def layers_of(found: dict[str, Any]) -> list[Any]:
    """The layers that any scheme gives a PE, in order, "last" at the end."""
    seen = {each["layer"] for row in found["schemes"].values() for each in row["correlation"]}
    return sorted(seen - {"last"}) + [layer for layer in ("last",) if layer in seen]


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """A row for each name, the first on top."""
    axes.set_yticks(range(len(names)), [name.replace("(", "\n(") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)


def _points(
    axes: Axes,
    y: int,
    values: Sequence[float | None],
    mean: Mapping[str, Any] | None,
    colour: str = "C0",
    label: str = "mean and its 95 % interval",
) -> None:
    """The seeds' values as rings under the row's middle line, and their mean with its interval on it."""
    there = [value for value in values if value is not None]
    spread = [y + 0.16 + 0.06 * i for i in range(len(there))]
    axes.plot(there, spread, "o", mfc="none", mec="0.45", ms=4, mew=0.9, label="a seed")
    if mean is not None:
        half = 0 if mean["low"] is None else mean["high"] - mean["mean"]
        axes.errorbar(mean["mean"], y, xerr=half, fmt="D", color=colour, ms=6, lw=2, capsize=4, label=label)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend under the whole figure, each label once."""
    found = [zip(*reversed(axes.get_legend_handles_labels()), strict=True) for axes in panels]
    once = dict(itertools.chain(*found))
    figure.legend(once.values(), once.keys(), loc="outside lower center", frameon=False, fontsize=9)


def draw_accuracy(found: dict[str, Any]) -> Figure:
    """Every seed's accuracy, mean and interval by scheme; a band shows the binomial standard error."""
    names = list(found["schemes"])
    figure = Figure((WIDTH, 1.5 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    if found["binomial_error"]:
        middle, error = found["accuracy_of_all"], found["binomial_error"]
        label = "± binomial standard error of one accuracy"
        axes.axvspan(middle - error, middle + error, color="C0", alpha=0.12, lw=0, label=label)
    for y, row in enumerate(found["schemes"].values()):
        _points(axes, y, row["accuracy"], row["accuracy_estimate"])
    _rows(axes, names)
    size = f" (one image: {found['image_percent']:.2g})" if found["test_images"] else ""
    axes.set_xlabel(f"accuracy on the held-out images, %{size}")
    _legend(figure, [axes])
    return figure


def draw_differences(found: dict[str, Any]) -> Figure:
    """The paired differences, a panel for each baseline; orange where the interval leaves out 0."""
    groups = [(k, list(g)) for k, g in itertools.groupby(found["comparisons"], key=lambda row: row["baseline"])]
    heights = [len(group) + 1.5 for _, group in groups]
    figure = Figure((WIDTH, 0.8 + 0.48 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (baseline, group) in zip(panels, groups, strict=True):
        axes.axvline(0, color="0.3", lw=1)
        for y, row in enumerate(group):
            style = ("C1", "the interval leaves out 0") if beyond(row) else ()
            _points(axes, y, row["differences"], row, *style)
        _rows(axes, [row["scheme"] for row in group])
        axes.set_title(f"accuracy minus that of {baseline}", fontsize=11)
    panels[-1].set_xlabel("difference at the same seed, points")
    _legend(figure, panels)
    return figure


def draw_correlation(found: dict[str, Any]) -> Figure:
    """Correlation of LN_l(x) and LN'_l(pos) by layer, and the variance of the last norm's bias."""
    layers, names = layers_of(found), list(found["schemes"])
    heights = (4.4, 0.5 + 0.46 * len(names))
    figure = Figure((WIDTH, 1.8 + sum(heights)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    shown = [name for name in names if found["schemes"][name]["correlation"]]
    for i, name in enumerate(shown):
        rows = found["schemes"][name]["correlation"]
        x = [layers.index(row["layer"]) + 0.06 * (i - (len(shown) - 1) / 2) for row in rows]
        spread = [row["sd"] or 0 for row in rows]
        style = {"marker": "osD^vPX*"[i % 8], "ls": ("-", "--", ":")[i // 3 % 3], "color": f"C{i % 10}"}
        top.errorbar(x, [row["mean"] for row in rows], spread, ms=5, lw=1.4, capsize=2, label=name, **style)
    top.axhline(0, color="0.3", lw=1)
    top.set_xticks(range(len(layers)), [f"layer {layer}" if layer != "last" else "last norm" for layer in layers])
    top.set(ylabel="correlation of LN(x) and LN'(pos)", title="mean and deviation over the seeds")
    top.grid(alpha=0.3)
    if shown:
        top.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), frameon=False, fontsize=9, ncols=2)
    for y, name in enumerate(names):
        row = found["schemes"][name]
        _points(bottom, y, row["bias_variance"], row["bias_variance_estimate"])
    _rows(bottom, names)
    bottom.set_xlabel("variance of the last norm's bias")
    bottom.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def write(found: dict[str, Any], out: Path) -> None:
    """Write study.md and the pictures into `out`.

    Raises:
        OSError: they can't be written.
    """
    save(draw_accuracy(found), out / "accuracy.png", dpi=DPI)
    save(draw_differences(found), out / "differences.png", dpi=DPI)
    if found["position"]["images"] is not None:
        save(draw_correlation(found), out / "correlation.png", dpi=DPI)
    text = markdown(found)
    with whole_file(out / "study.md") as file:
        file.write(text)
