"""Objects with boxes and masks in COCO's format: finding the files of a split, reading and checking them, the images.

A split is one JSON file (images, annotations, categories) and a folder of images. Where nothing names them they are
looked for in data.root, NAME being train, or val, valid, validation, test and the like for the held-out split:

    annotations/instances_NAME2017.json    NAME2017/*.jpg          COCO itself; also 2014, and without a year
    annotations/instances_NAME.json        images/NAME/*.jpg       or NAME/ or images/
    NAME/_annotations.coco.json            NAME/*.jpg              Roboflow's

The file is read once. What is kept of it are arrays and one block of bytes, which the processes that load images share
with this one: nothing is decoded before its image is due.

Labels count the categories in the order of their ids, from 0. What is broken in the file is left out with one warning:

- an image without id, file_name, width or height, with an id that another one has, or whose file is not there;
- an annotation of an unknown image or category, without a box of four numbers, or with an RLE that is no RLE of its
  image's size;
- of training alone: a box that has less than a pixel of width or height once it is clipped to its image, and crowds.
  In an evaluation these count as pycocotools has it.

An object without a mask has its box for one. An image without objects is evaluated, and not trained on.
"""

import json
import math
import os
import pickle
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .. import InputError
from ..config import Config
from ..distributed import World, find_world
from ..run_folder import print_warning
from .base import Batch
from .dense import LoadedSplit, collate_lists, resized, spread, to_device
from .evaluation import SPLITS as SPLIT_FIELDS
from .images import IndexedData, KeyedImages, UnreadableImage, decode, turned, unreadable
from .sources import SPLITS, preprocessing

LEAST_SIDE = 1.0
"""Pixels of a box that is trained on, each way."""
YEARS = ("2017", "2014", "")
EXAMPLES = 3
"""Examples of a kind in a warning."""
NO_MASK = pickle.dumps(None)
LARGEST = 2**63 - 1
"""Of an id, a side and an area."""


# ---- the file


