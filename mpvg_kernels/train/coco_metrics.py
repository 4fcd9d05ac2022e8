"""Average precision (AP) of boxes and masks as COCO has it, computed by pycocotools, and COCO's results rows.

AP is the mean over classes, and over the overlaps (IoU) 0.50, 0.55, ..., 0.95 at which a detection counts as right, of
the precision at 101 recalls; AP50 and AP75 are at one overlap. Small objects have an area below 32 x 32 pixels, large
ones of 96 x 96 or more. Crowds are neither to be found nor wrong to be found.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from .data.coco import Coco

KINDS = {"box": "bbox", "mask": "segm"}
"""What pycocotools calls them."""
SIZES = ("small", "medium", "large")


def rows(found: dict[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """What is found in an image as rows of COCO's results file.

    Boxes are rounded to a hundredth of a pixel and scores to a millionth. Classes that the file has no category for
    are left out.

    Args:
        found: as `MaskRCNN` gives it, in pixels of the original image; labels from 1.
        category_ids: by label, from 0.
    """
    boxes = found["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    masks = rle.encode(np.asfortranarray(found["masks"].permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [round(side, 2) for side in box],
            "score": round(score, 6),
            "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
        }
        for box, label, score, mask in zip(
            boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), masks, strict=True
        )
        if category_ids[label - 1] is not None
    ]


def average_precision(coco: Coco, images: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every AP of results on some images of a split, in percent.

    Args:
        images: indices in the split of those that were evaluated.
        results: their rows.

    Returns:
        "box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium", "box_ap_large", "box_ar" (the recall that 100
        detections of an image reach, mean over the overlaps), the same of "mask", and "per_class", of each class a
        dict of "name", "box_ap", "box_ap50", "box_ap75" and those of masks. None where there is no object of the kind.
    """
    truth = _truth(coco, images)
    figures: dict[str, Any] = {}
    of_class: dict[int, dict[str, float | None]] = {key: {} for key in truth.cats}
    for kind, name in KINDS.items():
        found = _evaluate(truth, _detections(results, truth, name), name)
        # (overlaps, recalls, classes, areas, most detections), and without the recalls
        precision, recall = found.eval["precision"], found.eval["recall"]
        whole = precision[:, :, :, 0, -1]
        parts = {"ap": whole, "ap50": whole[:1], "ap75": whole[5:6]}
        sizes = {f"ap_{size}": precision[:, :, :, i, -1] for i, size in enumerate(SIZES, 1)}
        more = {"ar": recall[:, :, 0, -1]}
        figures |= {f"{kind}_{key}": _mean(part) for key, part in (parts | sizes | more).items()}
        for i, category in enumerate(found.params.catIds):
            of_class[category] |= {f"{kind}_{key}": _mean(part[:, :, i]) for key, part in parts.items()}
    lacking = dict.fromkeys(f"{kind}_{key}" for kind in KINDS for key in ("ap", "ap50", "ap75"))
    pairs = zip(coco.class_names, coco.category_ids, strict=True)
    return figures | {"per_class": [{"name": name} | lacking | of_class.get(key, {}) for name, key in pairs]}


def _mean(values: np.ndarray) -> float | None:
    """In percent; pycocotools has -1 where there is no object."""
    values = values[values > -1]
    return 100 * float(values.mean()) if len(values) else None


def _evaluate(truth: COCO, detections: COCO, kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCOeval(truth, detections, kind)
        found.evaluate()
        found.accumulate()
    return found


def _index(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _truth(coco: Coco, images: Sequence[int]) -> COCO:
    annotations = []
    for image in images:
        height, width = coco.sizes[image].tolist()
        for i in range(coco.first[image], coco.first[image + 1]):
            mask = coco.rle(image, i)
            area = float(coco.areas[i])
            annotations.append(
                {
                    "id": len(annotations) + 1,  # from 1: pycocotools takes the object 0 for none
                    "image_id": int(coco.ids[image]),
                    "category_id": coco.category_ids[coco.labels[i]],
                    "bbox": coco.boxes[i].tolist(),
                    "area": float(rle.area(mask)) if np.isnan(area) else area,
                    "iscrowd": int(coco.crowds[i]),
                    "segmentation": mask,
                }
            )
    listed = [{"id": int(coco.ids[i]), "height": int(coco.sizes[i, 0]), "width": int(coco.sizes[i, 1])} for i in images]
    pairs = zip(coco.category_ids, coco.class_names, strict=True)
    return _index(listed, [{"id": key, "name": name} for key, name in pairs if key is not None], annotations)


def _detections(results: Sequence[dict[str, Any]], truth: COCO, kind: str) -> COCO:
    """As COCO.loadRes makes it, which takes no empty list; a mask's area is its own and not its box's."""
    annotations = []
    for i, row in enumerate(results, 1):
        box, mask = row["bbox"], row["segmentation"]
        area = box[2] * box[3] if kind == "bbox" else float(rle.area(mask))
        annotations.append({**row, "id": i, "iscrowd": 0, "area": area})
    return _index(truth.dataset["images"], truth.dataset["categories"], annotations)
