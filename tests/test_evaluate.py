"""Evaluation: figures of hand-made predictions, the images of splits, folders and streams, `mpvg eval`, pictures."""

import csv
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_data import Stream, change, fake_cifar100, fill, of
from torch import nn

from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import evaluate, latency, pictures
from mpvg_kernels.tools.evaluate import Predictions
from mpvg_kernels.train import InputError, TrainingError, config, loop
from mpvg_kernels.train.data import create_data, evaluation, open_images, sources
from mpvg_kernels.train.data.evaluation import EvalImages, ImageBatch, share
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.model import create_model
from mpvg_kernels.train.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group(__name__)
CPU = torch.device("cpu")


# ---- figures


def hand_made() -> Predictions:
    """Six images of three classes: labels 0 0 0 1 1 2, predicted 0 0 1 1 0 1."""
    top = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 2], [0, 2], [1, 2]])
    prob = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.6, 0.3], [0.7, 0.2], [0.5, 0.3], [0.9, 0.05]])
    label = torch.tensor([0, 0, 0, 1, 1, 2])
    loss = torch.tensor([0.1, 0.2, 1.2, 0.4, 2.0, 3.0])
    return Predictions(torch.arange(6), label, top, prob, loss)


def test_figures_with_known_answers():
    found = evaluate.summary(hand_made(), 4, ["ant", "bee", "cow", "dog"])
    assert found["images"] == 6 and found["acc"] == 50.0 and found["acc5"] is None
    assert found["loss"] == pytest.approx(6.9 / 6) and found["confidence"] == pytest.approx(100 * 4.4 / 6)
    assert found["confusion"].tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    ant, bee, cow, dog = found["per_class"]
    assert ant == {
        **{"label": 0, "name": "ant", "images": 3, "acc": pytest.approx(200 / 3), "predicted": 3},
        **{"precision": pytest.approx(200 / 3), "confused_with": "bee", "confused_images": 1},
    }
    assert (bee["acc"], bee["precision"], bee["confused_with"]) == (50.0, pytest.approx(100 / 3), "ant")
    assert (cow["acc"], cow["precision"], cow["predicted"]) == (0.0, None, 0)
    assert (dog["images"], dog["acc"], dog["confused_with"], dog["confused_images"]) == (0, None, None, 0)
    assert found["most_confused"] == [
        {"label": "ant", "predicted": "bee", "images": 1},
        {"label": "bee", "predicted": "ant", "images": 1},
        {"label": "cow", "predicted": "bee", "images": 1},
    ]


def test_top_5():
    top = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [5, 1, 2, 3, 4], [5, 1, 2, 3, 4]])
    found = Predictions(torch.arange(4), torch.tensor([0, 0, 0, 3]), top, torch.full((4, 5), 0.2), torch.zeros(4))
    found = evaluate.summary(found, 6)
    assert (found["acc"], found["acc5"]) == (25.0, 75.0)
    assert [row["name"] for row in found["per_class"]] == ["0", "1", "2", "3", "4", "5"]


def test_calibration_error_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    confidence[:16] = torch.arange(16, dtype=torch.float64) / 15  # the bins' borders belong to the bin below
    right = torch.rand(500, generator=generator) < confidence**2
    rows, error = evaluate.calibration(confidence, right)
    expected = 0.0
    for m in range(1, 16):
        inside = [i for i in range(500) if m == max(1, min(j for j in range(16) if float(confidence[i]) <= j / 15))]
        acc = sum(bool(right[i]) for i in inside) / len(inside)
        mean = sum(float(confidence[i]) for i in inside) / len(inside)
        expected += len(inside) / 500 * abs(acc - mean)
        row = rows[m - 1]
        assert (row["low"], row["high"], row["images"]) == ((m - 1) / 15, m / 15, len(inside))
        assert (row["acc"], row["confidence"]) == (pytest.approx(100 * acc), pytest.approx(100 * mean))
    assert error == pytest.approx(100 * expected)


def test_calibration_of_a_few():
    rows, error = evaluate.calibration(torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.tensor([True, False, True, True]))
    assert error == pytest.approx(50.0) and rows[-1]["images"] == 2 and rows[-1]["acc"] == 50.0
    assert rows[7] == {"low": 7 / 15, "high": 8 / 15, "images": 2, "acc": 100.0, "confidence": 50.0}
    assert rows[0] == {"low": 0.0, "high": 1 / 15, "images": 0, "acc": None, "confidence": None}


