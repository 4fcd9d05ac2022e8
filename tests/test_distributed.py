"""DistributedDataParallel on two gloo processes: the same gradients as one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import mpvg_kernels as mk


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.linspace(-1, 1, 5 * 8).view(5, 8))
        self.norm1, self.norm2 = mk.FusedAddPELayerNorm(8), mk.FusedAddLayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.norm = mk.FusedPELayerNormPool(8)

    def forward(self, x):
        y, x, pos = self.norm1(x, None, self.pos)
        y, x = self.norm2(x, self.linear(y))
        return self.norm(x, pos, self.linear(y))


def data():
    return torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))


def loss(net, x):
    return net(x).square().sum(1).mean()


def worker(rank: int, backend: str, store: str, results: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    with mk.use_backend(backend):
        net = nn.parallel.DistributedDataParallel(Net())
        loss(net, data()[rank * 3 : rank * 3 + 3]).backward()
    torch.save([p.grad for p in net.parameters()], f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp(backend, tmp_path):
    if backend in ("triton", "cuda"):
        pytest.skip("two gloo processes on the CPU: backends with CPU kernels only")
    mp.spawn(worker, (backend, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    net = Net()
    loss(net, data()).backward()
    for rank in (0, 1):
        for got, p in zip(torch.load(tmp_path / f"{rank}.pt"), net.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad)
