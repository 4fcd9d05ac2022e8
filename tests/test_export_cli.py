"""`mpvg export`: every architecture in every format, what is in the files and their cards, messages, nothing left over.

The models are small ones in run folders, as `mpvg train` leaves them; a full-size model would only cost time. A fresh
process takes seconds to start, so that one export of each format has it.
"""

import contextlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch._inductor import cpp_builder

import mpvg_kernels as mk
from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import export, loading
from mpvg_kernels.train import recipes
from mpvg_kernels.train.checkpoint import RunFolder
from mpvg_kernels.train.config import to_dict

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


def mpvg(*args: object, code: int = 0, fresh: bool = False) -> None:
    assert cli.main(["export", *map(str, args), *([] if fresh else ["--no-fresh-check"])]) == code


def fails(capsys, *args: object, code: int = 2, fresh: bool = False) -> str:
    """The one line that a failing export prints on stderr."""
    capsys.readouterr()
    mpvg(*args, code=code, fresh=fresh)
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
    cards = set() if format == "safetensors" else {"model.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"} | cards


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


def test_names_that_are_no_text_and_weights_that_are_no_numbers(tmp_path, capsys):
    model = small_model("deit")
    folder = tmp_path / "run"
    RunFolder.create(folder, {"class_names": ["a", "b\nb", "c\udce9", "d", "e"]}).save("last", model)
    mpvg(folder, "--format", "safetensors", "--out", tmp_path / "m")
    assert r"c\udce9, d, e" in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    torch.nn.init.constant_(model.head.bias, torch.nan)
    (folder / "run.json").write_text("[]")
    assert "holds no JSON object" in fails(capsys, folder, "--format", "safetensors", "--out", tmp_path / "n")
    (folder / "run.json").write_text('{"versions": [], "config": {}}')
    RunFolder(folder).save("last", model)
    said = fails(capsys, folder, "--format", "safetensors", "--out", tmp_path / "n")
    assert "logits that are not finite" in said and not (tmp_path / "n").exists()


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
        ("mpvg_vit_adapter_tiny", *out): "gives feature maps and has no classifier; expected a classification model",
        ("xyz", *out): "no run folder and no model; ours are mpvg_ceit_base_patch16_224, ",
        (there, *out): "is not a run folder: it has no run.json",
        (run, *out, "--weights", "best"): "the run has not saved its best weights",
        (run, *out, "--scheme", "gap"): "are of their own scheme; leave it out",
        (run, "--format", "pt2", "--out", there): f"{there} exists and nothing is overwritten",
        (run, "--format", "pt2", "--out", there / "a" / "b"): "is not a folder that can be written",
        (run, *out, "--img-size", "40x48"): "the nearest are height 32 or 48, width 48",
        (run, *out, "--img-size", "big"): "'big' is not a size; expected pixels, 224, or height x width, 224x160",
        (run, *out, "--batch", "0"): "--batch 0: expected 1 or more",
        (run, *out, "--img-size", "0"): "--img-size 0x0: expected 1 pixel or more",
        (run, "--format", "onnx", "--kernels"): "use --format pt2 or aot",
        (run, *out, "--opset", "18"): "is a version of ONNX's operators, which pt2 has not",
        (run, *out, "--device", "cuda"): "pt2 is written on the CPU for any device; use it with --format aot",
        (run, "--format", "aot", "--out", tmp_path / "m.so"): "whose names end in .pt2 alone; end it in .aot.pt2",
        (run / "last", *out, "--weights", "last"): "is a folder of weights already",
        (run / "last", *out, "--scheme", "gap"): "are of their own scheme; leave it out",
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


# ---- sources


def test_folder_in_timms_format(run, tmp_path, monkeypatch, capsys):
    """RUN/last is the run's last weights; what was exported from it is a source again."""
    monkeypatch.chdir(tmp_path)
    mpvg(run / "last", "--format", "safetensors")
    assert f"{run} (last weights) in {tmp_path / 'run-last'}" in capsys.readouterr().out
    mpvg("run-last", "--format", "pt2")
    assert f"run-last (its weights) in {tmp_path / 'run-last.pt2'}" in capsys.readouterr().out
    card = Path("run-last.pt2.md").read_text()
    assert "is not recorded in the folder that they were exported from, except in its README.md." in card
    (tmp_path / "run-last" / "model.safetensors").write_bytes(b"half")
    assert "can't be read as safetensors" in fails(capsys, "run-last", "--format", "onnx")
    (tmp_path / "run-last" / "model.safetensors").unlink()
    assert "model.safetensors does not exist; expected a folder in timm's" in fails(
        capsys, "run-last", "--format", "onnx"
    )


