"""Classification: images of one class each, with mixing, label smoothing and distillation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import TrainingError, distributed
from ..data import Batch, BatchAugmentation, Data, create_data
from ..distributed import World
from ..losses import Distillation, create_loss
from ..model import create_model
from .base import Task


class Classification(Task):
    """Accuracy and cross-entropy of any timm model."""

    def create_data(self, device: torch.device, world: World) -> Data:
        return create_data(self.config, device, world)

    def create_model(self, data: Data, *, start: bool) -> nn.Module:
        return create_model(self.config, data, start=start)

    def begin(self, data: Data, device: torch.device) -> None:
        self.augment = BatchAugmentation(self.config, data.num_classes)
        self.criterion = create_loss(self.config)
        distils = self.config.loss.distillation != "none"
        self.distillation = Distillation(self.config, data, device) if distils else None

    def loss(self, forward: Callable[..., Any], batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        x, target = self.augment(self._format(batch.x), batch.y)
        with self.autocast(device):
            output = forward(x)
        logits = (output[0] if isinstance(output, tuple) else output).float()
        loss = self.criterion(logits, target)
        if self.distillation is not None:
            loss = self.distillation(output, x, loss)
        # Against a mixed target's larger share.
        labels = target if target.ndim == 1 else target.argmax(-1)
        return loss, (logits.detach().argmax(-1) == labels).sum().view(1)

    def evaluate(
        self, model: nn.Module, data: Data, world: World, device: torch.device, on_batch: Callable[[], None]
    ) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for x, y, weight in data.test_batches():
            on_batch()
            with self.autocast(device):
                logits = model(self._format(x))
            logits = logits.float()
            losses = F.cross_entropy(logits, y, reduction="none")
            # A padded image's loss may be anything.
            losses = torch.where(weight > 0, losses, 0)
            sums += torch.stack([losses.sum(), ((logits.argmax(-1) == y) * weight).sum(), weight.sum()])
        loss, correct, images = distributed.add_up(sums, world).tolist()
        if not images:
            raise TrainingError("no held-out image could be read: look at data.root and data.val_split")
        return {"loss": loss / images, "acc": 100 * correct / images, "images": int(images)}

    def _format(self, x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last) if self.config.model.channels_last else x
