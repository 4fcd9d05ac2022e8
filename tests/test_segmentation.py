"""Mean IoU by hand, and segmentation through the trainer: loss, evaluation, resume, several processes, its recipe."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from mask_folders import make
from PIL import Image
from timm.optim import param_groups_layer_decay
from warm_process import WarmProcess

from mpvg_kernels.models import create_dense
from mpvg_kernels.train import InputError, TrainingError, config, iou, metrics, recipes
from mpvg_kernels.train.data import Batch
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.loop import Trainer, cpu_threads
from mpvg_kernels.train.run_folder import RunFolder
from mpvg_kernels.train.tasks.dense import predict
from mpvg_kernels.train.tasks.segmentation import Segmentation

pytestmark = pytest.mark.xdist_group(__name__)

CPU = torch.device("cpu")
ARGS = """--recipe digits --task segmentation --data.name masks --device cpu --model.name mpvg_vit_adapter_tiny
--model.patch_size 16 --model.embed_dim 24 --model.depth 2 --model.num_heads 2 --model.drop_path_rate 0.2
--model.adapter.interactions 2 --model.adapter.conv_inplane 8 --model.adapter.deform_num_heads 2
--model.adapter.pretrain_size 32 --data.img_size 32 32 --segmentation.short_side 40 --segmentation.long_side 160
--segmentation.width 16 --segmentation.aux_width 8 --segmentation.window 32 --batch 4 --epochs 2 --data.epoch_updates 4
--sched.name poly --sched.decay_rate 1 --sched.warmup_epochs 0 --sched.warmup_updates 2 --optim.layer_decay 0.95
--optim.ema_decay 0.9 --log.pos_interval 3 --log.interval 2 --checkpoint.interval 3 --log.tensorboard False""".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the runs have it: small convolutions are slower with more."""
    with cpu_threads(1):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with images of different sizes, one of the training and one of the held-out ones unreadable."""
    root = make(tmp_path_factory.mktemp("data") / "masks", 10, 5)
    (root / "images" / "train" / "03.png").write_text("no image")
    (root / "masks" / "val" / "02.png").write_text("no image")
    return root


def small(root, *more) -> config.Config:
    args = [*ARGS[2:], "--data.root", str(root), "--data.workers", "0", "--data.max_bad_share", "0.5", *more]
    return config.from_args(recipes.load("digits"), args)


# ---- intersection over union


def test_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    found = torch.tensor([[0, 1, 1, 1], [2, 0, 3, 0]])
    matrix = iou.confusion(found, labels, 5)
    assert matrix.dtype == torch.int64 and matrix[:3, :3].tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert matrix.sum() == 6  # what is found where pixels are ignored counts nowhere: 3 is neither labelled nor found
    expected = [1 / 3, 2 / 3, 1 / 2]
    of_classes = iou.class_figures(matrix)
    assert of_classes.iou[:3].tolist() == pytest.approx([100 * value for value in expected])
    assert of_classes.accuracy[:3].tolist() == pytest.approx([50, 100, 50])
    assert of_classes.share.tolist() == pytest.approx([100 / 3] * 3 + [0, 0])
    assert of_classes.iou[3:].isnan().all() and of_classes.accuracy[3:].isnan().all()
    figures = iou.figures(matrix)
    assert figures["miou"] == pytest.approx(50) and figures["acc"] == pytest.approx(100 * 4 / 6)
    assert figures["mean_acc"] == pytest.approx(200 / 3)


def test_a_class_that_is_found_and_not_labelled_counts():
    labels, found = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 2, 1])
    figures = iou.figures(iou.confusion(found, labels, 4))
    assert figures["miou"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert figures["mean_acc"] == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_nothing_is_labelled():
    matrix = iou.confusion(torch.tensor([1, 2]), torch.tensor([255, 255]), 3)
    assert matrix.sum() == 0 and all(math.isnan(value) for value in iou.figures(matrix).values())
    with pytest.raises(ValueError, match=r"found has the shape \(2,\), expected that of labels, \(3,\)"):
        iou.confusion(torch.zeros(2), torch.zeros(3), 3)


def test_by_sets_of_pixels():
    """Against the definition, and the whole is not the mean of its parts."""
    draw = torch.Generator().manual_seed(0)
    labels, found = (torch.randint(0, 6, (5, 7, 9), generator=draw, dtype=torch.uint8) for _ in range(2))
    labels[0] = found[0] = 1  # so that classes are not spread evenly
    labels[labels == 5] = 200
    parts = [iou.confusion(f, y, 6, 200) for f, y in zip(found, labels, strict=True)]
    assert torch.equal(sum(parts), iou.confusion(found, labels, 6, 200))
    kept, expected = labels != 200, []
    for label in range(6):
        y, f = (labels == label) & kept, (found == label) & kept
        expected.append(100 * float((y & f).sum() / (y | f).sum()))
    assert iou.class_figures(sum(parts)).iou.tolist() == pytest.approx(expected)
    whole = iou.figures(sum(parts))["miou"]
    assert whole == pytest.approx(sum(expected) / 6)
    assert abs(whole - np.mean([iou.figures(part)["miou"] for part in parts])) > 0.5


# ---- the task


def test_loss_and_counters(root):
    task = Segmentation(small(root, "--segmentation.aux_weight", "0.3"))
    draw = torch.Generator().manual_seed(0)
    logits, auxiliary = (torch.randn(2, 4, 5, 6, generator=draw) for _ in range(2))
    y = torch.randint(0, 4, (2, 5, 6), generator=draw)
    y[0] = 255
    loss, counts = task.loss(lambda x: (logits, auxiliary), Batch(torch.zeros(2, 3, 5, 6), y), CPU)
    expected = [F.cross_entropy(each[1:], y[1:]) for each in (logits, auxiliary)]
    torch.testing.assert_close(loss, expected[0] + 0.3 * expected[1])
    assert counts.tolist() == [int((logits[1].argmax(0) == y[1]).sum()), 30]


@pytest.fixture(scope="module")
def trainer(root, one_thread):
    trainer = Trainer(small(root))
    yield trainer
    trainer.data.close()


def test_flops_are_of_the_whole_model(trainer):
    layers = [m for m in trainer.model.decode_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert trainer.flops > 2 * layers[-1].weight.numel() * 8 * 8  # the last one sees a quarter of the crop
    assert trainer.has_pos_norms and trainer.task.features(trainer.model) is trainer.model.trunk


def test_evaluation_is_of_the_original_pixels(trainer, root):
    """Against one image at a time through `predict`, and the loss through the model's own logits."""
    found = trainer.evaluate()
    assert found["images"] == 4 and set(found) == {"loss", "miou", "acc", "images"}
    with torch.no_grad():
        whole = trainer.task.measure(trainer.model, trainer.data.test_split, World(), CPU)
        assert {key: whole[key] for key in found} == found
        matrix, losses, pixels = 0, 0.0, 0
        for i in (0, 1, 3, 4):
            image = trainer.data.test_split.image(i)
            labels = trainer.data.test_split.truth(i)["label_map"]
            label_map = predict(trainer.model, image, CPU)["label_map"]
            assert label_map.shape == labels.shape == (image.height, image.width) and label_map.dtype == torch.int64
            matrix = matrix + iou.confusion(label_map, labels, 4)
            [[x], _, _] = next(iter(trainer.data.test_split.batches([i])))
            logits = trainer.model.segment(x[None], 32)
            seen = F.interpolate(labels[None, None].double(), logits.shape[-2:], mode="nearest-exact")[0].long()
            losses += F.cross_entropy(logits, seen, reduction="sum", ignore_index=255).item()
            pixels += int((seen != 255).sum())
    expected = iou.figures(matrix)
    assert (found["miou"], found["acc"]) == (expected["miou"], expected["acc"])
    assert found["loss"] == pytest.approx(losses / pixels, rel=1e-5)
    rows = whole["per_class"]
    assert [row["name"] for row in rows] == ["red", "green", "blue", "yellow"]
    assert [row["iou"] for row in rows] == iou.class_figures(matrix).iou.tolist()
    assert sum(row["share"] for row in rows) == pytest.approx(100) and whole["mean_acc"] == expected["mean_acc"]


