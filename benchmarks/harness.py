"""What the benchmarks share: clocks, interleaved rounds, paired ratios, peak memory, machine facts, table and files.

How a number is made. Variants of the same work take turns: in every round each one runs once, and the order turns
around from round to round, so that a slow phase of the machine hits all of them. `ms` is the fastest round. A speed-up
is the median over rounds of (other's time / this one's time), with the 95 % confidence interval of that median. On a
CPU the clock is the CPU time of one thread (`torch.set_num_threads(1)`), which other processes disturb least; `wall_ms`
is elapsed time on all threads, from a pass of its own. On a GPU the clock is a pair of events, after a buffer larger
than the L2 cache was written; a training step's is elapsed time over several steps in a row.

A JSON file is {"benchmark": name, "machine": {...}, "settings": {...}, "rows": [...]}. Keys of every row:

    provider         "copy" (the roof), "eager", "compile", "reference", "cpp", "triton", ..., "liger" and other peers;
                     in bench_train the model
    status           "ok", "failed" (could not run; `note` says why) or "wrong" (result differs; never timed)
    note             what there is to say about the row, else ""
    dtype            "fp32", "bf16", "fp16" or "mixed" (stream fp32, branch and y bf16, parameters fp32)
    device           "cpu" or "cuda"
    ms, wall_ms      milliseconds a call, see above; null where not measured
    peak_extra_bytes most memory held at a time during one call beyond its inputs, in bytes
    speedup_eager, speedup_compile               median paired ratios; null where that provider did not run
    speedup_eager_ci95, speedup_compile_ci95     [low, high] of those medians

Keys of operator rows (bench_dual_ln, bench_norm_pool, bench_overhead) besides:

    op               "pe_layer_norm" or "pe_norm_pool"
    mode             "fwd" (no gradients recorded), "fwd_grad" (they are), "bwd" (all gradients of a forward that is not
                     timed) or "fwd_bwd"
    inputs           what the operator is given, a key of operators.INPUTS: "x", "x+f", "x+s*f", ...
    B, N, D          batch, tokens, width
    cache            "warm" (the same buffers every call) or "cold" (rotated buffers; on a GPU a flushed L2)
    bytes            least traffic of the call, operators.traffic
    gbps             bytes / ms
    roof_percent     time of a copy of the same bytes with the same allocations / ms, in percent

Keys of bench_train's rows besides: see there.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mpvg_kernels as mk

MIN_SAMPLE_S = 1e-3  # shorter calls are repeated inside one sample, else the clock's own cost shows


class Variant(NamedTuple):
    """One way to do the work: `call` is what is timed, `context()` is entered around the timed calls."""

    name: str
    call: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Ratio(NamedTuple):
    """Median of paired ratios and the 95 % confidence interval of that median."""

    median: float
    low: float
    high: float


class Column(NamedTuple):
    """A column of a printed table: the row's key, its heading, width, and how a value is written."""

    key: str
    heading: str
    width: int
    text: Callable[[Any], str] = str


# ---- clocks


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds a call; with one thread set, the time that thread worked."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def wall_seconds(call: Callable[[], object], repeats: int) -> float:
    """Elapsed seconds a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def synchronized_seconds(call: Callable[[], object], repeats: int) -> float:
    """Elapsed seconds a call on a GPU, of calls in a row: what a training step costs, the host's part included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


class CudaClock:
    """Seconds a call on the GPU by events, from a cold L2 cache."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            self._flush.zero_()
            # The GPU waits here while the host issues the call, so that launches are not what is measured.
            torch.cuda._sleep(1_000_000)
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in pairs) * 1e-3 / repeats


# ---- rounds and statistics


def interleave(
    variants: Sequence[Variant],
    rounds: int,
    clock: Callable[[Callable[[], object], int], float],
    *,
    warm: bool = True,
    min_sample_s: float = MIN_SAMPLE_S,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds a call of each variant, one sample a round; samples with the same index belong together.

    `warm` runs every variant once more, untimed, right before each of its samples: otherwise its inputs are in the
    cache but its outputs are wherever the variant before it left them.
    """
    repeats: dict[str, int] = {}
    for variant in variants:
        with variant.context():
            clock(variant.call, 2)
            repeats[variant.name] = max(1, math.ceil(min_sample_s / max(clock(variant.call, 1), 1e-9)))
    samples: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for done in range(rounds):
        for variant in variants if done % 2 == 0 else reversed(variants):
            with variant.context():
                if warm:
                    variant.call()
                samples[variant.name].append(clock(variant.call, repeats[variant.name]))
        progress(done + 1)
    return samples


