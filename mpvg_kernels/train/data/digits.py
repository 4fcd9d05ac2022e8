"""scikit-learn's handwritten digits, kept in memory: the data set that needs no download and no worker processes."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Affine, Config
from ..distributed import World
from .base import Batch, Data
from .order import held_out, keyed_generator


def affine_matrices(n: int, aug: Affine, generator: torch.Generator) -> Tensor:
    """Random maps from output to input coordinates, as F.affine_grid takes them: (n, 2, 3), fp32."""
    angle, scale, shear, dx, dy = (torch.rand(5, n, generator=generator) * 2 - 1).unbind()
    angle = angle * math.radians(aug.degrees)
    scale = 1 / (1 + scale * aug.scale)
    cos, sin, shear = angle.cos() * scale, angle.sin() * scale, shear * aug.shear
    # rotation times shear; the grid runs from -1 to 1, so a share of the side counts double
    rows = [cos, cos * shear - sin, dx * 2 * aug.translate, sin, sin * shear + cos, dy * 2 * aug.translate]
    changed = torch.rand(n, 1, 1, generator=generator) < aug.prob
    return torch.where(changed, torch.stack(rows, 1).view(n, 2, 3), torch.eye(2, 3))


def load_splits() -> list[tuple[np.ndarray, Tensor, Tensor]]:
    """The training and the held-out images: their indices in scikit-learn's list, x (n, 1, 8, 8) in 0 to 1, y (n,)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
    # The split's seed is fixed and has nothing to do with the run's.
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return [(index, x[index], y[index]) for index in parts]


class Digits(Data):
    """8x8 pixels, one channel, ten classes; stratified, a fifth held out."""

    input_size = (1, 8, 8)
    num_classes = 10
    class_names = [str(digit) for digit in range(10)]
    # The moments of the training split, rounded; constants, so that weights and preprocessing can't part.
    mean, std = (0.305,), (0.376,)
    preprocessing = {
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "crop_mode": "center",
    }

    def __init__(self, config: Config, device: torch.device, world: World = World()):  # noqa: B008
        (self.train_index, train_x, train_y), (self.test_index, test_x, test_y) = load_splits()
        super().__init__(config, device, world, len(train_y), len(test_y))
        self.train_x, self.train_y = train_x.to(device), train_y.to(device)
        self.test_x, self.test_y = test_x.to(device), test_y.to(device)

    def _normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean[0]) / self.std[0]

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The augmented images and the labels at every position of an epoch's list, on all processes alike."""
        order = torch.from_numpy(self.order.images(epoch)).to(self.device)
        generator = keyed_generator(self.config.seed, "affine", epoch)
        most = max(self.train_size, len(order))
        theta = affine_matrices(most, self.config.aug.affine, generator)[: len(order)].to(self.device)
        x = self.train_x[order]
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        # Bilinear sampling would blur strokes of a pixel's width, and no held-out image is blurred.
        x = F.grid_sample(x, grid, mode="bicubic", align_corners=False)
        return self._normalise(x), self.train_y[order]

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        x, y = self._epoch(epoch)
        for positions in self.order.micro_batches(start):
            at = torch.from_numpy(positions).to(self.device)
            yield Batch(x[at], y[at])

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        most = self.config.data.max_test_images
        for positions in held_out(self.test_size, self.order.micro_batch, self.world, most):
            at = torch.from_numpy(positions).to(self.device)
            yield self._normalise(self.test_x[at]), self.test_y[at], (at >= 0).float()
