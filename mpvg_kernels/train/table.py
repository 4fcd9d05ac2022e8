"""A table of text, as reports have it: Markdown here, HTML where `mpvg report` writes it."""

import html
import re
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Cells are text or numbers that `str` writes as they are meant."""

    header: tuple[str, ...]
    rows: list[tuple]

    def markdown(self) -> str:
        """The table in GitHub's Markdown; what would be markup in a cell is shown as it is."""
        return table(tuple(map(escape, self.header)), [tuple(map(escape, row)) for row in self.rows])


def table(header: tuple, rows: list[tuple]) -> str:
    """A Markdown table of cells that are Markdown themselves."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ("---",) * len(header), *rows])


def escape(value: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is no markup


def figure_of(value: float | None, spec: str, unit: str = "") -> str:
    """A number in a table, `-` where there is none."""
    return "-" if value is None else f"{value:{spec}}{unit}"
