"""The trainer's images: what depends on which key, shares of processes, decoding, what is wrong with a data set."""

import dataclasses
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from mpvg_kernels.train import InputError, TrainingError, config
from mpvg_kernels.train.data import (
    BatchAugmentation,
    Digits,
    EpochOrder,
    affine_matrices,
    create_data,
    images,
    key_seed,
    keyed_generator,
    seed_everything,
    sources,
)
from mpvg_kernels.train.data.order import accumulation, held_out
from mpvg_kernels.train.distributed import World

CPU = torch.device("cpu")
CLASSES = {"ant": 11, "bee": 13}  # images of each in the training split; 7 in the other


def change(found: config.Config, **changes) -> config.Config:
    """A config with fields changed by their names with a double underscore for the dot."""
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        if section:
            found = dataclasses.replace(
                found, **{section: dataclasses.replace(getattr(found, section), **{field: value})}
            )
        else:
            found = dataclasses.replace(found, **{name: value})
    return found


def picture(path, seed: int = 0, size=(20, 24)) -> None:
    """A JPEG or PNG whose colours tell it from the others."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def fill(root, classes=CLASSES, held_out=7):
    """A data set of small images in two folders."""
    for label, (name, count) in enumerate(classes.items()):
        for i in range(count):
            picture(root / "train" / name / f"{i}.jpg", 1000 * label + i)
        for i in range(held_out):
            picture(root / "val" / name / f"{i}.png", 1000 * label + 500 + i)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images"))


def of(root, **changes) -> config.Config:
    """A run on a folder with every random part of the augmentation on."""
    plain = config.Config(
        batch=6,
        device="cpu",
        data=config.Data("folder", str(root), img_size=(16, 16), workers=0),
        aug=config.Aug(auto_augment="rand-m9-mstd0.5-inc1"),
    )
    return change(plain, **changes)


def still(root, **changes) -> config.Config:
    """The same without augmentation: each image as a whole."""
    plain = {
        "aug__auto_augment": None,
        "aug__color_jitter": 0,
        "aug__hflip": 0,
        "aug__crop": "padded",
        "aug__padding": 0,
    }
    return of(root, **(plain | changes))


def open_data(found: config.Config, rank: int = 0, size: int = 1):
    return create_data(found, CPU, World(rank, size))


def epoch_of(found: config.Config, epoch: int = 1, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*open_data(found).train_batches(epoch, start), strict=True)
    return torch.cat(x), torch.cat(y)


# ---- keys and order


def test_keys():
    keys = [(1, 2), (12,), (1, 2, 0), (2, 1), (0,), (0, 0), (1, "order", 2), (2**40, 1), (2**32, 1)]
    assert len({key_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= key_seed(*key) < 2**63 for key in keys)
    assert key_seed(np.int64(3), 1) == key_seed(3, 1)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(1, 2)
    first = draw()
    draw()
    seed_everything(1, 2)
    assert draw() == first
    seed_everything(1, 3)
    assert not set(draw()) & set(first)
    assert torch.equal(torch.rand(3, generator=keyed_generator(1, 2)), torch.rand(3, generator=keyed_generator(1, 2)))


def order_of(n=50, batch=12, seed=0, repeats=1, world=World(), parts=1):  # noqa: B008
    return EpochOrder(n, batch, seed, repeats, world, parts)


def test_order_is_a_function_of_seed_and_epoch():
    order = order_of()
    assert (order.steps, order.micro_batch) == (4, 12)
    assert sorted(set(order.images(1))) == sorted(order.images(1)) and len(order.images(1)) == 48
    assert (order.images(3) == order_of().images(3)).all()
    for other in (order.images(2), order_of(seed=1).images(1)):
        assert (order.images(1) != other).any()
    # These very numbers: a run is resumed with what another version of numpy draws.
    assert order.images(1)[:5].tolist() == [29, 35, 37, 47, 23]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_each_update(size):
    whole = list(order_of().micro_batches(1))
    parts = [list(order_of(world=World(rank, size), parts=2).micro_batches(1)) for rank in range(size)]
    assert {len(part) for part in parts} == {6}  # three updates of two micro-batches
    for step, positions in enumerate(whole):
        mine = [np.concatenate(part[2 * step : 2 * step + 2]) for part in parts]
        assert all((each == positions[rank::size]).all() for rank, each in enumerate(mine))
        assert sorted(np.concatenate(mine)) == list(range(12 * (step + 1), 12 * (step + 2)))


def test_repeats_are_neighbours_and_an_epoch_keeps_its_length():
    order = order_of(repeats=3)
    found = order.images(1)
    assert order.steps == 4 and len(found) == 48
    assert (found.reshape(16, 3) == found[::3, None]).all() and len(set(found)) == 16
    assert (order_of(repeats=5).images(1)[:10] == np.repeat(found[:6:3], 5)).all()


@pytest.mark.parametrize(
    "batch, size, micro, expected",
    [(12, 1, None, 1), (12, 2, 6, 1), (12, 2, 5, 2), (12, 2, 2, 3), (12, 3, 100, 1), (10, 1, 4, 5), (7, 1, 1, 7)],
)
def test_micro_batches(batch, size, micro, expected):
    found = config.Config(batch=batch, dist=config.Dist(micro_batch=micro))
    assert accumulation(found, World(0, size)) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_held_out_shares(size):
    parts = [list(held_out(13, 2, World(rank, size))) for rank in range(size)]
    assert len({tuple(map(len, part)) for part in parts}) == 1
    every = np.concatenate([np.concatenate(part) for part in parts])
    assert sorted(every[every >= 0]) == list(range(13)) and (every < 0).sum() == -13 % size


@pytest.mark.parametrize("most, expected", [(5, [0, 2, 5, 7, 10]), (1, [0]), (13, range(13)), (20, range(13))])
def test_a_part_of_the_held_out_images_is_spread_over_all(most, expected):
    for size in (1, 2, 3):
        every = np.concatenate([each for r in range(size) for each in held_out(13, 2, World(r, size), most)])
        assert sorted(every[every >= 0]) == list(expected) and (every < 0).sum() == -len(expected) % size


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"aug__repeats": 3, "aug__mixup": 0.8}], ids=["plain", "repeats and mixup"])
def test_short_epochs(folder, size, changes):
    short = {"data__epoch_updates": 2, "data__max_test_images": 5, "batch": 4, **changes}
    for found in (change(config.Config(), **short), of(folder, **short)):
        parts = [open_data(found, rank, size) for rank in range(size)]
        assert parts[0].steps == 2
        assert sum(len(batch.x) for data in parts for batch in data.train_batches(1)) == 8
        assert sum(weight.sum() for data in parts for *_, weight in data.test_batches()) == 5
        whole, order = open_data(change(found, data__epoch_updates=None)), parts[0].order
        # Passes follow one another, and epochs are cut from them.
        passes = np.concatenate([whole.order.images(epoch) for epoch in (1, 2, 3)])
        epochs = np.concatenate([order.images(epoch) for epoch in range(1, 1 + len(passes) // 8)])
        assert (epochs == passes[: len(epochs)]).all() and len(epochs) > len(whole.order.images(1))
        longer = open_data(change(found, data__epoch_updates=whole.steps + 1)).order
        assert (longer.images(1) == passes[: 4 * whole.steps + 4]).all()
        for data in parts:
            data.close()


# ---- digits


def digits(rank=0, size=1, **changes) -> Digits:
    return open_data(change(config.Config(), **changes), rank, size)


STILL = config.Affine(prob=0)


def test_split_is_fixed_and_stratified():
    data = digits(seed=0)
    assert (len(data.train_index), len(data.test_index)) == (1437, 360) == (data.train_size, data.test_size)
    assert not set(data.train_index) & set(data.test_index)
    every = torch.cat([data.train_y, data.test_y]).bincount()
    assert every.sum() == 1797
    assert (data.test_y.bincount() - every / 5).abs().max() < 1
    assert (digits(seed=5).test_index == data.test_index).all()
    # The images themselves: accuracies are comparable only as long as this stays.
    found = hashlib.sha256(",".join(map(str, sorted(data.test_index))).encode()).hexdigest()[:16]
    assert found == "2b34a89618d0d4df"


def test_normalised_by_the_training_images():
    data = digits()
    x = torch.cat([x for x, _ in digits(aug__affine=STILL, batch=1437).train_batches(1)])
    assert abs(data.train_x.mean() - data.mean[0]) < 5e-4 and abs(data.train_x.std() - data.std[0]) < 5e-4
    assert abs(x.mean()) < 2e-3 and abs(x.std() - 1) < 2e-3


def digits_epoch(epoch=1, start=0, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*digits(**changes).train_batches(epoch, start), strict=True)
    return torch.cat(x), torch.cat(y)


def test_digits_are_functions_of_seed_and_epoch():
    torch.manual_seed(1)
    x, y = digits_epoch(seed=3, epoch=2)
    state = torch.get_rng_state()
    again, y_again = digits_epoch(seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global stream
    assert torch.equal(x, again) and torch.equal(y, y_again)
    for other in (dict(seed=3, epoch=3), dict(seed=2, epoch=2)):
        assert not torch.equal(digits_epoch(**other)[1], y)
    assert not torch.equal(digits_epoch(seed=3, epoch=2, aug__affine=STILL)[0], x)
    assert torch.equal(digits_epoch(seed=3, epoch=2, start=20)[0], x[20 * 64 :])


def test_an_epoch_shows_each_digit_once_with_its_label():
    data = digits(aug__affine=STILL, batch=1437)
    ((x, y),) = data.train_batches(1)
    pixels = x * data.std[0] + data.mean[0]
    shown = sorted(
        (*row.flatten().round(decimals=3).tolist(), label) for row, label in zip(pixels, y.tolist(), strict=True)
    )
    there = zip(data.train_x, data.train_y.tolist(), strict=True)
    assert shown == sorted((*row.flatten().round(decimals=3).tolist(), label) for row, label in there)
    assert [len(y) for _, y in digits(batch=64).train_batches(1)] == [64] * (1437 // 64)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_digits(size):
    x, y = digits_epoch(batch=60)
    parts = [list(digits(rank, size, batch=60, dist__micro_batch=10).train_batches(1)) for rank in range(size)]
    for rank, part in enumerate(parts):
        mine = torch.cat([batch.x for batch in part]).view(-1, 60 // size, 1, 8, 8)
        assert torch.equal(mine, x.view(-1, 60, 1, 8, 8)[:, rank::size])
        assert torch.equal(torch.cat([batch.y for batch in part]).view(-1, 60 // size), y.view(-1, 60)[:, rank::size])
        assert {len(batch.x) for batch in part} == {10}
    tests = [list(digits(rank, size, batch=42).test_batches()) for rank in range(size)]
    assert len({tuple(len(x) for x, _, _ in test) for test in tests}) == 1
    shown = torch.cat([x[weight > 0] for test in tests for x, _, weight in test])
    assert len(shown) == 360 == len({tuple(row) for row in shown.flatten(1).tolist()})


def test_repeated_digits_are_augmented_anew():
    x, y = digits_epoch(aug__repeats=2, aug__affine=config.Affine(prob=1))
    assert torch.equal(y[::2], y[1::2])
    assert not (x[::2] == x[1::2]).flatten(1).all(1).any()


def test_affine_draws_stay_in_their_range():
    aug = config.Affine(prob=1, degrees=10, translate=0.1, scale=0.2, shear=0)
    theta = affine_matrices(4000, aug, keyed_generator(0, 1))
    scale = theta[:, :, :2].det().sqrt()
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]).rad2deg()
    for value, low, high in (
        (1 / scale, 0.8, 1.2),
        (angle, -10, 10),
        (theta[:, 0, 2], -0.2, 0.2),
        (theta[:, 1, 2], -0.2, 0.2),
    ):
        spread = 0.01 * (high - low)
        assert low - 1e-4 <= value.min() <= low + spread and high - spread <= value.max() <= high + 1e-4


def test_share_of_images_that_are_changed():
    theta = affine_matrices(4000, config.Affine(prob=0.3), keyed_generator(0, 1))
    assert abs((theta != torch.eye(2, 3)).flatten(1).any(1).float().mean() - 0.3) < 0.03


# ---- images: what depends on what


def test_workers_do_not_matter(folder):
    """The same bits from this process, one and two others, also from an epoch's middle and after an evaluation."""
    x, y = epoch_of(of(folder), 2)
    assert len(x) == 24 and x.dtype == torch.float32 and x.shape[1:] == (3, 16, 16) and y.dtype == torch.int64
    for workers in (1, 2):
        data = open_data(of(folder, data__workers=workers))
        for start in (3, 0, 2):  # the first ones are given up in their middle
            found = []
            for batch in data.train_batches(2, start):
                found.append(batch)
                if start == 0 and len(found) == 2:
                    break
            assert torch.equal(torch.cat([b.x for b in found]), x[6 * start :][: 6 * len(found)])
            assert torch.equal(torch.cat([b.y for b in found]), y[6 * start :][: 6 * len(found)])
            assert len(found) == (2 if start == 0 else 4 - start)
            assert sum(weight.sum() for _, _, weight in data.test_batches()) == 14
        stale = data.train_batches(1)
        next(stale)
        next(data.test_batches())
        with pytest.raises(RuntimeError, match="given up"):
            next(stale)
        data.close()
        assert not data.loader.loader._iterator


