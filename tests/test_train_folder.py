"""A user's own folder of images, from the command line: train, be killed, go on, evaluate."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpvg_kernels.train import metrics

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group(__name__)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Stripes and rings, and among them what real folders have: broken, empty, 16-bit, CMYK and palette files."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    y, x = np.mgrid[:48, :48] / 48
    for split, count in (("train", 48), ("val", 12)):
        for label in ("rings", "stripes"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                shift, period = draw.random(3), draw.uniform(5, 9)
                distance = np.hypot(x - shift[0], y - shift[1]) if label == "rings" else x
                wave = 0.5 + 0.4 * np.sin(2 * np.pi * (period * distance + shift[2]))
                pixels = wave[..., None] * draw.uniform(0.5, 1, 3) + draw.normal(0, 0.05, (48, 48, 3))
                Image.fromarray((pixels.clip(0, 1) * 255).astype("uint8")).save(folder / f"{i:03}.jpg", quality=90)
    train = root / "train"
    whole = Image.open(train / "rings" / "001.jpg").convert("RGB")
    whole.convert("CMYK").save(train / "rings" / "cmyk.jpg")
    whole.convert("P").save(train / "rings" / "palette.png")
    Image.fromarray(np.asarray(whole.convert("L")).astype("uint16") * 257).save(train / "rings" / "deep.png")
    (train / "stripes" / "cut.jpg").write_bytes((train / "stripes" / "001.jpg").read_bytes()[:600])
    (train / "stripes" / "empty.jpg").write_bytes(b"")
    (root / "val" / "stripes" / "text.jpg").write_text("not an image")
    return root


def mpvg(*args, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mpvg_kernels", *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, text
    return text


def test_train_kill_resume_eval(images, tmp_path):
    run = tmp_path / "run"
    command = f"""train --recipe vit_lite_7_4_cifar100 --data.name folder --data.root {images} --data.max_bad_share 0.05
    --model.depth 2 --model.embed_dim 64 --model.num_heads 2 --batch 12 --epochs 8 --sched.warmup_epochs 1
    --sched.cooldown_epochs 0 --aug.auto_augment None --aug.mixup 0 --aug.cutmix 0 --optim.ema_decay 0.9
    --optim.lr 2e-3 --data.workers 1 --device cpu --checkpoint.interval 2 --out {run} --resume auto""".split()
    process = mpvg(*command)
    deadline, newest = time.monotonic() + 120, None
    while newest is None and time.monotonic() < deadline and process.poll() is None:
        newest = next(iter(run.glob("checkpoints/step-*/COMPLETE")), None)
        time.sleep(0.02)
    time.sleep(random.Random(0).random())
    process.send_signal(signal.SIGKILL)
    process.communicate()

    text = finish(mpvg(*command))
    assert "goes on from step-" in text, text
    epochs = metrics.read_log(run, "epoch")
    assert [row["epoch"] for row in epochs] == list(range(1, 9))
    assert {Path(row["file"]).name for row in metrics.read_log(run, "bad_image")} == {
        "cut.jpg",
        "empty.jpg",
        "text.jpg",
    }
    assert epochs[-1]["bad_images"] == 3 and "Unreadable images: 3" in (run / "report.md").read_text()
    assert epochs[-1]["test_acc"] > 75
    assert len((run / "starts.jsonl").read_text().splitlines()) == 2
    info = json.loads((run / "run.json").read_text())
    assert info["class_names"] == ["rings", "stripes"]

    result = tmp_path / "eval.json"
    # The images may have moved since.
    text = finish(mpvg("eval", run, "--weights", "ema", "--data.root", images, "--json", result))
    found = json.loads(result.read_text())
    assert (found["images"], found["acc"]) == (24, epochs[-1]["ema_acc"])
    assert f"accuracy {found['acc']:.2f} %" in text and "24 images" in text


def test_too_many_bad_images(images, tmp_path):
    text = finish(
        mpvg(
            *f"""train --recipe vit_lite_7_4_cifar100 --data.name folder --data.root {images} --data.max_bad_share 0
        --model.depth 2 --batch 24 --epochs 1 --sched.warmup_epochs 0 --sched.cooldown_epochs 0 --data.workers 0
        --device cpu --out {tmp_path / "run"}""".split()
        ),
        code=1,
    )
    (said,) = [line for line in text.splitlines() if line.startswith("mpvg: ") and "warning" not in line]
    assert "data.max_bad_share" in said and ".jpg" in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
