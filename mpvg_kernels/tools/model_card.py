"""A model card: Markdown beside an exported model on what it is, what it was trained on, and how it is used.

It says what the run folder and the file themselves tell, and what is not known. In a folder of timm's format it is
README.md, with the front matter that Hugging Face's hub reads.
"""

import json
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import __version__, backends
from ..train import InputError
from ..train.config import Config, field_names, get, without_effect
from ..train.record import collect, number
from ..train.report import FAIR
from ..train.run_folder import cpu_name
from ..train.table import Table, figure_of
from .loading import usage

if TYPE_CHECKING:
    from .export import Source

FRONT_MATTER = """\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm{}
---
"""
FORMATS = {
    "onnx": "an ONNX model with operator set {opset}, for ONNX Runtime and what else reads ONNX",
    "pt2": "a program of torch.export",
    "aot": "an AOTInductor package of torch.export's program, compiled for {target}",
    "safetensors": "a folder in timm's format",
}
FILES = {
    "onnx": "its metadata `preprocessing`",
    "pt2": "its extra file `preprocessing.json`",
    "aot": "its metadata `preprocessing`",
    "safetensors": "config.json",
}
DATA = {"digits": "scikit-learn's digits: 1,797 images of handwritten digits, 8x8 pixels, a fifth of them held out"}
# Fields that say where or how fast a run was, not what came out; paths are its user's own business.
NO_RECIPE = ("data.root", "data.workers", "data.download", "device", "threads", "profile", "eval_interval", "compile")
NO_RECIPE += ("model.name", "model.scheme", "model.grad_checkpointing", "model.channels_last", "optim.max_skipped")
NO_RECIPE += ("model.weights", "loss.teacher_weights", "epochs", "batch", "data.max_bad_share")
PAPERS_SCHEMES = ("pvg", "mpvg", "gap_last")
CITATION = """\
```bibtex
@inproceedings{lee2025maximizing,
  title     = {Maximizing the Position Embedding for Vision Transformers with Global Average Pooling},
  author    = {Lee, Wonjun and Ham, Bumsub and Kim, Suhyun},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2025},
  note      = {arXiv:2502.02919}
}
```"""
CPP = """\
In C++, with the libraries that `torch.utils.cmake_prefix_path` finds and a batch of normalised images:

```cpp
#include <torch/torch.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

torch::inductor::AOTIModelPackageLoader model(FILE);
std::string preprocessing = model.get_metadata()["preprocessing"];  // JSON
torch::Tensor logits = model.run({torch::randn({SHAPE}, DEVICE)})[0];
```"""


class Artefact(NamedTuple):
    """What was written, as the card tells it."""

    file: str
    """Its name."""
    written: Path
    """Where it is for now."""
    format: str
    about: dict[str, Any]
    """What the file says of its images and classes."""
    batch: int | None
    kernels: bool
    device: str
    needs_package: bool
    """Whether loading it takes mpvg_kernels."""
    resized: bool
    """Whether its image size is another than the one that its weights were trained for."""
    difference: float
    """Largest difference of a logit from eager, over the largest logit; `tolerance` was allowed."""
    tolerance: float
    fresh: bool
    """Whether it was loaded in a fresh process."""


def model_card(source: "Source", made: Artefact) -> str:
    """The card of a model that was exported: Markdown."""
    ours = type(source.model).__module__.startswith("mpvg_kernels.")
    sections = [
        f"# {made.file.removesuffix('.pt2').removesuffix('.aot').removesuffix('.onnx')}",
        _what(source, made.about),
        f"## Training\n\n{_training(source)}",
        f"## File\n\n{_file(made)}",
        f"## Use\n\n{_use(made)}",
        f"## Limits\n\n{_limits(source, made)}",
        f"## Made with\n\n{_versions(source, made.format)}",
        "## Licence\n\nTo be filled in by whoever publishes the model: the licence of the weights, and what that of "
        "the training data asks for.",
    ]
    if str(made.about.get("scheme", "")).partition("(")[0] in PAPERS_SCHEMES:
        said = "The position scheme is from the paper below, whose authors have nothing to do with these weights."
        sections.append(f"## Citation\n\n{said}\n\n{CITATION}")
    front = FRONT_MATTER.format("\n- mpvg_kernels" if ours else "") + "\n" if made.format == "safetensors" else ""
    return front + "\n\n".join(sections) + "\n"


