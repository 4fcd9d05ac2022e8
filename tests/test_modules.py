"""The nn.Modules: parameters, state dicts, repr, copies, and that they call the operators as their docstrings say."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mpvg_kernels as mk

DIM = 12
MODULES = (mk.FusedPELayerNorm, mk.FusedAddPELayerNorm, mk.FusedAddLayerNorm, mk.FusedPELayerNormPool)


def call(module, x, branch, pos, scale):
    """Every module on the same tensors: its outputs as a tuple."""
    if isinstance(module, mk.FusedPELayerNorm):
        return module(x, pos)
    if isinstance(module, mk.FusedAddPELayerNorm):
        return module(x, branch, pos, scale)
    if isinstance(module, mk.FusedAddLayerNorm):
        return module(x, branch, scale)
    return (module(x, pos, branch, scale), module.tokens(x, pos, branch, scale))


@pytest.fixture
def tensors(device):
    x, branch, pos = (torch.randn(*s, DIM, device=device) for s in ((3, 5), (3, 5), (5,)))
    return x, branch, pos, torch.tensor([0.0, 2.0, 2.0], device=device)


def randomised(cls, device, **kwargs):
    module = cls(DIM, device=device, **kwargs)
    for p in module.parameters():
        nn.init.normal_(p)
    return module


@pytest.mark.parametrize("cls", MODULES)
def test_outputs_are_the_formula(cls, backend, device, tensors):
    module = randomised(cls, device, eps=1e-5)
    x, branch, pos, scale = tensors
    h = x if cls is mk.FusedPELayerNorm else x + branch * scale[:, None, None]
    y = nn.functional.layer_norm(h, (DIM,), module.weight, module.bias, 1e-5)
    p = None
    if module.pos_weight is not None:
        p = nn.functional.layer_norm(pos, (DIM,), module.pos_weight, module.pos_bias, 1e-5)
        y = y + p
    want = {
        mk.FusedPELayerNorm: (y, p),
        mk.FusedAddPELayerNorm: (y, h, p),
        mk.FusedAddLayerNorm: (y, h),
        mk.FusedPELayerNormPool: (y.mean(1), y),
    }[cls]
    got = call(module, *tensors)
    assert isinstance(got, tuple) and len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", (mk.FusedAddPELayerNorm, mk.FusedAddLayerNorm, mk.FusedPELayerNormPool))
def test_branch_may_be_absent(cls, backend, device, tensors):
    module = randomised(cls, device)
    x, _, pos, _ = tensors
    zero = call(module, x, torch.zeros_like(x), pos, None)
    for a, b in zip(call(module, x, None, pos, None), zero, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", (mk.FusedPELayerNorm, mk.FusedAddPELayerNorm, mk.FusedPELayerNormPool))
def test_normed_pos_stands_for_pos(cls, backend, device, tensors):
    """With LN'(pos) given, the results are the same, and the module's own LN' goes unread."""
    module = randomised(cls, device)
    x, branch, pos, _ = tensors
    known = nn.functional.layer_norm(pos, (DIM,), module.pos_weight, module.pos_bias, module.eps)
    want = module(x, pos) if cls is mk.FusedPELayerNorm else call(module, x, branch, pos, None)
    nn.init.constant_(module.pos_weight, float("nan"))
    if cls is mk.FusedPELayerNormPool:
        got = (module(x, None, branch, normed_pos=known), module.tokens(x, None, branch, normed_pos=known))
    else:
        got = module(*((x,) if cls is mk.FusedPELayerNorm else (x, branch)), normed_pos=known)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="normed_pos is given with pos"):
        module(x, pos=pos, normed_pos=known, **({"branch": branch} if cls is mk.FusedAddPELayerNorm else {}))


def test_parameters_and_state_dict():
    pe = {"weight", "bias", "pos_weight", "pos_bias"}
    for cls in MODULES:
        names = pe if cls is not mk.FusedAddLayerNorm else {"weight", "bias"}
        module = cls(DIM)
        assert set(module.state_dict()) == names == set(dict(module.named_parameters()))
        assert set(cls(DIM, bias=False).state_dict()) == {n for n in names if n.endswith("weight")}
        assert all(bool((p == (1 if n.endswith("weight") else 0)).all()) for n, p in module.named_parameters())
    assert set(mk.FusedPELayerNormPool(DIM, pos_norm=False).state_dict()) == {"weight", "bias"}


def test_loads_a_layer_norm_checkpoint():
    norm = nn.LayerNorm(DIM)
    nn.init.normal_(norm.weight)
    module = mk.FusedAddLayerNorm(DIM)
    module.load_state_dict(norm.state_dict(), strict=True)
    x = torch.randn(2, 3, DIM)
    torch.testing.assert_close(module(x, None)[0], norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", MODULES)
def test_copies_give_the_same_numbers(cls, backend, device, tensors):
    module = randomised(cls, device)
    want = call(module, *tensors)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(a, b) for a, b in zip(call(twin, *tensors), want, strict=True))


def test_device_and_dtype_arguments():
    module = mk.FusedPELayerNorm(DIM, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    module.to_empty(device="cpu").reset_parameters()
    y, pos = module(torch.randn(1, 2, DIM).bfloat16(), torch.randn(2, DIM).bfloat16())
    assert y.dtype == pos.dtype == torch.bfloat16


def test_repr():
    assert repr(mk.FusedPELayerNorm(8)) == "FusedPELayerNorm(8, eps=1e-06)"
    assert repr(mk.FusedAddLayerNorm(8, 1e-5, bias=False)) == "FusedAddLayerNorm(8, eps=1e-05, bias=False)"
    text = repr(mk.FusedAddPELayerNorm(8, pos_eps=1e-5, num_prefix_tokens=2))
    assert text == "FusedAddPELayerNorm(8, eps=1e-06, pos_eps=1e-05, num_prefix_tokens=2)"
    assert repr(mk.FusedPELayerNormPool(8, pos_norm=False)) == "FusedPELayerNormPool(8, eps=1e-06, pos_norm=False)"


def test_prefix_tokens_get_no_pe(backend, device):
    module = randomised(mk.FusedPELayerNormPool, device, num_prefix_tokens=2)
    x, pos = torch.randn(2, 5, DIM, device=device), torch.randn(3, DIM, device=device)
    tokens = module.tokens(x, pos)
    want = nn.functional.layer_norm(x[:, :2], (DIM,), module.weight, module.bias, 1e-6)
    torch.testing.assert_close(tokens[:, :2], want)
    torch.testing.assert_close(module(x, pos), tokens[:, 2:].mean(1))


def test_errors():
    with pytest.raises(ValueError, match="dim=0"):
        mk.FusedPELayerNorm(0)
    with pytest.raises(ValueError, match="FusedPELayerNorm needs pos.*None"):
        mk.FusedPELayerNorm(8)(torch.ones(1, 2, 8), None)
    with pytest.raises(ValueError, match="given without pos|pos is given without pos_weight"):
        mk.FusedPELayerNormPool(8, pos_norm=False)(torch.ones(1, 2, 8), torch.ones(2, 8))
