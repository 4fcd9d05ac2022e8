"""Builds the C++ and CUDA extensions; everything else about the package is in pyproject.toml.

MPVG_BUILD says what is compiled:

    auto  (default) the CPU extension where a C++ compiler works; the CUDA extension where there is nvcc besides, and
          either a GPU or TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"). What is left out is said in a line
    none  nothing: the package then runs on its `reference` backend (and on Triton on a GPU)
    cpu   the CPU extension, or an error
    cuda  both extensions, or an error

nvcc is found by CUDA_HOME, else on the PATH. The extensions use PyTorch's stable ABI: one binary serves every PyTorch
from 2.11 and every Python from 3.10. With them comes one that does not and that nothing needs, csrc/autograd.cpp, which
saves host time: it is for the PyTorch and the Python that it is built with, and where it does not compile this is said
in a line, whatever MPVG_BUILD is. PyTorch must be installed before, hence `pip install --no-build-isolation -e .`:
an isolated build would bring a second PyTorch.
"""

import functools
import os
import re
import shutil
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


@functools.cache
def cuda_home() -> str | None:
    """The CUDA toolkit's folder: CUDA_HOME, else that of the nvcc on the PATH; None if there is neither."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return named
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None
    # It may be a link or a script that calls the real one, which knows where it is.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    return os.path.realpath(top[1] if top else Path(nvcc).resolve().parents[1])


def nvcc_says(option: str) -> str:
    """What nvcc prints for an option."""
    return subprocess.run([Path(cuda_home(), "bin/nvcc"), option], capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    """What the CUDA extension is compiled for: TORCH_CUDA_ARCH_LIST, else the GPUs' own compute capabilities."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    if named.strip(";"):
        return [name for name in named.split(";") if name]
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ["{}.{}".format(*capability) for capability in sorted(found)]


def missing_for_cuda() -> str | None:
    """What keeps the CUDA extension from being built, in words; None if nothing does."""
    missing = missing_for_cpu()  # nvcc needs a C++ compiler too
    if missing:
        return missing
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a build with CUDA, then install again"
    home = cuda_home()
    if home is None:
        return f"no nvcc: install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME to the folder with bin/nvcc"
    if not Path(home, "bin/nvcc").exists():
        return f"no nvcc in {home}/bin: set CUDA_HOME to the CUDA toolkit's folder"
    asked = architectures()
    if not asked:
        return "no GPU is visible and TORCH_CUDA_ARCH_LIST is not set; set it to what to compile for, 8.0;9.0 say"
    try:
        version = re.search(r"release (\d+)\.(\d+)", nvcc_says("--version"))
        known = re.findall(r"compute_(\d+)", nvcc_says("--list-gpu-arch"))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{home}/bin/nvcc does not run ({error}); reinstall the CUDA toolkit"
    if version and version[1] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {version[1]}.{version[2]} and PyTorch of CUDA {torch.version.cuda}; install the toolkit "
            "of PyTorch's major version, or set CUDA_HOME to it"
        )
    for name in asked:
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if number is None:
            return f"TORCH_CUDA_ARCH_LIST names {name!r}: expected compute capabilities such as 8.0;9.0+PTX"
        if int(number[1]) < 8:
            return f"TORCH_CUDA_ARCH_LIST names {name}: the kernels need compute capability 8.0 or later"
        if number[1] + number[2] not in known:
            newest = max(known, key=int)
            newest = f"{newest[:-1]}.{newest[-1]}"
            return (
                f"nvcc in {home} does not know compute capability {name} (it knows up to {newest}); update the toolkit"
            )
    return None


def cuda_flags() -> list[str]:
    """nvcc's flags; with -gencode of our own torch adds none."""
    flags = [
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fvisibility=hidden",
        "-DUSE_CUDA",
        *(flag for flag in CXX_FLAGS if flag.startswith("-DTORCH")),
    ]
    for name in architectures():
        number = name.partition("+")[0].replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extensions() -> list:
    """The extensions to build. An explicit choice that can't be met is an error; `auto` says so and goes on."""
    chosen = choice()
    if chosen == "none":
        return []
    if cuda_home():  # before torch.utils.cpp_extension is imported, which guesses by the PATH
        os.environ["CUDA_HOME"] = cuda_home()
    missing = {"C++ CPU": missing_for_cpu()}
    if chosen != "cpu":
        missing["CUDA"] = missing_for_cuda()
    for kernels, what in missing.items():
        if what and chosen != "auto":
            raise SystemExit(f"MPVG_BUILD={chosen}: {what}")
        if what:
            print(f"mpvg_kernels: installing without the {kernels} kernels: {what}", file=sys.stderr)

    def files(*patterns: str) -> list[str]:
        return sorted(p.relative_to(ROOT).as_posix() for pattern in patterns for p in (ROOT / "csrc").glob(pattern))

    modules = []
    if not missing["C++ CPU"]:
        import torch
        from torch.utils.cpp_extension import CppExtension

        modules.append(
            CppExtension(
                "mpvg_kernels._cpu",
                files("registration.cpp", "cpu/*.cpp"),
                depends=files("*.h", "cpu/*.h"),
                extra_compile_args={"cxx": CXX_FLAGS},
                py_limited_api=True,
            )
        )
        # Named after the PyTorch that it is for: mpvg_kernels/backends.py never loads another's.
        modules.append(
            CppExtension(
                "mpvg_kernels._autograd_" + re.sub(r"\W", "_", torch.__version__),
                files("autograd.cpp"),
                extra_compile_args={"cxx": ["-O2", "-g0", "-fvisibility=hidden"]},
            )
        )
    if "CUDA" in missing and not missing["CUDA"]:
        from torch.utils.cpp_extension import CUDAExtension

        named = f'-DMPVG_CUDA_ARCHITECTURES="{" ".join(architectures())}"'
        modules.append(
            CUDAExtension(
                "mpvg_kernels._cuda",
                files("cuda/*.cpp", "cuda/*.cu"),
                depends=files("*.h", "cpu/*.h", "cuda/*.h", "cuda/*.cuh"),
                extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA", named], "nvcc": cuda_flags()},
                py_limited_api=True,
            )
        )
    for module in modules:
        module.optional = chosen == "auto" or "_autograd" in module.name
    return modules


def build_ext() -> type:
    """torch's build command. What fails to compile fails the install only if it was asked for."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            # A place of its own that lasts: ninja then compiles again only what has changed, also where pip builds in a
            # temporary folder.
            self.build_temp = str(ROOT / "build" / ext.name)
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                print(f"mpvg_kernels: {ext.name} did not compile, installing without: {error}", file=sys.stderr)

    return Build


if __name__ == "__main__":
    modules = extensions()
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": build_ext()} if modules else {},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