def test_without_windows_and_classes_that_never_occur(root):
    made = small(root, "--segmentation.window", "None")
    task = Segmentation(replace(made, data=replace(made.data, root=str(root))))
    data = task.create_data(CPU, World())
    model = task.create_model(data, start=False).eval()
    for classifier in (model.classifier[1],):
        classifier.weight.data.zero_()
        classifier.bias.data.copy_(torch.tensor([0.0, 0.0, 5.0, -5.0]))
    with torch.no_grad():
        found = task.measure(model, data.test_split, World(), CPU, indices=[0])
    labels = data.test_split.truth(0)["label_map"]
    counts = torch.bincount(labels[labels != 255], minlength=4)
    expected = [
        100 * float(counts[2] / counts.sum()) if label == 2 else 0.0
        for label in range(4)
        if counts[label] or label == 2
    ]
    assert found["miou"] == pytest.approx(np.mean(expected)) and found["images"] == 1
    assert [row["iou"] is None for row in found["per_class"]] == [
        not c and label != 2 for label, c in enumerate(counts)
    ]
    assert [row["acc"] is None for row in found["per_class"]] == [not c for c in counts]


def test_no_held_out_image(trainer):
    with pytest.raises(TrainingError, match="no image that was to be evaluated could be read: .*"):
        trainer.task.measure(trainer.model.eval(), trainer.data.test_split, World(), CPU, indices=[2])


def test_one_image_is_too_few(root):
    with pytest.raises(InputError, match="a micro-batch has 1 image, expected 2 or more"):
        Segmentation(small(root, "--dist.micro_batch", "1")).create_data(CPU, World())
    synced = small(root, "--dist.sync_bn", "--batch", "2")
    assert Segmentation(synced).create_data(CPU, World(0, 2)).order.micro_batch == 1


# ---- runs


@pytest.fixture(scope="module")
def warm():
    with WarmProcess("mpvg_kernels.train.tasks.segmentation") as process:
        yield process


