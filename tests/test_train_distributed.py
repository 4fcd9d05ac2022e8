"""Training in several processes: FSDP2, torchrun and Slurm, agreement on signals and errors, batch norms, FP16."""

import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from warm_process import ROOT, WarmProcess

from mpvg_kernels.train import InputError, distributed, metrics
from mpvg_kernels.train.distributed import World, find_world, first_host

pytestmark = pytest.mark.xdist_group(__name__)

ARGS = """train --recipe digits --device cpu --model.patch_size 4 --model.embed_dim 32 --model.depth 2
--model.num_heads 2 --batch 96 --epochs 2
--sched.warmup_epochs 1 --log.tensorboard False --log.pos_interval 6 --resume auto --optim.ema_decay 0.9""".split()


@pytest.fixture(scope="module")
def warm():
    with WarmProcess() as process:
        yield process


def run(warm, folder, *more, code: int = 0, **kwargs) -> str:
    """Run the recipe in `folder`; what it printed."""
    out = folder.with_suffix(".txt")
    found = warm.run([*ARGS, "--out", folder, *more], out, **kwargs)
    assert found == code, out.read_text()
    return out.read_text()


def weights(folder, name: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name / "model.safetensors")


def assert_close(a, b, names=("last", "ema")) -> None:
    for name in names:
        found, expected = weights(a, name), weights(b, name)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


def assert_pos_alike(a, b) -> None:
    """Both runs looked at the PE after the same updates. Its norm is the same; each process has images of its own."""
    found, expected = (metrics.read_log(folder, "pos") for folder in (a, b))
    assert [row["step"] for row in found] == [row["step"] for row in expected] != []
    for row, other in zip(found, expected, strict=True):
        assert row["layers"] == other["layers"] == [1, "last"]
        assert row["pos_norm"] == pytest.approx(other["pos_norm"], rel=1e-3)
        assert row["correlation"] == pytest.approx(other["correlation"], abs=0.1)


@pytest.fixture(scope="module")
def alone(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(warm, folder)
    return folder


def test_fsdp_learns_the_same_and_goes_on_as_ddp(warm, alone, tmp_path):
    stop = {"signal": ("update", 9, 15)}
    folder = tmp_path / "run"
    more = ("--dist.mode", "fsdp", "--dist.micro_batch", "16", "--optim.clip_grad", "100")
    text = run(warm, folder, *more, processes=2, patch=stop, patched=1, code=75)
    assert "2 processes (fsdp)" in text and "3 micro-batches x 16 images" in text
    text = run(warm, folder, "--optim.clip_grad", "100", processes=3)  # ddp
    assert "goes on from step-000000" in text
    assert_close(folder, alone)
    assert_pos_alike(folder, alone)
    resumed = tmp_path / "fsdp"
    run(warm, resumed, "--dist.mode", "fsdp", processes=1, patch=stop, code=75)  # alone there is nothing to share out
    run(warm, resumed, "--dist.mode", "fsdp", processes=2)
    assert_close(resumed, alone)
    assert_pos_alike(resumed, alone)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_fp16(warm, alone, tmp_path, mode):
    run(warm, tmp_path / "run", "--dist.mode", mode, "--amp", "fp16", processes=2)
    rows = metrics.read_log(tmp_path / "run", "train")
    assert rows[-1]["loss_scale"] == 2.0**16 and rows[-1]["skipped"] == 0
    expected = metrics.read_log(alone, "train")[-1]["loss"]
    assert rows[-1]["loss"] != expected and rows[-1]["loss"] == pytest.approx(expected, rel=0.02)


def test_three_processes_go_on_to_the_same_bits(warm, tmp_path):
    # With two, a + b is b + a; from three on the order of a sum matters.
    for name in ("whole", "parts"):
        if name == "parts":
            run(warm, tmp_path / name, processes=3, patch={"kill": ("update", 20)}, code=-9)
        run(warm, tmp_path / name, processes=3)
    for name in ("last", "ema"):
        a, b = (weights(tmp_path / folder, name) for folder in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_batch_norms_are_those_of_the_first_process(warm, tmp_path):
    """What is evaluated is what is saved, although each process's batch norms have seen other images."""
    model = "--model.name mpvg_ceit_tiny_patch16_224 --data.name folder --data.img_size 32 32 --model.embed_dim 16"
    images = tmp_path / "images"
    from PIL import Image

    for i in range(16):
        for split in ("train", "val"):
            folder = images / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i * 15, 100, 250 - i * 15)).save(folder / f"{i}.png")
    small = f"{model} --batch 8 --data.workers 0 --model.patch_size None --data.root {images}"
    run(warm, tmp_path / "run", *small.split(), processes=2)
    (*_, logged) = metrics.read_log(tmp_path / "run", "epoch")
    out = tmp_path / "eval.txt"
    for name, kind in (("last", "test"), ("ema", "ema")):
        file = tmp_path / f"{name}.json"
        assert warm.run(["eval", tmp_path / "run", "--weights", name, "--json", file], out) == 0, out.read_text()
        assert json.loads(file.read_text())["loss"] == pytest.approx(logged[f"{kind}_loss"], rel=1e-5)


