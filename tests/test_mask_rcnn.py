"""Mask R-CNN: its parts against plain formulas, losses, learning, images of several sizes, repeatability, autocast."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dense_models import ADAPTER, SCHEMES, small

from mpvg_kernels.models import create_dense
from mpvg_kernels.models.mask_rcnn import Anchors, BestAnchors, PooledRoIs, mask_targets, paste_masks

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def sample(size, *boxes, noise=0.1, seed=0):
    """An image with dark and bright rectangles, and its targets: boxes are (left, top, right, bottom, label)."""
    image = noise * torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom, label) in zip(masks, boxes, strict=True):
        image[:, top:bottom, left:right] += (-1) ** label
        mask[top:bottom, left:right] = 1
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    return image, {"boxes": found[:, :4], "labels": found[:, 4].long(), "masks": masks}


def batch():
    """Images of different sizes, the last one without objects."""
    pairs = [
        sample((90, 120), (10, 20, 50, 60, 1), (60, 10, 110, 40, 2)),
        sample((64, 50), (5, 8, 45, 40, 5), seed=1),
        sample((40, 70), seed=2),
    ]
    return [list(x) for x in zip(*pairs, strict=True)]


# ---- the parts


@pytest.mark.parametrize("scale", [8, 2.5])
def test_anchors(scale):
    """Around the first pixel of each cell, of `scale` strides a side, with heights to widths of 0.5, 1 and 2."""
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    maps = [torch.zeros(2, 1, *size, dtype=torch.bfloat16) for size in sizes]
    found = Anchors(scale)(SimpleNamespace(image_sizes=[(0, 0)] * 2), maps)
    expected = []
    for (rows, columns), stride in zip(sizes, (4, 8, 16, 32, 64), strict=True):
        for row in range(rows):
            for column in range(columns):
                for ratio in (0.5, 1, 2):
                    height = scale * stride * math.sqrt(ratio)
                    x, y, w, h = column * stride, row * stride, height / ratio / 2, height / 2
                    expected.append([x - w, y - h, x + w, y + h])
    assert len(found) == 2
    for anchors in found:
        assert anchors.dtype == torch.float32
        torch.testing.assert_close(anchors, torch.tensor(expected))


def test_matching():
    """By the thresholds, and each object's best anchors from the lower threshold on."""
    match = BestAnchors(0.7, 0.3)
    quality = torch.tensor(
        [
            [0.8, 0.2, 0.5, 0.0, 0.1],  # has an anchor above the threshold
            [0.0, 0.6, 0.5, 0.0, 0.6],  # the best of it are below
            [0.0, 0.0, 0.0, 0.29, 0.0],  # has none at all
        ]
    )
    assert match(quality.clone()).tolist() == [0, 1, -2, -1, 1]
    shared = torch.tensor([[0.5, 0.2], [0.4, 0.2]])
    assert match(shared).tolist() == [1, -1]


