"""Memory of training: what each operator saves for its backward, and what a model's step saves and needs at its peak.

    python benchmarks/bench_memory.py                        the operators; DeiT-Ti, batch 8: minutes on one core
    python benchmarks/bench_memory.py --quick                a smaller model, eager

Saved bytes are those of all tensors that autograd keeps from the forward for the backward, each storage once and
parameters left out (`harness.saved_bytes`); an operator's inputs count, because in a model nothing else may keep them.
The peak is the most memory held at a time during a training step beyond what is there between steps (weights, AdamW's
state, the batch), gradients included. Models, engines and dtypes are bench_train's; with checkpointing a block's
activations are computed again in the backward. Bytes are exact and need no rounds.

Keys of a row besides those in harness.py:

    op                  "pe_layer_norm", "pe_norm_pool" or "train_step"
    inputs, B, N, D     of an operator, as in bench_dual_ln
    model, img_size, depth, batch, engine    of a step, as in bench_train
    checkpointing       whether the step's model recomputes its blocks
    saved_bytes         see above
    peak_extra_bytes    see above; null for an operator
    saved_vs_eager      saved bytes over those of the plain formula; of a step over those of `reference`
    peak_vs_timm, peak_vs_reference          peak over that model's in the same mode
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import bench_train
import harness
import operators
import torch
from harness import Column, Variant, number

import mpvg_kernels as mk

INPUTS = ("x", "x+f", "x+s*f", "x+f,no-pos")
OPERATOR_DTYPES = ("fp32", "bf16", "mixed")


def operator_saved_bytes(case: operators.Case, provider: str, device: str) -> int:
    """What the case's operator keeps for its backward."""
    arguments, _ = operators.make_arguments(case, device)
    parameters = [
        t for t in (arguments.weight, arguments.bias, arguments.pos_weight, arguments.pos_bias) if t is not None
    ]
    function, context = operators.PROVIDERS[provider](case)
    with context():
        return harness.saved_bytes(lambda: function(*arguments, case.out_dtype), parameters)


def operator_rows(case: operators.Case, providers: Sequence[str], device: str) -> list[dict[str, Any]]:
    """A row for each provider, "eager" the first of them."""
    rows = []
    for provider in providers:
        row = {"op": case.op, "inputs": case.inputs, "B": case.B, "N": case.N, "D": case.D, "dtype": case.dtype}
        row |= {"device": device, "provider": provider, "status": "ok", "note": "", "peak_extra_bytes": None}
        row["saved_bytes"] = operator_saved_bytes(case, provider, device)
        row["saved_vs_eager"] = row["saved_bytes"] / (rows[0] if rows else row)["saved_bytes"]
        rows.append(row)
    return rows


