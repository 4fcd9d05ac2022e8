"""Models as files for other programs: ONNX, torch.export's pt2, an AOTInductor package, or timm's folder.

    mpvg export runs/digits --format onnx                                        ./digits-last.onnx and its model card
    mpvg export runs/digits --format aot                                         compiled; runs without Python too
    mpvg export mpvg_swin_tiny_patch4_window7_224 --format pt2 --img-size 256    random weights, to try a tool chain

A program (onnx, pt2, aot) is traced in eval mode, for any number of images unless `batch` fixes it; what does not
depend on the images is constant in it, LN'(pos) of every layer above all. What was written is loaded again, here and in
a fresh process, and compared with the model in eager code on random images; only then does it get its name, so that
there is never a part of a file, or a wrong one.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import operator
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import timm.data
import timm.models
import torch
import torch.fx
from torch import Tensor, nn

from .. import backends
from ..models.dense import DenseModel
from ..models.patches import check_divides
from ..train import InputError, near_matches
from ..train.distributed import pick_backend
from ..train.run_folder import WEIGHTS, RunFolder, open_model, whole_file
from . import model_card
from .loading import FreshProcessError, in_fresh_process

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aot": ".aot.pt2", "safetensors": ""}
# Largest difference of a logit from eager, over the largest logit: fp32 in another order, or the same bits.
TOLERANCES = {"onnx": 1e-4, "pt2": 1e-4, "aot": 1e-4, "safetensors": 0.0}
IMAGES, LOGITS = "images", "logits"
"""Names of an ONNX model's input and output."""

Forward = Callable[[Tensor], Tensor]


class CheckError(Exception):
    """What was written does not load, or does not compute what the model computes; it was removed."""


class Exported(NamedTuple):
    """What was exported, and how near it is."""

    path: Path
    what: str
    """Model, scheme and weights in words."""
    input_size: tuple[int, int, int]
    difference: float
    """Largest difference of a logit from eager, here and in the fresh process, over the largest logit."""
    card: Path | None


class Source(NamedTuple):
    """A model and where it comes from."""

    model: nn.Module
    what: str
    """Model, scheme and weights in words."""
    name: str
    """What a file is called by default."""
    run: RunFolder | None = None
    weights: str | None = None
    """Which weights of the run."""
    folder: Path | None = None
    """The folder in timm's format, where it is in no run."""


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
    opset: int | None = None,
    device: str = "cpu",
    card: bool = True,
    fresh_check: bool = True,
) -> Exported:
    """Write a model to a file that is checked before it gets its name.

    Args:
        source: a run folder; a folder in timm's format, as `RUN/best` or an exported one; or a model name of timm's
            registry, which gets random weights (seed 0).
        format: "onnx"; "pt2", torch.export's program; "aot", the same compiled by AOTInductor; or "safetensors",
            timm's folder of config.json and model.safetensors.
        out: the file or folder; the default is the run's or model's name, in the working directory.
        weights: "best", "last" or "ema" of a run; the default is last.
        scheme: position scheme of a model name; weights have their own.
        img_size: (height, width) other than the model's own; PE tables are resampled.
        batch: number of images that the program takes; None for any.
        kernels: keep the fused operators in a pt2 or aot, which then needs `import mpvg_kernels` and the device; else
            it is the plain formula, which needs neither package.
        opset: ONNX operator set; the default is PyTorch's.
        device: "cpu" or "cuda", what an aot is compiled for.
        card: write a model card too: README.md in the folder, NAME.md beside a file NAME.
        fresh_check: load what was written in a fresh process too, beside this one.

    Raises:
        InputError: the model, an option or `out` can't be had.
        CheckError: what was written does not load, or gives other logits.
        ModuleNotFoundError: ONNX's packages are not installed.
    """
    _check_options(format, batch, kernels, opset, device)
    pick_backend(device)
    found = _open(source, weights, scheme)
    if isinstance(found.model, DenseModel):
        task = found.model.dense_config["task"]
        raise InputError(
            f"{found.what} are of a model of {task}: mpvg export takes classification models; the folder that its "
            "weights are in is a copy that mpvg predict takes"
        )
    path = (out or Path(found.name + SUFFIXES[format])).absolute()
    card_path = path.with_name(path.name + ".md") if card and format != "safetensors" else None
    _check_places(path, card_path, format)

    model = found.model
    own_size = tuple(timm.models.get_model_input_config(model)["input_size"])
    if img_size:
        _resize(model, img_size)
    model.to(device).eval()
    input_size = tuple(timm.models.get_model_input_config(model)["input_size"])
    needs_package = kernels or (format == "safetensors" and type(model).__module__.startswith("mpvg_kernels."))
    about = _about(model)
    # With the suffix last: torch wants packages to end in .pt2.
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    tmp_card = tmp.with_name(f"{tmp.name}.md")
    try:
        with torch.no_grad():
            # One image and an odd number: traced with two, a program for any batch has to take both.
            images = _random_images((batch,) if batch else (1, 3), input_size)
            expected = [model(x.to(device)).cpu() for x in images]
            if not all(x.isfinite().all() for x in expected):
                raise InputError(f"{found.what} gives logits that are not finite, so that no export can be checked")
            if format == "safetensors":
                again = _write_safetensors(model, tmp)
            else:
                write = {"onnx": functools.partial(_write_onnx, opset=opset), "pt2": _write_pt2}
                write["aot"] = functools.partial(_write_aot, device=device)
                try:
                    with _quiet():
                        program = _trace(model, torch.randn(batch or 2, *input_size, device=device), batch, kernels)
                        again = write[format](program, tmp, json.dumps(about))
                except (RuntimeError, ValueError) as error:  # of the tracer, the exporter, the compiler
                    size = "x".join(map(str, input_size))
                    why = _first_line(error)
                    raise InputError(f"--format {format} can't hold the model for {size} images ({why})") from None
            difference = _difference([again(x.to(device)).cpu() for x in images], expected, TOLERANCES[format])
        if fresh_check:
            try:
                logits = in_fresh_process(format, tmp, [x.numpy() for x in images], device, needs_package)
            except FreshProcessError as error:
                raise CheckError(f"what was written {error}; nothing was kept") from None
            fresh = _difference([torch.from_numpy(x) for x in logits], expected, TOLERANCES[format])
            difference = max(difference, fresh)
        if card:
            made = model_card.Artefact(
                path.name, tmp, format, about, batch, kernels, device, needs_package, input_size != own_size,
                difference, TOLERANCES[format], fresh_check,
            )  # fmt: skip
            with whole_file(tmp_card if card_path else tmp / "README.md") as file:
                file.write(model_card.model_card(found, made))
        _check_places(path, card_path, format)  # once more: another process may have been as far as this one
        os.replace(tmp, path)
        if card_path:
            os.replace(tmp_card, card_path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path} can't be written ({why}): choose another place with --out") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        for file in (tmp, tmp_card):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    return Exported(path, found.what, input_size, difference, (card_path or path / "README.md") if card else None)