class Logits(EvalImages):
    """Images that are logits, for a model that only flattens them."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor):
        super().__init__()
        self.logits, self.labels, self.size, self.num_classes = logits, labels, len(logits), logits.shape[1]
        self.asked = []

    def batches(self, batch, indices=None, *, world=World()):  # noqa: B008
        self.asked.append(batch)
        order = share(self.size, indices, world)
        for index in order.split(batch) if len(order) else ():
            yield ImageBatch(self.logits[index][..., None, None], self.labels[index], index)


def test_predictions():
    generator = torch.Generator().manual_seed(0)
    images = Logits(3 * torch.randn(50, 8, generator=generator), torch.randint(8, (50,), generator=generator))
    images.logits[0, 2:5] = 9.0  # the same for three classes
    plain = config.Config(batch=16)
    found = evaluate.predictions(nn.Flatten(), images, plain)
    softmax = images.logits.softmax(-1)
    assert torch.equal(found.index, torch.arange(50)) and torch.equal(found.label, images.labels)
    assert found.top.shape == found.prob.shape == (50, 5)
    assert torch.equal(found.top[:, 0], images.logits.argmax(-1)) and found.top[0, 0] == 2
    torch.testing.assert_close(found.prob, softmax.gather(1, found.top))
    torch.testing.assert_close(found.prob, softmax.sort(descending=True).values[:, :5])
    expected = nn.functional.cross_entropy(images.logits, images.labels, reduction="none")
    torch.testing.assert_close(found.loss, expected)
    other = evaluate.predictions(nn.Flatten(), images, plain, batch=7)
    assert images.asked == [16, 7] and all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    some = evaluate.predictions(nn.Flatten(), images, plain, indices=[30, 2, 7])
    assert some.index.tolist() == [30, 2, 7] and torch.equal(some.label, images.labels[[30, 2, 7]])
    two = evaluate.predictions(nn.Flatten(), Logits(images.logits[:, :2], images.labels % 2), plain)
    assert two.top.shape == (50, 2) and evaluate.summary(two, 2)["acc5"] is None
    with pytest.raises(TrainingError, match="no image could be read"):
        evaluate.predictions(nn.Flatten(), Logits(images.logits[:0], images.labels[:0]), plain)


def test_of_equal_logits_the_first_counts():
    """As argmax has it, in training's evaluation."""
    logits = torch.randint(3, (200, 100), generator=torch.Generator().manual_seed(0)).bfloat16()
    top, prob, _ = evaluate.top_classes(logits)
    assert torch.equal(top[:, 0], logits.argmax(-1)) and prob.dtype == torch.float32
    assert all(len(set(row)) == 5 for row in top.tolist())
    logits[:100, ::2] = math.nan
    assert torch.equal(evaluate.top_classes(logits)[0][:, 0], logits.argmax(-1))


def test_default_batch():
    for batch, micro, expected in ((64, None, 64), (1024, None, 256), (1024, 128, 128), (8, 128, 8)):
        assert evaluate.default_batch(change(config.Config(batch=batch), dist__micro_batch=micro)) == expected


# ---- images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ant, bee and cow in train/, val/ without cow and with an image that can't be read."""
    root = fill(tmp_path_factory.mktemp("images"), {"ant": 8, "bee": 8, "cow": 8})
    shutil.rmtree(root / "val" / "ant")
    (root / "val" / "cow" / "3.png").write_text("not an image")
    return root


def listed(images: EvalImages, batch: int = 4, **options) -> list[tuple[int, int]]:
    """The places and labels that it gives."""
    found = [
        (i, y) for b in images.batches(batch, **options) for i, y in zip(b.index.tolist(), b.y.tolist(), strict=True)
    ]
    return found


NAMES = ["ant", "bee", "cow"]


def test_labels_are_the_runs_where_classes_lack(folder):
    images = open_images(of(folder), CPU, class_names=NAMES)
    assert (images.num_classes, images.class_names, images.size) == (3, NAMES, 14)
    assert listed(images) == [(i, 1) for i in range(7)] + [(i, 2) for i in range(7, 14) if i != 10]
    assert [(each["file"], each["reason"]) for each in images.bad] == [(str(folder / "val/cow/3.png"), "not an image")]
    assert images.name(0) == str(folder / "val/bee/0.png")
    alone = open_images(of(folder), CPU)
    assert alone.class_names == ["bee", "cow"] and listed(alone)[0] == (0, 0)
    assert open_images(of(folder), CPU, "train", class_names=NAMES).size == 24
    assert open_images(of(folder), CPU, "val", class_names=NAMES).size == 14  # by its folder's name


