"""A smoke run: a run's own config cut to seconds, to see that data, model, optimizer and machine fit together.

    mpvg train --recipe deit_tiny_in1k --data.root /data/imagenet --out runs/deit_tiny --smoke

makes two updates of a small batch, evaluates, saves and reports, in a folder of its own, runs/deit_tiny-smoke-TIME.
"""

import time
from dataclasses import replace
from pathlib import Path

from .config import Config, Sched, field_names, get
from .data.order import accumulation
from .distributed import World
from .optim import learning_rates

BATCH = {"classification": 4, "detection": 2, "segmentation": 2}
"""Images of a process, even for mixup; a tenth of a second at 224 pixels, ten seconds of a CPU for UperNet at 512."""
TEST_IMAGES = {"classification": 8, "detection": 2, "segmentation": 2}
UPDATES = 2


def smoke(config: Config, world: World) -> Config:
    """The config of a smoke run of `config`: what takes long is cut, everything else stays.

    The peak learning rate stays the run's own, though the batch is smaller. The smoke run of a smoke run is itself.

    Raises:
        InputError: the whole run's batch can't be divided, or its learning rates are not in order.
    """
    accumulation(config, world)
    rates = learning_rates(config)
    peak = rates["peak"]
    curve = replace(
        config.sched, per="update", warmup_epochs=0, warmup_updates=None, cooldown_epochs=0, scale_with_batch=False
    )
    # What has no effect without a warm-up is put back, so that nothing warns of it.
    curve = replace(curve, warmup_prefix=False, warmup_lr=min(peak, Sched.warmup_lr), min_lr=min(peak, rates["min"]))
    workers = config.data.workers if config.data.name == "digits" else min(config.data.workers, 1)
    return replace(
        config,
        epochs=1,
        batch=min(config.batch, BATCH[config.task] * world.size),
        data=replace(config.data, workers=workers, epoch_updates=UPDATES, max_test_images=TEST_IMAGES[config.task]),
        optim=replace(config.optim, lr=peak, lr_base_batch=None),
        sched=curve,
        log=replace(config.log, interval=1, pos_interval=config.log.pos_interval and 1),
    )


def cuts(before: Config, after: Config) -> str:
    """One sentence: `smoke run, cut to seconds: epochs 300 to 1, batch 1024 to 4, ...`."""
    changed = [n for n in field_names() if get(before, n) != get(after, n)]
    parts = [f"{name} {get(before, name)} to {get(after, name)}" for name in changed]
    return f"smoke run, cut to seconds: {', '.join(parts) or 'nothing, it is one already'}"


def run_folder(out: Path | None, recipe: str, resume: str) -> Path | None:
    """A new folder beside the one that the run itself would have, so that the two never mix.

    None where a smoke run goes on in its own, which `resume` names.
    """
    if out is None and resume not in ("never", "auto"):
        return None
    out = out or Path("runs", recipe)
    return out.with_name(time.strftime(f"{out.name}-smoke-%Y%m%d-%H%M%S"))
