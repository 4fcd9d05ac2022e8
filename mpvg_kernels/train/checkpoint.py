"""The run folder, and the weights in it.

    run.json     the resolved config, versions, machine       written once, at the start
    status.json  running | finished | failed, and how far
    log.jsonl  metrics.csv  curves.png  report.md             metrics.py and report.py write these
    best/ last/  config.json and model.safetensors, as timm writes them

Every file is written beside its place and renamed into it, so that a reader never sees half of one.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.models
import torch
from torch import nn

from . import InputError

WEIGHTS = ("best", "last")


def _replace(tmp: Path, path: Path) -> None:
    with open(tmp, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(tmp, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(json.dumps(value, indent=2) + "\n")
    _replace(tmp, path)


class RunFolder:
    """A run's folder: `RunFolder.create` starts one, `RunFolder(path)` opens one that is there.

    Raises:
        InputError: `path` is not a run folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
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

    @classmethod
    def create(cls, path: str | Path, info: dict[str, Any]) -> "RunFolder":
        """Make the folder and write run.json (`info`) and status.json.

        Raises:
            InputError: there is something in the folder already, or it can't be made.
        """
        path = Path(path)
        try:
            if path.is_dir() and any(path.iterdir()):
                raise FileExistsError
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "run.json", info)
        except FileExistsError:
            raise InputError(
                f"{path} exists and nothing is overwritten: choose another folder with --out, or remove this one"
            ) from None
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror}): choose another folder with --out") from None
        run = cls(path)
        run.set_status("running")
        return run

    def set_status(self, state: str, **more: Any) -> None:
        """Write status.json: `state`, the time, and whatever else is known (epoch, step, accuracy, error)."""
        write_json(self.path / "status.json", {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more})

    def save(self, name: str, model: nn.Module) -> None:
        """Write weights and config in timm's format: `timm.create_model("local-dir:RUN/best", pretrained=True)`.

        Args:
            name: one of WEIGHTS.
            model: made by timm.create_model, which has noted in it what it takes to make it again.
        """
        tmp, folder = self.path / f".{name}.tmp", self.path / name
        timm.models.save_for_hf(model, tmp, safe_serialization=True)
        folder.mkdir(exist_ok=True)
        for file in sorted(tmp.iterdir()):  # config.json is the same all through the run, so the pair always fits
            _replace(file, folder / file.name)
        shutil.rmtree(tmp)

    def load(self, name: str, model: nn.Module) -> None:
        """Load the weights `name` (one of WEIGHTS) into `model`.

        Raises:
            InputError: they are not there, can't be read, or belong to another model.
        """
        path = self.path / name / "model.safetensors"
        if not path.exists():
            raise InputError(f"{path} does not exist: the run has not saved its {name} weights")
        try:
            found = safetensors.torch.load_file(path)
        except Exception as error:  # safetensors' own error type, and OSError
            raise InputError(f"{path} can't be read as safetensors ({error})") from None
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
            raise InputError(f"{path} holds the weights of another model than run.json's: {said}")
        model.load_state_dict(found)


def machine() -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    import platform

    import sklearn
    import torchvision

    from .. import __version__

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
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
            "cpu": cpu,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "command": sys.argv,
    }
