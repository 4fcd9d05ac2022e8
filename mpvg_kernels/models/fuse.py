"""timm's own VisionTransformer on the fused norms, for models without a position scheme.

    model = fuse_norms(timm.create_model("vit_small_patch16_224", pretrained=True))

The function, the parameters and their names stay. In `forward` and `forward_features` a sub-layer's output is not added
to the stream by a kernel of its own: the next norm reads both, and a last norm before the mean pools too.
A block that is called alone, as under activation checkpointing and in `forward_intermediates`, adds its own output.
"""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..modules import FusedAddLayerNorm, FusedPELayerNormPool
from ..ops.common import join
from .stream import draw_drop_path

__all__ = ["fuse_norms"]


def fuse_norms(model: VisionTransformer) -> VisionTransformer:
    """Fuse the residual adds and LayerNorms of a timm VisionTransformer, in place; returns the model.

    Outputs are the same (bit for bit on the `reference` backend), and so are parameters, their names, and all of timm's
    methods: optimisers, state dicts and saved folders fit before and after. Every pool and `fc_norm`, registers, layer
    scale, drop path and DeiT's distilled models are served.

    Args:
        model: a VisionTransformer, or a VisionTransformerDistilled; one that is fused already is left as it is.

    Raises:
        ValueError: another class, or blocks or norms that can't be fused; it names them, and nothing is changed.
    """
    if isinstance(model, _Fused):
        return model
    if type(model) not in _FUSED:
        raise ValueError(
            f"fuse_norms: the model is a {type(model).__name__}; expected timm's VisionTransformer or "
            "VisionTransformerDistilled themselves, as a subclass may have another forward"
        )
    obstacles = [f"blocks.{i} is a {type(b).__name__}" for i, b in enumerate(model.blocks) if type(b) is not Block]
    norms = {f"blocks.{i}.{n}": getattr(b, n) for i, b in enumerate(model.blocks) if type(b) is Block for n in _NORMS}
    if not isinstance(model.norm, nn.Identity):
        norms["norm"] = model.norm
    obstacles += [
        f"{name} is {norm}"
        for name, norm in norms.items()
        if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None
    ]
    if obstacles:
        more = f" and {len(obstacles) - 3} more" if len(obstacles) > 3 else ""
        raise ValueError(
            f"fuse_norms: {', '.join(obstacles[:3])}{more}; expected timm's Block with LayerNorms that have a scale"
        )
    for block in model.blocks:
        block.__class__ = FusedBlock
        for name in _NORMS:
            setattr(block, name, _fused(FusedAddLayerNorm, getattr(block, name)))
    if "norm" in norms:
        model.norm = _fused(FusedLastNorm, model.norm, pos_norm=False, num_prefix_tokens=model.num_prefix_tokens)
    model.__class__ = _FUSED[type(model)]
    return model


_NORMS = ("norm1", "norm2")


def _fused(kind: type[nn.Module], norm: nn.LayerNorm, **kwargs: Any) -> nn.Module:
    """A fused norm around the very parameters of timm's."""
    fused = kind(len(norm.weight), norm.eps, bias=norm.bias is not None, device="meta", **kwargs).train(norm.training)
    fused.weight, fused.bias = norm.weight, norm.bias
    return fused


class FusedLastNorm(FusedPELayerNormPool):
    """The last norm: its forward is a LayerNorm's, `pooled` the mean over the tokens that are no prefix as well."""

    def forward(self, x: Tensor, branch: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        """x and branch (B, N, D), branch_scale (B,) -> (B, N, D)."""
        return self.tokens(x, None, branch, branch_scale)

    def pooled(self, x: Tensor, branch: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        """The same -> (B, D)."""
        return super().forward(x, None, branch, branch_scale)


class FusedBlock(Block):
    """timm's block, whose norms join the residual branch before them."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        branch: Tensor | None = None,
        branch_scale: Tensor | None = None,
        join_branch: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """One layer on the stream x + branch_scale * branch, (B, N, D).

        Returns:
            The stream; without join_branch x, branch and branch_scale for the next layer, for it to join.
        """
        y, x = self.norm1(x, branch, branch_scale)
        branch = self.ls1(self.attn(y, attn_mask=attn_mask, is_causal=is_causal))
        y, x = self.norm2(x, branch, draw_drop_path(self.drop_path1, branch))
        branch = self.ls2(self.mlp(y))
        branch_scale = draw_drop_path(self.drop_path2, branch)
        return join(x, branch, branch_scale) if join_branch else (x, branch, branch_scale)


class _Fused:
    """What a fused model does otherwise than timm's: it hands branches from block to block."""

    def _run_blocks(
        self, image: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Image (B, C, H, W) to the stream before the last norm: x (B, N, D), and its last branch with its scale."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(image))))
        if self.grad_checkpointing and attn_mask is None and not is_causal:
            return checkpoint_seq(self.blocks, x), None, None
        branch = branch_scale = None
        for block in self.blocks:
            x, branch, branch_scale = block(
                x, attn_mask, is_causal, branch=branch, branch_scale=branch_scale, join_branch=False
            )
        return x, branch, branch_scale

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image (B, C, H, W) to all tokens after the last norm, if it comes before the pool: (B, N, D)."""
        x, branch, branch_scale = self._run_blocks(x, attn_mask, is_causal)
        if isinstance(self.norm, FusedLastNorm):
            return self.norm(x, branch, branch_scale)
        return self.norm(x if branch is None else join(x, branch, branch_scale))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes)."""
        pools = self.global_pool == "avg" and self.attn_pool is None and not self.pool_include_prefix
        if not (pools and isinstance(self.norm, FusedLastNorm)):
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        pooled = self.norm.pooled(*self._run_blocks(x, attn_mask, is_causal))
        return self.head(self.head_drop(self.fc_norm(pooled)))


class FusedVisionTransformer(_Fused, VisionTransformer):
    """timm's VisionTransformer on the fused norms; made by `fuse_norms` only."""


class FusedVisionTransformerDistilled(_Fused, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled on the fused norms; made by `fuse_norms` only."""


_FUSED = {
    VisionTransformer: FusedVisionTransformer,
    VisionTransformerDistilled: FusedVisionTransformerDistilled,
}
