"""Runs every GPU kernel once on a short case and checks it: what compute-sanitizer watches (tests/test_gpu.py).

compute-sanitizer --tool memcheck python tests/gpu_kernels.py [BACKEND ...]
"""

import sys

import test_pe_chain
import torch
from cases import Case, check

import mpvg_kernels as mk

BF16, F32 = torch.bfloat16, torch.float32
# Rows of several column blocks and vector loads, with a ragged last tile; then odd rows, read one element at a time;
# then a row that takes several warps.
CASES = (
    dict(B=5, N=19, D=192, dtype=BF16, branch_dtype=BF16, param_dtype=BF16, scale=True),
    dict(B=3, N=5, D=33, dtype=F32, branch_dtype=BF16, scale=True, num_prefix_tokens=1),
    dict(B=2, N=3, D=1280, dtype=F32, branch_dtype=None),
)


def main(names: list[str]) -> None:
    for name in names or [b for b in ("triton", "cuda") if b in mk.available_backends("cuda")]:
        for case in CASES:
            for op in ("norm", "pool"):
                with mk.use_backend(name):
                    check(op, Case(**case, device="cuda"))
                    check(op, Case(**case, normed_pos=True, device="cuda"))
            for hierarchical in (True, False):
                with mk.use_backend(name):
                    shape = case["N"], case["D"], case["dtype"]
                    test_pe_chain.check(test_pe_chain.Chain(3, *shape, hierarchical=hierarchical, device="cuda"))
        torch.cuda.synchronize()
        print(f"{name}: every kernel ran and is right")


if __name__ == "__main__":
    main(sys.argv[1:])
