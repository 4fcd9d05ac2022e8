"""What a run measures and where it goes: log.jsonl, metrics.csv, the progress shown, TensorBoard, W&B.

A run that is cut off and resumed leaves the same lines as one that was not, the keys in TIMES aside: the logs are cut
back to where the checkpoint was made (`RunLog.files`), and the sums of a half-filled interval are in it (`Meter`).
"""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from . import InputError
from .config import Log
from .distributed import World
from .figures import FIGURES, Figure, means
from .run_folder import finite, show

TIMES = ("time", "img_s", "data_wait", "memory_mb", "tflops", "mfu")
"""Keys of a log line that differ from one run to the next."""
PLAIN_INTERVAL_S = 60.0
"""Seconds between two lines of progress where there is no terminal."""
# Dense peak TFLOP/s of one GPU with 16-bit inputs, from NVIDIA's data sheets (SXM); fp32 runs are not compared.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0, "V100": 125.0}


def columns(task: str) -> tuple[str, ...]:
    """The columns of metrics.csv."""
    figures = FIGURES[task]
    trained = [f"train_{figure.key}" for figure in figures.trained]
    evaluated = [f"{part}_{figure.key}" for part in ("test", "ema") for figure in figures.evaluated]
    return ("epoch", "step", "lr", *trained, *evaluated, "grad_norm", "skipped", "bad_images", "img_s")


class Meter:
    """Sums over updates (loss, the task's counters, gradient norm, skipped ones), on the device, so that no update
    waits for one.

    One vector of fp64 for each process; only `read` adds them up.

    Attributes:
        keys: what is summed up.
        shared: 1 where each process has a part of the sum, 0 where it is the same on all; like `sums`, on the CPU.
    """

    def __init__(self, device: torch.device, task: str = "classification"):
        self.task = task
        parts = ("loss", *FIGURES[task].counters, "images")
        self.keys = (*parts, "grad_norm", "updates", "skipped")
        self.sums = torch.zeros(len(self.keys), dtype=torch.float64, device=device)
        self.shared = torch.tensor([key in parts for key in self.keys], dtype=torch.float64)

    def add(self, sums: Tensor) -> None:
        """Count one update's sums, in the order of `keys`."""
        self.sums += sums

    def reset(self) -> None:
        self.sums.zero_()

    def read(self, world: World) -> dict[str, float]:
        """The task's trained figures, grad_norm (mean over the updates not skipped), skipped, images.

        Images of a micro-batch whose loss was not finite are left out; where there are no others the figures are nan.
        """
        sums = self.sums.clone()
        if world.size > 1:
            parts = int(self.shared.sum())
            shared = sums[:parts].clone()  # the others are the same on every process
            dist.all_reduce(shared)
            sums[:parts] = shared
        found = dict(zip(self.keys, sums.tolist(), strict=True))  # waits for the device
        return means(self.task, found) | {
            "grad_norm": found["grad_norm"] / max(found["updates"] - found["skipped"], 1),
            "skipped": int(found["skipped"]),
            "images": int(found["images"]),
        }


class Spikes:
    """Finds intervals whose loss is far above those before it: by more than 4 deviations and a tenth of their mean."""

    def __init__(self):
        self.mean, self.square, self.count = 0.0, 0.0, 0

    def __call__(self, loss: float | None) -> bool:
        """Whether `loss` is a spike; remembers it with a weight of a tenth, but not one that is None or not finite."""
        if loss is None or not math.isfinite(loss):
            return False
        deviation = max(self.square - self.mean**2, 0.0) ** 0.5
        spike = self.count >= 10 and loss > self.mean + max(4 * deviation, 0.1 * abs(self.mean))
        weight = max(0.1, 1 / (self.count + 1))
        self.mean += weight * (loss - self.mean)
        self.square += weight * (loss**2 - self.square)
        self.count += 1
        return spike


def memory_mb(device: torch.device) -> float:
    """Peak memory in MB: what torch has held on a GPU, the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_tflops(device: torch.device, amp: str, given: float | None) -> float | None:
    """The device's peak TFLOP/s: the one that is given, or that of a known GPU at 16 bits."""
    if given is not None or device.type != "cuda" or amp == "none":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def check_installed(config: Log) -> None:
    """Raise InputError where the config asks for a logger that is not installed."""
    for name in ("tensorboard", "wandb"):
        if (value := getattr(config, name)) and importlib.util.find_spec(name) is None:
            raise InputError(
                f"config field log.{name} is {value!r}, and {name} is not installed: `pip install {name}` brings it"
            )


class LogFile:
    """A text file that lines are added to. What a full disk does not take is kept, and tried with the next line."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self._warn, self._pending, self._failed = path, warn, b"", False
        self._file = open(path, "ab", buffering=0)

    def write(self, line: str) -> None:
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._warn(f"{self.path} can't be written ({error.strerror}); its lines are kept and tried again")
            self._failed = True

    def flush(self) -> None:
        """Nothing to do: there is no buffer. (With `fileno` and `name`, what a checkpoint asks of a log.)"""

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def name(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._file.close()


def _has_terminal() -> bool:
    """Whether stderr is a terminal with a size; without one (`docker run -t`, some CI) tqdm's bar shows nothing."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except OSError:  # a stand-in without a descriptor, as in notebooks
        return True


