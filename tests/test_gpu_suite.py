"""benchmarks/gpu_suite.sh without a GPU: it runs to its end, and what its stages would do is checked piece by piece."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_suite  # noqa: E402
from gpu_suite import Failed, Skipped, Suite  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the suite would run")
FACTS = {"torch": "2.99", "cuda": "13.0", "device": "Made-up GPU", "capability": "9.0", "why": ""}


def shell(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, **kwargs)


@pytest.fixture
def suite(tmp_path):
    """A suite in a stage of a minute, on a GPU that is not there."""
    made = Suite(tmp_path, FACTS, None, minutes=1)
    made.stage = "stage"
    return made


# ---- the whole of it


@no_gpu
def test_runs_to_its_end_and_says_why_each_stage_was_skipped(tmp_path):
    done = shell("--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["stage"] for stage in summary["stages"]] == list(gpu_suite.STAGES)
    for stage in summary["stages"]:
        assert stage["status"] == "skipped" and "no CUDA GPU is visible to torch" in stage["note"]
        assert f"{stage['stage']}: skipped (0 s): no CUDA GPU is visible" in done.stdout
    assert "| ncu | skipped | 0 | no CUDA GPU" in (tmp_path / "out" / "summary.md").read_text()


@no_gpu
def test_without_out_nothing_is_written():
    before = {p.name for p in (ROOT / "benchmarks" / "results").iterdir()}
    done = shell("digits")
    assert done.returncode == 0 and "summary: nothing was measured, no CUDA GPU is visible" in done.stdout
    assert "build" not in done.stdout
    assert {p.name for p in (ROOT / "benchmarks" / "results").iterdir()} == before


def test_usage_errors():
    done = shell("speed")
    assert done.returncode == 2 and "unknown stage 'speed': there is wheels, build, tests, operators" in done.stderr
    done = shell("--wheels", "/nowhere")
    assert done.returncode == 2 and "--wheels /nowhere: there is no such folder" in done.stderr


def test_a_broken_torch_is_a_reason(monkeypatch):
    monkeypatch.setattr(gpu_suite, "PROBE", "raise ImportError('libcudart.so is missing')")
    assert gpu_suite.probe() == {"device": None, "why": "torch does not run: ImportError: libcudart.so is missing"}


def test_a_failed_stage_leaves_the_others_and_their_files(tmp_path, monkeypatch):
    def good(suite):
        (suite.out / "good.json").write_text("{}")
        return "fine"

    def bad(suite):
        suite.python("-c", "print('half'); raise SystemExit('it | broke')")

    stages = {"bad": gpu_suite.Stage(bad, 30), "good": gpu_suite.Stage(good, 30)}
    monkeypatch.setattr(gpu_suite, "STAGES", stages)
    monkeypatch.setattr(gpu_suite, "probe", lambda: FACTS)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    found = {stage["stage"]: stage for stage in json.loads((tmp_path / "summary.json").read_text())["stages"]}
    assert found["bad"]["status"] == "failed" and "exit code 1: it | broke" in found["bad"]["note"]
    assert found["good"]["status"] == "ok" and (tmp_path / "good.json").exists()
    assert "half\nit | broke" in (tmp_path / "bad.log").read_text()
    assert "it / broke" in (tmp_path / "summary.md").read_text()  # a bar would end the table's cell


def test_a_stage_that_runs_again_leaves_the_others_lines(tmp_path, monkeypatch):
    notes = iter(["first", "other", "second"])
    stages = {name: gpu_suite.Stage(lambda suite: next(notes), 30) for name in ("one", "two")}
    monkeypatch.setattr(gpu_suite, "STAGES", stages)
    monkeypatch.setattr(gpu_suite, "probe", lambda: FACTS)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 0
    assert gpu_suite.main(["one", "--out", str(tmp_path)]) == 0
    lines = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [(line["stage"], line["note"]) for line in lines] == [("one", "second"), ("two", "other")]
    monkeypatch.setattr(gpu_suite, "probe", lambda: FACTS | {"device": "Another GPU"})
    notes = iter(["third"])
    assert gpu_suite.main(["one", "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "summary.json").read_text())["stages"]) == 1


def test_the_suites_time_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "STAGES", {"late": gpu_suite.Stage(lambda suite: "ran", 30)})
    monkeypatch.setattr(gpu_suite, "probe", lambda: FACTS)
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "0"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["status"] == "skipped"


# ---- commands


def test_a_command_that_takes_too_long_is_asked_to_end(suite):
    code = "import time\ntry:\n time.sleep(30)\nexcept KeyboardInterrupt:\n print('wrote what there was')"
    suite.stage_ends = time.monotonic() + 1.5
    with pytest.raises(Failed, match="out of time after [12] s"):
        suite.python("-c", code)
    assert "wrote what there was" in (suite.out / "stage.log").read_text()


def test_a_command_that_does_not_end_is_killed_with_its_children(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.2)
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    suite.stage_ends = time.monotonic() + 1.5
    with pytest.raises(Failed, match="out of time after [12] s"):
        suite.run(["bash", "-c", f'echo started; {sys.executable} -c "{child}" & wait'])
    assert "started" in (tmp_path / "stage.log").read_text()
    time.sleep(4)
    assert not mark.exists()


def test_a_stage_whose_time_is_over_starts_nothing(suite):
    suite.stage_ends = time.monotonic()
    with pytest.raises(Failed, match="time was over before"):
        suite.python("-c", "pass")


def test_each_goes_on_after_a_failure(suite):
    with pytest.raises(Failed, match="exit code 4.*; .*exit code 5"):
        suite.each([["-c", "raise SystemExit(4)"], ["-c", "print('between')"], ["-c", "raise SystemExit(5)"]])
    assert "between" in (suite.out / "stage.log").read_text()


def test_at_once_keeps_errors_apart(suite):
    results = suite.at_once([lambda: 1, lambda: suite.python("-c", "raise SystemExit(3)"), lambda: 2])
    assert results[0] == 1 and results[2] == 2 and isinstance(results[1], Failed)


@no_gpu
@pytest.mark.parametrize("name", ("operators", "grid", "overhead", "memory", "train", "adapter"))
def test_the_benchmarks_take_the_stages_options(name, suite, monkeypatch, capsys):
    """Each command line is understood by its script, which then misses the GPU and nothing else."""
    import importlib

    commands = []
    monkeypatch.setattr(
        suite, "python", lambda *command, **kwargs: commands.append([str(c) for c in command]) or "triton"
    )
    gpu_suite.STAGES[name].call(suite)
    scripts = [command for command in commands if command[0].endswith(".py")]
    assert scripts
    for script, *options in scripts:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(Path(script).stem).main(options)
        assert stop.value.code == 2
        assert "--device cuda needs a CUDA GPU, and none is visible" in capsys.readouterr().err


def test_wheels_are_installed_out_of_the_way(suite, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(suite, "python", lambda *command, **kwargs: commands.append(list(map(str, command))))
    with pytest.raises(Skipped, match="--wheels is not given"):
        gpu_suite.wheels(suite)
    suite.wheels = tmp_path
    with pytest.raises(Failed, match="there is no .whl file"):
        gpu_suite.wheels(suite)
    (tmp_path / "peer-1.0-py3-none-any.whl").touch()
    assert gpu_suite.wheels(suite) == "peer-1.0-py3-none-any.whl"
    assert {"--no-index", "--no-deps", str(gpu_suite.WHEELS)} <= set(commands[0])
    assert str(gpu_suite.WHEELS) in Suite(tmp_path, FACTS, tmp_path, 1).env["PYTHONPATH"]


class MadeUpRuns:
    """In the place of Suite.python: files as the commands write them, with these weights and figures."""

    def __init__(self, resumed_weights: bytes = b"1", accuracy: float = 98.125, on_gpu: str = "0.51"):
        self.commands: list[list[str]] = []
        self.resumed_weights, self.accuracy, self.on_gpu = resumed_weights, accuracy, on_gpu

    def __call__(self, *command, **kwargs) -> str:
        self.commands.append([str(word) for word in command])
        option = {a: Path(b) for a, b in zip(command, command[1:], strict=False) if str(a).startswith("--")}
        if "train" in command:
            folder = option["--out"]
            rows = [{"kind": "train"}, *({"kind": "epoch", "test_acc": acc, "img_s": 100} for acc in (50.0, 98.125))]
            for name in ("last", "ema"):
                (folder / name).mkdir(parents=True)
                weights = self.resumed_weights if "--resume" in option and name == "ema" else b"1"
                (folder / name / "model.safetensors").write_bytes(weights)
            (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif "eval" in command:
            option["--json"].write_text(json.dumps({"acc": self.accuracy}))
        elif "predict" in command:
            probability = self.on_gpu if "cuda" in command else "0.50"
            option["--out"].write_text(f"file,class_1,probability_1,error\na.png,3,{probability},\n")
        return ""


def test_digits_reads_the_accuracy_and_resumes(suite, monkeypatch):
    monkeypatch.setattr(suite, "has", lambda module: True)
    monkeypatch.setattr(suite, "python", runs := MadeUpRuns())
    note = "accuracy 98.12 % on the held-out images, 100 img/s; a resumed run has the bits of the whole one"
    assert gpu_suite.digits(suite) == note
    assert runs.commands[2][-1].endswith("digits/whole/checkpoints/step-00000030")
    monkeypatch.setattr(suite, "python", MadeUpRuns(resumed_weights=b"2"))
    with pytest.raises(Failed, match="other bits than the whole one in ema/model.safetensors"):
        gpu_suite.digits(suite)
    monkeypatch.setattr(suite, "has", lambda module: module != "tyro")
    with pytest.raises(Skipped, match="tyro not installed"):
        gpu_suite.digits(suite)


def test_commands_on_the_run_of_digits(suite, monkeypatch):
    with pytest.raises(Skipped, match="there is no run"):
        gpu_suite.commands(suite)
    monkeypatch.setattr(suite, "has", lambda module: True)
    monkeypatch.setattr(suite, "python", runs := MadeUpRuns())
    gpu_suite.digits(suite)
    note = "eval 98.12 %; predict on 1 pictures; export to an AOTInductor package"
    assert gpu_suite.commands(suite) == note
    assert [command[2] for command in runs.commands[3:]] == ["eval", "predict", "predict", "export"]
    monkeypatch.setattr(suite, "python", MadeUpRuns(accuracy=98.0))
    with pytest.raises(Failed, match="an accuracy of 98.00 %, which the run did not"):
        gpu_suite.commands(suite)
    monkeypatch.setattr(suite, "python", MadeUpRuns(on_gpu="0.53"))
    with pytest.raises(Failed, match="other probabilities on the GPU"):
        gpu_suite.commands(suite)


# ---- results


@no_gpu
def test_tests_run_in_shards_and_are_counted(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "TEST_FILES", ("gpu",))
    suite.stage_ends = time.monotonic() + 100
    with pytest.raises(Skipped, match="no CUDA GPU is visible"):
        gpu_suite.tests(suite)
    monkeypatch.setattr(gpu_suite, "TEST_FILES", ("bad_input",))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    line = gpu_suite.tests(suite)
    assert int(line.partition(" ")[0]) > 100 and " 0 failed" in line
    assert len(list(suite.out.glob("tests-*.xml"))) == 2


def test_tally_names_what_failed(tmp_path):
    report = tmp_path / "tests-0.xml"
    cases = '<testcase classname="tests.test_a" name="one"/><testcase classname="tests.test_a" name="two">'
    report.write_text(f'<testsuites><testsuite>{cases}<failure message="m"/></testcase></testsuite></testsuites>')
    with pytest.raises(Failed, match="1 passed, 1 failed, 0 skipped; test_a::two"):
        gpu_suite._tally([report], [])
    with pytest.raises(Failed, match="out of time"):
        gpu_suite._tally([], ["out of time"])


NCU = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","forward_kernel(float *)","","dram__bytes.sum.per_second","Tbyte/s","2.5"
"0","12","forward_kernel(float *)","","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","74.60"
"0","12","forward_kernel(float *)","","gpu__time_duration.sum","ns","61,200"
"1","12","pool_kernel","","gpu__time_duration.sum","us","12.5"
"""


