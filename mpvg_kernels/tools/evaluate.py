"""How good a run's model is: accuracy, by class too, who is taken for whom, calibration. What `mpvg eval` does.

    mpvg eval runs/digits                                     the last weights on the held-out images
    mpvg eval runs/digits --folder ~/photos --weights ema     any folder of images, one folder in it for each class

Of every image the best classes, their probabilities and the loss are kept, never a row of logits.
"""

import csv
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..train import InputError, TrainingError
from ..train.config import Config, from_args
from ..train.data import EvalImages, open_images
from ..train.distributed import World, find_world, gather, pick_backend, pick_device, process_group, together
from ..train.loop import cpu_threads, make_deterministic
from ..train.model import autocast, create_model
from ..train.run_folder import RunFolder, finite, print_warning, printable, reason, whole_file, write_json
from . import latency, pictures
from .pictures import most_confused

TOP = 5
BINS = 15
"""Bins of the calibration, the number that Guo et al. (2017) have."""
PAIRS = 20
"""Pairs of classes that a result lists as mistaken most often."""


class Predictions(NamedTuple):
    """What a model says of n images; on the CPU."""

    index: Tensor
    """(n,) int64: the images' places in the split, ascending."""
    label: Tensor
    """(n,) int64."""
    top: Tensor
    """(n, k) int64: the k classes of largest probability, the largest first."""
    prob: Tensor
    """(n, k) fp32: their probabilities (softmax)."""
    loss: Tensor
    """(n,) fp32: cross-entropy."""


def top_classes(logits: Tensor, k: int = TOP) -> tuple[Tensor, Tensor, Tensor]:
    """The best classes of each image.

    Args:
        logits: (B, C), any floating type.

    Returns:
        top (B, min(k, C)) int64, the argmax first; prob, the same shape, fp32; normaliser (B,) fp32, the log of the sum
        of the exponentiated logits: logits - normaliser are the log-probabilities.
    """
    logits = logits.float()
    # Of equal logits topk takes any, argmax the first: accuracy must not depend on which of the two counts.
    best = logits.argmax(-1, keepdim=True)
    ranked = logits.where(~logits.isnan(), -torch.inf).scatter(-1, best, torch.inf)  # nan would come before inf
    top = ranked.topk(min(k, logits.shape[-1])).indices
    normaliser = logits.logsumexp(-1)
    return top, (logits.gather(-1, top) - normaliser[:, None]).exp(), normaliser


@torch.inference_mode()
def predictions(
    model: nn.Module,
    images: EvalImages,
    config: Config,
    batch: int | None = None,
    *,
    indices: Sequence[int] | None = None,
    world: World = World(),  # noqa: B008, it is frozen
    progress: bool = False,
) -> Predictions:
    """Let a model look at images.

    Args:
        model: in eval mode, on the images' device.
        images: of as many classes as the model.
        config: its amp and model.channels_last are read, and batch and dist.micro_batch where `batch` is None.
        batch: images at a time.
        indices: which of the images; None takes all.
        world: processes that share the images out; each gets all predictions.
        progress: show a bar where stderr is a terminal.

    Raises:
        TrainingError: no image could be read.
    """
    parts: list[tuple[Tensor, ...]] = []
    shown = progress and world.rank == 0
    bar = tqdm(total=images.size or None, unit="img", disable=None if shown else True, leave=False)
    for x, y, index in images.batches(batch or default_batch(config), indices, world=world):
        if config.model.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with autocast(config.amp, x.device):
            logits = model(x)
        top, prob, normaliser = top_classes(logits)
        loss = normaliser - logits.float().gather(-1, y[:, None])[:, 0]
        parts.append((index, y, top, prob, loss))  # left on the device, which is not waited for
        bar.update(len(x) * world.size)
    bar.close()
    mine = tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))
    told = [part for part, _ in gather((mine, images.bad), world) if part]
    if world.size > 1:
        images.bad = [each for _, bad in gather((None, images.bad), world) for each in bad]
    if not told:
        first = "".join(f": {each['file']} ({each['reason']})" for each in images.bad[:1])
        error = TrainingError(f"no image could be read{first}; look at data.root, --split and --folder")
        error.shared = True  # by all processes: the first one says it
        raise error
    found = Predictions(*(torch.cat(part) for part in zip(*told, strict=True)))
    if world.size == 1 and indices is not None:
        return found
    order = found.index.argsort(stable=True)
    return Predictions(*(part[order] for part in found))


