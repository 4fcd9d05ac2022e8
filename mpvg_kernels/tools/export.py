"""Models as files for other programs: ONNX, torch.export's pt2, or timm's folder with safetensors.

    mpvg export runs/digits --format onnx                                        ./digits-last.onnx
    mpvg export mpvg_swin_tiny_patch4_window7_224 --format pt2 --img-size 256    random weights, to try a tool chain

A program (onnx, pt2) is traced in eval mode, for any number of images unless `batch` fixes it; what does not depend
on the images is constant in it, LN'(pos) of every layer above all. What was written is loaded again and compared with
the model in eager code on random images; only then does it get its name, so that there is never a part of a file, or a
wrong one.
"""

import contextlib
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import timm.data
import timm.models
import torch
import torch.fx
from torch import Tensor, nn

from .. import backends
from ..models.patches import check_divides
from ..train import InputError, near_matches
from ..train.checkpoint import RunFolder

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ""}
# Largest difference of a logit from eager, over the largest logit: fp32 in another order, or the same bits.
TOLERANCES = {"onnx": 1e-4, "pt2": 1e-4, "safetensors": 0.0}
IMAGES, LOGITS = "images", "logits"
"""Names of an ONNX model's input and output."""

Forward = Callable[[Tensor], Tensor]


class ParityError(Exception):
    """What was written does not compute what the model computes; it was removed."""


class Exported(NamedTuple):
    """What was exported, and how near it is."""

    path: Path
    what: str
    """Model, scheme and weights in words."""
    input_size: tuple[int, int, int]
    difference: float
    """Largest difference of a logit from eager, over the largest logit."""


def export(
    source: str,
    format: str,
    out: Path | None = None,
    *,
    weights: str | None = None,
    scheme: str | None = None,
    img_size: tuple[int, int] | None = None,
    batch: int | None = None,
    kernels: bool = False,
) -> Exported:
    """Write a model to a file that is checked before it gets its name.

    Args:
        source: a run folder, or a model name of timm's registry, which gets random weights (seed 0).
        format: "onnx", "pt2" or "safetensors"; the last writes timm's folder, config.json and model.safetensors.
        out: the file or folder; the default is the run's or model's name, in the working directory.
        weights: "best" or "last" of a run; the default is last.
        scheme: position scheme of a model name; a run has its own.
        img_size: (height, width) other than the model's own; PE tables are resampled.
        batch: number of images that the program takes; None for any.
        kernels: keep the fused operators in a pt2, which then needs `import mpvg_kernels` and a CPU; else it is
            the plain formula, which needs neither.

    Raises:
        InputError: the model, an option or `out` can't be had.
        ParityError: what was written gives other logits.
        ModuleNotFoundError: ONNX's packages are not installed.
    """
    if kernels and format != "pt2":
        raise InputError(f"--kernels keeps this package's operators, which {format} has not: use --format pt2")
    if batch is not None and (batch < 1 or format == "safetensors"):
        why = "safetensors holds weights, which take any batch" if batch >= 1 else "expected 1 or more"
        raise InputError(f"--batch {batch}: {why}; leave it out for any number of images")
    if kernels and backends.resolve("cpu", compiled=True) == "reference":
        raise InputError(f"--kernels needs kernels on the CPU: {backends.status('cpp').reason}")
    if format == "onnx":
        import onnx  # noqa: F401  (before a model is built and traced for nothing)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    path = (out or Path(_default_name(source, weights) + SUFFIXES[format])).absolute()
    if path.exists():
        raise InputError(f"{path} exists and nothing is overwritten: choose another place with --out, or remove it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} is not a folder that can be written: make it, or choose another with --out")

    model, what = (_from_run if _is_run(source) else _from_name)(source, weights, scheme)
    if img_size:
        _resize(model, img_size)
    model.eval()
    input_size = tuple(timm.models.get_model_input_config(model)["input_size"])
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with torch.no_grad():
            if format == "safetensors":
                again = _write_safetensors(model, tmp)
            else:
                program = _trace(model, torch.randn(batch or 2, *input_size), batch, kernels)
                write = _write_onnx if format == "onnx" else _write_pt2
                again = write(program, tmp, _about(model))
            # One image and an odd number: traced with two, a program for any batch has to take both.
            difference = _difference(again, model, input_size, (batch,) if batch else (1, 3), TOLERANCES[format])
        os.replace(tmp, path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path} can't be written ({why}): choose another place with --out") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
    return Exported(path, what, input_size, difference)


# ---- the model


def _is_run(source: str) -> bool:
    return Path(source).is_dir() and not timm.is_model(source)  # an exported folder may be called like its model


def _default_name(source: str, weights: str | None) -> str:
    return f"{Path(source).resolve().name}-{weights or 'last'}" if _is_run(source) else source


def _from_run(source: str, weights: str | None, scheme: str | None) -> tuple[nn.Module, str]:
    run, name = RunFolder(source), weights or "last"
    if scheme is not None:
        raise InputError(f"--scheme {scheme}: {source} is a run, and its weights are of its own scheme; leave it out")
    return run.model(name), f"{source} ({name} weights)"


