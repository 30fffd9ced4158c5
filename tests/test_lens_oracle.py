"""The lens equals final norm and head written out in float64, at every site, raw and normed."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.experiments.logit_lens import LensResult, LensSpec, run
from tests.oracle.laboratory import Subject, distinct_prompt, query_on, subject
from tests.oracle.plain import Trace

FAMILIES = ("gpt2", "llama")
SITES: tuple[Literal["block", "mlp", "attention"], ...] = ("block", "mlp", "attention")
PROJECTIONS: tuple[Literal["normed", "raw"], ...] = ("normed", "raw")
ROUNDING = 1e-5
LENGTH = 9
TOP_K = 7


@lru_cache
def known(family: str) -> tuple[Subject, list[int], Trace]:
    chosen = subject(family, 4, 0, 1.5)
    ids = distinct_prompt(chosen.model, LENGTH, seed=3)
    return chosen, ids, chosen.trace(ids)


def expected_logits(family: str, site: str, projection: str) -> Tensor:
    """[layer, position, vocabulary] in float64; the embedding first where the site is the block."""
    chosen, _, trace = known(family)
    states = {
        "block": torch.cat([trace.embedding[None], trace.blocks]),
        "mlp": trace.mlp,
        "attention": trace.attention,
    }[site]
    return chosen.normed(states) if projection == "normed" else chosen.raw(states)


@lru_cache
def found(family: str, site: Literal["block", "mlp", "attention"], projection: Literal["normed", "raw"]) -> LensResult:
    chosen, ids, _ = known(family)
    spec = LensSpec(site=site, projection=projection, top_k=TOP_K, pinned=(11, 60))
    return run(chosen.handle, query_on(ids, (2, 5)), spec)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_lens_is_the_plain_projection(
    family: str, site: Literal["block", "mlp", "attention"], projection: Literal["normed", "raw"]
) -> None:
    result = found(family, site, projection)
    logits = expected_logits(family, site, projection)
    p = logits.softmax(dim=-1).numpy()
    within = ROUNDING * max(1.0, float(logits.abs().max()) / 40)  # a logit of 80 is rounded to 4e-6 in float32
    target = result.target.ids[0]
    assert result.layers == (tuple(range(-1, 4)) if site == "block" else tuple(range(4)))
    assert result.positions == tuple(range(LENGTH))
    assert result.top_ids.shape == (len(result.layers), LENGTH, TOP_K)
    close(np.take_along_axis(p, result.top_ids, axis=-1), result.top_probability, within)
    assert_top(result.top_ids, p)
    close(p[..., target], result.target_probability, within)
    assert_rank(result.target_rank, p, target)
    entropy = -(p * np.log(p)).sum(axis=-1)
    close(entropy, result.entropy, 1e-4)
    for i, token in enumerate((11, 60)):
        close(p[..., token], result.pinned_probability[..., i], within)
        assert_rank(result.pinned_rank[..., i], p, token)


def close(expected: np.ndarray, computed: np.ndarray, within: float = ROUNDING) -> None:
    assert np.isfinite(computed).all()
    assert float(np.abs(expected - computed).max()) <= within


def assert_top(ids: np.ndarray, p: np.ndarray) -> None:
    """The same tokens in the same order, but for exchanges between tokens that rounding cannot tell apart."""
    order = np.argsort(-p, axis=-1)[..., :TOP_K]
    differs = order != ids
    a, b = np.take_along_axis(p, order, -1)[differs], np.take_along_axis(p, ids, -1)[differs]
    assert (np.abs(a - b) <= ROUNDING).all()
    assert differs.mean() < 0.01
    assert all(len(set(cell)) == TOP_K for cell in ids.reshape(-1, TOP_K).tolist())


def assert_rank(ranks: np.ndarray, p: np.ndarray, token: int) -> None:
    """One plus the tokens that are more probable; tokens within rounding of the target may count either way."""
    own = p[..., token, None]
    slack = own * 1e-4
    fewest = 1 + (p > own + slack).sum(axis=-1)
    most = 1 + ((p > own - slack).sum(axis=-1) - 1)
    assert ((fewest <= ranks) & (ranks <= most)).all()
    assert (fewest == most).mean() > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_last_row_is_the_models_output(family: str) -> None:
    chosen, ids, trace = known(family)
    result = found(family, "block", "normed")
    with torch.no_grad():
        own = chosen.model(torch.tensor([ids])).logits[0].softmax(-1).numpy()
    close(np.take_along_axis(own, result.top_ids[-1], -1), result.top_probability[-1])
    assert result.p_target == pytest.approx(result.target_probability[-1, -1], abs=5e-6)
    assert result.rank == result.target_rank[-1, -1] == 1
    assert result.target.ids[0] == int(trace.logits[-1].argmax())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_tell_different_stories(family: str) -> None:
    """A lens that repeated one row would pass nothing here."""
    for site in SITES:
        for projection in PROJECTIONS:
            p = expected_logits(family, site, projection).softmax(-1)
            steps = (p[1:] - p[:-1]).abs().amax(dim=-1)
            assert float((steps > 0.05).double().mean()) >= 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_column_knows_only_its_own_token(family: str) -> None:
    chosen, ids, _ = known(family)
    other = [*ids]
    other[3] = next(t for t in range(3, 97) if t not in ids)
    changed = run(chosen.handle, query_on(other, (5, 7)), LensSpec(top_k=TOP_K))
    same = found(family, "block", "normed")
    where = [p for p in range(LENGTH) if p != 3]
    assert (changed.top_ids[0, where] == same.top_ids[0, where]).all()
    assert (changed.top_ids[0, 3] != same.top_ids[0, 3]).any()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_chosen_positions_are_columns_of_the_whole(projection: Literal["normed", "raw"]) -> None:
    chosen, ids, _ = known("llama")
    spec = LensSpec(projection=projection, top_k=TOP_K, positions=("last", "subject", "0"))
    part = run(chosen.handle, query_on(ids, (2, 5)), spec)
    whole = found("llama", "block", projection)
    assert part.positions == (0, 2, 3, 4, LENGTH - 1)
    assert (part.top_ids == whole.top_ids[:, list(part.positions)]).all()
    close(whole.entropy[:, list(part.positions)], part.entropy, 1e-5)


def test_table_holds_every_cell() -> None:
    result = found("gpt2", "mlp", "raw")
    table = result.table()
    assert len(table) == 4 * LENGTH * TOP_K
    row = table[(table.layer == 3) & (table.position == 4) & (table["rank"] == 2)].iloc[0]
    assert row["id"] == result.top_ids[3, 4, 1]
    assert row.probability == result.top_probability[3, 4, 1]
    assert row.target_rank == result.target_rank[3, 4]


def test_partial_results_fill_in() -> None:
    """Progress tells the whole from the start, never goes back, and leaves no cell out."""
    chosen, ids, _ = known("gpt2")
    seen: list[tuple[int, int, LensResult | None]] = []
    run(chosen.handle, query_on(ids, (2, 5)), LensSpec(), progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][1] == 5
    for count, _, partial in seen:
        if partial is not None:
            assert int((~np.isnan(partial.entropy)).all(axis=1).sum()) == count
