"""What a person does with the three pages, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Server, answer_chip, cell

PROMPT = "The capital of Japan is"


def ask(page: Page, prompt: str, subject: str, answer: str) -> None:
    page.get_by_role("textbox", name="Prompt, up to the answer").fill(prompt)
    page.get_by_role("textbox", name="Subject").fill(subject)
    page.get_by_role("textbox", name="Answer", exact=True).fill(answer)
    page.get_by_role("button", name="Ask").click()


def subject_tokens(page: Page) -> str:
    return "".join(
        page.locator(".token.subject").evaluate_all(
            "all => all.map(t => [...t.childNodes].slice(0, -1).map(n => n.textContent).join(''))"
        )
    )


def go_to(page: Page, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).first.click()


def test_type_a_fact_and_repair_its_subject_by_clicking(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url(**model))
    expect(answer_chip(page)).to_contain_text("Paris")
    ask(page, PROMPT, "", "Tokyo")
    expect(answer_chip(page)).to_contain_text("Tokyo")
    expect(page.get_by_role("textbox", name="Subject")).to_have_value("Japan")
    assert subject_tokens(page).strip("·") == "Japan"
    page.locator('.token[data-n="2"]').click()
    expect(page.locator(".hint")).to_contain_text("last token")
    page.locator('.token[data-n="3"]').click()
    expect(page.locator(".token.subject")).to_have_count(2)
    expect(page).to_have_url(re.compile("span=2-4"))


def test_click_a_cell_read_the_detail_change_page_and_open_the_link_elsewhere(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    page = new_context().new_page()
    page.goto(server.url("flow", **model))
    expect(page.get_by_text("Whole sets of tokens")).to_be_visible()
    cell(page, 3, 2).click()
    head = page.locator(".st-key-detail-head, .note").filter(has_text="at layer 2").first
    expect(head).to_contain_text("rank")
    expect(head).to_contain_text("blocked around this layer")
    expect(page).to_have_url(re.compile("cell=3.2"))
    go_to(page, "Lens")
    expect(page.get_by_text("What each state would say")).to_be_visible()
    expect(page.get_by_role("spinbutton", name="Token")).to_have_value("3")
    expect(page.get_by_role("spinbutton", name="Layer", exact=True)).to_have_value("2")
    expect(page).to_have_url(re.compile("cell=3.2"))
    page.get_by_role("radio", name="MLP update").click()
    expect(page).to_have_url(re.compile("site=mlp"))
    link = page.url
    server.restart()
    elsewhere = new_context().new_page()
    elsewhere.goto(link)
    expect(elsewhere.get_by_text("What each state would say")).to_be_visible()
    expect(elsewhere.get_by_role("spinbutton", name="Token")).to_have_value("3")
    expect(elsewhere.get_by_role("radio", name="MLP update")).to_be_checked()
    expect(elsewhere).to_have_url(link)


def test_block_edges_from_a_cell(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("lens", cell="2.1", **model))
    page.get_by_role("button", name="Block edges from here").click()
    expect(page.get_by_text("Does this one path matter?")).to_be_visible()
    expect(page.get_by_role("textbox", name=re.compile("One group of edges"))).to_have_value("last:2:0-2")
    expect(page.locator(".note").filter(has_text="log-odds").filter(has_text="→").first).to_contain_text(
        "cut in 3 layers"
    )


def test_block_edges_on_the_flow_page_itself(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("flow", cell="2.1", **model))
    expect(page.get_by_text("Does this one path matter?")).to_have_count(0)
    page.get_by_role("button", name="Block edges from here").click()
    expect(page.get_by_role("textbox", name=re.compile("One group of edges"))).to_have_value("last:2:0-2")


def test_every_figure_can_be_saved_and_read(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("flow", **model))
    page.locator(".st-key-export-map button:visible").first.click()
    expect(page.get_by_text("The same from Python:")).to_be_visible()
    expect(page.get_by_text("from factscope import load, Query, attention_knockout, KnockoutSpec")).to_be_visible()
    for form, start in (("CSV", b"position,layer"), ("SVG", b"<svg")):
        with page.expect_download() as download:
            page.get_by_role("button", name=form, exact=True).click()
        assert download.value.path().read_bytes().startswith(start)


def test_hostile_links_and_input_give_sentences(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("flow", cell="x.y", window="NaN", measure="<script>", **model))
    expect(page.get_by_text("window='NaN'")).to_be_visible()
    expect(page.get_by_text("measure='<script>'")).to_be_visible()
    ask(page, "<img src=x onerror=alert(1)> **$x$** :smile: [a](http://x.y)", "absent", "Paris")
    expect(page.get_by_text("absent").first).to_be_visible()
    expect(page.locator("img[src=x]")).to_have_count(0)
    expect(page.locator(".token").first).to_be_visible()
    expect(page.get_by_text("Traceback")).to_have_count(0)
    ask(page, "   ", "", "")
    expect(page.get_by_text("white space").or_(page.get_by_text("prompt is empty")).first).to_be_visible()


def test_the_keyboard_alone(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url(**model))
    expect(answer_chip(page)).to_contain_text("Paris")
    page.get_by_role("textbox", name="Prompt, up to the answer").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("The capital of France is")
    page.keyboard.press("Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Answer":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("Paris")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("capital\\+of\\+France"))
    expect(answer_chip(page)).to_contain_text("Paris")
    page.locator('.token[data-n="1"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("span=2-4"))
    page.get_by_role("link", name="Lens", exact=True).first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("What each state would say")).to_be_visible()
    page.get_by_role("spinbutton", name="Layer", exact=True).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"cell=\d+\.\d+"))


def test_twice_the_size(new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]) -> None:
    page = new_context(viewport={"width": 640, "height": 360}, device_scale_factor=2).new_page()
    page.goto(server.url("lens", **model))
    expect(page.get_by_text("What each state would say")).to_be_visible()
    expect(cell(page, 0, 0)).to_be_visible()
    expect(answer_chip(page)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
    page.get_by_role("button", name="Facts").click()
    expect(page.get_by_role("tab", name="Famous")).to_be_visible()
