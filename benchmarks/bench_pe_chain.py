"""Time of all layers' LN'_l(pos): pe_chain against one LayerNorm after the other, in eager PyTorch and torch.compile.

    python benchmarks/bench_pe_chain.py                      the full table, a minute or two on a CPU
    python benchmarks/bench_pe_chain.py --quick              one size

A size is LxKxD: layers, positions, width. The result is taken apart into L tables, as the layers of a model take them.
The columns are explained in benchmarks/results/README.md.
"""

import sys

import operators


def main(argv: list[str] | None = None) -> int:
    return operators.main(
        "pe_chain",
        "pe_chain",
        __doc__.partition("\n")[0],
        argv,
        sizes=[(11, 196, D) for D in (192, 384, 768)],
        quick_sizes=[(11, 196, 192)],
        inputs=["x"],
        quick_inputs=["x"],
    )


if __name__ == "__main__":
    sys.exit(main())
