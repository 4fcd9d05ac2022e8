"""Images that are read by index: decoding, what replaces an unreadable one, and the processes that load them."""

import atexit
import contextlib
import itertools
import multiprocessing
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import auto_augment, create_transform
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from .. import InputError, TrainingError
from ..config import Config
from ..distributed import World
from .base import Batch, Data
from .order import held_out, key_seed, seed_cpu, streams_put_back
from .sources import open_splits, preprocessing

# Images that are tried in place of an unreadable one, before the data set is taken to be unreadable as a whole.
TRIES = 16


class UnreadableImage(Exception):
    """An image that can't be decoded; the message says why."""


@contextlib.contextmanager
def unreadable(what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside with an image's file, of which PIL has many kinds, is an UnreadableImage.

    Args:
        what: begins its message.
    """
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except UnidentifiedImageError:  # its message may hold an address, which no two runs share
        raise UnreadableImage(f"{what}not an image") from None
    except Exception as error:
        raise UnreadableImage(what + (str(error).splitlines() or [type(error).__name__])[0]) from None


def decode(file: Any, mode: str) -> Image.Image:
    """The first image in a file, in PIL's mode `RGB` or `L`.

    16 bits are scaled to 8 by their range, transparency is dropped, CMYK and palettes are converted; the orientation in
    EXIF is left aside, as timm does.

    Raises:
        Exception: PIL has many kinds for a file that is broken.
    """
    image = Image.open(file)
    image.load()
    return convert(image, mode)


def turned(image: Image.Image) -> str:
    """The end of a sentence on an image that is of another size than its annotation."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return f" (its EXIF orientation, {orientation}, is left aside: save it turned)" if orientation != 1 else ""


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image in PIL's mode `RGB` or `L`; 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is 32 bits wide, and holds 16 in most files
        values = np.asarray(image).astype(np.int64).clip(0)
        top = 65535 if values.max() <= 65535 else 2**31 - 1
        image = Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


class Source:
    """A data set of timm or torchvision by index: (image in PIL's mode `mode`, label).

    Raises:
        UnreadableImage: the image is broken.
    """

    def __init__(self, dataset: Any, mode: str):
        self.mode = mode
        self.items = getattr(dataset, "reader", dataset)
        if hasattr(self.items, "loader"):  # torchvision's folders: the files are decoded here
            self.items.loader = _open

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with unreadable():
            image, label = self.items[index]
            if isinstance(image, Image.Image):
                return convert(image, self.mode), int(label)
            with image:
                return decode(image, self.mode), int(label)

    def name(self, index: int) -> str:
        """The image's file, or its index where it has none."""
        if isinstance(self.items, Reader):
            return self.items.filename(index, absolute=True) or f"index {index}"
        return str(self.items.samples[index][0]) if hasattr(self.items, "samples") else f"index {index}"


def _open(path: str) -> Any:
    return open(path, "rb")


# (epoch, position, index): of a training image; of a held-out one with epoch None, and index -1 for padding.
Key = tuple[int | None, int, int]
# Image, label or another target, weight, and the unreadable images that were met.
Sample = tuple[Tensor, Any, float, list[dict[str, Any]]]


class ByImage:
    """A transform of images as one of pairs (image, target); the target stays as it is."""

    def __init__(self, transform: Any):
        self.transform = transform

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        return self.transform(image), target


class KeyedImages(Dataset):
    """Training and held-out images by key: what a key gives depends on nothing else, so any process may load it.

    Args:
        train, test: give a pair (PIL image, target) for an index, or raise UnreadableImage; have `name(index)`.
        transform, test_transform: (image, target) -> the pair (x, y) of a sample; the first one draws from the CPU's
            global streams.
        blank: the pair that stands for what pads and for what can't be read.
        seed: the run's.
    """

    def __init__(
        self, train: Any, test: Any, transform: Any, test_transform: Any, blank: tuple[Tensor, Any], seed: int
    ):
        self.train, self.test, self.transform, self.test_transform = train, test, transform, test_transform
        self.blank, self.seed = blank, seed

    def __getitem__(self, key: Key) -> Sample:
        epoch, position, index = key
        bad: list[dict[str, Any]] = []
        if epoch is None:
            if index >= 0 and (found := self._read(self.test, index, epoch, position, bad)):
                return *self.test_transform(*found), 1.0, bad
            return *self.blank, 0.0, bad
        for attempt in range(TRIES):
            if attempt:
                index = key_seed(self.seed, "replacement", epoch, position, attempt) % len(self.train)
            if found := self._read(self.train, index, epoch, position, bad):
                seed_cpu(self.seed, "augment", epoch, position)
                return *self.transform(*found), 1.0, bad
        return *self.blank, 0.0, bad

    def _read(self, source: Any, index: int, epoch: int | None, position: int, bad: list) -> tuple | None:
        try:
            return source[index]
        except UnreadableImage as error:
            bad.append({"file": source.name(index), "position": position, "epoch": epoch, "reason": str(error)})
            return None


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, list[dict[str, Any]]]:
    """Samples as tensors (x, y, weight), and their unreadable images in one list."""
    x, y, weight, bad = zip(*samples, strict=True)
    return default_collate(list(x)), torch.tensor(y), torch.tensor(weight), [one for each in bad for one in each]


