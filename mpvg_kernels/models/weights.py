"""Checkpoints of other models, grids and schemes, converted to fit a model of this package."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._input import get_pretrained_grid_size
from torch import Tensor

if TYPE_CHECKING:
    from .mpvg_vit import MPVGVisionTransformer

__all__ = ["checkpoint_filter_fn", "load_weights"]

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


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: MPVGVisionTransformer, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Convert a checkpoint of timm's DeiT, ViT or Swin, of the original Swin, or of another size of this model, to fit.

    The class token and its PE slot are dropped for a pooled scheme, PE tables are resampled to the model's grid, patch
    weights to its patch size, and the PE LayerNorms of a checkpoint that has none start at the identity; where a Swin
    has no PE table, `model` keeps its own. One log line says what was done. Names and shapes are not checked here:
    `load_weights` does.

    Args:
        state_dict: parameters by name, or a checkpoint with them under "model", "state_dict" or
            "state_dict_ema".
        model: where they are to be loaded.
        grid: the (rows, columns) of patches that the checkpoint's table was learned for. Left out, it is the table's
            shape if that is (1, H, W, D), or taken from timm's record of the checkpoint's image size, or the model's
            own if the number of rows says so.

    Raises:
        ValueError: the grid of the checkpoint's table is not known, or does not fit the table.
    """
    for key in ("model", "state_dict", "state_dict_ema"):
        state_dict = state_dict.get(key, state_dict)
    state_dict = {model.own_name(name): value for name, value in state_dict.items()}
    tables = {k: v for k, v in state_dict.items() if k == "pos_embed" or k.startswith("layer_pos_embed.")}
    out = model.rename_checkpoint({k: v for k, v in state_dict.items() if k not in tables})
    done = ["found no PE table and left the model's own"] if "pos_embed" in out and "pos_embed" not in tables else []

    source_prefix = sum(out[k].shape[1] for k in ("cls_token", "reg_token") if k in out)
    drop_class_token = "cls_token" in out and getattr(model, "cls_token", None) is None
    if drop_class_token:
        parts = ("cls_token", *model.class_token_parts)
        out = {k: v for k, v in out.items() if k.split(".")[0] not in parts}
        done.append(" and ".join(["dropped the class token", *model.class_token_parts]))
    patch_weight = state_dict.get("patch_embed.proj.weight")
    if patch_weight is None:  # a stem, whose stride is the model's own
        patch_weight = torch.empty(0, 0, *model.patch_embed.patch_size)
    shapes = {k: v.shape for k, v in model.named_parameters()}
    for name, table in tables.items():
        new_grid = tuple(model.patch_embed.grid_size)
        fixed = model.fixed_table(table)
        if fixed is not None:
            out[name] = fixed
            if fixed.shape != table.shape:
                done.append(f"recomputed {name} for {new_grid[0]}x{new_grid[1]}")
            continue
        as_map = len(shapes.get(name, ())) == 4  # (1, H, W, D) says its grid
        if as_map:
            new_grid = tuple(shapes[name][1:3])
        if table.ndim == 4:
            old_grid, prefix, table = tuple(table.shape[1:3]), 0, table.flatten(1, 2)
        else:
            old_grid, prefix = _source_grid(model, name, table, source_prefix, grid, patch_weight)
        if drop_class_token and prefix:
            table, prefix = table[:, 1:], prefix - 1
            done.append(f"dropped the class token's row of {name}")
        if old_grid != new_grid:
            table = resample_abs_pos_embed(table, new_size=new_grid, old_size=old_grid, num_prefix_tokens=prefix)
            done.append(f"resampled {name} from {old_grid[0]}x{old_grid[1]} to {new_grid[0]}x{new_grid[1]}")
        out[name] = table.unflatten(1, new_grid) if as_map else table
    if not any(k.endswith("pos_weight") for k in out):
        own = model.state_dict()
        scales = {k: torch.ones_like(v) for k, v in own.items() if k.endswith(".pos_weight")}
        shifts = {k: torch.zeros_like(v) for k, v in own.items() if k.endswith(".pos_bias")}
        if scales:
            out.update(scales | shifts)
            done.append(f"{len(scales)} PE LayerNorms start at the identity")
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
    model: MPVGVisionTransformer, state_dict: Mapping[str, Any], *, grid: tuple[int, int] | None = None
) -> None:
    """Load a checkpoint, converted by `checkpoint_filter_fn`, into `model`; every name and shape must fit.

    Args: as `checkpoint_filter_fn`.

    Raises:
        ValueError: the weights are of another model; the message lists what is missing, unexpected and mis-shaped.
    """
    weights = checkpoint_filter_fn(state_dict, model, grid)
    own = model.state_dict()
    problems = {
        "missing": [k for k in own if k not in weights],
        "unexpected": [k for k in weights if k not in own],
        "mis-shaped": [
            f"{k} {tuple(v.shape)}, expected {tuple(own[k].shape)}"
            for k, v in weights.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    text = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    )
    if text:
        raise ValueError(
            f"these weights are of another model than this one (position scheme {model.scheme}, depth "
            f"{len(model.blocks)}, width {model.embed_dim}, {model.num_classes} classes): {text}"
        )
    model.load_state_dict(weights)
