"""The trainer's model: built for the data, started from weights of other grids and classes, parts of it frozen."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import timm
import torch

from mpvg_kernels.train import InputError
from mpvg_kernels.train.config import Config, Loss, Model, Optim
from mpvg_kernels.train.model import create_model, train_mode

TINY = Model(patch_size=4, embed_dim=16, depth=2, num_heads=2)
TIMM = dataclasses.replace(TINY, name="deit_tiny_patch16_224", scheme=None)
MOMENTS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "crop_pct": 1.0, "interpolation": "bilinear"}


def data(size: tuple[int, int] = (16, 16), classes: int = 5, channels: int = 3) -> SimpleNamespace:
    size = (channels, *size)
    return SimpleNamespace(input_size=size, num_classes=classes, preprocessing={"input_size": size, **MOMENTS})


def build(model: Model = TINY, images: SimpleNamespace | None = None, start: bool = True, **fields) -> torch.nn.Module:
    return create_model(Config(model=dataclasses.replace(model, **fields)), images or data(), start=start)


def save(model: torch.nn.Module, folder) -> str:
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return str(folder)


def fails(*args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        build(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- building


def test_model_of_the_data():
    model = build(images=data((8, 12), 7, 1), drop_path_rate=0.2)
    assert model(torch.zeros(2, 1, 8, 12)).shape == (2, 7)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) and model.pretrained_cfg["interpolation"] == "bilinear"
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [Model(name="lcnet_035", scheme=None), TIMM], ids=["lcnet", "vit"])
def test_timms_own_models_of_any_size(kind):
    assert build(kind, data((40, 56)))(torch.zeros(2, 3, 40, 56)).shape == (2, 5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"name": "mpvg_diet_tiny_patch16_224"},
            "config field model.name is 'mpvg_diet_tiny_patch16_224', which timm does",
        ),
        (
            {"name": "deit_tiny_patch16_224.nonsense"},
            "config field model.name is 'deit_tiny_patch16_224.nonsense': Inval",
        ),
        ({"name": "resnet18"}, "config field model.scheme is 'mpvg', expected None: resnet18 is timm's own model"),
        ({"name": "resnet18", "scheme": None}, "config field model.patch_size is 4, which resnet18 does not have"),
        ({"scheme": "nonsense"}, "mpvg_deit_tiny_patch16_224 can't be built with {'scheme': 'nonsense'"),
        ({"pretrained": True}, "config field model.pretrained is True, and mpvg_deit_tiny_patch16_224 can't be had so"),
        ({"linear_probe": True}, "config field model.weights is None, expected the weights to fine-tune"),
        (
            {"freeze": ("block.1",)},
            "model.freeze has 'block.1', which begins no parameter's name; did you mean 'blocks.1'",
        ),
        ({"freeze": ("patch_embed", "pos_embed", "blocks", "norm", "head")}, "model.freeze leaves nothing to train"),
        ({"weights": "nowhere"}, "config field model.weights is 'nowhere': nowhere does not exist"),
    ],
)
def test_models_that_cannot_be(fields, message):
    assert message in fails(**fields)


# ---- weights


def test_weights_are_not_read_where_a_checkpoint_follows():
    build(weights="nowhere", start=False)
    build(linear_probe=True, start=False)


@pytest.mark.parametrize("kind", [TINY, TIMM], ids=["mpvg", "timm"])
def test_the_same_weights_from_a_file_a_folder_and_a_run(tmp_path, caplog, kind):
    caplog.set_level(logging.INFO, "mpvg_kernels")
    source = build(kind)
    folder = save(source, tmp_path / "run" / "last")
    (tmp_path / "run" / "run.json").write_text("{}")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    for path in (folder, f"{folder}/model.safetensors", tmp_path / "run", tmp_path / "w.pth"):
        caplog.clear()
        found = build(kind, weights=str(path))
        torch.testing.assert_close(found.state_dict(), source.state_dict(), rtol=0, atol=0)
        assert [r.getMessage() for r in caplog.records if "mpvg" in r.name] == [
            f"Loaded the weights of {folder if path == tmp_path / 'run' else path}."
        ]
        assert found.pretrained_model_args == source.pretrained_model_args  # these are noted in the weights it writes


@pytest.mark.parametrize("kind", [TINY, TIMM], ids=["mpvg", "timm"])
def test_head_of_other_classes_starts_anew(tmp_path, caplog, kind):
    caplog.set_level(logging.INFO, "mpvg_kernels")
    source = build(kind, data(classes=9))
    folder = save(source, tmp_path / "nine")
    torch.manual_seed(3)
    fresh = build(kind)
    torch.manual_seed(3)
    found = build(kind, weights=folder)
    assert "head.weight and head.bias start anew: the checkpoint has 9 classes, the model 5." in caplog.messages
    for name, value in found.state_dict().items():
        assert torch.equal(value, (fresh if name.startswith("head.") else source).state_dict()[name]), name
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith("head.")}
    torch.save(weights, tmp_path / "none.pth")
    assert torch.equal(build(kind, weights=str(tmp_path / "none.pth")).norm.weight, source.norm.weight)
    assert "head.weight and head.bias start anew: the checkpoint has no classifier, the model 5." in caplog.messages


@pytest.mark.parametrize("kind", [TINY, TIMM], ids=["mpvg", "timm"])
def test_weights_of_another_grid_are_resampled(tmp_path, kind):
    # 2x8 patches for a model of 4x4: as many rows, so that only the noted size tells
    source = build(kind, data((8, 32)))
    prefix = source.num_prefix_tokens
    found = build(kind, weights=save(source, tmp_path / "wide"))
    expected = timm.layers.resample_abs_pos_embed(
        source.pos_embed, new_size=(4, 4), old_size=(2, 8), num_prefix_tokens=prefix
    )
    torch.testing.assert_close(found.pos_embed, expected)
    assert not torch.equal(found.pos_embed, source.pos_embed)


@pytest.mark.parametrize("kind", [TINY, TIMM], ids=["mpvg", "timm"])
def test_weights_of_the_models_default_size(tmp_path, kind):
    # 14x14 patches in a file that notes no size, for a model of 7x28
    kind = dataclasses.replace(kind, patch_size=16)
    source = build(kind, data((224, 224)))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    found = build(kind, data((112, 448)), weights=str(tmp_path / "w.pth"))
    expected = timm.layers.resample_abs_pos_embed(
        source.pos_embed, new_size=(7, 28), old_size=(14, 14), num_prefix_tokens=source.num_prefix_tokens
    )
    torch.testing.assert_close(found.pos_embed, expected)


@pytest.mark.parametrize("kind", [TINY, TIMM], ids=["mpvg", "timm"])
def test_weights_of_another_model(tmp_path, kind):
    folder = save(build(kind, depth=3), tmp_path / "deep")
    message = fails(kind, weights=folder)
    assert message.startswith(f"config field model.weights is {folder!r}: these weights are of another model")
    assert "unexpected (blocks.2." in message
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    assert "can't be read as safetensors" in fails(kind, weights=str(tmp_path / "cut.safetensors"))
    resnet = save(build(Model(name="resnet18", scheme=None)), tmp_path / "resnet")
    assert "config field model.weights is" in fails(kind, weights=resnet)


# ---- frozen parts


def test_freeze_by_the_beginning_of_names():
    model = build(depth=11, freeze=("blocks.1", "pos_embed", "patch_embed.proj.bias"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "patch_embed.proj.bias"} <= frozen
    assert {n for n in frozen if n.startswith("blocks.")} == {
        name for name, _ in model.named_parameters() if name.startswith("blocks.1.")
    }


def test_frozen_parts_stay_in_eval_mode():
    found = Config(model=dataclasses.replace(TINY, freeze=("blocks.0",), drop_path_rate=0.5))
    model = create_model(found, data()).eval()
    train_mode(model, found)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: not f"{name}.".startswith("blocks.0.") for name in modes}


def test_linear_probe(tmp_path):
    name = "mpvg_ceit_tiny_patch16_224"  # with batch norms
    kind = Model(name=name, embed_dim=16, depth=2, num_heads=2)
    folder = save(build(kind, data((32, 32))), tmp_path / "w")
    model = dataclasses.replace(kind, weights=folder, linear_probe=True, drop_path_rate=0.5, attn_drop_rate=0.5)
    found = Config(model=model, optim=Optim(lr=1.0))
    model = create_model(found, data((32, 32)))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    train_mode(model, found)
    assert model.head.training and not model.training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 3, 32, 32)
    outputs = [model(x) for _ in range(2)]
    assert torch.equal(*outputs)  # no dropout
    outputs[0].square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


# ---- memory


def test_checkpointing_and_channels_last():
    model = build(grad_checkpointing=True, channels_last=True)
    assert model.grad_checkpointing and model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    plain = build(TIMM)
    assert not plain.grad_checkpointing
    message = fails(Model(name="pit_ti_224", scheme=None, grad_checkpointing=True), data((224, 224)))
    assert message == "config field model.grad_checkpointing is True, expected False: pit_ti_224 can't do that"


def test_distilled_students_only_where_there_is_a_teacher():
    distilled = Config(
        model=dataclasses.replace(TIMM, name="deit_tiny_distilled_patch16_224"),
        loss=Loss(distillation="soft", teacher="resnet18"),
    )
    assert create_model(distilled, data()).distilled_training
    assert not create_model(dataclasses.replace(distilled, loss=Loss()), data()).distilled_training
