"""Scenes of shapes that are made here: what is in them, the folder that they are kept in, and the recipes on them."""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from mpvg_kernels.train import InputError, config, loop, metrics, recipes
from mpvg_kernels.train.data import shapes

SIZES = {"train": 6, "val": 4}
SCENES = [(split, index) for split in SIZES for index in range(40)]


def at(root) -> config.Config:
    return config.Config(data=config.Data(name="shapes", root=None if root is None else str(root)))


@pytest.fixture
def few(monkeypatch):
    """A folder of a few scenes takes a moment."""
    monkeypatch.setattr(shapes, "SIZES", SIZES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "root"
    shapes.write(root, SIZES)
    return root


# ---- scenes


@pytest.mark.parametrize(
    "part, expected",
    [
        ("image", "cd6ca280a2c49716"),
        ("label_map", "31436d0488b1b068"),
    ],
)
def test_scenes_are_the_same_everywhere(part, expected):
    """If they are to change, shapes.VERSION has to as well."""
    pixels = [getattr(shapes.draw(split, index), part) for split, index in (("train", 0), ("train", 7), ("val", 3))]
    assert hashlib.sha256(np.stack(pixels).tobytes()).hexdigest()[:16] == expected


def test_objects_do_not_overlap_and_show():
    for scene in (shapes.draw(*each) for each in SCENES):
        assert 1 <= len(scene.labels) <= shapes.MOST and scene.masks.sum(0).max() == 1
        assert scene.masks.sum((1, 2)).min() >= shapes.LEAST_PIXELS
        assert set(scene.labels) <= set(range(1, 6))
    assert {label for each in SCENES for label in shapes.draw(*each).labels} == set(range(1, 6))


def test_masks_are_what_is_seen(monkeypatch):
    """Inside of its mask an object's colour changes evenly from edge to edge; outside of all masks is background."""
    monkeypatch.setattr(
        shapes, "_background", lambda random, *columns: np.full((shapes.SIDE, shapes.SIDE, 3), 255, np.uint8)
    )
    y, x = np.mgrid[: shapes.SIDE, : shapes.SIDE]
    places = np.stack([np.ones_like(x), x, y], -1)
    hidden = 0
    for scene in (shapes.draw(*each) for each in SCENES):
        for mask in scene.masks:
            for channel in scene.image[mask].T.astype(float):
                inside = (channel > 0) & (channel < 255)  # what is clipped is flat
                if inside.sum() > 3:
                    points = places[mask][inside]
                    plane = points @ np.linalg.lstsq(points, channel[inside])[0]
                    assert abs(plane - channel[inside]).max() < 1
        assert (scene.image[~scene.masks.any(0)] == 255).all()
        hidden += sum(abs(each.sum() - whole.sum()) > 0 for each, whole in zip(scene.masks, _whole(scene), strict=True))
    assert hidden > len(SCENES) / 4


def _whole(scene: shapes.Scene) -> list[np.ndarray]:
    """The masks with what their rows and columns leave out between the first and the last pixel."""
    return [np.maximum.accumulate(m, 1) & np.maximum.accumulate(m[:, ::-1], 1)[:, ::-1] for m in scene.masks]


def test_splits_share_no_part_of_a_photograph(monkeypatch):
    columns = np.broadcast_to((np.arange(640) // 3)[None, :, None], (427, 640, 3)).astype(np.uint8)
    monkeypatch.setattr(shapes, "_photographs", lambda: [columns])
    seen = {"train": set(), "val": set()}
    for split, index in SCENES:
        scene = shapes.draw(split, index)
        seen[split] |= set(np.unique(scene.image[~scene.masks.any(0)]))
    assert max(seen["train"]) < min(seen["val"])


# ---- files


@pytest.mark.parametrize("split", SIZES)
def test_annotations_and_label_maps_agree(written, split, capsys):
    coco = COCO(written / f"annotations/instances_{split}.json")
    names = (written / "classes.txt").read_text().split()
    assert names == ["background", *(each["name"] for each in coco.loadCats([1, 2, 3, 4, 5]))]
    assert len(coco.imgs) == SIZES[split] == len(list((written / "images" / split).iterdir()))
    for key, image in coco.imgs.items():
        with Image.open(written / "masks" / split / image["file_name"]) as file:
            assert file.mode == "L" and file.size == (image["width"], image["height"])
            left = np.asarray(file).astype(int)
        with Image.open(written / "images" / split / image["file_name"]) as file:
            assert file.mode == "RGB" and file.size == (image["width"], image["height"])
            scene = shapes.draw(split, key - 1)
            assert np.array_equal(np.asarray(file), scene.image) and np.array_equal(left, scene.label_map)
        for each in coco.imgToAnns[key]:
            mask = coco.annToMask(each) > 0
            assert (left[mask] == each["category_id"]).all()
            left[mask] = 0
            rows, columns = mask.nonzero()
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert each["bbox"] == box and each["area"] == mask.sum() and each["iscrowd"] == 0
        assert not left.any()


def test_a_mask_may_begin_in_the_corner():
    mask = np.zeros((8, 10), bool)
    mask[0, 0] = mask[5, 3] = True
    found = shapes._annotation(1, 1, 1, mask)["segmentation"]
    assert found == {"size": [8, 10], "counts": [0, 1, 28, 1, 50]}


# ---- the folder


def test_folder_is_made_once(tmp_path, monkeypatch, few):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = shapes.folder(at(None))
    assert root == tmp_path / f"cache/mpvg_kernels/shapes-{shapes.VERSION}" and [*root.parent.iterdir()] == [root]
    monkeypatch.setattr(shapes, "write", None)
    assert shapes.folder(at(None)) == shapes.folder(at(root)) == root
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/.cache").mkdir(parents=True)
    shutil.move(tmp_path / "cache/mpvg_kernels", tmp_path / "home/.cache")
    assert shapes.folder(at(None)).parts[-3:-1] == (".cache", "mpvg_kernels")


def test_an_empty_folder_is_filled(tmp_path, few):
    assert shapes.folder(at(tmp_path)) == tmp_path
    assert (tmp_path / "shapes.json").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whole_or_not_at_all(tmp_path, monkeypatch, few, error):
    draw = shapes.draw

    def fail(split, index):
        if split == "val":
            raise error
        return draw(split, index)

    monkeypatch.setattr(shapes, "draw", fail)
    with pytest.raises((InputError, KeyboardInterrupt)) as raised:
        shapes.folder(at(tmp_path / "root"))
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert "(No space left on device): set data.root to a folder that can be written" in str(raised.value)


def test_several_processes_at_once(tmp_path, monkeypatch, few):
    """Each writes its own; the first one's stays."""
    write, together = shapes.write, threading.Barrier(3)
    monkeypatch.setattr(shapes, "write", lambda *args: (together.wait(60), write(*args)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(shapes.folder(at(tmp_path / "root")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "root"] * 3 and list(tmp_path.iterdir()) == [tmp_path / "root"]


def spoil(root, how: str) -> None:
    match how:
        case "another data set":
            shutil.rmtree(root)
            (root / "train").mkdir(parents=True)
        case "a file":
            shutil.rmtree(root)
            root.write_text("x")
        case "no image":
            (root / "images/val/0002.png").unlink()
        case "no annotations":
            (root / "annotations/instances_train.json").unlink()
        case "no note":
            (root / "shapes.json").unlink()
        case "another version":
            (root / "shapes.json").write_text(json.dumps({"version": 0, "sizes": SIZES}))


@pytest.mark.parametrize(
    "how, said",
    [
        ("another data set", "holds something else than the scenes of data.name=shapes"),
        ("a file", "holds something else than the scenes of data.name=shapes"),
        ("no note", "holds something else than the scenes of data.name=shapes"),
        ("no image", "has 3 of 4 files in images/val: delete the folder"),
        ("no annotations", "has no annotations/instances_train.json: delete the folder"),
        ("another version", f"has version 0 of the scenes, and this is version {shapes.VERSION}: delete the folder"),
    ],
)
def test_another_folder_is_left_alone(tmp_path, written, how, said):
    root = tmp_path / "root"
    shutil.copytree(written, root)
    spoil(root, how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        shapes.folder(at(root))
    assert str(error.value).startswith(f"{root} {said}") and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_can_not_be_made(tmp_path, few):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be made in .*file/root \(.*\): set data.root"):
        shapes.folder(at(tmp_path / "file/root"))


# ---- the recipes

RECIPES = ("shapes_detection", "shapes_segmentation")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name, key, least", [("shapes_detection", "box_ap50", 30), ("shapes_segmentation", "miou", 20)]
)
def test_recipes_learn(written, one_thread, name, key, least):
    """A few images within a few updates: classes, too, as knowing the background alone is a mean IoU of 12 %."""
    recipe = recipes.load(name)
    data = dataclasses.replace(recipe.data, root=str(written), workers=0, epoch_updates=60)
    sched = dataclasses.replace(recipe.sched, warmup_epochs=0, warmup_updates=4)
    trainer = loop.Trainer(dataclasses.replace(recipe, device="cpu", epochs=1, batch=4, data=data, sched=sched))
    loop.train_mode(trainer.model, trainer.config)
    batches = trainer.data.train_batches(1)
    for _ in range(60):
        trainer.update(batches)
    with contextlib.closing(trainer.task.open_split("train", trainer.device)) as split, torch.no_grad():
        found = trainer.task.measure(trainer.model.eval(), split, trainer.world, trainer.device)
    assert found[key] > least


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RECIPES)
def test_stated_figures(tmp_path, name):
    """The whole recipe reaches what its docstring states; minutes."""
    run = loop.train(dataclasses.replace(recipes.load(name), device="cpu"), tmp_path / "run", name)
    last, said = metrics.read_log(run.path, "epoch")[-1], " ".join(recipes.describe(name).split())
    stated = re.findall(r"(box AP|mask AP|mean IoU) ([\d.]+) %", said)
    keys = {"box AP": "test_box_ap", "mask AP": "test_mask_ap", "mean IoU": "test_miou"}
    assert stated and all(abs(last[keys[figure]] - float(value)) < 3 for figure, value in stated)
