"""Published numbers and identities that any implementation of tracing, editing and their scores must give.

One test for each: the noise stream, the three scores, the entropy of a text, windows, what restoring, noise of size
zero and severing come to, ROME's invariants, and the direction of its divergence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_editors as invariants
import test_tracing_oracle as tracing
import torch
from torch.nn import functional

from factscope.editors import problems, rome, suffix
from factscope.editors.compute import edit
from factscope.editors.edit import with_edits
from factscope.editors.noise import RowNoise
from factscope.experiments import edit_texts
from factscope.experiments.answers import AnswerScore
from factscope.experiments.edit_scores import neighbourhood_score, rewrite_score
from factscope.interventions import engine
from factscope.interventions.attention import window
from factscope.interventions.base import Noise, record_base
from factscope.interventions.intervention import Intervention, Patch
from factscope.interventions.noise import noise_source
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import subject

STREAM = [1.62434536, -0.61175641, -0.52817175]
"""The first draws of numpy's RandomState(1)."""
ROUNDING = 1e-5
"""How far two float32 runs of one computation may be apart in probability."""


def of(*p: float) -> AnswerScore:
    return AnswerScore(log_p=tuple(math.log(value) for value in p), greedy=False)


def model() -> ModelHandle:
    return subject("gpt2").handle


# ---------------------------------------------------------------------------------------------------------- the noise


def test_noise_vector() -> None:
    """Of a trace, and of the first row of an edit under noise."""
    source = noise_source(model(), "0.5")
    drawn = source.draw(seed=1, samples=10, tokens=2)
    assert (drawn.flatten()[:3] / 0.5).tolist() == pytest.approx(STREAM, abs=1e-8)
    assert drawn.dtype == torch.float64 and drawn.shape == (10, 2, 36)
    again = source.draw(seed=1, samples=10, tokens=2)
    assert torch.equal(drawn, again), "every call starts the stream anew"
    noise = RowNoise(source, [(1, 3), (4, 6)], seed=1)
    changed = noise.on([0, 1])(torch.zeros(2, 8, 36, dtype=torch.float64))
    assert (changed[0, 1, :3] / 0.5).tolist() == pytest.approx(STREAM, abs=1e-8)
    assert torch.equal(changed[0, 1:3], drawn[0]) and not changed[0, 3:].any() and not changed[1, :4].any()


# --------------------------------------------------------------------------------------------------------- the scores


def test_rewrite_vector() -> None:
    assert rewrite_score(of(0.2), of(0.9), "error-injection") == pytest.approx(0.875, abs=1e-12)


def test_neighbourhood_vector() -> None:
    assert neighbourhood_score(0.3, 0.5) == pytest.approx(0.7142857, abs=1e-7)


def test_erasure_vector() -> None:
    assert rewrite_score(of(0.8), of(0.2), "fact-erasure") == pytest.approx(0.75, abs=1e-12)


def test_entropy_vector() -> None:
    said = edit_texts.words("a b a b a c")
    assert edit_texts._entropy(said, 2) == pytest.approx(1.5219281, abs=1e-7)
    assert edit_texts._entropy(said, 3) == pytest.approx(1.5, abs=1e-12)
    assert edit_texts.n_gram_entropy("a b a b a c") == pytest.approx(1.5073094, abs=1e-7)
    assert edit_texts.fluency(["a b a b a c"]) == pytest.approx(150.7, abs=0.05)


# -------------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize(
    ("size", "center", "layers"),
    [
        (1, 12, range(12, 13)), (3, 12, range(11, 14)), (5, 12, range(10, 15)), (10, 12, range(7, 17)),
        (10, 0, range(0, 5)), (10, 27, range(22, 28)), (1, 0, range(0, 1)), (3, 0, range(0, 2)), (5, 27, range(25, 28)),
    ],
)  # fmt: skip
def test_window_vector(size: int, center: int, layers: range) -> None:
    """28 layers; ten of them are five before, the centre, and four behind."""
    assert list(window(center, size, 28)) == list(layers)


# --------------------------------------------------------------------------------------------------------- the traces


