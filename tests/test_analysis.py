"""Quantities on hand-made tensors with known answers; probe and summary against plain formulas and bare hooks."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_timm_contract import NO_SUCH_SCHEME, ONE_EACH, SCHEMES, build, images
from torch import nn

from mpvg_kernels.analysis import diagnostics, figures
from mpvg_kernels.analysis import quantities as q
from mpvg_kernels.analysis.probe import attention_weights, evaluating, layers_of, norms_of, pos_table, probe, takes_pos
from mpvg_kernels.analysis.summary import summarise
from mpvg_kernels.models import fuse_norms
from mpvg_kernels.modules import _FusedNorm

NAN = math.nan


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, **tolerance) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, equal_nan=True, **({"rtol": 1e-6, "atol": 1e-7} | tolerance))


# ---- quantities


def test_pearson():
    a, b = tensor([1, 2], [3, 4]), tensor([-2, -4], [-6, -8])
    close(q.pearson(a, b), -1.0)
    close(q.pearson(a, 5 - b), 1.0)
    close(q.pearson(tensor([1, 0, -1, 0]), tensor([0, 1, 0, -1])), 0.0)
    close(q.pearson(tensor([1, 2, 3]), tensor([1, 3, 2])), 0.5)
    close(q.pearson(a, torch.ones_like(a)), NAN)
    close(q.pearson(a, tensor([1, 2], [2, 1]), dim=0), [1.0, -1.0])


def test_correlation_is_that_of_the_mean_over_the_images():
    pos = tensor([1, 2], [3, 6])
    tokens = torch.stack([-pos + 4, -pos - 4, -pos + 1])  # alike but for a shift, which no correlation sees
    close(q.mean_tokens(tokens), -pos + 1 / 3)
    close(q.mean_tokens(pos), pos)
    close(q.correlation(tokens, pos), -1.0)
    # one image for, one against the PE, the first twice as strong: their mean is for it
    close(q.correlation(torch.stack([2 * pos, -pos]), pos), 1.0)
    close(q.correlation(torch.stack([pos, -pos]), pos), NAN)


def test_channels():
    tokens, pos = tensor([1, 1, -3], [2, 1, -1]), tensor([2, 3, 5], [4, -1, 9])
    close(q.channel_correlation(tokens, pos), [1.0, NAN, 1.0])
    means = q.channel_means(torch.stack([tokens, tokens]), pos)
    close(means[0], [1.5, 1.0, -2.0])
    close(means[1], [3.0, 1.0, 7.0])
    close(q.opposite_channels(tokens, pos), 1 / 3)
    close(q.opposite_channels(tokens, -pos), 2 / 3)


def test_lengths():
    close(q.pos_norm(tensor([3, 4], [0, 5], [5, 0], [4, 3])), 5.0)
    close(q.pos_norm(tensor([1, 0], [0, 7])), 5.0)  # root of the mean square, not the mean
    close(q.token_norms(tensor([[3, 4], [0, 2]])), [[5.0, 2.0]])


def test_bias_variance_divides_by_the_channels():
    close(q.bias_variance(tensor([1, -1, 3, 1])[0]), 2.0)


def test_cosines():
    before, after = tensor([[1, 0], [2, 2], [0, 3]]), tensor([[5, 0], [1, -1], [0, -1]])
    close(q.cosine_before_after(before, after), [[1.0, 0.0, -1.0]])
    close(q.token_similarity(tensor([[1, 0], [2, 0], [9, 0]], [[1, 0], [0, 1], [-1, 0]])), [1.0, -1 / 3])
    close(q.token_similarity(tensor([[1, 0]])), [NAN])
    x = torch.randn(2, 5, 3)
    plain = F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    close(q.token_similarity(x), (plain.sum((1, 2)) - 5) / 20, rtol=1e-4)


def test_similarity_of_positions():
    pos = tensor([1, 0], [0, 1], [-2, 0], [0, -3])
    close(q.position_similarity(pos), [[1, 0, -1, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, -1, 0, 1]])
    shifted = pos + tensor([100, 50])  # nearly alike, until what all have in common is taken off
    assert q.position_similarity(shifted).min() > 0.99
    close(q.position_similarity(shifted, centred=True), q.position_similarity(pos - pos.mean(0)))
    # on a grid of 2 x 2 each has two neighbours; here the diagonals are the opposites
    neighbours, pairs = q.neighbour_similarity(tensor([1, 0], [0, 1], [0, -1], [-1, 0]), (2, 2))
    close(neighbours, 0.0)
    close(pairs, -1 / 3)
    row = tensor([1, 1], [1, 1], [-1, -1], [-1, -1])
    close(q.neighbour_similarity(row, (2, 2))[0], 0.0)  # alike along the rows, opposite along the columns
    close(q.neighbour_similarity(row, (1, 4))[0], 1 / 3)


def test_attention():
    weights = tensor([[[0.5, 0.5, 0, 0], [1, 0, 0, 0]], [[0.5, 0.5, 0, 0], [0, 0, 1, 0]]])
    close(q.attention_received(weights), [[2.0, 1.0, 1.0, 0.0]])
    close(q.class_token_attention(weights), [[2.0, 2.0, 0.0, 0.0]])
    close(q.attention_received(torch.randn(2, 3, 7, 5).softmax(-1)).mean(1), [1.0, 1.0])


def test_definitions():
    assert q.DEFINITIONS["correlation"].startswith("Pearson's correlation, over all N D entries,")
    assert all(text and "\n" not in text for text in q.DEFINITIONS.values())


# ---- probe


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


CASES = [
    pytest.param(name, scheme, id=f"{family.removeprefix('mpvg_')}-{scheme}")
    for family, name in ONE_EACH.items()
    for scheme in SCHEMES
    if (family, scheme) not in NO_SUCH_SCHEME
]


def plain_norm(v, norm, prefix=""):
    """The paper's LN, written out."""
    eps = norm.pos_eps if prefix else norm.eps
    scaled = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return scaled * getattr(norm, f"{prefix}weight") + getattr(norm, f"{prefix}bias")


