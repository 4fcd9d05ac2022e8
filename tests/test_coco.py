"""COCO's format: finding files, what is wrong with them, masks, augmentation, keys."""

import json
import shutil

import coco_files
import numpy as np
import pytest
import torch
from coco_files import counts, rectangle, small, split, write
from PIL import Image
from pycocotools import mask as rle
from torchvision import tv_tensors

from mpvg_kernels.train import InputError, TrainingError, config
from mpvg_kernels.train.data import coco, shapes
from mpvg_kernels.train.data.images import UnreadableImage
from mpvg_kernels.train.distributed import World

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_files.write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def changed(tmp_path):
    """A function that writes a split of three images whose JSON was changed by a function, and reads it."""

    def get(change):
        content = split(tmp_path / "images", tmp_path / "images" / "some.json", 3)
        content = change(content) or content
        write(tmp_path / "images" / "some.json", content)
        return coco.Coco(tmp_path / "images" / "some.json", [tmp_path / "images"])

    return get


# ---- finding the files


@pytest.mark.parametrize(
    "file, folder, options",
    [
        ("annotations/instances_{}2017.json", "{}2017", {}),
        ("annotations/instances_{}2014.json", "images/{}2014", {}),
        ("annotations/instances_{}.json", "images/{}", {}),
        ("annotations/instances_{}.json", "{}", {}),
        ("annotations/instances_{}.json", "images", {}),
        ("{}/_annotations.coco.json", "{}", {}),
        ("{}.json", "images", {"annotations": "{}.json"}),
        ("{}.json", "{}_pictures", {"annotations": "{}.json", "images": "{}_pictures"}),
    ],
)
def test_layouts(tmp_path, file, folder, options):
    names = {"train": "train", "val": "valid" if "_annotations" in file else "val"}
    for i, name in enumerate(names.values()):
        split(tmp_path / folder.format(name), tmp_path / file.format(name), 4 + (folder == "images"), seed=i)
    more = [
        text
        for part, name in names.items()
        for field, value in options.items()
        for text in (f"--data.{part}_{field}", value.format(name))
    ]
    data = coco.CocoData(small(tmp_path, *more), CPU)
    assert (data.train_size, data.test_split.size) == (len(data.train.coco), 4 + (folder == "images"))
    assert data.class_names == ["blue", "red"] and data.num_classes == 2
    assert data.train.coco.folder == tmp_path / folder.format("train")
    assert data.test_split.name(0) == str(tmp_path / folder.format(names["val"]) / "000.png")


def test_years_side_by_side(tmp_path):
    """2017's images are not looked for in 2014's folder, where others have the same names."""
    for year in ("2014", "2017"):
        split(tmp_path / f"train{year}", tmp_path / "annotations" / f"instances_train{year}.json", 4)
    found = coco.find(small(tmp_path), "train")
    assert found.folder.name == "train2017" and found.file.name == "instances_train2017.json"
    older = ("--data.train_annotations", "annotations/instances_train2014.json")
    assert coco.find(small(tmp_path, *older), "train").folder.name == "train2014"


