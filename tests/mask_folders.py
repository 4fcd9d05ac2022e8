"""Makes small folders of images with label maps, for the tests of segmentation."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[220, 60, 40], [40, 200, 60], [60, 80, 220], [230, 220, 50], [120, 120, 120]], np.uint8)
"""One for each class; the last one is that of ignored pixels."""
CLASSES = len(COLOURS) - 1


def colours(labels: np.ndarray) -> np.ndarray:
    """Labels (H, W), 255 where ignored, as an image (H, W, 3) of a colour for each class."""
    return COLOURS[np.minimum(labels, CLASSES)]


def draw(draw: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """A label map (H, W) uint8 of a few rectangles on class 0."""
    labels = np.zeros((height, width), np.uint8)
    for label in (1, 2, 3, 255, 1):
        y, x = draw.randint(0, height - 8), draw.randint(0, width - 8)
        labels[y : y + draw.randint(8, height // 2), x : x + draw.randint(8, width // 2)] = label
    return labels


def make(root: Path, train: int = 12, test: int = 5, side: int = 40) -> Path:
    """images/{train,val} and masks/{train,val} with images of different sizes, and classes.txt."""
    rng = np.random.RandomState(0)
    for split, count in (("train", train), ("val", test)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = draw(rng, side + rng.randint(side // 2), side + rng.randint(side // 2))
            noise = rng.randint(-30, 31, (*labels.shape, 3))
            image = (colours(labels) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i:02}.png")
            Image.fromarray(labels).save(root / "masks" / split / f"{i:02}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\nyellow\n")
    return root
