"""What a run did, to look at: one HTML file with everything in it, and the same numbers as Markdown. `mpvg report`.

    mpvg report runs/digits                      runs/digits/report.html and report.md
    mpvg report runs/digits runs/digits-gap      runs/comparison.html and comparison.md

Curves, tables and config come from the run's folder alone; sample predictions, confusion matrix and calibration need
its weights and its data. Where those are missing a sentence says so, and the rest is written.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from .. import __version__
from ..train import InputError, TrainingError, config, recipes
from ..train.curves import (
    POS,
    counts_images,
    curve_table,
    curves,
    draw,
    panel,
    pos_by_layer,
    pos_comparison,
    pos_history,
    pos_over_updates,
)
from ..train.record import RunRecord, collect_all, duration, finite_number, number
from ..train.report import FAIR, MORE, facts, kept_sections, results_table
from ..train.run_folder import print_warning, whole_file
from ..train.table import Table, figure_of
from . import class_report, dense_report
from .page import Block, Fold, Note, Page, Panel, Panels, Picture, Section, State, Text, svg_uri, to_html, to_markdown

Evaluation: TypeAlias = class_report.Evaluation | dense_report.Evaluation


def report(
    paths: Sequence[Path],
    weights: str = "last",
    fields: Sequence[str] = (),
    *,
    out: Path | None = None,
    images: int = 24,
    use_model: bool = True,
) -> tuple[Path, Path]:
    """Write the report of a run, or of several side by side.

    Args:
        paths: run folders.
        weights: best, last or ema: whose predictions are shown.
        fields: config fields that differ from the run's when its weights are evaluated, as on the command line.
        out: the HTML file; the Markdown is beside it. None is RUN/report.html, of several runs comparison.html in the
            folder that holds the first.
        images: sample images that are shown.
        use_model: False reads the folders alone.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        InputError: none of the folders can be read, or the report can't be written.
    """
    if out is not None and out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {out}: expected a name that ends in .html; the Markdown is written beside it")
    if images < 0:
        raise InputError(f"--images {images}: expected 0 or more")
    records, problems = collect_all(list(paths))
    if not records:
        raise InputError(" ".join(problems).removesuffix("; the run is left out."))
    for record in records:
        problems += record.problems
    evaluations: list[Evaluation] = []
    try:
        for record in records if use_model else ():
            try:
                evaluations.append(_of(record).evaluate(record, weights, fields))
            except (InputError, TrainingError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
                said = " ".join(str(error).split()) or type(error).__name__
                problems.append(
                    f"{record.path}: no predictions of the {weights} weights are shown: {said.rstrip('.')}."
                )
        page = build(records, evaluations, problems, weights, images)
    finally:
        for each in evaluations:
            each.close()
    for sentence in problems:
        print_warning(sentence)
    if out is None:
        first = records[0].path
        out = first / "report.html" if len(records) == 1 else first.absolute().parent / "comparison.html"
    twin = out.with_suffix(".md")
    kept = kept_sections(twin)
    try:
        markdown = to_markdown(page) + (f"\n{MORE}\n\n{kept}\n" if kept else "")
        for path, text in ((out, to_html(page)), (twin, markdown)):
            with whole_file(path) as file:
                file.write(text)
    except OSError as error:
        raise InputError(f"{error.filename or out} can't be written ({error.strerror})") from None
    return out, twin


def build(
    records: list[RunRecord], evaluations: list[Evaluation], problems: list[str], weights: str, images: int
) -> Page:
    """The report as a page; finds more `problems` where the runs can't be compared."""
    one = records[0] if len(records) == 1 else None
    if one is None and not same_data(records):
        problems.append(
            "The runs are of different data: "
            + "; ".join(f"{record.label}: {_data(record)}" for record in records)
            + ". Their figures can't be compared, and no predictions are shown side by side."
        )
    sections = [Section("Results", _results(records))]
    if curves := _curves(records):
        sections.append(Section("Curves", curves))
    sections.append(Section("Position embedding", _pos(records)))
    sections += _from_weights(records, evaluations, problems, weights, images)
    sections.append(Section("Config", _recipe_difference(one) if one else _run_differences(records)))
    sections.append(Section("Machine, time and cost", _facts(records)))
    head: list[Block] = [_state(one)] if one else [_overview(records)]
    title = one.label if one else f"{len(records)} runs: {', '.join(record.label for record in records)}"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Page(title, head + [Note(each) for each in problems], sections, f"mpvg report {__version__}, {when}")


