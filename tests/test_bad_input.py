"""Every mistake a caller can make gives the same clear error in every backend, before anything runs.

One table for both operators and all backends; what DESIGN calls bad input and a call can be given has a line in it.
"""

import pytest
import torch
from cases import Case, fused

import mpvg_kernels as mk

B, N, D = 2, 4, 8
NORMED = dict(pos=None, pos_weight=None, pos_bias=None)

# name: (what to change in a correct call, error type, what the message must say)
MISTAKES = {
    "x no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "branch no tensor": (dict(branch=1.0), TypeError, "branch must be a tensor, not float"),
    "bias no tensor": (dict(bias=0.0), TypeError, "bias must be a tensor, not float"),
    "pos no tensor": (dict(pos="sincos"), TypeError, "pos must be a tensor, not str"),
    "pos_weight no tensor": (dict(pos_weight=1.0), TypeError, "pos_weight must be a tensor, not float"),
    "pos_bias no tensor": (dict(pos_bias=0), TypeError, "pos_bias must be a tensor, not int"),
    "scale no tensor": (dict(branch_scale=0.5), TypeError, "branch_scale must be a tensor, not float"),
    "x integer": (dict(x=torch.ones(B, N, D, dtype=torch.int64)), TypeError, "x must be float32.*torch.int64"),
    "x complex": (dict(x=torch.ones(B, N, D, dtype=torch.complex64)), TypeError, "x must be float32.*complex64"),
    "x 2-d": (dict(x=torch.ones(N, D)), ValueError, r"x has shape \(4, 8\): expected \(B, N, D\)"),
    "x without width": (dict(x=torch.ones(B, N, 0)), ValueError, "the last axis, D, must not be empty"),
    "weight of another width": (
        dict(weight=torch.ones(D + 1)),
        ValueError,
        r"weight has shape \(9,\): expected \(8,\)",
    ),
    "weight integer": (dict(weight=torch.ones(D, dtype=torch.int32)), TypeError, "weight has dtype torch.int32"),
    "weight missing": (dict(weight=None), TypeError, "weight must be a tensor, not NoneType"),
    "bias of another width": (dict(bias=torch.ones(D - 1)), ValueError, r"bias has shape \(7,\)"),
    "bias of another dtype": (
        dict(bias=torch.ones(D).half()),
        TypeError,
        "bias has dtype torch.float16: expected weight's",
    ),
    "pos of another N": (dict(pos=torch.ones(N + 1, D)), ValueError, r"pos has shape \(5, 8\): expected \(4, 8\)"),
    "pos of another D": (dict(pos=torch.ones(N, D + 1)), ValueError, r"pos has shape \(4, 9\): expected \(4, 8\)"),
    "pos with a batch": (dict(pos=torch.ones(B, N, D)), ValueError, r"pos has shape \(2, 4, 8\).*\(1, 4, 8\)"),
    "pos without its weight": (dict(pos_weight=None, pos_bias=None), ValueError, "pos is given without pos_weight"),
    "pos_weight without pos": (dict(pos=None), ValueError, "given without pos"),
    "pos half for a float x": (
        dict(pos=torch.ones(N, D).half()),
        TypeError,
        "pos has dtype torch.float16: expected torch.float32",
    ),
    "pos double": (
        dict(pos=torch.ones(N, D).double()),
        TypeError,
        "pos has dtype torch.float64: expected torch.float32",
    ),
    "weight half for a float x": (dict(weight=torch.ones(D).half()), TypeError, "weight has dtype torch.float16"),
    "weight bfloat16 for a half x": (
        dict(x=torch.ones(B, N, D).half(), weight=torch.ones(D).bfloat16()),
        TypeError,
        "weight has dtype torch.bfloat16: expected torch.float32 or x's dtype, torch.float16",
    ),
    "pos_weight of another width": (
        dict(pos_weight=torch.ones(D + 1)),
        ValueError,
        r"pos_weight has shape \(9,\): expected \(8,\)",
    ),
    "pos_weight half for a float x": (
        dict(pos_weight=torch.ones(D).half()),
        TypeError,
        "pos_weight has dtype torch.float16",
    ),
    "pos_bias of another dtype": (
        dict(pos_bias=torch.ones(D).bfloat16()),
        TypeError,
        "pos_bias has dtype torch.bfloat16: expected pos_weight's, torch.float32",
    ),
    "pos_bias without pos": (dict(pos=None, pos_weight=None), ValueError, "given without pos"),
    "pos_bias of another width": (dict(pos_bias=torch.ones(D + 2)), ValueError, r"pos_bias has shape \(10,\)"),
    "normed_pos besides pos": (
        dict(normed_pos=torch.ones(N, D)),
        ValueError,
        "normed_pos is given with pos, pos_weight",
    ),
    "normed_pos with a pos_bias": (
        dict(normed_pos=torch.ones(N, D), pos=None, pos_weight=None),
        ValueError,
        "normed_pos is given with pos, pos_weight or pos_bias",
    ),
    "normed_pos no tensor": (NORMED | dict(normed_pos=0), TypeError, "normed_pos must be a tensor, not int"),
    "normed_pos of another N": (
        NORMED | dict(normed_pos=torch.ones(N - 1, D)),
        ValueError,
        r"normed_pos has shape \(3, 8\): expected \(4, 8\) or \(1, 4, 8\)",
    ),
    "normed_pos half for a float x": (
        NORMED | dict(normed_pos=torch.ones(N, D).half()),
        TypeError,
        "normed_pos has dtype torch.float16: expected torch.float32",
    ),
    "normed_pos on another device": (
        NORMED | dict(normed_pos=torch.ones(N, D, device="meta")),
        ValueError,
        "normed_pos is on meta and x on",
    ),
    "pos on another device": (dict(pos=torch.ones(N, D, device="meta")), ValueError, "pos is on meta and x on"),
    "weight on another device": (dict(weight=torch.ones(D, device="meta")), ValueError, "weight is on meta and x on"),
    "branch on another device": (dict(branch=torch.ones(B, N, D, device="meta")), ValueError, "branch is on meta"),
    "bias on another device": (dict(bias=torch.ones(D, device="meta")), ValueError, "bias is on meta and x on"),
    "pos_weight on another device": (
        dict(pos_weight=torch.ones(D, device="meta")),
        ValueError,
        "pos_weight is on meta and x on",
    ),
    "pos_bias on another device": (dict(pos_bias=torch.ones(D, device="meta")), ValueError, "pos_bias is on meta"),
    "scale on another device": (
        dict(branch_scale=torch.ones(B, device="meta")),
        ValueError,
        "branch_scale is on meta and x on",
    ),
    "branch of another shape": (
        dict(branch=torch.ones(B, N + 1, D)),
        ValueError,
        r"branch has shape \(2, 5, 8\): expected x's",
    ),
    "branch integer": (dict(branch=torch.ones(B, N, D, dtype=torch.int32)), TypeError, "branch has dtype torch.int32"),
    "branch double for a float x": (
        dict(branch=torch.ones(B, N, D).double()),
        TypeError,
        "both must be float64, or neither",
    ),
    "scale without branch": (
        dict(branch=None, branch_scale=torch.ones(B)),
        ValueError,
        "branch_scale is given without branch",
    ),
    "scale of another shape": (
        dict(branch_scale=torch.ones(B, 1)),
        ValueError,
        r"branch_scale has shape \(2, 1\): expected \(2,\)",
    ),
    "scale integer": (
        dict(branch_scale=torch.ones(B, dtype=torch.int64)),
        TypeError,
        "branch_scale has dtype torch.int64",
    ),
    "scale double for a float x": (
        dict(branch_scale=torch.ones(B).double()),
        TypeError,
        "branch_scale has dtype torch.float64: expected float32 or x's dtype",
    ),
    "scale with gradient": (
        dict(branch_scale=torch.ones(B, requires_grad=True)),
        TypeError,
        r"branch_scale\.detach\(\)",
    ),
    "prefix negative": (
        dict(num_prefix_tokens=-1),
        ValueError,
        "num_prefix_tokens=-1: expected an integer from 0 to N = 4",
    ),
    "prefix too large": (dict(num_prefix_tokens=5), ValueError, "num_prefix_tokens=5"),
    "prefix no integer": (dict(num_prefix_tokens=1.0), ValueError, "num_prefix_tokens=1.0"),
    "prefix leaves pos too long": (dict(num_prefix_tokens=1), ValueError, r"expected \(3, 8\).*num_prefix_tokens=1"),
    "eps negative": (dict(eps=-1e-6), ValueError, "eps=-1e-06.*expected numbers of at least 0"),
    "eps no number": (dict(eps="small"), ValueError, "eps='small'.*expected numbers of at least 0"),
    "eps missing": (dict(eps=None), ValueError, "eps=None"),
    "eps nan": (dict(pos_eps=float("nan")), ValueError, "pos_eps=nan"),
    "out_dtype integer": (dict(out_dtype=torch.int32), TypeError, "out_dtype=torch.int32"),
    "out_dtype no dtype": (dict(out_dtype="bfloat16"), TypeError, "out_dtype=bfloat16: expected float32, bfloat16"),
    "out_dtype double": (dict(out_dtype=torch.float64), TypeError, "out_dtype=torch.float64"),
}


