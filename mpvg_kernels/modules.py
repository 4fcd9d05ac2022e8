"""nn.Modules around the operators, with LayerNorm's parameter names: a timm checkpoint's `norm1.weight` loads as it is.

All hold `weight` and `bias`, the token LayerNorm's; those that take a position embedding (PE) also `pos_weight` and
`pos_bias`, the PE LayerNorm's. Where LN'(pos) is known already (from `pe_chain`), it is given as `normed_pos` in place
of pos, and these two go unread. They compute the same on every backend, `reference` included, with the same state dict.
"""

import torch
from torch import Tensor, nn

from .functional import pe_layer_norm, pe_norm_pool


class _FusedNorm(nn.Module):
    """The parameters of a LayerNorm over the last axis and, with `pos_norm`, of the PE's own."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        pos_eps: float | None = None,
        bias: bool = True,
        num_prefix_tokens: int = 0,
        pos_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim}: expected a width of at least 1")
        self.dim, self.eps, self.num_prefix_tokens = dim, eps, num_prefix_tokens
        self.pos_eps = eps if pos_eps is None else pos_eps
        for name, wanted in (
            ("weight", True),
            ("bias", bias),
            ("pos_weight", pos_norm),
            ("pos_bias", pos_norm and bias),
        ):
            parameter = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales to one, shifts to zero."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        text = f"{self.dim}, eps={self.eps}"
        if self.pos_weight is not None and self.pos_eps != self.eps:
            text += f", pos_eps={self.pos_eps}"
        if self.bias is None:
            text += ", bias=False"
        if self.num_prefix_tokens:
            text += f", num_prefix_tokens={self.num_prefix_tokens}"
        return text

    # Every norm that may have a PE does its work through this, so that analysis/probe.py can look on.
    def _call(self, operator, x, pos=None, branch=None, branch_scale=None, normed_pos=None):
        if pos is None and normed_pos is None and self.pos_weight is not None:
            raise ValueError(f"{type(self).__name__} needs pos, the position embedding (N, D), and got None")
        return operator(
            x,
            self.weight,
            self.bias,
            pos,
            self.pos_weight if normed_pos is None else None,
            self.pos_bias if normed_pos is None else None,
            branch=branch,
            branch_scale=branch_scale,
            normed_pos=normed_pos,
            eps=self.eps,
            pos_eps=self.pos_eps,
            num_prefix_tokens=self.num_prefix_tokens,
        )


class FusedPELayerNorm(_FusedNorm):
    """y = LN(x) + LN'(pos): the norm before MSA in MPVG (arXiv 2502.02919), in one kernel.

    Args:
        dim: the width D.
        eps: LN's epsilon.
        pos_eps: LN''s epsilon; defaults to eps.
        bias: False leaves both LayerNorms without a shift.
        num_prefix_tokens: the first rows of x (class token, registers) that get no PE.
        device, dtype: of the parameters.
    """

    def forward(
        self, x: Tensor, pos: Tensor | None = None, *, normed_pos: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, N, D), pos or normed_pos (N - num_prefix_tokens, D) -> y (B, N, D), LN'(pos) for the next layer."""
        y, _, pos = self._call(pe_layer_norm, x, pos, normed_pos=normed_pos)
        return y, pos


class FusedAddPELayerNorm(_FusedNorm):
    """y = LN(h) + LN'(pos) with h = x + branch_scale * branch: `FusedPELayerNorm` that also joins the residual branch.

    Args: as `FusedPELayerNorm`.
    """

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        pos: Tensor | None = None,
        branch_scale: Tensor | None = None,
        *,
        normed_pos: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, branch (B, N, D), pos or normed_pos (N - num_prefix_tokens, D), branch_scale (B,) -> y, h, LN'(pos)."""
        return tuple(self._call(pe_layer_norm, x, pos, branch, branch_scale, normed_pos))


class FusedAddLayerNorm(_FusedNorm):
    """y = LN(h) with h = x + branch_scale * branch: the norm before the MLP, which never sees PE.

    Args: as `FusedPELayerNorm`, without pos_eps and num_prefix_tokens.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, bias: bool = True, device=None, dtype=None):
        super().__init__(dim, eps, bias=bias, pos_norm=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, branch: Tensor | None, branch_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and branch (B, N, D), branch_scale (B,) -> y and the stream h."""
        y, stream, _ = self._call(pe_layer_norm, x, None, branch, branch_scale)
        return y, stream


class FusedPELayerNormPool(_FusedNorm):
    """mean_n(LN(h) + LN'(pos)) with h = x + branch_scale * branch: the last norm and the pool in one pass.

    Args: as `FusedPELayerNorm`, and
        pos_norm: False has no LN' and takes no pos (the last norm of PVG and of plain GAP models).
    """

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.pos_weight is not None else ", pos_norm=False")

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        branch: Tensor | None = None,
        branch_scale: Tensor | None = None,
        *,
        normed_pos: Tensor | None = None,
    ) -> Tensor:
        """x and branch (B, N, D), pos or normed_pos (N - num_prefix_tokens, D), branch_scale (B,) -> (B, D)."""
        return self._call(pe_norm_pool, x, pos, branch, branch_scale, normed_pos)

    def tokens(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        branch: Tensor | None = None,
        branch_scale: Tensor | None = None,
        *,
        normed_pos: Tensor | None = None,
    ) -> Tensor:
        """The same before the mean, prefix tokens included: (B, N, D)."""
        return self._call(pe_layer_norm, x, pos, branch, branch_scale, normed_pos).y
