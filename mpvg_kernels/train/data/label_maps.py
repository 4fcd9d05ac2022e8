"""Images with a label map each, for segmentation: ADE20K and any folder of images with one of label maps.

A label map is an image of one channel whose values are the classes. Where the two folders of a split are, first found:

    images/NAME or NAME/images    and    masks/NAME, labels/NAME, annotations/NAME, NAME/masks, ...

in data.root, NAME being train or training, and validation, val, ...; ADE20K's own layout is among them. An image and
its label map have the same name but for the ending, in sub-folders too. Names of the classes, from label 0 on and
without what is ignored, are in data.root: classes.txt, a name a line, or ADE20K's objectInfo150.txt.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from .. import InputError, near_matches
from ..config import Config
from ..distributed import World
from ..run_folder import print_warning
from .base import Batch
from .dense import LoadedSplit, resized, spread
from .evaluation import SPLITS as SPLIT_FIELDS
from .images import IndexedData, KeyedImages, Sample, UnreadableImage, decode, turned, unreadable
from .sources import EXTENSIONS, SPLITS, preprocessing

IMAGES = ("images/{}", "{}/images")
MAPS = ("masks/{}", "labels/{}", "annotations/{}", "{}/masks", "{}/labels", "{}/annotations")
MAP_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # without loss
MAP_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
LOOKS = 16
"""Label maps that are looked at before a run."""
CROPS = 11
"""Crops that are drawn at most, the first one included."""


# ---- files


def by_stem(folder: Path, endings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The files in a folder and its sub-folders by their path in it without the ending, in order; and those whose name
    another has already."""
    found: dict[str, str] = {}
    doubles = []
    for path, inner, files in os.walk(folder, followlinks=True):
        inner.sort()
        for name in sorted(files):
            stem, ending = os.path.splitext(os.path.relpath(os.path.join(path, name), folder))
            if ending.lower() in endings and not name.startswith("."):
                if stem in found:
                    doubles.append(stem + ending)
                else:
                    found[stem] = stem + ending
    return found, doubles