def corrupted(span: tuple[int, int]) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """Handle, clean run, corrupted run with three samples, and the answer's tokens."""
    chosen, question = tracing.asked("gpt2", span)
    handle, ids = chosen.handle, question.ids
    values = noise_source(handle, "0.8").draw(1, 3, span[1] - span[0])
    every = ("attention", "mlp")
    noised = record_base(handle, ids, noise=Noise(positions=tuple(range(*span)), values=values), updates=every)
    return handle, record_base(handle, ids, updates=every), noised, tuple(question.answer)


def probabilities(handle: ModelHandle, base: Any, runs: list[Intervention], answer: tuple[int, ...]) -> list[float]:
    found: dict[int, float] = {}
    for indices, readout in engine.run(handle, base, runs):
        p = readout.scores(answer[:1]).log_probability.exp().mean(dim=1).tolist()
        found |= dict(zip(indices, p, strict=True))
    return [found[index] for index in range(len(runs))]


@pytest.mark.parametrize("span", tracing.SPANS)
def test_restoring_everything_gives_the_clean_run(span: tuple[int, int]) -> None:
    handle, clean, noised, answer = corrupted(span)
    places = tuple(range(tracing.LENGTH))
    whole = tuple(
        Patch(layer=layer, site="output", positions=places, source=clean) for layer in range(handle.info.n_layers)
    )
    one = Patch(layer=1, site="output", positions=places, source=clean)
    p_clean = float(clean.logits[0, 0].softmax(-1)[answer[0]])
    p_noised = noised.logits[:, 0].softmax(-1)[:, answer[0]]
    found = probabilities(handle, noised, [Intervention(patches=whole), Intervention(patches=(one,))], answer)
    assert found == pytest.approx([p_clean, p_clean], abs=ROUNDING)
    assert float((p_noised - p_clean).abs().max()) > 0.05, "else this says nothing"


@pytest.mark.parametrize("span", tracing.SPANS)
def test_restoring_the_last_block_at_the_last_token_gives_the_clean_run(span: tuple[int, int]) -> None:
    result = tracing.found("gpt2", span)
    assert result.p_restored_by_seed[0][-1, -1] == pytest.approx(result.p_clean, abs=ROUNDING)
    assert np.abs(result.p_restored_by_seed[0] - result.p_clean).max() > 0.05, "else this says nothing"


