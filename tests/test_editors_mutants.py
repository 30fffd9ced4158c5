"""Mistakes in the editors, planted one at a time: a test that is there for it fails, and passes without the mistake.

Each is a line of the published method written otherwise: another token, another mean, another sign, a factor left out.
The tests compare with plain float64 computations, so that none of these can pass for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import test_edit_scores as scores
import test_edit_vectors as vectors
import test_editing as commanded
import test_editors as invariants
import test_editors_applied as applied
import test_editors_oracle as oracle

from factscope import tokens
from factscope.editors import fine_tuning, memit, prompts, rome, second_moments, suffix, targets
from factscope.editors.noise import RowNoise
from factscope.experiments import edit_scores, edit_texts
from factscope.experiments.answers import AnswerScore
from factscope.interventions.weights import WeightDelta
from tests.oracle.planted import plant


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """``right`` in a function becomes ``wrong``; ``noticed`` is the test that fails."""

    where: Callable[..., Any]
    right: str
    wrong: str
    noticed: Callable[[], Any]


def one_of(name: str) -> Callable[[], None]:
    return lambda: oracle.test_rome(name, "float64")


def tuned(name: str) -> Callable[[], None]:
    return lambda: oracle.test_fine_tuning(name, "float64")


def mass() -> None:
    oracle.test_memit("gpt2", "float64")


def multiplied() -> None:
    invariants.test_memit_solves_its_normal_equations("granite")


def solved() -> None:
    from test_second_moments import test_solutions_are_those_of_plain_algebra

    test_solutions_are_those_of_plain_algebra()


def squared(family: str) -> Callable[[], None]:
    return lambda: applied.a_square_matrix_is_changed_the_right_way(family, "rome")


def said() -> None:
    commanded.found.cache_clear()
    try:
        commanded.test_the_table_is_that_of_the_model_with_the_edit_in_its_weights()
    finally:
        commanded.found.cache_clear()


MISTAKES: dict[str, Mistake] = {
    # ------------------------------------------------------------------------------------------------ ROME: key
    "the key of the token before": Mistake(
        where=prompts.rows, right="at = [one.positions(_NAMES[fact_token])[0] for one in seen]",
        wrong="at = [one.positions(_NAMES[fact_token])[0] - 1 for one in seen]", noticed=one_of("gpt2-averaged"),
    ),
    "the first token of the subject": Mistake(
        where=prompts.rows, right="_NAMES[fact_token])[0] for", wrong="'subject')[0] for",
        noticed=one_of("gpt2-averaged"),
    ),
    "no mean over contexts": Mistake(
        where=rome._chosen, right="return keys.mean(dim=0), keys.mean(dim=0), outputs.mean(dim=0)",
        wrong="return keys[0], keys[0], outputs[0]", noticed=one_of("gpt2-averaged"),
    ),
    "the essence counts as a context": Mistake(
        where=rome.rank_one, right="seen.keys[:-1].double()", wrong="seen.keys.double()",
        noticed=one_of("gpt2-averaged"),
    ),
    "divided by the mean key's product with u": Mistake(
        where=rome.rank_one, right="float(key @ u), float(made_of @ u)", wrong="float(made_of @ u), float(made_of @ u)",
        noticed=one_of("gpt2-original"),
    ),
    "u from C instead of its inverse": Mistake(
        where=second_moments.Moments.solve, right="torch.cholesky_solve(shaped, factor)",
        wrong="(factor @ (factor.T @ shaped))", noticed=one_of("gpt2-averaged"),
    ),
    "what the map gives is not taken off": Mistake(
        where=rome.rank_one, right="right = (value - output) / k_dot_u", wrong="right = value / k_dot_u",
        noticed=one_of("gpt2-prompt-only"),
    ),
    # ---------------------------------------------------------------------------------------------- ROME: value
    "KL the other way round": Mistake(
        where=targets.optimise, right="functional.kl_div(before, now,", wrong="functional.kl_div(now, before,",
        noticed=one_of("gpt2-averaged"),
    ),
    "KL at the last token of the essence": Mistake(
        where=prompts.rows, right="read.append([at[-1]] * target.n_tokens)",
        wrong="read.append([len(ids[-1]) - 1] * target.n_tokens)", noticed=one_of("gpt2-averaged"),
    ),
    "KL to the last step instead of the first": Mistake(
        where=targets.optimise, right="before = now.detach().clone() if before is None else before",
        wrong="before = now.detach().clone()", noticed=one_of("gpt2-averaged"),
    ),
    "decay by the squared norm": Mistake(
        where=targets.optimise, right="decay = scale * delta.norm()", wrong="decay = scale * delta.square().sum()",
        noticed=one_of("gpt2-averaged"),
    ),
    "decay over the norm instead of its square": Mistake(
        where=targets.optimise, right="float(first.to(dtype).square().sum())", wrong="float(first.to(dtype).norm())",
        noticed=one_of("gpt2-averaged"),
    ),
    "the other limit": Mistake(
        where=targets.limit_of, right='spec.clamp_reference == "mlp"', wrong='spec.clamp_reference != "mlp"',
        noticed=one_of("gpt2-residual"),
    ),
    "no limit": Mistake(
        where=targets.optimise, right="_cut(delta, limit)", wrong="None", noticed=one_of("gpt2-residual"),
    ),
    "the last step updates": Mistake(
        where=targets.optimise, right="if number == spec.steps - 1:", wrong="if number == spec.steps:",
        noticed=one_of("gpt2-averaged"),
    ),
    "never an early end": Mistake(
        where=targets._reached, right="< spec.stop", wrong="< 0", noticed=one_of("gpt2-stops"),
    ),
    "a sum over the target's tokens": Mistake(
        where=targets.optimise, right="of_target.mean(dim=-1).mean()", wrong="of_target.sum(dim=-1).mean()",
        noticed=one_of("gpt2-original"),
    ),
    "the plain prompt's loss alone": Mistake(
        where=targets.optimise, right="nll = -of_target.mean(dim=-1).mean()", wrong="nll = -of_target[0].mean()",
        noticed=one_of("gpt2-averaged"),
    ),
    "KL of the wrong sign": Mistake(
        where=targets.optimise, right="loss = asked + kl + decay", wrong="loss = asked - kl + decay",
        noticed=one_of("gpt2-averaged"),
    ),
    "an erasure that makes more probable": Mistake(
        where=targets.optimise, right="else torch.exp(-nll)", wrong="else -torch.exp(-nll)",
        noticed=one_of("gpt2-erasure"),
    ),
    "an erasure of the log-probability": Mistake(
        where=targets.optimise, right="else torch.exp(-nll)", wrong="else -nll", noticed=one_of("gpt2-erasure"),
    ),
    "the target read one token early": Mistake(
        where=prompts.rows, right="range(one.last, one.last + target.n_tokens)",
        wrong="range(one.last - 1, one.last - 1 + target.n_tokens)", noticed=one_of("gpt2-original"),
    ),
    # ---------------------------------------------------------------------------------------------------- MEMIT
    "what is missing is not shared out": Mistake(
        where=memit._change, right="(missing / (left * times)).T", wrong="(missing / times).T", noticed=mass,
    ),
    "the block's factor is forgotten": Mistake(
        where=memit._change, right="(missing / (left * times)).T", wrong="(missing / left).T", noticed=multiplied,
    ),
    "lambda does not grow with the width": Mistake(
        where=memit._change, right="spec.covariance_weight * keys.shape[0]", wrong="spec.covariance_weight",
        noticed=mass,
    ),
    "the stream is not read again": Mistake(
        where=memit._seen, right="deltas=deltas,", wrong="deltas=(),", noticed=mass,
    ),
    "contexts weigh as much as the plain prompt": Mistake(
        where=memit._seen, right="(found[0] + others.mean(dim=0)) / 2", wrong="found.mean(dim=0)", noticed=mass,
    ),
    "the MLP's output instead of the block's": Mistake(
        where=memit._goal, right="first=seen.stream[0],", wrong="first=seen.outputs[0],", noticed=mass,
    ),
    "K K' without lambda C": Mistake(
        where=second_moments.Moments.solve_with, right="covariance * torch.eye", wrong="0.0 * torch.eye",
        noticed=solved,
    ),
    # ------------------------------------------------------------------------------------------------------- FT
    "all tokens of the target scored at one position": Mistake(
        where=fine_tuning._Run.nll, right="log_p.gather(-1,", wrong="log_p[:, :1].expand_as(log_p).gather(-1,",
        noticed=tuned("gpt2"),
    ),
    "the mean over the target's tokens": Mistake(
        where=fine_tuning._Run.nll, right="[..., 0].sum(dim=-1)", wrong="[..., 0].mean(dim=-1)", noticed=tuned("gpt2"),
    ),
    "no bound": Mistake(
        where=fine_tuning.tune, right="if spec.bound is not None:", wrong="if False:", noticed=tuned("gpt2-bounded"),
    ),
    "the bound from above alone": Mistake(
        where=fine_tuning.tune, right="clamp_(-spec.bound, spec.bound)", wrong="clamp_(max=spec.bound)",
        noticed=tuned("gpt2-bounded"),
    ),
    "finetuning that learns what it should erase": Mistake(
        where=fine_tuning.tune, right="torch.exp(-nll) if erasing", wrong="-torch.exp(-nll) if erasing",
        noticed=tuned("gpt2-erasure"),
    ),
    "the first layer alone is trained": Mistake(
        where=fine_tuning._changes, right="{layer: added(layer) for layer in weights}",
        wrong="{layer: added(layer) for layer in list(weights)[:1]}", noticed=tuned("gpt2-window"),
    ),
    # ------------------------------------------------------------------------------------------------- the noise
    "noise where the plain prompt has its subject": Mistake(
        where=RowNoise._apply, right="self._subjects[0 if self.fresh else row]", wrong="self._subjects[0]",
        noticed=oracle.test_noise_is_put_on_every_rows_own_subject,
    ),
    "the same noise in every row": Mistake(
        where=RowNoise._drawn, right="self._values[row, :tokens]", wrong="self._values[0, :tokens]",
        noticed=oracle.test_noise_is_put_on_every_rows_own_subject,
    ),
    "keys without noise": Mistake(
        where=suffix.read, right="None if noise is None else noise.on(range(len(rows.at)))", wrong="None",
        noticed=oracle.test_noise_is_put_on_every_rows_own_subject,
    ),
    # ------------------------------------------------------------------------------------------------ the matrix
    "a change that is transposed (Conv1D)": Mistake(
        where=WeightDelta.added, right="x @ self.left.to(x)", wrong="x @ self.right.T.to(x)",
        noticed=squared("gpt2"),
    ),
    "a change that is transposed (Linear)": Mistake(
        where=WeightDelta.added, right="change = inner @ self.right.to(x)",
        wrong="change = (x @ self.right.T.to(x)) @ self.left.T.to(x)", noticed=squared("llama"),
    ),
    # ------------------------------------------------------------------------------------------------- the target
    "a target without its space": Mistake(
        where=tokens.answer_target, right="continuation = _gap(prompt, words) + words", wrong="continuation = words",
        noticed=said,
    ),
    # ------------------------------------------------------------------------------------------------- the scores
    "a rewrite that does not look at what was left to gain": Mistake(
        where=edit_scores.rewrite_score, right="_ratio(room + math.expm1(after.log_probability), room)",
        wrong="_ratio(room + math.expm1(after.log_probability), 1.0)", noticed=vectors.test_rewrite_vector,
    ),
    "an erasure with its sign turned": Mistake(
        where=edit_scores.rewrite_score, right="_ratio(before.probability - after.probability, before.probability)",
        wrong="_ratio(after.probability - before.probability, before.probability)",
        noticed=vectors.test_erasure_vector,
    ),
    "an erasure scored as a rewrite": Mistake(
        where=edit_scores.rewrite_score, right="if problem == ERASURE:", wrong="if False:",
        noticed=vectors.test_erasure_vector,
    ),
    "the geometric mean as the target's probability": Mistake(
        where=edit_scores.score_fact, right="pair.before.target.probability, pair.after.target.probability",
        wrong="pair.before.target.per_token, pair.after.target.per_token",
        noticed=scores.test_every_score_of_a_fact_by_hand,
    ),
    "the first paraphrase alone": Mistake(
        where=edit_scores.score_fact, right='slice(1) if averaging == "first" else slice(None)', wrong="slice(1)",
        noticed=scores.test_every_score_of_a_fact_by_hand,
    ),
    "a neighbourhood over a half, wherever p was": Mistake(
        where=edit_scores.neighbourhood_score, right="(0.5 + abs(before - 0.5))", wrong="0.5",
        noticed=vectors.test_neighbourhood_vector,
    ),
    "NS counts the new answer": Mistake(
        where=edit_scores.score_fact, right="_beats(probes.neighbours, _true_minus_new,",
        wrong="_beats(probes.neighbours, _new_minus_true,", noticed=scores.test_every_score_of_a_fact_by_hand,
    ),
    "EM with its sign turned": Mistake(
        where=edit_scores._new_minus_true, right="asked.target.per_token - asked.true.per_token",
        wrong="asked.true.per_token - asked.target.per_token", noticed=scores.test_every_score_of_a_fact_by_hand,
    ),
    "EM before the edit": Mistake(
        where=edit_scores._beats, right="gains = [gain(pair.after)", wrong="gains = [gain(pair.before)",
        noticed=scores.test_every_score_of_a_fact_by_hand,
    ),
    "the entropy of pairs and triples alike": Mistake(
        where=edit_texts.n_gram_entropy, right="4 / 3", wrong="2 / 3", noticed=vectors.test_entropy_vector,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES[name]
    with monkeypatch.context() as patch:
        plant(patch, mistake.where, mistake.right, mistake.wrong)
        with pytest.raises((AssertionError, RuntimeError)):  # shapes or gradients that are not there: noticed as well
            mistake.noticed()
    mistake.noticed()


def test_what_is_planted_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = AnswerScore.__dict__, edit_scores.neighbourhood_score.__code__
    with monkeypatch.context() as patch:
        plant(patch, edit_scores.neighbourhood_score, "1 - ", "2 - ")
        assert edit_scores.neighbourhood_score(0.5, 0.5) == 2
    assert (AnswerScore.__dict__, edit_scores.neighbourhood_score.__code__) == before
    with pytest.raises(AssertionError, match="0 times"):
        plant(monkeypatch, edit_scores.neighbourhood_score, "no such text", "")
