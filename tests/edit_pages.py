"""What the tests of the Edit page share: pages on the bundled model, an edit by hand, Apply and waiting for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

from dashboard import stack
from dashboard.stack import Stack
from tests.test_dashboard_pages import parts, said, settle

ROOT = Path(__file__).resolve().parents[1]
JAPAN: dict[str, Any] = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}
FRANCE: dict[str, Any] = {"prompt": "The capital of France is", "subject": "France", "answer": "Paris"}
QUICK: dict[str, Any] = {"layers": "1", "set": ["steps=4", "learning_rate=1.0", "contexts=none"]}
"""Settings with which an edit takes a second and works well enough."""
VISITOR = "visitor-without-cookie"
PATIENCE = 240.0


def page(name: str = "edit", *, visitor: str | None = None, **params: Any) -> AppTest:
    """A page; ``visitor`` is whom it belongs to."""
    at = AppTest.from_file(str(ROOT / "dashboard" / "main.py"), default_timeout=120)
    for key, value in params.items():
        at.query_params[key] = value
    if visitor is not None:
        at.session_state[VISITOR] = visitor
    if name != "fact":
        at.switch_page(str(ROOT / "pages" / f"{name}.py"))
    return settle(at.run())


def own(at: AppTest) -> Stack:
    """The stack of a page's visitor."""
    return stack.stacks().of(at.session_state[VISITOR])


def badge(at: AppTest) -> str:
    """What the frame says of the weights."""
    return next(m.value for m in at.markdown if "weights" in m.value or "EDITED" in m.value)


def chip(at: AppTest) -> dict[str, Any]:
    """The chip of the answer."""
    return next(data for data in parts(at) if "tokens" in data)["chips"][0]


def start(at: AppTest, new_answer: str | None = None) -> AppTest:
    """Name the new answer, and press Apply."""
    if new_answer is not None:
        settle(at.text_input(key="edit-target").set_value(new_answer).run())
    return at.button(key="edit-apply").click().run()


def wait_for(at: AppTest, shown: str) -> AppTest:
    """Run until the badge or a note says it."""
    deadline = time.monotonic() + PATIENCE
    while not any(shown in m.value for m in at.markdown) and shown not in said(at):
        assert time.monotonic() < deadline, said(at)
        time.sleep(0.2)
        at.run()
    return settle(at)
