"""Detection and segmentation in two processes: FSDP2 learns what DDP learns, and what is evaluated is shared out."""

import json

import pytest
import safetensors.torch
import torch
from warm_process import WarmProcess

from mpvg_kernels.train import metrics

pytestmark = pytest.mark.xdist_group(__name__)

MODEL = """--device cpu --data.name shapes --data.workers 0 --model.name mpvg_vit_adapter_tiny --model.patch_size None
--model.embed_dim 48 --model.depth 2 --model.num_heads 3 --model.adapter.interactions 2 --model.adapter.conv_inplane 8
--model.adapter.deform_num_heads 3 --batch 4 --epochs 1 --sched.warmup_epochs 0 --data.epoch_updates 2
--data.max_test_images 3 --optim.ema_decay 0.9 --log.interval 1 --log.pos_interval 1 --log.tensorboard False""".split()
TASKS = {
    "segmentation": """--task segmentation --data.img_size 64 64 --segmentation.short_side 64
--segmentation.long_side 64 --segmentation.width 8 --segmentation.aux_width 8 --optim.layer_decay 0.9""".split(),
    "detection": """--task detection --detection.width 8 --detection.box_width 16 --detection.short_sides 64 96
--detection.max_side 96 --detection.crop_prob 0 --detection.test_short_side 64 --detection.test_max_side 64
--detection.anchor_scale 4""".split(),
}


@pytest.fixture(scope="module")
def warm():
    with WarmProcess(*(f"mpvg_kernels.train.tasks.{task}" for task in TASKS)) as process:
        yield process


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes") / "shapes"  # the first run makes them


@pytest.mark.parametrize("task", TASKS)
def test_fsdp_learns_as_ddp(warm, scenes, task, tmp_path):
    for mode in ("ddp", "fsdp"):
        args = ["train", "--recipe", "digits", *MODEL, *TASKS[task], "--data.root", scenes]
        out = tmp_path / f"{mode}.txt"
        assert warm.run([*args, "--dist.mode", mode, "--out", tmp_path / mode], out, processes=2) == 0, out.read_text()
        assert f"2 processes ({mode})" in out.read_text() and "view tensor" not in out.read_text()
    folders = [tmp_path / mode for mode in ("ddp", "fsdp")]
    for name in ("last", "ema"):
        a, b = (safetensors.torch.load_file(folder / name / "model.safetensors") for folder in folders)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    logs = [metrics.read_log(folder, "train") for folder in folders]
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-4)
    for row, other in zip(*(metrics.read_log(folder, "pos") for folder in folders), strict=True):
        assert row["layers"] == other["layers"] == [1, "last"]
        assert row["pos_norm"] == pytest.approx(other["pos_norm"], rel=1e-4)
    assert json.loads((folders[1] / "last" / "config.json").read_text())["task"] == task
