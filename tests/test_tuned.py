"""The table of measured launch choices, and the tuner that writes it, on a clock that is made up."""

import dataclasses
import json
import subprocess
import sys
import warnings

import pytest
import torch
from cases import Case, check

import mpvg_kernels as mk

pytest.importorskip("triton", reason="Triton is not installed")

from mpvg_kernels import tuned  # noqa: E402
from mpvg_kernels.triton_ops import tiles, tune  # noqa: E402

CPU = torch.device("cpu")
CHOICE = {"threads": 256, "elements_per_thread": 16, "warps": 2, "stages": 3}
ENTRY = {"kernel": "pe_layer_norm_fwd", "dtype": "fp32", "D": 64, "choice": CHOICE}
BACKENDS = {"operator": "pe_norm_pool", "dtype": "bf16", "D": 64, "us": {"triton": 3.0, "cuda": 2.5}}


@pytest.fixture(autouse=True)
def _reads_again():
    tuned.forget()
    yield
    tuned.forget()


def table(**changes) -> dict:
    return {"format": 1, "devices": {"cpu": {"entries": [ENTRY], "backends": [BACKENDS]} | changes}}


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """A function that writes a table and makes it the user's."""

    def write(content) -> None:
        path = tmp_path / "table.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(tuned.VARIABLE, str(path))

    return write


def rules(kernel="pe_layer_norm_fwd", device=CPU, dtype=torch.float32, D=64):
    return tuned.loop_rules(tiles.RULES.pe_layer_norm_fwd, kernel, device, dtype, D)


def test_fields_are_those_of_the_rules():
    assert set(tuned.FIELDS) == {field.name for field in dataclasses.fields(tiles.LoopRules)}
    assert {f"{kernel}" for kernel in tuned.KERNELS} <= {field.name for field in dataclasses.fields(tiles.LaunchRules)}


def test_the_packages_table_is_one():
    tuned.read(tuned.PACKAGED)


def test_a_choice_holds_for_its_kernel_device_dtype_and_width(user_table):
    user_table(table())
    assert dataclasses.asdict(rules()) == CHOICE
    default = tiles.RULES.pe_layer_norm_fwd
    others = dict(kernel="pe_layer_norm_bwd"), dict(dtype=torch.bfloat16), dict(D=65), dict(device=torch.device("meta"))
    for other in others:
        assert rules(**other) == default


def test_a_part_of_a_choice_keeps_the_rest(user_table):
    user_table(table(entries=[ENTRY | {"choice": {"warps": 8}}]))
    assert rules() == dataclasses.replace(tiles.RULES.pe_layer_norm_fwd, warps=8)


def test_none_reads_no_table(user_table, monkeypatch):
    user_table(table())
    monkeypatch.setenv(tuned.VARIABLE, "none")
    assert rules() == tiles.RULES.pe_layer_norm_fwd


def test_the_users_table_counts_more_than_the_packages(user_table, tmp_path, monkeypatch):
    packaged = tmp_path / "packaged.json"
    entries = [ENTRY | {"choice": {"warps": 1}}, ENTRY | {"D": 8, "choice": {"warps": 8}}]
    packaged.write_text(json.dumps(table(entries=entries)))
    monkeypatch.setattr(tuned, "PACKAGED", packaged)
    user_table(table())
    assert dataclasses.asdict(rules()) == CHOICE and rules(D=8).warps == 8


def test_fastest_backend(user_table):
    user_table(table())
    assert tuned.fastest("pe_norm_pool", CPU, torch.bfloat16, 64) == "cuda"
    assert tuned.fastest("pe_layer_norm", CPU, torch.bfloat16, 64) is None


