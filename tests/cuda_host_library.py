"""Builds the CUDA kernels for the host: csrc/cuda's own source, compiled by g++ with the headers of tests/cuda_host.

The library registers the `_cuda` operators for CPU tensors, and the `cuda` backend uses it where MPVG_CUDA_HOST names
it. It is built once for a state of the sources, into build/cuda_host: of several processes that need it, one builds it.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
HOST = ROOT / "tests/cuda_host"
KERNELS = ROOT / "csrc/cuda"
# -ffp-contract=off: the compiler may not fuse a product and a sum; where a GPU would, the kernels ask for it.
FLAGS = ["-std=c++17", "-fno-math-errno", "-ffp-contract=off", "-w", f"-I{HOST}"]
SOURCES = [*(KERNELS / f"{name}.cu" for name in ("pe_layer_norm", "pe_norm_pool", "pe_chain")), HOST / "fibers.cpp"]


def missing() -> str | None:
    """What keeps the kernels from being compiled for the host; None if nothing does."""
    if shutil.which("g++") is None:
        return "the CUDA kernels run on the host only where g++ is installed"
    return None


def compile_objects(sources: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """Compile each source into `folder`, in parallel."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = ["g++", *FLAGS, *flags, "-x", "c++", "-c", source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{source.name}: {result.stderr[-4000:]}"
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


@functools.cache
def library() -> Path:
    """The shared library, built if it is not there for these sources and this torch."""
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode())
    headers = [*HOST.iterdir(), *(ROOT / "csrc").glob("*.h"), *KERNELS.iterdir()]
    for source in sorted([*headers, Path(__file__)]):
        digest.update(source.name.encode() + source.read_bytes())
    target = ROOT / "build/cuda_host" / f"{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / "lock"):
        if not target.exists():  # else another process has built it meanwhile
            build(target)
    return target


@contextlib.contextmanager
def locked(path: Path):
    """Keep other processes out; the system lets them in when this one dies."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(target: Path) -> None:
    """Compile and link the library; it is at `target` whole or not at all."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-O1", "-fPIC", "-fvisibility=hidden"]
    glue = [f"-I{torch_folder / 'include'}", "-include", str(HOST / "device.h")]
    glue += ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DMPVG_CUDA_ARCHITECTURES="host"']
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_objects(SOURCES, Path(folder), flags)
        objects += compile_objects([KERNELS / "operators.cpp"], Path(folder), flags + glue)
        built = Path(folder, "library.so")
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", "-shared", *objects, "-o", built, *libraries], check=True)
        unfinished = target.with_suffix(".unfinished")
        shutil.copy(built, unfinished)
        unfinished.replace(target)
    for old in sorted(target.parent.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-3]:
        old.unlink(missing_ok=True)
