"""The `mpvg` command: a small run from start to end, messages about bad input, exit codes, demo, Makefile."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mpvg_kernels as mk
from mpvg_kernels import __main__ as cli
from mpvg_kernels import backends, demo
from mpvg_kernels.train import InputError, checkpoint, config, metrics, recipes
from mpvg_kernels.train.run_folder import whole_file

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group(__name__)  # one run for all tests
# Two epochs of a tiny model.
FAST = (
    "--epochs 2 --sched.warmup_epochs 1 --model.patch_size 4 --model.embed_dim 32 --model.depth 2 --model.num_heads 2"
)
FAST_ARGS = [*FAST.split(), "--device", "cpu"]


def command(*args: object, **kwargs) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "mpvg_kernels", *map(str, args)], capture_output=True, text=True, env=env, **kwargs
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "runs" / "small"
    args = ["train", "--recipe", "digits", "--out", folder, *FAST_ARGS, "--optim.lr", "3e-3"]
    result = command(*args, env={"OMP_NUM_THREADS": "2"})  # the recipe asks for one thread
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(run[0], tmp_path / "copy"))


def fails(capsys, *args: object, code: int = 2) -> str:
    """The one line that a failing command prints on stderr."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mpvg: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# ---- a run


def test_run_folder(run):
    folder, printed = run
    assert {path.name for path in folder.iterdir()} == {
        *("run.json", "status.json", "starts.jsonl", "log.jsonl", "metrics.csv", "report.md", "curves.png"),
        *("best", "last", "checkpoints", ".lock"),
    }
    for name in ("best", "last"):
        assert {path.name for path in (folder / name).iterdir()} == {"config.json", "model.safetensors"}
    info = json.loads((folder / "run.json").read_text())
    assert info["config"]["epochs"] == 2 and info["config"]["optim"]["lr"] == 3e-3
    assert info["backend"] == mk.backends.resolve("cpu")
    assert info["machine"]["threads"] == recipes.load("digits").threads == 1
    assert info["versions"]["torch"] == torch.__version__ and info["recipe"] == "digits" and info["updates"] == 44
    status = json.loads((folder / "status.json").read_text())
    epochs, train = metrics.read_log(folder, "epoch"), metrics.read_log(folder, "train")
    assert (status["state"], status["epoch"], status["step"]) == ("finished", 2, 44)
    assert status["test_acc"] == epochs[-1]["test_acc"]
    assert [row["step"] for row in epochs] == [22, 44]
    assert [row["step"] for row in train] == [10, 20, 22, 32, 42, 44]
    assert all(row["loss"] > 0 and 0 <= row["acc"] <= 100 and row["img_s"] > 0 for row in train)
    assert train[-1]["loss"] < train[0]["loss"]
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in rows] == [row["test_loss"] for row in epochs]
    assert tuple(rows[0]) == metrics.columns("classification")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    accuracy = f"{epochs[-1]['test_acc']:.2f} %"
    assert f"| last | 2 | {accuracy} |" in report and "![loss and accuracy](curves.png)" in report
    assert (
        printed.count("\nepoch ") == 2 and f"test accuracy {accuracy} after 2 epochs" in printed
    )  # plain lines, no bar


