"""What a run's folder tells without its weights: `collect(folder)` reads run.json, status.json and the logs.

What writes about runs starts here (report.py, `mpvg report`). A run may be going on, cut off, or damaged: what can't be
read is a sentence in `problems`, and the rest is there.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from . import InputError
from .figures import FIGURES, Figures
from .metrics import parse_lines
from .run_folder import RunFolder

Row = dict[str, Any]


@dataclasses.dataclass
class RunRecord:
    """A run's folder as far as it can be read.

    Attributes:
        folder: the run folder.
        label: what the run is called beside others.
        info, status: run.json and status.json; status is empty where it can't be read.
        starts: a row for each start of the run.
        train, epochs, pos, spikes, skipped: lines of log.jsonl by kind, each with a `step`, in their order.
        bad_images: the rows of the images that could not be read.
        problems: a sentence for each thing that is missing or damaged.
    """

    folder: RunFolder
    label: str
    info: Row
    status: Row = dataclasses.field(default_factory=dict)
    starts: list[Row] = dataclasses.field(default_factory=list)
    train: list[Row] = dataclasses.field(default_factory=list)
    epochs: list[Row] = dataclasses.field(default_factory=list)
    pos: list[Row] = dataclasses.field(default_factory=list)
    spikes: list[Row] = dataclasses.field(default_factory=list)
    skipped: list[Row] = dataclasses.field(default_factory=list)
    bad_images: list[Row] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def config(self) -> Row:
        """The config as nested dictionaries, {} where run.json has none; `RunFolder.config` checks it."""
        config = self.info.get("config")
        return config if isinstance(config, dict) else {}

    def setting(self, name: str) -> Any:
        """A config field by its dotted name; None where there is no such field."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def task(self) -> str:
        """classification (also where nothing says another), detection or segmentation."""
        task = self.setting("task")
        return task if task in FIGURES else "classification"

    @property
    def figures(self) -> Figures:
        """What the run measures."""
        return FIGURES[self.task]

    @property
    def state(self) -> str:
        """running, preempted, finished, failed, or unknown."""
        return str(self.status.get("state", "unknown"))

    @property
    def updates(self) -> int:
        """Updates that are done, by the log; by status.json where the log has none."""
        steps = [rows[-1]["step"] for rows in (self.train, self.epochs) if rows]
        return max(steps) if steps else int(number(self.status, "step") or 0)

    @property
    def total(self) -> int | None:
        """Updates of the whole run."""
        total = number(self.info, "updates")
        return None if total is None else int(total)

    @property
    def evaluated(self) -> list[Row]:
        """The epochs whose weights were evaluated."""
        return [row for row in self.epochs if number(row, f"test_{self.figures.main.key}") is not None]

    def results(self) -> list[tuple[str, Row, str]]:
        """What came out: (weights, its line of the log, prefix of its keys there) for last, best and ema weights.

        Empty where nothing was evaluated. The best epoch is the first of the highest main figure, as for best/.
        """
        if not (rows := self.evaluated):
            return []
        key = self.figures.main.key
        found = [("last", rows[-1], "test"), ("best", max(rows, key=lambda row: row[f"test_{key}"]), "test")]
        return found + ([("ema", rows[-1], "ema")] if number(rows[-1], f"ema_{key}") is not None else [])

    def result(self) -> str | None:
        """The last weights' main figure as it is printed, None where nothing was evaluated."""
        main = self.figures.main
        return main.show(self.evaluated[-1][f"test_{main.key}"]) if self.evaluated else None

    def seconds(self) -> float | None:
        """Seconds in which the run was at work, evaluation included: from each start to the last line left of it.

        What was done after a checkpoint and cut off is not in the log any more, and not counted.
        """
        rows = [*self.train, *self.epochs]
        times = sorted(row["time"] for row in rows if number(row, "time") is not None)
        if not times:
            return None
        begins = sorted(filter(None, map(_start_time, self.starts)))
        if not begins or times[0] < begins[0]:  # the log came from another folder
            begins.insert(0, times[0])
        ends = [*begins[1:], math.inf]
        parts = [[t for t in times if begin <= t < end] for begin, end in zip(begins, ends, strict=True)]
        return sum(part[-1] - begin for begin, part in zip(begins, parts, strict=True) if part)

    def img_s(self) -> float | None:
        """Images a second of training: mean over the epochs, or over the intervals before the first one's end."""
        found = series(self.epochs or self.train, "img_s")[1]
        return sum(found) / len(found) if found else None


