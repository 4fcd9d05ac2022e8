"""`mpvg analyze`: what it writes and says of runs of several kinds, and messages about bad input."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from mpvg_kernels import __main__ as cli
from mpvg_kernels.analysis import diagnostics
from mpvg_kernels.analysis import quantities as q
from mpvg_kernels.tools import analyze
from mpvg_kernels.train import InputError, config
from mpvg_kernels.train.checkpoint import RunFolder
from mpvg_kernels.train.data import open_images

DIGITS = [str(i) for i in range(10)]
SMALL = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=10)
FIGURES = {"heatmaps", "correlation", "channels", "last_norm", "token_norms", "position_similarity", "attention"}


def save_run(folder: Path, scheme: str | None = "mpvg", name: str = "mpvg_deit_tiny_patch16_224", **small) -> Path:
    """A run of the digits with random weights, as `mpvg train` leaves it."""
    model = timm.create_model(name, **({} if scheme is None else {"scheme": scheme}), **{**SMALL, **small})
    resolved = config.Config(device="cpu", model=config.Model(name=name, scheme=scheme))
    info = {"config": config.to_dict(resolved), "class_names": DIGITS}
    run = RunFolder.create(folder, info)
    run.save("last", model)
    run.unlock()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return save_run(tmp_path_factory.mktemp("analyze") / "run")


def mpvg(capsys, *args: object) -> tuple[str, list[str]]:
    """What the command prints, and the lines of its warnings."""
    capsys.readouterr()
    assert cli.main(["analyze", *map(str, args)]) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()


def fails(capsys, *args: object, code: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(["analyze", *map(str, args)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mpvg: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


def test_what_is_written(run, capsys, tmp_path):
    out, warnings = mpvg(capsys, run, "--images", 20, "--json", tmp_path / "numbers.json")
    folder = run / "analysis" / "last-validation"
    assert files(folder) == FIGURES and warnings == []
    found = json.loads((folder / "analysis.json").read_text())
    assert found["scheme"] == "mpvg" and found["split"] == "validation" and found["images"] == 20
    assert found["definitions"] == q.DEFINITIONS and found["left_out"] == found["bad"] == []
    assert [row["layer"] for row in found["layers"]] == [0, 1, "last"]
    assert f"written: {folder}" in out and "on 20 images of validation" in out
    again = json.loads((tmp_path / "numbers.json").read_text())
    assert {key: again[key] for key in found} == found and len(again["written"]) == 1 + len(FIGURES)

    # The numbers are those of these images, evenly spaced over the split.
    model, images = RunFolder(run).model(), open_images(RunFolder(run).config(), torch.device("cpu"), "validation")
    (batch,) = images.batches(20, [i * images.size // 20 for i in range(20)])
    expected = diagnostics.pos_statistics(model, batch.x)
    rows = [row for row in found["layers"] if row["pos_norm"] is not None]
    assert [row["correlation"] for row in rows] == pytest.approx(expected["correlation"], abs=1e-5)
    assert [row["pos_norm"] for row in rows] == pytest.approx(expected["pos_norm"], rel=1e-5)
    assert f"{rows[0]['correlation']:+.3f}" in out


@pytest.mark.parametrize(
    ("scheme", "small", "said", "missing"),
    [
        ("pvg", {}, "the last norm of MPVGVisionTransformer (pvg) takes no position embedding", set()),
        ("default", {}, "has no norm that takes a position embedding", {"correlation", "channels"}),
        (
            None,
            {"name": "vit_tiny_patch16_224", "global_pool": "avg"},
            "has no norm between its last layer and the pool",
            {"correlation", "channels", "last_norm"},
        ),
    ],
    ids=["pvg", "default", "timm pooled"],
)
def test_what_a_model_has_not_is_said_and_the_rest_is_done(tmp_path, capsys, scheme, small, said, missing):
    run = save_run(tmp_path / "run", scheme, **small)
    out, warnings = mpvg(capsys, run, "--images", 3, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == FIGURES - missing
    assert any(said in line for line in warnings) and all(line.startswith("mpvg: warning: ") for line in warnings)
    assert str(tmp_path / "out") in out and not (run / "analysis").exists()


def test_a_folder_of_images(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    for label in "37":
        for i in range(2):
            path = tmp_path / "images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 90 * i).save(path)
    (tmp_path / "images" / "7" / "bad.png").write_text("not an image")
    out, (warning,) = mpvg(capsys, run, "--folder", tmp_path / "images")
    assert "on 4 images of" in out and "1 images could not be read" in warning and "bad.png" in warning
    found = json.loads((run / "analysis" / "last-folder-images" / "analysis.json").read_text())
    assert found["folder"] == str(tmp_path / "images") and found["split"] is None and len(found["bad"]) == 1
    for path in (tmp_path / "images").glob("*/?.png"):
        path.write_text("not one either")
    assert "none of the 5 images could be read" in fails(capsys, run, "--folder", tmp_path / "images", code=1)


def test_bad_input(run, tmp_path, capsys):
    assert "is not a run folder" in fails(capsys, tmp_path)
    assert "run has not saved its ema weights" in fails(capsys, run, "--weights", "ema")
    assert "--images 0: expected 1 or more" in fails(capsys, run, "--images", 0)
    assert "--split and --folder are both given" in fails(capsys, run, "--split", "train", "--folder", tmp_path)
    assert "--split sometimes" in fails(capsys, run, "--split", "sometimes")
    assert "config field optim.lr is -1.0" in fails(capsys, run, "--optim.lr", -1)
    (tmp_path / "file").write_text("")
    assert "can't be written" in fails(capsys, run, "--images", 1, "--out", tmp_path / "file" / "here")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    info = json.loads((other / "run.json").read_text())
    info["config"]["data"] |= {"name": "folder", "img_size": [16, 16], "workers": 0}
    info["config"]["model"]["name"] = "mpvg_deit_tiny_patch16_224"
    (other / "run.json").write_text(json.dumps(info))
    for label in DIGITS:
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "images" / label / "0.png")
    said = fails(capsys, other, "--folder", tmp_path / "images")
    assert "the images have 16x16 pixels and the model of" in said
    with pytest.raises(InputError, match="expected 1 or more"):
        analyze.analyze_run(run, images=0)


def test_numbers_that_are_not_finite_are_not_drawn(run, tmp_path, capsys):
    copy = RunFolder(shutil.copytree(run, tmp_path / "run"))
    model = copy.model()
    torch.nn.init.constant_(model.pos_embed, float("inf"))
    copy.save("last", model)
    _, warnings = mpvg(capsys, copy.path, "--out", tmp_path / "out")
    assert any("not finite: nothing is drawn" in line for line in warnings) and files(tmp_path / "out") == set()
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["layers"][-1]["pos_norm"] is None
