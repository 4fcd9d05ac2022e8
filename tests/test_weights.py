"""Loading: what converts into which scheme, the one line that says so, strictness, and files that can't be read."""

import argparse
import logging
import re

import pytest
import safetensors.torch
import timm
import torch
from architectures import randomise
from test_mpvg_vit import DIM, SMALL, TINY, build
from timm.models.vision_transformer import VisionTransformer

from mpvg_kernels.models import load_checkpoint, load_weights


def timms(**kwargs) -> VisionTransformer:
    return randomise(VisionTransformer(**{**SMALL, **kwargs}))


def loaded(model, weights, caplog, **kwargs) -> str:
    """Load and give back the line that says what was done."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        load_weights(model, weights, **kwargs)
    assert len(caplog.messages) <= 1
    return caplog.messages[0].partition(": ")[2] if caplog.messages else ""


@pytest.mark.parametrize("options", [{}, dict(no_embed_class=True), dict(reg_tokens=2)], ids=str)
def test_pooled_checkpoint_into_a_class_token_scheme(options, caplog):
    """The class token and its row of the table stay as the model has them; the rest is the checkpoint's."""
    weights = timms(class_token=False, global_pool="avg", fc_norm=False, **options).state_dict()
    model = randomise(build("default", **options))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = loaded(model, weights, caplog)
    slot = not options.get("no_embed_class")
    kept = "the class token and its row of pos_embed keep" if slot else "the class token keeps"
    assert done == f"{kept} the model's own initialisation."
    after = model.state_dict()
    assert torch.equal(after["cls_token"], before["cls_token"])
    assert torch.equal(after["pos_embed"][:, -weights["pos_embed"].shape[1] :], weights["pos_embed"])
    if slot:
        assert torch.equal(after["pos_embed"][:, 0], before["pos_embed"][:, 0])
    assert all(torch.equal(after[k], v) for k, v in weights.items() if k != "pos_embed")


def test_pooled_checkpoint_of_another_grid_into_a_class_token_scheme(caplog):
    weights = timms(img_size=(8, 32), class_token=False, global_pool="avg", fc_norm=False).state_dict()
    model = build("lape", img_size=(16, 24))
    assert loaded(model, weights, caplog, grid=(2, 8)) == (
        "resampled pos_embed from 2x8 to 4x6; the class token and its row of pos_embed keep the model's own "
        "initialisation; 4 PE LayerNorms start at the identity."
    )
    assert model.pos_embed.shape == (1, 25, DIM)


@pytest.mark.parametrize(("scheme", "start"), [("default", 0), ("gap", 1)])
def test_distilled_checkpoint(scheme, start, caplog):
    """Its third kind of token has no place in a scheme: token, row and head go."""
    weights = randomise(timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)).state_dict()
    model = build(scheme)
    done = loaded(model, weights, caplog)
    assert "dropped the distillation token and its head" in done
    assert "dropped the distillation token's row of pos_embed" in done
    rows = weights["pos_embed"]
    assert torch.equal(model.pos_embed, torch.cat([rows[:, :1], rows[:, 2:]], 1)[:, start:])
    assert torch.equal(model.head.weight, weights["head.weight"])


def test_norm_after_the_pool_becomes_the_norm_before_it(caplog):
    weights = timms(class_token=False, global_pool="avg").state_dict()
    assert "fc_norm.weight" in weights
    model = build("gap")
    loaded(model, weights, caplog)
    assert torch.equal(model.norm.weight, weights["fc_norm.weight"])


def lapes(weights: dict) -> dict:
    """Our parameters as LaPE's public DeiT code names them."""
    unshared = any(k.startswith("layer_pos_embed") for k in weights)
    out = {}
    for name, value in weights.items():
        name = re.sub(r"norm1\.pos_", "pe_norm.", name)
        name = "pos_embed0" if name == "pos_embed" and unshared else name
        out["module." + re.sub(r"^layer_pos_embed\.", "pos_embed", name)] = value
    return {"model": out, "epoch": 3}


