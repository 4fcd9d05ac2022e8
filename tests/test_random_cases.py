"""hypothesis draws calls of the operators: shapes, dtypes, flags, offsets, layouts of inputs and of incoming gradients,
numbers of threads, and which inputs need gradients.

`pytest -m exhaustive tests/test_random_cases.py` draws 10,000 cases that are new each time.
"""

import pytest
import torch
from cases import TENSORS, Case, check
from layouts import LAYOUTS, with_layout
from test_pe_chain import NAMES, Chain
from test_pe_chain import check as check_chain

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

dtypes = st.sampled_from([F32, BF16, F16])
layouts = st.sampled_from(list(LAYOUTS))
OPS = ("norm", "pool")


@st.composite
def cases(draw):
    """Any call at small sizes: shapes, dtypes, flags, offsets, and which inputs need gradients."""
    if draw(st.integers(0, 15)):
        b, n = draw(st.integers(1, 5)), draw(st.integers(1, 20))
        d = draw(st.integers(1, 70) | st.sampled_from([96, 128, 200, 256, 384]))
    else:  # enough work for several threads
        b, n, d = draw(st.integers(6, 12)), draw(st.integers(30, 50)), draw(st.sampled_from([250, 256, 384]))
    dtype = draw(dtypes)
    branch = draw(st.none() | dtypes)
    return Case(
        b,
        n,
        d,
        dtype,
        branch,
        draw(st.sampled_from([F32, dtype])),
        draw(st.none() | dtypes),
        pos=draw(st.booleans()),
        normed_pos=draw(st.booleans()),
        bias=draw(st.booleans()),
        scale=branch is not None and draw(st.booleans()),
        num_prefix_tokens=draw(st.integers(0, n - 1)),
        pos_batched=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 10.0, -300.0])),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        pos_eps=draw(st.none() | st.just(1e-3)),
        seed=draw(st.integers(0, 2**16)),
        needs=frozenset(draw(st.sets(st.sampled_from(TENSORS), min_size=1))),
        outputs=frozenset(draw(st.sets(st.sampled_from(["y", "stream", "pos"]), min_size=1))),
    )


@st.composite
def chains(draw):
    """Any call of pe_chain at small sizes."""
    dtype = draw(dtypes)
    return Chain(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 70) | st.sampled_from([96, 128, 200, 256, 384])),
        dtype,
        draw(st.sampled_from([F32, dtype])),
        draw(st.none() | dtypes),
        bias=draw(st.booleans()),
        hierarchical=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 10.0, -300.0])),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        seed=draw(st.integers(0, 2**16)),
        needs=frozenset(draw(st.sets(st.sampled_from(NAMES)))),
    )


def run_random_cases(op: str, backend: str, device: str, examples: int, **how) -> None:
    """Check `examples` calls of `op`, each with layouts and a number of threads of its own."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
    @given(cases(), layouts, layouts, layouts, st.integers(1, 3))
    def run(case, x_layout, branch_layout, gradient_layout, threads):
        case.device = device
        t = case.inputs()
        for name, layout in (("x", x_layout), ("branch", branch_layout)):
            if t[name] is not None:
                t[name] = with_layout(t[name], layout)
        torch.set_num_threads(threads)
        check(op, case, t, lambda gradient: LAYOUTS[gradient_layout](gradient))

    threads = torch.get_num_threads()
    try:
        run()
    finally:
        torch.set_num_threads(threads)


def run_random_chains(backend: str, device: str, examples: int, **how) -> None:
    """The same of pe_chain."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
    @given(chains())
    def run(case):
        case.device = device
        check_chain(case)

    run()


EXAMPLES = {"reference": 400, "cpp": 700, "triton": 25, "cuda": 25}


@pytest.mark.parametrize("op", OPS)
def test_random_cases(op, backend, device):
    run_random_cases(op, backend, device, EXAMPLES[backend], derandomize=True)


def test_random_chains(backend, device):
    run_random_chains(backend, device, min(EXAMPLES[backend], 300), derandomize=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", OPS)
def test_ten_thousand_random_cases(op, backend, device):
    examples = {"reference": 1000, "cpp": 4000}
    if backend not in examples:
        pytest.skip(f"{backend} would take hours off a GPU")
    run_random_cases(op, backend, device, examples[backend], print_blob=True)


@pytest.mark.parametrize("op", OPS)
def test_random_token_axes(op, backend, device):
    """(B, H, W, D) with p (H, W, D) is the flattened call, bit for bit, in any layout."""
    from cases import fused, gradients

    @settings(
        max_examples=100 if backend in ("reference", "cpp") else 10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(cases(), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
    def run(case, height, width, channels_first, gradients_channels_first):
        case.N, case.num_prefix_tokens, case.device = height * width, 0, device
        case.options["num_prefix_tokens"] = 0
        t = case.inputs()

        def deep(tensor, transposed):
            tensor = tensor.detach().view(*tensor.shape[:-2], height, width, case.D)
            return tensor.movedim(-1, -3).contiguous().movedim(-3, -1) if transposed else tensor

        axes = dict(t)
        for name in ("x", "branch", "pos"):
            if t[name] is not None:
                axes[name] = deep(t[name], channels_first).requires_grad_(t[name].requires_grad)
        flat_out, out = fused(op, t, case)[0], fused(op, axes, case)[0]
        flat_upstream = {n: torch.randn_like(v) for n, v in flat_out.items() if v is not None}
        upstream = {
            n: u if u.shape == out[n].shape else deep(u, gradients_channels_first) for n, u in flat_upstream.items()
        }
        for n in flat_upstream:
            assert torch.equal(out[n].reshape(flat_out[n].shape), flat_out[n]), n
        flat_grads, grads = gradients(flat_out, t, flat_upstream), gradients(out, axes, upstream)
        for n, want in flat_grads.items():
            assert (grads[n] is None) == (want is None)
            assert want is None or torch.equal(grads[n].reshape(want.shape), want), n

    run()
