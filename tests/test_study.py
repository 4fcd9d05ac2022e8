"""`mpvg study`: its statistics on numbers with known answers, and a small study that is stopped, killed and spoilt."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from scipy import stats

from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import statistics, study, study_report
from mpvg_kernels.train import InputError, loop
from mpvg_kernels.train.run_folder import RunFolder
from mpvg_kernels.train.signals import PASSED_ON, Signals

pytestmark = pytest.mark.xdist_group(__name__)  # one process that has imported everything, for all of its studies
FIELDS = "--epochs 2 --sched.warmup_epochs 0 --model.patch_size 4 --model.embed_dim 32 --model.depth 2"
FIELDS = [*FIELDS.split(), "--model.num_heads", "2", "--device", "cpu"]
SCHEMES = ["gap", "mpvg"]
RUNS = [f"{scheme}-seed-{seed}" for seed in range(2) for scheme in SCHEMES]


# ---- statistics


def test_estimate():
    found = statistics.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977987 * math.sqrt(2.5) / math.sqrt(5)  # Student's t at 0.975 with 4 degrees of freedom
    assert found == pytest.approx((5, 3.0, math.sqrt(2.5), 3 - half, 3 + half))
    assert statistics.estimate([2.0]) == (1, 2.0, None, None, None)
    same = 100 * 351 / 360 - 100 * 350 / 360  # the difference of two accuracies, with its rounding error
    assert statistics.estimate([same, 100 / 360, same])[2:] == (0.0, None, None)
    with pytest.raises(ValueError, match="one value or more"):
        statistics.estimate([])


def test_t_test():
    assert statistics.t_test([1.0, 2.0, 3.0]) == pytest.approx(0.07417990022744853)
    assert statistics.t_test([1.0, 1.0]) is None and statistics.t_test([1.0]) is None


def test_sign_flip_test():
    assert statistics.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8  # only all plus and all minus are as far from 0
    assert statistics.sign_flip_test([1.0, -1.0]) == 1.0 == statistics.sign_flip_test([0.0, 0.0])
    assert statistics.sign_flip_test([3.0, 1.0, -1.0, 2.0]) == 6 / 16  # sums of 5 and 7, 5 in two ways, both signs
    assert statistics.sign_flip_test([0.3] * 40) == 2.0**-39


def test_sign_flip_test_is_that_of_scipy():
    draw = random.Random(0)
    for n in (2, 5, 8):
        for _ in range(10):
            right = [(draw.randint(340, 360), draw.randint(340, 360)) for _ in range(n)]
            images = ([a - b for a, b in right],)
            theirs = stats.permutation_test(images, sum, permutation_type="samples", n_resamples=2**n)
            percent = [100 * a / 360 - 100 * b / 360 for a, b in right]
            assert statistics.sign_flip_test(percent) == pytest.approx(theirs.pvalue), right


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


def test_binomial_error():
    assert statistics.binomial_error(98.0, 360) == pytest.approx(0.7378648)


# ---- comparisons and words


def test_each_comparison_is_made_once():
    assert study_report.pairs(study.SCHEMES) == [
        *(("default", name) for name in study.SCHEMES[1:]),
        *(("gap", name) for name in study.SCHEMES[2:]),
        *(("mpvg", name) for name in study.SCHEMES[6:]),
    ]
    assert study_report.pairs(["pvg", "mpvg"]) == [("pvg", "mpvg")]


def test_comparisons():
    accuracies = {"gap": [90.0, 92.0, 94.0, 91.0], "pvg": [91.0, 93.1, 94.9, 92.0], "mpvg": [90.0, None, 95.0, 93.0]}
    against_pvg, against_mpvg = study_report.compare(accuracies)
    assert (against_pvg["baseline"], against_pvg["scheme"]) == ("gap", "pvg")
    assert against_pvg["differences"] == pytest.approx([1.0, 1.1, 0.9, 1.0])
    assert (against_pvg["n"], against_pvg["mean"], against_pvg["sign_flip_p"]) == pytest.approx((4, 1.0, 2 / 16))
    assert against_mpvg["differences"] == [0.0, None, 1.0, 2.0] and against_mpvg["n"] == 3
    theirs = stats.ttest_rel(accuracies["pvg"], accuracies["gap"])
    interval = theirs.confidence_interval()
    assert (against_pvg["low"], against_pvg["high"]) == pytest.approx((interval.low, interval.high))
    assert against_pvg["t_p"] == pytest.approx(theirs.pvalue)
    assert against_pvg["holm_p"] == pytest.approx(2 * theirs.pvalue) and study_report.beyond(against_pvg)
    assert against_mpvg["holm_p"] == against_mpvg["t_p"] > 0.05 and not study_report.beyond(against_mpvg)


def claim_of(**accuracies) -> str:
    return study_report.claim(study_report.compare(accuracies))


def test_claim_says_what_the_intervals_allow():
    base = [90.0, 92.0, 94.0, 91.0, 93.0]
    above = [value + 1 + shift for value, shift in zip(base, (0, 0.1, -0.1, 0.1, -0.1), strict=True)]
    around = [value + shift for value, shift in zip(base, (1, -1, 1, -1, 0), strict=True)]
    text = claim_of(gap=base, pvg=around)
    assert text.startswith("No scheme differs from gap beyond the 95 % interval")
    text = claim_of(gap=base, pvg=above, mpvg=around)
    assert "against gap, pvg +1.00 (0.88 to 1.12)." in text and "The other 1 of 2 comparisons" in text
    assert "what remains is pvg against gap" in text and "can't go below 0.0625" in text
    hint = [value + 1 + shift for value, shift in zip(base, (0, 0.9, -0.9, 0.6, -0.6), strict=True)]
    text = claim_of(**{"gap": base, "pvg": hint, "mpvg": around, "lape": around})
    assert "against gap, pvg +1.00" in text and "none remains" in text
    assert "at least two seeds" in claim_of(gap=[90.0], pvg=[99.0]) == claim_of(gap=[90.0, 91.0], pvg=[91.0, 92.0])
    assert "sign-flip" not in claim_of(gap=[*base, 90.5], pvg=[*above, 91.6])  # 2 / 64 is below 5 %


# ---- what is asked for


def runs_of(schemes=SCHEMES, fields=FIELDS, recipe="digits", seeds=2) -> list[study.Run]:
    return study.runs_of(recipe, schemes, seeds, fields, Path("out"))


def test_runs():
    runs = runs_of([*SCHEMES, "mpvg( add_to_input=False,last=None )"])
    assert [run.folder.name for run in runs[:3]] == ["gap-seed-0", "mpvg-seed-0", "pvg-add_to_input=False-seed-0"]
    assert [run.seed for run in runs] == [run.config.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    assert [run.config.model.scheme for run in runs[:3]] == ["gap", "mpvg", "pvg(add_to_input=False)"]
    assert all(run.config.epochs == 2 for run in runs)


def test_schemes_of_another_name_are_trained_once(capsys):
    names = [run.scheme for run in runs_of(study.SCHEMES, [], "swin_tiny_in1k", 1)]
    assert names == ["gap", "lape_gap", "pvg", "mpvg", "mpvg(hierarchical=False)", "mpvg(add_to_input=False)"]
    assert "'mpvg(first_layer=0)' is 'mpvg' in mpvg_swin_tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(schemes=["mpgv"]), "unknown position scheme 'mpgv' (did you mean mpvg"),
        (dict(schemes=["mpvg(last=7)"]), "a model of depth 2 has layers 0 to 1"),
        (dict(fields=["--seed=3"]), "choose by --seeds N"),
        (dict(fields=["--model.scheme", "gap"]), "choose by --schemes"),
        (dict(fields=["--lr", "1"]), "did you mean 'optim.lr'"),
        (dict(fields=["--model.name", "vit_tiny_patch16_224"]), "vit_tiny_patch16_224 can't be made with the scheme"),
        (
            dict(fields=["--model.name", "mpvg_diet"]),
            "config field model.name is 'mpvg_diet', which timm does not know",
        ),
        (dict(seeds=0), "--seeds is 0, expected 1 or more"),
        (dict(recipe="digit"), "did you mean 'digits'"),
    ],
)
def test_bad_requests(options, expected):
    with pytest.raises(InputError) as error:
        runs_of(**options)
    assert expected in str(error.value)


def test_not_under_torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without torchrun"):
        study.study("digits", out=tmp_path)


def test_jobs(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    config = runs_of()[0].config
    counts = {threads: study.default_jobs(dataclasses.replace(config, threads=threads)) for threads in (1, 3, 16, None)}
    assert counts == {1: 8, 3: 2, 16: 1, None: 1}


def test_pooled_schemes_begin_alike():
    """What study.md says about pairs."""
    weights = {run.scheme: loop.Trainer(run.config).model.state_dict() for run in runs_of(study.SCHEMES, seeds=1)}
    for name, found in weights.items():
        same = all(torch.equal(value, found[key]) for key, value in weights["gap"].items() if key != "pos_embed")
        assert same == (name not in ("default", "lape")), name


def test_a_signal_that_is_passed_on_is_the_same_signal(monkeypatch):
    """A terminal or a scheduler sends one to a study's processes, and so does the study."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for variables, expected in (({}, [130]), (dict.fromkeys(PASSED_ON[1:], "1"), [])):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGINT" and ended == expected
        ended.clear()


