"""What the position embedding does in a run's model: the paper's figures and their numbers, on any images.

    mpvg analyze runs/digits                                  64 held-out images; RUN/analysis/last-validation/
    mpvg analyze runs/digits --split train --images 256 --weights best --out figures

Writes a PNG a figure (`analysis.figures`) and analysis.json, in which each number has the name of the function of
`analysis.quantities` that defines it, and `definitions` says what that is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..analysis.figures import draw
from ..analysis.quantities import DEFINITIONS
from ..analysis.summary import SHOWN, summarise
from ..train import InputError, TrainingError
from ..train.config import from_args
from ..train.data import open_images
from ..train.distributed import pick_backend, pick_device
from ..train.loop import cpu_threads
from ..train.run_folder import RunFolder, print_warning, printable, reason, write_json
from .pictures import save

BATCH = 16
"""Images at a time: what a norm sees and gives is kept of so many."""


def analyze_run(
    path: str | Path,
    weights: str = "last",
    fields: Sequence[str] = (),
    *,
    split: str = "validation",
    folder: Path | None = None,
    images: int = 64,
    out: Path | None = None,
) -> dict[str, Any]:
    """Analyse a run's weights on images of a split or folder, and write figures and analysis.json.

    Args:
        path: run folder.
        weights: "best", "last" or "ema".
        fields: config fields that differ from the run's, as on the command line: ["--data.root", "/data"].
        split: "train", "validation" or a name that the data set has for one.
        folder: in its place a folder with a folder of images for each class.
        images: how many, evenly spaced over the split; all where it has fewer.
        out: where to write; None is RUN/analysis/WEIGHTS-SPLIT.

    Returns:
        What analysis.json holds: run, weights, model, scheme, split, folder, `Summary.numbers`, left_out (a sentence
        for each thing that the model has not), bad (unreadable images), definitions; and besides written, the files.

    Raises:
        InputError: `path` is not a run folder, its weights are not there or of another model, there are no such
            images, or `out` can't be written.
        TrainingError: no image could be read.
    """
    if images < 1:
        raise InputError(f"--images {images}: expected 1 or more")
    run = RunFolder(path)
    config = run.config()
    if fields:
        config = from_args(config, list(fields), "mpvg analyze RUN")
    if config.task != "classification":
        raise InputError(
            f"{path} is a run of {config.task}, whose images differ in size: mpvg analyze takes runs of classification"
        )
    device = pick_device(config.device)
    pick_backend(device)
    with cpu_threads(config.threads):
        model = run.model(weights).to(device)
        opened = open_images(config, device, split, folder=folder, class_names=run.info.get("class_names"))
        try:
            _check_size(model, opened.preprocessing["input_size"], path)
            # Data sets are often in the order of their classes. A stream that does not say how long it is gives its
            # first ones.
            count = min(images, opened.size or images)
            indices = [i * (opened.size or count) // count for i in range(count)]
            shown = []

            def batches():
                for batch in opened.batches(BATCH, indices):
                    shown.extend(opened.picture(x) for x in batch.x[: SHOWN - len(shown)])
                    yield batch.x

            summary = summarise(model, batches())
        finally:
            opened.close()
    if not summary.images:
        raise TrainingError(
            f"none of the {count} images could be read: {opened.bad[0]['reason'] if opened.bad else ''}"
        )
    place = split if folder is None else f"folder-{Path(folder).resolve().name}"
    result = {
        "run": str(path),
        "weights": weights,
        "model": config.model.name,
        "scheme": str(model.scheme) if hasattr(model, "scheme") else None,
        "split": split if folder is None else None,
        "folder": None if folder is None else str(folder),
        **summary.numbers(),
        "left_out": summary.left_out(),
        "bad": opened.bad,
        "definitions": DEFINITIONS,
    }
    # Of numbers that are not finite axes can't be made; the last norm's output has those of all before it.
    drawn = all(bool(norm.output_norms.isfinite().all()) for norm in summary.layers)
    if not drawn:
        result["left_out"].append(f"the {weights} weights give numbers that are not finite: nothing is drawn")
    out = out or run.path / "analysis" / f"{weights}-{place.replace('/', '_')}"
    written = [out / "analysis.json"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(written[0], result)
        for name, figure in draw(summary, shown).items() if drawn else ():
            written.append(out / f"{name}.png")
            save(figure, written[-1])
    except OSError as error:
        raise InputError(f"{out} can't be written ({reason(error)}): choose another folder with --out") from None
    return result | {"written": [str(file) for file in written]}


def _check_size(model: torch.nn.Module, input_size: Sequence[int], path: str | Path) -> None:
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own is not None and not getattr(model, "dynamic_img_size", False) and tuple(own) != tuple(input_size[1:]):
        size, asked = ("x".join(map(str, sides)) for sides in (own, input_size[1:]))
        raise InputError(
            f"the images have {asked} pixels and the model of {path} takes {size}: leave data.img_size out"
        )


def describe(result: dict[str, Any]) -> str:
    """What `mpvg analyze` prints: correlation and norm by layer, the last norm, where the pictures are."""
    on = result["split"] or result["folder"]
    lines = [f"{result['run']} ({result['weights']}) on {result['images']} images of {on}"]
    rows = [row for row in result["layers"] if row["pos_norm"] is not None]
    if rows:
        lines.append("layer  correlation  opposite channels  |LN'(pos)|")
        for row in rows:
            value = "undefined" if row["correlation"] is None else f"{row['correlation']:+.3f}"
            lines.append(
                f"{row['layer']!s:>5}  {value:>11}  {row['opposite_channels']:>17.1%}  {row['pos_norm']:>10.3f}"
            )
    if last := result["last_norm"]:
        cosine = "undefined" if (v := last["cosine_before_after"]["mean"]) is None else f"{v:.3f}"
        variance = "none" if (v := last["bias_variance"]["tokens"]) is None else f"{v:.2g}"
        lines.append(f"last norm: variance of its bias {variance}, cosine of a token before and after it {cosine}")
    lines.append(f"written: {Path(result['written'][0]).parent}")
    return "\n".join(map(printable, lines))


def warn(result: dict[str, Any]) -> None:
    """Say on stderr what the model has not, and what could not be read: a sentence each."""
    for sentence in result["left_out"]:
        print_warning(sentence)
    if bad := result["bad"]:
        print_warning(f"{len(bad)} images could not be read and are left out, the first {bad[0]['file']}")