@torch.no_grad()
def plain_probe(model, x) -> dict:
    """By layer the stream, LN(x), LN'(pos) and output (patch tokens), from the norms' own results and bare hooks.

    A norm with PE gives LN(x) + LN'(pos), and LN'(pos): what it is given is read from the arguments of its calls. The
    last norm is called again for its tokens.
    """
    found, prefix = {}, getattr(model, "num_prefix_tokens", 0)
    handles = []
    for i, block in enumerate(model.blocks):

        def hook(norm, args, kwargs, out, i=i):
            y, stream = out[0].flatten(1, -2)[:, prefix:], out[1].flatten(1, -2)[:, prefix:]
            pos = out[2] if len(out) == 3 else None
            pos = None if pos is None else pos.reshape(-1, y.shape[-1])[-y.shape[1] :]
            found[i] = stream, plain_norm(stream, norm), pos, y

        handles.append(block.norm1.register_forward_hook(hook, with_kwargs=True))
    logits = model(x)
    y = model.forward_features(x).flatten(1, -2)[:, prefix:]
    for handle in handles:
        handle.remove()
    return found | {"last": y, "logits": logits}


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_probe_sees_what_the_norms_do(name, scheme):
    model = randomise(build(name, scheme=scheme)).eval()
    x = images(model)
    plain, found = plain_probe(model, x), probe(model, x)
    assert torch.equal(found.logits, plain["logits"])
    assert [norm.layer for norm in found.layers] == list(range(len(model.blocks)))
    for norm in found.layers:
        stream, tokens, pos, y = plain[norm.layer]
        assert (norm.pos is None) == (pos is None) == (not takes_pos(model.blocks[norm.layer].norm1))
        assert norm.grid[0] * norm.grid[1] == norm.tokens.shape[1]
        close(norm.stream, stream, rtol=1e-5, atol=1e-5)
        close(norm.tokens, tokens, rtol=1e-4, atol=1e-4)
        close(norm.output, y, rtol=1e-4, atol=1e-4)
        if pos is not None:
            close(norm.pos, pos, rtol=1e-4, atol=1e-4)
    close(found.last.output, plain["last"], rtol=1e-4, atol=1e-4)
    close(found.last.tokens, plain_norm(found.last.stream, model.norm), rtol=1e-4, atol=1e-4)
    assert (found.last.pos is None) == (model.scheme.last is None)

    # The same numbers, from the definitions.
    statistics = diagnostics.pos_statistics(model.train(), x)
    expected = found.with_pos
    assert statistics["layers"] == [norm.layer for norm in expected]
    assert diagnostics.has_pos_norms(model) == bool(expected)
    for norm, length, value in zip(expected, statistics["pos_norm"], statistics["correlation"], strict=True):
        a, b = norm.tokens.double().mean(0).flatten(), norm.pos.double().flatten()
        assert length == pytest.approx(float(norm.pos.double().square().sum(1).mean().sqrt()), rel=1e-5)
        assert value == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=1e-4)


