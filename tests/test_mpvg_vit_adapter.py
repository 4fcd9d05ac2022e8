"""ViT-Adapter: against a plain formula in every scheme, sizes, windows, gradients, weights, timm's interface."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mpvg_kernels import use_backend
from mpvg_kernels.models import load_weights
from mpvg_kernels.models.mpvg_vit_adapter import GridAttention

SMALL = {
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "deform_num_heads": 2,
    "conv_inplane": 8,
    "img_size": 64,
    "interaction_indexes": ((0, 1), (2, 3)),
}
SCHEMES = ("default", "gap_last", "lape", "lape(join=share)", "lape(join=unshare)", "pvg", "mpvg", "mpvg(last=2)")
SCHEMES += ("mpvg(hierarchical=False)", "mpvg(first_layer=0, add_to_input=False)")


def small(scheme="mpvg", **kwargs):
    """A small adapter whose every parameter matters: none is zero or one."""
    torch.manual_seed(0)
    model = timm.create_model("mpvg_vit_adapter_tiny", scheme=scheme, **{**SMALL, **kwargs}).eval()
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape) * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


# ---- the plain formula, written anew


def norm(x, module, prefix=""):
    weight, bias = getattr(module, f"{prefix}weight"), getattr(module, f"{prefix}bias")
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def attention(x, attn, grid):
    """Multi-head attention of (B, N, D), in windows one after the other, with zeros behind the grid's edges."""
    size, (rows, columns) = attn.window_size or max(grid), grid
    qkv = attn.qkv(x).unflatten(1, grid)
    padded = F.pad(
        qkv, (0, 0, 0, -columns % size if attn.window_size else 0, 0, -rows % size if attn.window_size else 0)
    )
    out = torch.zeros(*padded.shape[:3], x.shape[-1])
    for top in range(0, padded.shape[1], size):
        for left in range(0, padded.shape[2], size):
            window = padded[:, top : top + size, left : left + size]
            q, k, v = window.flatten(1, 2).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            out[:, top : top + size, left : left + size] = y.transpose(1, 2).flatten(2).unflatten(1, window.shape[1:3])
    return attn.proj(out[:, :rows, :columns].flatten(1, 2))


def points(grids):
    """Centres of pixels, x before y."""
    found = [[(j + 0.5) / w, (i + 0.5) / h] for h, w in grids for i in range(h) for j in range(w)]
    return torch.tensor(found)


def plain(model, image):
    """The four maps of an adapter in eval mode, in fp32, without any of its forwards but the deformable attention's."""
    scheme = model.scheme
    image = F.pad(image, (0, -image.shape[-1] % 32, 0, -image.shape[-2] % 32))
    grid = image.shape[-2] // 16, image.shape[-1] // 16
    grids = [(2 * grid[0], 2 * grid[1]), grid, (grid[0] // 2, grid[1] // 2)]
    sizes = [h * w for h, w in grids]
    stem = model.spm.stem(image)
    c2 = model.spm.conv2(stem)
    c3 = model.spm.conv3(c2)
    c4 = model.spm.conv4(c3)
    priors = [fc(c) for fc, c in zip((model.spm.fc2, model.spm.fc3, model.spm.fc4), (c2, c3, c4), strict=True)]
    c = torch.cat([p.flatten(2).mT + level for p, level in zip(priors, model.level_embed, strict=True)], 1)
    x = model.patch_embed.proj(image).flatten(2).mT

    def resized(table):
        return model._resized(table, grid)

    pos_0 = resized(model.pos_embed)
    if scheme.add_to_input:
        x = x + pos_0
    pos, last = pos_0, pos_0
    for (first, end), interaction in zip(model.groups, model.interactions, strict=True):
        part = interaction.injector
        y = part.attn(norm(x, part.query_norm), points([grid]), norm(c, part.feat_norm), grids)
        x = x + part.gamma * y
        for i in range(first, end + 1):
            block = model.blocks[i]
            if str(i) in model.layer_pos_embed:
                pos = resized(model.layer_pos_embed[str(i)])
            y = norm(x, block.norm1)
            if scheme.reaches(i) and scheme.join == "norm":
                pos = norm(pos if scheme.hierarchical else pos_0, block.norm1, "pos_")
                y = y + pos
                last = pos if i and i == scheme.last else last
            elif scheme.reaches(i):
                x = x + pos
                y = norm(x, block.norm1)
            x = x + block.ls1.gamma * attention(y, block.attn, grid)
            x = x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(norm(x, block.norm2))))
        for part in (interaction.extractor, *(interaction.extra_extractors or ())):
            c = c + part.attn(norm(c, part.query_norm), points(grids), norm(x, part.feat_norm), [grid])
            hidden = part.ffn.fc1(norm(c, part.ffn_norm)).mT.split(sizes, -1)
            hidden = [part.ffn.dwconv(h.unflatten(-1, g)).flatten(2) for h, g in zip(hidden, grids, strict=True)]
            c = c + part.ffn.fc2(F.gelu(torch.cat(hidden, -1).mT))
    if not isinstance(model.norm, nn.Identity):
        x = norm(x, model.norm) + (norm(last, model.norm, "pos_") if scheme.last is not None else 0)
    tokens = x.mT.unflatten(-1, grid)
    # (contiguous: of one image with other strides PyTorch's BatchNorm takes a wrong gradient of its bias)
    maps = [m.unflatten(-1, g).contiguous() for m, g in zip(c.mT.split(sizes, -1), grids, strict=True)]
    maps = [model.up(maps[0]) + model.spm.fc1(stem), *maps]
    return [
        bn(m + F.interpolate(tokens, size=m.shape[-2:], mode="bilinear"))
        for bn, m in zip(model.feature_norms, maps, strict=True)
    ]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_the_plain_formula(scheme, backend):
    """On images that are not square, need padding, and have another grid than the table."""
    model = small(scheme, window_size=3, global_layers=(1,))
    image = torch.randn(2, 3, 70, 120)
    with use_backend(backend):
        found = model(image)
    expected = plain(model, image)
    assert [f.shape[-2:] for f in found] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(scheme):
    """Every parameter has one that is the plain formula's."""
    model = small(scheme, window_size=2, global_layers=(3,))
    image = torch.randn(1, 3, 64, 96)
    grads = []
    for run in (model, lambda image: plain(model, image)):
        model.zero_grad()
        sum((f * torch.linspace(-1, 1, f.numel()).view_as(f)).sum() for f in run(image)).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(model.named_parameters()).keys()
    for name, grad in grads[0].items():
        expected = grads[1][name]
        assert grad.any(), name
        assert (grad - expected).norm() <= 2e-3 * expected.norm() + 1e-6, name


