"""Times launch choices of the Triton kernels on this GPU and writes the table that `mpvg_kernels.tuned` reads.

    python -m mpvg_kernels.triton_ops.tune --out tuned.json            DeiT's widths, bf16 and fp32: some minutes
    MPVG_TUNED=tuned.json python ...                                   use it
    python -m mpvg_kernels.triton_ops.tune --packaged --widths 1024    put it into the package's own table

Nothing is tuned unless this is run. For each kernel, dtype and width it starts from the rules of tiles.py, changes one
field at a time to each of its neighbours, keeps what is faster by more than the noise, and goes round again until
nothing is. Where both backends are there it also says which of `triton` and `cuda` is the faster.
"""

import argparse
import dataclasses
import importlib.metadata
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import tuned

DTYPES = {name: dtype for dtype, name in tuned.DTYPES.items()}
# x has at least this many bytes: a call that no cache holds and no launch dominates.
BYTES = 64 << 20
TOKENS = 196
# A choice has to be this much faster to be kept: the noise of a median of 20 calls.
GAIN = 1.02
REPEATS = 20
# The values that are tried; `stages` starts at what the rules make of None.
VALUES = {
    "elements_per_thread": (8, 16, 24, 32),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
    "threads": (256, 384, 512, 640, 768, 1024, 1536),
}

Timer = Callable[[str, str, int, tuned.Choice], float]
"""(kernel, dtype, D, choice) -> microseconds; infinity for a choice that can't be launched."""


def neighbours(choice: tuned.Choice) -> Iterator[tuned.Choice]:
    """The choices that differ in one field, by one step of VALUES up or down."""
    for field, values in VALUES.items():
        at = choice[field]
        below, above = [v for v in values if v < at], [v for v in values if v > at]
        for value in below[-1:] + above[:1]:
            yield choice | {field: value}


def search(
    start: tuned.Choice, time: Callable[[tuned.Choice], float], gain: float = GAIN
) -> tuple[tuned.Choice, float]:
    """The choice that no neighbour beats by `gain`, and its time. Each is timed once; equals keep the earlier one."""
    timed: dict[tuple, float] = {}

    def cost(choice: tuned.Choice) -> float:
        key = tuple(choice.items())
        if key not in timed:
            timed[key] = time(choice)
        return timed[key]

    best = start
    while True:
        candidate = min(neighbours(best), key=cost)
        if not cost(candidate) * gain < cost(best):
            return best, cost(best)
        best = candidate


