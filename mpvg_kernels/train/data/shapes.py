"""Small scenes for detection and segmentation that are made here: coloured shapes over parts of photographs.

    root = folder(config)        data.root, or shapes-1 in the user's cache folder; made where it is missing

The layout is COCO's beside that of label maps, so that both tasks read the same scenes:

    images/{train,val}/0000.png                96 x 96 pixels
    annotations/instances_{train,val}.json     COCO's format: boxes, areas and masks (run lengths) of what is visible
    masks/{train,val}/0000.png                 label maps: 0 is background, 1 to 5 are the shapes
    classes.txt                                their names in this order
    shapes.json                                what wrote it

A scene has up to eight shapes of five kinds, of any size and rotation, which hide parts of each other. A kind has
hues of its own, some of which its neighbours have too. The photographs are the two that scikit-learn ships; scenes for
training and held-out ones have different parts of them. A scene is a function of its split and number alone: the same
on every machine, whatever the run's seed is.
"""

import functools
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .. import InputError
from ..config import Config

VERSION = 1
"""Of the scenes: to be raised with any change of them."""
SIDE = 96
SIZES = {"train": 800, "val": 200}
CLASSES = ("circle", "square", "triangle", "cross", "ring")
# Columns of the photographs, which are 640 wide.
COLUMNS = {"train": (0, 384), "val": (384, 640)}
LEAST, MOST = 3, 8
RADII = (10.0, 24.0)
HUE_RANGE = 0.6
"""Of a kind around its own hue, in distances of these: above a half the ranges overlap."""
# An object is drawn if at least so much of it shows, and so many pixels.
LEAST_SHARE, LEAST_PIXELS = 0.4, 60


class Scene(NamedTuple):
    """An image (SIDE, SIDE, 3) uint8, its objects' classes from 1, and the visible parts (N, SIDE, SIDE) bool."""

    image: np.ndarray
    labels: list[int]
    masks: np.ndarray

    @property
    def label_map(self) -> np.ndarray:
        """(SIDE, SIDE) uint8, 0 for the background."""
        return (self.masks * np.array(self.labels, np.uint8)[:, None, None]).sum(0, dtype=np.uint8)


def folder(config: Config) -> Path:
    """The folder of the scenes, made where it is missing; several processes may ask at once.

    Raises:
        InputError: the folder is there and is not whole, or it can't be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpvg_kernels"
    root = Path(config.data.root).expanduser() if config.data.root else cache / f"shapes-{VERSION}"
    try:
        if not _is_empty(root):
            _check(root)
            return root
        # Written beside it and renamed: whole or not there, whatever happens meanwhile.
        part = root.with_name(f"{root.name}.{uuid.uuid4().hex}")
        try:
            write(part, SIZES)
            part.rename(root)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if _is_empty(root):
            raise InputError(
                f"the scenes of data.name=shapes can't be made in {root} ({error.strerror or error}): set data.root to "
                "a folder that can be written"
            ) from None
        _check(root)  # another process was faster
    return root


def write(root: Path, sizes: dict[str, int]) -> None:
    """Write the scenes of both splits into a new folder.

    Args:
        sizes: the first so many scenes of each split.

    Raises:
        OSError: the folder is there, or can't be written.
    """
    root.mkdir(parents=True)
    (root / "annotations").mkdir()
    for split, size in sizes.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(size):
            name, scene = f"{index:04}.png", draw(split, index)
            Image.fromarray(scene.image).save(root / "images" / split / name, compress_level=1)
            Image.fromarray(scene.label_map).save(root / "masks" / split / name, compress_level=1)
            images.append({"id": index + 1, "file_name": name, "width": SIDE, "height": SIDE})
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                annotations.append(_annotation(len(annotations) + 1, index + 1, label, mask))
        categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
        contents = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *CLASSES)))
    (root / "shapes.json").write_text(json.dumps({"version": VERSION, "sizes": sizes}))


def draw(split: str, index: int) -> Scene:
    """A scene of "train" or "val"."""
    random = np.random.RandomState([VERSION, list(SIZES).index(split), index])
    image = _background(random, *COLUMNS[split])
    free = np.ones((SIDE, SIDE), bool)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    labels, masks = [], []
    # From front to back: what lies behind gets the pixels that are free, and is left out if they are too few.
    for _ in range(random.randint(LEAST, MOST + 1)):
        label, radius, angle = random.randint(len(CLASSES)) + 1, random.uniform(*RADII), random.uniform(0, 2 * np.pi)
        centre_x, centre_y = random.uniform(radius, SIDE - radius, 2)
        hue = (label - 1 + random.uniform(-HUE_RANGE, HUE_RANGE)) / len(CLASSES)
        colour, shade = _colour(hue, *random.uniform(0.5, 1, 2)), random.uniform(-0.4, 0.4)
        u, v = (x - centre_x) / radius, (y - centre_y) / radius
        u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        whole = _inside(CLASSES[label - 1], u, v)
        mask = whole & free
        if mask.sum() < max(LEAST_PIXELS, LEAST_SHARE * whole.sum()):
            continue
        image[mask] = (colour * (1 + shade * v[mask, None])).clip(0, 255)
        free &= ~mask
        labels.append(label)
        masks.append(mask)
    return Scene(image, labels, np.stack(masks))


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV in 0 to 1 as RGB in 0 to 255."""
    ramp = abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1
    return 255 * value * (1 - saturation * (1 - ramp.clip(0, 1)))


