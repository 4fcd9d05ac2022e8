"""What the trainer costs beside the model: time of its loop, of a checkpoint, and images a second next to a timm loop.

    python benchmarks/bench_trainer.py                       some minutes on two cores
    python benchmarks/bench_trainer.py --only overhead       one of overhead, checkpoint, images
    python benchmarks/bench_trainer.py --quick               tiny models, some seconds; its figures mean nothing

overhead    The loop (`Run._train_epoch`: logging at its interval, gradient norm, guards; no EMA) less forward, loss,
            backward, optimizer step and clearing the gradients, written plainly below, of the same model on the same
            batch in memory. One thread's CPU time; the two take turns, an interval of updates each.
checkpoint  How long a save holds up training: weights, EMA and Adam's moments of a DeiT-B. The first save gets its
            memory from the system, later ones have it. `weights`: RunFolder.save of last/, in the loop's own time.
images      The trainer and a plain loop on timm's create_loader, in turns of an epoch: the same JPEG files, transforms,
            mixup, CutMix, model and optimizer. CPU time of one thread without worker processes, else elapsed time.

Keys of a row besides status and note, as in harness.py; null or absent where it has no meaning:

    op                           "overhead", "checkpoint", "weights" or "images"
    case                         what was run
    bar                          what the trainer is to keep to: percent, seconds, or times the plain loop's speed
    step_ms, loop_ms             fastest plain step and update of the loop
    overhead_percent, ..._ci95   median over rounds of loop / plain - 1, and its 95 % confidence interval
    parts_ms                     where an update's time goes, from passes of their own: medians; the rest is less what
                                 the plain step has outside of its calls
    parts_percent                the parts beside the model step / step_ms: less noisy than overhead_percent
    look_ms, look_percent, ...   a look at the position embedding, and its share of the plain steps between two of them
                                 (config.log.pos_interval); the loop has one in its first update only
    megabytes                    of the tensors that are saved
    first_s, later_s             elapsed seconds that the first save, and the slowest of the later ones, take
    first_cpu_s, later_cpu_s     CPU seconds of the same
    written_s                    elapsed seconds until the slowest later save is on the disk, in the background
    img_s, timm_img_s            images a second, fastest round
    vs_timm, vs_timm_ci95        the trainer's speed / the plain loop's, median over rounds, and its interval
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy as np
import timm.data
import torch
from harness import Column, Variant, number
from PIL import Image
from torch import Tensor, nn

from mpvg_kernels.train import config as configs
from mpvg_kernels.train import loop, recipes
from mpvg_kernels.train.checkpoint import Checkpoints
from mpvg_kernels.train.data import Batch, Data, create_data
from mpvg_kernels.train.data.images import posterize
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.losses import create_loss
from mpvg_kernels.train.metrics import RunLog
from mpvg_kernels.train.optim import create_optimizer
from mpvg_kernels.train.run_folder import RunFolder
from mpvg_kernels.train.signals import Signals
from mpvg_kernels.train.tasks import classification

PARTS = ("overhead", "checkpoint", "images")
EPOCHS = 10**6  # more than are run: the schedule must not end
OVERHEAD_BAR, SAVE_BAR, IMAGES_BAR = 2.0, 1.0, 1.0


# ---- what is trained


class OneBatch(Data):
    """The same random images for every update, in memory: data that cost nothing."""

    def __init__(self, config: configs.Config, input_size: tuple[int, int, int], num_classes: int, steps: int):
        super().__init__(config, torch.device("cpu"), World(), steps * config.batch, 0)
        self.input_size, self.num_classes = input_size, num_classes
        moments = (0.5,) * input_size[0]
        self.preprocessing = {"input_size": input_size, "mean": moments, "std": moments}
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(config.batch, *input_size, generator=generator)
        self.batch = Batch(x, torch.randint(num_classes, (config.batch,), generator=generator))

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


def make_trainer(config: configs.Config, data: Data) -> loop.Trainer:
    """A trainer of these data on the CPU."""
    with mock.patch.object(classification, "create_data", lambda *_: data):
        return loop.Trainer(dataclasses.replace(config, epochs=EPOCHS, device="cpu"))


@contextlib.contextmanager
def make_run(trainer: loop.Trainer) -> Iterator[loop.Run]:
    """The trainer at work, with logs in a folder that is removed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Signals() as signals,
        RunLog(Path(folder), trainer.total) as log,
        contextlib.redirect_stdout(sys.stderr),  # a line of progress a minute
    ):
        yield loop.Run(trainer, signals, log, None, None)


def train_epoch(run: loop.Run) -> None:
    """The next epoch's updates by the trainer's loop."""
    run.trainer.epoch, run.trainer.step = run.trainer.epoch + 1, 0
    run._train_epoch(loop._NoProfiler())


