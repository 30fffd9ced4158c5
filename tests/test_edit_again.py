"""Probes of one weight state do not stand for another: they are asked again, and until then it is said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import probes, runs, stack
from dashboard.link import ModelChoice
from dashboard.stack import Entry
from factscope.editors.edit import with_edits
from factscope.experiments import editing
from factscope.queries import Query
from tests.edit_pages import JAPAN, VISITOR, own, page
from tests.test_dashboard_pages import parts, said, settle


@pytest.fixture(autouse=True)
def _no_stacks() -> Iterator[None]:
    stack.stacks.clear()
    yield
    stack.stacks.clear()


def shown(at: AppTest) -> list[float]:
    """p of the edit's target after it, in the table of probes."""
    return next(frame.value for frame in at.dataframe if "target change" in frame.value)["target after"].tolist()


def verdict(at: AppTest) -> str:
    """The colour of the verdict."""
    return next(data["tone"] for data in parts(at) if any("The edit " in line for line in data.get("lines", [])))


def two_edits(at: AppTest) -> tuple[Entry, Entry]:
    """Two edits of one fact in the stack of a page, the second computed with the first on."""
    query = Query(**JAPAN)
    with runs.use(ModelChoice()) as model:
        for number, answer in enumerate(("Rome", "Oslo")):
            settings = (("steps", 4), ("learning_rate", 1.0), ("contexts", "none"))
            spec = editing.EditingSpec(
                new_answer=answer, layers=(1,), settings=settings, evaluation=editing.EvaluationSpec(texts=1)
            )
            made = editing.run(with_edits(model, [entry.edit for entry in own(at).entries()]), query, spec)
            assert own(at).push(made.edits[0], ModelChoice(), made).number == number + 1
    first, second = own(at).entries()
    return first, second


def test_the_probes_of_another_weight_state_are_said_to_be_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    at = page("fact", **JAPAN)
    first, second = two_edits(at)
    monkeypatch.setattr(runs, "ASK_ABOVE_SECONDS", -1.0)
    alone = page(visitor=at.session_state[VISITOR], **JAPAN, edits=second.key)
    both = probes.table(second.evaluation)["target after"].tolist()
    assert "These probes were asked with edits 1 and 2 on; now only edit 2 is." in said(alone)
    assert verdict(alone) == "plain" and shown(alone) == both

    settle(alone.button(key="edit-ask-again").click().run())
    with runs.use(ModelChoice()) as model:
        asked = editing.evaluate(model, second.edit, spec=second.evaluation.spec.evaluation, query=Query(**JAPAN))
    assert shown(alone) == pytest.approx(probes.table(asked)["target after"].tolist(), abs=1e-6)
    assert shown(alone) != pytest.approx(both, abs=1e-3)
    assert "Asked again: the first time it was with edits 1 and 2 on; now only edit 2 is." in said(alone)
    assert verdict(alone) != "plain"

    settle(alone.toggle(key=f"edit-on-{first.key}").set_value(True).run())
    assert shown(alone) == both and "now only" not in said(alone) and verdict(alone) != "plain"
