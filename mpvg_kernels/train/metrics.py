"""What a run measures and where it goes: log.jsonl, metrics.csv, the progress shown, curves.png."""

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # needs no display and has no global state, unlike pyplot
from torch import Tensor
from tqdm import tqdm

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "img_s")


class Window:
    """Loss, accuracy and throughput since it was last read; the sums stay on the device until then."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.start, self.images, self.loss, self.correct = time.perf_counter(), 0, 0.0, 0.0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: its mean loss, its logits (B, classes) and its labels (B,)."""
        self.images += len(labels)
        self.loss = self.loss + loss.detach().double() * len(labels)
        self.correct = self.correct + (logits.detach().argmax(-1) == labels).sum()

    def read(self) -> dict[str, float]:
        """loss (mean over images), acc (percent), img_s (images a second)."""
        loss, acc = float(self.loss) / self.images, 100 * float(self.correct) / self.images  # waits for the device
        return {"loss": loss, "acc": acc, "img_s": round(self.images / (time.perf_counter() - self.start), 1)}


class RunLog:
    """log.jsonl (a line every few updates and one an epoch), metrics.csv (a row an epoch), and the progress shown.

    On a terminal the progress is a bar with loss, accuracy and img/s; elsewhere one plain line an epoch.
    """

    def __init__(self, folder: Path, steps: int):
        self._jsonl = open(folder / "log.jsonl", "a", buffering=1)
        self._csv_file = open(folder / "metrics.csv", "a", buffering=1, newline="")
        self._csv = csv.DictWriter(self._csv_file, COLUMNS, lineterminator="\n")
        self._csv.writeheader()
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._epoch_acc = ""

    def __enter__(self) -> "RunLog":
        return self

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        self._jsonl.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **row}) + "\n")

    def train(self, row: dict[str, Any]) -> None:
        """Log the updates since the last call; `row` has epoch, step, lr, loss, acc, img_s."""
        self._write("train", row)
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            shown = f"epoch {row['epoch']}, loss {row['loss']:.3f}, acc {row['acc']:.1f} %, {row['img_s']:.0f} img/s"
            self._bar.set_postfix_str(shown + self._epoch_acc)

    def epoch(self, row: dict[str, Any], best: bool) -> None:
        """Log an epoch with its evaluation; `row` has COLUMNS."""
        self._write("epoch", row)
        self._csv.writerow(row)
        self._epoch_acc = f", test {row['test_acc']:.2f} %"
        if self._bar is None:
            train, test = (f"{k} loss {row[f'{k}_loss']:.4f} acc {row[f'{k}_acc']:6.2f} %" for k in ("train", "test"))
            end = f"{row['img_s']:6.0f} img/s{'  best' if best else ''}"
            print(f"epoch {row['epoch']:>3}  lr {row['lr']:.1e}  {train}  {test}  {end}", flush=True)

    def __exit__(self, *_) -> None:
        self._jsonl.close()
        self._csv_file.close()
        if self._bar is not None:
            self._bar.close()


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of log.jsonl of one kind, `train` or `epoch`."""
    with open(folder / "log.jsonl") as file:
        return [row for row in map(json.loads, file) if row["kind"] == kind]


def plot_curves(folder: Path) -> None:
    """Draw curves.png: loss and accuracy over the updates, training and held-out."""
    train, epochs = read_log(folder, "train"), read_log(folder, "epoch")
    figure = Figure((10, 3.6), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy (%)"), strict=True):
        x, y = zip(*((r["step"], r[key]) for r in train), strict=True)
        axes.plot(x, y, lw=0.8, color="0.6", label="training batches (augmented)")
        x, y = zip(*((r["step"], r[f"test_{key}"]) for r in epochs), strict=True)
        axes.plot(x, y, marker=".", color="C0", label="held-out images")
        axes.set(xlabel="update", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.axes[0].set_yscale("log")
    figure.axes[1].set_ylim(max(0, min(r["test_acc"] for r in epochs[len(epochs) // 4 :]) - 10), 100.5)
    figure.savefig(folder / "curves.png", dpi=120)
