"""What users see of detection and segmentation: overlays, and `mpvg predict`, `eval` and `report` of tiny runs."""

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import dense_runs
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_report import same_tables, undrawn  # noqa: F401, a fixture
from warm_process import WarmProcess

from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import dense_evaluate, dense_predict, dense_report, overlays, report
from mpvg_kernels.train.data import shapes
from mpvg_kernels.train.record import collect
from mpvg_kernels.train.run_folder import RunFolder
from mpvg_kernels.train.tasks import dense

pytestmark = pytest.mark.xdist_group(__name__)
NAMES = ["ant", "bee", "cow"]
GREY = Image.new("RGB", (640, 480), (128, 128, 128))


def objects(*boxes: tuple[int, ...], size=(480, 640), scores=None) -> dict[str, torch.Tensor]:
    """Objects of the classes 0, 1, ... that fill their boxes."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    found = {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.arange(len(boxes)), "masks": masks}
    return found if scores is None else found | {"scores": torch.tensor(scores)}


def near(pixel, colour, most: float = 12) -> bool:
    return bool(np.abs(np.asarray(pixel, dtype=float) - colour).max() <= most)


# ---- overlays


def test_colours_can_be_told_apart():
    """By most people, and by those without the cones for red or for green."""
    colours = overlays.palette()
    assert len(np.unique(colours, axis=0)) == overlays.COLOURS
    lab = overlays._lab(colours.astype(float))

    def least(count: int) -> float:
        distance = np.linalg.norm(lab[:, :count, None] - lab[:, None, :count], axis=-1)
        return float((distance + 1e3 * np.eye(count)).min())

    assert least(8) > 15 and least(20) > 10 and least(150) > 3
    # Known values: sRGB's red in CIELAB, and that red and dark yellow are alike to protanopes.
    assert np.allclose(overlays._lab(np.array([[255.0, 0, 0]]))[0, 0], (53.2, 80.1, 67.2), atol=0.2)
    assert overlays.colour(3) == overlays.colour(3 + overlays.COLOURS)
    assert overlays.ink_on((240, 228, 66)) == overlays.INK and overlays.ink_on((0, 60, 120)) == overlays.PAPER


def test_objects_are_where_they_are():
    found = objects((100, 200, 300, 400), (400, 100, 500, 200), scores=[0.9, 0.6])
    picture = np.asarray(overlays.draw_objects(GREY, found, NAMES))
    for label, (x, y) in enumerate(((200, 300), (450, 150))):
        inside = (1 - overlays.FILL) * 128 + overlays.FILL * np.array(overlays.colour(label))
        assert near(picture[y, x], inside, 2)
    assert near(picture[300, 100], overlays.colour(0), 2) and near(picture[399, 200], overlays.colour(0), 2)  # the box
    assert near(picture[240, 350], (128, 128, 128), 0) and near(picture[440, 200], (128, 128, 128), 0)
    # The label is above the box, and holds letters.
    label = picture[180:199, 100:160].reshape(-1, 3)
    own = np.abs(label.astype(int) - overlays.colour(0)).max(1) <= 2
    ink = np.abs(label.astype(int) - overlays.ink_on(overlays.colour(0))).max(1) <= 40
    assert own.mean() > 0.4 and ink.mean() > 0.03
    assert near(np.asarray(GREY)[300, 200], (128, 128, 128), 0)  # the image is as it was


def test_scores_below_the_least_are_left_out():
    found = objects((100, 200, 300, 400), (400, 100, 500, 200), scores=[0.9, 0.6])
    alone = objects((100, 200, 300, 400), scores=[0.9])
    both, one = (overlays.draw_objects(GREY, each, NAMES, min_score=0.61) for each in (found, alone))
    assert np.array_equal(both, one)
    none = overlays.draw_objects(GREY, found, NAMES, min_score=0.95)
    assert np.array_equal(none, GREY) and none is not GREY
    assert np.array_equal(overlays.draw_objects(GREY, objects(scores=[]), NAMES), GREY)


def test_what_is_there_has_no_score(monkeypatch):
    said = []
    plain = overlays._chip
    monkeypatch.setattr(overlays, "_chip", lambda text, *args: said.append(text) or plain(text, *args))
    overlays.draw_objects(GREY, objects((100, 200, 300, 400)), NAMES)
    overlays.draw_objects(GREY, objects((100, 200, 300, 400), scores=[0.987]), NAMES)
    found = {"boxes": torch.tensor([[1.0, 2, 300, 400]]), "labels": torch.tensor([7]), "scores": torch.tensor([1.0])}
    overlays.draw_objects(GREY, found, ["a\nb"])  # no masks, no name
    assert said == ["ant", "ant 99 %", "7 100 %"]
    assert overlays._name(["a\nb"], 0) == "a?b"


def test_labels_are_inside_the_picture_and_apart():
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(40):
        x, y = (torch.rand(2, generator=generator) * torch.tensor([640, 480])).tolist()
        w, h = (torch.rand(2, generator=generator) * 200).tolist()
        left, top = overlays._place((90, 20), np.array([x - w, y - h, x, y]), (640, 480), taken)
        assert 0 <= left <= 550 and 0 <= top <= 460
        taken.append((left, top, left + 90, top + 20))
    first, second = (overlays._place((90, 20), np.array([50, 60, 300, 300]), (640, 480), t) for t in ([], taken[:0]))
    assert first == second == (50, 40)
    assert overlays._place((90, 20), np.array([50, 60, 300, 300]), (640, 480), [(50, 40, 140, 60)]) == (50, 60)
    assert overlays._place((90, 20), np.array([0, 0, 640, 480]), (640, 480), []) == (0, 0)


def test_a_long_name_is_cut():
    picture = overlays.draw_objects(GREY, objects((0, 100, 20, 120)), ["long " * 100])
    font = overlays.letters(14)
    assert picture.size == GREY.size and overlays.shorten("long " * 100, font, 100).endswith("…")
    assert font.getlength(overlays.shorten("long " * 100, font, 100)) <= 100
    assert overlays.shorten("short", font, 100) == "short"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_small_images_of_any_mode_are_enlarged(mode):
    small = Image.new("RGB", (64, 48), (128, 128, 128)).convert(mode)
    found = objects((10, 20, 30, 40), size=(48, 64), scores=[0.9])
    picture = overlays.draw_objects(small, found, NAMES)
    assert (picture.size, picture.mode, small.size) == ((640, 480), "RGB", (64, 48))
    expected = overlays.draw_objects(
        small.convert("RGB").resize((640, 480)), objects((100, 200, 300, 400), scores=[0.9]), NAMES
    )
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).mean() < 3
    assert overlays.draw_objects(small, found, NAMES, side=320).size == (320, 240)
    labels = torch.zeros(48, 64, dtype=torch.long)
    assert overlays.draw_label_map(small, labels, NAMES, side=320).width == 320


def test_masks_are_traced():
    found = objects((100, 100, 300, 300)) | {"boxes": torch.tensor([[50.0, 50, 400, 400]])}
    picture = np.asarray(overlays.draw_objects(GREY, found, NAMES))
    for x in (100, 299):
        assert near(picture[200, x], overlays.colour(0), 2)
    for x in (90, 105, 294, 310):
        assert not near(picture[200, x], overlays.colour(0))
    line = overlays._border(Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), 8)), 1)
    assert np.array_equal(np.asarray(line) > 0, np.pad(np.pad(np.zeros((2, 2), bool), 2, constant_values=True), 7))


def test_large_images_are_reduced():
    large = Image.new("RGB", (3000, 1500))
    found = objects((0, 0, 1500, 1500), size=(1500, 3000))
    picture = overlays.draw_objects(large, found, NAMES)
    assert picture.size == (overlays.MOST, overlays.MOST // 2)
    assert not near(np.asarray(picture)[500, 1000], (0, 0, 0)) and near(np.asarray(picture)[500, 1050], (0, 0, 0), 0)


def test_masks_at_borders_and_without_pixels():
    size = (480, 640)
    whole = overlays.draw_objects(GREY, objects((0, 0, 640, 480), (639, 479, 640, 480), scores=[0.9, 0.5]), NAMES)
    assert not near(np.asarray(whole)[240, 320], (128, 128, 128))
    empty = objects((10, 10, 50, 50), size=size) | {"masks": torch.zeros(1, *size, dtype=torch.bool)}
    picture = np.asarray(overlays.draw_objects(GREY, empty, NAMES))
    assert near(picture[30, 30], (128, 128, 128), 0) and near(picture[30, 10], overlays.colour(0), 2)
    half = objects((5, 5, 10, 10), size=size) | {"boxes": torch.tensor([[-20.0, -20, 700, 5]])}
    assert overlays.draw_objects(GREY, half, NAMES, side=50).size == (50, 38)


def test_label_map_and_its_legend():
    labels = torch.zeros(480, 640, dtype=torch.long)
    labels[:, 400:], labels[:100] = 1, 255
    picture = overlays.draw(GREY, {"label_map": labels}, NAMES)
    assert picture.width == 640 and 500 < picture.height < 560
    pixels = np.asarray(picture)
    pale = 48 + 0.75 * 128
    for label, x in ((0, 200), (1, 500)):
        assert near(pixels[300, x], (1 - overlays.MAP) * pale + overlays.MAP * np.array(overlays.colour(label)), 2)
    hatched = pixels[20:80, 20:80].reshape(-1, 3)
    assert (hatched == hatched[:, :1]).all() and len(np.unique(hatched[:, 0])) == 2  # grey, in stripes
    assert near(pixels[300, 399], (255, 255, 255), 0)  # the border between the two
    legend = pixels[480:].reshape(-1, 3)
    shares = [(np.abs(legend.astype(int) - overlays.colour(i)).max(1) <= 1).mean() for i in (0, 1, 2)]
    assert shares[0] > 0.002 and shares[1] > 0.002 and shares[2] == 0
    many = torch.arange(480 * 640).view(480, 640) % 150
    tall = overlays.draw_label_map(GREY, many, [f"class {i}" for i in range(150)])
    assert picture.height < tall.height < 800


def test_a_legend_counts_what_it_has_no_room_for(monkeypatch):
    said = []
    plain = overlays.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        overlays.ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, **style: said.append(text) or plain(self, at, text, **style),
    )
    shares = [(overlays.colour(i), f"class {i}", 0.01) for i in range(60)]
    overlays._legend(shares, 200, 14)
    names = [text for text in said if text.startswith("class")]
    assert said[-1] == f"and {60 - len(names)} more" and said.count("1.0 %") == len(names) < 60
    said.clear()
    overlays._legend([(None, "no label", 0.00001), (overlays.colour(1), "b", 0.5)], 640, 14)
    assert said == ["no label", "<0.1 %", "b", "50.0 %"]


def test_side_by_side():
    low, high = GREY.resize((300, 100)), GREY.resize((300, 150))
    one = overlays.side_by_side([low], ["truth"])
    pair = overlays.side_by_side([low, high], ["truth", "prediction"])
    three = overlays.side_by_side([low, high, low], ["truth", "a", "b" * 500])
    assert one.width == 300 and 600 < pair.width == three.width < 640
    assert 160 < pair.height < 190 and three.height > pair.height + 100
    assert near(np.asarray(pair)[-1, 0], (255, 255, 255), 0) and near(np.asarray(pair)[-1, -1], (128, 128, 128), 0)


# ---- the commands


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return dense_runs.scenes(tmp_path_factory.mktemp("dense") / "data")


@pytest.fixture(scope="module")
def detection(root, tmp_path_factory):
    return dense_runs.made(tmp_path_factory.mktemp("runs") / "det", "detection", root)


@pytest.fixture(scope="module")
def segmentation(root, tmp_path_factory):
    return dense_runs.made(tmp_path_factory.mktemp("runs") / "seg", "segmentation", root)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mpvg(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def rows_of(capsys, *args: object, code: int = 0) -> list[dict]:
    capsys.readouterr()
    assert mpvg("predict", *args, "--format", "json") == code
    return json.loads(capsys.readouterr().out)


CPU = torch.device("cpu")
SHAPES = ["circle", "square", "triangle", "cross", "ring"]


def test_predict_objects(detection, root, tmp_path, capsys):
    images = root / "images" / "val"
    rows = rows_of(capsys, detection, images, "--threshold", "0.19")
    model = RunFolder(detection).model()
    assert [row["file"] for row in rows] == [str(images / f"000{i}.png") for i in range(5)]
    some = 0
    for row in rows:
        found = dense.predict(model, Image.open(row["file"]), CPU)
        kept = (found["scores"] >= 0.19).nonzero()[:, 0].tolist()
        some += len(kept)
        assert row["width"] == row["height"] == shapes.SIDE and len(row["objects"]) == len(kept)
        for each, i in zip(row["objects"], kept, strict=True):
            assert each["label"] == found["labels"][i] and each["name"] == SHAPES[each["label"]]
            assert each["score"] == pytest.approx(float(found["scores"][i]))
            assert each["box"] == pytest.approx(found["boxes"][i].tolist())
            assert np.array_equal(coco_masks.decode(each["mask"]), found["masks"][i])
        picture = Image.open(tmp_path / row["picture"])
        expected = overlays.draw_objects(Image.open(row["file"]), found, SHAPES, min_score=0.19)
        assert picture.format == "JPEG" and picture.size == (640, 640)
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).mean() < 4
    assert 0 < some < 25  # the threshold leaves some out
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {f"000{i}.jpg" for i in range(5)}
    assert not any(row["objects"] for row in rows_of(capsys, detection, images, "--no-draw"))  # the default is 0.5
    assert "picture" not in rows_of(capsys, detection / "last", images / "0000.png", "--no-draw")[0]


def test_predict_label_maps(segmentation, root, tmp_path, capsys):
    file = root / "images" / "val" / "0001.png"
    (row,) = rows_of(capsys, segmentation, file, "--draw", tmp_path / "maps")
    labels = dense.predict(RunFolder(segmentation).model(), Image.open(file), CPU)["label_map"]
    assert np.array_equal(np.asarray(Image.open(row["label_map"])), labels)
    assert sum(each["share"] for each in row["classes"]) == pytest.approx(1)
    shares = [each["share"] for each in row["classes"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] > 0
    for each in row["classes"]:
        assert each["share"] == pytest.approx(float((labels == each["label"]).float().mean()))
        assert each["name"] == ["background", *SHAPES][each["label"]]
    assert row["picture"] == str(tmp_path / "maps" / "0001.jpg") and Image.open(row["picture"]).width == 640
    deep = tmp_path / "deep.png"
    dense_predict._save_labels(torch.tensor([[0, 300]]), deep)
    assert np.asarray(Image.open(deep)).tolist() == [[0, 300]]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_predict_as_table_and_csv(task, request, root, tmp_path, capsys):
    run, images = request.getfixturevalue(task), tmp_path / "images"
    images.mkdir()
    shutil.copy(root / "images" / "val" / "0001.png", images / "good.png")
    (images / "broken.png").write_text("no image")
    args = [run, images, tmp_path / "nowhere.png", *(["--threshold", "0.19"] if task == "detection" else [])]
    table = tmp_path / "found.csv"
    assert mpvg("predict", *args) == mpvg("predict", *args, "--format", "csv", "--out", table) == 0
    out, err = capsys.readouterr()
    assert out.startswith(str(images / "good.png")) and err.count("is left out (not an image)") == 2
    assert err.count("nowhere.png is left out (No such file or directory)") == 2
    with open(table, newline="") as file:
        found = list(csv.DictReader(file))
    (row,) = (row for row in rows_of(capsys, *args) if "error" not in row)
    told = row.get("objects") or row["classes"]
    assert [each["label"] for each in found if not each["error"]] == [str(each["label"]) for each in told]
    assert [each["error"] for each in found if each["error"]] == ["not an image", "No such file or directory"]
    good = [each for each in found if not each["error"]]
    assert all(
        each["picture"] == "predictions/images/good.jpg" and each["name"] == t["name"]
        for each, t in zip(good, told, strict=True)
    )
    if task == "detection":
        assert float(good[0]["right"]) == pytest.approx(told[0]["box"][2], abs=0.01)
        assert out.count(" %  (") == len(told) and f"{len(told)} object" in out
    else:
        assert float(good[0]["share"]) == pytest.approx(told[0]["share"], rel=1e-4)
        assert good[0]["label_map"] == "predictions/images/good.labels.png" and f"{told[0]['name']} " in out
    assert mpvg("predict", run, images / "broken.png") == 1


def test_an_image_without_objects_has_a_line_in_csv():
    file = io.StringIO()
    begin, write, _ = dense_predict.writer("csv", file, True, False, 0)
    begin()
    write({"file": "a.png", "objects": []})
    assert file.getvalue() == "file,label,name,score,left,top,right,bottom,error\na.png,,,,,,,,\n"


def test_pictures_of_one_name_are_kept_apart(detection, root, tmp_path, capsys):
    one, other = tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"
    for path in (one, other, tmp_path / "a" / "X.bmp", tmp_path / "a" / "x-2.png"):
        path.parent.mkdir(exist_ok=True)
        Image.open(root / "images" / "val" / "0000.png").save(path)
    rows = rows_of(capsys, detection, one, other, tmp_path / "a", "--draw", tmp_path / "out")
    pictures = [os.path.relpath(row["picture"], tmp_path / "out") for row in rows]
    # a/X.bmp, a/x.png and a/x-2.png of the folder in natural order, and x.png is the one of before.
    assert pictures[:2] == ["a/x.jpg", "b/x.jpg"] and pictures.count("a/x.jpg") == 2
    assert len(set(map(str.casefold, pictures))) == 4 and all((tmp_path / "out" / each).exists() for each in pictures)


def test_images_are_never_overwritten(detection, root, tmp_path, capsys):
    image = tmp_path / "in" / "x.jpg"
    image.parent.mkdir()
    Image.open(root / "images" / "val" / "0000.png").save(image)
    before = image.read_bytes()
    os.symlink(image.parent, tmp_path / "link")
    for place in (image.parent, tmp_path / "link"):
        assert mpvg("predict", detection, image, "--draw", place, "--format", "csv", "--out", tmp_path / "f.csv") == 2
        err = capsys.readouterr().err
        assert "is a folder that images are read from" in err and err.count("\n") == 1
    assert not (tmp_path / "f.csv").exists()
    (tmp_path / "out").mkdir()
    os.symlink(image, tmp_path / "out" / "x.jpg")
    assert mpvg("predict", detection, image, "--draw", tmp_path / "out") == 0
    assert image.read_bytes() == before and not (tmp_path / "out" / "x.jpg").is_symlink()


def test_eval_of_detection(detection, root, tmp_path, capsys):
    run = Path(shutil.copytree(detection, tmp_path / "run"))
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    assert mpvg("eval", run, "--data.root", moved, "--json", tmp_path / "r.json") == 0
    out, text = run / "eval" / "last-validation", capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"result.json", "per_class.csv", "results.json", "pictures"}
    result = json.loads((out / "result.json").read_text())
    assert json.loads((tmp_path / "r.json").read_text()) == result | {"written": str(out)}
    assert (result["task"], result["images"], result["split"], result["folder"]) == ("detection", 5, "validation", None)
    # By hand: pycocotools on the files.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(moved / "annotations" / "instances_val.json")
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            found = COCOeval(truth, truth.loadRes(str(out / "results.json")), kind)
            found.evaluate(), found.accumulate(), found.summarize()
            assert [result[f"{name}_{key}"] for key in ("ap", "ap50", "ap75")] == pytest.approx(100 * found.stats[:3])
    with open(out / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == SHAPES
    assert list(rows[0]) == ["name", *(f"{kind}_{key}" for kind in ("box", "mask") for key in ("ap", "ap50", "ap75"))]
    assert f"box AP {result['box_ap']:.2f} %" in text and "5 images" in text and f"written: {out}" in text
    assert "worst classes: " in text
    pictures = sorted((out / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"0000{i}-000{i}.jpg" for i in range(5)]
    assert Image.open(pictures[0]).width > 1280  # two beside each other


def test_eval_of_segmentation(segmentation, root, tmp_path, capsys):
    run = Path(shutil.copytree(segmentation, tmp_path / "run"))
    broken = Path(shutil.copytree(root, tmp_path / "broken"))
    (broken / "images" / "val" / "0003.png").write_text("no image")
    args = ["--data.name", "masks", "--data.root", broken]
    assert mpvg("eval", run, *args) == 0
    out, text = run / "eval" / "last-validation", capsys.readouterr().out
    names = {"result.json", "per_class.csv", "pictures", "confusion.csv", "confusion.png"}
    assert {path.name for path in out.iterdir()} == names
    result = json.loads((out / "result.json").read_text())
    assert (result["images"], len(result["bad"])) == (4, 1) and "unreadable images, left out: 1: " in text
    model, right, labelled = RunFolder(run).model(), 0, 0
    for i in (0, 1, 2, 4):
        labels = torch.from_numpy(np.asarray(Image.open(root / "masks" / "val" / f"000{i}.png")).astype(np.int64))
        found = dense.predict(model, Image.open(root / "images" / "val" / f"000{i}.png"), CPU)["label_map"]
        right, labelled = right + int((found == labels).sum()), labelled + labels.numel()
    assert result["acc"] == pytest.approx(100 * right / labelled)
    assert f"mean IoU {result['miou']:.2f} %" in text and f"loss {result['loss']:.4f}" in text
    assert len(list((out / "pictures").iterdir())) == 4
    with open(out / "confusion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["pixels"]) for row in rows) == labelled
    assert sum(int(row["pixels"]) for row in rows if row["label"] == row["predicted"]) == right
    # The same images, given by their folders.
    given = ["--images", broken / "images" / "val", "--annotations", broken / "masks" / "val", "--out", tmp_path / "o"]
    assert mpvg("eval", run, *given) == 0
    again = json.loads((tmp_path / "o" / "result.json").read_text())
    assert again["miou"] == pytest.approx(result["miou"]) and again["split"] is None
    assert again["annotations"] == str(broken / "masks" / "val")


def test_eval_of_any_annotations_and_latency(detection, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dense_evaluate.latency, "SECONDS", 0.05)
    given = ["--images", root / "images" / "val", "--annotations", root / "annotations" / "instances_val.json"]
    assert mpvg("eval", detection, *given, "--out", tmp_path / "out", "--latency") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["images"] == 5 and [row["batch"] for row in result["latency"]["rows"]] == [1]
    assert "p99" in capsys.readouterr().out and not (detection / "eval").exists()


def test_confusion_is_written_where_it_is_counted(tmp_path):
    dense_evaluate._write_confusion(np.array([[900_000, 100_000], [0, 7]]), ["a", "b"], tmp_path)
    assert (tmp_path / "confusion.csv").read_text().split() == [
        "label,predicted,pixels",
        "a,a,900000",
        "a,b,100000",
        "b,b,7",
    ]
    assert Image.open(tmp_path / "confusion.png").width >= 400
    figure = dense_evaluate.pictures.confusion_matrix(np.array([[90, 10], [0, 7]]), ["a", "b"], of="pixels")
    assert [text.get_text() for text in figure.axes[0].texts] == ["90", "10", "100"]


def test_processes_share_the_images(detection, root, tmp_path):
    broken = Path(shutil.copytree(root, tmp_path / "broken"))
    (broken / "images" / "val" / "0001.png").write_text("no image")
    args = ["eval", detection, "--data.name", "coco", "--data.root", broken, "--out"]
    assert mpvg(*args, tmp_path / "1") == 0
    with WarmProcess("mpvg_kernels.tools.dense_evaluate", "mpvg_kernels.train.tasks.detection") as warm:
        printed = tmp_path / "printed.txt"
        assert warm.run([*args, tmp_path / "2"], printed, processes=2) == 0, printed.read_text()
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("1", "2"))
    assert two["images"] == 4 and two["bad"] == one["bad"] and len(one["bad"]) == 1
    assert {**two, "box_ap": 0} == {**one, "box_ap": 0} and two["box_ap"] == pytest.approx(one["box_ap"])
    assert printed.read_text().count("(last) on validation") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("1", "2"))
    assert one == two and len(one) > 4


# ---- reports


@pytest.mark.usefixtures("undrawn")
def test_report_of_detection(detection, tmp_path):
    run = Path(shutil.copytree(detection, tmp_path / "run"))
    assert mpvg("report", run, "--images", 3) == 0
    found = same_tables((run / "report.html", run / "report.md"))
    text = " ".join(found.text)
    for word in ("Confusion", "calibration", "Calibration", "top-5", "confidence", "mistaken"):
        assert word not in text
    figures = next(table for table in found.tables if table[0] == ["", "last"])
    assert {"box AP", "mask AP75", "box AP, small objects", "box recall", "images"} <= {row[0] for row in figures}
    classes = next(table for table in found.tables if table[0][0] == "class")
    assert classes[0][1:4] == ["box AP", "box AP50", "box AP75"] and [row[0] for row in classes[1:]] == SHAPES
    samples = [image for image in found.images if image["src"].startswith("data:image/webp")]
    assert [image["alt"].split(":")[0] for image in samples] == ["0000.png", "0002.png", "0004.png"]
    picture = Image.open(io.BytesIO(base64.b64decode(samples[0]["src"].partition(",")[2])))
    assert 2 * dense_report.SIDE < picture.width < 2.1 * dense_report.SIDE
    assert (run / "report.html").stat().st_size < 900_000
    assert "found  0" in text  # none of a random model's scores is 50 %


@pytest.mark.usefixtures("undrawn")
def test_report_of_several_tasks_and_runs(detection, segmentation, root, tmp_path, capsys):
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in (detection, segmentation)]
    runs.append(dense_runs.made(tmp_path / "other", "segmentation", root, "--model.scheme", "default"))
    assert mpvg("report", *runs, "--images", 2) == 0
    found = same_tables((tmp_path / "comparison.html", tmp_path / "comparison.md"))
    text = " ".join(found.text)
    assert "different data: det: shapes, 5 classes (detection); seg: shapes, 6 classes (segmentation)" in text
    assert "Sample predictions: detection" in text and "Classes: segmentation" in text
    classes = [table for table in found.tables if table[0][0] == "class"]
    assert [table[0] for table in classes][1] == ["class", "IoU, seg", "IoU, other"]
    samples = [image for image in found.images if image["src"].startswith("data:image/webp")]
    assert len(samples) == 4
    high = Image.open(io.BytesIO(base64.b64decode(samples[-1]["src"].partition(",")[2])))
    assert high.height > 1.5 * dense_report.SIDE  # three in two rows
    assert mpvg("report", *runs, "--no-model") == 0
    found = same_tables((tmp_path / "comparison.html", tmp_path / "comparison.md"))
    assert not any(image["src"].startswith("data:image/webp") for image in found.images)
    assert "Classes" not in " ".join(found.text)


def test_runs_of_other_tasks_are_of_other_data(detection, segmentation):
    records = [collect(run) for run in (detection, segmentation)]
    for record in records:
        record.info["class_names"] = None
    assert not report.same_data(records) and report.same_data(records[:1])


@pytest.mark.usefixtures("undrawn")
def test_report_without_weights_or_data(segmentation, tmp_path, capsys):
    run = Path(shutil.copytree(segmentation, tmp_path / "run"))
    capsys.readouterr()
    assert mpvg("report", run, "--weights", "best") == 0
    assert mpvg("report", run, "--data.name", "masks", "--data.root", tmp_path / "nothing") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no predictions" in line]
    assert len(said) == 2 and "has not saved its best weights" in said[0] and str(tmp_path / "nothing") in said[1]


def test_many_classes_are_folded(detection, monkeypatch):
    each = dense_report.evaluate(collect(detection), "last")
    rows = [{"name": f"c{i}", "box_ap": float(i), "mask_ap": None} for i in range(130)]
    each.found["per_class"] = rows
    each.close()
    note, fold = dense_report._classes([each], True)
    assert note.text == "The 100 classes of 130 with the lowest box AP." and fold.title == "Table of 100 classes"
    assert fold.blocks[0].rows[1] == ("c1", "1.0 %", "-")


# ---- what can't be


def test_what_the_commands_can_not(detection, segmentation, root, tmp_path, capsys):
    image, other = root / "images" / "val" / "0000.png", tmp_path / "other"
    shutil.copytree(root, other)
    (other / "classes.txt").write_text("background\ncircle\nsquare\ntriangle\ncross\nbee\n")
    content = json.loads((other / "annotations" / "instances_val.json").read_text())
    content["categories"][4]["name"] = "bee"
    (other / "annotations" / "instances_val.json").write_text(json.dumps(content))
    annotations = root / "annotations" / "instances_val.json"
    for message, *args in (
        ("the run has not saved its best weights", "eval", detection, "--weights", "best"),
        ("of --images and --annotations one is given", "eval", detection, "--images", root),
        ("of --images and --annotations one is given", "eval", detection, "--annotations", annotations),
        (
            "--split and --images are both given",
            "eval",
            detection,
            "--split",
            "train",
            "--images",
            root,
            "--annotations",
            root,
        ),
        ("--folder is for classification, and", "eval", detection, "--folder", root),
        ("--batch is for classification, and", "eval", segmentation, "--batch", 4),
        ("third", "eval", detection, "--split", "third"),
        ("third", "eval", segmentation, "--split", "third"),
        ("nowhere", "eval", segmentation, "--images", "nowhere", "--annotations", "nowhere"),
        ("nowhere", "eval", detection, "--images", "nowhere", "--annotations", "nowhere"),
        ("bee", "eval", detection, "--data.name", "coco", "--data.root", other),
        ("bee", "eval", segmentation, "--data.name", "masks", "--data.root", other),
        ("config field task is 'segmentation'", "eval", detection, "--task", "segmentation", "--data.root", root),
        ("argument --threshold: '1.5' is not a number from 0 to 1", "predict", detection, image, "--threshold", 1.5),
        ("argument --threshold: 'x' is not a number", "predict", detection, image, "--threshold", "x"),
        ("--threshold is for detection, and", "predict", segmentation, image, "--threshold", 0.5),
        ("--top is for classification, and", "predict", segmentation, image, "--top", 3),
        ("--batch is for classification, and", "predict", detection, image, "--batch", 3),
        ("--draw and --no-draw are both given", "predict", detection, image, "--draw", "x", "--no-draw"),
        ("can't be written", "predict", detection, image, "--draw", root / "classes.txt" / "x"),
        ("is a run of detection, whose images differ in size", "analyze", detection),
        ("mpvg export takes classification models", "export", segmentation, "--format", "onnx"),
        ("mpvg study compares accuracies of classification", "study", "mask_rcnn_adapter_tiny_coco"),
    ):
        capsys.readouterr()
        assert mpvg(*args) == 2, args
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == "", (args, err)


def test_options_of_dense_models_are_refused_for_classifiers(tmp_path, capsys):
    model = timm.create_model("mpvg_vit_lite_7_4_32", num_classes=2, embed_dim=32, depth=2, num_heads=1)
    assert RunFolder.create(tmp_path / "run", {"config": {}}).save("last", model)
    for name, *value in (("threshold", "0.5"), ("draw", "x"), ("no-draw",)):
        assert mpvg("predict", tmp_path / "run", "x.png", f"--{name}", *value) == 2
        assert f"--{name} is for detection" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert mpvg("eval", tmp_path / "run", "--images", "x", "--annotations", "y") == 2
    assert re.search("--images is for detection and segmentation, and .* of classification", capsys.readouterr().err)


def test_fields_of_the_config_have_their_effect(detection, tmp_path, capsys):
    counts = []
    for threshold in ("0.0", "0.9"):
        out = tmp_path / threshold
        assert mpvg("eval", detection, "--detection.score_threshold", threshold, "--out", out) == 0
        counts.append(len(json.loads((out / "results.json").read_text())))
    assert counts[0] > counts[1]
    assert mpvg("eval", detection, "--detection.width", "12", "--out", tmp_path / "other") == 2
    assert "holds the weights of another model" in capsys.readouterr().err


def test_other_classes_without_names(detection, root, tmp_path, capsys):
    """Where the run has no names to compare, the numbers of classes are compared."""
    run = Path(shutil.copytree(detection, tmp_path / "run"))
    info = json.loads((run / "run.json").read_text())
    del info["class_names"]
    (run / "run.json").write_text(json.dumps(info))
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    content["categories"].append({"id": 9, "name": "ninth"})
    (tmp_path / "more.json").write_text(json.dumps(content))
    given = ["--images", root / "images" / "val", "--annotations", tmp_path / "more.json"]
    assert mpvg("eval", run, *given) == 2
    assert f"more.json has 6 classes and the run {run} 5; expected the same" in capsys.readouterr().err
