"""What a run measures and logs: sums on the device, spikes, skipped updates, log files on a full disk, the progress."""

import errno
import fcntl
import io
import json
import math
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch

from mpvg_kernels.train import metrics
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.guards import SkippedUpdates
from mpvg_kernels.train.metrics import LogFile, Meter, RunLog, Spikes, read_log

CPU = torch.device("cpu")
TRAIN = {"epoch": 1, "step": 2, "lr": 0.1, "loss": 1.5, "acc": 50.0, "img_s": 10.0}
EPOCH = TRAIN | {f"{kind}_{key}": 1.0 for kind in ("train", "test", "ema") for key in ("loss", "acc")}
EPOCH |= {"grad_norm": 1.0, "skipped": 0, "bad_images": 2}


def test_meter_leaves_skipped_updates_out_of_the_means():
    meter = Meter(CPU)
    meter.add(torch.tensor([8.0, 3, 4, 2, 1, 0], dtype=torch.float64))
    meter.add(torch.tensor([0.0, 1, 0, 0, 1, 1], dtype=torch.float64))
    meter.add(torch.tensor([4.0, 0, 4, 4, 1, 0], dtype=torch.float64))
    assert meter.read(World()) == {"loss": 1.5, "acc": 50.0, "grad_norm": 3.0, "skipped": 1, "images": 8}
    meter.reset()
    found = meter.read(World())  # no division by zero, and no loss of 0 that looks like success
    assert found["images"] == 0 and math.isnan(found["loss"]) and math.isnan(found["acc"])


def skipped(pattern: str, losses: str | None = None) -> tuple[int, int, bool]:
    """Read after updates of which the x ones were skipped (losses: those whose loss was the reason)."""
    counter = SkippedUpdates(CPU)
    for update, (mark, loss) in enumerate(zip(pattern, losses or pattern, strict=True)):
        counter.add(torch.tensor(mark == "x"), torch.tensor(loss == "x"), update)
    return counter.read()


def test_longest_row_of_skipped_updates():
    assert skipped("....") == (0, 0, False)
    assert skipped("x.xx.x")[:2] == (2, 2)
    assert skipped("xxx.xx")[:2] == (3, 0)
    assert skipped("..xxxx", "....xx") == (4, 2, False)  # the first one's reason
    assert skipped("..xxxx", "..x...") == (4, 2, True)


def test_spikes():
    spikes = Spikes()
    assert not any(spikes(1 + 0.01 * (i % 3)) for i in range(50))
    assert spikes(1.5) and not Spikes()(1e9)  # nothing to compare the first with
    falling = Spikes()
    assert not any(falling(10 / (1 + i)) for i in range(200))
    # its state is three numbers, from which it goes on
    again = Spikes()
    vars(again).update(vars(spikes))
    assert again(3.0) == spikes(3.0) and vars(again) == vars(spikes)


class FullDisk:
    """A file that takes a few bytes at a time, and none while `full`."""

    def __init__(self, file):
        self.file, self.full = file, False

    def write(self, data):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:5])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_log_lines_survive_a_full_disk(tmp_path):
    warnings = []
    log = LogFile(tmp_path / "log", warnings.append)
    disk = log._file = FullDisk(log._file)
    log.write("a line of some length")
    disk.full = True
    log.write("second")
    log.write("third")
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    expected = "a line of some length\nsecond\nthird\nfourth\n"
    assert (tmp_path / "log").read_text() == "a line of some length\n"
    disk.full = False
    log.write("fourth")
    assert (tmp_path / "log").read_text() == expected


def test_run_log(tmp_path, capsys):
    with RunLog(tmp_path, 10) as log:
        log.train(TRAIN)
        log.epoch(EPOCH, True)
        log.write("spike", {"step": 3})
        names = [Path(file.name).name for file in log.files]
        assert all(os.fstat(file.fileno()).st_size for file in log.files)
    assert names == ["log.jsonl", "metrics.csv"]
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",") == list(metrics.columns("classification")) and len(row.split(",")) == 13
    assert [r["step"] for kind in ("train", "epoch", "spike") for r in read_log(tmp_path, kind)] == [2, 2, 3]
    printed = capsys.readouterr().out
    assert "ema loss 1.0000" in printed and printed.rstrip().endswith("best")
    with RunLog(tmp_path, 10, 5) as log:  # goes on in the same files, without another header
        log.epoch({k: v for k, v in EPOCH.items() if not k.startswith(("test", "ema"))}, False)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[2] == "1,2,0.1,1.0,1.0,,,,,1.0,0,2,10.0"


