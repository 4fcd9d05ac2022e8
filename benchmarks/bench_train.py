"""Time of a training step, end to end: the plain GAP model, MPVG on the plain formula, MPVG on the fused kernels.

    python benchmarks/bench_train.py                         DeiT-Ti, batch 8: some minutes on one core
    python benchmarks/bench_train.py --quick                 a smaller model, under half a minute
    python benchmarks/bench_train.py --engines eager --dtypes bf16 --providers timm cpp
    python benchmarks/bench_train.py --models mpvg_swin_tiny_patch4_window7_224 --schemes mpvg gap --batch 4
    python benchmarks/bench_train.py --table all             every architecture's smallest model, below ten minutes

A step is forward, cross-entropy, backward, AdamW and clearing the gradients, on random images; a model that gives
feature maps (the ViT-Adapter) has their mean square error from random ones as its loss. Providers are our
backends under each of the schemes, and one plain model with global average pooling (GAP) that they are measured
against:

    timm     timm's own class, where timm has the model: DeiT (`class_token=False, global_pool="avg", fc_norm=False`:
             the same width, depth and tokens, without MPVG) and Swin (without an absolute position embedding)
    plain    else: our model under scheme "gap" on the plain formula

With the engine "compile" the model goes through torch.compile. The dtypes are "fp32" and "bf16" (autocast, parameters
in fp32).

Before it is timed, a fused model is compared with the `reference` one from the same weights: loss and gradient.

Keys of a row besides those in harness.py (its speed-ups over eager and compile are not among them):

    op                           "train_step"
    model, img_size, depth       the name that was asked for, image size and number of layers
    scheme                       position scheme; a plain model's is "gap"
    engine                       "eager" or "compile"
    batch                        images a step
    parameters                   of the model
    images_per_s                 batch / ms
    vs_timm, vs_plain, vs_reference     this step's time / that one's, median over rounds (1.03: three per cent slower);
                                 vs_plain is against "timm" where timm has the model, else against "plain";
                                 vs_reference against the same scheme's
    vs_timm_ci95, vs_plain_ci95, vs_reference_ci95    95 % confidence interval of the median
    peak_checkpointing_bytes     peak_extra_bytes with checkpointing (--checkpointing; eager only), else null
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import harness
import timm
import timm.models
import torch
import torch.nn.functional as F
from harness import Column, Group, Variant, number
from torch import nn

import mpvg_kernels as mk
from mpvg_kernels.train import near_matches

BASELINES = ("timm", "reference")
PLAIN = ("timm", "plain")
"""The providers of the plain GAP model, of which a model has one."""
TABLE = (
    "mpvg_deit_tiny_patch16_224",
    "mpvg_swin_tiny_patch4_window7_224",
    "mpvg_ceit_tiny_patch16_224",
    "mpvg_t2t_vit_7_224",
    "mpvg_vit_lite_7_4_32",
)
"""What --table all measures: each architecture's smallest model."""
ENGINES = ("eager", "compile")
GPU_SAMPLE_S = 0.3
# Largest relative difference from `reference` of the loss, and relative L2 distance of the whole gradient.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 1e-1)}


class Settings(NamedTuple):
    """What is trained, and how it is measured."""

    model: str
    """A registered name, or timm's for it, without mpvg_."""
    img_size: int | None
    """None: the model's own; depth too."""
    depth: int | None
    batch: int
    device: str
    rounds: int
    wall_rounds: int
    scheme: str = "mpvg"


def registered(model: str) -> str:
    """Our name of a model that may be given by timm's."""
    return model if model.startswith("mpvg_") else f"mpvg_{model}"


def plain_provider(model: str) -> str:
    """Which of PLAIN a model is measured against."""
    return "timm" if timm.is_model(registered(model).removeprefix("mpvg_")) else "plain"


