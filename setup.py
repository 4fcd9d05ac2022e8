"""Builds the C++ extensions; everything else about the package is in pyproject.toml.

MPVG_BUILD says what is compiled:

    auto  (default) the CPU extension where a C++ compiler works; else a line says why and the package installs without
    none  nothing: the package then runs on its `reference` backend (and on Triton on a GPU)
    cpu   the CPU extension, or an error
    cuda  the CUDA extension, or an error

The extensions use PyTorch's stable ABI: one binary serves every PyTorch from 2.11 and every Python from 3.10. PyTorch
must be installed before, hence `pip install --no-build-isolation -e .`: an isolated build would bring a second PyTorch.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")

# -O3 without -ffast-math: that would drop NaNs and make every thread of the process flush denormals. No -march=native
# either: the kernels choose the instruction set at run time. -ffp-contract=off is for csrc/cpu/vec.h, which says why.
# The warnings are GCC's about its own AVX-512 intrinsics; -g0 keeps 10 MB of debug information out of the library.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-std=c++17",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-tree-slp-vectorize",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def choice() -> str:
    """MPVG_BUILD, checked."""
    value = os.environ.get("MPVG_BUILD", "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise SystemExit(f"MPVG_BUILD={value}: expected one of {', '.join(CHOICES)}")
    return value


def missing_for_cpu() -> str | None:
    """What keeps the CPU extension from being built, in words; None if nothing does."""
    try:
        import torch
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"PyTorch does not import ({error}); install torch>=2.11, then `pip install --no-build-isolation -e .`"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        return f"PyTorch {torch.__version__} is too old; the extension needs 2.11 or later"
    if sys.platform == "win32":
        return "the kernels need a compiler that speaks GCC's vector extensions, which MSVC does not"
    compiler = get_cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <cstdint>\ntypedef float v __attribute__((vector_size(16)));\nv f(v x) { return x + x; }\n"
        )
        command = [*compiler.split(), "-std=c++17", "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"no C++ compiler: {compiler} does not run ({error.strerror}); install g++ or clang++, or set CXX"
    if result.returncode:
        last = (result.stderr.strip() or "?").splitlines()[-1]
        return f"the C++ compiler fails on a three-line program: {compiler}: {last}"
    return None


def extensions() -> list:
    """The extensions to build. An explicit choice that can't be met is an error; `auto` says so and goes on."""
    chosen = choice()
    if chosen == "none":
        return []
    if chosen == "cuda":
        raise SystemExit(
            "MPVG_BUILD=cuda: this version has no CUDA C++ sources yet; use auto or cpu (Triton serves GPUs)"
        )
    missing = missing_for_cpu()
    if missing and chosen == "cpu":
        raise SystemExit(f"MPVG_BUILD=cpu: {missing}")
    if missing:
        print(f"mpvg_kernels: installing without the C++ CPU kernels: {missing}", file=sys.stderr)
        return []
    from torch.utils.cpp_extension import CppExtension

    sources = [
        "csrc/registration.cpp",
        *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/cpu").glob("*.cpp")),
    ]
    headers = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h"))
    return [
        CppExtension(
            "mpvg_kernels._cpu",
            sources,
            depends=headers,
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ]


def build_ext(required: bool) -> type:
    """torch's build command. What fails to compile fails the install only if it was asked for."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if required:
                    raise
                print(
                    f"mpvg_kernels: the C++ CPU kernels did not compile, installing without: {error}", file=sys.stderr
                )

    return Build


if __name__ == "__main__":
    modules = extensions()
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": build_ext(required=choice() == "cpu")} if modules else {},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
