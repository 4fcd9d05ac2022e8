"""Which kernels there are on this machine, why others are not, and which one a call gets.

There are two choices, made by the same names: for eager calls, and for calls in code that torch.compile or torch.export
traces, where the plain formula (`reference`) is a rival in earnest, because Inductor fuses it with its neighbours.
`auto` (the default) takes the first backend of its table that runs on the tensor's device and falls back to `reference`
in silence; a backend asked for by name either runs or raises an error that says what is missing. The environment
variables MPVG_BACKEND and MPVG_COMPILED_BACKEND set the defaults.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")


class Choice(NamedTuple):
    """What is set for eager calls, and for calls in code that torch.compile or torch.export traces."""

    eager: Any
    compiled: Any


# What `auto` tries, by device type; a device that is not listed gets `reference`.
_AUTO = {
    # Not measured on a GPU yet: compiled code gets what eager code gets.
    "cuda": Choice(eager=("cuda", "triton"), compiled=("cuda", "triton")),
    # Compiled training step of MPVG-DeiT-Ti, batch 8, kernels' CPU time over the plain formula's: fp32 0.984, bf16
    # autocast 0.957 (benchmarks/results/train.json).
    "cpu": Choice(eager=("cpp",), compiled=("cpp",)),
}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that cannot run here; the message says why and what would bring it."""


class Status(NamedTuple):
    """Whether a backend can run: the device types it serves (none: it can't) and the reason in words."""

    devices: tuple[str, ...]
    reason: str


@functools.cache
def status(backend: str) -> Status:
    """The state of one kernel backend on this machine, probed once in a process."""
    return {"reference": _probe_reference, "cpp": _probe_cpp, "triton": _probe_triton, "cuda": _probe_cuda}[backend]()


def register_kernels() -> None:
    """Load the kernels that there are, without touching a GPU, as the package is imported.

    An exported program calls them by their operators' names and asks for nothing that would load them. What does not
    load is passed over here; `status` says why.
    """
    status("cpp")
    cuda = os.environ.get("MPVG_CUDA_HOST") or (torch.version.cuda and _extension("_cuda"))
    with contextlib.suppress(OSError):
        if cuda:
            torch.ops.load_library(cuda)
    with contextlib.suppress(ImportError):
        from . import triton_ops  # noqa: F401  (importing registers the kernels)


def _extension(name: str) -> Path | None:
    """The file of a built extension."""
    folder = Path(__file__).parent
    return next(iter([*sorted(folder.glob(f"{name}*.so")), *sorted(folder.glob(f"{name}*.pyd"))]), None)


def _probe_reference() -> Status:
    return Status(("any",), "plain PyTorch formula")


def _probe_cpp() -> Status:
    extension = _extension("_cpu")
    if extension is None:
        return Status(
            (), "the CPU extension is not built; install a C++ compiler and reinstall with MPVG_BUILD=cpu to build it"
        )
    try:
        torch.ops.load_library(extension)
    except OSError as error:
        return Status((), f"{extension.name} does not load ({error}); reinstall with MPVG_BUILD=cpu to rebuild it")
    return Status(("cpu",), f"C++ kernels, {torch.ops.mpvg.cpu_isa()}")


def _probe_triton() -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status((), "Triton is not installed; `pip install triton` brings it on Linux")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return Status((), "no CUDA GPU is visible; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests")
    try:
        from . import triton_ops  # noqa: F401  (importing registers the kernels)
    except ImportError as error:
        return Status((), f"Triton does not import ({error}); reinstall the triton that your torch asks for")
    if interpreted:
        return Status(("cpu", "cuda"), "Triton kernels in Triton's interpreter (slow; for tests)")
    return Status(("cuda",), "Triton kernels")


