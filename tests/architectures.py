"""What the tests of the architectures share: pieces of plain formulas, and checks that every architecture has to pass.

Each test file writes its architecture's forward in plain PyTorch from the parameters by name (`Formula` has the
pieces), for four layers under the schemes of test_mpvg_vit.EQUATIONS.
"""

import logging

import timm
import torch
import torch.nn.functional as F
from test_mpvg_vit import DEPTH, EQUATIONS, Equations
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from mpvg_kernels.models import load_weights

# Backends for every scheme in fp64, and those that are emulated without a GPU, for one scheme in fp32.
FAST, SLOW = ("reference", "cpp"), ("triton", "cuda")


class Formula:
    """A model's equations: its parameters by name, the scheme's, and the steps that all architectures take."""

    def __init__(self, model: nn.Module, eps: float):
        self.p = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in model.named_parameters()}
        self.eq: Equations = EQUATIONS[str(model.scheme)]
        self.heads = model.blocks[0].attn.num_heads
        self.eps = eps

    def norm(self, v: Tensor, name: str, prefix: str = "", eps: float | None = None) -> Tensor:
        mean, var = v.mean(-1, keepdim=True), v.var(-1, unbiased=False, keepdim=True)
        scaled = (v - mean) / (var + (self.eps if eps is None else eps)).sqrt()
        return scaled * self.p[f"{name}.{prefix}weight"] + self.p[f"{name}.{prefix}bias"]

    def linear(self, v: Tensor, name: str) -> Tensor:
        bias = self.p.get(f"{name}.bias")
        return v @ self.p[f"{name}.weight"].T + (0 if bias is None else bias)

    def mlp(self, v: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(v, f"{name}.fc1")), f"{name}.fc2")

    def conv(self, v: Tensor, name: str, **kwargs) -> Tensor:
        return F.conv2d(v, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), **kwargs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def self_attention(self, y: Tensor, name: str) -> Tensor:
        return self.attention(*self.linear(y, f"{name}.qkv").chunk(3, -1), name)

    def chain(self, layers: tuple[int, ...]) -> Tensor:
        """pos_embed through these layers' LN'."""
        pos = self.p["pos_embed"][0]
        for i in layers:
            pos = self.norm(pos, f"blocks.{i}.norm1", "pos_")
        return pos

    def embed(self, x: Tensor) -> Tensor:
        """Patches (B, N, D) with class token and PE, as the scheme has them."""
        if self.eq.class_token:
            x = torch.cat([self.p["cls_token"].expand(len(x), 1, -1), x], 1)
        return x + self.p["pos_embed"] if self.eq.add_to_input else x

    def attend(self, x: Tensor, i: int) -> Tensor:
        """x + MSA(LN(x) + pos_i), as the scheme has it."""
        if i in self.eq.stream:
            x = x + self.p[self.eq.stream[i]]
        y = self.norm(x, f"blocks.{i}.norm1")
        if i in self.eq.layers:
            y = y + self.chain(self.eq.layers[i])
        return x + self.self_attention(y, f"blocks.{i}.attn")

    def head(self, x: Tensor) -> Tensor:
        """The last norm, the pool and the head."""
        y, last = self.norm(x, "norm"), self.eq.last
        if last is not None:
            y = y + self.norm(self.p[last][0] if isinstance(last, str) else self.chain(last), "norm", "pos_")
        return self.linear(y[:, 0] if self.eq.class_token else y.mean(1), "head")


