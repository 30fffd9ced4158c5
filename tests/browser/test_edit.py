"""Edits are private: one visitor's edit, and what another one sees of it on the same server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import BUNDLED, Server, answer_chip
from tests.browser.test_main_flow import ask

JAPAN = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}
SET = {"new-answer": "Rome", "preset": "rome", "layers": "1"}
MORE = "&set=clamp_reference%3Dresidual&set=clamp%3D1.0"
pytestmark = pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled model is not there")


def badge(page: Page, text: str) -> None:
    expect(page.locator(".st-key-tools").get_by_text(text).first).to_be_visible()


def chip(page: Page) -> str:
    """The answer with its probability to four digits."""
    expect(answer_chip(page)).to_be_visible()
    return str(page.locator(".chip").first.get_attribute("title"))


def test_an_edit_is_its_visitors_own_and_survives_a_reload(
    new_context: Callable[..., BrowserContext], server: Server
) -> None:
    owner, other = new_context().new_page(), new_context().new_page()
    other.goto(server.url("flow", **JAPAN))
    owner.goto(server.url("edit", **JAPAN, **SET) + MORE)
    original = chip(other)
    assert chip(owner) == original
    badge(owner, "Original weights")
    expect(owner.get_by_text("What may move with it").first).to_be_visible()
    owner.locator(".st-key-edit-apply").get_by_role("button").click()
    ask(other, "The capital of Italy is", "Italy", "Rome")  # while the edit is computed
    expect(answer_chip(other)).to_contain_text("Rome")
    badge(other, "Original weights")
    badge(owner, "EDITED ×1: ROME, layer 1")
    expect(owner.locator(".chip").filter(has_text="Tokyo").first).not_to_have_attribute("title", original)
    edited = chip(owner)
    ask(other, JAPAN["prompt"], JAPAN["subject"], JAPAN["answer"])
    expect(other.locator(".chip").first).to_have_attribute("title", original)
    badge(other, "Original weights")
    owner.reload()
    badge(owner, "EDITED ×1: ROME, layer 1")
    assert chip(owner) == edited
    stranger = new_context().new_page()
    stranger.goto(owner.url)
    expect(stranger.get_by_text("the original weights").first).to_be_visible()
    badge(stranger, "Original weights")
    assert chip(stranger) == original
    owner.locator(".st-key-weight-undo").get_by_role("button").click()
    badge(owner, "Original weights")
    expect(owner.locator(".chip").first).to_have_attribute("title", original)