class PlainStep:
    """A training step without a trainer, on the trainer's model, loss and settings of the optimizer."""

    def __init__(self, config: configs.Config, model: nn.Module):
        self.forward, self.criterion, self.optimizer = model, create_loss(config), create_optimizer(config, model)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(self.forward(x), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


# ---- overhead


Places = dict[str, list[tuple[Any, str]]]
"""The parts of a step: of each the functions, as objects and names of their attributes."""


def parts_of_step(step: PlainStep | loop.Trainer) -> Places:
    criterion = step if isinstance(step, PlainStep) else step.task
    calls = [(step, "forward"), (criterion, "criterion"), (Tensor, "backward")]
    return {"model step": calls + [(step.optimizer, "step"), (step.optimizer, "zero_grad")]}


def parts_of_loop(run: loop.Run) -> Places:
    trainer = run.trainer
    return parts_of_step(trainer) | {
        "seeds": [(loop, "seed_everything")],
        "gradient norm": [(nn.utils, "get_total_norm")],
        "guard": [(trainer.skipped, "add"), (trainer, "check")],
        "meters": [(trainer.window, "add"), (trainer.whole, "add")],
        "schedule": [(trainer.schedule, "update")],
        "log": [(run, "_log_interval")],
    }


def parts(places: Places, call: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of a call's parts, and of the rest; of a part in another one the outer gets them."""
    seconds, inside = dict.fromkeys(places, 0.0), False

    def timed(part: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            nonlocal inside
            if inside:
                return call(*args, **kwargs)
            inside, start = True, time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part] += time.process_time() - start
                inside = False

        return wrapper

    with contextlib.ExitStack() as stack:
        for part, found in places.items():
            for owner, name in found:
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        start = time.process_time()
        call()
        return seconds | {"rest": time.process_time() - start - sum(seconds.values())}


def overhead(case: str, config: configs.Config, input_size: tuple, num_classes: int, rounds: int) -> dict[str, Any]:
    """The loop's time less the plain step's, an interval of the log a sample."""
    updates = config.log.interval
    trainer = make_trainer(config, data := OneBatch(config, input_size, num_classes, updates))
    step = PlainStep(config, trainer.model)

    def plain() -> None:
        for _ in range(updates):
            step(*data.batch)

    def look() -> None:
        trainer.pos_images = data.batch.x[: loop.POS_IMAGES]
        trainer.pos_statistics()

    with make_run(trainer) as run:
        calls = {"plain": plain, "loop": functools.partial(train_epoch, run), "look": look}
        variants = [Variant(name, call) for name, call in calls.items()]
        samples = harness.interleave(variants, rounds, harness.cpu_seconds, warm=False, min_sample_s=0)
        passes = []
        for _ in range(math.ceil(rounds / 3)):
            of_plain, of_loop = parts(parts_of_step(step), plain), parts(parts_of_loop(run), calls["loop"])
            passes.append(of_loop | {"rest": of_loop["rest"] - of_plain["rest"]})
    ratio = harness.paired_ratio(samples["loop"], samples["plain"])
    row = {"step_ms": min(samples["plain"]) / updates * 1e3, "loop_ms": min(samples["loop"]) / updates * 1e3}
    row |= {"overhead_percent": 100 * (ratio.median - 1)}
    row["overhead_percent_ci95"] = [100 * (ratio.low - 1), 100 * (ratio.high - 1)]
    row["parts_ms"] = {part: statistics.median(p[part] for p in passes) / updates * 1e3 for part in passes[0]}
    row["parts_percent"] = (
        100 * sum(ms for part, ms in row["parts_ms"].items() if part != "model step") / row["step_ms"]
    )
    of_interval = updates / config.log.pos_interval
    look_ratio = harness.paired_ratio(samples["look"], samples["plain"])
    row |= {"look_ms": min(samples["look"]) * 1e3, "look_percent": 100 * look_ratio.median * of_interval}
    row["look_percent_ci95"] = [100 * bound * of_interval for bound in (look_ratio.low, look_ratio.high)]
    return row_of("overhead", case, OVERHEAD_BAR, row)


# ---- checkpoint


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """Elapsed and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def checkpoint(model: configs.Model, size: int, saves: int, place: str | None) -> list[dict[str, Any]]:
    """A row each for checkpoints and for the weights that are written beside them."""
    config = configs.Config(batch=1, model=model, optim=configs.Optim(ema_decay=0.9999))
    trainer = make_trainer(config, data := OneBatch(config, (3, size, size), 1000, 1))
    loop.train_mode(trainer.model, config)
    trainer.update(data.train_batches(1))  # from here on Adam has moments
    weights, refused, times = trainer.model.state_dict(), [], {"checkpoint": [], "weights": [], "written": []}
    with tempfile.TemporaryDirectory(dir=place) as parent, make_run(trainer) as run:
        folder = RunFolder.create(Path(parent) / "run", {})
        folder.warn = refused.append
        checkpoints = Checkpoints(folder, config.checkpoint.keep, warn=refused.append)
        checkpoints.require_space(trainer.snapshot_bytes())
        for _ in range(saves):
            trainer.updates += 1
            times["checkpoint"].append(clocked(lambda: checkpoints.save(trainer.snapshot(run.log))))
            times["written"].append(clocked(checkpoints.wait))
        for _ in range(saves):
            times["weights"].append(clocked(lambda: folder.save("last", trainer.model, weights)))
        folder.unlock()
    sizes = {"checkpoint": trainer.snapshot_bytes(), "weights": sum(t.nbytes for t in weights.values())}
    rows = []
    for op, bar in (("checkpoint", SAVE_BAR), ("weights", None)):
        first, later = times[op][0], [max(each) for each in zip(*times[op][1:], strict=True)]
        row = {"megabytes": sizes[op] / 1e6, "first_s": first[0], "later_s": later[0]}
        row |= {"first_cpu_s": first[1], "later_cpu_s": later[1]}
        if op == "checkpoint":
            row["written_s"] = max(wall for wall, _ in times["written"][1:])
        rows.append(row_of(op, model.name, bar, row, "; ".join(refused)))
    return rows


# ---- images a second


def write_images(root: Path, train: int, size: tuple[int, int]) -> None:
    """JPEG files like photographs in size: blotches with noise on them, in two classes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", 4)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
        for i in range(count):
            blotches = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype="uint8")).resize(size)
            pixels = np.asarray(blotches) + draw.normal(0, 8, (size[1], size[0], 3))
            image = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
            image.save(root / split / "ab"[i % 2] / f"{i:04}.jpg", quality=90)


