"""CeiT (arXiv 2103.11816) with any position scheme: a convolutional stem, convolutions in the MLPs, class attention.

    model = timm.create_model("mpvg_ceit_tiny_patch16_224", scheme="mpvg", drop_path_rate=0.1)

A stem makes the patches, and LeFF, with a depth-wise convolution over their grid, stands for the MLP. With a class
token all is as published: LeFF hands the class token on as it gets it (so that the residual adds LN(class token)), and
after the last layer, layer-wise class attention (LCA) makes the class token that the last LayerNorm and the head read,
from those of all layers. The last layer's LeFF then changes only patch tokens that nobody reads: its gradient is zero.

The MPVG paper prints 6.361 M parameters for MPVG-CeiT-Ti. That is the default form's 6,356,904, class token and LCA
counted, and MPVG's 12 LayerNorms. But its pooled models have no class token, and without class tokens there is nothing
for LCA to read. So, ours: pooled schemes have neither, LeFF works on all tokens, and MPVG-CeiT-Ti has 5,913,960
parameters. Also ours: LCA gets no position embedding under lape, as class tokens have no place in a grid.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm, get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..modules import FusedAddLayerNorm
from ..ops.common import join
from .factory import create, default_cfg
from .mpvg_vit import MPVGVisionTransformer
from .patches import StemPatchEmbed

__all__ = ["ImageToTokens", "LayerClassAttention", "LeFF", "MPVGCeiT"]


class ImageToTokens(nn.Sequential):
    """The stem: image (B, in_chans, H, W) to patches (B, embed_dim, H / 16, W / 16); H and W are multiples of 16.

    A 7x7 convolution of stride 2 to 64 channels, BatchNorm, 3x3 max-pool of stride 2, and 4x4 patches of that.
    """

    def __init__(self, in_chans: int, embed_dim: int, *, bias: bool = True, device: Any = None, dtype: Any = None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False, **dd)
        self.bn = nn.BatchNorm2d(64, **dd)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.proj = nn.Conv2d(64, embed_dim, 4, stride=4, bias=bias, **dd)


class LeFF(nn.Module):
    """Locally enhanced feed-forward: 1x1, depth-wise 3x3 and 1x1 convolution, each with a BatchNorm, over the patches.

    Prefix tokens (class token, registers) leave as they came. The arguments are those of timm's Mlp.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = None,
        bias: bool = True,
        drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if norm_layer is not None:
            raise ValueError("scale_mlp_norm=True: LeFF has BatchNorms and takes no norm of its own; leave it out")
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_features, hidden_features, 1, bias=bias, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_features, **dd)
        self.conv2 = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features, bias=bias, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_features, **dd)
        self.conv3 = nn.Conv2d(hidden_features, in_features, 1, bias=bias, **dd)
        self.bn3 = nn.BatchNorm2d(in_features, **dd)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)

    def forward(self, y: Tensor, grid: tuple[int, int]) -> Tensor:
        """y (B, P + H * W, D) for a grid of H by W patches -> the same shape; the P prefix tokens are not changed."""
        prefix, patches = y.split((y.shape[1] - grid[0] * grid[1], grid[0] * grid[1]), dim=1)
        # (B, D, H, W) in channels-last order: a view of the tokens, and so is the way back
        x = patches.unflatten(1, grid).permute(0, 3, 1, 2)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.drop(self.bn3(self.conv3(x)))
        patches = x.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((prefix, patches), 1) if prefix.shape[1] else patches


class _LastQuery(Attention):
    """Attention with one query, the last token's: (B, L, D) -> (B, 1, D)."""

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, -1:], weight[:dim], None if bias is None else bias[:dim])
        kv = F.linear(x, weight[dim:], None if bias is None else bias[dim:])
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class LayerClassAttention(Block):
    """LCA: one more layer, over the class tokens of all layers instead of the tokens of an image, with a plain MLP.

    Args:
        depth: how many layers there are.
        All others are timm's Block's.
    """

    def __init__(self, dim: int, num_heads: int, depth: int, *, device: Any = None, dtype: Any = None, **kwargs: Any):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_layer=_LastQuery, **kwargs, **dd)
        norm_args = {"eps": self.norm1.eps, "bias": self.norm1.bias is not None, **dd}
        self.norm1, self.norm2 = FusedAddLayerNorm(dim, **norm_args), FusedAddLayerNorm(dim, **norm_args)
        self.layer_embed = nn.Parameter(torch.zeros(1, depth, dim, **dd))

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Class tokens after each of the first L layers (B, L, D) -> the model's class token (B, 1, D)."""
        x = class_tokens + self.layer_embed[:, : class_tokens.shape[1]]
        branch = self.attn(self.norm1(x, None)[0])
        y, x = self.norm2(x[:, -1:], branch)
        return x + self.mlp(y)