def _probe_cuda() -> Status:
    host = os.environ.get("MPVG_CUDA_HOST")
    if host:
        torch.ops.load_library(host)
        return Status(("cpu",), "CUDA C++ kernels run on the CPU by the tests' header (slow; for tests)")
    extension = _extension("_cuda")
    if extension is None:
        return Status(
            (), "the CUDA extension is not built; install the CUDA toolkit (nvcc) and reinstall with MPVG_BUILD=cuda"
        )
    if torch.version.cuda is None:
        return Status((), f"this PyTorch {torch.__version__} is built without CUDA; install one with it")
    if not torch.cuda.is_available():
        return Status((), _why_no_gpu())
    try:
        torch.ops.load_library(extension)
    except OSError as error:
        return Status((), f"{extension.name} does not load ({error}); reinstall with MPVG_BUILD=cuda to rebuild it")
    built = torch.ops.mpvg.cuda_architectures().split()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(built, capability):
            needed = "{}.{}".format(*capability)
            return Status(
                (),
                f"the CUDA extension is built for {', '.join(built)}, not for compute capability {needed} of "
                f"{torch.cuda.get_device_name(index)}; reinstall with MPVG_BUILD=cuda TORCH_CUDA_ARCH_LIST={needed}",
            )
    return Status(("cuda",), f"CUDA C++ kernels, built for {', '.join(built)}")


def _why_no_gpu() -> str:
    """The reason why torch sees no GPU: the driver's, where there is one that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        if "driver" in first.lower() and "too old" in first.lower():
            return f"the NVIDIA driver is too old for PyTorch's CUDA {torch.version.cuda}; update it ({first})"
    return "no CUDA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def runs_on(built: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("8.0", "9.0+PTX", "9.0a") runs on a GPU of this compute capability.

    Machine code runs within its major version, from its own minor version on, that of "9.0a" on 9.0 alone; PTX is
    compiled by the driver, for its own version and every later one.
    """
    for architecture in built:
        number, _, ptx = architecture.partition("+")
        exact = number[-1:].isalpha()  # 9.0a; 10.0f is forward compatible in its family, and not counted on here
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if (major, minor) == capability:
            return True
        if not exact and major == capability[0] and minor <= capability[1]:
            return True
        if not exact and ptx and (major, minor) <= capability:
            return True
    return False


@functools.cache
def autograd_nodes() -> tuple[ModuleType | None, str]:
    """The operators' autograd nodes in C++ (csrc/autograd.cpp), or None, and the reason in words.

    Without them the Functions in `ops` do the same, for some 30 us more a call. They are built for one version of
    PyTorch, which the file's name tells, so that another's is never loaded. MPVG_AUTOGRAD=python leaves them unused.
    """
    chosen = os.environ.get("MPVG_AUTOGRAD", "auto")
    if chosen not in ("auto", "python"):
        raise ValueError(f"MPVG_AUTOGRAD={chosen}: expected auto or python")
    if chosen == "python":
        return None, "MPVG_AUTOGRAD=python leaves the C++ nodes unused"
    name = "_autograd_" + re.sub(r"\W", "_", torch.__version__)
    built = sorted(path.name for path in Path(__file__).parent.glob("_autograd_*"))
    if not any(name + suffix in built for suffix in EXTENSION_SUFFIXES):
        state = f"built for another PyTorch or Python ({', '.join(built)})" if built else "not built"
        return None, f"{state}; reinstall with MPVG_BUILD=cpu to build them for PyTorch {torch.__version__}"
    try:
        return importlib.import_module(f"{__package__}.{name}"), f"nodes for PyTorch {torch.__version__}"
    except ImportError as error:
        return None, f"{name} does not load ({error}); reinstall with MPVG_BUILD=cpu to rebuild it"


def _from_environment() -> Choice:
    eager = os.environ.get("MPVG_BACKEND", "auto")
    return Choice(eager, os.environ.get("MPVG_COMPILED_BACKEND", eager))


_requested: Choice = _from_environment()

# The backend that eager calls get, by device type, as far as it was asked for: csrc/autograd.cpp looks it up here.
# Another choice has a dictionary of its own, so that a thread still resolving the last one leaves nothing in it.
eager: dict[str, str] = {}