@pytest.mark.parametrize("scheme", ["lape", "lape(join=share)", "lape(join=unshare)"])
def test_lapes_checkpoints(scheme, caplog):
    source = randomise(build(scheme))
    model = build(scheme)
    assert loaded(model, lapes(source.state_dict()), caplog) == ""
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    pooled = build(scheme.replace("lape", "lape_gap"))
    assert loaded(pooled, lapes(source.state_dict()), caplog).startswith(
        "dropped the class token; dropped the class token's row of pos_embed"
    )
    assert torch.equal(pooled.pos_embed, source.pos_embed[:, 1:])
    expected = {k: v for k, v in source.state_dict().items() if "pos_embed" not in k and k != "cls_token"}
    assert all(torch.equal(pooled.state_dict()[k], v) for k, v in expected.items())
    if scheme == "lape":
        with pytest.raises(
            ValueError,
            match=r"2 missing \(norm.pos_weight .*2 unexpected \(blocks.0.norm1.pos_weight .*; build the model with a "
            r"position scheme with PE LayerNorms in blocks.0.norm1, blocks.1.norm1, blocks.2.norm1 and 1 more only",
        ):
            load_weights(build("mpvg"), lapes(source.state_dict()))


def test_new_norms_at_zero_leave_the_function(caplog):
    """gap's weights in pvg and mpvg: the same logits as long as x + pos stays."""
    source = randomise(build("gap")).eval()
    image = torch.randn(2, 3, 16, 16)
    for scheme, count in (("pvg", 3), ("mpvg", 4), ("mpvg(hierarchical=False)", 3 + 1), ("gap_last", 1)):
        model = build(scheme).eval()
        assert loaded(model, source.state_dict(), caplog, new_pos_norms="zero") == (
            f"{count} PE LayerNorms start at zero."
        )
        torch.testing.assert_close(model(image), source(image))
    with pytest.raises(ValueError, match="new_pos_norms='one'; expected 'identity' or 'zero'"):
        load_weights(build("mpvg"), source.state_dict(), new_pos_norms="one")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (dict(depth=5), "with depth=5 to"),
        (dict(embed_dim=32, in_chans=1), "with embed_dim=32 and in_chans=1 to"),
        (dict(num_classes=7), "with num_classes=7 to"),
    ],
)
def test_what_would_take_the_weights_is_said(options, advice):
    with pytest.raises(ValueError, match=f"another model than this one .*; build the model {advice} take them"):
        load_weights(build("default"), timms(**options).state_dict())
    load_weights(build("default", **options), timms(**options).state_dict())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "folder"])
def test_load_checkpoint(name, tmp_path):
    source, model = randomise(build("mpvg")), build("mpvg")
    path = tmp_path / name
    if name == "folder":
        timm.models.save_for_hf(source, path, safe_serialization=True)
    elif name.endswith("pth"):
        torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1e-3)}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    load_checkpoint(model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", "cut", r"cut.safetensors can't be read as safetensors \(.*\); it may be cut off"),
        ("cut.pth", "cut", r"cut.pth can't be read as a PyTorch checkpoint \(.*\); it may be cut off"),
        ("text.safetensors", b"hello", "text.safetensors can't be read as safetensors"),
        ("text.bin", b"hello", "text.bin can't be read as a PyTorch checkpoint"),
        ("empty.pth", b"", "empty.pth can't be read as a PyTorch checkpoint"),
        ("none.safetensors", None, "none.safetensors does not exist; expected a .safetensors file"),
        ("folder", "folder", "is a folder without model.safetensors or pytorch_model.bin"),
        ("list.pth", "list", "holds list, not tensors by name"),
        ("other.safetensors", "other", "other.safetensors: these weights are of another model than this one"),
    ],
)
def test_files_that_cannot_be_loaded(name, content, message, tmp_path):
    """One sentence that names the file, and the model as it was."""
    path, model = tmp_path / name, build("mpvg")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = build("default", depth=2).state_dict()
    if content == "folder":
        path.mkdir()
    elif content == "list":
        torch.save([1], path)
    elif content in ("cut", "other"):
        torch.save(whole, path) if name.endswith("pth") else safetensors.torch.save_file(whole, path)
        if content == "cut":
            path.write_bytes(path.read_bytes()[:-5000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(model, path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [TINY, "mpvg_swin_tiny_patch4_window7_224", "mpvg_vit"])
def test_no_pretrained_weights(name):
    with pytest.raises(
        RuntimeError, match=f"No pretrained weights exist for {name}. Use `pretrained=False`, .*from_timm"
    ):
        timm.create_model(name, pretrained=True)