def default_batch(config: Config) -> int:
    """Images at a time where nothing says how many: what training gave a device at once, at most 256."""
    return min(config.dist.micro_batch or 256, config.batch)


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> tuple[list[dict[str, Any]], float]:
    """How far confidence and accuracy are apart: the expected calibration error (Guo et al. 2017, equation 3).

        ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|

    B_m are the images whose confidence, the probability of the predicted class, lies in ((m-1)/M, m/M], for M bins of
    equal width.

    Args:
        confidence: (n,), 0 to 1.
        right: (n,) bool, whether the prediction is right.

    Returns:
        A dict for each bin, {"low", "high", "images", "acc", "confidence"}, the last two means in percent and None
        where there are no images; and the error in percent.
    """
    borders = torch.arange(bins + 1, dtype=torch.float64) / bins
    confidence = confidence.double()
    of = torch.bucketize(confidence, borders[1:-1])  # right borders belong to the bin
    images = torch.bincount(of, minlength=bins)
    sums = [torch.bincount(of, weights=value, minlength=bins) for value in (right.double(), confidence)]
    acc, mean = (100 * each / images.clamp(min=1) for each in sums)
    rows = [
        {
            "low": m / bins,
            "high": (m + 1) / bins,
            "images": int(images[m]),
            "acc": float(acc[m]) if images[m] else None,
            "confidence": float(mean[m]) if images[m] else None,
        }
        for m in range(bins)
    ]
    return rows, float((images * (acc - mean).abs()).sum() / len(confidence))


def summary(found: Predictions, num_classes: int, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The figures of a set of predictions. All shares are in percent.

    Returns:
        images: how many were looked at.
        acc, acc5: share whose label is the predicted class, or among the best five; acc5 is None for five classes or
            fewer, where it says nothing.
        loss: mean cross-entropy.
        ece, calibration: see `calibration`.
        confidence: mean probability of the predicted class.
        per_class: a dict for each class, {"label", "name", "images", "acc", "predicted", "precision", "confused_with",
            "confused_images"}: images with this label and the share of them that is right, images predicted as this
            class and the share of them that is, and the class that its images are mistaken for most often. What there
            are no images for is None.
        most_confused: {"label", "predicted", "images"} by name, of the pairs that are mistaken most often.
        confusion: (C, C) numpy int64, images by label (row) and prediction (column).
    """
    names = list(class_names or map(str, range(num_classes)))
    predicted = found.top[:, 0]
    right = found.top == found.label[:, None]
    counts = torch.bincount(found.label * num_classes + predicted, minlength=num_classes**2)
    confusion = counts.view(num_classes, num_classes).numpy()
    bins, ece = calibration(found.prob[:, 0], right[:, 0])
    return {
        "images": len(predicted),
        "acc": _percent(right[:, 0].sum(), len(right)),
        "acc5": _percent(right.sum(), len(right)) if num_classes > TOP else None,
        "loss": float(found.loss.double().mean()),
        "ece": ece,
        "confidence": 100 * float(found.prob[:, 0].double().mean()),
        "calibration": bins,
        "per_class": [_class_row(confusion, label, names) for label in range(num_classes)],
        "most_confused": [
            {"label": names[label], "predicted": names[other], "images": images}
            for label, other, images in most_confused(confusion, PAIRS)
        ],
        "confusion": confusion,
    }


def _class_row(confusion: np.ndarray, label: int, names: list[str]) -> dict[str, Any]:
    row, right = confusion[label], confusion[label, label]
    errors = row.copy()
    errors[label] = 0
    worst = int(errors.argmax())
    return {
        "label": label,
        "name": names[label],
        "images": int(row.sum()),
        "acc": _percent(right, row.sum()),
        "predicted": int(confusion[:, label].sum()),
        "precision": _percent(right, confusion[:, label].sum()),
        "confused_with": names[worst] if errors[worst] else None,
        "confused_images": int(errors[worst]),
    }


def _percent(part: Any, whole: Any) -> float | None:
    return 100 * int(part) / int(whole) if whole else None


# ---- a run


def evaluate_run(
    path: str | Path,
    weights: str = "last",
    fields: Sequence[str] = (),
    *,
    split: str = "validation",
    folder: Path | None = None,
    batch: int | None = None,
    out: Path | None = None,
    batch_sizes: Sequence[int] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's weights on a split or a folder, and write figures and pictures.

    Started by torchrun or srun, the processes share the images out, each has the result, and the first one writes.

    Args:
        path: run folder.
        weights: "best", "last" or "ema".
        fields: config fields that differ from the run's, as on the command line: ["--data.root", "/data"].
        split: "train", "validation" or a name that the data set has for one.
        folder: in its place a folder with a folder of images for each class.
        batch: images at a time on each process; None is `default_batch`.
        out: where to write; None is RUN/eval/WEIGHTS-SPLIT.
        batch_sizes: of these the latency is measured as well.
        progress: show a bar where stderr is a terminal.

    Returns:
        What `summary` finds but for confusion, which is in confusion.csv, and: run, weights, split (or None), folder
        (or None), device, backend, amp, bad (a {"file", "reason"} for each unreadable image), latency (what
        `latency.measure` finds, where asked for) and written (where to; None where that failed, which is warned of).

    Raises:
        InputError: `path` is not a run folder, its weights are not there or of another model, or the images are not
            there or of other classes.
        TrainingError: no image could be read.
    """
    run = RunFolder(path)
    config = run.config()
    if fields:
        config = from_args(config, list(fields), "mpvg eval RUN")
    # What the run started from and its teacher may be gone by now; neither is needed.
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, distillation="none"))
    world = find_world()
    device = pick_device(config.device, world)
    backend = pick_backend(device, config.compile)
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    with process_group(world, device, config), cpu_threads(config.threads):
        model, images = together(world, lambda: _open(run, weights, config, device, split, folder))
        try:
            forward = torch.compile(model) if config.compile else model
            found = predictions(forward, images, config, batch, world=world, progress=progress)
        finally:
            images.close()
        result = {
            "run": str(path),
            "weights": weights,
            "split": None if folder else split,
            "folder": str(folder) if folder else None,
            "device": str(device),
            "backend": backend,
            "amp": config.amp,
            **summary(found, model.num_classes, images.class_names),
            "bad": images.bad,
        }
        confusion = result.pop("confusion")
        if world.rank == 0 and batch_sizes:
            result["latency"] = latency.measure(
                forward,
                images.preprocessing["input_size"],
                device,
                batch_sizes,
                amp=config.amp,
                channels_last=config.model.channels_last,
            )
        if world.rank == 0:
            out = out or run.path / "eval" / _place(weights, split, folder)
            result["written"] = write(result, confusion, images.class_names, out)
    return result


