"""The kernels, without torch, under address and undefined-behaviour sanitizers.

The CPU's by sanitizers_driver.cpp, on each instruction set; CUDA's on the host (tests/cuda_host) by its driver.cpp.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_host_library
import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc/cpu"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g1"]
FLAGS = ["-std=c++17", "-fno-math-errno", "-ffp-contract=off"]
# No inlining where the source asks for it: without optimisation that takes three times the time and memory to compile.
CALLS = ["-Dalways_inline=", "-Wno-psabi"]


def compiler() -> list[str]:
    """g++ with its sanitizer libraries, or a skip that says what is missing."""
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("g++ is not installed")
    for library in ("libasan.so", "libubsan.so"):
        where = subprocess.run([gcc, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(where):
            pytest.skip(f"g++ has no {library}")
    # Checks as calls instead of inline code: half the time to compile.
    return [gcc, "--param=asan-instrumentation-with-call-threshold=0", "-w"]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    """Run a program without what torch's processes may preload: address sanitizer wants to come before it."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_kernels_are_clean_on_every_instruction_set(tmp_path):
    command = compiler() + SANITIZE + FLAGS + CALLS
    sources = [*sorted(KERNELS.glob("isa_*.cpp")), KERNELS / "dispatch.cpp", ROOT / "tests/sanitizers_driver.cpp"]

    def compile_one(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        subprocess.run([*command, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = tmp_path / "driver"
    subprocess.run([*command, *objects, "-o", program], check=True)
    result = run(program)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "baseline ok" in result.stdout


@pytest.mark.slow
def test_cuda_kernels_are_clean_on_the_host(tmp_path):
    compiler()
    sanitize = ["-O1", *SANITIZE[:2], "-g1"]
    sources = [*cuda_host_library.SOURCES, cuda_host_library.HOST / "driver.cpp"]
    objects = cuda_host_library.compile_objects(sources, tmp_path, sanitize)
    program = tmp_path / "driver"
    subprocess.run(["g++", *sanitize, *objects, "-o", program], check=True)
    result = run(program)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "ok\n"