def test_images_are_functions_of_seed_and_epoch(folder):
    x, y = epoch_of(of(folder), 2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again, _ = epoch_of(of(folder), 2)
    assert torch.equal(again, x)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    for other in (epoch_of(of(folder), 3), epoch_of(of(folder, seed=1), 2)):
        assert not torch.equal(other[1], y)
    assert not torch.equal(epoch_of(still(folder), 2)[0], x)


def test_what_is_pickled_gives_the_same(folder):
    """Worker processes that are not forked get the data set so."""
    data = open_data(of(folder))
    copy = pickle.loads(pickle.dumps(data.loader.loader.dataset))
    pickle.dumps((data.loader.loader.collate_fn, data.loader.loader.worker_init_fn))
    assert torch.equal(copy[1, 5, 3][0], data.loader.loader.dataset[1, 5, 3][0])


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_images(folder, size):
    x, y = epoch_of(of(folder))
    for rank in range(size):
        data = open_data(of(folder, dist__micro_batch=2), rank, size)
        found = list(data.train_batches(1))
        assert {len(batch.x) for batch in found} == {6 // size // data.accumulation}
        assert torch.equal(torch.cat([b.x for b in found]), x.view(4, 6, 3, 16, 16)[:, rank::size].flatten(0, 1))
        assert torch.equal(torch.cat([b.y for b in found]), y.view(4, 6)[:, rank::size].flatten())
        whole = open_data(of(folder)).files(1, 2)
        assert data.files(1, 2) == whole[rank::size] and all(map(os.path.isfile, whole))


def test_each_image_comes_once_with_its_label(folder):
    data = open_data(still(folder))
    x, y = epoch_of(still(folder))
    assert len({tuple(row) for row in x.flatten(1).tolist()}) == 24
    for step in range(4):
        names = [path.split("/")[-2] for path in data.files(1, step)]
        assert names == [data.class_names[label] for label in y[6 * step : 6 * step + 6]]
    with Image.open(data.files(1, 1)[3]) as image:
        torch.testing.assert_close(x[9], data.loader.loader.dataset.transform(image, 0)[0])


def test_repeats_are_augmented_anew(folder):
    x, y = epoch_of(of(folder, aug__repeats=3))
    x, y = x.view(8, 3, 3, 16, 16), y.view(8, 3)
    assert (y == y[:, :1]).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not (x[:, a] == x[:, b]).flatten(1).all(1).any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_held_out_image_counts_once(folder, size):
    parts = [list(open_data(of(folder), rank, size).test_batches()) for rank in range(size)]
    assert len({tuple(x.shape for x, _, _ in part) for part in parts}) == 1
    x, y, weight = (torch.cat([part[i] for each in parts for part in each]) for i in range(3))
    assert weight.dtype == torch.float32 and weight.sum() == 14 and set(weight.tolist()) <= {0.0, 1.0}
    assert len({tuple(row) for row in x[weight > 0].flatten(1).tolist()}) == 14
    assert (y[weight > 0] == 0).sum() == 7


def test_preprocessing_is_the_models_unless_it_is_given(folder):
    found = open_data(of(folder, data__img_size=None, model__name="vit_tiny_patch16_224")).preprocessing
    assert found["input_size"] == (3, 224, 224) and found["mean"] == (0.5, 0.5, 0.5) and found["crop_pct"] == 0.9
    assert open_data(of(folder, data__img_size=None, model__name="no_model_of_timm")).input_size == (3, 224, 224)
    data = open_data(of(folder, data__mean=(0.5,), data__std=(0.25,), data__crop_pct=1.0, model__channels_last=True))
    assert data.preprocessing["crop_pct"] == 1.0 and data.input_size == (1, 16, 16)
    x, y = next(data.train_batches(1))
    assert x.shape == (6, 1, 16, 16) and -2 <= x.min() and x.max() <= 2
    data = open_data(of(folder, model__channels_last=True))
    assert next(data.train_batches(1)).x.is_contiguous(memory_format=torch.channels_last)
    assert next(data.test_batches())[0].is_contiguous(memory_format=torch.channels_last)


def test_padded_crop(folder):
    whole, _ = epoch_of(still(folder))
    moved, _ = epoch_of(still(folder, aug__padding=4, data__mean=(0.0,) * 3, data__std=(1.0,) * 3))
    plain, _ = epoch_of(still(folder, data__mean=(0.0,) * 3, data__std=(1.0,) * 3))
    offsets = set()
    for image, shown in zip(plain, moved, strict=True):
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        fits = [(i, j) for i in range(9) for j in range(9) if torch.equal(padded[:, i : i + 16, j : j + 16], shown)]
        assert fits
        offsets.add(fits[0])
    assert len(offsets) > 10
    flipped, _ = epoch_of(still(folder, aug__hflip=1.0))
    assert torch.equal(flipped, whole.flip(-1))
    assert len(epoch_of(still(folder, aug__interpolation="random"))[0]) == 24


# ---- decoding


def saved(tmp_path, image: Image.Image, name: str, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def decoded(path, mode="RGB") -> np.ndarray:
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("error")
        images.silence()
        return np.asarray(images.decode(file, mode))


def test_16_bits_are_scaled(tmp_path):
    values = np.array([[0, 128, 129], [257 * 7, 65535, 40000]], dtype=np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    for name in ("a.png", "a.tif", "a.pgm"):
        path = saved(tmp_path, Image.fromarray(values), name)
        assert (decoded(path, "L") == expected).all(), name
        assert (decoded(path) == expected[..., None]).all(), name
    wide = Image.fromarray(values.astype(np.int32) << 15)
    found = decoded(saved(tmp_path, wide, "wide.tif"), "L")
    assert (found == np.round(values / 65536 * 255)).all()


def test_colours_are_converted(tmp_path):
    rgb = Image.new("RGB", (4, 3), (200, 30, 90))
    rgba = Image.new("RGBA", (4, 3), (200, 30, 90, 7))
    for image, name, options, tolerance in (
        (rgb, "a.png", {}, 0),
        (rgba, "a.png", {}, 0),  # transparency is dropped
        (rgb.convert("P", palette=Image.Palette.ADAPTIVE), "a.png", {}, 0),
        (rgb.convert("P", palette=Image.Palette.ADAPTIVE), "a.png", {"transparency": b"\x07\x08"}, 0),
        (rgb.convert("CMYK"), "a.jpg", {"quality": 100}, 3),
        (rgb, "a.gif", {"save_all": True, "append_images": [Image.new("RGB", (4, 3))]}, 0),  # the first of two
    ):
        found = decoded(saved(tmp_path, image, name, **options)).astype(int)
        assert found.shape == (3, 4, 3) and abs(found - [200, 30, 90]).max() <= tolerance, (image.mode, options)
    for image in (Image.new("L", (4, 3), 77), Image.new("LA", (4, 3), (77, 9))):
        assert (decoded(saved(tmp_path, image, "a.png")) == 77).all()
        assert (decoded(saved(tmp_path, image, "a.png"), "L") == 77).all()
    assert (decoded(saved(tmp_path, Image.new("1", (4, 3), 1), "a.png")) == 255).all()


def test_orientation_is_left_aside(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(saved(tmp_path, Image.new("RGB", (4, 3)), "a.jpg", exif=exif)).shape == (3, 4, 3)


def test_posterize_to_no_bits(folder):
    """timm's policies ask for it, and Pillow has made an error of it."""
    image = Image.new("RGB", (4, 3), (200, 30, 90))
    assert not np.asarray(images.posterize(image, 0, fillcolor=0)).any()
    assert (np.asarray(images.posterize(image, 2)) == [192, 0, 64]).all()
    for policy in ("rand-m10-inc1", "original", "augmix-m3"):
        found = open_data(of(folder, aug__auto_augment=policy))
        steps = found.loader.loader.dataset.transform.transform.transforms
        nested = [getattr(step, "ops", None) or sum(getattr(step, "policy", []), []) for step in steps]
        ops = [op for each in nested for op in each if op.name.startswith("Posterize")]
        assert ops and all(op.aug_fn is images.posterize for op in ops)


# ---- unreadable images


def spoil(path, how: str = "empty") -> None:
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"no image" * 20}[how])


@pytest.fixture
def spoilt(tmp_path):
    """Three of 24 training images and one of 14 held-out ones can't be read."""
    root = fill(tmp_path)
    for name, how in (("ant/1.jpg", "empty"), ("bee/2.jpg", "truncated"), ("bee/3.jpg", "text")):
        spoil(root / "train" / name, how)
    spoil(root / "val" / "ant" / "4.png")
    return root


def test_unreadable_images_are_replaced_and_listed(spoilt):
    found = still(spoilt, data__max_bad_share=0.2)
    data = open_data(found)
    batches, bad = [], []
    for step, batch in enumerate(data.train_batches(1)):
        batches.append(batch)
        new = data.take_bad()
        assert all(6 * step <= one["position"] < 6 * step + 6 for one in new)  # told with their batch, not before
        bad += new
    assert data.take_bad() == []
    x = torch.cat([batch.x for batch in batches])
    names = [name for step in range(4) for name in data.files(1, step)]
    first = {}
    for one in bad:
        first.setdefault(one["position"], one)
    spoilt_ones = {str(spoilt / "train" / name) for name in ("ant/1.jpg", "bee/2.jpg", "bee/3.jpg")}
    assert first.keys() == {p for p, name in enumerate(names) if name in spoilt_ones}
    assert all(one["file"] == names[p] for p, one in first.items())
    assert {one["reason"] for one in first.values()} >= {"not an image"} and {one["epoch"] for one in bad} == {1}
    rows = [tuple(row) for row in x.flatten(1).tolist()]
    good = [row for p, row in enumerate(rows) if p not in first]
    assert len(set(good)) == 21
    assert all(rows[p] in good for p in first)  # another image stands in
    # The same ones again from other processes, and by another number of them.
    shares = [open_data(change(found, data__workers=rank), rank, 2) for rank in range(2)]
    parts = [torch.cat([b.x for b in share.train_batches(1)]).view(4, 3, 3, 16, 16) for share in shares]
    assert torch.equal(torch.stack(parts, 2).flatten(0, 2), x)
    again = [one for share in shares for one in share.take_bad()]
    assert sorted(again, key=str) == sorted(bad, key=str)
    for share in shares:
        share.close()


def test_unreadable_held_out_images_weigh_nothing(spoilt):
    data = open_data(of(spoilt))
    weight = torch.cat([weight for _, _, weight in data.test_batches()])
    assert (weight == 0).nonzero().flatten().tolist() == [4]
    (bad,) = data.take_bad()
    assert bad == {"file": str(spoilt / "val/ant/4.png"), "position": 4, "epoch": None, "reason": "not an image"}


def test_too_many_unreadable_images_stop_the_run(spoilt):
    data = open_data(of(spoilt, data__max_bad_share=0.1))
    with pytest.raises(TrainingError) as error:
        list(data.train_batches(1))
    for part in ("3 of the 24 training images (12.50%)", "max_bad_share is 10.00%", "2.jpg (", "repair or remove"):
        assert part in str(error.value)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_folder_without_a_readable_image_ends_at_once(tmp_path, monkeypatch, share):
    for path in fill(tmp_path).glob("train/*/*"):
        spoil(path)
    reads, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda *args: reads.append(1) or decode(*args))
    with pytest.raises(TrainingError, match="of the 24 training images .* unreadable"):
        next(open_data(of(tmp_path, data__max_bad_share=share)).train_batches(1))
    assert len(reads) <= 6 * images.TRIES


def test_a_bomb_is_unreadable_and_a_warning_is_not(folder, monkeypatch):
    path = str(folder / "train" / "ant" / "0.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # of 480: PIL warns
    assert decoded(path).shape == (20, 24, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # PIL refuses
    with pytest.raises(TrainingError, match="exceeds limit"):
        next(open_data(of(folder)).train_batches(1))


# ---- worker processes


def test_workers_leave_signals_alone_and_a_killed_one_is_told(folder, monkeypatch, request):
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.2,))  # seconds between two looks at the workers
    # As in a process that has had no other DataLoader with workers.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    before, found = signal.SIG_DFL, signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.SIGCHLD, found))
    data = open_data(of(folder, data__workers=1))
    batches = data.train_batches(1)
    next(batches)
    (worker,) = data.loader.loader._iterator._workers
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, name)
    assert len(list(batches)) == 3 and worker.is_alive()
    assert signal.getsignal(signal.SIGCHLD) == before  # torch's would raise anywhere
    batches = data.train_batches(2)
    next(batches)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # no error here
    with pytest.raises(TrainingError, match="killed .SIGKILL., most often because memory ran out"):
        list(batches) + list(data.train_batches(3))
    data.close()


def test_the_process_ends_without_close(folder):
    """Workers ignore the SIGTERM by which multiprocessing ends them at exit."""
    code = (
        "import sys, test_train_data as t\n"
        "data = t.open_data(t.of(sys.argv[1], data__workers=1)); batches = data.train_batches(1); next(batches)\n"
        "sys.modules['keep'] = batches\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        timeout=60,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()


# ---- other places that images come from


def pack(path, folder) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")


def test_tar_files_are_as_good_as_folders(folder, tmp_path):
    pack(tmp_path / "train.tar", folder / "train")
    pack(tmp_path / "validation.tar", folder / "val")
    data = open_data(of(tmp_path))
    assert (data.train_size, data.test_size, data.class_names) == (24, 14, ["ant", "bee"])
    assert torch.equal(epoch_of(of(tmp_path))[0], epoch_of(of(folder))[0])
    assert data.files(1, 0)[0].endswith(".jpg")


def fake_cifar100(root, monkeypatch, size=(20, 10)) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    base = root / torchvision.datasets.CIFAR100.base_folder
    base.mkdir()
    for name, count in zip(("train", "test"), size, strict=True):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": list(range(count))}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))


def test_torchvisions_cifar100(tmp_path, monkeypatch):
    fake_cifar100(tmp_path, monkeypatch)
    data = open_data(of(tmp_path, data__name="torch/cifar100", data__img_size=(32, 32)))
    assert (data.train_size, data.test_size, data.num_classes) == (20, 10, 100)
    assert data.class_names[7] == "class 7"
    x, y = epoch_of(of(tmp_path, data__name="torch/cifar100", data__img_size=(32, 32)))
    assert x.shape == (18, 3, 32, 32) and len(set(y.tolist())) == 18
    assert data.files(1, 0)[0] == f"index {y[0]}"
    assert sorted(int(label) for _, y, _ in data.test_batches() for label in y) == list(range(10))
    with pytest.raises(InputError, match="data.num_classes is 10, expected 100, the classes of torch/cifar100"):
        open_data(of(tmp_path, data__name="torch/cifar100", data__num_classes=10))


class Stream(IterableDataset):
    """What timm's create_dataset gives for a stream, as far as it is used: dealt out to processes and workers."""

    def __init__(self, training, images=26):
        self.training, self.images, self.epoch = training, images, 0
        self.reader = types.SimpleNamespace(num_samples=26 if training else 7, dist_rank=0, dist_num_replicas=1)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers

    def __iter__(self):
        at, parts = self.reader.dist_rank, self.reader.dist_num_replicas
        worker = get_worker_info()
        at, parts = at * worker.num_workers + worker.id, parts * worker.num_workers
        order = np.random.RandomState(self.epoch).permutation(self.images) if self.training else range(7)
        for i in list(order)[at::parts]:
            yield Image.new("RGB", (20, 20), (int(i), 100, 100)), int(i) % 5


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setitem(sources.PACKAGES, "wds", ("torch", "torch"))
    made = []

    def create(name, root, split, is_training=False, **options):
        made.append((name, split, is_training, options))
        return Stream(is_training)

    monkeypatch.setattr(sources, "create_dataset", create)
    return made


def streamed(tmp_path, **changes) -> config.Config:
    plain = {"data__name": "wds/things", "data__num_classes": 5, "data__workers": 1, "batch": 4}
    return of(tmp_path, **(plain | changes))


def test_streams(tmp_path, stream):
    data = open_data(streamed(tmp_path))
    assert [(name, split, training) for name, split, training, _ in stream] == [
        ("wds/things", "train", True),
        ("wds/things", "validation", False),
    ]
    assert stream[0][3]["batch_size"] == 4 and not data.ordered and data.steps == 6 and data.num_classes == 5
    first = [batch.x for batch in data.train_batches(1)]
    assert len(first) == 6 and {len(x) for x in first} == {4}
    second = [batch.x for batch in data.train_batches(2)]
    assert not torch.equal(torch.cat(second), torch.cat(first))
    data.source.set_epoch = lambda epoch: None  # the same images again: their augmentation is the epoch's
    data.source.epoch = 1
    assert not torch.equal(torch.cat([batch.x for batch in data.train_batches(2)]), torch.cat(first))
    del data.source.set_epoch
    still_red = streamed(tmp_path, aug__auto_augment=None, aug__color_jitter=0)
    orders = [torch.cat([b.x[:, 0, 8, 8] for b in open_data(still_red).train_batches(epoch)]) for epoch in (1, 2)]
    assert not torch.equal(*orders)  # and their order is
    assert sorted(data.files(1, 0))[0] == "image 0 of the stream of epoch 1"
    again = open_data(streamed(tmp_path))  # a run that is resumed at epoch 2
    assert torch.equal(torch.cat([batch.x for batch in again.train_batches(2)]), torch.cat(second))
    with pytest.raises(InputError, match="is a stream, which can be entered at the beginning of an epoch only"):
        again.train_batches(2, 1)
    data.close(), again.close()


def test_processes_share_a_stream(tmp_path, stream):
    plain = {"aug__auto_augment": None, "aug__color_jitter": 0, "data__mean": (0.0,) * 3, "data__std": (1 / 255,) * 3}
    parts, tests = [], []
    for rank in range(2):
        data = open_data(streamed(tmp_path, **plain), rank, 2)
        parts.append(torch.cat([batch.x[:, 0, 8, 8] for batch in data.train_batches(1)]).round().int().tolist())
        tests.append([(x[:, 0, 8, 8].round().int().tolist(), weight.tolist()) for x, _, weight in data.test_batches()])
        data.close()
    assert len(parts[0]) == len(parts[1]) == 12 and len(set(parts[0] + parts[1])) == 24
    assert [len(x) for x, _ in tests[0]] == [len(x) for x, _ in tests[1]]
    seen = [pixel for test in tests for x, weight in test for pixel, w in zip(x, weight, strict=True) if w]
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_part_of_a_stream(tmp_path, stream, workers):
    data = open_data(streamed(tmp_path, data__workers=workers, data__epoch_updates=2, data__max_test_images=5))
    assert sum(len(batch.x) for batch in data.train_batches(1)) == 8
    assert sum(weight.sum() for *_, weight in data.test_batches()) == 5
    data.close()


def test_a_stream_that_is_too_short(tmp_path, stream, monkeypatch):
    monkeypatch.setattr(sources, "create_dataset", lambda *_, is_training=False, **__: Stream(is_training, images=10))
    data = open_data(streamed(tmp_path))
    with pytest.raises(TrainingError, match="ended after 2 of the 6 updates of epoch 1"):
        list(data.train_batches(1))
    data.close()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"aug__repeats": 3}, "aug.repeats is 3, expected 1"),
        ({"data__num_classes": None}, "data.num_classes is None, expected a number, as wds/things"),
    ],
)
def test_what_a_stream_can_not(tmp_path, stream, changes, message):
    with pytest.raises(InputError, match=message):
        open_data(streamed(tmp_path, **changes))