class TimmLoop:
    """An epoch as timm's training script has it at its plainest: create_loader, mixup, step, schedule, a loss read."""

    def __init__(self, trainer: loop.Trainer):
        config, self.trainer = trainer.config, trainer
        aug = config.aug
        with mock.patch.dict(timm.data.auto_augment.NAME_TO_OP, PosterizeIncreasing=posterize):  # its own may fail
            self.loader = self._loader()
        self.mix = timm.data.Mixup(
            mixup_alpha=aug.mixup,
            cutmix_alpha=aug.cutmix,
            prob=aug.mix_prob,
            switch_prob=aug.mix_switch_prob,
            label_smoothing=config.loss.smoothing,
            num_classes=trainer.data.num_classes,
        )
        self.step = PlainStep(config, trainer.model)
        self.schedule = loop.create_schedule(config, self.step.optimizer, trainer.data.steps)

    def _loader(self) -> Iterable[tuple[Tensor, Tensor]]:
        config, prepared = self.trainer.config, self.trainer.data.preprocessing
        aug = config.aug
        return timm.data.create_loader(
            timm.data.create_dataset("", config.data.root, split="train"),
            batch_size=config.batch,
            is_training=True,
            num_workers=config.data.workers,
            use_prefetcher=False,
            persistent_workers=config.data.workers > 0,
            re_prob=aug.erase_prob,
            re_mode="pixel",
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            color_jitter=aug.color_jitter,
            auto_augment=aug.auto_augment,
            interpolation=aug.interpolation,
            **{key: prepared[key] for key in ("input_size", "mean", "std")},
        )

    def __call__(self) -> None:
        self.trainer.model.train()
        for i, (x, y) in enumerate(self.loader):
            loss = self.step(*self.mix(x, y))
            self.schedule.update(i)
            if i % self.trainer.config.log.interval == 0:
                loss.item()


