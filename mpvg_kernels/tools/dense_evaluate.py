"""How good a run of detection or segmentation is: figures, by class too, and what it finds beside what is there. What
`mpvg eval` does with such a run.

    mpvg eval runs/coco                                                  the last weights on the held-out images
    mpvg eval runs/coco --images photos --annotations photos.json        any images with COCO's annotations
    mpvg eval runs/ade20k --images photos --annotations label_maps       or with label maps
"""

import contextlib
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..models.dense import DenseModel
from ..train import InputError
from ..train.config import Config, from_args
from ..train.data.images import UnreadableImage
from ..train.distributed import World, find_world, gather, pick_backend, pick_device, process_group, together
from ..train.figures import FIGURES, Figure
from ..train.loop import cpu_threads, make_deterministic
from ..train.run_folder import RunFolder, finite, print_warning, printable, reason, whole_file, write_json
from ..train.tasks import create_task, dense
from ..train.tasks.dense import DenseSplit, DenseTask
from . import latency, pictures
from .dense_predict import THRESHOLD, save_picture
from .overlays import draw, side_by_side

PICTURES = 8
"""Images that are drawn, evenly over the split."""
WORST = 5
"""Classes that are named as the worst ones."""
CLASS_FIGURE = {"detection": "box_ap", "segmentation": "iou"}
"""The figure of a class that counts, by task."""


class Opened(NamedTuple):
    """A run's model on a device, and images with what is in them."""

    task: DenseTask
    model: DenseModel
    split: DenseSplit

    @property
    def names(self) -> list[str]:
        """The classes' names, or their numbers."""
        return list(self.split.class_names or map(str, range(self.model.num_classes)))

    @property
    def ignore(self) -> int:
        """The label of pixels that count nowhere."""
        return self.task.config.segmentation.ignore_label


def open_run(
    run: RunFolder,
    weights: str,
    config: Config,
    device: torch.device,
    split: str = "validation",
    *,
    images: Path | None = None,
    annotations: Path | None = None,
) -> Opened:
    """The run's model on the device, in eval mode, and a split of its data, or other images with annotations.

    Raises:
        InputError: they are not there, or do not fit each other.
    """
    if (own := run.config().task) != config.task:
        raise InputError(f"config field task is {config.task!r}, expected {own!r}, the task of {run.path}")
    task, names = create_task(config), run.info.get("class_names")
    opened = task.open_split(split, device, images=images, annotations=annotations, class_names=names)
    try:
        classes = _classes(run, weights) or opened.num_classes
        if opened.num_classes != classes:
            raise InputError(
                f"{annotations or config.data.name} has {opened.num_classes} classes and the run {run.path} {classes}; "
                "expected the same"
            )
        prepared = task.preprocessing()
        data = SimpleNamespace(num_classes=classes, input_size=prepared["input_size"], preprocessing=prepared)
        model = task.create_model(data, start=False)  # of this config: its thresholds may be others than the run's
        run.load(weights, model)
    except InputError:
        opened.close()
        raise
    return Opened(task, model.to(device).eval(), opened)


