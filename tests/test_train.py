"""The trainer's parts: config, recipes, data, schedule, optimizer groups, one update, saved weights."""

import dataclasses
import json
import math

import pytest
import timm
import torch

import mpvg_kernels as mk
from mpvg_kernels import demo
from mpvg_kernels.train import InputError, checkpoint, config, loop, recipes
from mpvg_kernels.train.data import Digits
from mpvg_kernels.train.metrics import Window

# A model that takes an update in milliseconds.
SMALL = config.Config(
    epochs=2,
    device="cpu",
    model=config.Model(patch_size=4, embed_dim=32, depth=2, num_heads=2),
    sched=config.Sched(warmup_epochs=1),
)

# ---- config


def test_fields_from_the_command_line():
    args = "--optim.lr 1e-3 --epochs=7 --model.scheme None --model.embed-dim 48 --compile True --amp bf16".split()
    found = config.from_args(SMALL, args)
    assert (found.optim.lr, found.epochs, found.model.scheme, found.model.embed_dim) == (1e-3, 7, None, 48)
    assert (found.compile, found.amp) == (True, "bf16")
    assert found.aug == SMALL.aug and found.model.depth == SMALL.model.depth  # the rest is the recipe's


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model.dpeth 3", "unknown config field 'model.dpeth'; did you mean 'model.depth'"),
        ("--lr 1", "unknown config field 'lr'; did you mean 'optim.lr'"),
        ("--qqq 1", "unknown config field 'qqq'; --print-config lists them all"),
        ("--model.depth x", "--model.depth"),
        ("--amp fp8", "'--amp'. Expected one of"),
        ("--seed", "Missing value for argument '--seed'"),
        ("--epochs 3 4", "Unrecognized options: 4"),
        ("--epochs 0", "config field epochs is 0, expected 1 or more"),
        ("--epochs 1", "config field sched.warmup_epochs is 1, expected 0 to epochs - 1 = 0"),
        ("--seed -1", "config field seed is -1, expected 0 or more"),
        ("--batch 0", "config field batch is 0"),
        ("--threads 0", "config field threads is 0, expected 1 or more, or None"),
        ("--optim.lr nan", "config field optim.lr is nan, expected more than 0"),
        ("--sched.min_lr 1", "config field sched.min_lr is 1.0, expected 0 to optim.lr"),
        ("--sched.warmup_lr 1", "config field sched.warmup_lr is 1.0"),
        ("--loss.smoothing 1", "config field loss.smoothing is 1.0"),
        ("--aug.prob 2", "config field aug.prob is 2.0, expected 0 to 1"),
        ("--aug.scale 1", "config field aug.scale is 1.0"),
        ("--optim.weight_decay -1", "config field optim.weight_decay is -1.0"),
        ("--log.interval 0", "config field log.interval is 0"),
    ],
)
def test_bad_fields(args, message):
    with pytest.raises(InputError) as error:
        config.from_args(SMALL, args.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_config_survives_json():
    assert config.from_dict(json.loads(json.dumps(config.to_dict(SMALL)))) == SMALL


def test_config_from_another_version():
    values = config.to_dict(SMALL)
    values["optim"]["momentun"] = 0.9
    with pytest.raises(InputError, match="unknown config field 'optim.momentun'"):
        config.from_dict(values)


def test_every_field_is_explained(capsys):
    with pytest.raises(SystemExit) as done:
        config.from_args(SMALL, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name in config.field_names():
        start = text.index(f"--{name} ")
        assert "(default" in text[start : start + 400]
    assert "Stochastic depth" in text  # the docstrings are there, not the names alone


@pytest.mark.parametrize("name", recipes.names())
def test_recipes(name):
    assert isinstance(recipes.load(name), config.Config)
    for word in (f"mpvg train --recipe {name}", "Hardware:", "Time:", "Accuracy"):
        assert word in recipes.describe(name)


# ---- optimizer, schedule, updates


def test_schedule():
    trainer = loop.Trainer(
        dataclasses.replace(SMALL, epochs=8, sched=config.Sched(warmup_epochs=2, warmup_lr=1e-5, min_lr=1e-4))
    )
    peak, steps, found = trainer.config.optim.lr, trainer.data.steps, []
    for update in range(8 * steps):
        found.append(trainer.lr)
        trainer.schedule.step_update(update + 1)
    warm, whole = 2 * steps, 8 * steps
    expected = [1e-5 + (peak - 1e-5) * t / warm for t in range(warm)]
    expected += [1e-4 + (peak - 1e-4) * (1 + math.cos(math.pi * t / whole)) / 2 for t in range(warm, whole)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_weight_decay_leaves_out_biases_norms_and_position():
    trainer = loop.Trainer(SMALL)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(names.values())  # every parameter trains
    decayed = {name for name, value in decay.items() if value}
    assert decayed == {n for n in names.values() if n.endswith(".weight") and "norm" not in n}
    assert {decay[name] for name in decayed} == {SMALL.optim.weight_decay}


def first_losses(changes: dict, updates: int = 3) -> list[float]:
    trainer = loop.Trainer(dataclasses.replace(SMALL, **changes))
    return [
        float(trainer.step(x, y)[0]) for _, (x, y) in zip(range(updates), trainer.data.train_batches(1), strict=False)
    ]


def test_runs_repeat():
    assert first_losses({}) == first_losses({}) != first_losses({"seed": 1})


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with loop.cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with loop.cpu_threads(None):
        assert torch.get_num_threads() == before


def test_bf16_is_close_to_fp32_and_used():
    plain, amp = first_losses({}), first_losses({"amp": "bf16"})
    assert amp != plain and amp == pytest.approx(plain, rel=2e-2)


def test_compiled_training_has_the_same_losses(monkeypatch):
    calls, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(1) or compiler(model, backend="eager"))
    assert first_losses({"compile": True}) == pytest.approx(first_losses({}), rel=1e-5)
    assert calls == [1]


@pytest.mark.parametrize(
    "loss, expected",
    [
        (config.Loss(), lambda z, y: torch.nn.functional.cross_entropy(z, y)),
        (config.Loss(smoothing=0.1), lambda z, y: torch.nn.functional.cross_entropy(z, y, label_smoothing=0.1)),
        (
            config.Loss("bce", 0.1),
            lambda z, y: torch.nn.functional.binary_cross_entropy_with_logits(
                z, torch.full_like(z, 0.01).scatter(1, y[:, None], 0.91)
            ),
        ),
    ],
    ids=["ce", "ce-smoothed", "bce-smoothed"],
)
def test_losses(loss, expected):
    z, y = torch.randn(6, 10), torch.randint(10, (6,))
    torch.testing.assert_close(loop.create_loss(dataclasses.replace(SMALL, loss=loss))(z, y), expected(z, y))


@pytest.mark.parametrize("fused", ["cpp", "triton"])
def test_backends_have_equal_losses(fused):
    if fused not in mk.available_backends("cpu"):
        pytest.skip(f"{fused} does not run on this CPU")
    tiny = dataclasses.replace(
        SMALL,
        batch=4,
        sched=config.Sched(warmup_epochs=0),
        model=dataclasses.replace(SMALL.model, embed_dim=24, depth=2),
    )
    result = demo.compare_backends(tiny, fused, 4 if fused == "triton" else 30)
    assert result["difference"] <= demo.MAX_LOSS_DIFFERENCE
    assert result["img_s"].keys() == {fused, "reference"}


def test_compare_backends_sees_a_difference(monkeypatch):
    # Were both runs on one backend, or the losses not compared, an error in the formula would go unseen.
    if "cpp" not in mk.available_backends("cpu"):
        pytest.skip("cpp does not run here")
    plain = loop.Trainer.step

    def step(self, x, labels):
        loss, logits = plain(self, x, labels)
        return loss * (1 + 1e-4 * (mk.backends.resolve("cpu") == "cpp")), logits

    monkeypatch.setattr(loop.Trainer, "step", step)
    assert demo.compare_backends(SMALL, "cpp", 3)["difference"] == pytest.approx(1e-4, rel=0.1)


def test_window():
    window = Window()
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    window.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 1]))
    window.add(torch.tensor(4.0), logits[:1], torch.tensor([0]))
    found = window.read()
    assert (found["loss"], found["acc"]) == (1.75, 75.0) and found["img_s"] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 2000}, "config field batch is 2000, expected at most the 1437 training images"),
        ({"device": "cud"}, "config field device is 'cud'"),
        ({"data": config.Data("digit")}, "config field data.name is 'digit', expected digits; did you mean 'digits'"),
        (
            {"optim": config.Optim("adamww")},
            "config field optim.name is 'adamww', which timm does not know; did you mean",
        ),
        ({"model": config.Model("mpvg_deit_tinny_patch16_224")}, "did you mean 'mpvg_deit_tiny_patch16_224'"),
        ({"model": config.Model(scheme="mpgv")}, "can't be built with"),
        ({"model": config.Model("vit_tiny_patch16_224")}, "unexpected keyword argument 'scheme'"),
        ({"model": config.Model(embed_dim=97)}, "can't be built with"),
    ],
)
def test_what_there_is_not(changes, message):
    with pytest.raises(InputError, match=".") as error:
        loop.Trainer(dataclasses.replace(SMALL, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["nonsense", "cuda"])
def test_backend_that_does_not_run(monkeypatch, name):
    if name in mk.available_backends("cpu"):
        pytest.skip(f"{name} runs here")
    monkeypatch.setattr(mk.backends, "_requested", mk.backends.Choice(name, name))  # as MPVG_BACKEND does
    with pytest.raises(InputError, match=name):
        loop.Trainer(SMALL)


# ---- saved weights


@pytest.fixture
def run(tmp_path):
    return checkpoint.RunFolder.create(tmp_path / "run", {})


def test_timm_reads_the_weights_back(run):
    trainer = loop.Trainer(SMALL)
    for x, y in list(trainer.data.train_batches(1))[:2]:
        trainer.step(x, y)
    run.save("best", trainer.model)
    model = timm.create_model(f"local-dir:{run.path / 'best'}", pretrained=True).eval()
    x, _ = next(trainer.data.test_batches())
    assert torch.equal(model(x), trainer.model.eval()(x))
    preprocessing = timm.data.resolve_model_data_config(model)
    assert preprocessing["input_size"] == (1, 8, 8)
    assert (tuple(preprocessing["mean"]), tuple(preprocessing["std"])) == (Digits.mean, Digits.std)


def test_a_save_that_fails_leaves_the_weights_before_it(run, monkeypatch):
    trainer = loop.Trainer(SMALL)
    run.save("last", trainer.model)
    before = {path.name: path.read_bytes() for path in (run.path / "last").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def full_disk(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError):
        run.save("last", trainer.model)
    assert {path.name: path.read_bytes() for path in (run.path / "last").iterdir()} == before
    monkeypatch.undo()
    run.save("last", trainer.model)  # what the failure left does not stand in the way
    assert sorted(path.name for path in run.path.iterdir()) == ["last", "run.json", "status.json"]
