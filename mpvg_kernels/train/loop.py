"""The training loop: builds everything from a `Config`, trains, evaluates, fills the run folder.

What the command line calls:

    mpvg train --recipe digits --out runs/digits
    mpvg eval runs/digits
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import timm
import timm.loss
import timm.optim
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from .. import backends
from . import InputError, TrainingError, near_matches
from .config import Config, from_dict, to_dict
from .data import Digits, create_data
from .metrics import RunLog, Window, read_log
from .report import write_report
from .run_folder import RunFolder, machine


def pick_device(name: str) -> torch.device:
    """The torch device that a config's `device` means."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise InputError(f"config field device is {name!r}: {str(error).splitlines()[0].rstrip('.')}") from None


@contextlib.contextmanager
def cpu_threads(count: int | None):
    """`count` CPU threads for torch inside (None: as many as there were), the number from before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def create_model(config: Config, data: Digits) -> nn.Module:
    """The config's model for the data's classes, channels and image size; its weights come from torch's seed."""
    args = {name: value for name, value in to_dict(config)["model"].items() if value is not None}
    name, (channels, *size) = args.pop("name"), data.input_size
    if not timm.is_model(name):
        close = near_matches(name, timm.list_models())
        raise InputError(f"config field model.name is {name!r}, which timm does not know{close}")
    args |= {"num_classes": data.num_classes, "in_chans": channels, "img_size": tuple(size)}
    preprocessing = {"input_size": data.input_size, "mean": data.mean, "std": data.std, "crop_pct": 1.0}
    try:
        return timm.create_model(name, pretrained_cfg_overlay=preprocessing, **args)
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"{name} can't be built with {args}: {error}") from error


def create_loss(config: Config) -> nn.Module:
    """The training loss, from logits (B, classes) fp32 and labels (B,)."""
    if config.loss.name == "bce":
        return timm.loss.BinaryCrossEntropy(smoothing=config.loss.smoothing)
    return nn.CrossEntropyLoss(label_smoothing=config.loss.smoothing)


class Trainer:
    """A run's parts (data, model, loss, optimizer, schedule) and what is done with them.

    Raises:
        InputError: the config names something that there is not.
    """

    def __init__(self, config: Config):
        self.config, self.device = config, pick_device(config.device)
        try:
            self.backend = backends.resolve(self.device.type, config.compile)
        except (ValueError, backends.BackendUnavailableError) as error:
            raise InputError(str(error)) from None
        torch.manual_seed(config.seed)
        self.data = create_data(config, self.device)
        self.model = create_model(config, self.data).to(self.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.criterion = create_loss(config)
        if config.optim.name not in (known := timm.optim.list_optimizers()):
            close = near_matches(config.optim.name, known)
            raise InputError(f"config field optim.name is {config.optim.name!r}, which timm does not know{close}")
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model, config.optim.name, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            "cosine",
            num_epochs=config.epochs,
            warmup_epochs=config.sched.warmup_epochs,
            warmup_lr=config.sched.warmup_lr,
            min_lr=config.sched.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.data.steps,
        )
        self.updates = 0

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16")

    def step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update; returns its loss (scalar) and its logits (B, classes), both fp32."""
        with self.autocast():
            logits = self.forward(x)
        logits = logits.float()
        loss = self.criterion(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.schedule.step_update(self.updates)
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Cross-entropy and accuracy (percent) on the held-out images."""
        self.model.eval()
        window = Window()
        for x, labels in self.data.test_batches():
            with self.autocast():
                logits = self.model(x)
            window.add(F.cross_entropy(logits.float(), labels), logits, labels)
        return window.read()

    def train_epoch(self, epoch: int, log: RunLog) -> dict[str, float]:
        """One pass over the training images; returns the epoch's mean loss, accuracy and throughput."""
        self.model.train()
        whole, window = Window(), Window()
        for i, (x, labels) in enumerate(self.data.train_batches(epoch), 1):
            lr = self.lr
            loss, logits = self.step(x, labels)
            whole.add(loss, logits, labels)
            window.add(loss, logits, labels)
            if i % self.config.log.interval == 0 or i == self.data.steps:
                row = {"epoch": epoch, "step": self.updates, "lr": lr, **window.read()}
                if not math.isfinite(row["loss"]):
                    at = f"update {self.updates}, epoch {epoch}"
                    raise TrainingError(f"the loss is {row['loss']} at {at}: try a lower optim.lr")
                log.train(row)
                window.reset()
        return whole.read()

    def fit(self, run: RunFolder) -> None:
        """Train all epochs; log and save into `run` after each."""
        best = -1.0
        with RunLog(run.path, self.config.epochs * self.data.steps) as log:
            for epoch in range(1, self.config.epochs + 1):
                lr, train = self.lr, self.train_epoch(epoch, log)
                test = self.evaluate()
                is_best, best = test["acc"] > best, max(best, test["acc"])
                row = {"epoch": epoch, "step": self.updates, "lr": lr, "img_s": train["img_s"]}
                for key in ("loss", "acc"):
                    row |= {f"train_{key}": train[key], f"test_{key}": test[key]}
                log.epoch(row, is_best)
                for name in ("best", "last") if is_best else ("last",):
                    run.save(name, self.model)
                run.set_status("running", epoch=epoch, step=self.updates, test_acc=test["acc"], best_acc=best)


