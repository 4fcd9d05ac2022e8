"""timm's VisionTransformer with any position scheme (MPVG, LaPE, ... and their ablations), on the fused norms.

The base of every architecture here whose tokens keep one width: other patch embeddings, blocks and tables are its
subclasses'. Between blocks travel (x, branch, branch_scale, pos), see stream.py.

Parameter names are timm's, plus `pos_weight` and `pos_bias` in the norms that take a position embedding (PE). With
scheme="default" the model is timm's own, on the `reference` backend bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import pad

from ..modules import FusedAddLayerNorm, FusedAddPELayerNorm, FusedPELayerNormPool
from ..ops.common import join
from .patches import CheckedPatchEmbed
from .pos_tables import LastNorm, PosTables
from .position_scheme import PositionScheme
from .stream import draw_drop_path, make_layer_norm, run_checkpointed
from .weights import ConvertsCheckpoints

__all__ = ["MPVGBlock", "MPVGVisionTransformer"]


class MPVGBlock(Block):
    """A pre-norm transformer block whose norms join the residual branch before them and, in norm1, add the PE.

    Args:
        dim, num_heads, and all others of timm's Block. norm_layer must make LayerNorms; the fused norms take their eps.
        scheme: decides whether this layer receives a PE, and how.
        num_prefix_tokens: the first tokens, for which pos has no rows.
        depth: the layer's index, from 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        scheme: PositionScheme,
        num_prefix_tokens: int = 0,
        depth: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__(dim, num_heads, depth=depth, device=device, dtype=dtype, **kwargs)
        norm_args = {"eps": self.norm1.eps, "bias": self.norm1.bias is not None, "device": device, "dtype": dtype}
        self.num_prefix_tokens = num_prefix_tokens
        self.adds_pos = scheme.reaches(depth) and scheme.join != "norm"
        if scheme.reaches(depth) and scheme.join == "norm":
            self.norm1 = FusedAddPELayerNorm(dim, num_prefix_tokens=num_prefix_tokens, **norm_args)
        else:
            self.norm1 = FusedAddLayerNorm(dim, **norm_args)
        self.norm2 = FusedAddLayerNorm(dim, **norm_args)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        branch_scale: Tensor | None = None,
        pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        normed_pos: Tensor | None = None,
        *mlp_args: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One layer on the stream x + branch_scale * branch.

        Args:
            x: (B, N, D), the residual stream without the last sub-layer's output.
            branch: (B, N, D), that output, or None.
            branch_scale: (B,), stochastic depth's factor of the branch for each sample, or None.
            pos: (1, N - num_prefix_tokens, D), the PE this layer starts from; a layer that takes none hands it on.
            attn_mask, is_causal: as in timm's Attention.
            normed_pos: LN'(pos) where it is known already, in place of pos.
            mlp_args: what the MLP takes besides the tokens.

        Returns:
            x, branch, branch_scale, pos for the next layer: pos is LN'(pos) where this layer has an LN'.
        """
        if self.adds_pos:
            x = x + pad(pos, (0, 0, self.num_prefix_tokens, 0))
        if isinstance(self.norm1, FusedAddPELayerNorm):
            given = pos if normed_pos is None else None
            y, x, pos = self.norm1(x, branch, given, branch_scale, normed_pos=normed_pos)
        else:
            y, x = self.norm1(x, branch, branch_scale)
        branch = self.ls1(self.attn(y, attn_mask=attn_mask, is_causal=is_causal))
        y, x = self.norm2(x, branch, draw_drop_path(self.drop_path1, branch))
        branch = self.ls2(self.mlp(y, *mlp_args))
        return x, branch, draw_drop_path(self.drop_path2, branch), pos


class MPVGVisionTransformer(ConvertsCheckpoints, VisionTransformer):
    """timm's VisionTransformer with a position scheme, on the fused norms.

    The norm comes before the pool, in one module, `norm`: its forward pools, its `tokens` does not.

    Args:
        scheme: a PositionScheme, its text ("mpvg", "mpvg(last=8)", "lape") or a mapping of its fields. It decides
            whether there is a class token and what the head reads.
        global_pool: left out, the scheme's; "" for unpooled features.
        norm_layer: one that makes LayerNorms, for its eps and bias ("layernorm", partial(nn.LayerNorm, eps=1e-5)).
        All other options are timm's VisionTransformer's.

    Raises:
        ValueError: an option that contradicts the scheme or that the fused norms cannot serve; each message says which.
    """

    published_names = (
        (r"^module\.", ""),
        # LaPE's: a layer's PE LayerNorm, and under join="unshare" a table for each layer
        (r"^blocks\.(\d+)\.pe_norm\.(weight|bias)$", r"blocks.\1.norm1.pos_\2"),
        (r"^pos_embed0$", "pos_embed"),
        (r"^pos_embed(\d+)$", r"layer_pos_embed.\1"),
    )

    block: Callable[..., MPVGBlock] = MPVGBlock
    """What makes the layers; an architecture with other blocks has its own."""

    def __init__(
        self,
        *,
        scheme: str | Mapping[str, Any] | PositionScheme = "mpvg",
        global_pool: str | None = None,
        class_token: bool | None = None,
        fc_norm: bool | None = None,
        norm_layer: Any = None,
        embed_dim: int = 768,
        depth: int = 12,
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        weight_init: str = "",
        **kwargs: Any,
    ):
        scheme = PositionScheme.parse(scheme)
        scheme.check_depth(depth)
        has_class_token = scheme.pool == "token"
        if global_pool not in (None, "", scheme.pool):
            raise ValueError(_pool_error(scheme, global_pool))
        if class_token not in (None, has_class_token):
            raise ValueError(
                f"position scheme {scheme} pools {'the class token' if has_class_token else 'all tokens'}, so it takes "
                f"class_token={has_class_token}, not {class_token}; leave class_token out, or choose a scheme with "
                f"{'average pooling such as gap' if has_class_token else 'a class token such as default or lape'}"
            )
        _check_options(scheme, fc_norm, kwargs)
        norm = make_layer_norm(norm_layer, embed_dim)
        num_prefix_tokens = has_class_token + reg_tokens
        kwargs.setdefault("embed_layer", CheckedPatchEmbed)
        super().__init__(
            global_pool=scheme.pool if global_pool is None else global_pool,
            class_token=has_class_token,
            fc_norm=False,
            norm_layer=norm_layer,
            embed_dim=embed_dim,
            depth=depth,
            no_embed_class=no_embed_class,
            reg_tokens=reg_tokens,
            weight_init="skip",
            block_fn=partial(self.block, scheme=scheme, num_prefix_tokens=num_prefix_tokens if no_embed_class else 0),
            **kwargs,
        )
        self.scheme = scheme
        if not isinstance(self.norm, nn.Identity):
            self.norm = FusedPELayerNormPool(
                embed_dim,
                norm.eps,
                bias=norm.bias is not None,
                num_prefix_tokens=num_prefix_tokens,
                pos_norm=scheme.last is not None,
                device=kwargs.get("device"),
                dtype=kwargs.get("dtype"),
            )
        tables = range(scheme.first_layer + (not scheme.add_to_input), depth) if scheme.join == "unshare" else ()
        self.pos_tables = PosTables()
        self.layer_pos_embed = nn.ParameterDict({str(i): torch.empty_like(self.pos_embed) for i in tables})
        # As timm: "skip" leaves modules as they initialised themselves, and later calls of init_weights reset them.
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation; a layer's own PE table is drawn as pos_embed is (truncated normal, 0.02)."""
        super().init_weights(mode, needs_reset=needs_reset)
        for table in self.layer_pos_embed.values():
            trunc_normal_(table, std=0.02)

    # ---- forward

    def _resized(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """A PE table for another grid of patches; the table itself where the grid is the model's."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resample_abs_pos_embed(
            table, new_size=grid, old_size=self.patch_embed.grid_size, num_prefix_tokens=prefix
        )

    def _embed(self, image: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Image (B, C, H, W) to tokens x_0 (B, N, D), the table pos_0 (1, N, D), and the layers' own tables by layer.

        Tables have no rows for prefix tokens under no_embed_class.
        """
        x = self.patch_embed(image)
        pos = self.pos_embed
        tables = {int(i): table for i, table in self.layer_pos_embed.items()}
        if self.dynamic_img_size:
            grid = x.shape[1:3]
            pos = self._resized(pos, grid)
            tables = {i: self._resized(table, grid) for i, table in tables.items()}
            x = x.flatten(1, 2)
        if self.scheme.add_to_input and self.no_embed_class:
            x = x + pos
        elif not self.scheme.add_to_input:
            # The stream has the parameters' precision, as x + pos has it: under autocast the patches are narrower.
            x = x.to(torch.promote_types(x.dtype, pos.dtype))
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        if self.scheme.add_to_input and not self.no_embed_class:
            x = x + pos
        return self.norm_pre(self.patch_drop(self.pos_drop(x))), pos, tables

    def _run_blocks(
        self,
        image: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        take: Sequence[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor], list[Tensor]]:
        """Everything before the last norm.

        Args:
            take: layers after which the stream is wanted.
            stop: run the layers before this one only.

        Returns:
            x, branch, branch_scale: the stream, its last branch not joined yet; last_pos: the last norm's PE, without
            rows for prefix tokens, as its keyword pos or normed_pos, or nothing; the taken streams (B, N, D), in the
            order of layers.
        """
        scheme, taken, kept = self.scheme, [], []
        mlp_args = self._mlp_args(image)
        x, pos_0, tables = self._embed(image)
        branch = branch_scale = None
        pos_last = pos_0 if scheme.last == 0 else None
        pos = pos_0 if scheme.layerwise else None
        normed, normed_last = self._normed_pos(pos_0)
        for i, block in enumerate(self.blocks):
            if i == stop:
                break
            args = x, branch, branch_scale, tables.get(i, pos), attn_mask, is_causal, normed.get(i), *mlp_args
            if self.grad_checkpointing:
                x, pos_i = run_checkpointed(block, *args)
                branch = branch_scale = None
            else:
                x, branch, branch_scale, pos_i = block(*args)
            if i in take:
                x = x if branch is None else join(x, branch, branch_scale)
                branch = branch_scale = None
                taken.append(x)
            self._after_block(kept, x, branch, branch_scale)
            if scheme.hierarchical and scheme.join == "norm":
                pos = pos_i
            if i == scheme.last and i:
                pos_last = pos_i
        last_pos = {}
        if normed_last is not None:
            last_pos["normed_pos"] = normed_last
        elif pos_last is not None:
            last_pos["pos"] = pos_last if self.no_embed_class else pos_last[:, self.num_prefix_tokens :]
        return *self._after_blocks(kept, x, branch, branch_scale), last_pos, taken

    def _normed_pos(self, pos_0: Tensor) -> tuple[dict[int, Tensor], Tensor | None]:
        """What is known of LN'(pos) before the first layer (`pos_tables`): by layer, and for the last norm."""
        if pos_0 is not self.pos_embed:  # resampled for this image
            return {}, None
        norms = {i: block.norm1 for i, block in enumerate(self.blocks) if isinstance(block.norm1, FusedAddPELayerNorm)}
        layers, k = list(norms), self.scheme.last
        last = None
        if k is not None and (k == 0 or k in norms) and isinstance(self.norm, FusedPELayerNormPool):
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            last = LastNorm(self.norm, layers.index(k) if k else None, prefix)
        tables = self.pos_tables(
            pos_0, list(norms.values()), training=self.training, hierarchical=self.scheme.hierarchical, last=last
        )
        if tables is None:
            return {}, None
        return dict(zip(layers, tables, strict=False)), tables[-1] if last else None

    # What other architectures add to the layers; nothing here.

    def _mlp_args(self, image: Tensor) -> tuple:
        """What the blocks' MLPs take besides the tokens, for this image (B, C, H, W)."""
        return ()

    def _after_block(self, kept: list[Tensor], x: Tensor, branch: Tensor | None, branch_scale: Tensor | None) -> None:
        """Append to `kept` what `_after_blocks` needs of the stream after a layer."""

    def _after_blocks(
        self, kept: list[Tensor], x: Tensor, branch: Tensor | None, branch_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, branch, branch_scale for the last norm, from those of the last layer and what was kept of the layers."""
        return x, branch, branch_scale

    def _norm_tokens(
        self, x: Tensor, last_pos: dict[str, Tensor], branch: Tensor | None = None, branch_scale: Tensor | None = None
    ) -> Tensor:
        """The last norm without the pool, (B, N, D); the stream itself where the norm was pruned away."""
        if isinstance(self.norm, nn.Identity):
            return x if branch is None else join(x, branch, branch_scale)
        return self.norm.tokens(x, branch=branch, branch_scale=branch_scale, **last_pos)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image (B, C, H, W) to all tokens after the last norm (with its PE, under a scheme that has it), (B, N, D)."""
        x, branch, branch_scale, last_pos, _ = self._run_blocks(x, attn_mask, is_causal)
        return self._norm_tokens(x, last_pos, branch, branch_scale)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes); pooled schemes norm and pool in one kernel."""
        x, branch, branch_scale, last_pos, _ = self._run_blocks(x, attn_mask, is_causal)
        if self.global_pool == "avg" and not isinstance(self.norm, nn.Identity):
            pooled = self.norm(x, branch=branch, branch_scale=branch_scale, **last_pos)
            return self.head(self.head_drop(pooled))
        return self.forward_head(self._norm_tokens(x, last_pos, branch, branch_scale))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Features of chosen layers, with timm's arguments and results.

        Args:
            x: image (B, C, H, W).
            indices: the last n layers if int, these layers if a list, all if None.
            return_prefix_tokens: pair each intermediate with its prefix tokens (B, prefix, D), where the model has any.
            norm: apply the last norm, and its PE under a scheme that has it, to every intermediate.
            stop_early: leave out layers after the last one asked for (and after the one whose PE `norm` needs).
            output_fmt: "NCHW", (B, D, H', W'), or "NLC", (B, H'W', D).
            intermediates_only: return the list alone, without the final tokens.
            output_dict: return {"image_intermediates", "image_intermediates_prefix", "image_features"}.
            attn_mask, is_causal: as in timm's Attention.

        Returns:
            (final tokens (B, N, D), intermediates), the intermediates alone, or a dictionary.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; expected 'NCHW' or 'NLC'")
        take, max_index = feature_take_indices(len(self.blocks), indices)
        stop = None
        if stop_early:
            needs_pos = (norm or not intermediates_only) and not isinstance(self.norm, nn.Identity)
            stop = max(max_index, self.scheme.last or 0 if needs_pos else 0) + 1
        batch, _, height, width = x.shape
        x, branch, branch_scale, last_pos, taken = self._run_blocks(x, attn_mask, is_causal, take, stop)
        if norm:
            taken = [self._norm_tokens(y, last_pos) for y in taken]
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            taken = [y.reshape(batch, *grid, -1).permute(0, 3, 1, 2).contiguous() for y in taken]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0

        if output_dict:
            result: dict[str, Any] = {"image_intermediates": taken}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self._norm_tokens(x, last_pos, branch, branch_scale)
            return result
        if return_prefix_tokens:
            taken = list(zip(taken, prefix, strict=True))
        if intermediates_only:
            return taken
        return self._norm_tokens(x, last_pos, branch, branch_scale), taken

    # ---- changing a built model

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features of these layers do not need; returns their indices (from 0).

        While the norm is kept, so is the layer whose PE the scheme gives to it.
        """
        take, max_index = feature_take_indices(len(self.blocks), indices)
        keep = max(max_index, 0 if prune_norm else self.scheme.last or 0) + 1
        self.blocks = self.blocks[:keep]
        for i in [i for i in self.layer_pos_embed if int(i) >= keep]:
            del self.layer_pos_embed[i]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; 0 classes for none. global_pool may be the scheme's own or "" (unpooled)."""
        if global_pool not in (None, "", self.scheme.pool):
            raise ValueError(_pool_error(self.scheme, global_pool))
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Another input or patch size: PE tables are resampled to the new grid of patches."""
        old_grid = self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        for i, table in self.layer_pos_embed.items():
            resized = resample_abs_pos_embed(
                table,
                new_size=self.patch_embed.grid_size,
                old_size=old_grid,
                num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
            )
            self.layer_pos_embed[i] = nn.Parameter(resized, requires_grad=table.requires_grad)

    def rename_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Another checkpoint's parameters, all but the PE tables, under this model's names and patch size.

        timm's pooled ViTs have the last norm after the pool; its weights become those of the norm before it.
        """
        weights = timm_checkpoint_filter_fn(state_dict, self, adapt_layer_scale=True)
        if not any(name.startswith("norm.") for name in weights):
            weights = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in weights.items()}
        return weights

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay; timm leaves 1-D parameters out by itself."""
        tables = {"pos_embed", *(f"layer_pos_embed.{i}" for i in self.layer_pos_embed)}
        return tables | {name for name in ("cls_token", "reg_token") if getattr(self, name) is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups (for layer-wise learning-rate decay), with every PE table in the stem."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": groups["stem"] + "|layer_pos_embed"}


def _pool_error(scheme: PositionScheme, global_pool: str) -> str:
    return (
        f"global_pool={global_pool!r} contradicts position scheme {scheme}, which pools {scheme.pool!r}; leave it out, "
        "pass '' for unpooled features, or choose another scheme (avg: gap, lape_gap, pvg, mpvg, gap_last; token: "
        "default, lape)"
    )


def _check_options(scheme: PositionScheme, fc_norm: bool | None, options: Mapping[str, Any]) -> None:
    """Refuse timm options that the scheme or the fused norms cannot serve."""
    if fc_norm:
        raise ValueError("fc_norm=True norms after the pool; position schemes norm before it: leave it out")
    if "block_fn" in options:
        raise ValueError("block_fn is the position scheme's own block; it can't be replaced")
    if options.get("pos_embed", "learn") != "learn":
        raise ValueError(f"pos_embed={options['pos_embed']!r}: a position scheme needs the learned table, 'learn'")
    if options.get("patch_drop_rate", 0.0) > 0 and (scheme.layerwise or scheme.last is not None):
        raise ValueError(
            f"patch_drop_rate={options['patch_drop_rate']} drops other tokens in each sample, so that no PE shared by "
            f"the batch fits them in later layers: position scheme {scheme} needs patch_drop_rate=0 (default and gap "
            "allow it)"
        )
    if options.get("pool_include_prefix") and scheme.pool == "avg":
        raise ValueError("pool_include_prefix=True: the fused pool leaves prefix tokens out; leave it at False")
    if not options.get("final_norm", True) and scheme.last is not None:
        raise ValueError(f"final_norm=False removes the norm that position scheme {scheme} gives a PE to")
