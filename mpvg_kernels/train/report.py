"""report.md and curves.png: what was run, on what, and what came out, from the run folder alone.

Its tables are those of `mpvg report` too, which adds what the weights say.
"""

import shlex
from pathlib import Path

from .curves import plot_curves, resumed_at
from .record import RunRecord, collect, duration, finite_number, number, when
from .run_folder import RunFolder, whole_file
from .table import Table, escape, figure_of

MORE = "<!-- mpvg report keeps what follows -->"
"""Ends what a report says itself."""
FAIR = "The best weights are chosen on the held-out images themselves, so the fair figure is that of the last ones."


def results_table(records: list[RunRecord]) -> Table:
    """The figures of the last, best and average weights, of every run that was evaluated."""
    # Each task's main one first; runs of different tasks have gaps in the others' columns.
    figures = dict.fromkeys(f for record in records for f in (record.figures.main, *record.figures.evaluated))
    header = ("weights", "epoch", *(f"test {figure.name}" for figure in figures), "training loss")
    rows = [
        (
            *([record.label] if len(records) > 1 else []),
            *(name, row.get("epoch", "-")),
            *(f.show(number(row, f"{key}_{f.key}") if f in record.figures.evaluated else None) for f in figures),
            figure_of(number(row, "train_loss"), ".4f"),
        )
        for record in records
        for name, row, key in record.results()
    ]
    return Table(("run", *header) if len(records) > 1 else header, rows)


def facts(record: RunRecord) -> dict[str, str]:
    """What was trained, how, on what, and what it cost: a line of text for each, without what is not known."""
    info, setting = record.info, record.setting
    machine = info["machine"] if isinstance(info.get("machine"), dict) else {}
    versions = info["versions"] if isinstance(info.get("versions"), dict) else {}
    names = info.get("class_names")
    found = {
        "Model": _parts(
            *(setting("model.name"), setting("model.scheme") and f"scheme {setting('model.scheme')}"),
            _with(number(info, "parameters"), "{:,.0f} parameters"),
            info.get("backend") and f"backend {info['backend']}",
        ),
        "Data": _parts(setting("data.name"), f"{len(names):,} classes" if isinstance(names, list) else None),
        "Training": _parts(
            f"{record.updates:,}"
            + (f" of {record.total:,}" if record.total not in (None, record.updates) else "")
            + f" updates of {setting('batch')} images",
            *(setting("optim.name"), _with(finite_number(setting("optim.lr")), "peak learning rate {:g}")),
            *(f"{name} {setting(name)}" for name in ("seed", "amp", "compile") if setting(name) is not None),
        ),
        "Throughput": _with(record.img_s(), "{:.0f} img/s (mean over the epochs, evaluation not counted)"),
        "Time": _time(record),
        "Cost": _cost(record, machine),
        "Machine": _parts(
            machine.get("cpu"),
            (count := number(machine, "threads")) and f"{count:.0f} thread{'s' * (count != 1)}",
            (machine.get("gpu") or "no GPU") if machine else None,
            machine.get("system"),
        ),
        "Versions": _parts(*(f"{name} {version}" for name, version in versions.items())),
        "Command": _command(info.get("command")),
    }
    bad, skipped = record.bad_images, sum(int(number(row, "updates") or 0) for row in record.skipped)
    if bad:
        found["Unreadable images"] = f"{len(bad)}, listed in log.jsonl ({bad[0].get('file')}, ...)"
    if skipped:
        found["Skipped updates"] = f"{skipped} (loss or gradient not finite)"
    if record.spikes:
        found["Loss spikes"] = f"{len(record.spikes)}, at update {', '.join(str(r['step']) for r in record.spikes[:8])}"
    return {name: text for name, text in found.items() if text}


def write_report(run: RunFolder, sections: str = "") -> None:
    """Write report.md and curves.png into the run folder; `sections` is Markdown to put at the end of the report.

    Raises:
        OSError: they can't be written.
    """
    record = collect(run.path)
    plot_curves(record)
    result, main = record.result(), record.figures.main
    shown = result if record.task == "classification" else f"{main.name} {result}"
    title = f"{shown} on the held-out images" if result else "no evaluated epoch"
    lines = "\n".join(f"- {name}: {escape(text)}" for name, text in facts(record).items())
    text = f"""# {escape(record.info.get("recipe", record.label))}: {title}

{results_table([record]).markdown()}

{FAIR}

![loss and {main.name}](curves.png)

{lines}
"""
    with whole_file(run.path / "report.md") as file:
        file.write(text + (f"\n{MORE}\n\n{sections.strip()}\n" if sections else ""))


def kept_sections(path: Path) -> str:
    """What `write_report` was given as `sections` for the report at `path`; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition(f"\n{MORE}\n")[2].strip()
    except OSError:
        return ""


def _parts(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def _with(value: float | None, text: str) -> str | None:
    return None if value is None else text.format(value)


def _time(record: RunRecord) -> str:
    seconds, rows = record.seconds(), [*record.train[-1:], *record.epochs[-1:]]
    last = max((row["time"] for row in rows if number(row, "time") is not None), default=None)
    resumed = resumed_at(record)
    return _parts(
        None if seconds is None else f"{duration(seconds)} with evaluation",
        None if last is None else f"last line of the log {when(last)}",
        f"resumed at update {', '.join(map(str, resumed))}" if resumed else None,
    )


def _cost(record: RunRecord, machine: dict) -> str:
    seconds, start = record.seconds(), record.starts[-1] if record.starts else {}
    processes, threads = number(start, "processes") or 1, number(machine, "threads")
    on_gpu = str(start.get("device", "")).startswith("cuda")
    units = processes if on_gpu else processes * threads if threads else None
    flops, batch = number(record.info, "flops"), number(record.config, "batch")
    memory = [value for row in record.train if (value := number(row, "memory_mb")) is not None]
    return _parts(
        f"{seconds * units / 3600:.3g} {'GPU' if on_gpu else 'core'} hours" if seconds and units else None,
        f"{3e-15 * flops * batch * record.updates:.3g} PFLOP of training" if flops and batch else None,
        f"at most {max(memory):,.0f} MB of {'GPU ' if on_gpu else ''}memory" if memory else None,
    )


def _command(command: object) -> str:
    if not isinstance(command, list) or not command:
        return ""
    return shlex.join(["mpvg", *map(str, command[1:])])
