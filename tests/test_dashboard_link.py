"""The page address: what it keeps, and what it makes of anything that somebody may write there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.link import (
    HOME,
    MAX_EDGES,
    MAX_PROMPT,
    Cursor,
    EditChoice,
    FlowChoice,
    LayersChoice,
    LensChoice,
    ModelChoice,
    PatchChoice,
    TraceChoice,
    View,
    parse,
    to_params,
)
from factscope.queries import Query

VIEW = View(
    fact=Query(
        prompt="Beats Music is owned by",
        subject="Beats Music",
        answer="Apple",
        foil="Sony",
        occurrence=1,
        span=(1, 4),
        bos="yes",
        score="sequence",
    ),
    model=ModelChoice(name="openai-community/gpt2", revision="main", dtype="bfloat16", device="cpu"),
    cursor=Cursor(position=3, layer=-1),
    flow=FlowChoice(
        sources=("subject-last", "3-5"),
        window=5,
        measure="log_odds",
        control=0,
        null="weights",
        seed=7,
        edges=("last:subject:3-6", "last:0:*"),
    ),
    lens=LensChoice(site="mlp", projection="raw", value="entropy", transpose=True, pinned=(5, 9)),
    patch=PatchChoice(
        prompt="Pears are sold by",
        subject="Pears",
        answer="Sony",
        direction="into_other",
        site="mlp",
        measure="probability",
    ),
    trace=TraceChoice(
        window=4,
        samples=3,
        noise="u0.5",
        seeds=(4, 2),
        sever="mlp",
        draws="compat",
        replace=True,
        extra=2,
        other="Louvre Palace",
        measure="log_odds",
        roles="attention",
    ),
    edit=EditChoice(method="memit", problem="fact-erasure", preset="memit", layers=(2, 3), settings=("steps=5",)),
    layers=LayersChoice(site="attention", together=3),
)


def test_the_home_view_has_no_parameters() -> None:
    assert to_params(View()) == {}
    assert parse({}) == (View(), [])


def test_everything_survives_the_address() -> None:
    found, errors = parse(to_params(VIEW))
    assert errors == []
    assert found == VIEW


@pytest.mark.parametrize("change", [{"foil": "Rome"}, {"bos": "no"}, {"score": "sequence"}, {"span": (1, 3)}])
def test_small_changes_of_the_home_fact_survive(change: dict[str, object]) -> None:
    view = View(fact=replace(HOME, **change))  # type: ignore[arg-type]
    assert parse(to_params(view)) == (view, [])


def test_a_prompt_without_the_rest_is_no_mixture_with_the_home_fact() -> None:
    found, errors = parse({"prompt": ["The capital of Japan is"]})
    assert errors == []
    assert found.fact == Query(prompt="The capital of Japan is")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("window", "NaN", "window='NaN'"),
        ("window", "0", "from 1 to 999"),
        ("window", "1e3", "whole number"),
        ("window", "٣", "whole number"),
        ("control", "-1", "from 0 to 50"),
        ("seed", "99999999999999999999", "whole number"),
        ("cell", "3", "POSITION.LAYER"),
        ("cell", "-1.2", "POSITION.LAYER"),
        ("cell", "1.99999", "POSITION.LAYER"),
        ("span", "5-2", "START-STOP"),
        ("span", "a-b", "START-STOP"),
        ("measure", "<script>alert(1)</script>", "percent, log_odds, logit_difference"),
        ("site", "residual", "block, mlp, attention"),
        ("value", "", None),
        ("bos", "maybe", "auto, yes, no"),
        ("dtype", "int8", "float32"),
        ("pin", "-4", "whole number"),
        ("prompt", "x" * (MAX_PROMPT + 1), "2,001 characters"),
        ("subject", "a\x00b", "not text"),
        ("sources", ",,,", "subject,relation,last"),
        ("occurrence", "2", "no prompt"),
        ("seeds", "1,1", "different whole numbers"),
        ("seeds", "1,x", "different whole numbers"),
        ("cf-direction", "back", "into_query, into_other"),
        ("samples", "0", "from 1 to 100"),
        ("sever", "both", "none, mlp, attention"),
        ("trace-window", "0", "from 1 to 999"),
        ("roles", "block", "hidden, mlp, attention"),
        ("layers-site", "<b>mlp</b>", "hidden, mlp, attention"),
        ("edit-window", "0", "from 1 to 999"),
        ("edit-window", "all", "whole number"),
    ],
)
def test_what_cannot_be_used_gives_a_sentence_and_the_default(name: str, value: str, says: str | None) -> None:
    found, errors = parse({name: [value]})
    assert found == View()
    if says is None:
        assert errors == []
    else:
        assert len(errors) == 1
        assert says in str(errors[0])
        assert str(errors[0]).endswith(".")


def test_an_endless_address_is_refused_as_a_whole() -> None:
    found, errors = parse({f"x{i}": ["y" * 100] for i in range(200)})
    assert found == View()
    assert "longer than" in str(errors[0])


def test_repeated_values_are_bounded() -> None:
    found, _ = parse({"edge": [f"last:{i}:*" for i in range(50)], "window": ["3", "5"]})
    assert len(found.flow.edges) == MAX_EDGES
    assert found.flow.window == 5


@given(st.dictionaries(st.sampled_from([*to_params(VIEW), "unknown"]), st.lists(st.text(max_size=60), max_size=3)))
def test_any_address_gives_a_view_that_its_own_address_gives_again(params: dict[str, list[str]]) -> None:
    view, errors = parse(params)
    assert all(str(error).endswith(".") for error in errors)
    again, none = parse(to_params(view))
    assert none == []
    assert again == view
