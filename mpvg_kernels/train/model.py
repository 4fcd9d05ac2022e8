"""A run's model: built for the data, started from weights, parts of it frozen."""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

from ..models import load_weights
from ..models.dense import DenseModel, create_dense
from ..models.weights import classifier_names, differences, keep_own_head, parameters_of, read_checkpoint
from . import InputError, near_matches
from .config import Config, Model, get

_logger = logging.getLogger(__name__)

# Fields of config.Model that are arguments of the model; the others are about its weights and its use.
ARGUMENTS = (
    *("scheme", "patch_size", "embed_dim", "depth", "num_heads"),
    *("drop_rate", "attn_drop_rate", "drop_path_rate"),
)

# What a ViT-Adapter's arguments are called in config.Adapter.
ADAPTER_ARGUMENTS = {name: name for name in ("window_size", "global_layers", "conv_inplane")}
ADAPTER_ARGUMENTS |= {name: name for name in ("deform_num_heads", "deform_ratio")}
ADAPTER_ARGUMENTS |= {"img_size": "pretrain_size", "interaction_indexes": "interactions"}


def check_name(field: str, name: str) -> None:
    """Raise InputError if timm has no model of that name."""
    try:
        if timm.is_model(name):
            get_pretrained_cfg(name)  # raises for a tag that the model has not
            return
    except (RuntimeError, ValueError) as error:
        raise InputError(f"config field {field} is {name!r}: {first_line(error)}") from None
    close = near_matches(name, timm.list_models())
    raise InputError(f"config field {field} is {name!r}, which timm does not know{close}")


def create_model(config: Config, data: Any, *, start: bool = True) -> nn.Module:
    """The config's model for the data, on the CPU; new weights come from torch's global random stream.

    Args:
        config: its sections model, optim and loss are read.
        data: has input_size (C, H, W), num_classes and preprocessing (timm's pretrained_cfg keys), which are noted in
            the model.
        start: load the weights that the run starts from; False where a checkpoint is to be loaded anyway.

    Raises:
        InputError: the model can't be built so, or the weights do not fit; the message names the field.
    """
    fields = config.model
    if start:
        _check_start(config)
    model = _build(config, data, pretrained=fields.pretrained and start)
    if fields.weights and start:
        load_into(model, "model.weights", fields.weights, fields.name, new_head=True)
    if config.loss.distillation != "none" and hasattr(model, "set_distilled_training"):
        model.set_distilled_training()  # both heads' logits in training mode
    freeze(model, config)
    if fields.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise InputError(
                f"config field model.grad_checkpointing is True, expected False: {fields.name} can't do that"
            ) from None
    return model.to(memory_format=torch.channels_last) if fields.channels_last else model


def create_dense_model(config: Config, data: Any, *, start: bool = True, head_args: dict[str, Any]) -> DenseModel:
    """The config's model for detection or segmentation, see `create_model`.

    model.weights may be a classification run's, for the backbone, or those of a run of the same task.

    Args:
        data: has input_size (C, H, W), num_classes and preprocessing, which is noted in the model's `preprocessing`.
        head_args: options of the task's model.

    Raises:
        InputError: the model can't be built so, or the weights do not fit; the message names the field.
    """
    fields, options = config.model, config.model.adapter
    if start:
        _check_start(config)
    check_name("model.name", fields.name)
    _check_scheme(fields)
    args = {name: getattr(fields, name) for name in ARGUMENTS if getattr(fields, name) is not None}
    for name, field in ADAPTER_ARGUMENTS.items():
        if (value := getattr(options, field)) not in (None, ()):
            args[name] = value
    if options.interactions is not None:
        layers = range(fields.depth or 12)
        if options.interactions > len(layers):
            raise InputError(
                f"config field model.adapter.interactions is {options.interactions}, expected at most the "
                f"{len(layers)} layers"
            )
        groups = np.array_split(layers, options.interactions)
        args["interaction_indexes"] = [(int(group[0]), int(group[-1])) for group in groups]
    if data.input_size[0] != 3:
        args["in_chans"] = data.input_size[0]
    pretrained = fields.pretrained and start
    with _build_errors(fields, args, pretrained):
        backbone_args = {**args, "pretrained": pretrained}
        model = create_dense(
            config.task, fields.name, data.num_classes, backbone_args=backbone_args, head_args=head_args
        )
    model.preprocessing = dict(data.preprocessing)
    if fields.weights and start:
        source = weights_path(fields.weights)
        try:
            if any(name.startswith("backbone.") for name in parameters_of(read_checkpoint(source))):
                model.load_weights(source)
            else:
                with _trained_at(model.trunk, source, fields.name):
                    model.load_backbone(source)
        except ValueError as error:
            raise InputError(f"config field model.weights is {fields.weights!r}: {first_line(error)}") from None
    freeze(model, config)
    if fields.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(memory_format=torch.channels_last) if fields.channels_last else model


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context in which a config's `amp` (none, bf16 or fp16) is in effect."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "none")


