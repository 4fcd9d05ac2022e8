"""The optimizer's groups and settings, and the learning rate of every update."""

import copy
import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import timm.optim
import torch

from mpvg_kernels.train import InputError, config, recipes
from mpvg_kernels.train.config import Config, Model, Optim, Sched
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.model import create_model
from mpvg_kernels.train.optim import create_optimizer, create_schedule, describe, learning_rates

STEPS = 5
DATA = SimpleNamespace(input_size=(3, 32, 32), num_classes=4, preprocessing={"input_size": (3, 32, 32)})
# the smallest model of each architecture
ARCHITECTURES = {
    "deit": Model(name="mpvg_deit_tiny_patch16_224", embed_dim=16, depth=3, num_heads=2, patch_size=8),
    "lite": Model(name="mpvg_vit_lite_6_4_32", embed_dim=16, depth=3, num_heads=2),
    "t2t": Model(name="mpvg_t2t_vit_7_224", embed_dim=16, depth=3, num_heads=2),
    "ceit": Model(name="mpvg_ceit_tiny_patch16_224", embed_dim=16, depth=3, num_heads=2),
    "swin": Model(name="mpvg_swin_tiny_patch4_window7_224", embed_dim=12),
    "timm": Model(name="deit_tiny_distilled_patch16_224", scheme=None, embed_dim=16, depth=3, num_heads=2),
}


def small(architecture: str = "deit", **optim) -> Config:
    return Config(model=ARCHITECTURES[architecture], optim=Optim(**optim), sched=Sched(min_lr=1e-6))


def build(found: Config) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(found, DATA, start=False)


