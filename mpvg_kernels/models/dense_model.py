"""What models on a backbone's feature maps share: a check of the maps, timm's interfaces, the backbone's weights."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Format
from torch import Tensor, nn

from .weights import ConvertsCheckpoints, checkpoint_filter_fn, differences, parameters_of, read_checkpoint

__all__ = ["STRIDES", "DenseModel"]

_logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)
"""Image pixels to a pixel of each feature map, a side."""


class DenseModel(nn.Module):
    """A backbone that gives feature maps of strides 4, 8, 16 and 32, and what a subclass makes of them.

    Args:
        backbone: images (B, C, H, W) of any size to four maps, from fine to coarse; timm's features_only models.
        num_classes: classes, without background and what is ignored.

    Raises:
        ValueError: a backbone with other maps.
    """

    dense_config: dict[str, Any] | None = None
    """What `create_dense` was called with, as JSON has it; None for a model that was built by hand."""

    class_layers: tuple[str, ...] = ()
    """Layers with an output for each class, which start anew where weights are of other classes."""

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        strides = tuple(backbone.feature_info.reduction())
        if strides != STRIDES:
            raise ValueError(
                f"the backbone gives maps of strides {strides}, expected {STRIDES}; choose another, or by out_indices "
                "those of its maps that have them"
            )
        self.backbone, self.num_classes = backbone, num_classes

    @property
    def channels(self) -> list[int]:
        """Channels of the four maps."""
        return self.backbone.feature_info.channels()

    @property
    def trunk(self) -> nn.Module:
        """The backbone itself, without timm's wrapper for feature maps."""
        return getattr(self.backbone, "model", self.backbone)

    @property
    def _prefix(self) -> str:
        return "backbone." if self.trunk is self.backbone else "backbone.model."

    def head_names(self) -> list[str]:
        """Names of all parameters but the backbone's."""
        return [name for name, _ in self.named_parameters() if not name.startswith("backbone.")]

    def features(self, images: Tensor) -> list[Tensor]:
        """The four maps of images (B, C, H, W), padded below and to the right to multiples of 32."""
        down, right = (-side % STRIDES[-1] for side in images.shape[-2:])
        maps = self.backbone(F.pad(images, (0, right, 0, down)) if down or right else images)
        if getattr(self.backbone, "output_fmt", Format.NCHW) == Format.NHWC:  # timm's Swin and its like
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return maps

    # ---- timm's interfaces

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing of the backbone's layers."""
        self.trunk.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay: the backbone's; timm leaves 1-D parameters out by itself."""
        own = getattr(self.trunk, "no_weight_decay", set)
        return {self._prefix + name for name in own()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the backbone's, and above them one with all that they leave out and the heads.

        As published, a ViT-Adapter's own parts are in the last group too: they have the full learning rate.
        """
        if not hasattr(self.trunk, "group_matcher"):
            raise ValueError(
                f"the backbone, a {type(self.trunk).__name__}, tells no layers: train it without layer-wise learning "
                "rates, or build it with feature_cls='getter', where timm can"
            )
        start = re.escape(self._prefix)

        def below(pattern: str) -> str:
            """The pattern for names that begin with the prefix; timm's are matched at the start, with or without ^."""
            anywhere = re.sub(r"(?<!\[)\^", "", pattern)
            return f"{start}(?:{anywhere})"

        return {
            name: below(spec) if isinstance(spec, str) else [(below(pattern), order) for pattern, order in spec]
            for name, spec in self.trunk.group_matcher(coarse).items()
            if spec is not None
        }

    # ---- weights

    def load_backbone(
        self,
        path: str | Path,
        *,
        grid: tuple[int, int] | None = None,
        new_pos_norms: Literal["identity", "zero"] = "identity",
    ) -> None:
        """Load the weights of a classification model into the backbone; what it has no place for is left out and said.

        Args:
            path: a file, or a folder that timm wrote, see `read_checkpoint`.
            grid, new_pos_norms: as `checkpoint_filter_fn`; for models of this package.

        Raises:
            ValueError: the file can't be read, or holds the weights of another model; one sentence that names the file.
        """
        weights = parameters_of(read_checkpoint(path))
        try:
            if isinstance(self.trunk, ConvertsCheckpoints):
                weights = checkpoint_filter_fn(weights, self.trunk, grid, new_pos_norms=new_pos_norms)
            self._load(weights)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        _logger.info("Loaded the backbone's weights from %s.", path)

    def load_weights(self, path: str | Path) -> None:
        """Load the weights of another such model; what has an output for each class starts anew for other classes.

        Args:
            path: a file, or a folder with one, see `read_checkpoint`.

        Raises:
            ValueError: the file can't be read, or holds the weights of another model; one sentence that names the file.
        """
        weights, own = parameters_of(read_checkpoint(path)), self.state_dict()
        new = [
            name
            for name in own
            if name.startswith(self.class_layers) and name in weights and weights[name].shape != own[name].shape
        ]
        weights |= {name: own[name] for name in new}
        if text := differences(self, weights):
            raise ValueError(f"{path}: these weights are of another model than this {type(self).__name__}: {text}")
        self.load_state_dict(weights)
        if new:
            _logger.info(
                "%s start anew: the checkpoint has other classes than these %d.", ", ".join(new), self.num_classes
            )

    def _load(self, weights: dict[str, Tensor]) -> None:
        parts = {name.split(".")[0] for name in self.trunk.state_dict()}
        left_out = sorted({name.split(".")[0] for name in weights} - parts)
        weights = {name: value for name, value in weights.items() if name.split(".")[0] in parts}
        if text := differences(self.trunk, weights):
            raise ValueError(f"these weights are of another model than this {type(self.trunk).__name__}: {text}")
        self.trunk.load_state_dict(weights)
        if left_out:
            _logger.info("Left out, as the backbone has no place for it: %s.", ", ".join(left_out))