@pytest.mark.parametrize(
    "options, message",
    [
        ((), r"config field data.train_split is 'train', but .* has none of the files annotations/instances_train2017"),
        (("--data.train_annotations", "a.json"), r"none of the files a.json; expected one, or data.train_annotations"),
        (("--data.root", "/nowhere"), "config field data.root is '/nowhere', where there is no folder"),
        (("--data.root", "None"), "config field data.root is None, expected the folder of a data set"),
        (("--data.name", "masks"), "config field data.name is 'masks', expected coco or shapes for task detection"),
    ],
)
def test_files_that_are_not_there(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        coco.CocoData(small(tmp_path, *options), CPU)


def test_images_that_are_not_there(root, tmp_path):
    shutil.copytree(root / "annotations", tmp_path / "annotations")
    (tmp_path / "train2017").mkdir()
    with pytest.raises(InputError, match=r"instances_train2017.json, such as 000.png, are not in .*/train2017 or "):
        coco.find(small(tmp_path), "train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "can't be read .no JSON: "),
        ("\ufeff[]", "has no list images and annotations and categories; expected annotations in COCO's format"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "has no list annotations;"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no images"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1}]}',
            "has a category without a number as id or a name",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            r"has categories that share an id or a name, expected each once: \[1, 'a'\], \[2, 'a'\]",
        ),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(InputError, match=f"some.json {message}"):
        coco.Coco(tmp_path / "some.json", [tmp_path])


def test_classes_that_differ(root, tmp_path):
    shutil.copytree(root, tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    write(file, content | {"categories": [*content["categories"], {"id": 9, "name": "green"}]})
    with pytest.raises(InputError, match=r"instances_val2017.json has categories that are none of .* 2 classes: green"):
        coco.CocoData(small(tmp_path / "coco"), CPU)
    write(file, content | {"categories": content["categories"][:1]})
    with pytest.raises(InputError, match=r"val2017.json lacks categories of .*train2017.json, expected the same: blue"):
        coco.CocoData(small(tmp_path / "coco"), CPU)
    with pytest.raises(InputError, match=r"data.num_classes is 5, expected 2, the categories of"):
        coco.CocoData(small(root, "--data.num_classes", 5), CPU)
    # A split that is opened for a run may lack classes, and has the run's labels.
    found = coco.open_coco(small(tmp_path / "coco"), "validation", CPU, class_names=["green", "red", "blue"])
    assert found.class_names == ["green", "red", "blue"] and found.coco.category_ids == [None, 7, None]
    assert set(found.coco.labels.tolist()) == {1}
    with pytest.raises(InputError, match="categories that are none of the run's 1 classes: red"):
        coco.open_coco(small(tmp_path / "coco"), "validation", CPU, class_names=["blue"])


def test_open_other_images(root, tmp_path):
    split(tmp_path / "own", tmp_path / "own.json", 3)
    found = coco.open_coco(small(root), "", CPU, images=tmp_path / "own", annotations=tmp_path / "own.json")
    assert found.size == 3 and found.image(1).mode == "RGB"
    with pytest.raises(InputError, match="own was given without annotations, expected COCO's JSON file too"):
        coco.open_coco(small(root), "", CPU, images=tmp_path / "own")
    with pytest.raises(InputError, match="--split is 'test', but .* has none of the files"):
        coco.open_coco(small(root), "test", CPU)


# ---- what is wrong with images and annotations


def first(content):
    return content["annotations"][0]


def make(field, value):
    """Change that field of the first annotation."""
    return lambda content: first(content).__setitem__(field, value)


RLE_OF_OTHERS = {"size": [3, 3], "counts": [4, 5]}
SHAPELESS = "objects without a mask, whose box is taken for it"


@pytest.mark.parametrize(
    "change, reason, annotations, trained",
    [
        (make("bbox", [2, 2, 0, 5]), "boxes thinner than a pixel", 0, -1),
        (make("bbox", [2, 2, 5, -4]), "boxes thinner than a pixel", 0, -1),
        (make("bbox", [2, 2, 0.9, 9]), "boxes thinner than a pixel", 0, -1),
        (make("bbox", [500, 2, 9, 9]), "boxes outside of their image", 0, -1),
        (make("bbox", [-9, -9, 9.5, 20]), "boxes outside of their image", 0, -1),
        (make("bbox", [-5, 2, 20, 20]), "boxes that reach out of their image, clipped", 0, 0),
        (make("bbox", [-0.5, 0, 20, 20]), None, 0, 0),
        (make("bbox", []), "annotations without image_id, category_id or a box of four numbers", -1, -1),
        (make("bbox", [1, 2, 3, "4"]), "annotations without image_id, category_id or a box of four numbers", -1, -1),
        (make("bbox", [1, 2, 3, float("nan")]), "annotations without image_id, category_id or a box of four", -1, -1),
        (make("bbox", None), "annotations without image_id, category_id or a box of four numbers", -1, -1),
        (make("image_id", 999), "annotations of images that are not listed", -1, -1),
        (make("category_id", 999), "annotations of categories that are not listed", -1, -1),
        (make("iscrowd", 1), None, 0, -1),
        (make("segmentation", []), SHAPELESS, 0, 0),
        (make("segmentation", None), SHAPELESS, 0, 0),
        (make("segmentation", [[1, 2, 3, 4]]), SHAPELESS, 0, 0),
        (make("segmentation", [[1, 2, 3, 4, 5, None]]), SHAPELESS, 0, 0),
        (make("segmentation", [[1, 2, 3, 4, 5, 1e9]]), SHAPELESS, 0, 0),
        (make("segmentation", [1, 2, 30, 4, 5, 40]), None, 0, 0),
        (make("segmentation", RLE_OF_OTHERS), "masks of another size than their image", -1, -1),
        (lambda c: first(c).pop("segmentation") and None, SHAPELESS, 0, 0),
        (lambda c: first(c).pop("area") and None, None, 0, 0),
        (make("area", 10**400), None, 0, 0),
        (lambda c: c["annotations"].append("nothing"), "annotations without image_id, category_id or a box", 0, 0),
        (lambda c: c["images"].append({"id": 9}), "images without id, file_name, width or height", 0, 0),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 9, "height": "64"}),
            "images without id, file_name",
            0,
            0,
        ),
        (lambda c: c["images"][0].update(height=float(c["images"][0]["height"])), None, 0, 0),
        (lambda c: c["images"].append(c["images"][0]), "images with the id of another", 0, 0),
        *(
            (lambda c, value=value: c["images"].append({**c["images"][0], "id": 9} | value), said, 0, 0)
            for value, said in [
                ({"id": 2**63}, "images without id"),
                ({"width": 10**30}, "images without id"),
                ({"width": 1e308}, "images without id"),
                ({"file_name": "a\0/b.png"}, "images that are not in"),
                ({"file_name": "\ud800/b.png"}, "images that are not in"),
            ]
        ),
        (
            lambda c: c["images"].insert(0, {**c["images"][0], "id": 9, "file_name": "x" * 300}),
            "images that are not",
            0,
            0,
        ),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 9, "file_name": "no.png"}),
            "images that are not in",
            0,
            0,
        ),
    ],
)
def test_what_is_left_out(changed, capsys, change, reason, annotations, trained):
    whole = changed(lambda content: None)
    whole.warn()
    assert capsys.readouterr().err == ""
    found = changed(change)
    assert len(found.labels) - len(whole.labels) == annotations
    assert int(found.trained.sum()) - int(whole.trained.sum()) == trained
    found.warn()
    said = capsys.readouterr().err
    assert (f"mpvg: warning: {found.file} has 1 {reason}" in said) if reason else not said
    for image in range(len(found)):
        target = found.target(image)
        height, width = found.sizes[image].tolist()
        limit = torch.tensor([width, height, width, height])
        assert ((target["boxes"] >= 0) & (target["boxes"] <= limit)).all()
        assert target["masks"].flatten(1).any(1).all() and (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


def test_one_warning_counts_and_names_the_first(changed, capsys):
    def change(content):
        for each in content["annotations"]:
            each["bbox"] = [0, 0, 0, 0]
        content["images"].pop()

    found = changed(change)
    found.warn()
    said = capsys.readouterr().err
    of_last = sum(each["image_id"] == 52 for each in json.loads(found.file.read_text())["annotations"])
    assert said.count("\n") == 1 and f"{of_last} annotations of images that are not listed" in said
    assert "boxes thinner than a pixel (annotation 1, annotation 2, annotation 3, ...)" in said


def test_images_without_objects(root, tmp_path):
    shutil.copytree(root, tmp_path / "coco")
    for part in ("train", "val"):
        file = tmp_path / "coco" / "annotations" / f"instances_{part}2017.json"
        content = json.loads(file.read_text())
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] not in (50, 53)]
        for each in content["annotations"]:
            each["iscrowd"] = int(each["image_id"] == 52)
        write(file, content)
    data = coco.CocoData(small(tmp_path / "coco"), CPU)
    assert data.train_size == 5 and data.test_split.size == 5
    assert [data.name(i)[-7:] for i in range(5)] == ["001.png", "004.png", "005.png", "006.png", "007.png"]
    assert all(len(data.train[i][1]["labels"]) for i in range(5))
    assert len(data.test_split.truth(0)["labels"]) == len(data.test_split.truth(2)["labels"]) == 0
    content["annotations"] = []
    write(tmp_path / "coco" / "annotations" / "instances_train2017.json", content)
    with pytest.raises(InputError, match="train2017.json has no object to train on, in images that are there"):
        coco.CocoData(small(tmp_path / "coco"), CPU)


