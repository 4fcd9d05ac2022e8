"""The training loop: builds everything from a `Config`, trains, evaluates, saves, resumes.

What the command line calls:

    mpvg train --recipe digits --out runs/digits --resume auto
    torchrun --nproc-per-node 8 -m mpvg_kernels train --recipe deit_tiny_in1k --data.root /data/imagenet --resume auto

A run's state is the weights, what the optimizer remembers, and two integers, the epoch and the update in it. Every
random number is a function of the seed and of these: the images' order and augmentation (data/), and what an update
draws (dropout, stochastic depth, mixup), for which the streams are seeded anew in each. So a run that was cut off and
goes on is bitwise the one that was not.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..analysis.diagnostics import has_pos_norms, pos_statistics
from . import InputError, Stopped, TrainingError, distributed
from .checkpoint import LOGS, Checkpoints, Restored, Snapshot
from .config import Config, get, ignored, to_dict
from .config import field_names as config_fields
from .data import Batch, seed_everything
from .distributed import Agreement, World, pick_device, together
from .figures import FIGURES
from .guards import SkippedUpdates
from .metrics import Meter, RunLog, Spikes, check_installed, memory_mb, peak_tflops, read_log
from .model import train_mode
from .optim import create_optimizer, create_schedule, describe
from .report import write_report
from .run_folder import WEIGHTS, RunFolder, machine, print_warning, reason, show
from .signals import Signals
from .tasks import create_task

UPDATE = 1
"""Marks the keys of what an update draws, apart from those of the data."""
POS_IMAGES = 16
"""Images of a process with which the position embedding is looked at while training."""
# What may be another in a resumed run: where and how it computes, not what. (Prefixes of field names.)
MAY_CHANGE = ("device", "threads", "compile", "deterministic", "profile", "dist.", "checkpoint.", "log.")
MAY_CHANGE += ("data.root", "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations")
MAY_CHANGE += ("data.download", "data.workers", "data.max_bad_share")
MAY_CHANGE += ("model.weights", "model.pretrained", "loss.teacher_weights")


@contextlib.contextmanager
def cpu_threads(count: int | None):
    """`count` CPU threads for torch inside (None: as many as there were), the number from before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_deterministic() -> None:
    """Let CUDA use algorithms that repeat bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Trainer:
    """A run's parts (task, data, model, optimizer, schedule) and its state: `updates`, `epoch` and `step`.

    Args:
        config: the run.
        world: this process among others; their connection must be open (`distributed.process_group`).
        device: what config.device means, or None to find out.
        start: load the weights that the config starts from; False where others are loaded anyway.

    Raises:
        InputError: the config names something that there is not.
    """

    def __init__(
        self,
        config: Config,
        world: World = World(),  # noqa: B008
        device: torch.device | None = None,
        start: bool = True,
    ):
        self.config, self.world = config, world
        self.device = device or pick_device(config.device, world)
        self.backend = distributed.pick_backend(self.device, config.compile)
        if config.deterministic and self.device.type == "cuda":
            make_deterministic()
        self.task = create_task(config)
        # Where one fails all do; the first process goes first where there is something to download or to make.
        if (config.data.download or config.data.name == "shapes") and world.size > 1:
            together(world, lambda: self.task.create_data(self.device, world).close(), main_only=True)
        self.data = together(world, lambda: self.task.create_data(self.device, world))
        torch.manual_seed(config.seed)
        self.model: nn.Module = together(world, lambda: self.task.create_model(self.data, start=start)).to(self.device)
        together(world, lambda: self.task.begin(self.data, self.device))
        ema = config.optim
        self.ema = None
        if ema.ema_decay is not None:
            # Under FSDP2 weights are DTensors and batch norms' statistics are not: torch takes no list of both.
            alike = world.size == 1 or config.dist.mode != "fsdp"
            self.ema = ModelEmaV3(self.model, ema.ema_decay, use_warmup=ema.ema_warmup, foreach=alike)
        self.has_pos_norms, self.pos_images = has_pos_norms(self.task.features(self.model)), None
        self.flops = self.task.flops(self.model, self.data, self.device)
        forward = self._distribute()
        self.forward = self.task.compile(forward) if config.compile else forward
        self._wrapped = forward
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = together(world, lambda: create_optimizer(config, self.model))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.schedule = create_schedule(config, self.optimizer, self.data.steps)
        self.updates, self.epoch, self.step = 0, 1, 0
        self.window, self.whole = Meter(self.device, config.task), Meter(self.device, config.task)
        self.spikes, self.best, self.bad_images = Spikes(), -1.0, set()
        self.skipped = SkippedUpdates(self.device)
        self.data_wait = 0.0
        self.schedule.update(0)

    def _distribute(self) -> nn.Module:
        """The model as it is called in training; shared out or wrapped where there are several processes."""
        if self.world.size == 1:
            return self.model
        if self.config.dist.sync_bn:
            if self.device.type != "cuda":
                raise InputError("config field dist.sync_bn is True, which needs GPUs")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if self.config.dist.mode == "ddp":
            return distributed.replicate(self.model, self.device, self.config.deterministic)
        for model in (self.model, *([self.ema.module] if self.ema else [])):
            distributed.shard(model)
        return self.model

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.config.total_epochs * self.data.steps

    @property
    def lr(self) -> float:
        """The learning rate of the next update: the head's, where parts have their own."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        start = time.perf_counter()
        batch = next(batches)
        self.data_wait += time.perf_counter() - start
        return batch

    def update(self, batches: Iterator[Batch]) -> Tensor:
        """One update from the next micro-batches; returns its mean loss on this process (scalar, on the device)."""
        parts, sums = self.data.accumulation, []
        for part in range(parts):
            batch = self._next(batches)
            if part == 0 and self._looks_at_pos(self.updates + 1):
                self.pos_images = self.task.images(batch, POS_IMAGES)
            seed_everything(self.config.seed, UPDATE, self.updates, self.world.rank, part)
            with distributed.gradients_stay(self._wrapped, part + 1 < parts):
                loss, counts = self.task.loss(self.forward, batch, self.device)
                # Where the loss is not finite every gradient shall be, on every process: then all skip the update.
                finite = loss.detach().isfinite()
                self.scaler.scale(loss * torch.where(finite, 1 / parts, math.nan)).backward()
            sums.append(torch.cat([(loss.detach() * len(batch.x)).double().view(1), counts.double()]))
            images = len(batch.x) * parts
        loss, *counts = torch.stack(sums).sum(0).unbind()
        bad_loss = ~loss.isfinite()
        norm, skipped = self._apply_gradients(bad_loss)
        # In fp64. A loss or norm that is not finite counts as 0.
        counted = (~bad_loss).double()
        counts = [count.nan_to_num(0.0, 0.0, 0.0) * counted for count in counts]
        row = torch.stack([loss, *counts, images * counted, norm.double(), torch.ones_like(loss), skipped.double()])
        row.nan_to_num_(0.0, 0.0, 0.0)
        self.window.add(row)
        self.whole.add(row)
        self.updates += 1
        self.schedule.update(self.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        return loss / images

    def _apply_gradients(self, bad_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Step the optimizer, unless a gradient is not finite: the gradient's norm, and whether it was not (scalars).

        Fused optimizers skip by themselves, so that the GPU is not waited for; others have to be asked to.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([grad for p in self.trained if (grad := p.grad) is not None])
        norm = distributed.whole(norm)
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.trained, self.config.optim.clip_grad, norm)
        skipped = ~norm.isfinite()
        if self.scaler.is_enabled():  # skips overflows by itself, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped.add(skipped, bad_loss, self.updates)
        return norm, skipped

    def _looks_at_pos(self, update: int) -> bool:
        """Whether the PE is looked at after this update (from 1): the first, every so many, the last."""
        interval = self.config.log.pos_interval
        if interval is None or not self.has_pos_norms:
            return False
        return update == 1 or update % interval == 0 or update == self.total

    def pos_statistics(self) -> dict[str, list] | None:
        """`analysis.diagnostics.pos_statistics` of the model as it is, means over the processes, if the last update
        asked for it: on the first images of its first micro-batch, not mixed or erased. Every process has to ask.
        """
        images, self.pos_images = self.pos_images, None
        if images is None:
            return None
        with self.task.autocast(self.device):
            found = pos_statistics(self.task.features(self.model), images)
        for key in ("pos_norm", "correlation") if self.world.size > 1 else ():
            # A number that one process does not have is nan, and so is the mean.
            mine = torch.tensor([math.nan if v is None else v for v in found[key]], dtype=torch.float64)
            mean = (distributed.add_up(mine, self.world) / self.world.size).tolist()
            found[key] = [value if math.isfinite(value) else None for value in mean]
        return found

    def check(self) -> None:
        """Stop where too many updates in a row had to be skipped. Waits for the device.

        Raises:
            TrainingError: says since when, on which process, and with which images.
        """
        count, first, bad_loss = self.skipped.read()
        if count <= self.config.optim.max_skipped:
            return
        epoch, step = 1 + first // self.data.steps, first % self.data.steps
        told = distributed.gather((bad_loss, self.data.files(epoch, step)), self.world)
        rank = next((rank for rank, (bad, _) in enumerate(told) if bad), 0)
        files = told[rank][1]
        what = "loss" if told[rank][0] else "gradient"
        error = TrainingError(
            f"the {what} was not finite in {count} updates in a row, from update {first + 1} (epoch {epoch}) on, on "
            f"process {rank}, with the images {', '.join(files[:8])}{', ...' if len(files) > 8 else ''}; try a lower "
            "optim.lr, a longer warm-up, optim.clip_grad, or amp bf16 or none"
        )
        error.shared = True
        raise error

    @torch.no_grad()
    def evaluate(self, model: nn.Module | None = None, on_batch=lambda: None) -> dict[str, float]:
        """`task.figures.evaluated` on the held-out images, each counted once over all processes.

        Args:
            model: what is evaluated, by default the model as it is (`self.ema.module` is its average).
            on_batch: called at every batch.
        """
        model = self.model if model is None else model
        distributed.broadcast_buffers(model, self.world)
        return self.task.evaluate(model.eval(), self.data, self.world, self.device, on_batch)

    # ---- state

    def snapshot_bytes(self) -> int:
        """About how large a checkpoint is: weights, their average, and what the optimizer remembers (two of each)."""
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        return weights * (1 + (self.ema is not None) + 2)

    def snapshot(self, log: RunLog) -> Snapshot | None:
        """All that a resume needs; every process has to ask, and the first gets it."""
        model = distributed.whole_state(self.model)
        ema = distributed.whole_state(self.ema.module) if self.ema is not None else None
        optimizer = distributed.optimizer_state(self.optimizer, self.model)
        meters = distributed.gather([m.sums.cpu() for m in (self.window, self.whole)], self.world)
        if self.world.rank:
            return None
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "meters": meters,
            "spikes": dict(vars(self.spikes)),
            "skipped": self.skipped.state,
            "best": self.best,
            "bad_images": sorted(self.bad_images),
            "config": to_dict(self.config),
        }
        return Snapshot(self.updates, model, ema, state, log.files)

    def restore(self, restored: Restored) -> None:
        """Take up the state that `snapshot` gave, also with another number of processes.

        Raises:
            InputError: it is of another model.
        """
        state = restored.state
        try:
            distributed.load_whole_state(self.model, restored.model)
            if self.ema is not None and restored.ema is not None:
                distributed.load_whole_state(self.ema.module, restored.ema)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{restored.path} is of another model than the config's ({reason})") from None
        distributed.load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.updates, self.epoch, self.step = restored.step, state["epoch"], state["step"]
        self.best, self.bad_images = state["best"], set(state["bad_images"])
        vars(self.spikes).update(state["spikes"])
        self.skipped.state = state["skipped"].to(self.device)
        meters = state["meters"]
        if len(meters) != self.world.size:  # their sum is the first process's
            total = [torch.stack(each).sum(0) for each in zip(*meters, strict=True)]
            shared = self.window.shared  # the rest is the same on every process
            total = [each * shared + one * (1 - shared) for each, one in zip(total, meters[0], strict=True)]
            rest = [one * (1 - shared) for one in meters[0]]
            meters = [total] + [rest] * (self.world.size - 1)
        for meter, sums in zip((self.window, self.whole), meters[self.world.rank], strict=True):
            meter.sums.copy_(sums)
        self.schedule.update(self.updates)


