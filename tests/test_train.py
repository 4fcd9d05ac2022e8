"""The training loop: an update and its variants, what is skipped, the state that a resume takes up."""

import dataclasses

import pytest
import torch
from torch import nn

import mpvg_kernels as mk
from mpvg_kernels import demo
from mpvg_kernels.analysis.diagnostics import pos_statistics
from mpvg_kernels.train import InputError, TrainingError, config, loop
from mpvg_kernels.train.checkpoint import Restored
from mpvg_kernels.train.metrics import RunLog

# A model that takes an update in milliseconds.
SMALL = config.Config(
    epochs=2,
    device="cpu",
    model=config.Model(patch_size=4, embed_dim=32, depth=2, num_heads=2),
    sched=config.Sched(warmup_epochs=1),
)


def changed(base: config.Config = SMALL, **changes) -> config.Config:
    """A config with other fields: section__field=value, or field=value."""
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        part = dataclasses.replace(getattr(base, section), **{field: value}) if section else value
        base = dataclasses.replace(base, **{section or field: part})
    return base


def losses_of(trainer: loop.Trainer, updates: int = 3) -> list[float]:
    """The losses of the next updates of the trainer's epoch."""
    loop.train_mode(trainer.model, trainer.config)
    batches = trainer.data.train_batches(trainer.epoch, trainer.step)
    found = [float(trainer.update(batches)) for _ in range(updates)]
    trainer.step += updates
    return found


def first_losses(**changes) -> list[float]:
    return losses_of(loop.Trainer(changed(**changes)))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- an update


def test_runs_repeat():
    assert first_losses() == first_losses() != first_losses(seed=1)


def test_what_an_update_draws_does_not_hang_on_the_past():
    random = dict(model__drop_path_rate=0.5, aug__mixup=0.8, aug__cutmix=1.0, aug__erase_prob=0.5)
    whole = losses_of(loop.Trainer(changed(**random)), 4)
    trainer = loop.Trainer(changed(**random))
    first = losses_of(trainer, 2)
    torch.manual_seed(9)
    torch.rand(5)
    assert first + losses_of(trainer, 2) == whole
    assert len(set(whole)) == 4 and whole != losses_of(loop.Trainer(SMALL), 4)


def test_micro_batches_add_up():
    parts = loop.Trainer(changed(dist__micro_batch=16))
    whole = loop.Trainer(SMALL)
    assert parts.data.accumulation == 4
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-5)
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert parts.window.sums[1:3].tolist() == whole.window.sums[1:3].tolist()  # correct, images


def test_gradient_is_clipped():
    free, clipped = (
        loop.Trainer(changed(optim__name="sgd", optim__weight_decay=0.0, optim__clip_grad=c)) for c in (None, 0.1)
    )
    before = weights_of(free.model)
    for trainer in (free, clipped):
        losses_of(trainer, 1)
    moved = [
        torch.cat([(v.detach() - before[k]).flatten() for k, v in t.model.named_parameters()]).norm()
        for t in (free, clipped)
    ]
    norm = float(free.window.sums[3])
    assert norm > 0.2 and float(clipped.window.sums[3]) == pytest.approx(norm, rel=1e-6)  # logged as it was
    assert float(moved[1]) == pytest.approx(float(moved[0]) * 0.1 / norm, rel=1e-2)


def looks(**changes) -> tuple[list[int], loop.Trainer]:
    """The updates of an epoch (22) after which the position embedding is looked at, and the trainer then."""
    trainer, found = loop.Trainer(changed(sched__warmup_epochs=0, epochs=1, **changes)), []
    for update in range(1, trainer.total + 1):
        losses_of(trainer, 1)
        if trainer.pos_statistics() is not None:
            found.append(update)
    return found, trainer


def test_position_embedding_is_looked_at_by_the_number_of_the_update(monkeypatch):
    assert looks(log__pos_interval=8)[0] == [1, 8, 16, 22]
    called = []
    monkeypatch.setattr(loop, "pos_statistics", lambda *_: called.append(0))
    assert looks(log__pos_interval=None)[0] == looks(log__pos_interval=1, model__scheme="gap")[0] == []
    assert called == []  # where there is nothing to see, nothing is computed


