"""Pictures of what is in an image: objects with boxes, masks and labels, or a label map with its legend.

    draw_objects(image, found, names, min_score=0.5)      of detection
    draw_label_map(image, label_map, names)               of segmentation
    draw(image, found, names)                             either, by what `found` holds
    side_by_side([draw(...), draw(...)], ["truth", "prediction"])

`found` is what `tasks.dense.predict` or `DenseSplit.truth` gives. A class has the same colour in every picture. Small
images are enlarged until letters on them can be read; images are never changed in place.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

LEAST, MOST = 640, 2048
"""Pixels of a picture's longer side, where nothing asks for another number."""
FILL = 0.42
"""Opacity of a mask."""
MAP = 0.6
"""Opacity of a label map."""
COLOURS = 256
"""Colours before they repeat."""
LEGEND_ROWS = 8
"""Most rows of a legend; classes of a smaller share are counted in its last entry."""
INK, PAPER, SOFT = (31, 35, 40), (255, 255, 255), (110, 118, 128)
# Okabe and Ito's colours, without black and grey, which photographs are full of.
FIRST = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
# Machado, Oliveira and Fernandes (2009): linear RGB as protanopes and deuteranopes see it.
SEEN_BY = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


# ---- colours


@functools.cache
def palette() -> np.ndarray:
    """The classes' colours (COLOURS, 3), uint8.

    Each is the one that is furthest from all before it, to the eyes that can least tell it from them: those of most
    people, and those without the cones for red or for green.
    """
    levels = np.linspace(0, 255, 12).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(grid)
    vivid = (lab[0, :, 0] > 35) & (lab[0, :, 0] < 88) & (np.hypot(lab[0, :, 1], lab[0, :, 2]) > 30)
    first = np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for name in FIRST], dtype=float)
    candidates = np.concatenate([first, grid[vivid]])
    lab = _lab(candidates)
    chosen, far = [], np.full(len(candidates), np.inf)
    for place in range(COLOURS):
        chosen.append(place if place < len(first) else int(far.argmax()))
        far = np.minimum(far, np.linalg.norm(lab - lab[:, chosen[-1:]], axis=-1).min(0))
    return candidates[chosen].astype(np.uint8)


def _lab(colours: np.ndarray) -> np.ndarray:
    """sRGB (N, 3), 0 to 255, in CIELAB as each kind of eyes sees it: (3, N, 3)."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.einsum("kij,nj->kni", SEEN_BY, linear).clip(0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = seen @ to_xyz.T / to_xyz.sum(1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def colour(label: int) -> Colour:
    """A class's colour."""
    return tuple(map(int, palette()[label % COLOURS]))


def ink_on(background: Colour) -> Colour:
    """Dark or white letters: what has more contrast."""
    return INK if np.dot(background, (0.299, 0.587, 0.114)) > 130 else PAPER


# ---- objects


def draw(
    image: Image.Image,
    found: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    min_score: float = 0.0,
    ignore: int = 255,
    side: int | None = None,
) -> Image.Image:
    """`draw_label_map` or `draw_objects`, by what `found` holds."""
    if "label_map" in found:
        return draw_label_map(image, found["label_map"], names, ignore=ignore, side=side)
    return draw_objects(image, found, names, min_score=min_score, side=side)