def test_checkpointing_and_stochastic_depth():
    """The same features and gradients with activation checkpointing, with the same random draws."""
    image, found = torch.randn(2, 3, 64, 64), []
    for on in (False, True):
        model = small(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(on)
        torch.manual_seed(1)
        features = model(image)
        sum(f.square().mean() for f in features).backward()
        found.append([*[f.detach() for f in features], *[p.grad for p in model.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_windows_see_no_further():
    """A pixel of another window changes nothing; one of the same window does."""
    attn = GridAttention(8, 2)
    attn.window_size = 2
    x = torch.randn(1, 4, 5, 8, requires_grad=True)
    attn(x)[0, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("size, parameters", [("tiny", 7_971_440), ("small", 27_513_488), ("base", 99_514_592)])
def test_parameters(size, parameters):
    model = timm.create_model(f"mpvg_vit_adapter_{size}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_features_only():
    model = timm.create_model("mpvg_vit_adapter_tiny", features_only=True, **SMALL)
    assert model.feature_info.channels() == [24] * 4 and model.feature_info.reduction() == [4, 8, 16, 32]
    assert [f.shape[-1] for f in model(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]
    two = timm.create_model("mpvg_vit_adapter_tiny", features_only=True, out_indices=(1, 3), **SMALL)
    assert [f.shape[-1] for f in two(torch.randn(1, 3, 64, 64))] == [8, 2]


# ---- weights


def test_classification_weights(caplog):
    """A DeiT's weights: its blocks are taken, the class token goes, the table is resampled, the rest starts anew."""
    sizes = {key: SMALL[key] for key in ("embed_dim", "depth", "num_heads")}
    source = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="lape", img_size=96, **sizes)
    model = timm.create_model("mpvg_vit_adapter_tiny", scheme="mpvg", **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        weights = {k: v for k, v in source.state_dict().items() if "blocks.0.norm1.pos" not in k}
        weights |= {f"norm.pos_{k}": torch.ones(24) for k in ("weight", "bias")}
        load_weights(model, weights, grid=(6, 6))
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items() if k.startswith("blocks."))
    assert after["pos_embed"].shape == (1, 16, 24) and not torch.equal(after["pos_embed"], before["pos_embed"])
    assert all(torch.equal(after[k], before[k]) for k in before if k.split(".")[0] in ("spm", "interactions", "up"))
    said = " ".join(caplog.messages)
    assert "of the adapter start anew; left out: head" in said and "resampled pos_embed from 6x6 to 4x4" in said
    assert "dropped the class token" in said


def test_own_weights_and_published_names():
    """Its own state dict, and one with the names of the published code, also as a detector's backbone."""
    model, other = small(), small()
    for p in other.parameters():
        p.data.zero_()
    load_weights(other, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    published = {}
    for name, value in model.state_dict().items():
        for i in range(4):
            name = name.replace(f"feature_norms.{i}.", f"norm{i + 1}.")
        name = name.replace(".ffn.dwconv.", ".ffn.dwconv.dwconv.").replace(".ls1.gamma", ".gamma1")
        published["backbone." + name.replace(".ls2.gamma", ".gamma2")] = value
    for p in other.parameters():
        p.data.zero_()
    load_weights(other, published)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(interaction_indexes=((0, 1), (3, 3))),
            r"expected the first and the last layer of each group, all 4 layers",
        ),
        (dict(global_layers=(4,)), "global_layers has 4, but the layers are 0 to 3"),
        (dict(num_classes=10), "num_classes=10: a ViT-Adapter gives feature maps"),
        (dict(scheme={"name": "mpvg", "last": None, "pool": "token"}), "a ViT-Adapter has no class token"),
        (dict(scheme="mpvgg"), "did you mean mpvg"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("mpvg_vit_adapter_tiny", **{**SMALL, **options})


def test_decay_and_groups():
    """Level embeddings and tables are not decayed; layer-wise learning rates know every parameter."""
    from timm.optim import param_groups_layer_decay

    model = small()
    assert {"level_embed", "pos_embed"} <= model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.9)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
