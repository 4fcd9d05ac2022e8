"""Latency and throughput: percentiles and rates of calls whose times are known, and what can't be timed."""

import time

import pytest
import torch
from torch import nn

from mpvg_kernels.tools import latency

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    """Takes 2 ms an image."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        time.sleep(0.002 * len(x))
        return x


def test_time_of_a_batch():
    model = Sleeper()
    found = latency.measure(model, (3, 4, 4), CPU, (1, 4), channels_last=True, seconds=0.2)
    one, four = found["rows"]
    assert (one["batch"], four["batch"]) == (1, 4) and {layout for *_, layout in model.seen} == {True}
    assert one["calls"] >= four["calls"] >= latency.LEAST
    for row in (one, four):
        assert 2 * row["batch"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["img_s"] == pytest.approx(1e3 * row["batch"] / row["mean_ms"]) and row["img_s"] <= 500
    assert (found["device"], found["amp"], found["input_size"]) == ("cpu", "none", [3, 4, 4])
    shapes = [shape for shape, *_ in model.seen]
    assert len(shapes) >= one["calls"] + four["calls"] + 6  # each is warmed up first
    text = latency.table(found).splitlines()
    assert text[0].startswith(f"latency of a batch on cpu, {found['backend']} backend, amp none, ")
    assert text[1].split() == ["batch", "p50", "p90", "p99", "img/s"]
    assert text[3].split() == [
        "4",
        *(f"{four[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
        f"{four['img_s']:.1f}",
    ]


def test_percentiles_are_latencies_that_were_measured(monkeypatch):
    """Of 100 calls that take 1, 2, ..., 100 ms."""
    monkeypatch.setattr(latency, "LEAST", 100)
    calls = []

    def repeat(call, seconds, least):
        calls.append((seconds, least))
        return [(i + 1) / 1000 for i in range(least)]

    monkeypatch.setattr(latency, "_repeat", repeat)
    row = latency._time(nn.Identity(), torch.zeros(5, 1), 1.0)
    assert calls == [(0.25, 3), (1.0, 100)]
    assert (row["p50_ms"], row["p90_ms"], row["p99_ms"]) == pytest.approx((50, 90, 99))
    assert row["mean_ms"] == pytest.approx(50.5) and row["img_s"] == pytest.approx(5 / 0.0505)


def test_autocast():
    dtypes = []

    class Linear(nn.Linear):
        def forward(self, x):
            dtypes.append((y := super().forward(x)).dtype)
            return y

    found = latency.measure(Linear(4, 4), (1, 1, 4), CPU, (2,), amp="bf16", seconds=0.01)
    assert set(dtypes) == {torch.bfloat16} and found["amp"] == "bf16"


def test_a_batch_that_does_not_fit():
    class Full(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                raise torch.cuda.OutOfMemoryError
            return x

    found = latency.measure(Full(), (1, 2, 2), CPU, (1, 2), seconds=0.01)
    assert found["rows"][1] == {"batch": 2, "error": "out of memory"} and found["rows"][0]["calls"] >= latency.LEAST
    assert latency.table(found).splitlines()[-1].split() == ["2", "out", "of", "memory"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for():
    model = nn.Conv2d(3, 256, 3).cuda()
    found = latency.measure(model, (3, 224, 224), torch.device("cuda"), (1, 64), seconds=0.5)
    one, many = found["rows"]
    assert many["p50_ms"] > 2 * one["p50_ms"] and many["img_s"] >= 0.9 * 64e3 / many["mean_ms"]
