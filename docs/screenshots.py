"""Takes the pictures of the report page that README shows. `make screenshots`, with a Chromium.

Each PNG holds the SHA-256 of the page that it was taken of, so that a test can tell one that is
not current. They are not compared by their pixels: fonts and browsers differ between machines.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results" / "h100" / "report" / "index.html"
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
SHOTS = {theme: ROOT / "docs" / f"page-{theme}.png" for theme in THEMES}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SIZE = {"width": 1440, "height": 840}
_COLOURS = 128
_KEY = "page-sha256"


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def launch_options() -> list[str]:
    return ["--no-sandbox"] if os.geteuid() == 0 else []


def page_sha256() -> str:
    return hashlib.sha256(PAGE.read_bytes()).hexdigest()


def taken_of(shot: Path) -> str | None:
    """The SHA-256 of the page that a picture shows."""
    with Image.open(shot) as picture:
        return picture.info.get(_KEY)


def take(browser: Browser, theme: Literal["light", "dark"]) -> bytes:
    context = browser.new_context(viewport=_SIZE, color_scheme=theme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(PAGE.as_uri())
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(_COLOURS)
    context.close()
    said = PngInfo()
    said.add_text(_KEY, page_sha256())
    data = io.BytesIO()
    picture.save(data, "png", optimize=True, pnginfo=said)
    return data.getvalue()


def main() -> None:
    from playwright.sync_api import sync_playwright

    found = chromium()
    if found is None:
        raise SystemExit("error: wanted a Chromium on PATH, found none: `make browser` gets one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=launch_options())
        for theme, path in SHOTS.items():
            path.write_bytes(take(browser, theme))
            print(f"wrote {path.relative_to(ROOT)}")
        browser.close()


if __name__ == "__main__":
    main()