@pytest.mark.parametrize("op", (mk.pe_layer_norm, mk.pe_norm_pool))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_message(op, mistake, backend, device):
    change, error, message = MISTAKES[mistake]
    t = Case(B, N, D, branch_dtype=torch.float32, needs=frozenset(), device=device).inputs()
    args = t | dict(branch_scale=None) | change
    args = {k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in args.items()}
    if mistake == "scale with gradient":
        args["branch_scale"] = torch.ones(B, device=device, requires_grad=True)
    with pytest.raises(error, match=message) as raised:
        op(**args)
    with mk.use_backend("reference"), pytest.raises(error) as plain:
        op(**args)
    assert str(raised.value) == str(plain.value)


# What only the pool, or only x with more token axes, can get wrong.
def test_nothing_to_pool(backend, device):
    t = Case(B, N, D, pos=False, needs=frozenset(), device=device).inputs()
    with pytest.raises(ValueError, match=r"x of shape \(2, 4, 8\) has no token to pool: .*num_prefix_tokens=4"):
        mk.pe_norm_pool(t["x"], t["weight"], t["bias"], num_prefix_tokens=N)
    with pytest.raises(ValueError, match=r"x of shape \(2, 0, 8\) has no token to pool"):
        mk.pe_norm_pool(t["x"][:, :0], t["weight"], t["bias"])


