"""`mpvg study RECIPE`: trains every position scheme with several seeds, and says what the differences are worth.

    mpvg study digits --seeds 5

study.md, study.json and the pictures are made at the end, from the run folders alone.

Each run is a run folder, DIR/SCHEME-seed-K, trained in a process of its own, and goes on by the trainer's own resume: a
study that was stopped or killed goes on with the same command, and ends in the same table. All schemes of a seed come
before the next seed, so that what is there at any moment is as many whole pairs as can be.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from ..analysis.diagnostics import pos_statistics
from ..analysis.probe import norms_of
from ..analysis.quantities import bias_variance
from ..train import InputError, Stopped, TrainingError, distributed, loop, recipes
from ..train.config import Config, check_options, from_args, ignored
from ..train.data.evaluation import open_images
from ..train.metrics import parse_lines, read_log
from ..train.model import ARGUMENTS, check_name
from ..train.record import duration
from ..train.run_folder import RunFolder, finite, lock_folder, print_warning, show, write_json
from ..train.signals import PASSED_ON, Signals
from . import study_report

SCHEMES = ("default", "gap", "lape", "lape_gap", "pvg", "mpvg")
SCHEMES += ("mpvg(first_layer=0)", "mpvg(hierarchical=False)", "mpvg(add_to_input=False)")
"""The paper's methods and the rows of its Table 6."""
PROBED = 64
"""Held-out images on which the correlations are taken, as many as `mpvg analyze` takes."""
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""How a run's process starts: as a child of one that has imported all that a run needs, and has done nothing else."""
POLL_S = 0.5
"""Seconds between two looks at whether a signal has come."""


class Run(NamedTuple):
    """One run of the study."""

    scheme: str
    seed: int
    config: Config
    folder: Path

    def __str__(self) -> str:
        return f"{self.scheme} seed {self.seed}"


def runs_of(recipe: str, schemes: Sequence[str], seeds: int, fields: Sequence[str], out: Path) -> list[Run]:
    """The study's runs in the order of training: all schemes of seed 0, of seed 1, ...

    Args:
        recipe: a recipe's name.
        schemes: position schemes as text; see `distinct`.
        seeds: how many; they are 0 to seeds - 1.
        fields: config fields of all runs that differ from the recipe's, as on the command line.
        out: the study's folder.

    Raises:
        InputError: what is asked for is not there or makes no sense.
    """
    base = recipes.load(recipe)
    check_options(list(fields))
    for name, option in (("seed", "--seeds N"), ("model.scheme", "--schemes S ...")):
        if any(field.partition("=")[0] == f"--{name}" for field in fields):
            raise InputError(f"--{name} is what differs between a study's runs: choose by {option}")
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}, expected 1 or more")
    base = from_args(base, list(fields), f"mpvg study {recipe}")
    if base.task != "classification":
        raise InputError(f"mpvg study compares accuracies of classification, and {recipe} is a recipe of {base.task}")
    names = distinct(schemes, base)
    models = {name: dataclasses.replace(base.model, scheme=name) for name in names}
    stems = {name: re.sub(r"[^a-zA-Z0-9_.=]+", "-", name).strip("-") for name in names}
    return [
        Run(name, seed, dataclasses.replace(base, seed=seed, model=models[name]), out / f"{stems[name]}-seed-{seed}")
        for seed in range(seeds)
        for name in names
    ]


def distinct(schemes: Sequence[str], config: Config) -> list[str]:
    """The schemes as the config's architecture writes them, each once: to Swin `default` is another name of `gap`.

    Raises:
        InputError: one that there is not, or that the model can't have.
    """
    check_name("model.name", config.model.name)
    names: list[str] = []
    fields = {name: value for name in ARGUMENTS if (value := getattr(config.model, name)) is not None}
    for scheme in schemes:
        try:
            name = str(timm.create_model(config.model.name, **fields | {"scheme": scheme}, device="meta").scheme)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{config.model.name} can't be made with the scheme {scheme!r} ({error})") from None
        if name in names:
            show(f"{scheme!r} is {name!r} in {config.model.name}, which is trained once")
        else:
            names.append(name)
    return names


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds the whole run."""
    try:
        return json.loads((run.folder / "status.json").read_text())["state"] == "finished" and bool(last_epoch(run))
    except (OSError, ValueError, KeyError):
        return False


def last_epoch(run: Run) -> dict[str, Any]:
    """The line of log.jsonl on the run's last epoch, empty where it is not there."""
    rows = read_log(run.folder, "epoch")
    last = (row for row in rows if row.get("epoch") == run.config.total_epochs and row.get("test_acc") is not None)
    return next(last, {})


