"""Time of the dual LayerNorm: pe_layer_norm against eager PyTorch and torch.compile.

    python benchmarks/bench_dual_ln.py                       the full table, some minutes on a CPU
    python benchmarks/bench_dual_ln.py --quick               one size, under half a minute
    python benchmarks/bench_dual_ln.py --dtypes mixed --inputs x+f "x+s*f" --json rows.json --plot rows.png

The columns are explained in benchmarks/results/README.md.
"""

import sys

import operators


def main(argv: list[str] | None = None) -> int:
    return operators.main("dual_ln", "pe_layer_norm", __doc__.partition("\n")[0], argv)


if __name__ == "__main__":
    sys.exit(main())
