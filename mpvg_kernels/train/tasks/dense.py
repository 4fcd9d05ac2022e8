"""What detection and segmentation share: splits that are evaluated image by image, and predictions on image files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import TrainingError
from ..data import Data
from ..data.dense import DenseSplit
from ..distributed import World
from .base import Task


class DenseTask(Task):
    """Detection or segmentation."""

    def preprocessing(self) -> dict[str, Any]:
        """How the config has images made ready, as the data's `preprocessing` says it.

        Raises:
            InputError: mean and std are not for one or three channels.
        """
        raise NotImplementedError

    def open_split(
        self,
        split: str,
        device: torch.device,
        *,
        images: Path | None = None,
        annotations: Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> DenseSplit:
        """Open one split of the config's data, or any images with annotations of the same kind.

        Args:
            split: "train", "validation", or a name that the data set has for one.
            images, annotations: in place of a split: a folder of images, and COCO's JSON file or the folder of label
                maps.
            class_names: the classes of the run in the order of their labels.

        Raises:
            InputError: it is not there, not as the config says, or of other classes.
        """
        raise NotImplementedError

    def measure(
        self,
        model: nn.Module,
        split: DenseSplit,
        world: World,
        device: torch.device,
        *,
        indices: Sequence[int] | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """All that is known of a model in eval mode on a split: `figures.evaluated` by key, more figures beside them,
        `images` (how many counted), `per_class` (a dict for each class, "name" first, figures in percent, None where
        there are none), of detection `results` (COCO's results, a list of dicts; empty on all processes but the first)
        and of segmentation `confusion` ((C, C) int64 on the CPU, pixels by label and by what was found). Called without
        gradients; every process has to call it and has the same figures.

        Raises:
            TrainingError: no image could be read.
        """
        raise NotImplementedError

    def features(self, model: nn.Module) -> nn.Module:
        return model.trunk

    def evaluate(
        self, model: nn.Module, data: Data, world: World, device: torch.device, on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Those of `measure` on the data's held-out images, `data.max_test_images` of them, with `images`."""
        found = self.measure(model, data.test_split, world, device, indices=data.test_indices, on_batch=on_batch)
        return {figure.key: found[figure.key] for figure in self.figures.evaluated} | {"images": found["images"]}


def none_readable(split: DenseSplit, where: str) -> TrainingError:
    """What `measure` raises where no image could be read, with the first reason that this process knows."""
    first = "; ".join(f"{each['file']} ({each['reason']})" for each in split.bad[:1])
    return TrainingError(f"no image {where} could be read{first and ': '}{first}")


def predict(model: nn.Module, image: Image.Image, device: torch.device) -> dict[str, Tensor]:
    """What a model finds in an image of any size and mode, in pixels of that image, on the CPU.

    Args:
        model: in eval mode on the device, as `RunFolder.model` opens it: with `preprocessing` and `dense_config`.

    Returns:
        Of detection "boxes" (N, 4) fp32 (left, top, right, bottom), "labels" (N,) int64 from 0, "scores" (N,) fp32 from
        the best on, "masks" (N, H, W) bool; of segmentation "label_map" (H, W) int64.
    """
    match model.dense_config["task"]:
        case "detection":
            from .detection import predict as of_task
        case _:
            from .segmentation import predict as of_task
    with torch.inference_mode():
        return of_task(model, image, device)
