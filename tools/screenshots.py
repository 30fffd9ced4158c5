"""Takes a picture of every page, light and dark, into docs/screenshots.

    python -m tools.screenshots [PAGE ...]

Starts its own server on a free port and stops it again. Each page opens cold, by its address, as a link does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tools.prepare import ROOT, find_chromium

FOLDER = ROOT / "docs" / "screenshots"
HOME = "fact"  # the page at /
SIZE = {"width": 1280, "height": 720}
START_SECONDS = 120
PAINT_MILLISECONDS = 60_000
RUN_MILLISECONDS = 300_000
DRAWN = "svg.marks, canvas.marks, .st-key-edit-apply button"
"""A figure; on the page for edits, which has none before one is made, its button."""
ASKED = {"layers": "?new-answer=Rome"}
"""What a page's address says, where nothing is shown before something is asked."""
RUN = {"layers": ".st-key-run-layers button"}
"""What is clicked first; a page that was shown before in the same server has its figure already."""


def main(wanted: list[str]) -> int:
    pages = [file.stem for file in sorted((ROOT / "pages").glob("*.py")) if not file.stem.startswith("_")]
    unknown = sorted(set(wanted) - set(pages))
    if unknown:
        print(f"error: no page {', '.join(unknown)}: there are {', '.join(pages)}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    with server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for page in wanted or pages:
            for scheme in ("light", "dark"):
                print(take(browser, address, page, scheme).relative_to(ROOT), flush=True)
        browser.close()
    return 0


@contextmanager
def server() -> Iterator[str]:
    """A dashboard on a free port, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "factscope", "serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/_stcore/health", process)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(address: str, process: subprocess.Popen) -> None:
    """Until the server says that it is well."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s")


def take(browser: Browser, address: str, page: str, scheme: str) -> Path:
    """One page in one colour scheme, once it is drawn and has stopped running."""
    context = browser.new_context(viewport=SIZE, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    try:
        view = context.new_page()
        view.goto(f"{address}/{'' if page == HOME else page}{ASKED.get(page, '')}")
        if page in RUN:
            view.locator(f"{RUN[page]}, {DRAWN}").first.wait_for(timeout=PAINT_MILLISECONDS)
            if view.locator(RUN[page]).count():
                view.locator(RUN[page]).click()
        view.locator(DRAWN).first.wait_for(timeout=PAINT_MILLISECONDS)
        view.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for(timeout=PAINT_MILLISECONDS)
        patience = RUN_MILLISECONDS if page in RUN else PAINT_MILLISECONDS
        view.locator('[class*="st-key-cancel-"]').last.wait_for(state="detached", timeout=patience)
        view.wait_for_timeout(1500)  # fonts and the last frame; there is no event for either
        target = FOLDER / f"{page}-{scheme}.png"
        view.screenshot(path=target)
        return target
    finally:
        context.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
