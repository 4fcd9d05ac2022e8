"""What the training loop needs of a data set, whatever it is read from."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..distributed import World
from .order import EpochOrder, accumulation


class Batch(NamedTuple):
    """A micro-batch on the device: normalised images x (B, C, H, W) fp32, labels y (B,) int64.

    Segmentation: y (B, H, W) int64. Detection, and held-out images of both: a list of images (C, H, W), which may
    differ in size, and a list of targets.
    """

    x: Any
    y: Any


class Data:
    """Training and held-out images, normalised and in batches, for this process among others.

    Attributes:
        input_size: (channels, height, width).
        num_classes: number of classes.
        class_names: their names, or None where nothing names them.
        preprocessing: input_size, mean, std, crop_pct, interpolation, crop_mode, as in timm's pretrained_cfg.
        train_size, test_size: images of both parts; test_size is 0 for a stream that does not say.
        steps: updates of an epoch.
        accumulation: micro-batches of an update on each process.
        ordered: whether an epoch can be entered at any step; a stream can be entered at its beginning only.
    """

    ordered = True
    class_names: list[str] | None = None
    input_size: tuple[int, int, int]
    num_classes: int
    preprocessing: dict[str, Any]

    def __init__(self, config: Config, device: torch.device, world: World, train_size: int, test_size: int):
        self.config, self.device, self.world = config, device, world
        self.train_size, self.test_size = train_size, test_size
        self.accumulation = accumulation(config, world)
        self.order = EpochOrder(
            train_size,
            config.batch,
            config.seed,
            config.aug.repeats,
            world,
            self.accumulation,
            config.data.epoch_updates,
        )
        self.steps = self.order.steps
        self._bad: list[dict[str, Any]] = []

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of the updates start, start + 1, ..., steps - 1 of an epoch, `accumulation` an update.

        A later call of this or of `test_batches` ends the iterator.

        Args:
            epoch: from 1.
            start: from 0.

        Raises:
            TrainingError: too many images can't be read, or a process that loads them was killed.
        """
        raise NotImplementedError

    def test_batches(self) -> Iterator[tuple[Any, Any, Tensor]]:
        """This process's part of the held-out images: x and y as in training or as `Batch` says, weight (B,) fp32.

        There are as many batches, and as large ones, on every process; the weight is 0 for what pads them and for an
        image that can't be read, else 1. Together the processes have each image once, or data.max_test_images of them.
        """
        raise NotImplementedError

    def files(self, epoch: int, step: int) -> list[str]:
        """This process's images of an update by name, for messages."""
        return [self.name(index) for index in self.order.images(epoch)[self.order.positions(step)]]

    def name(self, index: int) -> str:
        """A training image's file, or its index where it has none."""
        return f"index {index}"

    def take_bad(self) -> list[dict[str, Any]]:
        """Unreadable images of the batches given out since the last call.

        Each is {"file", "position", "epoch", "reason"}: position in the epoch's list, or in the held-out images, for
        which epoch is None.
        """
        bad, self._bad = self._bad, []
        return bad

    def close(self) -> None:
        """Stop the processes that load images; the data can't be used any more."""