class RunLog:
    """log.jsonl (a line every few updates and one an epoch), metrics.csv (a row an epoch), and the progress shown.

    On a terminal the progress is a bar with loss, main figure and img/s; elsewhere plain lines, one an epoch and one a
    minute. TensorBoard and W&B get the same numbers.

    Args:
        folder: the run folder; None on every process but the first, where nothing is written or shown.
        total: updates of the whole run.
        done: updates done before.
        tensorboard: write its files: True, False, or None where it is installed.
        wandb: W&B project, or None.
        config: the run's config, for W&B.
        task: what is trained, whose figures the rows have.
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        done: int = 0,
        *,
        tensorboard: bool | None = False,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
        task: str = "classification",
    ):
        self._columns, self._figures = columns(task), FIGURES[task]
        self._files: dict[str, LogFile] = {}
        self._bar = self._tensorboard = self._wandb = None
        self._shown = folder is not None
        self._total, self._epoch_shown, self._last_plain = total, "", time.monotonic()
        if folder is None:
            return
        self._files = {name: LogFile(folder / name, self.warn) for name in ("log.jsonl", "metrics.csv")}
        if not (folder / "metrics.csv").stat().st_size:
            self._files["metrics.csv"].write(",".join(self._columns))
        if _has_terminal():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
        if tensorboard is not False:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
            except ModuleNotFoundError:
                if tensorboard:
                    raise
        if wandb is not None:
            import wandb as api

            # The name is the run's folder, so that a resumed run goes on in the same place.
            self._wandb = api.init(project=wandb, id=folder.name, name=folder.name, resume="allow", config=config)

    def __enter__(self) -> "RunLog":
        return self

    @property
    def files(self) -> tuple[LogFile, ...]:
        """The log files, for a checkpoint: their sizes are where a resumed run cuts them."""
        return tuple(self._files.values())

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Add a line to log.jsonl; `row` has what JSON has. A number that is not finite is written as null."""
        if self._files:
            line = {"kind": kind, "time": round(time.time(), 3), **row}
            self._files["log.jsonl"].write(json.dumps(finite(line), allow_nan=False))

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._files:
            show(text)

    def warn(self, text: str) -> None:
        """Print a warning, on the first process: they all have the same to say."""
        if self._bar is not None:
            self._bar.write(f"warning: {text}", file=sys.stderr)
        elif self._shown:
            show(f"warning: {text}", sys.stderr)

    def _numbers(self, row: dict[str, Any], prefix: str) -> None:
        numbers = {f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def train(self, row: dict[str, Any]) -> None:
        """Log the updates since the last call; `row` has epoch, step, lr, the trained figures, img_s and more."""
        self.write("train", row)
        self._numbers(row, "train")
        shown = f"epoch {row['epoch']}, loss {row['loss']:.3f}, "
        shown += f"acc {row['acc']:.1f} %, " if "acc" in self._figures.shown else ""
        shown += f"{row['img_s']:.{0 if row['img_s'] >= 10 else 1}f} img/s"
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            self._bar.set_postfix_str(shown + self._epoch_shown)
        elif self._files and time.monotonic() - self._last_plain >= PLAIN_INTERVAL_S:
            self.say(f"step {row['step']}/{self._total}  {shown}  lr {row['lr']:.1e}")
            self._last_plain = time.monotonic()

    def pos(self, row: dict[str, Any]) -> None:
        """Log a look at the position embedding; `row` has epoch, step, layers, pos_norm and correlation."""
        self.write("pos", row)
        for key in ("pos_norm", "correlation"):
            by_layer = dict(zip(map(str, row["layers"]), row[key], strict=True))
            self._numbers(by_layer | {"step": row["step"]}, f"pos/{key}")

    def epoch(self, row: dict[str, Any], best: bool) -> None:
        """Log an epoch with its evaluation; `row` has `columns`, those of what was not evaluated aside."""
        self.write("epoch", row)
        self._numbers(row, "epoch")
        if not self._files:
            return
        self._files["metrics.csv"].write(",".join(str(row.get(name, "")) for name in self._columns))
        main = self._figures.main
        parts = [self._part("train", self._figures.trained, row)]
        parts += [self._part(part, self._figures.evaluated, row) for part in ("test", "ema")]
        if (name := f"test_{main.key}") in row:
            self._epoch_shown = f", test {main.show(row[name])}"
        if self._bar is None:
            end = f"{row['img_s']:6.{0 if row['img_s'] >= 10 else 1}f} img/s{'  best' if best else ''}"
            self.say(f"epoch {row['epoch']:>3}  lr {row['lr']:.1e}  {'  '.join(filter(None, parts))}  {end}")
            self._last_plain = time.monotonic()

    def _part(self, part: str, figures: tuple[Figure, ...], row: dict[str, Any]) -> str:
        """`test loss 0.1234 acc  98.61 %`: those of a part's figures that the progress shows."""
        words = [
            f"{figure.key} {row[name]:{'' if figure.spec == '.4f' else 6}{figure.spec}}{figure.unit}"
            for figure in figures
            if figure.key in self._figures.shown and (name := f"{part}_{figure.key}") in row
        ]
        return f"{part} {' '.join(words)}" if words else ""

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def parse_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one a line, and how many lines hold none.

    A run that was killed may leave half a line, and a full disk more. A number that is not finite is None.
    """
    rows, bad = [], 0
    lines = path.read_bytes().decode(errors="replace").split("\n")
    for line in lines if lines[-1] else lines[:-1]:
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of log.jsonl of one kind: `train`, `epoch`, `pos`, `bad_image`, `skipped`, `spike`.

    None where there is no log. What can't be read is left out; a number that was not finite is None.
    """
    path = folder / "log.jsonl"
    rows = parse_lines(path)[0] if path.exists() else []
    return [row for row in rows if row.get("kind") == kind]
