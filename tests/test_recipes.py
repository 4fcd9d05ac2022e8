"""Every recipe's values against the published ones, written out here with where they are from.

deit: facebookresearch/deit main.py; swin: microsoft/Swin-Transformer config.py and configs/swin/swin_tiny_*.yaml;
ceit: coeusguo/ceit main.py; t2t: yitu-opensource/T2T-ViT README.md and main.py, and transfer_learning.py;
compact: SHI-Labs/Compact-Transformers configs/datasets/cifar100.yml; paper: MPVG (arXiv 2502.02919); adapter:
czczup/ViT-Adapter segmentation/configs/ade20k/upernet_deit_adapter_tiny_512_160k_ade20k.py; mmseg: mmsegmentation 0.x
configs/_base_/datasets/ade20k.py, models/upernet_r50.py and schedules/schedule_160k.py; detection: the adapter's
detection/configs/mask_rcnn/mask_rcnn_deit_adapter_tiny_fpn_3x_coco.py; mmdet: mmdetection 2.x
configs/_base_/models/mask_rcnn_r50_fpn.py, schedules/schedule_3x.py and mmdet/models.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from timm.models import get_pretrained_cfg

from mpvg_kernels.train import InputError, config, recipes
from mpvg_kernels.train.model import create_model
from mpvg_kernels.train.optim import create_optimizer, create_schedule, learning_rates

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
IN1K = {
    **{"data.name": "folder", "amp": "bf16", "model.scheme": "mpvg", "optim.name": "adamw", "sched.name": "cosine"},
    # deit, swin, ceit and t2t have all these in common
    **{"aug.auto_augment": "rand-m9-mstd0.5-inc1", "aug.erase_prob": 0.25, "aug.mixup": 0.8, "aug.cutmix": 1.0},
    **{"aug.mix_prob": 1.0, "aug.mix_switch_prob": 0.5, "loss.smoothing": 0.1, "loss.name": "ce", "aug.hflip": 0.5},
    **{"aug.crop": "resized", "aug.scale": (0.08, 1.0), "aug.ratio": (3 / 4, 4 / 3), "epochs": 300},
    **{"model.linear_probe": False, "loss.distillation": "none", "optim.layer_decay": None, "model.drop_rate": None},
    **{"data.interpolation": "bicubic", "aug.interpolation": "bicubic"},
}
DEIT = IN1K | {
    **{"batch": 1024, "optim.weight_decay": 0.05, "optim.eps": 1e-8, "optim.clip_grad": None, "aug.repeats": 3},  # deit
    **{"optim.ema_decay": 0.99996, "model.drop_path_rate": 0.1, "data.crop_pct": 0.875},
    **{"sched.per": "epoch", "sched.warmup_epochs": 5},
    "sched.cooldown_epochs": 0,  # deit's 10 are never trained: its loop ends at --epochs
}
T2T = IN1K | {
    **{"batch": 512, "optim.weight_decay": 0.03, "sched.cooldown_epochs": 10, "sched.warmup_epochs": 10},  # t2t README
    **{"optim.ema_decay": 0.99996, "model.drop_path_rate": 0.1, "optim.clip_grad": None, "sched.per": "epoch"},
    **{"aug.interpolation": "random", "data.crop_pct": 0.9, "aug.repeats": 1},
}
PUBLISHED = {
    "deit_tiny_in1k": DEIT | {"model.name": "mpvg_deit_tiny_patch16_224"},
    "deit_small_in1k": DEIT | {"model.name": "mpvg_deit_small_patch16_224"},
    "deit_base_in1k": DEIT | {"model.name": "mpvg_deit_base_patch16_224"},
    "ceit_tiny_in1k": DEIT | {"model.name": "mpvg_ceit_tiny_patch16_224"},  # ceit: as deit
    "swin_tiny_in1k": IN1K
    | {
        **{"model.name": "mpvg_swin_tiny_patch4_window7_224", "model.drop_path_rate": 0.2},  # swin yaml
        **{"batch": 1024, "optim.weight_decay": 0.05, "optim.eps": 1e-8, "optim.betas": (0.9, 0.999)},  # swin config
        **{"optim.clip_grad": 5.0, "optim.ema_decay": None, "aug.repeats": 1, "data.crop_pct": 224 / 256},
        **{"sched.per": "update", "sched.warmup_epochs": 20, "sched.warmup_prefix": True, "sched.cooldown_epochs": 0},
    },
    "t2t_vit_7_in1k": T2T | {"model.name": "mpvg_t2t_vit_7_224"},
    "vit_lite_7_4_cifar100": T2T
    | {
        **{"model.name": "mpvg_vit_lite_7_4_32", "model.attn_drop_rate": 0.1, "data.name": "torch/cifar100"},  # compact
        **{"batch": 128, "optim.weight_decay": 0.06, "optim.ema_decay": None, "optim.decay_pos_embed": True},
        **{"aug.scale": (0.8, 1.0), "data.crop_pct": 1.0},
    },
    "t2t_vit_7_cifar100": {
        **{"model.name": "mpvg_t2t_vit_7_224", "data.name": "torch/cifar100", "model.drop_path_rate": 0.1},  # transfer
        **{"optim.name": "momentum", "optim.momentum": 0.9, "optim.weight_decay": 5e-4, "amp": "none"},
        **{"optim.backbone_lr_scale": 0.01, "aug.crop": "padded", "aug.padding": 28, "aug.hflip": 0.5},
        **{"aug.interpolation": "bilinear", "data.interpolation": "bilinear", "data.crop_pct": 1.0},
        **{"aug.auto_augment": None, "aug.color_jitter": 0.0, "aug.erase_prob": 0.0, "aug.mixup": 0.0},
        **{"aug.cutmix": 0.0, "loss.smoothing": 0.0, "sched.per": "epoch", "sched.warmup_epochs": 0},
        **{"batch": 128, "epochs": 60, "sched.cooldown_epochs": 0},  # paper; so is the learning rate below
        **{"optim.ema_decay": None, "optim.clip_grad": None, "aug.repeats": 1},
    },
}
OURS = ("digits", "shapes_detection", "shapes_segmentation")
"""Recipes that nobody published."""
DENSE = {
    "upernet_adapter_tiny_ade20k": {
        **{"task": "segmentation", "model.name": "mpvg_vit_adapter_tiny", "model.scheme": "mpvg", "data.name": "masks"},
        **{"batch": 8, "optim.lr": 12e-5, "optim.weight_decay": 0.01, "optim.name": "adamw"},  # paper
        **{"epochs": 10, "data.epoch_updates": 16_000},  # paper: 160k; adapter: evaluated every 16,000
        **{"data.img_size": (512, 512), "sched.warmup_updates": 1500},  # paper
        **{"optim.betas": (0.9, 0.999), "optim.layer_decay": 0.95, "model.drop_path_rate": 0.1},  # adapter
        **{"sched.name": "poly", "sched.decay_rate": 1.0, "sched.min_lr": 0.0, "sched.per": "update"},
        **{"sched.warmup_lr": 12e-5 * 1e-6, "sched.warmup_prefix": False, "sched.cooldown_epochs": 0},
        **{"segmentation.window": 512, "segmentation.stride": 341, "dist.sync_bn": True, "amp": "bf16"},
        **{"model.adapter.pretrain_size": 224, "model.adapter.window_size": None},  # all layers see the whole image
        **{"optim.clip_grad": None, "optim.ema_decay": None, "optim.lr_base_batch": None},
        **{"segmentation.reduce_zero_label": True, "segmentation.ignore_label": 255, "aug.hflip": 0.5},  # mmseg
        **{"segmentation.short_side": 512, "segmentation.long_side": 2048, "segmentation.scale": (0.5, 2.0)},
        **{"segmentation.cat_max_ratio": 0.75, "segmentation.photometric": True, "segmentation.aux_weight": 0.4},
        **{"segmentation.width": 512, "segmentation.aux_width": 256, "segmentation.drop_rate": 0.1},
    },
    "mask_rcnn_adapter_tiny_coco": {
        **{"task": "detection", "model.name": "mpvg_vit_adapter_tiny", "model.scheme": "mpvg", "data.name": "coco"},
        **{"batch": 8, "epochs": 36, "optim.lr": 1e-4, "optim.weight_decay": 0.05, "optim.name": "adamw"},  # paper
        **{"sched.warmup_updates": 500},  # paper
        **{"optim.betas": (0.9, 0.999), "optim.layer_decay": None, "model.drop_path_rate": 0.1},  # detection
        **{"model.adapter.pretrain_size": 224, "model.adapter.window_size": 14, "model.adapter.interactions": 4},
        **{"model.adapter.global_layers": (2, 5, 8, 11), "dist.sync_bn": True, "amp": "bf16", "aug.hflip": 0.5},
        **{"detection.short_sides": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)},
        **{"detection.max_side": 1333, "detection.crop_prob": 0.5, "detection.crop_short_sides": (400, 500, 600)},
        **{"detection.crop_sides": (384, 600), "detection.final_crop": (1024, 1024)},
        **{"optim.clip_grad": None, "optim.ema_decay": None, "optim.lr_base_batch": None},
        **{"sched.name": "step", "sched.decay_at": (27, 33), "sched.decay_rate": 0.1},  # mmdet
        **{"sched.warmup_lr": 1e-7, "sched.per": "update", "sched.cooldown_epochs": 0},
        **{"detection.test_short_side": 800, "detection.test_max_side": 1333, "detection.anchor_scale": 8.0},
        **{"detection.score_threshold": 0.05, "detection.nms_threshold": 0.5, "detection.max_detections": 100},
        **{"detection.width": 256, "detection.box_width": 1024, "detection.proposals": 1000},
        **{"detection.rpn_samples": 256, "detection.roi_samples": 512},
    },
}
# size, classes and moments; peak, first and least learning rate after scaling
IMAGES = {name: ((3, 224, 224), 1000, IMAGENET) for name in PUBLISHED} | {
    "vit_lite_7_4_cifar100": (
        *((3, 32, 32), 100),
        {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
    ),
    "t2t_vit_7_cifar100": (
        *((3, 224, 224), 100),
        {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    ),
}
RATES = {name: (1e-3, 1e-6, 1e-5) for name in PUBLISHED} | {  # deit: 5e-4 x 1024 / 512; swin: all three so
    "vit_lite_7_4_cifar100": (6e-4, 1e-6, 1e-5),
    "t2t_vit_7_cifar100": (5e-2, None, 2e-4),
}
STEPS = 7  # updates of an epoch here; the published numbers are by epoch


def expected_lr(name: str, update: int) -> float:
    """The learning rate of an update, from 0, written out from the published schedule."""
    peak, first, least = RATES[name]
    published = PUBLISHED[name]
    warmup, epochs = published["sched.warmup_epochs"], published["epochs"]
    epoch = update / STEPS if name == "swin_tiny_in1k" else update // STEPS
    if epoch < warmup:
        return first + (peak - first) * epoch / warmup
    if epoch >= epochs:
        return least
    if name == "swin_tiny_in1k":  # the curve has the 280 epochs after the warm-up
        epoch, epochs = epoch - 20, 280
    return least + (peak - least) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def build(name: str, scheme: str = "mpvg") -> tuple[config.Config, torch.nn.Module]:
    """A recipe's config with another scheme, and its model, which has shapes and no values."""
    found = config.from_args(recipes.load(name), ["--model.scheme", scheme])
    size, classes, moments = IMAGES.get(name, ((1, 8, 8), 10, {"mean": (0.3,), "std": (0.4,)}))
    data = SimpleNamespace(input_size=size, num_classes=classes, preprocessing={"input_size": size, **moments})
    with torch.device("meta"):
        return found, create_model(found, data, start=False)


