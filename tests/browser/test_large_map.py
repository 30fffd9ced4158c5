"""A map of 48 layers and 40 tokens can be read, and a click on it is answered within a second."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.browser.conftest import Server, cell
from tests.tiny_models import save_gpt2

LAYERS, TOKENS, CLICKS = 48, 40, 10
WITHIN_SECONDS = 1.0
SMALLEST = 6.0
"""Pixels of a cell's shorter side."""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a narrow random model of many layers."""
    return str(save_gpt2(tmp_path_factory.mktemp("large") / "model", layers=LAYERS, width=32, positions=128))


def test_a_large_map_is_readable_and_answers(
    large_model: str, new_context: Callable[..., BrowserContext], server: Server
) -> None:
    prompt = "xyz" + "abcdefgh" * 4 + "abcd"  # and the start token
    page = new_context().new_page()
    page.goto(server.url("lens", model=large_model, prompt=prompt, subject="xyz", null="positions"))
    last = cell(page, TOKENS - 1, LAYERS - 1)
    expect(last).to_be_visible(timeout=180_000)
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0, timeout=180_000)
    box = last.bounding_box()
    assert box is not None and min(box["width"], box["height"]) >= SMALLEST, box
    took = []
    for number in range(CLICKS):
        position, layer = (7 * number + 3) % TOKENS, (11 * number + 5) % LAYERS
        began = time.monotonic()
        cell(page, position, layer).click()
        page.wait_for_function(
            "cell => new URL(location).searchParams.get('cell')?.startsWith(cell)", arg=f"{position}.{layer}"
        )
        took.append(time.monotonic() - began)
        expect(page).to_have_url(re.compile(rf"cell={position}\.{layer}(&|\.|$)"))
    p50 = statistics.median(took)
    print(f"\nLens, {CLICKS} clicks on a map of {LAYERS} x {TOKENS}: p50 {p50:.2f} s, slowest {max(took):.2f} s")
    assert p50 <= WITHIN_SECONDS, took