TURNED = Image.Exif()
TURNED[0x112] = 6


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "truncated|Truncated|broken|incomplete"),
        (lambda file: file.write_text("no"), "^not an image$"),
        (lambda file: Image.new("RGB", (5, 7)).save(file), "^it has 5x7 pixels, expected .*instances_.*.json says$"),
        (
            lambda file: Image.new("RGB", (5, 7)).save(file, exif=TURNED),
            r"says \(its EXIF orientation, 6, is left aside",
        ),
        (lambda file: file.unlink(), "No such file"),
    ],
)
def test_images_that_are_found_out_later(root, tmp_path, spoil, reason):
    shutil.copytree(root, tmp_path / "coco")
    data = coco.CocoData(small(tmp_path / "coco", "--data.max_bad_share", 0.2), CPU)
    for part in ("train", "val"):
        spoil(tmp_path / "coco" / f"{part}2017" / "003.png")
    with pytest.raises(UnreadableImage, match=reason):
        data.train[3]
    batches = list(data.train_batches(1))
    assert [len(batch.x) for batch in batches] == [4, 4] and all(batch.y[0]["labels"].numel() for batch in batches)
    weights = [float(weight) for _, _, weight in data.test_batches()]
    assert weights == [1, 1, 1, 0, 1]
    bad = data.take_bad()
    assert [(each["file"][-15:], each["epoch"]) for each in bad] == [("ain2017/003.png", 1), ("val2017/003.png", None)]
    assert data.take_bad() == []
    strict = coco.CocoData(small(root, "--data.root", tmp_path / "coco", "--data.max_bad_share", 0.1), CPU)
    if spoil.__code__.co_names[0] != "unlink":  # which is found at the start then
        with pytest.raises(TrainingError, match="1 of the 8 training images .* are known to be unreadable"):
            list(strict.train_batches(1))


