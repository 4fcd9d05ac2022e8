"""Tensors past 2^31 elements: offsets need 64 bits. Rows at the far end are what a small call makes of the same rows.

Part of `make test`: views whose samples lie 2^30 elements apart, in memory of which only their rows are ever touched.
`pytest -m exhaustive tests/test_large.py`: dense results of that size, one at a time, where there is memory for one.
"""

import pytest
import torch

import mpvg_kernels as mk

PAST = 2**31
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _on_the_cpu(backend):
    if backend in ("triton", "cuda"):
        pytest.skip(f"{backend}: tests/test_cuda_host.py and tests/test_gpu.py have its offsets")


def needs_memory(gigabytes: float) -> None:
    """Skip unless this much memory is free, for its size alone."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except OSError:
        pytest.skip("this system does not say how much memory is free")
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GiB of free memory, {free:.1f} GiB are there")


def calls(x, branch, weight, bias, pos, dy, dout) -> list[torch.Tensor]:
    """Outputs and gradients of both operators, without those that sum over the batch; y, out, dx and dbranch."""
    x, branch = (None if t is None else t.detach().requires_grad_() for t in (x, branch))
    inputs = [t for t in (x, branch) if t is not None]
    y = mk.pe_layer_norm(x, weight, bias, pos, weight, bias, branch=branch).y
    out = mk.pe_norm_pool(x, weight, bias, pos, weight, bias, branch=branch)
    return [y, out, *torch.autograd.grad(y, inputs, dy), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("D", (33, 64))  # ragged rows go another way than whole vectors
@pytest.mark.parametrize("joined", (False, True))
def test_samples_far_apart(D, joined, backend):
    B, N, step = 4, 3, 2**30 + 4096
    try:
        memory = torch.empty((B - 1) * step + 8192, dtype=BF16)  # pages that nobody touches take no memory
    except RuntimeError as error:
        pytest.skip(f"no {2 * B} GB of address space: {error}")

    def far(offset: int) -> torch.Tensor:
        return memory.as_strided((B, N, D), (step, 256, 1), offset).copy_(torch.randn(B, N, D))

    weight, bias, pos = torch.rand(D) + 0.5, torch.randn(D), torch.randn(N, D)
    x, branch, dy = far(0), far(64) if joined else None, far(128)
    assert x.storage_offset() + x.stride(0) * (B - 1) > PAST
    dout = memory.as_strided((B, D), (step, 1), 192).copy_(torch.randn(B, D))
    near = [t if t is None else t.contiguous() for t in (x, branch)]
    found = calls(x, branch, weight, bias, pos, dy, dout)
    want = calls(*near, weight, bias, pos, dy.contiguous(), dout.contiguous())
    assert len(found) == len(want) and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def overlapping(B: int, N: int, D: int) -> torch.Tensor:
    """A bf16 tensor past 2^31 elements whose rows overlap in 100 MB. What the kernels make of it is dense."""
    assert B * N * D > PAST
    steps = (4099, 521, 1) if N < B else (0, 17, 1)
    memory = torch.randn(50_000_000, dtype=BF16)
    return memory.as_strided((B, N, D), steps)


def drop(t: torch.Tensor) -> None:
    """Give back the memory of a result whose graph is still needed."""
    t.untyped_storage().resize_(0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(11_000, 196, 1024), (8_192, 9, 32_768)], ids=str)
def test_many_samples(shape, backend):
    """More than 2^31 elements in y and dx: four samples of them, the last too, are as in a call of their own."""
    if backend == "reference":
        pytest.skip("reference keeps several copies and is PyTorch's own formula")
    needs_memory(6)
    B, N, D = shape
    chosen = [0, B // 2, B - 2, B - 1]
    x, weight, bias, dout = overlapping(B, N, D), torch.rand(D) + 0.5, torch.randn(D), torch.randn(B, D).to(BF16)
    few = x[chosen].requires_grad_()
    x.requires_grad_()
    y, few_y = mk.pe_layer_norm(x, weight, bias).y, mk.pe_layer_norm(few, weight, bias).y
    assert torch.equal(y.detach()[chosen], few_y)
    drop(y)
    (dx,) = torch.autograd.grad(y, x, x.detach())  # any gradient will do
    assert torch.equal(dx[chosen], torch.autograd.grad(few_y, few, few.detach())[0])
    del y, dx
    out, few_out = mk.pe_norm_pool(x, weight, bias), mk.pe_norm_pool(few, weight, bias)
    # a sample is added up in pieces where there are few of them: the last bit of a mean may differ
    torch.testing.assert_close(out.detach()[chosen], few_out.detach(), rtol=2**-7, atol=2**-7)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(dx[chosen], torch.autograd.grad(few_out, few, dout[chosen])[0])


@pytest.mark.exhaustive
def test_one_sample(backend):
    """More than 2^31 elements in a single sample: its rows are as in a call of their own, its mean as in double."""
    if backend == "reference":
        pytest.skip("reference keeps several copies and is PyTorch's own formula")
    needs_memory(6)
    N, D = 2**21, 1032
    chosen = [0, 1, N // 2, N - 2, N - 1]
    x, weight, bias = overlapping(1, N, D), torch.rand(D) + 0.5, torch.randn(D)
    mean = sum(
        torch.nn.functional.layer_norm(rows.float(), (D,), weight, bias, 1e-6).double().sum(0)
        for rows in x[0].split(2**16)
    )
    few = x[0, chosen][:, None].requires_grad_()
    x.requires_grad_()
    y, few_y = mk.pe_layer_norm(x, weight, bias).y, mk.pe_layer_norm(few, weight, bias).y
    assert torch.equal(y.detach()[0, chosen], few_y[:, 0])
    drop(y)
    (dx,) = torch.autograd.grad(y, x, x.detach())
    assert torch.equal(dx[0, chosen], torch.autograd.grad(few_y, few, few.detach())[0][:, 0])
    del y, dx
    out = mk.pe_norm_pool(x, weight, bias, out_dtype=torch.float32)
    torch.testing.assert_close(out.detach()[0].double(), mean / N, rtol=1e-5, atol=1e-5)
    dout = torch.randn(1, D).to(BF16).float()
    (dx,) = torch.autograd.grad(out, x, dout)
    few_y = mk.pe_layer_norm(few, weight, bias).y
    (few_dx,) = torch.autograd.grad(few_y, few, (dout.to(BF16) / N).expand(few.shape))  # exact: N is a power of two
    torch.testing.assert_close(dx[0, chosen], few_dx[:, 0], rtol=2**-7, atol=0)