def _classes(run: RunFolder, weights: str) -> int | None:
    """The number of classes that the weights' config.json notes; None where it can't be read."""
    try:
        return json.loads((run.path / weights / "config.json").read_text())["num_classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def measure(
    opened: Opened,
    device: torch.device,
    world: World = World(),  # noqa: B008, it is frozen
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """`DenseTask.measure` on all images, with a bar where stderr is a terminal."""
    shown = progress and world.rank == 0
    with tqdm(total=opened.split.size, unit="img", disable=None if shown else True, leave=False) as bar:
        return opened.task.measure(opened.model, opened.split, world, device, on_batch=lambda: bar.update(world.size))


def evaluate_run(
    path: str | Path,
    weights: str = "last",
    fields: Sequence[str] = (),
    *,
    split: str = "validation",
    images: Path | None = None,
    annotations: Path | None = None,
    out: Path | None = None,
    batch_sizes: Sequence[int] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's weights on a split or other images, and write figures and pictures.

    Started by torchrun or srun, the processes share the images out, each has the result, and the first one writes.

    Args:
        path: run folder.
        weights: "best", "last" or "ema".
        fields: config fields that differ from the run's, as on the command line: ["--data.root", "/data"].
        split: "train", "validation" or a name that the data set has for one.
        images, annotations: in its place a folder of images, and COCO's JSON file or the folder of label maps.
        out: where to write; None is RUN/eval/WEIGHTS-SPLIT.
        batch_sizes: of these the latency is measured as well, on images of `preprocessing["input_size"]`.
        progress: show a bar where stderr is a terminal.

    Returns:
        What `DenseTask.measure` finds but for `results` and `confusion`, which are in files, and: run, weights, task,
        split (or None), folder and annotations (or None), device, backend, amp, bad (a {"file", "reason"} for each
        unreadable image), latency (where asked for) and written (where to; None where that failed, which is warned of).

    Raises:
        InputError: `path` is not a run folder, its weights are not there or of another model, or the images are not
            there or of other classes.
        TrainingError: no image could be read.
    """
    run = RunFolder(path)
    config = run.config()
    if fields:
        config = from_args(config, list(fields), "mpvg eval RUN")
    world = find_world()
    device = pick_device(config.device, world)
    backend = pick_backend(device)
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    with process_group(world, device, config), cpu_threads(config.threads):
        opened = together(
            world, lambda: open_run(run, weights, config, device, split, images=images, annotations=annotations)
        )
        with contextlib.closing(opened.split):
            found = measure(opened, device, world, progress=progress)
            results, confusion = found.pop("results", None), found.pop("confusion", None)
            result = {
                "run": str(path),
                "weights": weights,
                "task": config.task,
                "split": None if images else split,
                "folder": str(images) if images else None,
                "annotations": str(annotations) if annotations else None,
                "device": str(device),
                "backend": backend,
                "amp": config.amp,
                **found,
                "bad": [each for bad in gather(opened.split.bad, world) for each in bad],
            }
            if world.rank == 0:
                if batch_sizes:
                    size = opened.model.preprocessing["input_size"]
                    result["latency"] = latency.measure(opened.model, size, device, batch_sizes, amp=config.amp)
                where = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"folder-{images.resolve().name}" if images else split)
                out = out or run.path / "eval" / f"{weights}-{where}"
                result["written"] = write(result, results, confusion, opened, device, out)
    return result


# ---- what is written


def write(
    result: dict[str, Any],
    results: list[dict[str, Any]] | None,
    confusion: Any,
    opened: Opened,
    device: torch.device,
    out: Path,
) -> str | None:
    """Write result.json, per_class.csv, pictures/, of detection results.json, of segmentation confusion.csv and .png.

    Args:
        results: COCO's results, or None.
        confusion: (C, C) pixels by label and prediction, or None.

    Returns:
        The folder, or None where it could not be written, which is warned of.
    """
    names = opened.names
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        write_json(out / "result.json", finite(result))
        with whole_file(out / "per_class.csv") as file:
            table = csv.DictWriter(file, result["per_class"][0])
            table.writeheader()
            table.writerows(result["per_class"])
        if results is not None:
            with whole_file(out / "results.json") as file:
                json.dump(results, file)
        if confusion is not None:
            _write_confusion(np.asarray(confusion), names, out)
        for index, image, truth, found in samples(opened.split, [opened.model], PICTURES, device):
            stem = re.sub(r"[^\w.-]+", "_", Path(opened.split.name(index)).stem)
            pair = compare(image, truth, found, names, ["prediction"], ignore=opened.ignore)
            save_picture(pair, out / "pictures" / f"{index:05}-{stem}.jpg")
    except OSError as error:
        print_warning(f"{out} can't be written ({reason(error)}): choose another folder with --out")
        return None
    return str(out)


def _write_confusion(confusion: np.ndarray, names: list[str], out: Path) -> None:
    with whole_file(out / "confusion.csv") as file:
        table = csv.writer(file)
        table.writerow(("label", "predicted", "pixels"))
        for label, predicted in zip(*confusion.nonzero(), strict=True):
            table.writerow((names[label], names[predicted], int(confusion[label, predicted])))
    pictures.save(pictures.confusion_matrix(confusion, names, of="pixels"), out / "confusion.png")


def samples(
    split: DenseSplit, models: Sequence[nn.Module], count: int, device: torch.device
) -> Iterator[tuple[int, Image.Image, dict[str, Tensor], list[dict[str, Tensor]]]]:
    """Images from all over a split, always the same ones: (index, image, what is there, what each model finds)."""
    for index in np.unique(np.linspace(0, split.size - 1, min(count, split.size)).round().astype(int)).tolist():
        try:
            image, truth = split.image(index), split.truth(index)
        except UnreadableImage:
            continue
        yield index, image, truth, [dense.predict(model, image, device) for model in models]


def compare(
    image: Image.Image,
    truth: dict[str, Tensor],
    found: Sequence[dict[str, Tensor]],
    names: Sequence[str],
    titles: Sequence[str],
    *,
    ignore: int = 255,
    side: int | None = None,
) -> Image.Image:
    """What is in an image beside what models find in it, of objects those with a score of THRESHOLD or more.

    Args:
        titles: of what is found.
        ignore, side: see `draw`, of each picture.
    """
    drawn = [draw(image, each, names, min_score=THRESHOLD, ignore=ignore, side=side) for each in (truth, *found)]
    return side_by_side(drawn, ["truth", *titles])


# ---- what is said


def figures_of(result: dict[str, Any]) -> list[tuple[Figure, float | None]]:
    """The figures of a result in the order in which they are told, the main one first."""
    figures = FIGURES[result["task"]]
    return [(figure, result[figure.key]) for figure in dict.fromkeys((figures.main, *figures.evaluated))]


def describe(result: dict[str, Any]) -> str:
    """What `mpvg eval` prints: the figures, the worst classes, unreadable images, where the rest is."""
    on, rows = result["split"] or result["folder"], result["per_class"]
    said = ", ".join(f"{figure.name} {figure.show(value)}" for figure, value in figures_of(result))
    lines = [f"{result['run']} ({result['weights']}) on {on}: {said}, {result['images']} images"]
    key = CLASS_FIGURE[result["task"]]
    seen = [row for row in rows if row[key] is not None]
    if worst := sorted((row for row in seen if row[key] < 100), key=lambda row: row[key])[:WORST]:
        lines.append("worst classes: " + ", ".join(f"{row['name']} ({row[key]:.1f} %)" for row in worst))
    if len(seen) < len(rows):
        lines.append(f"classes that are in no image: {len(rows) - len(seen)} of {len(rows)}")
    if bad := result["bad"]:
        files = ", ".join(f"{each['file']} ({each['reason']})" for each in bad[:WORST])
        lines.append(f"unreadable images, left out: {len(bad)}: {files}{', ...' if len(bad) > WORST else ''}")
    if "latency" in result:
        lines += latency.table(result["latency"]).split("\n")
    if result.get("written"):
        lines.append(f"written: {result['written']}")
    return "\n".join(map(printable, lines))
