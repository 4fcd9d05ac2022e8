"""`mpvg predict`: what is found, in which order, in every format, and what can't be read."""

import csv
import io
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_train_data import picture
from torch import nn

from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import evaluate, predict
from mpvg_kernels.train import config
from mpvg_kernels.train.data import Digits, open_images
from mpvg_kernels.train.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group(__name__)
NAMES = ["ant", 'bee, "honey"', "cow", "großer Dachs", "elk", "fox"]


def save(path, channels: int, names=NAMES):
    """A run folder with random weights, whose images are 16x16."""
    torch.manual_seed(0)
    prepared = {"mean": (0.3,) * channels, "std": (0.4,) * channels, "crop_pct": 0.8, "interpolation": "bilinear"}
    model = timm.create_model(
        "mpvg_deit_tiny_patch16_224",
        **{"scheme": "mpvg", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (16, 16)},
        **{"num_classes": len(NAMES), "in_chans": channels},
        pretrained_cfg_overlay=prepared | {"input_size": (channels, 16, 16)},
    )
    nn.init.normal_(model.head.weight)  # it starts at zero
    info = {"config": config.to_dict(config.Config()), "class_names": names}
    assert RunFolder.create(path, info).save("last", model)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("predict") / "run", 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Names that need quotes and a natural order, a folder deeper down, and what is no image."""
    root = tmp_path_factory.mktemp("images")
    for i, name in enumerate(('a, "b".jpg', "x2.png", "x10.png", "deeper/down/z.JPG", "x1.png")):
        picture(root / name, i, (30 + 5 * i, 40))
    (root / "broken.png").write_bytes((root / "x1.png").read_bytes()[:60])
    (root / "notes.txt").write_text("left alone")
    return root


ORDER = ['a, "b".jpg', "broken.png", "deeper/down/z.JPG", "x1.png", "x2.png", "x10.png"]


def mpvg(*args: object) -> int:
    return cli.main(["predict", *map(str, args)])


def rows_of(capsys, *args: object, code: int = 0) -> list[dict]:
    capsys.readouterr()
    assert mpvg(*args, "--format", "json") == code
    return json.loads(capsys.readouterr().out)


def test_json(run, images, capsys):
    rows = rows_of(capsys, run, images, "--top", 2)
    assert [row["file"] for row in rows] == [str(images / name) for name in ORDER]
    assert rows[1].keys() == {"file", "error"} and "predictions" not in rows[1]
    model = RunFolder(run).model()
    transform = timm.data.create_transform(
        (3, 16, 16), mean=(0.3,) * 3, std=(0.4,) * 3, crop_pct=0.8, interpolation="bilinear", crop_mode="center"
    )
    for row in (rows[0], *rows[2:]):
        with torch.no_grad():
            prob = model(transform(Image.open(row["file"]).convert("RGB"))[None])[0].softmax(-1)
        value, label = prob.topk(2)
        assert [each["label"] for each in row["predictions"]] == label.tolist()
        assert [each["name"] for each in row["predictions"]] == [NAMES[i] for i in label]
        assert [each["probability"] for each in row["predictions"]] == pytest.approx(value.tolist(), rel=1e-4)


def test_batches_and_workers_do_not_matter(run, images, capsys, monkeypatch):
    from mpvg_kernels.train.data import evaluation

    expected = rows_of(capsys, run, images)
    monkeypatch.setattr(evaluation, "IMAGES_PER_WORKER", 2)
    for batch in (1, 4):
        found = rows_of(capsys, run, images, "--batch", batch)
        assert [row["file"] for row in found] == [row["file"] for row in expected]
        for a, b in zip(found, expected, strict=True):
            assert a.get("error") == b.get("error")
            pairs = zip(a.get("predictions", ()), b.get("predictions", ()), strict=True)
            assert all(
                x["name"] == y["name"] and x["probability"] == pytest.approx(y["probability"], rel=1e-4)
                for x, y in pairs
            )


def test_csv(run, images, tmp_path, capsys):
    assert mpvg(run, images, images / "x1.png", "--format", "csv", "--top", 6, "--out", tmp_path / "p.csv") == 0
    assert capsys.readouterr().out == "" and os.listdir(tmp_path) == ["p.csv"]
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(images / name) for name in [*ORDER, "x1.png"]]
    assert rows[3] == rows[6]
    for row in rows:
        if row["error"]:
            assert row["class_1"] == row["probability_6"] == ""
        else:
            assert {row[f"class_{n}"] for n in range(1, 7)} == set(NAMES)
            values = [float(row[f"probability_{n}"]) for n in range(1, 7)]
            assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, rel=1e-4)
    assert sum(bool(row["error"]) for row in rows) == 1


def test_table_and_what_is_left_out(run, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    paths = [images / "x1.png", tmp_path / "empty", images / "broken.png", tmp_path / "no.png", images / "x2.png"]
    assert mpvg(run, *paths, images / "notes.txt", "--top", 1) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [str(paths[0]), str(paths[4])]
    assert all(line.endswith(" %") for line in out.splitlines())
    said = err.splitlines()
    assert [line.split()[2] for line in said] == [*map(str, paths[1:4]), str(images / "notes.txt")]
    assert "a folder without images" in said[0] and "(No such file or directory)" in said[2]
    assert said[3] == f"mpvg: warning: {images / 'notes.txt'} is left out (not an image)"


def test_exit_code_1_where_nothing_can_be_read(run, images, tmp_path, capsys):
    assert rows_of(capsys, run, images / "broken.png", tmp_path, code=1)[1]["error"].startswith("a folder without")


def test_any_folder_in_timms_format(run, images, tmp_path, capsys):
    expected = rows_of(capsys, run, images / "x1.png")
    assert rows_of(capsys, run / "last", images / "x1.png") == expected
    assert rows_of(capsys, run, images / "x1.png", "--weights", "last") == expected
    copy = shutil.copytree(run / "last", tmp_path / "copy")
    info = json.loads((copy / "config.json").read_text())
    del info["label_names"]
    (copy / "config.json").write_text(json.dumps(info))
    assert [each["name"] for each in rows_of(capsys, copy, images / "x1.png")[0]["predictions"]] == [
        str(each["label"]) for each in expected[0]["predictions"]
    ]
    info["label_names"] = NAMES[:2]
    (copy / "config.json").write_text(json.dumps(info))
    for message, *args in (
        ("names 2 classes, expected the model's 6", copy),
        ("is neither a run folder (with run.json) nor a folder in timm's format", tmp_path / "nowhere"),
        ("ema/model.safetensors does not exist: the run has not saved its ema weights", run, "--weights", "ema"),
        ("--weights best: ", run / "last", "--weights", "best"),
        ("config field device is 'gpu'", run, "--device", "gpu"),
        ("p.csv can't be written (No such file or directory)", run, "--out", tmp_path / "no" / "p.csv"),
        ("argument --top: '0' is not a number from 1", run, "--top", 0),
    ):
        assert mpvg(args[0], images / "x1.png", *args[1:]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == "", err


def test_one_channel_takes_any_image(tmp_path, images, capsys):
    run = save(tmp_path / "run", 1)
    grey = np.asarray(Image.open(images / "x1.png").convert("L"))
    Image.fromarray(grey.astype("uint16") * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(grey).convert("LA").save(tmp_path / "alpha.png")
    files = [tmp_path / name for name in ("deep.png", "palette.png", "alpha.png", "cmyk.tif")]
    rows = rows_of(capsys, run, images / "x1.png", *files)
    best = [row["predictions"][0] for row in rows]
    assert len({each["name"] for each in best}) == 1
    assert [each["probability"] for each in best[1:4]] == pytest.approx([best[0]["probability"]] * 3, rel=1e-5)


def test_orientation_is_left_aside_as_in_training(run, images, tmp_path, capsys):
    image, turned = Image.open(images / "x1.png").convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "turned.jpg", exif=turned)
    plain, turned = rows_of(capsys, run, tmp_path / "plain.jpg", tmp_path / "turned.jpg")
    assert plain["predictions"] == turned["predictions"]


def test_digits_are_what_evaluation_makes_of_them(tmp_path):
    """The same images, from files and in memory."""
    data = open_images(config.Config(), torch.device("cpu"))
    batch = next(data.batches(20))
    for i, x in enumerate(batch.x):
        Image.fromarray(data.picture(x)).save(tmp_path / f"{i}.png")
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (8, 8)}
    model = timm.create_model(
        "mpvg_deit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes, pretrained_cfg_overlay=Digits.preprocessing
    ).eval()
    nn.init.normal_(model.head.weight)
    files = list(predict.find([tmp_path]))
    rows = list(predict.predict(model, None, files, torch.device("cpu")))
    found = evaluate.predictions(model, data, config.Config(), indices=range(20))
    assert [[each["label"] for each in row["predictions"]][0] for row in rows] == found.top[:, 0].tolist()
    assert [row["predictions"][0]["probability"] for row in rows] == pytest.approx(found.prob[:, 0].tolist(), rel=0.02)


def test_weights_that_are_not_finite_give_valid_json(run, images, tmp_path, capsys):
    copy = RunFolder(shutil.copytree(run, tmp_path / "run"))
    model = copy.model()
    nn.init.constant_(model.head.bias, math.nan)
    copy.save("last", model)
    assert mpvg(copy.path, images / "x1.png", "--format", "json") == 0
    text = capsys.readouterr().out
    assert "NaN" not in text and json.loads(text)[0]["predictions"][0]["probability"] is None


def test_formats_without_rows():
    for form, expected in (("json", []), ("csv", "file,class_1,probability_1,error\n"), ("table", "")):
        file = io.StringIO()
        assert predict.write_rows([], form, file, 1) == 0
        assert (json.loads(file.getvalue()) if form == "json" else file.getvalue()) == expected


def test_a_failure_leaves_no_file(run, images, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("in the middle")

    (tmp_path / "p.json").write_text("from before")
    monkeypatch.setattr(predict, "top_classes", fail)
    with pytest.raises(RuntimeError):
        mpvg(run, images, "--format", "json", "--out", tmp_path / "p.json")
    assert os.listdir(tmp_path) == ["p.json"] and (tmp_path / "p.json").read_text() == "from before"


def test_names_that_are_no_text(run, images, tmp_path, monkeypatch, capsys):
    file = tmp_path / os.fsdecode(b"caf\xe9\n.png")
    shutil.copy(images / "x1.png", file)
    assert mpvg(run, file) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/caf\\udce9\\n.png  ")
    assert mpvg(run, file, "--format", "csv", "--out", tmp_path / "p.csv") == 0
    assert f'"{tmp_path}/caf\\udce9\n.png",' in (tmp_path / "p.csv").read_text(encoding="utf-8")
    # A terminal may have no letters but those of ASCII, and the output may be closed.
    monkeypatch.setattr(sys, "argv", ["mpvg", "predict", str(run), str(images / "x1.png"), "--top", "6"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert cli.main() == 0 and b"gro\\xdfer Dachs" in sys.stdout.buffer.getvalue()
    monkeypatch.setattr(sys, "stdout", None)
    assert mpvg(run, images / "x1.png") == mpvg(run, images / "x1.png", "--format", "csv") == 0


def test_a_reader_that_has_seen_enough(run, images, monkeypatch, capsys):
    """As `mpvg predict ... | head -1`: no traceback, nor an error when Python closes its output at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert mpvg(run, *[images / "x1.png"] * 50) == 0
        assert mpvg(run, *[images / "x1.png"] * 50, "--format", "json") == 0
    assert capsys.readouterr().err == ""
