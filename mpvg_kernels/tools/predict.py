"""What a model sees in images: files and folders in, classes with their probabilities out. What `mpvg predict` does.

    mpvg predict runs/digits photo.png more/               the best five classes of each image
    mpvg predict runs/digits/best *.jpg --format csv --top 1 --out classes.csv
    mpvg predict runs/shapes photos/                       of detection and segmentation: dense_predict.py

The preprocessing and the names of the classes are those that are stored with the weights, so that a folder in timm's
format is enough. Results come in the order of the input, a batch at a time.
"""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from timm.data import resolve_data_config
from timm.utils.misc import natural_key
from torch import nn

from ..models.dense import DenseModel
from ..train import InputError
from ..train.config import Config
from ..train.data.evaluation import IndexedImages
from ..train.data.images import UnreadableImage
from ..train.data.sources import EXTENSIONS, Split
from ..train.distributed import pick_backend, pick_device
from ..train.run_folder import RunFolder, discard, finite, open_model, print_warning, printable, whole_file
from .evaluate import TOP, top_classes

FORMATS = ("table", "json", "csv")
BATCH = 32
Writer: TypeAlias = tuple[Callable[[], Any], Callable[[dict[str, Any]], Any], Callable[[], Any]]
"""What is called before the first row, with each row, and behind the last."""


class Files:
    """Image files by index, for `train.data.images.Source`: an open file, and a label that means nothing."""

    def __init__(self, paths: Sequence[str]):
        self.samples = [(path, 0) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self.samples[index]
        try:
            return open(path, "rb"), label
        except IsADirectoryError:
            raise UnreadableImage(f"a folder without images: {' '.join(EXTENSIONS)}") from None
        except OSError as error:
            raise UnreadableImage(error.strerror) from None


def load(source: Path, weights: str | None = None) -> tuple[nn.Module, list[str] | None]:
    """The model of a run folder, or of a folder in timm's format, and the names of its classes, if it has them.

    Args:
        weights: which of a run's: "best", "last" (None) or "ema".

    Raises:
        InputError: it is neither, or the weights are not there.
    """
    if (source / "run.json").exists():
        model = RunFolder(source).model(weights or "last")
    elif not (source / "config.json").exists():
        raise InputError(
            f"{source} is neither a run folder (with run.json) nor a folder in timm's format (with config.json and "
            "model.safetensors)"
        )
    elif weights is not None:
        raise InputError(f"--weights {weights}: {source} is no run folder and has one set of weights; leave it out")
    else:
        model = open_model(source)
    names = model.label_names if isinstance(model, DenseModel) else model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):  # timm takes {label: name} too
        names = [names.get(str(i), names.get(i, str(i))) for i in range(model.num_classes)]
    if names is not None and len(names) != model.num_classes:
        raise InputError(
            f"{source} names {len(names)} classes, expected the model's {model.num_classes}: its config.json and "
            "weights do not belong together"
        )
    return model, names


def find(paths: Iterable[str | Path]) -> Iterator[str]:
    """The image files of files and folders; a folder's, and those deeper down, in the natural order of their names.

    A folder without images stands for itself, so that it is missed like a file that can't be read.
    """
    for path in map(str, paths):
        if not os.path.isdir(path):
            yield path
            continue
        inside = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        images = sorted((p for p in inside if os.path.splitext(p)[1].lower() in EXTENSIONS), key=natural_key)
        yield from images or [path]


@torch.inference_mode()
def predict(
    model: nn.Module,
    names: Sequence[str] | None,
    files: Sequence[str],
    device: torch.device,
    *,
    top: int = TOP,
    batch: int = BATCH,
) -> Iterator[dict[str, Any]]:
    """The best classes of each file, in the order of the files.

    Args:
        model: made by timm.create_model, whose pretrained_cfg says how images are prepared; in eval mode.
        names: the classes' names; None takes their numbers.
        top: classes of each image, at most the model's.

    Yields:
        {"file", "predictions": [{"label", "name", "probability"}, ...]}, the largest probability first, or, for a
        file that can't be read, {"file", "error"}.
    """
    cfg = resolve_data_config(model=model)
    names = names or [str(label) for label in range(model.num_classes)]
    images = IndexedImages(Config(), Split(Files(files), model.num_classes, list(names)), cfg, device)
    model, done = model.to(device), 0

    def unreadable(end: int) -> Iterator[dict[str, Any]]:
        # Those before `end` that no batch had; images.bad has them in the same order.
        for file in files[done:end]:
            yield {"file": file, "error": images.bad.pop(0)["reason"]}

    try:
        for x, _, index in images.batches(batch):
            found, prob, _ = (part.tolist() for part in top_classes(model(x), top))
            for place, labels, probabilities in zip(index.tolist(), found, prob, strict=True):
                yield from unreadable(place)
                best = [
                    {"label": label, "name": names[label], "probability": probability}
                    for label, probability in zip(labels, probabilities, strict=True)
                ]
                yield {"file": files[place], "predictions": best}
                done = place + 1
        yield from unreadable(len(files))
    finally:
        images.close()


# ---- output