def draw_objects(
    image: Image.Image,
    found: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    min_score: float = 0.0,
    side: int | None = None,
) -> Image.Image:
    """Objects on an image: masks, boxes, and labels with the classes' names and scores.

    Args:
        image: of any mode and size, W x H.
        found: "boxes" (N, 4) as left, top, right, bottom in pixels, "labels" (N,) from 0, "masks" (N, H, W) bool or
            none, and "scores" (N,) or, of what is known to be there, none.
        names: of the classes.
        min_score: objects of a smaller score are left out.
        side: pixels of the picture's longer side; None: the image's, at least LEAST and at most MOST.

    Returns:
        An RGB picture of the image's shape.
    """
    picture, scale = _resized(image, side)
    boxes, labels = found["boxes"].double().numpy() * np.tile(scale, 2), found["labels"].tolist()
    scores = found["scores"].tolist() if "scores" in found else [None] * len(labels)
    shown = [i for i, score in enumerate(scores) if score is None or score >= min_score]
    width = max(2, round(max(picture.size) / 400))
    # Large ones first, so that small ones lie upon them.
    order = sorted(shown, key=lambda i: -np.prod(boxes[i, 2:] - boxes[i, :2]))
    for i in order if "masks" in found else ():
        _draw_mask(picture, found["masks"][i].numpy(), scale, colour(labels[i]), width)
    pen = ImageDraw.Draw(picture, "RGBA")
    for i in order:
        left, top, right, bottom = (round(side) for side in boxes[i])
        corners = [left, top, max(right - 1, left), max(bottom - 1, top)]
        out = [corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1]
        pen.rectangle(out, outline=(0, 0, 0, 110), width=width + 2)
        pen.rectangle(corners, outline=colour(labels[i]), width=width)
    _draw_labels(picture, [(boxes[i], labels[i], _said(names, labels[i], scores[i])) for i in shown])
    return picture


def _said(names: Sequence[str], label: int, score: float | None) -> str:
    name = _name(names, label)
    return name if score is None else f"{name} {100 * score:.0f} %"


def _name(names: Sequence[str], label: int) -> str:
    name = names[label] if 0 <= label < len(names) else str(label)
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _resized(image: Image.Image, side: int | None) -> tuple[Image.Image, np.ndarray]:
    """A copy in RGB, and how much wider and higher it is."""
    longer = max(image.size)
    factor = (side or min(max(longer, LEAST), MOST)) / longer
    size = [max(1, round(each * factor)) for each in image.size]
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)
    return picture, np.array(picture.size) / image.size