def test_processes_share_what_is_evaluated(warm, alone, tmp_path):
    """Five images, one of which can't be read: the processes find what one finds, and the first one says it."""
    from PIL import Image

    for i in range(5):
        (folder := tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i * 60).save(folder / f"{i}.png")
    (tmp_path / "images" / "1" / "4.png").write_text("not an image")
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.txt"
        args = ["eval", alone, "--folder", tmp_path / "images", "--out", tmp_path / str(processes), "--device", "cpu"]
        assert warm.run([*args, "--batch", "2"], out, processes=processes) == 0, out.read_text()
        assert out.read_text().count("4 images") == out.read_text().count("written") == 1
        found[processes] = json.loads((tmp_path / str(processes) / "result.json").read_text())
    assert found[2]["images"] == 4 and [each["reason"] for each in found[2]["bad"]] == ["not an image"]
    for key in ("loss", "ece", "confidence"):
        assert found[2].pop(key) == pytest.approx(found[1].pop(key), rel=1e-5)
    del found[1]["calibration"], found[2]["calibration"]
    assert found[1] == found[2]
    args = ["eval", alone, "--folder", tmp_path / "images" / "1", "--device", "cpu"]
    assert warm.run(args, tmp_path / "bad.txt", processes=2) == 2
    assert (tmp_path / "bad.txt").read_text().count("has images outside of class folders") == 1


def test_an_error_is_said_once(warm, alone, tmp_path):
    text = run(warm, alone, "--resume", "never", processes=2, code=2).splitlines()
    (said,) = [line for line in text if line.startswith("mpvg: ") and "exists" in line]
    assert f"{alone} exists and nothing is overwritten" in said
    text = run(warm, tmp_path / "run", "--dist.backend", "nccl", processes=2, code=2)
    assert "config field dist.backend is 'nccl', which needs a GPU, and the device is cpu" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun(alone, tmp_path):
    """As it is typed: stopped by a scheduler's SIGTERM, started again by the same command."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mpvg_kernels", *ARGS, "--out", str(folder), "--log.interval", "1"]
    command += ["--data.max_bad_share", "0.5"]  # has no effect, which is said once
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        while process.poll() is None and not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text()):
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass
        process.terminate()
        assert process.wait(120) != 0
        text = (tmp_path / "out.txt").read_text()
        assert json.loads((folder / "status.json").read_text())["state"] == "preempted", text
        assert len(re.findall("mpvg: SIGTERM: saved in", text)) == len(re.findall("data.max_bad_share", text)) == 1
        assert subprocess.run(command, env=env, stdout=out, stderr=out).returncode == 0, text
    assert_close(folder, alone)


# ---- where a process stands


def test_first_host_of_slurm():
    for nodes, first in {
        "gpu1": "gpu1",
        "gpu1,gpu2": "gpu1",
        "gpu[007-009,12],login": "gpu007",
        "a-b[3,5]": "a-b3",
        "x,gpu[1-2]": "x",
    }.items():
        assert first_host(nodes) == first


SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[07-08]"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, World(3, 4, 1)),
        (SLURM, World(5, 8, 1)),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "2"}, World(0, 2, 0)),  # torchrun inside a job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, World()),  # the batch script, before srun
    ],
)
def test_world(monkeypatch, env, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert find_world() == expected
    if env is SLURM:
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "23456")
        monkeypatch.delenv("MASTER_ADDR")
        monkeypatch.delenv("MASTER_PORT")


def test_a_launcher_that_sets_half(monkeypatch):
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the variables that torchrun or srun set can't be read"):
        find_world()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="process 2 of this machine has no GPU: there are 2"):
        distributed.pick_device("auto", World(2, 3, 2))
