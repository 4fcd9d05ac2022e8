"""Label maps as training data: folders and pairs, what values mean, crops that stay aligned, bad files."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from mask_folders import CLASSES, COLOURS, colours, draw, make
from PIL import Image

from mpvg_kernels.train import InputError, TrainingError
from mpvg_kernels.train.config import Config, Data, Segmentation, from_args
from mpvg_kernels.train.data import label_maps
from mpvg_kernels.train.data.images import UnreadableImage
from mpvg_kernels.train.data.label_maps import LabelMaps, MaskData, TrainTransform, class_names, open_maps, pair
from mpvg_kernels.train.data.order import seed_cpu
from mpvg_kernels.train.distributed import World

CPU = torch.device("cpu")


def config(root, **fields) -> Config:
    data = {"name": "masks", "root": root and str(root), "img_size": (32, 32), "workers": 0, "max_bad_share": 0.5}
    own = {"short_side": 40, "long_side": 160, "photometric": False}
    own |= {k: v for k, v in fields.items() if hasattr(Segmentation, k)}
    data |= {k: v for k, v in fields.items() if hasattr(Data, k)}
    rest = {k: v for k, v in fields.items() if k not in own and k not in data}
    return Config(
        **{"task": "segmentation", "batch": 4, "data": Data(**data), "segmentation": Segmentation(**own), **rest}
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("masks"))


def write(folder, name, labels, mode=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels), mode).save(folder / name)


# ---- folders


@pytest.mark.parametrize(
    ("images", "maps"),
    [
        ("images/training", "annotations/training"),
        ("images/train", "labels/train"),
        ("train/images", "train/masks"),
        ("pictures/a", "maps/b"),
    ],
)
def test_layouts(tmp_path, images, maps):
    more = {"train_images": images, "train_annotations": maps} if images.startswith("pictures") else {}
    for inside, label in ((".", 0), ("deep", 3)):
        write(tmp_path / images / inside, "x.jpg", np.zeros((40, 40, 3), np.uint8))
        write(tmp_path / maps / inside, "x.png", np.full((40, 40), label, np.uint8))
    split = open_maps(config(tmp_path, num_classes=5, **more), "train", CPU)
    assert split.size == 2 and split.num_classes == 5 and split.class_names is None
    found = {split.name(i): int(split.truth(i)["label_map"][0, 0]) for i in (0, 1)}
    assert found == {str(tmp_path / images / "x.jpg"): 0, str(tmp_path / images / "deep/x.jpg"): 3}


def test_what_has_no_partner_is_left_out_and_said(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "c.png"):
        write(tmp_path / "i", name, np.zeros((4, 4, 3), np.uint8))
    for name in ("b.png", "c.png", "d.png"):
        write(tmp_path / "m", name, np.zeros((4, 4), np.uint8))
    told = []
    pairs = pair(tmp_path / "i", tmp_path / "m", told.append)
    assert [(image.name, labels.name) for image, labels in pairs] == [("b.jpg", "b.png"), ("c.jpg", "c.png")]
    assert len(told) == 1
    for words in (
        "1 times: image without a label map (a.jpg)",
        "1 times: label map without an image (d.png)",
        "1 times: file with another's name (c.png)",
    ):
        assert words in told[0]
    with pytest.raises(InputError, match=r"no image in .*i \(3 of .*\) has a label map in .*z \(0 of"):
        (tmp_path / "z").mkdir()
        pair(tmp_path / "i", tmp_path / "z", told.append)


def test_ade20k_names(tmp_path):
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t2\t3\twall", "2\t0.1\t2\t3\tbuilding, edifice"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    assert class_names(tmp_path) == ["wall", "building"]
    with pytest.raises(InputError, match="reduce_zero_label is False, expected True for ADE20K"):
        label_maps._classes(config(tmp_path))
    assert label_maps._classes(config(tmp_path, reduce_zero_label=True)) == (2, ["wall", "building"])
    (tmp_path / "objectInfo150.txt").write_text("\n".join([*rows, "3\t0\t0\t0\tbuilding, shop"]))
    assert class_names(tmp_path) == ["wall", "building, edifice", "building, shop"]
    (tmp_path / "classes.txt").write_text("a\nb\n\n")
    assert class_names(tmp_path) == ["a", "b"]
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(InputError, match="has the name 'a' twice"):
        class_names(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfa\nb")  # as Windows writes it
    assert class_names(tmp_path) == ["a", "b"]
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="classes.txt can't be read .*, expected a class's name on each line"):
        class_names(tmp_path)
    (tmp_path / "classes.txt").unlink()
    for broken in (b"", b"\xff", "\n".join([*rows, "3"]).encode()):
        (tmp_path / "objectInfo150.txt").write_bytes(broken)
        with pytest.raises(InputError, match="objectInfo150.txt can't be read, expected ADE20K's table"):
            class_names(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mask"}, "data.name is 'mask', expected masks or shapes for task segmentation; did you mean 'masks'"),
        ({"root": None}, "data.root is None, expected the folder"),
        ({"root": "/nowhere"}, "data.root is '/nowhere', where there is no folder"),
        (
            {"val_split": "test"},
            "data.val_split is 'test', but .* none of the folders images/test, test/images; expected",
        ),
        ({"val_annotations": "nothing"}, "data.val_annotations is 'nothing', expected a folder in"),
        ({"num_classes": 7}, "data.num_classes is 7, expected 4"),
        ({"ignore_label": 3}, "ignore_label is 3, which is one of the 4 classes' labels; expected more than 3"),
        ({"reduce_zero_label": True, "ignore_label": 4}, "ignore_label is 4, .* expected more than 4"),
        ({"batch": 13}, "batch is 13, expected at most the 12 training images"),
    ],
)
def test_bad_configs(root, fields, message):
    with pytest.raises(InputError, match=message):
        MaskData(config(fields.pop("root", root), **fields), CPU)


def test_no_class_names(tmp_path):
    make(tmp_path / "a", 4, 2)
    (tmp_path / "a" / "classes.txt").unlink()
    with pytest.raises(InputError, match="num_classes is None, expected a number, as .* has no classes.txt"):
        MaskData(config(tmp_path / "a"), CPU)
    assert MaskData(config(tmp_path / "a", num_classes=4), CPU).class_names is None


def test_classes_of_a_run(root, tmp_path):
    names = ["red", "green", "blue", "yellow"]
    assert open_maps(config(root), "validation", CPU, class_names=names).class_names == names
    with pytest.raises(InputError, match=r"other classes than the run: 4, not 4 \(red\); did you mean 'rad'"):
        open_maps(config(root), "validation", CPU, class_names=["rad", *names[1:]])
    with pytest.raises(InputError, match="the same in another order"):
        open_maps(config(root), "validation", CPU, class_names=names[::-1])
    folders = {"images": root / "images" / "val", "annotations": root / "masks" / "val"}
    elsewhere = config(tmp_path, num_classes=4)
    assert open_maps(elsewhere, "validation", CPU, class_names=names, **folders).size == 5
    with pytest.raises(InputError, match="expected both or none"):
        open_maps(elsewhere, "validation", CPU, images=folders["images"])


# ---- what the values mean


def grey_png(path, bits: int, rows: list[bytes], width: int) -> None:
    """A PNG of grey values of less than 8 bits, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def read(path, num_classes=200, **fields) -> torch.Tensor:
    maps = LabelMaps([(path, path)], config(path.parent, num_classes=num_classes, **fields), num_classes, "RGB")
    return maps.labels(0)


