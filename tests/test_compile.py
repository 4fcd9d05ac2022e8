"""torch.compile, torch.export and autocast around the operators: one graph, few compilations, the same numbers."""

import pytest
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
