"""Everything that a GPU is needed for, in one command.

    bash benchmarks/gpu_suite.sh [STAGE ...] [--out DIR] [--wheels DIR] [--minutes M]

Stages run in the order of STAGES, each in processes of its own, with a time limit of its own and the rest of --minutes
as the other; what a stage has written stays whatever comes after it. It needs Python, torch 2.11 or later, Triton and
timm; with nvcc it builds the CUDA C++ kernels too. No network. What is missing (pytest, matplotlib, a sanitizer, a GPU)
skips what needs it, and the summary says so.

Files in the folder: summary.md and summary.json; for each stage STAGE.log, and its JSON and PNG files, which
benchmarks/results/README.md explains. Exit codes: 0 nothing failed, 1 a stage failed or ran out of time, 2 usage.
"""

import argparse
import concurrent.futures
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

# Tensors of 64 MiB and more in bf16, DeiT's widths.
SIZES = ("1024x196x192", "512x196x384", "256x196x768")
INPUTS = {"dual_ln": "x+f", "norm_pool": "x"}
GRID_SIZES = tuple(f"{B}x{N}x{D}" for D in (96, 192, 384, 768, 1280) for N in (49, 196, 577) for B in (8, 64, 256))
# Wheels go here, out of the results' way and out of the environment's.
WHEELS = ROOT / "build" / "gpu_suite_wheels"
# What is out of time is asked to end before it is killed: pytest then still writes its report.
GRACE_S = 5.0
MODELS = {"deit_tiny": 256, "deit_small": 256, "deit_base": 128}
TEST_FILES = ("operators", "random_cases", "pe_chain", "modules", "compile", "bad_input", "backends", "tuned")
TEST_FILES += ("mpvg_vit", "gpu")
# What torch says of itself and the GPU, asked in a process of its own: a broken driver must not take this one down.
PROBE = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": None}
if torch.cuda.is_available():
    facts["device"] = torch.cuda.get_device_name()
    facts["capability"] = "%d.%d" % torch.cuda.get_device_capability()
print(json.dumps(facts))
"""


class Skipped(Exception):
    """A stage, or a part of it, can't run here; the message says why."""


class Failed(Exception):
    """A stage ran and something in it is wrong; the message says what."""


