"""Time of the last LayerNorm with PE and pooling: pe_norm_pool against eager PyTorch and torch.compile.

    python benchmarks/bench_norm_pool.py                     the full table, some minutes on a CPU
    python benchmarks/bench_norm_pool.py --quick             one size, under half a minute

The columns are explained in benchmarks/results/README.md.
"""

import sys

import operators


def main(argv: list[str] | None = None) -> int:
    return operators.main("norm_pool", "pe_norm_pool", __doc__.partition("\n")[0], argv)


if __name__ == "__main__":
    sys.exit(main())
