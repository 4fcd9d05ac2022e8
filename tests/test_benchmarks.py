"""The benchmarks: byte model and statistics against numbers worked out by hand, the check before timing, and that each
script runs and writes its files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_adapter  # noqa: E402
import bench_dual_ln  # noqa: E402
import bench_eval  # noqa: E402
import bench_memory  # noqa: E402
import bench_norm_pool  # noqa: E402
import bench_overhead  # noqa: E402
import bench_pe_chain  # noqa: E402
import bench_train  # noqa: E402
import bench_trainer  # noqa: E402
import harness  # noqa: E402
import operators  # noqa: E402
import peers  # noqa: E402
import plots  # noqa: E402
from operators import Case  # noqa: E402

import mpvg_kernels as mk  # noqa: E402
from mpvg_kernels.train import config as configs  # noqa: E402
from mpvg_kernels.train import loop  # noqa: E402

SMALL = ["--sizes", "2x5x16"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch):
    """One wrong provider or another allocator must not outlive its test."""
    monkeypatch.setattr(operators, "PROVIDERS", dict(operators.PROVIDERS))
    monkeypatch.setattr(harness, "pin_allocator", lambda: "left alone")


# With B=2, N=3, D=4: 24 elements in a (B, N, D) tensor, 12 in pos, 4 in a parameter, 8 in the pooled output, 2 in the
# scale. dx, dw, db, dpos, dpos_weight, dpos_bias in elements; in fp32 four times as many bytes:
GRADS = [24, 4, 4, 12, 4, 4]
GRADS_FP32 = [96, 16, 16, 48, 16, 16]


@pytest.mark.parametrize(
    "op, mode, inputs, dtype, read, written",
    [
        # x, w, b, pos, pos_weight, pos_bias -> y, pos'
        ("pe_layer_norm", "fwd", "x", "fp32", (24 + 12 + 4 * 4) * 4, [96, 48]),
        # x, f, w, b -> y, h
        ("pe_layer_norm", "fwd", "x+f,no-pos", "bf16", (48 + 2 * 4) * 2, [48, 48]),
        # the same with pos; then dy, dh, h, dpos', w, pos, pos_weight -> gradients (df is dx)
        ("pe_layer_norm", "fwd_bwd", "x+f", "bf16", (76 + 72 + 32) * 2, [48, 48, 24] + [2 * n for n in GRADS]),
        # the stream has no gradient: dy, x, dpos', w, pos, pos_weight
        ("pe_layer_norm", "fwd_bwd", "x", "fp32", (52 + 48 + 32) * 4, [96, 48] + GRADS_FP32),
        # the scale is read twice; df is a tensor of its own
        ("pe_layer_norm", "fwd_bwd", "x+s*f", "fp32", (78 + 74 + 32) * 4, [96, 96, 48, 96] + GRADS_FP32),
        # x, h and dh have 4 bytes an element, f, df, y and dy 2
        ("pe_layer_norm", "fwd_bwd", "x+f", "mixed", 3 * 96 + 2 * 48 + (28 + 32) * 4, [48, 96, 48, 48] + GRADS_FP32),
        # the backward alone: dy, dh, h, dpos', w, pos, pos_weight -> gradients
        ("pe_layer_norm", "bwd", "x+f", "bf16", (72 + 32) * 2, [2 * n for n in GRADS]),
        ("pe_norm_pool", "bwd", "x", "fp32", (8 + 24 + 20) * 4, GRADS_FP32),
        # x, w, b, pos, pos_weight, pos_bias -> pooled; without gradients no h
        ("pe_norm_pool", "fwd", "x", "fp32", (24 + 28) * 4, [32]),
        ("pe_norm_pool", "fwd", "x+f", "fp32", (48 + 28) * 4, [32]),
        # then dout, h, w, pos, pos_weight
        ("pe_norm_pool", "fwd_bwd", "x+f", "fp32", (76 + 8 + 24 + 20) * 4, [32, 96] + GRADS_FP32),
        # two layers: pos and their vectors -> a table each; then their gradients, and the inputs again
        ("pe_chain", "fwd", "x", "fp32", (12 + 4 * 4) * 4, [48, 48]),
        ("pe_chain", "fwd_bwd", "x", "bf16", (28 + 24 + 28) * 2, [24, 24, 24, 16, 16]),
    ],
)
def test_byte_model(op, mode, inputs, dtype, read, written):
    found = operators.traffic(Case(op, mode, inputs, 2, 3, 4, dtype))
    assert found.read == read
    assert sorted(found.written) == sorted(written)


@pytest.mark.parametrize("mode", operators.MODES)
@pytest.mark.parametrize("op", operators.TOKEN_OPERATORS)
def test_roof_copies_the_bytes_of_the_model(op, mode):
    case = Case(op, mode, "x+f", 8, 64, 128, "fp32")
    traffic = operators.traffic(case)
    large = [size for size in traffic.written if size >= 1 << 16]
    clones = operators.roof(case, 1, "cpu")()
    assert [t.nbytes for t in clones] == large
    # What the clones don't account for is copied into a buffer that stays, so nothing else is allocated.
    peak = harness.peak_extra_bytes(harness.Variant("copy", operators.roof(case, 1, "cpu")), "cpu")
    assert peak == sum(large)


def test_peak_memory_counts_temporaries():
    x = torch.ones(1000)
    assert harness.peak_extra_bytes(harness.Variant("two", lambda: (x * 2) * 3), "cpu") >= 8000
    assert harness.peak_extra_bytes(harness.Variant("one", lambda: x.clone()), "cpu") == 4000


def test_paired_ratio():
    # Round by round 2, 2, 2, 4, 2: the two slow rounds cost neither the median nor a ratio of unrelated rounds.
    ratio = harness.paired_ratio([2.0, 20.0, 4.0, 4.0, 2.0], [1.0, 10.0, 2.0, 1.0, 1.0])
    assert ratio == (2.0, 2.0, 4.0)  # five rounds have no 95 % interval: the range


def test_confidence_interval_of_the_median():
    # For 25 rounds the binomial distribution puts the 95 % interval between the 8th smallest and the 8th largest.
    ratio = harness.paired_ratio([float(i) for i in range(25, 0, -1)], [1.0] * 25)
    assert ratio == (13.0, 8.0, 18.0)


def test_speedups():
    samples = {"eager": [4.0, 4.0, 8.0], "cpp": [1.0, 2.0, 4.0]}
    keys = harness.speedups(samples, "cpp")
    assert keys["speedup_eager"] == 2.0 and keys["speedup_eager_ci95"] == [2.0, 4.0]
    assert keys["speedup_compile"] is None and keys["speedup_compile_ci95"] is None


def test_rounds_turn_around_and_warm_up():
    order = []
    variants = [harness.Variant(name, lambda name=name: order.append(name)) for name in "ab"]
    clock_calls = iter(range(100))

    def clock(call, repeats):
        for _ in range(repeats):
            call()
        return float(next(clock_calls) + 1)

    samples = harness.interleave(variants, 2, clock, min_sample_s=0)
    assert "".join(order) == "aaa" + "bbb" + "aabb" + "bbaa"  # calibration; then each untimed once and timed once
    assert samples == {"a": [5.0, 8.0], "b": [6.0, 7.0]}


@pytest.mark.parametrize(
    "bench, options, keys",
    [
        (bench_dual_ln, [*SMALL, "--inputs", "x,dh", "x+s*f", "x+f,no-pos", "--dtypes", "fp32", "mixed"], {"gbps"}),
        (bench_dual_ln, [*SMALL, "--inputs", "x+f", "--cold"], {"gbps"}),
        (bench_norm_pool, [*SMALL, "--modes", "bwd", "--dtypes", "fp32"], {"gbps"}),
        (bench_norm_pool, [*SMALL, "--inputs", "x", "x+s*f", "--dtypes", "bf16", "fp16", "mixed"], {"gbps"}),
        (bench_pe_chain, [*SMALL, "--dtypes", "fp32", "bf16"], {"gbps"}),
        (bench_overhead, ["--inputs", "x+f"], {"speedup_eager"}),
        (
            bench_train,
            ["--img-size", "32", "--depth", "2", "--batch", "2", "--engines", "eager"],
            {"vs_timm", "vs_reference", "images_per_s"},
        ),
    ],
)
def test_scripts_write_their_files(bench, options, keys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache_bytes", lambda: 1 << 14)  # few rotated buffers will do
    plain = "timm" if bench is bench_train else "eager"
    report, plot = tmp_path / "rows.json", tmp_path / "plots" / "rows.png"
    ours = harness.kernel_backends("cpu") + ["reference"]
    options = [*options, "--device", "cpu", "--quick", "--rounds", "3", "--providers", plain, *ours]
    assert bench.main([*options, "--json", str(report), "--plot", str(plot)]) == 0
    found = json.loads(report.read_text())
    assert found["benchmark"] == bench.__name__.removeprefix("bench_")
    assert {"cpu", "torch_isa", "cpp_backend", "torch"} <= found["machine"].keys()
    assert {"rounds", "device"} <= found["settings"].keys()
    for row in found["rows"]:
        assert row["status"] == "ok" and row["ms"] > 0 and keys <= row.keys()
    assert {row["provider"] for row in found["rows"]} - {"copy"} == {plain, *ours}
    assert plot.read_bytes().startswith(PNG)
    table = capsys.readouterr().out
    assert all(row["provider"] in table for row in found["rows"])


def test_memory_of_operators_and_steps(tmp_path, capsys):
    """Checkpointing saves less; the fused operators save what `tests/test_memory.py` says."""
    report = tmp_path / "rows.json"
    small = ["--sizes", "2x5x16", "--img-size", "32", "--depth", "2", "--batch", "2", "--dtypes", "fp32"]
    options = ["--engines", "eager", "--providers", "reference", "--device", "cpu", "--json", str(report)]
    assert bench_memory.main([*small, *options]) == 0
    rows = json.loads(report.read_text())["rows"]
    steps = {(r["dtype"], r["checkpointing"], r["provider"]): r for r in rows if r["op"] == "train_step"}
    assert len(steps) == 2 * 2 and len(rows) == 4 + 2 * 4 * 3 * 2
    for (dtype, checkpointing, provider), row in steps.items():
        assert 0 < row["saved_bytes"] < row["peak_extra_bytes"]
        if checkpointing:
            assert row["saved_bytes"] < steps[dtype, False, provider]["saved_bytes"]
    wanted = {"op": "pe_layer_norm", "inputs": "x", "dtype": "fp32", "provider": "eager"}
    (row,) = [r for r in rows if wanted.items() <= r.items()]
    # x, pos, and a mean and rstd of each row of both
    assert row["saved_bytes"] == 4 * (2 * 5 * 16 + 5 * 16 + 2 * 2 * 5 + 2 * 5) and row["saved_vs_eager"] == 1
    table = capsys.readouterr().out
    assert "saved bytes" in table and "recomputed" in table


def _wrong(case):
    """The plain formula with a slip that shows in one result only."""

    def function(*args):
        first, *others = operators.PLAIN[case.op](*args)
        return first * 1.01, *others

    return operators.Provider(function)


@pytest.mark.parametrize("mode", operators.MODES)
@pytest.mark.parametrize("bench", [bench_dual_ln, bench_norm_pool])
def test_wrong_provider_is_refused(bench, mode, tmp_path, monkeypatch):
    operators.PROVIDERS["compile"] = _wrong
    options = [
        "--sizes",
        "2x5x16",
        "--dtypes",
        "fp32",
        "--inputs",
        "x+f",
        "--modes",
        mode,
        "--providers",
        "eager",
        "compile",
    ]
    assert bench.main([*options, "--quick", "--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 1
    rows = {row["provider"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["compile"]["status"] == "wrong" and "is off by 1.0e-02" in rows["compile"]["note"]
    assert rows["compile"]["ms"] is None and rows["compile"]["speedup_eager"] is None
    assert rows["eager"]["status"] == "ok" and rows["eager"]["speedup_compile"] is None


def test_provider_that_cannot_run_is_said_so_and_gone_past(monkeypatch):
    def broken(case):
        def function(*args):
            raise RuntimeError("no working compiler\nand more lines")

        return operators.Provider(function)

    operators.PROVIDERS["compile"] = broken
    case = Case("pe_norm_pool", "fwd_bwd", "x", 2, 3, 4, "fp32")
    rows = operators.run_case(case, ["eager", "compile"], operators.Settings(rounds=1, wall_rounds=0))
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["compile"]["status"] == "failed"
    assert by_provider["compile"]["note"] == "RuntimeError: no working compiler"
    assert by_provider["eager"]["ms"] > 0


def test_training_step_that_differs_is_refused(monkeypatch):
    settings = bench_train.Settings("deit_tiny_patch16_224", 32, 2, 2, "cpu", 1, 0)
    make_model, made = bench_train.make_model, []

    def other_weights(provider, settings):
        model = make_model(provider, settings)
        made.append(model)
        if len(made) == 2:  # the first is what the others are compared with
            with torch.no_grad():
                model.head.bias.add_(torch.arange(1000) / 1000)
        return model

    monkeypatch.setattr(bench_train, "make_model", other_weights)
    _, refused = bench_train.prepare("eager", "fp32", ["reference"], settings)
    assert refused["reference"][0] == "wrong" and "loss is off by" in refused["reference"][1]


def test_training_steps_of_other_models_and_schemes(tmp_path, capsys, monkeypatch):
    """Each model has one plain GAP model, timm's where timm has it, and is measured against it under each scheme."""
    if "cpp" not in mk.available_backends("cpu"):
        pytest.skip(mk.backends.status("cpp").reason)
    make_model, made = bench_train.make_model, set()

    def recorded(provider, settings):
        model = make_model(provider, settings)
        made.add((provider, str(getattr(model, "scheme", type(model).__name__))))
        return model

    monkeypatch.setattr(bench_train, "make_model", recorded)
    report, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    models = ["mpvg_t2t_vit_7_224", "swin_tiny_patch4_window7_224"]
    small = ["--img-size", "32", "--depth", "2", "--batch", "2", "--dtypes", "fp32", "--rounds", "2", "--device", "cpu"]
    options = ["--models", *models, "--schemes", "mpvg", "gap", "--engines", "eager", "--no-wall", "--checkpointing"]
    assert bench_train.main([*small, *options, "--json", str(report), "--plot", str(plot)]) == 0
    found = json.loads(report.read_text())
    assert found["settings"]["models"] == models and found["settings"]["schemes"] == ["mpvg", "gap"]
    rows = {(r["model"], r["provider"], r["scheme"]): r for r in found["rows"]}
    ours = [("reference", "mpvg"), ("cpp", "mpvg"), ("cpp", "gap")]
    assert set(rows) == {(models[0], *key) for key in [("plain", "gap"), *ours]} | {
        (models[1], *key) for key in [("timm", "gap"), *ours]
    }
    for (model, _, scheme), row in rows.items():
        assert row["status"] == "ok" and row["ms"] > 0 and row["vs_plain"] > 0
        assert (row["img_size"], row["depth"]) == (32, 2)
        assert (row["vs_timm"] is None) == (model == models[0])
        assert (row["vs_reference"] is None) == (scheme == "gap")
        assert 0 < row["peak_checkpointing_bytes"] <= row["peak_extra_bytes"]
        assert model == models[0] or row["peak_checkpointing_bytes"] < row["peak_extra_bytes"]
    plain = {(provider, built) for provider, built in made if provider in bench_train.PLAIN}
    assert plain == {("plain", "gap"), ("timm", "SwinTransformer")}
    parameters = {key: row["parameters"] for key, row in rows.items()}
    assert parameters[models[0], "cpp", "gap"] == parameters[models[0], "plain", "gap"]
    assert parameters[models[1], "cpp", "gap"] == parameters[models[1], "timm", "gap"] + 8 * 8 * 96  # the PE table
    assert plot.read_bytes().startswith(PNG)
    table = capsys.readouterr().out
    assert all(model in table for model in models)


