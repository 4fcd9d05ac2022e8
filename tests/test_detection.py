"""Detection in the trainer: AP of hand-made cases and of pycocotools, losses, runs that go on, several processes."""

import contextlib
import io
import json
import math

import coco_files
import numpy as np
import pytest
import torch
from coco_files import SMALL, small, split, write
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_resume import contents, differences
from warm_process import WarmProcess

from mpvg_kernels.train import InputError, TrainingError, coco_metrics, metrics
from mpvg_kernels.train.data import coco
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.tasks import create_task
from mpvg_kernels.train.tasks.dense import predict

pytestmark = [
    pytest.mark.xdist_group(__name__),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_files.write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def warm():
    with WarmProcess("mpvg_kernels.train.tasks.detection") as process:
        yield process


# ---- AP


def dataset(folder, annotations, n=1, side=100):
    """Images of a side with annotations (image, category id, box) and the categories 3 (blue) and 7 (red)."""
    content = {"images": [], "annotations": [], "categories": coco_files.CATEGORIES}
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.new("RGB", (side, side)).save(folder / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": side, "width": side})
    for image, category, box, *more in annotations:
        x, y, w, h = box
        area = {"segmentation": coco_files.rectangle(x, y, w, h), "area": w * h, "iscrowd": 0}
        number = len(content["annotations"])  # from 0, which pycocotools takes for no object
        each = {"id": number, "image_id": image, "category_id": category, "bbox": box, **area, **dict(*more)}
        content["annotations"].append(each)
    write(folder / "some.json", content)
    return coco.Coco(folder / "some.json", [folder])


def found(box, label, score, side=100):
    """What a model finds: one object (left, top, width, height); labels from 1."""
    x, y, w, h = box
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[0, y : y + h, x : x + w] = True
    boxes = torch.tensor([[x, y, x + w, y + h]]).float()
    return {"boxes": boxes, "labels": torch.tensor([label]), "scores": torch.tensor([score]), "masks": mask}


BOX = [10, 20, 40, 40]
PERFECT = {"ap": 100, "ap50": 100, "ap75": 100}


@pytest.mark.parametrize(
    "objects, expected",
    [
        ([(BOX, 1, 0.9)], PERFECT),
        ([], {"ap": 0, "ap50": 0, "ap75": 0}),
        ([(BOX, 2, 0.9)], {"ap": 0, "ap50": 0, "ap75": 0}),  # another class
        # Shifted by a fifth of its width, IoU 2/3: right at 0.50, 0.55, 0.60, 0.65.
        ([([18, 20, 40, 40], 1, 0.9)], {"ap": 40, "ap50": 100, "ap75": 0}),
        # By an eighth: 35/45 = 0.78 is right at six overlaps.
        ([([15, 20, 40, 40], 1, 0.9)], {"ap": 60, "ap50": 100, "ap75": 100}),
        # By a seventh: 34/46 = 0.739 is right up to 0.70.
        ([([16, 20, 40, 40], 1, 0.9)], {"ap": 50, "ap50": 100, "ap75": 0}),
        # Precision is 1/2 at every recall where a wrong one comes before the right one, and 1 where it comes after.
        ([(BOX, 1, 0.8), ([55, 55, 40, 40], 1, 0.9)], {"ap": 50, "ap50": 50, "ap75": 50}),
        ([(BOX, 1, 0.9), ([55, 55, 40, 40], 1, 0.8)], PERFECT),
        ([(BOX, 1, 0.9), (BOX, 1, 0.8)], PERFECT),  # twice: the second is wrong, behind all recall
    ],
)
def test_ap_of_one_object(tmp_path, objects, expected):
    truth = dataset(tmp_path, [(0, 3, BOX)])
    rows = [row for each in objects for row in coco_metrics.rows(found(*each), 0, truth.category_ids)]
    ap = coco_metrics.average_precision(truth, [0], rows)
    for kind in ("box", "mask"):
        assert {key: ap[f"{kind}_{key}"] for key in expected} == pytest.approx(expected)
        # 1,600 pixels are of medium size.
        assert ap[f"{kind}_ap_medium"] == pytest.approx(expected["ap"])
        assert ap[f"{kind}_ap_small"] is ap[f"{kind}_ap_large"] is None
    blue, red = ap["per_class"]
    assert blue == {"name": "blue"} | {
        f"{k}_{n}": pytest.approx(v) for k in ("box", "mask") for n, v in expected.items()
    }
    assert red == {"name": "red"} | {f"{kind}_{name}": None for kind in ("box", "mask") for name in expected}
    assert ap["box_ar"] == pytest.approx(100 if expected == PERFECT else ap["box_ar"])


def test_boxes_and_masks_are_measured_apart(tmp_path):
    truth = dataset(tmp_path, [(0, 3, BOX)])
    objects = found(BOX, 1, 0.9)
    objects["masks"][:, :, 30:] = False  # half of it
    ap = coco_metrics.average_precision(truth, [0], coco_metrics.rows(objects, 0, truth.category_ids))
    assert ap["box_ap"] == pytest.approx(100) and ap["mask_ap50"] == pytest.approx(100)  # IoU 0.5 counts
    assert ap["mask_ap"] == pytest.approx(10) and ap["mask_ap75"] == 0


def test_what_counts(tmp_path):
    """Crowds do not count, images that were not evaluated neither; classes do alike; an object of id 0 is found."""
    crowd = {"iscrowd": 1, "segmentation": coco_files.counts([50, 50, 50, 50], (100, 100))}
    truth = dataset(
        tmp_path, [(0, 3, BOX), (0, 3, [50, 50, 50, 50], crowd), (1, 7, BOX), (1, 3, BOX), (2, 7, BOX)], n=3
    )
    rows = coco_metrics.rows(found(BOX, 1, 0.9), 0, truth.category_ids)
    in_crowd = coco_metrics.rows(found([60, 60, 20, 20], 1, 0.95), 0, truth.category_ids)
    assert coco_metrics.average_precision(truth, [0], rows + in_crowd)["box_ap"] == pytest.approx(100)
    # Red is never found; half of blue at full precision is 51 of 101 recalls.
    both = coco_metrics.average_precision(truth, [0, 1], rows)
    assert both["box_ap"] == pytest.approx((100 * 51 / 101 + 0) / 2)
    assert [each["box_ap"] for each in both["per_class"]] == pytest.approx([100 * 51 / 101, 0])
    nothing = coco_metrics.average_precision(dataset(tmp_path / "none", []), [0], rows)
    assert nothing["box_ap"] is nothing["mask_ap75"] is None


def noisy(truth, draw):
    """The objects of a split, shifted, resized, partly of another class, twice or missing: rows."""
    rows = []
    for image in range(len(truth)):
        target = truth.target(image)
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            for _ in range(draw.integers(0, 3)):
                height, width = truth.sizes[image].tolist()
                left, top, right, bottom = (box + torch.from_numpy(draw.normal(0, 3, 4))).round().int().tolist()
                left, top = max(left, 0), max(top, 0)
                right, bottom = min(max(right, left + 2), width), min(max(bottom, top + 2), height)
                mask = torch.zeros(1, height, width, dtype=torch.bool)
                mask[0, top:bottom, left : (left + right + 1) // 2 if draw.random() < 0.5 else right] = True
                objects = {
                    "boxes": torch.tensor([[left, top, right, bottom]]).float(),
                    "labels": 1 + (label if draw.random() < 0.8 else 1 - label).view(1),
                    "scores": torch.from_numpy(draw.random(1)),
                    "masks": mask,
                }
                rows += coco_metrics.rows(objects, int(truth.ids[image]), truth.category_ids)
    return rows


def test_as_pycocotools_has_it(tmp_path):
    """Its own evaluation of its own results file, on the file as it is."""
    content = split(tmp_path / "images", tmp_path / "some.json", 40)
    draw = np.random.default_rng(0)
    for each in content["annotations"][::7]:
        each["iscrowd"] = 1
        image = content["images"][each["image_id"] - 50]
        each["segmentation"] = coco_files.counts(each["bbox"], (image["height"], image["width"]))
    content["annotations"][3] |= {"bbox": [5, 5, 0, 9], "area": 0}  # not trained on; pycocotools counts it
    write(tmp_path / "some.json", content)
    truth = coco.Coco(tmp_path / "some.json", [tmp_path / "images"])
    rows = noisy(truth, draw)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    ours = coco_metrics.average_precision(truth, range(len(truth)), rows)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(tmp_path / "some.json")
        for kind, name in (("box", "bbox"), ("mask", "segm")):
            if name == "segm":  # else the area of its box is a mask's
                rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
            evaluation = COCOeval(theirs, theirs.loadRes(json.loads(json.dumps(rows))), name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
            expected = [100 * value if value >= 0 else None for value in evaluation.stats[[0, 1, 2, 3, 4, 5, 8]]]
            assert [ours[f"{kind}_{key}"] for key in (*keys, "ar")] == pytest.approx(expected, nan_ok=True)
            assert 5 < ours[f"{kind}_ap"] < 95 and expected[3] is not None
    with contextlib.redirect_stdout(io.StringIO()):  # the file as `loadRes` opens it
        assert len(theirs.loadRes(str(tmp_path / "results.json")).anns) == len(rows)


def test_rows(tmp_path):
    truth = dataset(tmp_path, [(0, 3, BOX)])
    objects = found(BOX, 2, 0.12345678)
    objects["boxes"] += 0.123456
    (row,) = json.loads(json.dumps(coco_metrics.rows(objects, 5, truth.category_ids)))
    assert row["bbox"] == [10.12, 20.12, 40.0, 40.0] and row["score"] == 0.123457
    assert (row["image_id"], row["category_id"]) == (5, 7) and row["segmentation"]["size"] == [100, 100]
    assert np.array_equal(rle.decode(row["segmentation"]), objects["masks"][0].numpy())
    assert coco_metrics.rows(objects, 5, [3, None]) == []
    none = {name: value[:0] for name, value in objects.items()}
    assert coco_metrics.rows(none, 5, truth.category_ids) == []


# ---- the task


def opened(config):
    task = create_task(config)
    data = task.create_data(CPU, World())
    torch.manual_seed(0)
    return task, data, task.create_model(data, start=True)


def test_loss(root):
    """The sum of the model's five, its labels counted from 1; the counters are sums over the images."""
    task, data, model = opened(small(root))
    batch = next(data.train_batches(1))
    model.train()
    torch.manual_seed(1)
    loss, counts = task.loss(model, batch, CPU)
    targets = [{**target, "labels": target["labels"] + 1} for target in batch.y]
    assert {int(label) for target in targets for label in target["labels"]} == {1, 2}
    torch.manual_seed(1)
    parts = model(batch.x, targets)
    torch.testing.assert_close(loss, sum(parts.values()))
    assert loss.requires_grad and not counts.requires_grad
    assert counts.tolist() == [4 * float(parts[key].detach()) for key in task.figures.counters]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_images_to_be_looked_at(root):
    task, data, model = opened(small(root))
    batch = next(data.train_batches(1))
    images = task.images(batch, 3)
    assert images.shape[:2] == (3, 3) and all(side % 32 == 0 for side in images.shape[2:])
    height, width = (min(x.shape[i], images.shape[i + 1]) for i in (1, 2) for x in batch.x[:1])
    assert torch.equal(images[0, :, :height, :width], batch.x[0][:, :height, :width])
    assert len(task.features(model)(images)) == 4
    assert task.flops(model, data, CPU) > 1e6


def test_measure(root):
    """An oracle in place of the model is perfect; what can't be read is left out; figures are finite numbers."""
    task, data, _ = opened(small(root))

    class Oracle(torch.nn.Module):
        def forward(self, images, sizes):
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls in self.wanted:
                target = data.test_split.truth(self.wanted[self.calls])
                assert target["masks"].shape[1:] == sizes[0]
                return [{**target, "labels": target["labels"] + 1, "scores": torch.ones(len(target["labels"]))}]
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0),
                     "masks": torch.zeros(0, *sizes[0]).bool()}]  # fmt: skip

    oracle = Oracle()
    oracle.wanted = {i: i for i in range(5)}
    calls = []
    measured = task.measure(oracle, data.test_split, World(), CPU, on_batch=lambda: calls.append(1))
    assert measured["images"] == len(calls) == 5 and measured["box_ap"] == measured["mask_ap"] == pytest.approx(100)
    assert len(measured["results"]) == len(data.test_split.coco.labels)
    assert [row["image_id"] for row in measured["results"]] == data.test_split.coco.ids[
        np.repeat(np.arange(5), np.diff(data.test_split.coco.first))
    ].tolist()
    # Nothing found of two images: their objects count, those of the others do not.
    oracle.calls, oracle.wanted = -1, {0: 3}
    measured = task.measure(oracle, data.test_split, World(), CPU, indices=[3, 1])
    shares = np.diff(data.test_split.coco.first)[[3, 1]]
    assert measured["images"] == 2 and 0 < measured["box_ap50"] < 100 and measured["box_ar"] < 100, shares
    # Without an object COCO has no AP; what decides on the best weights has to be a number.
    data.test_split.coco.first[:] = 0
    oracle.calls, oracle.wanted = -1, {}
    measured = task.evaluate(oracle, data, World(), CPU, lambda: None)
    assert measured == {figure.key: 0.0 for figure in task.figures.evaluated} | {"images": 5}
    data.test_split.source.coco.names[:] = ["gone.png"] * 5
    with pytest.raises(TrainingError, match=r"no image of .*val2017 could be read: .*val2017/gone.png .+"):
        task.measure(oracle, data.test_split, World(), CPU)


def test_predict(root):
    """In pixels of the image, whatever its mode and size; labels from 0; as evaluation finds it."""
    task, data, model = opened(small(root, "--detection.score_threshold", 0))
    model.eval()
    image = data.test_split.image(2)
    objects = predict(model, image, CPU)
    (rows,) = [task.measure(model, data.test_split, World(), CPU, indices=[2])["results"]]
    assert len(objects["labels"]) == len(rows) > 5 and objects["masks"].shape[1:] == (image.height, image.width)
    assert [row["score"] for row in rows] == pytest.approx(objects["scores"].tolist(), abs=1e-5)
    assert [row["category_id"] for row in rows] == [data.test_split.coco.category_ids[i] for i in objects["labels"]]
    types = {name: value.dtype for name, value in objects.items()}
    assert types == {"boxes": torch.float32, "labels": torch.int64, "scores": torch.float32, "masks": torch.bool}
    assert set(objects["labels"].tolist()) <= {0, 1}
    (truth,) = [data.test_split.truth(2)]
    assert truth["masks"].shape[1:] == objects["masks"].shape[1:] and truth["masks"].dtype == torch.bool
    for mode, size in (("L", (40, 90)), ("RGBA", (200, 30)), ("P", (64, 64))):
        objects = predict(model, image.convert(mode).resize(size), CPU)
        assert objects["masks"].shape[1:] == size[::-1]


def test_nothing_is_compiled(root):
    task, data, _ = opened(small(root, "--compile", "True"))
    with pytest.raises(InputError, match="config field compile is True, expected False for task detection"):
        task.begin(data, CPU)


# ---- runs

RUN = """--epochs 2 --model.drop_path_rate 0.2 --optim.ema_decay 0.9 --checkpoint.interval 1 --log.interval 1
--log.pos_interval 2 --detection.test_short_side 48 --optim.lr 1e-3""".split()


def command(root, folder, *more):
    """Any recipe: its config is changed all over."""
    given = [
        "train",
        "--recipe",
        "digits",
        *SMALL,
        *RUN,
        "--data.root",
        root,
        "--out",
        folder,
        "--resume",
        "auto",
        *more,
    ]
    return [*given, "--threads", "1", "--model.patch_size", "None"]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A data set with an image of each part that can't be read."""
    root = coco_files.write_coco(tmp_path_factory.mktemp("spoilt"))
    for part in ("train", "val"):
        (root / f"{part}2017" / "002.png").write_text("not an image")
    return root


SPOILT = ("--data.max_bad_share", "0.2")


@pytest.fixture(scope="module")
def whole(warm, spoilt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    out = folder.with_suffix(".txt")
    assert warm.run(command(spoilt, folder, *SPOILT), out) == 0, out.read_text()
    return folder


def test_a_run(whole):
    """What it leaves: all figures of the log as finite numbers, the bad images, weights that open as a model."""
    rows = metrics.read_log(whole, "epoch")
    assert [row["step"] for row in rows] == [2, 4]
    keys = {f"{part}_{kind}_{ap}" for part in ("test", "ema") for kind in ("box", "mask") for ap in PERFECT}
    keys |= {f"train_{key}" for key in ("loss", "loss_objectness", "loss_box_reg", "loss_mask", "loss_classifier")}
    assert all(keys <= row.keys() and all(math.isfinite(row[key]) for key in keys) for row in rows)
    for row in rows:
        parts = [value for key, value in row.items() if key.startswith("train_loss_")]
        assert len(parts) == 5 and row["train_loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["bad_images"] == 2
    bad = {row["file"][-15:]: row["reason"] for row in metrics.read_log(whole, "bad_image")}
    assert bad == {"ain2017/002.png": "not an image", "val2017/002.png": "not an image"}
    assert metrics.read_log(whole, "pos")[0]["layers"]
    from mpvg_kernels.train.run_folder import RunFolder

    model = RunFolder(whole).model("best")
    assert model.label_names == ["blue", "red"] and model.preprocessing["short_side"] == 48
    assert predict(model, Image.new("RGB", (70, 50)), CPU)["masks"].shape[1:] == (50, 70)


@pytest.mark.parametrize("moment, count", [("update", 4), ("detections", 6)])
def test_killed_runs_go_on_to_the_same_bits(warm, spoilt, whole, tmp_path, moment, count):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    workers = ("--data.workers", 1 if moment == "update" else 0)
    assert warm.run(command(spoilt, folder, *SPOILT, *workers), out, patch={"kill": (moment, count)}) == -9
    assert warm.run(command(spoilt, folder, *SPOILT), out) == 0, out.read_text()
    assert "goes on from step-0000" in out.read_text()
    assert differences(contents(folder), contents(whole)) == []


def test_two_processes_find_what_one_finds(warm, spoilt, tmp_path):
    """Of weights that stay as they are: the same AP, of each image once; the first process says it for both."""
    content = json.loads((spoilt / "annotations" / "instances_val2017.json").read_text())
    grid = [(x, y, image["id"]) for image in content["images"] for x in range(0, 49, 8) for y in range(0, 49, 8)]
    box = coco_files.rectangle(0, 0, 16, 16)
    content["annotations"] = [  # so many that some are found by weights that know nothing
        {"id": i, "image_id": image, "category_id": 3, "bbox": [x, y, 16, 16], "area": 256, "segmentation": box}
        for i, (x, y, image) in enumerate(grid)
    ]
    write(spoilt / "grid.json", content)
    still = ["--epochs", 1, "--optim.lr", 1e-30, "--sched.warmup_lr", 0, "--sched.min_lr", 0]
    # Batch norms of their own images too.
    still += ["--model.freeze", "backbone.model.spm", "backbone.model.feature_norms"]
    rows = []
    for processes in (1, 2):
        folder, out = tmp_path / f"run{processes}", tmp_path / f"{processes}.txt"
        more = (*SPOILT, *still, "--detection.score_threshold", 0, "--data.val_annotations", "grid.json")
        assert warm.run(command(spoilt, folder, *more), out, processes=processes) == 0, out.read_text()
        rows += metrics.read_log(folder, "epoch")
    one, two = ({key: value for key, value in row.items() if key.startswith(("test_", "ema_"))} for row in rows)
    assert one == two and one["test_box_ap"] > 0 and rows[1]["bad_images"] == 2
    # The proposals that the losses are taken over are drawn otherwise.
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.3)
    assert out.read_text().count("2 processes (ddp)") == out.read_text().count("best") == 1