# ---- what is asked for


def _check_options(format: str, batch: int | None, kernels: bool, opset: int | None, device: str) -> None:
    """Say what can't be had before a model is built and traced for nothing."""
    if kernels and format not in ("pt2", "aot"):
        raise InputError(f"--kernels keeps this package's operators, which {format} has not: use --format pt2 or aot")
    if batch is not None and (batch < 1 or format == "safetensors"):
        why = "safetensors holds weights, which take any batch" if batch >= 1 else "expected 1 or more"
        raise InputError(f"--batch {batch}: {why}; leave it out for any number of images")
    if opset is not None and format != "onnx":
        raise InputError(f"--opset {opset} is a version of ONNX's operators, which {format} has not; leave it out")
    if device != "cpu" and format != "aot":
        raise InputError(f"--device {device}: {format} is written on the CPU for any device; use it with --format aot")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA GPU here, and a package is compiled where it is to run")
    if kernels and backends.resolve(device, compiled=True) == "reference":
        names = ("cpp",) if device == "cpu" else ("cuda", "triton")
        reasons = "; ".join(f"{name}: {backends.status(name).reason}" for name in names)
        raise InputError(f"--kernels needs kernels on the device {device} ({reasons})")
    if format == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            importlib.import_module(name)
    if format == "aot":
        if kernels and torch.__version__ < (2, 12):
            raise InputError(
                f"--kernels in an aot needs PyTorch 2.12: {torch.__version__} gives the operators another dtype than "
                "they were exported with (pytorch/pytorch#169157); use --format pt2, or leave --kernels out"
            )
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:  # Inductor's own types, which differ from one PyTorch to the next
            raise InputError(
                f"--format aot compiles C++ and finds no compiler ({type(error).__name__}): install g++ or clang++, or "
                "name one in the environment variable CXX"
            ) from None


def _check_places(path: Path, card: Path | None, format: str) -> None:
    if format == "aot" and path.suffix != ".pt2":
        raise InputError(f"--out {path}: PyTorch loads packages whose names end in .pt2 alone; end it in .aot.pt2")
    for place in filter(None, (path, card)):
        if place.exists():
            raise InputError(
                f"{place} exists and nothing is overwritten: choose another place with --out, or remove it"
            )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} is not a folder that can be written: make it, or choose another with --out")


# ---- the model