def tune(kernels: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], time: Timer) -> list[dict[str, Any]]:
    """The table's entries: those kernels, dtypes and widths where something beats the rules."""
    from .tiles import RULES, launch

    entries = []
    for kernel in kernels:
        for dtype in dtypes:
            for D in widths:
                start = {k: v for k, v in dataclasses.asdict(getattr(RULES, kernel)).items() if k in tuned.FIELDS}
                itemsize = DTYPES[dtype].itemsize
                shape = (max(1, BYTES // (TOKENS * D * itemsize)), TOKENS, D)
                read_bytes = itemsize * READS[kernel]
                with tuned.trial(kernel, dtype, D, start):
                    planned = launch(kernel, torch.device("meta"), DTYPES[dtype], shape, read_bytes, False)
                start["stages"] = planned.stages
                default = time(kernel, dtype, D, start)
                choice, us = search(start, lambda choice, at=(kernel, dtype, D): time(*at, choice))
                line = f"{kernel} {dtype} {D}: {default:.1f} us by the rules"
                if choice != start:
                    entry = dict(kernel=kernel, dtype=dtype, D=D, choice=choice, us=us, default_us=default)
                    entries.append(entry)
                    line += f", {us:.1f} us with " + ", ".join(f"{k} {v}" for k, v in choice.items() if start[k] != v)
                print(line, flush=True)
    return entries


# Tensors of the stream's shape that a kernel reads, as `calls` below calls it.
READS = {"pe_layer_norm_fwd": 2, "pe_layer_norm_bwd": 3, "pe_norm_pool_fwd": 1, "pe_norm_pool_bwd": 1}


def calls(dtype: str, D: int, backend: str = "triton", device: str = "cuda") -> dict[str, Callable[[], object]]:
    """For each kernel a call of its raw operator, with a branch in the LayerNorm and every gradient."""
    from ..ops import pe_layer_norm, pe_norm_pool

    kind = DTYPES[dtype]
    B = max(1, BYTES // (TOKENS * D * kind.itemsize))
    x, branch, dy = (torch.randn(B, TOKENS, D, device=device, dtype=kind) for _ in range(3))
    pos, weight = torch.randn(TOKENS, D, device=device, dtype=kind), torch.randn(D, device=device, dtype=kind)
    norm, pool = (
        (given, None, weight, weight, pos, weight, weight, 1e-6, 1e-6, 0, kind, True) for given in (branch, None)
    )
    rest = (weight, None, pos, weight, 1e-6, 0, kind, kind, 127 & ~2)
    y, h, pos_out, stats = pe_layer_norm.FORWARD[backend](x, *norm)
    out, _, pool_stats, s = pe_norm_pool.FORWARD[backend](x, *pool)
    return {
        "pe_layer_norm_fwd": lambda: pe_layer_norm.FORWARD[backend](x, *norm),
        "pe_layer_norm_bwd": lambda: pe_layer_norm.BACKWARD[backend](dy, branch, pos_out, h, stats, *rest),
        "pe_norm_pool_fwd": lambda: pe_norm_pool.FORWARD[backend](x, *pool),
        "pe_norm_pool_bwd": lambda: pe_norm_pool.BACKWARD[backend](out, x, pool_stats, s, *rest),
    }


class GpuTimer:
    """Median microseconds of a call from a cold L2 cache, by events."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device="cuda")
        self._case: tuple[str, int] | None = None
        self._calls: dict[str, Callable[[], object]] = {}

    def __call__(self, kernel: str, dtype: str, D: int, choice: tuned.Choice) -> float:
        from triton.runtime.errors import OutOfResources

        if self._case != (dtype, D):  # the tensors of one case at a time
            self._calls = {}
            self._calls, self._case = calls(dtype, D), (dtype, D)
        with tuned.trial(kernel, dtype, D, choice):
            try:
                return self.time(self._calls[kernel])
            except OutOfResources:
                return float("inf")

    def time(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        pairs = []
        for _ in range(REPEATS):
            self._flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return 1e3 * statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def compare_backends(timer: GpuTimer, dtypes: Sequence[str], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Forward plus backward of each operator in each of the GPU backends that are there, if there are two."""
    from .. import backends

    there = [b for b in ("triton", "cuda") if b in backends.available_backends("cuda")]
    if len(there) < 2:
        return []
    entries = []
    for dtype in dtypes:
        for D in widths:
            us: dict[str, dict[str, float]] = {}
            for backend in there:
                for kernel, call in calls(dtype, D, backend).items():
                    of_operator = us.setdefault(kernel.rpartition("_")[0], dict.fromkeys(there, 0.0))
                    of_operator[backend] += timer.time(call)
            entries += [dict(operator=operator, dtype=dtype, D=D, us=times) for operator, times in us.items()]
    return entries


def main(argv: Sequence[str] | None = None) -> int:
    prog = "python -m mpvg_kernels.triton_ops.tune"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--widths", nargs="+", type=int, default=[192, 384, 768], metavar="D")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    add("--kernels", nargs="+", choices=tuned.KERNELS, default=list(tuned.KERNELS))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=Path("tuned.json"), metavar="FILE", help="default: %(default)s")
    where.add_argument("--packaged", action="store_true", help=f"write {tuned.PACKAGED}, which every call reads")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: there is nothing to time, as no CUDA GPU is visible", file=sys.stderr)
        return 1
    path = tuned.PACKAGED if args.packaged else args.out
    try:
        if path.exists():
            tuned.read(path)  # before minutes of timing, not after
    except tuned.TableError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    timer = GpuTimer()
    entries = tune(args.kernels, args.dtypes, args.widths, timer)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    measured = dict(versions=versions, entries=entries, backends=compare_backends(timer, args.dtypes, args.widths))
    tuned.write(path, torch.cuda.get_device_name(), measured)
    tuned.forget()
    print(f"{len(entries)} choices in {path}" + ("" if args.packaged else f"; use it with {tuned.VARIABLE}={path}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
