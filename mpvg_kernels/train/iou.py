"""Intersection over union of label maps, from one matrix of pixel counts that grows with the classes alone.

    matrix = sum(confusion(found, labels, 150) for found, labels in batches)
    figures(matrix)["miou"]

As mmsegmentation and the ADE20K challenge have it: intersections and unions are those of the whole data set, not means
over images or batches, and pixels without a label count nowhere, not in what is found either.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ClassFigures(NamedTuple):
    """Of each class, (C,) fp64, in percent; nan where there is nothing to divide by."""

    iou: Tensor
    """Pixels that are labelled and found as the class, of those that are either; nan where it is neither."""
    accuracy: Tensor
    """Pixels that are found as the class, of those that are labelled so; nan where none is."""
    share: Tensor
    """Pixels that are labelled so, of all labelled ones."""


def confusion(found: Tensor, labels: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Count pixels by label (rows) and by what was found (columns): (C, C) int64, to be added up over images.

    Args:
        found, labels: of one shape, integers from 0 to num_classes - 1; labels may be `ignore`.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != labels.shape:
        raise ValueError(f"found has the shape {tuple(found.shape)}, expected that of labels, {tuple(labels.shape)}")
    counted = labels != ignore
    pairs = labels[counted].long() * num_classes + found[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_figures(matrix: Tensor) -> ClassFigures:
    """The figures of each class of a matrix (C, C) by `confusion`."""
    counts = matrix.double()
    right, labelled, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    return ClassFigures(
        100 * right / (labelled + found - right), 100 * right / labelled, 100 * labelled / labelled.sum()
    )


def figures(matrix: Tensor) -> dict[str, float]:
    """Of a matrix (C, C) by `confusion`, in percent, nan where there is nothing.

    Returns:
        `miou`, the mean IoU of the classes that are labelled or found anywhere; `mean_acc`, the mean accuracy of those
        that are labelled; `acc`, the share of the labelled pixels that are right.
    """
    iou, accuracy, _ = class_figures(matrix)
    pixels = int(matrix.sum())
    acc = 100 * int(matrix.diagonal().sum()) / pixels if pixels else math.nan
    return {"miou": iou.nanmean().item(), "mean_acc": accuracy.nanmean().item(), "acc": acc}
