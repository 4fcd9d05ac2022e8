"""Every CUDA kernel compiled for sm_80, sm_90 and sm_100: no spills, no atomics, and the committed table."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import resources_cuda  # noqa: E402

# Registers may differ by so many under another nvcc than the table's.
REGISTERS_APART = 24
pytestmark = pytest.mark.xdist_group(__name__)  # one compilation for all tests


@pytest.fixture(scope="module")
def kernels():
    try:
        return resources_cuda.kernels()
    except resources_cuda.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_no_spills_and_no_atomics(kernels):
    assert set(kernels) == {80, 90, 100}
    for arch, found in kernels.items():
        assert len({resources_cuda.kernel_name(name) for name in found}) >= 16
        for name, kernel in found.items():
            assert kernel["spill_bytes"] == 0, f"{name} spills {kernel['spill_bytes']} bytes on sm_{arch}"
            assert kernel["atomics"] == 0, f"{name} uses atomics: its results would change from run to run"
            assert kernel["static_shared_bytes"] == 0, (
                f"{name} has static shared memory, which the host run does not know"
            )


@pytest.mark.slow
def test_the_committed_table(kernels):
    recorded = json.loads(resources_cuda.RESULTS.read_text())
    try:
        table = resources_cuda.rows()
    except resources_cuda.Unavailable as missing:
        pytest.skip(str(missing))
    how = "run `python benchmarks/resources_cuda.py --write`"
    if recorded["nvcc"] == resources_cuda.nvcc_version():
        assert table == recorded["rows"], f"the kernels' resources have changed: {how} and look at what changed"
        return
    keys = ("kernel", "operator", "direction", "dtype", "D", "arch", "threads", "shared_bytes")
    for now, then in zip(table, recorded["rows"], strict=True):
        assert [now[k] for k in keys] == [then[k] for k in keys], how
        assert abs(now["registers"] - then["registers"]) <= REGISTERS_APART, f"{now} against {then}: {how}"


def test_occupancy_by_hand():
    """Four blocks of 128 threads at 128 registers; one more by shared memory alone does not fit."""
    assert resources_cuda.occupancy_percent(90, 128, 128, 1024) == 25.0
    assert resources_cuda.occupancy_percent(90, 32, 128, 100 << 10) == 12.5
    assert resources_cuda.occupancy_percent(80, 32, 512, 2048) == 100.0
