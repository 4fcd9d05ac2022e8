"""The kernels in forked children, in data loaders' workers, and called from many threads at once."""

import multiprocessing
import os
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mpvg_kernels as mk

B, N, D = 24, 50, 192  # enough work for several threads
SECONDS = 60  # to wait for a child that takes less than one


@pytest.fixture(autouse=True)
def _on_the_cpu(backend):
    if backend in ("triton", "cuda"):
        pytest.skip(f"{backend}: processes and threads of the CPU's kernels")


def results(seed: int = 0) -> list[bytes]:
    """Outputs and gradients of both operators, as bytes: torch itself hangs in a forked child that compares them."""
    g = torch.Generator().manual_seed(seed)
    x, f = (torch.randn(B, N, D, generator=g).requires_grad_() for _ in range(2))
    weight, bias = torch.rand(D, generator=g).requires_grad_(), torch.rand(D, generator=g).requires_grad_()
    pos = torch.randn(N, D, generator=g).requires_grad_()
    dy, dout = torch.randn(B, N, D, generator=g), torch.randn(B, D, generator=g)
    y, stream, pos_out = mk.pe_layer_norm(x, weight, bias, pos, weight, bias, branch=f)
    out = mk.pe_norm_pool(x, weight, bias, pos, weight, bias)
    inputs = (x, f, weight, bias, pos)
    grads = torch.autograd.grad((y, stream), inputs, (dy, dy)) + torch.autograd.grad(out, inputs[::2], dout)
    return [t.detach().numpy().tobytes() for t in (y, stream, pos_out, out, *grads)]


def wait(pid: int) -> int:
    """The exit code of a child; of one that hangs, None, and it is ended."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


@pytest.fixture
def threads():
    """torch on three threads, which are running: what a fork does not copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.ones(1 << 20).sin_()
    yield
    torch.set_num_threads(before)


def forward(x: torch.Tensor) -> bytes:
    weight = x[0, 0].detach()
    y = mk.pe_layer_norm(x, weight, weight, x[0].detach(), weight, weight).y
    return y.numpy().tobytes() + mk.pe_norm_pool(x, weight, weight).numpy().tobytes()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
def test_a_forked_child_computes(backend, threads):
    """The parent's threads are not there: the kernels work alone; torch's own operators wait for them for ever."""
    if backend == "reference":
        pytest.skip("torch's own operators hang in a child of a process that has used threads")
    x = torch.randn(B, N, D)
    expected = forward(x)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if forward(x) == expected else 1)
    assert wait(pid) == 0
    assert forward(x) == expected  # the parent goes on as before


def _same(expected: list[bytes]) -> None:
    torch.set_num_threads(1)  # as torch asks of a forked child
    raise SystemExit(results() != expected)


@needs_fork
def test_a_forked_child_trains(backend, threads):
    if backend == "reference":  # whose sums depend on the number of threads
        torch.set_num_threads(1)
    process = multiprocessing.get_context("fork").Process(target=_same, args=(results(),))
    process.start()
    process.join(SECONDS)
    code = process.exitcode
    process.kill()
    process.join()
    assert code == 0


class Pooled(Dataset):
    """Items that are made by the kernels, in the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.linspace(-1, 1, B * N * D).view(B, N, D).sin() * (i + 1)
        return mk.pe_norm_pool(x, x[0, 0], None)


@needs_fork
def test_workers_of_a_data_loader(backend, threads):
    items = [Pooled()[i] for i in range(6)]
    loader = DataLoader(Pooled(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
    for got, want in zip(loader, items, strict=True):
        if backend == "reference":  # whose sums depend on the number of threads, which is one in a worker
            torch.testing.assert_close(got, want)
        else:
            assert torch.equal(got, want)


def test_many_threads_at_once(backend):
    """Python threads call forward and backward together; each finds the bits that it finds alone."""
    count, rounds = 8, 4
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [results(seed) for seed in range(count)]
        wrong, barrier = [], threading.Barrier(count)

        def work(seed):
            try:
                barrier.wait()
                torch.set_num_threads(2)  # OpenMP's number is a thread's own
                with mk.use_backend(backend):
                    for _ in range(rounds):
                        if results(seed) != expected[seed]:
                            wrong.append(seed)
            except Exception as error:  # noqa: BLE001  (told below, not lost with the thread)
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong
