"""The autograd nodes: those in C++ against the Functions in Python, what C++ declines, and when it stays unused.

tests/test_operators.py runs all of its cases on both; here is what no formula shows: hooks, errors, saved tensors.
"""

import threading

import pytest
import torch
from cases import Case, fused, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mpvg_kernels as mk
from mpvg_kernels import backends, functional
from mpvg_kernels.ops import common

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
OPS = ("norm", "pool")
needs_nodes = pytest.mark.skipif(backends.autograd_nodes()[0] is None, reason=backends.autograd_nodes()[1])
pytestmark = pytest.mark.skipif("cpp" not in mk.available_backends(), reason="the CPU extension is not built")


@pytest.fixture
def in_python(monkeypatch):
    """Autograd in Python for the rest of the test."""
    return lambda: monkeypatch.setattr(backends, "autograd_nodes", lambda: (None, ""))


@pytest.fixture(params=[pytest.param("C++", marks=needs_nodes), "Python"])
def autograd(request, in_python):
    """Both kinds of nodes."""
    if request.param == "Python":
        in_python()
    return request.param


def first(op: str, t: dict, case: Case) -> torch.Tensor:
    return next(iter(fused(op, t, case)[0].values()))


def name_of(output: torch.Tensor) -> str:
    return output.grad_fn.name()


@needs_nodes
@pytest.mark.parametrize("op,names", [("norm", ("pe_layer_norm", "PELayer")), ("pool", ("pe_norm_pool", "PENorm"))])
def test_the_node_in_use(op, names, in_python):
    case = Case()
    assert name_of(first(op, case.inputs(), case)) == f"{names[0]}_backward"
    in_python()
    assert name_of(first(op, case.inputs(), case)).startswith(names[1])


CASES = [
    Case(),
    Case(branch_dtype=F32),
    Case(branch_dtype=BF16, scale=True, num_prefix_tokens=2),
    Case(dtype=BF16, branch_dtype=BF16, param_dtype=BF16, bias=False),
    Case(pos=False, needs=frozenset({"weight"})),
    Case(branch_dtype=F32, needs=frozenset({"pos"})),
    Case(dtype=F64, param_dtype=F64, pos_batched=True),
]


