"""A split of a dense task whose images worker processes load, one at a time, and batches of images of any sizes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import World
from ..tasks.dense import DenseSplit
from .images import KeyedImages, KeyLists, Loader, Sample


def collate_lists(samples: list[Sample]) -> tuple[list[Tensor], list[Any], Tensor, list[dict[str, Any]]]:
    """Samples as lists of images and of targets, their weights, and their unreadable images in one list."""
    x, y, weight, bad = zip(*samples, strict=True)
    return list(x), list(y), torch.tensor(weight), [one for each in bad for one in each]


def to_device(values: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts on the device; anything else as it is."""
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    if isinstance(values, dict):
        return {key: to_device(value, device) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(to_device(value, device) for value in values)
    return values


def spread(size: int, most: int) -> Sequence[int]:
    """At most `most` of so many images, evenly over the list."""
    count = min(size, most)
    return [i * size // count for i in range(count)]


class LoadedSplit(DenseSplit):
    """The held-out images of `KeyedImages`.

    Args:
        images: what loads them.
        num_classes, class_names: see `DenseSplit`.
        device: where batches go.
        workers: processes that load images.
        loader, keys: another's in place of own processes, with the lists of keys that it asks for.
    """

    def __init__(
        self,
        images: KeyedImages,
        *,
        num_classes: int,
        class_names: list[str] | None,
        device: torch.device,
        workers: int = 0,
        loader: Loader | None = None,
        keys: KeyLists | None = None,
    ):
        self.source, self.size = images.test, len(images.test)
        self.num_classes, self.class_names, self.device = num_classes, class_names, device
        self.keys = keys or KeyLists()
        self.loader = loader or Loader(
            images, workers, device.type == "cuda", collate=collate_lists, batch_sampler=self.keys
        )
        self._bad: list[dict[str, Any]] = []

    @property
    def bad(self) -> list[dict[str, str]]:
        return [{key: each[key] for key in ("file", "reason")} for each in self._bad]

    def take_bad(self) -> list[dict[str, Any]]:
        """`bad` since the last call, as `Data.take_bad` has it."""
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
        self.keys.lists = ([(None, i, i)] for i in mine)
        for x, y, weight, bad in self.loader.batches():
            self._bad += bad
            yield to_device((x, y, weight), self.device)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def close(self) -> None:
        self.loader.close()