def pair(images: Path, maps: Path, warn: Callable[[str], None]) -> list[tuple[Path, Path]]:
    """Each image with its label map; `warn` is told once of what is left out.

    Raises:
        InputError: there is no pair.
    """
    (pictures, doubles), (labels, more) = by_stem(images, EXTENSIONS), by_stem(maps, MAP_EXTENSIONS)
    pairs = [(images / file, maps / labels[stem]) for stem, file in pictures.items() if stem in labels]
    if not pairs:
        raise InputError(
            f"no image in {images} ({len(pictures)} of {' '.join(EXTENSIONS)}) has a label map in {maps} "
            f"({len(labels)} of {' '.join(MAP_EXTENSIONS)}); expected files of the same name but for the ending"
        )
    left_out = [
        ("image without a label map", [file for stem, file in pictures.items() if stem not in labels]),
        ("label map without an image", [file for stem, file in labels.items() if stem not in pictures]),
        ("file with another's name", doubles + more),
    ]
    told = [f"{len(files)} times: {kind} ({_some(files)})" for kind, files in left_out if files]
    if told:
        warn(f"left out of {images} and {maps}: {'; '.join(told)}")
    return pairs


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def class_names(root: Path) -> list[str] | None:
    """The classes' names that a data set has beside its images, None where it has none.

    Raises:
        InputError: it can't be read, or one comes twice.
    """
    own, ade20k = root / "classes.txt", root / "objectInfo150.txt"
    if own.is_file():
        try:
            names = [line.strip() for line in own.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InputError(f"{own} can't be read ({error}), expected a class's name on each line, in UTF-8") from None
        if doubles := [name for i, name in enumerate(names) if name in names[:i]]:
            raise InputError(f"{own} has the name {doubles[0]!r} twice, expected another for each class")
        return names
    if not ade20k.is_file():
        return None
    try:
        head, *rows = (line.split("\t") for line in ade20k.read_text(encoding="utf-8").splitlines() if line.strip())
        column = next((i for i, title in enumerate(head) if title.strip().lower() == "name"), -1)
        synonyms = [row[column].strip() for row in rows]
    except (OSError, ValueError, IndexError):
        raise InputError(f"{ade20k} can't be read, expected ADE20K's table with the classes' names") from None
    first = [name.replace(";", ",").partition(",")[0] for name in synonyms]
    return first if len(set(first)) == len(first) else synonyms


def _classes(config: Config, given: Sequence[str] | None = None) -> tuple[int, list[str] | None]:
    """Number and names of the classes: the run's (`given`), the folder's, or the config's number alone.

    Raises:
        InputError: they differ, or nothing says them.
    """
    data, fields = config.data, config.segmentation
    root = Path(data.root) if data.root else None
    names = class_names(root) if root is not None else None
    if given is not None:
        if names is not None and names != list(given):
            other = [name for name in names if name not in given] or ["the same in another order"]
            close = near_matches(other[0], list(given)) if len(other) == 1 else ""
            raise InputError(
                f"{root} has other classes than the run: {len(names)}, not {len(given)} ({_some(other)}){close}"
            )
        names = list(given)
    elif names is not None and not fields.reduce_zero_label and not (root / "classes.txt").is_file():
        raise InputError(
            "config field segmentation.reduce_zero_label is False, expected True for ADE20K, whose classes begin at "
            f"label 1 (or name those from 0 on in {root / 'classes.txt'})"
        )
    if names is None and data.num_classes is None:
        raise InputError(
            f"config field data.num_classes is None, expected a number, as {data.root} has no classes.txt that names "
            "the classes"
        )
    count = data.num_classes if names is None else len(names)
    if data.num_classes not in (None, count):
        raise InputError(f"config field data.num_classes is {data.num_classes}, expected {count}, the names' number")
    last = count - 1 + fields.reduce_zero_label
    if fields.ignore_label <= last:
        raise InputError(
            f"config field segmentation.ignore_label is {fields.ignore_label}, which is one of the {count} classes' "
            f"labels; expected more than {last}"
        )
    return count, names


def _folders(config: Config, split: str) -> tuple[Path, Path]:
    """Where the images and the label maps of a split are: "train", "validation" or a name that folders have.

    Raises:
        InputError: they are not there.
    """
    data = config.data
    if data.root is None:
        raise InputError("config field data.root is None, expected the folder that has images and label maps in it")
    root = Path(data.root)
    if not root.is_dir():
        raise InputError(f"config field data.root is {data.root!r}, where there is no folder")
    field = SPLIT_FIELDS.get(split)
    name = getattr(data, field) if field else split
    names = next((names for names in SPLITS.values() if name == names[0]), [name])
    found = []
    for kind, patterns in (("images", IMAGES), ("annotations", MAPS)):
        given = field and f"data.{field.removesuffix('_split')}_{kind}"
        if given and (value := getattr(data, given.removeprefix("data."))) is not None:
            if not (root / value).is_dir():
                raise InputError(f"config field {given} is {value!r}, expected a folder in {root}")
            found.append(root / value)
            continue
        places = [pattern.format(each) for each in names for pattern in patterns]
        place = next((place for place in places if (root / place).is_dir()), None)
        if place is None:
            asked = f"config field data.{field} is {name!r}" if field else f"--split is {name!r}"
            way_out = f", or the folder's name in {given}" if given else ""
            raise InputError(f"{asked}, but {root} has none of the folders {', '.join(places)}; expected one{way_out}")
        found.append(root / place)
    return found[0], found[1]


def _refusal(path: Path, mode: str) -> str:
    return (
        f"the label map {path} is an image of colours or shades (mode {mode}), expected one channel of labels: write "
        "each pixel's class as its value, in a PNG of 8 or 16 bits or one with a palette"
    )


class LabelMaps:
    """Pairs of files by index: (image in PIL's mode `mode`, labels (1, H, W) uint8 or, for labels above 255, int32).

    The labels are classes from 0 on, or `ignore_label`. Indexing raises UnreadableImage for a file that is broken, a
    label map of another size than its image, and labels that are no class.

    Raises:
        InputError: the first label map is an image of colours.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], config: Config, num_classes: int, mode: str):
        fields = config.segmentation
        self.pairs, self.num_classes, self.mode, self.ignore = pairs, num_classes, mode, fields.ignore_label
        self.first = int(fields.reduce_zero_label)
        # What each value of a file means; -1: nothing.
        self.meaning = np.full(65536, -1, np.int32)
        self.meaning[self.first : self.first + num_classes] = np.arange(num_classes)
        self.meaning[: self.first] = self.meaning[self.ignore] = self.ignore
        mode = MAP_MODES[0]
        with contextlib.suppress(Exception), Image.open(pairs[0][1]) as first:  # a broken one is found when it is read
            mode = first.mode
        if mode not in MAP_MODES:
            raise InputError(_refusal(pairs[0][1], mode))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        image, labels = self.image(index), self.labels(index)
        if (size := (labels.shape[2], labels.shape[1])) != image.size:
            raise UnreadableImage(
                f"the label map {self.pairs[index][1]} has {size[0]}x{size[1]} pixels, expected {image.size[0]}x"
                f"{image.size[1]} as its image has{turned(image)}"
            )
        return image, labels

    def image(self, index: int) -> Image.Image:
        with unreadable():
            return decode(self.pairs[index][0], self.mode)

    def labels(self, index: int) -> Tensor:
        path = self.pairs[index][1]
        with unreadable(f"label map {path}: "), Image.open(path) as file:
            if file.mode not in MAP_MODES:
                raise UnreadableImage(_refusal(path, file.mode))
            # Pillow stretches grey values of 2 and 4 bits to 8, and a PGM's from its largest value to 8 or 16 bits.
            coded = file.tile[0][3] if file.tile else ""
            most, top = {"L;2": (3, 255), "L;4": (15, 255)}.get(str(coded), (1, 1))
            if file.format == "PPM" and isinstance(coded, tuple):
                most, top = coded[1], 255 if file.mode == "L" else 65535
            values = (np.asarray(file).astype(np.int64) * most + top // 2) // top
        labels = self.meaning[values.clip(0, len(self.meaning) - 1)]
        wrong = (labels < 0) | (values != values.clip(0, len(self.meaning) - 1))
        if wrong.any():
            raise UnreadableImage(
                f"the label map {path} has the label {values[wrong].max()}, expected at most "
                f"{self.num_classes - 1 + self.first} for the {self.num_classes} classes, or {self.ignore} for what is "
                "ignored"
            )
        return torch.from_numpy(labels.astype(np.uint8 if self.ignore < 256 else np.int32))[None]

    def name(self, index: int) -> str:
        """The image's file."""
        return str(self.pairs[index][0])


def _check_labels(maps: LabelMaps) -> None:
    """Warn where there is one class or none: masks of 0 and 255 are common, and 255 is ignored by default."""
    seen: set[int] = set()
    looked = range(len(maps)) if len(maps) <= LOOKS else spread(len(maps), LOOKS)
    for index in looked:
        with contextlib.suppress(UnreadableImage):
            seen.update(maps.labels(index).unique().tolist())
    classes = seen - {maps.ignore}
    if seen and len(classes) < min(2, maps.num_classes):
        only = f"no class but {min(classes)}" if classes else "no class"
        print_warning(
            f"{len(looked)} label maps in {maps.pairs[0][1].parent} have {only} of {maps.num_classes}, and all else is "
            f"ignored: look at their values, at segmentation.ignore_label, which is {maps.ignore}, and at "
            "segmentation.reduce_zero_label"
        )


# ---- transforms


def _uniform(least: float, most: float) -> float:
    return least + (most - least) * torch.rand(()).item()


class RandomScale(v2.Transform):
    """An image resized whole, then by a random factor, at once; bilinear with antialiasing, labels by the nearest.

    mmsegmentation's OpenCV does not smooth what it makes smaller, and takes for the nearest pixel the one above.
    """

    def __init__(self, short_side: int, long_side: int, scale: tuple[float, float]):
        super().__init__()
        self.short_side, self.long_side, self.scale = short_side, long_side, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = _uniform(*self.scale)
        size = functional.get_size(flat_inputs[0])
        return {"size": list(resized(*size, factor * self.short_side, factor * self.long_side))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            labels = inpt.as_subclass(Tensor)
            return tv_tensors.Mask(functional.resize_image(labels, params["size"], InterpolationMode.NEAREST_EXACT))
        return functional.resize(inpt, params["size"], antialias=True)


class ClassCrop(v2.Transform):
    """A random crop in which no class has more than a share of the labelled pixels, as far as a few draws find one.

    As mmsegmentation has it: a crop of one class alone is too much of it, and the last draw is taken as it is.
    """

    def __init__(self, size: tuple[int, int], most: float, ignore: int):
        super().__init__()
        self.size, self.most, self.ignore = size, most, ignore

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels = next(each for each in flat_inputs if isinstance(each, tv_tensors.Mask)).as_subclass(Tensor)
        for _ in range(CROPS):
            box = []
            for side, whole in zip(self.size, labels.shape[-2:], strict=True):
                box.append((int(torch.randint(max(whole - side, 0) + 1, ())), min(side, whole)))
            (top, height), (left, width) = box
            part = labels[0, top : top + height, left : left + width]
            counts = torch.bincount(part[part != self.ignore].flatten())
            if self.most >= 1 or ((counts > 0).sum() > 1 and counts.max() < self.most * counts.sum()):
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """mmsegmentation's PhotoMetricDistortion: brightness, contrast, saturation and hue, each in half of the images.

    v2.RandomPhotometricDistort is another: it multiplies the brightness, changes contrast and saturation against greys,
    has half of the hues' range (OpenCV's 18 are of 180, a tenth of the circle), and swaps channels.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        def maybe(least: float, most: float, otherwise: float) -> float:
            value = _uniform(least, most)
            return value if torch.rand(()) < 0.5 else otherwise

        ranges = {"brightness": (-32, 32, 0), "contrast": (0.5, 1.5, 1), "saturation": (0.5, 1.5, 1)}
        found = {name: maybe(*values) for name, values in (ranges | {"hue": (-0.1, 0.1, 0)}).items()}
        return found | {"contrast_first": bool(torch.rand(()) < 0.5)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        x = inpt.as_subclass(Tensor).float().add_(params["brightness"]).clamp_(0, 255)
        if params["contrast_first"]:
            x = x.mul_(params["contrast"]).clamp_(0, 255)
        if params["saturation"] != 1:
            # In HSV: V is the largest channel, and S the smallest one's distance from it, relative to V; at most 1.
            value = x.amax(0)
            distance = (value - x.amin(0)).clamp_(min=1e-6)
            x = value - (value - x) * (value / distance).clamp_(max=params["saturation"])
        if params["hue"]:
            x = functional.adjust_hue_image(x / 255, params["hue"]) * 255
        if not params["contrast_first"]:
            x = (x * params["contrast"]).clamp_(0, 255)
        return tv_tensors.Image(x.round().to(torch.uint8))


class PadTo(v2.Transform):
    """Padding to the right and below: zeros in a normalised image, the ignored label in its label map."""

    def __init__(self, size: tuple[int, int], ignore: int):
        super().__init__()
        self.size, self.ignore = size, ignore

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = functional.get_size(inpt)
        fill = self.ignore if isinstance(inpt, tv_tensors.Mask) else 0
        return functional.pad(inpt, [0, 0, self.size[1] - width, self.size[0] - height], fill=fill)


class TrainTransform:
    """Image and labels (1, H, W) to a normalised crop (C, h, w) and its labels (h, w); draws from torch's stream."""

    def __init__(self, config: Config, prepared: dict[str, Any]):
        fields, size = config.segmentation, tuple(prepared["input_size"][1:])
        self.steps = v2.Compose(
            [
                RandomScale(fields.short_side, fields.long_side, fields.scale),
                ClassCrop(size, fields.cat_max_ratio, fields.ignore_label),
                v2.RandomHorizontalFlip(config.aug.hflip),
                *([PhotometricDistortion()] if fields.photometric else []),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(prepared["mean"], prepared["std"]),
                PadTo(size, fields.ignore_label),
            ]
        )

    def __call__(self, image: Image.Image, labels: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.steps(tv_tensors.Image(functional.pil_to_tensor(image)), tv_tensors.Mask(labels))
        return x.as_subclass(Tensor), y.as_subclass(Tensor)[0]


def held_out_image(image: Image.Image, prepared: dict[str, Any]) -> Tensor:
    """A whole image, resized and normalised: (C, H, W) fp32.

    The sides are not rounded to multiples of 32, as mmsegmentation does by stretching the image: the model pads.
    """
    size = resized(image.height, image.width, prepared["short_side"], prepared["long_side"])
    x = functional.resize(functional.pil_to_tensor(image), list(size), antialias=True)
    return functional.normalize(functional.to_dtype(x, torch.float32, scale=True), prepared["mean"], prepared["std"])


class HeldOutTransform:
    """Image and labels (1, H, W) to the whole image, and {"label_map": (H, W)} of the original size."""

    def __init__(self, prepared: dict[str, Any]):
        self.prepared = prepared

    def __call__(self, image: Image.Image, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return held_out_image(image, self.prepared), {"label_map": labels[0]}


def collate(samples: list[Sample]) -> tuple[Any, Any, Tensor, list[dict[str, Any]]]:
    """Crops as tensors (x, y, weight, unreadable images); whole images as lists, as they differ in size."""
    x, y, weight, bad = zip(*samples, strict=True)
    if isinstance(y[0], Tensor):
        x, y = default_collate(list(x)), default_collate(list(y))
    return x, y, torch.tensor(weight), [one for each in bad for one in each]


# ---- data


def preparation(config: Config) -> dict[str, Any]:
    """How images are made ready: input_size (of a training crop), mean, std, interpolation, and the config's
    short_side, long_side, window and stride."""
    found, fields = preprocessing(config), config.segmentation
    kept = {key: found[key] for key in ("input_size", "mean", "std")} | {"interpolation": "bilinear"}
    return kept | {key: getattr(fields, key) for key in ("short_side", "long_side", "window", "stride")}


class LabelMapSplit(LoadedSplit):
    """See `DenseSplit`; a target is {"label_map": (H, W) int64} of the original size, with ignored pixels in it.

    Args:
        images: what loads them.
        class_names: None where nothing names the classes.
        loading: see `LoadedSplit`.
    """

    source: LabelMaps

    def __init__(
        self,
        images: KeyedImages,
        class_names: list[str] | None,
        device: torch.device,
        format: torch.memory_format = torch.contiguous_format,
        **loading: Any,
    ):
        super().__init__(images, images.test.num_classes, class_names, device, **loading)
        self.format, self.ignore_label = format, images.test.ignore

    def batches(
        self,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008, it is frozen
    ) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]], Tensor]]:
        for images, targets, weight in super().batches(indices, world=world):
            # What stands for an unreadable image has labels without a dict.
            maps = [each["label_map"] if isinstance(each, dict) else each for each in targets]
            images = [each[None].to(memory_format=self.format)[0] for each in images]
            yield images, [{"label_map": each.long()} for each in maps], weight

    def image(self, index: int) -> Image.Image:
        return self.source.image(index)

    def truth(self, index: int) -> dict[str, Tensor]:
        return {"label_map": self.source[index][1][0].long()}


