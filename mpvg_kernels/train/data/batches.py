"""What is done to a whole micro-batch in the training process: mixup, CutMix and random erasing, all timm's."""

from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ..config import Config


class BatchAugmentation:
    """Random erasing, then mixup or CutMix, of normalised images and their labels.

    It draws from the global streams, which the caller sets from a key just before (`seed_everything`). What is mixed is
    smoothed here by loss.smoothing, as in timm; labels are left to the loss.

    Call:
        x (B, C, H, W), which may be changed in place, and labels y (B,) -> images, and soft labels (B, classes) fp32
        where the config mixes, else y.
    """

    def __init__(self, config: Config, num_classes: int):
        aug = config.aug
        self.erase = RandomErasing(aug.erase_prob, mode="pixel") if aug.erase_prob else None
        self.mix = None
        if aug.mixup or aug.cutmix:
            self.mix = Mixup(
                mixup_alpha=aug.mixup,
                cutmix_alpha=aug.cutmix,
                prob=aug.mix_prob,
                switch_prob=aug.mix_switch_prob,
                label_smoothing=config.loss.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.erase is not None:
            self.erase.device = x.device
            x = self.erase(x)
        return (x, y) if self.mix is None else self.mix(x, y)
