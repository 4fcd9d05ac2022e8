"""The optimizer with its parameter groups, and the learning rate of every update."""

import inspect
from typing import Any

import timm.optim
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from torch import nn
from torch.optim import Optimizer

from . import InputError, near_matches
from .config import Config, Optim, Sched
from .data.order import accumulation
from .distributed import World
from .model import head_names

# ---- optimizer


def create_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """timm's optimizer of the config's name over the model's trainable parameters, each in one group.

    Args:
        config: its section optim is read, and batch for the learning rate.
        model: on its device, and not wrapped: names and get_classifier() are the model's own.

    Raises:
        InputError: an optimizer that timm does not know or can't make here, or a setting that it does not take.
    """
    fields = config.optim
    if fields.name not in (known := timm.optim.list_optimizers()):
        close = near_matches(fields.name, known)
        raise InputError(f"config field optim.name is {fields.name!r}, which timm does not know{close}")
    info = timm.optim.get_optimizer_info(fields.name)
    if info.second_order:
        raise InputError(f"config field optim.name is {fields.name!r}, which needs second derivatives: choose another")
    try:
        kwargs = _settings(fields, info) | _implementation(fields.name, model)
        lr = learning_rates(config)["peak"]
        groups = parameter_groups(fields, model, lr)
        return timm.optim.create_optimizer_v2(groups, fields.name, lr=lr, weight_decay=0.0, **kwargs)
    except (ImportError, AssertionError, ValueError, TypeError) as error:
        raise InputError(f"config field optim.name is {fields.name!r}, which can't be made: {error}") from error


def _settings(fields: Optim, info: timm.optim.OptimInfo) -> dict[str, Any]:
    """momentum, betas and eps as far as the optimizer takes them."""
    default, kwargs = Optim(), {}
    for name, takes in (
        ("momentum", info.has_momentum),
        ("betas", info.has_betas and info.num_betas == 2),
        ("eps", info.has_eps),
    ):
        value = getattr(fields, name)
        if takes and value is not None:
            kwargs[name] = value
        elif value != getattr(default, name):
            raise InputError(
                f"config field optim.{name} is {value}, expected {getattr(default, name)}: {fields.name} does not take "
                "it"
            )
    return kwargs


def _implementation(name: str, model: nn.Module) -> dict[str, bool]:
    """Torch's fused kernel where there is one; elsewhere the optimizer's own choice, which is foreach on a GPU.

    On a CPU too: for DeiT-Ti's parameters AdamW takes a third of the time, and the result is bitwise the same for every
    number of threads.
    """
    optimizer = timm.optim.get_optimizer_class(name, bind_defaults=False)
    devices = {p.device.type for p in model.parameters()}
    fused = optimizer.__module__.startswith("torch.optim") and "fused" in inspect.signature(optimizer).parameters
    return {"fused": True} if fused and devices <= {"cpu", "cuda"} else {}


