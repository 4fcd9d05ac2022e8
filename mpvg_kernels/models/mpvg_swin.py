"""Swin transformers (arXiv 2103.14030) with a learned absolute position embedding (PE) and any position scheme.

    model = timm.create_model("mpvg_swin_tiny_patch4_window7_224", scheme="mpvg", drop_path_rate=0.2)

Tokens are (B, H, W, D) and tables (1, H, W, D). The relative position biases stay. A layer's PE joins after norm1 and
before the cyclic shift and the window partition, so that one table serves every window:

    attention(roll(LN(x) + LN'(p)))   which is   attention(roll(LN(x)) + roll(LN'(p)))

Parameter names are timm's, plus `pos_embed` and, in the norms that take a PE, `pos_weight` and `pos_bias`. Under
scheme="gap" the model is timm's own with the table added to the patches, on the `reference` backend bit for bit.

The papers say that Swin pools, and that its layer 0 takes a PE under pvg and mpvg. They do not say how a PE gets from
one stage to the next. Ours:

- Layers count over all stages: `mpvg(last=8)` is the fifth layer of Swin-T's third stage.
- A PE goes through the PatchMerging that the tokens go through, with the same weights; nothing is added to the model.
- Where a later stage is given the table itself (the last LayerNorm's pos_0, hierarchical=False, join=share), that is
  pos_0 through the PatchMergings alone. pos_k for the last LayerNorm is the PE that layer k received, through the
  PatchMergings after it.
- Under join=unshare a layer's own table has the grid and the width of its stage.
- With another image size every table is resized once, to its stage's grid, and what follows from it is chained anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from timm.layers import get_norm_layer, resample_abs_pos_embed_nhwc, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from timm.models.swin_transformer import checkpoint_filter_fn as timm_checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import pad

from ..modules import FusedAddLayerNorm, FusedAddPELayerNorm, FusedPELayerNormPool
from ..ops.common import join
from .factory import create, default_cfg
from .position_scheme import NAMED_SCHEMES, PositionScheme
from .stream import draw_drop_path, make_layer_norm, run_and_join
from .weights import ConvertsCheckpoints

__all__ = ["MPVGSwinTransformer", "SwinPositionScheme"]


class SwinPositionScheme(PositionScheme):
    """`PositionScheme` as Swin has it: always pooled, so that `default` and `lape` are `gap` and `lape_gap`; `pvg` and
    `mpvg` include layer 0, the paper's exception."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "token":
            raise ValueError(
                "position scheme: pool='token', but Swin has no class token: its windows and PatchMergings take a full "
                "grid of tokens, and its head pools that grid in every scheme of the paper; use pool='avg'"
            )

    @classmethod
    def named(cls) -> Mapping[str, SwinPositionScheme]:
        return _SWIN_SCHEMES


_SWIN_SCHEMES = {
    name: SwinPositionScheme(
        **{**dataclasses.asdict(scheme), "pool": "avg", "first_layer": 0 if scheme.layerwise else scheme.first_layer}
    )
    for name, scheme in NAMED_SCHEMES.items()
}


def _like(norm: nn.LayerNorm) -> dict[str, Any]:
    """The arguments of a fused norm that stands for timm's."""
    weight = norm.weight
    bias = norm.bias is not None
    return {"dim": len(weight), "eps": norm.eps, "bias": bias, "device": weight.device, "dtype": weight.dtype}