def _from_name(source: str, weights: str | None, scheme: str | None) -> tuple[nn.Module, str]:
    if not timm.is_model(source):
        ours = timm.list_models("mpvg_*")
        close = near_matches(source, ours) or near_matches(source, timm.list_models())
        raise InputError(f"{source!r} is no run folder and no model{close or '; ours are ' + ', '.join(ours)}")
    if weights is not None:
        raise InputError(f"--weights {weights}: {source} is a model's name, which has none; name a run folder")
    torch.manual_seed(0)
    try:
        model = timm.create_model(source, **({} if scheme is None else {"scheme": scheme}))
    except (ValueError, TypeError) as error:
        raise InputError(f"{source} can't be built with --scheme {scheme}: {error}") from None
    of_scheme = f", scheme {model.scheme}" if hasattr(model, "scheme") else ""
    return model, f"{source} (random weights{of_scheme})"


def _resize(model: nn.Module, img_size: tuple[int, int]) -> None:
    if not hasattr(model, "set_input_size"):
        raise InputError("--img-size: this model takes images of any size; leave it out")
    try:
        check_divides(img_size, model.patch_embed.patch_size)
        model.set_input_size(img_size=img_size)
    except ValueError as error:
        raise InputError(f"--img-size: {error}") from None


def _about(model: nn.Module) -> str:
    """What a user of the program has to know, as JSON: the model's name and how its images are prepared."""
    cfg = timm.data.resolve_data_config(model=model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    about = {"architecture": model.pretrained_cfg["architecture"], "num_classes": model.num_classes}
    if hasattr(model, "scheme"):
        about["scheme"] = str(model.scheme)
    return json.dumps(about | {key: cfg[key] for key in keys})


# ---- the formats: each writes, loads what it wrote, and gives its forward


def _trace(model: nn.Module, images: Tensor, batch: int | None, kernels: bool) -> torch.export.ExportedProgram:
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with backends.use_backend("auto", compiled="auto" if kernels else "reference"):
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    module = program.module(check_guards=False)
    if not _fold(module):
        return program
    return torch.export.export(module, (images,), dynamic_shapes=shapes)


def _fold(module: torch.fx.GraphModule) -> bool:
    """Compute what follows from parameters alone, and make it constants in place; whether there was something.

    `models.pos_tables` leaves little to do, but not every architecture has it: Swin's PE goes through PatchMergings.
    The fused operators take LN'(pos) with the tokens, so that in a Swin with kernels it stays a part of every call.
    """
    known: dict[torch.fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function" and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    parameters = {id(value): node for node, value in known.items() if node.op == "get_attr"}
    computed = [node for node in known if node.op == "call_function"]
    folded = False
    for node in computed:
        value = known[node]
        if isinstance(value, Tensor) and any(user not in known for user in node.users):
            constant = parameters.get(id(value))  # where nothing was done to it
            if constant is None:
                name = f"constant_{node.name}"
                module.register_buffer(name, value.clone())
                with module.graph.inserting_before(node):
                    constant = module.graph.get_attr(name)
                folded = True
            node.replace_all_uses_with(constant)
    for node in reversed(computed):  # checks of what is constant too, which dead code elimination would keep
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return folded


def _write_pt2(program: torch.export.ExportedProgram, path: Path, about: str) -> Forward:
    with open(path, "wb") as file:  # a name would have to end in .pt2
        torch.export.save(program, file, extra_files={"preprocessing.json": about})
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> Forward:
    import onnx
    import onnxruntime

    written = torch.onnx.export(
        program, dynamo=True, input_names=[IMAGES], output_names=[LOGITS], external_data=False, verbose=False
    )
    written.model.metadata_props["preprocessing"] = about
    written.save(path, external_data=False)
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])


def _write_safetensors(model: nn.Module, path: Path) -> Forward:
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def _difference(
    again: Forward, model: nn.Module, input_size: tuple[int, ...], batches: Iterable[int], tolerance: float
) -> float:
    """Largest difference of the written model's logits from eager on random images, over the largest logit."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for batch in batches:
        images = torch.randn(batch, *input_size, generator=generator)
        expected, found = model(images), again(images)
        if found.shape != expected.shape:
            said = f"gives {tuple(found.shape)} for {batch} images, expected {tuple(expected.shape)}"
            raise ParityError(f"what was written {said}; nothing was kept")
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        difference = ((found - expected).abs().max() / scale).item()
        if not difference <= tolerance:  # also where it is NaN
            raise ParityError(
                f"what was written differs from the model in eager code by {difference:.1e} of the largest logit for "
                f"{batch} images, allowed {tolerance:.0e}; nothing was kept"
            )
        worst = max(worst, difference)
    return worst


def describe(done: Exported, format: str, batch: int | None) -> str:
    """One line on an export, for the command line."""
    size = "x".join(map(str, done.input_size))
    images = f"{'any number' if batch is None else batch} of {size} images"
    return (
        f"{done.what} in {done.path}: {images}; largest difference from eager {done.difference:.1e} of the largest "
        f"logit, allowed {TOLERANCES[format]:.0e}"
    )
