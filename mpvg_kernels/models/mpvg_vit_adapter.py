"""ViT-Adapter (arXiv 2205.08534) around MPVG's ViT blocks: features of strides 4, 8, 16 and 32 for dense prediction.

model = timm.create_model("mpvg_vit_adapter_tiny", scheme="mpvg", window_size=14, global_layers=(2, 5, 8, 11))
c1, c2, c3, c4 = model(torch.randn(1, 3, 480, 640))

Beside the tokens x of the ViT run features c of a small convolutional network, at strides 8, 16 and 32. In front of
every group of layers an injector adds to x what it finds in c; behind the group an extractor adds to c what it finds in
x. Both find by deformable attention:

    x = x + gamma * attn(LN(x), LN(c))      injector; gamma starts at zero
    x, pos = layers(x, pos)                 with the PE of the position scheme, as in classification
    c = c + attn(LN(c), LN(x));  c = c + convffn(LN(c))      extractor

All these norms join the branch before them (see stream.py), so that no sum is a pass of its own.

The paper on position embeddings has no code for this. Ours: there is no class token, so that `default` is `gap` and
`lape` is `lape_gap`, as in Swin; pos_0 is resized once to the image's grid, and every LN'_l(pos) follows from the
resized one; the tokens that are added to the last feature maps get LN(x) + LN'(pos_0) under mpvg and LN(x) under pvg,
and go there as they are under the schemes that the paper does not change (default, lape), as ViT-Adapter has it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..modules import FusedAddLayerNorm
from ..ops.common import join
from .deformable_attention import DeformableAttention, Grid, reference_points
from .factory import create, default_cfg
from .mpvg_vit import MPVGVisionTransformer
from .position_scheme import NAMED_SCHEMES, PositionScheme
from .stream import draw_drop_path, run_and_join

__all__ = ["AdapterPositionScheme", "MPVGViTAdapter"]

_logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)
PATCH = 16
ADAPTER = ("level_embed", "spm", "interactions", "up", "feature_norms")
"""The parts that a classification model does not have."""


class AdapterPositionScheme(PositionScheme):
    """`PositionScheme` without class tokens: `default` and `lape` are `gap` and `lape_gap`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "token":
            raise ValueError("position scheme: pool='token', but a ViT-Adapter has no class token; use pool='avg'")

    @classmethod
    def named(cls) -> Mapping[str, AdapterPositionScheme]:
        return _SCHEMES


_SCHEMES = {
    name: AdapterPositionScheme(**{**dataclasses.asdict(scheme), "pool": "avg"})
    for name, scheme in NAMED_SCHEMES.items()
}


def _norms_features(scheme: PositionScheme) -> bool:
    """Whether tokens pass the last norm: where it gets a PE, and in PVG, which the paper compares with that."""
    return scheme.last is not None or (scheme.add_to_input and scheme.layerwise)


class Stream(NamedTuple):
    """A residual stream x + scale * branch, (B, ..., D), whose last branch the next norm joins."""

    x: Tensor
    branch: Tensor | None = None
    scale: Tensor | None = None

    def joined(self) -> Tensor:
        return self.x if self.branch is None else join(*self)


class SpatialPrior(nn.Module):
    """A convolutional stem: image (B, C, H, W) to maps (B, D, H/s, W/s) of the strides 4, 8, 16, 32.

    Args:
        in_chans: image channels C.
        width: channels of the stem's first stage.
        dim: D.
    """

    def __init__(self, in_chans: int, width: int, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}

        def conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **kwargs),
                nn.BatchNorm2d(outputs, **kwargs),
                nn.ReLU(inplace=True),
            ]

        self.stem = nn.Sequential(
            *conv(in_chans, width, 2), *conv(width, width, 1), *conv(width, width, 1), nn.MaxPool2d(3, 2, 1)
        )
        self.conv2 = nn.Sequential(*conv(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*conv(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*conv(4 * width, 4 * width, 2))
        for i, channels in enumerate((width, 2 * width, 4 * width, 4 * width), 1):
            self.add_module(f"fc{i}", nn.Conv2d(channels, dim, 1, **kwargs))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))