# ---- whole batches


def test_batch_augmentation():
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)

    def augmented(key=(1, 2), **aug):
        augment = BatchAugmentation(config.Config(aug=config.Aug(**aug)), 10)
        seed_everything(*key)
        return augment(x.clone(), y)

    same, target = augmented()
    assert torch.equal(same, x) and target is y
    for aug in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "erase_prob": 0.5}):
        mixed, target = augmented(**aug)
        again, target_again = augmented(**aug)
        other, _ = augmented(key=(1, 3), **aug)
        assert torch.equal(mixed, again) and torch.equal(target, target_again) and not torch.equal(mixed, other)
        assert target.shape == (8, 10)
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        assert ((target > 0).sum(1) <= 2).all() and (target > 0)[range(8), y].all()
    share = target[0, 0]
    mixed, target = augmented(mixup=0.8)
    share = target[0, 0]
    torch.testing.assert_close(mixed, share * x + (1 - share) * x.flip(0))
    smoothed = BatchAugmentation(config.Config(aug=config.Aug(mixup=0.8), loss=config.Loss(smoothing=0.2)), 10)
    seed_everything(1, 2)
    torch.testing.assert_close(smoothed(x.clone(), y)[1], 0.8 * target + 0.02)
    erased, target = augmented(erase_prob=1.0)
    changed = (erased != x).any(1).flatten(1).sum(1)
    assert target is y and ((changed > 0.01 * 256) & (changed < 0.5 * 256)).all()
    assert len(erased[0][erased[0] != x[0]].unique()) > 3  # noise, not one colour
    assert torch.equal(augmented(mixup=0.8, mix_prob=0.0)[0], x)


