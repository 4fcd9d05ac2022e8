"""UperNet (arXiv 1807.10221) on a backbone's feature maps: semantic segmentation.

model = UperNet(timm.create_model("mpvg_vit_adapter_tiny", features_only=True), num_classes=150)
loss = segmentation_loss(model(images), labels)       while training
labels = label_map(model.eval().segment(image, window=512, stride=341), size=(683, 1024))

Pyramid pooling on the coarsest map, a feature pyramid over all four, one convolution over all its levels together, and
while training an auxiliary head on the third map. Layers, widths and initial weights are those of mmsegmentation's
UPerHead and FCNHead, whose parameters have other names. One thing differs: there the loss is the mean over all pixels
of a batch, the ignored ones counted with a loss of zero; here it is the mean over those that are not ignored.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense_model import STRIDES, DenseModel

__all__ = ["UperNet", "label_map", "segmentation_loss"]

POOL_SCALES = (1, 2, 3, 6)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class _Classifier(nn.Sequential):
    """Dropout of whole channels and a 1x1 convolution to the classes."""

    def __init__(self, inputs: int, num_classes: int, drop_rate: float):
        super().__init__(nn.Dropout2d(drop_rate), nn.Conv2d(inputs, num_classes, 1))
        nn.init.normal_(self[1].weight, std=0.01)
        nn.init.zeros_(self[1].bias)


class PyramidPooling(nn.Module):
    """The map beside its means over grids of 1, 2, 3 and 6 cells a side: (B, C, H, W) -> (B, width, H, W)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _conv(inputs, width, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = _conv(inputs + len(POOL_SCALES) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([x, *[_resize(stage(x), x.shape[-2:]) for stage in self.stages]], 1))


class UperHead(nn.Module):
    """The decoder: maps from fine to coarse to one of `width` channels, of the finest one's size."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        *finer, coarsest = channels
        self.pooling = PyramidPooling(coarsest, width)
        self.laterals = nn.ModuleList(_conv(inputs, width, 1) for inputs in finer)
        self.convs = nn.ModuleList(_conv(width, width, 3) for _ in finer)
        self.bottleneck = _conv(len(channels) * width, width, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=False)] + [self.pooling(maps[-1])]
        for coarse, fine in itertools.pairwise(reversed(range(len(levels)))):
            levels[fine] = levels[fine] + _resize(levels[coarse], levels[fine].shape[-2:])
        levels = [*[conv(x) for conv, x in zip(self.convs, levels, strict=False)], levels[-1]]
        return self.bottleneck(torch.cat([_resize(x, levels[0].shape[-2:]) for x in levels], 1))


class UperNet(DenseModel):
    """A backbone with UperNet's decoder.

    Training needs two images in a batch: a batch norm behind the mean over a whole map sees one pixel of each.

    Args:
        backbone: see `DenseModel`.
        num_classes: classes, without the one that is ignored.
        width: channels of the decoder.
        aux_width: channels of the auxiliary head.
        drop_rate: dropout of channels before both classifiers.
    """

    class_layers = ("classifier.", "aux_head.1.")

    def __init__(
        self, backbone: nn.Module, num_classes: int, width: int = 512, aux_width: int = 256, drop_rate: float = 0.1
    ):
        super().__init__(backbone, num_classes)
        self.decode_head = UperHead(self.channels, width)
        self.classifier = _Classifier(width, num_classes, drop_rate)
        self.aux_head = nn.Sequential(
            _conv(self.channels[2], aux_width, 3), _Classifier(aux_width, num_classes, drop_rate)
        )

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Image (B, C, H, W) to logits (B, num_classes, H, W); while training (logits, the auxiliary head's)."""
        height, width = image.shape[-2:]
        maps = self.features(image)
        whole = [STRIDES[0] * side for side in maps[0].shape[-2:]]  # the image and its padding
        logits = _resize(self.classifier(self.decode_head(maps)), whole)[..., :height, :width]
        if not self.training:
            return logits
        return logits, _resize(self.aux_head(maps[2]), whole)[..., :height, :width]

    @torch.no_grad()
    def segment(self, image: Tensor, window: int | None = None, stride: int | None = None, batch: int = 1) -> Tensor:
        """Logits (B, num_classes, H, W) of the whole image at once, or the means of windows that slide over it.

        The last window of a row or column is moved back into the image. A side below the window's is taken whole.

        Args:
            image: (B, C, H, W).
            window: side of the windows in pixels; None takes the image whole.
            stride: pixels between two windows, at most the window; None is two thirds of it.
            batch: windows of an image that go through the model together.

        Raises:
            ValueError: a stride that would leave pixels out, or a model that is training.
        """
        if self.training:
            raise ValueError("segment is for a model in eval mode; call model.eval() first")
        if window is None:
            return self(image)
        stride = max(1, 2 * window // 3) if stride is None else stride
        if not 1 <= stride <= window:
            raise ValueError(f"stride={stride}: expected 1 to the window's side, {window}")
        height, width = image.shape[-2:]
        total = image.new_zeros(len(image), self.num_classes, height, width)
        count = image.new_zeros(1, 1, height, width)
        places = list(itertools.product(_starts(height, window, stride), _starts(width, window, stride)))
        for i in range(0, len(places), batch):
            parts = [(..., slice(y, y + window), slice(x, x + window)) for y, x in places[i : i + batch]]
            logits = self(torch.cat([image[part] for part in parts]))
            for part, found in zip(parts, logits.split(len(image)), strict=True):
                total[part] += found
                count[part] += 1
        return total / count


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one at the end."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def segmentation_loss(
    outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor, ignore: int = 255, aux_weight: float = 0.4
) -> Tensor:
    """Cross-entropy, a scalar in fp32: the mean over the pixels that are not ignored; zero where all are.

    Args:
        outputs: logits (B, num_classes, H, W), or those and the auxiliary head's, which are added with its weight.
        labels: (B, H, W), integers from 0 to num_classes - 1, or `ignore`.
        ignore: the label of pixels without one.
        aux_weight: weight of the auxiliary head's loss.
    """
    if not isinstance(outputs, Tensor):
        logits, auxiliary = outputs
        return segmentation_loss(logits, labels, ignore) + aux_weight * segmentation_loss(auxiliary, labels, ignore)
    total = F.cross_entropy(outputs.float(), labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)


def label_map(logits: Tensor, size: tuple[int, int] | None = None, classes: int = 16) -> Tensor:
    """The best class of each pixel, (B, H, W) in int64, of logits (B, num_classes, H', W') that are resized to a size.

    Args:
        logits: of the image as the model saw it.
        size: (H, W), that of the original image; None keeps the logits' own.
        classes: how many classes are resized at a time: all of a large image would take gigabytes.
    """
    size = logits.shape[-2:] if size is None else size
    best = labels = None
    for first in range(0, logits.shape[1], classes):
        value, label = _resize(logits[:, first : first + classes], size).max(1)
        if best is None:
            best, labels = value, label
        else:
            labels = torch.where(value > best, label + first, labels)
            best = torch.maximum(best, value)
    return labels
