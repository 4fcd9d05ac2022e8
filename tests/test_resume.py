"""Runs that are killed, stopped, or run out of disk, and go on: to the same bits as the run that nothing happened to."""

import csv
import json
import random
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
--checkpoint.interval 3 --log.interval 2 --log.tensorboard False""".split()
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
    found = {f"{name} weights": safetensors.torch.load_file(folder / name / "model.safetensors") for name in checkpoint.WEIGHTS}
    newest = max((folder / "checkpoints").glob("step-*"))
    found["state"] = torch.load(newest / "state.pt", weights_only=True)
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
        names = sorted(a.keys() | b.keys(), key=str)
        return [d for n in names for d in (differences(a[n], b[n], f"{path}/{n}") if n in a and n in b else [f"{path}/{n}"])]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


# ---- killed


def test_killed_twenty_times(warm, images, uninterrupted, tmp_path):
    folder, out, draw = tmp_path / "run", tmp_path / "out.txt", random.Random(1)
    kills = [("fsync", 2), ("rename", 2), ("evaluation", 1), ("snapshot", 2)]  # whatever the draw
    most = {"update": 9, "optimizer": 9, "evaluation": 30, "snapshot": 4, "fsync": 25, "rename": 8}
    while len(kills) < 20:
        moment = draw.choice(list(most))
        kills.append((moment, draw.randint(1, most[moment])))
    codes = []
    for kill in kills:
        workers = draw.choice([0, 0, 0, 1, 2])
        codes.append(warm.run(command(images, folder, "--data.workers", workers), out, patch={"kill": kill}))
        assert codes[-1] in (-9, 0), out.read_text()
    assert codes.count(-9) >= 20, codes
    assert warm.run(command(images, folder, "--data.workers", 1), out) == 0, out.read_text()
    assert differences(contents(folder), contents(uninterrupted(1))) == []