@pytest.mark.parametrize("op", (mk.pe_layer_norm, mk.pe_norm_pool))
def test_pos_of_another_grid(op, backend, device):
    t = Case(B, N, D, needs=frozenset(), device=device).inputs()
    args = t["weight"], t["bias"], t["pos"], t["pos_weight"], t["pos_bias"]
    with pytest.raises(ValueError, match=r"pos has shape \(4, 8\): expected \(2, 2, 8\) or \(1, 2, 2, 8\)"):
        op(t["x"].view(B, 2, 2, D), *args)


@pytest.mark.parametrize("op", (mk.pe_layer_norm, mk.pe_norm_pool))
def test_double_on_kernels_without_it(op, backend, device):
    """float64 is for `reference` and `cpp`; the GPU backends say which do have it."""
    t = Case(B, N, D, torch.float64, param_dtype=torch.float64, pos=False, needs=frozenset(), device=device).inputs()
    if backend in ("reference", "cpp"):
        op(t["x"], t["weight"], t["bias"])
        return
    with pytest.raises(TypeError, match=f"x is float64: backend '{backend}' has float32, .*use 'reference'"):
        op(t["x"], t["weight"], t["bias"])


def test_prefix_with_more_axes(backend, device):
    case = Case(2, 4, 8, needs=frozenset(), device=device)
    t = case.inputs()
    with pytest.raises(ValueError, match=r"num_prefix_tokens=1 needs x of shape \(B, N, D\)"):
        fused("norm", t | {"x": t["x"].view(2, 2, 2, 8)}, Case(2, 4, 8, num_prefix_tokens=1))
