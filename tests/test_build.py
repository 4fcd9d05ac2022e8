"""What setup.py does with MPVG_BUILD and with a machine that lacks a compiler, and what the built extension needs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpvg_kernels as mk

ROOT = Path(__file__).parents[1]
BUILT = sorted((ROOT / "mpvg_kernels").glob("_cpu*.so"))
needs_extension = pytest.mark.skipif(not BUILT, reason="the CPU extension is not built")


def setup(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py, with these environment variables."""
    return subprocess.run(
        [sys.executable, "setup.py", *(args or ("--name",))],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("choice", ["none", "auto", "cpu", "CPU", ""])
def test_choices_that_can_be_met(choice):
    if choice.lower() == "cpu" and not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("no C++ compiler")
    result = setup(MPVG_BUILD=choice)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "mpvg_kernels"


def test_unknown_choice():
    result = setup(MPVG_BUILD="fast")
    assert result.returncode != 0
    assert "MPVG_BUILD=fast: expected one of auto, none, cpu, cuda" in result.stderr


@pytest.fixture
def toolkit(tmp_path):
    """A stand-in for a CUDA toolkit: toolkit(release, architectures) gives its folder."""

    def make(release: str, known: tuple[str, ...] = ("80", "90")) -> str:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir()
        listed = "\\n".join(f"compute_{number}" for number in known)
        nvcc.write_text(
            f"#!/bin/sh\ncase $1 in --version) echo 'Cuda compilation tools, release {release}, V{release}.1';; "
            f"--list-gpu-arch) printf '{listed}\\n';; esac\n"
        )
        nvcc.chmod(0o755)
        return str(tmp_path)

    return make


needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or os.environ.get("CXX")), reason="no C++ compiler")
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA")
TORCH_CUDA = torch.version.cuda or "0.0"


def refused(**environment: str) -> str:
    """What an explicit MPVG_BUILD=cuda says when it fails: one line."""
    result = setup(MPVG_BUILD="cuda", **environment)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("MPVG_BUILD=cuda: ")]
    return line


@needs_compiler
@needs_cuda_torch
def test_cuda_without_nvcc(tmp_path):
    assert "no nvcc in /nowhere/bin: set CUDA_HOME" in refused(CUDA_HOME="/nowhere")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        compiler = Path(shutil.which("c++")).parent
        assert "no nvcc: install the CUDA toolkit" in refused(PATH=str(compiler), CUDA_HOME="", CUDA_PATH="")


@needs_compiler
@needs_cuda_torch
@pytest.mark.parametrize(
    "architectures,message",
    [
        ("8.0;99.0", "does not know compute capability 99.0 .it knows up to 9.0.; update the toolkit"),
        ("8.0 9.0a 12.1+PTX", r"does not know compute capability 12.1\+PTX"),
        ("7.5", "TORCH_CUDA_ARCH_LIST names 7.5: the kernels need compute capability 8.0"),
        ("Hopper", "TORCH_CUDA_ARCH_LIST names 'Hopper': expected compute capabilities such as"),
    ],
)
def test_cuda_for_an_architecture_that_cannot_be_had(architectures, message, toolkit):
    assert re.search(message, refused(CUDA_HOME=toolkit(TORCH_CUDA), TORCH_CUDA_ARCH_LIST=architectures))


@needs_compiler
@needs_cuda_torch
def test_cuda_of_another_version(toolkit):
    major, minor = TORCH_CUDA.split(".")[:2]
    home = toolkit(f"{int(major) - 1}.0")
    line = refused(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="8.0;9.0")
    assert f"nvcc is of CUDA {int(major) - 1}.0 and PyTorch of CUDA {TORCH_CUDA}" in line


@needs_compiler
@needs_cuda_torch
def test_cuda_of_another_minor_version_will_do(toolkit):
    home = toolkit(f"{TORCH_CUDA.split('.')[0]}.99")
    result = setup(MPVG_BUILD="cuda", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="8.0, 9.0+PTX")
    assert result.returncode == 0, result.stderr


@needs_compiler
@needs_cuda_torch
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, whose architecture is taken")
def test_cuda_without_a_gpu_needs_a_list(toolkit):
    home = toolkit(TORCH_CUDA)
    assert "no GPU is visible and TORCH_CUDA_ARCH_LIST is not set" in refused(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="")
    result = setup(MPVG_BUILD="auto", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="")
    assert result.returncode == 0
    lines = [line for line in result.stderr.splitlines() if "without the CUDA kernels" in line]
    assert len(lines) == 1 and "TORCH_CUDA_ARCH_LIST is not set" in lines[0]


