"""How long a model takes for a batch, and how many images a second that is. `mpvg eval RUN --latency` prints it."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import backends
from ..train.model import autocast

SECONDS = 2.0
LEAST, MOST = 20, 10_000
"""Calls that are timed of each batch size, whatever the time."""


@torch.inference_mode()
def measure(
    model: nn.Module,
    input_size: tuple[int, int, int],
    device: torch.device,
    batch_sizes: Sequence[int] = (1, 8, 64),
    *,
    amp: str = "none",
    channels_last: bool = False,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Time a model's forward pass on images that lie on the device: no decoding, no copy to it.

    A latency is elapsed time from the call to the result, for which a GPU is waited for after each call. Throughput on
    a GPU is of calls in a row without a wait, between two events; on a CPU, which waits anyway, it is images over the
    mean latency. Every batch size is warmed up for a quarter of `seconds` first, so that compilation, allocation and
    the clock's rise are over.

    Args:
        model: in eval mode, on the device.
        input_size: (channels, height, width).
        batch_sizes: images of a call, from 1.
        amp: none, bf16 or fp16.
        seconds: how long the latencies of a batch size are taken, of LEAST calls at least; None is SECONDS.

    Returns:
        device, backend, amp, threads, input_size, and rows: a dict for each batch size, {"batch", "calls", "p50_ms",
        "p90_ms", "p99_ms", "mean_ms", "img_s"}. A percentile is a latency that was measured: the smallest that is not
        exceeded by so many per cent of the calls. One that does not fit into the GPU's memory has {"batch", "error"}.
    """
    rows, seconds = [], SECONDS if seconds is None else seconds
    for batch in batch_sizes:
        x = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0)).to(device)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        try:
            with autocast(amp, device):
                rows.append({"batch": batch} | _time(model, x, seconds))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append({"batch": batch, "error": "out of memory"})
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "backend": backends.resolve(device.type, isinstance(model, torch._dynamo.OptimizedModule)),
        "amp": amp,
        "threads": torch.get_num_threads(),
        "input_size": list(input_size),
        "rows": rows,
    }


def _time(model: nn.Module, x: Tensor, seconds: float) -> dict[str, Any]:
    on_gpu = x.device.type == "cuda"

    def call() -> float:
        start = time.perf_counter()
        model(x)
        if on_gpu:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start

    _repeat(call, seconds / 4, 3)
    taken = _repeat(call, seconds, LEAST)
    p50, p90, p99 = (1e3 * float(each) for each in np.percentile(taken, (50, 90, 99), method="inverted_cdf"))
    each = _events(model, x, len(taken)) if on_gpu else float(np.mean(taken))
    return {
        "calls": len(taken),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "mean_ms": 1e3 * float(np.mean(taken)),
        "img_s": len(x) / each,
    }


def _repeat(call, seconds: float, least: int) -> list[float]:
    """What `call` gives until so much time is over."""
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < least or (time.perf_counter() < end and len(taken) < MOST):
        taken.append(call())
    return taken


def _events(model: nn.Module, x: Tensor, calls: int) -> float:
    """Seconds a call of calls in a row, by the GPU's own clock."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        model(x)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def table(found: dict[str, Any]) -> str:
    """What `measure` found, as text."""
    where = f"{found['device']}, {found['backend']} backend, amp {found['amp']}"
    if found["device"] == "cpu":
        where += f", {found['threads']} thread{'s' * (found['threads'] > 1)}"
    lines = [f"latency of a batch on {where} (ms)", f"{'batch':>6} {'p50':>9} {'p90':>9} {'p99':>9} {'img/s':>10}"]
    for row in found["rows"]:
        if "error" in row:
            lines.append(f"{row['batch']:>6} {row['error']}")
        else:
            latencies = " ".join(f"{row[key]:>9.2f}" for key in ("p50_ms", "p90_ms", "p99_ms"))
            lines.append(f"{row['batch']:>6} {latencies} {row['img_s']:>10.1f}")
    return "\n".join(lines)