def test_pixels_are_those_of_training(folder):
    """The same bits, so that `mpvg eval` finds the accuracy that training has logged."""
    data = create_data(of(folder, data__val_split="train"), CPU)
    x = torch.cat([x for x, *_ in data.test_batches()])
    assert torch.equal(x, torch.cat([batch.x for batch in open_images(of(folder), CPU, "train").batches(5)]))


def test_any_folder(folder, tmp_path):
    images = open_images(of("nowhere"), CPU, folder=folder / "val", class_names=NAMES)
    assert listed(images)[0] == (0, 1) and images.preprocessing["input_size"] == (3, 16, 16)
    x = next(images.batches(2)).x
    torch.testing.assert_close(x, next(open_images(of(folder), CPU, class_names=NAMES).batches(2)).x)
    digits = open_images(config.Config(), CPU, folder=folder / "val", class_names=NAMES)
    assert next(digits.batches(2)).x.shape == (2, 1, 8, 8)


def test_processes_and_indices(folder):
    images = open_images(of(folder), CPU, class_names=NAMES)
    parts = [listed(images, world=World(rank, 3)) for rank in range(3)]
    assert sorted(sum(parts, [])) == listed(images) and [i for i, _ in parts[1]] == [1, 4, 7, 13]
    assert listed(images, indices=[9, 0, 12]) == [(9, 2), (0, 1), (12, 2)]
    assert listed(images, indices=[9, 0, 12], world=World(0, 2)) == [(9, 2), (12, 2)]


def test_workers_do_not_matter(folder, monkeypatch):
    monkeypatch.setattr(evaluation, "IMAGES_PER_WORKER", 6)
    monkeypatch.setattr(evaluation, "cpus", lambda: 8)
    plain = change(of(folder), model__channels_last=True)
    expected = list(open_images(plain, CPU, class_names=NAMES).batches(3))
    images = open_images(change(plain, data__workers=4), CPU, class_names=NAMES)
    found = list(images.batches(3))
    assert images.workers == images.loader.loader.num_workers == 2  # 14 images, 6 for each
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert found[0].x.is_contiguous(memory_format=torch.channels_last)
    assert listed(images, indices=[1, 2]) == [(1, 1), (2, 1)] and images.workers == 0
    images.close()


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setitem(sources.PACKAGES, "wds", ("torch", "torch"))
    monkeypatch.setattr(sources, "create_dataset", lambda *_, **__: Stream(False))


def test_streams(stream, tmp_path):
    """Seven images; two workers have those at even and at odd places."""
    changes = {"data__name": "wds/x", "data__num_classes": 5, "data__mean": (0.0,) * 3, "data__std": (1 / 255,) * 3}
    images = open_images(of(tmp_path, **changes, data__workers=2), CPU)
    assert (images.size, images.num_classes, images.class_names) == (7, 5, None)
    red = {int(i): round(float(x[0, 8, 8])) for b in images.batches(2) for x, i in zip(b.x, b.index, strict=True)}
    assert red == {i: i for i in range(7)}
    for batch in (1, 4):
        assert sorted(listed(images, batch)) == [(i, i % 5) for i in range(7)]
    parts = [listed(images, world=World(rank, 2)) for rank in range(2)]
    assert all(parts) and sorted(sum(parts, [])) == sorted(listed(images))
    assert listed(images, indices=[5, 0, 6, 9]) == [(5, 0), (0, 0), (6, 1)]
    assert listed(images, indices=[5, 0, 6], world=World(1, 2)) == [(0, 0)]
    assert images.name(3) == "image 3 of the stream"
    images.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "other"}, "--split is 'other', but data.root .* has no folder or tar file other; expected one with"),
        ({"folder": ".", "class_names": NAMES}, "has the splits (empty, )?train, val in it, expected one of them"),
        ({"folder": "nowhere"}, "nowhere does not exist, expected a folder with a folder of images for each class"),
        ({"folder": "train", "class_names": ["ant", "cow"]}, "class folders that the run does not know: bee; its 2 cl"),
        ({"folder": "empty", "class_names": NAMES}, "empty has no images .* in folders, one a class"),
        ({"folder": "val/bee", "class_names": NAMES}, "val/bee has images outside of class folders"),
    ],
)
def test_what_is_wrong(folder, options, message):
    (folder / "empty").mkdir(exist_ok=True)
    if "folder" in options:
        options = options | {"folder": folder / options["folder"]}
    with pytest.raises(InputError, match=message):
        open_images(of(folder), CPU, **options)