def _open(
    run: RunFolder, weights: str, config: Config, device: torch.device, split: str, folder: Path | None
) -> tuple[nn.Module, EvalImages]:
    """The run's model on the device, and the images."""
    names = run.info.get("class_names")
    images = open_images(config, device, split, folder=folder, class_names=names)
    classes = len(names) if names else config.data.num_classes or images.num_classes
    try:
        if images.num_classes != classes:  # there are no names to compare
            raise InputError(
                f"{folder or config.data.name} has {images.num_classes} classes and the run {classes}, whose names are "
                "not known; expected the same"
            )
        prepared = images.preprocessing
        data = SimpleNamespace(num_classes=classes, input_size=prepared["input_size"], preprocessing=prepared)
        model = create_model(config, data, start=False)
        run.load(weights, model)
    except InputError:
        images.close()
        raise
    return model.to(device).eval(), images


def _place(weights: str, split: str, folder: Path | None) -> str:
    """A name for the folder that is written."""
    what = split if folder is None else f"folder-{Path(folder).resolve().name}"
    return f"{weights}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', what)}"


def write(result: dict[str, Any], confusion: np.ndarray, class_names: Sequence[str] | None, out: Path) -> str | None:
    """Write result.json, per_class.csv, confusion.csv and .png and reliability.png.

    confusion.csv has a line for each pair of label and prediction that there are images of.

    Returns:
        The folder, or None where it could not be written, which is warned of.
    """
    names = list(class_names or map(str, range(len(confusion))))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "result.json", finite(result))
        with whole_file(out / "per_class.csv") as file:
            table = csv.DictWriter(file, result["per_class"][0])
            table.writeheader()
            table.writerows(result["per_class"])
        with whole_file(out / "confusion.csv") as file:
            table = csv.writer(file)
            table.writerow(("label", "predicted", "images"))
            for label, predicted in zip(*confusion.nonzero(), strict=True):
                table.writerow((names[label], names[predicted], confusion[label, predicted]))
        pictures.save(pictures.confusion_matrix(confusion, class_names), out / "confusion.png")
        pictures.save(pictures.reliability_diagram(result["calibration"], result["ece"]), out / "reliability.png")
    except OSError as error:
        print_warning(f"{out} can't be written ({reason(error)}): choose another folder with --out")
        return None
    return str(out)


def describe(result: dict[str, Any]) -> str:
    """What `mpvg eval` prints: the figures, the worst classes, unreadable images, where the rest is."""
    on = result["split"] or result["folder"]
    top5 = f", top-{TOP} {result['acc5']:.2f} %" if result["acc5"] is not None else ""
    lines = [
        f"{result['run']} ({result['weights']}) on {on}: accuracy {result['acc']:.2f} %{top5}, "
        f"loss {result['loss']:.4f}, calibration error {result['ece']:.2f} %, {result['images']} images"
    ]
    if not math.isfinite(result["loss"]):
        lines.append("the model's outputs are not all finite numbers: its accuracy means nothing")
    seen = [row for row in result["per_class"] if row["images"]]
    worst = sorted((row for row in seen if row["acc"] < 100), key=lambda row: row["acc"])[:TOP]
    if worst:
        said = (
            f"{row['name']} ({row['acc']:.1f} % of {row['images']} images, most often taken for {row['confused_with']})"
            for row in worst
        )
        lines.append(f"least accurate classes: {', '.join(said)}")
    if len(seen) < len(result["per_class"]):
        lines.append(f"classes without images: {len(result['per_class']) - len(seen)} of {len(result['per_class'])}")
    if bad := result["bad"]:
        files = ", ".join(f"{each['file']} ({each['reason']})" for each in bad[:TOP])
        lines.append(f"unreadable images, left out: {len(bad)}: {files}{', ...' if len(bad) > TOP else ''}")
    if "latency" in result:
        lines += latency.table(result["latency"]).split("\n")
    if result.get("written"):
        lines.append(f"written: {result['written']}")
    return "\n".join(map(printable, lines))
