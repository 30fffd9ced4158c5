"""Write docs/screenshots: every page, light and dark, at 1280x720, of a server of its own.

    python -m tests.browser.screenshots [FOLDER] [NAME=VALUE ...]

NAME=VALUE pairs go into the address: ``model=/some/folder`` shows another model than the bundled one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS, PATIENCE, ROOT, Server, answer_chip

READY = {
    "fact": "The same fact in other words",
    "flow": "Whole sets of tokens",
    "lens": "What each state would say",
    "heads": "Where it looks",
    "trace": "State restored",
}


def main(arguments: list[str]) -> None:
    """Start a server, photograph the pages, stop it."""
    folders = [Path(a) for a in arguments if "=" not in a]
    params = dict(a.split("=", 1) for a in arguments if "=" in a)
    target = folders[0] if folders else ROOT / "docs" / "screenshots"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"FACTSCOPE_RENDERER": "canvas"}).start()
        try:
            _photograph(server, target, params)
        finally:
            server.stop()


def _photograph(server: Server, target: Path, params: dict[str, str]) -> None:
    with sync_playwright() as playwright:
        path = str(CHROMIUM) if CHROMIUM.exists() else None
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": 1280, "height": 720}, color_scheme=theme)
            context.set_default_timeout(PATIENCE)
            for name in READY:
                page = context.new_page()
                page.goto(server.url("" if name == "fact" else name, **params))
                _wait(page, name)
                page.screenshot(path=target / f"{name}-{theme}.png")
                page.close()
                print(target / f"{name}-{theme}.png")
            context.close()
        browser.close()


def _wait(page: Page, name: str) -> None:
    """Until the answer, the figures and everything that they wait for stand on the page."""
    expect(answer_chip(page)).to_be_visible()
    expect(page.get_by_text(READY[name]).first).to_be_visible()
    expect(page.locator("canvas.marks, svg.marks").nth(1)).to_be_visible()
    expect(page.locator("[class*='st-key-cancel-']")).to_have_count(0)
    expect(page.locator("[data-stale='true']")).to_have_count(0)
    page.mouse.move(640, 5)
    page.wait_for_function("document.fonts.status === 'loaded'")
    page.wait_for_timeout(700)  # Vega's and Streamlit's own fades, which say nothing when they are over


if __name__ == "__main__":
    main(sys.argv[1:])
