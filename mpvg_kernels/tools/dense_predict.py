"""What a model for detection or segmentation finds in image files, in rows and in pictures: `mpvg predict` for such.

    mpvg predict runs/coco photos/                              predictions/*.jpg: boxes, masks, names and scores
    mpvg predict runs/ade20k photos/ --draw maps --format csv   maps/*.jpg and *.labels.png, and the share of each class

Pictures lie in a folder as the files do below the folder that holds them all, under their names, each once.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.dense import DenseModel
from ..train import InputError
from ..train.data.images import Source, UnreadableImage, silence
from ..train.run_folder import printable, reason, whole_file
from ..train.tasks import dense
from .overlays import draw
from .predict import Files, Writer, json_writer

THRESHOLD = 0.5
"""Least score of an object that is told and drawn."""
PICTURES = Path("predictions")
"""Where pictures go by default."""
BOX = ("left", "top", "right", "bottom")
SHOWN = 5
"""Classes of a label map in a line of the table."""


def predict(
    model: DenseModel,
    names: Sequence[str] | None,
    files: Sequence[str],
    device: torch.device,
    *,
    threshold: float = THRESHOLD,
    pictures: Path | None = PICTURES,
) -> Iterator[dict[str, Any]]:
    """What is found in each file, in the order of the files.

    Args:
        model: as `RunFolder.model` opens it.
        names: the classes' names; None takes their numbers.
        threshold: least score of an object.
        pictures: the folder that pictures, and of segmentation label maps, are written to; None writes none.

    Returns:
        an iterator of {"file", "width", "height"} and of detection "objects", a list of {"label", "name", "score",
        "box", "mask"} from the best on, with the box in pixels (left, top, right, bottom) and the mask as COCO's
        compressed run lengths; of segmentation "classes", a list of {"label", "name", "share"} from the largest share
        of the pixels on. Besides, where they are written, "picture" and "label_map", their paths. For a file that
        can't be read {"file", "error"}.

    Raises:
        InputError: `pictures` is a folder that images are read from, or can't be written.
    """
    names = names or [str(label) for label in range(model.num_classes)]
    places = places_of(files, pictures) if pictures else [None] * len(files)
    return _rows(model.to(device), names, files, places, device, threshold)


def _rows(
    model: DenseModel,
    names: Sequence[str],
    files: Sequence[str],
    places: Sequence[str | None],
    device: torch.device,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    source = Source(Files(files), "RGB")
    silence()
    for index, (file, place) in enumerate(zip(files, places, strict=True)):
        try:
            image, _ = source[index]
        except UnreadableImage as error:
            yield {"file": file, "error": str(error)}
            continue
        found = dense.predict(model, image, device)
        row = {"file": file, "width": image.width, "height": image.height, **_row(found, names, threshold)}
        if place:
            picture = draw(image, found, names, min_score=threshold)
            row |= {"picture": f"{place}.jpg"} | ({"label_map": f"{place}.labels.png"} if "label_map" in found else {})
            try:
                save_picture(picture, Path(row["picture"]))
                if "label_map" in found:
                    _save_labels(found["label_map"], Path(row["label_map"]))
            except OSError as error:
                why = f"{place}.jpg can't be written ({reason(error)})"
                raise InputError(f"{why}: choose another folder with --draw") from None
        yield row


def _row(found: dict[str, Tensor], names: Sequence[str], threshold: float) -> dict[str, Any]:
    if "label_map" in found:
        counts = torch.bincount(found["label_map"].flatten(), minlength=len(names))
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        share = counts.double() / counts.sum()
        return {"classes": [{"label": i, "name": names[i], "share": float(share[i])} for i in order.tolist()]}
    parts = zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), found["masks"], strict=True)
    return {
        "objects": [
            {"label": label, "name": names[label], "score": score, "box": box, "mask": run_lengths(mask.numpy())}
            for label, score, box, mask in parts
            if score >= threshold
        ]
    }


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as COCO writes it: {"size": [H, W], "counts": text}."""
    from pycocotools import mask as coco

    found = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def places_of(files: Sequence[str], out: Path) -> list[str]:
    """Where each file's pictures go, without their suffixes: in `out` as the files lie below the folder that holds all
    of them; of two files of one name that differ in their suffixes, the second one is NAME-2.

    Raises:
        InputError: a file would lie beside its picture, where another one may have its name.
    """
    paths = [os.path.abspath(file) for file in files]
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    found: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        if path in found:
            continue
        stem = os.path.join(out, os.path.splitext(os.path.relpath(path, top))[0])
        place, count = stem, 1
        while place.casefold() in taken:
            count += 1
            place = f"{stem}-{count}"
        taken.add(place.casefold())
        found[path] = place
    read_from = {os.path.realpath(os.path.dirname(path)) for path in paths}
    for place in found.values():
        if os.path.realpath(os.path.dirname(place)) in read_from:
            raise InputError(
                f"{os.path.dirname(place) or '.'} is a folder that images are read from, and pictures are not written "
                "among them: choose another one with --draw"
            )
    return [found[path] for path in paths]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as JPEG, with the colours at full resolution, and its folders.

    Raises:
        OSError: it can't be written.
    """
    _save(picture, path, "JPEG", quality=92, subsampling=0)


def _save_labels(label_map: Tensor, path: Path) -> None:
    """A label map as a PNG of one channel, of 16 bits where 8 do not suffice."""
    deep = int(label_map.max()) > 255
    _save(Image.fromarray(label_map.numpy().astype(np.uint16 if deep else np.uint8)), path, "PNG")


def _save(picture: Image.Image, path: Path, format: str, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():  # it may lead to one of the images
        path.unlink()
    with whole_file(path, "wb") as file:
        picture.save(file, format, **options)


# ---- output


def writer(format: str, file: IO[str], detects: bool, drawn: bool, width: int) -> Writer:
    """What writes rows: a table to look at, a JSON array, or CSV.

    Args:
        format: "table", "json" or "csv".
        detects: objects, else label maps.
        drawn: whether there are pictures.
        width: of the table's first column.
    """
    match format:
        case "json":
            return json_writer(file)
        case "csv":
            return _csv(file, detects, drawn)
        case _:
            return _table(file, width)


def _table(file: IO[str], width: int) -> Writer:
    """A line for an image and one for each of its objects, or the shares of its largest classes."""

    def write(row: dict[str, Any]) -> None:
        if "error" in row:  # which stderr has
            return
        name = f"{row['file']:<{width}}"
        if "classes" in row:
            best = [f"{each['name']} {100 * each['share']:5.1f} %" for each in row["classes"]]
            more = f"   and {len(best) - SHOWN} more" if len(best) > SHOWN else ""
            print(printable(f"{name}  {'   '.join(best[:SHOWN])}{more}"), file=file)
            return
        count = len(row["objects"])
        print(printable(f"{name}  {count} object{'s' * (count != 1)}"), file=file)
        longest = max((len(each["name"]) for each in row["objects"]), default=0)
        for each in row["objects"]:
            left, top, right, bottom = each["box"]
            where = f"({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f})"
            print(printable(f"    {each['name']:<{longest}}  {100 * each['score']:5.1f} %  {where}"), file=file)

    return (lambda: None), write, (lambda: None)


def _csv(file: IO[str], detects: bool, drawn: bool) -> Writer:
    """A line for each object, or each class of a label map; one without either for an image that has none."""
    columns = ["file", "label", "name", *(("score", *BOX) if detects else ("share",))]
    columns += ["picture", *([] if detects else ["label_map"])] if drawn else []
    out = csv.DictWriter(file, [*columns, "error"], restval="", extrasaction="ignore", lineterminator="\n")

    def write(row: dict[str, Any]) -> None:
        for each in row.get("objects" if detects else "classes") or [{}]:
            box = {side: f"{value:.2f}" for side, value in zip(BOX, each.get("box", ()), strict=False)}
            rounded = {key: f"{each[key]:.6g}" for key in ("score", "share") if key in each}
            out.writerow(row | each | box | rounded)

    return out.writeheader, write, (lambda: None)
