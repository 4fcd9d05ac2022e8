"""report.md and curves.png: what was run, on what, and what came out, from the run folder alone."""

from .checkpoint import RunFolder
from .metrics import plot_curves, read_log


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ("---",) * len(header), *rows])


def write_report(run: RunFolder, sections: str = "") -> None:
    """Write report.md and curves.png into the run folder; `sections` is Markdown to put at the end of the report."""
    info, epochs = run.info, [row for row in read_log(run.path, "epoch") if "test_acc" in row]
    config, last, best = info["config"], epochs[-1], max(epochs, key=lambda row: row["test_acc"])
    plot_curves(run.path)
    kinds = [("last", last, "test"), ("best", best, "test")] + ([("ema", last, "ema")] if "ema_acc" in last else [])
    lines = table(
        ("weights", "epoch", "test accuracy", "test loss", "training loss"),
        [
            (name, r["epoch"], f"{r[f'{key}_acc']:.2f} %", f"{r[f'{key}_loss']:.4f}", f"{r['train_loss']:.4f}")
            for name, r, key in kinds
        ],
    )
    bad = read_log(run.path, "bad_image")
    notes = f"- Unreadable images: {len(bad)}, listed in log.jsonl ({bad[0]['file']}, ...)\n" if bad else ""
    skipped = sum(row["skipped"] for row in epochs)
    notes += f"- Skipped updates (loss or gradient not finite): {skipped}\n" if skipped else ""
    machine, versions = info["machine"], info["versions"]
    (run.path / "report.md").write_text(
        f"""# {info["recipe"]}: {last["test_acc"]:.2f} % on the held-out images

{lines}

The best weights are chosen on the held-out images themselves, so the fair figure is that of the last ones.

![loss and accuracy](curves.png)

- Model: {config["model"]["name"]}, scheme {config["model"]["scheme"]}, {info["parameters"]:,} parameters, backend \
{info["backend"]}
- Training: {info["updates"]:,} updates of {config["batch"]} images, {config["optim"]["name"]}, peak learning rate \
{config["optim"]["lr"]:g}, seed {config["seed"]}, amp {config["amp"]}, compile {config["compile"]}
- Throughput: {sum(r["img_s"] for r in epochs) / len(epochs):.0f} img/s (mean over the epochs, evaluation not counted)
- Machine: {machine["cpu"]}, {machine["threads"]} threads, {machine["gpu"] or "no GPU"}, {machine["system"]}
- Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}
{notes}
{sections}""".rstrip()
        + "\n"
    )
