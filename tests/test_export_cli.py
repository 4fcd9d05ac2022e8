"""`mpvg export`: every architecture in every format, what is in the files, messages, and nothing left of a failure.

The models are small ones in run folders, as `mpvg train` leaves them; a full-size model would only cost time.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import mpvg_kernels as mk
from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import export
from mpvg_kernels.train.checkpoint import RunFolder

PLAIN = dict(img_size=(32, 48), embed_dim=24, depth=2, num_heads=2, num_classes=5)
# By architecture: a registered name, and options that make it small.
MODELS = {
    "deit": ("mpvg_deit_tiny_patch16_224", PLAIN),
    "swin": (  # shifted and padded windows, and a PatchMerging
        "mpvg_swin_tiny_patch4_window7_224",
        dict(img_size=(40, 24), embed_dim=12, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=5),
    ),
    "ceit": ("mpvg_ceit_tiny_patch16_224", PLAIN),
    "t2t": ("mpvg_t2t_vit_7_224", PLAIN | dict(token_dim=8)),
    "vit": ("mpvg_vit_lite_7_4_32", PLAIN | dict(img_size=(8, 12))),
}
ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(ONNX), reason=f"{', '.join(ONNX)} not installed; the extra `export` brings them")


def small_model(architecture: str, scheme: str = "mpvg", **options):
    """With parameters and statistics all different from their initial values, as after training."""
    name, small = MODELS[architecture]
    model = timm.create_model(name, scheme=scheme, **{**small, **options})
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.is_floating_point() and p.requires_grad | ("running" in name):
                p.add_(torch.rand_like(p), alpha=0.05)
    return model.eval()


def save_run(folder: Path, model) -> Path:
    run = RunFolder.create(folder, {})
    run.save("last", model)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return save_run(tmp_path_factory.mktemp("export") / "run", small_model("deit"))


def mpvg(*args: object, code: int = 0) -> None:
    assert cli.main(["export", *map(str, args)]) == code


def fails(capsys, *args: object, code: int = 2) -> str:
    """The one line that a failing export prints on stderr."""
    capsys.readouterr()
    mpvg(*args, code=code)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mpvg: ") and err.count("\n") == 1
    return err


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def read(program: torch.export.ExportedProgram) -> set[str]:
    """The parameters that the program reads."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    return {str(spec.target) for spec in program.graph_signature.input_specs if spec.arg.name in used}


