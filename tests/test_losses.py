"""The losses against their formulas, and the teacher of a distillation: its images, its weights, bad ones."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor

from mpvg_kernels.train import InputError
from mpvg_kernels.train.config import Config, Loss, Model
from mpvg_kernels.train.losses import Distillation, create_loss
from mpvg_kernels.train.model import create_model

B, C = 6, 5
MOMENTS = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
DATA = SimpleNamespace(
    input_size=(3, 16, 16), num_classes=C, preprocessing={"input_size": (3, 16, 16), "crop_pct": 1.0, **MOMENTS}
)
CPU = torch.device("cpu")
TEACHER = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": C}


def log_softmax(v: Tensor) -> Tensor:
    return v - v.exp().sum(1, keepdim=True).log()


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(B, C, requires_grad=True)


# ---- cross-entropies


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_of_labels(logits, smoothing):
    labels = torch.arange(B) % C
    expected = -((1 - smoothing) * log_softmax(logits)[range(B), labels] + smoothing * log_softmax(logits).mean(1))
    found = create_loss(Config(loss=Loss(smoothing=smoothing)))(logits, labels)
    torch.testing.assert_close(found, expected.mean())


def test_of_soft_targets_which_are_not_smoothed_again(logits):
    target = torch.rand(B, C).softmax(1)
    found = create_loss(Config(loss=Loss(smoothing=0.2)))(logits, target)
    torch.testing.assert_close(found, -(target * log_softmax(logits)).sum(1).mean())


@pytest.mark.parametrize("soft", [False, True])
def test_binary(logits, soft):
    target = torch.arange(B) % C
    dense = torch.full((B, C), 0.2 / C) + 0.8 * torch.eye(C)[target]
    if soft:
        target = dense = torch.rand(B, C)
    p = logits.sigmoid()
    found = create_loss(Config(loss=Loss(name="bce", smoothing=0.2)))(logits, target)
    torch.testing.assert_close(found, -(dense * p.log() + (1 - dense) * (1 - p).log()).mean())


# ---- distillation


def teacher_folder(path, **changes) -> str:
    """A small teacher as timm writes it, with preprocessing of its own."""
    model = timm.create_model(
        "deit_tiny_patch16_224",
        pretrained_cfg_overlay={"input_size": (3, 24, 24), "mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7)},
        **TEACHER | changes,
    )
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return str(path)


def distillation(folder: str | None, kind: str = "soft", data=DATA, **changes) -> Distillation:
    loss = {"teacher": "deit_tiny_patch16_224", "teacher_weights": folder, "distill_alpha": 0.3, "distill_tau": 2.0}
    return Distillation(Config(loss=Loss(distillation=kind, **loss | changes)), data, CPU)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(tmp_path, logits, kind, heads):
    found = distillation(teacher_folder(tmp_path), kind)
    x, loss = torch.randn(B, 3, 16, 16), torch.tensor(1.7)
    images = x * torch.tensor(MOMENTS["std"]).view(3, 1, 1) + torch.tensor(MOMENTS["mean"]).view(3, 1, 1)
    images = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)
    images = torch.nn.functional.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    teacher = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images).detach()
    torch.testing.assert_close(found.logits(x), teacher)
    outputs = logits if heads == 1 else (logits.detach() * 3, logits)
    if kind == "hard":
        share = -log_softmax(logits)[range(B), teacher.argmax(1)].mean()
    else:
        p, q = log_softmax(teacher / 2), log_softmax(logits / 2)
        share = (p.exp() * (p - q)).sum() * 4 / (B * C)
    result = found(outputs, x, loss)
    torch.testing.assert_close(result, 0.7 * loss + 0.3 * share)
    result.backward()
    assert logits.grad.abs().sum() > 0 and all(p.grad is None for p in found.teacher.parameters())
    assert not found.teacher.training


def test_student_with_a_distillation_token():
    model = Model(name="deit_tiny_distilled_patch16_224", scheme=None, embed_dim=16, depth=1, num_heads=2)
    found = Config(model=model, loss=Loss(distillation="hard", teacher="deit_tiny_patch16_224"))
    student = create_model(found, DATA)
    outputs = student.train()(torch.zeros(2, 3, 16, 16))
    assert isinstance(outputs, tuple) and [o.shape for o in outputs] == [(2, C)] * 2
    plain = create_model(dataclasses.replace(found, loss=Loss()), DATA)
    assert plain.train()(torch.zeros(2, 3, 16, 16)).shape == (2, C)


def test_teacher_from_a_file_and_from_a_run_folder(tmp_path):
    folder = tmp_path / "run" / "last"
    folder.parent.mkdir()
    teacher_folder(folder)
    (tmp_path / "run" / "run.json").write_text("{}")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        distillation(str(tmp_path / "run")).logits(x), distillation(str(folder)).logits(x), rtol=0, atol=0
    )
    model = timm.create_model("lcnet_035", num_classes=C)
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    found = distillation(str(tmp_path / "teacher.pth"), teacher="lcnet_035")
    assert found.size == (224, 224) and torch.equal(found.teacher.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    "classes, data, changes, message",
    [
        (C + 1, DATA, {}, "loss.teacher is 'deit_tiny_patch16_224' with 6 classes, expected the data's 5"),
        (None, DATA, {}, "loss.teacher is 'deit_tiny_patch16_224' with 1000 classes, expected the data's 5"),
        (C, DATA, {"teacher": "deit_small_patch16_224"}, "expected 'deit_tiny_patch16_224', whose weights"),
        (C, DATA, {"teacher": "diet_tiny_patch16_224"}, "which timm does not know; did you mean"),
        (C, DATA, {"teacher": "deit_tiny_patch16_224.nonsense"}, "nonsense"),
        (
            C,
            DATA,
            {"teacher_weights": "nowhere.pth", "teacher": "lcnet_035"},
            "config field loss.teacher_weights is 'nowhere.pth': nowhere.pth does",
        ),
        (
            C,
            SimpleNamespace(input_size=(1, 16, 16), num_classes=C, preprocessing={"mean": (0.5,), "std": (0.5,)}),
            {},
            "loss.teacher is 'deit_tiny_patch16_224', whose images have 3 channels, expected the data's 1",
        ),
    ],
)
def test_teachers_that_do_not_fit(tmp_path, classes, data, changes, message):
    folder = None if classes is None else teacher_folder(tmp_path, num_classes=classes)
    with pytest.raises(InputError) as error:
        distillation(folder, data=data, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_teacher_runs_in_the_runs_precision(tmp_path):
    folder = teacher_folder(tmp_path)
    loss = Loss(distillation="soft", teacher="deit_tiny_patch16_224", teacher_weights=folder)
    found = Distillation(Config(amp="bf16", loss=loss), DATA, CPU)
    dtypes = []
    found.teacher.head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    assert found.logits(torch.randn(2, 3, 16, 16)).dtype == torch.float32 and dtypes == [torch.bfloat16]
    assert math.isfinite(found(torch.randn(2, C), torch.randn(2, 3, 16, 16), torch.tensor(1.0)).item())
