"""Reads what a model's norms see and give, and its attention maps, while it computes what it computes anyway.

    found = probe(model, images)
    quantities.correlation(found.layers[3].tokens, found.layers[3].pos)

Every architecture and scheme of this package, and timm's ViTs and Swins. The model's results are the same to the bit;
nothing of it is changed when `probe` returns: no parameter, no mode, no statistic, no random number is drawn.

LN_l(x) and LN'_l(pos) never exist apart in a fused norm, and a pooled last norm never has its tokens. So the norms'
arguments are taken, and the plain formula of both LayerNorms is applied to them here.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_reverse
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..models.mpvg_ceit import LayerClassAttention
from ..modules import _FusedNorm
from ..ops.common import join, layer_norm
from .quantities import attention_received, class_token_attention

Layer = int | Literal["last"]


@dataclass(frozen=True)
class NormProbe:
    """The norm before a layer's attention, or the last one, at work: patch tokens only, fp32 (fp64 of an fp64 model).

    Class tokens and registers are left out: they have no place in the grid, and no PE under most schemes.
    """

    layer: Layer
    """The layer's index from 0, over all stages; "last" for the norm after the layers."""
    grid: tuple[int, int] | None
    """Height and width of the grid of patches; None where it is not known."""
    stream: Tensor
    """(B, N, D), the residual stream x that is normalised."""
    tokens: Tensor
    """(B, N, D), LN_l(x)."""
    pos: Tensor | None
    """(N, D), LN'_l(pos); None where the norm takes no PE."""

    @property
    def output(self) -> Tensor:
        """(B, N, D), what the norm gives: LN_l(x) + LN'_l(pos), or LN_l(x)."""
        return self.tokens if self.pos is None else self.tokens + self.pos


@dataclass(frozen=True)
class AttentionProbe:
    """A layer's attention, by patch tokens; 1 is an even share. In Swin a token's share is that of its window."""

    layer: int
    grid: tuple[int, int] | None
    received: Tensor
    """(B, N), `quantities.attention_received`."""
    class_token: Tensor | None
    """(B, N), `quantities.class_token_attention`; None in models without a class token."""


@dataclass(frozen=True)
class Probe:
    """What `probe` found."""

    logits: Tensor
    """What the model returned."""
    layers: list[NormProbe]
    """The norm before attention in each layer; empty where the model has no such layers."""
    last: NormProbe | None
    """The last norm; None where there is none before the pool, as in timm's pooled ViTs."""
    attention: list[AttentionProbe]
    """Each layer's attention; empty unless it was asked for."""

    @property
    def with_pos(self) -> list[NormProbe]:
        """The norms that take a PE, in order, the last one included."""
        return [norm for norm in (*self.layers, *([self.last] if self.last else [])) if norm.pos is not None]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module in the mode that it was in outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def layers_of(model: nn.Module) -> list[Block | SwinTransformerBlock]:
    """A model's transformer layers in order, those of all stages; CeiT's attention over class tokens is none."""
    kinds = (Block, SwinTransformerBlock)
    return [m for m in model.modules() if isinstance(m, kinds) and not isinstance(m, LayerClassAttention)]


def norms_of(model: nn.Module) -> dict[Layer, nn.Module]:
    """The norms that `probe` looks at: before each layer's attention, and the last one where it is before the pool."""
    norms: dict[Layer, nn.Module] = {i: block.norm1 for i, block in enumerate(layers_of(model))}
    if norms:
        norms["last"] = getattr(model, "norm", None)
    return {layer: norm for layer, norm in norms.items() if isinstance(norm, nn.LayerNorm | _FusedNorm)}


def takes_pos(norm: nn.Module) -> bool:
    """Whether a norm has an LN' for a PE."""
    return getattr(norm, "pos_weight", None) is not None


def pos_table(model: nn.Module) -> tuple[Tensor, tuple[int, int]] | None:
    """The table pos_0 (N, D) that a model's PE starts from, without prefix tokens' rows, and its grid; None without."""
    table, grid = getattr(model, "pos_embed", None), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(table, Tensor) or grid is None:
        return None
    count = grid[0] * grid[1]
    rows = table.detach().reshape(-1, table.shape[-1])
    return (rows[-count:], tuple(grid)) if len(rows) >= count else None