def bilinear(image, y, x):
    """(C, H, W) at a point, pixel centres at integers; its edges reach one pixel out, beyond that it is zero."""
    height, width = image.shape[-2:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return (
        (1 - dy) * (1 - dx) * image[:, top, left]
        + (1 - dy) * dx * image[:, top, right]
        + dy * (1 - dx) * image[:, bottom, left]
        + dy * dx * image[:, bottom, right]
    )


def plain_roi_align(image, box, side, stride):
    """Means over each cell of the box of ceil(its side) x ceil(its side) points, pixel centres at one half."""
    left, top, right, bottom = (float(v) / stride - 0.5 for v in box)
    h, w = (bottom - top) / side, (right - left) / side
    rows, columns = math.ceil(h), math.ceil(w)
    out = torch.zeros(len(image), side, side)
    for i in range(side):
        for j in range(side):
            points = [
                bilinear(image, top + (i + (k + 0.5) / rows) * h, left + (j + (m + 0.5) / columns) * w)
                for k in range(rows)
                for m in range(columns)
            ]
            out[:, i, j] = sum(points) / len(points)
    return out


def test_rois():
    """Each box from the map that suits its size, in the order of the boxes; two images, one without a box."""
    maps = {str(i): torch.randn(3, 2, 256 // stride, 320 // stride) for i, stride in enumerate((4, 8, 16, 32))}
    boxes = [
        torch.tensor([[3.0, 5, 300, 250], [10, 12, 21, 17.5], [20, 30, 150, 155], [0, 0, 112, 112]]),
        torch.zeros(0, 4),
        torch.tensor([[100.5, 30, 160, 130], [290, 200, 320, 256]]),
    ]
    levels = [2, 0, 1, 1, 0, 0]  # 272, 8, 127, 112, 77 and 41 pixels a side; 224 is stride 16's
    found = PooledRoIs(7)(maps, boxes, None)
    expected = [
        plain_roi_align(maps[str(level)][image], box, 7, 4 * 2**level)
        for (image, box), level in zip([(i, b) for i, bs in enumerate(boxes) for b in bs], levels, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    large = torch.tensor([0.0, 0, 4000, 4000])  # which no level is coarse enough for
    found = PooledRoIs(2)(maps, [large[None]])
    torch.testing.assert_close(found[0], plain_roi_align(maps["3"][0], large, 2, 32))


def test_pasted_masks():
    """A probability at the centre of each pixel, interpolated between the centres of the mask's cells."""
    masks = torch.rand(4, 28, 28)
    boxes = torch.tensor([[3.3, 4.6, 20.2, 33.9], [-5, -7, 12, 9], [30, 20, 70, 60], [41, 1, 60, 9]])
    found = paste_masks(masks, boxes, (36, 40))
    for mask, (left, top, right, bottom), whole in zip(masks, boxes.tolist(), found, strict=True):
        outside = F.pad(mask, (1, 1, 1, 1))[None]  # zero from one cell beyond the edge on
        for y in range(36):
            for x in range(40):
                row = (y + 0.5 - top) / (bottom - top) * 28 + 0.5
                column = (x + 0.5 - left) / (right - left) * 28 + 0.5
                inside = -1 <= row <= 30 and -1 <= column <= 30
                value = bilinear(outside, row, column).item() if inside else 0.0
                assert whole[y, x] == (value >= 0.5) or abs(value - 0.5) < 1e-4
    assert found[:3].flatten(1).any(1).all() and not found[3].any()
    assert paste_masks(masks[:0], boxes[:0], (5, 6)).shape == (0, 5, 6)
    rounded = masks.bfloat16()  # as under autocast: coordinates are not
    large = boxes * 37
    assert torch.equal(*(paste_masks(m, large, (1300, 1500)) for m in (rounded, rounded.float())))


def test_losses_of_the_heads():
    """Against the formulas, with all proposals taken: cross-entropy, L1 of box offsets, cross-entropy of masks."""
    model = small("detection", head_args={"roi_samples": 1000}).train()
    heads = model.roi_heads
    maps = {str(i): torch.randn(1, 16, 128 // s, 128 // s) for i, s in enumerate((4, 8, 16, 32))}
    image, target = sample((128, 128), (10, 20, 60, 70, 2), (64, 40, 120, 110, 4))
    target["masks"][0, 20:40, 10:30] = 0
    proposals = torch.tensor([[12.0, 18, 58, 75], [60, 44, 110, 118], [5, 5, 30, 30], [62, 20, 125, 80]])
    _, losses = heads(maps, [proposals], [(128, 128)], [target])
    boxes = torch.cat([proposals, target["boxes"]])
    labels, objects = torch.tensor([2, 4, 0, 0, 2, 4]), [0, 1, None, None, 0, 1]
    features = torch.stack([plain_roi_align(maps["0"][0], box, 7, 4) for box in boxes])
    scores, offsets = heads.box_predictor(heads.box_head(features))
    class_loss = -scores.log_softmax(1)[range(6), labels].mean()
    box_loss = mask_loss = 0
    for box, label, found, i in zip(boxes, labels, offsets, objects, strict=True):
        if i is None:
            continue
        (px, py, pw, ph), (gx, gy, gw, gh) = (
            ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]) for b in (box, target["boxes"][i])
        )
        wanted = [(gx - px) / pw / 0.1, (gy - py) / ph / 0.1, (gw / pw).log() / 0.2, (gh / ph).log() / 0.2]
        box_loss += (found[4 * label : 4 * label + 4] - torch.stack(wanted)).abs().sum() / 6
        mask = (plain_roi_align(target["masks"][i][None].float(), box, 28, 1)[0] >= 0.5).float()
        features = plain_roi_align(maps["0"][0], box, 14, 4)[None]
        logits = heads.mask_predictor(heads.mask_head(features))[0, label]
        mask_loss += F.binary_cross_entropy(logits.sigmoid(), mask) / 4
    for name, expected in (("classifier", class_loss), ("box_reg", box_loss), ("mask", mask_loss)):
        torch.testing.assert_close(losses[f"loss_{name}"], expected, rtol=1e-4, atol=1e-5)


def test_losses_of_the_rpn():
    """Cross-entropy over the sampled anchors and L1 over the positive ones, both by the number of the sampled."""
    rpn = small("detection", head_args={"rpn_samples": 1000}).rpn
    labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 0, 1, -1])]
    logits, deltas = torch.randn(8, 1), torch.randn(8, 4)
    targets = [torch.randn(4, 4), torch.randn(4, 4)]
    taken = [0, 1, 3, 4, 5, 6]
    label, found, wanted = torch.cat(labels)[taken], deltas[[0, 6]], torch.cat(targets)[[0, 6]]
    class_loss = F.binary_cross_entropy(logits.flatten()[taken].sigmoid(), label)
    losses = rpn.compute_loss(logits, deltas, labels, targets)
    torch.testing.assert_close(losses[0], class_loss)
    torch.testing.assert_close(losses[1], (found - wanted).abs().sum() / 6)


def test_mask_targets():
    """The part of each box's own object."""
    masks = torch.zeros(2, 60, 60, dtype=torch.bool)
    masks[0, 10:38, 5:33], masks[1, 30:58, 20:48] = torch.rand(28, 28) > 0.5, torch.rand(28, 28) > 0.5
    boxes = torch.tensor([[20.0, 30, 48, 58], [5, 10, 33, 38]])
    found = mask_targets(masks, boxes, torch.tensor([1, 0]))
    assert torch.equal(found.bool(), torch.stack([masks[1, 30:58, 20:48], masks[0, 10:38, 5:33]]))


# ---- the model


def test_parameters():
    """Published: 28 M."""
    with torch.device("meta"):
        model = create_dense("detection", "mpvg_vit_adapter_tiny", 80)
    assert sum(p.numel() for p in model.parameters()) == 28_077_669


def test_initial_weights():
    """Those of mmdetection: normal in the layers that predict, Xavier's and Kaiming's elsewhere; no bias."""
    torch.manual_seed(0)
    head = {"width": 64, "box_width": 128}
    model = create_dense("detection", "mpvg_vit_adapter_tiny", 80, backbone_args=ADAPTER, head_args=head)
    heads = model.roi_heads
    for layer, std in (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
        (heads.box_head.fc6, (2 / (64 * 49 + 128)) ** 0.5),
        (heads.box_head.fc7, (2 / (128 + 128)) ** 0.5),
        (heads.mask_head[0][0], (2 / (64 * 9)) ** 0.5),
        (heads.mask_predictor.conv5_mask, (2 / (64 * 4)) ** 0.5),
        (heads.mask_predictor.mask_fcn_logits, (2 / 81) ** 0.5),
        (model.fpn.inner_blocks[1][0], (2 / (24 + 64)) ** 0.5),
        (model.fpn.layer_blocks[1][0], (2 / (9 * 128)) ** 0.5),
        (model.rpn.head.conv[0][0], 0.01),
        (model.rpn.head.cls_logits, 0.01),
        (model.rpn.head.bbox_pred, 0.01),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.15) and not layer.bias.any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training(scheme):
    """Five finite losses in fp32 for images of several sizes, with and without objects; every parameter learns."""
    model = small("detection", scheme).train()
    images, targets = batch()
    losses = model(images, targets)
    assert losses.keys() == LOSSES
    assert all(loss.isfinite() and loss > 0 and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_objects_at_all():
    """The losses of boxes and masks are zero, and so are their gradients; none is missing."""
    model = small("detection").train()
    losses = model(*[list(x) for x in zip(sample((64, 64)), sample((40, 50)), strict=True)])
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(p.grad.any() for p in model.roi_heads.mask_head.parameters())


def test_repeatable():
    """The same bits for the same seed, another choice of anchors for another one."""
    images, targets = batch()
    found = []
    for seed in (3, 3, 4):
        model = small("detection", drop_path_rate=0.2).train()
        torch.manual_seed(seed)
        losses = model(images, targets)
        sum(losses.values()).backward()
        found.append([*[loss.detach() for loss in losses.values()], *[p.grad for p in model.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_detections():
    """Of each image, in its own pixels or in those of the original: boxes inside, masks in boxes, best first."""
    model = small("detection", head_args={"score_threshold": 0.0, "max_objects": 7}).eval()
    images, _ = batch()
    sizes = [(180, 360), (64, 50), (20, 35)]
    with torch.no_grad():
        found, scaled = model(images), model(images, sizes=sizes)
    for image, size, own, other in zip(images, sizes, found, scaled, strict=True):
        (height, width), (h, w) = image.shape[-2:], size
        assert [tuple(own[key].shape) for key in ("boxes", "labels", "scores")] == [(7, 4), (7,), (7,)]
        assert own["masks"].shape == (7, height, width) and own["masks"].dtype == torch.bool
        assert other["masks"].shape == (7, h, w)
        limits = torch.tensor([width, height] * 2)
        assert (own["boxes"] >= 0).all() and (own["boxes"] <= limits).all()
        assert own["scores"].tolist() == sorted(own["scores"].tolist(), reverse=True)
        assert own["labels"].min() >= 1 and own["labels"].max() <= 5
        torch.testing.assert_close(other["boxes"], own["boxes"] * torch.tensor([w / width, h / height] * 2))
        for mask, (left, top, right, bottom) in zip(own["masks"], own["boxes"], strict=True):
            rows, columns = mask.nonzero().T
            assert ((columns + 1 >= left) & (columns <= right) & (rows + 1 >= top) & (rows <= bottom)).all()
    model.roi_heads.score_thresh = 1.0
    with torch.no_grad():
        none = model(torch.stack([images[0]] * 2))
    assert [tuple(f["masks"].shape) for f in none] == [(0, 90, 120)] * 2


@pytest.mark.slow
def test_learns():
    """Two objects of an image, by class, box and mask, after some steps on it."""
    model = small("detection", head_args={"score_threshold": 0.5}).train()
    image, target = sample((64, 96), (8, 12, 40, 44, 1), (50, 20, 90, 52, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    order = found["labels"].argsort()
    assert found["labels"][order].tolist() == [1, 2]
    assert (found["boxes"][order] - target["boxes"]).abs().max() < 5
    both = found["masks"][order] & target["masks"].bool(), found["masks"][order] | target["masks"].bool()
    intersection, union = (m.flatten(1).sum(1) for m in both)
    assert (intersection / union > 0.8).all()


def test_autocast():
    """bf16: losses near those in fp32, boxes and anchors in fp32, and gradients are finite."""
    model = small("detection").train()
    images, targets = batch()
    torch.manual_seed(1)
    expected = model(images, targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=0.02)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(images)
    assert all(f["boxes"].dtype == f["scores"].dtype == torch.float32 for f in found)


def test_bad_targets():
    model = small("detection").train()
    (image, *_), (target, *_) = batch()
    for change, message in (
        ({"boxes": target["boxes"][:, [2, 1, 0, 3]]}, r"targets\[0\] has a box without area"),
        ({"boxes": target["boxes"][:1]}, r"targets\[0\] has boxes of \(1, 4\), expected \(2, 4\)"),
        ({"masks": target["masks"][:, 1:]}, r"targets\[0\] has masks of \(2, 89, 120\), expected \(2, 90, 120\)"),
        ({"labels": target["labels"] - 1}, r"targets\[0\] has labels that are not from 1 to 5"),
        ({"labels": target["labels"] + 4}, r"targets\[0\] has labels that are not from 1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            model([image], [target | change])
    for targets in (None, [target] * 2):
        with pytest.raises(ValueError, match="1 images with . targets; while training each has one"):
            model([image], targets)
