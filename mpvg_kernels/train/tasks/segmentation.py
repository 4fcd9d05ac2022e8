"""Semantic segmentation: a class for every pixel, by UperNet."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...models.upernet import label_map, segmentation_loss
from .. import InputError, distributed, iou
from ..data import Batch, Data
from ..data.images import convert
from ..data.label_maps import LabelMapSplit, MaskData, held_out_image, open_maps, preparation
from ..distributed import World
from ..model import create_dense_model
from .base import count_flops
from .dense import DenseTask, none_readable

WINDOWS = 4
"""Windows of an image that a GPU takes at once; a CPU gains nothing from more than one."""


class Segmentation(DenseTask):
    """Mean IoU and pixel accuracy of UperNet on any backbone with four feature maps.

    `loss` of an evaluation is the main head's cross-entropy, the mean over all labelled pixels of the data set, of the
    images as the model sees them: the label maps are resized for it, whose classes else could not be kept in memory.
    """

    def create_data(self, device: torch.device, world: World) -> Data:
        data = MaskData(self.config, device, world)
        together = data.order.micro_batch * (world.size if self.config.dist.sync_bn else 1)
        if together < 2:
            data.close()
            raise InputError(
                "a micro-batch has 1 image, expected 2 or more, as UperNet's batch norms have no statistics of one: "
                "choose another batch or dist.micro_batch, or dist.sync_bn on several GPUs"
            )
        return data

    def create_model(self, data: Data, *, start: bool) -> nn.Module:
        fields = self.config.segmentation
        head = {name: getattr(fields, name) for name in ("width", "aux_width", "drop_rate")}
        return create_dense_model(self.config, data, start=start, head_args=head)

    def loss(self, forward: Callable[..., Any], batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        fields = self.config.segmentation
        with self.autocast(device):
            outputs = forward(batch.x)
        loss = segmentation_loss(outputs, batch.y, fields.ignore_label, fields.aux_weight)
        labelled = batch.y != fields.ignore_label
        right = outputs[0].detach().argmax(1) == batch.y  # never where ignored, whose label is no class
        return loss, torch.stack([right.sum(), labelled.sum()])

    def preprocessing(self) -> dict[str, Any]:
        return preparation(self.config)

    def open_split(
        self,
        split: str,
        device: torch.device,
        *,
        images: Path | None = None,
        annotations: Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> LabelMapSplit:
        return open_maps(self.config, split, device, images=images, annotations=annotations, class_names=class_names)

    def measure(
        self,
        model: nn.Module,
        split: LabelMapSplit,
        world: World,
        device: torch.device,
        *,
        indices: Sequence[int] | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """See `DenseTask.measure`. Beside the figures: `mean_acc`, and of each class `iou`, `acc` and `share`, see
        iou.py."""
        fields, classes = self.config.segmentation, split.num_classes
        ignore, batch = fields.ignore_label, WINDOWS if device.type == "cuda" else 1
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for [image], [target], weight in split.batches(indices, world=world):
            on_batch()
            more = self._calls_of_others(image, batch, world)
            with self.autocast(device):
                logits = model.segment(image[None], fields.window, fields.stride, batch)
                for _ in range(more):
                    model(image[None, :, : fields.window, : fields.window])
            if not weight:
                continue
            logits, labels = logits.float(), target["label_map"]
            seen = F.interpolate(labels[None, None].float(), logits.shape[-2:], mode="nearest-exact")[0].long()
            loss = F.cross_entropy(logits, seen, ignore_index=ignore, reduction="sum")
            sums += torch.stack([loss, (seen != ignore).sum(), weight[0].to(device)])
            matrix += iou.confusion(label_map(logits, labels.shape)[0], labels, classes, ignore)
        loss, pixels, images = distributed.add_up(sums, world).tolist()
        matrix = distributed.add_up(matrix, world).cpu()
        if not images:
            raise none_readable(split, "that was to be evaluated")
        found = {"loss": loss / pixels if pixels else float("nan"), **iou.figures(matrix), "images": int(images)}
        found["confusion"] = matrix
        names = split.class_names or [f"class {label}" for label in range(classes)]
        rows = zip(names, *(values.tolist() for values in iou.class_figures(matrix)), strict=True)
        keys = ("iou", "acc", "share")
        return found | {
            "per_class": [
                {"name": name} | {k: None if v != v else v for k, v in zip(keys, values, strict=True)}
                for name, *values in rows
            ]
        }

    def _calls_of_others(self, image: Tensor, batch: int, world: World) -> int:
        """How many more calls of the model another process makes for its image, to be made here too: under FSDP each
        call gathers weights from all processes."""
        window, stride = self.config.segmentation.window, self.config.segmentation.stride
        if world.size == 1 or self.config.dist.mode != "fsdp" or window is None:
            return 0
        stride = stride or max(1, 2 * window // 3)
        windows = math.prod(1 - (-max(side - window, 0) // stride) for side in image.shape[-2:])
        calls = -(-windows // batch)
        return max(distributed.gather(calls, world)) - calls

    def flops(self, model: nn.Module, data: Data, device: torch.device) -> int:
        """Of a crop through backbone and decoder; the auxiliary head is left out."""
        x = torch.zeros(1, *data.input_size, device=device)
        return count_flops(model, lambda: model.eval()(x))


def predict(model: nn.Module, image: Image.Image, device: torch.device) -> dict[str, Tensor]:
    """See `dense.predict`."""
    prepared = model.preprocessing
    x = held_out_image(convert(image, "L" if prepared["input_size"][0] == 1 else "RGB"), prepared).to(device)
    logits = model.segment(x[None], prepared["window"], prepared["stride"], WINDOWS if device.type == "cuda" else 1)
    return {"label_map": label_map(logits.float(), (image.height, image.width))[0].cpu()}
