"""A report as blocks (text, tables, pictures), written as one HTML file and as Markdown for pull requests.

The HTML file needs nothing beside it: pictures and styles are in it, there is no script, and it follows the reader's
choice of light or dark. The Markdown has the same text and tables without the pictures: GitHub shows none that are in
the text itself. Whatever text a block is given is shown as it is, never as markup.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..train.table import Table, escape

THUMB = 160
"""Longest side of an image in a gallery, in pixels of the file; smaller ones stay as they are."""
FEW = 20
"""Most rows of a table of many things that is open."""
INK, PAPER = "#000001", "#fffffe"
"""Colours of a figure's letters and background that the page's own take the place of."""
# A picture in a page follows the page's light or dark by itself.
SVG_STYLE = """<style>:root{--ink:#1f2328;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#d6d9de;--paper:#1b1e23}}</style>"""


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Note(NamedTuple):
    """A paragraph that must not be missed: what is not there, and why."""

    text: str


class Picture(NamedTuple):
    """A picture and what it shows, in words."""

    uri: str
    alt: str


class Panel(NamedTuple):
    """A picture with the numbers that it shows."""

    title: str
    picture: Picture
    table: Table


class Panels(NamedTuple):
    """Panels side by side where there is room."""

    panels: Sequence[Panel]


class Sample(NamedTuple):
    """An image of the data, and what was said of it."""

    picture: Picture
    name: str
    caption: tuple[str, ...]
    """A text for each column of the gallery."""
    right: bool | None
    """Whether the prediction is right; None where that is not one answer."""


class Gallery(NamedTuple):
    """Images with captions; in Markdown a table."""

    columns: tuple[str, ...]
    """What each line of a caption says."""
    samples: Sequence[Sample]
    large: bool = False
    """Pictures with letters on them, of any shape, one or two in a row."""


class Heat(NamedTuple):
    """A table of counts whose cells are shaded by their share of the row; the diagonal is shaded as right."""

    corner: str
    names: Sequence[str]
    counts: np.ndarray
    """(C, C)"""


class State(NamedTuple):
    """How far a run is: done of total, None where that is not known."""

    state: str
    text: str
    done: int
    total: int | None


class Fold(NamedTuple):
    """Blocks that are shown when one asks for them."""

    title: str
    blocks: Sequence["Block"]


Block: TypeAlias = Text | Note | Table | Panels | Gallery | Heat | State | Fold


class Section(NamedTuple):
    title: str
    blocks: Sequence[Block]


class Page(NamedTuple):
    title: str
    head: Sequence[Block]
    """What comes before the sections."""
    sections: Sequence[Section]
    foot: str


def folded(table: Table, what: str) -> Block:
    """A table, shown when one asks for it where it has more than FEW rows; `what` is what they are."""
    return table if len(table.rows) <= FEW else Fold(f"Table of {len(table.rows)} {what}", [table])


# ---- pictures


def uri(data: bytes, kind: str) -> str:
    """A file as an address that holds it whole."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def svg_uri(figure: Figure) -> str:
    """A figure as a drawing whose letters and background follow the reader's light or dark."""
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=INK, which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, axes.xaxis.offsetText, axes.yaxis.offsetText):
            text.set_color(INK)
    for each in (*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))):
        for text in each.get_texts():
            text.set_color(INK)
    figure.set_facecolor(PAPER)
    buffer = io.StringIO()
    # Letters as text, not as shapes; the same figure gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpvg"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    for colour, name in ((INK, "--ink"), (PAPER, "--paper"), ("#ffffff", "--paper")):
        text = text.replace(colour, f"var({name})")
    text = re.sub(r"(<svg [^>]*>)", lambda found: found[0] + SVG_STYLE, text[text.index("<svg ") :], count=1)
    return uri(text.encode(), "svg+xml")


def image_uri(pixels: np.ndarray) -> str:
    """An image (H, W, 3) or (H, W), uint8: small ones exactly, larger ones reduced to THUMB and as JPEG."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    small = max(image.size) <= 64
    image.thumbnail((THUMB, THUMB))
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    return uri(buffer.getvalue(), "png" if small else "jpeg")


def picture_uri(picture: Image.Image) -> str:
    """A picture with letters on it, as it is."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, method=4)
    return uri(buffer.getvalue(), "webp")


# ---- HTML