def test_kinds_of_label_maps(tmp_path):
    path = tmp_path / "x.png"
    labels = np.array([[0, 1, 2], [3, 150, 255]], np.uint8)
    Image.fromarray(labels).save(path)
    assert read(path).tolist() == [labels.tolist()] and read(path).dtype == torch.uint8
    palette = Image.fromarray(labels, "P")
    palette.putpalette([7 * i % 256 for i in range(768)])
    palette.save(path)
    assert Image.open(path).mode == "P" and read(path).tolist() == [labels.tolist()]
    wide = np.array([[0, 300], [65535, 1]], np.uint16)
    Image.fromarray(wide).save(path)
    assert read(path, 400, ignore_label=65535).tolist() == [wide.tolist()]
    grey_png(path, 4, [bytes([0x01, 0x2F])], 4)
    assert read(path).tolist() == [[[0, 1, 2, 15]]]
    grey_png(path, 2, [bytes([0b00011011])], 4)
    assert read(path).tolist() == [[[0, 1, 2, 3]]]
    grey_png(path, 1, [bytes([0b01010000])], 4)
    assert read(path).tolist() == [[[0, 1, 0, 1]]]
    for most, values in ((4, bytes([0, 1, 4])), (254, bytes([200, 1, 254])), (1000, b"\0\3\1\x2c\3\xe8")):
        path.write_bytes(b"P5 3 1 %d\n" % most + values)  # its values are those of the file, though Pillow scales them
        depth = np.uint8 if most < 256 else ">u2"
        assert read(path, 1001, ignore_label=65535).tolist() == [[np.frombuffer(values, depth).tolist()]]