def test_splits_and_classes_of_other_data_sets(tmp_path, monkeypatch):
    fake_cifar100(tmp_path, monkeypatch)
    plain = of(tmp_path, data__name="torch/cifar100", data__img_size=(32, 32))
    names = [f"class {i}" for i in range(100)]
    images = open_images(plain, CPU, class_names=names)
    assert (images.size, images.num_classes) == (10, 100) and listed(images) == [(i, i) for i in range(10)]
    with pytest.raises(InputError, match="--split is 'third', expected train or validation for torch/cifar100"):
        open_images(plain, CPU, "third")
    with pytest.raises(InputError, match=r"has other classes than the run: 100, not 2 \(class 1, class 2"):
        open_images(plain, CPU, class_names=["class 0", "x"])
    with pytest.raises(InputError, match="the digits have train and validation"):
        open_images(config.Config(), CPU, "third")


def test_pictures_of_images(folder):
    images = open_images(of(folder), CPU, class_names=NAMES)
    picture = images.picture(next(images.batches(1)).x[0])
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    digits = open_images(config.Config(), CPU)
    picture = digits.picture(next(digits.batches(1)).x[0])
    assert picture.shape == (8, 8) and picture.max() > 200


# ---- the command


TINY = {"model__name": "mpvg_deit_tiny_patch16_224", "model__patch_size": 8, "model__embed_dim": 32}
TINY |= {"model__depth": 2, "model__num_heads": 2}


def made(path, root, names=NAMES, **changes):
    """A run folder as training leaves it, with random weights."""
    found = of(root, **(TINY | changes))
    run = RunFolder.create(path, {"config": config.to_dict(found), "class_names": names})
    images = open_images(found, CPU, class_names=names)
    data = type("Data", (), {"num_classes": images.num_classes, "preprocessing": images.preprocessing})
    data.input_size = images.preprocessing["input_size"]
    torch.manual_seed(0)
    assert run.save("last", create_model(found, data))
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs") / "run", folder)


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    monkeypatch.setattr(loop, "Trainer", None)


