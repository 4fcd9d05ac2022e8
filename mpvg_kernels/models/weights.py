"""Checkpoints of other models, grids and schemes, converted to fit a model of this package."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from timm.models._input import get_pretrained_grid_size
from torch import Tensor, nn

if TYPE_CHECKING:
    from .mpvg_vit import MPVGVisionTransformer

__all__ = ["checkpoint_filter_fn", "load_checkpoint", "load_weights", "read_checkpoint"]

_logger = logging.getLogger(__name__)


class ConvertsCheckpoints:
    """What `checkpoint_filter_fn` asks a model: names and parts that differ from architecture to architecture."""

    class_token_parts: tuple[str, ...] = ()
    """Names of submodules that only models with a class token have."""

    published_names: tuple[tuple[str, str], ...] = ()
    """Patterns of parameter names in the architecture's published code and what they become here, in this order."""

    def own_name(self, name: str) -> str:
        """This model's name for a parameter of the architecture's published code; other names as they are."""
        for pattern, own in self.published_names:
            name = re.sub(pattern, own, name)
        return name

    def fixed_table(self, table: Tensor) -> Tensor | None:
        """What stands for a checkpoint's PE table where this architecture's is a formula; None: tables are learned."""
        return None

    def rename_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Another checkpoint's parameters, all but the PE tables, under this model's names and sizes."""
        raise NotImplementedError


def parameters_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters by name, which training scripts keep under "model", "state_dict" or "state_dict_ema"."""
    for key in ("model", "state_dict", "state_dict_ema"):
        checkpoint = checkpoint.get(key, checkpoint)
    return checkpoint


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any],
    model: MPVGVisionTransformer,
    grid: tuple[int, int] | None = None,
    *,
    new_pos_norms: Literal["identity", "zero"] = "identity",
) -> dict[str, Tensor]:
    """Convert a checkpoint of timm, DeiT, LaPE or the original Swin, or of another size of this model, to fit.

    The class token and its PE slot are dropped for a pooled scheme; a model that has them and finds none keeps its own.
    The distillation token of DeiT's distilled models is always dropped, with its head.
    PE tables are resampled to the model's grid by rows and columns, patch weights to its patch size. The PE LayerNorms
    of a checkpoint that has none are new; where a Swin has no PE table, `model` keeps its own. One log line says what
    was done. Names and shapes are not checked here: `load_weights` does.

    Args:
        state_dict: parameters by name, or a checkpoint with them under "model", "state_dict" or
            "state_dict_ema".
        model: where they are to be loaded.
        grid: the (rows, columns) of patches that the checkpoint's table was learned for. Left out, it is the table's
            shape if that is (1, H, W, D), or taken from timm's record of the checkpoint's image size, or the model's
            own if the number of rows says so.
        new_pos_norms: how PE LayerNorms that the checkpoint has not start. "identity": scale 1 and shift 0, as in
            training from scratch. "zero": scale 0 and shift 0, so that the model computes what the checkpoint's did,
            if that pooled as this scheme does and add_to_input is the same. Of a chain of them, all but the first then
            have a constant input: their shifts learn first.

    Raises:
        ValueError: the grid of the checkpoint's table is not known, or does not fit the table.
    """
    if new_pos_norms not in ("identity", "zero"):
        raise ValueError(f"new_pos_norms={new_pos_norms!r}; expected 'identity' or 'zero'")
    state_dict = {model.own_name(name): value for name, value in parameters_of(state_dict).items()}
    tables = {k: v for k, v in state_dict.items() if k == "pos_embed" or k.startswith("layer_pos_embed.")}
    out = model.rename_checkpoint({k: v for k, v in state_dict.items() if k not in tables})
    done = ["found no PE table and left the model's own"] if "pos_embed" in out and "pos_embed" not in tables else []

    source_prefix = sum(out[k].shape[1] for k in ("cls_token", "dist_token", "reg_token") if k in out)
    distilled = "dist_token" in out  # by DeiT's teacher; no scheme has a place for it
    if distilled:
        out = {k: v for k, v in out.items() if k.split(".")[0] not in ("dist_token", "head_dist")}
        done.append("dropped the distillation token and its head")
    drop_class_token = "cls_token" in out and getattr(model, "cls_token", None) is None
    if drop_class_token:
        parts = ("cls_token", *model.class_token_parts)
        out = {k: v for k, v in out.items() if k.split(".")[0] not in parts}
        done.append(" and ".join(["dropped the class token", *model.class_token_parts]))
    # (without a table these are weights of something else altogether: load_weights lists what they lack)
    add_class_token = "pos_embed" in tables and "cls_token" not in out and getattr(model, "cls_token", None) is not None
    if add_class_token:
        out["cls_token"] = model.cls_token.detach().clone()
    patch_weight = state_dict.get("patch_embed.proj.weight")
    if patch_weight is None:  # a stem, whose stride is the model's own
        patch_weight = torch.empty(0, 0, *model.patch_embed.patch_size)
    own = model.state_dict()
    for name, table in tables.items():
        if name not in own:  # for load_weights to find
            out[name] = table
            continue
        new_grid = tuple(model.patch_embed.grid_size)
        fixed = model.fixed_table(table)
        if fixed is not None:
            out[name] = fixed
            if fixed.shape != table.shape:
                done.append(f"recomputed {name} for {new_grid[0]}x{new_grid[1]}")
            continue
        as_map = own[name].ndim == 4  # (1, H, W, D) says its grid
        if as_map:
            new_grid = tuple(own[name].shape[1:3])
        if table.ndim == 4:
            old_grid, prefix, table = tuple(table.shape[1:3]), 0, table.flatten(1, 2)
        else:
            old_grid, prefix = _source_grid(model, name, table, source_prefix, grid, patch_weight)
        if distilled and prefix:
            table, prefix = torch.cat([table[:, :1], table[:, 2:]], dim=1), prefix - 1
            done.append(f"dropped the distillation token's row of {name}")
        if drop_class_token and prefix:
            table, prefix = table[:, 1:], prefix - 1
            done.append(f"dropped the class token's row of {name}")
        if old_grid != new_grid:
            table = resample_abs_pos_embed(table, new_size=new_grid, old_size=old_grid, num_prefix_tokens=prefix)
            done.append(f"resampled {name} from {old_grid[0]}x{old_grid[1]} to {new_grid[0]}x{new_grid[1]}")
        if add_class_token and not model.no_embed_class:
            table = torch.cat([own[name][:, :1].to(table), table], dim=1)
        out[name] = table.unflatten(1, new_grid) if as_map else table
    if add_class_token:
        kept = "the class token keeps" if model.no_embed_class else "the class token and its row of pos_embed keep"
        done.append(f"{kept} the model's own initialisation")
    if not any(k.endswith("pos_weight") for k in out):
        scale = float(new_pos_norms == "identity")
        scales = {k: torch.full_like(v, scale) for k, v in own.items() if k.endswith(".pos_weight")}
        shifts = {k: torch.zeros_like(v) for k, v in own.items() if k.endswith(".pos_bias")}
        if scales:
            out.update(scales | shifts)
            start = "the identity" if new_pos_norms == "identity" else "zero"
            done.append(f"{len(scales)} PE LayerNorms start at {start}")
    if done:
        _logger.info("Converted a checkpoint to position scheme %s: %s.", model.scheme, "; ".join(done))
    return out