def test_position_embedding_is_looked_at_without_a_trace(monkeypatch):
    """The same weights and losses; on the first images of the first micro-batch, as they were before mixing."""
    random = dict(model__drop_path_rate=0.5, aug__mixup=0.8, aug__erase_prob=1.0, dist__micro_batch=32)
    seen = []

    def look(model, x):
        seen.append(x.clone())
        assert model is trainer.model and torch.is_autocast_enabled("cpu") and x.shape == (16, 1, 8, 8)
        return pos_statistics(model, x)

    monkeypatch.setattr(loop, "pos_statistics", look)
    results = []
    for interval in (None, 1):
        trainer = loop.Trainer(changed(amp="bf16", log__pos_interval=interval, **random))
        modes = None
        for _ in range(3):
            results.append(losses_of(trainer, 1))
            modes = [m.training for m in trainer.model.modules()]
            trainer.pos_statistics()
            assert [m.training for m in trainer.model.modules()] == modes
        results.append(weights_of(trainer.model))
    assert results[:3] == results[4:7]
    assert all(torch.equal(value, results[7][key]) for key, value in results[3].items())
    batches = trainer.data.train_batches(1, 0)
    plain = [next(batches).x[:16] for _ in range(6)]
    assert len(seen) == 3 and all(torch.equal(x, plain[2 * i]) for i, x in enumerate(seen))


def test_average_of_the_weights():
    trainer = loop.Trainer(changed(optim__ema_decay=0.9))
    seen = []
    for _ in range(4):
        losses_of(trainer, 1)
        seen.append(trainer.model.head.weight.detach().clone())
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(trainer.ema.module.head.weight, expected)
    raw, average = trainer.evaluate(), trainer.evaluate(trainer.ema.module)
    assert raw["images"] == average["images"] == 360 and raw["loss"] != average["loss"]


def test_frozen_parts_do_not_move():
    trainer = loop.Trainer(changed(model__freeze=("patch_embed", "blocks.0"), optim__weight_decay=0.5))
    before = weights_of(trainer.model)
    losses_of(trainer, 2)
    same = {name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(("patch_embed.", "blocks.0."))}


def test_teacher_is_learned_from(tmp_path):
    teacher = loop.Trainer(changed(seed=5))
    torch.save(teacher.model.state_dict(), tmp_path / "teacher.pt")
    given = dict(loss__teacher=SMALL.model.name, loss__teacher_weights=str(tmp_path / "teacher.pt"))
    # (The teacher is built by its name alone, so it has to be one that the name gives: the folder says how.)
    run = mk.train.run_folder.RunFolder.create(tmp_path / "run", {})
    run.save("last", teacher.model)
    given["loss__teacher_weights"] = str(run.path / "last")
    plain, soft, hard = (
        first_losses(**(given if kind != "none" else {}), loss__distillation=kind) for kind in ("none", "soft", "hard")
    )
    assert plain != soft != hard != plain
    # A teacher alone, the student's own: nothing to learn.
    student = loop.Trainer(changed(seed=5, **given, loss__distillation="soft", loss__distill_alpha=1.0))
    assert losses_of(student, 1) == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize("changes", [dict(model__grad_checkpointing=True), dict(model__channels_last=True)])
def test_other_ways_to_the_same_losses(changes):
    assert first_losses(**changes) == pytest.approx(first_losses(), rel=1e-5)


def test_fp16_scales_its_loss():
    trainer = loop.Trainer(changed(amp="fp16"))
    scaled = losses_of(trainer)
    assert scaled != first_losses() and scaled == pytest.approx(first_losses(), rel=2e-2)
    assert trainer.scaler.is_enabled() and trainer.scaler.get_scale() > 1


# ---- updates that are skipped


def spoil(monkeypatch, trainer: loop.Trainer, at: set[int], value: float = float("nan")) -> None:
    """Make the loss of certain updates not finite."""
    plain = trainer.task.loss

    def loss(*args):
        found, counts = plain(*args)
        return found * (value if trainer.updates in at else 1.0), counts

    monkeypatch.setattr(trainer.task, "loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adamw", "lamb"])  # one that skips by itself, and one that is asked to
