"""What timm's own tests ask of a model, of every registered name: at small sizes, and at full size without memory.

Each name's function is called with sizes of its architecture in FAMILIES; what differs between the names of one
architecture is their sizes, which are seen on the meta device.
"""

import copy
import re

import pytest
import timm
import torch
from architectures import FAST, SLOW
from timm.models import group_parameters
from torch import nn

import mpvg_kernels as mk
from mpvg_kernels.models import from_timm  # noqa: F401  (registers, as mpvg_kernels does)

VIT = dict(embed_dim=24, depth=3, num_heads=2)
FAMILIES = {
    "mpvg_deit": dict(VIT, img_size=16, patch_size=4),
    "mpvg_vit": dict(VIT, img_size=16, patch_size=4),
    "mpvg_vit_lite": dict(VIT, img_size=16),
    "mpvg_ceit": dict(VIT, img_size=32),
    "mpvg_t2t_vit": dict(VIT, img_size=32, token_dim=8),
    "mpvg_swin": dict(img_size=16, patch_size=2, embed_dim=12, depths=(1, 1, 1), num_heads=(1, 2, 4), window_size=4),
}
# (a ViT-Adapter gives feature maps and has tests of its own)
NAMES = timm.list_models("mpvg_*", exclude_filters="*adapter*")
SCHEMES = (
    *("default", "gap", "lape", "lape_gap", "pvg", "mpvg", "gap_last"),
    *("mpvg(last=1)", "mpvg(first_layer=0)", "mpvg(hierarchical=False)", "mpvg(add_to_input=False)"),
    *("lape(join=share)", "lape(join=unshare)"),
)
# Table 6's layer 0 is where Swin's mpvg starts already.
NO_SUCH_SCHEME = {("mpvg_t2t_vit", "lape(join=unshare)")}


def family(name: str) -> str:
    return max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len)


ONE_EACH = {family(name): name for name in reversed(NAMES)}