class Coco:
    """A split in COCO's format.

    Attributes:
        file, folder: the JSON file, and where the images are.
        class_names, category_ids: by label, from 0.
        ids, names, sizes: of the images, the sizes (n, 2) are heights and widths.
        first: (n + 1,), an image's annotations are first[i] to first[i + 1].
        boxes: (m, 4) float64, left, top, width, height as in the file.
        areas: (m,) float64, nan where the file says none.
        labels, crowds, trained: (m,); trained is whether an object is fit for training.
        left_out: by reason the number and the first examples.

    Raises:
        InputError: the file can't be read, is not in COCO's format, or the folder has none of its images.
    """

    def __init__(self, file: Path, folders: Sequence[Path]):
        self.file = file
        content = _read(file)
        self.left_out: dict[str, tuple[int, list[str]]] = {}
        self._read_categories(content["categories"])
        listed = self._read_images(content["images"], folders)
        self._read_annotations(content["annotations"], listed)

    def __len__(self) -> int:
        return len(self.ids)

    def _leave_out(self, reason: str, example: Any) -> None:
        count, examples = self.left_out.get(reason, (0, []))
        self.left_out[reason] = count + 1, [*examples, str(example)] if count < EXAMPLES else examples

    def warn(self) -> None:
        """Say in one line what is left out, if anything."""
        if self.left_out:
            told = [
                f"{count} {reason} ({', '.join(examples)}{', ...' if count > EXAMPLES else ''})"
                for reason, (count, examples) in self.left_out.items()
            ]
            print_warning(f"{self.file} has {'; '.join(told)}")

    def _read_categories(self, categories: list) -> None:
        try:
            names = {each["id"]: each["name"] for each in categories}
            if not all(isinstance(i, int) and isinstance(name, str) for i, name in names.items()):
                raise TypeError
        except (TypeError, KeyError):
            raise InputError(f"{self.file} has a category without a number as id or a name: {categories[:3]}") from None
        if len(set(names.values())) < len(categories):
            found = sorted(str([each["id"], each["name"]]) for each in categories)
            raise InputError(
                f"{self.file} has categories that share an id or a name, expected each once: {some(found)}"
            )
        self.category_ids = sorted(names)
        self.class_names = [names[i] for i in self.category_ids]
        if not names:
            raise InputError(f"{self.file} has no categories")

    def _read_images(self, images: list, folders: Sequence[Path]) -> set[int]:
        """Keep what is there; the ids of all that are listed."""
        found: dict[int, tuple[str, int, int]] = {}
        for each in images:
            try:
                key, name, sides = each["id"], each["file_name"], (each["height"], each["width"])
                whole = isinstance(key, int) and isinstance(name, str) and abs(key) <= LARGEST
                whole = whole and all(int(side) == side and 1 <= side <= LARGEST for side in sides)
            except (TypeError, KeyError, ValueError, OverflowError):
                whole = False
            if not whole:
                self._leave_out("images without id, file_name, width or height", str(each)[:80])
            elif key in found:
                self._leave_out("images with the id of another", f"{name}, id {key}")
            else:
                found[key] = name, *map(int, sides)
        listed = set(found)
        names = [name for name, *_ in found.values()]
        self.folder = self._find_folder(names, folders)
        there = _present(self.folder, names)
        for name in names:
            if name not in there:
                self._leave_out(f"images that are not in {self.folder}", name)
        found = {key: row for key, row in found.items() if row[0] in there}
        self.ids, self.names = np.array(list(found), dtype=np.int64), [name for name, *_ in found.values()]
        self.sizes = np.array([size for _, *size in found.values()], dtype=np.int64).reshape(-1, 2)
        return listed

    def _find_folder(self, names: list[str], folders: Sequence[Path]) -> Path:
        """The first of the folders that has one of the first images."""
        if not names:
            raise InputError(f"{self.file} lists no images with id, file_name, width and height")
        for folder in folders:
            if any(os.path.isfile(folder / name) for name in names[:100]):  # False for what can be no name at all
                return folder
        for folder in folders:  # only some of them are there
            if _present(folder, names):
                return folder
        raise InputError(
            f"the images of {self.file}, such as {names[0]}, are not in {' or '.join(map(str, folders))}; expected a "
            "folder with the images that the file lists"
        )

    def _read_annotations(self, annotations: list, listed: set[int]) -> None:
        image_of = {key: i for i, key in enumerate(self.ids.tolist())}
        label_of = {key: label for label, key in enumerate(self.category_ids)}
        images, labels, crowds, trained = array("q"), array("q"), array("b"), array("b")
        boxes, areas, self._segmentations, ends = array("d"), array("d"), bytearray(), array("q")
        annotations.reverse()  # and popped, so that what is read is free
        while annotations:
            each = annotations.pop()
            where = f"annotation {each.get('id')}" if isinstance(each, dict) else str(each)[:80]
            try:
                key, category, (x, y, w, h) = each["image_id"], each["category_id"], each["bbox"]
                if not math.isfinite(x + y + w + h):
                    raise ValueError
                crowd, area = bool(each.get("iscrowd")), each.get("area")
                image, label = image_of.get(key), label_of.get(category)
            except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
                self._leave_out("annotations without image_id, category_id or a box of four numbers", where)
                continue
            if image is None:
                if key not in listed:
                    self._leave_out("annotations of images that are not listed", where)
                continue
            if label is None:
                self._leave_out("annotations of categories that are not listed", where)
                continue
            height, width = self.sizes[image].tolist()
            left, right = (min(max(side, 0), width) for side in (x, x + w))
            top, bottom = (min(max(side, 0), height) for side in (y, y + h))
            fits = min(right - left, bottom - top) >= LEAST_SIDE
            packed = each.get("segmentation", NO_MASK)
            found = pickle.loads(packed)
            try:
                segmentation = _segmentation(found, height, width)
            except ValueError as error:
                self._leave_out(str(error), where)
                continue
            if segmentation is None:
                self._leave_out("objects without a mask, whose box is taken for it", where)
                segmentation = [[left, top, right, top, right, bottom, left, bottom]]
            if not crowd and not fits:
                thin = min(w, h) < LEAST_SIDE
                self._leave_out(f"boxes {'thinner than a pixel' if thin else 'outside of their image'}", where)
            elif not crowd and max(left - x, top - y, x + w - right, y + h - bottom) > LEAST_SIDE:
                self._leave_out("boxes that reach out of their image, clipped", where)
            images.append(image)
            labels.append(label)
            crowds.append(crowd)
            trained.append(fits and not crowd)
            boxes.extend((x, y, w, h))
            areas.append(area if isinstance(area, int | float) and abs(area) <= LARGEST else math.nan)
            self._segmentations += packed if segmentation is found else pickle.dumps(segmentation)
            ends.append(len(self._segmentations))
        image = np.array(images, dtype=np.int64)
        order = np.argsort(image, kind="stable")  # by image
        self.first = np.searchsorted(image[order], np.arange(len(self) + 1))
        self.boxes, self.areas = np.array(boxes).reshape(-1, 4)[order], np.array(areas)[order]
        self.labels = np.array(labels, dtype=np.int64)[order]
        self.crowds, self.trained = (np.array(each, dtype=bool)[order] for each in (crowds, trained))
        ends = np.array([0, *ends], dtype=np.int64)
        self._spans = np.stack([ends[:-1], ends[1:]], 1)[order]

    def relabel(self, class_names: list[str]) -> None:
        """Take over the labels of a run's classes; the id of one that the file lacks is None.

        Raises:
            InputError: the file has others.
        """
        if unknown := [name for name in self.class_names if name not in class_names]:
            raise InputError(
                f"{self.file} has categories that are none of the run's {len(class_names)} classes: {some(unknown)}"
            )
        ids = dict(zip(self.class_names, self.category_ids, strict=True))
        label_of = {name: label for label, name in enumerate(class_names)}
        self.labels = np.array([label_of[name] for name in self.class_names])[self.labels]
        self.class_names, self.category_ids = class_names, [ids.get(name) for name in class_names]

    def segmentation(self, annotation: int) -> list | dict:
        """An annotation's polygons or RLE, as in the file."""
        start, end = self._spans[annotation]
        return pickle.loads(self._segmentations[start:end])

    def rle(self, image: int, annotation: int) -> dict[str, Any]:
        """An annotation's mask as pycocotools has it."""
        size = self.sizes[image].tolist()
        found = self.segmentation(annotation)
        if isinstance(found, list):
            return rle.merge(rle.frPyObjects(found, *size))
        return rle.frPyObjects(found, *size) if isinstance(found["counts"], list) else found

    def target(self, image: int) -> dict[str, Tensor]:
        """What is trained on of an image: "boxes" (N, 4) fp32 left, top, right, bottom, clipped to the image, "labels"
        (N,) int64 from 0, "masks" (N, H, W) uint8."""
        height, width = self.sizes[image].tolist()
        index = self.first[image] + np.flatnonzero(self.trained[self.first[image] : self.first[image + 1]])
        boxes = self.boxes[index]
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, [width, height, width, height])
        masks = torch.zeros(len(index), height, width, dtype=torch.uint8)
        for mask, annotation in zip(masks, index, strict=True):
            mask.copy_(torch.from_numpy(rle.decode(self.rle(image, annotation))))
        boxes, labels = torch.from_numpy(boxes).float(), torch.from_numpy(self.labels[index])
        return {"boxes": boxes, "labels": labels, "masks": masks}


