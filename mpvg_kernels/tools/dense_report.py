"""What a report says of the weights of detection and segmentation: figures, samples, classes. Part of `mpvg report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..train import config
from ..train.distributed import pick_device
from ..train.figures import Figure
from ..train.record import RunRecord
from ..train.table import Table, figure_of
from .class_report import CLASS_ROWS, SPLIT
from .dense_evaluate import CLASS_FIGURE, Opened, compare, figures_of, measure, open_run, samples
from .dense_predict import THRESHOLD
from .page import Block, Gallery, Picture, Sample, Section, Text, folded, picture_uri

SIDE = 360
"""Pixels of the longer side of a sample, of which there are two or more in a picture."""
COLUMNS = {"iou": "IoU", "acc": "accuracy", "share": "share of the pixels"}
COLUMNS |= {"mean_acc": "mean accuracy of the classes"}
COLUMNS |= {f"{kind}_ar": f"{kind} recall" for kind in ("box", "mask")}
COLUMNS |= {f"{kind}_ap{at}": f"{kind} AP{at}" for kind in ("box", "mask") for at in ("", "50", "75")}
COLUMNS |= {
    f"{kind}_ap_{size}": f"{kind} AP, {size} objects"
    for kind in ("box", "mask")
    for size in ("small", "medium", "large")
}
"""What figures of classes, and those beside the ones that training logs, are called."""


class Evaluation(NamedTuple):
    """What a run's weights find in the held-out images."""

    record: RunRecord
    opened: Opened
    device: torch.device
    found: dict[str, Any]
    """See `DenseTask.measure`."""

    def close(self) -> None:
        self.opened.split.close()


def evaluate(record: RunRecord, weights: str, fields: Sequence[str] = ()) -> Evaluation:
    """Measure the run's weights on the held-out images of its data.

    Raises:
        InputError: the weights or the data are not there, or do not fit each other.
        TrainingError: no image could be read.
    """
    settings = record.folder.config()
    if fields:
        settings = config.from_args(settings, list(fields), "mpvg report RUN")
    device = pick_device(settings.device)
    opened = open_run(record.folder, weights, settings, device, SPLIT)
    try:
        return Evaluation(record, opened, device, measure(opened, device, progress=True))
    except BaseException:
        opened.split.close()
        raise


def same_images(evaluations: list[Evaluation]) -> bool:
    """Whether classes and number of the held-out images are the same."""
    return len({(tuple(each.opened.names), each.opened.split.size) for each in evaluations}) <= 1


def sections(evaluations: list[Evaluation], weights: str, images: int, one: bool, comparable: bool) -> list[Section]:
    """See class_report.py."""
    found = [Section("Evaluation", _evaluation(evaluations, weights, one))]
    if comparable:
        found.append(Section("Sample predictions", _samples(evaluations, images, one)))
        found.append(Section("Classes", _classes(evaluations, one)))
    return found


def _evaluation(evaluations: list[Evaluation], weights: str, one: bool) -> list[Block]:
    text = f"The {weights} weights on the held-out images."
    bad = sum(len(each.opened.split.bad) for each in evaluations)
    text += f" {bad} images that can't be read are left out." if bad else ""
    if evaluations[0].record.task == "detection":
        text += " AP as COCO has it; small objects have an area below 32 x 32 pixels, large ones of 96 x 96 or more."
    each_of = [_figures(each) for each in evaluations]
    rows = [(figure.name, *(figure.show(mine[key][1]) for mine in each_of)) for key, (figure, _) in each_of[0].items()]
    rows.append(("images", *(each.found["images"] for each in evaluations)))
    header = ("", weights) if one else ("", *(each.record.label for each in evaluations))
    return [Text(text), Table(header, rows)]


def _figures(each: Evaluation) -> dict[str, tuple[Figure, float | None]]:
    """The figures that training logs, and behind them the others that have a name."""
    logged = {figure.key: (figure, value) for figure, value in figures_of(each.found | {"task": each.record.task})}
    more = {
        key: (Figure(key, COLUMNS[key], ".2f", " %"), value)
        for key, value in each.found.items()
        if key in COLUMNS and key not in logged
    }
    return logged | more


def _samples(evaluations: list[Evaluation], count: int, one: bool) -> list[Block]:
    """What is there and what each run finds, of images from all over the split."""
    first, labels = evaluations[0], [each.record.label for each in evaluations]
    detects = first.record.task == "detection"
    models = [each.opened.model for each in evaluations]
    columns = ("objects", *(["found"] if one else labels)) if detects else ("right",) if one else tuple(labels)
    shown = []
    for index, image, truth, found in samples(first.opened.split, models, count, first.device):
        name = Path(first.opened.split.name(index)).name
        titles = ["prediction"] if one else labels
        options = {"ignore": first.opened.ignore, "side": SIDE}
        picture = compare(image, truth, found, first.opened.names, titles, **options)
        caption = _caption(truth, found, first.opened.ignore)
        said = ", ".join(f"{key} {value}" for key, value in zip(columns, caption, strict=True))
        shown.append(Sample(Picture(picture_uri(picture), f"{name}: {said}"), name, caption, None))
    if not shown:
        return [Text("No image is shown.")]
    what = f"Objects with a score of {100 * THRESHOLD:.0f} % or more" if detects else "The best class of each pixel"
    text = f"{what}, beside what is there, in images from all over the held-out ones."
    return [Text(text), Gallery(columns, shown, large=True)]


def _caption(truth: dict[str, Tensor], found: list[dict[str, Tensor]], ignore: int) -> tuple[str, ...]:
    """Numbers of objects, or shares of the labelled pixels that are right."""
    if "label_map" in truth:
        labelled = truth["label_map"] != ignore
        pixels = max(int(labelled.sum()), 1)
        right = [int(((each["label_map"] == truth["label_map"]) & labelled).sum()) for each in found]
        return tuple(f"{100 * count / pixels:.1f} %" for count in right)
    return (str(len(truth["labels"])), *(str(int((each["scores"] >= THRESHOLD).sum())) for each in found))


def _classes(evaluations: list[Evaluation], one: bool) -> list[Block]:
    key = CLASS_FIGURE[evaluations[0].record.task]
    tables = [each.found["per_class"] for each in evaluations]
    order, blocks = range(len(tables[0])), []
    if len(order) > CLASS_ROWS:
        worst = sorted(order, key=lambda i: 101.0 if tables[0][i][key] is None else tables[0][i][key])
        order = worst[:CLASS_ROWS]
        blocks.append(Text(f"The {CLASS_ROWS} classes of {len(tables[0])} with the lowest {COLUMNS[key]}."))
    if one:
        keys = [each for each in COLUMNS if each in tables[0][0]]
        header = ("class", *(COLUMNS[each] for each in keys))
        rows = [(tables[0][i]["name"], *(figure_of(tables[0][i][each], ".1f", " %") for each in keys)) for i in order]
    else:
        header = ("class", *(f"{COLUMNS[key]}, {each.record.label}" for each in evaluations))
        rows = [(tables[0][i]["name"], *(figure_of(table[i][key], ".1f", " %") for table in tables)) for i in order]
    return [*blocks, folded(Table(header, rows), "classes")]
