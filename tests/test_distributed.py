"""Two gloo processes train as one on the whole batch: DistributedDataParallel, and FSDP2 with its mixed precision."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import mpvg_kernels as mk

pytestmark = pytest.mark.xdist_group(__name__)  # one pair of processes for all tests

DIM, TOKENS, BATCH, STEPS = 8, 5, 6, 3


class Block(nn.Module):
    """A layer of MPVG: the position embedding comes in and goes out, the last branch is joined by the next norm."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = mk.FusedAddPELayerNorm(DIM), mk.FusedAddLayerNorm(DIM)
        self.linear1, self.linear2 = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x, branch, pos):
        y, x, pos = self.norm1(x, branch, pos)
        y, x = self.norm2(x, self.linear1(y))
        return x, self.linear2(y), pos


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.linspace(-1, 1, TOKENS * DIM).view(TOKENS, DIM))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = mk.FusedPELayerNormPool(DIM)

    def forward(self, x):
        branch, pos = None, self.pos
        for block in self.blocks:
            x, branch, pos = block(x, branch, pos)
        return self.norm(x, self.pos, branch)


def data() -> torch.Tensor:
    return torch.randn(STEPS, BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def train(net: nn.Module, batches: torch.Tensor) -> dict:
    """Some steps of SGD: the losses, and every parameter's first gradient and last value."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses, first = [], None
    for x in batches:
        loss = (net(x).float() - 1).square().sum(1).mean()
        loss.backward()
        if first is None:
            first = [whole(p.grad) for p in net.parameters()]
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), "gradients": first, "parameters": [whole(p) for p in net.parameters()]}


def whole(t: torch.Tensor) -> torch.Tensor:
    assert t is not None, "a parameter had no gradient"
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def ddp(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)  # which raises an error in the second step if a parameter is unused


def fsdp(net: nn.Module, **policy) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, **policy)
    return fully_shard(net, **policy)


def fsdp_mixed(net: nn.Module) -> nn.Module:
    return fsdp(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


WRAPPERS = {"ddp": ddp, "fsdp": fsdp, "fsdp_mixed": fsdp_mixed}


def worker(rank: int, backends: list[str], store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = BATCH // 2
    found = {}
    for backend in backends:
        for wrapper, wrap in WRAPPERS.items():
            torch.manual_seed(0)
            with mk.use_backend(backend):
                found[backend, wrapper] = train(wrap(Net()), data()[:, rank * half : (rank + 1) * half])
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the two processes found, for every backend and wrapper: they take long to start."""
    folder = tmp_path_factory.mktemp("distributed")
    backends = [b for b in ("reference", "cpp") if b in mk.available_backends()]
    mp.spawn(worker, (backends, str(folder / "store"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_one(wrapper, backend, found):
    if backend in ("triton", "cuda"):
        pytest.skip("two gloo processes on the CPU: backends with CPU kernels only")
    zero, one = (process[backend, wrapper] for process in found)
    torch.manual_seed(0)
    want = train(Net(), data())

    def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = 0.1 if wrapper == "fsdp_mixed" else 1e-5
        assert (got - expected).norm() <= tolerance * expected.norm() + 1e-6

    assert_close((zero["losses"] + one["losses"]) / 2, want["losses"])
    for key in ("gradients", "parameters"):
        for a, b, expected in zip(zero[key], one[key], want[key], strict=True):
            assert torch.equal(a, b)
            assert_close(a, expected)