def some(names: Sequence[str]) -> str:
    """A list of names, cut short."""
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


def _read(file: Path) -> dict[str, list]:
    """The lists of a file in COCO's format.

    Raises:
        InputError: it can't be read or lacks one.
    """
    try:
        with open(file, encoding="utf-8-sig") as text:
            content = json.load(text, object_hook=_pack)
    except (OSError, ValueError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else f"no JSON: {error}"
        raise InputError(f"{file} can't be read ({said}); expected annotations in COCO's format") from None
    names = ("images", "annotations", "categories")
    lacking = [name for name in names if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if lacking:
        raise InputError(f"{file} has no list {' and '.join(lacking)}; expected annotations in COCO's format")
    return content


def _pack(found: dict[str, Any]) -> dict[str, Any]:
    """An object of the JSON, its segmentation as bytes while the rest is read: half the time and memory."""
    if "segmentation" in found:
        found["segmentation"] = pickle.dumps(found["segmentation"])
    return found


def _present(folder: Path, names: Sequence[str]) -> set[str]:
    """Those of the files that are in a folder, found by listing it and those of its folders that names begin with."""
    found: set[str] = set()
    for parent in {os.path.dirname(name) for name in names}:
        try:
            found.update(os.path.join(parent, name) for name in os.listdir(folder / parent))
        except (OSError, ValueError):  # not there, or no name that a file can have
            continue
    return found.intersection(names)


def _segmentation(found: Any, height: int, width: int) -> list | dict | None:
    """A segmentation that pycocotools can read, without polygons that are none; None where nothing is left.

    Raises:
        ValueError: it is an RLE that is broken or of another size.
    """
    if isinstance(found, dict):
        counts = found.get("counts")
        if found.get("size") != [height, width]:
            raise ValueError("masks of another size than their image")
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        whole = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
        if not whole or sum(counts) != height * width:  # with which pycocotools would not come to an end
            raise ValueError("masks that are no RLE of their image's pixels")
        return found
    if not isinstance(found, list):
        return None
    if found and isinstance(found[0], int | float):  # one polygon, not in a list
        found = [found]
    kept = [polygon for polygon in found if _is_polygon(polygon, max(height, width))]
    return found if len(kept) == len(found) != 0 else kept or None


def run_lengths(text: str) -> list[int] | None:
    """The run lengths of COCO's compressed RLE, None where it is none.

    A number is in groups of five bits, the lowest first, a character each; from the fourth on it is the difference to
    the number two before. pycocotools reads beyond the end of a text that ends within a number.
    """
    found: list[int] = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last group, with the sign in it
            value -= (bits & 16) << (shift - 4)
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    return None if shift else found


def _is_polygon(found: Any, side: int) -> bool:
    """Whether these are three points or more, none farther than a side out of an image with such sides: pycocotools
    draws what is outside too."""
    try:
        return (len(found) >= 6 and len(found) % 2 == 0 and math.isfinite(sum(found)) and min(found) >= -side) and max(
            found
        ) <= 2 * side
    except (TypeError, OverflowError):
        return False


def find(config: Config, split: str) -> Coco:
    """Read a split: "train", "validation", or a name that the data set has for one.

    Raises:
        InputError: it is not there, or not as it should be.
    """
    data, root, field = config.data, _root(config), SPLIT_FIELDS.get(split)
    name = getattr(data, field) if field else split
    names = next((names for names in SPLITS.values() if name == names[0]), [name])
    given = {
        what: field and getattr(data, f"{field.removesuffix('_split')}_{what}") for what in ("images", "annotations")
    }
    files = [f"annotations/instances_{name}{year}.json" for name in names for year in YEARS]
    files += [f"{name}/_annotations.coco.json" for name in names]
    if given["annotations"]:
        files = [given["annotations"]]
    file = next((root / file for file in files if (root / file).is_file()), None)
    if file is None:
        asked = f"config field data.{field} is {name!r}" if field else f"--split is {name!r}"
        way_out = f", or data.{field.removesuffix('_split')}_annotations that names another file" if field else ""
        raise InputError(f"{asked}, but {root} has none of the files {', '.join(files)}; expected one{way_out}")
    if given["images"]:
        return Coco(file, [root / given["images"]])
    own = file.stem.removeprefix("instances_")  # train2017, where there may be a train2014 too
    folders = [own, f"images/{own}"] + [
        f"{start}{name}{year}" for start in ("images/", "") for name in names for year in YEARS
    ]
    beside = [] if file.parent.name == "annotations" else [file.parent]
    folders = [*beside, *(root / folder for folder in folders), root / "images", root]
    return Coco(file, [folder for folder in dict.fromkeys(folders) if folder.is_dir()])


def _root(config: Config) -> Path:
    """Where the data set is; made where it is one that is made.

    Raises:
        InputError: it is none of these, or not there.
    """
    match config.data.name:
        case "shapes":
            from . import shapes

            return shapes.folder(config)
        case "coco":
            if config.data.root is None:
                raise InputError("config field data.root is None, expected the folder of a data set in COCO's format")
            if not Path(config.data.root).is_dir():
                raise InputError(f"config field data.root is {config.data.root!r}, where there is no folder")
            return Path(config.data.root)
        case name:
            raise InputError(f"config field data.name is {name!r}, expected coco or shapes for task {config.task}")


# ---- the images


class CocoSource:
    """Images with their targets by index, see `KeyedImages`.

    Args:
        coco: the split.
        images: which of its images, in this order.
        mode: PIL's, RGB or L.
        train: whether targets are those of training (`Coco.target`), or {"image", "size"}: an image's index in the
            split, -1 for what pads, and its (height, width).
    """

    def __init__(self, coco: Coco, images: np.ndarray, mode: str, train: bool):
        self.coco, self.images, self.mode, self.train = coco, images, mode, train

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        coco, image = self.coco, int(self.images[index])
        pixels = self.read(index)
        height, width = size = tuple(coco.sizes[image].tolist())
        if not self.train:
            return pixels, {"image": image, "size": size}
        target = coco.target(image)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))
        target["masks"] = tv_tensors.Mask(target["masks"])
        return pixels, target

    def read(self, index: int) -> Image.Image:
        """An image alone.

        Raises:
            UnreadableImage: it can't be read, or is of another size than the file says.
        """
        height, width = self.coco.sizes[self.images[index]].tolist()
        with unreadable():
            pixels = decode(self.name(index), self.mode)
        if pixels.size != (width, height):
            raise UnreadableImage(
                f"it has {pixels.width}x{pixels.height} pixels, expected {width}x{height} as {self.coco.file} says"
                f"{turned(pixels)}"
            )
        return pixels

    def name(self, index: int) -> str:
        return str(self.coco.folder / self.coco.names[self.images[index]])