def _source_grid(
    model: MPVGVisionTransformer,
    name: str,
    table: Tensor,
    num_prefix_tokens: int,
    grid: tuple[int, int] | None,
    patch_weight: Tensor | None,
) -> tuple[tuple[int, int], int]:
    """The grid that a checkpoint's table was learned for, and how many of its rows are prefix tokens'.

    Never a square root: 196 rows are 14x14 or 7x28, and only a record of the image size tells which.
    """
    rows = table.shape[1]
    if grid is not None:
        prefix = rows - grid[0] * grid[1]
        if prefix not in (0, num_prefix_tokens):
            raise ValueError(
                f"{name} of the checkpoint has {rows} rows, which is no grid of {grid[0]}x{grid[1]} patches with or "
                f"without {num_prefix_tokens} prefix tokens"
            )
        return tuple(grid), prefix
    own = tuple(model.patch_embed.grid_size)
    found = []
    for prefix in sorted({num_prefix_tokens, 0}, reverse=True):
        recorded = get_pretrained_grid_size(model, patch_weight, rows - prefix)
        if recorded is not None and "img_size" in getattr(model, "pretrained_model_args", {}):
            return recorded, prefix
        grids = {recorded, own if own[0] * own[1] == rows - prefix else None} - {None}
        found += [(candidate, prefix) for candidate in sorted(grids)]
    if len(found) != 1:
        why = f"it may be any of {[g for g, _ in found]}" if found else "its number of rows fits no known image size"
        raise ValueError(
            f"the grid of the checkpoint's {name} with {rows} rows ({num_prefix_tokens} prefix tokens) is not known: "
            f"{why}; pass grid=(rows, columns) of patches to load_weights or checkpoint_filter_fn"
        )
    return found[0]


def load_weights(
    model: MPVGVisionTransformer,
    state_dict: Mapping[str, Any],
    *,
    grid: tuple[int, int] | None = None,
    new_pos_norms: Literal["identity", "zero"] = "identity",
    new_head: bool = False,
) -> None:
    """Load a checkpoint, converted by `checkpoint_filter_fn`, into `model`; every name and shape must fit.

    Args: as `checkpoint_filter_fn`, and
        new_head: keep the model's own classifier where the checkpoint's has another number of classes, or it has none;
            a log line says so.

    Raises:
        ValueError: the weights are of another model; the message lists what is missing, unexpected and mis-shaped, with
            both shapes, and the options of a model that would take them. `model` is as it was.
    """
    weights = checkpoint_filter_fn(state_dict, model, grid, new_pos_norms=new_pos_norms)
    if new_head:
        weights = keep_own_head(model, weights)
    text = differences(model, weights)
    if text:
        options = _options_that_fit(model, weights)
        raise ValueError(
            f"these weights are of another model than this one (position scheme {model.scheme}, depth "
            f"{len(model.blocks)}, width {model.embed_dim}, {model.num_classes} classes): {text}"
            + (f"; build the model with {' and '.join(options)} to take them" if options else "")
        )
    model.load_state_dict(weights)