@pytest.mark.parametrize("weights", ["best", "last"])
def test_eval_gives_the_logged_accuracy(copy, tmp_path, capsys, weights):
    folder = copy
    shutil.rmtree(folder / ("best" if weights == "last" else "last"))  # they may be of one epoch: take the other away
    epochs = metrics.read_log(folder, "epoch")
    logged = epochs[-1] if weights == "last" else max(epochs, key=lambda row: row["test_acc"])
    assert cli.main(["eval", str(folder), "--weights", weights, "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["acc"] == logged["test_acc"] and result["loss"] == pytest.approx(logged["test_loss"], rel=1e-5)
    assert (result["images"], result["weights"]) == (360, weights)
    assert f"accuracy {result['acc']:.2f} %" in capsys.readouterr().out


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((200, 20)))
    assert cli.main(["train", "--recipe", "digits", "--out", str(tmp_path / "run"), *FAST_ARGS]) == 0
    out, err = capsys.readouterr()
    assert "\nepoch " not in out
    assert re.search(r"44/44 .*epoch 2, loss \d\.\d+, acc \d+\.\d %, \d+ img/s, test \d+\.\d+ %", err)


def test_interrupt(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "mpvg_kernels", "train", "--recipe", "digits", "--out", tmp_path / "run"]
        + [*FAST_ARGS, "--epochs", "500"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: a test run in the background of a shell hands on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    expected = (
        rf"mpvg: SIGINT: saved in {tmp_path}/run at update \d+ of 11000; the same command with --resume auto goes on\n"
    )
    assert re.search(expected, process.stderr.read())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"


def test_a_stream_goes_on_from_the_beginning_of_an_epoch(run, tmp_path, monkeypatch, capsys):
    from mpvg_kernels.train import data, loop

    monkeypatch.setattr(data.Digits, "ordered", False)
    args = ["train", "--recipe", "digits", "--out", str(tmp_path / "run"), *FAST_ARGS, "--resume", "auto"]
    args += ["--checkpoint.interval", "5", "--optim.lr", "3e-3"]  # as the run that nothing happened to
    plain = loop.Trainer.update

    def update(self, batches):
        if self.updates == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "update", update)
        assert cli.main(args) == 75
    said = "SIGTERM: stopped at update 31 of 44; the same command with --resume auto goes on in"
    err = capsys.readouterr().err
    assert said in err and "from the beginning of epoch 2, as a stream of images can't be entered in the middle" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000022"]
    assert cli.main(args) == 0 and "goes on from step-00000022" in capsys.readouterr().out
    weights = [folder / "last" / "model.safetensors" for folder in (run[0], tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_diverged_training(tmp_path, capsys):
    args = ["train", "--recipe", "digits", "--out", tmp_path / "run", *FAST_ARGS, "--optim.lr", "1e30"]
    assert cli.main([str(arg) for arg in args]) == 1
    expected = (
        r"mpvg: the (loss|gradient) was not finite in 11 updates in a row, from update \d+ \(epoch 1\) on.*optim.lr.*\n"
    )
    assert re.search(expected, capsys.readouterr().err)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "was not finite" in status["error"]


def test_a_run_goes_on_from_a_checkpoint_in_a_new_folder(copy, tmp_path, capsys):
    checkpoint = copy / "checkpoints" / "step-00000022"
    for path, out in ((checkpoint, tmp_path / "other"), (copy, copy)):
        # Without --recipe the config is the run's.
        args = ["train", "--resume", path, *(["--out", out] if out != copy else [])]
        assert cli.main([str(arg) for arg in args]) == 0
        assert f"goes on from step-000000{'22' if out != copy else '44'}" in capsys.readouterr().out
        for name in ("log.jsonl", "metrics.csv"):
            assert len((out / name).read_text().splitlines()) == len((copy / name).read_text().splitlines())
        weights = [folder / "last" / "model.safetensors" for folder in (copy, out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        starts = [json.loads(line)["step"] for line in (out / "starts.jsonl").read_text().splitlines()]
        assert starts == ([22] if out != copy else [0, 44])


def test_a_finished_run_goes_on_in_a_new_folder(copy, tmp_path):
    assert cli.main(["train", "--resume", str(copy), "--out", str(tmp_path / "other")]) == 0
    for name in ("best", "last"):  # no epoch is left that would write them
        weights = [folder / name / "model.safetensors" for folder in (copy, tmp_path / "other")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_weights_of_a_later_update_are_not_taken_along(copy, tmp_path, capsys):
    lines = (copy / "log.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    assert row["kind"] == "epoch"
    (copy / "log.jsonl").write_text("\n".join([*lines, json.dumps(row | {"step": 99, "test_acc": 100.0})]) + "\n")
    assert cli.main(["train", "--resume", str(copy), "--out", str(tmp_path / "other")]) == 0
    assert "best is of a later update" in capsys.readouterr().err
    assert not (tmp_path / "other" / "best").exists() and not (tmp_path / "other" / "last").exists()


def test_a_finished_run_without_its_log(copy, capsys):
    (copy / "log.jsonl").unlink()
    assert cli.main(["train", "--resume", str(copy)]) == 0
    out, err = capsys.readouterr()
    assert "has lost the accuracy" in out and "some of the log is lost" in err and "no report.md" in err
    assert json.loads((copy / "status.json").read_text())["state"] == "finished"


def test_checkpoints_of_another_model(copy, capsys):
    info = json.loads((copy / "run.json").read_text())
    info["config"]["model"]["embed_dim"] = 64
    (copy / "run.json").write_text(json.dumps(info))
    assert "is of another model than the config's" in fails(capsys, "train", "--resume", copy)
    assert json.loads((copy / "status.json").read_text())["state"] == "failed"


def test_what_a_run_started_from_is_told_and_not_needed_later(copy, tmp_path, capsys):
    args = ["train", "--recipe", "digits", *FAST_ARGS, "--epochs", "1", "--sched.warmup_epochs", "0"]
    args += ["--model.weights", copy, "--model.linear_probe", "--loss.distillation", "hard"]
    args += ["--loss.teacher", "mpvg_deit_tiny_patch16_224", "--loss.teacher_weights", copy / "best"]
    assert cli.main([str(arg) for arg in [*args, "--out", tmp_path / "run"]]) == 0
    err = capsys.readouterr().err
    assert f"mpvg: Loaded the weights of {copy / 'last'}." in err and f"Loaded the weights of {copy / 'best'}." in err
    shutil.rmtree(copy)
    assert cli.main(["eval", str(tmp_path / "run")]) == 0


def test_profile(tmp_path):
    args = ["train", "--recipe", "digits", "--out", tmp_path / "run", *FAST_ARGS, "--epochs", "1", "--profile"]
    assert cli.main([str(arg) for arg in [*args, "--sched.warmup_epochs", "0"]]) == 0
    profile = tmp_path / "run" / "profile"
    assert "ProfilerStep*" in (profile / "kernels.txt").read_text()
    trace = json.loads((profile / "trace.json").read_text())
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in trace["traceEvents"]) == 4


def test_settings_without_effect_are_told(tmp_path, capsys):
    args = ["train", "--recipe", "digits", "--out", tmp_path / "run", *FAST_ARGS, "--epochs", "1", "--data.root", "x"]
    assert cli.main([str(arg) for arg in [*args, "--sched.warmup_epochs", "0", "--eval_interval", "3"]]) == 0
    out, err = capsys.readouterr()
    assert err == "mpvg: warning: config field data.root has no effect: data.name is digits\n"
    assert "batch 64 = 1 process x 1 micro-batch x 64 images" in out and "test loss" in out  # the last epoch's always


# ---- the other commands


def test_print_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--recipe", "digits", "--print-config", "--optim.lr", "5e-4", "--seed=9"]) == 0
    found = config.from_dict(json.loads(capsys.readouterr().out))
    assert (found.optim.lr, found.seed, found.epochs) == (5e-4, 9, recipes.load("digits").epochs)
    assert not list(tmp_path.iterdir())  # nothing was started


def test_recipes_and_info(capsys):
    assert cli.main(["recipes"]) == 0
    assert "digits: " in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert all(f"  {name} " in text for text in [capsys.readouterr().out] for name in mk.backends.BACKENDS)


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--help"], ["train", "--recipe", "digits", "--help"], ["eval", "-h"]]
)
def test_help(capsys, args):
    try:
        code = cli.main(args)
    except SystemExit as done:
        code = done.code
    text = capsys.readouterr().out
    assert code == 0 and "usage: mpvg" in text
    assert ("--optim.lr" in text) == ("train" in args)
    assert ("Peak learning rate" in text) == ("--recipe" in args)


def test_bench_passes_its_arguments_on(tmp_path, monkeypatch, capfd):
    (tmp_path / "bench_toy.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path)
    assert cli.main(["bench", "toy", "--quick", "--json", "x.json", "--help"]) == 3
    assert capfd.readouterr().out == "['--quick', '--json', 'x.json', '--help']\n"


def test_import_brings_none_of_the_extras():
    code = "import sys, mpvg_kernels; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"tyro", "sklearn", "matplotlib", "mpvg_kernels.train"} & set(out.split())


# ---- bad input


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train", "mpvg train needs --recipe NAME: there is ceit_tiny_in1k, deit_base_in1k"),
        ("train --recipe digit", "vit_lite_7_4_cifar100; did you mean 'digits'"),
        ("train --recipe digits --optim.lrr 1", "unknown config field 'optim.lrr'; did you mean 'optim.lr'"),
        ("train --recipe digits --epochs many", "--epochs"),
        ("train --recipe digits --model.scheme nonsense", "nonsense"),
        ("train --recipe digits stray", "stray"),
        ("train --resume auto", "mpvg train needs --recipe NAME"),
        ("train --resume nowhere", "nowhere is not a run folder, nor a checkpoint in one"),
        ("train --recipe digits --resume nowhere", "nowhere is not a run folder"),
        ("eval", "required: RUN"),
        ("eval run --lateny", "unknown option or config field 'lateny'; did you mean 'latency'"),
        ("analyze run --imges 3", "unknown option or config field 'imges'; did you mean 'images'"),
        ("train --recipe digits --resum auto", "unknown option or config field 'resum'; did you mean 'resume'"),
        ("report run --qqq 1", "unknown config field 'qqq'; `mpvg train --recipe NAME --print-config` lists them all"),
        ("eval nowhere", "nowhere is not a run folder: it has no run.json"),
        ("eval nowhere --weights mean", "invalid choice: 'mean'"),
        ("eval nowhere --wieghts best", "unknown option or config field 'wieghts'; did you mean 'weights'"),
        ("info --all", "mpvg info does not take '--all'"),
        ("bench nothing", "unknown benchmark 'nothing': there is "),
    ],
)
def test_usage(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *args.split())
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_run_folder_that_exists(run, capsys):
    before = (run[0] / "log.jsonl").read_bytes()
    message = fails(capsys, "train", "--recipe", "digits", "--out", run[0], *FAST_ARGS)
    assert f"{run[0]} exists and nothing is overwritten: choose another folder with --out" in message
    assert (run[0] / "log.jsonl").read_bytes() == before


def test_run_folder_in_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fails(capsys, "train", "--recipe", "digits", "--out", tmp_path / "file" / "run", *FAST_ARGS)
    assert "can't be written (Not a directory)" in message


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    message = fails(capsys, "train", "--recipe", "digits", "--out", tmp_path / "run", *FAST_ARGS)
    assert "has 1 MB free" in message and re.search(r"takes 1\.\d+ MB beside", message)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_empty_folder_is_fine(tmp_path):
    checkpoint.RunFolder.create(tmp_path, {"recipe": "x"})
    assert checkpoint.RunFolder(tmp_path).info == {"recipe": "x"}


def test_weights_of_another_model(copy, capsys):
    info = json.loads((copy / "run.json").read_text())
    info["config"]["model"] |= {"depth": 3, "scheme": "gap"}
    (copy / "run.json").write_text(json.dumps(info))
    message = fails(capsys, "eval", copy)
    assert "last/model.safetensors holds the weights of another model than run.json's" in message
    assert "missing (blocks.2." in message and "not in the model (blocks.1.norm1.pos_bias" in message
    info["config"]["model"] |= {"depth": 2, "scheme": "mpvg", "embed_dim": 64}
    (copy / "run.json").write_text(json.dumps(info))
    assert "of another shape (blocks.0.attn.proj.bias (32,) instead of (64,)" in fails(capsys, "eval", copy)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "run.json").write_text("{"), "run.json can't be read"),
        (lambda f: (f / "run.json").write_text("{}"), "run.json has no config"),
        (
            lambda f: (f / "run.json").write_text('{"config": {"epoch": 3}, "versions": {"mpvg_kernels": "9.1"}}'),
            "unknown config field 'epoch'; did you mean 'epochs'? (the config was written by mpvg_kernels 9.1",
        ),
        (lambda f: (f / "run.json").write_text('{"config": {"epochs": "two"}}'), "a value of the wrong kind ('>='"),
        (lambda f: (f / "run.json").write_text('{"config": {"model": null}}'), "a value of the wrong kind ("),
        (lambda f: shutil.rmtree(f / "last"), "does not exist: the run has not saved its last weights"),
        (lambda f: (f / "last" / "model.safetensors").write_bytes(b"12345678"), "can't be read as safetensors"),
    ],
)
def test_spoilt_run_folder(copy, capsys, spoil, message):
    spoil(copy)
    assert message in fails(capsys, "eval", copy)