@pytest.mark.parametrize("site", ["hidden", "mlp", "attention"])
def test_noise_of_size_zero_has_no_effect(site: str) -> None:
    result = tracing.found("gpt2", tracing.SPANS[1], site=site, noise="0")
    assert result.p_corrupted_by_seed[0] == pytest.approx(result.p_clean, abs=ROUNDING)
    assert np.allclose(result.p_restored_by_seed[0], result.p_clean, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_severing_where_nothing_is_restored_changes_nothing(kind: Any) -> None:
    """Updates kept as they are in the very run; and behind the last block there is nothing to sever."""
    handle, _, noised, answer = corrupted(tracing.SPANS[1])
    kept = [
        Intervention(
            patches=tuple(
                Patch(layer=layer, site=kind, positions=(at,), source=noised) for layer in range(handle.info.n_layers)
            )
        )
        for at in range(tracing.LENGTH)
    ]
    p_noised = float(noised.logits[:, 0].softmax(-1)[:, answer[0]].mean())
    assert probabilities(handle, noised, kept, answer) == pytest.approx([p_noised] * len(kept), abs=ROUNDING)
    ordinary = tracing.found("gpt2", tracing.SPANS[1]).p_restored_by_seed[0]
    severed = tracing.found("gpt2", tracing.SPANS[1], sever=kind).p_restored_by_seed[0]
    assert np.allclose(severed[:, -1], ordinary[:, -1], atol=ROUNDING, rtol=0)
    assert np.abs(severed - ordinary).max() > 0.01, "earlier layers' effects run through what is severed"


# ----------------------------------------------------------------------------------------------------------- the edit


@pytest.mark.parametrize("mode", ["averaged", "prompt_only", "original"])
def test_the_edited_layer_takes_the_key_to_the_value(mode: Any) -> None:
    """Exactly; and with the published mixture of keys the mean key goes elsewhere."""
    handle = invariants.handle("gpt2")
    spec = replace(invariants.ROME, key_mode=mode)
    task = problems.task(handle, invariants.fact(handle), spec)
    found = rome.rank_one(handle, task, 1, invariants.TEMPLATES, invariants.moments(handle, [1]), spec)
    asked = task.rows(invariants.TEMPLATES)
    plain = suffix.read(handle, asked, (1,))[1]
    left, right = found.delta.left, found.delta.right
    assert left is not None
    taken = found.output + found.key @ left.double() @ right.double()
    assert invariants.apart(taken, found.value) <= 1e-6
    after = suffix.read(handle, asked, (1,), deltas=[found.delta])[1].outputs
    mean = after.double().mean(dim=0)
    assert (invariants.apart(mean, found.value) <= 1e-5) == (mode == "averaged")
    assert (invariants.apart(after[0], found.value) <= 1e-5) == (mode != "averaged")
    assert torch.equal(plain.keys, suffix.read(handle, asked, (1,), deltas=[found.delta])[1].keys)


def test_the_divergence_is_zero_at_the_first_step() -> None:
    handle = invariants.handle("gpt2")
    made = edit(handle, [invariants.fact(handle)], invariants.ROME)
    terms = [step["kl"] for step in made.report["values"][0]["steps"]]
    assert terms[0] == pytest.approx(0.0, abs=1e-7) and min(terms[1:]) > 1e-6


def test_weights_are_the_same_bits_afterwards() -> None:
    handle = invariants.handle("gpt2")
    before = invariants.state(handle)
    made = edit(handle, [invariants.fact(handle)], invariants.ROME)
    edited = with_edits(handle, [made])
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = handle.forward(ids)
    assert not torch.equal(edited.forward(ids), plain)
    assert invariants.state(handle) == before and torch.equal(handle.forward(ids), plain)


def test_divergence_vector() -> None:
    """``kl_div(init, now)`` is KL(now || init), and that is what an optimisation reports."""
    init, now = (torch.tensor(p, dtype=torch.float64).log()[None] for p in ([0.5, 0.3, 0.2], [0.1, 0.7, 0.2]))
    found = float(functional.kl_div(init, now, log_target=True, reduction="batchmean"))
    assert found == pytest.approx(float((now.exp() * (now - init)).sum()))
    assert found != pytest.approx(float((init.exp() * (init - now)).sum()), rel=0.05)
    told = divergence_of_the_second_step()
    assert told[0] == pytest.approx(told[1], rel=1e-6) and told[0] != pytest.approx(told[2], rel=1e-3)


def divergence_of_the_second_step() -> tuple[float, float, float]:
    """As an optimisation told it, and KL(now || init) and KL(init || now) of the distributions that it saw."""
    import test_editors_oracle as oracle

    from factscope.editors import targets
    from factscope.editors.specs import RomeSpec

    handle, ids = oracle.handle("gpt2"), oracle.prompt("gpt2")
    spec = RomeSpec(steps=2, stop=0.0, kl_factor=1.0, contexts="none", statistics="identity")
    task = problems.task(handle, oracle.fact_of(ids, (2, 5), (17,)), spec)
    rows = task.rows(("{}",), essence=True)
    part = suffix.Suffix(handle, rows, 1, multiplier=1.0)
    first = suffix.read(handle, rows, (1,))[1].outputs[0]
    seen: list[torch.Tensor] = []
    original = part.with_value

    def watched(change: torch.Tensor, *, in_stream: bool = False) -> torch.Tensor:
        logits = original(change, in_stream=in_stream)
        seen.append(logits[-1, 0].detach().log_softmax(dim=-1))
        return logits

    part.with_value = watched  # type: ignore[method-assign]
    found = targets.optimise(part, (17,), spec, first=first, limit=10.0)
    init, now = seen
    return found.steps[1].kl, float((now.exp() * (now - init)).sum()), float((init.exp() * (init - now)).sum())