def number(row: Row, key: str) -> float | None:
    """The row's value where it is a finite number, None otherwise."""
    return finite_number(row.get(key))


def finite_number(value: Any) -> float | None:
    """The value where it is a finite number, None otherwise."""
    usual = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usual else None


def series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """The updates and values of the rows that have a finite number there."""
    found = [(row["step"], row[key]) for row in rows if number(row, key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def collect(path: Path) -> RunRecord:
    """Read what a run's folder tells.

    Raises:
        InputError: it is not a run folder, or its run.json can't be read.
    """
    folder = RunFolder(path)
    record = RunRecord(folder, path.resolve().name, folder.info)
    if not record.config:
        record.problems.append(f"{path / 'run.json'} has no config.")
    try:
        status = json.loads((path / "status.json").read_text())
        record.status = status if isinstance(status, dict) else {}
    except (OSError, ValueError) as error:
        record.problems.append(f"{path / 'status.json'} can't be read ({error}), so the run's state is not known.")
    record.starts = _lines(record, "starts.jsonl")
    rows = _lines(record, "log.jsonl")
    record.bad_images = [row for row in rows if row.get("kind") == "bad_image"]
    lists = {"train": record.train, "epoch": record.epochs, "pos": record.pos}
    lists |= {"spike": record.spikes, "skipped": record.skipped}
    for kind, found in lists.items():
        found += _in_order([row for row in rows if row.get("kind") == kind and type(row.get("step")) is int])
    record.pos[:] = [row for row in record.pos if _is_pos(row)]
    if not record.train and not record.epochs:
        record.problems.append(f"{path / 'log.jsonl'} has no update yet.")
    elif not record.evaluated:
        record.problems.append(f"{path / 'log.jsonl'} has no evaluated epoch yet.")
    return record


def collect_all(paths: list[Path]) -> tuple[list[RunRecord], list[str]]:
    """Read several runs' folders; labels tell those of one name apart.

    Returns:
        The runs that can be read, and a sentence for each path that is left out or named otherwise.
    """
    records: list[RunRecord] = []
    said = []
    for path in paths:
        if any(path.resolve() == record.path.resolve() for record in records):
            said.append(f"{path} is given twice, and shown once.")
            continue
        try:
            records.append(collect(path))
        except InputError as error:
            said.append(f"{error}; the run is left out.")
    for name, count in Counter(record.label for record in records).items():
        if count > 1:
            twins = [record for record in records if record.label == name]
            names = [f"{record.path.resolve().parent.name}/{name}" for record in twins]
            if len(set(names)) < count:
                names = [str(record.path) for record in twins]
            for record, label in zip(twins, names, strict=True):
                record.label = label
            said.append(f"{count} runs are called {name}: they are shown as {', '.join(names)}.")
    return records, said


def _lines(record: RunRecord, name: str) -> list[Row]:
    path = record.path / name
    try:
        rows, bad = parse_lines(path)
    except OSError as error:
        record.problems.append(f"{path} can't be read ({error.strerror}).")
        return []
    if bad:
        lines, are = ("line", "is") if bad == 1 else ("lines", "are")
        record.problems.append(f"{path}: {bad} {lines} can't be read and {are} left out.")
    return rows


def _in_order(rows: list[Row]) -> list[Row]:
    """The rows by their update; where a run went on from an older checkpoint, those of the later start."""
    found: list[Row] = []
    for row in reversed(rows):
        if not found or row["step"] < found[-1]["step"]:
            found.append(row)
    return found[::-1]


def _is_pos(row: Row) -> bool:
    lists = [row.get(key) for key in ("layers", "pos_norm", "correlation")]
    return all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1


def _start_time(start: Row) -> float | None:
    try:
        return datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 5 s, or 7 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def when(seconds: float) -> str:
    """A time of the log as 2026-01-31 12:00 UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
