"""The code blocks of the README pages, and how what they show is compared with what is printed.

A `console` block has commands behind `$ `, continued in the next line after a backslash, and below each what it prints.
A `python` block is a whole program. A `text` block right behind it, or behind a paragraph that begins with `prints`, is
what it prints. In both, `…` stands for what differs from machine to machine: in a line for any characters, alone in
a line for any lines. Decimal numbers may differ by one in their last digit. An `sh` block has commands that are not
run, and shows no output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ANY", "LANGUAGES", "Example", "difference", "examples", "fences"]

ANY = "\u2026"
LANGUAGES = {"console", "python", "sh", "text", "yaml"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"(?<![\d.])[-\u2212]?\d[\d,]*\.\d+(?![\d.])")


@dataclass(frozen=True, slots=True)
class Fence:
    """A code block: its language, its text, the line it begins at, and whether it stands right behind another."""

    language: str
    text: str
    line: int
    follows: bool


@dataclass(frozen=True, slots=True)
class Example:
    """Something that a page runs, and what it shows as printed: None where it shows nothing."""

    language: str
    program: str
    shown: str | None
    line: int


def fences(page: Path) -> list[Fence]:
    """The code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Fence] = []
    end = 0
    for match in _FENCE.finditer(text):
        between = text[end : match.start()].strip()
        line = text.count("\n", 0, match.start()) + 1
        follows = bool(found) and (not between or (between.startswith("prints") and "\n\n" not in between))
        found.append(Fence(match[1], match[2], line, follows))
        end = match.end()
    return found


def examples(page: Path) -> Iterator[Example]:
    """Whatever a page shows to be run, in order."""
    blocks = fences(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "python":
            shown = after.text if after is not None and after.language == "text" and after.follows else None
            yield Example("python", block.text, shown, block.line)
        elif block.language == "console":
            yield from _commands(block)


def _commands(block: Fence) -> Iterator[Example]:
    lines = block.text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    assert starts[:1] == [0], f"line {block.line}: a console block begins with a command"
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        last = start
        while lines[last].endswith("\\"):
            last += 1
        program = "\n".join(lines[start : last + 1]).removeprefix("$ ")
        yield Example("console", program, "\n".join(lines[last + 1 : end]), block.line + 1 + start)


def difference(shown: str, printed: str) -> str | None:
    """Where what is printed is not what a page shows, or None."""
    want, got = _stripped(shown), _stripped(printed)
    pattern, numbers = _pattern(want)
    match = re.fullmatch(pattern, "".join(line + "\n" for line in got))
    if match is None:
        return "\n".join(["the page shows", *want, "--- but this is printed", *got])
    for text, found in zip(numbers, match.groups(), strict=True):
        unit = 10.0 ** -len(text.partition(".")[2])
        if abs(_value(text) - _value(found)) > 1.01 * unit:
            return "\n".join([f"the page shows {text}, and {found} is printed in", *got])
    return None


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("\u2212", "-"))


def _pattern(lines: list[str]) -> tuple[str, list[str]]:
    """An expression with a group for each decimal number of the lines, and these numbers."""
    parts: list[str] = []
    numbers: list[str] = []
    for line in lines:
        if line.strip() == ANY:
            parts.append(r"(?:[^\n]*\n)*?")
            continue
        end = 0
        for match in _NUMBER.finditer(line):
            numbers.append(match[0])
            parts += [_literal(line[end : match.start()]), r"([-\u2212]?\d[\d,]*\.\d+)"]
            end = match.end()
        parts.append(_literal(line[end:]) + r"\n")
    return "".join(parts), numbers


def _literal(text: str) -> str:
    return r"[^\n]*?".join(re.escape(piece) for piece in text.split(ANY))
