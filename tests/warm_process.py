"""Starts `mpvg` commands by forking a process that has imported everything: a start in tenths of a second, not in ten.

Run as a program it is that process. It reads one JSON request a line and answers each with a line:

    {"start": [{"argv": [...], "env": {...}, "out": FILE, "cwd": DIR, "patch": {...}}, ...]}    the process numbers
    {"wait": [pid, ...], "timeout": s}    the exit codes (-9 for SIGKILL), once all have ended; when one has failed the
                                          others are killed, as torchrun does

`patch` ends a process with SIGKILL at a given moment, {"kill": [NAME, N]}: at the N-th call of what NAME stands for in
MOMENTS; {"signal": [NAME, N, number], "again": ...} sends a signal then. Or it spoils something: {"forget": true} (a
resumed run begins its epoch anew), {"nan": [N, count]} (losses from the N-th on), {"file_limit": bytes} (RLIMIT_FSIZE).
{"call": [MODULE, NAME]} calls a function first.

`WarmProcess` is the other end, for the tests.
"""

import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# When a process may be killed: module, attribute path.
MOMENTS = {
    "update": ("mpvg_kernels.train.loop", "Trainer.update"),
    "optimizer": ("mpvg_kernels.train.loop", "Trainer._apply_gradients"),
    "evaluation": ("mpvg_kernels.train.tasks.classification", "F.cross_entropy"),
    "detections": ("mpvg_kernels.train.coco_metrics", "rows"),
    "snapshot": ("mpvg_kernels.train.loop", "Trainer.snapshot"),
    "fsync": ("os", "fsync"),
    "rename": ("os", "replace"),
}


def call_at(name: str, count: int, run) -> None:
    """Call `run` when what `name` stands for is called for the `count`-th time, before it does anything."""
    module, path = MOMENTS[name]
    owner, (*parents, attribute) = importlib.import_module(module), path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    plain, calls = getattr(owner, attribute), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            run()
        return plain(*args, **kwargs)

    setattr(owner, attribute, counted)


def apply(patch: dict) -> None:
    """Do what a request's `patch` says, in the process that it is for."""
    from mpvg_kernels.train import loop
    from mpvg_kernels.train.tasks.classification import Classification

    if "kill" in patch:
        call_at(*patch["kill"], lambda: os.kill(os.getpid(), signal.SIGKILL))
    for name, count, number in [patch[key] for key in ("signal", "again") if key in patch]:
        call_at(name, count, functools.partial(os.kill, os.getpid(), number))
    if "forget" in patch:
        plain = loop.Trainer.restore

        def restore(self, restored):
            plain(self, restored)
            self.step = 0

        loop.Trainer.restore = restore
    if "nan" in patch:
        loss, first, count = Classification.loss, patch["nan"][0], [0]

        def spoilt(self, *args):
            value, counts = loss(self, *args)
            count[0] += 1
            return value * (float("nan") if first <= count[0] < first + patch["nan"][1] else 1.0), counts

        Classification.loss = spoilt
    if "call" in patch:
        module, name = patch["call"]
        getattr(importlib.import_module(module), name)()
    if "file_limit" in patch:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (patch["file_limit"], patch["file_limit"]))


def child(request: dict) -> None:
    """Run one command; does not return."""
    code = 1
    try:
        with open(request["out"], "ab", buffering=0) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ.update(request.get("env", {}))
        os.chdir(request.get("cwd", "."))
        apply(request.get("patch", {}))
        from mpvg_kernels.__main__ import main

        code = main(request["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], timeout: float) -> list[int | None]:
    """The exit codes of children; after `timeout` seconds, or once one has failed, the rest is killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(code < 0 for code in codes.values()):
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def serve() -> None:
    import mpvg_kernels.train.loop
    import mpvg_kernels.train.recipes.digits  # noqa: F401, imported for the children
    import mpvg_kernels.train.tasks.classification  # noqa: F401

    for name in sys.argv[1:]:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = []
            for each in request["start"]:
                pid = os.fork()
                if not pid:
                    child(each)
                answer.append(pid)
        else:
            answer = wait(request["wait"], request["timeout"])
        print(json.dumps(answer), flush=True)


class WarmProcess:
    """The process that forks, seen from a test; a context manager.

    Args:
        modules: what it imports for its children, besides the trainer.
    """

    def __init__(self, *modules: str):
        self._modules = modules

    def __enter__(self) -> "WarmProcess":
        # Not what the tests of the GPU kernels need (conftest.py): a user's process has the backends of the machine.
        env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MPVG_CUDA_HOST")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._modules],
            env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background hands on that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, request: dict):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, requests: list[dict]) -> list[int]:
        return self._ask({"start": requests})

    def wait(self, pids: list[int], timeout: float = 120) -> list[int]:
        return self._ask({"wait": pids, "timeout": timeout})

    def run(self, argv: list, out: Path, *, processes: int = 1, patch: dict | None = None, patched: int = 0) -> int:
        """Run a command in as many processes as asked, the one of rank `patched` with `patch`; the worst exit code."""
        requests = []
        port = str(20000 + (os.getpid() * 7 + int(time.monotonic() * 1000)) % 20000)
        for rank in range(processes):
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            requests.append({"argv": [str(arg) for arg in argv], "env": env, "out": str(out)})
        if patch:
            requests[patched]["patch"] = patch
        codes = self.wait(self.start(requests))
        return min(codes) if min(codes) < 0 else max(codes)


if __name__ == "__main__":
    serve()