def _what(source: "Source", about: dict[str, Any]) -> str:
    kind = f"`{about['architecture']}`" + (f" under position scheme `{about['scheme']}`" if "scheme" in about else "")
    opening = f"An image classifier: {kind}, {_origin(source)}."
    if source.run is None and source.folder is None:
        opening += (
            "\n\n**The weights are random (seed 0).** The model has learned nothing and its answers mean nothing: it "
            "is there to try a tool chain."
        )
    channels, height, width = about["input_size"]
    flops = _flops(source.model, about["input_size"])
    crop = f"{about['interpolation']} resize, {about['crop_mode']} crop of {100 * about['crop_pct']:g} % of the side"
    names = about.get("label_names")
    some = f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ", whose names are not known"
    rows = [
        ("architecture", about["architecture"] + _sizes(source.model)),
        *([("position scheme", about["scheme"])] if "scheme" in about else []),
        ("parameters", f"{sum(p.numel() for p in source.model.parameters()):,}"),
        ("arithmetic of an image", f"{_si(flops / 2)} multiply-adds ({_si(flops)} FLOP): products and convolutions"),
        ("input", f"{channels} x {height} x {width} (channels, height, width), fp32"),
        ("preprocessing", f"{crop}; mean {_numbers(about['mean'])}, deviation {_numbers(about['std'])}"),
        ("output", f"logits of {about['num_classes']:,} classes{some}"),
    ]
    return f"{opening}\n\n{Table(('', ''), rows).markdown()}"


def _origin(source: "Source") -> str:
    if source.run is not None:
        recipe = source.run.info.get("recipe")
        return f"{f'trained by the recipe `{recipe}`' if recipe else 'from a run'}, {source.weights} weights"
    return "with weights of unrecorded training" if source.folder is not None else "untrained"


def _sizes(model: nn.Module) -> str:
    depths = [len(stage.blocks) for stage in model.layers] if hasattr(model, "layers") else None
    depth = len(model.blocks) if hasattr(model, "blocks") else "-".join(map(str, depths)) if depths else None
    found = {"depth": depth, "width": getattr(model, "embed_dim", None)}
    return "".join(f", {name} {value}" for name, value in found.items() if value)


@torch.no_grad()
def _flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Floating-point operations of one image's forward pass (matrix products and convolutions), 2 a multiply-add."""
    image = torch.zeros(1, *input_size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, backends.use_backend("reference"):
        model(image)
    return counter.get_total_flops()


def _si(value: float) -> str:
    """1.26 G"""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.0f} "


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


# ---- training


def _training(source: "Source") -> str:
    if source.run is None:
        if source.folder is None:
            return "None."
        more = ", except in its README.md" if (source.folder / "README.md").exists() else ""
        return f"How the weights were trained is not recorded in the folder that they were exported from{more}."
    info = source.run.info
    parts = []
    try:
        config = source.run.config()
        parts += [f"**Data.** {_data(config, info)}", f"**Results.** {_results(source, config)}"]
        hidden = without_effect(config).keys() | set(NO_RECIPE)
        shown = [n for n in field_names() if n not in hidden and not n.startswith(("log.", "dist.", "checkpoint."))]
        values = "\n".join(f"{name} {json.dumps(get(config, name))}" for name in shown if get(config, name) is not None)
        start = "pretrained weights" if config.model.pretrained or config.model.weights else "random weights"
        parts.append(
            f"**Recipe.** {config.epochs} epochs of batches of {config.batch}, from {start}{_command(info)}\n\n"
            f"The fields of the config that have an effect on the weights:\n\n```\n{values}\n```"
        )
    except InputError as error:
        parts.append(f"What was trained, and how, can't be told: {error}.")
    return "\n\n".join(parts)


def _data(config: Config, info: dict[str, Any]) -> str:
    data, names = config.data, info.get("class_names")
    text = DATA.get(data.name, f"`{data.name}`, split `{data.train_split}`; `{data.val_split}` is held out")
    return f"{text}; {len(names):,} classes." if names and data.name not in DATA else f"{text}."


def _results(source: "Source", config: Config) -> str:
    record = collect(source.run.path)
    results = record.results()
    if not results:
        return "Not known: " + " ".join(record.problems or ["the run's log has no evaluated epoch."])
    rows = [
        (
            f"{name} (exported)" if name == source.weights else name,
            row.get("epoch", "-"),
            figure_of(number(row, f"{key}_acc"), ".2f", " %"),
            figure_of(number(row, f"{key}_loss"), ".4f"),
        )
        for name, row, key in results
    ]
    split = "held-out images" if config.data.name in DATA else f"held-out images (split `{config.data.val_split}`)"
    epoch = number(results[0][1], "epoch") or 0
    part = "" if epoch >= config.epochs else f" These are after epoch {epoch} of {config.epochs}."
    found = Table(("weights", "epoch", "accuracy", "loss"), rows).markdown()
    return f"Top-1 accuracy and loss on the {split}, from the run's log.{part}\n\n{found}\n\n{FAIR}"