def mpvg(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def test_eval_writes_figures_and_pictures(run, folder, tmp_path, capsys):
    copy, moved = shutil.copytree(run, tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(folder / "val", moved / "val")  # the training images are not there
    assert mpvg("eval", copy, "--data.root", moved, "--json", tmp_path / "r.json", "--batch", 5) == 0
    out = copy / "eval" / "last-validation"
    assert {path.name for path in out.iterdir()} == {
        *("result.json", "per_class.csv", "confusion.csv", "confusion.png", "reliability.png")
    }
    result = json.loads((out / "result.json").read_text())
    assert json.loads((tmp_path / "r.json").read_text()) == result | {"written": str(out)}
    assert (result["images"], result["split"], result["folder"], result["weights"]) == (13, "validation", None, "last")
    images = open_images(of(folder), CPU, class_names=NAMES)
    x, y = (torch.cat(part) for part in zip(*(batch[:2] for batch in images.batches(64)), strict=True))
    logits = RunFolder(run).model()(x).detach()
    assert result["acc"] == pytest.approx(100 * float((logits.argmax(-1) == y).float().mean()))
    assert result["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    with open(out / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["images"]) for row in rows] == [("ant", "0"), ("bee", "7"), ("cow", "6")]
    with open(out / "confusion.csv", newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 13
    for name in ("confusion", "reliability"):
        assert Image.open(out / f"{name}.png").width >= 400
    text = capsys.readouterr().out
    assert f"accuracy {result['acc']:.2f} %" in text and "13 images" in text and f"written: {out}" in text
    assert "classes without images: 1 of 3" in text
    assert f"unreadable images, left out: 1: {moved / 'val/cow/3.png'} (not an image)" in text


def test_eval_of_a_folder_with_other_settings(run, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    args = ["eval", run, "--folder", folder / "train", "--out", tmp_path / "out", "--amp", "bf16", "--latency"]
    args += ["--batch-sizes", 1, 2, "--model.channels_last", "--data.crop_pct", "1.0", "--dist.micro_batch", 4]
    assert mpvg(*args) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["images"], result["split"], result["amp"]) == (24, None, "bf16")
    assert [row["batch"] for row in result["latency"]["rows"]] == [1, 2]
    assert f"on {folder / 'train'}: accuracy" in (text := capsys.readouterr().out) and "p99" in text
    assert not (run / "eval").exists()
    assert evaluate._place("ema", "x", folder / "train") == "ema-folder-train"
    assert evaluate._place("ema", "val-{0..3}.tar|50", None) == "ema-val-_0..3_.tar_50"


def test_eval_of_timms_own_model(folder, tmp_path, capsys):
    run = made(tmp_path / "run", folder, model__name="vit_tiny_patch16_224", model__scheme=None)
    assert mpvg("eval", run, "--split", "train") == 0
    assert "24 images" in capsys.readouterr().out and (run / "eval" / "last-train" / "result.json").exists()


def test_names_that_are_no_text(tmp_path):
    result = evaluate.summary(hand_made(), 3, ["a", "b\nb", "c\udce9"])
    out = evaluate.write(result, result.pop("confusion"), ["a", "b\nb", "c\udce9"], tmp_path)
    with open(f"{out}/per_class.csv", newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a", "b\nb", r"c\udce9"]


def test_the_result_is_written_though_nobody_reads_what_is_printed(run, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert mpvg("eval", run, "--out", tmp_path, "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 13


def test_weights_that_are_not_finite_give_valid_json(run, folder, tmp_path, capsys):
    copy = RunFolder(shutil.copytree(run, tmp_path / "run"))
    model = copy.model()
    nn.init.constant_(model.head.bias, math.nan)
    copy.save("last", model)
    assert mpvg("eval", copy.path) == 0
    assert json.loads((copy.path / "eval/last-validation/result.json").read_text())["loss"] is None
    assert "its accuracy means nothing" in capsys.readouterr().out


def test_a_folder_that_can_not_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert mpvg("eval", run, "--out", tmp_path / "file" / "x") == 0
    out, err = capsys.readouterr()
    assert "accuracy" in out and "written" not in out
    assert (
        err
        == f"mpvg: warning: {tmp_path}/file/x can't be written (Not a directory): choose another folder with --out\n"
    )


def test_what_the_command_can_not(run, folder, tmp_path, capsys):
    unnamed = made(tmp_path / "unnamed", folder, names=None, data__val_split="train")
    info = json.loads((unnamed / "run.json").read_text())
    info["config"]["data"]["num_classes"] = 3
    (unnamed / "run.json").write_text(json.dumps(info))
    bad = tmp_path / "bad" / "ant" / "a.png"
    bad.parent.mkdir(parents=True)
    bad.write_text("not an image")
    for code, message, *args in (
        (2, "best/model.safetensors does not exist: the run has not saved its best weights", run, "--weights", "best"),
        (2, "--split is 'third', but data.root", run, "--split", "third"),
        (2, "--split and --folder are both given: give one of them", run, "--split", "train", "--folder", folder),
        (2, "--batch-sizes are those of --latency", run, "--batch-sizes", 4),
        (2, "argument --batch: '0' is not a number from 1", run, "--batch", 0),
        (2, "has 2 classes and the run 3, whose names are not known", unnamed, "--folder", folder / "val"),
        (2, "of another shape (pos_embed (1, 4, 32) instead of (1, 16, 32))", run, "--data.img_size", 32, 32),
        (1, f"no image could be read: {bad} (not an image)", run, "--folder", tmp_path / "bad"),
    ):
        assert mpvg("eval", *args) == code
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == "", err


# ---- pictures


@pytest.mark.parametrize("classes", [1, 10, 60, 450])
def test_confusion_matrix(classes):
    confusion = np.diag(np.full(classes, 7))
    names = [f"a class with a long name, number {i}" for i in range(classes)]
    assert pictures.most_confused(confusion, 5) == []
    assert pictures.png(pictures.confusion_matrix(confusion, names)).startswith(b"\x89PNG")
    if classes > 1:
        confusion[0, 1] = 3
        confusion[1, 0] = 4
        assert pictures.most_confused(confusion, 5) == [(1, 0, 4), (0, 1, 3)]
        assert pictures.most_confused(confusion, 1) == [(1, 0, 4)]
    if classes == 450:
        confusion[400, 2] = 5
    figure = pictures.confusion_matrix(confusion)
    matrix = figure.axes[0].images[0].get_array()
    assert matrix.shape == ((150, 150) if classes == 450 else (classes, classes))
    if classes == 10:
        assert matrix[1, 0] == pytest.approx(100 * 4 / 11)
        assert [text.get_text() for text in figure.axes[0].texts][:3] == ["7", "3", "4"]
    if classes == 450:  # three classes a cell, so that the first two mistakes are in the first
        assert matrix[0, 0] == 100 and matrix[133, 0] == pytest.approx(100 * 5 / 26)
    assert pictures.png(figure) == pictures.png(pictures.confusion_matrix(confusion))


def test_reliability_diagram():
    rows, error = evaluate.calibration(torch.tensor([0.9, 0.4]), torch.tensor([True, True]))
    figure = pictures.reliability_diagram(rows, error)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[:2] == [100.0, 100.0] and heights[2:] == pytest.approx([-60, -10], abs=1e-4)
    assert "35.00 %" in figure.axes[0].get_title() and pictures.png(figure).startswith(b"\x89PNG")