@pytest.mark.parametrize("text", ["11", "", "PPP", "WHOLE1P", "1\x7f", "é", 5, None, [5, 5], [1, -1], ["a"]])
def test_broken_run_lengths(changed, text):
    """With an RLE of another number of pixels pycocotools compares masks for ever, or reads what is not its own."""

    def change(content):
        size = [content["images"][0]["height"], content["images"][0]["width"]]
        spoilt = text
        if text == "WHOLE1P":  # all pixels, and a number that does not end
            whole = rle.encode(np.zeros(size, np.uint8, order="F"))
            spoilt = whole["counts"].decode() + "P"
        first(content)["segmentation"] = {"size": size, "counts": spoilt}

    found = changed(change)
    assert list(found.left_out) == ["masks that are no RLE of their image's pixels"]


def test_run_lengths():
    draw = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        mask = np.asfortranarray(draw.random((70, 90)) < share, dtype=np.uint8)
        mask[10:60, 5:80] = draw.integers(2)
        edges = np.flatnonzero(np.diff(mask.T.reshape(-1))) + 1
        runs = np.diff([0, *edges, mask.size]).tolist()
        assert coco.run_lengths(rle.encode(mask)["counts"].decode()) == ([0] * int(mask[0, 0]) + runs)


# ---- masks and boxes


