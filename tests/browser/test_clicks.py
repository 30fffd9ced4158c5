"""No click on a cell is lost, not the second one on the same cell either."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.conftest import Server, cell


def at(page: Page, position: int, layer: int) -> None:
    """The cursor is there: in the address, which the server writes, and in the numbers of the detail panel."""
    expect(page).to_have_url(re.compile(rf"cell={position}\.{layer}(&|$)"))
    expect(page.get_by_role("spinbutton", name="Token").first).to_have_value(str(position))
    expect(page.get_by_role("spinbutton", name="Layer", exact=True).first).to_have_value(str(layer))


def test_a_cell_that_was_clicked_before_is_answered_again(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("lens", **model))
    cell(page, 3, 3).click()
    at(page, 3, 3)
    for elsewhere in (1, 2):
        layer = page.get_by_role("spinbutton", name="Layer", exact=True).first
        layer.fill(str(elsewhere))
        layer.press("Enter")
        at(page, 3, elsewhere)
        cell(page, 3, 3).click()
        at(page, 3, 3)
    cell(page, 5, 2).click()
    at(page, 5, 2)
    cell(page, 3, 3).click()
    at(page, 3, 3)
