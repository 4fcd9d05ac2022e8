"""Time of a training step, end to end: timm's plain GAP DeiT, MPVG on the plain formula, MPVG on the fused kernels.

    python benchmarks/bench_train.py                         DeiT-Ti, batch 8: some minutes on one core
    python benchmarks/bench_train.py --quick                 a smaller model, under half a minute
    python benchmarks/bench_train.py --engines eager --dtypes bf16 --providers timm cpp

A step is forward, cross-entropy, backward, AdamW and clearing the gradients, on random images. Providers are "timm"
(`class_token=False, global_pool="avg", fc_norm=False`: the same width, depth and tokens, without MPVG) and our
backends; with the engine "compile" the model goes through torch.compile. The dtypes are "fp32" and "bf16" (autocast,
parameters in fp32).

Before it is timed, a fused model is compared with the `reference` one from the same weights: loss and gradient.

Keys of a row besides those in harness.py (its speed-ups over eager and compile are not among them):

    op                           "train_step"
    model, img_size, depth       timm's name of the baseline, and its options
    engine                       "eager" or "compile"
    batch                        images a step
    parameters                   of the model
    images_per_s                 batch / ms
    vs_timm, vs_reference        this step's time / that one's, median over rounds (1.03: three per cent slower)
    vs_timm_ci95, vs_reference_ci95    95 % confidence interval of the median
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import harness
import timm
import torch
import torch.nn.functional as F
from harness import Column, Group, Variant, number
from torch import nn

import mpvg_kernels as mk
import mpvg_kernels.models  # noqa: F401  (registers the mpvg_deit_* models in timm)

BASELINES = ("timm", "reference")
ENGINES = ("eager", "compile")
GPU_SAMPLE_S = 0.3
# Largest relative difference from `reference` of the loss, and relative L2 distance of the whole gradient.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 1e-1)}


class Settings(NamedTuple):
    """What is trained, and how it is measured."""

    model: str
    img_size: int
    depth: int
    batch: int
    device: str
    rounds: int
    wall_rounds: int


def make_model(provider: str, settings: Settings) -> nn.Module:
    """The provider's model, in training mode, from the same random state each time."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": settings.img_size, "depth": settings.depth}
    if provider == "timm":
        model = timm.create_model(settings.model, class_token=False, global_pool="avg", fc_norm=False, **options)
    else:
        model = timm.create_model(f"mpvg_{settings.model}", scheme="mpvg", **options)
    return model.to(settings.device).train()