@functools.cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def _background(random: np.random.RandomState, left: int, right: int) -> np.ndarray:
    """A part of a photograph, at its scale or half of it, mirrored or not."""
    photographs = _photographs()
    photograph = photographs[random.randint(len(photographs))]
    step = random.randint(1, 3)
    top = random.randint(photograph.shape[0] - step * SIDE + 1)
    start = random.randint(left, right - step * SIDE + 1)
    part = photograph[top : top + step * SIDE, start : start + step * SIDE]
    part = part.reshape(SIDE, step, SIDE, step, 3).sum((1, 3)) // step**2  # in integers, as Pillow's filters may change
    down, across = random.choice([1, -1], 2)
    return part[::down, ::across].astype(np.uint8)


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points are in a shape around (0, 0) that a circle of radius 1 holds."""
    least, most = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    match name:
        case "circle":
            return u**2 + v**2 <= 0.8
        case "square":
            return most <= 0.7
        case "triangle":
            return (v >= -0.5) & (3**0.5 * abs(u) + v <= 1)
        case "cross":
            return (most <= 0.92) & (least <= 0.3)
        case "ring":
            return abs(u**2 + v**2 - 0.65) <= 0.35


def _annotation(number: int, image: int, label: int, mask: np.ndarray) -> dict[str, object]:
    """A mask as COCO has it: its run lengths go down the columns and begin with zeros."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "id": number,
        "image_id": image,
        "category_id": label,
        "bbox": [int(side) for side in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts},
    }


def _is_empty(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))


def _check(root: Path) -> None:
    """Raise InputError unless all files of `write` are there."""
    try:
        noted = json.loads((root / "shapes.json").read_text())
        version, sizes = noted["version"], noted["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{root} holds something else than the scenes of data.name=shapes: set data.root to a folder that is "
            "missing or empty, and they are made there"
        ) from None
    wrong = ""
    if version != VERSION:
        wrong = f"version {version} of the scenes, and this is version {VERSION}"
    else:
        for split, size in sizes.items():
            for part in (root / kind / split for kind in ("images", "masks")):
                if (found := len(list(part.glob("*.png")))) != size:
                    wrong = f"{found} of {size} files in {part.relative_to(root)}"
        needed = ["classes.txt", *(f"annotations/instances_{split}.json" for split in sizes)]
        wrong = wrong or next((f"no {name}" for name in needed if not (root / name).is_file()), "")
    if wrong:
        raise InputError(f"{root} has {wrong}: delete the folder, and it is made anew, or set data.root to another one")