def test_pooled_output_is_the_mean_of_the_probed_tokens():
    for scheme in ("mpvg", "pvg", "gap_last"):
        model = randomise(build(ONE_EACH["mpvg_deit"], scheme=scheme))
        found = probe(model, images(model))
        close(model.head(found.last.output.mean(1)), found.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(ONE_EACH.values()), ids=list(ONE_EACH))
@pytest.mark.parametrize("training", [False, True])
def test_probe_leaves_everything_as_it_was(name, training):
    model = build(name).train(training)
    model.blocks[0].eval()  # as a frozen part is
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    x, state = images(model), torch.get_rng_state()
    x_before = x.clone()
    probe(model, x)
    diagnostics.pos_statistics(model, x)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, x_before)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_everything_is_as_it_was_after_an_error_too():
    model = build(ONE_EACH["mpvg_deit"]).train()
    with pytest.raises(ValueError, match="image size"):
        probe(model, torch.randn(1, 3, 12, 16))
    assert model.training and not any("_call" in vars(m) or m._forward_pre_hooks for m in model.modules())


def plain_attention(block, y):
    """softmax(q k / sqrt(d)) of timm's Attention, written out."""
    attn = block.attn
    q_, k, _ = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (attn.q_norm(q_) @ attn.k_norm(k).mT / q_.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("scheme", ["default", "lape", "mpvg"])
@pytest.mark.parametrize("family", ["mpvg_deit", "mpvg_ceit", "mpvg_t2t_vit", "mpvg_vit_lite"])
@torch.no_grad()
def test_attention_of_vits(family, scheme):
    model = randomise(build(ONE_EACH[family], scheme=scheme, **({"qk_norm": True} if family == "mpvg_deit" else {})))
    x, prefix, seen = images(model), model.num_prefix_tokens, []
    handles = [b.attn.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for b in model.blocks]
    found = probe(model.eval(), x).attention
    for handle in handles:
        handle.remove()
    assert [each.layer for each in found] == [0, 1, 2]
    for each, block, y in zip(found, model.blocks, seen, strict=True):
        weights = plain_attention(block, y)
        n = weights.shape[-1]
        close(each.received, n * weights.sum((1, 2))[:, prefix:] / (weights.shape[1] * n), rtol=1e-4, atol=1e-5)
        assert (each.class_token is None) == (scheme == "mpvg")
        if prefix:
            close(each.class_token, n * weights[:, :, 0, prefix:].mean(1), rtol=1e-4, atol=1e-5)
        close(attention_weights(block.attn, y), weights, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_maps_of_shifted_windows():
    """By brute force: a query's weights go to the image's places, over windows that wrap around."""
    model = timm.create_model(
        "mpvg_swin_tiny_patch4_window7_224",
        **dict(img_size=(40, 24), embed_dim=12, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=5),
    )
    randomise(model).eval()
    block = model.blocks[1]
    assert any(block.shift_size) and block.input_resolution == (10, 6)  # windows of 4 pad it to 12 x 8
    x, weights = torch.randn(2, 3, 40, 24), []
    handle = block.attn.softmax.register_forward_hook(lambda m, args, out: weights.append(out))
    found = probe(model, x).attention[1]
    handle.remove()
    received = weights[0].mean((1, 2)) * 16  # (windows, 16): the softmax ran for the maps alone
    expected = torch.zeros(2, 12, 8)
    per_image = received.view(2, 3, 2, 4, 4)
    for row in range(3):
        for column in range(2):
            expected[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = per_image[:, row, column]
    shift = block.shift_size
    for i in range(10):
        for j in range(6):
            place = expected[:, (i - shift[0]) % 10, (j - shift[1]) % 6]
            close(found.received.view(2, 10, 6)[:, i, j], place)
    assert found.class_token is None and found.grid == (10, 6)


def test_autocast_and_double():
    model = randomise(build(ONE_EACH["mpvg_deit"]))
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = probe(model, x)
    exact = probe(model, x)
    for a, b in zip(found.with_pos, exact.with_pos, strict=True):
        assert a.stream.dtype == a.tokens.dtype == a.pos.dtype == torch.float32
        close(a.pos, b.pos, rtol=1e-5, atol=1e-5)  # the PE is not rounded
        close(a.tokens, b.tokens, rtol=0.1, atol=0.1)
    assert probe(model.double(), x.double()).last.tokens.dtype == torch.float64


def test_dynamic_sizes_and_registers():
    model = build(ONE_EACH["mpvg_deit"], dynamic_img_size=True, reg_tokens=2)
    found = probe(model, torch.randn(2, 3, 16, 24))
    assert [norm.grid for norm in found.with_pos] == [(4, 6)] * 3
    assert found.layers[1].tokens.shape == found.layers[1].output.shape == (2, 24, 24)
    assert found.layers[1].pos.shape == (24, 24) and found.attention[0].received.shape == (2, 24)
    assert found.attention[0].class_token is None  # registers are no class token
    assert pos_table(model)[0].shape == (16, 24) and pos_table(model)[1] == (4, 4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_timms_own_vits(fused, pool):
    small = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3, global_pool=pool)
    model = timm.create_model("vit_tiny_patch16_224", **small, class_token=pool == "token").eval()
    x, streams = torch.randn(2, 3, 16, 16), []
    handle = model.blocks[1].register_forward_pre_hook(lambda m, args: streams.append(args[0]))
    expected = model(x)
    handle.remove()
    prefix = model.num_prefix_tokens
    if fused:
        fuse_norms(model)
    found = probe(model, x)
    close(found.logits, expected, rtol=1e-4, atol=1e-5)
    close(found.layers[1].stream, streams[0][:, prefix:], rtol=1e-4, atol=1e-5)
    assert len(found.attention) == 2 and found.with_pos == []
    assert (found.last is None) == (pool == "avg")  # its norm comes after the pool
    if pool == "token":
        close(found.last.output, model.forward_features(x)[:, prefix:], rtol=1e-4, atol=1e-5)
    assert diagnostics.pos_statistics(model, x) == {"layers": [], "pos_norm": [], "correlation": []}


def test_other_models_give_what_they_have():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 2), embed_dim=8)
    found = probe(swin, torch.randn(1, 3, 56, 56))
    assert [norm.grid for norm in found.layers] == [(14, 14), (7, 7)] and found.last.grid == (7, 7)
    assert [each.received.shape for each in found.attention] == [(1, 196), (1, 49)] and pos_table(swin) is None
    conv = timm.create_model("resnet18", num_classes=3)
    found = probe(conv, torch.randn(1, 3, 32, 32))
    assert found.logits.shape == (1, 3) and found.layers == [] and found.last is None and found.attention == []
    (sentence,) = summarise(conv, [torch.randn(1, 3, 32, 32)]).left_out()
    assert "ResNet has no transformer layers" in sentence


def test_layers_and_norms():
    model = build(ONE_EACH["mpvg_ceit"], scheme="default")
    assert layers_of(model) == list(model.blocks)  # not its class attention
    assert list(norms_of(model)) == [0, 1, 2, "last"]
    assert all(isinstance(norm, _FusedNorm) for norm in norms_of(model).values())
    with evaluating(model):
        assert not model.training and not torch.is_grad_enabled()


def test_numbers_that_are_not_finite_are_none():
    model = build(ONE_EACH["mpvg_deit"])
    with torch.no_grad():
        model.blocks[1].norm1.pos_weight.zero_()
        model.blocks[1].norm1.pos_bias.zero_()
        model.norm.pos_weight.fill_(NAN)
    found = diagnostics.pos_statistics(model, images(model))
    assert found["pos_norm"][0] == 0.0 and found["correlation"][0] is None  # nothing to point anywhere
    assert found["pos_norm"][-1] is None and found["correlation"][-1] is None


# ---- summary and figures


@pytest.mark.parametrize("scheme", ["default", "pvg", "mpvg"])
def test_summary_does_not_hang_on_the_batches(scheme):
    model = randomise(build(ONE_EACH["mpvg_deit"], scheme=scheme))
    x = images(model, 6)
    found, whole = summarise(model, x.split(4)), probe(model, x)
    assert found.images == 6 and found.class_token == (scheme == "default")
    for norm, plain in zip(found.layers, [*whole.layers, whole.last], strict=True):
        close(norm.tokens, plain.tokens.mean(0), rtol=1e-4, atol=1e-5)
        close(norm.stream_norms, plain.stream.norm(dim=-1).mean(0), rtol=1e-4, atol=1e-5)
        close(norm.output_norms, plain.output.norm(dim=-1).mean(0), rtol=1e-4, atol=1e-5)
    last = whole.last
    close(found.last.cosine, F.cosine_similarity(last.stream, last.output, dim=-1), rtol=1e-4, atol=1e-5)
    close(found.last.similarity_before, q.token_similarity(last.stream), rtol=1e-4, atol=1e-5)
    close(found.last.similarity_after, q.token_similarity(last.output), rtol=1e-4, atol=1e-5)
    close(found.last.shown_after, last.output.norm(dim=-1)[:4], rtol=1e-4, atol=1e-5)
    for each, plain in zip(found.attention, whole.attention, strict=True):
        of = plain.class_token if scheme == "default" else plain.received
        close(each.mean, of.mean(0), rtol=1e-4, atol=1e-5)
        close(each.shown, of[:4], rtol=1e-4, atol=1e-5)

    numbers = found.numbers()
    by_layer = {row["layer"]: row for row in numbers["layers"]}
    assert list(by_layer) == [0, 1, 2, "last"] and by_layer[0]["grid"] == (4, 4)
    assert [layer for layer, row in by_layer.items() if row["pos_norm"] is not None] == {
        "default": [],
        "pvg": [1, 2],
        "mpvg": [1, 2, "last"],
    }[scheme]
    statistics = diagnostics.pos_statistics(model, x)
    for layer, value in zip(statistics["layers"], statistics["correlation"], strict=True):
        assert by_layer[layer]["correlation"] == pytest.approx(value, abs=1e-5)
        assert len(by_layer[layer]["channel_correlation"]) == 24
    variance = numbers["last_norm"]["bias_variance"]
    assert variance["tokens"] == pytest.approx(float(model.norm.bias.detach().var(unbiased=False)), rel=1e-4)
    assert (variance["pos"] is None) == (scheme != "mpvg")
    assert len(by_layer[2]["token_norms"]["before"]) == 4
    said = " ".join(found.left_out())
    assert ("no norm that takes a position embedding" in said) == (scheme == "default")
    assert ("the last norm of MPVGVisionTransformer (pvg) takes no" in said) == (scheme == "pvg")
    assert (said == "") == (scheme == "mpvg")


def test_figures():
    """One for all that there is to show; what they look like was looked at."""
    for name, scheme, missing in (
        ("mpvg_deit", "mpvg", set()),
        ("mpvg_swin", "pvg", set()),
        ("mpvg_deit", "default", {"correlation", "channels"}),
    ):
        model = build(ONE_EACH[name], scheme=scheme)
        x = images(model, 5)
        drawn = figures.draw(summarise(model, [x]), [torch.zeros(16, 16).byte().numpy()] * 4)
        every = {"heatmaps", "correlation", "channels", "last_norm", "token_norms", "position_similarity", "attention"}
        assert set(drawn) == every - missing
        for figure in drawn.values():
            figure.savefig("/dev/null", format="png", dpi=20)
    assert figures.chosen(list(range(13)), 7) == [0, 2, 4, 6, 8, 10, 12] and figures.chosen([1, 2], 7) == [1, 2]


def test_figures_of_a_tiny_or_constant_model():
    """One image of one token, and a PE of zeros: nothing divides by nothing."""
    model = build(ONE_EACH["mpvg_deit"], img_size=4)
    with torch.no_grad():
        model.pos_embed.zero_()
    found = summarise(model, [images(model, 1)])
    assert all(row["correlation"] is None or abs(row["correlation"]) <= 1 for row in found.numbers()["layers"])
    for figure in figures.draw(found).values():
        figure.savefig("/dev/null", format="png", dpi=20)