def run(warm, root, folder, *more, code=0, **kwargs) -> str:
    argv = ["train", *ARGS, "--data.root", root, "--data.max_bad_share", "0.5", "--out", folder, *more]
    out = folder.with_suffix(".txt")
    assert warm.run(argv, out, **kwargs) == code, out.read_text()
    return out.read_text()


@pytest.fixture(scope="module")
def whole(warm, root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(warm, root, folder, "--data.workers", 0)
    return folder


def contents(folder) -> tuple:
    """Weights and log of a run, times aside."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    weights = {
        name: safetensors.torch.load_file(folder / name / "model.safetensors") for name in ("last", "ema", "best")
    }
    return weights, [{k: v for k, v in line.items() if k not in metrics.TIMES} for line in lines]


def assert_same_run(found, expected) -> None:
    (weights, log), (others, other_log) = contents(found), contents(expected)
    assert log == other_log
    for name, tensors in others.items():
        assert tensors.keys() == weights[name].keys()
        assert all(torch.equal(weights[name][key], value) for key, value in tensors.items())


def test_a_run(whole, root):
    epochs = metrics.read_log(whole, "epoch")
    assert [row["step"] for row in epochs] == [4, 8]
    for row in epochs:
        for key in ("train_loss", "train_acc", "test_loss", "test_miou", "test_acc", "ema_loss", "ema_miou", "ema_acc"):
            assert 0 < row[key] <= 100 or key.endswith("miou")
    assert {row["file"].rpartition("/")[2] for row in metrics.read_log(whole, "bad_image")} == {"02.png", "03.png"}
    assert [row["step"] for row in metrics.read_log(whole, "pos")] == [1, 3, 6, 8]
    folder = RunFolder(whole)
    model, image = folder.model("best"), Image.open(root / "images" / "val" / "00.png")
    assert model.label_names == ["red", "green", "blue", "yellow"] and model.preprocessing["window"] == 32
    assert predict(model, image.convert("RGBA"), CPU)["label_map"].shape == (image.height, image.width)
    task = Segmentation(folder.config())
    split = task.open_split("validation", CPU, class_names=model.label_names)
    with torch.no_grad():
        found = task.measure(folder.model("last"), split, World(), CPU)
    assert found["miou"] == epochs[-1]["test_miou"] and found["loss"] == pytest.approx(epochs[-1]["test_loss"])


def test_interrupted_and_resumed(warm, root, whole, tmp_path):
    folder = tmp_path / "run"
    resume = ("--resume", "auto")
    stop = {"signal": ["update", 6, signal.SIGTERM]}
    run(warm, root, folder, *resume, "--data.workers", 1, code=75, patch=stop)
    run(warm, root, folder, *resume, "--data.workers", 0, code=-9, patch={"kill": ["update", 2]})
    run(warm, root, folder, *resume, "--data.workers", 2)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes(warm, root, tmp_path, mode):
    """They share the images out, and what they say of a model is what one process says of it."""
    folder = tmp_path / "run"
    more = ("--data.workers", 0, "--dist.mode", mode, "--epochs", 1, "--data.epoch_updates", 3)
    more += () if mode == "ddp" else ("--optim.ema_decay", "None")  # timm's average takes no batch norms under FSDP
    run(warm, root, folder, *more, processes=2)
    (row,) = metrics.read_log(folder, "epoch")
    task = Segmentation(small(root))
    data = task.create_data(CPU, World())
    with torch.no_grad():
        for name, part in (("last", "test"), ("ema", "ema"))[: 2 if mode == "ddp" else 1]:
            found = task.evaluate(RunFolder(folder).model(name), data, World(), CPU, lambda: None)
            assert found["miou"] == row[f"{part}_miou"] and found["acc"] == row[f"{part}_acc"]
            assert found["loss"] == pytest.approx(row[f"{part}_loss"], rel=1e-6)
    data.close()


# ---- the recipe


def test_layer_decay():
    """As ViT-Adapter's: layer 0 is the patches and the PE, the blocks are 1 to 12, all else has the full rate."""
    with torch.device("meta"):
        model = create_dense("segmentation", "mpvg_vit_adapter_tiny", 150, backbone_args={"scheme": "mpvg"})
    found = recipes.load("upernet_adapter_tiny_ade20k")
    groups = param_groups_layer_decay(
        model, layer_decay=found.optim.layer_decay, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)].removeprefix("backbone.model."): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scales) == len(names)
    seen = set()
    for name, scale in scales.items():
        part, *rest = name.split(".")
        layer = 13
        if part in ("patch_embed", "pos_embed"):
            layer = 0
        elif part == "blocks":
            layer = int(rest[0]) + 1
        elif part == "norm":  # of mpvg and pvg alone, with the last block as in timm's ViT
            layer = 12
        seen.add((part, layer))
        assert scale == pytest.approx(0.95 ** (13 - layer), rel=1e-12), name
    assert {("patch_embed", 0), ("pos_embed", 0), ("blocks", 1), ("blocks", 12)} <= seen
    assert {
        ("spm", 13),
        ("level_embed", 13),
        ("interactions", 13),
        ("up", 13),
        ("decode_head", 13),
        ("aux_head", 13),
    } <= seen