WRONG = {
    "no JSON": ("{", "is no JSON"),
    "another format": ({"format": 2, "devices": {}}, "has format 2, and this version reads format 1"),
    "no table": ([1], "has format None"),
    "no devices": ({"format": 1}, "has no dict of devices"),
    "no list": (table(entries={}), "has no list of entries for 'cpu'"),
    "no kernel": (table(entries=[ENTRY | {"kernel": "k"}]), "kernel 'k', expected one of pe_layer_norm_fwd"),
    "no dtype": (table(entries=[ENTRY | {"dtype": "int8"}]), "dtype 'int8'"),
    "no width": (table(entries=[ENTRY | {"D": 0}]), "D 0"),
    "unknown field": (table(entries=[ENTRY | {"choice": {"speed": 1}}]), "for some of threads, elements"),
    "no integer": (table(entries=[ENTRY | {"choice": {"warps": "4"}}]), "expected positive integers"),
    "odd warps": (table(entries=[ENTRY | {"choice": {"warps": 3}}]), "no power of two"),
    "no times": (table(backends=[BACKENDS | {"us": {}}]), "expected a time for each backend"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_users_table_that_is_wrong_is_an_error(case, user_table):
    content, message = WRONG[case]
    user_table(content)
    with pytest.raises(tuned.TableError, match=message) as error:
        rules()
    assert "table.json" in str(error.value) and "mpvg_kernels.triton_ops.tune` writes one" in str(error.value)


def test_a_missing_table_is_an_error(monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, "/nowhere/table.json")
    with pytest.raises(tuned.TableError, match="/nowhere/table.json can't be read: No such file"):
        rules()


def test_the_packages_table_that_is_wrong_is_a_warning(tmp_path, monkeypatch):
    broken = tmp_path / "tuned.json"
    broken.write_text('{"format": 7}')
    monkeypatch.setattr(tuned, "PACKAGED", broken)
    with pytest.warns(UserWarning, match="format 7.*going on with the default choices"):
        assert rules() == tiles.RULES.pe_layer_norm_fwd
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules()  # said once


def test_writing_keeps_the_other_devices(tmp_path):
    path = tmp_path / "tuned.json"
    tuned.write(path, "A", {"entries": [ENTRY]})
    tuned.write(path, "B", {"entries": []})
    tuned.write(path, "A", {"entries": []})
    assert tuned.read(path)["devices"] == {"A": {"entries": []}, "B": {"entries": []}}
    path.write_text("mine")
    with pytest.raises(tuned.TableError):
        tuned.write(path, "A", {"entries": []})
    assert path.read_text() == "mine"


def test_neighbours_differ_in_one_step_of_one_field():
    found = list(tune.neighbours(CHOICE))
    assert len(found) == 7  # threads has nothing below 256
    assert all(sum(c[k] != CHOICE[k] for k in CHOICE) == 1 for c in found)
    assert {c["warps"] for c in found} == {1, 2, 4}


def test_search_goes_down_to_the_least_and_times_each_once():
    timed = []

    def clock(choice):
        timed.append(tuple(choice.items()))
        return 100 + 10 * abs(choice["warps"] - 8) + 10 * abs(choice["stages"] - 1)

    best, us = tune.search(CHOICE, clock)
    assert best == CHOICE | {"warps": 8, "stages": 1} and us == 100
    assert len(set(timed)) == len(timed)


def test_search_keeps_what_is_not_beaten_by_the_noise():
    best, us = tune.search(CHOICE, lambda choice: 100 if choice == CHOICE else 99)
    assert (best, us) == (CHOICE, 100)
    assert tune.search(CHOICE, lambda choice: 100 if choice == CHOICE else float("inf"))[0] == CHOICE


def test_tune_lists_what_beats_the_rules(capsys):
    def clock(kernel, dtype, D, choice):
        return 50.0 if (kernel, dtype, D, choice["stages"]) == ("pe_norm_pool_fwd", "bf16", 192, 2) else 80.0

    entries = tune.tune(("pe_norm_pool_fwd", "pe_norm_pool_bwd"), ("bf16", "fp32"), (192, 384), clock)
    (entry,) = entries
    assert (entry["kernel"], entry["dtype"], entry["D"]) == ("pe_norm_pool_fwd", "bf16", 192)
    assert entry["choice"]["stages"] == 2 and (entry["us"], entry["default_us"]) == (50.0, 80.0)
    assert set(entry["choice"]) == set(tuned.FIELDS)
    assert tuned._wrong_choice(entry) == ""
    assert "pe_norm_pool_fwd bf16 192: 80.0 us by the rules, 50.0 us with stages 2" in capsys.readouterr().out


def test_calls_run_every_kernel(monkeypatch):
    """Each call that is timed plans its own kernel's launch, reading what READS says, and gives results."""
    if "triton" not in mk.available_backends():
        pytest.skip(mk.backends.status("triton").reason)
    planned = []
    launch = tiles.launch

    def recorded(kernel, device, dtype, shape, read_bytes, partials):
        planned.append((kernel, shape[1:], read_bytes))
        return launch(kernel, device, dtype, shape, read_bytes, partials)

    monkeypatch.setattr(tune, "BYTES", 4000)
    for module in ("pe_layer_norm", "pe_norm_pool"):
        monkeypatch.setattr(getattr(mk.triton_ops, module), "launch", recorded)
    calls = tune.calls("fp32", 48, "triton", "cuda" if torch.cuda.is_available() else "cpu")
    assert tuple(calls) == tuned.KERNELS
    for kernel, call in calls.items():
        planned.clear()
        result = call()
        assert (kernel, (tune.TOKENS, 48), 4 * tune.READS[kernel]) in planned
        assert result[0].isfinite().all()


def test_without_a_gpu_the_tuner_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: it would tune")
    command = [sys.executable, "-m", "mpvg_kernels.triton_ops.tune"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "tune: there is nothing to time, as no CUDA GPU is visible\n"


@pytest.mark.parametrize("op", ("norm", "pool"))
@pytest.mark.parametrize("elements_per_thread", tune.VALUES["elements_per_thread"])
@pytest.mark.parametrize("warps", tune.VALUES["warps"])
def test_every_choice_computes_the_same(op, elements_per_thread, warps):
    """Results under the choices that the tuner tries are held to the accuracy rule."""
    if "triton" not in mk.available_backends():
        pytest.skip(mk.backends.status("triton").reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = {"threads": 256, "elements_per_thread": elements_per_thread, "warps": warps, "stages": 2}
    operator = {"norm": "pe_layer_norm", "pool": "pe_norm_pool"}[op]
    kernels = [kernel for kernel in tuned.KERNELS if kernel.startswith(operator)]
    first, second = (tuned.trial(kernel, "fp32", 96, choice) for kernel in kernels)
    with mk.use_backend("triton"), first, second:
        check(op, Case(3, 7, 96, branch_dtype=torch.float32, scale=True, device=device))
