"""T2T-ViT (arXiv 2101.11986) with any position scheme: tokens-to-token patches and a fixed position embedding.

    model = timm.create_model("mpvg_t2t_vit_7_224", scheme="mpvg", drop_path_rate=0.1)

The image becomes tokens in three soft splits (overlapping patches: 7x7 with stride 4, then twice 3x3 with stride 2),
with performer attention (FAVOR+, arXiv 2009.14794) of width 64 after the first two. A plain transformer follows.

The position embedding (PE) is the published one-dimensional sinusoid, a parameter without gradient; position 0 is the
class token's, and patches count from 1 in reading order. The LayerNorms of the PE are learned as everywhere. Ours,
where the papers are silent:

- A model without a class token keeps the patches' positions, 1 to N, so that a patch's PE is the same in every scheme.
- Other grids have the sinusoid of their own number of patches, as the published models of other sizes do; nothing is
  resampled.
- LaPE's join="unshare" is refused: a table of each layer's own would be the same fixed table, which is join="share".
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..modules import FusedAddLayerNorm
from .factory import create, default_cfg
from .mpvg_vit import MPVGVisionTransformer
from .patches import StemPatchEmbed
from .position_scheme import PositionScheme

__all__ = ["MPVGT2TViT", "TokenPerformer", "TokensToToken", "sinusoid"]


def sinusoid(num_patches: int, num_prefix_tokens: int, dim: int) -> Tensor:
    """The fixed PE (1, num_prefix_tokens + num_patches, dim): prefix tokens at position 0, patches from 1.

    Channels 2i and 2i + 1 are sin and cos of position / 10000^(2i / dim).
    """
    position_N = torch.arange(1 - num_prefix_tokens, num_patches + 1, dtype=torch.float64).clamp(min=0)
    channel_D = torch.arange(dim, dtype=torch.float64)
    angle_ND = position_N[:, None] / 10000 ** (2 * (channel_D // 2) / dim)
    return torch.where(channel_D % 2 == 0, angle_ND.sin(), angle_ND.cos())[None]


class TokenPerformer(nn.Module):
    """A transformer layer with performer attention that also changes the width, (B, N, in_dim) to (B, N, dim).

        k, q, v = kqv(LN(x));  y = v + proj(attn(q, k, v));  out = y + mlp(LN(y))
        attn_n = sum_m phi(q_n).phi(k_m) v_m / (sum_m phi(q_n).phi(k_m) + 1e-8)
        phi(x) = exp(W x - |x|^2 / 2) / sqrt(M)      W: M = dim / 2 fixed orthogonal features

    phi and the sums over tokens are computed in fp32 at least, under autocast too: phi reaches e^(M / 2), more than
    fp16 holds, and |x|^2 overflows sooner.

    Args:
        in_dim, dim: width of the input and of the output.
        eps: LayerNorm's epsilon.
        drop: dropout of the attention's projection and of the MLP.
        device, dtype: of the parameters.
    """

    def __init__(
        self, in_dim: int, dim: int, *, eps: float = 1e-5, drop: float = 0.1, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = FusedAddLayerNorm(in_dim, eps, **dd)
        self.kqv = nn.Linear(in_dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        self.norm2 = FusedAddLayerNorm(dim, eps, **dd)
        self.mlp = Mlp(dim, dim, drop=(0.0, drop), **dd)
        self.features = nn.Parameter(torch.empty(dim // 2, dim, **dd), requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the fixed features, orthogonal rows of length sqrt(M); the layers reset themselves."""
        # orthogonal_ needs a QR decomposition, which half precision does not have
        features = torch.empty_like(self.features, dtype=torch.float32)
        self.features.copy_(nn.init.orthogonal_(features, gain=math.sqrt(len(features))))

    def _attend(self, k_BND: Tensor, q_BND: Tensor, v_BND: Tensor) -> Tensor:
        dtype = torch.promote_types(v_BND.dtype, torch.float32)
        w_MD = self.features.to(dtype)

        def phi(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return (x @ w_MD.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(w_MD.shape[0])

        device = v_BND.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # there is none on "meta"
            k_BNM, q_BNM = phi(k_BND), phi(q_BND)
            sum_BM1 = k_BNM.sum(1).unsqueeze(-1)
            return q_BNM @ (k_BNM.mT @ v_BND.to(dtype)) / (q_BNM @ sum_BM1 + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, in_dim) -> (B, N, dim)."""
        k, q, v = self.kqv(self.norm1(x, None)[0]).chunk(3, dim=-1)
        y = self._attend(k, q, v).to(v.dtype)
        y, x = self.norm2(v, self.proj_drop(self.proj(y)))
        return x + self.mlp(y)


class TokensToToken(nn.Module):
    """The T2T module: image (B, C, H, W) to tokens (B, embed_dim, H / 16, W / 16); H and W are multiples of 16.

    Args:
        in_chans, embed_dim: C and the tokens' width.
        token_dim: width of the two performers.
        bias: whether the last projection has one.
        eps, drop, device, dtype: as TokenPerformer's.
    """

    SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
    """Kernel, stride and padding of the soft splits."""

    def __init__(self, in_chans: int, embed_dim: int, *, token_dim: int = 64, bias: bool = True, **kwargs: Any):
        super().__init__()
        widths = [in_chans * self.SPLITS[0][0] ** 2, token_dim * self.SPLITS[1][0] ** 2]
        self.attention1, self.attention2 = (TokenPerformer(width, token_dim, **kwargs) for width in widths)
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.project = nn.Linear(token_dim * self.SPLITS[2][0] ** 2, embed_dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        for split, layer in zip(self.SPLITS, (self.attention1, self.attention2, self.project), strict=True):
            kernel, stride, padding = split
            height, width = (side // stride for side in x.shape[-2:])
            x = layer(F.unfold(x, kernel, padding=padding, stride=stride).mT).mT.unflatten(2, (height, width))
        return x


class MPVGT2TViT(MPVGVisionTransformer):
    """T2T-ViT with a position scheme.

    Args:
        token_dim: width of the T2T module's performers.
        token_drop_rate: dropout in the performers.
        qk_scale: factor of the attention logits in the blocks, head width ** -0.5 if None. The published weights were
            trained with embed_dim ** -0.5: give that to use them.
        All others, and the errors, are MPVGVisionTransformer's. patch_size is 16, and image sides multiples of it.
    """

    published_names = (
        (r"^module\.", ""),
        (r"^tokens_to_token\.", "patch_embed.proj."),
        (r"^(patch_embed\.proj\.attention\d)\.mlp\.0\.", r"\1.mlp.fc1."),
        (r"^(patch_embed\.proj\.attention\d)\.mlp\.2\.", r"\1.mlp.fc2."),
        (r"^(patch_embed\.proj\.attention\d)\.w$", r"\1.features"),
    )

    def __init__(
        self,
        *,
        scheme: str | Mapping[str, Any] | PositionScheme = "mpvg",
        norm_layer: Any = None,
        token_dim: int = 64,
        token_drop_rate: float = 0.1,
        qk_scale: float | None = None,
        **kwargs: Any,
    ):
        scheme = PositionScheme.parse(scheme)
        if scheme.join == "unshare":
            raise ValueError(
                f"position scheme {scheme}: T2T-ViT's table is a fixed sinusoid, so a table of each layer's own would "
                "be that table again; use join='share'"
            )
        if qk_scale is not None and kwargs.get("qk_norm"):
            raise ValueError(f"qk_scale={qk_scale} would be undone by qk_norm=True; leave one of them out")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-5)
        stem = partial(TokensToToken, token_dim=token_dim, drop=token_drop_rate)
        super().__init__(scheme=scheme, norm_layer=norm_layer, embed_layer=partial(StemPatchEmbed, stem=stem), **kwargs)
        self.pos_embed.requires_grad_(False)
        self._set_table()
        if qk_scale is not None:
            for block in self.blocks:
                block.attn.q_norm = _Scale(qk_scale / block.attn.scale)

    def _sinusoid(self, num_patches: int) -> Tensor:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return sinusoid(num_patches, prefix, self.embed_dim).to(self.pos_embed)

    @torch.no_grad()
    def _set_table(self) -> None:
        self.pos_embed.copy_(self._sinusoid(self.patch_embed.num_patches))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation; the published code's for the class token; the table is the sinusoid."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._set_table()

    def _resized(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        return table if tuple(grid) == self.patch_embed.grid_size else self._sinusoid(grid[0] * grid[1])

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another input size: the table is the sinusoid of the new number of patches."""
        super().set_input_size(img_size, patch_size)
        self._set_table()

    def fixed_table(self, table: Tensor) -> Tensor:
        """This model's sinusoid; ValueError where the checkpoint's table is something else."""
        for prefix in (1, 0, self.num_prefix_tokens):
            rows = table.shape[1] - prefix
            expected = sinusoid(rows, prefix, self.embed_dim)
            if table.shape == expected.shape and torch.allclose(table.cpu().double(), expected, atol=1e-2):
                return self.pos_embed.detach()
        raise ValueError(
            f"pos_embed {tuple(table.shape)} of the checkpoint is not the sinusoid of width {self.embed_dim} that "
            "T2T-ViT's table is fixed to; its weights were trained with another table"
        )


class _Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


default_cfgs = generate_default_cfgs(
    {f"mpvg_t2t_vit_{depth}_224": default_cfg(crop_pct=0.9, first_conv=None) for depth in (7, 10, 12, 14, 19, 24)}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MPVGT2TViT:
    return create(MPVGT2TViT, variant, pretrained, **{"qkv_bias": False, **kwargs})


@register_model
def mpvg_t2t_vit_7_224(pretrained: bool = False, **kwargs: Any) -> MPVGT2TViT:
    """T2T-ViT-7 (width 256, 4 heads): 4,310,222 parameters under default, the fixed ones counted."""
    return _create(
        "mpvg_t2t_vit_7_224", pretrained, **{"depth": 7, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0, **kwargs}
    )


@register_model
def mpvg_t2t_vit_10_224(pretrained: bool = False, **kwargs: Any) -> MPVGT2TViT:
    """T2T-ViT-10 (width 256, 4 heads) with a position scheme."""
    return _create(
        "mpvg_t2t_vit_10_224", pretrained, **{"depth": 10, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0, **kwargs}
    )


@register_model
def mpvg_t2t_vit_12_224(pretrained: bool = False, **kwargs: Any) -> MPVGT2TViT:
    """T2T-ViT-12 (width 256, 4 heads) with a position scheme."""
    return _create(
        "mpvg_t2t_vit_12_224", pretrained, **{"depth": 12, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0, **kwargs}
    )


@register_model
def mpvg_t2t_vit_14_224(pretrained: bool = False, **kwargs: Any) -> MPVGT2TViT:
    """T2T-ViT-14 (width 384, 6 heads) with a position scheme."""
    return _create(
        "mpvg_t2t_vit_14_224", pretrained, **{"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0, **kwargs}
    )


@register_model
def mpvg_t2t_vit_19_224(pretrained: bool = False, **kwargs: Any) -> MPVGT2TViT:
    """T2T-ViT-19 (width 448, 7 heads) with a position scheme."""
    return _create(
        "mpvg_t2t_vit_19_224", pretrained, **{"depth": 19, "embed_dim": 448, "num_heads": 7, "mlp_ratio": 3.0, **kwargs}
    )


@register_model
def mpvg_t2t_vit_24_224(pretrained: bool = False, **kwargs: Any) -> MPVGT2TViT:
    """T2T-ViT-24 (width 512, 8 heads) with a position scheme."""
    return _create(
        "mpvg_t2t_vit_24_224", pretrained, **{"depth": 24, "embed_dim": 512, "num_heads": 8, "mlp_ratio": 3.0, **kwargs}
    )
