"""What was timed on a GPU: launch choices of the Triton kernels, and which backend is faster. Where it is kept.

A table is a JSON file:

    {"format": 1,
     "devices": {"NVIDIA H100 80GB HBM3": {
        "versions": {"torch": "...", "triton": "...", "mpvg_kernels": "..."},
        "entries": [{"kernel": "pe_layer_norm_fwd", "dtype": "bf16", "D": 384,
                     "choice": {"threads": 512, "elements_per_thread": 24, "warps": 4, "stages": 3},
                     "us": 61.2, "default_us": 63.0}],
        "backends": [{"operator": "pe_layer_norm", "dtype": "bf16", "D": 384,
                      "us": {"triton": 161.2, "cuda": 158.9}}]}}}

A choice replaces fields of `triton_ops.tiles.LoopRules`; it holds for one kernel, dtype of the stream, width and name
of the device, and changes nothing but speed and the order of sums. Two tables are read, once: `tuned.json` beside this
file, and the one that the environment variable MPVG_TUNED names, whose entries count more. MPVG_TUNED=none reads
neither. `python -m mpvg_kernels.triton_ops.tune` writes them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
PACKAGED = Path(__file__).with_name("tuned.json")
VARIABLE = "MPVG_TUNED"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OPERATORS = ("pe_layer_norm", "pe_norm_pool")
KERNELS = tuple(f"{operator}_{direction}" for operator in OPERATORS for direction in ("fwd", "bwd"))
FIELDS = ("threads", "elements_per_thread", "warps", "stages")

Choice = dict[str, int]
Key = tuple[str, str, str, int]
"""(device, kernel or operator, dtype, D)"""


class TableError(ValueError):
    """A table that can't be used; the message says which, what is wrong with it, and what writes a new one."""


def read(path: Path) -> dict[str, Any]:
    """The table in a file, checked.

    Raises:
        TableError: there is no such file, or it is no table of this format.
    """
    try:
        table = json.loads(path.read_text())
        wrong = _wrong_table(table)
    except OSError as error:
        wrong = f"can't be read: {error.strerror}"
    except ValueError as error:
        wrong = f"is no JSON: {error}"
    if wrong:
        again = "`python -m mpvg_kernels.triton_ops.tune` writes one"
        raise TableError(f"the table of launch choices {path} {wrong}; {again}")
    return table


def _wrong_table(table: Any) -> str:
    """What is wrong with a table, in words; "" if nothing is."""
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        return f"has format {found!r}, and this version reads format {FORMAT}"
    devices = table.get("devices")
    if not isinstance(devices, dict) or not all(isinstance(device, dict) for device in devices.values()):
        return "has no dict of devices"
    for name, device in devices.items():
        for part, wrong_entry in (("entries", _wrong_choice), ("backends", _wrong_backends)):
            entries = device.get(part, [])
            if not isinstance(entries, list):
                return f"has no list of {part} for {name!r}"
            for entry in entries:
                wrong = wrong_entry(entry) if isinstance(entry, dict) else "no keys"
                if wrong:
                    return f"has among the {part} of {name!r} one with {wrong}: {json.dumps(entry)}"
    return ""


def _wrong_key(entry: dict, names: tuple[str, ...], name: str) -> str:
    if entry.get(name) not in names:
        return f"{name} {entry.get(name)!r}, expected one of {', '.join(names)}"
    if entry.get("dtype") not in DTYPES.values():
        return f"dtype {entry.get('dtype')!r}, expected one of {', '.join(DTYPES.values())}"
    if not _positive(entry.get("D")):
        return f"D {entry.get('D')!r}, expected a positive integer"
    return ""


def _wrong_choice(entry: dict) -> str:
    choice = entry.get("choice")
    if not isinstance(choice, dict) or not choice.keys() <= set(FIELDS) or not all(map(_positive, choice.values())):
        return f"choice {choice!r}, expected positive integers for some of {', '.join(FIELDS)}"
    if choice.get("warps", 1).bit_count() != 1 or choice.get("threads", 32) < 32:
        return "warps that are no power of two, or fewer than 32 threads"
    return _wrong_key(entry, KERNELS, "kernel")


def _wrong_backends(entry: dict) -> str:
    us = entry.get("us")
    if not isinstance(us, dict) or not us or not all(isinstance(t, int | float) and t > 0 for t in us.values()):
        return f"us {us!r}, expected a time for each backend"
    return _wrong_key(entry, OPERATORS, "operator")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def write(path: Path, device: str, measured: dict[str, Any]) -> None:
    """Put a device's part into a table; the other devices' stay. What is no table is not overwritten: TableError."""
    table = read(path) if path.exists() else {"format": FORMAT, "devices": {}}
    table["devices"][device] = measured
    path.write_text(json.dumps(table, indent=1) + "\n")


@functools.cache
def _tables() -> list[dict[str, Any]]:
    """Both tables. A user's that can't be used is an error; the package's own is a warning, for all works without."""
    named = os.environ.get(VARIABLE, "")
    if named == "none":
        return []
    tables = []
    try:
        tables.append(read(PACKAGED))
    except TableError as error:
        warnings.warn(f"{error}; going on with the default choices", stacklevel=2)
    if named:
        tables.append(read(Path(named)))
    return tables


def _by_key(part: str, name: str, value: Callable[[dict], Any]) -> dict[Key, Any]:
    return {
        (device, entry[name], entry["dtype"], entry["D"]): value(entry)
        for table in _tables()
        for device, measured in table["devices"].items()
        for entry in measured.get(part, [])
    }


@functools.cache
def _choices() -> dict[Key, Choice]:
    return _by_key("entries", "kernel", lambda entry: entry["choice"])


@functools.cache
def _fastest() -> dict[Key, str]:
    return _by_key("backends", "operator", lambda entry: min(entry["us"], key=entry["us"].get))


_trial: dict[tuple[str, str, int], Choice] = {}


def loop_rules(rules, kernel: str, device: torch.device, dtype: torch.dtype, D: int):
    """`rules`, with what the tables say for this kernel, device, dtype and width."""
    name = DTYPES[dtype]
    choice = _trial.get((kernel, name, D)) or _choices().get((_device_name(device), kernel, name, D))
    return dataclasses.replace(rules, **choice) if choice else rules


def fastest(operator: str, device: torch.device, dtype: torch.dtype, D: int) -> str | None:
    """The backend that was measured to be the faster one, forward and backward together; None: not measured."""
    return _fastest().get((_device_name(device), operator, DTYPES.get(dtype, ""), D))


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def forget() -> None:
    """Read the tables again at the next call, and plan every launch anew."""
    _tables.cache_clear()
    _choices.cache_clear()
    _fastest.cache_clear()
    _forget_launches()


def _forget_launches() -> None:
    from .triton_ops import tiles

    tiles.launch.cache_clear()


@contextlib.contextmanager
def trial(kernel: str, dtype: str, D: int, choice: Choice) -> Iterator[None]:
    """Inside, a choice holds that is in no table: for the tuner."""
    _trial[kernel, dtype, D] = choice
    _forget_launches()
    try:
        yield
    finally:
        del _trial[kernel, dtype, D]
        _forget_launches()