def _check_name(name: str) -> str:
    choices = ("auto", *BACKENDS)
    if name not in choices:
        near = difflib.get_close_matches(str(name), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(choices)}{hint}")
    return name


class use_backend:
    """Choose the backend of the calls that follow: a setter, and a context manager that puts the old choice back.

        use_backend("triton")                       # from here on
        with use_backend("reference"): ...          # only inside
        use_backend("auto", compiled="reference")   # compiled code gets the plain formula, for Inductor to fuse

    Args:
        name: "auto", "reference", "cpp", "triton" or "cuda".
        compiled: the same for calls in code that torch.compile or torch.export traces; defaults to `name`. ("auto" is
            what was measured to be faster there.) Compiled code compiles again when this changes; an exported program
            keeps what it was exported with.

    Raises:
        ValueError: a name is unknown.
        BackendUnavailableError: a backend can't run on this machine.
    """

    def __init__(self, name: str, *, compiled: str | None = None):
        global _requested, eager
        choice = Choice(name, name if compiled is None else compiled)
        for asked in choice:
            if _check_name(asked) != "auto" and not status(asked).devices:
                raise BackendUnavailableError(f"backend {asked!r} is not available: {status(asked).reason}")
        self._previous, _requested = _requested, choice
        eager = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _requested, eager
        _requested = self._previous
        eager = {}


def available_backends(device: str | torch.device | None = None) -> tuple[str, ...]:
    """The backends that run here, `reference` first; with `device` only those that run on that type of device."""
    device_type = None if device is None else torch.device(device).type
    return tuple(b for b in BACKENDS if _runs(b, device_type))


def _runs(backend: str, device_type: str | None) -> bool:
    devices = status(backend).devices
    return bool(devices) if device_type is None else device_type in devices or "any" in devices


def requested() -> str:
    """The name that holds here, in eager or in compiled code: `use_backend`'s, else the environment's, else "auto"."""
    return _requested.compiled if torch.compiler.is_compiling() else _requested.eager


def resolve(device_type: str, compiled: bool | None = None) -> str:
    """The backend of a call on this type of device: here, or in eager (False) or compiled (True) code."""
    if compiled is None:
        compiled = torch.compiler.is_compiling()
    if compiled:
        return _resolve(_requested.compiled, device_type, True)
    known = eager  # before _requested is read, see there
    known[device_type] = backend = _choose(_requested.eager, device_type, False)
    return backend


@torch.compiler.assume_constant_result
def _resolve(requested: str, device_type: str, compiled: bool) -> str:
    """A constant of compiled code: Dynamo guards on the arguments, so on `_requested`, and never traces the probing."""
    return _choose(requested, device_type, compiled)


@functools.cache
def _choose(requested: str, device_type: str, compiled: bool) -> str:
    if _check_name(requested) == "auto":
        auto = _AUTO.get(device_type, Choice((), ()))
        tried = auto.compiled if compiled else auto.eager
        return next((b for b in tried if _runs(b, device_type)), "reference")
    if not _runs(requested, device_type):
        devices, reason = status(requested)
        why = f"it runs on {' and '.join(devices)} tensors only" if devices else reason
        raise BackendUnavailableError(f"backend {requested!r} can't run on a {device_type} tensor: {why}")
    return requested


def show_config() -> None:
    """Print what is there, what is not and why, and what `auto` picks on each type of device."""
    from . import __version__

    print(f"mpvg_kernels {__version__}, torch {torch.__version__}")
    print(f"backend requested: {_requested.eager}, in compiled code: {_requested.compiled}")
    for backend in BACKENDS:
        devices, reason = status(backend)
        print(f"  {backend:<10}{'yes' if devices else 'no':<5}{reason}")
    for device_type in _AUTO:
        eager, compiled = (_choose("auto", device_type, compiled) for compiled in (False, True))
        print(f"  auto on {device_type}: {eager}, in compiled code: {compiled}")
    nodes, reason = autograd_nodes()
    print(f"  autograd in {'C++' if nodes else 'Python'}: {reason}")
