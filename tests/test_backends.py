"""Choosing a backend: names, setter and context manager, the environment, what is missing and why."""

import subprocess
import sys

import pytest
import torch

import mpvg_kernels as mk
from mpvg_kernels import backends


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python in a fresh process that inherits the environment but for MPVG_BACKEND and Triton's interpreter."""
    import os

    clean = {k: v for k, v in os.environ.items() if k not in ("MPVG_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True)


def test_context_manager_and_setter():
    assert backends.requested() == "auto"
    with mk.use_backend("reference"):
        assert backends.resolve("cpu") == "reference"
        with mk.use_backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"
    mk.use_backend("reference")
    assert backends.requested() == "reference"
    mk.use_backend("auto")


def test_restored_after_an_error():
    with pytest.raises(KeyError), mk.use_backend("reference"):
        raise KeyError
    assert backends.requested() == "auto"


def test_auto_prefers_kernels():
    assert backends.resolve("cpu") == ("cpp" if "cpp" in mk.available_backends() else "reference")
    assert backends.resolve("mps") == backends.resolve("meta") == "reference"


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown backend 'trition': expected one of auto, .*did you mean 'triton'"):
        mk.use_backend("trition")
    assert backends.requested() == "auto"


def test_missing_backend_says_why():
    missing = [b for b in backends.BACKENDS if b not in mk.available_backends()]
    if not missing:
        pytest.skip("all backends are there")
    for name in missing:
        with pytest.raises(mk.BackendUnavailableError, match=f"'{name}' is not available: .+"):
            mk.use_backend(name)


def test_backend_of_another_device():
    if "cpp" not in mk.available_backends():
        pytest.skip(backends.status("cpp").reason)
    with (
        mk.use_backend("cpp"),
        pytest.raises(mk.BackendUnavailableError, match="can't run on a meta tensor.*cpu tensors"),
    ):
        mk.FusedAddLayerNorm(4, device="meta")(torch.ones(1, 2, 4, device="meta"), None)


CALL = "import torch, mpvg_kernels as mk; mk.FusedAddLayerNorm(4)(torch.ones(1, 2, 4), None)"


def test_environment():
    code = "import mpvg_kernels as mk; print(mk.backends.resolve('cpu'))"
    assert run(code, MPVG_BACKEND="reference").stdout.strip() == "reference"
    bad = run(CALL, MPVG_BACKEND="fast")
    assert bad.returncode and "unknown backend 'fast'" in bad.stderr
    if not torch.cuda.is_available():
        bad = run(CALL, MPVG_BACKEND="triton")
        assert bad.returncode and "no CUDA GPU is visible" in bad.stderr


def test_show_config(capsys):
    mk.show_config()
    text = capsys.readouterr().out
    assert mk.__version__ in text and torch.__version__ in text
    for name in backends.BACKENDS:
        assert f"  {name}" in text
    assert f"auto on cpu: {backends.resolve('cpu')}" in text


def test_works_without_the_extension(monkeypatch):
    """A package without compiled parts: `auto` is the plain formula, and asking for `cpp` says how to get it."""
    monkeypatch.setattr(backends.Path, "glob", lambda *_: [])
    status = backends._probe_cpp()
    assert not status.devices and "MPVG_BUILD=cpu" in status.reason


def test_meta_tensors_have_shapes_and_dtypes():
    """Devices without kernels get the plain formula, "meta" included."""
    y, stream, pos = mk.FusedAddPELayerNorm(4, device="meta")(
        torch.ones(2, 3, 4, device="meta"), None, torch.ones(3, 4, device="meta")
    )
    assert y.is_meta and y.shape == (2, 3, 4) and pos.shape == (3, 4)
