"""Patch embeddings of this package's own architectures: timm's PatchEmbed, with a stem, and errors that name what fits.

timm's PatchEmbed crops an image that no whole number of patches covers, where the model is built for that size; these
refuse it.
"""

from collections.abc import Callable
from typing import Any

from timm.layers import PatchEmbed, to_2tuple
from torch import Tensor, nn

__all__ = ["CheckedPatchEmbed", "StemPatchEmbed"]

STEM_STRIDE = 16


class CheckedPatchEmbed(PatchEmbed):
    """timm's PatchEmbed; an image size that does not fit is a ValueError that names the nearest ones.

    Args: timm's PatchEmbed's.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, *args: Any, **kwargs: Any
    ):
        check_divides(to_2tuple(img_size), to_2tuple(patch_size))
        super().__init__(img_size, patch_size, *args, **kwargs)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another image or patch size; one that does not fit changes nothing."""
        check_divides(to_2tuple(img_size or self.img_size), to_2tuple(patch_size or self.patch_size))
        super().set_input_size(img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to patches (B, N, D), or (B, H', W', D) where output_fmt asks for it."""
        size = tuple(x.shape[-2:])
        if self.strict_img_size and size != self.img_size:
            raise ValueError(
                f"image size {size[0]}x{size[1]}: this model is built for {self.img_size[0]}x{self.img_size[1]}; "
                f"resize the image, call set_input_size({size}), or build it with dynamic_img_size=True"
            )
        if not self.dynamic_img_pad:
            check_divides(size, self.patch_size)
        return super().forward(x)


def check_divides(size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raise ValueError, with the nearest sizes that fit, where patches do not cover an image of this size."""
    if all(side > 0 and side % patch == 0 for side, patch in zip(size, patch_size, strict=True)):
        return
    near = []
    for side, patch in zip(size, patch_size, strict=True):
        below = side // patch * patch
        sides = [side] if below == side else [below, below + patch]
        near.append(" or ".join(str(s) for s in sides if s > 0))
    raise ValueError(
        f"image size {size[0]}x{size[1]}: the sides must be multiples of {patch_size[0]} and {patch_size[1]}; the "
        f"nearest are height {near[0]}, width {near[1]}"
    )


class StemPatchEmbed(CheckedPatchEmbed):
    """A patch embedding whose projection is a stem: several layers, with a stride of 16 in all.

    Args:
        stem: makes it from (in_chans, embed_dim, bias=, device=, dtype=): a module from (B, C, H, W) to
            (B, D, H / 16, W / 16).
        All others are timm's PatchEmbed's; patch_size must be 16.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        stem: Callable[..., nn.Module],
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        _check_stem_stride(patch_size)
        # timm's own projection is as small as can be; the stem takes its place.
        super().__init__(img_size, patch_size, 1, 1, bias=False, device=device, dtype=dtype, **kwargs)
        self.proj = stem(in_chans, embed_dim, bias=bias, device=device, dtype=dtype)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another image size; the patch size is the stem's."""
        _check_stem_stride(patch_size or STEM_STRIDE)
        super().set_input_size(img_size)


def _check_stem_stride(patch_size: int | tuple[int, int]) -> None:
    if to_2tuple(patch_size) != (STEM_STRIDE, STEM_STRIDE):
        raise ValueError(
            f"patch_size={patch_size}: this architecture's patches come from a stem of stride {STEM_STRIDE}; "
            "leave it out"
        )