def _open(source: str, weights: str | None, scheme: str | None) -> Source:
    folder = Path(source)
    if not folder.is_dir() or timm.is_model(source):  # an exported folder may be called like its model
        return _from_name(source, weights, scheme)
    if scheme is not None:
        raise InputError(f"--scheme {scheme}: the weights in {source} are of their own scheme; leave it out")
    if (folder / "run.json").exists() or not (folder / "config.json").exists():
        run, name = RunFolder(folder), weights or "last"
        return Source(run.model(name), f"{source} ({name} weights)", f"{folder.resolve().name}-{name}", run, name)
    if weights is not None:
        raise InputError(f"--weights {weights}: {source} is a folder of weights already; leave it out, or name the run")
    full = folder.resolve()
    if full.name in WEIGHTS and (full.parent / "run.json").exists():
        return _open(str(folder.parent if folder.name == full.name else full.parent), full.name, None)
    return Source(open_model(folder), f"{source} (its weights)", full.name, folder=folder)


def _from_name(source: str, weights: str | None, scheme: str | None) -> Source:
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
    if not model.num_classes:
        raise InputError(f"{source} gives feature maps and has no classifier; expected a classification model")
    of_scheme = f", scheme {model.scheme}" if hasattr(model, "scheme") else ""
    return Source(model, f"{source} (random weights{of_scheme})", source)


def _resize(model: nn.Module, img_size: tuple[int, int]) -> None:
    if not hasattr(model, "set_input_size"):
        raise InputError("--img-size: this model takes images of any size; leave it out")
    if min(img_size) < 1:
        raise InputError(f"--img-size {img_size[0]}x{img_size[1]}: expected 1 pixel or more")
    try:
        check_divides(img_size, model.patch_embed.patch_size)
        model.set_input_size(img_size=img_size)
    except ValueError as error:
        raise InputError(f"--img-size: {error}") from None


def _about(model: nn.Module) -> dict[str, Any]:
    """What a user of the program has to know: the model's name, its classes, and how its images are prepared."""
    cfg = timm.data.resolve_data_config(model=model)
    about = {"architecture": model.pretrained_cfg["architecture"], "num_classes": model.num_classes}
    if hasattr(model, "scheme"):
        about["scheme"] = str(model.scheme)
    about["input_size"] = timm.models.get_model_input_config(model)["input_size"]  # set_input_size leaves cfg's alone
    about |= {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    names = model.pretrained_cfg.get("label_names")
    return about | ({"label_names": list(names)} if names else {})


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


def _write_aot(program: torch.export.ExportedProgram, path: Path, about: str, device: str) -> Forward:
    options = {"aot_inductor.metadata": {"preprocessing": about}}
    options["cpp.dynamic_threads"] = True  # else what a process of one thread compiles has one wherever it is loaded
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    if device == "cuda":
        _check_that_it_loads(path)
    return torch._inductor.aoti_load_package(str(path))


def _check_that_it_loads(path: Path) -> None:
    """Load a package in another process first, as PyTorch 2.11 has been seen to crash there.

    Raises:
        RuntimeError: that process crashed.
    """
    code = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    if subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode < 0:
        raise RuntimeError(f"PyTorch {torch.__version__} crashes when it loads the package")


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str, opset: int | None = None) -> Forward:
    import onnx
    import onnxruntime

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise InputError(f"--opset {opset}: onnx {onnx.__version__} knows 1 to {newest}; leave it out for the default")
    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[IMAGES],
        output_names=[LOGITS],
        external_data=False,
        verbose=False,
    )
    # Where the exporter can't convert to a set it leaves the model in another one.
    if opset is not None and written.model.opset_imports[""] != opset:
        raise InputError(
            f"--opset {opset}: PyTorch can't write the model in it; try one from 18 to 25, or leave it out"
        )
    written.model.metadata_props["preprocessing"] = about
    written.save(path, external_data=False)
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which have no common type
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} does not load the model in opset {written.model.opset_imports['']} "
            f"({_first_line(error)}); choose another with --opset"
        ) from None
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])


def _write_safetensors(model: nn.Module, path: Path) -> Forward:
    names = model.pretrained_cfg.get("label_names")  # where Hugging Face looks for them
    config = {"label_names": list(names)} if names else None
    timm.models.save_for_hf(model, path, model_config=config, safe_serialization=True)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


@contextlib.contextmanager
def _quiet():
    """Without what exporters log and warn of: what they write is checked, and what they can't is one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200].rstrip(". ") or type(error).__name__


# ---- the check


def _random_images(batches: tuple[int, ...], input_size: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *input_size, generator=generator) for batch in batches]


def _difference(found: list[Tensor], expected: list[Tensor], tolerance: float) -> float:
    """Largest difference of the written model's logits from eager, over the largest logit."""
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        batch = len(want)
        if got.shape != want.shape:
            said = f"gives {tuple(got.shape)} for {batch} images, expected {tuple(want.shape)}"
            raise CheckError(f"what was written {said}; nothing was kept")
        scale = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny)
        difference = ((got - want).abs().max() / scale).item()
        if not difference <= tolerance:  # also where it is NaN
            raise CheckError(
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
        f"logit, allowed {TOLERANCES[format]:.0e}" + (f"; model card in {done.card}" if done.card else "")
    )
