"""torch.compile, torch.export and autocast around the operators: one graph, few compilations, the same numbers."""

import itertools

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import mpvg_kernels as mk


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _not_interpreted(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter does not run under torch.compile")


@pytest.fixture
def traced(backend, device):
    """The backend, where tracing it shows something new: on a CPU `cuda` is traced as `cpp` is."""
    if backend == "cuda" and device == "cpu":
        pytest.skip("traced as cpp is")
    return backend


class Net(torch.nn.Module):
    """Two blocks' worth of the three norms, with linear layers between as neighbours to fuse with."""

    def __init__(self, dim: int = 16):
        super().__init__()
        self.pos = torch.nn.Parameter(torch.randn(6, dim))
        self.norm1, self.norm2 = mk.FusedAddPELayerNorm(dim), mk.FusedAddLayerNorm(dim)
        self.linear1, self.linear2 = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
        self.norm = mk.FusedPELayerNormPool(dim)

    def forward(self, x, scale=None):
        branch, pos = None, self.pos
        for _ in range(2):
            y, x, pos = self.norm1(x, branch, pos, None if branch is None else scale)
            y, x = self.norm2(x, self.linear1(y), scale)
            branch = self.linear2(torch.nn.functional.gelu(y))
        return self.norm(x, pos, branch, scale)


def grads(net, x, scale=None):
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = net(x, scale)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("scaled", (False, True))
def test_fullgraph_forward_and_backward(scaled, backend, device):
    net = Net().to(device)
    x = torch.randn(3, 6, 16, device=device)
    scale = torch.tensor([0.0, 1.5, 1.5], device=device) if scaled else None
    compiled = torch.compile(net, fullgraph=True)
    want, got = grads(net, x, scale), None
    net.zero_grad()
    xc = x.clone().requires_grad_()
    out = compiled(xc, scale)
    out.square().sum().backward()
    got = [out.detach(), xc.grad, *(p.grad for p in net.parameters())]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dynamic,most", [(None, 2), (True, 1)])
def test_few_compilations_over_batch_sizes(dynamic, most, backend, device):
    net = Net().to(device)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 5, 8, 13):
        x = torch.randn(batch, 6, 16, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(x), net(x))
        compiled(x).sum().backward()
    assert counter.frame_count <= most


def test_changing_the_backend_recompiles(backend, device):
    """Compiled code holds the backend that was asked for when it was traced, and traces again when that changes."""
    net = Net().to(device)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(2, 6, 16, device=device)
    compiled(x)
    with mk.use_backend("reference"):
        torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == (1 if backend == "reference" else 2)


class OperatorCounter:
    """A compiler that runs graphs as they are; it counts them, and the kernels' operators in the one that ran last."""

    def __init__(self):
        self.graphs = self.operators = 0

    def __call__(self, graph, _):
        self.graphs += 1
        operators = sum(str(node.target).startswith("mpvg.") for node in graph.graph.nodes)

        def run(*args):
            self.operators = operators
            return graph.forward(*args)

        return run


def test_compiled_code_has_a_choice_of_its_own(backend, device):
    """Eager code on kernels and compiled code on the plain formula, or the reverse; a change compiles again, once."""
    net, counter = Net().to(device), OperatorCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(2, 6, 16, device=device)
    kernels = 0 if backend == "reference" else 5
    with torch.no_grad():
        want = net(x)
        for eager, in_compiled, operators in (
            (backend, None, kernels),
            (backend, "reference", 0),
            ("reference", None, 0),
            ("reference", backend, kernels),
            (backend, backend, kernels),
        ):
            with mk.use_backend(eager, compiled=in_compiled):
                torch.testing.assert_close(compiled(x), want)
            assert counter.operators == operators
    assert counter.graphs == (1 if backend == "reference" else 2)


def small_model(scheme="mpvg", **kwargs):
    sizes = dict(img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=10)
    return timm.create_model("mpvg_deit_tiny_patch16_224", scheme=scheme, **sizes, **kwargs)


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("dynamic,most", [(None, 2), (True, 1)])
def test_model_compiles_few_times(dynamic, most, train, traced, device):
    """A whole model, in eval and in training with stochastic depth under autocast: the same numbers, few graphs."""
    model = small_model(drop_path_rate=0.5).to(device).train(train)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 5, 8):
        x, out = torch.randn(batch, 3, 32, 32, device=device), []
        for forward in (model, compiled):
            torch.manual_seed(batch)  # of the branches that are dropped
            with torch.autocast(device, torch.bfloat16, enabled=train), torch.set_grad_enabled(train):
                out.append(forward(x).float())
            if train:
                out[-1].square().sum().backward()
                out.append(model.pos_embed.grad)
                model.zero_grad()
        half = len(out) // 2
        torch.testing.assert_close(out[half:], out[:half])
    assert counter.frame_count <= most