def test_every_architecture_is_tried_here():
    assert {name.split("_")[1] for name in timm.list_models("mpvg_*")} == MODELS.keys()


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=needs_onnx), "safetensors"])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture(architecture, format, tmp_path, capsys):
    """The file gives the model's own logits for any number of images, loaded here as its users load it."""
    model = small_model(architecture)
    run, out = save_run(tmp_path / "run", model), tmp_path / "model"
    mpvg(run, "--format", format, "--out", out)
    size = timm.models.get_model_input_config(model)["input_size"]
    said = capsys.readouterr().out
    assert f"any number of {'x'.join(map(str, size))} images" in said and f"{run} (last weights) in {out}" in said
    images = [torch.randn(batch, *size) for batch in (1, 2, 5)]
    with torch.no_grad():
        if format == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
            found = [torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]) for x in images]
            prepared = session.get_modelmeta().custom_metadata_map["preprocessing"]
        elif format == "pt2":
            files = {"preprocessing.json": ""}
            with open(out, "rb") as file:
                program = torch.export.load(file, extra_files=files)
            assert not any(name.startswith("mpvg") for name in operators(program))
            assert not {name for name in read(program) if "pos_weight" in name}, "LN'(pos) is left to compute"
            found, prepared = [program.module()(x) for x in images], files["preprocessing.json"]
        else:
            again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            assert again.scheme == model.scheme
            found, prepared = [again(x) for x in images], None
        torch.testing.assert_close(found, [model(x) for x in images], rtol=1e-4, atol=1e-5)
    if prepared:
        told = json.loads(prepared)
        assert (told["architecture"], told["scheme"], told["num_classes"]) == (MODELS[architecture][0], "mpvg", 5)
        assert told["input_size"] == list(size) and len(told["mean"]) == len(told["std"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}


def test_plain_program_loads_without_this_package(run, tmp_path):
    mpvg(run, "--format", "pt2", "--out", tmp_path / "m.pt2", "--batch", 2)
    code = (
        "import sys, torch; m = torch.export.load('m.pt2').module(); print(m(torch.zeros(2, 3, 32, 48)).shape); "
        "assert 'mpvg_kernels' not in sys.modules and 'timm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "[2, 5]" in done.stdout, done.stderr


def test_kernels_are_kept_where_they_are_asked_for(run, tmp_path):
    if "cpp" not in mk.available_backends():
        pytest.skip(mk.backends.status("cpp").reason)
    mpvg(run, "--format", "pt2", "--out", tmp_path / "m.pt2", "--kernels")
    kept = {name for name in operators(torch.export.load(tmp_path / "m.pt2")) if name.startswith("mpvg")}
    assert kept == {"mpvg.pe_layer_norm_fwd_cpp.default", "mpvg.pe_norm_pool_fwd_cpp.default"}


def test_a_name_gets_random_weights_another_size_and_scheme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "mpvg_vit_lite_6_4_32"
    args = [name, "--format", "safetensors", "--scheme", "lape", "--img-size", "16x24"]
    mpvg(*args)
    assert f"{name} (random weights, scheme lape) in {tmp_path / name}: " in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
    assert str(model.scheme) == "lape" and model.patch_embed.img_size == (16, 24)
    # A folder of the model's name beside the command is no run: the name still means the model.
    assert "exists and nothing is overwritten" in fails(capsys, *args)


def test_weights_and_size_of_a_run(run, tmp_path, capsys):
    folder = save_run(tmp_path / "run", small_model("deit"))
    RunFolder(folder).save("best", best := small_model("deit"))
    mpvg(folder, "--format", "safetensors", "--weights", "best", "--out", tmp_path / "best", "--img-size", "64x32",
         "--json", tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["path"] == str(tmp_path / "best") and result["difference"] == result["allowed"] == 0
    assert result["input_size"] == [3, 64, 32] and result["what"] == f"{folder} (best weights)"
    best.set_input_size((64, 32))
    again = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
    image = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(again(image), best(image))


@needs_onnx
def test_fixed_batch(tmp_path):
    run = save_run(tmp_path / "run", small_model("vit"))
    mpvg(run, "--format", "onnx", "--out", tmp_path / "m.onnx", "--batch", 4)
    import onnxruntime

    (images,) = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    assert images.shape == [4, 3, 8, 12]


@pytest.mark.parametrize("format, wrong", [("safetensors", "logits"), ("pt2", "shape"), ("safetensors", "nan")])
def test_a_file_that_differs_is_not_kept(format, wrong, run, tmp_path, capsys, monkeypatch):
    writer = f"_write_{format}"
    write = getattr(export, writer)

    def wrongly(*args):
        again = write(*args)
        spoil = {
            "logits": lambda y: y * (1 + 1e-6),
            "shape": lambda y: y[:, 1:],
            "nan": lambda y: y * torch.nan,
        }
        return lambda images: spoil[wrong](again(images))

    monkeypatch.setattr(export, writer, wrongly)
    said = fails(capsys, run, "--format", format, "--out", tmp_path / "m", code=1)
    assert "nothing was kept" in said
    assert ("gives (1, 4) for 1 images, expected (1, 5)" if wrong == "shape" else "of the largest logit") in said
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_what_cannot_be_written(run, tmp_path, capsys, monkeypatch):
    def full(program, path, about):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_pt2", full)
    said = fails(capsys, run, "--format", "pt2", "--out", tmp_path / "m.pt2", "--batch", 1)
    assert "can't be written (No space left on device)" in said and not list(tmp_path.iterdir())


def test_missing_packages_name_their_extra(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    said = fails(capsys, run, "--format", "onnx", "--out", tmp_path / "m.onnx")
    assert "onnx is not installed; `pip install 'mpvg_kernels[export]'` brings it" in said


def test_bad_input(run, tmp_path, capsys):
    there = tmp_path / "there"
    there.mkdir()
    out = ("--format", "pt2", "--out", tmp_path / "m.pt2")
    cases = {
        ("mpvg_deit_tiny_patch16", *out): "no run folder and no model; did you mean 'mpvg_deit_tiny_patch16_224'",
        ("xyz", *out): "no run folder and no model; ours are mpvg_ceit_base_patch16_224, ",
        (there, *out): "is not a run folder: it has no run.json",
        (run, *out, "--weights", "best"): "the run has not saved its best weights",
        (run, *out, "--scheme", "gap"): "its weights are of its own scheme; leave it out",
        (run, "--format", "pt2", "--out", there): f"{there} exists and nothing is overwritten",
        (run, "--format", "pt2", "--out", there / "a" / "b"): "is not a folder that can be written",
        (run, *out, "--img-size", "40x48"): "the nearest are height 32 or 48, width 48",
        (run, *out, "--img-size", "big"): "'big' is not a size; expected pixels, 224, or height x width, 224x160",
        (run, *out, "--batch", "0"): "--batch 0: expected 1 or more",
        (run, "--format", "onnx", "--kernels"): "use --format pt2",
        (run, "--format", "safetensors", "--batch", "2"): "safetensors holds weights, which take any batch",
        (run, "--format", "gguf"): "invalid choice: 'gguf'",
        (run,): "the following arguments are required: --format",
        ("mpvg_vit_lite_7_4_32", *out, "--weights", "last"): "is a model's name, which has none",
        ("mpvg_vit_lite_7_4_32", *out, "--scheme", "mpgv"): "mpgv",
        ("mpvg_swin_tiny_patch4_window7_224", *out, "--img-size", "225"): "the nearest are height 224 or 228",
    }
    for args, message in cases.items():
        assert message in fails(capsys, *args), args
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list(there.iterdir())


@pytest.mark.parametrize("file, content", [("config.json", "{"), ("config.json", "{}"), ("model.safetensors", "half")])
def test_spoiled_run(file, content, tmp_path, capsys):
    run = save_run(tmp_path / "run", small_model("deit"))
    (run / "last" / file).write_text(content)
    assert str(run / "last" / file) in fails(capsys, run, "--format", "safetensors", "--out", tmp_path / "m")