# ---- transforms


class RandomShortSide(v2.Transform):
    """Resize to a shorter side that is drawn; masks are sampled at the centres of the new pixels.

    torchvision's RandomShortestSize samples masks half a pixel beside and rounds sizes down.
    """

    def __init__(self, short_sides: Sequence[int], long_side: int):
        super().__init__()
        self.short_sides, self.long_side = short_sides, long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        side = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        return {"size": resized(*v2.query_size(flat_inputs), side, self.long_side)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        masks = isinstance(inpt, tv_tensors.Mask)
        mode = v2.InterpolationMode.NEAREST_EXACT if masks else v2.InterpolationMode.BILINEAR
        return v2.functional.resize(inpt, list(params["size"]), mode, antialias=True)


class RandomCrop(v2.Transform):
    """Crop to a height and a width that are drawn each from a range, at a place that is drawn; smaller sides stay."""

    def __init__(self, heights: tuple[int, int], widths: tuple[int, int]):
        super().__init__()
        self.ranges = heights, widths

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sizes = v2.query_size(flat_inputs)
        (height, top), (width, left) = (self._draw(*pair) for pair in zip(sizes, self.ranges, strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def _draw(self, side: int, least_and_most: tuple[int, int]) -> tuple[int, int]:
        least, most = (min(side, limit) for limit in least_and_most)
        length = int(torch.randint(least, most + 1, ()))
        return length, int(torch.randint(side - length + 1, ()))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(inpt, **params)


def _to_normal(prepared: dict[str, Any]) -> list[v2.Transform]:
    normalise = v2.Normalize(list(prepared["mean"]), list(prepared["std"]))
    dtypes = {tv_tensors.Image: torch.float32, "others": None}
    return [v2.ToImage(), v2.ToDtype(dtypes, scale=True), normalise, v2.ToPureTensor()]


class TrainTransform:
    """DETR's multi-scale augmentation (arXiv 2005.12872, A.4) with the sides of config.detection, and flips.

    Boxes are clipped to a crop, not drawn anew around what it leaves of the masks; objects of whose box it leaves less
    than a pixel are dropped, which may be all (as mmdetection's allow_negative_crop).
    """

    def __init__(self, config: Config, prepared: dict[str, Any]):
        fields = config.detection
        resize = RandomShortSide(fields.short_sides, fields.max_side)
        first = RandomShortSide(fields.crop_short_sides, fields.max_side)
        crop = RandomCrop(fields.crop_sides, fields.crop_sides)
        sizes = [resize, v2.Compose([first, crop, resize])]
        steps = [v2.RandomHorizontalFlip(config.aug.hflip)]
        steps.append(v2.RandomChoice(sizes, [1 - fields.crop_prob, fields.crop_prob]))
        if fields.final_crop is not None:
            steps.append(RandomCrop(*((side, side) for side in fields.final_crop)))
        steps += [v2.SanitizeBoundingBoxes(LEAST_SIDE), *_to_normal(prepared)]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.steps(image, target)


class HeldOutTransform:
    """Resize and normalise, as evaluation and predictions have it.

    Args:
        prepared: `mean`, `std`, `short_side` and `long_side`.
    """

    def __init__(self, prepared: dict[str, Any]):
        self.sides = prepared["short_side"], prepared["long_side"]
        self.steps = v2.Compose(_to_normal(prepared))

    def __call__(self, image: Image.Image, target: Any = None) -> tuple[Tensor, Any]:
        height, width = resized(image.height, image.width, *self.sides)
        return self.steps(image.resize((width, height), Image.Resampling.BILINEAR)), target


def prepare(config: Config) -> dict[str, Any]:
    """How images are made ready for the model: input_size (of the largest evaluated image), mean, std, short_side and
    long_side.

    Raises:
        InputError: mean and std are not for one or three channels.
    """
    found, fields = preprocessing(config), config.detection
    sides = min(fields.test_short_side, fields.test_max_side), fields.test_max_side
    size = (found["input_size"][0], *(-(-side // 32) * 32 for side in sides))
    normal = {key: found[key] for key in ("mean", "std")}
    return {"input_size": size, **normal, "short_side": fields.test_short_side, "long_side": fields.test_max_side}


# ---- splits and training data


class CocoSplit(LoadedSplit):
    """The images of a split to be evaluated; a target is {"image", "size"}, see `CocoSource`.

    Attributes:
        coco: the split's file.
    """

    def __init__(self, images: KeyedImages, device: torch.device, **loading: Any):
        self.coco: Coco = images.test.coco
        super().__init__(images, len(self.coco.class_names), self.coco.class_names, device, **loading)

    def image(self, index: int) -> Image.Image:
        return self.source.read(index)

    def truth(self, index: int) -> dict[str, Tensor]:
        """See `DenseSplit.truth`; without crowds, and boxes clipped to the image."""
        target = self.coco.target(index)
        return {**target, "masks": target["masks"].bool()}


class CocoData(IndexedData):
    """Training and held-out images in COCO's format.

    Attributes:
        test_split: the held-out ones.
        test_indices: those of them that data.max_test_images leaves, evenly over the list; None for all.
    """

    def __init__(self, config: Config, device: torch.device, world: World = World()):  # noqa: B008
        self.preprocessing = prepared = prepare(config)
        self.input_size = prepared["input_size"]
        train, test = (find(config, split) for split in SPLIT_FIELDS)
        if world.rank == 0:
            train.warn()
            test.warn()
        self.num_classes, self.class_names = len(train.class_names), train.class_names
        if config.data.num_classes not in (None, self.num_classes):
            raise InputError(
                f"config field data.num_classes is {config.data.num_classes}, expected {self.num_classes}, the "
                f"categories of {train.file}"
            )
        if only := [name for name in train.class_names if name not in test.class_names]:
            raise InputError(f"{test.file} lacks categories of {train.file}, expected the same: {some(only)}")
        test.relabel(train.class_names)
        fit = np.unique(np.searchsorted(train.first, np.flatnonzero(train.trained), side="right") - 1)
        if not len(fit):
            raise InputError(f"{train.file} has no object to train on, in images that are there")
        sources = CocoSource(train, fit, _mode(prepared), train=True), _held_out(test, prepared)
        transforms = TrainTransform(config, prepared), HeldOutTransform(prepared)
        images = KeyedImages(*sources, *transforms, blank(prepared), config.seed)
        super().__init__(config, device, world, images, collate_lists, test_batch=1)
        self.test_split = CocoSplit(images, device, loader=self.loader, keys=self.keys)
        self.test_indices = spread(len(test), config.data.max_test_images)

    def to_device(self, x: list[Tensor], y: list[dict[str, Tensor]]) -> Batch:
        return Batch(*to_device((x, y), self.device))

    def test_batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Any]], Tensor]]:
        return self.test_split.batches(self.test_indices, world=self.world)

    def take_bad(self) -> list[dict[str, Any]]:
        return super().take_bad() + self.test_split.take_bad()


def _mode(prepared: dict[str, Any]) -> str:
    return "L" if prepared["input_size"][0] == 1 else "RGB"


def _held_out(coco: Coco, prepared: dict[str, Any]) -> CocoSource:
    return CocoSource(coco, np.arange(len(coco)), _mode(prepared), train=False)


def blank(prepared: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What stands for an image that can't be read."""
    return torch.zeros(prepared["input_size"][0], 32, 32), {"image": -1, "size": (32, 32)}


def open_coco(
    config: Config,
    split: str,
    device: torch.device,
    *,
    images: Path | None = None,
    annotations: Path | None = None,
    class_names: Sequence[str] | None = None,
) -> CocoSplit:
    """See `DenseTask.open_split`; where `annotations` are given without `images`, these are beside them."""
    if annotations is not None:
        coco = Coco(Path(annotations), [Path(images or annotations.parent)])
    elif images is not None:
        raise InputError(f"the folder of images {images} was given without annotations, expected COCO's JSON file too")
    else:
        coco = find(config, split)
    if find_world().rank == 0:
        coco.warn()
    if class_names is not None:
        coco.relabel(list(class_names))
    prepared = prepare(config)
    loaded = KeyedImages(None, _held_out(coco, prepared), None, HeldOutTransform(prepared), blank(prepared), 0)
    return CocoSplit(loaded, device, workers=config.data.workers)