def test_looks_at_the_position_embedding(tmp_path, monkeypatch):
    row = {"epoch": 1, "step": 4, "layers": [1, "last"], "pos_norm": [9.5, 8.0], "correlation": [-0.5, None]}
    with RunLog(tmp_path, 10) as log:
        sent = []
        monkeypatch.setattr(
            log, "_wandb", type("Wandb", (), {"log": lambda _, numbers, step: sent.append((numbers, step))})()
        )
        log.pos(row)
        monkeypatch.setattr(log, "_wandb", None)
    (line,) = read_log(tmp_path, "pos")
    assert {key: line[key] for key in row} == row
    assert sent == [({"pos/pos_norm/1": 9.5, "pos/pos_norm/last": 8.0}, 4), ({"pos/correlation/1": -0.5}, 4)]


def test_lines_a_minute_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "PLAIN_INTERVAL_S", 0.0)
    with RunLog(tmp_path, 10) as log:
        log.train(TRAIN)
    assert "step 2/10  epoch 1, loss 1.500, acc 50.0 %, 10 img/s" in capsys.readouterr().out


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, 10) as log:
        log.train(TRAIN)
        log.epoch(EPOCH, True)
        log.write("spike", {})
        log.say("hello")
        assert log.files == ()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_tensorboard_is_used_where_it_is(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path, 10, 4, tensorboard=None) as log:
        log.train(TRAIN)
    assert written[0] == (str(tmp_path / "tensorboard"), 5) and written[-1] == "closed"
    assert ("train/loss", 1.5, 2) in written
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, 10, tensorboard=None) as log:  # not installed: left out
        log.train(TRAIN)
    with pytest.raises(ModuleNotFoundError):
        RunLog(tmp_path, 10, tensorboard=True)


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []
    module = type(sys)("wandb")
    module.init = lambda **kwargs: calls.append(kwargs) or module
    module.log = lambda numbers, step: calls.append((step, numbers))
    module.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", module)
    with RunLog(tmp_path / "", 10, wandb="vit", config={"seed": 1}) as log:
        log.train(TRAIN)
    assert calls[0] == {
        **{"project": "vit", "id": tmp_path.name, "name": tmp_path.name, "resume": "allow", "config": {"seed": 1}}
    }
    assert calls[1][0] == 2 and calls[1][1]["train/acc"] == 50.0 and calls[-1] == "finished"


def test_a_log_that_is_cut_mid_line_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "train", "step": 1}) + '\n{"kind": "tra')
    assert read_log(tmp_path, "train") == [{"kind": "train", "step": 1}]


def test_output_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    """A scheduler keeps the output in a file, often on the disk of the runs."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True))
    with RunLog(tmp_path, 4) as log:
        log.say("text")
        log.warn("text")
        log.epoch(EPOCH, True)
    assert len(read_log(tmp_path, "epoch")) == 1


def test_other_processes_say_nothing(capsys):
    with RunLog(None, 4) as log:
        log.warn("the first says it")
        log.say("and this")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("lines", [0, 40])
def test_bar_needs_a_terminal_with_a_size(tmp_path, monkeypatch, capsys, lines):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 150, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with RunLog(tmp_path, 4) as log:
            log.epoch(EPOCH, True)
    os.close(ours)
    assert ("epoch   1" in capsys.readouterr().out) == (lines == 0)


def test_the_log_is_strict_json(tmp_path):
    """A number that is not finite is null, so that any program can read the file."""
    with RunLog(tmp_path, 4) as log:
        log.train(TRAIN | {"loss": math.nan, "acc": math.inf})
        log.write("pos", {"step": 1, "pos_norm": [1.0, -math.inf], "nested": {"x": math.nan}})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] is None and lines[0]["acc"] is None and lines[0]["lr"] == 0.1
    assert lines[1]["pos_norm"] == [1.0, None] and lines[1]["nested"] == {"x": None}


def test_lines_that_cannot_be_read_are_left_out(tmp_path):
    assert read_log(tmp_path, "train") == []  # no log yet
    lines = ["[1]", '{"step": 1}', '{"kind": "train", "loss": NaN}', "", "\x00", '{"kind": "train", "step": 2}']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n" + b'{"kind": "train", "step": 3}')
    assert read_log(tmp_path, "train") == [{"kind": "train", "loss": None}, {"kind": "train", "step": 3}]
    assert metrics.parse_lines(tmp_path / "log.jsonl")[1] == 4


def test_a_loss_that_is_not_finite_is_no_spike_and_not_remembered():
    spikes = Spikes()
    assert not any(spikes(1.0) for _ in range(20))
    before = dict(vars(spikes))
    assert not any(spikes(loss) for loss in (None, math.nan, math.inf)) and vars(spikes) == before
    assert spikes(2.0)