def randomise(model: nn.Module) -> nn.Module:
    """Learned parameters all different, so that no term of a formula vanishes or is the identity."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=float("norm" in name or "bn" in name), std=0.3)
    return model


def check_equations(model: nn.Module, formula: type[Formula], image: Tensor, *, unread: str = "") -> None:
    """Logits and the gradient of every learned parameter are the formula's; none is without.

    unread: beginning of the names of parameters whose gradient is zero, as the formula has it.
    """
    exact = image.dtype == torch.float64
    tolerance = dict(rtol=1e-9, atol=1e-10) if exact else dict(rtol=1e-3, atol=1e-3)
    plain = formula(model)
    expected = plain(image)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    logits = model(image)
    (logits * weights).sum().backward()
    torch.testing.assert_close(logits, expected, **tolerance)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert p.grad is not None, name
        if not name.endswith(("conv1.bias", "conv2.bias", "conv3.bias")):  # a BatchNorm takes every shift out again
            assert bool(p.grad.any()) != (bool(unread) and name.startswith(unread)), name
        torch.testing.assert_close(p.grad, plain.p[name].grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def check_scheme_differences(build, schemes, with_class_token: tuple[str, ...] = ()) -> None:
    """Against `default`: the class token, its slot and what belongs to it, the LNs of the PE, and tables; no more."""
    default = {k: v.shape for k, v in build("default").named_parameters()}
    for scheme in schemes:
        eq, found = EQUATIONS[scheme], {k: v.shape for k, v in build(scheme).named_parameters()}
        width = default["pos_embed"][-1:]
        expected = dict(default)
        if not eq.class_token:
            expected = {k: v for k, v in expected.items() if not k.startswith(("cls_token", *with_class_token))}
            expected["pos_embed"] = (1, default["pos_embed"][1] - 1, *width)
        norms = [f"blocks.{i}.norm1" for i in eq.layers] + ["norm"] * (eq.last is not None)
        expected |= {f"{norm}.pos_{kind}": width for norm in norms for kind in ("weight", "bias")}
        expected |= {v: expected["pos_embed"] for v in eq.stream.values()}
        assert found == expected, scheme


def outputs_and_grads(model, image, call=None):
    torch.manual_seed(2)
    out = model(image) if call is None else call(image)
    out.square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return out, grads


def check_checkpointing(build, image) -> None:
    """The same outputs, gradients and running statistics; the layers' activations are not kept."""
    kept, results = [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = randomise(build(drop_path_rate=0.4)).double()
        model.set_grad_checkpointing(enable)
        kept.append(0)

        def pack(t):
            kept[-1] += t.numel() > 0  # torch 2.11's checkpoint keeps an empty one for each block
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results.append((*outputs_and_grads(model, image.double()), dict(model.named_buffers())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)
    assert kept[1] < kept[0] / 2


def check_compiles(model, image) -> None:
    """One graph, with the same outputs and gradients."""
    torch._dynamo.reset()
    out, grads = outputs_and_grads(model, image)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, grads_again = outputs_and_grads(model, image, compiled)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads_again, grads, rtol=1e-3, atol=1e-3)


def check_exports(model, image) -> None:
    """For any batch size."""
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(model.eval(), (image,), dynamic_shapes=({**batch},))
        image = torch.cat((image, image.flip(0), image.flip(-1)))
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


def check_saved(model, image, folder) -> nn.Module:
    """A folder written by timm reads back through timm, to the bit."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert again.scheme == model.scheme
    with torch.no_grad():
        assert torch.equal(again.eval()(image), model.eval()(image))
    return again


def check_published_weights(build, published: dict[str, Tensor], own: dict[str, Tensor], caplog, dropped: str) -> None:
    """A checkpoint under published names is the default model's `own`; in a pooled scheme it loses its class token."""
    assert len(published) == len(own)
    model = build("default")
    load_weights(model, published)
    assert not caplog.messages, "a conversion is not a load"
    torch.testing.assert_close(model.state_dict(), own, rtol=0, atol=0)
    pooled = build("mpvg")
    with caplog.at_level(logging.INFO, "mpvg_kernels"):
        load_weights(pooled, published)
    assert f"position scheme mpvg: {dropped}" in caplog.text
    for name, value in pooled.state_dict().items():
        if name == "pos_embed":
            assert torch.equal(value, own[name][:, 1:])
        elif "pos_" not in name:
            assert torch.equal(value, own[name]), name


def check_sizes(build, schemes, size: tuple[int, int], other: tuple[int, int], stride: int) -> None:
    """set_input_size and dynamic_img_size agree on an image with as many patches in another shape."""
    for scheme in schemes:
        model = randomise(build(scheme, img_size=size)).eval()
        dynamic = build(scheme, img_size=size, dynamic_img_size=True).eval()
        dynamic.load_state_dict(model.state_dict())
        with torch.no_grad():
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(dynamic(image), model(image))
            model.set_input_size(other)
            image = torch.randn(2, 3, *other)
            torch.testing.assert_close(model(image), dynamic(image))
            final, (map_,) = dynamic.forward_intermediates(image, 1)
            padded = build(scheme, img_size=size, dynamic_img_size=True, dynamic_img_pad=True).eval()
            padded.load_state_dict(dynamic.state_dict())
            torch.testing.assert_close(padded(image[..., :-1, :]), dynamic(F.pad(image[..., :-1, :], (0, 0, 0, 1))))
        assert map_.shape[2:] == (other[0] // stride, other[1] // stride)
        torch.testing.assert_close(final, model.forward_features(image))


def check_features(build, image, stride: int) -> None:
    """timm's contract: head of features, intermediates, features_only, a new head, an unpooled model."""
    for scheme in ("default", "mpvg"):
        model = randomise(build(scheme)).eval()
        features = model.forward_features(image)
        prefix, grid = int(scheme == "default"), (image.shape[2] // stride, image.shape[3] // stride)
        assert features.shape == (len(image), prefix + grid[0] * grid[1], model.num_features)
        torch.testing.assert_close(model(image), model.forward_head(features), rtol=1e-4, atol=1e-4)
        assert model.forward_head(features, pre_logits=True).shape == (len(image), model.num_features)
        final, maps = model.forward_intermediates(image, indices=[0, 2], norm=True)
        torch.testing.assert_close(final, features, rtol=1e-4, atol=1e-4)
        assert [m.shape for m in maps] == [(len(image), model.num_features, *grid)] * 2
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(image), features, rtol=1e-4, atol=1e-4)
        model.reset_classifier(3)
        assert model(image).shape[-1] == 3

        backbone = build(scheme, features_only=True, out_indices=(0, 2))
        assert backbone.feature_info.reduction() == [stride] * 2
        assert [m.shape for m in backbone(image)] == [m.shape for m in maps]
        assert len(backbone.model.blocks) == 3
        sum(m.sum() for m in backbone(image)).backward()
        unused = [k for k, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused


def check_parameter_groups(model, undecayed: set[str], last: tuple[str, ...]) -> None:
    """Weight decay leaves out 1-D parameters and `undecayed`; layer decay has `last` with the last norm."""
    names = dict(model.named_parameters())
    skipped = model.no_weight_decay()
    assert undecayed <= set(names)
    groups = param_groups_weight_decay(model, no_weight_decay_list=skipped)
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    for name, p in names.items():
        if p.requires_grad:
            assert (id(p) in decayed) == (p.ndim > 1 and name not in undecayed), name
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layers = {name: scale[id(p)] for name, p in names.items() if p.requires_grad}
    stem = {layers[k] for k in layers if k.startswith(("patch_embed.", "pos_embed", "cls_token", "layer_pos_embed"))}
    assert len(stem) == 1
    assert all(layers[k] == layers["norm.weight"] for k in layers if k.startswith(last))
    assert len(set(layers.values())) == DEPTH + 2
