"""Checkpoints: all that a run needs to go on as if it had never stopped, in its folder's `checkpoints/`.

    step-00001234/model.safetensors  ema.safetensors     weights, and their moving average where there is one
                  state.pt                               the rest: tensors and plain values, no pickled object
                  COMPLETE                               size and CRC-32 of each file, written last

A checkpoint is written into `.step-00001234.tmp`, every file fsynced, and renamed when it is whole. Training stands
still only while its tensors are copied into memory; a thread writes them. A disk that is full or fails costs
checkpoints, never the run.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from ..models.weights import read_checkpoint
from . import InputError
from .run_folder import WEIGHTS, RunFolder, disk_error, machine, reason, sync, write_json

__all__ = ["WEIGHTS", "Checkpoints", "Restored", "RunFolder", "Snapshot", "machine", "write_json"]

FORMAT = 1
LOGS = ("log.jsonl", "metrics.csv")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SLACK = 2**20  # bytes of headers, file system blocks and the like, beside the tensors
BLOCK = 2**28  # bytes that are allocated at once; a power of two, to which pinned memory is rounded up


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is saved; `Checkpoints.save` copies the tensors before it returns."""

    step: int
    """Updates that have been done."""
    model: Mapping[str, Tensor]
    """The model's state_dict, whole tensors on any device."""
    ema: Mapping[str, Tensor] | None
    """The same of the moving average, where there is one."""
    state: Mapping[str, Any]
    """Whatever else it takes to go on: dicts, lists, tuples, tensors, numbers, strings, bool and None alone. Its entry
    "logs" is written by `Checkpoints.save`."""
    logs: tuple[IO, ...] = ()
    """The open log files of the run folder, cut back to what they hold now when training goes on from here."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read; all tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]
    path: Path


class _Damaged(Exception):
    """A checkpoint is not whole; the message says why, and follows its name and `is not whole: `."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: the run's folder, locked by this process if it is to write.
        keep: how many whole ones remain after a save.
        warn: called with a sentence when one can't be written; from the thread that writes.
    """

    def __init__(self, run: RunFolder, keep: int, *, warn: Callable[[str], None]):
        self.run, self.keep, self.warn = run, keep, warn
        self.folder = run.path / "checkpoints"
        self._buffers = _Buffers()
        self._thread: threading.Thread | None = None
        self._damaged: set[Path] = set()  # found so by reading them, which pruning does not do

    # ---- writing

    def require_space(self, size: int, weights: int = 0) -> None:
        """Make sure, at the start of a run, that its checkpoints can be written; clears what a killed save left.

        Args:
            size: bytes of a checkpoint.
            weights: bytes of the weights that are saved beside them.

        Raises:
            InputError: the folder can't be written, or there is no space for one checkpoint and the weights.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path)
            probe = self.folder / ".probe"
            probe.write_bytes(b"probe")
            probe.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(
                f"{self.folder} can't be written ({error.strerror}): make it writable, or choose another folder "
                "with --out"
            ) from None
        there = self._whole()
        in_older = sum(file.stat().st_size for path in there[1:] for file in path.iterdir())
        if free + in_older < size + weights + SLACK:
            raise InputError(
                f"{self.folder} has {_bytes(free)} free, and a checkpoint takes {_bytes(size + SLACK)} beside "
                f"{_bytes(weights)} of weights: make room, or choose another folder with --out"
            )
        # One more than are kept, as an old one goes only when the new one is whole.
        needed = max(0, self.keep + 1 - len(there)) * size + weights
        if free < needed:
            self.warn(
                f"{self.folder} has {_bytes(free)} free, and {self.keep} checkpoints and the one being written take "
                f"{_bytes(needed)} more: older ones will be removed early"
            )

    def save(self, snapshot: Snapshot, background: bool = True) -> None:
        """Write a checkpoint and remove those beyond `keep`.

        Returns as soon as the tensors are copied, which waits for the checkpoint before it to be written; with
        `background=False` when all is written. What the disk refuses goes to `warn`, and training can go on.

        Raises:
            TypeError: the snapshot holds something else than tensors and plain values; a bug of the caller.
        """
        self.wait()
        tree = {"model": snapshot.model, "ema": snapshot.ema, "state": snapshot.state}
        copies = iter(self._buffers.copy(list(_tensors(tree, "snapshot"))))
        model, ema, state = _with_tensors(tree, copies).values()
        logs = []
        try:
            for file in snapshot.logs:
                file.flush()
                logs.append(os.dup(file.fileno()))  # the file may be closed while the thread still needs it
            sizes = {Path(f.name).name: os.fstat(d).st_size for f, d in zip(snapshot.logs, logs, strict=True)}
        except OSError as error:
            self._warn_not_written(snapshot.step, error)
            _close(logs)
            return
        copy = Snapshot(snapshot.step, model, ema, state | {"logs": sizes})
        if background:
            # Not a daemon: Python ends when the checkpoint is written, not before.
            self._thread = threading.Thread(target=self._write, args=(copy, logs), name="checkpoint")
            self._thread.start()
        else:
            self._write(copy, logs)

    def wait(self) -> None:
        """Return when the last checkpoint is written, or has failed to be, which `warn` was told."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, logs: list[int]) -> None:
        """Write, making room once if it takes that; never raises, as a thread has nobody to raise to."""
        try:
            try:
                self._write_whole(snapshot, logs)
            except Exception as error:
                found = disk_error(error)
                if found is None or found.errno not in FULL:
                    raise
                removed = ", ".join(self._prune(1, snapshot.step)) or "nothing, as there is no older checkpoint"
                self.warn(
                    f"no room for the checkpoint of update {snapshot.step} ({reason(found)}): removed {removed}; "
                    "trying once more"
                )
                self._write_whole(snapshot, logs)
            self._prune(self.keep, snapshot.step)
        except Exception as error:
            self._warn_not_written(snapshot.step, error)
        finally:
            _close(logs)

    def _write_whole(self, snapshot: Snapshot, logs: list[int]) -> None:
        path = self.folder / f"step-{snapshot.step:08}"
        tmp = self.folder / f".{path.name}.tmp"
        tree = {"step": snapshot.step, "state": snapshot.state}
        size = SLACK + sum(t.nbytes for t in _tensors([snapshot.model, snapshot.ema, tree], "snapshot"))
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            tmp.mkdir(parents=True)
            if (free := shutil.disk_usage(tmp).free) < size:
                raise OSError(errno.ENOSPC, f"it takes {_bytes(size)}, and {_bytes(free)} are free")
            safetensors.torch.save_file(snapshot.model, tmp / "model.safetensors", metadata={"format": "pt"})
            if snapshot.ema is not None:
                safetensors.torch.save_file(snapshot.ema, tmp / "ema.safetensors", metadata={"format": "pt"})
            with open(tmp / "state.pt", "wb") as file:  # a path would hide the OSError
                torch.save(tree, file)
            files = sorted(tmp.iterdir())
            for file in files:
                sync(file)
            for log in logs:
                os.fsync(log)
            complete = {"format": FORMAT, "mpvg_kernels": __version__}
            complete["files"] = {f.name: {"size": f.stat().st_size, "crc32": _crc32(f)} for f in files}
            write_json(tmp / "COMPLETE", complete | {"crc32": _crc32(complete)})
            sync(tmp)
            if path.exists():  # one of the same update, saved before the evaluation or damaged
                _remove(path)
            os.rename(tmp, path)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        self._damaged.discard(path)

    def _warn_not_written(self, step: int, error: Exception) -> None:
        self.warn(
            f"the checkpoint of update {step} was not written ({reason(error)}): training goes on, and the next save "
            "tries again"
        )

    def _prune(self, keep: int, step: int) -> list[str]:
        """Remove all but the newest `keep` whole checkpoints up to update `step`; returns their names.

        Those of later updates are what training left behind when it went back to an older one.
        """
        whole = self._whole()
        kept = ([path for path in whole if _step(path) <= step] or whole)[:keep]
        gone = [path for path in _checkpoints(self.folder) if path not in kept]
        for path in gone:
            with contextlib.suppress(OSError):
                _remove(path)
        return [path.name for path in gone]

    def _whole(self) -> list[Path]:
        """The whole checkpoints, newest first, as far as the sizes of their files tell."""
        whole = []
        for path in _checkpoints(self.folder):
            with contextlib.suppress(_Damaged):
                _complete(path)
                whole.append(path)
        return [path for path in whole if path not in self._damaged]

    # ---- reading

    def newest(self) -> tuple[Restored, list[str]] | None:
        """The newest whole checkpoint, and a sentence for each newer one that is not whole; None where there is none.

        Raises:
            InputError: it was written by a newer version.
        """
        for tmp in self.folder.glob(".step-*.tmp"):
            # Whole, but for its name: the process was killed in between. The others are cleared when writing starts.
            place = self.folder / tmp.name.removeprefix(".").removesuffix(".tmp")
            if (tmp / "COMPLETE").exists() and not place.exists():
                with contextlib.suppress(OSError):
                    os.rename(tmp, place)
        found, passed_over = _newest(self.folder)
        self._damaged = set(passed_over)
        if found is None:
            for sentence in passed_over.values():
                self.warn(sentence)
            return None
        return found, list(passed_over.values())

    def open(self, path: str | Path) -> Restored:
        """Read a certain checkpoint, or another run's newest.

        Args:
            path: the folder of a checkpoint or of a run.

        Raises:
            InputError: there is none, it is not whole, or it was written by a newer version.
        """
        path = Path(path)
        if (path / "checkpoints").is_dir():
            found, passed_over = _newest(path / "checkpoints")
            for sentence in passed_over.values():
                self.warn(sentence)
            if found is None:
                raise InputError(f"{path} has no whole checkpoint; choose another run, or start a new one")
            return found
        if not path.is_dir():
            raise InputError(f"{path} is not a folder; expected that of a checkpoint or of a run")
        try:
            return _read(path)
        except _Damaged as damage:
            raise InputError(f"{path} is not a whole checkpoint: {damage}; choose another one") from None

    def cut_logs(self, state: Mapping[str, Any] | None) -> None:
        """Cut the run's logs back to what they held at a checkpoint; to nothing when training starts over.

        Args:
            state: `Restored.state`, or None.

        Raises:
            InputError: they can't be written.
        """
        for name, size in (state["logs"] if state else dict.fromkeys(LOGS, 0)).items():
            path = self.run.path / name
            try:
                there = path.stat().st_size if path.exists() else 0
                if there < size:
                    self.warn(f"{path} has {there} bytes, and had {size} at the checkpoint: some of the log is lost")
                elif there > size:
                    os.truncate(path, size)
            except OSError as error:
                raise InputError(f"{path} can't be written ({error.strerror}): make it writable") from None


# ---- folders


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints, newest first, whole or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=_step, reverse=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; hidden first, so that half of one is never taken for a checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _crc32(of: Path | dict) -> int:
    if isinstance(of, dict):
        return zlib.crc32(json.dumps(of).encode())
    crc = 0
    with open(of, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def _complete(path: Path) -> dict[str, Any]:
    """What COMPLETE says, after the files were found to have the sizes in it."""
    try:
        complete = json.loads((path / "COMPLETE").read_text())
        crc = complete.pop("crc32")
    except FileNotFoundError:
        raise _Damaged("it has no COMPLETE") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"COMPLETE can't be read ({error})") from None
    if crc != _crc32(complete):
        raise _Damaged("COMPLETE is damaged")
    for name, expected in complete["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise _Damaged(f"{name} can't be read ({error.strerror})") from None
        if size != expected["size"]:
            raise _Damaged(f"{name} has {size} bytes, COMPLETE says {expected['size']}")
    return complete


def _read(path: Path) -> Restored:
    complete = _complete(path)
    if complete["format"] > FORMAT:
        raise InputError(
            f"{path} was written by mpvg_kernels {complete['mpvg_kernels']} in format {complete['format']}, and this "
            f"mpvg_kernels {__version__} reads formats up to {FORMAT}: update it"
        )
    contents = {"ema.safetensors": None}
    try:
        for name, expected in complete["files"].items():
            if (crc := _crc32(path / name)) != expected["crc32"]:
                raise _Damaged(f"{name} has CRC-32 {crc:08x}, COMPLETE says {expected['crc32']:08x}")
            contents[name] = read_checkpoint(path / name)
    except (OSError, ValueError) as error:
        raise _Damaged(str(error)) from None
    rest = contents["state.pt"]
    return Restored(rest["step"], contents["model.safetensors"], contents["ema.safetensors"], rest["state"], path)


def _newest(folder: Path) -> tuple[Restored | None, dict[Path, str]]:
    """The newest whole checkpoint, and by path why newer ones are not."""
    passed_over: dict[Path, str] = {}
    for path in _checkpoints(folder):
        try:
            return _read(path), passed_over
        except _Damaged as damage:
            passed_over[path] = f"{path.name} is not whole: {damage}"
    return None, passed_over


def _bytes(count: float) -> str:
    """1.4 GB"""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


# ---- tensors in memory

PLAIN = (int, float, str, bool, type(None))
EXPECTED = "a dict, a list, a tuple, a dense tensor whole on one device, a number, a string, a bool or None"


def _tensors(value: Any, where: str) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples.

    Raises:
        TypeError: there is something that torch.load(weights_only=True) refuses or that can't be copied.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) not in (int, str):
                raise TypeError(f"{where} has the key {key!r}; expected an int or a str")
            yield from _tensors(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{where}[{i}]")
    elif type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta:
        yield value
    elif type(value) not in PLAIN:
        raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}; expected {EXPECTED}")


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """A copy of the nested `value` with other tensors, in the order of `_tensors`."""
    if isinstance(value, Mapping):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item, tensors) for item in value)
    return next(tensors) if isinstance(value, Tensor) else value


class _Buffers:
    """Memory that every save copies its tensors into; fresh memory would take longer than the copy itself."""

    def __init__(self):
        self._layout: list = []
        self._tensors: list[Tensor] = []

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies on the CPU, contiguous, each with a storage of its own; good until the next call."""
        layout = [(tensor.shape, tensor.dtype) for tensor in tensors]
        if layout != self._layout:
            self._tensors = []  # give the memory back first
            self._tensors = _allocate(layout, pinned=any(tensor.is_cuda for tensor in tensors))
            self._layout = layout
        for copy, tensor in zip(self._tensors, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._tensors


def _allocate(layout: list[tuple[torch.Size, torch.dtype]], pinned: bool) -> list[Tensor]:
    """Tensors in few large blocks of memory, as pinned memory is rounded up to powers of two.

    Not numpy's memory: it asks for huge pages, and the system may take seconds to find them.
    """
    sizes = [-(-shape.numel() * dtype.itemsize // 64) * 64 for shape, dtype in layout]
    left, tensors = sum(sizes), []
    block, offset = torch.empty(0, dtype=torch.uint8), 0
    for (shape, dtype), size in zip(layout, sizes, strict=True):
        if offset + size > len(block):
            length, offset = max(size, min(BLOCK, left)), 0
            block = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
        # Unlike a view, a tensor from a buffer is all of its storage: torch.save writes storages whole.
        if size:
            flat = torch.frombuffer(block.numpy(), dtype=dtype, count=shape.numel(), offset=offset)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensors.append(flat.view(shape))
        offset, left = offset + size, left - size
    return tensors
