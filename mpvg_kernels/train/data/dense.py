"""What the data of dense tasks share: splits that are evaluated, lists of images of any sizes, worker processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..distributed import World
from .evaluation import IMAGES_PER_WORKER, cpus
from .images import KeyedImages, KeyLists, Loader, Sample


def resized(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """Height and width of an image whose sides are made as large as they can be, in proportion."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def spread(size: int, most: int | None) -> list[int] | None:
    """`most` of so many images, evenly over the list; None where they are all."""
    return None if most is None or most >= size else [i * size // most for i in range(most)]


def to_device(values: Any, device: torch.device) -> Any:
    """The tensors in lists, tuples and dicts on the device; anything else as it is."""
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    if isinstance(values, dict):
        return {key: to_device(value, device) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(to_device(value, device) for value in values)
    return values


def collate_lists(samples: list[Sample]) -> tuple[list[Tensor], list[Any], Tensor, list[dict[str, Any]]]:
    """Samples as lists of images and of targets, their weights, and their unreadable images in one list."""
    x, y, weight, bad = zip(*samples, strict=True)
    return list(x), list(y), torch.tensor(weight), [one for each in bad for one in each]


class DenseSplit:
    """The images of a split with what is in them, prepared as the model needs them, not augmented.

    Attributes:
        size: how many there are.
        num_classes: classes, without background and what is ignored.
        class_names: their names in the order of the labels from 0, or None where nothing names them.
        bad: {"file", "reason"} of each image that could not be read so far.
    """

    size: int
    num_classes: int
    class_names: list[str] | None
    bad: list[dict[str, str]]

    def batches(
        self,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008, it is frozen
    ) -> Iterator[tuple[list[Tensor], list[Any], Tensor]]:
        """The images in order, or those of `indices` in theirs, an image at a time: a list of one normalised image
        (C, H, W) on the device, a list of its target, and weight (1,) fp32, 0 for an image that can't be read or only
        pads: with several `world` processes, each gets every world.size-th, and all get as many batches.

        A later call ends the iterator.
        """
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """An image as it is in its file, in RGB.

        Raises:
            UnreadableImage: it can't be read.
        """
        raise NotImplementedError

    def truth(self, index: int) -> dict[str, Tensor]:
        """What is in an image, as `DenseTask.predict` tells what is found, without scores; on the CPU.

        Raises:
            UnreadableImage: the image or its annotation can't be read.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The image's file."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the processes that load images."""


class LoadedSplit(DenseSplit):
    """The held-out images of `KeyedImages`, see `DenseSplit`.

    Args:
        images: what loads them.
        class_names: see `DenseSplit`.
        device: where batches go.
        workers: most processes of its own that load images.
        loader, keys: another's loader in their place, with the lists of keys that it asks for.
    """

    def __init__(
        self,
        images: KeyedImages,
        class_names: list[str],
        device: torch.device,
        *,
        workers: int = 0,
        loader: Loader | None = None,
        keys: KeyLists | None = None,
    ):
        self.images, self.source, self.size = images, images.test, len(images.test)
        self.num_classes, self.class_names, self.device = len(class_names), class_names, device
        self.most_workers, self.workers = workers, -1
        self.keys, self.loader, self.lent = keys or KeyLists(), loader, loader is not None
        self._bad: list[dict[str, Any]] = []

    @property
    def bad(self) -> list[dict[str, str]]:
        return [{key: each[key] for key in ("file", "reason")} for each in self._bad]

    def take_bad(self) -> list[dict[str, Any]]:
        """As `Data.take_bad`: what is in `bad`, which is empty then."""
        bad, self._bad = self._bad, []
        return bad

    def batches(
        self,
        indices: Sequence[int] | None = None,
        *,
        world: World = World(),  # noqa: B008
    ) -> Iterator[tuple[list[Tensor], list[Any], Tensor]]:
        order = range(self.size) if indices is None else indices
        mine = [int(i) for i in order[world.rank :: world.size]]
        mine += [-1] * (-(-len(order) // world.size) - len(mine))
        if not self.lent:
            self._start(min(self.most_workers, len(mine) // IMAGES_PER_WORKER, cpus()))
        self.keys.lists = ([(None, i, i)] for i in mine)
        for x, y, weight, bad in self.loader.batches():
            self._bad += [each for each in bad if each not in self._bad]
            yield to_device((x, y, weight), self.device)

    def _start(self, workers: int) -> None:
        if workers != self.workers:
            self.close()
            pin = self.device.type == "cuda"
            self.loader = Loader(self.images, workers, pin, collate=collate_lists, batch_sampler=self.keys)
            self.workers = workers

    def name(self, index: int) -> str:
        return self.source.name(index)

    def close(self) -> None:
        if not self.lent and self.loader is not None:
            self.loader.close()
            self.loader, self.workers = None, -1
