"""A server and a browser for the whole session; a fresh browser context for each test."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.tiny_models import save_gpt2

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "factscope" / "demo" / "model" / "config.json"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync"
).split()
PATIENCE = 60_000
"""Milliseconds: the machine may be busy."""

expect.set_options(timeout=PATIENCE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here drives a browser."""
    for item in items:
        if Path(__file__).parent in Path(str(item.fspath)).parents:
            item.add_marker(pytest.mark.browser)


@dataclass
class Server:
    """``streamlit run app.py`` on a free port, started from another folder."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start and wait until it says that it is healthy."""
        self.port = self.port or _free_port()
        command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py"), f"--server.port={self.port}"]
        environment = {
            **os.environ,
            "FACTSCOPE_RENDERER": "svg",
            "FACTSCOPE_TORCH_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "FACTSCOPE_LOG_DIR": str(self.folder),
            **self.environment,
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 120
        while not self.healthy():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return self

    def stop(self) -> None:
        """End it as an operator would, and make sure that it ended."""
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def restart(self) -> None:
        """A new process on the same port: nothing is remembered."""
        self.stop()
        self.start()

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/_stcore/health", timeout=2) as answer:
                return answer.read() == b"ok"
        except OSError:
            return False

    def log(self) -> str:
        """What it wrote."""
        return (self.folder / "server.log").read_text(errors="replace")[-4000:]

    def processor_share(self, seconds: float) -> float:
        """Share of one core that the server uses over so many seconds."""
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(seconds)
        return (sum(process.cpu_times()[:2]) - before) / seconds

    def url(self, path: str = "", **params: str) -> str:
        """An address on it."""
        query = f"?{urlencode(params)}" if params else ""
        return f"http://127.0.0.1:{self.port}/{path}{query}"


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random model."""
    return str(save_gpt2(tmp_path_factory.mktemp("tiny") / "model", layers=6, width=48, positions=128))


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random model whose map of a long prompt takes a while."""
    return str(save_gpt2(tmp_path_factory.mktemp("deep") / "model", layers=32, width=640, positions=512))


@pytest.fixture(scope="session")
def model(tiny_model: str) -> dict[str, str]:
    """The address's parameters for the model under test: the bundled one if it is there."""
    return {} if BUNDLED.exists() else {"model": tiny_model}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests."""
    running = Server(tmp_path_factory.mktemp("server")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium if it is installed, else Playwright's own."""
    with sync_playwright() as playwright:
        path = str(CHROMIUM) if CHROMIUM.exists() else None
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def new_context(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Makes browser contexts, which share nothing; closes them."""
    opened: list[BrowserContext] = []

    def make(**options: object) -> BrowserContext:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 720}, **options})  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE)
        opened.append(context)
        return context

    yield make
    for context in opened:
        context.close()


@pytest.fixture
def page(new_context: Callable[..., BrowserContext]) -> Page:
    """A page that fails the test if it asks anybody but the server."""
    made = new_context().new_page()
    made.on("request", lambda request: _local_only(request.url))
    return made


def _local_only(url: str) -> None:
    assert re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:", url), f"the page asked {url}"


def answer_chip(page: Page) -> Locator:
    """The chip that says the answer's probability and rank."""
    return page.locator(".chip").first


def cell(page: Page, position: int, layer: int) -> Locator:
    """A cell of the first heatmap on the page."""
    return page.locator(f'path[aria-label^="layer: {layer}; position: {position};"]').first
