"""The demo (`make demo`, `mpvg demo`): training on real images, checked against the plain formula, and timed.

It trains the digits recipe, runs its first updates on the fused and the `reference` backend side by side, times the two
operators, and writes it all into the report of the run's folder. Exit code 1 when accuracy or loss miss their bounds.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import backends, show_config, use_backend
from .__main__ import BENCHMARKS
from .train import recipes
from .train.checkpoint import RunFolder
from .train.config import Config
from .train.loop import Trainer, cpu_threads, train
from .train.metrics import read_log
from .train.report import write_report
from .train.table import table

MIN_ACCURACY = 97.5  # percent, after the last epoch; the recipe's seeds lie above
MAX_LOSS_DIFFERENCE = 1e-5  # relative, over the first updates
MAX_TRAIN_SECONDS = 90  # on two cores; reported, not enforced: a machine may be slower
UPDATES = 50
OPERATORS = {"dual_ln": "pe_layer_norm", "norm_pool": "pe_norm_pool"}


@contextlib.contextmanager
def step(number: int, what: str):
    """Say what a step does, and after it how long it took."""
    print(f"\n[{number}/4] {what}", flush=True)
    start = time.perf_counter()
    yield
    print(f"[{number}/4] took {time.perf_counter() - start:.1f} s", flush=True)


def compare_backends(config: Config, fused: str, updates: int) -> dict[str, Any]:
    """Run the first `updates` updates on `fused` and on `reference`, taking turns, from the same weights and images.

    Returns:
        difference: largest relative difference of the two losses of an update.
        img_s: backend -> images a second, from the median time of an update.
    """
    names = (fused, "reference")
    trainers, losses = {}, {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        with use_backend(name):
            trainers[name] = Trainer(config)
    steps = trainers[fused].data.steps
    for i in range(updates):
        if i % steps == 0:
            batches = {name: trainer.data.train_batches(1 + i // steps) for name, trainer in trainers.items()}
        for name in names if i % 2 else reversed(names):
            trainers[name].model.train()
            with use_backend(name), cpu_threads(config.threads):
                start = time.perf_counter()
                losses[name].append(float(trainers[name].update(batches[name])))  # waits for the device
                seconds[name].append(time.perf_counter() - start)
    pairs = zip(losses[fused], losses["reference"], strict=True)
    return {
        "difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "img_s": {name: config.batch / statistics.median(seconds[name]) for name in names},
    }


def benchmark(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run a benchmark's quick cases, JSON and plot into `folder`; returns its rows (see benchmarks/harness.py)."""
    json_file, plot = folder / f"{name}.json", folder / f"{name}.png"
    command = [
        sys.executable,
        str(BENCHMARKS / f"bench_{name}.py"),
        "--quick",
        "--json",
        str(json_file),
        "--plot",
        str(plot),
    ]
    subprocess.run(command, check=True)
    return json.loads(json_file.read_text())["rows"]


def benchmark_section(name: str, rows: list[dict[str, Any]]) -> str:
    """One operator's part of the report."""

    def number(value: float | None, digits: int, unit: str = "") -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    lines = [
        (
            f"{r['inputs']} {r['mode']}",
            f"{r['B']}x{r['N']}x{r['D']} {r['dtype']}",
            r["provider"],
            number(r["ms"], 3) if r["status"] == "ok" else r["status"],
            number(r["roof_percent"], 0, " %"),
            number(r["speedup_eager"], 2, "x"),
            number(r["speedup_compile"], 2, "x"),
        )
        for r in rows
    ]
    header = ("inputs", "shape", "provider", "ms", "of the copy roof", "over eager", "over torch.compile")
    return f"### {OPERATORS[name]}\n\n{table(header, lines)}\n\n![{OPERATORS[name]}]({name}.png)\n"


def main(out: Path | None) -> int:
    """Run the demo into the new folder `out` (default: runs/demo-TIME); returns the exit code."""
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    config, failures, sections = recipes.load("digits"), [], []

    with step(1, "which backends there are"):
        show_config()

    with step(2, "train a small MPVG DeiT on 1,437 handwritten digits, test it on 360 others"):
        start = time.perf_counter()
        run: RunFolder = train(config, out, "digits")
        seconds, accuracy = time.perf_counter() - start, read_log(run.path, "epoch")[-1]["test_acc"]
    fused = run.info["backend"]
    if accuracy < MIN_ACCURACY:
        failures.append(f"test accuracy {accuracy:.2f} %, expected at least {MIN_ACCURACY} %")
    speed = f"Trained in {seconds:.0f} s on the `{fused}` backend (meant: at most {MAX_TRAIN_SECONDS} s on two cores)."
    sections.append(f"## Training\n\n{speed}\n")

    with step(3, f"the first {UPDATES} updates on {fused} and on reference, side by side"):
        if fused == "reference":
            devices, reason = backends.status("cpp")
            reason = "it was asked for by name" if devices else f"cpp: {reason}"
            text = f"Nothing to compare: the run itself was on reference ({reason})."
        else:
            result = compare_backends(config, fused, UPDATES)
            text = (
                f"Largest relative loss difference {result['difference']:.1e} (at most {MAX_LOSS_DIFFERENCE:g}); "
                + (", ".join(f"`{name}` {img_s:.0f} img/s" for name, img_s in result["img_s"].items()) + ".")
            )
            if not result["difference"] <= MAX_LOSS_DIFFERENCE:  # NaN fails too
                failures.append(
                    f"the loss differs by {result['difference']:.1e}, expected at most {MAX_LOSS_DIFFERENCE:g}"
                )
        print(text.replace("`", ""))
    sections.append(f"## The first {UPDATES} updates on both backends\n\n{text}\n")

    with step(4, "time the two operators: copy of the same bytes (roof), eager, torch.compile, ours"):
        if BENCHMARKS.is_dir():
            sections.append("## Operators\n\nms is the fastest round's CPU time of one thread (GPU time on a GPU).\n")
            for name in OPERATORS:
                try:
                    sections.append(benchmark_section(name, benchmark(name, run.path)))
                except subprocess.CalledProcessError as error:
                    failures.append(f"the {OPERATORS[name]} benchmark ended with exit code {error.returncode}")
        else:
            print("left out: the benchmarks are in the repository, not in the installed package")

    write_report(run, "\n".join(sections))
    print(f"\nreport: {run.path / 'report.md'}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
