"""What the compiler makes of every Triton kernel, and the times that follow from bytes alone. Needs no GPU.

    python benchmarks/resources.py                 compile, print the table, and write the files in benchmarks/results
    python benchmarks/resources.py --check         compile, and compare with the committed table

resources.json holds a row for each kernel, width, dtype and architecture: {"versions": {...}, "rows": [...]}, the rows
with the keys KEYS. predictions.json holds *predicted* times: bytes of `operators.traffic` over a bandwidth. Both have a
Markdown twin to read.

The kernels are those that a call with a branch, a scale and all gradients launches. resources_cuda.py has the same of
the CUDA C++ kernels.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import operators
import triton_aot

RESULTS = Path(__file__).parent / "results"
KEYS = (
    "backend", "kernel", "operator", "direction", "dtype", "D", "arch",
    "registers", "shared_bytes", "spill_bytes", "threads", "occupancy_percent",
)  # fmt: skip
WIDTHS = (192, 384, 768, 1280)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TOKENS = 196


class Multiprocessor(NamedTuple):
    """What an architecture's multiprocessor has, from the CUDA programming guide's table of compute capabilities."""

    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    shared_bytes: int = 228 << 10


MULTIPROCESSORS = {80: Multiprocessor(shared_bytes=164 << 10), 90: Multiprocessor(), 100: Multiprocessor()}


def occupancy_percent(arch: int, registers: int, threads: int, shared_bytes: int) -> int:
    """Resident warps of the most there can be, in percent.

    Registers are given out to warps in units of 256, shared memory to blocks in units of 128 bytes, with 1 KB of the
    system's own for each.
    """
    has = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(
        has.registers // of_a_warp // warps,
        has.warps // warps,
        has.blocks,
        has.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024),
    )
    return round(100 * blocks * warps / has.warps)


def triton_rows(architectures: Sequence[int] = triton_aot.ARCHITECTURES) -> list[dict[str, Any]]:
    """The rows of the Triton kernels."""
    calls = {
        (dtype, D): triton_aot.Call(TOKENS, D, name, name, name, name) for dtype, name in DTYPES.items() for D in WIDTHS
    }
    found = triton_aot.compile_calls({f"{dtype} {D}": call for (dtype, D), call in calls.items()}, architectures)
    rows = []
    for arch in architectures:
        for dtype, D in calls:
            names: list[tuple[str, str, str]] = []
            for k in found[arch][f"{dtype} {D}"]:
                name = k.kernel.removesuffix("_kernel")
                if (k.operator, k.direction, name) in names:
                    name += " of pos"  # the pool runs its first kernel on pos too
                names.append((k.operator, k.direction, name))
                threads = 32 * k.warps
                values = (
                    "triton", name, k.operator, k.direction, dtype, D, f"sm_{arch}", k.registers, k.shared, k.spilled,
                    threads, occupancy_percent(arch, k.registers, threads, k.shared),
                )  # fmt: skip
                rows.append(dict(zip(KEYS, values, strict=True)))
    return rows


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("triton", "torch")}


# ---- predictions


class Gpu(NamedTuple):
    """A GPU's memory bandwidth, and the part of it that a copy is taken to reach."""

    name: str
    bytes_per_s: float
    copy_fraction: float
    source: str


H100 = Gpu(
    name="H100 SXM",
    bytes_per_s=3.35e12,
    copy_fraction=0.90,
    source="3.35 TB/s: NVIDIA's H100 data sheet (SXM5, 80 GB HBM3); that a copy reaches 90 % of it is an assumption",
)
# The part of a copy's bandwidth that the kernels are to reach: the bars for the forward and the backward.
OF_A_COPY = {"fwd": 0.90, "bwd": 0.85}
# Batches that make x at least 64 MiB in bf16.
PREDICTED_SIZES = ((1024, 196, 192), (512, 196, 384), (256, 196, 768), (256, 197, 768), (256, 196, 1280))