def _check_start(config: Config) -> None:
    """A backbone that hardly trains, or not at all, needs weights to start from."""
    if config.model.weights or config.model.pretrained:
        return
    for field, still in (("model.linear_probe", False), ("optim.backbone_lr_scale", 1)):
        if (value := get(config, field)) != still and (value is True or value < 1):
            raise InputError(
                "config field model.weights is None, expected the weights to fine-tune (a file, a folder that timm "
                f"wrote, or a run folder): {field} is {value}; or set model.pretrained"
            )


def _build(config: Config, data: Any, pretrained: bool) -> nn.Module:
    fields = config.model
    check_name("model.name", fields.name)
    _check_scheme(fields)
    channels, *size = data.input_size
    args = {name: getattr(fields, name) for name in ARGUMENTS if getattr(fields, name) is not None}
    args |= {"num_classes": data.num_classes, "in_chans": channels}
    registered = get_pretrained_cfg(fields.name)
    if registered is None or registered.fixed_input_size:  # the others take any size and no img_size
        args["img_size"] = tuple(size)
    with _build_errors(fields, args, pretrained):
        return timm.create_model(
            fields.name, pretrained=pretrained, pretrained_cfg_overlay=dict(data.preprocessing), **args
        )


def _check_scheme(fields: Model) -> None:
    if fields.scheme is not None and not _is_own(fields.name):
        raise InputError(
            f"config field model.scheme is {fields.scheme!r}, expected None: {fields.name} is timm's own model, whose "
            "position embedding has no scheme"
        )


@contextlib.contextmanager
def _build_errors(fields: Model, args: dict[str, Any], pretrained: bool) -> Iterator[None]:
    """An InputError for what goes wrong inside, where the config's model is built with `args`."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:  # the last two from a download
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        names = {name: f"model.{name}" for name in ARGUMENTS}
        names |= {name: f"model.adapter.{field}" for name, field in ADAPTER_ARGUMENTS.items()}
        if unknown and unknown[1] in names and unknown[1] in args:
            field, value = names[unknown[1]], args[unknown[1]]
            raise InputError(f"config field {field} is {value!r}, which {fields.name} does not have") from None
        if pretrained:
            raise InputError(
                f"config field model.pretrained is True, and {fields.name} can't be had so: {first_line(error)}"
            ) from error
        said = first_line(error)
        if not said.startswith(f"{fields.name} can't be built"):
            said = f"{fields.name} can't be built with {args}: {said}"
        raise InputError(said) from error


def _is_own(name: str) -> bool:
    return model_entrypoint(name.partition(".")[0]).__module__.startswith(f"{__name__.partition('.')[0]}.")


def first_line(error: Exception) -> str:
    """An error's message, for the end of a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


# ---- weights


def weights_path(path: str | Path) -> Path:
    """Where the weights are that a user names: a run folder means its last ones."""
    path = Path(path)
    return path / "last" if (path / "run.json").is_file() else path


