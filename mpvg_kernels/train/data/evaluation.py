"""One split's images as evaluation sees them: opened alone, in order, prepared as the model needs them, not augmented.

`open_images(config, device, "validation").batches(64)` gives them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import InputError
from ..config import Config
from .digits import Digits, load_splits
from .images import KeyedImages, KeyLists, Loader, Source, create_transforms
from .sources import STREAMS, open_split, prefix, preprocessing

SPLITS = {"train": "train_split", "validation": "val_split"}
"""The splits with a name in every data set, and the config field that says which of its own each is."""


class ImageBatch(NamedTuple):
    """Images x (B, C, H, W) fp32, normalised, and labels y (B,) int64, on the device; index (B,) int64 in the split."""

    x: Tensor
    y: Tensor
    index: Tensor


class EvalImages:
    """The images of a split.

    Attributes:
        size: how many there are.
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

    def batches(self, batch: int, indices: Sequence[int] | None = None) -> Iterator[ImageBatch]:
        """The images in order, or those of `indices` in theirs; unreadable ones are left out (and in `bad`)."""
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

    def batches(self, batch: int, indices: Sequence[int] | None = None) -> Iterator[ImageBatch]:
        order = torch.arange(self.size) if indices is None else torch.as_tensor(indices, dtype=torch.long)
        for index in order.split(batch):
            at = index.to(self.x.device)
            yield ImageBatch(self.x[at], self.y[at], index)

    def name(self, index: int) -> str:
        return f"digit {self.number[index]}"


class IndexedImages(EvalImages):
    """A split with an image at every index: folders, tar files, torchvision's and Hugging Face's data sets."""

    def __init__(self, config: Config, split: str, device: torch.device):
        super().__init__()
        self.preprocessing, self.device = preprocessing(config), device
        input_size = self.preprocessing["input_size"]
        opened = open_split(config, SPLITS.get(split), split)
        self.num_classes, self.class_names = opened.num_classes, opened.class_names
        self.source = Source(opened.images, "L" if input_size[0] == 1 else "RGB")
        self.size = len(self.source)
        transform = create_transforms(config, self.preprocessing)[1]
        images = KeyedImages(None, self.source, None, transform, input_size, 0)
        self.keys = KeyLists()
        self.loader = Loader(images, config.data.workers, device.type == "cuda", batch_sampler=self.keys)

    def batches(self, batch: int, indices: Sequence[int] | None = None) -> Iterator[ImageBatch]:
        order = torch.arange(self.size) if indices is None else torch.as_tensor(indices, dtype=torch.long)
        self.keys.lists = [[(None, int(i), int(i)) for i in index] for index in order.split(batch)]
        for keys, (x, y, weight, bad) in zip(self.keys.lists, self.loader.batches(), strict=True):
            self.bad += [{key: each[key] for key in ("file", "reason")} for each in bad]
            index, read = torch.tensor([key[2] for key in keys]), weight > 0
            if not read.all():
                x, y, index = x[read], y[read], index[read]
            if len(index):
                x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
                yield ImageBatch(x, y, index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def close(self) -> None:
        self.loader.close()


def open_images(config: Config, device: torch.device, split: str = "validation") -> EvalImages:
    """Open one split of the config's data set.

    Args:
        split: "train" or "validation", or a name that the data set itself has for one.

    Raises:
        InputError: it is not there, or not as the config says.
    """
    if config.data.name == "digits":
        return DigitImages(split, device)
    if prefix(config.data.name) in STREAMS:
        raise InputError(f"{config.data.name} is a stream")
    return IndexedImages(config, split, device)