def images(root: Path, workers: int, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """The trainer's speed on a folder of images, and the timm loop's."""
    recipe = recipes.load("deit_tiny_in1k")
    data = dataclasses.replace(recipe.data, root=str(root), workers=workers, img_size=(size, size))
    aug, optim = (
        dataclasses.replace(recipe.aug, repeats=1),
        dataclasses.replace(recipe.optim, lr_base_batch=None, ema_decay=None),
    )
    config = dataclasses.replace(recipe, data=data, aug=aug, optim=optim, batch=batch, amp="none", device="cpu")
    trainer = make_trainer(config, create_data(config, torch.device("cpu"), World()))
    try:
        with make_run(trainer) as run:
            variants = [Variant("timm", TimmLoop(trainer)), Variant("loop", functools.partial(train_epoch, run))]
            clock = harness.wall_seconds if workers else harness.cpu_seconds
            samples = harness.interleave(variants, rounds, clock, warm=False, min_sample_s=0)
    finally:
        trainer.data.close()
    ratio = harness.paired_ratio(samples["timm"], samples["loop"])
    count = trainer.data.steps * batch
    row = {"img_s": count / min(samples["loop"]), "timm_img_s": count / min(samples["timm"])}
    row |= {"vs_timm": ratio.median, "vs_timm_ci95": [ratio.low, ratio.high]}
    clock_name = "elapsed" if workers else "CPU time"
    return row_of("images", f"{size} px, batch {batch}, {workers} workers, {clock_name}", IMAGES_BAR, row)


# ---- output


def row_of(op: str, case: str, bar: float | None, figures: dict[str, Any], refused: str = "") -> dict[str, Any]:
    status = "failed" if refused else "ok"
    return {"op": op, "case": case, "status": status, "note": refused, "device": "cpu", "bar": bar} | figures


def _figure(row: dict[str, Any]) -> str:
    """What the bar is set for, in words, and what explains it."""
    if row["op"] == "overhead":
        low, high = row["overhead_percent_ci95"]
        shares = f"{row['overhead_percent']:.2f} % [{low:.2f}, {high:.2f}], by parts {row['parts_percent']:.2f} %"
        of_parts = ", ".join(f"{p} {ms:.2f}" for p, ms in row["parts_ms"].items())
        look = f"a look at the PE {row['look_ms']:.1f} ms, {row['look_percent']:.2f} %"
        return f"{shares}, of {row['step_ms']:.1f} ms; {of_parts}; {look}"
    if row["op"] == "images":
        low, high = row["vs_timm_ci95"]
        speeds = f"{row['img_s']:.1f} img/s, timm loop {row['timm_img_s']:.1f}"
        return f"{row['vs_timm']:.3f} [{low:.3f}, {high:.3f}] x; {speeds}"
    figures = f"first {row['first_s']:.2f} s, later {row['later_s']:.2f} s (CPU {row['first_cpu_s']:.2f}, "
    figures += f"{row['later_cpu_s']:.2f}) for {row['megabytes']:.0f} MB"
    return figures + (f", on the disk {row['written_s']:.1f} s later" if "written_s" in row else "")


COLUMNS = (
    Column("op", "op", 10),
    Column("case", "case", 42),
    Column("bar", "bar", 4, number(1)),
    Column("figure", "measured", 8),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_trainer", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rounds", type=int, default=15, help="timed rounds of overhead and images")
    add("--saves", type=int, default=4, help="checkpoints; from 2")
    add("--folder", help="where checkpoints and images are written for the while (default: the system's)")
    add("--json", metavar="FILE", help="write the rows there")
    add("--quick", action="store_true", help="tiny models, two rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        harness.change_defaults(parser, args, rounds=2, saves=2)
    if args.rounds < 1 or args.saves < 2:
        parser.error(f"--rounds is {args.rounds} and --saves {args.saves}: they start at 1 and 2")
    allocator = harness.pin_allocator()
    print(f"trainer: {harness.describe(harness.machine())}\n")
    harness.print_header(COLUMNS)
    rows = []
    with harness.threads(1):
        for row in measure(args):
            harness.print_row(COLUMNS, row | {"figure": _figure(row)})
            rows.append(row)
            if args.json:  # a run that is cut off leaves what it has
                settings = {key: value for key, value in vars(args).items() if key not in ("json", "folder")}
                harness.write_json(args.json, "trainer", settings | {"allocator": allocator}, rows)
    return 1 if any(row["status"] != "ok" for row in rows) else 0


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that were asked for, one after the other."""
    quick = args.quick
    tiny = configs.Model(embed_dim=32, depth=2, num_heads=2)
    if "overhead" in args.only:
        log = configs.Log(interval=2) if quick else configs.Log()
        # Steps of about 100 ms. With few images the gradient's norm, which is read from memory, weighs the most.
        for depth, batch in ((2, 2),) if quick else ((12, 10), (4, 30)):
            size = 32 if quick else 64
            model = tiny if quick else configs.Model(depth=depth)
            case = f"DeiT-Ti, {depth} layers, {size} px, batch {batch}"
            config = configs.Config(batch=batch, model=model, log=log)
            yield overhead(case, config, (3, size, size), 1000, args.rounds)
        recipe = dataclasses.replace(recipes.load("digits"), log=log)
        yield overhead("digits recipe", recipe, (1, 8, 8), 10, args.rounds)
    if "checkpoint" in args.only:
        model = tiny if quick else configs.Model(name="mpvg_deit_base_patch16_224")
        yield from checkpoint(model, 32 if quick else 224, args.saves, args.folder)
    if "images" in args.only:
        count, batch, size, pixels = (8, 4, 32, (64, 48)) if quick else (128, 32, 64, (500, 375))
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            write_images(Path(folder), count, pixels)
            for workers in (0, 1):
                yield images(Path(folder), workers, batch, size, args.rounds)


if __name__ == "__main__":
    sys.exit(main())