def load_into(model: nn.Module, field: str, path: str, name: str, *, new_head: bool) -> None:
    """Load weights into a model; a table of another grid is resampled; log lines say what was done.

    Args:
        model: the model.
        field: the config field that names the weights, for errors.
        path: a file, a folder that timm wrote, or a run folder.
        name: the model's timm name, whose default image size is the weights' where no config.json says another.
        new_head: the classifier starts anew where the weights' has another number of classes.

    Raises:
        InputError: the weights can't be read or are of another model.
    """
    source = weights_path(path)
    try:
        weights = read_checkpoint(source)
        with _trained_at(model, source, name):
            if hasattr(model, "own_name"):  # a model of this package
                load_weights(model, weights, new_head=new_head)
            else:
                _load_timm(model, weights, new_head)
    except ValueError as error:
        raise InputError(f"config field {field} is {str(path)!r}: {first_line(error)}") from None
    _logger.info("Loaded the weights of %s.", source)


def _load_timm(model: nn.Module, checkpoint: dict[str, Any], new_head: bool) -> None:
    weights = {name.removeprefix("module."): value for name, value in parameters_of(checkpoint).items()}
    # As timm converts its own: each architecture's file has a function of this name, or needs none.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            weights = convert(weights, model)
        except (KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"these weights are of another model than {type(model).__name__} ({error})") from None
    if new_head:
        weights = keep_own_head(model, weights)
    if text := differences(model, weights):
        raise ValueError(f"these weights are of another model than this {type(model).__name__}: {text}")
    model.load_state_dict(weights)


@contextlib.contextmanager
def _trained_at(model: nn.Module, source: Path, name: str) -> Iterator[None]:
    """Tell timm's and this package's conversions the image size that the weights were trained at.

    196 rows of a table are 14x14 or 7x28; the model's own record is of the size that it is to be trained at now.
    """
    try:
        noted = json.loads(((source if source.is_dir() else source.parent) / "config.json").read_text())
        size = noted.get("model_args", {}).get("img_size") or noted["pretrained_cfg"]["input_size"][1:]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or another program's
        size = (get_pretrained_cfg(name) or get_pretrained_cfg("vit_base_patch16_224")).input_size[1:]
    before = getattr(model, "pretrained_model_args", {})  # timm's wrapper for feature maps has none
    model.pretrained_model_args = {**before, "img_size": tuple(size) if isinstance(size, list) else size}
    try:
        yield
    finally:
        model.pretrained_model_args = before


def head_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the head: a classifier's, or all but the backbone's."""
    return model.head_names() if isinstance(model, DenseModel) else classifier_names(model)


# ---- frozen parts


def freeze(model: nn.Module, config: Config) -> None:
    """Turn off gradients of what the config freezes.

    Raises:
        InputError: a prefix that begins no parameter's name, or nothing is left to train.
    """
    names = dict(model.named_parameters())
    if config.model.linear_probe:
        head = set(head_names(model))
        frozen = names.keys() - head
    else:
        frozen = set()
        for prefix in config.model.freeze:
            found = {name for name in names if _begins(name, prefix)}
            if not found:
                parts = {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)}
                close = near_matches(prefix, sorted(parts))
                raise InputError(f"config field model.freeze has {prefix!r}, which begins no parameter's name{close}")
            frozen |= found
    for name in frozen:
        names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        field = "linear_probe" if config.model.linear_probe else "freeze"
        raise InputError(f"config field model.{field} leaves nothing to train")


def _begins(name: str, prefix: str) -> bool:
    """Whether `prefix` is one of the modules that `name` is in, or all of it: blocks.1 does not begin blocks.10."""
    return f"{name}.".startswith(f"{prefix.rstrip('.')}.")


def train_mode(model: nn.Module, config: Config) -> None:
    """Training mode, but for frozen parts: their dropout stays off, their batch norms keep their statistics."""
    head = {name.rpartition(".")[0] for name in head_names(model)}
    model.train()
    for name, module in model.named_modules():
        if config.model.linear_probe:
            module.training = name in head
        elif any(name and _begins(name, prefix) for prefix in config.model.freeze):
            module.training = False
