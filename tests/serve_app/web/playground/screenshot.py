"""Takes the README's picture of the playground, with real scores of the embedded model.

python -m tests.serve_app.web.playground.screenshot
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt

from serve_app.reward_model import RewardModel
from tests.browser import chromium
from tests.serve_app.web.playground.engine_service import EngineService
from tests.serve_app.web.playground.serving import serving

PICTURE = Path(__file__).parents[4] / "serve_app" / "web" / "playground" / "playground.png"


class Config(BaseModel):
    """What to photograph, and where to put it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path = PICTURE
    width: PositiveInt = 1200
    scheme: Literal["light", "dark"] = "light"


def main(config: Config) -> None:
    models = {"tiny": RewardModel.from_pretrained("tiny", device="cpu", dtype="float32")}
    with serving(EngineService(models)) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": config.width, "height": 800}, color_scheme=config.scheme)
        page.goto(f"{url}/")
        page.click("#example")
        for _ in range(2):  # the first one warms the model up
            page.click("#rank")
            page.wait_for_selector("#rank:not([aria-disabled])")
            page.wait_for_selector(".standing")
        # As high as the page, so that nothing sticks to an edge.
        height = page.evaluate("() => { document.activeElement.blur(); return document.body.scrollHeight; }")
        page.set_viewport_size({"width": config.width, "height": height})
        page.screenshot(path=config.output)
    with Image.open(config.output) as picture:  # flat areas and grey edges: 256 colours are enough
        picture.convert("RGB").quantize(256).save(config.output, optimize=True)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(tyro.cli(Config))
