"""The Heads page in a real browser: a click on a head, its knockout on Flow, and the link on a cold server."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Server


def head_cell(page: Page, layer: int, head: int) -> Any:
    return page.locator(f'path[aria-label^="layer: {layer}; head: {head};"]').first


def facts(page: Page) -> Any:
    return page.locator(".note").filter(has_text="of its attention goes to the subject")


def test_click_a_head_knock_it_out_and_open_the_link_elsewhere(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    page = new_context().new_page()
    page.goto(server.url("heads", **model))
    expect(facts(page)).to_be_visible()
    head_cell(page, 1, 3).click()
    expect(facts(page)).to_contain_text("layer 1, head 3:")
    expect(page.get_by_role("spinbutton", name="Head")).to_have_value("3")
    expect(page).to_have_url(re.compile(r"cell=\d+\.1\.3"))
    link = page.url
    page.get_by_role("button", name="Knock out this head").click()
    expect(page.get_by_text("Does this one path matter?")).to_be_visible()
    expect(page.get_by_role("textbox", name=re.compile("One group of edges"))).to_have_value(
        re.compile(r"last:0-\d+:1:3")
    )
    expect(page.get_by_text("cut in 1 layer.")).to_be_in_viewport()
    server.restart()
    elsewhere = new_context().new_page()
    elsewhere.goto(link)
    expect(facts(elsewhere)).to_contain_text("layer 1, head 3:")
    expect(elsewhere).to_have_url(link)


def test_a_large_map_answers_a_click_within_a_second(page: Page, server: Server, tmp_path: Path) -> None:
    """48 layers of 25 heads and 40 tokens, computed before."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tiny_models import redraw, tiny_tokenizer

    tokenizer = tiny_tokenizer("byte")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=50, n_layer=48, n_head=25, n_positions=96, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config).eval()
    redraw(model, 3, scale=0.8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = "The mother tongue of Danielle Darrieux, who was born in the city of Bordeaux, is"
    page.goto(server.url("heads", model=str(tmp_path), prompt=prompt, subject="Danielle Darrieux", answer="French"))
    expect(page.get_by_text("Where it looks")).to_be_visible(timeout=60_000)
    expect(page.locator("[class*='st-key-cancel-']")).to_have_count(0, timeout=60_000)
    times = []
    for layer, head in ((30, 7), (12, 20), (47, 24)):
        target = head_cell(page, layer, head)
        expect(target).to_be_visible()
        began = time.perf_counter()
        target.click()
        expect(facts(page)).to_contain_text(f"layer {layer}, head {head}:")
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0, times  # the machine may be busy with other things
