"""The run folder and its checkpoints: what is left after a kill, damage, a full disk; weights in timm's format."""

import contextlib
import errno
import json
import os
import pickletools
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import mpvg_kernels as mk  # noqa: F401  registers the models
from mpvg_kernels.train import InputError, checkpoint
from mpvg_kernels.train.checkpoint import Checkpoints, RunFolder, Snapshot

PREPROCESSING = {"input_size": (1, 8, 8), "mean": (0.3,), "std": (0.4,), "crop_pct": 1.0}
KEPT_FILES = ("model.safetensors", "ema.safetensors", "state.pt", "COMPLETE")


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {})


@pytest.fixture
def said():
    return []


@pytest.fixture
def saves(run, said):
    return Checkpoints(run, 2, warn=said.append)


def small_model() -> torch.nn.Module:
    sizes = dict(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, in_chans=1, num_classes=10)
    return timm.create_model("mpvg_deit_tiny_patch16_224", pretrained_cfg_overlay=PREPROCESSING, **sizes)


def snapshot(step: int, size: int = 500, **more) -> Snapshot:
    """One whose tensors all hold the number of the step."""
    full = {f"t{i}": torch.full((size,), float(step)) for i in range(3)}
    return Snapshot(step, full, full, {"optimizer": {0: dict(full)}, "epoch": step}, **more)


def step_of(restored: checkpoint.Restored) -> int:
    """The step of a restored `snapshot`, after a look at every tensor."""
    for tensors in (restored.model, restored.ema, restored.state["optimizer"][0]):
        assert len(tensors) == 3 and all((tensor == restored.step).all() for tensor in tensors.values())
    assert restored.state["epoch"] == restored.step
    return restored.step


def names(saves: Checkpoints) -> list[str]:
    return sorted(path.name for path in saves.folder.iterdir())


def forked(function, *args) -> int:
    """Run in a child process; returns its process id. The child exits with 0, or 1 if an exception came out."""
    if pid := os.fork():
        return pid
    try:
        torch.set_num_threads(1)  # a forked child has none of its parent's threads
        function(*args)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


# ---- what is saved is what comes back


def test_everything_comes_back(saves, run):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    ema = {name: value.half() for name, value in model.state_dict().items()}
    state = {
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "best": (None, 0.5, True, "acc", [1, float("inf")]),
        "empty": torch.empty(0, 3, dtype=torch.bool),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.ones(1).expand(4),
        "scalar": torch.tensor(7),
    }
    saves.save(Snapshot(12, model.state_dict(), ema, state))
    saves.wait()
    restored, passed_over = saves.newest()
    assert (restored.step, passed_over, restored.path) == (12, [], saves.folder / "step-00000012")
    expected = {"model": dict(model.state_dict()), "ema": ema, "state": state | {"logs": {}}}
    found = {"model": restored.model, "ema": restored.ema, "state": restored.state}
    assert_same(found, expected)
    assert sorted(path.name for path in restored.path.iterdir()) == sorted(KEPT_FILES)
    fresh = torch.optim.AdamW(small_model().parameters())
    fresh.load_state_dict(restored.state["optimizer"])
    assert step_of_optimizer(fresh) == step_of_optimizer(optimizer) == 1


def assert_same(found, expected) -> None:
    """Equal nested dicts, lists and tuples, bit for bit."""
    assert isinstance(found, torch.Tensor) or type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


def step_of_optimizer(optimizer: torch.optim.Optimizer) -> int:
    (step,) = {int(values["step"]) for values in optimizer.state.values()}
    return step


def test_tied_and_channels_last_weights(saves):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    saves.save(Snapshot(1, {"a": weight, "b": weight, "row": weight[0]}, None, {}), background=False)
    restored, _ = saves.newest()
    assert restored.ema is None and not (restored.path / "ema.safetensors").exists()
    assert all(torch.equal(restored.model[name], weight) for name in "ab")
    assert torch.equal(restored.model["row"], weight[0])


