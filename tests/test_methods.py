"""The cards of the methods: one text for pages, the docs page and the docstrings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from factscope.methods import METHODS, Method, markdown, page, plain


def test_the_docs_page_is_written_from_the_cards(repository: Path) -> None:
    assert (repository / "docs" / "methods.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_card_is_complete_and_plain(method: Method) -> None:
    assert method.question.endswith("?") and method.question.count("?") == 1
    assert len(method.recipe) == 4
    for text in (method.answer, *method.recipe, method.misleads, method.source):
        assert text[0].isupper() or not text[0].isalpha() or text.startswith("nostalgebraist"), text
        assert text.endswith("."), text
        assert not re.search(r"\*\*|\]\(|^\s*[-#]", text), text
    shown = markdown(method)
    for text in (method.question, method.answer, *method.recipe, method.dark, method.misleads, method.source):
        assert plain(text) in shown


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.module], ids=lambda m: m.module)
def test_the_docstring_of_the_experiment_opens_with_the_question_and_names_the_source(method: Method) -> None:
    module = importlib.import_module(f"factscope.experiments.{method.module}")
    doc = " ".join((module.__doc__ or "").split())
    assert doc.startswith(method.question)
    first_author = re.findall(r"[A-Za-z]+", method.source)[0]
    assert first_author in doc


def test_every_experiment_has_a_card(repository: Path) -> None:
    files = (repository / "factscope" / "experiments").glob("*.py")
    experiments = {file.stem for file in files if "\ndef run(" in file.read_text(encoding="utf-8")}
    assert len(experiments) >= 3
    assert experiments <= {method.module for method in METHODS.values()}


def test_every_card_that_a_page_asks_for_exists(repository: Path) -> None:
    pages = " ".join(file.read_text(encoding="utf-8") for file in (repository / "pages").glob("*.py"))
    asked = {*re.findall(r'panels\.heading\(.+, "(\w+)"\)', pages), *re.findall(r'method="(\w+)"', pages)}
    assert len(asked) >= 4
    assert asked <= set(METHODS)


def test_a_page_shows_a_card_as_it_is() -> None:
    def script() -> None:
        from dashboard import help

        help.card("edges", "here")

    at = AppTest.from_function(script).run()
    assert not at.exception
    assert [m.value for m in at.markdown] == [markdown(METHODS["edges"]).strip()]
    assert r"or \*) and" in at.markdown[0].value