def build(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **{**FAMILIES[family(name)], "num_classes": 42, **kwargs})


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.in_chans if hasattr(model, "in_chans") else 3, *model.patch_embed.img_size)


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens as (B, N, D); Swin has (B, H, W, D)."""
    return tokens.flatten(1, -2)


every_name = pytest.mark.parametrize("name", NAMES)
every_family = pytest.mark.parametrize("name", ONE_EACH.values(), ids=ONE_EACH.keys())


@every_name
def test_forward_and_backward(name):
    """Finite logits, a gradient for every parameter that learns, none that is unused."""
    model = build(name).train()
    logits = model(images(model))
    assert logits.shape == (2, 42) and logits.isfinite().all()
    logits.mean().backward()
    assert [k for k, p in learned(model).items() if p.grad is None] == []
    fixed = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {k for k in fixed if re.search(r"^pos_embed$|\.features$", k)} and (not fixed or "t2t" in name)
    assert build(name, in_chans=1)(torch.randn(1, 1, *model.patch_embed.img_size)).shape == (1, 42)


@every_name
@pytest.mark.parametrize("scheme", ["default", "mpvg"])
def test_head_of_features_is_forward(name, scheme):
    model = build(name, scheme=scheme).eval()
    image = images(model)
    features = model.forward_features(image)
    assert features.shape[-1] == model.num_features == model.head_hidden_size
    torch.testing.assert_close(model.forward_head(features), model(image), rtol=1e-4, atol=1e-5)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.num_features)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), pre_logits, rtol=1e-4, atol=1e-5)
    assert model.num_classes == 0
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image), features, rtol=1e-4, atol=1e-5)
    model.reset_classifier(7, model.scheme.pool)
    assert model(image).shape == (2, 7) and model.num_classes == 7
    assert not model.get_classifier().training
    with pytest.raises(ValueError, match="global_pool='max' contradicts position scheme"):
        model.reset_classifier(7, "max")


@every_name
def test_forward_intermediates(name):
    """Against feature_info and one another: all, chosen, the last, with norm, as tokens, stopped early."""
    model = build(name).eval()
    image, info = images(model), model.feature_info
    final, every = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image), rtol=1e-4, atol=1e-5)
    sides = [tuple(side // i["reduction"] for side in image.shape[2:]) for i in info]
    assert [tuple(y.shape) for y in every] == [(2, i["num_chs"], *s) for i, s in zip(info, sides, strict=True)]
    _, chosen = model.forward_intermediates(image, indices=[0, 2])
    torch.testing.assert_close(chosen, [every[0], every[2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.forward_intermediates(image, indices=2, intermediates_only=True), every[-2:], rtol=1e-4, atol=1e-5
    )
    early = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, every[:1], rtol=1e-4, atol=1e-5)
    _, normed = model.forward_intermediates(image, indices=1, norm=True)
    torch.testing.assert_close(normed[0].flatten(2).mT, flat(final)[:, model_prefix(model) :], rtol=1e-4, atol=1e-5)
    if family(name) == "mpvg_swin":
        with pytest.raises(ValueError, match="output_fmt='NLC'; expected 'NCHW'"):
            model.forward_intermediates(image, output_fmt="NLC")
        return
    _, tokens = model.forward_intermediates(image, output_fmt="NLC")
    torch.testing.assert_close(tokens, [y.flatten(2).mT for y in every], rtol=1e-4, atol=1e-5)


def model_prefix(model: nn.Module) -> int:
    return getattr(model, "num_prefix_tokens", 0)


@every_name
def test_features_only(name):
    backbone = build(name, features_only=True, out_indices=(0, 2))
    image = images(backbone.model)
    maps = backbone(image)
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    reduction = backbone.feature_info.reduction()
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(side // r for side in image.shape[2:]) for r in reduction]
    sum(m.sum() for m in maps).backward()
    assert [k for k, p in learned(backbone).items() if p.grad is None] == []


@every_name
def test_parameter_groups(name):
    """Layer groups take in every parameter but the head's, and names without weight decay are parameters."""
    for scheme in ("default", "mpvg"):
        model = build(name, scheme=scheme)
        names = dict(model.named_parameters())
        assert model.no_weight_decay() <= set(names)
        for coarse in (False, True):
            patterns = model.group_matcher(coarse)
            blocks = patterns["blocks"]
            known = [patterns["stem"], *([blocks] if isinstance(blocks, str) else [b[0] for b in blocks])]
            known += [v for k, v in patterns.items() if k not in ("stem", "blocks")]
            left = [k for k in names if not any(re.match(p, k) for p in known)]
            # (timm's coarse groups of Swin leave the last norm to the head's)
            with_head = ("head.", "norm.") if coarse and family(name) == "mpvg_swin" else ("head.",)
            assert left == [k for k in names if k.startswith(with_head)], coarse
            groups = group_parameters(model, patterns)
            assert sorted(k for group in groups.values() for k in group) == sorted(names)
            stem = next(iter(groups.values()))
            assert "pos_embed" in stem and "patch_embed" in str(stem) and "blocks" not in str(stem)


@every_name
def test_checkpointing(name):
    model = build(name, drop_path_rate=0.0).double().eval()
    image = images(model).double()
    results = []
    for enable in (False, True, False):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        logits = model(image)
        logits.square().sum().backward()
        results.append((logits, {k: p.grad for k, p in learned(model).items()}))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@every_name
def test_default_cfg(name):
    """Its keys, the modules that it names, and the full-size model: on the meta device, no memory is taken."""
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    assert cfg["architecture"] == name and cfg["fixed_input_size"] and cfg["paper_ids"] == "arXiv:2502.02919"
    assert len(cfg["mean"]) == len(cfg["std"]) == 3 and cfg["interpolation"] == "bicubic" and cfg["crop_pct"]
    assert cfg["input_size"][1:] == model.patch_embed.img_size
    assert model.get_submodule(cfg["classifier"]).weight.shape[0] == cfg["num_classes"] == model.num_classes
    if cfg["first_conv"] is not None:
        assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
    with torch.no_grad():
        assert model.eval()(torch.empty(1, *cfg["input_size"], device="meta")).shape == (1, cfg["num_classes"])


