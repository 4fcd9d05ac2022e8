"""The images: fixed splits, and batches whose order and augmentation are functions of the run's seed and the epoch.

No global random stream is used: an epoch's draws come from a generator keyed by (seed, epoch), so that a run can be
entered at any epoch and sees the same images. A dataset is a class with the attributes and methods of `Digits`, entered
in DATASETS.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import InputError, near_matches
from .config import Aug, Config


def keyed_generator(*key: int) -> torch.Generator:
    """A random generator that depends on the whole key alone; close keys give unrelated streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def affine_matrices(n: int, aug: Aug, generator: torch.Generator) -> Tensor:
    """Random maps from output to input coordinates, as F.affine_grid takes them: (n, 2, 3), fp32."""
    angle, scale, shear, dx, dy = (torch.rand(5, n, generator=generator) * 2 - 1).unbind()
    angle = angle * math.radians(aug.degrees)
    scale = 1 / (1 + scale * aug.scale)
    cos, sin, shear = angle.cos() * scale, angle.sin() * scale, shear * aug.shear
    # rotation times shear; the grid runs from -1 to 1, so a share of the side counts double
    rows = [cos, cos * shear - sin, dx * 2 * aug.translate, sin, sin * shear + cos, dy * 2 * aug.translate]
    changed = torch.rand(n, 1, 1, generator=generator) < aug.prob
    return torch.where(changed, torch.stack(rows, 1).view(n, 2, 3), torch.eye(2, 3))


class Digits:
    """scikit-learn's handwritten digits: 8x8 pixels, one channel, ten classes; stratified, a fifth held out.

    Attributes:
        input_size: (channels, height, width).
        num_classes: number of classes.
        steps: updates of an epoch.
        mean, std: of the training images' pixels, for each channel; batches are normalised by them.
    """

    input_size = (1, 8, 8)
    num_classes = 10
    # The moments of the training split, rounded; constants, so that weights and preprocessing can't part.
    mean, std = (0.305,), (0.376,)

    def __init__(self, config: Config, device: torch.device):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        # The split's seed is fixed and has nothing to do with the run's.
        self.train_index, self.test_index = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
        )
        x = torch.from_numpy(images).float().view(-1, *self.input_size) / 16
        y = torch.from_numpy(labels).long()
        self.train_x, self.train_y = x[self.train_index].to(device), y[self.train_index].to(device)
        self.test_x, self.test_y = x[self.test_index].to(device), y[self.test_index].to(device)
        self.seed, self.aug, self.batch, self.device = config.seed, config.aug, config.batch, device
        self.steps = len(self.train_y) // self.batch
        if not self.steps:
            most = len(self.train_y)
            raise InputError(f"config field batch is {self.batch}, expected at most the {most} training images")

    def _normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean[0]) / self.std[0]

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images (batch, 1, 8, 8) and labels (batch,) of one epoch, in its own order."""
        generator = keyed_generator(self.seed, epoch)
        order = torch.randperm(len(self.train_y), generator=generator).to(self.device)
        theta = affine_matrices(len(order), self.aug, generator).to(self.device)
        for start in range(0, self.steps * self.batch, self.batch):
            at = order[start : start + self.batch]
            x = self.train_x[at]
            grid = F.affine_grid(theta[start : start + self.batch], list(x.shape), align_corners=False)
            # Bilinear sampling would blur strokes of a pixel's width, and no held-out image is blurred.
            yield self._normalise(F.grid_sample(x, grid, mode="bicubic", align_corners=False)), self.train_y[at]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images, unaugmented, each once."""
        for x, y in zip(self.test_x.split(self.batch), self.test_y.split(self.batch), strict=True):
            yield self._normalise(x), y


DATASETS = {"digits": Digits}


def create_data(config: Config, device: torch.device) -> Digits:
    """The dataset that the config names.

    Raises:
        InputError: there is no dataset of that name, or it is smaller than a batch.
    """
    name = config.data.name
    if name not in DATASETS:
        close = near_matches(name, DATASETS)
        raise InputError(f"config field data.name is {name!r}, expected {', '.join(DATASETS)}{close}")
    return DATASETS[name](config, device)
