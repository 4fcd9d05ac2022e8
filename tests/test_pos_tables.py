"""The tables LN'_l(pos) that models keep in eval: the same numbers as without, never stale, constants of an export."""

import copy
import io
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

import mpvg_kernels as mk
from mpvg_kernels.models.pos_tables import PosTables

OPTIONS = dict(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=5)


def build(scheme="mpvg", seed=0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("mpvg_deit_tiny_patch16_224", scheme=scheme, **{**OPTIONS, **kwargs})
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.3)
    return model.eval()


def own(model, image):
    """The model's result with each norm computing its own LN'(pos)."""
    model = copy.copy(model)
    model.__dict__ = dict(model.__dict__)
    model.pos_tables = lambda *args, **kwargs: None
    return model(image)


def image(batch=2, device="cpu", dtype=torch.float32):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def kept(model):
    return model.pos_tables._kept


SCHEMES = [
    ("mpvg", {}),
    ("mpvg(last=2)", {}),
    ("mpvg(hierarchical=False)", {}),
    ("mpvg(first_layer=0, add_to_input=False)", {}),
    ("pvg", {}),
    ("lape", {}),
    ("lape", dict(reg_tokens=2)),
    ("lape_gap", {}),
    ("gap_last", dict(reg_tokens=1)),
    ("mpvg(last=2)", dict(reg_tokens=2)),
    ("mpvg", dict(no_embed_class=True, reg_tokens=2)),
    ("mpvg", dict(norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, bias=False, **kwargs))),
]


@pytest.mark.parametrize("scheme,kwargs", SCHEMES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
def test_the_same_numbers(scheme, kwargs, backend, device):
    model = build(scheme, **kwargs).to(device)
    x = image(device=device)
    with torch.no_grad():
        for call in (model, model.forward_features, lambda x: model.forward_intermediates(x, norm=True)[0]):
            assert torch.equal(call(x), call(x))
        torch.testing.assert_close(model(x), own(model, x), rtol=1e-5, atol=1e-5)
        if device == "cpu":
            first = kept(model)
            model(x)
            assert first is not None and kept(model) is first
    with torch.enable_grad():
        assert model(x).requires_grad  # by each norm's own LN': there the parameters have gradients


@pytest.mark.parametrize("scheme", ("default", "gap", "lape(join='share')"))
def test_schemes_without_an_inner_norm_keep_nothing(scheme):
    model = build(scheme)
    with torch.no_grad():
        model(image())
    assert kept(model) is None


def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train()(image()).square().sum().backward()
    optimizer.step()
    model.eval()


def norm1(model):
    return model.blocks[2].norm1


def other(model):
    return build(seed=1).state_dict()


def swap(model):
    norm1(model).pos_bias = nn.Parameter(torch.randn(24))


def numpy_view(model):
    norm1(model).pos_weight.detach().numpy()[3] += 1


def training_and_back(model):
    model.train()
    model.pos_embed.data *= torch.linspace(0, 1, 24)
    model.eval()


def replace_the_module(model):
    norm = mk.FusedAddPELayerNorm(24)
    nn.init.normal_(norm.pos_weight)
    model.blocks[2].norm1 = norm


def nudge(model):
    """The smallest change there is: one bit of one parameter, without a trace."""
    p = norm1(model).pos_weight.data
    p[0] = torch.nextafter(p[0], torch.tensor(9.0))


CHANGES = {
    "in place under no_grad": lambda m: m.pos_embed.add_(0.1 * torch.randn_like(m.pos_embed)),
    "a weight in place": lambda m: norm1(m).pos_weight.mul_(-1.5),
    "the last norm in place": lambda m: m.norm.pos_bias.add_(1),
    "p.data = ...": lambda m: setattr(norm1(m).pos_weight, "data", torch.randn(24)),
    "p.data.add_()": lambda m: norm1(m).pos_bias.data.add_(1),
    "pos_embed.data": lambda m: m.pos_embed.data.mul_(torch.linspace(0, 1, 24)),
    "one bit": nudge,
    "a numpy view": numpy_view,
    "optimizer": step,
    "load_state_dict": lambda m: m.load_state_dict(other(m)),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(other(m), assign=True),
    "another Parameter": swap,
    "another module": replace_the_module,
    "eps": lambda m: [setattr(b.norm1, "pos_eps", 0.5) for b in m.blocks],
    "eps of one layer": lambda m: setattr(norm1(m), "pos_eps", 0.5),
    "training mode and back": training_and_back,
    "to(float64)": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.bfloat16(),
    "half() and float()": lambda m: m.half().float(),
    "fewer layers": lambda m: m.prune_intermediate_layers([0, 1], prune_head=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change, backend):
    if backend not in ("reference", "cpp"):
        pytest.skip("what is kept does not depend on the backend")
    model = build()
    with torch.no_grad():
        before = model(image())
        assert kept(model) is not None
        with torch.enable_grad() if change == "optimizer" else torch.no_grad():
            CHANGES[change](model)
        x = image(dtype=model.pos_embed.dtype)
        got, want = model(x), own(model, x)
        assert change == "one bit" or got.dtype != before.dtype or not torch.allclose(got, before, 1e-4, 1e-4)
        exact = torch.finfo(got.dtype).eps * 50
        torch.testing.assert_close(got, want, rtol=exact, atol=exact * float(want.abs().max()))
        fresh = copy.deepcopy(model)
        assert kept(fresh) is None and torch.equal(fresh(x), got)


def test_not_stale_across_backends():
    """A result comes from the backend that is asked for, also where another has left tables."""
    model, x = build(), image()
    with torch.no_grad():
        for backend in [b for b in ("reference", "cpp", "reference") if b in mk.available_backends()]:
            with mk.use_backend(backend):
                assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_start_empty_and_go_their_own_way(clone):
    model, x = build(), image()
    with torch.no_grad():
        want = model(x)
        names = set(model.state_dict())
        assert names == {n for n, _ in model.named_parameters()}  # no buffer
        copied = clone(model)
        assert kept(copied) is None and torch.equal(copied(x), want)
        copied.pos_embed.data.add_(torch.randn(24))
        torch.testing.assert_close(copied(x), own(copied, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), want) and not torch.allclose(copied(x), want)
    size = [0, 0]
    for i, m in enumerate((model, build())):
        buffer = io.BytesIO()
        torch.save(m, buffer)
        size[i] = buffer.tell()
    assert abs(size[0] - size[1]) < 100


def replica(model, pos_embed):
    """As DataParallel's: another module with the same attributes, the parameters plain tensors among them."""
    twin = copy.copy(model)
    twin.__dict__ = dict(model.__dict__)
    twin._parameters = {n: p for n, p in model._parameters.items() if n != "pos_embed"}
    twin.pos_embed = pos_embed
    return twin


def test_replicas_and_threads():
    """Replicas share what is kept; each gets the result of its own parameters, in many threads at once too."""
    model, x = build(), image()
    factors = [torch.linspace(scale, 1, 24) for scale in (1.0, 0.5, -1.0)]
    models = [replica(model, model.pos_embed.detach() * factor) for factor in factors]
    assert len({id(m.pos_tables) for m in models}) == 1
    with torch.no_grad():
        wants = [own(m, x) for m in models]
    assert not torch.allclose(wants[0], wants[1])
    start = threading.Barrier(3)

    def run(i):
        start.wait()
        with torch.no_grad():
            return max(float((models[i](x) - wants[i]).abs().max()) for _ in range(30))

    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(run, range(3))) < 1e-5


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_gradients_of_the_image(mode, backend, device):
    """With fixed position embeddings eval keeps tables under autograd too, also ones made in inference mode."""
    model = build().to(device)
    for name, p in model.named_parameters():
        p.requires_grad_("pos_" not in name)
    with mode():
        model(image(device=device))
    grads = []
    for call in (model, lambda x: own(model, x)):
        x = image(device=device).requires_grad_()
        grads.append(torch.autograd.grad(call(x).square().sum(), [x, model.norm.weight, model.blocks[1].norm1.weight]))
    assert kept(model) is not None or device != "cpu"
    torch.testing.assert_close(*grads)


def test_trainable_embeddings_get_their_gradients_in_eval(backend, device):
    model = build().to(device)
    x = image(device=device)
    with torch.no_grad():
        model(x)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "pos_" in n)


