"""PositionScheme: the named schemes' fields, text and mapping forms that round-trip, and what is refused, and why."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpvg_kernels.models import NAMED_SCHEMES, PositionScheme


def test_named_schemes_are_those_of_the_papers():
    # pool, add_to_input, layerwise, first_layer, hierarchical, last, join
    expected = {
        "default": ("token", True, False, 1, True, None, "norm"),
        "gap": ("avg", True, False, 1, True, None, "norm"),
        "lape": ("token", False, True, 0, True, None, "norm"),
        "lape_gap": ("avg", False, True, 0, True, None, "norm"),
        "pvg": ("avg", True, True, 1, True, None, "norm"),
        "mpvg": ("avg", True, True, 1, True, 0, "norm"),
        "gap_last": ("avg", True, False, 1, True, 0, "norm"),
    }
    assert {name: dataclasses.astuple(scheme) for name, scheme in NAMED_SCHEMES.items()} == expected


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("mpvg", {}),
        (" mpvg() ", {}),
        ("mpvg(last=8)", {"last": 8}),
        ("mpvg( first_layer = 0, hierarchical=False )", {"first_layer": 0, "hierarchical": False}),
        ("mpvg(last=None)", {"last": None}),
        ("mpvg(join=share)", {"join": "share"}),
        ("mpvg(join='unshare')", {"join": "unshare"}),
    ],
)
def test_parse_text(text, changes):
    expected = dataclasses.replace(NAMED_SCHEMES["mpvg"], **changes)
    assert PositionScheme.parse(text) == expected
    assert PositionScheme.parse({"name": "mpvg", **changes}) == expected
    assert PositionScheme.parse(dataclasses.asdict(expected)) == expected
    assert PositionScheme.parse(expected) is expected


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        *((name, name) for name in NAMED_SCHEMES),
        ("pvg(last=8)", "mpvg(last=8)"),
        ("mpvg(last=None)", "pvg"),
        ("gap(last=0)", "gap_last"),
        ("lape(join='unshare')", "lape(join=unshare)"),
        ("pvg(hierarchical=False, last=0)", "mpvg(hierarchical=False)"),
    ],
)
def test_text_is_the_shortest(scheme, text):
    assert str(PositionScheme.parse(scheme)) == text


@st.composite
def schemes(draw):
    """Any scheme that construction accepts."""
    fields = {
        "pool": draw(st.sampled_from(["avg", "token"])),
        "add_to_input": draw(st.booleans()),
        "layerwise": draw(st.booleans()),
        "first_layer": draw(st.integers(0, 3)),
        "hierarchical": draw(st.booleans()),
        "last": draw(st.none() | st.integers(0, 5)),
        "join": draw(st.sampled_from(["norm", "share", "unshare"])),
    }
    try:
        return PositionScheme(**fields)
    except ValueError:
        return NAMED_SCHEMES[draw(st.sampled_from(list(NAMED_SCHEMES)))]


@given(schemes())
def test_text_round_trips(scheme):
    assert PositionScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mpgv", r"unknown position scheme 'mpgv' \(did you mean mpvg or pvg\?\); known: default, gap, lape"),
        ("", "unknown position scheme ''; known: default"),
        ({"name": "lap"}, r"unknown position scheme 'lap' \(did you mean lape or gap or lape_gap\?\)"),
        ("mpvg(lst=8)", r"no field 'lst' \(did you mean last\?\); fields: pool, add_to_input"),
        ("mpvg(8)", r"expected name\(field=value, ...\), for example mpvg\(last=8\)"),
        ("mpvg(8, last=3)", "expected name"),
        ("mpvg(last=8", "expected name"),
        ("mpvg(last=8)(last=7)", "expected name"),
        ("mpvg(**last)", "expected name"),
        ("mpvg(last=8, last=7)", "expected name"),
        ("mpvg(last=open)", r"last='open' \(str\); expected int"),
        ("mpvg(last=True)", r"last=True \(bool\); expected int"),
        ("mpvg(layerwise=1)", r"layerwise=1 \(int\); expected bool"),
        ("mpvg(join=shared)", r"join='shared'; expected one of \('norm', 'share', 'unshare'\)"),
        ("mpvg(pool=max)", r"pool='max'; expected one of \('avg', 'token'\)"),
        ("mpvg(last=-1)", "last=-1; expected None, 0 for the table, or a layer's index"),
        ("mpvg(first_layer=-1)", "first_layer=-1; layers count from 0"),
        ("mpvg(pool=token)", "last=0 needs pool='avg'. A class-token model's head reads the class token alone"),
        ("lape(last=3)", "last=3 needs pool='avg'"),
        ("mpvg(first_layer=3, last=2)", "layer 2 makes no PE of its own .* use last=0"),
        ("gap(last=3)", "layer 3 makes no PE of its own under layerwise=False"),
        ("mpvg(join=share, last=3)", "layer 3 makes no PE of its own .* join='share'"),
        ("gap(add_to_input=False)", "reaches nothing; set add_to_input, layerwise or last"),
        ("gap(first_layer=0)", "first_layer=0 has no effect with layerwise=False"),
        ("gap(hierarchical=False)", "hierarchical=False has no effect with layerwise=False"),
        ("gap(join=share)", "join='share' has no effect with layerwise=False"),
        ("lape(join=share, hierarchical=False)", "hierarchical=False has no effect with join='share'"),
        ("mpvg(join=share, first_layer=0)", "would add a table to the same tokens twice"),
        ({"pool": "avg"}, "neither a 'name' nor add_to_input, layerwise"),
    ],
)
def test_refused(value, message):
    with pytest.raises(ValueError, match=message):
        PositionScheme.parse(value)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="expected a string such as 'mpvg', a mapping or a PositionScheme, got int"):
        PositionScheme.parse(3)


@pytest.mark.parametrize(
    ("text", "depth", "message"),
    [
        ("mpvg(last=8)", 8, r"mpvg\(last=8\): last=8, but a model of depth 8 has layers 0 to 7"),
        ("pvg", 1, "pvg: first_layer=1, but a model of depth 1 has layers 0 to 0"),
    ],
)
def test_depth(text, depth, message):
    scheme = PositionScheme.parse(text)
    scheme.check_depth(depth + 1)
    with pytest.raises(ValueError, match=message):
        scheme.check_depth(depth)


def test_layers_reached():
    assert [PositionScheme.parse("mpvg(first_layer=2)").reaches(i) for i in range(4)] == [False, False, True, True]
    assert not PositionScheme.parse("gap_last").reaches(2)


def test_is_a_frozen_value():
    scheme = PositionScheme.parse("mpvg")
    assert hash(scheme) == hash(PositionScheme.parse("pvg(last=0)"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.last = 3