class Step:
    """A training step of one model on one batch; calling it runs it and returns nothing."""

    def __init__(self, provider: str, engine: str, dtype: str, settings: Settings):
        self.model = make_model(provider, settings)
        self.run = torch.compile(self.model, dynamic=False) if engine == "compile" else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)
        self.autocast = torch.autocast(settings.device, torch.bfloat16, enabled=dtype == "bf16")
        torch.manual_seed(1)
        self.images = torch.randn(settings.batch, 3, settings.img_size, settings.img_size).to(settings.device)
        self.labels = torch.randint(self.model.num_classes, (settings.batch,)).to(settings.device)

    def backward(self) -> torch.Tensor:
        """Loss of the batch, its gradients in the parameters."""
        with self.autocast:
            loss = F.cross_entropy(self.run(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def loss_and_gradient(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the step's batch and the gradient of all parameters as one vector; changes no weight."""
    loss = step.backward()
    gradient = torch.cat([p.grad.flatten() for p in step.model.parameters()])
    step.optimizer.zero_grad(set_to_none=True)
    return loss, gradient


def differences(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], dtype: str) -> str:
    """In words, which of loss and gradient differ by more than the dtype allows; "" when none does."""
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return ", ".join(
        f"{name} is off by {distance:.1e} (allowed {allowed:.0e})"
        for name, distance, allowed in zip(("loss", "gradient"), off, TOLERANCES[dtype], strict=True)
        if not distance <= allowed  # also where it is NaN
    )


def prepare(
    engine: str, dtype: str, providers: Sequence[str], settings: Settings
) -> tuple[list[Variant], dict[str, tuple[str, str]]]:
    """The variants that are right, and for each of the others (status, note)."""
    torch._dynamo.reset()
    with mk.use_backend("reference"):
        expected = loss_and_gradient(Step("reference", "eager", dtype, settings))
    variants, refused = [], {}
    for provider in providers:
        backend = "reference" if provider == "timm" else provider
        if backend not in mk.available_backends(settings.device):
            refused[provider] = "failed", mk.backends.status(backend).reason
            continue
        try:
            with mk.use_backend(backend):
                step = Step(provider, engine, dtype, settings)
                found = loss_and_gradient(step)
        except Exception as error:
            # A compiler that does not work is said and gone past; in eager nothing may fail.
            if engine == "eager":
                raise
            refused[provider] = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        wrong = "" if provider == "timm" else differences(found, expected, dtype)
        if wrong:
            refused[provider] = "wrong", wrong
        else:
            variants.append(Variant(provider, step, functools.partial(mk.use_backend, backend)))
    return variants, refused


def run(engine: str, dtype: str, providers: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Check and time the providers' steps; returns their rows."""
    on_gpu = settings.device == "cuda"
    with harness.threads(torch.get_num_threads() if on_gpu else 1):
        variants, refused = prepare(engine, dtype, providers, settings)
        # On a GPU several steps make a sample: the host then runs ahead of the GPU, as it does in training.
        clock = harness.synchronized_seconds if on_gpu else harness.cpu_seconds
        samples = harness.interleave(
            variants, settings.rounds, clock, warm=False, min_sample_s=GPU_SAMPLE_S if on_gpu else 0
        )
        peaks = {variant.name: harness.peak_extra_bytes(variant, settings.device) for variant in variants}
    wall = {}
    if settings.wall_rounds and not on_gpu:
        wall = harness.interleave(variants, settings.wall_rounds, harness.wall_seconds, warm=False, min_sample_s=0)
    rows = []
    for provider in providers:
        status, note = refused.get(provider, ("ok", ""))
        row = {"op": "train_step", "model": settings.model, "img_size": settings.img_size, "depth": settings.depth}
        row |= {"engine": engine, "dtype": dtype, "batch": settings.batch, "device": settings.device}
        row |= {"provider": provider, "status": status, "note": note}
        row["parameters"] = sum(p.numel() for p in make_model(provider, settings).parameters())
        row |= dict.fromkeys(("ms", "wall_ms", "images_per_s", "peak_extra_bytes"))
        if provider in samples:
            fastest = min(samples[provider])
            row |= {"ms": fastest * 1e3, "wall_ms": min(wall[provider]) * 1e3 if wall else None}
            row |= {"images_per_s": settings.batch / fastest, "peak_extra_bytes": peaks[provider]}
        for baseline in BASELINES:
            ratio = None
            if provider in samples and baseline in samples:
                ratio = harness.paired_ratio(samples[provider], samples[baseline])
            row[f"vs_{baseline}"] = ratio and ratio.median
            row[f"vs_{baseline}_ci95"] = ratio and [ratio.low, ratio.high]
        rows.append(row)
    return rows


def _ratio_with_interval(cell: tuple[float | None, Sequence[float] | None]) -> str:
    median, interval = cell
    return "-" if median is None else f"{median:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


COLUMNS = (
    Column("engine", "engine", 8),
    Column("dtype", "dtype", 6),
    Column("provider", "provider", 10),
    Column("ms", "ms", 9, number(1)),
    Column("wall_ms", "wall ms", 9, number(1)),
    Column("images_per_s", "img/s", 7, number(2)),
    Column("timm", "time / timm's", 22, _ratio_with_interval),
    Column("reference", "time / reference's", 22, _ratio_with_interval),
    Column("peak_mb", "peak MB", 8, number(1)),
    Column("parameters", "parameters", 10, "{:,}".format),
)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the table shows it."""
    peak = row["peak_extra_bytes"]
    ratios = {baseline: (row[f"vs_{baseline}"], row[f"vs_{baseline}_ci95"]) for baseline in BASELINES}
    return row | ratios | {"peak_mb": None if peak is None else peak / 1e6}


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """Draw the step times: a panel for each engine, a group of bars for each dtype."""
    panels: dict[str, list[Group]] = {}
    for (engine, dtype), group in itertools.groupby(rows, key=lambda r: (r["engine"], r["dtype"])):
        timed = {row["provider"]: row for row in group if row["ms"] is not None}
        bars = {name: row["ms"] for name, row in timed.items()}
        notes = {name: f"{row['vs_timm']:.2f}" for name, row in timed.items() if name != "timm" and row["vs_timm"]}
        if bars:
            panels.setdefault(engine, []).append(Group(dtype, bars, notes))
    if not panels:
        harness.progress(f"nothing was timed: no plot in {path}")
        return
    clock = "elapsed time" if rows[0]["device"] == "cuda" else "CPU time, one thread"
    title = f"Training step of {rows[0]['model']}, batch {rows[0]['batch']}"
    footer = f"{clock}; over the bars: time / timm's plain GAP model's. {harness.describe(harness.machine())}"
    harness.plot_bars(path, title, "ms", panels, footer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 when a fused model's loss or gradient was wrong, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="deit_tiny_patch16_224", help="timm's name of a DeiT that has an mpvg_ twin")
    add("--img-size", type=int, default=224)
    add("--depth", type=int, default=12)
    add("--batch", type=int, default=8)
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--dtypes", nargs="+", choices=tuple(TOLERANCES), default=list(TOLERANCES))
    add("--providers", nargs="+", choices=("timm", *mk.backends.BACKENDS), help="all that run here, if not given")
    harness.common_options(parser, rounds=25)
    add("--quick", action="store_true", help="few rounds, 64-pixel images, depth 4, eager")
    args = parser.parse_args(argv)
    harness.check_common(parser, args)
    if args.quick:
        harness.change_defaults(parser, args, img_size=64, depth=4, rounds=7, engines=["eager"], no_wall=True)
    providers = args.providers or ["timm", "reference", *harness.kernel_backends(args.device)]
    settings = Settings(
        model=args.model,
        img_size=args.img_size,
        depth=args.depth,
        batch=args.batch,
        device=args.device,
        rounds=args.rounds,
        wall_rounds=0 if args.no_wall else min(5, args.rounds),
    )
    allocator = harness.pin_allocator()
    print(f"train: {harness.describe(harness.machine())}")
    harness.print_header(COLUMNS)
    rows = []
    for engine, dtype in itertools.product(args.engines, args.dtypes):
        harness.progress(f"[{engine}, {dtype}] {len(providers)} models, {settings.rounds} rounds")
        found = run(engine, dtype, providers, settings)
        for row in found:
            harness.print_row(COLUMNS, _shown(row))
        rows += found
        if args.json:  # after each group: a run that is cut off leaves what it has
            described = settings._asdict() | {"allocator": allocator, "quick": args.quick}
            harness.write_json(args.json, "train", described, rows)
    if args.plot:
        plot(args.plot, rows)
    return harness.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
