"""The operator benchmarks' cases under pytest-benchmark, for its comparing and storing of runs.

    pytest benchmarks --benchmark-only                             everything, a long run
    pytest benchmarks --benchmark-only -k "fwd_bwd and bf16" --benchmark-group-by=group --benchmark-autosave

On a CPU one thread runs and its CPU time is measured; on a GPU the timed call waits for the device. Each provider's
result is checked first. `extra_info` holds the byte model's GB/s and % of roof of the fastest round.
Providers run one after the other here: for ratios of two providers use the scripts, which let them take turns.
"""

import time

import harness
import operators
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = operators.Settings(device=DEVICE)
CASES = [
    operators.Case(op, mode, inputs, *size, dtype)
    for op in operators.TOKEN_OPERATORS
    for mode in operators.DEFAULT_MODES
    for inputs in operators.DEFAULT_INPUTS
    for dtype in operators.DEFAULT_DTYPES
    for size in operators.SIZES
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    harness.pin_allocator()
    with harness.threads(torch.get_num_threads() if DEVICE == "cuda" else 1):
        yield


@pytest.mark.benchmark(
    timer=time.perf_counter if DEVICE == "cuda" else time.process_time, warmup=True, warmup_iterations=2, max_time=0.5
)
@pytest.mark.parametrize("provider", operators.default_providers(DEVICE))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(benchmark, case: operators.Case, provider: str):
    variants, refused = operators.prepare(case, [provider], SETTINGS)
    if provider in refused:
        status, note = refused[provider]
        (pytest.fail if status == "wrong" else pytest.skip)(f"{provider}: {note}")
    roof, variant = variants

    def call():
        variant.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    with variant.context():
        benchmark(call)
    if benchmark.disabled:  # --benchmark-disable: the check alone
        return
    clock = harness.CudaClock() if DEVICE == "cuda" else harness.cpu_seconds
    copied = min(harness.interleave([roof], SETTINGS.rounds, clock)[roof.name])
    fastest, total = benchmark.stats.stats.min, operators.traffic(case).total
    benchmark.extra_info |= {"gbps": total / fastest / 1e9, "roof_percent": 100 * copied / fastest, "bytes": total}