def make_model(provider: str, settings: Settings) -> nn.Module:
    """The provider's model, in training mode, from the same random state each time."""
    torch.manual_seed(0)
    name, is_swin = registered(settings.model), "swin" in settings.model
    options: dict[str, Any] = {"img_size": settings.img_size}
    if settings.depth is not None:  # a Swin's in stages of two layers
        options |= {"depths": (2,) * (settings.depth // 2)} if is_swin else {"depth": settings.depth}
    if provider == "timm":
        gap = {} if is_swin else {"class_token": False, "global_pool": "avg", "fc_norm": False}
        model = timm.create_model(name.removeprefix("mpvg_"), **gap, **options)
    else:
        model = timm.create_model(name, scheme="gap" if provider == "plain" else settings.scheme, **options)
    return model.to(settings.device).train()


class Step:
    """A training step of one model on one batch; calling it runs it and returns nothing."""

    def __init__(self, provider: str, engine: str, dtype: str, settings: Settings):
        self.model = make_model(provider, settings)
        self.run = torch.compile(self.model, dynamic=False) if engine == "compile" else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)
        self.autocast = torch.autocast(settings.device, torch.bfloat16, enabled=dtype == "bf16")
        torch.manual_seed(1)
        size = timm.models.get_model_input_config(self.model)["input_size"]
        self.images = torch.randn(settings.batch, *size).to(settings.device)
        if self.model.num_classes:
            self.targets = [torch.randint(self.model.num_classes, (settings.batch,)).to(settings.device)]
        else:
            maps = [
                (info["num_chs"], *(side // info["reduction"] for side in size[1:])) for info in self.model.feature_info
            ]
            self.targets = [torch.randn(settings.batch, *shape).to(settings.device) for shape in maps]

    def loss(self) -> torch.Tensor:
        """Cross-entropy of the batch; of feature maps, their mean square error."""
        with self.autocast:
            output = self.run(self.images)
            if isinstance(output, torch.Tensor):
                return F.cross_entropy(output, *self.targets)
            return sum(F.mse_loss(found, target) for found, target in zip(output, self.targets, strict=True))

    def backward(self) -> torch.Tensor:
        """Loss of the batch, its gradients in the parameters."""
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def loss_and_gradient(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the step's batch and the gradient of all learned parameters as one vector; changes no weight."""
    loss = step.backward()
    gradient = torch.cat([p.grad.flatten() for p in step.model.parameters() if p.requires_grad])
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
        backend = "reference" if provider in PLAIN else provider
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
        wrong = "" if provider in PLAIN else differences(found, expected, dtype)
        if wrong:
            refused[provider] = "wrong", wrong
        else:
            variants.append(Variant(provider, step, functools.partial(mk.use_backend, backend)))
    return variants, refused


def run(
    engine: str,
    dtype: str,
    providers: Sequence[str],
    settings: Settings,
    schemes: Sequence[str] = ("mpvg",),
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """Check and time the providers' steps under each scheme, all in the same rounds; returns their rows.

    A plain model is there once. Beside it the plain formula under "gap", the same model again, is left out.
    """
    on_gpu = settings.device == "cuda"
    has_plain = any(provider in PLAIN for provider in providers)
    names: dict[tuple[str, str], str] = {}  # (scheme, provider) of each row: its variant's name
    variants, refused = [], {}
    with harness.threads(torch.get_num_threads() if on_gpu else 1):
        for i, scheme in enumerate(schemes):
            twice = {"reference"} if has_plain and scheme == "gap" else set()
            asked = [p for p in providers if p not in twice and (i == 0 or p not in PLAIN)]
            found, bad = prepare(engine, dtype, asked, settings._replace(scheme=scheme))
            own = {p: p if p in PLAIN else f"{p}, {scheme}" for p in asked}
            names |= {("gap" if p in PLAIN else scheme, p): name for p, name in own.items()}
            variants += [variant._replace(name=own[variant.name]) for variant in found]
            refused |= {own[p]: why for p, why in bad.items()}
        # On a GPU several steps make a sample: the host then runs ahead of the GPU, as it does in training.
        clock = harness.synchronized_seconds if on_gpu else harness.cpu_seconds
        samples = harness.interleave(
            variants, settings.rounds, clock, warm=False, min_sample_s=GPU_SAMPLE_S if on_gpu else 0
        )
        peaks = {variant.name: harness.peak_extra_bytes(variant, settings.device) for variant in variants}
        recomputed = {}
        if checkpointing and engine == "eager":
            for variant in variants:
                variant.call.model.set_grad_checkpointing(True)
                recomputed[variant.name] = harness.peak_extra_bytes(variant, settings.device)
                variant.call.model.set_grad_checkpointing(False)
    wall = {}
    if settings.wall_rounds and not on_gpu:
        wall = harness.interleave(variants, settings.wall_rounds, harness.wall_seconds, warm=False, min_sample_s=0)
    plain = plain_provider(settings.model)
    rows = []
    for (scheme, provider), name in names.items():
        status, note = refused.get(name, ("ok", ""))
        model = make_model(provider, settings._replace(scheme=scheme))
        size = timm.models.get_model_input_config(model)["input_size"][-1]
        row = {"op": "train_step", "model": settings.model, "img_size": size, "depth": _depth(model)}
        row |= {"engine": engine, "dtype": dtype, "batch": settings.batch, "device": settings.device}
        row |= {"provider": provider, "scheme": scheme, "status": status, "note": note}
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row |= dict.fromkeys(("ms", "wall_ms", "images_per_s", "peak_extra_bytes", "peak_checkpointing_bytes"))
        if name in samples:
            fastest = min(samples[name])
            row |= {"ms": fastest * 1e3, "wall_ms": min(wall[name]) * 1e3 if wall else None}
            row |= {"images_per_s": settings.batch / fastest, "peak_extra_bytes": peaks[name]}
            row["peak_checkpointing_bytes"] = recomputed.get(name)
        for key, baseline in (("timm", "timm"), ("plain", plain), ("reference", names.get((scheme, "reference")))):
            ratio = None
            if name in samples and baseline in samples:
                ratio = harness.paired_ratio(samples[name], samples[baseline])
            row[f"vs_{key}"] = ratio and ratio.median
            row[f"vs_{key}_ci95"] = ratio and [ratio.low, ratio.high]
        rows.append(row)
    return rows


def _depth(model: nn.Module) -> int:
    stages = model.layers if hasattr(model, "layers") else [model]
    return sum(len(stage.blocks) for stage in stages)


def ratio_with_interval(cell: tuple[float | None, Sequence[float] | None]) -> str:
    """A median and its interval in a table's cell."""
    median, interval = cell
    return "-" if median is None else f"{median:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


COLUMNS = (
    Column("engine", "engine", 8),
    Column("dtype", "dtype", 6),
    Column("provider", "provider", 10),
    Column("scheme", "scheme", 8),
    Column("ms", "ms", 9, number(1)),
    Column("wall_ms", "wall ms", 9, number(1)),
    Column("images_per_s", "img/s", 7, number(2)),
    Column("plain", "time / plain GAP's", 22, ratio_with_interval),
    Column("reference", "time / reference's", 22, ratio_with_interval),
    Column("peak_mb", "peak MB", 8, number(1)),
    Column("recomputed_mb", "recomputed", 10, number(1)),
    Column("parameters", "parameters", 10, "{:,}".format),
)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the table shows it."""
    ratios = {baseline: (row[f"vs_{baseline}"], row[f"vs_{baseline}_ci95"]) for baseline in ("plain", "reference")}
    peaks = {"peak_mb": row["peak_extra_bytes"], "recomputed_mb": row["peak_checkpointing_bytes"]}
    return row | ratios | {key: None if peak is None else peak / 1e6 for key, peak in peaks.items()}


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """Draw the step times: a panel for each model and engine, a group of bars for each dtype and scheme."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    several = len({row["scheme"] for row in rows if row["provider"] not in PLAIN}) > 1
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panel = row["engine"] if len(models) == 1 else f"{row['model']}, {row['engine']}"
        label = f"{row['dtype']} {row['scheme']}" if several else row["dtype"]
        groups.setdefault((panel, label), []).append(row)
    panels: dict[str, list[Group]] = {}
    for (panel, label), group in groups.items():
        timed = {row["provider"]: row for row in group if row["ms"] is not None}
        bars = {name: row["ms"] for name, row in timed.items()}
        notes = {name: f"{row['vs_plain']:.2f}" for name, row in timed.items() if name not in PLAIN and row["vs_plain"]}
        if bars:
            panels.setdefault(panel, []).append(Group(label, bars, notes))
    if not panels:
        harness.progress(f"nothing was timed: no plot in {path}")
        return
    clock = "elapsed time" if rows[0]["device"] == "cuda" else "CPU time, one thread"
    title = f"Training step of {models[0] if len(models) == 1 else 'each model'}, batch {rows[0]['batch']}"
    footer = f"{clock}; over the bars: time / the plain GAP model's. {harness.describe(harness.machine())}"
    harness.plot_bars(path, title, "ms", panels, footer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 when a fused model's loss or gradient was wrong, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", "--model", nargs="+", default=["deit_tiny_patch16_224"], metavar="NAME",
        help="registered names; timm's name for one, without mpvg_, will do")  # fmt: skip
    add("--schemes", nargs="+", default=["mpvg"], metavar="SCHEME", help="position schemes, for example mpvg gap")
    add("--img-size", type=int, help="(default: the model's own)")
    add("--depth", type=int, help="number of layers; a Swin's come in stages of two (default: the model's own)")
    add("--batch", type=int, default=8)
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--dtypes", nargs="+", choices=tuple(TOLERANCES), default=list(TOLERANCES))
    add("--providers", nargs="+", choices=(*PLAIN, *mk.backends.BACKENDS), help="all that run here, if not given")
    add("--checkpointing", action="store_true", help="measure peak memory with checkpointing too (eager)")
    add("--table", choices=("all",), help="each architecture's smallest model, mpvg and gap, eager, batch 4")
    harness.common_options(parser, rounds=25)
    add("--quick", action="store_true", help="few rounds, 64-pixel images, depth 4, eager")
    args = parser.parse_args(argv)
    harness.check_common(parser, args)
    if args.table:
        table = {"models": list(TABLE), "schemes": ["mpvg", "gap"], "engines": ["eager"], "batch": 4, "rounds": 11}
        harness.change_defaults(parser, args, **table, no_wall=True, checkpointing=True)
    if args.quick:
        harness.change_defaults(parser, args, img_size=64, depth=4, rounds=7, engines=["eager"], no_wall=True)
    check_models(parser, args)
    allocator = harness.pin_allocator()
    print(f"train: {harness.describe(harness.machine())}")
    rows = []
    for model in args.models:
        settings = Settings(
            model=model,
            img_size=args.img_size,
            depth=args.depth,
            batch=args.batch,
            device=args.device,
            rounds=args.rounds,
            wall_rounds=0 if args.no_wall else min(5, args.rounds),
        )
        providers = args.providers or [plain_provider(model), "reference", *harness.kernel_backends(args.device)]
        print(f"\n{model}")
        harness.print_header(COLUMNS)
        for engine, dtype in itertools.product(args.engines, args.dtypes):
            harness.progress(f"[{engine}, {dtype}] {model}: {len(providers)} models, {settings.rounds} rounds")
            found = run(engine, dtype, providers, settings, args.schemes, args.checkpointing)
            for row in found:
                harness.print_row(COLUMNS, _shown(row))
            rows += found
            if args.json:  # after each group: a run that is cut off leaves what it has
                described = settings._asdict() | {"allocator": allocator, "quick": args.quick}
                described |= {"model": " ".join(args.models), "models": args.models, "schemes": args.schemes}
                del described["scheme"]
                harness.write_json(args.json, "train", described, rows)
    if args.plot:
        plot(args.plot, rows)
    return harness.exit_code(rows)


def check_models(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error where a model, a scheme for it or a provider of it does not exist."""
    for model in args.models:
        name = registered(model)
        if not timm.is_model(name):
            close = near_matches(name, timm.list_models("mpvg_*"))
            parser.error(f"--models: {model!r} is no model of ours{close}")
        for scheme in args.schemes:
            try:
                with torch.device("meta"):
                    timm.create_model(name, scheme=scheme, img_size=args.img_size)
            except ValueError as error:
                parser.error(f"{model}: {error}")
        if "timm" in (args.providers or ()) and plain_provider(model) != "timm":
            parser.error(f"--providers: timm has no {model}; its plain GAP model is the provider 'plain'")


if __name__ == "__main__":
    sys.exit(main())