# ---- the check in a fresh process


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=needs_onnx), "safetensors"])
def test_fresh_process(format, run, tmp_path, monkeypatch, capsys):
    """It loads the file where this package, and for ONNX torch, can't be imported, and its logits are compared."""
    mpvg(run, "--format", format, "--out", tmp_path / "m", fresh=True)
    card = tmp_path / "m" / "README.md" if format == "safetensors" else tmp_path / "m.md"
    assert "in the exporting process and in a fresh one" in card.read_text()
    if format == "onnx":  # one format is enough for what can go wrong
        load = "session = None\n" + loading.LOAD["onnx"].partition("\n")[2]
        wrong = {
            load: "does not load and run in a fresh process (AttributeError: 'NoneType' object has no attribute",
            "import torch\n" + loading.LOAD["onnx"]: "ModuleNotFoundError: import of torch halted",
            loading.LOAD["onnx"].replace("})[0]", "})[0] * 2"): "by 1.0e+00 of the largest logit for 1 images",
            "import time; time.sleep(9)": "did not load and run in a fresh process within 2 s",
        }
        for code, message in wrong.items():
            monkeypatch.setitem(loading.LOAD, "onnx", code)
            monkeypatch.setattr(loading, "TIMEOUT_S", 2 if "sleep" in code else 300)
            said = fails(capsys, run, "--format", "onnx", "--out", tmp_path / "w", code=1, fresh=True)
            assert message in said and said.endswith("; nothing was kept\n")
        assert {path.name for path in tmp_path.iterdir()} == {"m", "m.md"}


