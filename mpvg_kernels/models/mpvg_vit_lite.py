"""ViT-Lite (arXiv 2104.05704) with any position scheme: small images, and a block that re-normalises the stream.

    model = timm.create_model("mpvg_vit_lite_7_4_32", scheme="mpvg")         32 pixels, 100 classes

    x = x + attn(LN1(x) + pos_l);  x = LN2(x);  x = x + mlp(x)

The published code calls LN1 pre_norm and LN2 norm1; here they have timm's names, norm1 and norm2, and its weights
load. As published, the class token starts at zero, the position embedding (PE) is drawn from a normal of 0.2 and is
subject to weight decay, attention has a dropout of 0.1, and stochastic depth goes up to 0.1.
"""

from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..functional import pe_layer_norm
from ..modules import FusedAddLayerNorm
from .factory import create, default_cfg
from .mpvg_vit import MPVGBlock, MPVGVisionTransformer
from .patches import CheckedPatchEmbed

__all__ = ["MPVGViTLite", "ViTLiteBlock"]


class StreamNorm(FusedAddLayerNorm):
    """h = x + branch_scale * branch; LN(h) is both what the MLP reads and the stream from here on."""

    def forward(self, x: Tensor, branch: Tensor, branch_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and branch (B, N, D), branch_scale (B,) -> LN(h) twice, in h's dtype (under autocast too)."""
        dtype = torch.promote_types(x.dtype, branch.dtype)
        y, _, _ = pe_layer_norm(
            x, self.weight, self.bias, branch=branch, branch_scale=branch_scale, eps=self.eps, out_dtype=dtype
        )
        return y, y


class ViTLiteBlock(MPVGBlock):
    """MPVGBlock whose second norm replaces the stream by its own output."""

    def __init__(self, dim: int, num_heads: int, *, device: Any = None, dtype: Any = None, **kwargs: Any):
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        bias = self.norm2.bias is not None
        self.norm2 = StreamNorm(dim, self.norm2.eps, bias=bias, device=device, dtype=dtype)


class MPVGViTLite(MPVGVisionTransformer):
    """ViT-Lite with a position scheme.

    Args and errors: as MPVGVisionTransformer's; an image size that is no multiple of the patch size is a ValueError.
    """

    block = ViTLiteBlock
    published_names = (
        (r"^module\.", ""),
        (r"^tokenizer\.conv_layers\.0\.0\.", "patch_embed.proj."),
        (r"^classifier\.class_emb$", "cls_token"),
        (r"^classifier\.positional_emb$", "pos_embed"),
        (r"^classifier\.fc\.", "head."),
        (r"^classifier\.norm\.", "norm."),
        (r"^classifier\.blocks\.(\d+)\.norm1\.", r"blocks.\1.norm2."),
        (r"^classifier\.blocks\.(\d+)\.pre_norm\.", r"blocks.\1.norm1."),
        (r"^classifier\.blocks\.(\d+)\.self_attn\.", r"blocks.\1.attn."),
        (r"^classifier\.blocks\.(\d+)\.linear([12])\.", r"blocks.\1.mlp.fc\2."),
    )

    def __init__(self, *, norm_layer: Any = None, **kwargs: Any):
        super().__init__(
            norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-5), embed_layer=CheckedPatchEmbed, **kwargs
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, and the published code's for tables, class token and patches."""
        super().init_weights(mode, needs_reset)
        for table in (self.pos_embed, *self.layer_pos_embed.values()):
            nn.init.normal_(table, std=0.2)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay besides 1-D ones; the PE has it, as in the published recipe."""
        return super().no_weight_decay() & {"cls_token", "reg_token"}


CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)

default_cfgs = generate_default_cfgs(
    {
        f"mpvg_vit_lite_{depth}_4_32": default_cfg(
            num_classes=100, input_size=(3, 32, 32), crop_pct=1.0, mean=CIFAR100_MEAN, std=CIFAR100_STD
        )
        for depth in (6, 7)
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MPVGViTLite:
    sizes = {"patch_size": 4, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0, "qkv_bias": False}
    rates = {"attn_drop_rate": 0.1, "drop_path_rate": 0.1}
    return create(MPVGViTLite, variant, pretrained, **{**sizes, **rates, **kwargs})


@register_model
def mpvg_vit_lite_7_4_32(pretrained: bool = False, **kwargs: Any) -> MPVGViTLite:
    """ViT-Lite-7/4 with a position scheme: 3,740,004 parameters under default, with 100 classes."""
    return _create("mpvg_vit_lite_7_4_32", pretrained, **{"depth": 7, **kwargs})


@register_model
def mpvg_vit_lite_6_4_32(pretrained: bool = False, **kwargs: Any) -> MPVGViTLite:
    """ViT-Lite-6/4 with a position scheme."""
    return _create("mpvg_vit_lite_6_4_32", pretrained, **{"depth": 6, **kwargs})
