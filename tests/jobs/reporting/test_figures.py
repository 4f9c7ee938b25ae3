"""Figures that stand in a page: no colour, font or id of Matplotlib's own is left."""

from __future__ import annotations

import re
import warnings

from jobs.reporting.figures import ACCENT, INK, figure_of_size, inline, printable

TEXT = "a$b$_\u8bc4\u5206 <script>&\"' #010003"


def drawn(name: str = "one") -> str:
    with figure_of_size(3, 2) as figure:
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], color=ACCENT, marker="o")
        axes.fill_between([1, 2], [1, 2], color=INK, alpha=0.5)
        axes.set_xlabel(TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a font without Chinese is no reason to warn
        return str(inline(figure, name=name, title='"quoted"'))


def test_colours_are_the_pages_and_text_is_text() -> None:
    svg = drawn()
    assert set(re.findall(r'style="[^"]*#(\w+)', svg)) <= {"000000"}
    assert "var(--accent)" in svg
    assert "font-family" not in svg
    assert "<style" not in svg
    assert "a$b$_\u8bc4\u5206 &lt;script&gt;&amp;" in svg
    assert " #010003</text>" in svg  # a colour in a text is no colour
    assert 'aria-label="&quot;quoted&quot;"' in svg


def test_ids_are_the_figures_own_and_lead_somewhere() -> None:
    svg = drawn("two")
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids
    assert all(found.startswith("two-") for found in ids)
    assert len(set(ids)) == len(ids)
    assert {*re.findall(r'href="#([^"]+)"', svg), *re.findall(r"url\(#([^)]+)\)", svg)} == set(ids)
    assert drawn("two") == svg  # and nothing differs from run to run


def test_labels_are_one_line_without_control_characters() -> None:
    assert printable("a\x00\nb\u202e", 10) == "a  b "
    assert printable("abcdefgh", 5) == "abcd\u2026"