# ---- a study


def start(out: Path, *more: str) -> int:
    return cli.main(["study", "digits", "--seeds", "2", "--schemes", *SCHEMES, "--out", str(out), *FIELDS, *more])


def start_by_fork(out: Path) -> int:
    """`start` in a process that is itself the forkserver's child, and need not start another (10 s)."""
    study.START_METHOD = "fork"
    return start(out, "--jobs", "1")


def states(out: Path) -> list[str | None]:
    paths = [out / name / "status.json" for name in RUNS]
    return [json.loads(path.read_text())["state"] if path.exists() else None for path in paths]


def wait_for(done) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def without_cost(out: Path) -> dict:
    return {key: value for key, value in json.loads((out / "study.json").read_text()).items() if key != "cost"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study in whose folder one run could not be made at first, and what it said then; whole by a second start."""
    out = tmp_path_factory.mktemp("study") / "whole"
    stray = out / RUNS[2] / "notes.txt"
    stray.parent.mkdir(parents=True)
    stray.write_text("not a run")
    assert start(out, "--jobs", "2") == 1
    first = (out / "study.md").read_text(), without_cost(out), states(out)
    stray.unlink()
    assert start(out) == 0
    return out, *first


def test_failed_run_is_told_and_the_others_go_on(whole):
    out, text, found, state = whole
    assert state == ["finished", "finished", None, "finished"]
    assert list(found["failed"]) == ["gap seed 1"] and "nothing is overwritten" in found["failed"]["gap seed 1"]
    assert f"- gap seed 1: {found['failed']['gap seed 1']}" in text
    assert found["schemes"]["gap"]["accuracy"][1] is None and found["comparisons"][0]["n"] == 1
    assert states(out) == ["finished"] * 4 and without_cost(out)["failed"] == {}


def test_what_a_study_writes(whole):
    out, found = whole[0], without_cost(whole[0])
    assert {path.name for path in out.iterdir()} == {
        *("study.md", "study.json", "accuracy.png", "differences.png", "correlation.png"),
        *("costs.jsonl", "logs", ".lock", *RUNS),
    }
    for scheme, seed in itertools.product(SCHEMES, range(2)):
        folder = RunFolder(out / f"{scheme}-seed-{seed}")
        row = found["schemes"][scheme]
        assert row["accuracy"][seed] == json.loads((folder.path / "status.json").read_text())["test_acc"]
        assert row["parameters"] == folder.info["parameters"]
        assert row["bias_variance"][seed] == pytest.approx(float(folder.model().norm.bias.detach().var(unbiased=False)))
        assert (out / "logs" / f"{folder.path.name}.log").read_text().count("test accuracy") == 1
    layers = [each["layer"] for each in found["schemes"]["mpvg"]["correlation"]]
    assert layers == [1, "last"] and found["schemes"]["gap"]["correlation"] == []
    assert all(-1 <= each["mean"] <= 1 and each["n"] == 2 for each in found["schemes"]["mpvg"]["correlation"])
    assert found["test_images"] == 360 and found["image_percent"] == pytest.approx(100 / 360)
    costs = json.loads((out / "study.json").read_text())["cost"]
    assert costs["runs"] == 4 and 0.2 < costs["cpu_s"] < 120 and len(costs["machines"]) == 1
    text = (out / "study.md").read_text()
    command = "mpvg study digits --seeds 2 --schemes gap mpvg " + " ".join(FIELDS)
    assert found["claim"] in text and command in text and "Small data and a small model can't settle" in text


def test_a_run_is_what_train_makes(whole, tmp_path):
    run = runs_of()[1]
    folder = loop.train(run.config, tmp_path / "run", "digits")
    assert (folder.path / "last" / "model.safetensors").read_bytes() == (
        whole[0] / run.folder.name / "last" / "model.safetensors"
    ).read_bytes()


def test_without_images_there_are_the_accuracies(whole, monkeypatch, tmp_path):
    def refuse(*_):
        raise InputError("the images are elsewhere")

    monkeypatch.setattr(study, "open_images", refuse)
    runs = study.runs_of("digits", SCHEMES, 2, FIELDS, whole[0])
    found = study.look_at(runs, "digits", FIELDS, whole[0], {})
    study_report.write(found, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "Not looked at: the images are elsewhere." in text and "binomial standard error of" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"study.md", "accuracy.png", "differences.png"}
    assert found["comparisons"] == without_cost(whole[0])["comparisons"]


def test_half_a_line_of_the_costs_is_left_out(tmp_path):
    (tmp_path / "costs.jsonl").write_text('{"run": "x", "wall_s": 1.0, "cpu_s"')
    assert study._cost(tmp_path, runs_of(seeds=1), [])["runs"] == 0


def test_other_fields_are_refused(whole, capsys):
    before = states(whole[0])
    assert start(whole[0], "--optim.lr", "1e-3") == 2
    assert "holds a run with optim.lr 0.002, and the config now says 0.001" in capsys.readouterr().err
    assert states(whole[0]) == before


def test_stopped_and_killed_it_ends_in_the_same(whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cut"
    monkeypatch.setattr(study, "POLL_S", 0.02)  # a run of this size is over in half a second

    def stop():
        wait_for(lambda: states(out)[0] is not None)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert start(out, "--jobs", "1") == 75
    thread.join()
    assert states(out) == ["preempted", None, None, None]
    assert "0 of 4 runs are finished; the same command goes on" in capsys.readouterr().err
    assert not (out / "study.json").exists()

    process = multiprocessing.get_context("forkserver").Process(target=start_by_fork, args=(out,))
    process.start()
    wait_for(lambda: states(out)[1] is not None)
    assert start(out) == 2  # another process is at it
    assert f"is being written by process {process.pid}" in capsys.readouterr().err
    process.kill()
    process.join()

    def free() -> bool:  # the run's own process ends with the study's
        run = RunFolder(out / RUNS[1])
        try:
            run.lock()
        except InputError:
            return False
        run.unlock()
        return True

    wait_for(free)
    assert states(out) == ["finished", "running", None, None]

    assert start(out) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 runs are finished already" in printed and "[4/4] mpvg seed 1: " in printed
    assert without_cost(out) == without_cost(whole[0])
    assert "goes on from step-" in (out / "logs" / f"{RUNS[0]}.log").read_text()