def test_reduce_zero_label(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 1, 2, 4, 255]], np.uint8)).save(path)
    assert read(path, 4, reduce_zero_label=True).tolist() == [[[255, 0, 1, 3, 255]]]
    with pytest.raises(UnreadableImage, match=f"{path} has the label 4, expected at most 3 for the 3 classes, or 255"):
        read(path, 3, reduce_zero_label=True)
    with pytest.raises(UnreadableImage, match=f"{path} has the label 4, expected at most 3 for the 4 classes"):
        read(path, 4)


def test_images_of_colours_are_refused(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(InputError, match=f"{path} is an image of colours .*RGB.*write each pixel's class as its value"):
        read(path)


# ---- transforms


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (0.5, 2.0)])
def test_image_and_labels_stay_aligned(scale):
    """A class's colour stays its colour: at every pixel where the image is not resized, else within the classes."""
    prepared = {"input_size": (3, 48, 40), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    made = config("", scale=scale, short_side=48, long_side=96)
    transform, rng, flipped, padded = TrainTransform(made, prepared), np.random.RandomState(0), 0, 0
    for i in range(30):
        labels = draw(rng, 48, 60)
        seed_cpu(0, i)
        x, y = transform(Image.fromarray(colours(labels)), torch.from_numpy(labels)[None])
        assert x.shape == (3, 48, 40) and y.shape == (48, 40) and x.dtype == torch.float32 and y.dtype == torch.uint8
        expected = torch.from_numpy(COLOURS)[y.long().clamp(max=CLASSES)].permute(2, 0, 1) / 255
        outside = (x == 0).all(0)  # no colour is black
        assert (y[outside] == 255).all()
        right = ((x - expected).abs().amax(0) < 1 / 255) | outside
        assert right.all() if scale == (1, 1) else right.float().mean() > 0.75
        padded += bool(outside.any())
        crops = [labels[:, j : j + 40] for j in range(21)]
        flipped += scale == (1, 1) and any((y.numpy() == crop[:, ::-1]).all() for crop in crops)
        assert scale != (1, 1) or any((y.numpy() == c).all() or (y.numpy() == c[:, ::-1]).all() for c in crops)
    assert bool(padded) == (scale[0] < 1) and (scale != (1, 1) or 5 < flipped < 25)


@pytest.mark.parametrize("turned", [False, True])
def test_labels_are_resized_as_the_image_is(turned):
    """A label is that of the class that the image is nearer to: no shift of half a pixel, as OpenCV's nearest has."""
    labels = torch.zeros(32, 32, dtype=torch.uint8)
    labels[:, 13:] = 1
    labels = labels.T if turned else labels
    for size in (64, 16, 20, 75):
        image, found = label_maps.RandomScale(size, size, (1, 1))(
            label_maps.tv_tensors.Image(torch.stack([labels * 200] * 3)), label_maps.tv_tensors.Mask(labels[None])
        )
        assert image.shape == (3, size, size) and found.shape == (1, size, size)
        clear = (image[0].int() - 100).abs() > 2
        assert torch.equal(found[0][clear] == 1, image[0][clear] > 100) and clear.float().mean() > 0.9


def test_a_crop_of_one_class_is_drawn_again():
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, :, 40:] = 1
    labels[:, :40] = 255

    def most(share: float) -> list[float]:
        crop, found = label_maps.ClassCrop((16, 16), share, 255), []
        for i in range(60):
            seed_cpu(0, i)
            part = crop(label_maps.tv_tensors.Mask(labels)).flatten()
            counts = torch.bincount(part[part != 255], minlength=2)
            found.append(float(counts.max() / counts.sum()) if counts.sum() else 1.0)
        return found

    few, many = (sum(share < 0.75 for share in most(limit)) for limit in (1.0, 0.75))
    assert few < 10 and many > 30
    # Where there is no such crop the last one is taken.
    assert label_maps.ClassCrop((16, 16), 0.75, 255)(label_maps.tv_tensors.Mask(labels * 0)).shape == (1, 16, 16)