@contextlib.contextmanager
def watching(
    model: nn.Module, norms: dict[Layer, nn.Module], image: Tensor, tell: Callable[[NormProbe], Any]
) -> Iterator[None]:
    """Inside, each of these norms of the model tells what it sees whenever it is called.

    Args:
        norms: some of `norms_of(model)`.
        image: (B, C, H, W), what the model is called with; its size decides the grid.
        tell: called before the norm computes. Under FSDP2 the parameters are whole there, and only there.
    """
    prefix = getattr(model, "num_prefix_tokens", 0)

    def told(layer: Layer, norm: nn.Module, stream: Tensor, pos: Tensor | None, normed_pos: Tensor | None) -> None:
        dtype = torch.promote_types(stream.dtype, torch.float32)
        grid = tuple(stream.shape[1:3]) if stream.ndim == 4 else _grid(model, image)
        with torch.autocast(stream.device.type, enabled=False):
            stream = stream.detach().to(dtype).flatten(1, -2)[:, 0 if stream.ndim == 4 else prefix :]
            tokens = layer_norm(stream, norm.weight, norm.bias, norm.eps)
            if normed_pos is None and pos is not None:
                normed_pos = layer_norm(pos.detach().to(dtype), norm.pos_weight, norm.pos_bias, norm.pos_eps)
            if normed_pos is not None:
                normed_pos = normed_pos.detach().to(dtype).reshape(-1, normed_pos.shape[-1])[-tokens.shape[1] :]
            if grid is not None and grid[0] * grid[1] != tokens.shape[1]:
                grid = None
            tell(NormProbe(layer, grid, stream, tokens, normed_pos))

    with contextlib.ExitStack() as stack:
        for layer, norm in norms.items():
            stack.enter_context(_watching_norm(layer, norm, told))
        yield


@contextlib.contextmanager
def _watching_norm(layer: Layer, norm: nn.Module, told: Callable) -> Iterator[None]:
    if not isinstance(norm, _FusedNorm):
        with norm.register_forward_pre_hook(lambda norm, args: told(layer, norm, args[0], None, None)):
            yield
        return
    call = norm._call

    def watched(operator, x, pos=None, branch=None, branch_scale=None, normed_pos=None):
        told(layer, norm, x if branch is None else join(x, branch, branch_scale), pos, normed_pos)
        return call(operator, x, pos, branch, branch_scale, normed_pos)

    # Not a hook: the last norm's `tokens` is a method of its own, which hooks do not see.
    norm._call = watched
    try:
        yield
    finally:
        del norm._call


def _grid(model: nn.Module, image: Tensor) -> tuple[int, int] | None:
    """The grid of patches of an image, where the model's patch embedding says."""
    size = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    return None if size is None else tuple(size(tuple(image.shape[-2:])))


def attention_weights(attn: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The weights (B, heads, Q, K) of a timm attention for these arguments of its forward.

    The forward is run once more, with the softmax that a fused one does not show, dropout of the weights left out.

    Args:
        attn: timm's Attention (ViT) or WindowAttention (Swin; B counts windows).
    """
    found: list[Tensor] = []
    fused, attn.fused_attn = attn.fused_attn, False
    try:
        with attn.attn_drop.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
            attn.forward(*args, **kwargs)  # not the module itself, whose hooks may be what calls
    finally:
        attn.fused_attn = fused
    return found[0].detach().float()


def _look_at_attention(
    model: nn.Module, seen: NormProbe, block: nn.Module, args: tuple, kwargs: dict
) -> AttentionProbe:
    """What a layer's attention, called with these arguments, shows; `seen` is the norm before it."""
    weights, grid = attention_weights(block.attn, *args, **kwargs), seen.grid
    received, class_token = attention_received(weights), None
    if isinstance(block, SwinTransformerBlock):
        # As the block puts its windows together again: padding off, then the cyclic shift back.
        window = block.window_size
        padded = [-(-side // w) * w for side, w in zip(grid, window, strict=True)]
        map_BHW1 = window_reverse(received.reshape(-1, *window, 1), window, *padded)[:, : grid[0], : grid[1]]
        received = map_BHW1.roll(tuple(block.shift_size), (1, 2)).flatten(1)
    else:
        prefix = getattr(model, "num_prefix_tokens", 0)
        if getattr(model, "cls_token", None) is not None:
            class_token = class_token_attention(weights)[:, prefix:]
        received = received[:, prefix:]
    return AttentionProbe(seen.layer, grid, received, class_token)


def probe(model: nn.Module, x: Tensor, *, attention: bool = True) -> Probe:
    """Run a model on images and keep what its norms and its attention see and give.

    Args:
        model: of this package or of timm; the call is in eval mode without gradients, whatever mode it is in. What it
            has no layers or norms for is left empty (a convolutional network gives its logits alone).
        x: images (B, C, H, W), as the model takes them.
        attention: attention maps too, which costs each attention a second time.

    Returns:
        The Probe; its tensors are on the model's device, about 8 B N D bytes a layer.
    """
    norms: dict[Layer, NormProbe] = {}
    maps: list[AttentionProbe] = []
    with evaluating(model), contextlib.ExitStack() as stack:
        stack.enter_context(watching(model, norms_of(model), x, lambda seen: norms.setdefault(seen.layer, seen)))
        for layer, block in enumerate(layers_of(model) if attention else ()):

            def look(_, args, kwargs, layer=layer, block=block):
                maps.append(_look_at_attention(model, norms[layer], block, args, kwargs))

            if layer in norms_of(model) and hasattr(block.attn, "attn_drop"):
                stack.enter_context(block.attn.register_forward_pre_hook(look, with_kwargs=True))
        logits = model(x)
    last = norms.pop("last", None)
    return Probe(logits, [norms[layer] for layer in sorted(norms)], last, maps)