def paired_ratio(other: Sequence[float], this: Sequence[float]) -> Ratio:
    """How many times faster `this` is than `other`: median over rounds of other / this, with its 95 % interval.

    The interval is the one between order statistics (binomial with p = 1/2), which assumes nothing about the noise's
    shape; below six rounds no such interval exists, and it is the whole range.
    """
    ratios = sorted(o / t for o, t in zip(other, this, strict=True))
    n, skip, tail = len(ratios), 0, 0.0
    while tail + math.comb(n, skip) / 2**n <= 0.025:
        tail += math.comb(n, skip) / 2**n
        skip += 1
    skip = max(skip - 1, 0)
    return Ratio(statistics.median(ratios), ratios[skip], ratios[n - 1 - skip])


def speedups(samples: dict[str, list[float]], name: str, baselines: Iterable[str] = ("eager", "compile")) -> dict:
    """The speed-up keys of the row of `name`."""
    keys = {}
    for baseline in baselines:
        ratio = paired_ratio(samples[baseline], samples[name]) if baseline in samples else None
        keys[f"speedup_{baseline}"] = ratio.median if ratio else None
        keys[f"speedup_{baseline}_ci95"] = [ratio.low, ratio.high] if ratio else None
    return keys


# ---- memory and threads


def pin_allocator() -> str:
    """Make glibc keep freed memory below 32 MiB a block, as it does in a long-running process; returns what was done.

    Without this, whether an output's pages are fresh depends on which block happens to lie at the heap's top: the same
    call then takes once or three times its time from round to round. Blocks above 32 MiB are fresh pages either way.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return "system default"
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 32 << 20) and mallopt(m_trim_threshold, 2**31 - 1):
        return "glibc, freed blocks up to 32 MiB are kept"
    return "system default"


def peak_extra_bytes(variant: Variant, device: str) -> int:
    """The most bytes held at a time during one call beyond what was there before it, results included."""
    with variant.context():
        variant.call()
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            variant.call()
            return torch.cuda.max_memory_allocated() - before
        # Kineto reads this once, at the first profile: nothing but errors on stderr, please.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            variant.call()
    # Not `profiler.events()`: that one books an allocation on the operator that made it, and its time is lost.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


def saved_bytes(forward: Callable[[], object], left_out: Iterable[torch.Tensor] = ()) -> int:
    """The bytes that a forward keeps for its backward, each storage once; those of `left_out` (parameters) not."""
    known = {t.untyped_storage().data_ptr() for t in left_out}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # not `t`: an output that holds its own graph is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = forward()  # alive until the sum: a freed storage's address could be another's
    total = sum(kept.values())
    del outputs
    return total


@contextlib.contextmanager
def threads(count: int):
    """`count` threads for torch inside, the number from before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kernel_backends(device: str) -> list[str]:
    """Our kernels that are worth timing there: not `reference`, nor GPU kernels that run on a CPU for tests."""
    return [b for b in mk.available_backends(device) if b == "cpp" or (b != "reference" and device != "cpu")]