# ---- what is wrong with a data set


def remove(*paths) -> None:
    for path in paths:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_empty_class_folders_are_warned_about(tmp_path):
    fill(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.warns(UserWarning, match="train has class folders without images: cat"):
        assert open_data(of(tmp_path)).class_names == ["ant", "bee"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_data(of(tmp_path), 1, 2)  # the first process has said it
    (tmp_path / "train" / "cat").rmdir()
    # Labels are the training split's where the other has fewer classes.
    for file in (tmp_path / "val" / "ant").iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="val has class folders without images: ant"):
        data = open_data(of(tmp_path))
    assert {int(label) for _, y, weight in data.test_batches() for label in y} == {1}


def wrong(kind, root):
    """A data set with one thing wrong."""
    if kind != "nothing there":
        fill(root, {"ant": 4, "bee": 4}, 2)
    if kind == "no images":
        remove(root / "train/ant", root / "train/bee")
    if kind == "no val":
        remove(root / "val/ant", root / "val/bee")
        (root / "val").rmdir()
    if kind == "classes":
        (root / "val/bee").rename(root / "val/wasp")
    if kind == "loose":
        picture(root / "train" / "stray.png")
    if kind == "tar":
        (root / "train").rename(root / "train-old")
        (root / "train.tar").write_bytes(b"no tar")
    return root


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("", {"data__root": None}, "data.root is None, expected the place where folder's images are"),
        ("", {"data__root": "/no/such"}, "data.root is '/no/such', where there is no folder or file"),
        (
            "nothing there",
            {},
            "data.train_split is 'train', but data.root .* has no folder or tar file train or training",
        ),
        ("no images", {}, "train has no images .* in folders, one a class"),
        ("no val", {}, "data.val_split is 'validation', .* no folder or tar file validation or val or .* or test;"),
        ("", {"data__val_split": "dev"}, "data.val_split is 'dev', .* no folder or tar file dev;"),
        ("classes", {}, "the class folders differ, .*: only in .*train: bee; only in .*val: wasp"),
        ("loose", {}, "train has images outside of class folders"),
        ("tar", {}, "train.tar can't be read as a tar file"),
        ("", {"data__num_classes": 3}, "data.num_classes is 3, expected 2, the class folders in .*train"),
        ("", {"batch": 9}, "config field batch is 9, expected at most the 8 training images"),
        ("", {"data__name": "folders"}, "data.name is 'folders', expected one of .*; did you mean 'folder'"),
        ("", {"data__name": "cifar100"}, "did you mean 'torch/cifar100'"),
        ("", {"data__name": "torch/cifar1000"}, "did you mean 'torch/cifar100'"),
        ("", {"data__name": "torch/cifar100"}, "torch/cifar100 with .*: Dataset not found or corrupted"),
        ("", {"data__mean": (0.5, 0.5)}, r"data.mean is \(0.5, 0.5\), expected one or three numbers"),
        ("", {"data__std": (0.5,)}, r"data.std is \(0.5,\), expected 3 numbers, one for each channel"),
        ("", {"aug__auto_augment": "rnd-m9"}, "aug.auto_augment is 'rnd-m9', expected a policy of timm's"),
        ("", {"batch": 3, "aug__mixup": 0.8}, "a micro-batch has 3 images, expected an even number"),
        ("", {"batch": 7, "dist__micro_batch": 4}, "dist.micro_batch is 4, expected 1 or 7, into which the 7 images"),
    ],
)
def test_what_is_wrong(tmp_path, kind, changes, message):
    with pytest.raises(InputError, match=message) as error:
        open_data(of(wrong(kind, tmp_path), **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, install", [("hfds/x", "datasets"), ("wds/x", "webdataset"), ("tfds/x", "tensorflow")])
def test_packages_that_are_missing(folder, monkeypatch, name, install):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"data.name is '{name}', which needs .*: pip install {install}"):
        open_data(of(folder, data__name=name))


def test_a_batch_that_processes_can_not_share(folder):
    with pytest.raises(InputError, match="batch is 8, expected a multiple of the 3 processes, for example 6 or 9"):
        open_data(of(folder, batch=8), 0, 3)