@pytest.mark.parametrize("kind", ["polygon", "uncompressed", "compressed", "two parts"])
def test_masks(changed, kind):
    def change(content):
        image, each = content["images"][0], first(content)
        size = image["height"], image["width"]
        x, y, w, h = each["bbox"]
        if kind == "two parts":
            each["segmentation"] = rectangle(x, y, w, 4) + rectangle(x, y + 4, w, h - 4) + [[1, 2]]
        elif kind != "polygon":
            each["segmentation"] = counts(each["bbox"], size)
        if kind == "compressed":
            packed = rle.frPyObjects(each["segmentation"], *size)
            each["segmentation"] = {"size": list(size), "counts": packed["counts"].decode()}

    found = changed(change)
    target = found.target(0)
    height, width = found.sizes[0].tolist()
    for box, mask in zip(target["boxes"].long().tolist(), target["masks"], strict=True):
        expected = torch.zeros(height, width, dtype=torch.uint8)
        expected[box[1] : box[3], box[0] : box[2]] = 1
        assert torch.equal(mask, expected)
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64


def test_labels_are_in_the_order_of_ids(root):
    found = coco.find(small(root), "train")
    content = json.loads(found.file.read_text())
    ids = [each["category_id"] for each in content["annotations"]]
    assert found.class_names == ["blue", "red"] and [found.category_ids[i] for i in found.labels] == ids


# ---- transforms


def fields(**changes):
    found = config.Detection(short_sides=(90, 130), max_side=170, crop_short_sides=(100,), crop_sides=(50, 80))
    return config.Config(task="detection", detection=config.dataclasses.replace(found, **changes))


PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def sample(height=80, width=120):
    """An image whose objects have colours of their own, with their boxes and masks."""
    boxes = torch.tensor([[10, 20, 50, 60], [30, 5, 110, 70], [0, 0, 30, 80]]).float()
    pixels, masks = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (left, top, right, bottom) in enumerate(boxes.long().tolist()):
        masks[i, top:bottom, left:right] = 1
        pixels[i, top:bottom, left:right] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(3),
        "masks": tv_tensors.Mask(masks),
    }
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), target


