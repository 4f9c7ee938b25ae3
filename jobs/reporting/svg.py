"""Figures as SVG that stands in a page: its colours and fonts are the page's, its ids are its own."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure

__all__ = ["ACCENT", "INK", "LINE", "QUIET", "SECOND", "figure_of_size", "inline", "printable"]

# Matplotlib draws in these; the page has a colour of its own for each, by day and by night.
INK, QUIET, LINE, ACCENT, SECOND = "#010000", "#010001", "#010002", "#010003", "#010004"
_VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", ACCENT: "--accent", SECOND: "--second"}
_COLOURS = re.compile("|".join(_VARIABLES))
_FONTS = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")

# On top of Matplotlib's defaults, whatever the user's own style is.
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and has the reader's fonts
    "svg.hashsalt": "rayward",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a column's name is a dollar
    "xtick.color": LINE,
    "xtick.labelcolor": QUIET,
    "xtick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.color": LINE,
    "ytick.labelcolor": QUIET,
    "ytick.labelsize": 10,
    "ytick.major.size": 3,
}


@contextmanager
def figure_of_size(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, and its style while it is drawn."""
    with matplotlib.style.context(["default", _STYLE]):
        yield Figure(figsize=(width, height), layout="constrained")


def inline(figure: Figure, *, name: str, title: str) -> Markup:
    """The figure as an element of a page.

    Args:
        figure: what `figure_of_size` made; it is drawn in that style.
        name: put in front of ids, so that figures of one page do not share any.
        title: what is read aloud.
    """
    target = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # The browser draws the text and has fonts for it; Matplotlib only measures it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # nothing that differs from run to run
        figure.savefig(target, format="svg", transparent=True, metadata=metadata)
    root = ET.fromstring(target.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # the style would hold for all of the page
                parent.remove(child)
    used = {found for element in root.iter() for value in element.attrib.values() for found in _references(value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element, name, used))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return Markup(ET.tostring(root, encoding="unicode"))


def printable(text: str, limit: int) -> str:
    """A label in one line of at most `limit` characters, without those that no SVG may hold."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "\u2026"


def _attributes(element: ET.Element, name: str, used: set[str]) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
        elif key.endswith("}href"):
            yield "href", f"#{name}-{value.removeprefix('#')}"
        else:
            value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
            if key == "style":
                value = _COLOURS.sub(lambda found: f"var({_VARIABLES[found[0]]})", _FONTS.sub("", value))
            yield key, value


def _references(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else _REFERENCE.findall(value)