def _of(record: RunRecord) -> ModuleType:
    """What evaluates a run's weights and reports on them."""
    return class_report if record.task == "classification" else dense_report


def _from_weights(
    records: list[RunRecord], evaluations: list[Evaluation], problems: list[str], weights: str, images: int
) -> list[Section]:
    """What the weights say, of each task apart."""
    sections = []
    tasks = dict.fromkeys(record.task for record in records)
    for task in tasks:
        runs, found = (
            [r for r in records if r.task == task],
            [e for e in evaluations if e.record.task == task],
        )
        if not found:
            continue
        comparable = len(runs) == 1 or same_data(runs)
        if comparable and not _of(runs[0]).same_images(found):
            comparable = False
            problems.append("The runs' held-out images are not the same: no predictions are shown side by side.")
        mine = _of(runs[0]).sections(found, weights, images, len(runs) == 1, comparable)
        sections += mine if len(tasks) == 1 else [s._replace(title=f"{s.title}: {task}") for s in mine]
    return sections


# ---- from the logs


def _progress(record: RunRecord) -> str:
    rows = [row for rows in (record.train, record.epochs) for row in rows[-1:]]
    epoch = max((int(row["epoch"]) for row in rows if number(row, "epoch") is not None), default=None)
    total = [finite_number(record.setting(name)) for name in ("epochs", "sched.cooldown_epochs")]
    of = f" of {sum(map(int, total))}" if None not in total else ""
    text = f"update {record.updates:,}" + (f" of {record.total:,}" if record.total else "")
    text += f", epoch {epoch}{of}" if epoch is not None else ""
    return text + (f"; {record.status['error']}" if record.status.get("error") else "")


def _state(record: RunRecord) -> State:
    recipe = f"recipe {record.info['recipe']}, " if record.info.get("recipe") else ""
    return State(record.state, recipe + _progress(record), record.updates, record.total)


def _main(record: RunRecord) -> str:
    """The main figure, with its name where it is not the accuracy."""
    name = "" if record.task == "classification" else f"{record.figures.main.name} "
    return f"{name}{record.result()}" if record.evaluated else "-"


def _overview(records: list[RunRecord]) -> Table:
    rows = []
    for record in records:
        parameters, seconds = number(record.info, "parameters"), record.seconds()
        rows.append(
            (
                *(record.label, record.state, _progress(record)),
                *(record.setting("model.name") or "-", record.setting("model.scheme") or "-"),
                *(figure_of(parameters, ",.0f"), "-" if seconds is None else duration(seconds)),
                _main(record),
            )
        )
    names = dict.fromkeys(record.figures.main.name for record in records)
    header = ("run", "state", "how far", "model", "scheme", "parameters", "time", f"test {' or '.join(names)}")
    return Table(header, rows)


def _results(records: list[RunRecord]) -> list[Block]:
    table = results_table(records)
    return [table, Text(FAIR)] if table.rows else [Text("Nothing has been evaluated yet.")]


def _curves(records: list[RunRecord]) -> list[Block]:
    panels = []
    for curve in curves(records):
        table = curve_table(curve, records)
        if not table.rows:
            continue
        figure, axes = panel()
        draw(axes, curve, records)
        alt = f"{curve.title} over the updates of {_names(records)}; the table below has its numbers"
        panels.append(Panel(curve.title, Picture(svg_uri(figure), alt), table))
    if not panels:
        return []
    text = "Training figures are means over the intervals of the log, on augmented images"
    if len(records) > 1:
        text += "; pale lines are training batches"
        text += ", dashed ones the average of the weights" if any(r.setting("optim.ema_decay") for r in records) else ""
    if counts_images(records):
        text += "; the runs' batches differ, so the pictures count images and not updates"
    return [Text(f"{text}."), Panels(panels)]