# ---- AOTInductor


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the smallest model; compiling takes some 20 s."""
    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler ({type(error).__name__})")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("aot")
    small = dict(embed_dim=16)  # two layers, the fewest that mpvg takes
    run = RunFolder.create(folder / "run", {"class_names": list("abcde")})
    run.save("last", model := small_model("vit", **small))
    mpvg(run.path, "--format", "aot", "--out", folder / "m.aot.pt2", fresh=True)
    return folder / "m.aot.pt2", model


@pytest.mark.slow
@pytest.mark.xdist_group("aot")
def test_package(package):
    """It runs in a process without this package (`fresh`), for any number of images, and says how to prepare them."""
    path, model = package
    again = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 12)
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    about = json.loads(again.get_metadata()["preprocessing"])
    assert about["input_size"] == [3, 8, 12] and about["label_names"] == list("abcde") and about["scheme"] == "mpvg"
    card = path.with_name("m.aot.pt2.md").read_text()
    assert (
        "AOTIModelPackageLoader" in card and "aoti_load_package" in card and "needs" not in card.partition("## Use")[0]
    )


@pytest.mark.slow
def test_a_package_that_crashes_pytorch(tmp_path, monkeypatch):
    """The crash stays in another process, and is said; a process that ends otherwise is not one."""
    python, crash = tmp_path / "python", "kill -SEGV $$"
    monkeypatch.setattr(export.sys, "executable", str(python))
    for does, crashes in ((crash, True), ("exit 1", False), ("exit 0", False)):
        python.write_text(f"#!/bin/sh\n{does}\n")
        python.chmod(0o755)
        with pytest.raises(RuntimeError, match="crashes when it loads") if crashes else contextlib.nullcontext():
            export._check_that_it_loads(tmp_path / "m.pt2")


@pytest.mark.xdist_group("aot")
def test_card_of_a_package_runs(package, monkeypatch, capsys):
    run_card(package[0].with_name("m.aot.pt2.md"), package[1], monkeypatch, capsys)


def test_package_bad_input(run, tmp_path, monkeypatch, capsys):
    args = (run, "--format", "aot", "--out", tmp_path / "m.pt2")

    def no_compiler():
        raise OSError("none")

    with monkeypatch.context() as patch:
        patch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
        assert "compiles C++ and finds no compiler (OSError): install g++" in fails(capsys, *args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--device cuda: PyTorch finds no CUDA GPU here" in fails(capsys, *args, "--device", "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
        patch.setattr(export.backends, "resolve", lambda *_, **__: "cpp")
        assert "needs PyTorch 2.12: 2.11.0 gives the operators another dtype" in fails(capsys, *args, "--kernels")

    def uncompilable(*_, **__):
        raise RuntimeError("C++ compile error\nmany lines")

    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", uncompilable)
        patch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
        said = fails(capsys, *args)
        assert "--format aot can't hold the model for 3x32x48 images (C++ compile error)" in said
    assert not list(tmp_path.iterdir())


# ---- ONNX's operator set


@needs_onnx
def test_opset(tmp_path, capsys):
    import onnx

    run = save_run(tmp_path / "run", small_model("vit"))
    args = (run, "--format", "onnx", "--out", tmp_path / "m.onnx", "--opset")
    mpvg(*args, 18)
    (opset,) = onnx.load(tmp_path / "m.onnx").opset_import
    assert opset.version == 18 and "operator set 18" in (tmp_path / "m.onnx.md").read_text()
    for file in ("m.onnx", "m.onnx.md"):
        (tmp_path / file).unlink()
    assert "--opset 7: PyTorch can't write the model in it" in fails(capsys, *args, 7)
    newest = onnx.defs.onnx_opset_version()
    for wrong in (0, newest + 1):
        assert f"knows 1 to {newest}; leave it out" in fails(capsys, *args, wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@needs_onnx
def test_opset_that_onnxruntime_does_not_know(run, tmp_path, monkeypatch, capsys):
    import onnxruntime

    def refuses(*_, **__):
        raise RuntimeError("opset 99 is under development\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuses)
    said = fails(capsys, run, "--format", "onnx", "--out", tmp_path / "m.onnx", "--batch", "1")
    assert "does not load the model in opset" in said and "(opset 99 is under development); choose another" in said


# ---- the model card


def run_card(card: Path, model, monkeypatch, capsys) -> None:
    """Run the Python that a card prints, as it is; it has to name the classes that the model finds likeliest."""
    cfg = timm.data.resolve_data_config(model=model)
    cfg["input_size"] = timm.models.get_model_input_config(model)["input_size"]
    pixels = torch.randint(256, (40, 30, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    monkeypatch.chdir(card.parent.parent if card.name == "README.md" else card.parent)
    picture.save("image.png")
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    capsys.readouterr()
    names: dict = {}
    exec(compile(code, card.name, "exec"), names)
    x = timm.data.create_transform(**cfg)(picture)[None]
    torch.testing.assert_close(torch.from_numpy(names["prepare"]("image.png")), x)
    with torch.no_grad():
        prob, order = model(x).softmax(-1)[0].sort(descending=True)
    shown = [f"{100 * p:5.1f} %  {'abcde'[i]}" for p, i in zip(prob.tolist(), order.tolist(), strict=True)]
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize(
    "format, size", [("pt2", (32, 48)), pytest.param("onnx", (32, 32), marks=needs_onnx), ("safetensors", (48, 32))]
)
def test_code_of_the_card_runs(format, size, tmp_path, monkeypatch, capsys):
    """As printed, and it prepares an image exactly as timm does."""
    run = RunFolder.create(tmp_path / "run", {"class_names": list("abcde")})
    run.save("last", model := small_model("deit", img_size=size))
    mpvg(run.path, "--format", format, "--out", tmp_path / "m")
    run_card(tmp_path / "m" / "README.md" if format == "safetensors" else tmp_path / "m.md", model, monkeypatch, capsys)


def test_card_of_a_run(tmp_path, monkeypatch):
    """What the run folder tells is in it: data, recipe, results of the weights that were exported, versions."""
    config = recipes.load("digits")
    info = {"recipe": "digits", "config": to_dict(config), "class_names": list("0123456789")}
    info |= {"versions": {"torch": "9.9"}, "machine": {"cpu": "a fast one", "gpu": None, "system": "Linux"}}
    info |= {"command": ["/home/me/mpvg", "train", "--recipe", "digits", "--out", "/home/me/runs", "--data.root", "/x"]}
    run = RunFolder.create(tmp_path / "run", info)
    options = dict(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=10, in_chans=1)
    run.save("best", timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg", **options))
    rows = [(1, 91.25, 0.4), (2, 90.0, 0.5)]
    lines = [{"kind": "epoch", "epoch": e, "step": e, "test_acc": acc, "test_loss": loss} for e, acc, loss in rows]
    (run.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "epo')
    mpvg(run.path, "--format", "safetensors", "--weights", "best", "--img-size", "16", "--out", tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "timm" and "image-classification" in front["tags"] and "license" not in front
    for expected in (
        "# m\n",
        "trained by the recipe `digits`, best weights",
        "1,797 images of handwritten digits",
        "| last | 2 | 90.00 % | 0.5000 |\n| best (exported) | 1 | 91.25 % | 0.4000 |",
        "after epoch 2 of 32",
        "chosen on the held-out images themselves",
        "\n    mpvg train --recipe digits\n",
        "optim.lr 0.002\n",
        "Exported for images of 16x16, which is not the size of its training",
        "torch 9.9; a fast one, Linux",
        "## Licence\n\nTo be filled in",
        "arXiv:2502.02919",
        "`model.safetensors` (",
    ):
        assert expected in card, expected
    assert "/home/me" not in card and "aug.mixup" in card and "aug.crop" not in card


def test_card_of_random_weights_and_of_a_bare_run(run, tmp_path):
    mpvg("mpvg_vit_lite_6_4_32", "--format", "pt2", "--scheme", "lape", "--out", tmp_path / "m.pt2")
    card = (tmp_path / "m.pt2.md").read_text()
    assert "**The weights are random (seed 0).**" in card and "## Training\n\nNone." in card
    assert "## Citation" not in card and not card.startswith("---")
    mpvg(run, "--format", "pt2", "--out", tmp_path / "n.pt2", "--batch", 1)
    assert "can't be told: " in (tmp_path / "n.pt2.md").read_text()


def test_no_card_and_none_overwritten(run, tmp_path, capsys):
    (tmp_path / "m.pt2.md").write_text("mine")
    args = (run, "--format", "pt2", "--out", tmp_path / "m.pt2", "--batch", 1)
    assert f"{tmp_path / 'm.pt2.md'} exists and nothing is overwritten" in fails(capsys, *args)
    mpvg(*args, "--no-card")
    assert "model card" not in capsys.readouterr().out
    assert (tmp_path / "m.pt2.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
