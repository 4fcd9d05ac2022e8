"""What the CUDA kernels take of a GPU: registers, spills, shared memory, occupancy. Needs nvcc and g++, and no GPU.

    python benchmarks/resources_cuda.py            print the table (Markdown)
    python benchmarks/resources_cuda.py --write    and write benchmarks/results/resources_cuda.json

Registers and spills are ptxas's, for every instantiation. Which kernel a call starts, with how many threads and how
much shared memory, the launchers say themselves: they run on the host (tests/cuda_host) with a GPU's properties set and
launches recorded. Occupancy follows from the three by CUDA's allocation rules.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/resources_cuda.json"
SOURCES = ("pe_layer_norm", "pe_norm_pool", "pe_chain")
ARCHITECTURES = (80, 90, 100)
# KB of shared memory of a multiprocessor; all three have 65536 registers and hold 64 warps and 32 blocks.
SHARED_KB = {80: 164, 90: 228, 100: 228}


class Unavailable(RuntimeError):
    """There is no compiler to ask."""


@functools.cache
def nvcc() -> str:
    """The path of nvcc, found as setup.py finds it."""
    home = runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]()
    path = Path(home or "/nowhere", "bin/nvcc")
    if not path.exists():
        raise Unavailable("nvcc is not installed: the CUDA kernels can't be compiled")
    return str(path)


@functools.cache
def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout)[1]


def sources_digest() -> str:
    """Changes with the kernels' sources."""
    digest = hashlib.sha256()
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").iterdir()]
    for source in sorted(headers):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def compile_for(source: str, arch: int) -> dict[str, dict]:
    """Mangled kernel name -> registers, spill_bytes, static_shared_bytes, atomics, of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc(),
            "-std=c++17",
            "-O3",
            f"-arch=sm_{arch}",
            "-cubin",
            "-Xptxas=-v",
            "--keep",
            "--keep-dir",
            folder,
        ]
        command += ["-o", f"{folder}/{source}.out", str(ROOT / f"csrc/cuda/{source}.cu")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source}.cu does not compile for sm_{arch}: {result.stderr[-2000:]}")
        (ptx,) = (path.read_text() for path in Path(folder).glob("*.ptx"))
    kernels = {}
    for block in result.stderr.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        static = re.search(r"(\d+) bytes smem", block)
        kernels[block.partition("'")[0]] = dict(
            registers=int(re.search(r"Used (\d+) registers", block)[1]),
            spill_bytes=int(spills[1]) + int(spills[2]),
            static_shared_bytes=int(static[1]) if static else 0,
        )
    for text in re.split(r"\.entry ", ptx)[1:]:
        name = re.match(r"\w+", text)[0]
        kernels[name]["atomics"] = len(re.findall(r"^\s*(?:@%\w+\s+)?(?:atom|red)\.", text, re.MULTILINE))
    return kernels


@functools.cache
def kernels() -> dict[int, dict[str, dict]]:
    """Architecture -> mangled name -> resources, of every kernel. Kept in build/ for a state of the sources."""
    kept = ROOT / "build/resources_cuda" / f"{sources_digest()}-{nvcc_version()}.json"
    if kept.exists():
        return {int(arch): found for arch, found in json.loads(kept.read_text()).items()}
    found = {arch: {} for arch in ARCHITECTURES}
    jobs = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, arch), result in zip(jobs, pool.map(lambda job: compile_for(*job), jobs), strict=True):
            found[arch] |= result
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


@functools.cache
def launches() -> list[dict]:
    """What the launchers start for a ViT's calls: one dictionary a launch."""
    sys.path.insert(0, str(ROOT / "tests"))
    import cuda_host_library as host

    if host.missing():
        raise Unavailable(host.missing())
    with tempfile.TemporaryDirectory() as folder:
        sources = [*host.SOURCES, host.HOST / "launches.cpp"]
        objects = host.compile_objects(sources, Path(folder), ["-O0", "-fno-pie"])
        program = Path(folder, "launches")
        subprocess.run(["g++", "-no-pie", *objects, "-o", program], check=True)
        symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
        output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in symbols.splitlines()]
    # g++ marks a static function's name, nvcc does not.
    names = {int(line[0], 16): line[2].replace("cudaL", "cuda") for line in lines if len(line) == 3}
    found = []
    for line in output.splitlines():
        arch, operator, direction, dtype, D, address, blocks, threads, shared = line.split()
        found.append(
            dict(
                arch=int(arch),
                operator=operator,
                direction=direction,
                dtype=dtype,
                D=int(D),
                symbol=names[int(address, 16)],
                blocks=int(blocks),
                threads=int(threads),
                dynamic_shared_bytes=int(shared),
            )  # fmt: skip
        )
    return found


def occupancy_percent(arch: int, registers: int, threads: int, shared_bytes: int) -> float:
    """Resident warps, of the 64 that a multiprocessor holds.

    Registers go to warps in units of 256; each block takes 1 KB of shared memory for the system besides its own, in
    units of 128 bytes.
    """
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = SHARED_KB[arch] * 1024 // (-(-(shared_bytes + 1024) // 128) * 128)
    return round(100 * min(by_registers, by_shared, 64 // warps, 32) * warps / 64, 1)


def kernel_name(symbol: str) -> str:
    """pe_layer_norm_fwd_kernel of _ZN4mpvg4cuda24pe_layer_norm_fwd_kernelI..."""
    return re.search(r"\d([a-z][a-z_]*_kernel)", symbol)[1]


def rows() -> list[dict]:
    """The table: a row for each kernel that a call starts, by operator, direction, dtype, D and architecture."""
    compiled, table = kernels(), []
    for launch in launches():
        kernel = compiled[launch["arch"]][launch["symbol"]]
        shared = launch["dynamic_shared_bytes"] + kernel["static_shared_bytes"]
        table.append(
            dict(
                backend="cuda",
                kernel=kernel_name(launch["symbol"]),
                operator=launch["operator"],
                direction=launch["direction"],
                dtype=launch["dtype"],
                D=launch["D"],
                arch=launch["arch"],
                registers=kernel["registers"],
                shared_bytes=shared,
                spill_bytes=kernel["spill_bytes"],
                threads=launch["threads"],
                occupancy_percent=occupancy_percent(launch["arch"], kernel["registers"], launch["threads"], shared),
            )
        )
    return table


def markdown(table: list[dict]) -> str:
    """The table for reading: one line for a kernel, dtype and D, the architectures' values side by side."""
    lines = ["| kernel | dtype | D | threads | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |"]
    lines.append("|" + " --- |" * (4 + len(ARCHITECTURES)))
    grouped = {}
    for row in table:
        key = (row["operator"], row["direction"], row["kernel"], row["dtype"], row["D"], row["threads"])
        grouped.setdefault(key, {})[row["arch"]] = row
    for (_, _, kernel, dtype, D, threads), by_arch in grouped.items():
        cells = []
        for arch in ARCHITECTURES:
            row = by_arch[arch]
            cells.append(
                f"{row['registers']} / {row['shared_bytes'] / 1024:.1f} KB / {row['spill_bytes']} / "
                f"{row['occupancy_percent']:.0f} %"
            )
        lines.append(f"| {kernel} | {dtype} | {D} | {threads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    write = parser.parse_args().write
    table = rows()
    print("registers / shared memory a block / bytes spilled / occupancy\n")
    print(markdown(table))
    if write:
        text = ",\n".join(json.dumps(row) for row in table)
        RESULTS.write_text(f'{{"nvcc": "{nvcc_version()}", "rows": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