def last_level_cache_bytes() -> int:
    """Size of the CPU's largest cache as Linux tells it; 64 MiB where it does not."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    unit = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * unit[size[-1]] for size in sizes if size[-1] in unit), default=64 << 20)


# ---- machine


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, instruction set in use, threads, versions, GPU."""
    facts = {
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cpp_backend": mk.backends.status("cpp").reason,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "timm", "mpvg_kernels"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = getattr(sys.modules.get(package), "__version__", None)
    for peer in ("liger-kernel", "flash-attn", "quack-kernels", "apex"):
        with contextlib.suppress(PackageNotFoundError):
            facts[peer] = version(peer)
    return facts


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(facts: dict[str, Any]) -> str:
    """The machine in one line, for tables and plots."""
    parts = [f"{facts['cpu']} ({facts['cpu_cores']} cores, {facts['torch_isa']})", facts["gpu"]]
    parts += [f"{name} {facts[name]}" for name in ("torch", "triton", "timm") if facts[name]]
    return ", ".join(part for part in parts if part)


# ---- output


def common_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds a case")
    parser.add_argument("--no-wall", action="store_true", help="leave out the pass on all threads")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them there")


def check_common(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error where a common option can't be met."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and none is visible")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}: it starts at 1")


def change_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace, **defaults: Any) -> None:
    """Other defaults for --quick; what was given stays."""
    vars(args).update({key: value for key, value in defaults.items() if getattr(args, key) == parser.get_default(key)})


def exit_code(rows: list[dict[str, Any]]) -> int:
    """1 when a result was wrong, else 0."""
    wrong = [row for row in rows if row["status"] == "wrong"]
    if wrong:
        progress(f"{len(wrong)} of {len(rows)} results are wrong")
    return 1 if wrong else 0


def number(digits: int) -> Callable[[float | None], str]:
    """A formatter of numbers with `digits` decimals; "-" where there is none."""
    return lambda value: "-" if value is None else f"{value:.{digits}f}"


def print_header(columns: Sequence[Column]) -> None:
    """Print a table's headings: texts to the left, numbers to the right, as `print_row` sets them."""
    line = "  ".join(f"{c.heading:<{c.width}}" if c.text is str else f"{c.heading:>{c.width}}" for c in columns)
    print(f"{line}\n{'-' * len(line)}", flush=True)


def print_row(columns: Sequence[Column], row: dict[str, Any]) -> None:
    """Print one row, and what its note says."""
    cells = (c.text(row.get(c.key)) for c in columns)
    line = "  ".join(
        f"{t:<{c.width}}" if c.text is str else f"{t:>{c.width}}" for c, t in zip(columns, cells, strict=True)
    )
    print(line + (f"  {row['status']}: {row['note']}" if row["note"] else ""), flush=True)


def progress(text: str) -> None:
    """A line about what a long run is at, on stderr, so that the table on stdout stays clean."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: str | Path, benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write one run's file; its keys are documented at the top of this module."""
    report = {"benchmark": benchmark, "machine": machine(), "settings": settings, "rows": rows}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


class Group(NamedTuple):
    """The bars that stand together in a plot, and the height of the roof's mark over them."""

    label: str
    bars: dict[str, float]
    annotations: dict[str, str]
    roof: float | None = None


COLORS = {"eager": "#b8bcc4", "compile": "#7d8597", "cpp": "#0b6e99", "triton": "#0b6e99", "cuda": "#12a594"}
COLORS |= {"reference": "#e0a458", "timm": "#b8bcc4", "plain": "#b8bcc4", "fused": "#0b6e99"}


def plot_bars(
    path: str | Path, title: str, ylabel: str, panels: dict[str, list[Group]], footer: str, columns: int = 2
) -> None:
    """Draw panels of grouped bars into a PNG; what is best (ours) stands out, its annotation on top of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    widest = max(len(groups) for groups in panels.values())
    size = (max(5.0, 1.3 * widest + 1.0) * columns, 3.4 * lines + 1.1)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for groups in panels.values() for group in groups for name in group.bars))
    width = 0.8 / len(names)
    handles: dict[str, Any] = {}
    for axis, (panel, groups) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=("", [])):
        if not groups:
            axis.set_visible(False)
            continue
        for at, group in enumerate(groups):
            shown = [name for name in names if name in group.bars]
            for slot, name in enumerate(shown):
                x = at + (slot - (len(shown) - 1) / 2) * width
                height = group.bars[name]
                handles[name] = axis.bar(x, height, width * 0.92, color=COLORS.get(name, "#c8553d"), zorder=2)
                axis.annotate(
                    group.annotations.get(name, ""), (x, height), (0, 2), textcoords="offset points",
                    ha="center", va="bottom", fontsize=7.5, fontweight="bold", color=COLORS.get(name, "#c8553d"),
                )  # fmt: skip
            if group.roof is not None:
                (handles["copy of the same bytes (roof)"],) = axis.plot(
                    [at - 0.45, at + 0.45],
                    [group.roof] * 2,
                    color="#c8553d",
                    linewidth=1.6,
                    linestyle=(0, (4, 2)),
                    zorder=3,
                )
        axis.set_title(panel, fontsize=10, loc="left")
        axis.set_xticks(range(len(groups)), [group.label for group in groups], fontsize=8)
        axis.set_ylabel(ylabel, fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(axis="y", color="#e6e6e6", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.14)
        axis.set_ylim(bottom=0)
    figure.suptitle(textwrap.fill(title, int(9.5 * size[0])), fontsize=12, fontweight="bold")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5,
        title=textwrap.fill(footer, int(17 * size[0])), title_fontsize=7,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
