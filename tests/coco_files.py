"""A small data set in COCO's format, and a small detector's config, for tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mpvg_kernels.train import config

CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]  # blue is label 0
COLOURS = {7: (220, 60, 50), 3: (50, 70, 220)}


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def counts(box, size):
    """The uncompressed RLE of a rectangle."""
    x, y, w, h = box
    mask = np.zeros(size, np.uint8)
    mask[y : y + h, x : x + w] = 1
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return {"counts": runs if not flat[0] else [0, *runs], "size": list(size)}


def scene(number: int, seed: int = 0):
    """An image of noise with one to three rectangles; (pixels, annotations without ids)."""
    draw = np.random.default_rng([seed, number])
    height, width = (int(side) for side in draw.integers(64, 97, 2))
    pixels = draw.integers(90, 140, (height, width, 3), dtype=np.uint8)
    found = []
    for _ in range(draw.integers(1, 4)):
        w, h = (int(side) for side in draw.integers(12, 40, 2))
        x, y = int(draw.integers(0, width - w)), int(draw.integers(0, height - h))
        key = int(draw.choice([7, 3]))
        pixels[y : y + h, x : x + w] = COLOURS[key]
        found.append(
            {
                "category_id": key,
                "bbox": [x, y, w, h],
                "area": w * h,
                "segmentation": rectangle(x, y, w, h),
                "iscrowd": 0,
            }
        )
    return pixels, found


def split(folder: Path, file: Path, n: int, seed: int = 0) -> dict:
    """Write n images and their JSON; the content of the JSON, to be changed and written again."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict = {"images": [], "annotations": [], "categories": CATEGORIES}
    for i in range(n):
        pixels, found = scene(i, seed)
        name = f"{i:03}.png"
        Image.fromarray(pixels).save(folder / name)
        content["images"].append({"id": 50 + i, "file_name": name, "height": len(pixels), "width": len(pixels[0])})
        for each in found:
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": 50 + i, **each})
    write(file, content)
    return content


def write(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_coco(root: Path, train: int = 8, val: int = 5) -> Path:
    """Both splits as COCO itself has them."""
    split(root / "train2017", root / "annotations" / "instances_train2017.json", train)
    split(root / "val2017", root / "annotations" / "instances_val2017.json", val, seed=1)
    return root


SMALL = """--task detection --data.name coco --model.name mpvg_vit_adapter_tiny --model.embed_dim 24 --model.depth 2
--model.num_heads 2 --model.adapter.interactions 2 --model.adapter.conv_inplane 8 --model.adapter.deform_num_heads 2
--model.adapter.pretrain_size 64 --detection.width 16 --detection.box_width 32 --detection.rpn_samples 32
--detection.roi_samples 32 --detection.proposals 50 --detection.short_sides 48 64 --detection.max_side 96
--detection.crop_short_sides 48 56 --detection.crop_sides 32 48 --detection.final_crop 80 80
--detection.test_short_side 64 --detection.test_max_side 96 --detection.anchor_scale 2 --detection.score_threshold 0.01
--batch 4 --sched.warmup_epochs 0 --data.workers 0 --device cpu --log.tensorboard False""".split()
"""A detector that trains in tenths of a second, as command-line fields."""


def small(root: Path, *more) -> config.Config:
    return config.from_args(config.Config(), [*SMALL, "--data.root", str(root), *map(str, more)])
