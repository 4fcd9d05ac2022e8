"""The run folder: what a run writes, and the weights that others read.

    run.json     the resolved config, versions, machine       written once, at the start
    status.json  running | preempted | finished | failed, and how far
    starts.jsonl a line for each start: time, command, machine, processes, update that it began with
    log.jsonl  metrics.csv  curves.png  report.md             metrics.py and report.py write these
    checkpoints/                                              checkpoint.py writes it: what a run goes on from
    best/ last/ ema/  config.json and model.safetensors, as timm writes them
    .lock        the process that writes the folder

Every file is written beside its place and renamed into it, so that a reader never sees half of one.
"""

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..models.dense import DenseModel, create_dense
from ..models.weights import read_checkpoint
from . import InputError
from .config import Config, from_dict

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WEIGHTS = ("best", "last", "ema")
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk; some file systems know that of files alone."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in NO_FOLDER_SYNC:
            raise


def _replace(tmp: Path, path: Path) -> None:
    sync(tmp)
    os.replace(tmp, path)


def finite(value: Any) -> Any:
    """The value, nested or not, with None in the place of numbers that are not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """A file to write that gets its name when it is whole and on the disk; where that fails, nothing is left of it.

    A link, or what is no regular file (/dev/stdout, a named pipe), is written to as it is, and stays what it is. Text
    is UTF-8; bytes of names that are no text are escapes in it.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with open(path, mode, **text) as file:
            yield file
        return
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may be writing the same file
    try:
        with open(tmp, mode, **text) as file:
            yield file
        _replace(tmp, path)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    with whole_file(path) as file:
        file.write(text)


def disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind what a writer raised, or None; safetensors and torch.save raise other types for it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if isinstance(error, safetensors.SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__ or error.__context__
    return None


def reason(error: BaseException) -> str:
    """What went wrong in a few words: the system's own for an error of the disk."""
    found = disk_error(error)
    return f"{type(error).__name__}: {error}" if found is None else found.strerror or str(found)


def show(text: str, file: IO[str] | None = None) -> None:
    """Print a line; where the output goes to a disk that is full, or to nobody, the work is not to stop for that."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        discard(file or sys.stdout)
    except OSError:
        pass


def discard(stream: IO[str]) -> None:
    """Let a stream that nobody reads any more (`| head`) end nowhere: Python flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Text on one line of a terminal: what names may hold of line ends, control characters and bytes, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_warning(message: str) -> None:
    """Say a warning on stderr."""
    show(f"mpvg: warning: {printable(message)}", sys.stderr)


class RunFolder:
    """A run's folder: `RunFolder.create` starts one, `RunFolder(path)` opens one that is there.

    Attributes:
        info: what run.json holds.
        warn: called with a sentence when something can't be written that training can do without.

    Raises:
        InputError: `path` is not a run folder.
    """

    warn: Callable[[str], None] = staticmethod(print_warning)

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock_file = None
        try:
            self.info: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise InputError(
                f"{self.path} is not a run folder: it has no run.json; expected a folder that `mpvg train` wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / 'run.json'} can't be read ({error}); expected the JSON of `mpvg train`"
            ) from None
        if not isinstance(self.info, dict):
            raise InputError(f"{self.path / 'run.json'} holds no JSON object; expected the JSON of `mpvg train`")

    @classmethod
    def create(cls, path: str | Path, info: dict[str, Any]) -> "RunFolder":
        """Make the folder, lock it (see `lock`) and write run.json (`info`) and status.json.

        Raises:
            InputError: there is something in the folder already, it can't be made, or another process is making it.
        """
        path = Path(path)
        taken = f"{path} exists and nothing is overwritten: choose another folder with --out, or remove this one"
        ours = (".lock", ".run.json.")  # all that is there when a start was cut off before it wrote run.json
        try:
            if path.is_dir() and not all(file.name.startswith(ours) for file in path.iterdir()):
                raise InputError(taken)
            path.mkdir(parents=True, exist_ok=True)
            lock_file = lock_folder(path)
            if (path / "run.json").exists():  # another process made the run in between, and has ended
                raise InputError(taken)
            write_json(path / "run.json", info)
        except FileExistsError:
            raise InputError(taken) from None
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror}): choose another folder with --out") from None
        run = cls(path)
        run._lock_file = lock_file
        run.set_status("running")
        return run

    def lock(self) -> None:
        """Make this process the one that writes the folder, until it ends or calls `unlock`.

        Where the file system has no locks, nothing happens.

        Raises:
            InputError: another process writes it, or it can't be written.
        """
        if self._lock_file is None:
            try:
                self._lock_file = lock_folder(self.path)
            except OSError as error:
                raise InputError(f"{self.path} can't be written ({error.strerror})") from None

    def unlock(self) -> None:
        """Let another process write the folder."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def set_status(self, state: str, **more: Any) -> bool:
        """Write status.json: `state`, the time, and whatever else is known (epoch, step, accuracy, error).

        Returns:
            Whether it could be written; if not, `warn` was told.
        """
        status = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
        try:
            write_json(self.path / "status.json", finite(status))
        except OSError as error:
            self.warn(f"{self.path / 'status.json'} could not be written ({reason(error)}); training goes on")
            return False
        return True

    def config(self) -> Config:
        """The run's config.

        Raises:
            InputError: run.json has none, or one with fields that this version does not know.
        """
        if "config" not in self.info:
            raise InputError(f"{self.path / 'run.json'} has no config; expected the JSON of `mpvg train`")
        versions = self.info.get("versions")
        return from_dict(self.info["config"], versions.get("mpvg_kernels") if isinstance(versions, dict) else None)

    def note_start(self, **start: Any) -> None:
        """Add a line to starts.jsonl; log.jsonl stays free of what differs between a resumed run and a whole one."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **start})
        try:
            with open(self.path / "starts.jsonl", "a") as file:
                file.write(line + "\n")
        except OSError as error:
            self.warn(f"{self.path / 'starts.jsonl'} could not be written ({error.strerror}); training goes on")

    def save(self, name: str, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> bool:
        """Write weights and config in timm's format: `timm.create_model("local-dir:RUN/best", pretrained=True)`.

        A model for detection or segmentation, which timm does not know, has a config.json for `create_dense`.

        Args:
            name: one of WEIGHTS.
            model: made by timm.create_model or `create_dense`, which have noted in it what it takes to make it again.
            tensors: the weights, where they are not those in the model (an average, or in parts on many devices).

        Returns:
            Whether they could be written; if not, `warn` was told, and those of before are still there.
        """
        tmp, folder = self.path / f".{name}.tmp", self.path / name
        # A copy each: safetensors takes neither tied weights nor channels-last ones.
        copies = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in (model.state_dict() if tensors is None else tensors).items()
        }
        try:
            tmp.mkdir(exist_ok=True)
            safetensors.torch.save_file(copies, tmp / "model.safetensors", metadata={"format": "pt"})
            write_model_config(model, tmp / "config.json", self.info.get("class_names"))
            folder.mkdir(exist_ok=True)
            for file in sorted(tmp.iterdir()):  # config.json is the same all through the run, so the pair always fits
                _replace(file, folder / file.name)
            sync(folder)
        except (OSError, safetensors.SafetensorError) as error:
            self.warn(
                f"the {name} weights could not be written to {folder} ({reason(error)}); training goes on without"
            )
            return False
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        return True

    def model(self, name: str = "last") -> nn.Module:
        """The run's model with the weights `name` (one of WEIGHTS), on the CPU, in eval mode; no image is needed.

        Raises:
            InputError: they are not there, can't be read, or belong to another model.
        """
        self._require(name)
        return open_model(self.path / name)

    def load(self, name: str, model: nn.Module) -> None:
        """Load the weights `name` (one of WEIGHTS) into `model`.

        Raises:
            InputError: they are not there, can't be read, or belong to another model.
        """
        self._require(name)
        _load(self.path / name / "model.safetensors", model, "run.json")

    def _require(self, name: str) -> None:
        path = self.path / name / "model.safetensors"
        if not path.exists():
            raise InputError(f"{path} does not exist: the run has not saved its {name} weights")


