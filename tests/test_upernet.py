"""UperNet: against a plain formula, its loss, sliding windows, label maps, gradients, autocast, torch.compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from dense_models import SCHEMES, small
from torch import nn

from mpvg_kernels.models import create_dense, label_map, segmentation_loss

CLASSES = 5


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- the plain formula


def conv(x, block, eps=1e-5):
    """Convolution, batch norm with the running statistics, ReLU."""
    convolution, norm, _ = block
    x = F.conv2d(x, convolution.weight, padding=convolution.kernel_size[0] // 2)
    scale, shift, mean, var = (t[:, None, None] for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    return ((x - mean) / (var + eps).sqrt() * scale + shift).clamp(min=0)


def pooled(x, cells):
    """Means over cells x cells parts, which overlap where the side is no multiple."""
    height, width = x.shape[-2:]

    def part(i, side):
        return slice(i * side // cells, -(-(i + 1) * side // cells))

    rows = [
        torch.stack([x[..., part(i, height), part(j, width)].mean((-2, -1)) for j in range(cells)], -1)
        for i in range(cells)
    ]
    return torch.stack(rows, -2)


def up(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def plain(model, maps, size):
    """Logits of both heads in eval mode, of the padded image's size."""
    head = model.decode_head
    c1, c2, c3, c4 = maps
    stages = zip((1, 2, 3, 6), head.pooling.stages, strict=True)
    scales = [up(conv(pooled(c4, cells), stage[1]), c4.shape[-2:]) for cells, stage in stages]
    p4 = conv(torch.cat([c4, *scales], 1), head.pooling.bottleneck)
    p3 = conv(c3, head.laterals[2]) + up(p4, c3.shape[-2:])
    p2 = conv(c2, head.laterals[1]) + up(p3, c2.shape[-2:])
    p1 = conv(c1, head.laterals[0]) + up(p2, c1.shape[-2:])
    levels = [conv(p, block) for p, block in zip((p1, p2, p3), head.convs, strict=True)] + [p4]
    fused = conv(torch.cat([levels[0], *[up(p, c1.shape[-2:]) for p in levels[1:]]], 1), head.bottleneck)
    aux = conv(c3, model.aux_head[0])
    return [
        up(F.conv2d(x, layer.weight, layer.bias), size)
        for x, layer in ((fused, model.classifier[1]), (aux, model.aux_head[1][1]))
    ]


def test_against_the_plain_formula():
    """Both heads on an image that needs padding, with statistics and scales that matter."""
    model = small("segmentation").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.2)
    x = images(2, 3, 70, 100)
    expected = plain(model, model.backbone(F.pad(x, (0, 28, 0, 26))), (96, 128))
    torch.testing.assert_close(model(x), expected[0][..., :70, :100], rtol=1e-4, atol=1e-5)
    model.training = True  # of this module alone: both heads, running statistics, no dropout
    for found, e in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, e[..., :70, :100], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["default", "mpvg"])
def test_parameters(scheme):
    """Published: 36 M."""
    with torch.device("meta"):
        model = create_dense("segmentation", "mpvg_vit_adapter_tiny", 150, backbone_args={"scheme": scheme})
    assert sum(p.numel() for p in model.parameters()) == {"default": 36_062_236, "mpvg": 36_067_228}[scheme]
    assert sum(p.numel() for p in model.aux_head.parameters()) == 256 * (192 * 9 + 2) + 150 * 257


def test_initial_weights():
    """Those of mmsegmentation: Kaiming's by the fan out, and normal in the classifiers."""
    model = small("segmentation")
    for layer, std in ((model.decode_head.bottleneck[0], (2 / (9 * 16)) ** 0.5), (model.classifier[1], 0.01)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.15)
    assert not model.classifier[1].bias.any()