def differences(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """What keeps weights from being loaded into `model`: names missing, unexpected and mis-shaped; "" if they fit."""
    own = model.state_dict()
    problems = {
        "missing": [f"{k} {tuple(v.shape)}" for k, v in own.items() if k not in weights],
        "unexpected": [f"{k} {tuple(v.shape)}" for k, v in weights.items() if k not in own],
        "mis-shaped": [
            f"{k} {tuple(v.shape)}, expected {tuple(own[k].shape)}"
            for k, v in weights.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    )


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the parameters of a timm model's classifier, both heads of DeiT's distilled models among them."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else (heads,)
    ids = {id(p) for head in heads for p in head.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in ids]


def keep_own_head(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with the model's own classifier in place of one of another number of classes, or of none.

    A log line says what starts anew.
    """
    own, names = model.state_dict(), classifier_names(model)
    new = [name for name in names if name not in weights or len(weights[name]) != len(own[name])]
    if not new:
        return dict(weights)
    classes = next((f"{len(weights[name])} classes" for name in new if name in weights), "no classifier")
    _logger.info(
        "%s: the checkpoint has %s, the model %d.", f"{' and '.join(new)} start anew", classes, len(own[new[0]])
    )
    return {**weights, **{name: own[name] for name in new}}


def _options_that_fit(model: MPVGVisionTransformer, weights: Mapping[str, Tensor]) -> list[str]:
    """The options by which a model for these weights differs from this one, as far as the weights tell."""
    own = model.state_dict()
    options = []
    depths = _depths(weights)
    if depths and depths != _depths(own):
        options.append(f"depth={depths[0]}" if len(depths) == 1 else f"depths={tuple(depths)}")
    classifier = getattr(model, "default_cfg", {}).get("classifier", "head")
    for option, name, axis in (
        ("embed_dim", "patch_embed.proj.weight", 0),
        ("in_chans", "patch_embed.proj.weight", 1),
        ("num_classes", f"{classifier}.weight", 0),
    ):
        sizes = [t[name].shape[axis] for t in (own, weights) if name in t and t[name].ndim > axis]
        if len(sizes) == 2 and sizes[0] != sizes[1]:
            options.append(f"{option}={sizes[1]}")
    expected, found = ([k.removesuffix(".pos_weight") for k in t if k.endswith(".pos_weight")] for t in (own, weights))
    if found and set(found) != set(expected):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        options.append(f"a position scheme with PE LayerNorms in {', '.join(found[:3])}{more} only")
    return options


def _depths(names: Iterable[str]) -> list[int]:
    """How many blocks there are, in each stage where there are stages."""
    indices: dict[str, set[str]] = {}
    for match in filter(None, (re.match(r"(layers\.\d+\.)?blocks\.(\d+)\.norm1\.weight$", name) for name in names)):
        indices.setdefault(match[1], set()).add(match[2])
    return [len(blocks) for blocks in indices.values()]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's tensors: a .safetensors file, one of torch.save, or a folder that timm wrote.

    Raises:
        ValueError: there is none, it is cut off, or it is in neither format; one sentence.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise ValueError(
                f"{path} is a folder without model.safetensors or pytorch_model.bin; give a file, or a "
                "folder that timm.models.save_for_hf wrote"
            )
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a .safetensors file or one that torch.save wrote")
    kind = "safetensors" if path.suffix == ".safetensors" else "a PyTorch checkpoint"
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's scripts save theirs
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors' and pickle's own types, OSError, RuntimeError for a broken archive
        reason = str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__
        raise ValueError(f"{path} can't be read as {kind} ({reason}); it may be cut off or of another format") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {type(found).__name__}, not tensors by name; save model.state_dict()")
    return found


def load_checkpoint(
    model: MPVGVisionTransformer,
    path: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    new_pos_norms: Literal["identity", "zero"] = "identity",
    new_head: bool = False,
) -> None:
    """`load_weights` from a file or a folder, see `read_checkpoint`.

    Args: `path`, and as `load_weights`.

    Raises:
        ValueError: the file can't be read, or holds the weights of another model; one sentence that names the file.
    """
    state_dict = read_checkpoint(path)
    try:
        load_weights(model, state_dict, grid=grid, new_pos_norms=new_pos_norms, new_head=new_head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
