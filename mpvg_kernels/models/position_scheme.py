"""How the position embedding (PE) travels through a vision transformer, as one value.

The methods of the MPVG paper (AAAI 2025, arXiv 2502.02919), of LaPE (ICCV 2023) and their ablations are values of
:class:`PositionScheme`, not branches of a model's code. As text, for configs and checkpoints: a name, and what differs
from it in parentheses.

    mpvg                          the paper's method
    mpvg(last=8)                  Table 5: pos_8 instead of pos_0 goes to the last LayerNorm
    mpvg(hierarchical=False)      Table 6: every layer normalises pos_0 itself
    lape(join=unshare)            LaPE's ablation: a table of its own for each layer, added to the stream
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NAMED_SCHEMES", "PositionScheme"]

JOINS = ("norm", "share", "unshare")
POOLS = ("avg", "token")


@dataclass(frozen=True)
class PositionScheme:
    """Where the PE goes. ``pos_0`` is the learned table; ``l`` counts layers from 0; ``LN'`` is a LayerNorm of the PE.

    A value that would have no effect is refused, so that an ablation never trains the model it was to differ from.
    """

    pool: str
    """What the head reads: "avg", the mean of the normed patch tokens (no class token), or "token", the class token."""

    add_to_input: bool
    """Whether ``pos_0`` is added to the patch tokens: ``x_0 = patches + pos_0``."""

    layerwise: bool
    """Whether layers ``l >= first_layer`` receive a PE each, joined as ``join`` says."""

    first_layer: int = 1
    """The first layer that receives a PE. The layers before it see none but what ``add_to_input`` put in the stream."""

    hierarchical: bool = True
    """Which PE layer l normalises: the PE that layer l-1 received (True; the first such layer takes ``pos_0``), so that
    ``pos_l = LN'_l(pos_{l-1})``, or always the table, ``pos_l = LN'_l(pos_0)`` (False)."""

    last: int | None = None
    """The last LayerNorm's PE, ``LN(x) + LN'(pos_last)``. 0 is the table itself (also where layer 0 has a LayerNorm of
    its own for it), k >= 1 the PE that layer k received, None leaves the last LayerNorm plain. Pooled schemes only."""

    join: str = "norm"
    """How a layer takes its PE. "norm": ``MSA(LN_l(x) + pos_l)``, it never enters the stream. LaPE's two ablations add
    to the stream before the layer, unnormed: "share": ``x + pos_0``; "unshare": ``x +`` a table of the layer's own (the
    first of all tables used is ``pos_0``)."""

    def __post_init__(self) -> None:
        for name, kind in (("add_to_input", bool), ("layerwise", bool), ("hierarchical", bool), ("first_layer", int)):
            self._check_type(name, kind)
        if self.last is not None:
            self._check_type("last", int)
        for name, allowed in (("pool", POOLS), ("join", JOINS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"position scheme: {name}={getattr(self, name)!r}; expected one of {allowed}")
        if self.first_layer < 0:
            raise ValueError(f"position scheme: first_layer={self.first_layer}; layers count from 0")
        self._check_effects()
        if self.last is not None:
            self._check_last(self.last)

    def _check_type(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        if type(value) is not kind:
            raise ValueError(f"position scheme: {name}={value!r} ({type(value).__name__}); expected {kind.__name__}")

    def _check_effects(self) -> None:
        if not (self.add_to_input or self.layerwise or self.last is not None):
            raise ValueError(
                "position scheme: the position embedding reaches nothing; set add_to_input, layerwise or last"
            )
        if not self.layerwise:
            for name, default in (("first_layer", 1), ("hierarchical", True), ("join", "norm")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"position scheme: {name}={getattr(self, name)!r} has no effect with layerwise=False; "
                        f"leave it at {default!r} or set layerwise=True"
                    )
        elif self.join != "norm":
            if not self.hierarchical:
                raise ValueError(
                    f"position scheme: hierarchical=False has no effect with join={self.join!r}, which adds tables to "
                    "the stream and normalises none; leave it at True"
                )
            if self.add_to_input and self.first_layer == 0:
                raise ValueError(
                    f"position scheme: add_to_input=True and join={self.join!r} from layer 0 would add a table to the "
                    "same tokens twice; set add_to_input=False or first_layer=1"
                )

    def _check_last(self, last: int) -> None:
        if self.pool == "token":
            raise ValueError(
                f"position scheme: last={last} needs pool='avg'. A class-token model's head reads the class token "
                "alone, so the PE that the last LayerNorm gives to the patch tokens never reaches it; the paper gives "
                "the last LayerNorm a PE only with global average pooling"
            )
        if last < 0:
            raise ValueError(f"position scheme: last={last}; expected None, 0 for the table, or a layer's index")
        if last and (not self.layerwise or last < self.first_layer or self.join == "share"):
            raise ValueError(
                f"position scheme: last={last}, but layer {last} makes no PE of its own under "
                f"layerwise={self.layerwise}, first_layer={self.first_layer}, join={self.join!r}; use last=0 for the "
                "table"
            )

    def reaches(self, layer: int) -> bool:
        """Whether this layer receives a PE (beyond what ``add_to_input`` put in the stream)."""
        return self.layerwise and layer >= self.first_layer

    def check_depth(self, depth: int) -> None:
        """Raise ValueError where the scheme names a layer that a model of ``depth`` layers does not have."""
        for name, layer in (("first_layer", self.first_layer if self.layerwise else 0), ("last", self.last or 0)):
            if layer and layer >= depth:
                raise ValueError(
                    f"position scheme {self}: {name}={layer}, but a model of depth {depth} has layers 0 to {depth - 1}"
                )

    @classmethod
    def named(cls) -> Mapping[str, PositionScheme]:
        """The schemes with names, as this class's architectures have them: what :meth:`parse` and text start from."""
        return NAMED_SCHEMES

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | PositionScheme) -> PositionScheme:
        """Read a scheme from text, from a mapping, or pass one through.

        An architecture where names mean something else has a subclass with its own :meth:`named`.

        Args:
            value: "mpvg", "mpvg(last=8, add_to_input=False)"; a mapping of the fields, where a "name" gives the scheme
                that the other entries change; or a PositionScheme.

        Raises:
            ValueError: unknown name (nearest names listed) or field, text that can't be read, a combination that makes
                no sense (see the fields).
            TypeError: another type.
        """
        if isinstance(value, PositionScheme):
            return value if type(value) is cls else cls(**dataclasses.asdict(value))
        if isinstance(value, str):
            name, fields = _parse_text(value, cls.named())
        elif isinstance(value, Mapping):
            fields = dict(value)
            name = fields.pop("name", None)
        else:
            raise TypeError(
                f"position scheme: expected a string such as 'mpvg', a mapping or a PositionScheme, "
                f"got {type(value).__name__}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise ValueError(f"position scheme: no field {key!r}{_near(key, known)}; fields: {', '.join(known)}")
        if name is not None:
            return dataclasses.replace(_named(name, cls.named()), **fields)
        missing = [key for key in ("pool", "add_to_input", "layerwise") if key not in fields]
        if missing:
            raise ValueError(f"position scheme: the mapping has neither a 'name' nor {', '.join(missing)}")
        return cls(**fields)

    def __str__(self) -> str:
        """The shortest text that :meth:`parse` reads back as this value."""
        texts = []
        # Of equally short texts the last one named wins: mpvg(last=8), not pvg(last=8).
        for name, scheme in reversed(self.named().items()):
            changed = [
                f"{field.name}={getattr(self, field.name)}"
                for field in dataclasses.fields(self)
                if getattr(self, field.name) != getattr(scheme, field.name)
            ]
            texts.append((len(changed), f"{name}({', '.join(changed)})" if changed else name))
        return min(texts, key=lambda text: text[0])[1]


NAMED_SCHEMES: dict[str, PositionScheme] = {
    "default": PositionScheme(pool="token", add_to_input=True, layerwise=False),
    "gap": PositionScheme(pool="avg", add_to_input=True, layerwise=False),
    "lape": PositionScheme(pool="token", add_to_input=False, layerwise=True, first_layer=0),
    "lape_gap": PositionScheme(pool="avg", add_to_input=False, layerwise=True, first_layer=0),
    "gap_last": PositionScheme(pool="avg", add_to_input=True, layerwise=False, last=0),
    "pvg": PositionScheme(pool="avg", add_to_input=True, layerwise=True),
    "mpvg": PositionScheme(pool="avg", add_to_input=True, layerwise=True, last=0),
}
"""The paper's methods by name, as a ViT or DeiT has them."""


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.4)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _named(name: str, schemes: Mapping[str, PositionScheme]) -> PositionScheme:
    if name not in schemes:
        names = list(schemes)
        raise ValueError(f"unknown position scheme {name!r}{_near(str(name), names)}; known: {', '.join(names)}")
    return schemes[name]


def _parse_text(text: str, schemes: Mapping[str, PositionScheme]) -> tuple[str, dict[str, Any]]:
    """Split "name(field=value, ...)" into its name and fields; a bare word as a value is a string (share, avg)."""
    name = text.partition("(")[0].strip()
    _named(name, schemes)
    try:
        call = ast.parse(text.strip() if "(" in text else f"{name}()", mode="eval").body
        fields = {
            keyword.arg: keyword.value.id if isinstance(keyword.value, ast.Name) else ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
        readable = isinstance(call.func, ast.Name) and not call.args and None not in fields
        readable = readable and len(fields) == len(call.keywords)
    except (SyntaxError, ValueError, AttributeError):
        readable = False
    if not readable:
        raise ValueError(f"position scheme {text!r}: expected name(field=value, ...), for example mpvg(last=8)")
    return name, fields
