"""Tiny runs of detection and segmentation with random weights, as training leaves them, on a few scenes of shapes."""

import json
from pathlib import Path

import torch

from mpvg_kernels.train import config
from mpvg_kernels.train.data import shapes
from mpvg_kernels.train.distributed import World
from mpvg_kernels.train.figures import FIGURES
from mpvg_kernels.train.run_folder import RunFolder
from mpvg_kernels.train.tasks import create_task

SIZES = {"train": 4, "val": 5}
FIELDS = """--data.name shapes --device cpu --threads 1 --batch 2 --data.workers 0 --data.img_size 64 64
--model.name mpvg_vit_adapter_tiny --model.embed_dim 16 --model.depth 2 --model.num_heads 2
--model.adapter.interactions 2 --model.adapter.conv_inplane 8 --model.adapter.deform_num_heads 2
--segmentation.short_side 64 --segmentation.width 16 --segmentation.aux_width 16
--detection.width 16 --detection.box_width 16 --detection.proposals 20 --detection.test_short_side 64
--detection.score_threshold 0.0 --detection.max_detections 5"""


def scenes(root: Path) -> Path:
    """SIZES scenes in a new folder."""
    shapes.write(root, SIZES)
    return root


def made(path: Path, task: str, root: Path, *fields: str, log: bool = True) -> Path:
    """A run folder with random weights and, unless it is not wanted, a log of two epochs."""
    found = config.from_args(config.Config(), [*FIELDS.split(), "--task", task, "--data.root", str(root), *fields])
    kind, data = create_task(found), None
    try:
        data = kind.create_data(torch.device("cpu"), World())
        torch.manual_seed(0)
        model = kind.create_model(data, start=False)
    finally:
        if data is not None:
            data.close()
    info = {"config": config.to_dict(found), "class_names": data.class_names, "recipe": f"shapes_{task}", "updates": 4}
    run = RunFolder.create(path, info)
    assert run.save("last", model)
    if log:
        figures = FIGURES[task]
        rows = []
        for epoch in (1, 2):
            at = {"time": 1000.0 + epoch, "epoch": epoch, "step": 2 * epoch, "lr": 1e-3}
            values = {figure.key: 3.0 / epoch for figure in figures.trained}
            rows.append({"kind": "train", "grad_norm": 1.0, "skipped": 0, "img_s": 9.0, **at, **values})
            tested = {f"test_{figure.key}": 10.0 * epoch for figure in figures.evaluated}
            rows.append({"kind": "epoch", "train_loss": 2.0, "grad_norm": 1.0, "img_s": 9.0, **at, **tested})
        (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
