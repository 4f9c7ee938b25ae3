"""The README's Python example prints what the README says it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_python_example_prints_what_the_readme_shows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.DOTALL)
    assert example is not None
    printed = subprocess.run([sys.executable, "-c", example[1]], capture_output=True, text=True, check=True, cwd=ROOT)
    shown = re.split(r"[\s\[\],]+", example[2])
    for ours, theirs in zip(re.split(r"[\s\[\],]+", printed.stdout), shown, strict=True):
        if "." in theirs:
            assert abs(float(ours) - float(theirs)) < 1e-4  # the last bits are the processor's
        else:
            assert ours == theirs
