"""What a run did, to look at: one HTML file with everything in it, and the same numbers as Markdown. `mpvg report`.

    mpvg report runs/digits                      runs/digits/report.html and report.md
    mpvg report runs/digits runs/digits-gap      runs/comparison.html and comparison.md

Curves, tables and config come from the run's folder alone; sample predictions, confusion matrix and calibration need
its weights and its data. Where those are missing a sentence says so, and the rest is written.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
from ..train.data import EvalImages, open_images
from ..train.distributed import pick_device
from ..train.record import RunRecord, collect_all, duration, finite_number, number
from ..train.report import FAIR, MORE, facts, kept_sections, results_table
from ..train.run_folder import print_warning, whole_file
from ..train.table import Table, figure_of
from . import pictures
from .evaluate import Predictions, predictions, summary
from .page import (
    Block,
    Fold,
    Gallery,
    Heat,
    Note,
    Page,
    Panel,
    Panels,
    Picture,
    Sample,
    Section,
    State,
    Text,
    image_uri,
    svg_uri,
    to_html,
    to_markdown,
    uri,
)

SPLIT = "validation"
HEAT_CLASSES = 20
"""Most classes whose confusion matrix is a table; of more it is a picture."""
FEW_CLASSES = 20
"""Most classes whose table is open."""
CLASS_ROWS = 100
"""Most classes in a table; of more, the least accurate ones."""


class Evaluation(NamedTuple):
    """What a run's weights say of the held-out images."""

    record: RunRecord
    images: EvalImages
    found: Predictions
    summary: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return [row["name"] for row in self.summary["per_class"]]


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
                evaluations.append(evaluate(record, weights, fields))
            except (InputError, TrainingError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
                said = " ".join(str(error).split()) or type(error).__name__
                problems.append(
                    f"{record.path}: no predictions of the {weights} weights are shown: {said.rstrip('.')}."
                )
        page = build(records, evaluations, problems, weights, images)
    finally:
        for each in evaluations:
            each.images.close()
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
    comparable = one is not None or same_data(records)
    if not comparable:
        problems.append(
            "The runs are of different data: "
            + "; ".join(f"{record.label}: {_data(record)}" for record in records)
            + ". Their accuracies can't be compared, and no predictions are shown side by side."
        )
    elif not _same_images(evaluations):
        comparable = False
        problems.append("The runs' held-out images are not the same: no predictions are shown side by side.")
    sections = [Section("Results", _results(records))]
    if curves := _curves(records):
        sections.append(Section("Curves", curves))
    sections.append(Section("Position embedding", _pos(records)))
    if evaluations:
        sections.append(Section("Evaluation", _evaluation(evaluations, weights, one is not None)))
    if evaluations and comparable:
        samples = _samples(evaluations[0], images) if one else _disagreements(evaluations, images)
        sections.append(Section("Sample predictions", samples))
        sections.append(Section("Confusion matrix", _confusion(evaluations, one is not None)))
        sections.append(Section("Classes", _classes(evaluations, one is not None)))
    sections.append(Section("Config", _recipe_difference(one) if one else _run_differences(records)))
    sections.append(Section("Machine, time and cost", _facts(records)))
    head: list[Block] = [_state(one)] if one else [_overview(records)]
    title = one.label if one else f"{len(records)} runs: {', '.join(record.label for record in records)}"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Page(title, head + [Note(each) for each in problems], sections, f"mpvg report {__version__}, {when}")


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
    """Whether the runs are of the same data set, split and classes, as far as their folders tell."""
    keys = ("data.name", "data.val_split")
    kinds = {json.dumps([[r.setting(key) for key in keys], r.info.get("class_names")], default=str) for r in records}
    return len(kinds) == 1


def _data(record: RunRecord) -> str:
    names = record.info.get("class_names")
    count = f", {len(names)} classes" if isinstance(names, list) else ""
    return f"{record.setting('data.name')}{count}"


# ---- from the weights


def _same_images(evaluations: list[Evaluation]) -> bool:
    """Whether classes, and the labels at the same places of the splits, are the same."""
    labels: dict[int, int] = {}
    for each in evaluations:
        for index, label in zip(each.found.index.tolist(), each.found.label.tolist(), strict=True):
            if labels.setdefault(index, label) != label:
                return False
    return len({tuple(each.names) for each in evaluations}) <= 1


def evaluate(record: RunRecord, weights: str, fields: Sequence[str] = ()) -> Evaluation:
    """Let the run's weights look at the held-out images of its data.

    Raises:
        InputError: the weights or the data are not there, or do not fit each other.
        TrainingError: no image could be read.
    """
    from ..train.loop import check_classes

    settings, names = record.folder.config(), record.info.get("class_names")
    if fields:
        settings = config.from_args(settings, list(fields), "mpvg report RUN")
    model = record.folder.model(weights)
    device = pick_device(settings.device)
    images = open_images(settings, device, SPLIT, class_names=names)
    try:
        check_classes(record.folder, images.class_names)
        if images.num_classes != model.num_classes:
            raise InputError(f"the data has {images.num_classes} classes and the model {model.num_classes}")
        found = predictions(model.to(device), images, settings, progress=True)
    except BaseException:
        images.close()
        raise
    return Evaluation(record, images, found, summary(found, images.num_classes, images.class_names))


def _evaluation(evaluations: list[Evaluation], weights: str, one: bool) -> list[Block]:
    def row(each: Evaluation) -> tuple:
        got = each.summary
        numbers = (
            figure_of(got["acc"], ".2f", " %"),
            figure_of(got["acc5"], ".2f", " %"),
            figure_of(got["loss"], ".4f"),
        )
        name = weights if one else each.record.label
        return (name, got["images"], *numbers, *(figure_of(got[k], ".2f", " %") for k in ("confidence", "ece")))

    header = (
        "weights" if one else "run",
        "images",
        "accuracy",
        "top-5",
        "loss",
        "mean confidence",
        "calibration error",
    )
    text = f"The {weights} weights on the held-out images."
    bad = sum(len(each.images.bad) for each in evaluations)
    text += f" {bad} images that can't be read are left out." if bad else ""
    blocks: list[Block] = [Text(text), Table(header, [row(each) for each in evaluations])]
    panels = []
    for each in evaluations:
        ece, bins = each.summary["ece"], each.summary["calibration"]
        figure = pictures.reliability_diagram(bins, ece)
        alt = f"Reliability diagram of {each.record.label}: accuracy over confidence, calibration error {ece:.2f} %"
        rows = [
            (f"{100 * b['low']:.0f} to {100 * b['high']:.0f} %", b["images"])
            + tuple(figure_of(b[key], ".1f", " %") for key in ("confidence", "acc"))
            for b in bins
            if b["images"]
        ]
        table = Table(("confidence", "images", "mean confidence", "accuracy"), rows)
        title = "Calibration" if one else f"Calibration of {each.record.label}"
        panels.append(Panel(title, Picture(svg_uri(figure), alt), table))
    return blocks + ([Panels(panels)] if one else [Fold("Calibration of each run", [Panels(panels)])])


def _samples(evaluation: Evaluation, count: int) -> list[Block]:
    """Mistakes, the most confident first, and images that are right, from all over the split."""
    found, names = evaluation.found, evaluation.names
    right = found.top[:, 0] == found.label
    wrong = (~right).nonzero()[:, 0]
    wrong = wrong[found.prob[wrong, 0].argsort(descending=True, stable=True)]
    rest = right.nonzero()[:, 0]
    shown = wrong[: max(count - count // 4, count - len(rest))]
    chosen = torch.linspace(0, max(len(rest) - 1, 0), min(count - len(shown), len(rest))).long()
    rows = torch.cat([shown, rest[chosen]])

    def caption(i: int) -> tuple[tuple[str, ...], bool]:
        label, best = names[found.label[i]], names[found.top[i, 0]]
        return (label, best, f"{100 * found.prob[i, 0]:.1f} %"), bool(right[i])

    text = f"{len(wrong)} of {len(right)} images are mistaken."
    if not len(rows):
        return [Text(text)]
    text += " The most confident mistakes come first (orange), then images that are right (blue)."
    return [Text(text), _gallery(evaluation, ("label", "predicted", "probability"), rows.tolist(), caption)]


def _disagreements(evaluations: list[Evaluation], count: int) -> list[Block]:
    """Images that not all runs say the same of: first those that most runs get wrong."""
    places = [dict(zip(each.found.index.tolist(), range(len(each.found.index)), strict=True)) for each in evaluations]
    common = [index for index in places[0] if all(index in place for place in places)]
    said = [
        (index, [int(each.found.top[place[index], 0]) for each, place in zip(evaluations, places, strict=True)])
        for index in common
    ]
    first, names = evaluations[0], evaluations[0].names
    label = {index: int(first.found.label[places[0][index]]) for index in common}
    differ = [(index, answers) for index, answers in said if len(set(answers)) > 1]
    differ.sort(key=lambda each: sum(answer == label[each[0]] for answer in each[1]))

    def caption(i: int) -> tuple[tuple[str, ...], None]:
        index = int(first.found.index[i])
        texts = [names[label[index]]]
        for each, place in zip(evaluations, places, strict=True):
            at = place[index]
            texts.append(f"{names[each.found.top[at, 0]]} ({100 * each.found.prob[at, 0]:.0f} %)")
        return tuple(texts), None

    text = f"The runs disagree on {len(differ)} of {len(common)} images."
    if len(evaluations) < 2 or not differ[:count]:
        return [Text(text)] if len(evaluations) > 1 else [Text("One run alone has predictions.")]
    columns = ("label", *(each.record.label for each in evaluations))
    rows = [places[0][index] for index, _ in differ[:count]]
    return [Text(text + " Those that most runs get wrong come first."), _gallery(first, columns, rows, caption)]


def _gallery(
    evaluation: Evaluation, columns: tuple[str, ...], rows: list[int], caption: Callable[[int], tuple]
) -> Gallery:
    """The images of some rows of the predictions."""
    images = evaluation.images
    place = dict(zip(evaluation.found.index[rows].tolist(), rows, strict=True))
    samples = []
    for x, _, index in images.batches(len(rows), list(place)):
        for pixels, i in zip(x, index.tolist(), strict=True):
            text, right = caption(place[i])
            name = images.name(i)
            alt = f"{name}: {', '.join(f'{key} {said}' for key, said in zip(columns, text, strict=True))}"
            samples.append(Sample(Picture(image_uri(images.picture(pixels)), alt), Path(name).name, text, right))
    return Gallery(columns, samples)


def _confusion(evaluations: list[Evaluation], one: bool) -> list[Block]:
    blocks: list[Block] = [Text("Images by label (row) and prediction (column).")]
    for each in evaluations:
        counts, names = each.summary["confusion"], each.names
        pairs = [(p["label"], p["predicted"], p["images"]) for p in each.summary["most_confused"]]
        table = Table(("label", "predicted", "images"), pairs)
        if len(names) <= HEAT_CLASSES:
            mine: list[Block] = [Heat("label", names, counts)]
            if pairs:
                mine.append(Fold("Most frequent mistakes", [table]))
        else:
            figure = pictures.confusion_matrix(counts, names)
            alt = f"Confusion matrix of {len(names)} classes; the table has the most frequent mistakes"
            mine = [Panels([Panel("Most frequent mistakes", Picture(uri(pictures.png(figure), "png"), alt), table)])]
        blocks += mine if one else [Fold(each.record.label, mine)]
    return blocks


def _classes(evaluations: list[Evaluation], one: bool) -> list[Block]:
    first = evaluations[0].summary["per_class"]
    order = list(range(len(first)))
    text = ""
    if len(order) > CLASS_ROWS:
        order = sorted(order, key=lambda i: 101.0 if first[i]["acc"] is None else first[i]["acc"])[:CLASS_ROWS]
        text = f"The {CLASS_ROWS} least accurate of {len(first)} classes."
    if one:
        header = ("class", "images", "accuracy", "predicted", "precision", "most often taken for")
        rows = [
            (
                *(first[i]["name"], first[i]["images"], figure_of(first[i]["acc"], ".1f", " %"), first[i]["predicted"]),
                figure_of(first[i]["precision"], ".1f", " %"),
                f"{first[i]['confused_with']} ({first[i]['confused_images']})" if first[i]["confused_images"] else "-",
            )
            for i in order
        ]
    else:
        header = ("class", "images", *(f"accuracy, {each.record.label}" for each in evaluations))
        rows = [
            (
                *(first[i]["name"], first[i]["images"]),
                *(figure_of(each.summary["per_class"][i]["acc"], ".1f", " %") for each in evaluations),
            )
            for i in order
        ]
    blocks: list[Block] = [Text(text)] if text else []
    table = Table(header, rows)
    return blocks + ([table] if len(order) <= FEW_CLASSES else [Fold(f"Table of {len(rows)} classes", [table])])
