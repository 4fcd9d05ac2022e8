"""UperNet (arXiv 1807.10221) on a backbone's feature maps: semantic segmentation.

model = UperNet(timm.create_model("mpvg_vit_adapter_tiny", features_only=True), num_classes=150)
logits = model.segment(torch.randn(1, 3, 512, 683), window=512, stride=341)

Pyramid pooling on the coarsest map, a feature pyramid over all four, one convolution over all its levels together, and
while training an auxiliary head on the third map: widths and layers as in mmsegmentation's UPerHead and FCNHead, whose
parameters have other names there.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UperNet"]

POOL_SCALES = (1, 2, 3, 6)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


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


class UperNet(nn.Module):
    """A backbone with UperNet's decoder.

    Args:
        backbone: gives four maps, from fine to coarse, for images (B, C, H, W) of any size; has `feature_info` as
            timm's features_only models have it.
        num_classes: classes, without the one that is ignored.
        width: channels of the decoder.
        aux_width: channels of the auxiliary head.
        drop_rate: dropout of channels before both classifiers.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, width: int = 512, aux_width: int = 256, drop_rate: float = 0.1
    ):
        super().__init__()
        channels = backbone.feature_info.channels()
        self.backbone, self.num_classes = backbone, num_classes
        self.decode_head = UperHead(channels, width)
        self.classifier = _Classifier(width, num_classes, drop_rate)
        self.aux_head = nn.Sequential(_conv(channels[2], aux_width, 3), _Classifier(aux_width, num_classes, drop_rate))

    def forward(self, image: Tensor) -> Any:
        """Image (B, C, H, W) to logits (B, num_classes, H, W); while training (logits, the auxiliary head's)."""
        height, width = image.shape[-2:]
        maps = self.backbone(image)
        # A backbone may pad images to its stride: the first map's pixels stand for 4x4 of them, the last ones beyond.
        stride = self.backbone.feature_info.reduction()[0]
        whole = [side * stride for side in maps[0].shape[-2:]]
        logits = _resize(self.classifier(self.decode_head(maps)), whole)[..., :height, :width]
        if not self.training:
            return logits
        return logits, _resize(self.aux_head(maps[2]), whole)[..., :height, :width]

    @torch.no_grad()
    def segment(self, image: Tensor, window: int | None = None, stride: int | None = None) -> Tensor:
        """Logits (B, num_classes, H, W) of the whole image at once, or the means of windows that slide over it.

        Args:
            image: (B, C, H, W).
            window: side of the windows in pixels; None takes the image whole.
            stride: pixels between two windows, at most the window; None is two thirds of it.

        Raises:
            ValueError: a stride that would leave pixels out.
        """
        if window is None:
            return self(image)
        stride = stride or max(1, 2 * window // 3)
        if not 1 <= stride <= window:
            raise ValueError(f"stride={stride}: expected 1 to the window's side, {window}")
        height, width = image.shape[-2:]
        total = image.new_zeros(len(image), self.num_classes, height, width)
        count = image.new_zeros(1, 1, height, width)
        for top, left in itertools.product(_starts(height, window, stride), _starts(width, window, stride)):
            part = ..., slice(top, top + window), slice(left, left + window)
            total[part] += self(image[part])
            count[part] += 1
        return total / count


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one at the end."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