def write_rows(rows: Iterable[dict[str, Any]], format: str, file: IO[str], top: int, width: int = 0) -> int:
    """Write results as they come: a table to look at, a JSON array, or CSV with a line an image.

    Args:
        format: one of FORMATS.
        top: classes of each image.
        width: of the table's first column.

    Returns:
        How many images could be read.
    """
    match format:
        case "json":
            writer = json_writer(file)
        case "csv":
            writer = _csv(file, top)
        case _:
            writer = _table(file, width)
    return write_all(rows, writer)


def write_all(rows: Iterable[dict[str, Any]], writer: Writer) -> int:
    """Write results as they come; how many of the images could be read."""
    begin, write, end = writer
    good = 0
    begin()
    for row in rows:
        write(row)
        good += "error" not in row
    end()
    return good


def _table(file: IO[str], width: int) -> Writer:
    def write(row: dict[str, Any]) -> None:
        if "error" not in row:  # which stderr has
            best = (f"{each['name']} {100 * each['probability']:5.1f} %" for each in row["predictions"])
            print(printable(f"{row['file']:<{width}}  {'   '.join(best)}"), file=file)

    return (lambda: None), write, (lambda: None)


def json_writer(file: IO[str]) -> Writer:
    """A JSON array."""
    before = ["[\n"]

    def write(row: dict[str, Any]) -> None:
        file.write(before[0] + json.dumps(finite(row), allow_nan=False))
        before[0] = ",\n"

    return (lambda: None), write, (lambda: file.write("\n]\n" if before[0] != "[\n" else "[]\n"))


def _csv(file: IO[str], top: int) -> Writer:
    table = csv.writer(file, lineterminator="\n")
    columns = [name for n in range(1, top + 1) for name in (f"class_{n}", f"probability_{n}")]

    def write(row: dict[str, Any]) -> None:
        best = [value for each in row.get("predictions", ()) for value in (each["name"], f"{each['probability']:.6g}")]
        best += [""] * (len(columns) - len(best))
        table.writerow([row["file"], *best, row.get("error", "")])

    return (lambda: table.writerow(["file", *columns, "error"])), write, (lambda: None)


@contextlib.contextmanager
def opened(out: Path | None) -> Iterator[IO[str]]:
    """The standard output, or a file (`whole_file`).

    Raises:
        InputError: it can't be written.
    """
    if out is None:
        yield sys.stdout
        return
    try:
        with whole_file(out) as file:
            yield file
    except OSError as error:
        raise InputError(f"{out} can't be written ({error.strerror}): choose another file with --out") from None


def predict_files(
    source: Path,
    paths: Sequence[str | Path],
    weights: str | None = None,
    *,
    top: int | None = None,
    format: str = "table",
    out: Path | None = None,
    batch: int | None = None,
    device: str = "auto",
    threshold: float | None = None,
    draw: Path | None = None,
    pictures: bool = True,
) -> int:
    """Write what is found in files and folders; files that can't be read are named on stderr.

    Args:
        top, batch: for classification, TOP and BATCH where they are None.
        threshold: for detection, `dense_predict.THRESHOLD` where it is None.
        draw, pictures: for detection and segmentation, where pictures go (None: `dense_predict.PICTURES`), and whether
            there are any.

    Returns:
        The exit code: 0 where any image could be read, else 1.

    Raises:
        InputError: the model, `out` or `draw` can't be had, or an option is for other models.
    """
    where = pick_device(device)
    pick_backend(where)
    model, names = load(source, weights)
    given = {"top": top, "batch": batch, "threshold": threshold, "draw": draw, "no-draw": not pictures or None}
    _check_options(source, model, given)
    files = list(find(paths))
    width = min(max(map(len, files)), 60)
    if isinstance(model, DenseModel):
        from . import dense_predict

        place = (draw or dense_predict.PICTURES) if pictures else None
        least = dense_predict.THRESHOLD if threshold is None else threshold
        rows = dense_predict.predict(model, names, files, where, threshold=least, pictures=place)
        detects = model.dense_config["task"] == "detection"

        def write(file: IO[str]) -> int:
            return write_all(told(rows), dense_predict.writer(format, file, detects, place is not None, width))
    else:
        most = min(top or TOP, model.num_classes)
        rows = predict(model, names, files, where, top=most, batch=batch or BATCH)

        def write(file: IO[str]) -> int:
            return write_rows(told(rows), format, file, most, width)

    try:
        with opened(out) as file:
            good = write(file)
            file.flush()
    except BrokenPipeError:  # `| head` has seen enough
        discard(sys.stdout)
        return 0
    return 0 if good else 1


def told(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, each of a file that can't be read with a warning."""
    for row in rows:
        if "error" in row:
            print_warning(f"{row['file']} is left out ({row['error']})")
        yield row


def _check_options(source: Path, model: nn.Module, given: dict[str, Any]) -> None:
    """Say which option is of no use to the model's task."""
    task = model.dense_config["task"] if isinstance(model, DenseModel) else "classification"
    tasks = {name: ("classification",) for name in ("top", "batch")} | {"threshold": ("detection",)}
    for name, value in given.items():
        of = tasks.get(name, ("detection", "segmentation"))
        if value is not None and task not in of:
            raise InputError(f"--{name} is for {' and '.join(of)}, and {source} is a model of {task}: leave it out")
