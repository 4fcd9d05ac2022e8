"""One split's images as evaluation sees them: opened alone, in order, prepared as the model needs them, not augmented.

`open_images(config, device, "validation").batches(64)` gives them. What comes at which place is the same at every call,
for any batch and number of processes; for a stream, with the same data.workers.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .. import InputError
from ..config import Config
from ..distributed import World
from .digits import Digits, load_splits
from .images import ByImage, KeyedImages, KeyLists, Loader, Sample, Source, convert, held_out_transform
from .sources import STREAMS, Split, open_folder, open_split, prefix, preprocessing

SPLITS = {"train": "train_split", "validation": "val_split"}
"""The splits with a name in every data set, and the config field that says which of its own each is."""
IMAGES_PER_WORKER = 64
"""Fewer images are decoded sooner by one process than by another that has to be started for them."""


class ImageBatch(NamedTuple):
    """Images x (B, C, H, W) fp32, normalised, and labels y (B,) int64, on the device; index (B,) int64 in the split,
    on the CPU."""

    x: Tensor
    y: Tensor
    index: Tensor


class EvalImages:
    """The images of a split.

    Attributes:
        size: how many there are; 0 for a stream that does not say.
        num_classes, class_names: names are None where nothing names the classes.
        preprocessing: input_size, mean, std, crop_pct, interpolation, crop_mode, as in timm's pretrained_cfg.
        bad: {"file", "reason"} of each image that could not be read by `batches` so far.
    """

    size: int
    num_classes: int
    class_names: list[str] | None
    preprocessing: dict[str, Any]

    def __init__(self):
        self.bad: list[dict[str, str]] = []

    def batches(
        self,
        batch: int,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008, it is frozen
    ) -> Iterator[ImageBatch]:
        """The images in order, or those of `indices` in theirs; unreadable ones are left out (and in `bad`).

        A later call ends the iterator.

        Args:
            batch: most images of a batch.
            world: processes that share the images out: this one gets every world.size-th.

        Raises:
            TrainingError: a process that loads images was killed.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The image's file, or its index where it has none."""
        return f"index {index}"

    def picture(self, x: Tensor) -> np.ndarray:
        """A normalised image (C, H, W) to look at: (H, W, 3) or, of one channel, (H, W), uint8."""
        mean, std = (torch.tensor(self.preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
        pixels = ((x.detach().float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        return (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()

    def close(self) -> None:
        """Stop the processes that load images."""


def share(size: int, indices: Sequence[int] | None, world: World) -> Tensor:
    """This process's part of `size` images, or of those in `indices`: int64, may be empty."""
    order = torch.arange(size) if indices is None else torch.as_tensor(indices, dtype=torch.long)
    return order[world.rank :: world.size]


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class DigitImages(EvalImages):
    """scikit-learn's digits, in memory."""

    num_classes, class_names, preprocessing = Digits.num_classes, Digits.class_names, Digits.preprocessing

    def __init__(self, split: str, device: torch.device):
        super().__init__()
        if split not in SPLITS:
            raise InputError(f"--split {split}: the digits have {' and '.join(SPLITS)}")
        self.number, x, y = load_splits()[list(SPLITS).index(split)]
        mean, std = self.preprocessing["mean"][0], self.preprocessing["std"][0]
        self.x, self.y, self.size = ((x - mean) / std).to(device), y.to(device), len(y)

    def batches(
        self,
        batch: int,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008
    ) -> Iterator[ImageBatch]:
        order = share(self.size, indices, world)
        for index in order.split(batch) if len(order) else ():  # nothing splits into one empty part
            at = index.to(self.x.device)
            yield ImageBatch(self.x[at], self.y[at], index)

    def name(self, index: int) -> str:
        return f"digit {self.number[index]}"


class _LoadedImages(EvalImages):
    """What other data sets share: the classes, and the way to the device.

    Args:
        split: what was opened, with the classes that it names.
        prepared: see `EvalImages.preprocessing`.
    """

    def __init__(self, config: Config, split: Split, prepared: dict[str, Any], device: torch.device):
        super().__init__()
        self.preprocessing, self.device = prepared, device
        self.num_classes, self.class_names = split.num_classes, split.class_names
        self.mode = "L" if prepared["input_size"][0] == 1 else "RGB"
        self.transform = held_out_transform(prepared, pixels=True)
        self.mean, self.std = (torch.tensor(prepared[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
        self.format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        self.most_workers = config.data.workers
        self.loader: Loader | None = None

    def _on_device(self, x: Tensor, y: Tensor, index: Tensor) -> ImageBatch:
        # Normalised a batch at a time, in training's order of operations: four times fewer bytes come from the workers.
        x = x.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.format)
        x = x.div_(255).sub_(self.mean).div_(self.std)
        return ImageBatch(x, y.to(self.device, non_blocking=True), index)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
            self.loader = None


class IndexedImages(_LoadedImages):
    """A split with an image at every index: folders, tar files, torchvision's and Hugging Face's data sets."""

    def __init__(self, config: Config, split: Split, prepared: dict[str, Any], device: torch.device):
        super().__init__(config, split, prepared, device)
        self.source = Source(split.images, self.mode)
        self.size = len(self.source)
        blank = torch.zeros(prepared["input_size"], dtype=torch.uint8)
        self.images = KeyedImages(None, self.source, None, ByImage(self.transform), (blank, 0), 0)
        self.keys, self.workers = KeyLists(), -1

    def batches(
        self,
        batch: int,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008
    ) -> Iterator[ImageBatch]:
        order = share(self.size, indices, world)
        if not len(order):
            return
        workers = min(self.most_workers, len(order) // IMAGES_PER_WORKER, cpus())
        if workers != self.workers:
            self.close()
            self.loader = Loader(self.images, workers, self.device.type == "cuda", batch_sampler=self.keys)
            self.workers = workers
        self.keys.lists = [[(None, i, i) for i in index.tolist()] for index in order.split(batch)]
        for keys, (x, y, weight, bad) in zip(self.keys.lists, self.loader.batches(), strict=True):
            self.bad += [{key: each[key] for key in ("file", "reason")} for each in bad]
            index, read = torch.tensor([key[2] for key in keys]), weight > 0
            if not read.all():
                x, y, index = x[read], y[read], index[read]
            if len(index):
                yield self._on_device(x, y, index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def close(self) -> None:
        super().close()
        self.workers = -1


class _StreamedImages(IterableDataset):
    """A stream's images with their places: the n-th of worker w among W has the place n W + w.

    `begin` says which are wanted: this process's share, or those of a set, behind whose last one reading ends.
    """

    def __init__(self, source: Any, transform: Any, mode: str):
        self.source, self.transform, self.mode = source, transform, mode
        self.begin(None, World())

    def begin(self, wanted: set[int] | None, world: World) -> None:
        self.wanted, self.world = wanted, world

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        last = None if self.wanted is None else max(self.wanted, default=-1)
        for count, (image, label) in enumerate(self.source):
            place = count * worker.num_workers + worker.id
            if last is not None and place > last:
                return
            if place in self.wanted if self.wanted is not None else count % self.world.size == self.world.rank:
                # The place goes where KeyedImages has the weight.
                yield self.transform(convert(image, self.mode)), int(label), place, []


class StreamedImages(_LoadedImages):
    """A split that is a stream: webdataset, Hugging Face's streaming and TensorFlow's data sets.

    Every call of `batches` reads it from its beginning, and every process reads all of it. A broken image is passed
    over by the libraries that read it, and is not in `bad`. An image's index is its place in what data.workers
    processes give in turns. `indices` are kept in memory until the last one is read; those behind the end are left out.
    """

    def __init__(self, config: Config, split: Split, prepared: dict[str, Any], device: torch.device):
        super().__init__(config, split, prepared, device)
        self.size = getattr(split.images.reader, "num_samples", 0) or 0
        # In this process a reader would keep what it began.
        self.workers = max(1, self.most_workers)
        split.images.reader.dist_rank, split.images.reader.dist_num_replicas = 0, 1
        split.images.set_loader_cfg(num_workers=self.workers)
        self.stream = _StreamedImages(split.images, self.transform, self.mode)

    def batches(
        self,
        batch: int,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008
    ) -> Iterator[ImageBatch]:
        self.close()
        mine = None if indices is None else share(0, indices, world).tolist()
        self.stream.begin(None if mine is None else set(mine), world)
        self.loader = Loader(self.stream, self.workers, self.device.type == "cuda", batch_size=batch)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for x, y, place, _ in self.loader.batches():
            if mine is None:
                yield self._on_device(x, y, place)
            else:
                found |= {int(p): pair for *pair, p in zip(x, y, place, strict=True)}
        kept = [place for place in mine or () if place in found]
        for start in range(0, len(kept), batch):
            places = kept[start : start + batch]
            x, y = (torch.stack(part) for part in zip(*(found[place] for place in places), strict=True))
            yield self._on_device(x, y, torch.tensor(places))

    def name(self, index: int) -> str:
        return f"image {index} of the stream"


def open_images(
    config: Config,
    device: torch.device,
    split: str = "validation",
    *,
    folder: Path | None = None,
    class_names: Sequence[str] | None = None,
) -> EvalImages:
    """Open one split of the config's data set, or any folder of images.

    Args:
        split: "train" or "validation", or a name that the data set itself has for one.
        folder: in place of a split: a folder with a folder of images for each class, prepared as the config says.
        class_names: the classes of the run in the order of their labels, so that a split or folder that lacks some of
            them has the run's labels all the same. None: the classes are those that are found.

    Raises:
        InputError: it is not there, not as the config says, or has classes that are not in `class_names`.
    """
    digits = config.data.name == "digits"
    if digits and folder is None:
        return DigitImages(split, device)
    names = None if class_names is None else list(class_names)
    prepared = Digits.preprocessing if digits else preprocessing(config)
    if folder is not None:
        return IndexedImages(config, open_folder(folder, names), prepared, device)
    opened = open_split(config, SPLITS.get(split), split, names)
    kind = StreamedImages if prefix(config.data.name) in STREAMS else IndexedImages
    return kind(config, opened, prepared, device)
