"""Mask R-CNN (arXiv 1703.06870) on a backbone's feature maps, from torchvision's parts: objects, boxes and masks.

    model = mask_rcnn(timm.create_model("mpvg_vit_adapter_tiny", features_only=True), num_classes=80)
    losses = model(images, targets)         while training: a dict of five losses
    found = model(images)                   in eval: {"boxes", "labels", "scores", "masks"} of each image

The settings are mmdetection's (Mask R-CNN, R-50 FPN): anchors of 8 times the stride, adaptive RoIAlign, no frozen batch
norms. What torchvision has otherwise stays so: the same losses but smooth L1 with beta 1/9 for boxes in place of L1, an
RPN whose proposals are chosen over all levels together, and labels that count from 1, 0 being the background.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

__all__ = ["mask_rcnn"]

WIDTH = 256
"""Channels of the feature pyramid."""
STRIDE = 32
"""What batches of images are padded to."""


class _Pyramid(nn.Module):
    """A backbone with a feature pyramid: maps by name, "0" the finest, and "pool" for the RPN alone."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.body, self.out_channels = backbone, WIDTH
        self.fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), WIDTH, LastLevelMaxPool())

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(image))))


class _AsTheyAre(GeneralizedRCNNTransform):
    """Puts images of several sizes into one batch, and does nothing else to them."""

    def __init__(self):
        super().__init__(min_size=1, max_size=1, image_mean=[0.0], image_std=[1.0], size_divisible=STRIDE)

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def mask_rcnn(backbone: nn.Module, num_classes: int, **kwargs: Any) -> MaskRCNN:
    """Mask R-CNN on a backbone.

    Images are taken as they are, normalised and of any size: how they are resized is the data's.

    Args:
        backbone: gives four maps of strides 4, 8, 16 and 32; has `feature_info` as timm's features_only models have it.
        num_classes: classes of objects, without the background.
        kwargs: torchvision's MaskRCNN's, in place of mmdetection's settings.
    """
    names = [str(i) for i in range(4)]
    sizes = tuple((8 * stride,) for stride in (4, 8, 16, 32, 64))
    settings = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(names, 7, sampling_ratio=0, canonical_scale=224),
        "mask_roi_pool": MultiScaleRoIAlign(names, 14, sampling_ratio=0, canonical_scale=224),
        # train and test: proposals that the RPN keeps before and after NMS
        "rpn_pre_nms_top_n_train": 2000,
        "rpn_post_nms_top_n_train": 1000,
        "rpn_pre_nms_top_n_test": 1000,
        "rpn_post_nms_top_n_test": 1000,
        "box_score_thresh": 0.05,
        "box_nms_thresh": 0.5,
        "box_detections_per_img": 100,
    }
    model = MaskRCNN(_Pyramid(backbone), num_classes + 1, **settings | kwargs)
    model.transform = _AsTheyAre()
    return model