class MPVGSwinBlock(SwinTransformerBlock):
    """timm's block on fused norms: they join the residual branch before them and, in norm1, add the PE."""

    @classmethod
    def convert(cls, block: SwinTransformerBlock, scheme: PositionScheme, layer: int) -> None:
        """Make timm's block one of these, in place: timm's model names the classes of its parts itself."""
        with_pos = scheme.reaches(layer) and scheme.join == "norm"
        block.__class__ = cls
        block.adds_pos = scheme.reaches(layer) and not with_pos
        block.norm1 = (FusedAddPELayerNorm if with_pos else FusedAddLayerNorm)(**_like(block.norm1))
        block.norm2 = FusedAddLayerNorm(**_like(block.norm2))

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        branch_scale: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One layer on the stream x + branch_scale * branch.

        Args:
            x: (B, H, W, D), the residual stream without the last sub-layer's output.
            branch: (B, H, W, D), that output, or None.
            branch_scale: (B,), stochastic depth's factor of the branch for each sample, or None.
            pos: (1, H, W, D), the PE this layer starts from; a layer that takes none hands it on.

        Returns:
            x, branch, branch_scale, pos for the next layer: pos is LN'(pos) where this layer has an LN'.
        """
        if self.adds_pos:
            x = x + pos
        if isinstance(self.norm1, FusedAddPELayerNorm):
            y, x, pos = self.norm1(x, branch, pos, branch_scale)
        else:
            y, x = self.norm1(x, branch, branch_scale)
        branch = self._attn(y)
        y, x = self.norm2(x, branch, draw_drop_path(self.drop_path1, branch))
        branch = self.mlp(y)
        return x, branch, draw_drop_path(self.drop_path2, branch), pos


class MPVGPatchMerging(PatchMerging):
    """timm's PatchMerging on a fused norm, without the copy that timm's padding makes of a grid that needs none."""

    @classmethod
    def convert(cls, merging: PatchMerging) -> None:
        """Make timm's module one of these, in place."""
        merging.__class__ = cls
        merging.norm = FusedAddLayerNorm(**_like(merging.norm))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, ceil(H / 2), ceil(W / 2), out_dim), tokens or a PE."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x, None)[0])


