"""Sets up every test run: GPU kernels on the CPU where there is no GPU, and the backends and devices to test on."""

import os
import warnings

# Workers of pytest-xdist share the cores. Before torch starts its threads, and for the processes that tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
# Before anything imports Triton: without a GPU its kernels run on the CPU, interpreted.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# Models are compared with formulas: a convolution's rounding to TF32 would be all that is seen.
torch.backends.cudnn.allow_tf32 = False

import cuda_host_library  # noqa: E402
import interpreter  # noqa: E402
import pytest  # noqa: E402

NO_INTERPRETER = None if HAS_GPU else interpreter.missing()
if NO_INTERPRETER:
    del os.environ["TRITON_INTERPRET"]  # the Triton backend is then as it is without a GPU: missing

# Before mpvg_kernels is imported: without a GPU its CUDA kernels are compiled for the CPU, and run by tests/cuda_host.
NO_CUDA_HOST = None if HAS_GPU else cuda_host_library.missing()
if not HAS_GPU and not NO_CUDA_HOST:
    os.environ["MPVG_CUDA_HOST"] = str(cuda_host_library.library())

import mpvg_kernels as mk  # noqa: E402
from mpvg_kernels import backends  # noqa: E402


@pytest.fixture(params=backends.BACKENDS)
def backend(request, monkeypatch):
    """Each backend in turn, chosen for the length of the test; skipped with its reason where it can't run.

    A test may ask for "cpp, autograd in Python" besides, which leaves the C++ nodes unused.
    """
    name, _, autograd = request.param.partition(", ")
    if lacking := {"cuda": NO_CUDA_HOST, "triton": NO_INTERPRETER}.get(name):
        pytest.skip(lacking)
    if name not in mk.available_backends():
        pytest.skip(f"{name}: {backends.status(name).reason}")
    if autograd:
        monkeypatch.setattr(backends, "autograd_nodes", lambda: (None, autograd))
    with mk.use_backend(name):
        yield name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """What takes minutes comes first, so that pytest-xdist's workers do not wait for one of them at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    # pytest-xdist writes a test's group behind its name, and distributes by that. Where it fails to (3.8 under pytest
    # 9.2), nothing else says so, and every worker compiles what one should.
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        warnings.warn("pytest-xdist ignores its groups, which costs minutes: install pytest<9.2", stacklevel=1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def device(backend):
    """Where the backend's tensors are: a GPU for the GPU kernels when there is one."""
    return "cuda" if HAS_GPU and backend in ("triton", "cuda") else "cpu"
