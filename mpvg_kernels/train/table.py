"""A table of text, as reports have it: Markdown here, HTML where `mpvg report` writes it."""

import html
import re
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Cells are text or numbers that `str` writes as they are meant."""

    header: tuple[str, ...]
    rows: list[tuple]

    def markdown(self) -> str:
        """The table in GitHub's Markdown; what would be markup in a cell is escaped."""
        lines = [" | ".join(map(escape, row)) for row in (self.header, *self.rows)]
        lines.insert(1, " | ".join(["---"] * len(self.header)))
        return "\n".join(f"| {line} |" for line in lines)


def escape(value: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is no markup


def figure_of(value: float | None, spec: str, unit: str = "") -> str:
    """A number in a table, `-` where there is none."""
    return "-" if value is None else f"{value:{spec}}{unit}"