def step_rows(
    engine: str, dtype: str, checkpointing: bool, providers: Sequence[str], settings: bench_train.Settings
) -> list[dict[str, Any]]:
    """A row for each provider's training step."""
    rows = {}
    for provider in providers:
        row = {"op": "train_step", "model": settings.model, "img_size": settings.img_size, "depth": settings.depth}
        row |= {"batch": settings.batch, "engine": engine, "dtype": dtype, "checkpointing": checkpointing}
        row |= {"device": settings.device, "provider": provider, "status": "ok", "note": ""}
        row |= dict.fromkeys(("saved_bytes", "peak_extra_bytes"))
        torch._dynamo.reset()
        try:
            with mk.use_backend("reference" if provider == "timm" else provider):
                step = bench_train.Step(provider, engine, dtype, settings)
                step.model.set_grad_checkpointing(checkpointing)
                row["peak_extra_bytes"] = harness.peak_extra_bytes(Variant(provider, step), settings.device)
                known = [*step.model.parameters(), *step.model.buffers(), step.images]
                row["saved_bytes"] = harness.saved_bytes(step.loss, known)
        except Exception as error:
            if engine == "eager":
                raise
            row |= {"status": "failed", "note": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
        rows[provider] = row
    for row in rows.values():
        row["saved_vs_eager"] = _ratio(row, rows.get("reference"), "saved_bytes")
        for baseline in bench_train.BASELINES:
            row[f"peak_vs_{baseline}"] = _ratio(row, rows.get(baseline), "peak_extra_bytes")
    return list(rows.values())


def _ratio(row: dict[str, Any], baseline: dict[str, Any] | None, key: str) -> float | None:
    return row[key] / baseline[key] if row[key] is not None and baseline and baseline[key] else None


OPERATOR_COLUMNS = (
    Column("op", "operator", 13),
    Column("inputs", "inputs", 10),
    Column("size", "B,N,D", 13),
    Column("dtype", "dtype", 6),
    Column("provider", "provider", 10),
    Column("saved_bytes", "saved bytes", 12, "{:,}".format),
    Column("saved_vs_eager", "over eager's", 12, number(4)),
)
STEP_COLUMNS = (
    Column("engine", "engine", 8),
    Column("dtype", "dtype", 6),
    Column("checkpointing", "recomputed", 10, lambda on: "blocks" if on else "nothing"),
    Column("provider", "provider", 10),
    Column("saved_mb", "saved MB", 9, number(1)),
    Column("saved_vs_eager", "over reference's", 16, number(3)),
    Column("peak_mb", "peak MB", 9, number(1)),
    Column("peak_vs_timm", "over timm's", 11, number(3)),
    Column("peak_vs_reference", "over reference's", 16, number(3)),
)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the tables show it."""
    if row["op"] != "train_step":
        return row | {"size": f"{row['B']},{row['N']},{row['D']}"}
    return row | {
        f"{name}_mb": None if row[key] is None else row[key] / 1e6
        for name, key in (("saved", "saved_bytes"), ("peak", "peak_extra_bytes"))
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--sizes", nargs="+", type=operators.parse_size, metavar="BxNxD", default=list(operators.SIZES))
    add("--model", default="deit_tiny_patch16_224", help="timm's name of a DeiT that has an mpvg_ twin")
    add("--img-size", type=int, default=224)
    add("--depth", type=int, default=12)
    add("--batch", type=int, default=8)
    add("--engines", nargs="+", choices=bench_train.ENGINES, default=list(bench_train.ENGINES))
    add("--dtypes", nargs="+", choices=tuple(bench_train.TOLERANCES), default=list(bench_train.TOLERANCES))
    add("--providers", nargs="+", choices=mk.backends.BACKENDS, help="our backends; all that run here, if not given")
    add("--json", metavar="FILE", help="write the rows there")
    add("--quick", action="store_true", help="one size, 64-pixel images, depth 4, eager")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and none is visible")
    if args.quick:
        harness.change_defaults(parser, args, sizes=[(8, 196, 192)], img_size=64, depth=4, engines=["eager"])
    ours = args.providers or harness.kernel_backends(args.device)
    settings = bench_train.Settings(args.model, args.img_size, args.depth, args.batch, args.device, 1, 0)
    described = settings._asdict() | {"quick": args.quick}
    rows: list[dict[str, Any]] = []

    def keep(columns: Sequence[Column], found: list[dict[str, Any]]) -> None:
        for row in found:
            harness.print_row(columns, _shown(row))
        rows.extend(found)
        if args.json:  # after each group: a run that is cut off leaves what it has
            harness.write_json(args.json, "memory", described, rows)

    print(f"memory: {harness.describe(harness.machine())}")
    harness.print_header(OPERATOR_COLUMNS)
    for op, inputs, dtype, size in itertools.product(operators.TOKEN_OPERATORS, INPUTS, OPERATOR_DTYPES, args.sizes):
        case = operators.Case(op, "fwd_grad", inputs, *size, dtype)
        keep(OPERATOR_COLUMNS, operator_rows(case, ["eager", *ours], args.device))
    print()
    harness.print_header(STEP_COLUMNS)
    providers = list(dict.fromkeys([*bench_train.BASELINES, *ours]))
    for engine, dtype, checkpointing in itertools.product(args.engines, args.dtypes, (False, True)):
        harness.progress(f"[{engine}, {dtype}, checkpointing {checkpointing}] {len(providers)} models")
        keep(STEP_COLUMNS, step_rows(engine, dtype, checkpointing, providers, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