def groups_by_name(optimizer, model) -> dict[str, dict]:
    """Each parameter's group; a parameter in two of them is an error."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group
    return found


# ---- parameter groups


@pytest.mark.parametrize("kind", [{}, {"layer_decay": 0.5}, {"backbone_lr_scale": 0.1}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_trainable_parameter_is_in_one_group(architecture, kind):
    found = small(architecture, **kind)
    model = build(found)
    next(p for n, p in model.named_parameters() if n.endswith("attn.proj.weight")).requires_grad_(False)
    groups = groups_by_name(create_optimizer(found, model), model)
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"norm.weight", "norm.bias"} <= groups.keys()  # T2T's script leaves the last norm out
    if architecture != "timm":
        assert {"norm.pos_weight", "norm.pos_bias"} <= groups.keys()
    for name, group in groups.items():
        p = model.get_parameter(name)
        tables = ("pos_embed",) * (architecture != "lite") + ("cls_token", "dist_token")
        undecayed = p.ndim == 1 or name in tables or "relative_position_bias" in name
        assert group["weight_decay"] == (0 if undecayed else found.optim.weight_decay), name
        head = name.startswith("head")
        if "backbone_lr_scale" in kind:
            assert group["lr"] == found.optim.lr * (1 if head else 0.1), name
        if "layer_decay" in kind:
            assert (group["lr_scale"] == 1) == head, name
            if name.startswith(("patch_embed.", "pos_embed")):
                assert group["lr_scale"] == min(g["lr_scale"] for g in groups.values())


@pytest.mark.parametrize("decay", [False, True])
def test_decay_of_the_position_embedding(decay):
    found = small(decay_pos_embed=decay)
    found = dataclasses.replace(found, model=dataclasses.replace(found.model, scheme="default"))
    model = build(found)
    groups = groups_by_name(create_optimizer(found, model), model)
    assert bool(groups["pos_embed"]["weight_decay"]) == decay and groups["cls_token"]["weight_decay"] == 0


# ---- settings


@pytest.mark.filterwarnings("ignore:.*opt_einsum")  # kron's wish
@pytest.mark.parametrize("name", timm.optim.list_optimizers())
def test_each_of_timms_optimizers(name):
    info = timm.optim.get_optimizer_info(name)
    found, model = (
        small(name=name, momentum=0.8 if info.has_momentum else 0.9, eps=1e-7 if info.has_eps else None),
        None,
    )
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(3, 3))
    if isinstance(info.opt_class, str) or info.second_order:
        with pytest.raises(InputError, match=f"config field optim.name is '{name}', which "):
            create_optimizer(found, model)
        return
    optimizer = create_optimizer(found, model)
    assert type(optimizer) is timm.optim.get_optimizer_class(name, bind_defaults=False)
    if info.has_momentum and "momentum" in optimizer.defaults:
        assert optimizer.defaults["momentum"] == 0.8
    if info.has_eps and "eps" in optimizer.defaults:
        assert optimizer.defaults["eps"] == 1e-7


@pytest.mark.parametrize(
    "optim, message",
    [
        ({"name": "adamww"}, "config field optim.name is 'adamww', which timm does not know; did you mean 'adamw'"),
        ({"name": "adahessian"}, "needs second derivatives"),
        ({"momentum": 0.5}, "config field optim.momentum is 0.5, expected 0.9: adamw does not take it"),
        ({"name": "sgd", "betas": (0.9, 0.9)}, "config field optim.betas is (0.9, 0.9), expected None: sgd does not"),
        ({"name": "sgd", "eps": 1e-8}, "config field optim.eps is 1e-08, expected None: sgd does not"),
        ({"name": "adan", "betas": (0.9, 0.9)}, "config field optim.betas is (0.9, 0.9), expected None: adan"),
    ],
)
def test_settings_that_are_not_taken(optim, message):
    with pytest.raises(InputError) as error:
        create_optimizer(small(**optim), build(small()))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_that_are_taken():
    optimizer = create_optimizer(small(betas=(0.8, 0.95), eps=1e-5), build(small()))
    assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["eps"] == 1e-5
    optimizer = create_optimizer(small(name="momentum", momentum=0.7), build(small()))
    assert optimizer.defaults["momentum"] == 0.7 and not optimizer.defaults["nesterov"]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_on_a_cpu_is_the_same_for_every_number_of_threads(name):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model = torch.nn.Linear(331, 157)
            optimizer = create_optimizer(small(name=name), model)
            assert optimizer.defaults["fused"] is True
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                optimizer.step()
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- schedule


def curve(sched: Sched, epoch: float, epochs: int, peak: float) -> float:
    """The learning rate at a time in epochs, written out."""
    if epoch < sched.warmup_epochs:
        return sched.warmup_lr + (peak - sched.warmup_lr) * epoch / sched.warmup_epochs
    if sched.warmup_prefix:
        epoch, epochs = epoch - sched.warmup_epochs, epochs - sched.warmup_epochs
    if sched.name == "constant":
        return peak
    if sched.name == "step":
        return peak * sched.decay_rate ** math.floor(epoch / sched.decay_epochs + 1e-9)
    if epoch >= epochs:
        return sched.min_lr
    down = (
        (1 - epoch / epochs) ** sched.decay_rate
        if sched.name == "poly"
        else (1 + math.cos(math.pi * epoch / epochs)) / 2
    )
    return sched.min_lr + (peak - sched.min_lr) * down


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("per", ["update", "epoch"])
@pytest.mark.parametrize("name", ["cosine", "poly", "step", "constant"])
def test_schedule_is_a_function_of_the_update(name, per, prefix):
    sched = Sched(name=name, per=per, warmup_epochs=2, warmup_prefix=prefix, min_lr=1e-5, cooldown_epochs=2)
    sched = dataclasses.replace(sched, decay_epochs=3, decay_rate=0.3)
    found = dataclasses.replace(small("timm", layer_decay=0.5), epochs=9, sched=sched)
    model = build(found)
    optimizer = create_optimizer(found, model)
    schedule = create_schedule(found, optimizer, STEPS)
    assert max(g["lr"] for g in optimizer.param_groups) == pytest.approx(1e-6)  # before any update
    order = list(range(found.total_epochs * STEPS))
    random.Random(0).shuffle(order)
    for update in order:
        expected = curve(sched, update / STEPS if per == "update" else update // STEPS, found.epochs, found.optim.lr)
        schedule.update(update)
        assert schedule.lr_at(update) == pytest.approx(expected, rel=1e-9), update
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-9)


def test_warm_up_of_half_an_epoch():
    found = dataclasses.replace(small(), epochs=2, sched=Sched(warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.0))
    schedule = create_schedule(found, create_optimizer(found, build(found)), 8)
    assert [schedule.lr_at(u) / found.optim.lr for u in range(5)] == pytest.approx(
        [0, 0.25, 0.5, 0.75, (1 + 0.5**0.5) / 2]
    )


def test_min_lr_is_the_same_for_head_and_backbone():
    # T2T's transfer script: torch's CosineAnnealingLR over groups with learning rates of their own
    found = recipes.load("t2t_vit_7_cifar100")
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 5e-4}, {"params": [torch.zeros(1)], "lr": 5e-2}])
    schedule = create_schedule(found, optimizer, STEPS)
    published = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 5e-4}, {"params": [torch.zeros(1)], "lr": 5e-2}])
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(published, eta_min=2e-4, T_max=60)
    for epoch in range(60):
        schedule.update(epoch * STEPS + 2)
        rates = [[group["lr"] for group in o.param_groups] for o in (optimizer, published)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-9)
        published.step()
        annealing.step()
    schedule.update(60 * STEPS)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 2e-4]


def test_schedule_goes_on_after_the_optimizer_is_loaded():
    found = small(layer_decay=0.7)
    model = build(found)
    optimizer = create_optimizer(found, model)
    create_schedule(found, optimizer, STEPS).update(40)
    saved, expected = copy.deepcopy(optimizer.state_dict()), [group["lr"] for group in optimizer.param_groups]
    optimizer = create_optimizer(found, model)
    schedule = create_schedule(found, optimizer, STEPS)
    optimizer.load_state_dict(saved)
    schedule.update(99)
    assert [group["lr"] for group in optimizer.param_groups] != expected
    schedule.update(40)
    assert [group["lr"] for group in optimizer.param_groups] == expected


# ---- scaling by the batch


def test_learning_rates_are_scaled_by_the_batch():
    deit, swin = recipes.load("deit_tiny_in1k"), recipes.load("swin_tiny_in1k")
    half = [dataclasses.replace(c, batch=512) for c in (deit, swin)]
    assert learning_rates(half[0]) == pytest.approx({"peak": 5e-4, "warmup": 1e-6, "min": 1e-5})
    assert learning_rates(half[1]) == pytest.approx({"peak": 5e-4, "warmup": 5e-7, "min": 5e-6})


@pytest.mark.parametrize(
    "args, message",
    [
        (
            "--batch 8",
            "config field sched.min_lr is 1e-05, expected at most 7.81e-06, the peak learning rate 7.8125e-06 = ",
        ),
        ("--sched.warmup_lr 4e-4 --batch 128", "config field sched.warmup_lr is 0.0004, expected at most 0.000125"),
        (
            "--optim.backbone_lr_scale 0.001",
            "the peak learning rate 0.001 = 0.0005 x 1024 / 512 x optim.backbone_lr_scale",
        ),
    ],
)
def test_peak_below_an_end(args, message):
    with pytest.raises(InputError) as error:
        learning_rates(config.from_args(recipes.load("deit_tiny_in1k"), args.split()))
    assert message in str(error.value)


def test_description():
    found = config.from_args(recipes.load("swin_tiny_in1k"), ["--dist.micro_batch", "50"])
    optimizer = SimpleNamespace(
        param_groups=[{"params": [0] * 3, "weight_decay": 0.05}, {"params": [0] * 4, "weight_decay": 0}]
    )
    assert describe(found, 1251, World(size=8), optimizer).splitlines() == [
        "peak lr 0.001 = 0.0005 x 1024 / 512, warm-up from 1e-06 in 20 epochs (before the curve)",
        "cosine schedule to 1e-05, set every update, over 300 epochs of 1251 updates",
        "batch 1024 = 8 processes x 4 micro-batches x 32 images",
        "adamw, weight decay 0.05 on 3 tensors, none on 4",
    ]
    text = describe(recipes.load("t2t_vit_7_cifar100"), 390)
    assert "peak lr 0.05, 0.0005 for all but the head\n" in text
    assert "batch 128 = 1 process x 1 micro-batch x 128 images\nmomentum, weight decay 0.0005" in text
    assert "over 300 epochs and 10 of cool-down of" in describe(recipes.load("t2t_vit_7_in1k"), 2502)