def _draw_mask(picture: Image.Image, mask: np.ndarray, scale: np.ndarray, paint: Colour, width: int) -> None:
    """Fill a mask with a colour that one sees through, and trace its border."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return
    # Only the part around it; a margin for the border, which is wider than the mask.
    margin = np.ceil((width + 2) / scale)
    start = np.floor(np.maximum([columns[0], rows[0]] - margin, 0))
    end = np.minimum([columns[-1] + 1, rows[-1] + 1] + margin, mask.shape[::-1])
    place = np.floor(start * scale).astype(int)
    size = np.maximum(np.ceil(end * scale).astype(int) - place, 1)
    size = np.minimum(size, np.array(picture.size) - place)
    part = tuple(np.concatenate([place / scale, np.minimum((place + size) / scale, mask.shape[::-1])]))
    cover = Image.fromarray(mask.astype(np.uint8) * 255).resize(tuple(size), Image.Resampling.BICUBIC, box=part)
    if scale[0] > 1.5:  # the mask's own pixels would show as steps
        smooth = ImageFilter.GaussianBlur(0.8 * float(scale[0]))
        cover = cover.filter(smooth).point(lambda v: min(255, max(0, 4 * v - 382)))
    at = tuple(map(int, place))
    picture.paste(paint, at, cover.point(lambda v: round(FILL * v)))
    picture.paste(paint, at, _border(cover, width // 2))


def _border(cover: Image.Image, reach: int) -> Image.Image:
    """How much of each pixel is within `reach` of the border of what is covered."""
    grown, shrunk = (torch.from_numpy(sign * np.asarray(cover, dtype=np.float32))[None] for sign in (1, -1))
    for kernel in ((1, 2 * reach + 1), (2 * reach + 1, 1)):
        pad = (kernel[0] // 2, kernel[1] // 2)
        grown, shrunk = (F.max_pool2d(x, kernel, 1, pad) for x in (grown, shrunk))
    return Image.fromarray((grown + shrunk)[0].byte().numpy())


def _draw_labels(picture: Image.Image, labels: Sequence[tuple[np.ndarray, int, str]]) -> None:
    """Labels at boxes, the first ones where they suit best and on top, each whole and inside the picture."""
    size = letter_size(picture.size)
    chips: list[tuple[Box, Image.Image]] = []
    for box, label, text in labels:
        chip = _chip(text, colour(label), size, picture.width)
        where = _place(chip.size, box, picture.size, [taken for taken, _ in chips])
        chips.append(((*where, where[0] + chip.width, where[1] + chip.height), chip))
    for (left, top, *_), chip in reversed(chips):
        picture.paste(chip, (left, top), chip)


def _place(size: tuple[int, int], box: np.ndarray, picture: tuple[int, int], taken: Sequence[Box]) -> tuple[int, int]:
    """Where a label of a box goes: above it, else inside, below, or at its right end; the first that covers least of
    the others, and inside the picture."""
    (width, height), (left, top, right, bottom) = size, np.round(box).astype(int).tolist()
    wanted = [(left, top - height), (left, top), (left, bottom), (left, bottom - height)]
    wanted += [(right - width, y) for _, y in wanted]
    inside = [
        (min(max(x, 0), max(picture[0] - width, 0)), min(max(y, 0), max(picture[1] - height, 0))) for x, y in wanted
    ]

    def covered(place: tuple[int, int]) -> float:
        x, y = place
        return sum(
            max(0, min(x + width, b[2]) - max(x, b[0])) * max(0, min(y + height, b[3]) - max(y, b[1])) for b in taken
        )

    # One that had to be moved is not where one looks for it: it comes after those that had not.
    return min(
        zip(inside, wanted, strict=True), key=lambda each: (covered(each[0]), each[0] != each[1]), default=((0, 0), 0)
    )[0]


def _chip(text: str, paint: Colour, size: int, most: int) -> Image.Image:
    """A label: letters on a rounded rectangle of the class's colour, at most so wide."""
    font = letters(size)
    pad = max(3, size // 4)
    text = shorten(text, font, most - 2 * pad)
    ascent, descent = font.getmetrics()
    width, height = round(font.getlength(text)) + 2 * pad, ascent + descent + pad // 2
    chip = Image.new("RGBA", (width, height), (*paint, 255))
    chip.putalpha(_rounded(width, height, pad))
    ImageDraw.Draw(chip).text((pad, pad // 4), text, fill=ink_on(paint), font=font)
    return chip


def _rounded(width: int, height: int, radius: int) -> Image.Image:
    """A filled rectangle with round corners, drawn large and reduced, which makes its edge smooth."""
    large = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), 4 * radius, 255)
    return large.resize((width, height), Image.Resampling.BOX)


# ---- letters


@functools.cache
def letters(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures: matplotlib's own, which has the letters of most languages."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def letter_size(picture: tuple[int, int]) -> int:
    """Pixels of letters on a picture of that size."""
    return max(14, round(max(picture) / 55))


def shorten(text: str, font: ImageFont.FreeTypeFont, most: int) -> str:
    """The text, cut where it is wider than `most` pixels."""
    if font.getlength(text) <= most:
        return text
    while text and font.getlength(text + "…") > most:
        text = text[:-1]
    return text.rstrip() + "…"


# ---- label maps


def draw_label_map(
    image: Image.Image,
    label_map: Tensor,
    names: Sequence[str],
    *,
    ignore: int = 255,
    side: int | None = None,
) -> Image.Image:
    """A label map on an image, with a legend of its classes below, those of most pixels first.

    Args:
        image: of any mode and size, W x H.
        label_map: (H, W), integers.
        names: of the classes.
        ignore: label of pixels that have no class, which are hatched.
        side: pixels of the longer side of the image in the picture; None: as for objects.

    Returns:
        An RGB picture, as wide as the image in it and higher by the legend.
    """
    labels = label_map.numpy()
    picture, _ = _resized(image, side)
    width, height = picture.size
    # Labels are numbers of classes and can't be mixed: the nearest pixel's.
    rows = np.minimum((np.arange(height) + 0.5) * labels.shape[0] // height, labels.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * labels.shape[1] // width, labels.shape[1] - 1).astype(int)
    large = labels[rows][:, columns]
    known = (large != ignore)[..., None]
    # In grey, as its colours would mix with those of the classes, and a little pale, as black would swallow them.
    pixels = 48 + 0.75 * np.asarray(picture.convert("L").convert("RGB")).astype(np.float32)
    mixed = (1 - MAP) * pixels + np.float32(MAP) * palette()[large % COLOURS]
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // max(4, width // 120) % 2)[..., None]
    pixels = np.where(known, mixed, pixels * (0.8 - 0.35 * stripes))
    pixels = np.where(_borders(large, max(1, round(max(picture.size) / 640)))[..., None], 255, pixels)
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    values, counts = np.unique(labels, return_counts=True)
    shares = sorted(zip(counts / labels.size, values.tolist(), strict=True), reverse=True)
    legend = _legend(
        [
            (None if label == ignore else colour(label), "no label" if label == ignore else _name(names, label), share)
            for share, label in shares
        ],
        width,
        letter_size(picture.size),
    )
    whole = Image.new("RGB", (width, height + legend.height), PAPER)
    whole.paste(picture)
    whole.paste(legend, (0, height))
    return whole


def _borders(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels whose right or lower neighbour is of another class, and as many beside them as the line is wide."""
    edge = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        edge[:, :-step] |= labels[:, :-step] != labels[:, step:]
        edge[:-step] |= labels[:-step] != labels[step:]
    return edge


def _legend(entries: Sequence[tuple[Colour | None, str, float]], width: int, size: int) -> Image.Image:
    """Squares of colour with names and shares, in columns."""
    font, soft = letters(size), letters(max(11, round(0.85 * size)))
    gap = size // 2
    texts = [(f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %") for *_, share in entries]
    share_width = max((soft.getlength(text) for text in texts), default=0)
    widest = max((font.getlength(name) for _, name, _ in entries), default=0)
    cell = min(width - 2 * gap, round(size + gap + widest + gap + share_width + 2 * gap))
    columns = max(1, (width - 2 * gap) // cell)
    cell = (width - 2 * gap) // columns
    room = columns * LEGEND_ROWS
    shown = entries if len(entries) <= room else entries[: room - 1]
    rows = -(-(len(shown) + (len(shown) < len(entries))) // columns)
    line = round(1.5 * size)
    legend = Image.new("RGB", (width, rows * line + 2 * gap), PAPER)
    pen = ImageDraw.Draw(legend)
    for place, (paint, name, _) in enumerate(shown):
        left, middle = gap + place % columns * cell, gap + place // columns * line + line // 2
        square = Image.new("RGB", (size, size), paint or SOFT)
        if paint is None:
            for x in range(-size, size, 6):
                ImageDraw.Draw(square).line((x, size, x + size, 0), fill=PAPER, width=2)
        legend.paste(square, (left, middle - size // 2), _rounded(size, size, size // 4))
        text = shorten(name, font, cell - size - 4 * gap - round(share_width))
        start = left + size + gap
        pen.text((start, middle), text, fill=INK, font=font, anchor="lm")
        pen.text((start + font.getlength(text) + gap, middle), texts[place], fill=SOFT, font=soft, anchor="lm")
    if more := len(entries) - len(shown):
        left, middle = gap + len(shown) % columns * cell, gap + len(shown) // columns * line + line // 2
        pen.text((left, middle), f"and {more} more", fill=SOFT, font=font, anchor="lm")
    return legend


# ---- several


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str], columns: int = 2) -> Image.Image:
    """Pictures in a grid, each under its title, on white."""
    size = max(letter_size(picture.size) for picture in pictures)
    font, gap = letters(size), size
    head = round(1.7 * size)
    columns = min(columns, len(pictures))
    width = max(picture.width for picture in pictures)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [head + max(picture.height for picture in row) for row in rows]
    whole = Image.new("RGB", (columns * width + (columns - 1) * gap, sum(heights) + (len(rows) - 1) * gap), PAPER)
    pen, top = ImageDraw.Draw(whole), 0
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            left = column * (width + gap)
            text = shorten(titles[number * columns + column], font, width - size // 2)
            pen.text((left + size // 4, top + head // 2), text, fill=INK, font=font, anchor="lm")
            whole.paste(picture, (left, top + head))
        top += heights[number] + gap
    return whole