class Run:
    """A trainer at work in a run folder: logs, checkpoints, signals.

    Args:
        trainer: what is trained.
        signals: where a signal is told.
        log: where numbers go.
        folder, checkpoints: the run folder and its checkpoints; None on every process but the first.
    """

    def __init__(
        self,
        trainer: Trainer,
        signals: Signals,
        log: RunLog,
        folder: RunFolder | None,
        checkpoints: Checkpoints | None,
    ):
        self.trainer, self.signals, self.log = trainer, signals, log
        self.folder, self.checkpoints = folder, checkpoints
        self.agree = Agreement(trainer.world)
        self.peak = peak_tflops(trainer.device, trainer.config.amp, trainer.config.log.peak_tflops)

    def fit(self) -> None:
        """Train what is left of the run.

        Raises:
            Stopped: a signal came; the run is saved.
            TrainingError: it can't go on.
        """
        trainer = self.trainer
        with self._profiler() as profiler:
            for epoch in range(trainer.epoch, trainer.config.total_epochs + 1):
                trainer.epoch = epoch
                img_s = self._train_epoch(profiler)
                self._end_epoch(img_s)

    def _train_epoch(self, profiler) -> float:
        """The updates that are left of the epoch; returns images a second."""
        trainer, config = self.trainer, self.trainer.config
        train_mode(trainer.model, config)
        batches = trainer.data.train_batches(trainer.epoch, trainer.step)
        begin, first = time.perf_counter(), trainer.step
        start, since, trainer.data_wait = begin, first, 0.0
        while trainer.step < trainer.data.steps:
            self.poll()
            lr = trainer.lr
            trainer.update(batches)
            trainer.step += 1
            profiler.step()
            if trainer.step % config.log.interval == 0 or trainer.step == trainer.data.steps:
                self._log_interval(lr, trainer.step - since, start)
                start, since, trainer.data_wait = time.perf_counter(), trainer.step, 0.0
            elif trainer.device.type == "cpu":  # nothing to wait for
                trainer.check()
            if (found := trainer.pos_statistics()) is not None:
                self.log.pos({"epoch": trainer.epoch, "step": trainer.updates, **found})
            interval = config.checkpoint.interval
            if interval is not None and trainer.updates % interval == 0 and trainer.step < trainer.data.steps:
                if trainer.data.ordered:  # a stream can be entered at its beginning only
                    self.save()
        return round((trainer.step - first) * config.batch / (time.perf_counter() - begin), 1)

    def _log_interval(self, lr: float, updates: int, start: float) -> None:
        """Log the updates since the last call, `updates` of them done since `start`. Waits for the device."""
        trainer, world = self.trainer, self.trainer.world
        trainer.check()
        self._log_bad_images()
        row = {"epoch": trainer.epoch, "step": trainer.updates, "lr": lr, **trainer.window.read(world)}
        images = row.pop("images")
        seconds = time.perf_counter() - start
        img_s = updates * trainer.config.batch / seconds
        tflops = 3e-12 * trainer.flops * img_s / world.size  # backward is twice forward
        row |= {"img_s": round(img_s, 1), "data_wait": round(trainer.data_wait / seconds, 4)}
        row |= {"memory_mb": round(memory_mb(trainer.device), 1), "tflops": round(tflops, 4)}
        if self.peak is not None:
            row["mfu"] = round(tflops / self.peak, 4)
        if trainer.scaler.is_enabled():
            row["loss_scale"] = trainer.scaler.get_scale()
        if images:
            if trainer.spikes(row["loss"]):
                self.log.write("spike", {"epoch": row["epoch"], "step": row["step"], "loss": row["loss"]})
                self.log.warn(f"the loss rose to {row['loss']:.4f} in the updates up to {row['step']}")
        if row["skipped"]:
            self.log.write("skipped", {"epoch": row["epoch"], "step": row["step"], "updates": row["skipped"]})
            self.log.warn(
                f"{row['skipped']} of the updates up to {row['step']} were skipped: loss or gradient was not finite"
            )
        self.log.train(row)
        trainer.window.reset()

    def _log_bad_images(self) -> None:
        """List the images, of any process, that could not be read for the first time."""
        trainer, world = self.trainer, self.trainer.world
        bad = trainer.data.take_bad()
        if not distributed.add_up(torch.tensor(len(bad)), world):
            return
        every = [row for rows in distributed.gather(bad, world) for row in rows]
        for row in sorted(every, key=lambda row: (row["epoch"] or 0, row["position"])):
            if row["file"] not in trainer.bad_images:
                trainer.bad_images.add(row["file"])
                self.log.write("bad_image", row)
                self.log.warn(f"{row['file']} can't be used: {row['reason']}")

    def _end_epoch(self, img_s: float) -> None:
        """Evaluate, log, save."""
        trainer, config, epoch = self.trainer, self.trainer.config, self.trainer.epoch
        train = trainer.whole.read(trainer.world)
        row = {"epoch": epoch, "step": trainer.updates, "lr": trainer.schedule.lr_at((epoch - 1) * trainer.data.steps)}
        figures, is_best = trainer.task.figures, False
        row |= {f"train_{figure.key}": train[figure.key] for figure in figures.trained}
        if epoch % config.eval_interval == 0 or epoch == config.total_epochs:
            models = {"test": trainer.model} | ({"ema": trainer.ema.module} if trainer.ema else {})
            for name, model in models.items():
                found = trainer.evaluate(model, self.poll)
                row |= {f"{name}_{figure.key}": found[figure.key] for figure in figures.evaluated}
            self._log_bad_images()
            is_best = row[f"test_{figures.main.key}"] > trainer.best
            trainer.best = max(trainer.best, row[f"test_{figures.main.key}"])
        row |= {"grad_norm": train["grad_norm"], "skipped": train["skipped"], "bad_images": len(trainer.bad_images)}
        self.log.epoch(row | {"img_s": img_s}, is_best)
        trainer.whole.reset()
        trainer.epoch, trainer.step = epoch + 1, 0
        self._save_weights(is_best)
        self.save()
        if self.folder is not None:
            known = {name: row[name] for part in ("test", "ema") if (name := f"{part}_{figures.main.key}") in row}
            self.folder.set_status("running", epoch=epoch, step=trainer.updates, **self._best(), **known)

    def _best(self) -> dict[str, float]:
        """What status.json says of the best evaluation so far."""
        return {f"best_{self.trainer.task.figures.main.key}": self.trainer.best}

    def _save_weights(self, is_best: bool) -> None:
        """Write last/, and best/ and ema/ where there is something new."""
        trainer = self.trainer
        weights = distributed.whole_state(trainer.model)
        average = distributed.whole_state(trainer.ema.module) if trainer.ema is not None else None
        if self.folder is not None:
            for name in ("best", "last") if is_best else ("last",):
                self.folder.save(name, trainer.model, weights)
            if average is not None:
                self.folder.save("ema", trainer.model, average)

    def save(self, background: bool = True) -> None:
        """Make a checkpoint. A disk that is full is warned about, and training goes on."""
        self._log_bad_images()
        snapshot = self.trainer.snapshot(self.log)
        if self.checkpoints is not None:
            self.checkpoints.save(snapshot, background=background)

    def poll(self) -> None:
        """Save and stop where a signal has told any process to.

        Raises:
            Stopped: after the checkpoint.
        """
        if not self.agree(self.signals.received is not None):
            return
        trainer, goes_on = self.trainer, "the same command with --resume auto goes on"
        where = f" in {self.folder.path}" if self.folder is not None else ""
        if trainer.data.ordered or trainer.step in (0, trainer.data.steps):
            self.save(background=False)
            done = f"saved{where} at update {trainer.updates} of {trainer.total}; {goes_on}"
        else:
            done = (
                f"stopped at update {trainer.updates} of {trainer.total}; {goes_on}{where} from the beginning of epoch "
            )
            done += f"{trainer.epoch}, as a stream of images can't be entered in the middle"
        if self.folder is not None:
            self.folder.set_status("preempted", epoch=trainer.epoch, step=trainer.updates, **self._best())
        stopped = Stopped(f"{self.signals.received or 'a signal to another process'}: {done}")
        stopped.shared = True
        raise stopped

    def _profiler(self):
        """A torch profiler over a few updates where one is asked for; something that does nothing otherwise."""
        if not self.trainer.config.profile or self.folder is None:
            return _NoProfiler()
        out = self.folder.path / "profile"

        def write(profile: torch.profiler.profile) -> None:
            out.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(out / "trace.json"))
            key = "self_cuda_time_total" if self.trainer.device.type == "cuda" else "self_cpu_time_total"
            (out / "kernels.txt").write_text(profile.key_averages().table(sort_by=key, row_limit=40))
            self.log.say(f"profile of 4 updates in {out}")

        # The first updates allocate, tune and compile.
        schedule = torch.profiler.schedule(wait=3, warmup=1, active=4, repeat=1)
        return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)


