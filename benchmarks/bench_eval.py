"""`mpvg eval`'s loop next to timm's validate loop: images a second on the same files with the same model.

    python benchmarks/bench_eval.py                    some minutes on two cores
    python benchmarks/bench_eval.py --only digits      one of digits, jpeg64, jpeg224
    python benchmarks/bench_eval.py --quick            few images, two rounds; its figures mean nothing

The plain loop is timm's: its create_loader with the prefetcher that normalises batches, and after each batch its
accuracy, AverageMeter and the loss read from the device, as its validate script does. Ours is `evaluate.predictions` on
`open_images`, and `evaluate.summary` besides: classes, confusion, calibration. Both have opened the files before, and
one thread; they take turns. Without worker processes the clock is the CPU time of one thread; elapsed time is taken of
the same calls.

digits      PNG files of 8x8 pixels and the digits recipe's model: what is left of the time is the loop's own
jpeg64      500x375 JPEG files to 64x64 and a DeiT-Ti: decoding weighs the most
jpeg224     the same files to 224x224: the model does

Keys of a row besides status and note, as in harness.py:

    case                         which of these, and with how many worker processes
    images, batch                how many
    ms, timm_ms                  fastest round for all images: CPU time without workers, else elapsed
    img_s, timm_img_s            images a second of that round
    vs_timm, vs_timm_ci95        our speed / the plain loop's, median over rounds, and its 95 % interval
    wall_vs_timm, ..._ci95       the same by elapsed time
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import timm.data
import timm.utils
import torch
from harness import Column, Variant, number
from PIL import Image
from torch import nn

from mpvg_kernels.tools import evaluate
from mpvg_kernels.train import recipes
from mpvg_kernels.train.config import Config, Data, Model
from mpvg_kernels.train.data import open_images
from mpvg_kernels.train.data.digits import load_splits
from mpvg_kernels.train.data.evaluation import EvalImages
from mpvg_kernels.train.model import create_model

CASES = ("digits", "jpeg64", "jpeg224")
BAR = 1.0
CPU = torch.device("cpu")


def write_digits(root: Path, count: int) -> None:
    """The held-out digits as files, a folder for each class."""
    _, x, y = load_splits()[1]
    for i, (pixels, label) in enumerate(zip(x[:count, 0], y[:count].tolist(), strict=True)):
        (folder := root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255).byte().numpy()).save(folder / f"{i}.png")


def write_jpegs(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Smooth random images in two classes."""
    draw = np.random.default_rng(0)
    for i in range(count):
        (folder := root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


class TimmLoop:
    """timm's validate loop over a folder; `result` holds accuracy (percent) and loss of the last pass."""

    def __init__(self, root: Path, model: nn.Module, images: EvalImages, batch: int, workers: int):
        prepared = dict(images.preprocessing)
        mode = "L" if prepared["input_size"][0] == 1 else "RGB"
        dataset = timm.data.create_dataset("", str(root), search_split=False, input_img_mode=mode)
        self.model = model
        self.loader = timm.data.create_loader(
            dataset, batch_size=batch, use_prefetcher=True, num_workers=workers, device=CPU, **prepared
        )

    def __call__(self) -> None:
        losses, top1, top5 = (timm.utils.AverageMeter() for _ in range(3))
        criterion = nn.CrossEntropyLoss()
        with torch.inference_mode():
            for x, y in self.loader:
                output = self.model(x)
                loss = criterion(output, y)
                acc1, acc5 = timm.utils.accuracy(output, y, topk=(1, 5))
                losses.update(loss.item(), len(x))
                top1.update(acc1.item(), len(x))
                top5.update(acc5.item(), len(x))
        self.result = top1.avg, losses.avg


class OurLoop:
    """What `mpvg eval` does with images that are open."""

    def __init__(self, model: nn.Module, images: EvalImages, config: Config):
        self.model, self.images, self.config = model, images, config

    def __call__(self) -> None:
        found = evaluate.predictions(self.model, self.images, self.config)
        figures = evaluate.summary(found, self.images.num_classes, self.images.class_names)
        self.result = figures["acc"], figures["loss"]


class Elapsed:
    """A call that notes its elapsed time."""

    def __init__(self, call: Callable[[], None]):
        self.call, self.seconds = call, []

    def __call__(self) -> None:
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)


