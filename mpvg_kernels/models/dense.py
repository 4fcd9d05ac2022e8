"""Models for dense prediction from names: a task's head on a backbone's feature maps, made again from a JSON config.

model = create_dense("segmentation", "mpvg_vit_adapter_tiny", 150, backbone_args={"scheme": "mpvg"})
again = create_dense(**model.dense_config)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import timm

from .dense_model import DenseModel
from .mask_rcnn import MaskRCNN
from .upernet import UperNet

__all__ = ["TASKS", "DenseModel", "create_dense"]

TASKS: dict[str, type[DenseModel]] = {"segmentation": UperNet, "detection": MaskRCNN}


def create_dense(
    task: str,
    backbone: str,
    num_classes: int,
    *,
    backbone_args: Mapping[str, Any] | None = None,
    head_args: Mapping[str, Any] | None = None,
) -> DenseModel:
    """A model for dense prediction; its attribute `dense_config` has these arguments, for `create_dense(**config)`.

    Args:
        task: "segmentation" (UperNet) or "detection" (Mask R-CNN).
        backbone: timm's name of a model whose four feature maps have the strides 4, 8, 16 and 32.
        num_classes: classes, without background and what is ignored.
        backbone_args: options of the backbone as timm.create_model takes them; only what JSON can hold. `pretrained` is
            not noted in dense_config, as a model that is made again has its weights from elsewhere.
        head_args: options of the task's model, see UperNet and MaskRCNN.

    Raises:
        ValueError: an unknown task or backbone, a backbone with other maps, or options that JSON can't hold.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}; expected one of {', '.join(TASKS)}")
    if not timm.is_model(backbone):
        raise ValueError(f"backbone={backbone!r} is no model that timm knows; timm.list_models() lists them")
    try:
        options, head = (json.loads(json.dumps(dict(args or {}))) for args in (backbone_args, head_args))
    except TypeError as error:
        raise ValueError(f"backbone_args and head_args must be what JSON can hold: {error}") from None
    pretrained = options.pop("pretrained", False)
    try:
        maps = timm.create_model(
            backbone, pretrained, features_only=True, **{"out_indices": (-4, -3, -2, -1), **options}
        )
    except (TypeError, RuntimeError) as error:  # an option that it does not have; no feature maps
        raise ValueError(f"{backbone} can't be built for feature maps with {options}: {error}") from None
    try:
        model = TASKS[task](maps, num_classes, **head)
    except TypeError as error:
        raise ValueError(f"{TASKS[task].__name__} can't be built with {head}: {error}") from None
    model.dense_config = {
        "task": task,
        "backbone": backbone,
        "num_classes": num_classes,
        "backbone_args": options,
        "head_args": head,
    }
    return model
