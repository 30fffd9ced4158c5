"""Numbers read from logits, against float64 and against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factscope import measures

logits_of = st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=12).map(torch.tensor)
check = settings(max_examples=100, deadline=None)


@check
@given(logits_of, st.data())
def test_probability_rank_entropy_and_log_odds(logits: torch.Tensor, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    wide = logits.double()
    p = wide.softmax(dim=-1)
    others = torch.cat([wide[:token], wide[token + 1 :]])
    assert float(measures.probability(logits, token)) == pytest.approx(float(p[token]), abs=1e-6)
    assert float(measures.log_probabilities(logits)[token]) == pytest.approx(float(p[token].log()), abs=1e-4)
    assert float(measures.log_odds(logits, token)) == pytest.approx(float(wide[token] - others.logsumexp(0)), abs=1e-4)
    assert int(measures.rank(logits, token)) == 1 + sum(float(v) > float(logits[token]) for v in logits)
    assert float(measures.entropy(logits)) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    foil = data.draw(st.integers(0, len(logits) - 1))
    assert float(measures.logit_difference(logits, token, foil)) == float(logits[token] - logits[foil])


@check
@given(logits_of)
def test_probabilities_sum_to_one_and_shifts_do_not_matter(logits: torch.Tensor) -> None:
    assert float(measures.log_probabilities(logits).exp().sum()) == pytest.approx(1, abs=1e-5)
    moved = measures.log_odds(logits + 3, 0)
    assert float(moved) == pytest.approx(float(measures.log_odds(logits, 0)), abs=1e-4)


@pytest.mark.parametrize("gap", [0.0, 5.0, 12.0, 20.0, 40.0])
def test_log_odds_do_not_saturate(gap: float) -> None:
    """At a gap of 20 the probability is 1 in float32."""
    assert float(measures.log_odds(torch.tensor([gap, 0.0]), 0)) == pytest.approx(gap, abs=1e-5)
    assert float(measures.log_odds(torch.tensor([gap, 0.0]), 1)) == pytest.approx(-gap, abs=1e-5)


@pytest.mark.parametrize("p", [1e-12, 0.001, 0.5, 0.9, 1 - 1e-9])
def test_log_odds_of_a_log_probability(p: float) -> None:
    log_p = torch.tensor([math.log1p(p - 1)], dtype=torch.float64)
    expected = math.log(p) - math.log1p(-p)
    assert float(measures.log_odds_of_log_probability(log_p)) == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_read_in_float32() -> None:
    logits = torch.tensor([[3.0, 1.0, -2.0]], dtype=torch.bfloat16)
    for value in (measures.log_probabilities(logits), measures.log_odds(logits, 0), measures.entropy(logits)):
        assert value.dtype == torch.float32
    assert measures.log_probabilities(logits.double()).dtype == torch.float64
    expected = float(logits.double().softmax(-1)[0, 0])
    assert float(measures.probability(logits, 0)[0]) == pytest.approx(expected, abs=1e-7)


def test_inputs_are_left_alone_and_batches_are_rows() -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    assert measures.log_odds(logits, 4).shape == measures.rank(logits, 4).shape == (3, 5)
    assert torch.equal(measures.log_odds(logits, 4)[1, 2], measures.log_odds(logits[1, 2], 4))
    assert torch.equal(logits, before)


def test_ties_share_the_better_rank() -> None:
    logits = torch.tensor([2.0, 5.0, 2.0, 1.0])
    assert measures.rank(logits, 2) == measures.rank(logits, 0) == 2
