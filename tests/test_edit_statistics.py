"""Statistics of keys that are missing: what the page says, offers and does, and where it may not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from streamlit.testing.v1 import AppTest

from dashboard import edit_statistics, runs, stack, uploads
from dashboard.link import ModelChoice
from factscope.editors import collecting
from factscope.editors.second_moments import stored
from tests import test_dashboard_pages
from tests.edit_pages import page, start, wait_for
from tests.test_dashboard_pages import said, settle

tiny = test_dashboard_pages.tiny
TEXT = "\n\n".join(f"The tower number {n} of the town stands near river {n * 7}." for n in range(120)).encode()
OTHER = TEXT.replace(b"tower", b"bridge")
ASKED = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "answer": "Paris", "new-answer": "Rome"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FACTSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    stack.stacks.clear()
    yield
    stack.stacks.clear()


@pytest.fixture
def at(tiny: str) -> AppTest:
    return page(**ASKED, model=tiny, layers="1", set=["steps=2", "contexts=none"])


def test_what_is_missing_is_said_and_nothing_starts(at: AppTest) -> None:
    assert "no statistics of keys" in said(at) and "layer 1" in said(at)
    assert "Nothing is collected unasked" in said(at)
    assert at.button(key="edit-apply").disabled
    assert any("factscope statistics" in block.value for block in at.code)
    assert not stored()


def test_the_edit_without_statistics_is_offered_and_labelled(at: AppTest) -> None:
    settle(at.button(key="edit-identity").click().run())
    assert "identity, no statistics" in said(at)
    assert not at.button(key="edit-apply").disabled
    wait_for(start(at), "EDITED")
    assert "no statistics of keys were used (identity)" in said(at)


def test_a_text_is_collected_from_after_its_cost_was_told(at: AppTest) -> None:
    settle(at.file_uploader(key="edit-collect-file").upload("about <towers>.txt", TEXT).run())
    assert "tokens of 120 paragraphs" in said(at) and "on disk" in said(at)
    assert not stored()
    settle(at.button(key="edit-collect").click().run())
    wait_for(at, "Statistics of keys: about")
    (entry,) = stored()
    assert entry.layer == 1 and entry.n_tokens > 1000 and "/" not in entry.origin
    assert not at.button(key="edit-apply").disabled
    wait_for(start(at), "EDITED")


def test_a_collection_that_is_cancelled_goes_on_where_it_stopped(
    at: AppTest, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = collecting._sum_up
    batches: list[int] = []
    released = threading.Event()

    def held(*given: Any) -> None:
        batches.append(1)
        if len(batches) == 2:
            released.wait(60)
        add(*given)

    settle(at.file_uploader(key="edit-collect-file").upload("towers.txt", OTHER).run())
    monkeypatch.setattr(collecting, "_sum_up", held)
    at.button(key="edit-collect").click().run()
    deadline = time.monotonic() + 60
    while len(batches) < 2 or not any(button.key == "cancel-edit-collect" for button in at.button):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        at.run()
    assert any("tokens" in bar.proto.text for bar in at.get("progress"))
    at.button(key="cancel-edit-collect").click().run()
    released.set()
    wait_for(at, "goes on from there")
    assert not stored() and len(batches) == 2
    assert at.button(key="edit-collect").label == "Go on"
    settle(at.button(key="edit-collect").click().run())
    wait_for(at, "Statistics of keys: towers")
    (resumed,) = stored()
    first_and_second = len(batches)
    monkeypatch.setenv("FACTSCOPE_CACHE_DIR", str(tmp_path / "another"))
    batches[:] = [1, 1, 1]
    text = tmp_path / "towers.txt"
    text.write_bytes(OTHER)
    with runs.use(ModelChoice(name=tiny)) as model:
        (whole,) = collecting.collect(model, collecting.read_corpus(text), (1,))
    assert len(batches) - 3 == first_and_second > 2
    assert resumed.n_tokens == whole.n_tokens
    torch.testing.assert_close(load_file(resumed.path), load_file(whole.path))


def test_a_server_for_others_takes_no_text(at: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert edit_statistics.allowed()
    assert {one.key for one in at.file_uploader} == {"edit-file", "edit-collect-file"}
    monkeypatch.setattr(edit_statistics, "allowed", lambda: False)
    settle(at.run())
    assert "takes no texts for statistics" in said(at)
    assert [one.key for one in at.file_uploader] == ["edit-file"]
    assert any(button.key == "edit-identity" for button in at.button)
    monkeypatch.undo()
    monkeypatch.setenv("FACTSCOPE_MODELS_ALLOWED", "bundled")
    assert not edit_statistics.allowed()


def test_statistics_from_a_file_of_the_server_are_refused_where_models_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FACTSCOPE_MODELS_ALLOWED", "bundled")
    at = page(**ASKED, layers="1", set="statistics=/etc/hostname.npz")
    assert "this server reads none" in said(at)


def test_a_text_that_is_too_large_is_refused(at: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 10)
    settle(at.file_uploader(key="edit-collect-file").upload("towers.txt", TEXT).run())
    assert "more than 10 bytes" in said(at)