class MPVGSwinStage(SwinTransformerStage):
    """timm's stage, PatchMerging and then blocks, for tokens and the PEs that travel with them."""

    @classmethod
    def convert(cls, stage: SwinTransformerStage, scheme: PositionScheme, first_layer: int) -> None:
        """Make timm's stage one of these, in place; `first_layer` is the index of its first block in the model."""
        stage.__class__ = cls
        stage.scheme, stage.first_layer = scheme, first_layer
        if isinstance(stage.downsample, PatchMerging):
            MPVGPatchMerging.convert(stage.downsample)
        for layer, block in enumerate(stage.blocks, first_layer):
            MPVGSwinBlock.convert(block, scheme, layer)

    def merge_pos(self, pos: Tensor | None) -> Tensor | None:
        """A PE (1, H, W, D) through the tokens' PatchMerging; it keeps its dtype, so that autocast rounds it once."""
        return None if pos is None else self.downsample(pos).to(pos.dtype)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        branch_scale: Tensor | None,
        pos: Tensor | None,
        pos_last: Tensor | None,
        tables: Mapping[int, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """One stage on the stream x + branch_scale * branch.

        Args:
            x, branch, branch_scale: as the previous stage gave them, (B, H, W, D) and (B,).
            pos: (1, H, W, D), the PE that the stage's first layer starts from, before the merging; or None.
            pos_last: (1, H, W, D), the last norm's PE so far, before the merging; or None.
            tables: by layer, tables of its own that take pos's place, on this stage's grid.

        Returns:
            x, branch, branch_scale, pos, pos_last for the next stage.
        """
        scheme = self.scheme
        if branch is not None:
            x, branch, branch_scale = join(x, branch, branch_scale), None, None
        x = self.downsample(x)
        merged = self.merge_pos(pos)
        pos, pos_last = merged, merged if pos_last is pos else self.merge_pos(pos_last)
        for layer, block in enumerate(self.blocks, self.first_layer):
            args = x, branch, branch_scale, tables.get(layer, pos)
            if self.grad_checkpointing:
                x, pos_layer = checkpoint(run_and_join, block, *args)
                branch = branch_scale = None
            else:
                x, branch, branch_scale, pos_layer = block(*args)
            if scheme.hierarchical and scheme.join == "norm":
                pos = pos_layer
            if layer and layer == scheme.last:
                pos_last = pos_layer
        return x, branch, branch_scale, pos, pos_last


class MPVGSwinTransformer(ConvertsCheckpoints, SwinTransformer):
    """timm's SwinTransformer with a learned absolute PE and a position scheme, on the fused norms.

    The last norm and the pool are one module, `norm`: its forward pools, its `tokens` does not.

    Args:
        scheme: a PositionScheme, its text ("mpvg", "mpvg(last=8)", "lape") or a mapping of its fields, with the names
            as `SwinPositionScheme` has them.
        img_size, patch_size: the patches must divide the image; windows need not, padding fills them.
        global_pool: "avg", or "" for unpooled features.
        norm_layer: one that makes LayerNorms, for its eps and bias; timm's default has eps=1e-5.
        All other options are timm's SwinTransformer's. dynamic_img_size (timm's strict_img_size=False) takes images of
            any size that patches divide.

    Raises:
        ValueError: an option that contradicts the scheme or that the fused norms cannot serve; each message says which.
    """

    published_names = ((r"^absolute_", ""),)

    def __init__(
        self,
        *,
        scheme: str | Mapping[str, Any] | PositionScheme = "mpvg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 6, 2),
        norm_layer: Any = nn.LayerNorm,
        weight_init: str = "",
        **kwargs: Any,
    ):
        scheme = SwinPositionScheme.parse(scheme)
        scheme.check_depth(sum(depths))
        _check_pool(scheme, global_pool)
        _check_divides(img_size, patch_size)
        make_layer_norm(norm_layer, 1)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool=global_pool,
            depths=depths,
            norm_layer=get_norm_layer(norm_layer),
            weight_init="skip",
            **kwargs,
        )
        self.scheme = scheme
        for stage, first_layer in zip(self.layers, accumulate(depths, initial=0), strict=False):
            MPVGSwinStage.convert(stage, scheme, first_layer)
        device_dtype = {"device": self.norm.weight.device, "dtype": self.norm.weight.dtype}
        self.norm = FusedPELayerNormPool(**_like(self.norm), pos_norm=scheme.last is not None)
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.patch_embed.grid_size, self.embed_dim, **device_dtype))
        self.layer_pos_embed = nn.ParameterDict()
        if scheme.join == "unshare":
            for layer in range(scheme.first_layer + (not scheme.add_to_input), sum(depths)):
                block = self.blocks[layer]
                self.layer_pos_embed[str(layer)] = torch.zeros(1, *block.input_resolution, block.dim, **device_dtype)
        # As timm: "skip" leaves modules as they initialised themselves, and later calls of init_weights reset them.
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation; PE tables are drawn as the original draws its own (truncated normal, 0.02)."""
        super().init_weights(mode, needs_reset=needs_reset)
        for table in (self.pos_embed, *self.layer_pos_embed.values()):
            trunc_normal_(table, std=0.02)

    @property
    def blocks(self) -> list[MPVGSwinBlock]:
        """The layers of all stages, in the order in which position schemes count them."""
        return [block for stage in self.layers for block in stage.blocks]

    # ---- forward

    def _resized(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """A PE table for another grid; the table itself where the image size is fixed or the grid is its own."""
        return resample_abs_pos_embed_nhwc(table, grid) if self.dynamic_img_size else table

    def _run_stages(
        self, image: Tensor, take: Sequence[int] = (), stop: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
        """Everything before the last norm.

        Args:
            take: stages after which the stream is wanted.
            stop: run the stages before this one only.

        Returns:
            x, branch, branch_scale: the stream, its last branch not joined yet; pos_last: the last norm's PE, or None;
            the taken streams (B, H, W, D), in the order of stages.
        """
        scheme, taken = self.scheme, []
        self._check_size(image)
        x = self.patch_embed(image)
        grid = x.shape[1:3]
        pos = pos_0 = self._resized(self.pos_embed, grid)
        if scheme.add_to_input:
            x = x + pos_0
        branch = branch_scale = None
        pos_last = pos_0 if scheme.last == 0 and not isinstance(self.norm, nn.Identity) else None
        own = {int(layer): table for layer, table in self.layer_pos_embed.items()}
        # (torch.compile in torch 2.11 traces neither max's default nor a generator there)
        last_taker = max([-1, *[i for i in range(len(self.blocks)) if scheme.reaches(i) and i not in own]])
        for i, stage in enumerate(self.layers):
            if i == stop:
                break
            if stage.first_layer > last_taker:
                pos = None
            if i:
                grid = [(size + 1) // 2 for size in grid]
            layers = range(stage.first_layer, stage.first_layer + len(stage.blocks))
            tables = {layer: self._resized(own[layer], grid) for layer in layers if layer in own}
            x, branch, branch_scale, pos, pos_last = stage(x, branch, branch_scale, pos, pos_last, tables)
            if i in take:
                x = x if branch is None else join(x, branch, branch_scale)
                branch = branch_scale = None
                taken.append(x)
        return x, branch, branch_scale, pos_last, taken

    def _norm_tokens(
        self, x: Tensor, pos: Tensor | None, branch: Tensor | None = None, branch_scale: Tensor | None = None
    ) -> Tensor:
        """The last norm without the pool, (B, H, W, D); the stream itself where the norm was pruned away."""
        if isinstance(self.norm, nn.Identity):
            return x if branch is None else join(x, branch, branch_scale)
        return self.norm.tokens(x, pos, branch, branch_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to tokens after the last norm, with its PE under a scheme that has it: (B, H', W', D)."""
        x, branch, branch_scale, pos, _ = self._run_stages(x)
        return self._norm_tokens(x, pos, branch, branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes); norm and pool are one kernel."""
        x, branch, branch_scale, pos, _ = self._run_stages(x)
        if self.global_pool == "avg" and not isinstance(self.norm, nn.Identity):
            return self.head.fc(self.head.drop(self.norm(x, pos, branch, branch_scale)))
        return self.forward_head(self._norm_tokens(x, pos, branch, branch_scale))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, with timm's arguments and results.

        Args:
            x: image (B, C, H, W).
            indices: the last n stages if int, these stages if a list, all if None.
            norm: apply the last norm, and its PE under a scheme that has it, to the last stage's.
            stop_early: leave out stages after the last one asked for.
            output_fmt: "NCHW", the only one.
            intermediates_only: return the list alone.

        Returns:
            (final tokens (B, H', W', D), intermediates (B, D_i, H_i, W_i)), or the intermediates alone. The final
            tokens are normed where the last stage ran.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}; expected 'NCHW'")
        last = len(self.layers) - 1
        take, max_index = feature_take_indices(len(self.layers), indices)
        stop = max_index + 1 if stop_early else None
        x, branch, branch_scale, pos, taken = self._run_stages(x, take, stop)
        if norm and max_index == last:
            taken[-1] = self._norm_tokens(taken[-1], pos)
        taken = [y.permute(0, 3, 1, 2).contiguous() for y in taken]
        if intermediates_only:
            return taken
        if stop_early and max_index < last:
            return x if branch is None else join(x, branch, branch_scale), taken
        return self._norm_tokens(x, pos, branch, branch_scale), taken

    # ---- sizes

    def _check_size(self, image: Tensor) -> None:
        size = tuple(image.shape[-2:])
        if not self.dynamic_img_size:
            if size != tuple(self.patch_embed.img_size):
                raise ValueError(
                    f"image of {_text(size)}: this model takes {_text(self.patch_embed.img_size)}; call "
                    "set_input_size(img_size), or build it with dynamic_img_size=True"
                )
        elif not getattr(self.patch_embed, "dynamic_img_pad", False):
            _check_divides(size, self.patch_embed.patch_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Another input, patch or window size, with timm's arguments: PE tables are resampled to their new grids."""
        _check_divides(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size, patch_size, **kwargs)
        self.pos_embed = _resample(self.pos_embed, self.patch_embed.grid_size)
        for layer, table in self.layer_pos_embed.items():
            self.layer_pos_embed[layer] = _resample(table, self.blocks[int(layer)].input_resolution)

    # ---- changing a built model

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features of these stages do not need; returns their indices (from 0)."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        for layer in [layer for layer in self.layer_pos_embed if int(layer) >= len(self.blocks)]:
            del self.layer_pos_embed[layer]
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; 0 classes for none. global_pool may be "avg" or "" (unpooled)."""
        if global_pool is not None:
            _check_pool(self.scheme, global_pool)
        super().reset_classifier(num_classes, global_pool)

    def rename_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Another checkpoint's parameters, all but the PE tables, under this model's names, patch and window sizes.

        A Swin without an absolute PE has no table to give: the model's own stands in.
        """
        own = dict(self.named_parameters())
        # timm looks up the module of every bias table, and takes the windows of equally many rows for squares.
        kept = {
            name: value
            for name, value in state_dict.items()
            if name.endswith("relative_position_bias_table") and (name not in own or own[name].shape == value.shape)
        }
        others = {name: value for name, value in state_dict.items() if name not in kept}
        return {"pos_embed": self.pos_embed.detach().clone(), **timm_checkpoint_filter_fn(others, self), **kept}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay; timm leaves 1-D parameters out by itself."""
        return super().no_weight_decay() | {"pos_embed", *(f"layer_pos_embed.{i}" for i in self.layer_pos_embed)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups (for layer-wise learning-rate decay), with every PE table in the stem."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": groups["stem"] + "|^pos_embed|^layer_pos_embed"}


def _resample(table: nn.Parameter, grid: tuple[int, int]) -> nn.Parameter:
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    with torch.no_grad():
        return nn.Parameter(resample_abs_pos_embed_nhwc(table, grid), requires_grad=table.requires_grad)


def _text(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)


def _check_divides(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    img_size, patch_size = to_2tuple(img_size), to_2tuple(patch_size)
    sides = list(zip(img_size, patch_size, strict=True))
    if any(size % patch for size, patch in sides):
        smaller = _text([max(size // patch, 1) * patch for size, patch in sides])
        larger = _text([-(-size // patch) * patch for size, patch in sides])
        raise ValueError(
            f"image of {_text(img_size)}: patches of {_text(patch_size)} do not divide it; nearest valid size: "
            f"{smaller if smaller == larger else f'{smaller} or {larger}'}"
        )


def _check_pool(scheme: PositionScheme, global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(
            f"global_pool={global_pool!r} contradicts position scheme {scheme}, which pools 'avg' in Swin; leave it "
            "out, or pass '' for unpooled features"
        )


default_cfgs = generate_default_cfgs(
    {
        f"mpvg_swin_{size}_patch4_window7_224": default_cfg(pool_size=(7, 7), crop_pct=0.9, classifier="head.fc")
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MPVGSwinTransformer:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return create(
        MPVGSwinTransformer,
        variant,
        pretrained,
        out_indices=out_indices,
        **{"patch_size": 4, "window_size": 7, **kwargs},
    )


@register_model
def mpvg_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> MPVGSwinTransformer:
    """Swin-T (width 96) with a position scheme: 28,589,410 parameters under gap, the paper's default."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _create("mpvg_swin_tiny_patch4_window7_224", pretrained, **{**sizes, **kwargs})


@register_model
def mpvg_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> MPVGSwinTransformer:
    """Swin-S (width 96, 18 layers in the third stage) with a position scheme."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    return _create("mpvg_swin_small_patch4_window7_224", pretrained, **{**sizes, **kwargs})


@register_model
def mpvg_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> MPVGSwinTransformer:
    """Swin-B (width 128, 18 layers in the third stage) with a position scheme."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create("mpvg_swin_base_patch4_window7_224", pretrained, **{**sizes, **kwargs})
