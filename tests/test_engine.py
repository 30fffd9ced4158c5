"""The engine: chunks, batches and cached prefixes change no number; refusals and progress keep their promises."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from factscope.columns import control_of
from factscope.errors import SpecError
from factscope.experiments.attention_knockout import KnockoutResult, KnockoutSpec, control_sets, run
from factscope.interventions import engine
from factscope.interventions.attention import Cut, default_flow_window, keep_masks, window
from factscope.interventions.base import record_base
from factscope.interventions.intervention import Intervention
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle
from factscope.tokens import TokenizedQuery, tokenize
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, subject
from tests.oracle.plain import layers_of_window
from tests.tiny_models import FAMILIES

LENGTH, LAST, SPAN = 8, 7, (2, 5)


@lru_cache
def known(name: str) -> tuple[ModelHandle, list[int]]:
    model = subject(name).model if name in ("gpt2", "llama") else FAMILIES[name](0)
    return handle_of(model, name), distinct_prompt(model, LENGTH, seed=1)


def cut(layer: int, queries: tuple[int, ...], keys: tuple[int, ...], heads: tuple[int, ...] | None = None) -> Cut:
    return Cut(layer=layer, queries=queries, keys=keys, heads=heads)


def knockouts_of_all_kinds() -> list[Intervention]:
    """Different first layers and positions, doubles, heads, nothing at all, and edges into the future."""
    single = [Intervention(cuts=(cut(layer, (LAST,), (key,)),)) for layer in range(4) for key in range(LENGTH)]
    early = [Intervention(cuts=(cut(1, (q,), (q - 1,)), cut(2, (LAST,), (0, 1)))) for q in (3, 5, 6)]
    heads = [Intervention(cuts=(cut(2, (LAST,), (2, 3), (0, 2)), cut(2, (LAST,), (5,), (1,))))]
    nothing = [Intervention(cuts=()), Intervention(cuts=(cut(1, (3,), (4, 5)),))]
    return [*single, *early, *heads, *nothing, *single[:3], *early[:1]]


def answers(handle: ModelHandle, ids: list[int], knockouts: list[Intervention], n_readout: int = 1) -> np.ndarray:
    base = record_base(handle, ids, n_readout=n_readout)
    found: dict[int, np.ndarray] = {}
    for indices, readout in engine.run(handle, base, knockouts):
        logits = readout.logits()[:, 0]
        assert logits.shape == (len(indices), n_readout, handle.vocabulary)
        assert not set(indices) & set(found)
        found |= dict(zip(indices, logits.softmax(-1).numpy(), strict=True))
    assert sorted(found) == list(range(len(knockouts)))
    return np.stack([found[i] for i in range(len(knockouts))])


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom"])
@pytest.mark.parametrize("n_readout", [1, 3])
def test_batches_and_chunks_change_nothing(name: str, n_readout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, ids = known(name)
    knockouts = knockouts_of_all_kinds()
    many = answers(handle, ids, knockouts, n_readout)
    for rows in (1, 5, 64):
        monkeypatch.setattr(engine, "MAX_ROWS", rows)
        assert float(np.abs(answers(handle, ids, knockouts, n_readout) - many).max()) <= 1e-5
    monkeypatch.undo()
    monkeypatch.setattr(engine, "CACHE_BUDGET", 1)
    assert float(np.abs(answers(handle, ids, knockouts, n_readout) - many).max()) <= 1e-5
    assert float(np.abs(many - many[-5]).max(axis=(1, 2)).mean()) > 0.02


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mpt"])
def test_the_cached_prefix_equals_whole_forwards(name: str) -> None:
    handle, ids = known(name)
    knockouts = knockouts_of_all_kinds()
    fast = answers(handle, ids, knockouts)
    for knockout, found in zip(knockouts, fast, strict=True):
        keep = keep_masks([knockout.cuts], LENGTH, 0, handle.info.n_heads, handle.device)
        whole = handle.forward(torch.tensor([ids]), Plan(keep=keep), last=1)[0].softmax(-1).numpy()
        assert float(np.abs(whole - found).max()) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
@pytest.mark.parametrize("missing", ["suffix", "resume"])
def test_slower_paths_give_the_same(name: str, missing: str) -> None:
    """A family without a usable cache, or that cannot be resumed, runs more of the model and answers alike."""
    from factscope.models.handle import Capability

    handle, ids = known(name)
    lacking = {"suffix", "resume"} if missing == "resume" else {"suffix"}
    slow = {key: Capability(ok=key not in lacking, reason="") for key in handle.capabilities}
    original = handle.capabilities
    fast = answers(handle, ids, knockouts_of_all_kinds())
    object.__setattr__(handle, "capabilities", slow)
    try:
        assert float(np.abs(answers(handle, ids, knockouts_of_all_kinds()) - fast).max()) <= 1e-5
    finally:
        object.__setattr__(handle, "capabilities", original)


def test_the_base_run_is_the_plain_model_and_stays_as_it_was() -> None:
    handle, ids = known("llama")
    base = record_base(handle, ids, n_readout=2)
    plain = handle.forward(torch.tensor([ids]))
    assert float((base.logits[0] - plain[0, -2:]).abs().max()) <= 1e-4
    before = [t.clone() for t in (*base.states, *base.keys, *base.values, base.logits)]
    for _ in engine.run(handle, base, knockouts_of_all_kinds()):
        pass
    after = [*base.states, *base.keys, *base.values, base.logits]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_run_that_cuts_nothing_is_the_base_run() -> None:
    handle, ids = known("gpt2")
    base = record_base(handle, ids)
    nothing = [Intervention(cuts=()), Intervention(cuts=(cut(0, (2,), (3, 7)),))]
    ((indices, readout),) = list(engine.run(handle, base, nothing))
    logits = readout.logits()
    assert sorted(indices) == [0, 1]
    assert torch.equal(logits[0], base.logits)
    assert torch.equal(logits[1], base.logits)


def test_empty_rows_are_refused_and_named() -> None:
    handle, ids = known("llama")
    for spec in (
        KnockoutSpec(edges=("last:0-7:1",)),
        KnockoutSpec(edges=("last:0-3:1", "last:4-7:1")),
        KnockoutSpec(edges=("last:0-3:1:0", "last:4-7:1:0-1")),
        KnockoutSpec(edges=("0:0:1",)),
    ):
        with pytest.raises(SpecError, match="layer 1"):
            run(handle, query_on(ids, SPAN), spec)
    run(handle, query_on(ids, SPAN), KnockoutSpec(edges=("last:0-3:1", "last:4-7:2", "last:0-6:3")))


def test_a_sliding_window_counts_when_rows_are_refused() -> None:
    """Mistral here sees four positions: 4 to 7 are all that the last one has, whatever stands before."""
    handle, ids = known("mistral")
    with pytest.raises(SpecError, match="nothing to attend to"):
        run(handle, query_on(ids, SPAN), KnockoutSpec(edges=("last:4-7:2",)))
    result = run(handle, query_on(ids, SPAN), KnockoutSpec(edges=("last:0-3:2",)))
    assert result.p_knockout[0, 0] == pytest.approx(result.p_base, abs=1e-6)
    sees_all, words = known("llama")
    run(sees_all, query_on(words, SPAN), KnockoutSpec(edges=("last:4-7:2",)))


def test_edges_into_the_future_change_nothing_and_say_so() -> None:
    handle, ids = known("gpt2")
    result = run(handle, query_on(ids, SPAN), KnockoutSpec(sources=("each",), target_position=4))
    assert (result.p_knockout[5:] == result.p_base).all()
    assert (result.relative_change_percent[5:] == 0).all()
    assert any("future" in warning for warning in result.warnings)
    edge = run(handle, query_on(ids, SPAN), KnockoutSpec(edges=("3:5:*",)))
    assert edge.p_knockout[0, 0] == edge.p_base
    assert any("future" in warning for warning in edge.warnings)


def test_progress_fills_the_grid_and_ends_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, ids = known("gpt2")
    monkeypatch.setattr(engine, "WAVE_WORK", 1)
    steps: list[tuple[int, int, KnockoutResult]] = []
    final = run(
        handle, query_on(ids, SPAN), KnockoutSpec(sources=("each",), window=1), progress=lambda *s: steps.append(s)
    )
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)
    assert steps[-1][0] == steps[-1][1] == 4 * LENGTH
    assert len(steps) > 3
    assert steps[0] == (0, 4 * LENGTH, None)  # before the plain run, which may take its time
    shown = [(done, partial) for done, _, partial in steps if partial is not None]
    for done, partial in shown:
        known_cells = ~np.isnan(partial.p_knockout)
        assert int(known_cells.sum()) == done == len(partial.table())
        assert np.array_equal(partial.p_knockout[known_cells], final.p_knockout[known_cells])
    first = np.flatnonzero(~np.isnan(shown[1][1].p_knockout).all(axis=0))
    assert len(first) >= 1


@pytest.mark.parametrize("n_layers", [1, 2, 8, 12, 48])
def test_windows_are_those_of_the_paper(n_layers: int) -> None:
    for center, size in itertools.product(range(n_layers), range(1, n_layers + 1)):
        assert list(window(center, size, n_layers)) == layers_of_window(center, size, n_layers)


def test_default_windows() -> None:
    assert [default_flow_window(n) for n in (4, 8, 12, 24, 28, 48)] == [3, 3, 3, 5, 5, 9]


@pytest.mark.parametrize("name", ["subject", "relation", "last", "subject-first", "2-4", "0", "0+5"])
def test_controls_match_their_source_and_lie_outside_it(name: str) -> None:
    handle, _ = known("gpt2")
    ids = distinct_prompt(subject("gpt2").model, 16, seed=2)
    for span in ((0, 8), (4, 9), (2, 11)):
        seen: TokenizedQuery = tokenize(query_on(ids, span), handle.tokenizer)
        own = {p for part in name.split("+") for p in seen.positions(part)}
        drawn, warnings = control_sets(seen, name, tuple(own), 5, seed=5)
        others = 14 - len(own - {0})
        if len(own - {0}) == 0 or len(own - {0}) > others:
            assert drawn == []
            assert warnings[0].startswith("no control")
            continue
        again, _ = control_sets(seen, name, tuple(own), 5, seed=5)
        assert 1 <= len(drawn) == len(set(drawn)) <= 5
        assert drawn == again
        if math.comb(others, len(own - {0})) > 10:
            assert (len(drawn), warnings) == (5, ())
            assert drawn != control_sets(seen, name, tuple(own), 5, seed=6)[0]
        for chosen in drawn:
            assert len(chosen) == len(set(chosen)) == len(own)
            assert (0 in chosen) == (0 in own)
            assert not set(chosen) & (own - {0})
            assert seen.last not in chosen


def test_the_control_of_the_relation_may_be_of_the_subject() -> None:
    handle, _ = known("gpt2")
    seen = tokenize(query_on(distinct_prompt(subject("gpt2").model, 8, seed=2), (0, 5)), handle.tokenizer)
    drawn, _ = control_sets(seen, "relation", seen.positions("relation"), 20, seed=1)
    assert {p for chosen in drawn for p in chosen} == {1, 2, 3, 4}


def test_no_control_is_the_subject_itself() -> None:
    """A subject that is position 0 alone: the only set that matches it for position 0 is the subject."""
    handle, ids = known("gpt2")
    result = run(handle, query_on(ids, (0, 1)), KnockoutSpec(sources=("subject",), control=3))
    assert result.sources == ("subject",)
    assert any(warning.startswith("no control") for warning in result.warnings)


def test_every_source_has_rows_of_its_own_control() -> None:
    handle, ids = known("gpt2")
    result = run(handle, query_on(ids, (2, 5)), KnockoutSpec(control=2))
    families = {name: [s for s in result.sources if control_of(s) == name] for name in ("subject", "relation", "last")}
    assert families == {
        "subject": ["control-1"],
        "relation": ["relation-control-1"],
        "last": ["last-control-1", "last-control-2"],
    }
    cut = dict(zip(result.sources, result.positions, strict=True))
    assert (cut["control-1"], cut["relation-control-1"]) == ((1, 5, 6), (0, 2, 3, 4))
    assert {len(cut[name]) for name in families["last"]} == {1}
    assert sum("only 1 different sets match" in warning for warning in result.warnings) == 2
    assert set(result.table()["source"]) == set(result.sources)
    few = run(handle, query_on(ids, (3, 5)), KnockoutSpec(sources=("relation",), control=2))
    assert few.sources == ("relation",)
    assert "2 other positions are too few to match 5 of 'relation'" in few.warnings[-1]
    each = run(handle, query_on(ids, (2, 5)), KnockoutSpec(sources=("each",), control=2))
    assert each.sources[len(ids) :] == ("control-1",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (KnockoutSpec(window=0), "window 0"),
        (KnockoutSpec(window=5), "window 5"),
        (KnockoutSpec(target_position=8), "position 8"),
        (KnockoutSpec(target_position=-1), "position -1"),
        (KnockoutSpec(heads=("9.0",)), "layer '9'"),
        (KnockoutSpec(heads=("1.4",)), "head '4'"),
        (KnockoutSpec(heads=("1",)), "LAYER.HEAD"),
        (KnockoutSpec(edges=("last:0",)), "FROM:TO:LAYERS"),
        (KnockoutSpec(edges=("last:0:1:x",)), "head 'x'"),
        (KnockoutSpec(sources=()), "no sources"),
        (KnockoutSpec(sources=("each", "last")), "alone"),
        (KnockoutSpec(sources=("last", "last")), "twice"),
        (KnockoutSpec(control=-1), "control -1"),
    ],
)
def test_specs_out_of_range_are_refused_by_value(spec: Any, message: str) -> None:
    handle, ids = known("gpt2")
    with pytest.raises(SpecError, match=message):
        run(handle, query_on(ids, SPAN), spec)
