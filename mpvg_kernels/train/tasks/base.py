"""What the training loop needs of a task."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ... import backends
from ..config import Config
from ..data import Batch, Data
from ..distributed import World
from ..figures import FIGURES, Figures
from ..model import autocast


class Task:
    """A task's data, model, loss and evaluation.

    The loop calls `create_data`, `create_model` and `begin` in this order, then `loss` and `evaluate`.

    Attributes:
        config: the run.
        figures: what is measured.
    """

    name: str
    config: Config
    figures: Figures

    def __init__(self, config: Config):
        self.config, self.figures = config, FIGURES[config.task]

    def create_data(self, device: torch.device, world: World) -> Data:
        """The data set that the config names, this process's part of it.

        Raises:
            InputError: there is none of that name, it is not as the config says, or the batch can't be divided.
        """
        raise NotImplementedError

    def create_model(self, data: Data, *, start: bool) -> nn.Module:
        """The config's model for the data, on the CPU; new weights come from torch's global random stream.

        Args:
            start: load the weights that the run starts from; False where a checkpoint is to be loaded anyway.

        Raises:
            InputError: the model can't be built so, or the weights do not fit; the message names the field.
        """
        raise NotImplementedError

    def begin(self, data: Data, device: torch.device) -> None:
        """Make whatever else training needs (a loss, a teacher).

        Raises:
            InputError: it can't be had.
        """

    def loss(self, forward: Callable[..., Any], batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch. The global random streams are this micro-batch's own.

        Args:
            forward: the model, wrapped and compiled as training needs it.
            batch: as `data.train_batches` gives them; images may be changed in place.

        Returns:
            The mean loss (scalar, fp32), and the sums over the images of `figures.counters` (k,), detached, both on
            the device.
        """
        raise NotImplementedError

    def evaluate(
        self, model: nn.Module, data: Data, world: World, device: torch.device, on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """`figures.evaluated` by key on the held-out images of `data.test_batches`, each counted once over all
        processes. Called without gradients and in eval mode; every process has to call it.

        Args:
            on_batch: to be called at every batch.

        Raises:
            TrainingError: no held-out image could be read.
        """
        raise NotImplementedError

    def compile(self, model: nn.Module) -> nn.Module:
        """What `config.compile` makes of the wrapped model."""
        return torch.compile(model)

    def images(self, batch: Batch, most: int) -> Tensor:
        """A copy of a micro-batch's first images (B, C, H, W), at most `most`, to look at the position embedding."""
        return batch.x[:most].clone()

    def features(self, model: nn.Module) -> nn.Module:
        """The part of a model that takes images (B, C, H, W) through all norms that have a position embedding."""
        return model

    def flops(self, model: nn.Module, data: Data, device: torch.device) -> int:
        """Floating-point operations of one image's forward pass (matrix products and convolutions)."""
        x = torch.zeros(1, *data.input_size, device=device)
        return count_flops(model, lambda: self.features(model.eval())(x))

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which `config.amp` is in effect."""
        return autocast(self.config.amp, device)


def count_flops(model: nn.Module, call: Callable[[], Any]) -> int:
    """Floating-point operations of what `call` does with the model (matrix products and convolutions)."""
    # torch's counter fails at a module that gets a view of a trainable parameter while there are no gradients.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with FlopCounterMode(display=False) as counter, backends.use_backend("reference"):
            call()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops()