def _command(info: dict[str, Any]) -> str:
    """The command line of the run's start, without the program's path and the folder that it wrote."""
    command = [str(part) for part in info.get("command", [])[1:]]
    for option in ("--out", "--resume", "--data.root"):
        if option in command:
            at = command.index(option)
            del command[at : at + 2]
    return f":\n\n    mpvg {shlex.join(command)}" if command else "."


# ---- the file


def _file(made: Artefact) -> str:
    files = sorted(made.written.iterdir()) if made.written.is_dir() else [made.written]
    names = [file.name if made.written.is_dir() else made.file for file in files]
    sizes = ", ".join(f"`{name}` ({_bytes(file.stat().st_size)})" for name, file in zip(names, files, strict=True))
    opset = ""
    if made.format == "onnx":
        import onnx

        found = onnx.load(made.written, load_external_data=False).opset_import
        opset = next(each.version for each in found if not each.domain)
    what = FORMATS[made.format].format(opset=opset, target=_target(made.device))
    need = {"onnx": "onnxruntime", "safetensors": "timm"}.get(made.format, f"PyTorch ({torch.__version__} wrote it)")
    if made.needs_package:
        need += " and mpvg_kernels, whose " + ("fused operators it holds" if made.kernels else "architecture it is")
    elif made.format != "safetensors":
        need += ", not mpvg_kernels" + (" or PyTorch" if made.format == "onnx" else " or timm")
    takes = "any number of images" if made.batch is None else f"{made.batch} images"
    where = "in the exporting process" + (" and in a fresh one" if made.fresh else "")
    return (
        f"{sizes}: {what}. Loading takes {need}. A call takes {takes}. How images are prepared, and what the classes "
        f"are called, is in {FILES[made.format]}.\n\nChecked at the export: loaded {where}, its logits on random "
        f"images differ from the model's in eager PyTorch by at most {made.difference:.1e} of the largest logit "
        f"(allowed: {made.tolerance:.0e})."
    )


def _target(device: str) -> str:
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    return f"{platform.system()} {platform.machine()} and this kind of processor ({cpu_name()})"


def _bytes(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def _use(made: Artefact) -> str:
    text = f"In the folder that holds `{made.file}`, with an image `image.png` there:\n\n"
    text += f"```python\n{usage(made.format, made.file, made.device, made.needs_package)}```"
    if made.format == "aot" and not made.kernels:
        shape = ", ".join(map(str, (made.batch or 1, *made.about["input_size"])))
        device = "torch::kCUDA" if made.device == "cuda" else "torch::kCPU"
        cpp = CPP.replace("FILE", json.dumps(made.file)).replace("SHAPE", shape).replace("DEVICE", device)
        text += f"\n\n{cpp}"
    return text


def _limits(source: "Source", made: Artefact) -> str:
    if source.run is not None:
        data = source.run.info.get("config", {}).get("data", {}).get("name")
        lines = [
            f"It has seen only images of its training data{f' ({data})' if data else ''}, and names one of its classes "
            "for any picture, whatever that shows."
        ]
    elif source.folder is not None:
        lines = ["What it was trained on is not recorded here; it names one of its classes for any picture."]
    else:
        lines = ["Random weights: no use but for trying things out."]
    lines.append(
        "Not evaluated: other data, images that are blurred, rotated or made to deceive it, calibration of the "
        "probabilities, differences between groups of people."
    )
    if made.resized and (source.run or source.folder):
        size = "x".join(map(str, made.about["input_size"][1:]))
        lines.append(f"Exported for images of {size}, which is not the size of its training: not evaluated there.")
    if made.format == "aot":
        lines.append(
            "Compiled for the machine kind above: on another processor or GPU, or with another PyTorch, it may fail to "
            "load or stop with an illegal instruction. Export it again there."
        )
    return "\n".join(f"- {line}" for line in lines)


def _versions(source: "Source", format: str) -> str:
    versions = {"mpvg_kernels": __version__, "torch": torch.__version__, "timm": timm.__version__}
    if format == "onnx":
        import onnx
        import onnxruntime

        versions |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    lines = [f"Exported: {_list(versions)}, Python {platform.python_version()}; {cpu_name()}, {platform.system()}."]
    if source.run is not None and "versions" in source.run.info:
        machine = source.run.info.get("machine", {})
        on = ", ".join(str(machine[key]) for key in ("gpu", "cpu", "system") if machine.get(key))
        lines.insert(0, f"Trained: {_list(source.run.info['versions'])}; {on}.")
    return "\n\n".join(lines)


def _list(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