class ConvFFN(nn.Module):
    """An MLP on features of several maps with a depth-wise 3x3 convolution in it, the same for all maps."""

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **kwargs)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **kwargs)
        self.fc2 = nn.Linear(hidden, dim, **kwargs)

    def forward(self, c: Tensor, grids: Sequence[Grid]) -> Tensor:
        """c (B, sum of rows * columns, D) -> the same shape."""
        maps = to_maps(self.fc1(c), grids)
        c = torch.cat([self.dwconv(m).flatten(2) for m in maps], -1).transpose(1, 2)
        return self.fc2(F.gelu(c))


def to_maps(c: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """(B, sum of rows * columns, D) -> one (B, D, rows, columns) for each grid."""
    parts = c.transpose(1, 2).split([rows * columns for rows, columns in grids], -1)
    return [part.unflatten(-1, grid).contiguous() for part, grid in zip(parts, grids, strict=True)]


class Injector(nn.Module):
    """x = x + gamma * attn(LN(x), LN(c)): tokens take from the features of all three strides."""

    def __init__(self, dim: int, init_values: float, eps: float, attention: dict[str, Any], **kwargs: Any):
        super().__init__()
        self.query_norm = FusedAddLayerNorm(dim, eps, **kwargs)
        self.feat_norm = FusedAddLayerNorm(dim, eps, **kwargs)
        self.attn = DeformableAttention(dim, 3, **attention, **kwargs)
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values), **kwargs))

    def forward(self, x: Stream, c: Stream, grids: Sequence[Grid], grid: Grid) -> tuple[Stream, Stream]:
        """x of (B, rows, columns, D) on `grid`, c of (B, N, D) on `grids` -> both, what was found as x's branch."""
        y, stream = self.query_norm(*x)
        features, c = self.feat_norm(*c)
        points = reference_points([grid], y.device)
        found = self.attn(y.flatten(1, 2), points, features, grids).unflatten(1, grid)
        return Stream(stream, self.gamma * found), Stream(c)


class Extractor(nn.Module):
    """c = c + attn(LN(c), LN(x)); c = c + convffn(LN(c)): features take from the tokens."""

    def __init__(self, dim: int, hidden: int, drop_path: float, eps: float, attention: dict[str, Any], **kwargs: Any):
        super().__init__()
        self.query_norm = FusedAddLayerNorm(dim, eps, **kwargs)
        self.feat_norm = FusedAddLayerNorm(dim, eps, **kwargs)
        self.attn = DeformableAttention(dim, 1, **attention, **kwargs)
        self.ffn_norm = FusedAddLayerNorm(dim, eps, **kwargs)
        self.ffn = ConvFFN(dim, hidden, **kwargs)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Stream, x: Stream, grids: Sequence[Grid], grid: Grid) -> tuple[Stream, Stream]:
        """c of (B, N, D) on `grids`, x of (B, rows, columns, D) on `grid` -> both, the MLP's output as c's branch."""
        y, stream = self.query_norm(*c)
        features, x = self.feat_norm(*x)
        points = reference_points(grids, y.device)
        found = self.attn(y, points, features.flatten(1, 2), [grid])
        y, stream = self.ffn_norm(stream, found)
        branch = self.ffn(y, grids)
        return Stream(stream, branch, draw_drop_path(self.drop_path, branch)), Stream(x)


class Interaction(nn.Module):
    """What stands around a group of layers: an injector before it, an extractor behind it, the last with two more."""

    def __init__(self, injector: Injector, extractor: Extractor, more: Sequence[Extractor] = ()):
        super().__init__()
        self.injector, self.extractor = injector, extractor
        self.extra_extractors = nn.ModuleList(more) if more else None


