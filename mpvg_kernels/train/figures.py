"""What each task measures: the figures of its training and of its evaluation, and which of them is the one that counts.

Light on purpose: what reads logs and draws curves needs nothing else of a task.
"""

from collections.abc import Callable
from typing import NamedTuple


class Figure(NamedTuple):
    """A number of the log: `train_KEY`, `test_KEY` and `ema_KEY` in the lines of epochs, KEY in those of updates."""

    key: str
    name: str
    """What it is called in sentences and tables."""
    spec: str
    """Format of its value."""
    unit: str = ""
    best: Callable = max
    """max or min: where it is good."""

    def show(self, value: float | None) -> str:
        """The value as it is printed, for example `98.61 %`; `-` for None."""
        return "-" if value is None else f"{value:{self.spec}}{self.unit}"


class Figures(NamedTuple):
    """A task's figures."""

    trained: tuple[Figure, ...]
    """Of the updates, on augmented images; the loss is the first."""
    evaluated: tuple[Figure, ...]
    """Of the held-out images."""
    main: Figure
    """The evaluated one that the best weights are chosen by."""
    counters: tuple[str, ...]
    """What is summed up over updates for `trained`, besides the loss and the number of images."""
    shown: tuple[str, ...]
    """Keys of those that the progress shows."""


LOSS = Figure("loss", "loss", ".4f", best=min)


def _aps(kind: str) -> tuple[Figure, ...]:
    names = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
    return tuple(Figure(f"{kind}_{key}", f"{kind} {name}", ".2f", " %") for key, name in names.items())


_ACCURACY = Figure("acc", "accuracy", ".2f", " %")
_PIXELS = Figure("acc", "pixel accuracy", ".2f", " %")
_MIOU = Figure("miou", "mean IoU", ".2f", " %")
_BOX, _MASK = _aps("box"), _aps("mask")
_PARTS = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
_PART_NAMES = ("RPN objectness loss", "RPN box loss", "class loss", "box loss", "mask loss")

FIGURES = {
    "classification": Figures((LOSS, _ACCURACY), (LOSS, _ACCURACY), _ACCURACY, ("correct",), ("loss", "acc")),
    "detection": Figures(
        (LOSS, *(Figure(key, name, ".4f", best=min) for key, name in zip(_PARTS, _PART_NAMES, strict=True))),
        (*_BOX, *_MASK),
        _BOX[0],
        _PARTS,
        ("loss", "box_ap", "mask_ap"),
    ),
    "segmentation": Figures(
        (LOSS, _PIXELS), (LOSS, _MIOU, _PIXELS), _MIOU, ("right", "pixels"), ("loss", "acc", "miou")
    ),
}


def means(task: str, sums: dict[str, float]) -> dict[str, float]:
    """A task's trained figures from sums over images: `loss` and the counters, and `images`, how many they were."""
    images = sums["images"] or float("nan")
    found = {"loss": sums["loss"] / images}
    match task:
        case "classification":
            found["acc"] = 100 * sums["correct"] / images
        case "segmentation":
            found["acc"] = 100 * sums["right"] / sums["pixels"] if sums["pixels"] else float("nan")
        case "detection":
            found |= {key: sums[key] / images for key in _PARTS}
    return found