@every_name
def test_saved_folder_reads_back(name, tmp_path):
    model = build(name, scheme="gap_last").eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = images(model)
    assert again.scheme == model.scheme and type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
        assert torch.equal(copy.deepcopy(model)(image), model(image))


@every_name
def test_other_sizes(name):
    """A non-square size, set and dynamic; a size that does not fit names the nearest that do."""
    model = build(name).eval()
    side = model.patch_embed.img_size[0]
    size = (2 * side, side)
    dynamic = build(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    model.set_input_size(size)
    image = torch.randn(1, 3, *size)
    assert model.patch_embed.grid_size[0] == 2 * model.patch_embed.grid_size[1]
    if family(name) == "mpvg_swin":  # a size that is set makes windows and shifts anew, see test_mpvg_swin.py
        assert model(image).shape == dynamic(image).shape == (1, 42)
    else:
        torch.testing.assert_close(model(image), dynamic(image), rtol=1e-4, atol=1e-5)
    patch = model.patch_embed.patch_size[0]
    odd = side + 1
    nearest = rf"nearest.*{side}.*{side + patch}"
    for call in (
        lambda: build(name, img_size=odd),
        lambda: model.set_input_size((odd, odd)),
        lambda: dynamic(torch.randn(1, 3, odd, odd)),
    ):
        with pytest.raises(ValueError, match=nearest):
            call()
    with pytest.raises(ValueError, match="set_input_size"):
        model(torch.randn(1, 3, side, side))


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model = build(name).to(dtype)
    logits = model(images(model).to(dtype))
    assert logits.dtype == dtype and logits.isfinite().all()
    logits.float().mean().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in learned(model).values())


@every_family
def test_exports(name):
    """For any batch size."""
    model = build(name).eval()
    image = images(model)
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        image = images(model, 5)
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


def losses(name: str, scheme: str, device="cpu", **kwargs) -> list[torch.Tensor]:
    """The loss before and after a step of SGD, in which every parameter has its part."""
    torch.manual_seed(0)
    model = build(name, scheme=scheme, num_classes=5, **kwargs).to(device)
    image, target = images(model).to(device), torch.tensor([1, 3], device=device)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return nn.functional.cross_entropy(model(image), target)

    before = loss()
    before.backward()
    assert [k for k, p in learned(model).items() if p.grad is None] == []
    torch.optim.SGD(learned(model).values(), lr=0.1).step()
    with torch.no_grad():
        after = loss()
    assert before != after
    return [before.detach().cpu(), after.cpu()]


@every_family
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_train_alike(name, scheme):
    """A step on each backend that is quick here."""
    if (family(name), scheme) in NO_SUCH_SCHEME:
        with pytest.raises(ValueError, match="a fixed sinusoid"):
            build(name, scheme=scheme)
        return
    if family(name) == "mpvg_swin":
        scheme = scheme.replace("first_layer=0", "first_layer=1")
    found = {}
    for backend in FAST:
        if backend in mk.available_backends("cpu"):
            with mk.use_backend(backend):
                found[backend] = losses(name, scheme)
    for values in found.values():
        torch.testing.assert_close(values, found["reference"], rtol=1e-5, atol=1e-5)


LEAST = dict(depth=2, embed_dim=8, num_heads=1)
TINY = {
    "mpvg_deit": dict(LEAST, img_size=8),
    "mpvg_vit_lite": dict(LEAST, img_size=8),
    "mpvg_ceit": dict(LEAST, img_size=(16, 32)),
    "mpvg_t2t_vit": dict(LEAST, img_size=(16, 32)),
    "mpvg_swin": dict(depths=(1, 1), num_heads=(1, 2), img_size=8, window_size=2),
}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("backend", SLOW, indirect=True)
def test_gpu_backends_train_alike(kind, backend, device):
    """A step of a model as small as can be: without a GPU the kernels are emulated. (mpvg_vit is mpvg_deit's class.)"""
    found = losses(ONE_EACH[kind], "mpvg", device, **TINY[kind])
    with mk.use_backend("reference"):
        expected = losses(ONE_EACH[kind], "mpvg", device, **TINY[kind])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