@pytest.mark.parametrize("command", ["eval RUN --json", "analyze RUN --json", "report RUN --out", "export RUN --json"])
def test_no_place_for_a_result_is_said_before_the_work(command, copy, tmp_path, capsys):
    args = [copy if part == "RUN" else part for part in command.split()]
    if args[0] == "export":
        args += ["--format", "safetensors"]
    message = fails(capsys, *args[:3], tmp_path / "no" / "r.html", *args[3:])
    assert f"{tmp_path / 'no'} is not a folder: make it" in message and not (copy / "eval").exists()


@pytest.mark.parametrize("command", ["eval RUN", "analyze RUN", "predict RUN x.png", "export RUN --format pt2"])
def test_a_backend_that_there_is_not(command, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with mk.use_backend("triton" if not torch.cuda.is_available() else "cpp"):
        args = [run[0] if part == "RUN" else part for part in command.split()]
        monkeypatch.setattr(backends, "_runs", lambda *_: False)
        backends._choose.cache_clear()
        message = fails(capsys, *args)
    backends._choose.cache_clear()
    assert "can't run on a" in message and not list(tmp_path.iterdir())


def test_json_that_cannot_be_written(copy, tmp_path, capsys):
    assert cli.main(["eval", str(copy), "--json", str(tmp_path)]) == 2
    assert f"{tmp_path} can't be written (Is a directory)" in capsys.readouterr().err


def test_a_result_goes_through_a_pipe_or_a_link(tmp_path):
    """A device in the file's place stays what it is: root's /dev/null was replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    cli.write_result(tmp_path / "pipe", {"acc": 1.0})
    assert (tmp_path / "pipe").is_fifo() and json.loads(os.read(reader, 99)) == {"acc": 1.0}
    os.close(reader)
    (tmp_path / "link").symlink_to("file")
    cli.write_result(tmp_path / "link", {"acc": 2.0})
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "file").read_text()) == {"acc": 2.0}
    with pytest.raises(InputError, match="Is a directory"):
        cli.write_result(Path("."), {})
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "file"}


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    processes = iter((1, 2))
    monkeypatch.setattr(os, "getpid", lambda: next(processes))
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        first.write("first")
        second.write("second")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_names_do_not_break_a_message_of_one_line(copy, tmp_path, capsys):
    for name in ("a\nb", "\x1b[31mred", "caf\udce9"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").write_text("")
    message = fails(capsys, "eval", copy, "--folder", tmp_path / "images")
    assert r"\x1b[31mred, a\nb, caf\udce9" in message


@pytest.mark.parametrize("missing", ["tyro", "sklearn.datasets", "matplotlib.figure"])
def test_missing_extra(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # so that importing it fails
    for name in ("loop", "curves", "report"):
        monkeypatch.delitem(sys.modules, f"mpvg_kernels.train.{name}", raising=False)
        monkeypatch.delattr(mk.train, name, raising=False)
    message = fails(capsys, "train", "--recipe", "digits", "--out", tmp_path / "run", *FAST_ARGS)
    package = missing.partition(".")[0]
    assert f"{package} is not installed; `pip install 'mpvg_kernels[train]'` brings it" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field, value", [("tensorboard", "True"), ("wandb", "project")])
def test_missing_logger(tmp_path, monkeypatch, capsys, field, value):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = fails(capsys, *("train", "--recipe", "digits", "--out", tmp_path / "run", f"--log.{field}", value))
    assert f"config field log.{field} is " in message and f"`pip install {field}` brings it" in message
    assert not list(tmp_path.iterdir())


def test_bench_without_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "none")
    assert "run `mpvg bench` in a clone of the repository" in fails(capsys, "bench", "dual_ln")


# ---- demo and Makefile


@pytest.mark.parametrize("bounds, code", [((0, 1e-5), 0), ((101, -1), 1)], ids=["good", "bad"])
def test_demo(tmp_path, monkeypatch, capfd, bounds, code):
    # The real demo on a tiny model, with a benchmark that answers at once; its bounds decide the exit code.
    fused = mk.backends.resolve("cpu")
    row = {"inputs": "x", "mode": "fwd", "B": 2, "N": 3, "D": 4, "dtype": "fp32", "provider": "cpp", "status": "ok"}
    row |= {"ms": 1.5, "roof_percent": 88.0, "speedup_eager": 2.0, "speedup_compile": None}
    script = f"import json, sys; open(sys.argv[3], 'w').write(json.dumps({{'rows': [{row!r}]}}))"
    for name in demo.OPERATORS:
        (tmp_path / f"bench_{name}.py").write_text(script)
    small = config.from_args(recipes.load("digits"), [*FAST_ARGS, "--epochs", "1", "--sched.warmup_epochs", "0"])
    monkeypatch.setattr(demo, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(recipes, "load", lambda name: small)
    monkeypatch.setattr(demo, "MIN_ACCURACY", bounds[0])
    monkeypatch.setattr(demo, "MAX_LOSS_DIFFERENCE", bounds[1])
    monkeypatch.setattr(demo, "UPDATES", 3)
    assert cli.main(["demo", "--out", str(tmp_path / "run")]) == code
    out, err = capfd.readouterr()
    assert ("FAILED: test accuracy" in err) == bool(code)
    assert ("FAILED: the loss differs" in err) == (bool(code) and fused != "reference")
    assert len(re.findall(r"\[[1-4]/4\] took \d", out)) == 4 and f"report: {tmp_path / 'run' / 'report.md'}" in out
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| x fwd | 2x3x4 fp32 | cpp | 1.500 | 88 % | 2.00x | - |" in report
    assert "Largest relative loss difference" in report or "Nothing to compare" in report


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target, runs", [("demo", "-m mpvg_kernels demo"), ("test", "-m pytest")])
def test_make(tmp_path, target, runs):
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}

    def plan(**more: str) -> str:
        return subprocess.run(
            ["make", "-n", target], cwd=tmp_path, env=env | more, capture_output=True, text=True, check=True
        ).stdout

    text = plan()
    torch_first = text.index("ninja numpy torch"), text.index("--no-build-isolation")
    assert "-m venv .venv" in text and torch_first == tuple(sorted(torch_first)) and f".venv/bin/python {runs}" in text
    # an environment that is active is used as it is
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    (active / "bin" / "python").touch()
    text = plan(VIRTUAL_ENV=str(active))
    assert "-m venv" not in text and f"{active}/bin/python -m pip" in text and f"{active}/bin/python {runs}" in text
    # installed already: nothing but the run, until a source changes
    stamp = re.search(r"touch (\S+)", text).group(1)
    Path(stamp).touch()
    assert "pip" not in plan(VIRTUAL_ENV=str(active))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cpp").touch()
    os.utime(tmp_path / "csrc" / "kernel.cpp", (time.time() + 5, time.time() + 5))
    assert "--no-build-isolation" in plan(VIRTUAL_ENV=str(active))
