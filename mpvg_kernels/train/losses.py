"""The training losses: cross-entropies of labels or soft targets, and distillation from a teacher."""

from collections.abc import Callable
from typing import Any

import timm
import timm.loss
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from . import InputError
from .config import Config
from .model import check_name, first_line, load_into, weights_path


def create_loss(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss from logits (B, classes) fp32 and labels (B,) or soft targets (B, classes): a scalar, fp32.

    Label smoothing is for labels: soft targets come from mixup, which has smoothed them.
    """
    smoothing = config.loss.smoothing
    if config.loss.name == "bce":
        return timm.loss.BinaryCrossEntropy(smoothing=smoothing)
    of_labels, of_targets = nn.CrossEntropyLoss(label_smoothing=smoothing), timm.loss.SoftTargetCrossEntropy()
    return lambda logits, target: (of_labels if target.ndim == 1 else of_targets)(logits, target)


class Distillation:
    """Adds what a teacher says to a loss, as DeiT does (Touvron et al. 2021, equations 2 and 3).

        hard: (1 - alpha) loss + alpha CE(student, argmax teacher)
        soft: (1 - alpha) loss + alpha tau^2 mean KL(softmax(teacher / tau), softmax(student / tau))

    The mean is over images and classes, as in DeiT's code. The student's logits are those of its distillation head, or
    of its only head.

    Args:
        config: its section loss is read, and amp.
        data: the student's; has input_size (C, H, W), num_classes and preprocessing (mean, std).
        device: where the teacher runs.

    Raises:
        InputError: there is no such teacher, its weights can't be had, or it has another number of classes or channels.
    """

    def __init__(self, config: Config, data: Any, device: torch.device):
        self.kind, self.alpha, self.tau = config.loss.distillation, config.loss.distill_alpha, config.loss.distill_tau
        self.autocast = (device.type, torch.float16 if config.amp == "fp16" else torch.bfloat16, config.amp != "none")
        self.teacher = _create_teacher(config, data).to(device).eval().requires_grad_(False)
        cfg = self.teacher.pretrained_cfg
        self.size = tuple(cfg["input_size"][1:])

        def moments(cfg: dict[str, Any]) -> Tensor:
            if len(cfg["mean"]) != data.input_size[0]:
                raise InputError(
                    f"config field loss.teacher is {config.loss.teacher!r}, whose images have {len(cfg['mean'])} "
                    f"channels, expected the data's {data.input_size[0]}"
                )
            return torch.tensor([cfg["mean"], cfg["std"]], device=device).view(2, -1, 1, 1)

        (mean, std), (own_mean, own_std) = moments(data.preprocessing), moments(cfg)
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The teacher's logits (B, classes) fp32 for the student's images (B, C, H, W), normalised and sized anew."""
        x = x * self.scale + self.shift
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype, enabled=enabled):
            return self.teacher(x).float()

    def __call__(self, outputs: Tensor | tuple[Tensor, Tensor], x: Tensor, loss: Tensor) -> Tensor:
        """The loss (scalar) with the teacher's share.

        Args:
            outputs: the student's logits (B, classes), or with a distillation token (logits, distillation logits).
            x: the images (B, C, H, W) that the student got.
            loss: of the student's (first) logits and the targets, scalar.
        """
        student = (outputs[-1] if isinstance(outputs, (tuple, list)) else outputs).float()
        teacher = self.logits(x)
        if self.kind == "hard":
            distillation = F.cross_entropy(student, teacher.argmax(1))
        else:
            student, teacher = F.log_softmax(student / self.tau, 1), F.log_softmax(teacher / self.tau, 1)
            distillation = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / student.numel()
        return loss * (1 - self.alpha) + distillation * self.alpha


def _create_teacher(config: Config, data: Any) -> nn.Module:
    name, weights = config.loss.teacher, config.loss.teacher_weights
    check_name("loss.teacher", name)
    source, args = name, {"pretrained": True}
    if weights is not None:
        folder = weights_path(weights)
        noted = (folder / "config.json").is_file()  # as timm writes it: arguments and preprocessing
        source, args = (f"local-dir:{folder}", {}) if noted else (name, {"num_classes": data.num_classes})
    elif (classes := get_pretrained_cfg(name).num_classes) != data.num_classes:
        raise _other_classes(name, classes, data)
    try:
        teacher = timm.create_model(source, **args)
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError, OSError) as error:
        raise InputError(f"config field loss.teacher is {name!r}, which can't be had: {first_line(error)}") from error
    if teacher.num_classes != data.num_classes:
        raise _other_classes(name, teacher.num_classes, data)
    found = teacher.pretrained_cfg["architecture"]
    if found != name.partition(".")[0]:
        raise InputError(f"config field loss.teacher is {name!r}, expected {found!r}, whose weights {weights} has")
    if weights is not None:
        load_into(teacher, "loss.teacher_weights", weights, name, new_head=False)
    return teacher


def _other_classes(name: str, classes: int, data: Any) -> InputError:
    return InputError(
        f"config field loss.teacher is {name!r} with {classes} classes, expected the data's {data.num_classes}"
    )
