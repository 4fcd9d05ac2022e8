"""Images that come one after the other: webdataset, Hugging Face's streaming and TensorFlow's data sets.

A stream has no order that could be entered in the middle: a run resumes at the beginning of an epoch. What an epoch
gives is a function of (seed, epoch, number of processes, number of workers), as the shards are dealt out to them.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .. import InputError, TrainingError
from ..config import Config
from ..distributed import World
from .base import Batch, Data
from .images import Loader, Sample, convert, create_transforms
from .order import accumulation, keyed_generator, seed_cpu
from .sources import open_splits, preprocessing


class StreamImages(IterableDataset):
    """The training images of this process's part of a stream, augmented by (seed, epoch, rank, worker, count).

    Args:
        source: gives PIL images and labels; it deals itself out to processes and workers.
    """

    epoch = 1

    def __init__(self, source: Any, transform: Any, mode: str, seed: int, world: World):
        self.source, self.transform, self.mode, self.seed, self.world = source, transform, mode, seed, world

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        key = self.seed, "augment", self.epoch, self.world.rank, worker.id if worker else 0
        for count, (image, label) in enumerate(self.source):
            image = convert(image, self.mode)
            seed_cpu(*key, count)
            yield self.transform(image), int(label), 1.0, []


class HeldOutStream(IterableDataset):
    """Each process's part of a stream that every process reads as a whole, padded to the same number on all.

    Reading it whole costs the decoding of the others' images. It is what lets every image count once, though the
    stream's length need not be known. With `most` the first images are read, at most that many, of which each worker
    process has an equal share.
    """

    def __init__(
        self, source: Any, transform: Any, mode: str, input_size: tuple[int, ...], world: World, most: int | None = None
    ):
        self.source, self.transform, self.mode = source, transform, mode
        self.input_size, self.world, self.most = input_size, world, most

    def __iter__(self) -> Iterator[Sample]:
        worker, stream = get_worker_info(), iter(self.source)
        if self.most is not None:
            rank, size = (worker.id, worker.num_workers) if worker else (0, 1)
            stream = islice(stream, len(range(rank, self.most, size)))
        while group := list(islice(stream, self.world.size)):
            if self.world.rank < len(group):
                image, label = group[self.world.rank]
                yield self.transform(convert(image, self.mode)), int(label), 1.0, []
            else:
                yield torch.zeros(self.input_size), 0, 0.0, []


class StreamData(Data):
    """A stream of training images, and one of held-out images."""

    ordered = False

    def __init__(self, config: Config, device: torch.device, world: World = World()):  # noqa: B008
        if config.aug.repeats > 1:
            raise InputError(
                f"config field aug.repeats is {config.aug.repeats}, expected 1 for {config.data.name}, a stream"
            )
        self.preprocessing = preprocessing(config)
        self.input_size = self.preprocessing["input_size"]
        mode = "L" if self.input_size[0] == 1 else "RGB"
        micro_batch = config.batch // world.size // accumulation(config, world)
        splits = open_splits(
            config, world.rank == 0, is_training=True, batch_size=micro_batch, seed=config.seed, repeats=0
        )
        self.num_classes, self.class_names = splits.num_classes, splits.class_names
        train_size, test_size = (getattr(split.reader, "num_samples", 0) for split in (splits.train, splits.test))
        if not train_size:
            raise InputError(
                f"config field data.train_split is {config.data.train_split!r}, expected a split that says how many "
                "images it has, for example by |NUMBER behind the shards of wds"
            )
        super().__init__(config, device, world, train_size, test_size)
        if self.steps > (whole := train_size // config.batch):
            raise InputError(
                f"config field data.epoch_updates is {self.steps}, expected at most {whole}: a pass over "
                f"{config.data.name}, a stream, has no more"
            )
        self.format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        # In this process a reader would keep the state of its shuffling from one epoch to the next.
        self.workers = max(1, config.data.workers)
        for split, rank, size in ((splits.train, world.rank, world.size), (splits.test, 0, 1)):
            split.reader.dist_rank, split.reader.dist_num_replicas = rank, size
            split.set_loader_cfg(num_workers=self.workers)
        transform, test_transform = create_transforms(config, self.preprocessing)
        self.source = splits.train
        self.train = StreamImages(splits.train, transform, mode, config.seed, world)
        most = config.data.max_test_images
        self.test = HeldOutStream(splits.test, test_transform, mode, self.input_size, world, most)
        self.loader: Loader | None = None

    def _load(self, dataset: IterableDataset, drop_last: bool, *key: int | str) -> Iterator[tuple]:
        """Batches by new worker processes, whose seeds come from the key."""
        self.close()
        self.loader = Loader(
            dataset,
            self.workers,
            self.device.type == "cuda",
            keyed_generator(self.config.seed, *key),
            batch_size=self.order.micro_batch,
            drop_last=drop_last,
        )
        for x, y, weight, _ in self.loader.batches():
            x = x.to(self.device, non_blocking=True, memory_format=self.format)
            yield x, y.to(self.device, non_blocking=True), weight.to(self.device, non_blocking=True)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if start:
            raise InputError(
                f"{self.config.data.name} is a stream, which can be entered at the beginning of an epoch only, not at "
                f"update {start} of epoch {epoch}: resume from the checkpoint of an epoch's end"
            )
        return self._train_batches(epoch)

    def _train_batches(self, epoch: int) -> Iterator[Batch]:
        self.train.epoch = epoch
        self.source.set_epoch(epoch)
        wanted = self.steps * self.accumulation
        given = 0
        for x, y, _ in islice(self._load(self.train, True, "stream", epoch, self.world.rank), wanted):
            given += 1
            yield Batch(x, y)
        if given < wanted:
            raise TrainingError(
                f"the stream ended after {given // self.accumulation} of the {self.steps} updates of epoch {epoch}: it "
                f"has fewer images than the {self.train_size} that it says"
            )

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self._load(self.test, False, "held out")

    def files(self, epoch: int, step: int) -> list[str]:
        first = step * self.config.batch // self.world.size
        return [
            f"image {first + i} of the stream of epoch {epoch}" for i in range(self.config.batch // self.world.size)
        ]
