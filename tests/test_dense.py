"""What both models for dense prediction share: made again from JSON, timm's interfaces, backbones and their weights."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from dense_models import ADAPTER, HEADS, small
from timm.optim import param_groups_layer_decay

from mpvg_kernels.models import MaskRCNN, UperNet, create_dense
from mpvg_kernels.train.config import Config, from_args
from mpvg_kernels.train.model import create_dense_model

TASKS = ("segmentation", "detection")


def output(model, image):
    """All that a model in eval mode gives, as tensors."""
    with torch.no_grad():
        found = model.eval()(image)
    return [found] if isinstance(found, torch.Tensor) else [value for one in found for value in one.values()]


@pytest.mark.parametrize("task", TASKS)
def test_made_again(task):
    """From its config, as JSON has it, and its weights: the same outputs."""
    model = small(task, "mpvg(last=2)", drop_path_rate=0.1)
    config = json.loads(json.dumps(model.dense_config))
    assert config == model.dense_config and config.keys() == {
        *("task", "backbone", "num_classes", "backbone_args", "head_args")
    }
    again = create_dense(**config)
    assert again.dense_config == config
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 70, 90)
    assert all(torch.equal(a, b) for a, b in zip(output(model, image), output(again, image), strict=True))


def test_config_is_plain():
    """Tuples become lists, and where weights came from is not noted."""
    args = {**ADAPTER, "interaction_indexes": ((0, 1), (2, 3)), "pretrained": False}
    model = create_dense("segmentation", "mpvg_vit_adapter_tiny", 3, backbone_args=args)
    assert model.dense_config["backbone_args"] == ADAPTER and isinstance(model, UperNet)
    assert UperNet(model.backbone, 3).dense_config is None
    detector = create_dense("detection", "mpvg_vit_adapter_tiny", 3, backbone_args=ADAPTER, head_args={"width": 8})
    assert isinstance(detector, MaskRCNN)


@pytest.mark.parametrize(
    "task, backbone, options, message",
    [
        ("depth", "resnet18", {}, "task='depth'; expected one of segmentation, detection"),
        ("segmentation", "resnet_18", {}, "backbone='resnet_18' is no model that timm knows"),
        ("segmentation", "vit_tiny_patch16_224", {}, r"strides \(16, 16, 16, 16\), expected \(4, 8, 16, 32\)"),
        ("detection", "resnet18", {"out_indices": [0, 1, 2, 3]}, r"strides \(2, 4, 8, 16\), expected \(4, 8, 16, 32\)"),
        ("detection", "mpvg_vit_adapter_tiny", {"out_indices": [1, 2]}, r"strides \(8, 16\), expected"),
        ("detection", "mpvg_vit_adapter_tiny", {"schema": "mpvg"}, "mpvg_vit_adapter_tiny can't be built .* 'schema'"),
        ("segmentation", "resnet18", {"act_layer": torch.nn.ReLU}, "must be what JSON can hold"),
        ("segmentation", "mpvg_vit_adapter_tiny", {"scheme": "mpvgg"}, "did you mean mpvg"),
    ],
)
def test_bad_options(task, backbone, options, message):
    with pytest.raises(ValueError, match=message):
        create_dense(task, backbone, 3, backbone_args=options)


def test_bad_head_options():
    with pytest.raises(ValueError, match="MaskRCNN can't be built with {'breadth': 8}: .*'breadth'"):
        create_dense("detection", "mpvg_vit_adapter_tiny", 3, backbone_args=ADAPTER, head_args={"breadth": 8})


# ---- timm's interfaces


def published_scale(name, layers, decay):
    """ViT-Adapter's rule for layer-wise learning rates; a last norm, which it does not have, is the last layer's."""
    name = name.removeprefix("backbone.model.")
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    else:
        layer = 0 if re.match(r"pos_embed|layer_pos_embed|patch_embed\.", name) else layers + 1
    layer = layers if name.startswith("norm.") else layer
    return decay ** (layers + 1 - layer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("scheme", ["mpvg", "default", "lape(join=unshare)"])
def test_layer_decay(task, scheme):
    """Parameters of the adapter and of the heads learn at the full rate, the ViT's layers and its stem at less."""
    model = small(task, scheme)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    tables = {"pos_embed", "level_embed", "layer_pos_embed"}
    for name, p in model.named_parameters():
        assert scales[id(p)] == published_scale(name, 4, 0.5), name
        assert (decays[id(p)] == 0) == (p.ndim == 1 or bool(tables & set(name.split(".")))), name
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    rest = {f"backbone.model.{name}" for name, _ in model.trunk.named_parameters()}
    assert dict(model.named_parameters()).keys() == rest ^ set(model.head_names())


@pytest.mark.parametrize("task", TASKS)
def test_checkpointing(task):
    """The same gradients with activation checkpointing, which reaches the backbone."""
    image, grads = torch.randn(2, 3, 64, 64), []
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64)}
    for on in (False, True):
        model = small(task).train()
        model.set_grad_checkpointing(on)
        assert model.trunk.grad_checkpointing is on
        torch.manual_seed(1)
        outputs = model(image, [target] * 2).values() if task == "detection" else model(image)
        sum(y.square().mean() for y in outputs).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- backbones


SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "backbone, options",
    [
        ("mpvg_swin_tiny_patch4_window7_224", {**SWIN, "dynamic_img_size": True, "scheme": "pvg"}),
        ("swin_tiny_patch4_window7_224", {**SWIN, "strict_img_size": False}),  # gives (B, H, W, C)
        ("resnet18", {}),
        ("resnet18", {"feature_cls": "getter"}),
    ],
    ids=["mpvg_swin", "swin", "resnet", "resnet getter"],
)
def test_other_backbones(task, backbone, options):
    """Of this package and of timm, for images of any size, and layers where the backbone tells them."""
    model = create_dense(task, backbone, 4, backbone_args=options, head_args=HEADS[task]).eval()
    maps = model.features(torch.randn(1, 3, 64, 90))
    assert [m.shape[1] for m in maps] == model.channels
    assert [m.shape[2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert output(model, torch.randn(1, 3, 70, 90))
    if model.trunk is model.backbone:
        with pytest.raises(ValueError, match="tells no layers: train it without layer-wise learning rates"):
            model.group_matcher()
    else:
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        own = {scale[id(p)] for name, p in model.named_parameters() if not name.startswith("backbone.")}
        assert own == {1.0} and max(scale[id(p)] for p in model.trunk.parameters()) < 1


# ---- weights


def test_classification_weights(tmp_path, caplog):
    """A DeiT's, in a file and in timm's folder: said what starts anew, what is left out and what is resampled."""
    sizes = {key: ADAPTER[key] for key in ("embed_dim", "depth", "num_heads")}
    source = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg", img_size=96, **sizes)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    timm.models.save_for_hf(source, tmp_path / "folder", safe_serialization=True)
    for path in (tmp_path / "deit.pth", tmp_path / "folder"):
        model = small("segmentation")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with caplog.at_level(logging.INFO, "mpvg_kernels"):
            model.load_backbone(path, grid=(6, 6))
        after, given = model.state_dict(), source.state_dict()
        for name, value in after.items():
            own = name.removeprefix("backbone.model.")
            if own in given and own != "pos_embed":
                assert torch.equal(value, given[own]), name
            elif own != "pos_embed":
                assert torch.equal(value, before[name]), name
        said = " ".join(caplog.messages)
        assert "of the adapter start anew; left out: head" in said and "resampled pos_embed from 6x6 to 4x4" in said
        assert f"Loaded the backbone's weights from {path}" in said


@pytest.mark.parametrize("options", [{}, {"feature_cls": "getter"}], ids=["list", "getter"])
def test_weights_of_timm(options, tmp_path, caplog):
    """A timm model's: its classifier is left out and said; another model's are refused."""
    source = timm.create_model("resnet18", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    model = create_dense("segmentation", "resnet18", 4, backbone_args=options, head_args=HEADS["segmentation"])
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        model.load_backbone(tmp_path / "resnet.pth")
    assert torch.equal(model.trunk.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert "no place for it: fc" in " ".join(caplog.messages)
    with pytest.raises(
        ValueError, match=r"resnet.pth: these weights are of another model than this MPVGViTAdapter: .*"
    ):
        small("detection").load_backbone(tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="nothing.pth does not exist"):
        model.load_backbone(tmp_path / "nothing.pth")


def test_weights_of_swin(tmp_path):
    source = timm.create_model("mpvg_swin_tiny_patch4_window7_224", scheme="mpvg", **SWIN)
    torch.save(source.state_dict(), tmp_path / "swin.pth")
    args = {**SWIN, "dynamic_img_size": True}
    model = create_dense("detection", "mpvg_swin_tiny_patch4_window7_224", 4, backbone_args=args)
    model.load_backbone(tmp_path / "swin.pth")
    given = source.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in model.trunk.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_weights_of_a_dense_model(task, tmp_path, caplog):
    """All of them; for other classes what has an output for each starts anew, which is said."""
    source = small(task)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    image = torch.randn(1, 3, 64, 64)
    same = create_dense(**source.dense_config)
    same.load_weights(tmp_path / "model.pth")
    assert all(torch.equal(a, b) for a, b in zip(output(source, image), output(same, image), strict=True))
    other = create_dense(**{**source.dense_config, "num_classes": 7})
    before = {name: p.clone() for name, p in other.named_parameters()}
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        other.load_weights(tmp_path / "model.pth")
    given, new = source.state_dict(), []
    for name, p in other.named_parameters():
        if p.shape == given[name].shape:
            assert torch.equal(p, given[name]), name
        else:
            assert torch.equal(p, before[name]) and name in other.head_names()
            new.append(name)
    assert [f"{', '.join(new)} start anew: the checkpoint has other classes than these 7."] == caplog.messages
    assert len(new) == {"segmentation": 4, "detection": 6}[task]
    wider = create_dense(**{**source.dense_config, "head_args": {**HEADS[task], "width": 24}})
    with pytest.raises(
        ValueError, match=rf"model.pth: these weights are of another model than this {type(wider).__name__}"
    ):
        wider.load_weights(tmp_path / "model.pth")


@pytest.mark.parametrize("task", TASKS)
def test_weights_of_a_classification_model_of_timm(task, tmp_path):
    """As the trainer loads them into timm's wrapper for feature maps."""
    given = timm.create_model("resnet18").state_dict()
    torch.save(given, tmp_path / "resnet.pth")
    fields = ("--task", task, "--model.name", "resnet18", "--model.scheme", "None")
    config = from_args(Config(), [*fields, "--model.weights", str(tmp_path / "resnet.pth")])
    data = SimpleNamespace(input_size=(3, 64, 64), num_classes=4, preprocessing={})
    model = create_dense_model(config, data, head_args=HEADS[task])
    found = model.trunk.state_dict()
    assert found and all(torch.equal(value, given[name]) for name, value in found.items())