def silence() -> None:
    """No warnings by Pillow: an image is readable or not."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def begin_worker(_: int) -> None:
    """For a worker process: what a scheduler or Ctrl-C sends to all processes is the training process's to answer."""
    silence()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class KeyLists:
    """A batch sampler that takes other lists of keys for each pass."""

    def __init__(self):
        self.lists: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.lists)


_workers: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    # Before multiprocessing waits for its processes: workers ignore the SIGTERM that it sends them.
    for worker in list(_workers):
        worker.kill()


class Loader:
    """torch's DataLoader with worker processes that leave signals to this one, and whose death is a TrainingError.

    Args:
        dataset: gives samples.
        workers: number of processes, which stay until `close`; 0 loads in this one.
        pin: whether batches lie in pinned memory.
        generator: what the workers' own seeds come from.
        collate: makes a batch of a list of samples.
        batching: the DataLoader's arguments that say which samples are a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        workers: int,
        pin: bool,
        generator: torch.Generator | None = None,
        collate: Callable[[list[Sample]], tuple] = collate,
        **batching: Any,
    ):
        self.turn = 0
        self.loader = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            worker_init_fn=begin_worker,
            persistent_workers=workers > 0,
            generator=generator or torch.Generator(),  # without one it draws from the global stream
            **batching,
        )

    def batches(self) -> Iterator[tuple]:
        """One pass; it ends the iterator of the pass before."""
        self.turn += 1
        turn = self.turn
        try:
            iterator = self._start()
            while (batch := self._next(iterator)) is not None:
                yield batch
                if turn != self.turn:
                    raise RuntimeError("these batches were given up when others were asked for")
        except (
            RuntimeError,
            OSError,
            EOFError,
        ) as error:  # torch's own, or what is left of the connection to the worker
            if not (ended := self._ended()):
                raise
            raise TrainingError(
                f"a process that loads images was killed ({ended}), most often because memory ran out: lower "
                "data.workers, or give the run more memory"
            ) from error

    def _next(self, iterator: Iterator[tuple]) -> tuple | None:
        if self.loader.num_workers:
            return next(iterator, None)
        with streams_put_back(), warnings.catch_warnings():  # what is a worker's own must not stay in this process
            silence()
            return next(iterator, None)

    def _ended(self) -> str:
        """How a worker process ended that should not have, for example SIGKILL."""
        for worker in getattr(self.loader._iterator, "_workers", ()):
            worker.join(0.1)  # its connections close a little before it has ended
            if worker.exitcode is not None:
                return signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"exit code {worker.exitcode}"
        return ""

    def _start(self) -> Iterator[tuple]:
        # torch sets a handler of SIGCHLD that raises in whatever line the main thread is at. Without it a dead worker
        # is found out when its batch is due, within five seconds.
        main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
        handler = signal.getsignal(signal.SIGCHLD) if main else None
        iterator = iter(self.loader)
        if main:
            signal.signal(signal.SIGCHLD, handler)
        _workers.update(getattr(iterator, "_workers", ()))
        return iterator

    def close(self) -> None:
        """Stop the processes."""
        iterator, self.loader._iterator = self.loader._iterator, None
        self.turn += 1
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                if worker.is_alive():  # stuck in reading, and it ignores SIGTERM
                    worker.kill()


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, which asks Pillow for 0 bits at times: that gave black, and is an error from Pillow 12 on."""
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def create_transforms(config: Config, prepared: dict[str, Any]) -> tuple[Any, Any]:
    """timm's transforms of training and of held-out images, from a PIL image to a normalised tensor.

    Raises:
        InputError: aug.auto_augment is no policy of timm's.
    """
    aug = config.aug
    normal = {key: prepared[key] for key in ("input_size", "mean", "std")}
    try:
        first, second, last = create_transform(
            **normal,
            is_training=True,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            color_jitter=aug.color_jitter or None,
            auto_augment=aug.auto_augment,
            interpolation=aug.interpolation,
            separate=True,
        )
    except (AssertionError, ValueError, KeyError) as error:
        policy = f"{aug.auto_augment!r}, expected a policy of timm's such as rand-m9-mstd0.5-inc1"
        raise InputError(f"config field aug.auto_augment is {policy} ({type(error).__name__}: {error})") from None
    for step in second.transforms:
        for op in getattr(step, "ops", None) or itertools.chain(*getattr(step, "policy", ())):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterize
    if aug.crop == "padded":
        size, kinds = list(prepared["input_size"][1:]), [aug.interpolation]
        if aug.interpolation == "random":
            kinds = ["bilinear", "bicubic"]
        resize = [transforms.Resize(size, transforms.InterpolationMode(kind)) for kind in kinds]
        first = transforms.Compose(
            [
                transforms.RandomChoice(resize) if len(resize) > 1 else resize[0],
                transforms.RandomCrop(size, padding=aug.padding),
                transforms.RandomHorizontalFlip(aug.hflip),
            ]
        )
    return transforms.Compose([*first.transforms, *second.transforms, *last.transforms]), held_out_transform(prepared)


