"""The layers' LN'_l(pos) of a model in one go, by `pe_chain`, and kept from one call in eval to the next.

No LN'_l(pos) depends on the image. `PosTables` gives them all before the first layer, for the fused norms to take as
`normed_pos`; where it gives None, each norm computes its own, as it does without. Which is the faster one:

    with gradients      None: what the one launch saves, taking it apart and together again costs (a training step of
                        DeiT-Ti took 0.99 to 1.02 times as long on a CPU)
    eval on a CPU       the tables of the last call, if all that they were computed from is equal to a copy kept of it
    eval elsewhere      computed anew by the one launch: a comparison would make the host wait for the device
    torch.export        constants of the exported program, for a model in eval mode
    torch.compile       None: compiled code would not see parameters change

The copy is what makes it safe: version counters do not see `p.data.add_()`, and hooks do not see all the ways in which
a parameter can be replaced. A comparison of values needs to know none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import backends
from ..functional import pe_chain
from ..modules import FusedAddPELayerNorm, FusedPELayerNorm, FusedPELayerNormPool

Norm = FusedPELayerNorm | FusedAddPELayerNorm


class LastNorm(NamedTuple):
    """The norm after the layers, where it takes a PE: LN'(pos_k), or LN'(pos), without the rows of prefix tokens."""

    norm: FusedPELayerNormPool
    layer: int | None
    """k, an index into the norms of the layers; None: pos itself."""
    num_prefix_tokens: int = 0
    """The first rows of pos that are prefix tokens'."""


class _Rule(NamedTuple):
    """How tables follow from tensors."""

    eps: float
    hierarchical: bool
    has_bias: bool
    last: tuple[float, int | None, int] | None  # eps, layer, num_prefix_tokens


class _Kept(NamedTuple):
    """The tables, and all that they depend on: besides values, the rule, the dtypes and the backend."""

    key: tuple
    sources: list[Tensor]
    tables: tuple[Tensor, ...]


def _alike(sources: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors of one dtype and width: not fake, not sharded, not a shard."""
    pos = sources[0]
    dtype, width = pos.dtype, pos.shape[-1]
    return all([type(t) in (nn.Parameter, Tensor) and t.dtype == dtype and t.shape[-1] == width for t in sources])


def _compute(rule: _Rule, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The layers' tables, each in pos's shape without a leading 1, then the last norm's if there is one.

    `sources` are pos, the norms' pos_weight and, with has_bias, their pos_bias; in both the last norm's comes last.
    """
    pos, *vectors = sources
    norms = len(vectors) // (1 + rule.has_bias)
    weights, biases = vectors[:norms], vectors[norms:] or None
    layers = norms - (rule.last is not None)
    tables: tuple[Tensor, ...] = ()
    if layers:
        chain_biases = biases and biases[:layers]
        chain = pe_chain(pos, weights[:layers], chain_biases, eps=rule.eps, hierarchical=rule.hierarchical)
        tables = chain.unbind(0)
    if rule.last:
        eps, layer, num_prefix_tokens = rule.last
        source = pos.reshape(-1, pos.shape[-1]) if layer is None else tables[layer]
        tables += pe_chain(source[num_prefix_tokens:], weights[-1:], biases and biases[-1:], eps=eps).unbind(0)
    return tables


class PosTables:
    """Gives a model's LN'_l(pos) all at once, or None where each norm had better compute its own.

    A copy or a pickle of it starts empty. Threads may share it: what is kept is replaced as a whole.
    """

    _kept: _Kept | None = None

    def __reduce__(self):
        return PosTables, ()

    def __call__(
        self,
        pos: Tensor,
        norms: Sequence[Norm],
        *,
        training: bool,
        hierarchical: bool = True,
        last: LastNorm | None = None,
    ) -> tuple[Tensor, ...] | None:
        """The tables of the norms in order, then the last norm's.

        Args:
            pos: (K, D) or (1, K, D), the parameter that all start from.
            norms: the layers' norms with an LN', in the order of the layers; all with the same pos_eps.
            training: whether the model is in training mode.
            hierarchical: LN'_l reads LN'_{l-1}(...), else pos itself.
            last: the last norm, if it takes a PE.
        """
        exporting = _is_exporting()
        if training:
            if exporting:
                _warn_of_training_mode()
            return None
        if not exporting and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return None
        every = [*norms, last.norm] if last else norms
        if not every or len({norm.pos_eps for norm in norms}) > 1:
            return None
        sources = [pos, *[norm.pos_weight for norm in every]]
        biases = [norm.pos_bias for norm in every]
        has_bias = any([b is not None for b in biases])
        if has_bias:
            sources += biases
        last_rule = (last.norm.pos_eps, last.layer, last.num_prefix_tokens) if last else None
        rule = _Rule(every[0].pos_eps, hierarchical, has_bias, last_rule)
        if exporting:
            return _constants(rule, sources)
        if torch._C._are_functorch_transforms_active() or not _alike(sources):
            return None
        if torch.is_grad_enabled() and any([t.requires_grad for t in sources]):
            return None
        if pos.device.type != "cpu":
            return _compute(rule, sources)
        return self._keep(rule, sources)

    def _keep(self, rule: _Rule, sources: list[Tensor]) -> tuple[Tensor, ...]:
        """`_compute`, or its last result if that was of equal sources."""
        key = (rule, sources[0].dtype, backends.resolve("cpu"))
        kept = self._kept
        if kept is None or kept.key != key or not all(map(torch.equal, kept.sources, sources)):
            # From the copy, not from the parameters, which another thread may be changing. Outside of inference mode:
            # a later call may need gradients of its image.
            with torch.inference_mode(False), torch.no_grad():
                copies = [t.detach().clone() for t in sources]
                kept = self._kept = _Kept(key, copies, _compute(rule, copies))
        return kept.tables


@torch.compiler.assume_constant_result  # in torch 2.11 Dynamo has True for it in what it traces for torch.compile too
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # Dynamo passes over warnings in what it traces, but calls this
def _warn_of_training_mode() -> bool:
    warnings.warn(
        "this model is exported in training mode, so the program drops out at random and computes every LN'(pos) in "
        "each call: call model.eval() before torch.export",
        stacklevel=3,
    )
    return True


def _constants(rule: _Rule, sources: list[Tensor]) -> tuple[Tensor, ...] | None:
    """The tables as real tensors while a program is exported, in which they are constants."""
    if torch.compiler.is_dynamo_compiling():
        return _dynamo_constants(tuple(rule), *sources)
    return _constant_tables(rule, *[_real(t) for t in sources])


@torch.compiler.assume_constant_result
def _dynamo_constants(rule: tuple, *sources: Tensor) -> tuple[Tensor, ...] | None:
    return _constant_tables(_Rule(*rule), *sources)


def _constant_tables(rule: _Rule, *sources: Tensor | None) -> tuple[Tensor, ...] | None:
    if any(t is None for t in sources) or not _alike(sources):
        return None
    with _disable_current_modes(), torch.inference_mode(False):
        # (detached: no_grad() would leave its mark in the program)
        return tuple(table.clone() for table in _compute(rule, [t.detach() for t in sources]))


def _real(t: Tensor) -> Tensor | None:
    """The tensor that torch.export's fake one stands for; None if torch does not tell (then nothing is a constant)."""
    if not isinstance(t, FakeTensor):
        return t
    try:
        fakes = t.fake_mode.fake_tensor_converter.meta_converter
        numbers = fakes.describer.lookup_tensor
        return next((real for real, number in numbers.items() if fakes.tensor_memo.get(number) is t), None)
    except AttributeError:  # torch's own bookkeeping, which may change
        return None
