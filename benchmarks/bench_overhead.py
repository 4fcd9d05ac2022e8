"""Host time of a tiny call: ours against the plain eager formula.

    python benchmarks/bench_overhead.py                      both operators, microseconds a call

At B=1, N=4, D=16 what remains is argument checks, the dispatcher and autograd: of a forward under torch.no_grad (fwd),
of one that records gradients (fwd_grad), and of a forward with its backward. The columns are explained in
benchmarks/results/README.md.
"""

import sys

import operators


def _providers(device: str) -> list[str]:
    return [name for name in operators.default_providers(device) if name != "compile"]


def main(argv: list[str] | None = None) -> int:
    return operators.main(
        "overhead",
        ("pe_layer_norm", "pe_norm_pool"),
        __doc__.partition("\n")[0],
        argv,
        sizes=[(1, 4, 16)],
        quick_sizes=[(1, 4, 16)],
        dtypes=["fp32"],
        modes=["fwd", "fwd_grad", "fwd_bwd"],
        inputs=["x", "x+f", "x+s*f", "x+f,no-pos"],
        providers=_providers,
        host=True,
    )


if __name__ == "__main__":
    sys.exit(main())