def _pos(records: list[RunRecord]) -> list[Block]:
    found = [record for record in records if record.pos]
    if not found:
        text = "The log has no lines on the position embedding: no norm of the model takes one (default, gap), "
        return [Text(text + "log.pos_interval is None, or none was due yet.")]
    panels = []
    for quantity in POS:
        if len(records) == 1:
            table = pos_history(quantity, records[0])
            alt = f"{quantity.title} in each layer over the updates; the table below has its numbers"
            picture = Picture(svg_uri(pos_over_updates(quantity, records[0])), alt)
            panels.append(Panel(f"{quantity.title} over the updates", picture, table))
    for quantity in POS:
        alt = f"{quantity.title} by layer at the end of the log of {_names(found)}; the table below has its numbers"
        picture = Picture(svg_uri(pos_by_layer(quantity, records)), alt)
        panels.append(Panel(f"{quantity.title}, last state by layer", picture, pos_comparison(quantity, found)))
    text = (
        "LN'(pos) is the position embedding as a layer gets it, LN(x) the tokens that it is added to; the last norm is "
        "that before pooling. A negative correlation means that the embedding works against the tokens."
    )
    if none := [record for record in records if not record.pos]:
        text += f" The log of {_names(none)} has no lines on it."
    return [Text(text), Panels(panels)]


def _names(records: list[RunRecord]) -> str:
    return ", ".join(record.label for record in records)


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Config fields by dotted names, as text."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _recipe_difference(record: RunRecord) -> list[Block]:
    name = str(record.info.get("recipe", ""))  # a config of one's own has none
    try:
        expected, of = recipes.load(name), f"recipe {name}"
    except InputError:
        expected, of = config.Config(), "the defaults"
    before, now = _flat(config.to_dict(expected)), _flat(record.config)
    rows = [(key, before.get(key, "-"), now[key]) for key in now if before.get(key) != now[key]]
    blocks: list[Block] = [Table(("field", of, "run"), rows)] if rows else [Text(f"Nothing differs from {of}.")]
    return blocks + [Fold("The whole config", [Table(("field", "value"), list(now.items()))])]


def _run_differences(records: list[RunRecord]) -> list[Block]:
    each = [{"recipe": str(record.info.get("recipe", "-"))} | _flat(record.config) for record in records]
    keys = list(dict.fromkeys(key for values in each for key in values))
    rows = [(key, *(values.get(key, "-") for values in each)) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return [Text("The runs' configs are the same.")]
    return [Text("Fields that differ:"), Table(("field", *(record.label for record in records)), rows)]


def _facts(records: list[RunRecord]) -> list[Block]:
    each = [facts(record) for record in records]
    keys = dict.fromkeys(key for found in each for key in found)
    rows = [(key, *(found.get(key, "-") for found in each)) for key in keys]
    if len(records) == 1:
        return [Table(("", "run"), rows)]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if row not in differ]
    blocks: list[Block] = [Table(("", *(record.label for record in records)), differ)]
    return blocks + ([Text("The same for every run:"), Table(("", "every run"), same)] if same else [])


def same_data(records: list[RunRecord]) -> bool:
    """Whether the runs are of the same task, data set, split and classes, as far as their folders tell."""
    keys = ("data.name", "data.val_split")
    kinds = {
        json.dumps([r.task, [r.setting(key) for key in keys], r.info.get("class_names")], default=str) for r in records
    }
    return len(kinds) == 1


def _data(record: RunRecord) -> str:
    names = record.info.get("class_names")
    count = f", {len(names)} classes" if isinstance(names, list) else ""
    task = "" if record.task == "classification" else f" ({record.task})"
    return f"{record.setting('data.name')}{count}{task}"