def train(config: Config, out: Path, recipe: str) -> RunFolder:
    """Train a config into the new folder `out`, report included; says what it does on the way.

    Raises:
        InputError: the config can't be met, or the folder is taken.
        TrainingError: the loss is no longer finite.
    """
    with cpu_threads(config.threads):
        start = time.perf_counter()
        trainer = Trainer(config)
        updates, parameters = config.epochs * trainer.data.steps, sum(p.numel() for p in trainer.model.parameters())
        info = {"recipe": recipe, "backend": trainer.backend, "parameters": parameters, "updates": updates}
        run = RunFolder.create(out, info | machine() | {"config": to_dict(config)})
        print(
            f"{config.model.name} ({config.model.scheme}), {parameters:,} parameters, on {trainer.device} with the "
            f"{trainer.backend} backend\n{updates} updates of {config.batch} images, peak lr {config.optim.lr:g} after "
            f"{config.sched.warmup_epochs * trainer.data.steps} updates; run folder {run.path}",
            flush=True,
        )
        try:
            trainer.fit(run)
            write_report(run)
        except BaseException as error:  # an interrupt as well: the status must not stay at `running`
            run.set_status("failed", step=trainer.updates, error=f"{type(error).__name__}: {error}")
            raise
        last = read_log(run.path, "epoch")[-1]
        run.set_status("finished", epoch=last["epoch"], step=last["step"], test_acc=last["test_acc"])
        print(
            f"test accuracy {last['test_acc']:.2f} % after {config.epochs} epochs, "
            f"{time.perf_counter() - start:.0f} s; report in {run.path / 'report.md'}"
        )
        return run


def evaluate_run(path: Path, weights: str) -> dict[str, Any]:
    """Evaluate a run's weights (`best` or `last`) on the held-out images: accuracy (percent), loss, number of images.

    Raises:
        InputError: `path` is not a run folder, or its weights are not there or of another model.
    """
    run = RunFolder(path)
    if "config" not in run.info:
        raise InputError(f"{run.path / 'run.json'} has no config; expected the JSON of `mpvg train`")
    config = from_dict(run.info["config"])
    trainer = Trainer(config)
    run.load(weights, trainer.model)
    with cpu_threads(config.threads):
        result = trainer.evaluate()
    images = sum(len(labels) for _, labels in trainer.data.test_batches())
    return {"run": str(path), "weights": weights, "acc": result["acc"], "loss": result["loss"], "images": images}