class _NoProfiler(contextlib.nullcontext):
    def __enter__(self):
        return self

    def step(self) -> None:
        pass


# ---- what the command line calls


def train(config: Config, out: Path | None, recipe: str, resume: str = "never") -> RunFolder | None:
    """Train a config in a run folder, report included; says what it does on the way.

    Args:
        config: the run.
        out: run folder; None is runs/RECIPE-TIME, or runs/RECIPE where `resume` is auto.
        recipe: the recipe's name, for the record.
        resume: never (a new folder), auto (go on from the folder's newest checkpoint, or start), or the path of a
            run folder or checkpoint to go on from.

    Returns:
        The run folder; None on every process but the first.

    Raises:
        InputError: the config can't be met, the folder is taken, or it holds another run.
        TrainingError: it can't go on.
        Stopped: a signal came; the run is saved.
    """
    world = distributed.find_world()
    device = pick_device(config.device, world)
    with Signals() as signals, cpu_threads(config.threads), distributed.process_group(world, device, config):
        start = time.perf_counter()
        together(world, lambda: check_installed(config.log), main_only=True)
        trainer, folder, checkpoints = _prepare(config, out, recipe, resume, world, device)
        main = folder is not None
        try:
            with RunLog(
                folder.path if main else None,
                trainer.total,
                trainer.updates,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                config=to_dict(config),
                task=config.task,
            ) as log:
                Run(trainer, signals, log, folder, checkpoints).fit()
            if main:
                checkpoints.wait()
                _report(folder)
        except Stopped:
            raise
        except BaseException as error:  # an interrupt as well: the status must not stay at `running`
            if main:
                folder.set_status("failed", step=trainer.updates, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            trainer.data.close()
            if main:
                checkpoints.wait()
        if not main:
            return None
        # Not there if the log was removed, or the disk was full to the end.
        last = next((row for row in read_log(folder.path, "epoch") if row["step"] == trainer.updates), {})
        main_figure = trainer.task.figures.main
        test, ema = (f"{part}_{main_figure.key}" for part in ("test", "ema"))
        figures = {name: last[name] for name in (test, ema) if last.get(name) is not None}
        folder.set_status("finished", epoch=config.total_epochs, step=trainer.updates, **figures)
        if not figures:
            lost = f"{folder.path / 'log.jsonl'} has lost the {main_figure.name}"
            show(f"finished; {lost}, which `mpvg eval {folder.path}` finds")
            return folder
        average = f", EMA {main_figure.show(figures[ema])}" if ema in figures else ""
        show(
            f"test {main_figure.name} {main_figure.show(last[test])}{average} after {config.total_epochs} epochs, "
            f"{time.perf_counter() - start:.0f} s; report in {folder.path / 'report.md'}"
        )
        return folder


def _report(folder: RunFolder) -> None:
    key = f"test_{FIGURES[folder.config().task].main.key}"
    if not any(row.get(key) is not None for row in read_log(folder.path, "epoch")):
        print_warning(f"{folder.path / 'log.jsonl'} has no evaluated epoch, so there is no report.md")
        return
    try:
        write_report(folder)
    except OSError as error:  # the disk is full; all that it says is in the logs
        print_warning(f"{folder.path / 'report.md'} could not be written ({error.strerror})")


def _prepare(
    config: Config, out: Path | None, recipe: str, resume: str, world: World, device: torch.device
) -> tuple[Trainer, RunFolder | None, Checkpoints | None]:
    """The trainer where it begins or goes on; on the first process the run folder and its checkpoints too."""
    point = together(world, lambda: _resume_point(config, out, recipe, resume), main_only=True)
    out, found = point or (out, None)
    restored = found and found.restored
    path = distributed.from_main(restored and restored.path, world)
    trainer = Trainer(config, world, device, start=path is None)
    try:
        opened = together(world, lambda: _open(trainer, out, recipe, found), main_only=True)
        folder, checkpoints = opened or (None, None)
        if path is not None:
            try:
                together(world, lambda: trainer.restore(restored or _checkpoints(run_of(path), config).open(path)))
            except InputError as error:
                if folder is not None:
                    folder.set_status("failed", step=restored.step, error=f"InputError: {error}")
                raise
        if folder is not None:
            _say(trainer, folder, path)
    except BaseException:
        trainer.data.close()
        raise
    return trainer, folder, checkpoints


class _Found(NamedTuple):
    """Where a run goes on: the folder that it was in, and its checkpoint, if there is a whole one."""

    folder: RunFolder
    restored: Restored | None


def _checkpoints(folder: RunFolder, config: Config) -> Checkpoints:
    return Checkpoints(folder, config.checkpoint.keep, warn=print_warning)


def _resume_point(config: Config, out: Path | None, recipe: str, resume: str) -> tuple[Path, _Found | None]:
    """On the first process: the run folder's path, and where the run goes on, None for a new one."""
    if resume not in ("never", "auto"):
        folder = run_of(Path(resume))
        if out is None or out.resolve() == folder.path.resolve():
            out = folder.path
            folder.lock()
        return out, _Found(folder, _checkpoints(folder, config).open(resume))
    if out is None:
        out = Path("runs") / (recipe if resume == "auto" else time.strftime(f"{recipe}-%Y%m%d-%H%M%S"))
    if resume == "never" or not (out / "run.json").exists():
        return out, None
    folder = RunFolder(out)
    folder.lock()
    newest = _checkpoints(folder, config).newest()
    for sentence in newest[1] if newest else ():
        print_warning(sentence)
    return out, _Found(folder, newest[0] if newest else None)


def _open(trainer: Trainer, out: Path, recipe: str, found: _Found | None) -> tuple[RunFolder, Checkpoints]:
    """On the first process: the run folder, made or taken up, its logs cut back to where the run goes on."""
    config = trainer.config
    info = {"recipe": recipe, "backend": trainer.backend, "updates": trainer.total, "flops": trainer.flops}
    info |= {"parameters": sum(p.numel() for p in trainer.model.parameters()), "class_names": trainer.data.class_names}
    info |= machine() | {"config": to_dict(config)}
    if found is None:
        folder = RunFolder.create(out, info)
    else:
        folder = found.folder
        check_same_run(folder, trainer)
        if out.resolve() != folder.path.resolve():
            folder = RunFolder.create(out, info)
            _copy_past(found.folder, folder, found.restored)
    restored = found and found.restored
    checkpoints = _checkpoints(folder, config)
    weights = sum(t.nbytes for t in trainer.model.state_dict().values())
    try:
        checkpoints.require_space(trainer.snapshot_bytes(), weights * (3 if trainer.ema else 2))
    except InputError as error:
        folder.set_status("failed", error=f"InputError: {error}")
        raise
    checkpoints.cut_logs(restored.state if restored else None)
    step = restored.step if restored else 0
    folder.note_start(
        step=step, processes=trainer.world.size, device=str(trainer.device), command=info["command"], **info["machine"]
    )
    folder.set_status("running", step=step)
    return folder, checkpoints


def _copy_past(source: RunFolder, folder: RunFolder, restored: Restored) -> None:
    """Copy a run's logs into another folder, and those of its weights that are no younger than the checkpoint."""
    try:
        for name in LOGS:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, folder.path / name)
        epochs = read_log(source.path, "epoch")
        main = FIGURES[source.config().task].main
        best = max((row.get(f"test_{main.key}", -1.0) for row in epochs), default=-1.0)
        of_then = dict.fromkeys(WEIGHTS, all(row["step"] <= restored.step for row in epochs))
        of_then["best"] = best == restored.state["best"]
        for name in WEIGHTS:
            if of_then[name] and (source.path / name).is_dir():
                shutil.copytree(source.path / name, folder.path / name)
    except OSError as error:
        raise InputError(f"{source.path} can't be copied to {folder.path} ({reason(error)})") from None
    if epochs and not of_then["best"]:
        print_warning(
            f"{source.path / 'best'} is of a later update: {folder.path / 'best'} comes with the first {main.name} "
            f"above {main.show(restored.state['best'])}"
        )