def prediction_rows(gpu: Gpu = H100) -> list[dict[str, Any]]:
    """A row for each operator, direction, inputs, size and dtype: its least bytes and the time these take.

    Not of pe_chain, whose few megabytes take less time than its layers' latency.
    """
    rows = []
    for op in operators.TOKEN_OPERATORS:
        for direction, of_a_copy in OF_A_COPY.items():
            for inputs in ("x", "x+f"):
                for size in PREDICTED_SIZES:
                    for dtype in ("bf16", "fp32", "mixed"):
                        case = operators.Case(op, direction, inputs, *size, dtype)
                        total = operators.traffic(case).total
                        at_copy = total / (gpu.bytes_per_s * gpu.copy_fraction)
                        row = dict(op=op, mode=direction, inputs=inputs, B=size[0], N=size[1], D=size[2], dtype=dtype)
                        row |= dict(bytes=total, us_at_copy=at_copy * 1e6, us_at_target=at_copy / of_a_copy * 1e6)
                        rows.append(row)
    return rows


# ---- files


def markdown(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def resources_markdown(found: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    """A line for each kernel, dtype and width, with a column for each architecture."""
    lines: dict[tuple, dict[str, str]] = {}
    spills = sum(row["spill_bytes"] for row in rows)
    for row in rows:
        key = tuple(row[k] for k in ("backend", "operator", "direction", "kernel", "dtype", "D", "threads"))
        spilled = f", {row['spill_bytes']} spilled" if row["spill_bytes"] else ""
        cell = f"{row['registers']} / {row['shared_bytes']} / {row['occupancy_percent']} %{spilled}"
        lines.setdefault(key, {})[row["arch"]] = cell
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    table = markdown(
        ("backend", "operator", "direction", "kernel", "dtype", "D", "threads", *archs),
        ((*key, *(cells.get(arch, "-") for arch in archs)) for key, cells in lines.items()),
    )
    spilled = f"{spills} bytes are spilled in all." if spills else "No kernel spills."
    compiled = ", ".join(f"{name} {number}" for name, number in found.items())
    return (
        "# Registers, shared memory and occupancy of the GPU kernels\n\n"
        "Made by `python benchmarks/resources.py`. Cells are registers a thread / bytes of shared memory a block /\n"
        f"theoretical occupancy. Compiled with {compiled}. {spilled}\n\n" + table
    )


def predictions_markdown(gpu: Gpu, rows: Sequence[dict[str, Any]]) -> str:
    keys = ("op", "mode", "inputs", "B", "N", "D", "dtype")
    table = markdown(
        (*keys, "MB", "us at a copy's speed", "us at the target"),
        (
            (*(r[k] for k in keys), f"{r['bytes'] / 1e6:.1f}", f"{r['us_at_copy']:.1f}", f"{r['us_at_target']:.1f}")
            for r in rows
        ),
    )
    targets = ", ".join(f"{mode} {100 * part:.0f} %" for mode, part in OF_A_COPY.items())
    return (
        f"# Predicted times on an {gpu.name}: not measured\n\n"
        "Made by `python benchmarks/resources.py`. Bytes are the least traffic of a call (`operators.traffic`); the\n"
        f"time is bytes / bandwidth and nothing else. Bandwidth: {gpu.source}.\n"
        f"The target is the part of a copy's bandwidth that the kernels are to reach: {targets}. bwd is the backward\n"
        "alone.\n\n" + table
    )


def differences(committed: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[str]:
    """What differs between two tables, a line each."""

    def by_key(rows: Sequence[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
        return {tuple(row[k] for k in KEYS[:7]): row for row in rows}

    old, new = by_key(committed), by_key(found)
    lines = [f"{' '.join(map(str, key))}: only in one of the tables" for key in old.keys() ^ new.keys()]
    for key in old.keys() & new.keys():
        lines += [
            f"{' '.join(map(str, key))}: {k} was {old[key][k]}, is {new[key][k]}"
            for k in KEYS[7:]
            if old[key][k] != new[key][k]
        ]
    return sorted(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the committed table differs")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    rows = triton_rows()
    table = resources_markdown(versions(), rows)
    print(table)
    if args.check:
        committed = json.loads((RESULTS / "resources.json").read_text())
        lines = differences(committed["rows"], rows)
        print("\n".join(lines) or "as committed")
        return 1 if lines else 0
    args.out.mkdir(parents=True, exist_ok=True)
    predicted = prediction_rows()
    for name, report, text in (
        ("resources", {"versions": versions(), "rows": rows}, table),
        (
            "predictions",
            {"predicted_not_measured": True, "gpu": H100._asdict(), "of_a_copy": OF_A_COPY, "rows": predicted},
            predictions_markdown(H100, predicted),
        ),
    ):
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