# ---- training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(scheme):
    """Every parameter gets one."""
    model = small("segmentation", scheme).train()
    x, labels = images(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64), dtype=torch.uint8)
    labels[:, :10] = 255
    segmentation_loss(model(x), labels).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_loss():
    """The mean over labelled pixels, of both heads with their weights."""
    logits, aux = torch.randn(2, CLASSES, 4, 6), torch.randn(2, CLASSES, 4, 6)
    labels = torch.randint(0, CLASSES, (2, 4, 6))
    labels[0, :2] = 255

    def mean(logits):
        found = [
            math.log(sum(math.exp(v) for v in logits[b, :, i, j])) - logits[b, labels[b, i, j], i, j].item()
            for b in range(2)
            for i in range(4)
            for j in range(6)
            if labels[b, i, j] != 255
        ]
        return sum(found) / len(found)

    assert segmentation_loss(logits, labels).item() == pytest.approx(mean(logits), rel=1e-5)
    both = segmentation_loss((logits, aux), labels.to(torch.uint8))
    assert both.item() == pytest.approx(mean(logits) + 0.4 * mean(aux), rel=1e-5)
    other = segmentation_loss((logits, aux), torch.where(labels == 255, -1, labels), ignore=-1, aux_weight=1)
    assert other.item() == pytest.approx(mean(logits) + mean(aux), rel=1e-5)
    assert segmentation_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_loss_without_labels():
    """Zero, with gradients of zero: a batch with ignored pixels only does no harm."""
    logits = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_autocast():
    """bf16: close to fp32, and gradients are finite."""
    model = small("segmentation").train()
    x, labels = images(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    torch.manual_seed(2)
    expected = segmentation_loss(model(x), labels)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss(model(x), labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compile():
    """One graph for backbone and head: the same loss and gradients."""
    layers = {"depth": 2, "interaction_indexes": [[0, 1]]}
    model = small("segmentation", head_args={"drop_rate": 0.0}, **layers).train()
    x, labels = images(2, 3, 64, 96), torch.randint(0, CLASSES, (2, 64, 96))
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        segmentation_loss(run(x), labels).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---- whole images


def windows(model, image, window, stride):
    """Sliding windows as mmsegmentation counts them, one by one."""
    height, width = image.shape[-2:]
    down = max(height - window + stride - 1, 0) // stride + 1
    across = max(width - window + stride - 1, 0) // stride + 1
    total, count = torch.zeros(len(image), CLASSES, height, width), torch.zeros(height, width)
    for i in range(down):
        for j in range(across):
            bottom, right = min(i * stride + window, height), min(j * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            total[:, :, top:bottom, left:right] += model(image[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    assert count.min() >= 1
    return total / count


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(70, 101), (64, 128), (40, 90), (30, 20)], ids=str)
def test_segment(size, batch):
    """Windows that are moved back at the edges, that fit, and images below the window in one side or both."""
    model, image = small("segmentation").eval(), images(2, 3, *size)
    found = model.segment(image, window=64, stride=24, batch=batch)
    assert found.shape == (2, CLASSES, *size) and not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found, windows(model, image, 64, 24), rtol=1e-4, atol=1e-5)


def test_segment_options():
    model, image = small("segmentation").eval(), images(1, 3, 40, 90)
    assert torch.equal(model.segment(image), model(image))
    assert torch.equal(model.segment(image, window=64), model.segment(image, window=64, stride=42))
    for stride in (0, 65):
        with pytest.raises(ValueError, match=f"stride={stride}: expected 1 to the window's side, 64"):
            model.segment(image, window=64, stride=stride)
    with pytest.raises(ValueError, match="a model in eval mode"):
        model.train().segment(image)


@pytest.mark.parametrize("classes", [1, 3, 16])
@pytest.mark.parametrize("size", [None, (37, 50), (9, 7)])
def test_label_map(size, classes):
    """Of resized logits the best class; the first of equal ones."""
    logits = torch.randn(2, 7, 20, 24).round()
    found = label_map(logits, size, classes)
    assert found.dtype == torch.int64
    assert torch.equal(found, up(logits, size or (20, 24)).argmax(1))
