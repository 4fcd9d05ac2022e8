"""A smoke run: what `mpvg train --smoke` cuts and what it keeps, in which folder, and what goes on from it."""

import dataclasses
import json
import logging

import pytest
from test_train_data import fill
from warm_process import WarmProcess

from mpvg_kernels.__main__ import main
from mpvg_kernels.train import InputError, config, metrics, recipes
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.optim import learning_rates
from mpvg_kernels.train.smoke import cuts, smoke

pytestmark = pytest.mark.xdist_group(__name__)
CUT = """epochs batch data.workers data.epoch_updates data.max_test_images optim.lr optim.lr_base_batch sched.per
sched.warmup_epochs sched.warmup_updates sched.warmup_prefix sched.warmup_lr sched.min_lr sched.scale_with_batch
sched.cooldown_epochs log.interval log.pos_interval""".split()


@pytest.fixture(scope="module")
def warm():
    with WarmProcess() as process:
        yield process


# ---- the config


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("size", [1, 8])
def test_what_is_cut_of_a_recipe(name, size):
    whole = recipes.load(name)
    if whole.batch % size:
        pytest.skip(f"a batch of {whole.batch} can't be divided by {size}")
    cut = smoke(whole, World(0, size))
    assert {n for n in config.field_names() if config.get(whole, n) != config.get(cut, n)} <= set(CUT)
    images = min(whole.batch, (4 if whole.task == "classification" else 2) * size)
    assert (cut.total_epochs, cut.batch, cut.data.epoch_updates) == (1, images, 2)
    assert cut.data.max_test_images == (8 if whole.task == "classification" else 2)
    assert all(learning_rates(cut)[key] == learning_rates(whole)[key] for key in ("peak", "min"))
    assert set(config.ignored(cut)) <= set(config.ignored(whole))
    assert smoke(cut, World(0, size)) == cut  # as a resumed smoke run is
    said = cuts(whole, cut)
    batch = f", batch {whole.batch} to {images}" if whole.batch != images else ""
    assert f"epochs {whole.epochs} to 1{batch}, " in said and "\n" not in said


def test_what_the_whole_run_could_not_is_told():
    """A learning rate below min_lr, and a batch that can't be divided."""
    whole = recipes.load("deit_tiny_in1k")
    with pytest.raises(InputError, match="sched.min_lr is 1e-05, expected at most 3.91e-06"):
        smoke(dataclasses.replace(whole, batch=4), World())
    with pytest.raises(InputError, match="batch is 1024, expected a multiple of the 3 processes"):
        smoke(whole, World(0, 3))


def test_a_small_batch_stays():
    found = smoke(config.Config(batch=2, dist=config.Dist(micro_batch=1)), World())
    assert (found.batch, found.dist.micro_batch, found.log.pos_interval) == (2, 1, 1)
    never = config.Config(log=config.Log(pos_interval=None))
    assert smoke(never, World()).log.pos_interval is None


# ---- the command


SMALL = "--device cpu --model.depth 2 --model.embed_dim 32 --model.num_heads 2 --log.tensorboard False".split()


def run(warm, root, argv: str, code: int = 0, **kwargs) -> str:
    """Run it; what it printed."""
    out = root / "printed.txt"
    out.unlink(missing_ok=True)
    found = warm.run([*argv.split(), *SMALL], out, **kwargs)
    assert found == code, out.read_text()
    return out.read_text()


def one(folder, pattern: str):
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_of_images(warm, tmp_path, processes):
    """The recipe with mixup, repeated augmentation, EMA and bf16, on a quarter of its pixels."""
    fill(tmp_path / "images", held_out=10)
    argv = f"train --recipe deit_tiny_in1k --data.root {tmp_path / 'images'} --data.img_size 32 32"
    text = run(warm, tmp_path, f"{argv} --out {tmp_path / 'runs' / 'deit'} --smoke", processes=processes)
    assert text.count("mpvg: smoke run, cut to seconds: epochs 300 to 1, batch 1024 to ") == 1
    assert "over 1 epochs of 2 updates" in text and "peak lr 0.001\n" in text
    folder = one(tmp_path / "runs", "deit-smoke-*")
    rows = metrics.read_log(folder, "epoch")
    assert len(rows) == 1 and rows[0]["step"] == 2 and {"test_acc", "ema_acc"} <= rows[0].keys()
    assert [row["step"] for row in metrics.read_log(folder, "train")] == [1, 2]
    info = json.loads((folder / "run.json").read_text())
    assert info["recipe"] == "deit_tiny_in1k-smoke" and info["updates"] == 2
    assert info["config"]["batch"] == 4 * processes
    assert {"report.md", "last", "best", "ema"} <= {path.name for path in folder.iterdir()}


def test_it_resumes_as_a_smoke_run_only(warm, tmp_path):
    argv = f"train --recipe digits --out {tmp_path / 'digits'}"
    stopped = run(warm, tmp_path, f"{argv} --smoke", 75, patch={"signal": ("update", 2, 15)})
    folder = one(tmp_path, "digits-smoke-*")
    assert f"saved in {folder}" in stopped
    told = run(warm, tmp_path, f"train --recipe digits --resume {folder}", 2)
    assert f"{folder} holds a run with epochs 1, and the config now says 32" in told
    run(warm, tmp_path, f"train --recipe digits --resume {folder} --smoke")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    run(warm, tmp_path, argv + " --data.epoch_updates 3 --epochs 4")  # its folder is still free
    told = run(warm, tmp_path, f"train --recipe digits --resume {tmp_path / 'digits'} --smoke", 2)
    assert "holds a run with epochs 4, and the config now says 1" in told


def test_default_folder(monkeypatch, tmp_path, capsys, caplog):
    """Every smoke run has a new one, with --resume auto too."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        assert main(["train", "--recipe", "digits", "--smoke", "--resume", "auto", *SMALL]) == 0
    assert one(tmp_path / "runs", "*").name.startswith("digits-smoke-2")
    assert "smoke run, cut to seconds: epochs 32 to 1, batch 64 to 4, " in caplog.text


def test_print_config(capsys):
    assert main(["train", "--recipe", "swin_tiny_in1k", "--smoke", "--print-config"]) == 0
    assert config.from_dict(json.loads(capsys.readouterr().out)) == smoke(recipes.load("swin_tiny_in1k"), World())
