"""hypothesis draws calls of the operators: shapes, dtypes, flags, offsets, and which inputs need gradients."""

import pytest
import torch
from cases import TENSORS, Case, check
from test_pe_chain import NAMES, Chain
from test_pe_chain import check as check_chain

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

dtypes = st.sampled_from([F32, BF16, F16])


@st.composite
def cases(draw):
    """Any call at small sizes: shapes, dtypes, flags, offsets, and which inputs need gradients."""
    n = draw(st.integers(1, 20))
    dtype = draw(dtypes)
    branch = draw(st.none() | dtypes)
    return Case(
        draw(st.integers(1, 5)),
        n,
        draw(st.integers(1, 70) | st.sampled_from([96, 128, 200, 256, 384])),
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


EXAMPLES = {"reference": 100, "cpp": 600, "triton": 25, "cuda": 25}


@pytest.mark.parametrize("op", ("norm", "pool", "chain"))
def test_random_cases(op, backend, device):
    @settings(
        max_examples=EXAMPLES[backend],
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(chains() if op == "chain" else cases())
    def run(case):
        case.device = device
        check_chain(case) if op == "chain" else check(op, case)

    run()