def study(
    recipe: str,
    *,
    seeds: int = 5,
    schemes: Sequence[str] = SCHEMES,
    out: Path | None = None,
    jobs: int | None = None,
    fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Train what is left of the study; returns what study.json holds.

    Args:
        recipe: a recipe's name.
        seeds: runs of each scheme, with the seeds 0 to seeds - 1.
        schemes: position schemes as text.
        out: the study's folder, runs/study-RECIPE by default.
        jobs: runs at once. None: on CPUs as many as have the cores that config.threads asks for, on a GPU one.
        fields: config fields of all runs that differ from the recipe's: ["--epochs", "8"].

    Raises:
        InputError: what is asked for makes no sense, the folder holds runs of another config, or another process is at
            work in it.
        TrainingError: no run has succeeded, or the results can't be written.
        Stopped: a signal came; the runs are saved.
    """
    if distributed.find_world().size > 1:
        raise InputError(
            "mpvg study starts processes of its own: start it without torchrun or srun; --jobs N is for N runs at once"
        )
    out = out or Path("runs") / f"study-{recipe}"
    runs = runs_of(recipe, schemes, seeds, fields, out)
    config = runs[0].config
    jobs = default_jobs(config) if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}, expected 1 or more")
    for run in runs:
        if (run.folder / "run.json").exists():
            loop.check_same_config(RunFolder(run.folder), run.config)
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
    except OSError as error:
        raise InputError(f"{out} can't be written ({error.strerror}): choose another folder with --out") from None
    try:
        for sentence in ignored(config):
            print_warning(sentence)
        failed = train_runs(runs, recipe, out, jobs)
        finished = [run for run in runs if is_finished(run)]
        if not finished:
            raise TrainingError(f"no run has succeeded; the first failed so: {next(iter(failed.values()))}")
        found = look_at(runs, recipe, fields, out, failed)
        try:
            write_json(out / "study.json", finite(found))
            study_report.write(found, out)
        except OSError as error:
            raise TrainingError(
                f"{out} can't be written ({error.strerror}); the runs are whole, and not lost"
            ) from None
    finally:
        if lock is not None:
            lock.close()
    show(f"{found['claim']}\nreport in {out / 'study.md'}")
    return found


def default_jobs(config: Config) -> int:
    """Runs at once: one on a GPU, on CPUs as many as there are cores for."""
    if distributed.pick_device(config.device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (config.threads or cores))


# ---- training


class Job:
    """A process that trains one run.

    Args:
        run: the run.
        recipe: its recipe's name, for the record.
        out: the study's folder, for the log of what the run prints.
        slot: number of the job among those at once, which chooses a GPU where there are several.
    """

    def __init__(self, run: Run, recipe: str, out: Path, slot: int):
        self.run, self.slot, self.log = run, slot, out / "logs" / f"{run.folder.name}.log"
        context = multiprocessing.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            context.set_forkserver_preload([__name__, "sklearn.datasets", "sklearn.model_selection"])
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_train, args=(theirs, run, recipe, self.log, slot))
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        """Ask the run to save itself and stop."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGTERM)

    def result(self) -> dict[str, Any]:
        """What `_train` found, to be asked for when the pipe has something: error (None: none), stopped, costs."""
        try:
            found = self.pipe.recv()
        except EOFError:
            found = None
        self.process.join()
        self.pipe.close()
        if found is None:
            code = self.process.exitcode
            found = {"error": f"its process ended with exit code {code}; its last words are in {self.log}"}
        return {"stopped": False, "wall_s": None, "cpu_s": None} | found


def _train(pipe: connection.Connection, run: Run, recipe: str, log: Path, slot: int) -> None:
    """Train a run, in a process of its own; what it prints is added to `log`, what came of it is sent."""
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ[PASSED_ON[1]] = "1"
    start, found = time.perf_counter(), {"error": None}
    try:
        config = run.config
        if config.device in ("auto", "cuda") and torch.cuda.is_available():
            config = dataclasses.replace(config, device=f"cuda:{slot % torch.cuda.device_count()}")
        loop.train(config, run.folder, recipe, resume="auto")
    except Stopped as stopped:
        print(stopped, flush=True)
        found["stopped"] = True
    except Exception as error:
        known = isinstance(error, InputError | TrainingError)
        found["error"] = str(error) if known else f"{type(error).__name__}: {error}"
        traceback.print_exc()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(each.ru_utime + each.ru_stime for each in usage)
    pipe.send(found | {"wall_s": round(time.perf_counter() - start, 2), "cpu_s": round(cpu_s, 2)})


def _end_with_parent() -> None:
    """End this process when the study's is gone: nobody would know of the run, and the study may be started again."""
    multiprocessing.parent_process().join()
    os._exit(1)


def train_runs(runs: Sequence[Run], recipe: str, out: Path, jobs: int) -> dict[str, str]:
    """Train the runs that are not finished, `jobs` at once, with a line for each; returns why those failed that did.

    Raises:
        Stopped: a signal came; the runs at work have saved themselves.
    """
    waiting = [run for run in runs if not is_finished(run)]
    ready = len(runs) - len(waiting)
    failed: dict[str, str] = {}
    if ready:
        show(f"{ready} of {len(runs)} runs are finished already")
    at_work, seconds = [], []
    with Signals() as signals:
        while at_work or (waiting and signals.received is None):
            while waiting and len(at_work) < jobs and signals.received is None:
                slot = min(set(range(jobs)) - {job.slot for job in at_work})
                try:
                    at_work.append(Job(waiting[0], recipe, out, slot))
                    waiting.pop(0)
                except (EOFError, OSError) as error:
                    time.sleep(POLL_S)  # a signal to the whole group may have ended the process that forks just before
                    if signals.received is None:
                        raise TrainingError(f"no process could be started for {waiting[0]} ({error})") from None
            ended = []
            while not ended:
                ended = connection.wait([job.pipe for job in at_work], POLL_S)
                if signals.received is not None:
                    break
            if signals.received is not None:
                for job in at_work:
                    job.stop()
            for job in [job for job in at_work if signals.received is not None or job.pipe in ended]:
                at_work.remove(job)
                found = job.result()
                _note_cost(out, job, found)
                if found["stopped"] or (found["error"] and signals.received is not None):
                    continue
                ready += 1
                if not found["error"] and not is_finished(job.run):
                    found["error"] = f"{job.run.folder / 'log.jsonl'} has lost the accuracy of the last epoch"
                if found["error"]:
                    failed[str(job.run)] = found["error"]
                    outcome = f"failed: {found['error']}"
                else:
                    outcome = f"{last_epoch(job.run)['test_acc']:.2f} %, {found['wall_s']:.0f} s"
                    seconds.append(found["wall_s"])
                left = len(waiting) + len(at_work)
                time_left = duration(sum(seconds) / len(seconds) * left / jobs) if left and seconds else ""
                show(f"[{ready}/{len(runs)}] {job.run}: {outcome}{time_left and f'; about {time_left} left'}")
        finished = sum(map(is_finished, runs))
        if signals.received is not None and finished < len(runs):
            raise Stopped(
                f"{signals.received}: {finished} of {len(runs)} runs are finished; the same command goes on in {out}"
            )
    return failed


def _note_cost(out: Path, job: Job, found: dict[str, Any]) -> None:
    """Add what a process has cost to costs.jsonl."""
    if found["cpu_s"] is None:
        return
    line = {"run": job.run.folder.name, "wall_s": found["wall_s"], "cpu_s": found["cpu_s"]}
    try:
        with open(out / "costs.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        print_warning(f"{out / 'costs.jsonl'} could not be written ({error.strerror})")


# ---- looking at what was trained


def look_at(
    runs: Sequence[Run], recipe: str, fields: Sequence[str], out: Path, failed: dict[str, str]
) -> dict[str, Any]:
    """What study.json holds, from the finished ones of the runs: `study_report.result` with the costs."""
    names, seeds = list(dict.fromkeys(run.scheme for run in runs)), sorted({run.seed for run in runs})
    finished = {(run.scheme, run.seed): run for run in runs if is_finished(run)}
    images, x, reason = _held_out(runs[0].config)
    schemes, folders = {}, []
    for name in names:
        row = {"parameters": None, "accuracy": [], "loss": [], "bias_variance": [], "pos": []}
        for seed in seeds:
            run = finished.get((name, seed))
            last, found = (last_epoch(run), RunFolder(run.folder)) if run else ({}, None)
            row["accuracy"].append(last.get("test_acc"))
            row["loss"].append(last.get("test_loss"))
            variance, pos = _look_at_norms(found, x) if found and x is not None else (None, None)
            row["bias_variance"].append(variance)
            row["pos"].append(pos)
            if found is not None:
                folders.append(found)
                row["parameters"] = found.info["parameters"]
        schemes[name] = row
    command = ["mpvg", "study", recipe, "--seeds", str(len(seeds))]
    command += [] if names == list(SCHEMES) else ["--schemes", *names]
    about = {"recipe": recipe, "command": shlex.join([*command, *fields]), "seeds": seeds}
    about["small"] = runs[0].config.data.name == "digits"
    about["position"] = {"images": None if x is None else len(x), "reason": reason}
    return study_report.result(about, schemes, images, failed) | {"cost": _cost(out, runs, folders)}


def _held_out(config: Config) -> tuple[int | None, torch.Tensor | None, str]:
    """How many held-out images there are, the first PROBED of them (B, C, H, W), and why not where there are none."""
    try:
        images = open_images(config, distributed.pick_device(config.device), "validation")
    except InputError as error:
        return None, None, str(error)
    try:
        batch = next(images.batches(PROBED, range(min(PROBED, images.size or PROBED))), None)
    finally:
        images.close()
    return images.size or None, None if batch is None else batch.x, "no held-out image could be read"


def _look_at_norms(folder: RunFolder, x: torch.Tensor) -> tuple[float | None, dict[str, list] | None]:
    """Variance of the last norm's bias, and `pos_statistics`, of a run's last weights."""
    try:
        model = folder.model("last").to(x.device)
    except InputError as error:
        print_warning(f"{error}; the study's correlations are without this run")
        return None, None
    with loop.cpu_threads(folder.config().threads):
        statistics = pos_statistics(model, x)
    bias = getattr(norms_of(model).get("last"), "bias", None)
    return None if bias is None else float(bias_variance(bias.detach())), statistics


def _cost(out: Path, runs: Sequence[Run], folders: Sequence[RunFolder]) -> dict[str, Any]:
    """CPU and wall time of the runs, machines and versions: all that may be another when the study is repeated."""
    path, names = out / "costs.jsonl", {run.folder.name for run in runs}
    lines = parse_lines(path)[0] if path.exists() else []
    lines = [line for line in lines if line.get("run") in names]
    told = {"machines": [], "versions": []}
    for folder in folders:
        machine, versions = folder.info["machine"], folder.info["versions"]
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a run"
        device = machine["gpu"] or f"{machine['cpu']}, {threads}"
        told["machines"].append(f"{device}, {machine['system']}, backend {folder.info['backend']}")
        told["versions"].append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return {
        "runs": len({line["run"] for line in lines}),
        **{key: round(sum(line[key] for line in lines), 1) for key in ("wall_s", "cpu_s")},
        **{key: list(dict.fromkeys(values)) for key, values in told.items()},
    }
