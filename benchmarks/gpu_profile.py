"""Runs each of a backend's four main calls once between a profiler's marks, for Nsight Compute (stage `ncu`).

ncu --profile-from-start off python benchmarks/gpu_profile.py triton
"""

import sys

import torch

import mpvg_kernels as mk
from mpvg_kernels.triton_ops import tune


def main(backend: str) -> None:
    mk.use_backend(backend)  # loads its kernels, or says why it can't
    for dtype, D in (("bf16", 192), ("bf16", 768), ("fp32", 384)):
        calls = tune.calls(dtype, D, backend)
        for call in calls.values():  # compiles
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1])