def test_ncu_rows():
    first, second = gpu_suite.ncu_rows(NCU, "triton")
    assert first == dict(
        backend="triton", kernel="forward_kernel", gbps=2500.0, percent_of_peak=74.6, us=pytest.approx(61.2)
    )
    assert second == dict(backend="triton", kernel="pool_kernel", us=12.5)
    newer, _ = gpu_suite.ncu_rows(NCU.replace('"Tbyte/s","2.5"', '"byte/s","2,500,000,000,000"'), "triton")
    assert newer == first
    assert gpu_suite.ncu_rows("==ERROR== no kernels", "cuda") == []


def test_summary_has_a_table_for_each_result(tmp_path):
    import bench_adapter
    import bench_dual_ln
    import bench_train

    small = ["--device", "cpu", "--quick", "--rounds", "1"]
    bench_dual_ln.main([*small, "--sizes", "2x3x16", "--providers", "eager", "--json", str(tmp_path / "dual_ln.json")])
    model = ["--img-size", "32", "--depth", "2", "--batch", "2", "--providers", "timm"]
    bench_train.main([*small, *model, "--json", str(tmp_path / "train-deit_tiny.json")])
    bench_adapter.main(
        [*small, "--dtypes", "fp32", "--providers", "reference", "--json", str(tmp_path / "adapter.json")]
    )
    (tmp_path / "ncu.json").write_text(json.dumps({"rows": gpu_suite.ncu_rows(NCU, "triton")}))
    stages = [{"stage": "operators", "status": "ok", "seconds": 1.0, "note": "n"}]
    text = gpu_suite.summary_markdown(FACTS, stages, tmp_path)
    assert "# GPU suite on Made-up GPU" in text and "| operators | ok | 1 | n |" in text
    assert "## dual_ln" in text and "| fwd | x+f | 2 | 3 | 16 | fp32 | eager |" in text
    assert "## Training step" in text and "| deit_tiny | 2 | eager | bf16 | timm |" in text
    assert "## Training step of mpvg_vit_adapter_tiny" in text and "| 1 | fp32 | reference |" in text
    assert "## Deformable attention" in text and "| injector | fwd_bwd | fp32 | torchvision |" in text
    assert "| triton | forward_kernel | 61.2 | 2500.0 | 74.6 |" in text
