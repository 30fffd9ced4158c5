"""Averages over queries: both means, ties apart, intervals over subjects."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import pytest

from factscope.errors import SpecError
from factscope.experiments import extraction_rates as rates
from factscope.experiments.attribute_extraction import ExtractionResult, ExtractionSpec
from factscope.experiments.attribute_extraction import run as extract
from factscope.experiments.extraction_rates import (
    extracting_layers,
    extraction_rates,
    first_sublayer,
    mapping_share,
    mean,
)
from factscope.experiments.heads import HeadsResult
from factscope.experiments.heads import run as heads
from factscope.queries import Query
from tests.oracle.laboratory import distinct_prompt, query_on, subject, words


@lru_cache
def real() -> tuple[ExtractionResult, HeadsResult]:
    chosen = subject("gpt2")
    query = query_on(distinct_prompt(chosen.model, 8, seed=1), (2, 5))
    return extract(chosen.handle, query), heads(chosen.handle, query)


def with_events(attention: str, mlp: str, name: str = "one") -> ExtractionResult:
    """A result whose layers have an event where the letter is x."""
    result, _ = real()
    rank = np.array([[1 if letter == "x" else 7 for letter in word] for word in (attention, mlp)])
    query = dataclasses.replace(result.query, query=dataclasses.replace(result.query.query, subject=name))
    return dataclasses.replace(result, target_rank=rank, query=query)


SOME = (
    ("x.x.", "...x", "a"),
    (".x..", ".x..", "a"),
    ("...x", "x...", "b"),
    ("....", "..x.", "c"),
    ("..x.", "....", "d"),
)


def results() -> list[ExtractionResult]:
    return [with_events(*letters) for letters in (*SOME, ("....", "....", "e"))]


def test_rates_by_layer_and_for_any() -> None:
    table = extraction_rates(results())
    assert list(table.columns) == ["site", "layer", "extraction_rate", "low", "high", "n"]
    own = table[table.site == "attention"]
    assert own.extraction_rate.tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 6, 1 / 6, 4 / 6])
    assert np.isnan(own.layer.iloc[-1])
    assert table[table.site == "mlp"].extraction_rate.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 6, 4 / 6])
    assert (table.n == 6).all()
    assert ((table.low <= table.extraction_rate) & (table.extraction_rate <= table.high)).all()


def test_both_means_of_extracting_layers() -> None:
    table = extracting_layers(results()).set_index(["site", "over"])
    assert table.loc[("attention", "all"), "extracting_layers"] == pytest.approx(5 / 6)
    assert table.loc[("attention", "extracted"), "extracting_layers"] == pytest.approx(5 / 4)
    assert table.loc[("attention", "extracted"), "n"] == 4
    assert table.loc[("mlp", "all"), "extracting_layers"] == pytest.approx(4 / 6)


def test_ties_stand_apart() -> None:
    found = first_sublayer(results())
    assert found == {
        "attention_first": 1, "tie": 1, "mlp_first": 1, "mlp_only": 1, "attention_only": 1, "neither": 1,
    }  # fmt: skip


def test_share_of_mappings_at_extracting_layers() -> None:
    _, split = real()

    def with_mapping(layer: int | None) -> HeadsResult:
        rank = np.full(split.mapping_rank.shape, 50)
        if layer is not None:
            rank[layer, 2] = 3
        return dataclasses.replace(split, mapping_rank=rank)

    pairs = [
        (with_events("x.x.", "....", "a"), with_mapping(2)),
        (with_events("x...", "....", "b"), with_mapping(2)),  # a mapping elsewhere does not count
        (with_events("....", "xxxx", "c"), with_mapping(1)),  # not extracted: not asked
        (with_events(".x..", "....", "d"), with_mapping(None)),
    ]
    share = mapping_share(pairs)
    assert share.n == 3
    assert share.value == pytest.approx(1 / 3)
    assert mapping_share(pairs[2:3]).n == 0
    assert np.isnan(mapping_share(pairs[2:3]).value)
    other = dataclasses.replace(split, target=dataclasses.replace(split.target, ids=(5,)))
    with pytest.raises(SpecError, match="pair"):
        mapping_share([(pairs[0][0], other)])


def test_a_subject_chosen_by_its_tokens_is_the_subject() -> None:
    """Not its prompt: two prompts about it are one subject to the bootstrap."""
    chosen = subject("gpt2")
    first, second = (distinct_prompt(chosen.model, 8, seed) for seed in (1, 2))
    second[2:5] = first[2:5]
    queries = [Query(prompt=words(ids), span=(2, 5)) for ids in (first, second)]
    found = [extract(chosen.handle, query) for query in queries]
    assert len({rates._subject(result) for result in found}) == 1


def test_intervals_draw_subjects_not_queries() -> None:
    """One subject asked fifty times is one subject."""
    values = [1.0] * 50 + [0.0] * 2
    together = mean(values, ["a"] * 50 + ["b", "c"])
    apart = mean(values, [str(i) for i in range(52)])
    assert together.value == apart.value == pytest.approx(50 / 52)
    assert apart.low > 0.85
    assert together.low == 0.0
    assert together.n == 52
    assert mean(values, ["a"] * 52) == mean(values, ["a"] * 52)
    assert mean([2.0] * 4, list("abcd")).low == 2.0


def test_what_does_not_go_together_is_refused() -> None:
    one = with_events("x...", "....")
    with pytest.raises(SpecError, match="no results"):
        extraction_rates([])
    with pytest.raises(SpecError, match="2 different specs"):
        first_sublayer([one, dataclasses.replace(one, spec=ExtractionSpec(edges="block:subject"))])
    with pytest.raises(SpecError, match="2 different models"):
        extracting_layers([one, dataclasses.replace(one, model=dataclasses.replace(one.model, weights="other"))])
    with pytest.raises(SpecError, match="partial"):
        extraction_rates([dataclasses.replace(one, target_rank=np.zeros((2, 4), dtype=int))])