class Suite:
    """What the stages share: the folder, the GPU's facts, the clock, and how to run a command."""

    def __init__(self, out: Path | None, facts: dict[str, Any], wheels: Path | None, minutes: float):
        self.out, self.facts, self.wheels = out, facts, wheels
        self.ends = time.monotonic() + 60 * minutes
        self.stage, self.stage_ends = "", self.ends
        paths = [str(ROOT), *([str(WHEELS)] if wheels else []), os.environ.get("PYTHONPATH", "")]
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        self.env.pop("TRITON_INTERPRET", None)

    def has(self, module: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([sys.executable, "-c", code], env=self.env).returncode == 0

    def plots(self, option: str, name: str) -> list[str]:
        """The option that asks for a plot, where there is matplotlib to draw it."""
        return [option, str(self.out / name)] if self.has("matplotlib") else []

    def python(self, *arguments: str | Path, **kwargs) -> str:
        return self.run([sys.executable, *map(str, arguments)], **kwargs)

    def run(self, command: Sequence[str], env: dict[str, str] | None = None, allowed: Sequence[int] = (0,)) -> str:
        """Run a command within the stage's time, its output in the stage's log; returns what it printed."""
        left = self.stage_ends - time.monotonic()
        log = self.out / f"{self.stage}.log"
        if left < 1:
            raise Failed(f"the stage's time was over before {_shown(command)}")
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.env | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=left)
            over = False
        except subprocess.TimeoutExpired:
            over = True
            try:
                os.killpg(process.pid, signal.SIGINT)  # its children too
                output, _ = process.communicate(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
        with log.open("a") as file:
            file.write(f"$ {_shown(command)}\n{output}\n")
        if over:
            raise Failed(f"out of time after {left:.0f} s: {_shown(command)}")
        if process.returncode not in allowed:
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
            raise Failed(f"{_shown(command)} ended with exit code {process.returncode}: {last.strip()[:200]}")
        return output

    def each(self, commands: Sequence[Sequence[str | Path]]) -> None:
        """Run Python on each, one after the other; one that fails does not keep the next from running."""
        failures = []
        for command in commands:
            try:
                self.python(*command)
            except Failed as failure:
                failures.append(str(failure))
        if failures:
            raise Failed("; ".join(failures))

    def at_once(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of several calls that run at the same time; an exception stands in the place of a result."""

        def caught(call: Callable[[], Any]) -> Any:
            try:
                return call()
            except Exception as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(caught, calls))


def _shown(command: Sequence[str]) -> str:
    words = [Path(word).name if word == sys.executable else word for word in map(str, command)]
    text = " ".join(words).replace(f"{ROOT}/", "")
    return text if len(text) < 200 else f"{text[:200]} ..."


# ---- stages: each returns a line for the summary


def wheels(suite: Suite) -> str:
    """Install the peers' wheels, for this run alone."""
    if not suite.wheels:
        raise Skipped("--wheels is not given: peers are those of the environment")
    files = sorted(suite.wheels.glob("*.whl"))
    if not files:
        raise Failed(f"--wheels {suite.wheels}: there is no .whl file")
    shutil.rmtree(WHEELS, ignore_errors=True)
    suite.python("-m", "pip", "install", "--no-index", "--no-deps", "--target", WHEELS, *files)
    return ", ".join(file.name for file in files)


def build(suite: Suite) -> str:
    """Compile the extensions in place, for this GPU; then say which backends there are."""
    environment = {"MPVG_BUILD": "auto", "TORCH_CUDA_ARCH_LIST": suite.facts["capability"]}
    suite.python("setup.py", "build_ext", "--inplace", env=environment)
    info = suite.python("-m", "mpvg_kernels", "info")
    there = re.findall(r"^  (\w+) +yes", info, re.MULTILINE)
    missing = re.findall(r"^  (\w+) +no +(.*)", info, re.MULTILINE)
    return f"backends: {', '.join(there)}" + "".join(f"; no {name}: {reason}" for name, reason in missing)


def tests(suite: Suite) -> str:
    """The operators' tests on the GPU backends, in several processes at a time."""
    if not suite.has("pytest"):
        raise Skipped("pytest is not installed")
    files = [f"tests/test_{name}.py" for name in TEST_FILES]
    chosen = ["-k", "(triton or cuda or test_gpu) and not sanitizer", "-p", "no:cacheprovider", "-q"]
    listed = suite.python("-m", "pytest", *files, *chosen, "--collect-only")
    ids = [line for line in listed.splitlines() if "::" in line and line.startswith("tests/")]
    if not ids:
        raise Failed("pytest collected no test")
    _remove(suite.out.glob("tests-*.xml"))
    shards = min(8, max(1, (os.cpu_count() or 2) // 2))

    def shard(at: int) -> None:
        report = f"--junitxml={suite.out / f'tests-{at}.xml'}"
        suite.python("-m", "pytest", *ids[at::shards], report, "-p", "no:cacheprovider", "-q", allowed=(0, 1))

    ended = suite.at_once([lambda at=at: shard(at) for at in range(shards)])
    return _tally(suite.out.glob("tests-*.xml"), [str(e) for e in ended if e is not None])


def sanitizer(suite: Suite) -> str:
    """compute-sanitizer's three tools on a short case of every kernel."""
    if not suite.has("pytest"):
        raise Skipped("pytest is not installed")

    _remove(suite.out.glob("sanitizer-*.xml"))

    def tool(name: str) -> None:
        report = f"--junitxml={suite.out / f'sanitizer-{name}.xml'}"
        suite.python(
            "-m",
            "pytest",
            "tests/test_gpu.py",
            "-k",
            name,
            report,
            "-rs",
            "-p",
            "no:cacheprovider",
            "-q",
            allowed=(0, 1),
        )

    ended = suite.at_once([lambda name=name: tool(name) for name in ("memcheck", "racecheck", "initcheck")])
    return _tally(suite.out.glob("sanitizer-*.xml"), [str(e) for e in ended if e is not None])


def _remove(files) -> None:
    """What an earlier run left must not be counted."""
    for file in files:
        file.unlink()


def _tally(reports, errors: list[str]) -> str:
    """Counts over pytest's reports, as a line; Failed where something failed, Skipped where all was skipped."""
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            kind = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
            if (skip := case.find("skipped")) is not None:
                kind = "skipped"
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            outcomes[kind].append(skip.get("message", "") if kind == "skipped" else name)
    line = ", ".join(f"{len(names)} {kind}" for kind, names in outcomes.items())
    if outcomes["failed"] or errors:
        raise Failed("; ".join([line, *outcomes["failed"][:10], *errors]))
    if not outcomes["passed"]:
        raise Skipped("; ".join(sorted(set(outcomes["skipped"]))) or "no test ran")
    return line


def operators(suite: Suite) -> str:
    """Both operators' benchmarks at 64 MiB and more, against eager, torch.compile and the peers that are there."""

    def command(name: str, *options: str | Path) -> list[str | Path]:
        fixed = ("--sizes", *SIZES, "--inputs", INPUTS[name], "--modes", "fwd", "bwd", "fwd_bwd", "--device", "cuda")
        return [BENCHMARKS / f"bench_{name}.py", *fixed, *options]

    _fill_compile_caches(
        suite,
        [
            command(name, "--dtypes", dtype, "--providers", "compile", "--rounds", "1")
            for name in INPUTS
            for dtype in ("bf16", "fp32")
        ],
    )
    timed = []
    for name in INPUTS:
        files = ["--json", suite.out / f"{name}.json", *suite.plots("--plot", f"{name}.png")]
        files += suite.plots("--roofline", f"{name}-roofline.png")
        timed.append(command(name, "--dtypes", "bf16", "fp32", "--rounds", "15", *files))
    suite.each(timed)
    return f"dual_ln and norm_pool at {', '.join(SIZES)}"


def _fill_compile_caches(suite: Suite, commands: Sequence[Sequence[str | Path]]) -> None:
    """Let torch.compile do its work for all of them at the same time, before anything is timed; its caches keep it."""
    suite.at_once([lambda command=command: suite.python(*command, allowed=range(256)) for command in commands])


def grid(suite: Suite) -> str:
    """A speed-up over eager for many sizes: the heat map."""
    suite.python(
        BENCHMARKS / "bench_dual_ln.py", "--sizes", *GRID_SIZES, "--dtypes", "bf16", "--inputs", "x+f",
        "--modes", "fwd_bwd", "--rounds", "5", "--device", "cuda", "--providers", "eager", *_kernels(suite),
        "--json", suite.out / "grid.json", *suite.plots("--heatmap", "grid-heatmap.png"),
    )  # fmt: skip
    return f"{len(GRID_SIZES)} sizes"


def _kernels(suite: Suite) -> list[str]:
    code = "import mpvg_kernels as mk; print(*[b for b in mk.available_backends('cuda') if b != 'reference'])"
    return suite.python("-c", code).split()


def overhead(suite: Suite) -> str:
    """Host time of a tiny call; and pe_chain, of which launches are the larger part."""
    timed = []
    for name in ("overhead", "pe_chain"):
        files = ["--json", suite.out / f"{name}.json", *suite.plots("--plot", f"{name}.png")]
        timed.append([BENCHMARKS / f"bench_{name}.py", "--device", "cuda", "--rounds", "15", *files])
    suite.each(timed)
    return "host time of a tiny call; pe_chain"


def memory(suite: Suite) -> str:
    """What DeiT-Ti saves for its backward and needs at its peak, eager, with and without checkpointing."""
    batch = MODELS["deit_tiny"]
    options = ("--engines", "eager", "--sizes", "256x196x192", "--batch", str(batch), "--device", "cuda")
    suite.python(BENCHMARKS / "bench_memory.py", *options, "--json", suite.out / "memory.json")
    return f"saved bytes and peaks, batch {batch}"


def train(suite: Suite) -> str:
    """DeiT-Ti, -S and -B training steps in bf16, eager and compiled: timm's plain GAP, MPVG plain, MPVG fused."""

    def command(model: str, *options: str | Path) -> list[str | Path]:
        name = f"{model}_patch16_224"
        batch = str(MODELS[model])
        fixed = ("--model", name, "--batch", batch, "--dtypes", "bf16", "--device", "cuda")
        return [BENCHMARKS / "bench_train.py", *fixed, *options]

    def timed(engine: str, suffix: str) -> list[list[str | Path]]:
        return [
            command(model, "--engines", engine, "--rounds", "7", "--json", suite.out / f"train-{model}{suffix}.json")
            for model in MODELS
        ]

    suite.each(timed("eager", ""))
    # Compiling takes minutes, so it comes last, each model of each provider in a process of its own.
    once = ("--engines", "compile", "--rounds", "1", "--providers")
    _fill_compile_caches(
        suite, [command(model, *once, name) for model in MODELS for name in ("timm", "reference", *_kernels(suite))]
    )
    suite.each(timed("compile", "-compiled"))
    return f"training steps of {', '.join(f'{model} (batch {batch})' for model, batch in MODELS.items())}"


def adapter(suite: Suite) -> str:
    """The ViT-Adapter's training step against the plain formula's, and its deformable attention alone."""
    files = ("--json", suite.out / "adapter.json", *suite.plots("--plot", "adapter.png"))
    suite.python(BENCHMARKS / "bench_adapter.py", "--device", "cuda", "--batch", "8", "--rounds", "9", *files)
    return "mpvg_vit_adapter_tiny, 512x512, batch 8"


def digits(suite: Suite) -> str:
    """The digits recipe on the GPU, and a run that goes on where it was cut off."""
    missing = [module for module in ("tyro", "sklearn", "matplotlib") if not suite.has(module)]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed")
    folder = suite.out / "digits"
    if folder.exists():
        shutil.rmtree(folder)
    train = ("-m", "mpvg_kernels", "train", "--recipe", "digits", "--device", "cuda", "--out")
    suite.python(*train, folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    result = {"test_acc": epochs[-1]["test_acc"], "img_s": sum(row["img_s"] for row in epochs) / len(epochs)}
    (suite.out / "digits.json").write_text(json.dumps(result, indent=1) + "\n")
    # A run that goes on from a checkpoint in the middle of an epoch, beside the one that it is of.
    whole, resumed = folder / "whole", folder / "resumed"
    short = ("--epochs", "3", "--sched.warmup_epochs", "1", "--deterministic", "True", "--checkpoint.interval", "30")
    short += ("--optim.ema_decay", "0.9")
    suite.python(*train, whole, *short, "--checkpoint.keep", "9")
    suite.python(*train, resumed, *short, "--resume", whole / "checkpoints" / "step-00000030")
    weights = [f"{name}/model.safetensors" for name in ("last", "ema")]
    if other := [name for name in weights if (whole / name).read_bytes() != (resumed / name).read_bytes()]:
        raise Failed(f"a resumed run has other bits than the whole one in {' and '.join(other)}")
    note = f"accuracy {result['test_acc']:.2f} % on the held-out images, {result['img_s']:.0f} img/s"
    return f"{note}; a resumed run has the bits of the whole one"


def commands(suite: Suite) -> str:
    """What `mpvg` does with a finished run: eval, predict and export find on the GPU what the run found itself."""
    run = suite.out / "digits"
    if not (run / "log.jsonl").exists():
        raise Skipped("there is no run: the stage `digits` makes it")
    mpvg, found = ("-m", "mpvg_kernels"), suite.out / "commands"
    found.mkdir(exist_ok=True)
    suite.python(*mpvg, "eval", run, "--device", "cuda", "--json", found / "eval.json")
    accuracy = json.loads((found / "eval.json").read_text())["acc"]
    if abs(accuracy - json.loads((suite.out / "digits.json").read_text())["test_acc"]) > 0.01:
        raise Failed(f"mpvg eval finds an accuracy of {accuracy:.2f} %, which the run did not")
    pictures = ROOT / "docs" / "samples"
    for device in ("cuda", "cpu"):
        to = found / f"predict-{device}.csv"
        suite.python(*mpvg, "predict", run, pictures, "--device", device, "--top", "1", "--format", "csv", "--out", to)
    on_gpu, on_cpu = (_probabilities(found / f"predict-{device}.csv") for device in ("cuda", "cpu"))
    if on_gpu.keys() != on_cpu.keys() or any(abs(on_gpu[name] - on_cpu[name]) > 0.02 for name in on_cpu):
        raise Failed("mpvg predict finds other probabilities on the GPU than on the CPU; see commands/")
    # The command itself compares what it wrote with the model, here and in a fresh process.
    target = ("--format", "aot", "--device", "cuda", "--out", found / "digits.pt2", "--json", found / "export.json")
    suite.python(*mpvg, "export", run, *target)
    return f"eval {accuracy:.2f} %; predict on {len(on_gpu)} pictures; export to an AOTInductor package"


def _probabilities(path: Path) -> dict[str, float]:
    """Of each picture in a CSV of `mpvg predict --top 1`, by its path."""
    with path.open() as file:
        return {row["file"]: float(row["probability_1"]) for row in csv.DictReader(file)}


NCU_METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes.sum.per_second": "gbps",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_peak",
}
# To the units of the keys above, from those that ncu prints.
NCU_UNITS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "%": 1}
NCU_UNITS |= {
    "Gbyte/s": 1,
    "Gbyte/second": 1,
    "Tbyte/s": 1e3,
    "Tbyte/second": 1e3,
    "Mbyte/s": 1e-3,
    "byte/second": 1e-9,
    "byte/s": 1e-9,
}


def ncu(suite: Suite) -> str:
    """Bandwidth that the main kernels reach, by Nsight Compute's counters."""
    program = shutil.which("ncu") or shutil.which("ncu", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if program is None:
        raise Skipped("ncu (Nsight Compute) is not installed")
    rows = []
    for backend in _kernels(suite):
        command = [program, "--csv", "--profile-from-start", "off", "--metrics", ",".join(NCU_METRICS)]
        command += [sys.executable, str(BENCHMARKS / "gpu_profile.py"), backend]
        output = suite.run(command, allowed=range(256))
        if "ERR_NVGPUCTRPERM" in output:
            raise Skipped("ncu may not read the GPU's counters here (ERR_NVGPUCTRPERM: it needs privileges)")
        rows += ncu_rows(output, backend)
    if not rows:
        raise Failed("ncu reported no kernel; see ncu.log")
    (suite.out / "ncu.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    most = max(rows, key=lambda row: row.get("gbps", 0))
    return f"{len(rows)} kernels, at most {most.get('gbps', 0):.0f} GB/s ({most['kernel']} of {most['backend']})"


def ncu_rows(output: str, backend: str) -> list[dict[str, Any]]:
    """The kernels in ncu's CSV, a dict each, in the order of their launches."""
    start = output.find('"ID"')
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO(output[max(start, 0) :])) if start >= 0 else ():
        key = NCU_METRICS.get(line.get("Metric Name") or "")
        unit = NCU_UNITS.get(line.get("Metric Unit") or "")
        if key and unit:
            row = kernels.setdefault(line["ID"], {"backend": backend, "kernel": line["Kernel Name"].partition("(")[0]})
            row[key] = float(line["Metric Value"].replace(",", "")) * unit
    return list(kernels.values())


class Stage(NamedTuple):
    """A stage: what runs, and the seconds it may take."""

    call: Callable[[Suite], str]
    limit_s: int


STAGES = {
    "wheels": Stage(wheels, 60),
    "build": Stage(build, 200),
    "tests": Stage(tests, 240),
    "operators": Stage(operators, 210),
    "train": Stage(train, 240),
    "adapter": Stage(adapter, 180),
    "digits": Stage(digits, 90),
    "commands": Stage(commands, 120),
    "overhead": Stage(overhead, 60),
    "memory": Stage(memory, 60),
    "sanitizer": Stage(sanitizer, 120),
    "ncu": Stage(ncu, 60),
    "grid": Stage(grid, 90),
}


# ---- summary


def summary_markdown(suite_facts: dict[str, Any], stages: Sequence[dict[str, Any]], folder: Path | None) -> str:
    """The folder's results in tables."""
    device = suite_facts.get("device") or "no GPU"
    parts = [f"# GPU suite on {device}\n\ntorch {suite_facts.get('torch')}, CUDA {suite_facts.get('cuda')}.\n"]
    rows = [(s["stage"], s["status"], f"{s['seconds']:.0f}", s["note"]) for s in stages]
    parts.append(_table(("stage", "status", "s", "note"), rows))
    if folder:
        parts += [_operator_tables(folder), _train_table(folder), _adapter_tables(folder)]
        parts += [_memory_table(folder), _ncu_table(folder)]
    return "\n".join(filter(None, parts))


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return []


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _operator_tables(folder: Path) -> str:
    keys = ("mode", "inputs", "B", "N", "D", "dtype")
    parts = []
    for name in ("dual_ln", "norm_pool"):
        rows = [row for row in _rows(folder / f"{name}.json") if row["provider"] != "copy"]
        if rows:
            lines = [
                (
                    *(row[k] for k in keys), row["provider"], _number(row["ms"] and 1e3 * row["ms"], 1),
                    _number(row["gbps"], 0), _number(row["roof_percent"], 0, " %"),
                    _number(row["speedup_eager"], 2, "x"), _number(row["speedup_compile"], 2, "x"), row["note"],
                )
                for row in rows
            ]  # fmt: skip
            header = (*keys, "provider", "us", "GB/s", "of a copy", "over eager", "over torch.compile", "note")
            parts.append(f"## {name}\n\n{_table(header, lines)}")
    return "\n".join(parts)


def _train_table(folder: Path) -> str:
    lines = []
    for model, file in ((model, f"train-{model}{suffix}.json") for suffix in ("", "-compiled") for model in MODELS):
        for row in _rows(folder / file):
            ratios = (_number(row[f"vs_{baseline}"], 3) for baseline in ("timm", "reference"))
            figures = _number(row["ms"], 1), _number(row["images_per_s"], 0), *ratios, row["note"]
            lines.append((model, row["batch"], row["engine"], row["dtype"], row["provider"], *figures))
    header = ("model", "batch", "engine", "dtype", "provider", "ms", "img/s", "time / timm", "time / reference", "note")
    return f"## Training step\n\n{_table(header, lines)}" if lines else ""


def _adapter_tables(folder: Path) -> str:
    rows = _rows(folder / "adapter.json")
    steps = [
        (
            row["batch"], row["dtype"], row["provider"], _number(row["ms"], 1), _number(row["vs_reference"], 3),
            _number(row["peak_extra_bytes"] and row["peak_extra_bytes"] / 1e6, 1),
            _number(row["peak_vs_reference"], 3), row["note"],
        )
        for row in rows
        if row["op"] == "train_step"
    ]  # fmt: skip
    header = ("batch", "dtype", "provider", "ms", "time / reference", "peak MB", "peak / reference", "note")
    parts = [f"## Training step of mpvg_vit_adapter_tiny\n\n{_table(header, steps)}"] if steps else []
    keys = ("case", "mode", "dtype", "provider")
    calls = [
        (
            *(row[key] for key in keys), _number(row["ms"], 3), _number(row["speedup_eager"], 2, "x"),
            _number(row["speedup_torchvision"], 2, "x"),
            _number(row["peak_extra_bytes"] and row["peak_extra_bytes"] / 1e6, 1), row["note"],
        )
        for row in rows
        if row["op"] == "deformable_attention"
    ]  # fmt: skip
    header = (*keys, "ms", "over eager", "over torchvision", "peak MB", "note")
    return "\n".join(parts + ([f"## Deformable attention\n\n{_table(header, calls)}"] if calls else []))


def _memory_table(folder: Path) -> str:
    lines = [
        (
            row["dtype"], "blocks" if row["checkpointing"] else "nothing", row["provider"],
            _number(row["saved_bytes"] / 1e6, 1), _number(row["peak_extra_bytes"] / 1e6, 1),
            _number(row["peak_vs_timm"], 3), _number(row["peak_vs_reference"], 3),
        )
        for row in _rows(folder / "memory.json")
        if row["op"] == "train_step" and row["status"] == "ok"
    ]  # fmt: skip
    header = ("dtype", "recomputed", "provider", "saved MB", "peak MB", "peak / timm", "peak / reference")
    return f"## Memory of a training step\n\n{_table(header, lines)}" if lines else ""


def _ncu_table(folder: Path) -> str:
    lines = [
        (row["backend"], row["kernel"], *(_number(row.get(key), 1) for key in NCU_METRICS.values()))
        for row in _rows(folder / "ncu.json")
    ]
    return f"## Nsight Compute\n\n{_table(('backend', 'kernel', 'us', 'GB/s', '% of peak'), lines)}" if lines else ""


# ---- command line


def probe() -> dict[str, Any]:
    """torch's facts and the GPU's; `device` is None where there is none, and `why` says why."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"device": None, "why": f"torch does not run: {(done.stderr.strip() or '?').splitlines()[-1]}"}
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts | {"why": "" if facts["device"] else f"no CUDA GPU is visible to torch {facts['torch']}"}


def run_stage(suite: Suite, name: str) -> dict[str, Any]:
    """Run one stage; returns its line of the summary: stage, status, seconds, note."""
    stage, start = STAGES[name], time.monotonic()
    suite.stage, suite.stage_ends = name, min(start + stage.limit_s, suite.ends)
    try:
        if not suite.facts["device"]:
            raise Skipped(suite.facts["why"])
        if suite.ends - start < 5:
            raise Skipped("the suite's time was over; name the stage to run it alone")
        (suite.out / f"{name}.log").unlink(missing_ok=True)
        status, note = "ok", stage.call(suite)
    except Skipped as reason:
        status, note = "skipped", str(reason)
    except (Failed, OSError, ValueError, KeyError) as error:
        status, note = "failed", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    return {"stage": name, "status": status, "seconds": time.monotonic() - start, "note": note}


def write_summary(out: Path, facts: dict[str, Any], done: Sequence[dict[str, Any]]) -> None:
    """Write summary.json and summary.md; of stages that did not run now, what an earlier run on this device said."""
    path = out / "summary.json"
    by_name = {stage["stage"]: stage for stage in done}
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["machine"]["device"] == facts["device"]:
            by_name = {stage["stage"]: stage for stage in earlier["stages"]} | by_name
    stages = [by_name[name] for name in STAGES if name in by_name]
    path.write_text(json.dumps({"machine": facts, "stages": stages}, indent=1) + "\n")
    (out / "summary.md").write_text(summary_markdown(facts, stages, out))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_suite.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; without any, all of them")
    add("--out", type=Path, metavar="DIR", help="default: benchmarks/results/gpu-<name of the device>")
    add("--wheels", type=Path, metavar="DIR", help="install the wheels in there, for this run alone (peers, say)")
    add("--minutes", type=float, default=10, help="for all stages together (default: %(default)s)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}: there is {', '.join(STAGES)}")
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: there is no such folder")
    facts = probe()
    out = args.out
    if out is None and facts["device"]:
        out = BENCHMARKS / "results" / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-"))
    if out is not None:
        out = out.resolve()
        out.mkdir(parents=True, exist_ok=True)
    suite = Suite(out, facts, args.wheels and args.wheels.resolve(), args.minutes)
    done: list[dict[str, Any]] = []
    for name in STAGES:
        if args.stages and name not in args.stages and not (name == "wheels" and args.wheels):
            continue
        print(f"{name}: ...", flush=True)
        done.append(run_stage(suite, name))
        print(f"{name}: {done[-1]['status']} ({done[-1]['seconds']:.0f} s): {done[-1]['note']}", flush=True)
        if out is not None:  # after each stage, so that a run that is cut off leaves it too
            write_summary(out, facts, done)
    print(f"summary: {out / 'summary.md'}" if out else f"summary: nothing was measured, {facts['why']}")
    return 1 if any(stage["status"] == "failed" for stage in done) else 0


if __name__ == "__main__":
    sys.exit(main())
