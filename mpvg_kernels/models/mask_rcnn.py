"""Mask R-CNN (arXiv 1703.06870) on a backbone's feature maps: objects with classes, boxes and masks.

    model = MaskRCNN(timm.create_model("mpvg_vit_adapter_tiny", features_only=True), num_classes=80)
    losses = model(images, targets)         while training: a dict of five losses
    found = model(images)                   in eval: {"boxes", "labels", "scores", "masks"} of each image

Built from torchvision's parts, with the layers, the settings and the losses of mmdetection's Mask R-CNN (R-50 FPN).
Where torchvision's parts do otherwise, the classes below change it: L1 losses, RoIAlign with pixel centres at one half
("aligned"), anchors that are not rounded and whose distance is the stride, no anchor for an object that overlaps all by
less than 0.3, targets of masks that are zero or one, masks that are sampled at the centres of the image's pixels, and
initial weights. What remains:

- labels count from 1, with 0 for the background, and box regression and masks have an output for the background
  that nothing reads: 4,357 parameters more with the widths published;
- anchors in the padding of a smaller image of a batch are background; mmdetection leaves them out of the loss;
- a proposal is matched with the object that it overlaps most; in mmdetection with another one that has none better;
- random choices are drawn from torch's generator in another order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .dense_model import STRIDES, DenseModel

__all__ = ["MaskRCNN"]

MASK = 28
"""Side of a predicted mask in cells."""


class Anchors(AnchorGenerator):
    """Boxes of `scale` strides a side, of 3 shapes, around the first pixel of each stride x stride pixels, by map."""

    def __init__(self, scale: float = 8.0):
        self.strides = [*STRIDES, 2 * STRIDES[-1]]
        super().__init__(tuple((scale * stride,) for stride in self.strides), ((0.5, 1.0, 2.0),) * len(self.strides))

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        height = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt() * scales[0]
        width = scales[0] ** 2 / height
        return torch.stack([-width, -height, width, height], 1) / 2

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """The same anchors (A, 4) for each image, in fp32 whatever the maps are."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in maps], [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


class PooledRoIs(MultiScaleRoIAlign):
    """RoIAlign of boxes on the map that suits their size, with the centre of a pixel at one half."""

    def __init__(self, side: int):
        super().__init__([str(i) for i in range(len(STRIDES))], side, sampling_ratio=0)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Boxes (N_i, 4) of each image to (sum of N_i, C, side, side)."""
        images = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([images, torch.cat(boxes)], 1)
        side = (rois[:, 3:] - rois[:, 1:3]).prod(1).clamp(min=0).sqrt()
        # A box of 224 pixels a side is looked up at stride 16, one of half that at half the stride.
        levels = (torch.log2(side / 56 + 1e-6)).floor().clamp(0, len(STRIDES) - 1)
        found, order = [], []
        for level, stride in enumerate(STRIDES):
            index = (levels == level).nonzero().flatten()
            order.append(index)
            found.append(roi_align(maps[str(level)], rois[index], self.output_size, 1 / stride, aligned=True))
        return torch.cat(found)[torch.cat(order).argsort()]


class FloatRPNHead(RPNHead):
    """Its boxes are coordinates: in fp32 under autocast too."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(maps)
        return [x.float() for x in logits], [x.float() for x in deltas]


class FloatPredictor(FastRCNNPredictor):
    """As `FloatRPNHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class BestAnchors(Matcher):
    """Objects to anchors: besides those above the threshold, each object has the ones that overlap it most.

    Unless the lower threshold is above them too; of two objects the later one has an anchor that is both's.
    """

    def __init__(self, high_threshold: float, low_threshold: float):
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=True)

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.amax(1, keepdim=True)
        taken = (match_quality_matrix == best) & (best >= self.low_threshold)
        index = torch.arange(len(taken), device=taken.device)[:, None]
        latest = torch.where(taken, index, -1).amax(0)
        matches.copy_(torch.where(latest >= 0, latest, matches))


class RPN(RegionProposalNetwork):
    """Region proposals, with an L1 loss of boxes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.proposal_matcher = BestAnchors(self.proposal_matcher.high_threshold, self.proposal_matcher.low_threshold)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled, label, target = positive | negative, torch.cat(labels), torch.cat(regression_targets)
        loss_class = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], label[sampled])
        loss_box = F.l1_loss(pred_bbox_deltas[positive], target[positive], reduction="sum")
        return loss_class, loss_box / sampled.sum()


class Heads(RoIHeads):
    """Classes, boxes and masks of proposals, with an L1 loss of boxes and masks of zeros and ones as targets."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        scores, found = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        label, delta = torch.cat(labels), torch.cat(deltas)
        positive = label.nonzero().flatten()
        found = found.unflatten(1, (-1, 4))[positive, label[positive]]
        losses = {
            # (sums, as a mean over nothing is nan)
            "loss_classifier": F.cross_entropy(scores, label, reduction="sum") / max(len(label), 1),
            "loss_box_reg": F.l1_loss(found, delta[positive], reduction="sum") / max(len(label), 1),
        }
        boxes = [b[of > 0] for b, of in zip(proposals, labels, strict=True)]
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
        masks = masks[torch.arange(len(masks), device=masks.device), label[positive]]
        wanted = [
            mask_targets(target["masks"], b, index[of > 0])
            for target, b, index, of in zip(targets, boxes, matched, labels, strict=True)
        ]
        loss = F.binary_cross_entropy_with_logits(masks, torch.cat(wanted), reduction="sum")
        losses["loss_mask"] = loss / max(masks.numel(), 1)
        return [], losses


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
    """The parts of masks (M, H, W) in boxes (N, 4), box i of mask index[i], as zeros and ones (N, 28, 28)."""
    if not len(boxes):
        return boxes.new_zeros(0, MASK, MASK)
    rois = torch.cat([index[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes), rois, MASK, aligned=True)[:, 0] >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Masks (N, 28, 28) of probabilities in boxes (N, 4) to masks (N, H, W) of bool of an image of that size."""
    height, width = size
    masks = masks.float()  # coordinates below have its precision
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    corners = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).long()
    limit = torch.tensor([width, height, width, height], device=boxes.device)
    corners = corners.clamp(min=torch.zeros_like(limit), max=limit).tolist()
    for mask, box, whole, (left, top, right, bottom) in zip(masks, boxes, pasted, corners, strict=True):
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right, device=boxes.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom, device=boxes.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
        found = F.grid_sample(mask[None, None], grid[None].to(mask), align_corners=False)[0, 0]
        whole[top:bottom, left:right] = found >= threshold
    return pasted