def parameter_groups(fields: Optim, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Every trainable parameter in one group: with and without weight decay, by layer, head and backbone.

    No weight decay for biases, 1-D parameters (every LayerNorm, those of the PE too) and the full names of
    model.no_weight_decay(). With a layer decay each group has timm's `lr_scale`; with a backbone_lr_scale each has a
    `lr` of its own, so that the schedule's min_lr is the same for both, as with torch's CosineAnnealingLR.
    """
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if fields.decay_pos_embed:
        undecayed = {name for name in undecayed if "pos_embed" not in name}
    decay = {"weight_decay": fields.weight_decay, "no_weight_decay_list": undecayed}
    if fields.layer_decay is not None:
        return param_groups_layer_decay(model, layer_decay=fields.layer_decay, **decay)
    groups = param_groups_weight_decay(model, **decay)
    if fields.backbone_lr_scale == 1:
        return groups
    names = set(head_names(model))
    head = {id(p) for name, p in model.named_parameters() if name in names}
    parts = [
        group | {"params": [p for p in group["params"] if (id(p) in head) == is_head], "lr": lr * scale}
        for group in groups
        for is_head, scale in ((True, 1.0), (False, fields.backbone_lr_scale))
    ]
    return [group for group in parts if group["params"]]


# ---- schedule


def has_warmup(sched: Sched) -> bool:
    """Whether the schedule begins with a warm-up."""
    return (sched.warmup_epochs if sched.warmup_updates is None else sched.warmup_updates) > 0


def learning_rates(config: Config) -> dict[str, float]:
    """The learning rates in effect: `peak`, `warmup` (that of the first update) and `min`, scaled by the batch.

    Raises:
        InputError: the schedule would not fall to min_lr or rise from warmup_lr, as the batch or the backbone's scale
            makes the peak smaller than either.
    """
    optim, sched = config.optim, config.sched
    scale = 1.0 if optim.lr_base_batch is None else config.batch / optim.lr_base_batch
    peak, ends = optim.lr * scale, scale if sched.scale_with_batch else 1.0
    rates = {"peak": peak, "warmup": sched.warmup_lr * ends, "min": sched.min_lr * ends}
    lowest = peak * min(1.0, optim.backbone_lr_scale)
    for name, used in (("warmup", has_warmup(sched)), ("min", sched.name in ("cosine", "poly"))):
        if used and rates[name] > lowest:
            value, backbone = getattr(sched, f"{name}_lr"), f" x optim.backbone_lr_scale {optim.backbone_lr_scale:g}"
            raise InputError(
                f"config field sched.{name}_lr is {value:g}, expected at most {lowest / ends:.3g}, "
                f"the peak learning rate {_of_batch(config)}{backbone if lowest < peak else ''}"
            )
    return rates


def _of_batch(config: Config) -> str:
    """How the peak comes about: `0.001 = 0.0005 x 1024 / 512`."""
    optim = config.optim
    if optim.lr_base_batch is None:
        return f"{optim.lr:g}"
    peak = optim.lr * config.batch / optim.lr_base_batch
    return f"{peak:g} = {optim.lr:g} x {config.batch} / {optim.lr_base_batch}"


class Schedule:
    """Sets the learning rate of every group; a function of the number of updates alone, with nothing to save.

    Args:
        config: its sections sched and optim are read, and epochs and batch.
        optimizer: whose groups have their peak as `lr`.
        steps: updates of an epoch.

    Raises:
        InputError: see `learning_rates`.
    """

    def __init__(self, config: Config, optimizer: Optimizer, steps: int):
        sched, rates = config.sched, learning_rates(config)
        self.steps = 1 if sched.per == "update" else steps  # updates of a unit of time
        units = steps if sched.per == "update" else 1  # units of time of an epoch
        warmup, total = int(sched.warmup_epochs * units), config.epochs * units
        if sched.warmup_updates is not None:
            warmup = sched.warmup_updates
            if warmup >= total:
                raise InputError(
                    f"config field sched.warmup_updates is {warmup}, expected less than the {total} updates of the run"
                )
        args = {"warmup_t": warmup, "warmup_lr_init": rates["warmup"], "warmup_prefix": sched.warmup_prefix}
        if sched.name in ("cosine", "poly"):
            args |= {"t_initial": total - warmup if sched.warmup_prefix else total, "lr_min": rates["min"]}
        match sched.name:
            case "cosine":
                self.timm = CosineLRScheduler(optimizer, **args)
            case "poly":
                self.timm = PolyLRScheduler(optimizer, power=sched.decay_rate, **args)
            case "step" if sched.decay_at:
                # timm's steps come one unit earlier than they are told.
                decay_t = [round(epoch * units) + 1 for epoch in sched.decay_at]
                self.timm = MultiStepLRScheduler(optimizer, decay_t, decay_rate=sched.decay_rate, **args)
            case "step":
                decay = {"decay_t": sched.decay_epochs * units, "decay_rate": sched.decay_rate}
                self.timm = StepLRScheduler(optimizer, **decay, **args)
            case "constant":
                self.timm = StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **args)
        self.update(0)

    def _rates(self, update: int) -> list[float]:
        return self.timm._get_lr(update // self.steps)  # what timm's step() sets, without its epoch or update switch

    def update(self, done: int) -> None:
        """Set every group's learning rate for the update that follows `done` ones."""
        self.timm.update_groups(self._rates(done))

    def lr_at(self, done: int) -> float:
        """The learning rate of the update that follows `done` ones: the head's, where parts have their own."""
        return max(self._rates(done))


def create_schedule(config: Config, optimizer: Optimizer, steps: int) -> Schedule:
    """The config's schedule for an epoch of `steps` updates, see `Schedule`."""
    return Schedule(config, optimizer, steps)


# ---- what is printed


def describe(config: Config, steps: int, world: World = World(), optimizer: Optimizer | None = None) -> str:  # noqa: B008
    """Lines on the learning rate in effect, the schedule, the batch and the weight decay."""
    optim, sched, rates = config.optim, config.sched, learning_rates(config)
    lines = [f"peak lr {_of_batch(config)}"]
    if optim.backbone_lr_scale != 1:
        lines[0] += f", {rates['peak'] * optim.backbone_lr_scale:g} for all but the head"
    if optim.layer_decay is not None:
        lines[0] += f", x {optim.layer_decay:g} for each layer below the head"
    if has_warmup(sched):
        kind = "before the curve" if sched.warmup_prefix else "within the curve"
        updates = sched.warmup_updates
        length = f"{sched.warmup_epochs:g} epochs" if updates is None else f"{updates} updates"
        lines[0] += f", warm-up from {rates['warmup']:g} in {length} ({kind})"
    falls = f" to {rates['min']:g}" if sched.name in ("cosine", "poly") else ""
    cooldown = f" and {sched.cooldown_epochs} of cool-down" if sched.cooldown_epochs else ""
    lines.append(
        f"{sched.name} schedule{falls}, set every {sched.per}, over {config.epochs} epochs{cooldown} of {steps} updates"
    )
    share = config.batch // world.size
    parts = accumulation(config, world)
    lines.append(
        f"batch {config.batch} = {world.size} {'process' if world.size == 1 else 'processes'} x {parts} "
        f"micro-{'batch' if parts == 1 else 'batches'} x {share // parts} images"
    )
    lines.append(f"{optim.name}, weight decay {optim.weight_decay:g}")
    if optimizer is not None:
        counts = [
            sum(len(group["params"]) for group in optimizer.param_groups if bool(group["weight_decay"]) == decayed)
            for decayed in (True, False)
        ]
        lines[-1] += f" on {counts[0]} tensors, none on {counts[1]}"
    return "\n".join(lines)
