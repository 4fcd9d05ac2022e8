"""What the operators save for their backward: at most what the plain formula saves, but for the pool's sums.

Counted are the storages of all saved tensors, each once, parameters left out, as a model would keep them.
"""

import sys
from pathlib import Path

import pytest
import torch
from cases import Case, fused, plain

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
B, N, D = 3, 20, 32
PARAMETERS = ("weight", "bias", "pos_weight", "pos_bias")

# (x, branch, parameters)
DTYPES = [
    (F32, None, F32),
    (F32, F32, F32),
    (F32, BF16, F32),  # as under autocast
    (BF16, None, F32),
    (BF16, BF16, F32),
    (F16, F32, F32),
    (BF16, None, BF16),
    (F16, F16, F16),
]


def saved(function, op: str, case: Case) -> int:
    t = case.inputs()
    return harness.saved_bytes(lambda: function(op, t, case), [t[n] for n in PARAMETERS if t[n] is not None])


@pytest.mark.parametrize("op", ("norm", "pool"))
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).split(".")[-1] for x in d))
@pytest.mark.parametrize("scale", (False, True))
@pytest.mark.parametrize("pos", (False, True))
@pytest.mark.parametrize("prefix", (0, 2))
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)  # what is saved is the same for every backend
def test_no_more_is_saved_than_by_the_plain_formula(op, dtypes, scale, pos, prefix, backend, device):
    """The stream in its own dtype and fp32 statistics of its rows; nothing of pos, whose statistics are computed again.

    Two things are ours alone. The pool keeps S (B, D): with it the backward sums nothing over the tokens. And where
    all is in half precision the plain formula on a CPU keeps the statistics in that too, which costs it its accuracy.
    """
    x, branch, params = dtypes
    if scale and branch is None:
        pytest.skip("a scale needs a branch")
    case = Case(B, N, D, x, branch, params, pos=pos, scale=scale, num_prefix_tokens=prefix, device=device)
    ours, plains = saved(fused, op, case), saved(plain, op, case)
    sums = 4 * B * D if op == "pool" else 0
    half = params != F32 and device == "cpu"
    statistics = 2 * 2 * B * N if half else 0
    assert ours <= plains + sums + statistics
    if pos:  # its mean and rstd are not saved
        assert ours <= plains + sums + statistics - 2 * (2 if half else 4) * (N - prefix)
    if x != F32 and params == F32 and branch != F32:  # the plain formula saves an fp32 copy of the stream
        assert ours < 0.7 * plains


def test_a_storage_counts_once_and_parameters_do_not():
    w, x = torch.randn(5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert harness.saved_bytes(lambda: (x * w, x.view(5, 3).sin())) == 60 + 20
    assert harness.saved_bytes(lambda: (x * w, x.view(5, 3).sin()), [w]) == 60
    assert harness.saved_bytes(lambda: x.detach() * 2) == 0
