"""What a report says of a classifier's weights: evaluation, samples, confusion, classes. Part of `mpvg report`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..train import InputError, config
from ..train.data import EvalImages, open_images
from ..train.distributed import pick_device
from ..train.record import RunRecord
from ..train.table import Table, figure_of
from . import pictures
from .evaluate import Predictions, predictions, summary
from .page import (
    Block,
    Fold,
    Gallery,
    Heat,
    Panel,
    Panels,
    Picture,
    Sample,
    Section,
    Text,
    folded,
    image_uri,
    svg_uri,
    uri,
)

SPLIT = "validation"
HEAT_CLASSES = 20
"""Most classes whose confusion matrix is a table; of more it is a picture."""
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

    def close(self) -> None:
        self.images.close()


def sections(evaluations: list[Evaluation], weights: str, images: int, one: bool, comparable: bool) -> list[Section]:
    """What the weights of one run, or of several, say.

    Args:
        weights: which ones they are.
        images: samples that are shown.
        one: of one run, which is not compared.
        comparable: whether the runs are of the same images.
    """
    found = [Section("Evaluation", _evaluation(evaluations, weights, one))]
    if comparable:
        samples = _samples(evaluations[0], images) if one else _disagreements(evaluations, images)
        found.append(Section("Sample predictions", samples))
        found.append(Section("Confusion matrix", _confusion(evaluations, one)))
        found.append(Section("Classes", _classes(evaluations, one)))
    return found


def same_images(evaluations: list[Evaluation]) -> bool:
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
    return [*blocks, folded(Table(header, rows), "classes")]
