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


def test_cuda_is_refused_in_plain_words():
    result = setup(MPVG_BUILD="cuda")
    assert result.returncode != 0
    assert "MPVG_BUILD=cuda: this version has no CUDA C++ sources yet" in result.stderr


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


def test_version_has_one_source():
    assert setup("--version").stdout.splitlines()[-1] == mk.__version__


@needs_extension
def test_extension_needs_only_the_stable_abi():
    """No symbol of torch's C++ libraries (at::, c10::, torch::), only the C functions of its stable ABI."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", BUILT[0]], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert "torch_parallel_for" in names
    assert not [n for n in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", n)]
    assert not [n for n in names if n.startswith(("_Py", "Py"))]


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_set_can_be_lowered(isa):
    """MPVG_CPU_ISA and the operator `cpu_isa` choose the kernels; the results agree."""
    assert "cpp" in mk.available_backends()
    cpu_isa = torch.ops.mpvg.cpu_isa
    x, w = torch.randn(3, 5, 33), torch.randn(33)
    fastest = cpu_isa("")
    with mk.use_backend("cpp"):
        want = mk.pe_layer_norm(x, w, None).y
        try:
            assert cpu_isa(isa).startswith(isa)
        except RuntimeError:
            pytest.skip(f"this machine has no {isa}")
        try:
            torch.testing.assert_close(mk.pe_layer_norm(x, w, None).y, want)
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
