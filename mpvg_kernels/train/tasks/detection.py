"""Detection: objects with classes, boxes and masks, found by Mask R-CNN and measured by COCO's AP.

On CUDA the backward passes of RoIAlign and of the resampled features add up in no fixed order, so that two runs differ
in the last bits; on the CPU a run that was cut off and goes on is bitwise the whole one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import InputError, coco_metrics, distributed
from ..data import Batch, Data
from ..data.coco import CocoData, CocoSplit, HeldOutTransform, open_coco, prepare
from ..data.images import convert
from ..distributed import World
from ..model import create_dense_model
from .base import count_flops
from .dense import DenseTask, none_readable

STRIDE = 32
"""Images to be looked at alone are cut to multiples of it."""


class Detection(DenseTask):
    """Box and mask AP of Mask R-CNN on any backbone with four feature maps."""

    def create_data(self, device: torch.device, world: World) -> Data:
        return CocoData(self.config, device, world)

    def create_model(self, data: Data, *, start: bool) -> nn.Module:
        fields = self.config.detection
        same = ("anchor_scale", "score_threshold", "nms_threshold", "width", "box_width", "rpn_samples", "roi_samples")
        head = {name: getattr(fields, name) for name in (*same, "proposals")}
        return create_dense_model(
            self.config, data, start=start, head_args=head | {"max_objects": fields.max_detections}
        )

    def begin(self, data: Data, device: torch.device) -> None:
        if self.config.compile:  # PyTorch 2.14's compiler fails at the backbone with sizes that vary
            raise InputError(
                "config field compile is True, expected False for task detection, whose images vary in size"
            )

    def loss(self, forward: Callable[..., Any], batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        targets = [{**target, "labels": target["labels"] + 1} for target in batch.y]  # 0 is the background
        with self.autocast(device):
            losses = forward(batch.x, targets)
        parts = torch.stack([losses[name].float() for name in self.figures.counters])
        return parts.sum(), parts.detach() * len(batch.x)

    def preprocessing(self) -> dict[str, Any]:
        return prepare(self.config)

    def open_split(
        self,
        split: str,
        device: torch.device,
        *,
        images: Path | None = None,
        annotations: Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> CocoSplit:
        return open_coco(self.config, split, device, images=images, annotations=annotations, class_names=class_names)

    def measure(
        self,
        model: nn.Module,
        split: CocoSplit,
        world: World,
        device: torch.device,
        *,
        indices: Sequence[int] | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """See `DenseTask.measure`. Masks are kept as RLE, so that memory grows with what is found alone. The figures
        that are evaluated while training are 0 on images without objects, where COCO has none; the others None.
        """
        coco, seen, rows = split.coco, [], []
        for images, targets, weight in split.batches(indices, world=world):
            on_batch()
            with self.autocast(device):  # what only pads, too: under FSDP2 every process has to call the model
                found = model(images, sizes=[target["size"] for target in targets])
            for target, objects in zip(targets, found, strict=True):
                if weight:
                    seen.append(target["image"])
                    rows += coco_metrics.rows(objects, int(coco.ids[target["image"]]), coco.category_ids)
        shares = distributed.gather((seen, rows), world)
        seen = sorted(image for share, _ in shares for image in share)
        if not seen:
            raise none_readable(split, f"of {coco.folder}")
        figures, results = None, []
        if world.rank == 0:
            order = {int(coco.ids[image]): i for i, image in enumerate(seen)}
            results = sorted((row for _, share in shares for row in share), key=lambda row: order[row["image_id"]])
            figures = coco_metrics.average_precision(coco, seen, results)
            figures |= {figure.key: figures[figure.key] or 0.0 for figure in self.figures.evaluated}
        return {**distributed.from_main(figures, world), "images": len(seen), "results": results}

    def images(self, batch: Batch, most: int) -> Tensor:
        """The first images, cut to the size that all of them have."""
        images = batch.x[:most]
        least = (min(image.shape[side] for image in images) for side in (-2, -1))
        height, width = (max(STRIDE, side // STRIDE * STRIDE) for side in least)
        return torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])

    def flops(self, model: nn.Module, data: Data, device: torch.device) -> int:
        """Of the largest evaluated image through backbone, pyramid and RPN; the heads', which differ from image to
        image with the number of proposals, are left out."""
        x = torch.zeros(1, *data.input_size, device=device)

        def forward() -> None:
            maps = model.eval().features(x)
            model.rpn.head(list(model.fpn({str(i): each for i, each in enumerate(maps)}).values()))

        return count_flops(model, forward)


def predict(model: nn.Module, image: Image.Image, device: torch.device) -> dict[str, Tensor]:
    """See `dense.predict`."""
    prepared = model.preprocessing
    image = convert(image, "L" if prepared["input_size"][0] == 1 else "RGB")
    x, _ = HeldOutTransform(prepared)(image)
    (found,) = model([x.to(device)], sizes=[(image.height, image.width)])
    found = {name: value.cpu() for name, value in found.items()}
    return {**found, "labels": found["labels"] - 1, "boxes": found["boxes"].float(), "scores": found["scores"].float()}