def test_photometric_distortion():
    """Against mmsegmentation's definition, through Python's HSV."""
    import colorsys

    image = torch.randint(0, 256, (3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    step = label_maps.PhotometricDistortion()
    for first in (True, False):
        params = {"brightness": 20.0, "contrast": 1.3, "saturation": 1.4, "hue": 0.07, "contrast_first": first}
        found = step.transform(label_maps.tv_tensors.Image(image), params).permute(1, 2, 0).reshape(-1, 3)
        for pixel, result in zip(image.permute(1, 2, 0).reshape(-1, 3).tolist(), found.tolist(), strict=True):
            pixel = [min(value + 20.0, 255) for value in pixel]
            pixel = [min(value * 1.3, 255) for value in pixel] if first else pixel
            h, s, v = colorsys.rgb_to_hsv(*[value / 255 for value in pixel])
            pixel = [255 * value for value in colorsys.hsv_to_rgb((h + 0.07) % 1, min(1, 1.4 * s), v)]
            pixel = pixel if first else [min(value * 1.3, 255) for value in pixel]
            assert result == pytest.approx(pixel, abs=1)
    nothing = {"brightness": 0, "contrast": 1, "saturation": 1, "hue": 0, "contrast_first": True}
    assert torch.equal(step.transform(label_maps.tv_tensors.Image(image), nothing), image)
    draws = [step.make_params([]) for _ in range(200)]
    for name, same, least, most in (
        ("brightness", 0, -32, 32), ("contrast", 1, 0.5, 1.5), ("saturation", 1, 0.5, 1.5), ("hue", 0, -0.1, 0.1)
    ):  # fmt: skip
        values = [drawn[name] for drawn in draws]
        changed = [value for value in values if value != same]
        assert 60 < len(changed) < 140 and least <= min(changed) < max(changed) <= most
        assert min(changed) < least + (most - least) / 8 and max(changed) > most - (most - least) / 8


def test_held_out_images(root):
    data = MaskData(config(root, short_side=30, long_side=40, max_test_images=3), CPU)
    assert data.test_indices == [0, 1, 3] and data.test_size == data.test_split.size == 5
    assert data.preprocessing["short_side"] == 30 and data.preprocessing["input_size"] == (3, 32, 32)
    count = 0
    for [x], [target], weight in data.test_batches():
        height, width = target["label_map"].shape
        factor = min(30 / min(height, width), 40 / max(height, width))
        assert x.shape[1:] == (round(height * factor), round(width * factor)) and weight.tolist() == [1.0]
        assert target["label_map"].dtype == torch.int64
        count += 1
    assert count == 3


# ---- order and workers


def batches(data, epoch: int, start: int = 0) -> list[torch.Tensor]:
    found = [tensor.clone() for batch in data.train_batches(epoch, start) for tensor in batch]
    data.close()
    return found


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_function_of_seed_epoch_and_position(root):
    made = config(root, photometric=True)
    first = batches(MaskData(made, CPU), 2)
    assert first[0].shape == (4, 3, 32, 32) and first[1].shape == (4, 32, 32) and first[1].dtype == torch.int64
    torch.manual_seed(5)  # no global stream matters
    again = MaskData(replace(made, data=replace(made.data, workers=2)), CPU)
    assert same(first, batches(again, 2))
    assert same(first[4:], batches(MaskData(made, CPU), 2, 2))
    assert not torch.equal(first[0], batches(MaskData(made, CPU), 1)[0])
    parts = [batches(MaskData(made, CPU, World(rank, 2)), 2) for rank in (0, 1)]
    assert torch.equal(torch.stack([parts[0][0], parts[1][0]], 1).flatten(0, 1), first[0])


# ---- bad files


def test_bad_files(tmp_path, capsys):
    root = make(tmp_path / "masks", 12, 6)
    (root / "images" / "train" / "00.png").write_text("no image")
    (root / "masks" / "train" / "01.png").write_bytes((root / "masks" / "train" / "01.png").read_bytes()[:60])
    Image.new("L", (3, 4)).save(root / "masks" / "train" / "02.png")
    Image.new("RGB", Image.open(root / "images" / "train" / "03.png").size).save(root / "masks" / "train" / "03.png")
    labels = np.asarray(Image.open(root / "masks" / "train" / "04.png")).copy()
    labels[0, 0] = 77
    Image.fromarray(labels).save(root / "masks" / "train" / "04.png")
    (root / "masks" / "train" / "05.png").unlink()
    turned = Image.Exif()
    turned[0x112] = 8
    Image.open(root / "images" / "train" / "02.png").save(root / "images" / "train" / "02.png", exif=turned)
    (root / "masks" / "val" / "02.png").write_bytes(b"")
    data = MaskData(config(root), CPU)
    assert capsys.readouterr().err.count("mpvg: warning") == 1
    for epoch in (1, 2, 3, 4):
        for x, y in data.train_batches(epoch):
            assert x.shape[0] == y.shape[0] == 4
    reasons = {row["file"].rpartition("/")[2]: row["reason"] for row in data.take_bad()}
    assert reasons.keys() == {f"{i:02}.png" for i in range(5)}
    assert reasons["00.png"] == "not an image"
    assert f"label map {root / 'masks' / 'train' / '01.png'}: " in reasons["01.png"]
    assert reasons["02.png"].endswith("as its image has (its EXIF orientation, 8, is left aside: save it turned)")
    assert "has 3x4 pixels, expected" in reasons["02.png"] and "is an image of colours" in reasons["03.png"]
    assert (
        f"{root / 'masks' / 'train' / '04.png'} has the label 77, expected at most 3 for the 4 classes"
        in reasons["04.png"]
    )
    weights = [weight.item() for _, _, weight in data.test_batches()]
    assert weights == [1, 1, 0, 1, 1, 1]
    assert data.test_split.bad == [
        {"file": str(root / "images" / "val" / "02.png"), "reason": data.test_split.bad[0]["reason"]}
    ]
    (row,) = data.take_bad()
    assert row["epoch"] is None and row["position"] == 2 and data.take_bad() == []
    strict = config(root, max_bad_share=0.1)
    with pytest.raises(TrainingError, match="of the 11 training images .* are known to be unreadable"):
        list(MaskData(strict, CPU).train_batches(1))


@pytest.mark.parametrize(("values", "said"), [((0, 255), "no class but 0"), ((255,), "no class"), ((0, 1), None)])
def test_masks_of_0_and_255_are_warned_of(tmp_path, capsys, values, said):
    """All of the object would be ignored, and a model that finds none has an IoU of 100 %."""
    make(tmp_path, 4, 2)
    for file in (tmp_path / "masks" / "train").iterdir():
        labels = np.asarray(Image.open(file))
        Image.fromarray(np.array(values, np.uint8)[(labels > 1) % len(values)]).save(file)
    (tmp_path / "masks" / "train" / "03.png").write_bytes(b"")  # which is no matter of this look
    MaskData(config(tmp_path), CPU)
    text = f"mpvg: warning: 4 label maps in {tmp_path / 'masks' / 'train'} have {said} of 4, and all else is ignored: "
    warned = capsys.readouterr().err
    assert (text in warned and warned.count("\n") == 1) if said else not warned


def test_processes_share_a_split(root):
    data = config(root)
    seen = [[w.item() for *_, w in open_maps(data, "validation", CPU).batches(world=World(r, 2))] for r in (0, 1)]
    assert seen == [[1, 1, 1], [1, 1, 0]]
    assert len(list(open_maps(data, "validation", CPU).batches([4, 0]))) == 2
    [[x], [target], _] = next(iter(open_maps(data, "validation", CPU).batches([4])))
    assert torch.equal(target["label_map"], open_maps(data, "validation", CPU).truth(4)["label_map"])


def test_command_line_fields():
    args = ["--task", "segmentation", "--segmentation.drop_rate", "1"]
    with pytest.raises(InputError, match="segmentation.drop_rate is 1.0, expected 0 or more and less than 1"):
        from_args(Config(), args)
