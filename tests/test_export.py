"""Exported models: torch.export programs and AOTInductor packages, saved here and run in a process of their own.

Compilation is what costs time here, so each artefact is made once, from one small model.
"""

import subprocess
import sys

import pytest
import timm
import torch

import mpvg_kernels as mk

SIZES = dict(img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=10)
BATCH = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}

# A process that has never seen the model and imports what it is told to: reads images, writes each program's logits.
RUN = """
import sys, torch
imports, *programs = sys.argv[1:]
for name in imports.split():
    __import__(name)
images, logits = torch.load("images.pt"), []
for program in programs:
    if program.startswith("aoti"):
        run = torch._inductor.aoti_load_package(program)
    else:
        run = torch.export.load(program).module()
    with torch.no_grad():
        logits.append([run(x) for x in images])
torch.save(logits, "logits.pt")
assert imports or "mpvg_kernels" not in sys.modules
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg", **SIZES).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def export(model, strict=False):
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=BATCH, strict=strict)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("mpvg.")}


def check_in_fresh_process(model, folder, imports, *programs):
    """The programs give the model's own logits, for batches of other sizes than the exported one too, 1 among them."""
    images = [torch.randn(batch, 3, 32, 32) for batch in (1, 2, 7)]
    torch.save(images, folder / "images.pt")
    command = [sys.executable, "-c", RUN, imports, *programs]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        want = [model(x) for x in images]
    for program, found in zip(programs, torch.load(folder / "logits.pt"), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=program: f"{name}: {m}")


@pytest.fixture
def cpp():
    if "cpp" not in mk.available_backends():
        pytest.skip(mk.backends.status("cpp").reason)
    with mk.use_backend("cpp"):
        yield


def test_programs_in_a_fresh_process(cpp, model, tmp_path):
    """They call the kernels by their operators' names: importing the package is all that they need."""
    programs = {strict: export(model, strict) for strict in (False, True)}
    for strict, program in programs.items():
        assert operators(program) == {"mpvg.pe_layer_norm_fwd_cpp.default", "mpvg.pe_norm_pool_fwd_cpp.default"}
        torch.export.save(program, tmp_path / f"strict_{strict}.pt2")
    check_in_fresh_process(model, tmp_path, "mpvg_kernels", "strict_False.pt2", "strict_True.pt2")


@pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason="AOTInductor packages of PyTorch 2.11 give operators another dtype than they were exported with "
    "(pytorch/pytorch#169157)",
)
def test_package_in_a_fresh_process(cpp, model, tmp_path):
    torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / "aoti.pt2"))
    check_in_fresh_process(model, tmp_path, "mpvg_kernels", "aoti.pt2")


def test_plain_program_needs_no_package(model, tmp_path):
    """Exported from the plain formula, a model runs where mpvg_kernels is not even installed."""
    with mk.use_backend("auto", compiled="reference"):
        program = export(model)
    assert not operators(program)
    torch.export.save(program, tmp_path / "plain.pt2")
    check_in_fresh_process(model, tmp_path, "", "plain.pt2")


def test_program_keeps_its_kernels(cpp, model):
    """The choice at the export holds, whatever is chosen later; decompositions leave the operators whole."""
    program = export(model)
    x = torch.randn(4, 3, 32, 32)
    with mk.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert operators(program.run_decompositions()) == operators(program)


@pytest.mark.parametrize("scheme", ("default", "lape", "pvg"))
def test_other_schemes(scheme, cpp):
    """A class token, prefix rows without a PE, and a last norm without one are exported too."""
    other = timm.create_model("mpvg_deit_tiny_patch16_224", scheme=scheme, reg_tokens=2, no_embed_class=True, **SIZES)
    program = export(other.eval())
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), other(x))


def test_autocast_inside_the_model(cpp, model):
    """A model that enters autocast itself computes in its dtype wherever the program runs."""

    class Autocast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    program = export(Autocast().eval())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        got, want = program.module()(x), Autocast()(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