def test_a_loss_that_is_not_finite_changes_nothing(monkeypatch, name, value):
    trainer = loop.Trainer(changed(optim__name=name, dist__micro_batch=32))
    assert getattr(trainer.optimizer, "_step_supports_amp_scaling", False) == (name == "adamw")
    spoil(monkeypatch, trainer, {1}, value)
    losses_of(trainer, 1)
    before, state = (
        weights_of(trainer.model),
        {
            name: {key: value.clone() for key, value in of.items() if isinstance(value, torch.Tensor)}
            for name, of in loop.distributed.optimizer_state(trainer.optimizer, trainer.model)["parameters"].items()
        },
    )
    counted = trainer.window.sums[:3].clone()  # loss, correct, images
    losses_of(trainer, 1)
    assert torch.equal(trainer.window.sums[:3], counted)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    after = loop.distributed.optimizer_state(trainer.optimizer, trainer.model)["parameters"]
    assert all(torch.equal(after[n][k], value) for n, of in state.items() for k, value in of.items())
    losses_of(trainer, 1)
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])
    found = trainer.window.read(trainer.world)
    assert found["skipped"] == 1 and found["loss"] < 5 and found["grad_norm"] < 100
    assert found["images"] == 2 * SMALL.batch  # of the other two updates
    trainer.check()


def test_too_many_in_a_row(monkeypatch):
    trainer = loop.Trainer(changed(optim__max_skipped=1))
    spoil(monkeypatch, trainer, {1, 3, 4})
    losses_of(trainer, 4)
    trainer.check()  # one, and one
    losses_of(trainer, 1)
    images = ", ".join(trainer.data.files(1, 3)[:8])
    with pytest.raises(TrainingError) as error:
        trainer.check()
    assert str(error.value).startswith(
        "the loss was not finite in 2 updates in a row, from update 4 (epoch 1) on, on process 0, with the images "
        + images
    )


# ---- the state


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adafactor", "adopt"])
def test_state_is_taken_up(name):
    fields = changed(optim__name=name, optim__ema_decay=0.9, model__drop_path_rate=0.3, optim__lr=1e-3)
    whole = loop.Trainer(fields)
    losses_of(whole, 2)
    snapshot = whole.snapshot(RunLog(None, 1))
    copies = torch.utils._pytree.tree_map_only(
        torch.Tensor, torch.clone, (snapshot.model, snapshot.ema, snapshot.state)
    )
    again = loop.Trainer(dataclasses.replace(fields))
    again.restore(Restored(snapshot.step, *copies, path=None))
    assert (again.updates, again.epoch, again.step, again.lr) == (whole.updates, whole.epoch, whole.step, whole.lr)
    assert losses_of(whole, 3) == losses_of(again, 3)
    for a, b in ((whole.model, again.model), (whole.ema.module, again.ema.module)):
        assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    assert torch.equal(whole.whole.sums, again.whole.sums)


def test_state_of_another_model(tmp_path):
    whole = loop.Trainer(SMALL)
    snapshot = whole.snapshot(RunLog(None, 1))
    other = loop.Trainer(changed(model__embed_dim=48))
    with pytest.raises(InputError, match="step-1 is of another model than the config's"):
        other.restore(Restored(0, snapshot.model, None, snapshot.state, "step-1"))


# ---- the rest


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with loop.cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with loop.cpu_threads(None):
        assert torch.get_num_threads() == before


def test_bf16_is_close_to_fp32_and_used():
    plain, amp = first_losses(), first_losses(amp="bf16")
    assert amp != plain and amp == pytest.approx(plain, rel=2e-2)


def test_compiled_training_has_the_same_losses(monkeypatch):
    calls, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(1) or compiler(model, backend="eager"))
    assert first_losses(compile=True) == pytest.approx(first_losses(), rel=1e-5)
    assert calls == [1]


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
    plain = loop.Trainer.update

    def update(self, batches):
        return plain(self, batches) * (1 + 1e-4 * (mk.backends.resolve("cpu") == "cpp"))

    monkeypatch.setattr(loop.Trainer, "update", update)
    assert demo.compare_backends(SMALL, "cpp", 3)["difference"] == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 2000}, "config field batch is 2000, expected at most the 1437 training images"),
        ({"device": "cud"}, "config field device is 'cud'"),
        ({"data": config.Data("digit")}, "config field data.name is 'digit'"),
        (
            {"optim": config.Optim("adamww")},
            "config field optim.name is 'adamww', which timm does not know; did you mean",
        ),
        ({"model": config.Model("mpvg_deit_tinny_patch16_224")}, "did you mean 'mpvg_deit_tiny_patch16_224'"),
        ({"model": config.Model(scheme="mpgv")}, "can't be built with"),
        ({"model": config.Model("vit_tiny_patch16_224")}, "config field model.scheme is 'mpvg', expected None"),
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