def test_the_table_has_every_architecture(monkeypatch, capsys):
    asked = []

    def run(engine, dtype, providers, settings, schemes, checkpointing):
        asked.append((settings.model, engine, dtype, providers[0], tuple(schemes), checkpointing))
        return []

    monkeypatch.setattr(bench_train, "run", run)
    assert bench_train.main(["--table", "all", "--device", "cpu", "--dtypes", "bf16"]) == 0
    assert {name.split("_")[1] for name, *_ in asked} == {n.split("_")[1] for n in timm.list_models("mpvg_*")}
    plain = {name: "timm" if name.split("_")[1] in ("deit", "swin") else "plain" for name, *_ in asked}
    assert asked == [(name, "eager", "bf16", plain[name], ("mpvg", "gap"), True) for name in bench_train.TABLE]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "mpvg_deit_tiny_patch16"], "is no model of ours; did you mean 'mpvg_deit_tiny_patch16_224' or"),
        (["--schemes", "mpgv"], "deit_tiny_patch16_224: "),
        (["--model", "mpvg_ceit_tiny_patch16_224", "--img-size", "100"], "the nearest are height 96 or 112"),
        (
            ["--models", "mpvg_t2t_vit_7_224", "--providers", "timm", "cpp"],
            "its plain GAP model is the provider 'plain'",
        ),
    ],
)
def test_bad_options_of_a_training_step(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_train.main([*options, "--device", "cpu"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "64x196"], "'64x196' is not a size; expected BxNxD"),
        (["--dtypes", "int8"], "'int8' is not one of fp32, bf16"),
        (["--providers", "fastest"], "'fastest' is not one of eager, compile"),
        (["--rounds", "0"], "--rounds is 0: it starts at 1"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_dual_ln.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("op", operators.TOKEN_OPERATORS)
def test_forward_and_backward_add_up(op):
    def case(mode):
        return operators.traffic(Case(op, mode, "x+f", 2, 3, 4, "bf16"))

    forward, backward, both = case("fwd"), case("bwd"), case("fwd_bwd")
    h = 2 * 24 if op == "pe_norm_pool" else 0  # which the pool writes for a backward only
    assert both.total == forward.total + backward.total + h


def test_backward_alone_runs_on_one_forward():
    """The timed call is the backward: the function is not called again."""
    calls = []

    def function(*args):
        calls.append(1)
        return operators.PLAIN["pe_layer_norm"](*args)

    case = Case("pe_layer_norm", "bwd", "x+f", 2, 3, 4, "fp32")
    arguments, grads = operators.make_arguments(case, "cpu")
    call = operators.make_call(case, function, arguments, grads)
    first, second = call(), call()
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_grid_is_the_issues():
    B, N, D = ({size[i] for size in operators.GRID} for i in range(3))
    assert min(B) == 1 and max(B) == 1024
    assert N == {49, 64, 196, 197, 577, 784} and D == {96, 192, 256, 384, 512, 768, 1024, 1280}
    assert len(operators.GRID) == len(B) * len(N) * len(D)


def test_grid_with_a_limit_and_its_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "GRID", ((1, 2, 16), (2, 2, 16), (1, 2, 32), (64, 64, 512)))
    roofline, heatmap = tmp_path / "roofline.png", tmp_path / "plots" / "heatmap.png"
    report = tmp_path / "rows.json"
    options = ["--grid", "--max-mib", "1", "--dtypes", "fp32", "--inputs", "x+f", "--rounds", "2", "--no-wall"]
    options += ["--providers", "eager", "reference", "--json", str(report), "--device", "cpu"]
    assert bench_dual_ln.main([*options, "--roofline", str(roofline), "--heatmap", str(heatmap)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {(r["B"], r["N"], r["D"]) for r in rows} == {(1, 2, 16), (2, 2, 16), (1, 2, 32)}
    assert roofline.read_bytes().startswith(PNG) and heatmap.read_bytes().startswith(PNG)


def test_a_heat_map_needs_a_baseline(tmp_path, capsys):
    row = dict(provider="reference", speedup_eager=None, speedup_compile=None)
    plots.heatmap(tmp_path / "none.png", [row], "machine")
    assert "nothing was timed beside a baseline" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


# ---- the adapter


def test_the_adapters_step_and_its_attention(tmp_path, capsys):
    report, plot, ours = tmp_path / "rows.json", tmp_path / "rows.png", ["reference", *harness.kernel_backends("cpu")]
    options = ["--quick", "--device", "cpu", "--rounds", "2", "--json", str(report)]
    assert bench_adapter.main([*options, "--dtypes", "fp32", "--providers", *ours, "--plot", str(plot)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert bench_adapter.main([*options, "--dtypes", "bf16", "--only", "attention"]) == 0
    rows += json.loads(report.read_text())["rows"]
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows)
    steps = [row for row in rows if row["op"] == "train_step"]
    assert [row["provider"] for row in steps] == ours
    assert all(row["vs_reference"] > 0 and 0.9 < row["peak_vs_reference"] < 1.1 for row in steps)
    calls = {(row["case"], row["mode"], row["dtype"], row["provider"]): row for row in rows[len(steps) :]}
    assert len(calls) == 2 * 2 * 2 * 2
    for (case, _, dtype, provider), row in calls.items():
        # 64 pixels: 4x4 tokens look at 8x8, 4x4 and 2x2 features, and these at them
        assert (row["queries"], row["levels"]) == {"injector": (16, 3), "extractor": (84, 1)}[case]
        assert row["samples"] == row["queries"] * row["levels"] * bench_adapter.POINTS
        assert row["error"] < {"fp32": 1e-5, "bf16": 5e-2}[dtype]
        assert (row["speedup_torchvision"] == 1) == (provider == "torchvision")
    assert plot.read_bytes().startswith(PNG)
    table = capsys.readouterr().out
    assert "time / reference's" in table and "x torchvision" in table


@pytest.mark.parametrize("what", ("output", "gradient"))
def test_an_attention_that_differs_is_refused(what, tmp_path, monkeypatch):
    convolve = bench_adapter.convolve

    def other(attn, case, query, features):
        out = convolve(attn, case, query, features)
        return out * 1.001 if what == "output" else out.detach() + 1.05 * (out - out.detach())

    monkeypatch.setattr(bench_adapter, "convolve", other)
    options = ["--quick", "--device", "cpu", "--only", "attention", "--dtypes", "fp32", "--rounds", "1"]
    assert bench_adapter.main([*options, "--json", str(tmp_path / "rows.json")]) == 1
    for row in json.loads((tmp_path / "rows.json").read_text())["rows"]:
        assert (row["status"] == "wrong") == (row["provider"] == "torchvision")
        assert row["status"] == "ok" or f"{what} is off by" in row["note"] and row["ms"] is None


def test_bad_sizes_of_the_adapter(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_adapter.main(["--img-size", "500", "--device", "cpu"])
    assert stop.value.code == 2
    assert "--img-size is 500: expected a multiple of 32" in capsys.readouterr().err


# ---- the trainer


def test_the_trainer_against_plain_loops(tmp_path, capsys):
    report = tmp_path / "rows.json"
    assert bench_trainer.main(["--quick", "--folder", str(tmp_path), "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["op"] for row in rows] == ["overhead", "overhead", "checkpoint", "weights", "images", "images"]
    assert all(row["status"] == "ok" for row in rows)
    for row in rows[:2]:
        assert row["parts_ms"]["model step"] > row["parts_ms"]["gradient norm"] > 0
        assert row["parts_percent"] < 100 * row["loop_ms"] / row["step_ms"]
        low, high = row["overhead_percent_ci95"]
        assert low <= row["overhead_percent"] <= high
        low, high = row["look_percent_ci95"]
        assert row["look_ms"] > 0 and 0 < low <= row["look_percent"] <= high
    weights = rows[3]["megabytes"]
    assert rows[2]["megabytes"] == pytest.approx(4 * weights)  # with their average and Adam's two moments
    assert all(row["vs_timm"] > 0 for row in rows[4:])
    assert list(tmp_path.iterdir()) == [report]  # nothing else is left
    assert "digits recipe" in capsys.readouterr().out


def test_the_plain_step_is_the_trainers():
    """What the trainer's loop is measured against does the same work: the weights are the same behind it."""
    settings = configs.Config(batch=4, model=configs.Model(embed_dim=32, depth=2, num_heads=2))
    data = bench_trainer.OneBatch(settings, (3, 32, 32), 10, 2)
    trainer, other = (bench_trainer.make_trainer(settings, data) for _ in range(2))
    step = bench_trainer.PlainStep(trainer.config, other.model)
    for group in step.optimizer.param_groups:
        group["lr"] = trainer.lr  # of the warm-up's first update
    before = [p.clone() for p in other.trained]
    loop.train_mode(trainer.model, settings)
    loop.train_mode(other.model, settings)
    assert trainer.update(data.train_batches(1)).item() == pytest.approx(step(*data.batch).item())
    for expected, found in zip(trainer.trained, other.trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert any(not torch.equal(old, found) for old, found in zip(before, other.trained, strict=True))


def test_a_save_that_fails_is_said_so(tmp_path, monkeypatch, capsys):
    def refuse(self, snapshot, background=True):
        self.warn("the disk is full")

    monkeypatch.setattr(bench_trainer.Checkpoints, "save", refuse)
    assert bench_trainer.main(["--quick", "--only", "checkpoint", "--folder", str(tmp_path)]) == 1
    assert "failed: the disk is full" in capsys.readouterr().out


def test_evaluation_against_timms_loop(tmp_path, monkeypatch, capsys):
    """Both find the same accuracy and loss, and a loop that does not is said to be wrong."""
    report = tmp_path / "rows.json"
    args = ["--quick", "--folder", str(tmp_path), "--json", str(report)]
    assert bench_eval.main([*args, "--only", "digits", "jpeg64"]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["case"].split(", ")[:2] for row in rows] == [
        ["digits", "0 workers"],
        ["jpeg64", "0 workers"],
        ["jpeg64", "1 workers"],
    ]
    assert all(row["status"] == "ok" and row["vs_timm"] > 0 and row["wall_vs_timm"] > 0 for row in rows)
    assert list(tmp_path.iterdir()) == [report]
    monkeypatch.setattr(bench_eval.OurLoop, "__call__", lambda self: setattr(self, "result", (0.0, 0.0)))
    assert bench_eval.main([*args, "--only", "digits"]) == 1
    assert "the plain loop's are" in capsys.readouterr().out


# ---- peers


def _made_up_peer(add_norm: bool):
    """A library whose LayerNorm is right, and that counts its calls."""
    calls = []

    def norm(v, weight, bias, eps):
        calls.append("norm")
        return torch.nn.functional.layer_norm(v, v.shape[-1:], weight, bias, eps)

    def joined(x, branch, scale, weight, bias, eps):
        calls.append("add_norm")
        h = x + (branch if scale is None else branch * scale[:, None, None])
        return norm(h, weight, bias, eps), h

    return peers.Peer(norm, joined if add_norm else None), calls


@pytest.mark.parametrize("add_norm", (False, True))
@pytest.mark.parametrize("op", operators.TOKEN_OPERATORS)
@pytest.mark.parametrize("inputs", operators.INPUTS)
def test_peers_do_the_same_work(op, inputs, add_norm, monkeypatch):
    peer, calls = _made_up_peer(add_norm)
    monkeypatch.setattr(peers, "load", lambda name: peer)
    for mode in operators.MODES:
        case = Case(op, mode, inputs, 2, 3, 8, "fp32")
        variants, refused = operators.prepare(case, ["liger"], operators.Settings(roof=False))
        assert not refused and [variant.name for variant in variants] == ["liger"]
    assert "norm" in calls and ("add_norm" in calls) == (add_norm and case.given.branch)


def test_a_peer_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(peers, "load", lambda name: peers.Peer(lambda v, weight, bias, eps: v * weight + bias))
    case = Case("pe_norm_pool", "fwd", "x+f", 2, 3, 8, "fp32")
    _, refused = operators.prepare(case, ["quack"], operators.Settings(roof=False))
    assert refused["quack"][0] == "wrong"


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_is_not_there_says_so(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: None)
    assert peers.installed() == []
    case = Case("pe_layer_norm", "fwd", "x", 2, 3, 8, "fp32")
    _, refused = operators.prepare(case, [name], operators.Settings(roof=False))
    assert refused[name] == ("failed", f"{peers.PEERS[name][0]} is not installed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible")
@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("op", operators.TOKEN_OPERATORS)
def test_installed_peers_are_right(name, op):
    if name not in peers.installed():
        pytest.skip(f"{peers.PEERS[name][0]} is not installed")
    for dtype in operators.DTYPES:
        case = Case(op, "fwd_bwd", "x+s*f", 4, 49, 768, dtype)
        _, refused = operators.prepare(case, [name], operators.Settings(device="cuda", roof=False))
        assert refused.get(name, ("",))[0] != "wrong", refused


def test_script_runs_by_its_path():
    command = [sys.executable, BENCHMARKS / "bench_dual_ln.py", "--quick", *SMALL, "--providers", "eager"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "x compile" in done.stdout and "2,5,16" in done.stdout


def test_pytest_benchmark_collects_and_runs_a_case():
    command = [sys.executable, "-m", "pytest", "-q", str(BENCHMARKS), "--benchmark-only", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # no worker of this run
    environment |= {"PYTHONPATH": str(BENCHMARKS.parent)}
    one = ["-k", "pe_layer_norm and fwd_bwd and x+f and 768 and fp32 and eager", "--benchmark-min-rounds=2"]
    done = subprocess.run([*command, *one], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