def measure(case: str, root: Path, workers: int, images: int, rounds: int) -> dict[str, Any]:
    """The row of a case on the files in `root`."""
    if case == "digits":
        config = dataclasses.replace(recipes.load("digits"), device="cpu")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    else:
        size = int(case.removeprefix("jpeg"))
        data = Data("folder", str(root), img_size=(size, size), workers=workers)
        config = Config(batch=min(32, images), device="cpu", model=Model(), data=data)
    opened = open_images(config, CPU, folder=root)
    data = SimpleNamespace(
        num_classes=opened.num_classes,
        preprocessing=opened.preprocessing,
        input_size=opened.preprocessing["input_size"],
    )
    torch.manual_seed(0)
    model = create_model(config, data, start=False).eval()
    nn.init.normal_(model.head.weight, std=0.1)  # it may start at zero, where every class is as good
    batch = evaluate.default_batch(config)
    loops = {"timm": TimmLoop(root, model, opened, batch, workers), "ours": OurLoop(model, opened, config)}
    calls = {name: Elapsed(loop) for name, loop in loops.items()}
    try:
        clock = harness.wall_seconds if workers else harness.cpu_seconds
        variants = [Variant(name, call) for name, call in calls.items()]
        samples = harness.interleave(variants, rounds, clock, warm=False, min_sample_s=0)
    finally:
        opened.close()
    ratio = harness.paired_ratio(samples["timm"], samples["ours"])
    wall = harness.paired_ratio(*(calls[name].seconds[-rounds:] for name in ("timm", "ours")))
    best = {name: min(each) for name, each in samples.items()}
    same = np.allclose(loops["ours"].result, loops["timm"].result, rtol=1e-3)
    return {
        "case": f"{case}, {workers} workers, {'elapsed' if workers else 'CPU time'}",
        "status": "ok" if same else "wrong",
        "note": "" if same else f"acc, loss {loops['ours'].result}, the plain loop's are {loops['timm'].result}",
        "device": "cpu",
        "bar": BAR,
        **{"images": images, "batch": batch},
        **{"ms": 1e3 * best["ours"], "timm_ms": 1e3 * best["timm"]},
        **{"img_s": images / best["ours"], "timm_img_s": images / best["timm"]},
        **{"vs_timm": ratio.median, "vs_timm_ci95": [ratio.low, ratio.high]},
        **{"wall_vs_timm": wall.median, "wall_vs_timm_ci95": [wall.low, wall.high]},
    }


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that were asked for, one after the other."""
    for case in args.only:
        images = 12 if args.quick else args.images if case != "digits" else 360
        with tempfile.TemporaryDirectory(dir=args.folder) as root:
            write = write_digits if case == "digits" else write_jpegs
            write(Path(root), images)
            for workers in (0, 1) if case == "jpeg64" else (0,):
                yield measure(case, Path(root), workers, images, args.rounds)


COLUMNS = (
    Column("case", "case", 30),
    Column("img_s", "img/s", 8, number(1)),
    Column("timm_img_s", "timm img/s", 10, number(1)),
    Column("vs_timm", "x timm", 7, number(3)),
    Column("vs_timm_ci95", "95 %", 14, lambda value: "-" if value is None else f"{value[0]:.3f} {value[1]:.3f}"),
    Column("wall_vs_timm", "elapsed", 8, number(3)),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_eval", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=CASES, default=list(CASES))
    add("--images", type=int, default=96, help="JPEG files")
    add("--rounds", type=int, default=11, help="timed rounds")
    add("--folder", help="where the images are written for the while (default: the system's)")
    add("--json", metavar="FILE", help="write the rows there")
    add("--quick", action="store_true", help="few images, two rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        harness.change_defaults(parser, args, rounds=2)
    if args.rounds < 1 or args.images < 2:
        parser.error(f"--rounds is {args.rounds} and --images {args.images}: they start at 1 and 2")
    allocator = harness.pin_allocator()
    print(f"eval: {harness.describe(harness.machine())}\n")
    harness.print_header(COLUMNS)
    rows = []
    with harness.threads(1):
        for row in rows_of(args):
            harness.print_row(COLUMNS, row)
            rows.append(row)
            if args.json:  # a run that is cut off leaves what it has
                settings = {key: value for key, value in vars(args).items() if key not in ("json", "folder")}
                harness.write_json(args.json, "eval", settings | {"allocator": allocator}, rows)
    return harness.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