def test_boxes_and_masks_go_with_the_image():
    """Each object's mask, its box and what has its colour stay the same pixels, whatever is drawn."""
    transform, sizes, lost, flips = coco.TrainTransform(fields(final_crop=(100, 140)), PLAIN), set(), 0, set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transform(*sample())
        sizes.add(image.shape)
        height, width = image.shape[-2:]
        assert height <= 100 and width <= 140 and image.dtype == torch.float32
        assert all(type(value) is torch.Tensor for value in (image, *target.values()))
        assert target["masks"].shape == (len(target["boxes"]), height, width)
        assert len(target["labels"]) == len(target["boxes"])
        lost += 3 - len(target["labels"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            assert (box[2:] - box[:2] >= 1).all() and (box >= 0).all() and box[2] <= width and box[3] <= height
            y, x = mask.nonzero().unbind(1)
            tight = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            # A pixel of the mask is up to 130 / 50 after the last resize.
            assert (tight - box).abs().max() <= 2.6, (seed, tight, box)
            assert ((image[label] > 0.5) != mask.bool()).float().mean() < 0.03
        flips.add(len(target["labels"]) == 3 and bool(target["boxes"][2, 2] > width - 1))
    assert len(sizes) > 12 and lost > 0 and flips == {True, False}


def test_a_crop_may_lose_all_objects():
    transform = coco.TrainTransform(fields(crop_prob=1.0, crop_sides=(8, 8), short_sides=(16,)), PLAIN)
    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = sample()
        target["masks"], target["labels"] = tv_tensors.Mask(target["masks"][:1]), target["labels"][:1]
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"][:1], format="XYXY", canvas_size=(80, 120))
        x, target = transform(image, target)
        assert x.shape == (3, 16, 16) and target["masks"].shape == (len(target["labels"]), 16, 16)
        found.append(len(target["labels"]))
    assert set(found) == {0, 1}


def test_sides_are_those_of_the_config():
    transform = coco.TrainTransform(fields(crop_prob=0.0, final_crop=None), PLAIN)
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        sizes.add(tuple(transform(*sample())[0].shape[-2:]))
    assert sizes == {(90, 135), (113, 170)}  # 130 is too much for the longer side
    transform = coco.TrainTransform(fields(crop_prob=1.0, short_sides=(90,), final_crop=None), PLAIN)
    ratios = set()
    for seed in range(30):
        torch.manual_seed(seed)
        height, width = transform(*sample())[0].shape[-2:]
        assert min(height, width) == 90 and max(height, width) <= 90 * 80 / 50 + 1
        ratios.add(width / height)
    assert min(ratios) < 0.8 and max(ratios) > 1.25


def test_masks_are_sampled_at_pixel_centres():
    """A mask that is made smaller has the pixel that each new one's centre is in."""
    image, target = sample()
    target["masks"] = tv_tensors.Mask(torch.arange(80 * 120).view(1, 80, 120) % 251)
    _, target = coco.RandomShortSide((50,), 1000)(image, target)
    rows, columns = ((torch.arange(n) + 0.5) * 1.6 for n in (50, 75))
    expected = (rows.long()[:, None] * 120 + columns.long()) % 251
    assert torch.equal(target["masks"][0], expected)


def test_held_out_images_keep_their_ratio(root):
    data = coco.CocoData(small(root), CPU)
    for i, (x, y, weight) in enumerate(data.test_batches()):
        height, width = data.test_split.coco.sizes[i].tolist()
        scale = min(64 / min(height, width), 96 / max(height, width))
        assert x[0].shape == (3, int(height * scale + 0.5), int(width * scale + 0.5))
        assert y == [{"image": i, "size": (height, width)}] and weight.tolist() == [1]
    assert data.preprocessing == {
        "input_size": (3, 64, 96),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "short_side": 64,
        "long_side": 96,
    }


# ---- keys


def images_of(data, epoch=2):
    return [
        (image, target) for batch in data.train_batches(epoch) for image, target in zip(batch.x, batch.y, strict=True)
    ]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and all(torch.equal(s[key], t[key]) for key in s) for (x, s), (y, t) in zip(a, b, strict=True)
    )


def test_images_depend_on_their_key_alone(root):
    """Not on worker processes, what was loaded before, the global streams or the number of processes."""
    plain = images_of(coco.CocoData(small(root), CPU))
    torch.manual_seed(5)
    workers = coco.CocoData(small(root, "--data.workers", 2), CPU)
    assert same(images_of(workers), plain) and not same(images_of(workers, 1), plain)
    assert len(list(workers.test_batches())) == 5
    assert same(images_of(workers), plain)
    workers.close()
    shares = [images_of(coco.CocoData(small(root), CPU, World(rank, 2))) for rank in (0, 1)]
    assert same([each for pair in zip(*shares, strict=True) for each in pair], plain)
    (entered,) = coco.CocoData(small(root), CPU).train_batches(2, start=1)
    assert same(list(zip(entered.x, entered.y, strict=True)), plain[4:])
    assert not same(images_of(coco.CocoData(small(root, "--seed", 1), CPU)), plain)


@pytest.mark.parametrize("most, expected", [(None, [0, 1, 2, 3, 4]), (2, [0, 2]), (9, [0, 1, 2, 3, 4])])
def test_processes_share_held_out_images(root, most, expected):
    found = []
    for rank in (0, 1, 2):
        data = coco.CocoData(small(root, "--data.max_test_images", most, "--batch", 6), CPU, World(rank, 3))
        found.append([int(y[0]["image"]) for _, y, _ in data.test_batches()])
    assert len({len(each) for each in found}) == 1
    assert sorted(i for each in found for i in each if i >= 0) == expected


def test_shapes(tmp_path, monkeypatch):
    """data.name=shapes reads what is made there as COCO's format."""
    monkeypatch.setattr(shapes, "folder", lambda config: coco_files.write_coco(tmp_path))
    assert coco.CocoData(small(tmp_path, "--data.name", "shapes", "--data.root", "None"), CPU).train_size == 8