@pytest.mark.parametrize("by", ["link", "script"])
def test_nvcc_is_found_behind_a_link_or_a_script(by, toolkit, tmp_path_factory, monkeypatch):
    """The toolkit's folder, not that of the nvcc on the PATH."""
    import runpy

    home = Path(toolkit("13.0"))
    nvcc = home / "bin/nvcc"
    if by == "script":  # the real nvcc says where it is
        nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={home}/bin/..' >&2\n")
    other = tmp_path_factory.mktemp("elsewhere") / "bin"
    other.mkdir()
    if by == "link":
        (other / "nvcc").symlink_to(nvcc)
    else:
        (other / "nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        (other / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(other), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]() == str(home.resolve())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_explicit_cpu_without_a_working_compiler_fails(compiler):
    result = setup(MPVG_BUILD="cpu", CXX=compiler)
    assert result.returncode != 0
    assert re.search(rf"MPVG_BUILD=cpu: .*{compiler}", result.stderr)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_auto_without_a_working_compiler_says_so_and_goes_on(compiler):
    result = setup(MPVG_BUILD="auto", CXX=compiler)
    assert result.returncode == 0
    lines = [line for line in result.stderr.splitlines() if "without the C++ CPU kernels" in line]
    assert len(lines) == 1 and compiler in lines[0]


NODES = "mpvg_kernels._autograd_" + re.sub(r"\W", "_", torch.__version__)


@needs_compiler
@pytest.mark.parametrize("choice,optional", [("none", {}), ("cpu", {"_cpu": False}), ("auto", {"_cpu": True})])
def test_autograd_nodes_come_with_the_cpu_kernels_and_are_optional(choice, optional, monkeypatch):
    """They depend on PyTorch's internals and nothing depends on them: a failure never fails the install."""
    import runpy

    monkeypatch.setenv("MPVG_BUILD", choice)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    modules = runpy.run_path(str(ROOT / "setup.py"))["extensions"]()
    found = {m.name: m.optional for m in modules if m.name != "mpvg_kernels._cuda"}
    assert found == ({f"mpvg_kernels.{k}": v for k, v in optional.items()} | {NODES: True} if optional else {})


@needs_compiler
@pytest.mark.parametrize("part,fails", [(NODES, False), ("mpvg_kernels._cpu", True)])
def test_what_does_not_compile(part, fails, monkeypatch, capsys):
    """With MPVG_BUILD=cpu the kernels have to compile; without the autograd nodes a line says so."""
    import runpy

    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    def fail(self, ext):
        raise RuntimeError("no such header")

    monkeypatch.setenv("MPVG_BUILD", "cpu")
    monkeypatch.setattr(BuildExtension, "build_extension", fail)
    script = runpy.run_path(str(ROOT / "setup.py"))
    (module,) = [m for m in script["extensions"]() if m.name == part]
    build = script["build_ext"]()(Distribution())
    if fails:
        with pytest.raises(RuntimeError, match="no such header"):
            build.build_extension(module)
        return
    build.build_extension(module)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mpvg_kernels: {part} did not compile, installing without: no such header"


@needs_extension
@pytest.mark.skipif(os.environ.get("MPVG_AUTOGRAD") == "python", reason="MPVG_AUTOGRAD=python")
def test_autograd_nodes_are_built_for_this_torch():
    """Not needed, but `make test` should not pass by without them."""
    assert mk.backends.autograd_nodes()[0] is not None, mk.backends.autograd_nodes()[1]


def test_version_has_one_source():
    assert setup("--version").stdout.splitlines()[-1] == mk.__version__


@pytest.mark.parametrize("part,calls", [("cpu", "torch_parallel_for"), ("cuda", "aoti_torch_get_current_cuda_stream")])
def test_extension_needs_only_the_stable_abi(part, calls):
    """No symbol of torch's C++ libraries (at::, c10::, torch::), only the C functions of its stable ABI."""
    built = sorted((ROOT / "mpvg_kernels").glob(f"_{part}*.so"))
    if not built:
        pytest.skip(f"the {part} extension is not built")
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", built[0]], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert calls in names
    assert not [n for n in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", n)]
    assert not [n for n in names if n.startswith(("_Py", "Py"))]


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("D", [33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_set_can_be_lowered(isa, D, dtype):
    """MPVG_CPU_ISA and the operator `cpu_isa` choose the kernels; the results agree."""
    assert "cpp" in mk.available_backends()
    cpu_isa = torch.ops.mpvg.cpu_isa
    x, w = torch.randn(9, 5, D, dtype=dtype, requires_grad=True), torch.randn(D, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        x[2, 3] += 100  # one row among others whose mean is large
    fastest = cpu_isa("")

    def results():
        y = mk.pe_layer_norm(x, w, None).y
        pooled = mk.pe_norm_pool(x, w, None)
        return y, pooled, *torch.autograd.grad(y.square().sum() + pooled.sum(), (x, w))

    with mk.use_backend("cpp"):
        want = results()
        try:
            assert cpu_isa(isa).startswith(isa)
        except RuntimeError:
            pytest.skip(f"this machine has no {isa}")
        try:
            torch.testing.assert_close(results(), want, rtol=1e-4, atol=1e-4)
        finally:
            assert cpu_isa("") == fastest
    code = f"import torch; torch.ops.load_library(r'{BUILT[0]}'); print(torch.ops.mpvg.cpu_isa())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MPVG_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert result.stdout.strip().startswith(isa), result.stderr


@needs_extension
def test_unknown_instruction_set():
    assert "cpp" in mk.available_backends()
    with pytest.raises(RuntimeError, match="no CPU kernels named 'mmx'"):
        torch.ops.mpvg.cpu_isa("mmx")