class GridAttention(Attention):
    """timm's attention on a grid of tokens, over all of them or in windows.

    As ViT-Adapter has it, a window that reaches beyond the grid is filled with keys and values of zero that take part.
    """

    window_size: int | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, rows, columns, D) -> the same shape."""
        batch, rows, columns, _ = x.shape
        size = self.window_size
        if size is None:
            return super().forward(x.flatten(1, 2), attn_mask, is_causal).unflatten(1, (rows, columns))
        qkv = F.pad(self.qkv(x), (0, 0, 0, -columns % size, 0, -rows % size))
        down, across = qkv.shape[1] // size, qkv.shape[2] // size
        windows = qkv.view(batch, down, size, across, size, 3, self.num_heads, self.head_dim)
        # (3, B, down, across, heads, size * size, head_dim)
        q, k, v = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3).unbind(0)
        y = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        y = y.view(batch, down, across, self.num_heads, size, size, self.head_dim).permute(0, 1, 4, 2, 5, 3, 6)
        y = y.reshape(batch, down * size, across * size, self.attn_dim)[:, :rows, :columns]
        return self.proj_drop(self.proj(self.norm(y)))


class MPVGViTAdapter(MPVGVisionTransformer):
    """ViT-Adapter with a position scheme: an image of any size to features of strides 4, 8, 16 and 32.

    Sides are padded below and to the right to multiples of 32; the features are those of the padded image.

    Args:
        scheme: a PositionScheme, its text or a mapping of its fields, with the names as `AdapterPositionScheme` has
            them.
        interaction_indexes: the groups of layers, first and last of each; together all layers in order.
        window_size: side of the attention's windows in tokens; None: every layer sees the whole image.
        global_layers: layers that see the whole image where window_size is set.
        conv_inplane: channels of the spatial prior's first stage.
        deform_num_heads, n_points, deform_ratio: heads, points and relative width of the deformable attention.
        cffn_ratio: hidden width of the extractors' MLPs, relative to the model's.
        init_values: start of the injectors' gamma and, with `layer_scale`, 1 of the blocks' scales. ViT-Adapter's own
            code has both.
        img_size: the size that pos_embed is made for (the classification run's), not that of the images.
        All others are MPVGVisionTransformer's.

    Raises:
        ValueError: groups that are not all layers in order, layers that there are not, or what MPVGVisionTransformer
            refuses.
    """

    published_names = (
        *MPVGVisionTransformer.published_names,
        (r"^backbone\.", ""),
        (r"^norm([1-4])\.", lambda match: f"feature_norms.{int(match[1]) - 1}."),
        (r"\.ffn\.dwconv\.dwconv\.", ".ffn.dwconv."),
        (r"^blocks\.(\d+)\.gamma([12])$", r"blocks.\1.ls\2.gamma"),
    )

    def __init__(
        self,
        *,
        scheme: str | Mapping[str, Any] | PositionScheme = "mpvg",
        interaction_indexes: Sequence[Sequence[int]] = ((0, 2), (3, 5), (6, 8), (9, 11)),
        window_size: int | None = None,
        global_layers: Sequence[int] = (),
        conv_inplane: int = 64,
        deform_num_heads: int = 6,
        n_points: int = 4,
        deform_ratio: float = 1.0,
        cffn_ratio: float = 0.25,
        init_values: float = 0.0,
        layer_scale: bool = True,
        embed_dim: int = 768,
        depth: int = 12,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        num_classes: int = 0,
        weight_init: str = "",
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        scheme = AdapterPositionScheme.parse(scheme)
        groups = [tuple(group) for group in interaction_indexes]
        covered = [layer for first, last in groups for layer in range(first, last + 1)]
        if covered != list(range(depth)):
            raise ValueError(
                f"interaction_indexes={interaction_indexes}: expected the first and the last layer of each group, all "
                f"{depth} layers in order, for example ((0, {depth // 2 - 1}), ({depth // 2}, {depth - 1}))"
            )
        if wrong := [layer for layer in global_layers if layer not in covered]:
            raise ValueError(f"global_layers has {wrong[0]}, but the layers are 0 to {depth - 1}")
        if num_classes:
            raise ValueError(f"num_classes={num_classes}: a ViT-Adapter gives feature maps and has no classifier")
        super().__init__(
            scheme=scheme,
            embed_dim=embed_dim,
            depth=depth,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            global_pool="",
            num_classes=0,
            init_values=1.0 if layer_scale else None,
            dynamic_img_size=True,
            weight_init="skip",
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.groups = groups
        for layer, block in enumerate(self.blocks):
            block.attn.__class__ = GridAttention
            block.attn.window_size = None if layer in global_layers else window_size
        if not _norms_features(scheme):
            self.norm = nn.Identity()
        eps, kwargs = self.blocks[0].norm2.eps, {"device": device, "dtype": dtype}
        attention = {"num_heads": deform_num_heads, "num_points": n_points, "ratio": deform_ratio}
        hidden = int(embed_dim * cffn_ratio)

        def extractor() -> Extractor:
            return Extractor(embed_dim, hidden, drop_path_rate, eps, attention, **kwargs)

        self.level_embed = nn.Parameter(torch.zeros(3, embed_dim, **kwargs))
        self.spm = SpatialPrior(in_chans, conv_inplane, embed_dim, **kwargs)
        self.interactions = nn.ModuleList(
            Interaction(
                Injector(embed_dim, init_values, eps, attention, **kwargs),
                extractor(),
                [extractor(), extractor()] if group is groups[-1] else [],
            )
            for group in groups
        )
        self.up = nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2, **kwargs)
        self.feature_norms = nn.ModuleList(nn.BatchNorm2d(embed_dim, **kwargs) for _ in STRIDES)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stride, "module": f"feature_norms.{i}"}
            for i, stride in enumerate(STRIDES)
        ]
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's for the ViT; the adapter's as published (convolutions by their fan out, level embeddings normal)."""
        super().init_weights(mode, needs_reset)
        if not hasattr(self, "spm"):  # from the base's own initialisation
            return
        for part in (self.spm, self.up, self.interactions, self.feature_norms):
            part.apply(_init_adapter)
        nn.init.normal_(self.level_embed)

    # ---- forward

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """Image (B, C, H, W) to four maps (B, D, H'/s, W'/s), s = 4, 8, 16, 32; H', W': the next multiples of 32."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        rows, columns = (side // PATCH for side in image.shape[-2:])
        grid, grids = (rows, columns), [(2 * rows, 2 * columns), (rows, columns), (rows // 2, columns // 2)]
        c1, *maps = self.spm(image)
        levels = self.level_embed.to(c1.dtype)
        c = Stream(torch.cat([m.flatten(2).mT + level for m, level in zip(maps, levels, strict=True)], 1))
        x, pos_last, c = self._interact(image, c, grid, grids)
        c2, c3, c4 = to_maps(c, grids)
        x3 = self._last_tokens(x, pos_last).permute(0, 3, 1, 2)
        resized = [F.interpolate(x3, scale_factor=PATCH / s, mode="bilinear") if s != PATCH else x3 for s in STRIDES]
        features = [self.up(c2) + c1, c2, c3, c4]
        return [norm(f + x) for norm, f, x in zip(self.feature_norms, features, resized, strict=True)]

    def _interact(
        self, image: Tensor, c: Stream, grid: Grid, grids: Sequence[Grid]
    ) -> tuple[Stream, Tensor | None, Tensor]:
        """All layers and interactions: the tokens' stream, the last norm's PE or None, and the features (B, N, D)."""
        scheme = self.scheme
        tokens, pos_0, tables = self._embed(image)
        x, pos_0 = Stream(tokens.unflatten(1, grid)), pos_0.unflatten(1, grid)
        tables = {layer: table.unflatten(1, grid) for layer, table in tables.items()}
        pos = pos_0 if scheme.layerwise else None
        pos_last = pos_0 if scheme.last == 0 else None
        for (first, last), interaction in zip(self.groups, self.interactions, strict=True):
            x, c = self._run(interaction.injector, x, c, grids, grid)
            for layer in range(first, last + 1):
                args = *x, tables.get(layer, pos)
                if self.grad_checkpointing:
                    tokens, pos_layer = checkpoint(run_and_join, self.blocks[layer], *args)
                    x = Stream(tokens)
                else:
                    *parts, pos_layer = self.blocks[layer](*args)
                    x = Stream(*parts)
                if scheme.hierarchical and scheme.join == "norm":
                    pos = pos_layer
                if layer and layer == scheme.last:
                    pos_last = pos_layer
            for extractor in (interaction.extractor, *(interaction.extra_extractors or ())):
                c, x = self._run(extractor, c, x, grids, grid)
        return x, pos_last, c.joined()

    def _run(self, module: nn.Module, *args: Any) -> tuple[Stream, Stream]:
        return checkpoint(module, *args) if self.grad_checkpointing else module(*args)

    def _last_tokens(self, x: Stream, pos_last: Tensor | None) -> Tensor:
        """The tokens (B, rows, columns, D) that are added to the feature maps."""
        if isinstance(self.norm, nn.Identity):
            return x.joined()
        return self.norm.tokens(x.x, pos_last, x.branch, x.scale)

    def forward(self, image: Tensor) -> list[Tensor]:
        """As `forward_features`."""
        return self.forward_features(image)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **_: Any,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface to the feature maps: those of `indices` (all), and before them the coarsest one.

        Args:
            x: image (B, C, H, W).
            indices: the last n maps if int, these maps if a list, all if None.
            norm, stop_early: without effect; all maps come from the same last step.
            output_fmt: "NCHW" alone.
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}; expected 'NCHW'")
        take, _ = feature_take_indices(len(STRIDES), indices)
        maps = self.forward_features(x)
        taken = [maps[i] for i in take]
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The indices of the maps (from 0); there is nothing to drop, as every map needs every layer."""
        return feature_take_indices(len(STRIDES), indices)[0]

    def rename_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the ViT's; to the weights of a classification model the adapter's own, which start anew, are added."""
        weights, own = super().rename_checkpoint(state_dict), self.state_dict()
        if any(name.split(".")[0] in ADAPTER for name in weights):
            return weights
        left_out = sorted(
            {part for part in ("head", "head_dist", "norm") if _has(weights, part) and not _has(own, part)}
        )
        weights = {name: value for name, value in weights.items() if name.split(".")[0] not in left_out}
        new = {name for name in own if name.split(".")[0] in ADAPTER or re.search(r"\.ls[12]\.", name)} - weights.keys()
        new |= {name for name in own if name.startswith("norm.") and not _has(weights, "norm")}
        _logger.info(
            "A classification model's weights: %d tensors of the adapter start anew; left out: %s.",
            len(new),
            ", ".join(left_out) or "nothing",
        )
        return {**weights, **{name: own[name] for name in new}}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay; timm leaves 1-D parameters out by itself."""
        return super().no_weight_decay() | {"level_embed"}


def _has(weights: Mapping[str, Tensor], part: str) -> bool:
    return any(name.split(".")[0] == part for name in weights)


def _init_adapter(module: nn.Module) -> None:
    if isinstance(module, DeformableAttention):
        module.reset_parameters()
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ConvFFN):
        for linear in (module.fc1, module.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
    elif isinstance(module, Injector):
        nn.init.constant_(module.gamma, module.init_values)


default_cfgs = generate_default_cfgs(
    {
        f"mpvg_vit_adapter_{size}": default_cfg(num_classes=0, fixed_input_size=False, classifier=None)
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MPVGViTAdapter:
    kwargs.setdefault("out_indices", (0, 1, 2, 3))
    return create(MPVGViTAdapter, variant, pretrained, **{"patch_size": PATCH, "depth": 12, **kwargs})


@register_model
def mpvg_vit_adapter_tiny(pretrained: bool = False, **kwargs: Any) -> MPVGViTAdapter:
    """ViT-Adapter-T (width 192, 3 heads) with a position scheme."""
    return _create("mpvg_vit_adapter_tiny", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def mpvg_vit_adapter_small(pretrained: bool = False, **kwargs: Any) -> MPVGViTAdapter:
    """ViT-Adapter-S (width 384, 6 heads) with a position scheme."""
    return _create("mpvg_vit_adapter_small", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def mpvg_vit_adapter_base(pretrained: bool = False, **kwargs: Any) -> MPVGViTAdapter:
    """ViT-Adapter-B (width 768, 12 heads) with a position scheme."""
    sizes = {"embed_dim": 768, "num_heads": 12, "deform_num_heads": 12, "deform_ratio": 0.5}
    return _create("mpvg_vit_adapter_base", pretrained, **{**sizes, **kwargs})