def run_of(path: Path) -> RunFolder:
    """The run folder that a path is, or is the checkpoint of."""
    return RunFolder(path if (path / "run.json").exists() or path.parent.name != "checkpoints" else path.parent.parent)


def check_same_run(folder: RunFolder, trainer: Trainer) -> None:
    """Raise InputError where the folder's run is not the one that `trainer` would go on with."""
    check_same_config(folder, trainer.config)
    check_classes(folder, trainer.data.class_names)


def check_same_config(folder: RunFolder, config: Config) -> None:
    """Raise InputError where the folder's run is of another config; what MAY_CHANGE names is not compared."""
    saved = folder.config()
    for name in config_fields():
        before, now = get(saved, name), get(config, name)
        if before != now and not name.startswith(MAY_CHANGE):
            raise InputError(
                f"{folder.path} holds a run with {name} {before!r}, and the config now says {now!r}: go on with the "
                "same, or give a new run another folder with --out"
            )


def check_classes(folder: RunFolder, names: list[str] | None) -> None:
    """Raise InputError where the data's classes are not those that the folder's run was trained on."""
    before = folder.info.get("class_names")
    if before is None or names is None or before == names:
        return
    parts = [("without", sorted(set(before) - set(names))), ("with", sorted(set(names) - set(before)))]
    said = " and ".join(f"{word} {', '.join(n[:5])}{', ...' if len(n) > 5 else ''}" for word, n in parts if n)
    raise InputError(
        f"the data has other classes than {folder.path} was trained on: {len(names)} instead of {len(before)}, "
        f"{said or 'in another order'}; look at data.root"
    )


def _say(trainer: Trainer, folder: RunFolder, restored_from: Path | None) -> None:
    """Print what is about to be trained."""
    config, world = trainer.config, trainer.world
    for sentence in ignored(config):
        print_warning(sentence)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    where = (
        str(trainer.device)
        if world.size == 1
        else f"{world.size} processes ({config.dist.mode}), {trainer.device.type}"
    )
    show(
        f"{config.model.name} ({config.model.scheme}), {parameters:,} parameters, "
        f"{trainer.flops / 1e9:.2f} GFLOP an image forward, on {where} with the {trainer.backend} backend\n"
        f"{describe(config, trainer.data.steps, world, trainer.optimizer)}\nrun folder {folder.path}"
        + (f", goes on from {restored_from.name}" if restored_from else ""),
    )
