"""Runs that are killed, stopped, or out of disk, and go on: to the same bits as the run that nothing happened to."""

import csv
import json
import random
import re
import shutil
import signal

import pytest
import safetensors.torch
import torch
from PIL import Image
from warm_process import WarmProcess

from mpvg_kernels.train import checkpoint, metrics

pytestmark = pytest.mark.xdist_group(__name__)

# Everything that draws random numbers, or has a state, is on.
ARGS = """--recipe digits --device cpu --model.patch_size 8 --model.embed_dim 24 --model.depth 2 --model.num_heads 2
--model.drop_path_rate 0.2 --model.drop_rate 0.1 --data.name folder --data.img_size 24 24 --data.max_bad_share 0.1
--aug.auto_augment rand-m9-mstd0.5-inc1 --aug.erase_prob 0.25 --aug.mixup 0.8 --aug.cutmix 1.0 --aug.repeats 2
--batch 8 --epochs 4 --sched.warmup_epochs 1 --optim.ema_decay 0.9 --optim.clip_grad 1.0 --loss.smoothing 0.1
--checkpoint.interval 3 --log.interval 2 --log.pos_interval 5 --log.tensorboard False""".split()
UPDATES, STEPS = 32, 8


@pytest.fixture(scope="module")
def warm():
    with WarmProcess() as process:
        yield process


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 64 training images in two classes, three of them unreadable, and 12 held-out ones."""
    root, draw = tmp_path_factory.mktemp("images"), random.Random(0)
    for split, count in (("train", 32), ("val", 6)):
        for label, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                size = draw.randint(24, 40), draw.randint(24, 40)
                image = Image.new("RGB", size, tuple(max(0, c + draw.randint(-30, 30)) for c in colour))
                image.paste((0, 255, 0), (draw.randint(0, 10), draw.randint(0, 10), 15, 15))
                image.save(folder / f"{i:02}.jpg")
    whole = (root / "train" / "red" / "05.jpg").read_bytes()
    (root / "train" / "red" / "05.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "blue" / "11.jpg").write_bytes(b"")
    (root / "val" / "blue" / "03.jpg").write_text("not an image")
    return root


def command(images, folder, *more) -> list:
    return ["train", *ARGS, "--data.root", images, "--out", folder, "--resume", "auto", *more]


@pytest.fixture(scope="module")
def uninterrupted(warm, images, tmp_path_factory):
    """The run folders of whole runs by the number of processes, made when asked for."""
    made = {}

    def get(processes: int):
        if processes not in made:
            folder = tmp_path_factory.mktemp("whole") / f"run{processes}"
            out = folder.with_suffix(".txt")
            code = warm.run(command(images, folder, "--data.workers", 0), out, processes=processes)
            assert code == 0, out.read_text()
            made[processes] = folder
        return made[processes]

    return get


def contents(folder) -> dict:
    """All that a run leaves, times aside."""
    weights = {name: folder / name / "model.safetensors" for name in checkpoint.WEIGHTS}
    found = {name: safetensors.torch.load_file(path) for name, path in weights.items()}
    newest = max((folder / "checkpoints").glob("step-*"))
    found["state"] = torch.load(newest / "state.pt", weights_only=True)["state"]
    del found["state"]["logs"]  # sizes: the times in them are of different lengths
    found["state"]["config"] = None  # the number of workers may differ
    found["step"] = newest.name
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    found["log"] = [{k: v for k, v in line.items() if k not in metrics.TIMES} for line in lines]
    with open(folder / "metrics.csv") as file:
        found["csv"] = [{k: v for k, v in row.items() if k not in metrics.TIMES} for row in csv.DictReader(file)]
    return found


def differences(a, b, path="") -> list[str]:
    """Where two nested structures differ, tensors bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}/{name}" for name in a.keys() ^ b.keys()]
        return found + [d for name in a.keys() & b.keys() for d in differences(a[name], b[name], f"{path}/{name}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


# ---- killed


def test_killed_twenty_times(warm, images, uninterrupted, tmp_path):
    """Again and again until the run ends, with any number of workers; then the next run."""
    out, draw, killed, runs = tmp_path / "out.txt", random.Random(1), 0, 0
    first = [("fsync", 2), ("rename", 2), ("evaluation", 1), ("snapshot", 2)]  # whatever the draw
    most = {"update": 6, "optimizer": 6, "evaluation": 8, "snapshot": 4, "fsync": 12, "rename": 5}
    while killed < 20 or (tmp_path / f"run{runs}").exists():
        moment = draw.choice(list(most))
        kill = first[killed] if killed < len(first) else (moment, draw.randint(1, most[moment]))
        argv = command(images, tmp_path / f"run{runs}", "--data.workers", draw.choice([0, 0, 0, 1, 2]))
        code = warm.run(argv, out, patch={"kill": kill} if killed < 20 else None)
        assert code == 0 or code == -9, out.read_text()
        if code == 0:
            assert differences(contents(tmp_path / f"run{runs}"), contents(uninterrupted(1))) == []
            runs += 1
        killed += code == -9


def test_two_processes_killed(warm, images, uninterrupted, tmp_path):
    folder, out, draw = tmp_path / "run", tmp_path / "out.txt", random.Random(2)
    kills = [("evaluation", 1), ("fsync", 3), ("update", 5), ("snapshot", 2), ("optimizer", 7), ("rename", 3)]
    for rank, kill in enumerate(kills):
        patched = 0 if kill[0] in ("fsync", "rename") else rank % 2  # the first process alone writes
        workers = draw.choice([0, 0, 1])
        argv = command(images, folder, "--data.workers", workers)
        code = warm.run(argv, out, processes=2, patch={"kill": kill}, patched=patched)
        assert code == -9, out.read_text()
    assert warm.run(command(images, folder), out, processes=2) == 0, out.read_text()
    assert differences(contents(folder), contents(uninterrupted(2))) == []


def test_a_position_that_is_not_restored_is_seen(warm, images, uninterrupted, tmp_path):
    # The negative control of the two tests above: were nothing compared, or nothing resumed, they would pass.
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    argv = command(images, folder, "--data.workers", 0)
    # The save after update 6 has waited until that after update 3 was written.
    assert warm.run(argv, out, patch={"kill": ("update", 7)}) == -9
    assert warm.run(argv, out, patch={"forget": True}) == 0, out.read_text()
    found = differences(contents(folder), contents(uninterrupted(1)))
    assert any(path.startswith("/last/") for path in found) and any(path.startswith("/log") for path in found)


def test_the_newest_checkpoint_is_damaged(warm, images, uninterrupted, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    argv = command(images, folder, "--data.workers", 0)
    assert warm.run(argv, out, patch={"kill": ("update", 14)}) == -9
    *_, before, newest = sorted((folder / "checkpoints").glob("step-*"))
    with open(newest / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    out.unlink()
    assert warm.run(argv, out) == 0, out.read_text()
    text = out.read_text()
    assert re.search(rf"warning: .*{newest.name}.*model.safetensors", text) and f"goes on from {before.name}" in text
    assert differences(contents(folder), contents(uninterrupted(1))) == []


# ---- stopped by a signal


@pytest.mark.parametrize("moment, count", [("update", 6), ("evaluation", 2)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_the_run_goes_on(warm, images, uninterrupted, tmp_path, moment, count, processes):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    argv = command(images, folder, "--data.workers", 0)
    told = {"signal": (moment, count, int(signal.SIGTERM if processes == 1 else signal.SIGUSR1))}
    # With two processes only the second is told.
    code = warm.run(argv, out, processes=processes, patch=told, patched=processes - 1)
    assert code == 75, out.read_text()
    status = json.loads((folder / "status.json").read_text())
    step = STEPS if moment == "evaluation" else count + processes - 1
    assert (status["state"], status["step"]) == ("preempted", step)
    assert re.search(
        rf"saved in {folder} at update {step} of {UPDATES}; the same command with --resume", out.read_text()
    )
    assert warm.run(argv, out, processes=processes) == 0, out.read_text()
    assert differences(contents(folder), contents(uninterrupted(processes))) == []


def test_a_second_signal_ends_at_once(warm, images, tmp_path):
    out = tmp_path / "out.txt"
    twice = {"signal": ("update", 2, int(signal.SIGINT)), "again": ("snapshot", 1, int(signal.SIGINT))}
    assert warm.run(command(images, tmp_path / "run"), out, patch=twice) == 130
    assert "SIGINT: saving at the next update" in out.read_text()


# ---- another number of processes


def test_processes_share_a_batch_and_their_number_may_change(warm, tmp_path):
    """From 2 to 1 to 3 processes, in the middle of epochs: nothing here depends on the process but rounding."""
    plain = """train --recipe digits --device cpu --model.patch_size 4 --model.embed_dim 32 --model.depth 2
    --model.num_heads 2 --batch 96 --epochs 3 --sched.warmup_epochs 1 --log.tensorboard False --resume auto""".split()
    out = tmp_path / "out.txt"
    assert warm.run([*plain, "--out", tmp_path / "one"], out) == 0, out.read_text()
    argv = [*plain, "--out", tmp_path / "many"]
    stop = {"signal": ("update", 9, int(signal.SIGTERM))}
    assert [warm.run(argv, out, processes=n, patch=stop) for n in (2, 1)] == [75, 75], out.read_text()
    assert warm.run([*argv, "--dist.micro_batch", "16"], out, processes=3) == 0, out.read_text()
    one, many = (
        safetensors.torch.load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "many")
    )
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-3, atol=1e-4)
    logs = [metrics.read_log(tmp_path / name, "epoch") for name in ("one", "many")]
    for a, b in zip(*logs, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
    assert warm.run([*argv, "--batch", "97"], out, processes=2) == 2
    assert "97" in out.read_text().splitlines()[-1]


# ---- what goes wrong


def test_losses_that_are_not_finite_are_skipped(warm, images, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    argv = command(images, folder, "--data.workers", 0, "--optim.max_skipped", 3)
    assert warm.run(argv, out, patch={"nan": (6, 3)}) == 0, out.read_text()
    assert sum(row["updates"] for row in metrics.read_log(folder, "skipped")) == 3
    weights = safetensors.torch.load_file(folder / "last" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert "warning: 1 of the updates up to 6 were skipped" in out.read_text()


def test_too_many_losses_that_are_not_finite(warm, images, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    argv = command(images, folder, "--data.workers", 0, "--optim.max_skipped", 2)
    assert warm.run(argv, out, processes=2, patch={"nan": (5, 1000)}, patched=1) == 1
    (said,) = [line for line in out.read_text().splitlines() if line.startswith("mpvg: ")]
    assert re.match(
        r"mpvg: the loss was not finite in 3 updates in a row, from update 5 \(epoch 1\) on, on process 1", said
    )
    assert re.search(r"with the images \S*train/(red|blue)/\d\d.jpg, ", said)
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_full_disk(warm, images, uninterrupted, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    argv = command(images, folder, "--data.workers", 0)
    # Lines of a log fit, weights do not.
    assert warm.run(argv, out, patch={"file_limit": 20_000}) == 0, out.read_text()
    text = out.read_text()
    assert "warning: " in text and "File too large" in text and "Traceback" not in text
    assert not list((folder / "checkpoints").glob("*")) and not (folder / "last" / "model.safetensors").exists()
    assert len(metrics.read_log(folder, "epoch")) == 4
    assert warm.run(argv, out) == 0  # there is room now, and no checkpoint: from the start
    assert differences(contents(folder), contents(uninterrupted(1))) == []


def test_another_config_does_not_go_on(warm, images, uninterrupted, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    shutil.copytree(uninterrupted(1), folder)
    assert warm.run(command(images, folder, "--optim.lr", "0.5"), out) == 2
    assert "holds a run with optim.lr 0.002, and the config now says 0.5" in out.read_text()
    shutil.copytree(images, tmp_path / "other")
    (tmp_path / "other" / "train" / "red").rename(tmp_path / "other" / "train" / "green")
    (tmp_path / "other" / "val" / "red").rename(tmp_path / "other" / "val" / "green")
    assert warm.run(command(tmp_path / "other", folder), out) == 2
    said = out.read_text().splitlines()[-1]
    assert "the data has other classes than" in said and "without red and with green" in said


def test_a_finished_run_is_left_as_it_is(warm, images, uninterrupted, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    shutil.copytree(uninterrupted(1), folder)
    assert warm.run(command(images, folder), out) == 0, out.read_text()
    assert differences(contents(folder), contents(uninterrupted(1))) == []