class MaskRCNN(DenseModel):
    """Mask R-CNN.

    Args:
        backbone: see `DenseModel`.
        num_classes: classes of objects, without the background.
        width: channels of the feature pyramid, of the RPN and of the mask head.
        box_width: width of the box head's two layers.
        anchor_scale: side of the square anchors, in strides of their map.
        rpn_samples, roi_samples: anchors and proposals of an image that the losses are taken over.
        proposals: what the RPN keeps of an image; before overlapping ones are dropped it takes as many of each map, and
            twice as many while training.
        score_threshold: objects of a smaller score are not reported.
        nms_threshold: of two objects of a class with a larger IoU, only the better one is.
        max_objects: objects of an image that are reported.
    """

    class_layers = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        width: int = 256,
        box_width: int = 1024,
        anchor_scale: float = 8.0,
        rpn_samples: int = 256,
        roi_samples: int = 512,
        proposals: int = 1000,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_objects: int = 100,
    ):
        super().__init__(backbone, num_classes)
        self.fpn = FeaturePyramidNetwork(self.channels, width, LastLevelMaxPool())
        anchors = Anchors(anchor_scale)
        self.rpn = RPN(
            anchors,
            FloatRPNHead(width, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},  # of a level
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.roi_heads = Heads(
            PooledRoIs(7),
            TwoMLPHead(width * 7**2, box_width),
            FloatPredictor(box_width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_samples,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_objects,
            mask_roi_pool=PooledRoIs(MASK // 2),
            mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        )
        self._init_heads()

    def _init_heads(self) -> None:
        """As mmdetection, where torchvision has otherwise."""
        head, predictor = self.roi_heads.box_head, self.roi_heads.box_predictor
        for layer in [head.fc6, head.fc7, *(m for m in self.fpn.modules() if isinstance(m, nn.Conv2d))]:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        for layer in [head.fc6, head.fc7, predictor.cls_score, predictor.bbox_pred]:
            nn.init.zeros_(layer.bias)
        for name, parameter in self.roi_heads.mask_predictor.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[dict[str, Tensor]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses while training, else what is found.

        Args:
            images: (C, H, W) each, normalised, of any sizes; they are padded to one batch of multiples of 32.
            targets: while training, of each image "boxes" (N, 4) in fp32 as left, top, right, bottom in pixels,
                "labels" (N,) in int64 from 1 to num_classes, and "masks" (N, H, W) of zeros and ones. N may be 0.
            sizes: in eval, the (height, width) of the original images, which boxes and masks are wanted for; None are
                those of `images`.

        Returns:
            while training "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg" and "loss_mask",
            each a scalar in fp32; in eval of each image "boxes" (N, 4), "labels" (N,), "scores" (N,), from the
            best on, and "masks" (N, height, width) of bool.

        Raises:
            ValueError: targets that are missing or do not fit their image.
        """
        if self.training:
            self._check(images, targets)
        image_sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (max(sides) for sides in zip(*image_sizes, strict=True))
        batch = torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])
        maps = self.fpn({str(i): m for i, m in enumerate(self.features(batch))})
        proposals, losses = self.rpn(ImageList(batch, image_sizes), maps, targets)
        found, more = self.roi_heads(maps, proposals, image_sizes, targets)
        if self.training:
            return losses | more
        for objects, size, original in zip(found, image_sizes, sizes or image_sizes, strict=True):
            (height, width), (original_height, original_width) = size, original
            scale = objects["boxes"].new_tensor([original_width / width, original_height / height] * 2)
            objects["boxes"] = objects["boxes"] * scale
            objects["masks"] = paste_masks(objects["masks"][:, 0], objects["boxes"], original)
        return found

    def _check(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None) -> None:
        if targets is None or len(targets) != len(images):
            raise ValueError(f"{len(images)} images with {len(targets or ())} targets; while training each has one")
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            boxes, labels, masks = (target[name] for name in ("boxes", "labels", "masks"))
            shapes = {"boxes": (len(labels), 4), "labels": (len(labels),), "masks": (len(labels), *image.shape[-2:])}
            for name, shape in shapes.items():
                if target[name].shape != shape:
                    raise ValueError(f"targets[{i}] has {name} of {tuple(target[name].shape)}, expected {shape}")
            if (boxes[:, 2:] <= boxes[:, :2]).any():
                raise ValueError(f"targets[{i}] has a box without area; leave such objects out")
            if ((labels < 1) | (labels > self.num_classes)).any():
                raise ValueError(f"targets[{i}] has labels that are not from 1 to {self.num_classes}")