def _format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.model.channels_last else torch.contiguous_format


def blank(prepared: dict[str, Any], source: LabelMaps) -> tuple[Tensor, Tensor]:
    """What stands for an unreadable image: a crop of the mean colour with nothing but ignored pixels."""
    labels = torch.full(prepared["input_size"][1:], source.ignore, dtype=torch.int32)
    return torch.zeros(prepared["input_size"]), labels.to(torch.uint8 if source.ignore < 256 else torch.int32)


def _resolve(config: Config) -> Config:
    """The config with data.root where the images are, made where they are made."""
    name = config.data.name
    if name == "shapes":
        from . import shapes

        return replace(config, data=replace(config.data, root=str(shapes.folder(config))))
    if name != "masks":
        close = near_matches(name, ("masks", "shapes"))
        raise InputError(f"config field data.name is {name!r}, expected masks or shapes for task segmentation{close}")
    return config


def _mode(prepared: dict[str, Any]) -> str:
    return "L" if prepared["input_size"][0] == 1 else "RGB"


class MaskData(IndexedData):
    """Images with label maps: crops to train on, and whole images to evaluate.

    Attributes:
        test_split: the held-out images.
        test_indices: those of them that data.max_test_images leaves, evenly over the whole list; None for all.
    """

    def __init__(self, config: Config, device: torch.device, world: World = World()):  # noqa: B008
        config = _resolve(config)
        folders = [_folders(config, split) for split in SPLIT_FIELDS]
        self.num_classes, self.class_names = _classes(config)
        self.preprocessing = prepared = preparation(config)
        self.input_size, self.format = prepared["input_size"], _format(config)
        warn = print_warning if world.rank == 0 else lambda text: None
        train, test = (LabelMaps(pair(*folder, warn), config, self.num_classes, _mode(prepared)) for folder in folders)
        if world.rank == 0:
            _check_labels(train)
        transforms = TrainTransform(config, prepared), HeldOutTransform(prepared)
        images = KeyedImages(train, test, *transforms, blank(prepared, train), config.seed)
        super().__init__(config, device, world, images, collate, test_batch=1)
        lent = {"loader": self.loader, "keys": self.keys}
        self.test_split = LabelMapSplit(images, self.class_names, device, self.format, **lent)
        self.test_indices = spread(len(test), config.data.max_test_images)

    def to_device(self, x: Tensor, y: Tensor) -> Batch:
        x = x.to(self.device, non_blocking=True, memory_format=self.format)
        return Batch(x, y.to(self.device, non_blocking=True).long())

    def test_batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]], Tensor]]:
        return self.test_split.batches(self.test_indices, world=self.world)

    def take_bad(self) -> list[dict[str, Any]]:
        return super().take_bad() + self.test_split.take_bad()


def open_maps(
    config: Config,
    split: str,
    device: torch.device,
    *,
    images: Path | None = None,
    annotations: Path | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelMapSplit:
    """See `DenseTask.open_split`; `images` and `annotations` are folders, given together or not at all."""
    if (images is None) != (annotations is None):
        raise InputError("a folder of images or one of label maps was given, expected both or none")
    if images is None:
        config = _resolve(config)
        folders = _folders(config, split)
    else:
        folders = Path(images), Path(annotations)
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"{folder} is no folder, expected one of images and one of label maps")
        if class_names is not None:  # the folder's own classes are not those of data.root
            config = replace(config, data=replace(config.data, root=None))
    count, names = _classes(config, class_names)
    prepared = preparation(config)
    source = LabelMaps(pair(*folders, print_warning), config, count, _mode(prepared))
    loaded = KeyedImages(None, source, None, HeldOutTransform(prepared), blank(prepared, source), 0)
    return LabelMapSplit(loaded, names, device, _format(config), workers=config.data.workers)