class MPVGCeiT(MPVGVisionTransformer):
    """CeiT with a position scheme.

    Args and errors: as MPVGVisionTransformer's, but that patch_size is 16, image sides are multiples of it, and
    patch_drop_rate, fix_init and scale_mlp_norm are refused: LeFF needs the whole grid, and is no Mlp.
    """

    class_token_parts = ("lca",)
    published_names = (
        (r"^module\.", ""),
        (r"^i2t\.backbone\.", "patch_embed.proj."),
        (r"^i2t\.proj\.", "patch_embed.proj.proj."),
        (r"^(blocks\.\d+)\.leff\.", r"\1.mlp."),
        (r"^lca\.feedforward\.", "lca.mlp."),
        (r"^pos_layer_embed$", "lca.layer_embed"),
    )

    def __init__(
        self,
        *,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Any = None,
        act_layer: Any = None,
        weight_init: str = "",
        **kwargs: Any,
    ):
        rate = kwargs.get("patch_drop_rate")
        if rate:
            raise ValueError(f"patch_drop_rate={rate}: CeiT's LeFF convolves the whole grid of patches; leave it out")
        if kwargs.get("fix_init"):
            raise ValueError("fix_init=True: CeiT's LeFF has BatchNorms, which undo a rescaling; leave it out")
        both = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "qk_norm": qk_norm, "proj_bias": proj_bias}
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            norm_layer=norm_layer,
            act_layer=act_layer,
            embed_layer=partial(StemPatchEmbed, stem=ImageToTokens),
            mlp_layer=LeFF,
            weight_init="skip",
            **both,
            **kwargs,
        )
        self.lca = None
        if self.has_class_token:
            self.lca = LayerClassAttention(
                embed_dim,
                num_heads,
                depth,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=get_norm_layer(norm_layer) or LayerNorm,
                act_layer=get_act_layer(act_layer) or nn.GELU,
                device=kwargs.get("device"),
                dtype=kwargs.get("dtype"),
                **both,
            )
        if weight_init != "skip":
            self.weight_init_mode = weight_init
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, and the published code's for the class token and the layer embedding."""
        super().init_weights(mode, needs_reset)
        if self.lca is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            nn.init.zeros_(self.lca.layer_embed)

    def _mlp_args(self, image: Tensor) -> tuple:
        return (self.patch_embed.dynamic_feat_size(image.shape[-2:]),)

    def _after_block(self, kept: list[Tensor], x: Tensor, branch: Tensor | None, branch_scale: Tensor | None) -> None:
        if self.lca is not None:
            kept.append(x[:, :1] if branch is None else join(x[:, :1], branch[:, :1], branch_scale))

    def _after_blocks(
        self, kept: list[Tensor], x: Tensor, branch: Tensor | None, branch_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.lca is None:
            return x, branch, branch_scale
        x = x if branch is None else join(x, branch, branch_scale)
        return torch.cat((self.lca(torch.cat(kept, 1)), x[:, 1:]), 1), None, None

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features of these layers do not need; LCA goes with the last norm."""
        if prune_norm:
            self.lca = None
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups; LCA is with the last norm."""
        groups = super().group_matcher(coarse)
        return {**groups, "blocks": [*groups["blocks"], (r"^lca", (99999,))]}


default_cfgs = generate_default_cfgs(
    {
        f"mpvg_ceit_{size}_patch16_224": default_cfg(first_conv="patch_embed.proj.conv")
        for size in ("tiny", "small", "base")
    }
)


@register_model
def mpvg_ceit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MPVGCeiT:
    """CeiT-T (width 192, 3 heads): 6,356,904 parameters under default, 5,913,960 under mpvg."""
    return create(MPVGCeiT, "mpvg_ceit_tiny_patch16_224", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def mpvg_ceit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MPVGCeiT:
    """CeiT-S (width 384, 6 heads) with a position scheme."""
    return create(MPVGCeiT, "mpvg_ceit_small_patch16_224", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def mpvg_ceit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MPVGCeiT:
    """CeiT-B (width 768, 12 heads) with a position scheme."""
    return create(MPVGCeiT, "mpvg_ceit_base_patch16_224", pretrained, **{"embed_dim": 768, "num_heads": 12, **kwargs})
