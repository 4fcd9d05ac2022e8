"""The ViT-Adapter: a training step on the fused kernels and on the plain formula, and its deformable attention alone.

    python benchmarks/bench_adapter.py                       512x512 images, one at a time: some minutes on one core
    python benchmarks/bench_adapter.py --quick               64x64 images
    python benchmarks/bench_adapter.py --device cuda         batch 8
    python benchmarks/bench_adapter.py --only attention --dtypes fp32

`step`: bench_train's training step of mpvg_vit_adapter_tiny on `reference` and on every backend that runs here, with
the mean square error of the four feature maps against random ones in the place of a head and its loss.

`attention`: one DeformableAttention of that adapter, its projections included, as the injector calls it (queries of
stride 16 look at three maps) and as the extractor does (queries of strides 8, 16 and 32 look at one). Providers:

    eager          ours: PyTorch's grid_sample, a call a level
    compile        torch.compile of it
    torchvision    torchvision's deform_conv2d in its place, a call for each pair of query grid and level: the positions
                   of a 2x2 kernel are the points, its mask their weights, its weight the output projection. It is the
                   same function. In bf16 it computes in fp32, as torchvision's autocast has it

Each is compared in fp32, output and gradients, with ours in fp64 before it is timed.

Keys of a step's row: bench_train's, and

    peak_vs_reference    this step's peak_extra_bytes over those of `reference`

Keys of an attention row besides those in harness.py:

    op                   "deformable_attention"
    case                 "injector" or "extractor"
    mode                 "fwd" (no gradients recorded) or "fwd_bwd" (gradients of query, features and parameters)
    img_size, batch      the adapter's image and batch
    queries, levels      queries of an image, maps that each looks at
    samples              points at which each channel is sampled, over the batch
    error                relative L2 distance of the output from fp64's in this dtype
    speedup_torchvision  how many times faster than torchvision; speedup_torchvision_ci95 its interval
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bench_train
import harness
import torch
from harness import Column, Group, Variant, number
from torch import Tensor
from torchvision.ops import deform_conv2d

import mpvg_kernels as mk
from mpvg_kernels.models.deformable_attention import DeformableAttention, Grid, reference_points

MODEL = "mpvg_vit_adapter_tiny"
DIM, HEADS, POINTS = 192, 6, 4
PROVIDERS = ("eager", "compile", "torchvision")
MODES = ("fwd", "fwd_bwd")
# Largest relative L2 distance in fp32 of the output, and of all gradients as one vector: where a point comes to lie on
# the other side of a pixel's centre, its gradient is another.
TOLERANCE = 1e-4, 2e-2


class Case(NamedTuple):
    """Whose pixels look (maps of these rows and columns), and at what maps."""

    queries: list[Grid]
    maps: list[Grid]


def cases(img_size: int) -> dict[str, Case]:
    """The adapter's two calls for square images."""
    side = img_size // 16
    grid, grids = (side, side), [(2 * side, 2 * side), (side, side), (side // 2, side // 2)]
    return {"injector": Case([grid], grids), "extractor": Case(grids, [grid])}


class Arguments(NamedTuple):
    """What an attention is called with, and the gradient of its output."""

    query: Tensor
    points: Tensor
    features: Tensor
    grad: Tensor


def make(
    case: Case, batch: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[DeformableAttention, Arguments]:
    """An attention whose points are where training could have put them, and its arguments."""
    torch.manual_seed(0)
    attn = DeformableAttention(DIM, len(case.maps), HEADS, POINTS)
    for linear in (attn.sampling_offsets, attn.attention_weights):
        torch.nn.init.normal_(linear.weight, std=0.05)
    points = reference_points(case.queries)
    rows = sum(height * width for height, width in case.maps)
    query, features, grad = (torch.randn(batch, n, DIM) for n in (len(points), rows, len(points)))
    tensors = [v.to(device, dtype) for v in (query, features, grad)]
    for v in tensors[:2]:
        v.requires_grad_()
    return attn.to(device, dtype), Arguments(tensors[0], points.to(device), tensors[1], tensors[2])


# ---- torchvision's deformable convolution in the attention's place


def layout(out: int, size: int) -> tuple[int, int, int]:
    """Stride, padding and dilation with which a kernel of two goes from `size` pixels to `out`."""
    return (1, (out - size + 2) // 2, 2) if out >= size else (size // out, 0, 1)


def convolve(attn: DeformableAttention, case: Case, query: Tensor, features: Tensor) -> Tensor:
    """What `attn` computes for queries at the pixels of `case.queries`, by deform_conv2d of a 2x2 kernel."""
    heads, levels = attn.num_heads, attn.num_levels
    offsets = attn.sampling_offsets(query).float().unflatten(-1, (heads, levels, POINTS, 2))
    weights = attn.attention_weights(query).unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, (levels, POINTS))
    kernel = attn.output_proj.weight.float()[:, :, None, None].expand(-1, -1, 2, 2)
    sizes = [rows * columns for rows, columns in case.maps]
    maps = [
        v.float().mT.unflatten(-1, grid)
        for v, grid in zip(attn.value_proj(features).split(sizes, 1), case.maps, strict=True)
    ]
    found, counts = [], [rows * columns for rows, columns in case.queries]
    for grid, offset, weight in zip(case.queries, offsets.split(counts, 1), weights.split(counts, 1), strict=True):
        total = 0
        for level, value in enumerate(maps):
            strides, paddings, dilations = zip(*map(layout, grid, case.maps[level]), strict=True)
            # (B, Q, heads, points, x and y) -> (B, heads * points * (y and x), rows, columns)
            shifted = offset[:, :, :, level] + shifts(grid, case.maps[level], query.device)[:, None]
            shifted = shifted.flip(-1).permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(-1, grid)
            mask = weight[:, :, :, level].float().permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, grid)
            total = total + deform_conv2d(value, shifted, kernel, None, strides, paddings, dilations, mask)
        found.append(total.flatten(2).mT)
    return torch.cat(found, 1) + attn.output_proj.bias


def shifts(grid: Grid, size: Grid, device: torch.device) -> Tensor:
    """From each kernel position to the query's reference point, in the map's pixels: (Q, 4, 2), x and y."""
    ranges = []
    for out, pixels in zip(grid, size, strict=True):
        stride, padding, dilation = layout(out, pixels)
        at = torch.arange(out, device=device)
        start = at * stride - padding
        point = (at + 0.5) * pixels / out - 0.5
        ranges.append(torch.stack([point - start, point - start - dilation], -1))  # (out, 2 kernel positions)
    y, x = ranges
    rows, columns = grid
    x, y = x[None, :, None, :].expand(rows, -1, 2, -1), y[:, None, :, None].expand(-1, columns, -1, 2)
    return torch.stack([x, y], -1).reshape(rows * columns, POINTS, 2)


# ---- attention: check and time


def function(provider: str, attn: DeformableAttention, case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The provider's attention as a function of query, points and features."""
    if provider == "torchvision":
        return lambda query, points, features: convolve(attn, case, query, features)
    run = torch.compile(attn, dynamic=False) if provider == "compile" else attn
    return lambda query, points, features: run(query, points, features, case.maps)


def gradients(out: Tensor, attn: DeformableAttention, given: Arguments) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [given.query, given.features, *attn.parameters()], given.grad.to(out.dtype))


def check(provider: str, case: Case, batch: int, device: str) -> str:
    """In words, what of the provider's fp32 results differs from ours in fp64; "" when nothing does."""
    found = []
    for name, dtype in (("eager", torch.float64), (provider, torch.float32)):
        attn, given = make(case, batch, device, dtype)
        out = function(name, attn, case)(*given[:3])
        grads = gradients(out, attn, given)
        found.append((out.detach().double(), torch.cat([g.flatten().double() for g in grads])))
    off = [distance(b, a) for a, b in zip(*found, strict=True)]
    return ", ".join(
        f"{name} is off by {at:.1e} (allowed {allowed:.0e})"
        for name, at, allowed in zip(("output", "gradient"), off, TOLERANCE, strict=True)
        if not at <= allowed  # also where it is NaN
    )


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def attention_rows(
    name: str, case: Case, dtype: str, providers: Sequence[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check and time the providers in both modes, in the same rounds; returns their rows."""
    on_gpu, refused, calls = args.device == "cuda", {}, {}
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bf16")
    attn, given = make(case, args.batch, args.device)
    exact_attn, exact = copy.deepcopy(attn).double(), make(case, args.batch, args.device, torch.float64)[1]
    with torch.no_grad():
        expected = exact_attn(exact.query, exact.points, exact.features, case.maps)
    errors = {}
    for provider in providers:
        torch._dynamo.reset()
        try:
            if wrong := check(provider, case, args.batch, args.device):
                refused[provider] = "wrong", wrong
                continue
            run = function(provider, attn, case)
            with torch.no_grad(), autocast:
                errors[provider] = distance(run(*given[:3]), expected)
            with autocast:
                gradients(run(*given[:3]), attn, given)
        except Exception as error:
            if provider != "compile":  # a compiler that does not work is said and gone past
                raise
            refused[provider] = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        calls[provider] = run
    rows = []
    clock = harness.CudaClock() if on_gpu else harness.cpu_seconds
    for mode in MODES:

        def call(run: Callable, mode: str = mode) -> None:
            with autocast, torch.set_grad_enabled(mode == "fwd_bwd"):
                out = run(*given[:3])
            if mode == "fwd_bwd":
                gradients(out, attn, given)

        variants = [Variant(provider, lambda run=run: call(run)) for provider, run in calls.items()]
        with harness.threads(torch.get_num_threads() if on_gpu else 1):
            samples = harness.interleave(variants, args.rounds, clock)
            peaks = {v.name: harness.peak_extra_bytes(v, args.device) for v in variants}
        for provider in providers:
            status, note = refused.get(provider, ("ok", ""))
            row = {"op": "deformable_attention", "case": name, "mode": mode, "dtype": dtype, "device": args.device}
            row |= {"img_size": args.img_size, "batch": args.batch, "queries": len(given.points)}
            row["levels"] = len(case.maps)
            row["samples"] = args.batch * row["queries"] * row["levels"] * POINTS
            row |= {"provider": provider, "status": status, "note": note, "wall_ms": None}
            row["ms"] = min(samples[provider]) * 1e3 if provider in samples else None
            row |= {"peak_extra_bytes": peaks.get(provider), "error": errors.get(provider)}
            baselines = dict.fromkeys(f"speedup_{b}{end}" for b in PROVIDERS for end in ("", "_ci95"))
            rows.append(row | (harness.speedups(samples, provider, PROVIDERS) if provider in samples else baselines))
    return rows


# ---- training step


def step_rows(dtype: str, providers: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """bench_train's rows of the adapter, with the peak's ratio."""
    settings = bench_train.Settings(MODEL, args.img_size, None, args.batch, args.device, args.rounds, 0)
    rows = bench_train.run("eager", dtype, providers, settings)
    plain = next((row["peak_extra_bytes"] for row in rows if row["provider"] == "reference"), None)
    for row in rows:
        peak = row["peak_extra_bytes"]
        row["peak_vs_reference"] = peak / plain if peak and plain else None
    return rows


# ---- output


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the tables show it."""
    peak = row["peak_extra_bytes"]
    reference = row.get("vs_reference"), row.get("vs_reference_ci95")
    return row | {"peak_mb": None if peak is None else peak / 1e6, "reference": reference}


STEP_COLUMNS = (
    Column("dtype", "dtype", 6),
    Column("provider", "provider", 10),
    Column("ms", "ms", 9, number(1)),
    Column("images_per_s", "img/s", 7, number(2)),
    Column("reference", "time / reference's", 22, bench_train.ratio_with_interval),
    Column("peak_mb", "peak MB", 8, number(1)),
    Column("peak_vs_reference", "peak / reference's", 18, number(3)),
)
ATTENTION_COLUMNS = (
    Column("case", "case", 10),
    Column("mode", "mode", 8),
    Column("dtype", "dtype", 6),
    Column("provider", "provider", 12),
    Column("ms", "ms", 9, number(3)),
    Column("speedup_eager", "x eager", 8, number(2)),
    Column("speedup_torchvision", "x torchvision", 13, number(2)),
    Column("peak_mb", "peak MB", 8, number(1)),
    Column("error", "error", 8, lambda error: "-" if error is None else f"{error:.1e}"),
)


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """Draw the times: a panel for the step and for each of the attention's cases."""
    panels: dict[str, list[Group]] = {}
    for row in rows:
        if row["ms"] is None:
            continue
        is_step = row["op"] == "train_step"
        panel, label = ("training step", row["dtype"]) if is_step else (row["case"], f"{row['mode']} {row['dtype']}")
        groups = panels.setdefault(panel, [])
        if not groups or groups[-1].label != label:
            groups.append(Group(label, {}, {}))
        ratio = row["vs_reference"] if is_step else row["speedup_torchvision"]
        groups[-1].bars[row["provider"]] = row["ms"]
        if ratio and row["provider"] not in ("reference", "torchvision"):
            groups[-1].annotations[row["provider"]] = f"{ratio:.2f}"
    if not panels:
        harness.progress(f"nothing was timed: no plot in {path}")
        return
    footer = "over the bars: time / reference's of a step, times faster than torchvision of the attention. "
    title = f"{MODEL}, {rows[0]['img_size']}x{rows[0]['img_size']} pixels, batch {rows[0]['batch']}"
    harness.plot_bars(path, title, "ms", panels, footer + harness.describe(harness.machine()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 when a result was wrong, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=("step", "attention"), help="one of the two")
    add("--img-size", type=int, default=512, help="side of the images, a multiple of 32")
    add("--batch", type=int, default=8 if torch.cuda.is_available() else 1)
    add("--dtypes", nargs="+", choices=tuple(bench_train.TOLERANCES), default=list(bench_train.TOLERANCES))
    add("--providers", nargs="+", choices=mk.backends.BACKENDS, help="of the step; all that run here, if not given")
    add("--attentions", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="providers of the attention")
    harness.common_options(parser, rounds=11)
    add("--quick", action="store_true", help="64-pixel images, few rounds, no torch.compile")
    args = parser.parse_args(argv)
    harness.check_common(parser, args)
    if args.quick:
        eager = [name for name in PROVIDERS if name != "compile"]
        harness.change_defaults(parser, args, img_size=64, batch=1, rounds=3, attentions=eager)
    if args.img_size < 32 or args.img_size % 32:
        parser.error(f"--img-size is {args.img_size}: expected a multiple of 32")
    allocator = harness.pin_allocator()
    print(f"adapter: {harness.describe(harness.machine())}")
    settings = {"model": MODEL, "img_size": args.img_size, "batch": args.batch, "device": args.device}
    settings |= {"rounds": args.rounds, "allocator": allocator, "quick": args.quick}
    rows: list[dict[str, Any]] = []

    def keep(columns: Sequence[Column], found: list[dict[str, Any]]) -> None:
        for row in found:
            harness.print_row(columns, _shown(row))
        rows.extend(found)
        if args.json:  # after each group: a run that is cut off leaves what it has
            harness.write_json(args.json, "adapter", settings, rows)

    if args.only != "attention":
        harness.print_header(STEP_COLUMNS)
        for dtype in args.dtypes:
            providers = args.providers or ["reference", *harness.kernel_backends(args.device)]
            keep(STEP_COLUMNS, step_rows(dtype, providers, args))
        print()
    if args.only != "step":
        harness.print_header(ATTENTION_COLUMNS)
        for (name, case), dtype in itertools.product(cases(args.img_size).items(), args.dtypes):
            harness.progress(f"[{name}, {dtype}] {len(args.attentions)} providers, {args.rounds} rounds")
            keep(ATTENTION_COLUMNS, attention_rows(name, case, dtype, args.attentions, args))
    if args.plot:
        plot(args.plot, rows)
    return harness.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