def test_inductor_does_not_write_operators_down(traced, device, monkeypatch):
    """Before PyTorch 2.14 it does, for operators that it does not know, in a time that is exponential in the depth."""
    from torch._inductor import exc, lowering

    if traced == "reference":
        pytest.skip("the plain formula has no operators")
    written = []
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", lambda target, args, kwargs: written.append(target) or "")
    for operator in [known for known in lowering.lowerings if "mpvg::" in str(known)]:
        monkeypatch.delitem(lowering.lowerings, operator)
    net = Net().to(device)
    with torch._inductor.config.patch(force_disable_caches=True):
        grads(torch.compile(net, fullgraph=True), torch.randn(2, 6, 16, device=device))
    assert not [target for target in written if "mpvg" in str(target)]


@pytest.mark.parametrize("mode", ("reduce-overhead", "max-autotune"))
def test_modes(mode, traced, device):
    if traced == "reference":
        pytest.skip("reference is PyTorch's own operators")
    net = Net().to(device)
    x = torch.randn(3, 6, 16, device=device)
    want = grads(net, x)
    compiled = torch.compile(net, mode=mode, fullgraph=True)
    for _ in range(3):  # a CUDA graph is recorded at the second call and replayed from then on
        net.zero_grad()
        xc = x.clone().requires_grad_()
        out = compiled(xc)
        out.square().sum().backward()
        got = [out.detach().clone(), xc.grad.clone(), *(p.grad.clone() for p in net.parameters())]
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("transform", ("grad", "vmap", "jvp"))
def test_transforms_inside_compiled_code(transform, traced, device):
    """torch.func inside compiled code goes past the kernels' backward (gradients were wrong): one clear error."""
    if traced == "reference":
        pytest.skip("reference goes through torch.func")
    net = Net().to(device)
    x = torch.randn(2, 6, 16, device=device)
    calls = {
        "grad": lambda x: torch.func.grad(lambda x: net(x).sum())(x),
        "vmap": lambda x: torch.func.vmap(net)(x[None]),
        "jvp": lambda x: torch.func.jvp(net, (x,), (x,)),
    }
    for fullgraph, error in ((True, torch._dynamo.exc.Unsupported), (False, RuntimeError)):
        torch._dynamo.reset()
        with pytest.raises(error, match="torch.func transforms do not go through the fused kernels.*use_backend"):
            torch.compile(calls[transform], fullgraph=fullgraph, backend="aot_eager")(x)


@pytest.mark.parametrize("op", ("norm", "pool"))
def test_mixed_dtypes_under_autocast(op, traced, device):
    """Every mix of dtypes of x, branch and parameters gives compiled what it gives eager, or the same error."""
    F32, BF16 = torch.float32, torch.bfloat16
    function = mk.pe_norm_pool if op == "pool" else mk.pe_layer_norm
    for x_dtype, branch_dtype, param_dtype in itertools.product((F32, BF16), repeat=3):
        torch._dynamo.reset()
        x, branch = torch.randn(2, 3, 8).to(device, x_dtype), torch.randn(2, 3, 8).to(device, branch_dtype)
        params = [torch.rand(shape).to(device, param_dtype) for shape in ((8,), (8,), (3, 8), (8,), (8,))]
        scale = torch.tensor([0.0, 2.0], device=device, dtype=branch_dtype)
        inputs = [t.requires_grad_() for t in (x, branch, *params)]
        results, errors = [], []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)):
            try:
                with torch.autocast(device, BF16):
                    out = call(x, *params, branch=branch, branch_scale=scale)
                out = [out] if op == "pool" else list(out)
                results.append(out + list(torch.autograd.grad(sum(o.float().square().sum() for o in out), inputs)))
            except (TypeError, torch._dynamo.exc.Unsupported) as error:
                errors.append(str(error))
        if x_dtype == F32 and param_dtype == BF16:
            assert len(errors) == 2 and all(
                "weight has dtype torch.bfloat16: expected torch.float32" in e for e in errors
            )
        else:
            assert not errors
            torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


def test_autocast_in_compiled_code(backend, device):
    net = Net().to(device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        got, want = compiled(x), net(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_dynamic_batch(strict, backend, device):
    net = Net().to(device).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(3, 6, 16, device=device)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch}, None)[:1], strict=strict)
        x = torch.randn(7, 6, 16, device=device)
        torch.testing.assert_close(program.module()(x), net(x))


def test_checkpointing_in_compiled_code(backend, device):
    net = Net().to(device)

    def forward(x):
        return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

    x = torch.randn(2, 6, 16, device=device, requires_grad=True)
    got = torch.autograd.grad(torch.compile(forward, fullgraph=True, backend="aot_eager")(x).sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(net(x).sum(), x)[0], rtol=1e-4, atol=1e-4)