STYLE = """
:root { color-scheme: light dark; --ink:#1f2328; --soft:#59636e; --paper:#fff; --card:#f6f7f9; --line:#d8dce1;
  --blue:31,119,180; --orange:255,127,14; --link:#0b5fa5 }
@media (prefers-color-scheme: dark) { :root { --ink:#d6d9de; --soft:#9aa4af; --paper:#1b1e23; --card:#24282e;
  --line:#3b4149; --blue:74,158,218; --orange:255,150,60; --link:#6cb6ff } }
* { box-sizing: border-box }
body { margin:0 auto; padding:1.2rem 1rem 3rem; max-width:76rem; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui,sans-serif; overflow-wrap:anywhere }
h1 { font-size:1.7rem; line-height:1.2; margin:.2rem 0 .6rem }
h2 { font-size:1.25rem; margin:2.2rem 0 .6rem; padding-bottom:.2rem; border-bottom:1px solid var(--line) }
h3 { font-size:1rem; margin:.2rem 0 .3rem }
a { color:var(--link) }
nav { display:flex; flex-wrap:wrap; gap:.2rem 1rem; margin:.8rem 0 }
p { margin:.5rem 0; max-width:60rem }
.note { border-left:4px solid rgb(var(--orange)); background:var(--card); padding:.4rem .8rem;
  border-radius:0 6px 6px 0 }
.state { display:flex; flex-wrap:wrap; align-items:center; gap:.3rem .8rem; margin:.5rem 0 }
.state b { padding:.05rem .6rem; border-radius:1rem; border:2px solid rgb(var(--blue)) }
.state b.failed, .state b.preempted, .state b.unknown { border-color:rgb(var(--orange)) }
progress { width:11rem; max-width:100%; accent-color:rgb(var(--blue)) }
/* A shadow at the right says that there is more to scroll to. */
.scroll { overflow-x:auto; margin:.5rem 0; max-width:100%; background:
  linear-gradient(to left,var(--paper) 80%,transparent) right -2px top/1.7rem 100% no-repeat local,
  linear-gradient(to left,rgba(128,128,128,.5),transparent) right/.6rem 100% no-repeat scroll }
table { border-collapse:collapse; font-size:.86rem; font-variant-numeric:tabular-nums; overflow-wrap:normal }
th, td { padding:.22rem .55rem; border-bottom:1px solid var(--line); text-align:left; vertical-align:top;
  max-width:34rem }
thead th { border-bottom-width:2px; vertical-align:bottom; font-weight:600 }
tbody th { font-weight:400; min-width:6.5rem }
td { overflow-wrap:break-word; min-width:3.2rem }
.t { min-width:10rem }
.n { text-align:right; white-space:nowrap }
.panels { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,29rem),1fr)); gap:1.2rem }
.panel { min-width:0; border:1px solid var(--line); border-radius:8px; padding:.7rem }
.panel img { display:block; width:100%; height:auto; border-radius:4px }
.panel table { font-size:.78rem }
.panel th, .panel td { padding:.22rem .4rem }
.heat td, .heat th { text-align:right; min-width:1.7rem; max-width:9rem; padding:.22rem .3rem; white-space:nowrap }
.gallery { display:grid; grid-template-columns:repeat(auto-fill,minmax(8.2rem,1fr)); gap:.8rem }
.gallery.wide { grid-template-columns:repeat(auto-fill,minmax(10.3rem,1fr)) }
.gallery.large { grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr)) }
figure { margin:0; border:3px solid rgb(var(--blue)); border-radius:6px; overflow:hidden; background:var(--card) }
figure.wrong { border-color:rgb(var(--orange)) }
figure.none { border-color:var(--line) }
figure img { display:block; width:100%; aspect-ratio:1; object-fit:contain; background:#888 }
.large figure img { aspect-ratio:auto; background:none }
figure img.pixels { image-rendering:pixelated }
figcaption { padding:.3rem .45rem; font-size:.78rem; line-height:1.35 }
figcaption span { display:block }
figcaption i { color:var(--soft); font-style:normal }
details { margin:.6rem 0 }
summary { cursor:pointer; font-weight:600 }
@media (max-width:34rem) { th, td { padding:.22rem .3rem } table { font-size:.8rem } tbody th { min-width:4rem }
  .gallery:not(.wide, .large) { grid-template-columns:repeat(auto-fill,minmax(6.5rem,1fr)); gap:.6rem } }
footer { margin-top:2.5rem; color:var(--soft); font-size:.85rem }
"""
NUMBER = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?( %)?")


