"""Takes the README's picture of a report: the shipped sample, scored by the embedded model, ranked and reported.

python -m tests.jobs.reporting.screenshot
"""

from __future__ import annotations

import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt

from cluster.connect import connect
from jobs import rank, report, score
from jobs.demo import SAMPLE
from tests.browser import chromium

PICTURE = Path(__file__).parents[3] / "jobs" / "reporting" / "report.png"


class Config(BaseModel):
    """Where to put the picture, and how the page is shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path = PICTURE
    width: PositiveInt = 1200
    scheme: Literal["light", "dark"] = "light"


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with connect(), chdir(folder):
            score.run(score.ScoreConfig(input=str(SAMPLE), output="scored-sample", model="tiny", dtype="float32"))
            rank.run(rank.RankConfig(input="scored-sample", output="ranked-sample"))
            report.run(report.ReportConfig(input="ranked-sample", output="report.html"))
        _photograph(Path(folder, "report.html"), config)
    with Image.open(config.output) as picture:  # flat areas and grey edges: 256 colours are enough
        picture.convert("RGB").quantize(256).save(config.output, optimize=True)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes")


def _photograph(page_file: Path, config: Config) -> None:
    """The page down to the last of its figures."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": config.width, "height": 800}, color_scheme=config.scheme)
        page.goto(page_file.as_uri())
        box = page.locator("figure").last.bounding_box()
        assert box is not None
        page.screenshot(
            path=config.output,
            full_page=True,
            clip={"x": 0, "y": 0, "width": config.width, "height": box["y"] + box["height"] + 24},
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