def test_every_recipe_is_pinned():
    assert set(recipes.names()) == {*PUBLISHED, *DENSE, *OURS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values(name):
    found = recipes.load(name)
    assert {field: config.get(found, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert not config.ignored(found)
    size, _, moments = IMAGES[name]
    registered = get_pretrained_cfg(found.model.name)  # what the data takes where the recipe says nothing
    assert (found.data.img_size or registered.input_size[1:]) == size[1:]
    assert (found.data.mean or registered.mean, found.data.std or registered.std) == tuple(moments.values())
    peak, first, least = RATES[name]
    rates = learning_rates(found)
    assert (rates["peak"], rates["min"]) == pytest.approx((peak, least), rel=1e-12)
    assert first is None or rates["warmup"] == pytest.approx(first, rel=1e-12)
    assert found.total_epochs == {"t2t_vit_7_in1k": 310, "vit_lite_7_4_cifar100": 310}.get(name, found.epochs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rate_of_each_epoch(name):
    found = recipes.load(name)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rates(found)["peak"])
    schedule = create_schedule(found, optimizer, STEPS)
    for epoch in range(found.total_epochs):
        for update in (epoch * STEPS, epoch * STEPS + 3):
            schedule.update(update)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected_lr(name, update), rel=1e-9), update


@pytest.mark.parametrize("scheme", ["default", "mpvg"])
@pytest.mark.parametrize("name", [*PUBLISHED, "digits"])
def test_parameter_groups(name, scheme):
    found, model = build(name, scheme)
    optimizer = create_optimizer(found, model)
    assert type(optimizer) is (torch.optim.SGD if name == "t2t_vit_7_cifar100" else torch.optim.AdamW)
    assert not optimizer.defaults.get("nesterov")
    assert optimizer.defaults.get("eps", 1e-8) == 1e-8 and optimizer.defaults.get("betas", (0.9, 0.999)) == (0.9, 0.999)
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == sum(len(g["params"]) for g in optimizer.param_groups)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert decay.keys() == trained
    bare = {"pos_embed", "cls_token"} - ({"pos_embed"} if name.startswith("vit_lite") else set())
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    for parameter, value in decay.items():
        undecayed = shapes[parameter] == 1 or parameter in bare or "relative_position_bias" in parameter
        assert value == (0 if undecayed else found.optim.weight_decay), parameter
    pos_norms = {n for n in trained if ".pos_weight" in n or ".pos_bias" in n}
    assert bool(pos_norms) == (scheme == "mpvg") and "norm.weight" in trained
    assert ("pos_embed" in trained) != name.startswith("t2t")  # a fixed sinusoid there
    head = {n for n in trained if n.startswith("head")}
    peak = learning_rates(found)["peak"]
    backbone = peak * 0.01 if name == "t2t_vit_7_cifar100" else peak  # transfer: --transfer-ratio
    assert {rates[n] for n in head} == {peak} and {rates[n] for n in trained - head} == {backbone}


@pytest.mark.parametrize("name", DENSE)
def test_values_of_dense_prediction(name):
    found = recipes.load(name)
    assert {field: config.get(found, field) for field in DENSE[name]} == DENSE[name]
    assert not config.ignored(found)
    registered = get_pretrained_cfg(found.model.name)
    assert {"mean": registered.mean, "std": registered.std} == IMAGENET


def test_learning_rates_of_160k_updates():
    """mmcv's: a straight line down, in the warm-up times what rises from a millionth to 1."""
    found = recipes.load("upernet_adapter_tiny_ade20k")
    total = found.epochs * found.data.epoch_updates
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in (1.0, 0.95**13)], lr=12e-5
    )
    schedule = create_schedule(found, optimizer, found.data.epoch_updates)
    assert total == 160_000
    for update in (0, 1, 750, 1499, 1500, 80_000, 159_999):
        schedule.update(update)
        rise = min(1.0, 1e-6 + (1 - 1e-6) * update / 1500)
        line = 12e-5 * (1 - update / total)
        # Here the warm-up rises to the peak, and not to the line at its end: 0.9 % more at most.
        expected = line * rise if update >= 1500 else 12e-5 * rise
        assert expected / (line * rise) < 1.0095
        lr, lowest = (group["lr"] for group in optimizer.param_groups)
        assert lr == pytest.approx(expected, rel=1e-9) and lowest == pytest.approx(0.95**13 * expected, rel=1e-9)