def test_functional_call_and_transforms():
    """torch.func gives a model other parameters and transforms it: no table stands in the way."""
    model, x = build(), image()
    others = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
        got = torch.func.functional_call(model, others, (x,))
        model.load_state_dict(others)
        torch.testing.assert_close(got, own(model, x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, before)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    with mk.use_backend("reference"):
        assert torch.func.grad(loss)(others)["pos_embed"].any()


class Sharded(torch.Tensor):
    """A tensor that is not plain, as FSDP's are."""


def test_only_plain_parameters():
    model = build()
    model.pos_embed = nn.Parameter(model.pos_embed.detach().as_subclass(Sharded))
    with torch.no_grad():
        model(image())
    assert kept(model) is None


def test_other_image_sizes_keep_nothing():
    model = build(dynamic_img_size=True)
    x = torch.randn(1, 3, 24, 16)
    with torch.no_grad():
        got = model(x)
        assert kept(model) is None and torch.equal(got, own(model, x))
        model(image())
        assert kept(model) is not None and torch.equal(model(x), got)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_compiled_code_follows_the_parameters(mode):
    torch._dynamo.reset()
    model, x = build(), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        for change in (None, "p.data.add_()", "pos_embed.data"):
            if change:
                with torch.no_grad():
                    CHANGES[change](model)
            torch.testing.assert_close(compiled(x), own(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.enable_grad))
def test_export_has_the_tables_as_constants(strict, mode):
    model, x = build(), image()
    with mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exported in training mode")
        program = torch.export.export(model, (x,), strict=strict)
    tables = [c for c in program.constants.values() if isinstance(c, torch.Tensor) and c.shape == (16, 24)]
    assert len(tables) == 4  # three layers' and the last norm's
    used = {str(n.target) for n in program.graph.nodes if n.op == "placeholder" and n.users}
    assert not any("pos_weight" in name for name in used)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(program.module()(x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.export.load(buffer).module()(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", (False, True))
def test_export_in_training_mode_warns(strict):
    with pytest.warns(UserWarning, match=r"exported in training mode.*call model\.eval\(\) before torch\.export"):
        torch.export.export(build().train(), (image(),), strict=strict)


def test_export_where_torch_does_not_tell_the_parameters(monkeypatch):
    """Then the program computes the tables in each call, and is right all the same."""
    monkeypatch.setattr("mpvg_kernels.models.pos_tables._real", lambda t: None)
    model, x = build(), image()
    program = torch.export.export(model, (x,), strict=False)
    assert not program.constants
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_empty_tables_are_a_plain_object():
    assert PosTables()._kept is None and pickle.loads(pickle.dumps(PosTables()))._kept is None
