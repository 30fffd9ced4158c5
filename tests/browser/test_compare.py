"""Pin as A, change something, see A | B | B - A, unpin; the link restores both sides on a server that knows nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Server, answer_chip
from tests.browser.test_main_flow import ask, go_to


def figures(page: Page, name: str) -> list[str]:
    """Texts of the cells or points of A's, B's and the difference's figure."""
    found = []
    for side in ("a", "b", "difference"):
        box = page.locator(f'[class*="st-key-chart-{name}-{side}-"] svg.marks')
        expect(box).to_be_visible()
        found.append(" ".join(box.locator("path[aria-label]").evaluate_all("all => all.map(p => p.ariaLabel)")))
    return found


def test_pin_change_unpin_and_open_the_link_on_a_cold_server(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    page = new_context().new_page()
    page.goto(server.url("flow", **model))
    page.get_by_role("button", name="Pin as A").click()
    expect(page.get_by_text("B is the same so far")).to_be_visible()
    expect(page).to_have_url(re.compile(r"[?&]a=1"))
    page.get_by_role("button", name="Random weights").click()
    expect(page.get_by_text(re.compile("B differs in model"))).to_be_visible()
    a, b, difference = figures(page, "map")
    assert a != b
    assert "in A" in difference and "in B" in difference
    figures(page, "curve")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    for name, chart in (("Lens", "lens"), ("Fact", "layers")):
        go_to(page, name)
        figures(page, chart)
    go_to(page, "Flow")
    figures(page, "map")
    link = page.url
    server.restart()
    elsewhere = new_context().new_page()
    elsewhere.goto(link)
    expect(elsewhere.get_by_text(re.compile("B differs in model"))).to_be_visible()
    assert figures(elsewhere, "map") == [a, b, difference]
    expect(elsewhere).to_have_url(link)
    elsewhere.get_by_role("button", name="Unpin").click()
    expect(elsewhere.locator('[class*="st-key-chart-map-difference-"]')).to_have_count(0)
    expect(elsewhere.locator('[class*="st-key-chart-map-"] svg.marks')).to_be_visible()
    expect(elsewhere).not_to_have_url(re.compile(r"[?&]a=1"))


def test_another_fact_beside_a_and_back(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("lens", **model))
    page.get_by_role("button", name="Pin as A").click()
    expect(page.get_by_text("B is the same so far")).to_be_visible()
    ask(page, "The capital of Japan is", "Japan", "Tokyo")
    expect(answer_chip(page)).to_contain_text("Tokyo")
    expect(page.get_by_text("B differs in prompt; subject; answer.")).to_be_visible()
    figures(page, "lens")
    expect(page.get_by_text("Rows are matched by role").first).to_be_visible()
    page.get_by_role("button", name="Back to A").click()
    expect(answer_chip(page)).to_contain_text("Paris")
    expect(page.get_by_text("B is the same so far")).to_be_visible()