def held_out_transform(prepared: dict[str, Any], *, pixels: bool = False) -> Any:
    """timm's transform of held-out images, from a PIL image to a normalised tensor, or to its pixels (uint8)."""
    keys = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    return create_transform(**{key: prepared[key] for key in keys}, normalize=not pixels)


class IndexedData(Data):
    """Training and held-out images by index, loaded by worker processes.

    Args:
        images: what loads them.
        collate: makes a batch of a list of samples.
        test_batch: images of a held-out batch; None: as many as of a micro-batch.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        world: World,
        images: KeyedImages,
        collate: Callable[[list[Sample]], tuple] = collate,
        test_batch: int | None = None,
    ):
        super().__init__(config, device, world, len(images.train), len(images.test))
        self.train, self.test = images.train, images.test
        self.test_batch = test_batch or self.order.micro_batch
        self.keys = KeyLists()
        pin = device.type == "cuda"
        self.loader = Loader(images, config.data.workers, pin, collate=collate, batch_sampler=self.keys)
        self.known_bad: dict[str, str] = {}

    def to_device(self, x: Any, y: Any) -> Batch:
        """What was collated, on the device."""
        raise NotImplementedError

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        images = self.order.images(epoch)
        self.keys.lists = (
            [(epoch, int(position), int(images[position])) for position in positions]
            for positions in self.order.micro_batches(start)
        )
        for x, y, weight, bad in self.loader.batches():
            if bad:
                self._count(bad, readable=bool(weight.all()))
            yield self.to_device(x, y)

    def _count(self, bad: list[dict[str, Any]], readable: bool) -> None:
        """Note unreadable training images, and stop where there are too many."""
        self._bad += bad
        self.known_bad.update((each["file"], each["reason"]) for each in bad)
        share, most = len(self.known_bad) / self.train_size, self.config.data.max_bad_share
        if share > most or not readable:
            first = "; ".join(f"{file} ({reason})" for file, reason in list(self.known_bad.items())[:3])
            raise TrainingError(
                f"{len(self.known_bad)} of the {self.train_size} training images ({share:.2%}) are known to be "
                f"unreadable, data.max_bad_share is {most:.2%}: {first}; repair or remove them, or raise "
                "data.max_bad_share"
            )

    def test_batches(self) -> Iterator[tuple[Any, Any, Tensor]]:
        self.keys.lists = (
            [(None, int(index), int(index)) for index in indices]
            for indices in held_out(self.test_size, self.test_batch, self.world, self.config.data.max_test_images)
        )
        for x, y, weight, bad in self.loader.batches():
            self._bad += bad
            yield *self.to_device(x, y), weight.to(self.device, non_blocking=True)

    def name(self, index: int) -> str:
        return self.train.name(index)

    def close(self) -> None:
        self.loader.close()


class ImageData(IndexedData):
    """A folder, tar file, torchvision's or Hugging Face's data set: whatever has an image at every index."""

    def __init__(self, config: Config, device: torch.device, world: World = World()):  # noqa: B008
        self.preprocessing = preprocessing(config)
        self.input_size = self.preprocessing["input_size"]
        mode = "L" if self.input_size[0] == 1 else "RGB"
        splits = open_splits(config, world.rank == 0)
        self.num_classes, self.class_names = splits.num_classes, splits.class_names
        self.format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        transforms, blank = create_transforms(config, self.preprocessing), (torch.zeros(self.input_size), 0)
        sources = (Source(split, mode) for split in (splits.train, splits.test))
        images = KeyedImages(*sources, *map(ByImage, transforms), blank, config.seed)
        super().__init__(config, device, world, images)

    def to_device(self, x: Tensor, y: Tensor) -> Batch:
        x = x.to(self.device, non_blocking=True, memory_format=self.format)
        return Batch(x, y.to(self.device, non_blocking=True))