def test_no_pickled_object(saves):
    saves.save(snapshot(1), background=False)
    path = saves.folder / "step-00000001" / "state.pt"
    assert torch.load(path, weights_only=True)["step"] == 1
    with zipfile.ZipFile(path) as archive:
        (pickle,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    called = {arg for opcode, arg, _ in pickletools.genops(pickle) if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST")}
    assert called == {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    assert path.stat().st_size < 3 * 500 * 4 + 4096  # its own tensors, not the memory that they were copied into


@pytest.mark.parametrize(
    "value, message",
    [
        (np.float64(1), r"snapshot['state']['x'][0] is a numpy.float64; expected"),
        ({1}, "is a builtins.set"),
        (torch.device("cpu"), "is a torch.device"),
        (types.SimpleNamespace(), "is a types.SimpleNamespace"),
        (torch.eye(2).to_sparse(), "is a torch.Tensor; expected"),
        (torch.empty(2, device="meta"), "is a torch.Tensor; expected"),
        ({(1, 2): 3}, "has the key (1, 2); expected an int or a str"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused(saves, value, message):
    with pytest.raises(TypeError) as error:
        saves.save(Snapshot(1, {}, None, {"x": [value]}))
    assert message in str(error.value)
    assert not saves.folder.exists()


def test_a_save_in_flight_is_not_touched(saves, monkeypatch):
    # The weights change in place as soon as save() returns; a second save waits for the first one's memory.
    write, memory, weight = safetensors.torch.save_file, [], torch.full((1000,), 1.0)

    def slow(tensors, *args, **kwargs):
        time.sleep(0.1)
        memory.append(tensors["w"])
        write(tensors, *args, **kwargs)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", slow)
    for step in (1, 2):
        saves.save(Snapshot(step, {"w": weight}, None, {}))
        assert not (saves.folder / f"step-{step:08}").exists()  # written in the background
        assert not saves._thread.daemon  # Python does not end before it has
        weight.fill_(step + 1)
    saves.wait()
    for step in (1, 2):
        assert (saves.open(saves.folder / f"step-{step:08}").model["w"] == step).all()
    assert memory[0].data_ptr() == memory[1].data_ptr()  # pages that are new each time would take longer than the copy


def test_pruning(saves):
    for step in range(1, 6):
        saves.save(snapshot(step))
    saves.wait()
    assert names(saves) == ["step-00000004", "step-00000005"]
    # One that is not whole does not count, and goes.
    (saves.folder / "step-00000005" / "COMPLETE").unlink()
    saves.save(snapshot(6), background=False)
    assert names(saves) == ["step-00000004", "step-00000006"]
    # Nor does one whose damage a look at sizes can't tell, once it was read.
    flip(saves.folder / "step-00000006" / "state.pt", 1000, 0)
    assert step_of(saves.newest()[0]) == 4
    saves.save(snapshot(7), background=False)
    assert names(saves) == ["step-00000004", "step-00000007"]


def test_going_back_to_an_older_one(saves):
    saves.keep = 3
    for step in (1, 2, 3):
        saves.save(snapshot(step), background=False)
    assert step_of(saves.open(saves.folder / "step-00000001")) == 1
    saves.save(snapshot(2), background=False)  # takes the place of the one that is there; 3 was another history's
    assert names(saves) == ["step-00000001", "step-00000002"]
    assert step_of(saves.newest()[0]) == 2


# ---- kills


def write_for_ever(folder, first: int, acknowledged: int) -> None:
    """Save one step after the other as training does; say those that are written into the pipe."""
    saves = Checkpoints(RunFolder(folder), 2, warn=sys.exit)
    saves.require_space(0)
    state = snapshot(first)
    for step in range(first, first + 10_000):
        state = Snapshot(step, state.model, state.ema, state.state | {"epoch": step})
        for tensor in state.model.values():  # which the moving average and the optimizer have too
            tensor.fill_(step)
        saves.save(state, background=bool(step % 2))
        if not step % 2:
            os.write(acknowledged, b"%d\n" % step)


def test_killed_at_random_times(saves, run):
    draw, step, half_written = random.Random(0), 0, 0
    for _ in range(20):
        reader, writer = os.pipe()
        child = forked(write_for_ever, run.path, step + 1, writer)
        os.close(writer)
        os.read(reader, 16)  # the first that is written
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with open(reader) as lines:
            sure = max(map(int, lines), default=0)
        half_written += any(path.name.startswith(".") for path in saves.folder.iterdir())
        restored, passed_over = saves.newest()
        assert step_of(restored) >= max(sure, step) and passed_over == []
        step = restored.step
    assert half_written  # so the kills did come while something was being written


def test_killed_at_every_call(run, said):
    # The first save removes an older one, the second takes the place of one that is there.
    calls = ("fsync", "rename", "replace", "rmdir")

    def write(last_call):
        saves, count = Checkpoints(run, 1, warn=sys.exit), 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > last_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in calls:
            setattr(os, name, counted(getattr(os, name)))
        for _ in range(2):
            saves.save(snapshot(2))
        saves.wait()

    saves = Checkpoints(run, 1, warn=said.append)
    saves.save(snapshot(1), background=False)
    before = saves.folder.rename(run.path / "before")
    for last_call in range(1000):
        shutil.rmtree(saves.folder, ignore_errors=True)
        shutil.copytree(before, saves.folder)
        status = os.waitpid(forked(write, last_call), 0)[1]
        restored, passed_over = saves.newest()
        assert step_of(restored) in (1, 2) and passed_over == []
        saves.require_space(0)
        assert step_of(saves.newest()[0]) == restored.step  # clearing up took nothing that was whole
        assert all(re.fullmatch(r"step-\d{8}", name) for name in names(saves))
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert last_call >= 20 and restored.step == 2 and said == []


# ---- damage


def flip(path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 1 << bit
    path.write_bytes(content)


def two(saves) -> None:
    for step in (200, 300):
        saves.save(snapshot(step), background=False)


@pytest.mark.parametrize("name", KEPT_FILES)
def test_cut_off_and_missing_files(saves, name):
    two(saves)
    path = saves.folder / "step-00000300" / name
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        restored, (sentence,) = saves.newest()
        assert step_of(restored) == 200
        if name != "COMPLETE":
            expected = f"{name} has {size} bytes, COMPLETE says {len(whole)}"
            assert sentence == f"step-00000300 is not whole: {expected}"
    path.unlink()
    restored, (sentence,) = saves.newest()
    assert step_of(restored) == 200 and sentence.startswith("step-00000300 is not whole: ") and name in sentence


@pytest.mark.parametrize("name", KEPT_FILES)
def test_flipped_bits(saves, name):
    two(saves)
    path = saves.folder / "step-00000300" / name
    whole, draw = path.read_bytes(), random.Random(0)
    for byte in range(len(whole)) if name == "COMPLETE" else draw.sample(range(len(whole)), 40):
        flip(path, byte, draw.randrange(8))
        restored, passed_over = saves.newest()
        if step_of(restored) == 200:
            assert passed_over[0].startswith(f"step-00000300 is not whole: {name} ")
        else:  # blanks in COMPLETE may differ
            assert name == "COMPLETE" and json.loads(path.read_text()) == json.loads(whole)
        path.write_bytes(whole)
    assert step_of(saves.newest()[0]) == 300


def test_none_is_whole(saves, said):
    assert saves.newest() is None
    two(saves)
    for path in saves.folder.glob("*/state.pt"):
        path.unlink()
    assert saves.newest() is None and len(said) == 2
    with pytest.raises(InputError, match="run has no whole checkpoint"):
        saves.open(saves.run.path)


def write_complete(path, **changes) -> None:
    complete = json.loads((path / "COMPLETE").read_text()) | changes
    del complete["crc32"]
    (path / "COMPLETE").write_text(json.dumps(complete | {"crc32": checkpoint._crc32(complete)}))


def test_files_that_do_not_parse(saves):
    two(saves)
    path = saves.folder / "step-00000300"
    (path / "state.pt").write_bytes(b"nonsense")
    files = json.loads((path / "COMPLETE").read_text())["files"]
    files["state.pt"] = {"size": 8, "crc32": checkpoint._crc32(path / "state.pt")}
    write_complete(path, files=files)
    restored, (sentence,) = saves.newest()
    assert step_of(restored) == 200 and "state.pt can't be read as a PyTorch checkpoint" in sentence


def test_newer_version(saves):
    two(saves)
    write_complete(saves.folder / "step-00000300", format=2, mpvg_kernels="9.9")
    for read in (saves.newest, lambda: saves.open(saves.run.path)):
        with pytest.raises(InputError) as error:
            read()
        assert f"9.9 in format 2, and this mpvg_kernels {mk.__version__} reads formats up to 1" in str(error.value)


def test_open(saves, tmp_path, said):
    two(saves)
    assert step_of(saves.open(saves.run.path)) == 300
    assert step_of(saves.open(str(saves.folder / "step-00000200"))) == 200
    shutil.copytree(saves.folder / "step-00000200", tmp_path / "mine")
    assert step_of(saves.open(tmp_path / "mine")) == 200
    flip(saves.folder / "step-00000300" / "model.safetensors", -1, 0)
    with pytest.raises(InputError, match="step-00000300 is not a whole checkpoint: model.safetensors has CRC-32"):
        saves.open(saves.folder / "step-00000300")
    assert said == []
    os.rename(saves.folder / "step-00000300", saves.folder / ".step-00000300.tmp")  # another process is writing it
    assert step_of(saves.open(saves.run.path)) == 200 and said == []
    os.rename(saves.folder / ".step-00000300.tmp", saves.folder / "step-00000300")
    assert step_of(saves.open(saves.run.path)) == 200 and "step-00000300 is not whole" in said[0]
    with pytest.raises(InputError, match="none is not a folder; expected"):
        saves.open(tmp_path / "none")
    with pytest.raises(InputError, match="is not a whole checkpoint: it has no COMPLETE"):
        saves.open(tmp_path)


# ---- disks that are full or fail


def disk_of(monkeypatch, saves, capacity: int) -> None:
    def usage(_):
        used = sum(path.stat().st_size for path in saves.folder.rglob("*") if path.is_file())
        return types.SimpleNamespace(total=capacity, used=used, free=capacity - used)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)


LARGE = 200_000  # elements; of three tensors, three times
LARGE_BYTES = 9 * 4 * LARGE


def test_full_disk_makes_room(saves, said, monkeypatch):
    disk_of(monkeypatch, saves, int(2.5 * LARGE_BYTES))
    for step in (1, 2):
        saves.save(snapshot(step, LARGE), background=False)
    assert said == []
    saves.save(snapshot(3, LARGE), background=False)
    assert names(saves) == ["step-00000002", "step-00000003"] and step_of(saves.newest()[0]) == 3
    (sentence,) = said
    assert sentence.startswith("no room for the checkpoint of update 3 (it takes 8.25 MB, and 3.")
    assert sentence.endswith("MB are free): removed step-00000001; trying once more")


def test_full_disk_goes_on_without(saves, said, monkeypatch):
    disk_of(monkeypatch, saves, int(1.5 * LARGE_BYTES))
    saves.save(snapshot(1, LARGE), background=False)
    saves.save(snapshot(2, LARGE))
    saves.wait()
    assert names(saves) == ["step-00000001"] and step_of(saves.newest()[0]) == 1
    assert "removed nothing, as there is no older checkpoint; trying once more" in said[0]
    assert said[1].startswith("the checkpoint of update 2 was not written (it takes")
    assert said[1].endswith("training goes on, and the next save tries again")
    monkeypatch.undo()
    saves.save(snapshot(3, LARGE))
    saves.wait()
    assert len(said) == 2 and step_of(saves.newest()[0]) == 3


@pytest.mark.parametrize("limited", ["model.safetensors", "state.pt"])
def test_file_size_limit(saves, said, run, limited):
    resource = pytest.importorskip("resource")
    for step in (1, 2):
        saves.save(snapshot(step), background=False)
    large = torch.zeros(10 * LARGE)

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE, LARGE))
        in_model = limited == "model.safetensors"
        saves.save(Snapshot(3, {"w": large} if in_model else {}, None, {} if in_model else {"w": large}))
        saves.wait()
        assert "update 3 (File too large): removed step-00000001; trying once more" in said[0]
        assert "update 3 was not written (File too large): training goes on" in said[1]
        assert names(saves) == ["step-00000002"]
        if in_model:
            model = torch.nn.Linear(LARGE, 1)
            model.pretrained_cfg = {}
            assert run.save("best", model) is False

    assert os.waitpid(forked(write), 0)[1] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("wrapped", [False, True], ids=["OSError", "SafetensorError"])
def test_errors_of_the_disk(saves, run, said, monkeypatch, number, wrapped):
    calls = []

    def fail(_, path, **__):
        calls.append(path)
        path.write_bytes(b"half")
        raise safetensors.SafetensorError(f"I/O (os error {number})") if wrapped else OSError(number, "", path)

    saves.save(snapshot(1), background=False)
    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fail)
    saves.save(snapshot(2))
    saves.wait()
    assert names(saves) == ["step-00000001"]
    assert len(calls) == (2 if number in checkpoint.FULL else 1) == len(said)
    assert "was not written (" in said[-1] and (not wrapped or f"({os.strerror(number)})" in said[-1])


def test_what_is_no_error_of_the_disk_is_said_too(saves, said, monkeypatch):
    monkeypatch.setattr(checkpoint.torch, "save", lambda *_: 1 / 0)
    saves.save(snapshot(1))
    saves.wait()
    assert "update 1 was not written (ZeroDivisionError: division by zero)" in said[0] and names(saves) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_file_systems_that_do_not_sync_folders(saves, said, monkeypatch, number):
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    saves.save(snapshot(1), background=False)
    assert (saves.newest() is None) == (number == errno.EIO) == bool(said)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MB, and a function that makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=4m", *options)), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    if not shutil.which("mount") or mount().returncode:
        pytest.skip("mounting is not permitted here")
    yield folder, lambda: mount("remount", "ro").check_returncode()
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_disk(tiny_disk, said, monkeypatch):
    folder, make_read_only = tiny_disk
    run = RunFolder.create(folder / "run", {})
    run.warn = said.append
    saves = Checkpoints(run, 2, warn=said.append)
    sizes = shutil.disk_usage(folder)
    # What others write in between is not seen by the look at the free space.
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: sizes)
    for step in range(1, 5):
        saves.save(snapshot(step, 40_000), background=False)  # 1.4 MB each
    assert step_of(saves.newest()[0]) == 4 and names(saves) == ["step-00000003", "step-00000004"]
    assert len(said) == 2 and all("(No space left on device): removed step-" in sentence for sentence in said)
    (folder / "other").write_bytes(bytes(1_000_000))
    saves.save(snapshot(5, 60_000), background=False)
    assert "update 5 was not written (No space left on device)" in said[-1] and names(saves) == ["step-00000004"]
    (folder / "other").unlink()
    run.unlock()
    make_read_only()
    del said[:]
    saves.save(snapshot(6), background=False)
    assert run.set_status("running") is False and run.save("last", small_model()) is False
    assert len(said) == 3 and all("Read-only file system" in sentence for sentence in said)
    assert step_of(saves.newest()[0]) == 4  # reading needs no writing
    for start in (lambda: saves.require_space(1), run.lock, lambda: RunFolder.create(folder / "other", {})):
        with pytest.raises(InputError, match=r"can't be written \(Read-only file system\)"):
            start()


def test_no_folder_can_be_made(saves, said):
    saves.folder.write_text("")  # a file in its place
    with pytest.raises(InputError, match="checkpoints can't be written"):
        saves.require_space(1)
    saves.save(snapshot(1), background=False)
    assert "update 1 was not written" in said[0]


def test_space_at_the_start(saves, said, monkeypatch):
    two(saves)
    (saves.folder / ".step-00000400.tmp").mkdir()
    (saves.folder / ".step-00000100.old").mkdir()
    disk_of(monkeypatch, saves, 100_000_000)
    saves.require_space(30_000_000, 60_000_000)  # two are there, so one more is written beside them
    assert said == [] and names(saves) == ["step-00000200", "step-00000300"]
    saves.keep = 3
    saves.require_space(30_000_000, 60_000_000)
    assert "has 100 MB free, and 3 checkpoints and the one being written take 120 MB more" in said[0]
    with pytest.raises(InputError, match="has 100 MB free, and a checkpoint takes 51 MB beside 60 MB of weights: make"):
        saves.require_space(50_000_000, 60_000_000)


def test_space_that_older_ones_take_can_be_had(saves, said, monkeypatch):
    disk_of(monkeypatch, saves, int(2.5 * LARGE_BYTES))
    for step in (1, 2):
        saves.save(snapshot(step, LARGE), background=False)
    saves.require_space(LARGE_BYTES)
    assert "older ones will be removed early" in said[0]


# ---- logs


def test_logs_are_cut_back(saves, run, said):
    with open(run.path / "log.jsonl", "a") as log, open(run.path / "metrics.csv", "a") as csv:
        log.write("one\n")
        csv.write("a,b\n")
        saves.save(snapshot(1, logs=(log, csv)))
        log.write("two\n")  # while it is being written
    saves.wait()
    restored, _ = saves.newest()
    assert restored.state["logs"] == {"log.jsonl": 4, "metrics.csv": 4}
    saves.cut_logs(restored.state)
    assert ((run.path / "log.jsonl").read_text(), (run.path / "metrics.csv").read_text()) == ("one\n", "a,b\n")
    (run.path / "metrics.csv").write_text("a")
    saves.cut_logs(restored.state)
    assert said == [f"{run.path / 'metrics.csv'} has 1 bytes, and had 4 at the checkpoint: some of the log is lost"]
    saves.cut_logs(None)
    assert (run.path / "log.jsonl").read_text() == (run.path / "metrics.csv").read_text() == ""


def test_logs_that_cannot_be_written(saves, said):
    with contextlib.suppress(OSError), open("/dev/full", "w") as log:  # closing it fails too
        log.write("one")
        saves.save(snapshot(1, logs=(log,)))
    assert "update 1 was not written (No space left on device)" in said[0] and saves.newest() is None


# ---- the run folder


def test_create_does_not_overwrite(run, tmp_path):
    with pytest.raises(InputError, match="exists and nothing is overwritten"):
        RunFolder.create(run.path, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(InputError, match="exists and nothing is overwritten"):
        RunFolder.create(tmp_path / "other", {})
    left = tmp_path / "left"  # by a start that was killed
    left.mkdir()
    (left / ".run.json.tmp").write_text("{")
    assert RunFolder.create(left, {"a": 1}).info == {"a": 1}


def test_two_processes(tmp_path):
    reader, writer = os.pipe()

    def train():
        run = RunFolder.create(tmp_path / "run", {})  # noqa: F841  holds the lock
        os.write(writer, b"%8d" % forked(time.sleep, 60))  # a data worker, which outlives its parent for a while
        time.sleep(60)

    child = forked(train)
    worker = int(os.read(reader, 8))
    run = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=f"is being written by process {child} on {socket.gethostname()}: wait until"):
        run.lock()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run.lock()
    os.kill(worker, signal.SIGKILL)


def test_no_locks_there(run, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    run.unlock()
    run.lock()


def test_status_that_cannot_be_written(run, said):
    run.warn = said.append
    assert run.set_status("running", step=3) is True and said == []
    assert json.loads((run.path / "status.json").read_text())["step"] == 3
    (run.path / "status.json").unlink()
    (run.path / "status.json").mkdir()
    assert run.set_status("running") is False
    assert said == [f"{run.path / 'status.json'} could not be written (Is a directory); training goes on"]


def test_timm_reads_the_weights_back(run):
    trained = small_model().eval()
    assert run.save("best", trained) is True
    model = timm.create_model(f"local-dir:{run.path / 'best'}", pretrained=True).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), trained(x))
    preprocessing = timm.data.resolve_model_data_config(model)
    assert (preprocessing["input_size"], *preprocessing["mean"], *preprocessing["std"]) == ((1, 8, 8), 0.3, 0.4)
    fresh = small_model().eval()
    run.load("best", fresh)
    assert torch.equal(fresh(x), trained(x))


def test_weights_of_any_layout(run):
    model = small_model().to(memory_format=torch.channels_last)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    assert run.save("ema", model) is True
    fresh = small_model()
    run.load("ema", fresh)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_save_that_fails_leaves_the_weights_before_it(run, said, monkeypatch):
    run.warn, model = said.append, small_model()
    run.save("last", model)
    before = {path.name: path.read_bytes() for path in (run.path / "last").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def full_disk(tensors, path, **_):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError(f"I/O error (os error {errno.ENOSPC})")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full_disk)
    assert run.save("last", model) is False
    assert said == [
        f"the last weights could not be written to {run.path / 'last'} (No space left on device); training goes on "
        "without"
    ]
    assert {path.name: path.read_bytes() for path in (run.path / "last").iterdir()} == before
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "last", "run.json", "status.json"]
    monkeypatch.undo()
    assert run.save("last", model) is True