def write_model_config(model: nn.Module, path: Path, class_names: list[str] | None) -> None:
    """Write the config.json of a model, by which `open_model` makes it again."""
    labels = {"label_names": class_names} if class_names else {}
    if isinstance(model, DenseModel):
        write_json(path, {**model.dense_config, "preprocessing": getattr(model, "preprocessing", {}), **labels})
    else:
        save_config_for_hf(model, path, labels or None)


def open_model(folder: Path) -> nn.Module:
    """The model of a folder that `RunFolder.save` or timm wrote (config.json, model.safetensors), on the CPU, in eval
    mode. One for detection or segmentation has `preprocessing` and, where its classes have names, `label_names`.

    Raises:
        InputError: they are not there, can't be read, or do not belong together.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise InputError(
                f"{folder / name} does not exist; expected a folder in timm's format, which has both files"
            )
    try:
        config = json.loads((folder / "config.json").read_text())
        if "task" in config:
            about = {name: config.pop(name, None) for name in ("preprocessing", "label_names")}
            model = create_dense(**config)
            model.preprocessing, model.label_names = about.values()
        else:
            model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=False)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} is not a model's config in timm's format ({error})") from None
    _load(folder / "model.safetensors", model, "config.json")
    return model.eval()


def _load(path: Path, model: nn.Module, of: str) -> None:
    """Load the weights in `path`; `of` names the file that the model was made from, for the message."""
    try:
        found = read_checkpoint(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    expected = model.state_dict()
    both = found.keys() & expected.keys()
    wrong = [
        ("missing", sorted(expected.keys() - found.keys())),
        ("not in the model", sorted(found.keys() - expected.keys())),
        (
            "of another shape",
            [
                f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in sorted(both)
                if found[key].shape != expected[key].shape
            ],
        ),
    ]
    if any(keys for _, keys in wrong):
        said = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in wrong
            if keys
        )
        raise InputError(f"{path} holds the weights of another model than {of}'s: {said}")
    model.load_state_dict(found)


def lock_folder(folder: Path) -> IO[str] | None:
    """The open file that holds the lock on a folder until it is closed; None where there are no locks.

    A record lock (lockf), not flock: the kernel drops it with this process, while flock's would live on in the data
    workers, which hold copies of the open file for some seconds after the process is gone.

    Raises:
        InputError: another process holds it.
        OSError: the folder can't be written.
    """
    if fcntl is None:
        return None
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"{folder} is being written by {holder}: wait until it has ended, or choose another folder with --out"
        ) from None
    except OSError:
        file.close()
        return None
    with contextlib.suppress(OSError):  # the name is a help alone, and the disk may be full
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    import sklearn
    import torchvision

    from .. import __version__

    return {
        "versions": {
            "mpvg_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "command": sys.argv,
    }
