"""The committed table of registers, shared memory and occupancy is what the compiler says; predictions follow bytes."""

import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import operators  # noqa: E402
import resources  # noqa: E402

pytestmark = pytest.mark.xdist_group(__name__)  # one compilation for all tests


def committed(name: str) -> dict:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


@functools.cache
def compiled() -> list[dict]:
    return resources.triton_rows()


def test_the_committed_table_is_what_is_compiled():
    table = committed("resources")
    if table["versions"]["triton"] != version("triton"):
        pytest.skip(f"the table is of Triton {table['versions']['triton']}; with {version('triton')} only spills count")
    assert not resources.differences(table["rows"], compiled())


def test_no_kernel_spills():
    assert compiled() and committed("resources")["rows"]
    for row in (*compiled(), *committed("resources")["rows"]):
        assert row["spill_bytes"] == 0, row


def test_every_width_dtype_and_architecture_is_there():
    rows = committed("resources")["rows"]
    assert all(tuple(row) == resources.KEYS for row in rows)
    kernels = {(row["operator"], row["direction"], row["kernel"]) for row in rows}
    assert len(rows) == len(kernels) * len(resources.WIDTHS) * len(resources.DTYPES) * 3
    assert {kernel[:2] for kernel in kernels} == {(op, d) for op in operators.PLAIN for d in ("fwd", "bwd")}


def test_the_text_is_the_table():
    table, predicted = committed("resources"), committed("predictions")
    results = BENCHMARKS / "results"
    assert (results / "resources.md").read_text() == resources.resources_markdown(table["versions"], table["rows"])
    text = resources.predictions_markdown(resources.H100, predicted["rows"])
    assert (results / "predictions.md").read_text() == text
    assert "not measured" in text and predicted["predicted_not_measured"] is True


@pytest.mark.parametrize(
    "arch, registers, threads, shared, percent",
    [
        (90, 32, 128, 0, 100),  # 16 blocks of 4 warps
        (90, 168, 128, 0, 19),  # 65536 / (168 * 32) = 12.2 warps: three blocks
        (90, 128, 512, 0, 25),  # one block of 16 warps
        (90, 33, 32, 0, 50),  # registers come in units of 8: 40 a thread; then 32 blocks of one warp are the limit
        (80, 32, 128, 40 << 10, 25),  # 164 KB hold four blocks of 40 + 1 KB
        (90, 32, 128, 40 << 10, 31),  # 228 KB hold five
    ],
)
def test_occupancy(arch, registers, threads, shared, percent):
    assert resources.occupancy_percent(arch, registers, threads, shared) == percent


def test_predictions_are_bytes_over_bandwidth():
    rows = committed("predictions")["rows"]
    assert rows == resources.prediction_rows()
    for row in rows:
        case = operators.Case(row["op"], row["mode"], row["inputs"], row["B"], row["N"], row["D"], row["dtype"])
        assert row["bytes"] == operators.traffic(case).total
        assert row["us_at_copy"] == pytest.approx(1e6 * row["bytes"] / (3.35e12 * 0.9))
        assert row["us_at_target"] > row["us_at_copy"]


def test_differences_name_what_changed():
    (row,) = [dict.fromkeys(resources.KEYS, 1)]
    assert resources.differences([row], [dict(row)]) == []
    assert resources.differences([row], [row | {"registers": 9}]) == ["1 1 1 1 1 1 1: registers was 1, is 9"]
    assert resources.differences([row], [row | {"kernel": "k"}])[0].endswith("only in one of the tables")
