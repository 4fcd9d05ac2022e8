"""What a training run can be told: nested dataclasses, a line a field, on the command line as `--SECTION.FIELD VALUE`.

A recipe is a value of `Config`; the command line changes single fields of it (`from_args`); the resolved whole is saved
in the run folder and read back from there (`from_dict`). Unknown names and illegal values are `InputError`s that name
the field.
"""

import contextlib
import dataclasses
import io
from typing import Any, Literal

from . import InputError, near_matches


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. A field left at None is the model's own default."""

    name: str = "mpvg_deit_tiny_patch16_224"
    """timm name of the model; classes, channels and image size come from the data."""
    scheme: str | None = "mpvg"
    """How the position embedding travels: default, gap, lape, pvg, mpvg, ...; None for timm's own models."""
    patch_size: int | None = None
    """Side of a patch in pixels."""
    embed_dim: int | None = None
    """Width of a token."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads of a block."""
    drop_path_rate: float | None = None
    """Stochastic depth of the last block; the blocks before it get linearly less."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The images."""

    name: str = "digits"
    """Dataset: digits (scikit-learn's 1,797 handwritten digits, a fifth held out)."""


@dataclasses.dataclass(frozen=True)
class Aug:
    """Random affine augmentation of the training images, each with draws of its own, uniform in +- the value."""

    prob: float = 0.6
    """Share of the images that are changed; the others stay as sharp as the held-out ones."""
    degrees: float = 10.0
    """Rotation in degrees."""
    translate: float = 0.06
    """Shift along each axis, as a share of the image's side."""
    scale: float = 0.1
    """Relative change of size."""
    shear: float = 0.1
    """Horizontal shift for a unit of height."""


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimizer. Biases, 1-D parameters and what the model names in no_weight_decay() are not decayed."""

    name: str = "adamw"
    """timm name of the optimizer."""
    lr: float = 1e-3
    """Peak learning rate, for the whole batch as it is (no scaling rule is applied)."""
    weight_decay: float = 0.05
    """Weight decay."""


@dataclasses.dataclass(frozen=True)
class Sched:
    """Cosine learning rate with a linear warm-up, set at every update."""

    warmup_epochs: int = 3
    """Epochs of warm-up; they count as epochs of the cosine, as in timm."""
    warmup_lr: float = 1e-6
    """Learning rate of the first update."""
    min_lr: float = 1e-5
    """Learning rate at the cosine's end."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The training loss; evaluation reports plain cross-entropy."""

    name: Literal["ce", "bce"] = "ce"
    """Softmax cross-entropy, or binary cross-entropy on every class."""
    smoothing: float = 0.0
    """Label smoothing."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What is written while training."""

    interval: int = 10
    """Updates between two lines of log.jsonl."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    seed: int = 0
    """Seed of weights, order and augmentation; the held-out images do not depend on it."""
    epochs: int = 32
    """Passes over the training images."""
    batch: int = 64
    """Images of an update; an epoch's last, incomplete batch is left out."""
    amp: Literal["none", "bf16"] = "none"
    """Automatic mixed precision: none (everything fp32) or bf16 autocast."""
    compile: bool = False
    """Train through torch.compile."""
    device: str = "auto"
    """Device of the run: auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's own choice."""
    model: Model = Model()
    data: Data = Data()
    aug: Aug = Aug()
    optim: Optim = Optim()
    sched: Sched = Sched()
    loss: Loss = Loss()
    log: Log = Log()

    def __post_init__(self):
        def need(ok: bool, field: str, expected: str):
            if not ok:
                section, _, name = field.rpartition(".")
                value = getattr(getattr(self, section) if section else self, name)
                raise InputError(f"config field {field} is {value!r}, expected {expected}")

        need(self.seed >= 0, "seed", "0 or more")
        need(self.epochs >= 1, "epochs", "1 or more")
        need(self.batch >= 1, "batch", "1 or more")
        need(self.threads is None or self.threads >= 1, "threads", "1 or more, or None")
        need(self.optim.lr > 0, "optim.lr", "more than 0")
        need(self.optim.weight_decay >= 0, "optim.weight_decay", "0 or more")
        need(0 <= self.sched.warmup_epochs < self.epochs, "sched.warmup_epochs", f"0 to epochs - 1 = {self.epochs - 1}")
        need(0 <= self.sched.warmup_lr <= self.optim.lr, "sched.warmup_lr", f"0 to optim.lr = {self.optim.lr:g}")
        need(0 <= self.sched.min_lr <= self.optim.lr, "sched.min_lr", f"0 to optim.lr = {self.optim.lr:g}")
        need(0 <= self.loss.smoothing < 1, "loss.smoothing", "0 or more and less than 1")
        need(0 <= self.aug.prob <= 1, "aug.prob", "0 to 1")
        need(0 <= self.aug.scale < 1, "aug.scale", "0 or more and less than 1")
        need(self.log.interval >= 1, "log.interval", "1 or more")


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Every field's dotted name, in order: seed, ..., model.name, ..."""
    names = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            names += field_names(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def check_names(names: list[str]) -> None:
    """Raise InputError for the first dotted name that is no field of `Config`."""
    known = field_names()
    for name in names:
        if name not in known:
            # `lr` alone means `optim.lr`
            close = next((f"; did you mean {k!r}?" for k in known if k.endswith(f".{name}")), near_matches(name, known))
            raise InputError(f"unknown config field {name!r}{close or '; --print-config lists them all'}")


def from_args(default: Config, args: list[str], prog: str = "mpvg train --recipe NAME") -> Config:
    """`default` with the fields that the command line sets, for example ["--optim.lr", "1e-3", "--epochs=2"].

    Raises:
        InputError: an unknown field, or a value of the wrong kind.
        SystemExit: after printing the help, when `args` ask for it.
    """
    import tyro

    # Ours and not tyro's check, for its one sentence; a single dash may start a negative number.
    options = [arg[2:].partition("=")[0] for arg in args if arg.startswith("--") and arg != "--help"]
    check_names([option.replace("-", "_") for option in options])
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            markers = (tyro.conf.FlagConversionOff,)  # --compile True, a value after every name
            return tyro.cli(Config, default=default, args=args, prog=prog, use_underscores=True, config=markers)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        # tyro draws a box of paragraphs around its message: the first paragraph is what was wrong.
        lines = [line.strip("│ ") for line in message.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        text = " ".join(lines[: next((i for i, line in enumerate(lines) if not line or line[0] == "─"), None)])
        raise InputError(text.rstrip(".") or "the config fields on the command line can't be read") from None


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` wrote.

    Raises:
        InputError: a field that this version does not know.
    """
    sections = {field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}
    check_names([f"{k}.{n}" for k in sections for n in values.get(k, {})] + [k for k in values if k not in sections])
    return Config(**{k: sections[k](**v) if k in sections else v for k, v in values.items()})