@needs_nodes
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{CASES.index(c)}")
def test_both_give_and_save_the_same(op, case, in_python):
    """The same bits, and the same tensors saved in the same order: one may recompute what the other saved."""

    def results():
        saved = []

        def pack(tensor):
            saved.append((tensor.shape, tensor.dtype))
            return tensor.clone()

        t = case.inputs()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = fused(op, t, case)[0]
        found = gradients(out, t, {n: torch.ones_like(v) for n, v in out.items() if v is not None})
        return (
            saved,
            [v for v in (*out.values(), *found.values()) if v is not None],
            [v is not None and v.requires_grad for v in out.values()],
        )

    saved, tensors, differentiable = results()
    in_python()
    want_saved, want_tensors, want_differentiable = results()
    assert saved and saved == want_saved and differentiable == want_differentiable
    assert all(torch.equal(a, b) for a, b in zip(tensors, want_tensors, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("branch", (None, F32))
def test_changing_a_saved_tensor_is_an_error(op, branch, autograd):
    case = Case(branch_dtype=branch)
    for name in ("weight", "pos", "pos_weight", *(() if branch else ("x",))):
        t = case.inputs()
        t[name] = t[name] * 1
        y = first(op, t, case)
        t[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_changing_the_stream_is_an_error(autograd):
    """It is saved; without a branch it is x's own memory, and autograd refuses at once."""
    case = Case(branch_dtype=F32)
    t = case.inputs()
    out = fused("norm", t, case)[0]
    out["stream"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out["y"].sum().backward()
    t = Case().inputs()
    out = fused("norm", t, Case())[0]
    with pytest.raises(RuntimeError, match="is a view|view was created"):
        out["stream"].add_(1)


@pytest.mark.parametrize("op", OPS)
def test_a_graph_serves_once_or_is_retained(op, autograd):
    case = Case(branch_dtype=F32)
    t = case.inputs()
    y = first(op, t, case).sum()
    once, again = (torch.autograd.grad(y, t["x"], retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.parametrize("op,name", [("norm", "pe_layer_norm"), ("pool", "pe_norm_pool")])
@pytest.mark.parametrize("wrt", ("x", "weight", "upstream"))
def test_double_backward_has_one_text(op, name, wrt, autograd):
    case = Case()
    t = case.inputs()
    y = first(op, t, case)
    t["upstream"] = torch.ones_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, t["x"], t["upstream"], create_graph=True)
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(dx.sum(), t[wrt], allow_unused=True)
    assert str(error.value) == (
        f"{name}: double backward is not supported by the fused kernels; "
        "run the forward under mpvg_kernels.use_backend('reference') to differentiate twice"
    )


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
@pytest.mark.parametrize("op", OPS)
def test_anomaly_mode_names_the_node(op, autograd):
    case = Case()
    t = case.inputs()
    with torch.autograd.detect_anomaly():
        y = first(op, t, case)
        with pytest.raises(RuntimeError, match=f"'{name_of(y)}' returned nan values"):
            y.backward(torch.full_like(y, float("nan")))


@pytest.mark.parametrize("op", OPS)
def test_threads_share_a_graph(op, autograd):
    case = Case(9, 7, 32, branch_dtype=F32)
    t = case.inputs()
    y = first(op, t, case).sum()
    names = ("x", "weight", "pos")
    want = torch.autograd.grad(y, [t[n] for n in names], retain_graph=True)
    found = []

    def work():
        for _ in range(20):
            found.append(torch.autograd.grad(y, [t[n] for n in names], retain_graph=True))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80
    assert all(torch.equal(a, b) for grads in found for a, b in zip(grads, want, strict=True))


def test_hooks_on_outputs_and_node(autograd):
    t = Case().inputs()
    out = fused("norm", t, Case())[0]
    seen = []
    for name in ("y", "stream", "pos"):
        out[name].register_hook(lambda grad, name=name: seen.append(name))
    out["y"].grad_fn.register_hook(lambda grads, outputs: seen.append(len(outputs)))
    sum(v.sum() for v in out.values()).backward()
    assert sorted(seen, key=str) == [3, "pos", "stream", "y"]


class NoGradient(torch.autograd.Function):
    """Identity that passes no gradient back."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("op", OPS)
def test_an_undefined_gradient_is_zero(op, autograd):
    case = Case(branch_dtype=F32)
    t = case.inputs()
    NoGradient.apply(first(op, t, case)).sum().backward()
    assert all(t[n].grad is None or not t[n].grad.any() for n in ("x", "branch", "weight", "pos"))


class Watch(TorchDispatchMode):
    """Notes the grad_mask of every raw backward."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_bwd_" in str(function):
            self.masks.append(args[-1])
        return function(*args, **(kwargs or {}))


@needs_nodes
@pytest.mark.parametrize("op", OPS)
def test_only_what_is_asked_for_is_computed(op):
    case = Case(branch_dtype=F32)
    asked = [("x", common.GRAD_X), ("branch", common.GRAD_X), ("pos", common.GRAD_POS), ("bias", common.GRAD_BIAS)]
    for name, mask in asked:
        t = case.inputs()
        y = first(op, t, case).sum()
        with Watch() as watch:
            torch.autograd.grad(y, t[name])
        assert watch.masks == [mask]


# ---- what C++ leaves to Python


class Subclass(torch.Tensor):
    pass


@needs_nodes
@pytest.mark.parametrize("op", OPS)
def test_what_is_out_of_the_ordinary_goes_through_python(op):
    case = Case(branch_dtype=F32)
    t = case.inputs()
    t["x"] = t["x"].detach().as_subclass(Subclass).requires_grad_()
    assert "Function" in name_of(first(op, t, case))
    t = case.inputs()
    with Watch():
        y = first(op, t, case)
    assert "Function" in name_of(y)
    with torch.overrides.BaseTorchFunctionMode():
        y = first(op, t, case)
    assert "Function" in name_of(y)
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        first(op, t | {"x": forward_ad.make_dual(t["x"].detach().requires_grad_(), torch.ones_like(t["x"]))}, case)


@needs_nodes
@pytest.mark.parametrize("op,node", [("norm", "pe_layer_norm_backward"), ("pool", "pe_norm_pool_backward")])
def test_the_node_serves_calls_that_python_makes_ordinary(op, node):
    """More token axes, other layouts: checked and brought into shape in Python, then run in C++."""
    case = Case(2, 12, 16, branch_dtype=F32)
    t = case.inputs()
    deep = t | {n: t[n].view(2, 3, 4, 16) for n in ("x", "branch")} | {"pos": t["pos"].view(3, 4, 16)}
    strided = t | {"pos": t["pos"].t().contiguous().t(), "x": t["x"].mT.contiguous().mT}
    for inputs in (deep, strided):
        last = first(op, inputs, case).grad_fn
        assert node in (last.name(), *(f.name() for f, _ in last.next_functions if f))


SHAPES = {"x": (2, 3, 8), "branch": (2, 3, 8), "branch_scale": (2,), "weight": (8,), "bias": (8,)}
SHAPES |= {"pos": (3, 8), "pos_weight": (8,), "pos_bias": (8,)}
KINDS = {
    "good": lambda shape: torch.randn(shape),
    "absent": lambda shape: None,
    "bf16": lambda shape: torch.randn(shape).bfloat16(),
    "fp64": lambda shape: torch.randn(shape).double(),
    "integer": lambda shape: torch.ones(shape, dtype=torch.int64),
    "longer": lambda shape: torch.randn((*shape[:-1], shape[-1] + 1)),
    "one more": lambda shape: torch.randn((shape[0] + 1, *shape[1:])),
    "batched": lambda shape: torch.randn((1, *shape)),
    "strided": lambda shape: torch.randn((*shape, 2))[..., 0],
    "expanded": lambda shape: torch.randn(shape[-1:]).expand(shape),
    "elsewhere": lambda shape: torch.randn(shape, device="meta"),
    "sparse": lambda shape: torch.randn(shape).to_sparse(),
    "needs a gradient": lambda shape: torch.randn(shape).requires_grad_(),
    "no tensor": lambda shape: [1.0],
}


@needs_nodes
@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(list(SHAPES)), st.sampled_from(list(KINDS)), max_size=3),
    st.sampled_from([1e-6, 0.0, -1.0, float("nan"), 1, None, "no"]),
    st.sampled_from([None, 1e-5, -1.0]),
    st.sampled_from([0, 0, 1, 3, 4, -1, 2**70, True, 1.0]),
    st.sampled_from([None, F32, BF16, F64, torch.int64]),
    st.sampled_from(["pe_layer_norm", "pe_norm_pool"]),
)
def test_cpp_takes_no_call_that_python_would_refuse(changed, eps, pos_eps, prefix, out_dtype, op):
    """The C++ nodes have the checks a second time; what they take passes those of functional.py, unchanged."""
    kinds = dict.fromkeys(SHAPES, "good") | changed
    tensors = []
    for name, shape in SHAPES.items():
        if name == "pos" and prefix in (1, 3):
            shape = (3 - int(prefix), 8)
        tensors.append(KINDS[kinds[name]](shape))
    given, options = (*tensors, None), (eps, pos_eps, prefix, out_dtype)
    with mk.use_backend("cpp"):
        try:
            result = functional._run_in_cpp(op, given, options)
        except mk.BackendUnavailableError:
            assert kinds["x"] == "elsewhere"
            return
        try:
            prepared = functional._prepare(*given, *options)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            assert result is None
            return
    if result is not None:
        assert all(a is b for a, b in zip(tensors, prepared, strict=False))
        outputs = (result,) if isinstance(result, torch.Tensor) else result
        options = prepared[-1]
        assert outputs[0].dtype == options.out_dtype and outputs[0].isfinite().all()


# ---- when they stay unused


def show_config(capsys) -> str:
    mk.show_config()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  autograd in ")]
    return line


def test_another_torch_leaves_them_unused_and_says_so(monkeypatch, capsys):
    """The extension is for one version of PyTorch; another's is not even opened."""
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    monkeypatch.setattr(
        backends.Path, "glob", lambda *_: [backends.Path("_autograd_2_98_0.cpython-311-x86_64-linux-gnu.so")]
    )
    nodes, reason = backends.autograd_nodes.__wrapped__()
    assert nodes is None
    assert reason.startswith("built for another PyTorch or Python (_autograd_2_98_0.")
    assert reason.endswith("reinstall with MPVG_BUILD=cpu to build them for PyTorch 2.99.0+cpu")
    monkeypatch.setattr(backends, "autograd_nodes", backends.autograd_nodes.__wrapped__)
    assert show_config(capsys) == f"  autograd in Python: {reason}"
    case = Case()
    assert "Function" in name_of(first("norm", case.inputs(), case))


def test_not_built(monkeypatch):
    monkeypatch.setattr(backends.Path, "glob", lambda *_: [])
    nodes, reason = backends.autograd_nodes.__wrapped__()
    assert nodes is None and reason.startswith("not built; reinstall with MPVG_BUILD=cpu")


@needs_nodes
def test_that_does_not_load(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    nodes, reason = backends.autograd_nodes.__wrapped__()
    assert nodes is None and "does not load (undefined symbol: x); reinstall" in reason


@needs_nodes
def test_in_use_says_so(capsys):
    assert show_config(capsys) == f"  autograd in C++: nodes for PyTorch {torch.__version__}"


def test_environment(monkeypatch):
    monkeypatch.setenv("MPVG_AUTOGRAD", "python")
    assert backends.autograd_nodes.__wrapped__() == (None, "MPVG_AUTOGRAD=python leaves the C++ nodes unused")
    monkeypatch.setenv("MPVG_AUTOGRAD", "fast")
    with pytest.raises(ValueError, match="MPVG_AUTOGRAD=fast: expected auto or python"):
        backends.autograd_nodes.__wrapped__()