def to_html(page: Page) -> str:
    """The page as one HTML file."""
    links = "".join(f'<a href="#{_anchor(each.title)}">{_text(each.title)}</a>' for each in page.sections)
    body = "".join(
        f'<section id="{_anchor(each.title)}"><h2>{_text(each.title)}</h2>{_html(each.blocks)}</section>\n'
        for each in page.sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{_text(page.title)}</h1>{_html(page.head)}<nav aria-label="sections">{links}</nav></header>
<main>
{body}</main>
<footer>{_text(page.foot)}</footer>
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _html(blocks: Iterable[Block]) -> str:
    return "".join(_HTML[type(block)](block) for block in blocks)


def _table_html(table: Table) -> str:
    mark = [""] + [_column_kind([str(row[i]) for row in table.rows]) for i in range(1, len(table.header))]
    head = "".join(f'<th scope="col"{m}>{_text(cell)}</th>' for m, cell in zip(mark, table.header, strict=True))
    rows = "".join(
        "<tr>"
        + f'<th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td{m}>{_text(cell)}</td>" for m, cell in zip(mark[1:], row[1:], strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _column_kind(cells: list[str]) -> str:
    if all(map(NUMBER.fullmatch, cells)):
        return ' class="n"'
    return ' class="t"' if max(map(len, cells)) > 24 else ""


def _picture_html(picture: Picture, attributes: str = "") -> str:
    return f'<img src="{_text(picture.uri)}" alt="{_text(picture.alt)}"{attributes}>'


def _panels_html(block: Panels) -> str:
    panels = (
        f'<div class="panel"><h3>{_text(each.title)}</h3>{_picture_html(each.picture)}{_table_html(each.table)}</div>'
        for each in block.panels
    )
    return f'<div class="panels">{"".join(panels)}</div>'


def _gallery_html(block: Gallery) -> str:
    figures = []
    for sample in block.samples:
        kind = {True: "right", False: "wrong", None: "none"}[sample.right]
        lines = zip(block.columns, sample.caption, strict=True)
        spans = [_text(sample.name), *(f"<i>{_text(name)}</i> {_text(said)}" for name, said in lines)]
        caption = "".join(f"<span>{span}</span>" for span in spans)
        exact = ' class="pixels"' if sample.picture.uri.startswith("data:image/png") else ""
        picture = _picture_html(sample.picture, exact)
        figures.append(f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>')
    kind = "gallery large" if block.large else "gallery wide" if len(block.columns) > 3 else "gallery"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _heat_html(block: Heat) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in block.names)
    rows = []
    for i, (name, counts) in enumerate(zip(block.names, block.counts, strict=True)):
        total = max(int(counts.sum()), 1)
        cells = []
        for j, count in enumerate(counts):
            share = 0.55 * float(count) / total if i == j else min(0.85, 4.0 * float(count) / total)
            colour = f' style="background:rgba(var(--{"blue" if i == j else "orange"}),{share:.2f})"' if count else ""
            cells.append(f"<td{colour}>{int(count) or ''}</td>")
        rows.append(f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll heat"><table><thead><tr><th scope="col">{_text(block.corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _state_html(block: State) -> str:
    kind = block.state if block.state in ("running", "preempted", "finished", "failed") else "unknown"
    bar = f'<progress max="{block.total}" value="{block.done}">{block.done}</progress>' if block.total else ""
    return f'<div class="state"><b class="{kind}">{_text(block.state)}</b>{bar}<span>{_text(block.text)}</span></div>'


_HTML = {
    Text: lambda block: f"<p>{_text(block.text)}</p>",
    Note: lambda block: f'<p class="note">{_text(block.text)}</p>',
    Table: _table_html,
    Panels: _panels_html,
    Gallery: _gallery_html,
    Heat: _heat_html,
    State: _state_html,
    Fold: lambda block: f"<details><summary>{_text(block.title)}</summary>{_html(block.blocks)}</details>",
}


# ---- Markdown


def to_markdown(page: Page) -> str:
    """The page's text and tables in GitHub's Markdown."""
    parts = [f"# {escape(page.title)}", *_markdown(page.head)]
    for section in page.sections:
        parts += [f"## {escape(section.title)}", *_markdown(section.blocks)]
    return "\n\n".join([*parts, escape(page.foot)]) + "\n"


def _markdown(blocks: Iterable[Block]) -> Iterable[str]:
    for block in blocks:
        match block:
            case Text():
                yield escape(block.text)
            case Note():
                yield f"> [!NOTE]\n> {escape(block.text)}"
            case Table():
                yield block.markdown()
            case State():
                yield f"**{escape(block.state)}**: {escape(block.text)}"
            case Panels():
                for panel in block.panels:
                    yield f"**{escape(panel.title)}**"
                    yield panel.table.markdown()
            case Gallery():
                yield Table(("image", *block.columns), [(s.name, *s.caption) for s in block.samples]).markdown()
            case Heat():
                rows = [(name, *map(int, row)) for name, row in zip(block.names, block.counts, strict=True)]
                yield Table((block.corner, *block.names), rows).markdown()
            case Fold():
                inside = "\n\n".join(_markdown(block.blocks))
                yield f"<details><summary>{html.escape(block.title)}</summary>\n\n{inside}\n\n</details>"