def test_learning_rates_of_the_3x_schedule():
    """mmcv's: in the warm-up times what rises from a thousandth to 1, then a tenth from epoch 27 on, and from 33."""
    found, steps = recipes.load("mask_rcnn_adapter_tiny_coco"), 14658
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rates(found)["peak"])
    schedule = create_schedule(found, optimizer, steps)
    expected = {update: 1e-4 * (0.001 + 0.999 * update / 500) for update in (0, 1, 250, 499)}
    expected |= {500: 1e-4, 27 * steps - 1: 1e-4, 27 * steps: 1e-5, 33 * steps - 1: 1e-5, 33 * steps: 1e-6}
    for update, lr in {**expected, 36 * steps - 1: 1e-6}.items():
        schedule.update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-9), update


def test_fine_tuning_needs_weights():
    found = recipes.load("t2t_vit_7_cifar100")
    with pytest.raises(InputError, match="config field model.weights is None.*optim.backbone_lr_scale is 0.01"):
        create_model(found, SimpleNamespace(input_size=(3, 224, 224), num_classes=100, preprocessing={}))


@pytest.mark.parametrize("name", recipes.names())
def test_docstring(name):
    text = " ".join(recipes.describe(name).split())
    for words in (f"{name}: ", f"mpvg train --recipe {name}", "Hardware:", "Time:", "Accuracy"):
        assert words in text
    if name not in OURS:
        assert all(
            w in text for w in ("torchrun --nproc_per_node 8", "--data.root", "reported by the paper, not repro")
        )
        assert all(f"{scheme} " in text for scheme in ("default", "lape", "pvg", "mpvg"))
