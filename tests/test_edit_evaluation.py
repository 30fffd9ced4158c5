"""Evaluation of edits: every number against float64 forwards of really changed weights; what holds on every family."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.editors.edit import Edit, EditedModel, EditFact, with_edits
from factscope.errors import Cancelled, DatasetError, EditError, TargetError
from factscope.experiments import answers, edit_evaluation, edit_probes, edit_texts
from factscope.experiments.answers import AnswerScore, Question, ask
from factscope.experiments.edit_evaluation import EditEvaluation, EvaluationSpec, evaluate, update_norm
from factscope.generation import Sampling, continue_prompt
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle
from factscope.queries import Probe, Query
from tests.oracle import plain_evaluation
from tests.oracle.edits import delta as random_delta
from tests.oracle.edits import merged
from tests.oracle.laboratory import Subject, distinct_prompt, handle_of, subject, words
from tests.oracle.plain_evaluation import Case, Change
from tests.oracle.whole import Whole
from tests.tiny_models import FAMILIES

ROUNDING = 1e-5
STD = 0.8
TEXTS = 5
SPANS = ((2, 3), (2, 5))
NO_TEXTS = EvaluationSpec(texts=0, sampled=False)


class Setting:
    """One edited fact of three prompts more, as text and as tokens."""

    def __init__(self, family: str, span: tuple[int, int], problem: str) -> None:
        self.subject, self.problem = subject(family), problem
        ids = random.Random(4).sample(range(3, 97), 34)
        named, free = ids[: span[1] - span[0]], ids[4:]
        self.named = named
        self.prompts = {
            "fact": [*free[:2], *named, *free[2:4]],
            "paraphrase": [*named, *free[4:9]],
            "neighbour": free[9:14],
            "other-relation": [*free[14:15], *named, *free[15:19]],
        }
        self.starts = {"fact": 2, "paraphrase": 0, "neighbour": None, "other-relation": 1}
        generator = torch.Generator().manual_seed(3)
        d_in, d_out = plain_evaluation.widths(self.subject)
        self.deltas = tuple(
            WeightDelta(
                layer=layer, place="down_projection",
                left=torch.randn(d_in, rank, generator=generator) / 6,
                right=torch.randn(rank, d_out, generator=generator),
            )
            for layer, rank in ((1, 1), (2, 2))
        )  # fmt: skip
        before, after = self.states()
        # What either state says itself, so that probabilities are seen to move.
        self.answers = {
            kind: plain_evaluation.greedy(before, self.prompts[kind], n) for kind, n in (("fact", 1), ("neighbour", 3))
        }
        noise = self.noise("fact")
        choices = plain_evaluation.log_p(after, self.prompts["fact"], noise)[-1].argsort(descending=True).tolist()
        first = next(token for token in choices if token != self.answers["fact"][0])
        self.target = [first, *plain_evaluation.greedy(after, [*self.prompts["fact"], first], 1, noise)]
        if problem == "fact-erasure":
            self.target = self.answers["fact"]

    @property
    def edit(self) -> Edit:
        text = words([*self.prompts["fact"][:2]]) + " {} " + words(self.prompts["fact"][-2:])
        return Edit(
            method="rome",
            problem=self.problem,
            model=EditedModel.of(self.subject.handle),
            computed_on=self.subject.handle.info.weights,
            facts=(
                EditFact(prompt=text, subject=words(self.named), target=words(self.target), answer=self.true("fact")),
            ),
            spec={"noise": str(STD), "seed": 4, "layers": [1, 2]},
            deltas=self.deltas,
            report={"warnings": ["told"]},
        )  # fmt: skip

    def true(self, kind: str) -> str:
        return words(self.ids_of_true(kind))

    def ids_of_true(self, kind: str) -> list[int]:
        return self.answers["neighbour" if kind == "neighbour" else "fact"]

    @property
    def probes(self) -> tuple[Probe, ...]:
        kinds = ("paraphrase", "neighbour", "other-relation")
        return tuple(Probe(kind=kind, prompt=words(self.prompts[kind]), answer=self.true(kind)) for kind in kinds)

    def noise(self, kind: str) -> tuple[int, Tensor] | None:
        """The first sample of a trace, at the subject of this very prompt."""
        start = self.starts[kind]
        if self.problem != "fact-forcing" or start is None:
            return None
        width = int(self.subject.model.config.hidden_size)
        stream = np.random.RandomState(4).randn(10, len(self.named), width)
        return start, STD * torch.from_numpy(stream)[0]

    def states(self) -> tuple[Subject, Subject]:
        changes = [Change(layer=d.layer, weight=d.left.double() @ d.right.double()) for d in self.deltas]  # type: ignore[union-attr]
        return self.subject, plain_evaluation.edited(self.subject, changes)

    def case(self, kind: str) -> Case:
        true, noise, states = self.ids_of_true(kind), self.noise(kind), self.states()
        args = self.prompts[kind]
        target = [plain_evaluation.token_log_p(state, args, self.target, noise) for state in states]
        log_p = [plain_evaluation.token_log_p(state, args, true, noise) for state in states]
        right = [plain_evaluation.first_choices(state, args, true, noise) for state in states]
        return Case(
            target=(target[0], target[1]), true=(log_p[0], log_p[1]), right=(right[0], right[1]),
            target_first=plain_evaluation.first_choices(states[1], args, self.target, noise),
        )  # fmt: skip


@lru_cache
def setting(family: str, span: tuple[int, int], problem: str = "error-injection") -> Setting:
    return Setting(family, span, problem)


@lru_cache
def right(family: str, span: tuple[int, int], problem: str) -> dict[str, Case]:
    found = setting(family, span, problem)
    return {kind: found.case(kind) for kind in found.prompts}


def found(family: str, span: tuple[int, int], problem: str, score: str = "sequence") -> EditEvaluation:
    one = setting(family, span, problem)
    query = Query(prompt=words(one.prompts["fact"]), subject=words(one.named), answer=one.true("fact"), score=score)  # type: ignore[arg-type]
    spec = EvaluationSpec(texts=TEXTS, sampled=False)
    return evaluate(one.subject.handle, one.edit, [one.probes], spec, query=query)


def agrees(family: str, span: tuple[int, int], problem: str) -> bool:
    """Every probability and every score against plain float64."""
    cases, result = right(family, span, problem), found(family, span, problem)
    table = result.table().set_index("kind")
    p = [
        abs(table.loc[kind, f"p_{side}_{when}"] - math.exp(sum(getattr(case, side)[state])))
        for kind, case in cases.items()
        for side in ("target", "true")
        for state, when in enumerate(("before", "after"))
    ]
    scores, erasure = result.fact_scores()[0], problem == "fact-erasure"
    wanted = {
        "rewrite": plain_evaluation.hase_rewrite(cases["fact"], erasure),
        "paraphrase": plain_evaluation.hase_rewrite(cases["paraphrase"], erasure),
        "neighbourhood": plain_evaluation.hase_neighbourhood(cases["neighbour"]),
        "exact_rewrite": float(cases["fact"].target_first),
        "exact_neighbourhood": float(cases["neighbour"].right[1]),
    }
    if not erasure:
        gains = {kind: plain_evaluation.gain(case) for kind, case in cases.items()}
        wanted |= {"em": gains["fact"], "pm": gains["paraphrase"], "nm": -gains["neighbour"]}
        wanted |= {"es": float(gains["fact"] > 0), "ps": float(gains["paraphrase"] > 0)}
        wanted["ns"] = float(gains["neighbour"] < 0)
    return max(p) <= ROUNDING and all(abs(getattr(scores, n) - value) <= 5e-5 for n, value in wanted.items())


PROBLEMS = ("error-injection", "fact-erasure", "fact-forcing")


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("span", SPANS, ids=["one token", "three tokens"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_probabilities_and_scores_are_those_of_plain_forwards(family: str, span: tuple[int, int], problem: str) -> None:
    assert agrees(family, span, problem)
    cases = right(family, span, problem)
    moved = [abs(math.exp(sum(c.target[1])) - math.exp(sum(c.target[0]))) for c in cases.values()]
    assert max(moved) > 0.05, "the edit must be visible"


def _no_edit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(edit_evaluation, "with_edits", lambda model, edits: model)


def _swapped(patch: pytest.MonkeyPatch) -> None:
    original = Question.__init__

    def mutant(self: Question, *, ids: Any, answers: Any, noise: Any = None) -> None:
        original(self, ids=ids, answers=answers[::-1], noise=noise)

    patch.setattr(Question, "__init__", mutant)


def _first_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AnswerScore, "log_probability", property(lambda self: self.log_p[0]))


def _one_token_late(patch: pytest.MonkeyPatch) -> None:
    original = answers._score
    patch.setattr(answers, "_score", lambda logits, answer: original(logits.roll(1, dims=0), answer))


def _other_stream(patch: pytest.MonkeyPatch) -> None:
    original = edit_probes.noise_on

    def mutant(fact: Any, seen: Any) -> Any:
        object.__setattr__(fact, "seed", 5)
        return original(fact, seen)

    patch.setattr(edit_probes, "noise_on", mutant)


def _noise_of_the_fact_everywhere(patch: pytest.MonkeyPatch) -> None:
    original = edit_probes.noise_on

    def mutant(fact: Any, seen: Any) -> Any:
        noise = original(fact, seen)
        if noise is not None:
            object.__setattr__(noise, "positions", tuple(range(2, 2 + len(noise.positions))))
        return noise

    patch.setattr(edit_probes, "noise_on", mutant)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no edit": (_no_edit, "error-injection"),
    "target and answer swapped": (_swapped, "error-injection"),
    "first token alone": (_first_token, "error-injection"),
    "one token late": (_one_token_late, "error-injection"),
    "another draw": (_other_stream, "fact-forcing"),
    "noise where the fact has its subject": (_noise_of_the_fact_everywhere, "fact-forcing"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistakes_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, problem = MUTANTS[name]
    right("gpt2", SPANS[1], problem)
    mutant(monkeypatch)
    assert not agrees("gpt2", SPANS[1], problem)


@pytest.mark.parametrize("problem", ["error-injection", "fact-forcing"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_continuations_are_those_of_plain_forwards(family: str, problem: str) -> None:
    one, result = setting(family, SPANS[1], problem), found(family, SPANS[1], problem)
    for row in result.rows:
        kind = row.probe.kind
        for state, text in zip(one.states(), (row.text_before, row.text_after), strict=True):
            assert text == words(plain_evaluation.greedy(state, one.prompts[kind], TEXTS, one.noise(kind)))


def test_the_first_token_alone_is_in_the_table_unless_the_whole_answer_is_asked_for() -> None:
    cases = right("gpt2", SPANS[1], "error-injection")
    table = found("gpt2", SPANS[1], "error-injection", score="token").table().set_index("kind")
    for kind, case in cases.items():
        assert table.loc[kind, "p_target_after"] == pytest.approx(math.exp(case.target[1][0]), abs=ROUNDING)
    whole = found("gpt2", SPANS[1], "error-injection")
    token = found("gpt2", SPANS[1], "error-injection", score="token")
    assert repr(whole.fact_scores()) == repr(token.fact_scores()), "scores are always of whole answers"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_counts_every_token(family: str) -> None:
    chosen = subject(family)
    text = distinct_prompt(chosen.model, 12, seed=6)
    asked = Question(ids=tuple(text[:1]), answers=(tuple(text[1:]),))
    (perplexity,) = edit_texts.perplexities(chosen.handle, [asked])
    assert perplexity == pytest.approx(plain_evaluation.perplexity(chosen, text), rel=1e-5)


@pytest.mark.parametrize("problem", ["error-injection", "fact-forcing"])
def test_essence_is_that_of_plain_forwards(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = setting("gpt2", SPANS[1], problem)
    monkeypatch.setattr(edit_texts, "TOKENS", 14)
    monkeypatch.setattr(edit_texts, "ESSENCE_PROMPT", "{} w60")
    result = evaluate(one.subject.handle, one.edit, [one.probes], EvaluationSpec(texts=0, seed=2))
    beginning = [*one.named, 60]
    texts = continue_prompt(one.subject.handle, beginning, 14 - len(beginning), sampling=Sampling(seed=2), rows=5)
    noise = one.noise("paraphrase")  # the subject comes first there, too
    old, new = (
        np.mean([plain_evaluation.perplexity(state, [*beginning, *text.ids], noise) for text in texts])
        for state in one.states()
    )
    assert result.texts.essence[0] == pytest.approx(1 - np.clip(new - old, 0, 5) / 5, abs=1e-3)
    assert result.fact_scores()[0].essence == result.texts.essence[0]


def test_sampled_texts_share_their_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = setting("gpt2", SPANS[1])
    monkeypatch.setattr(edit_texts, "TOKENS", 20)
    references = tmp_path / "texts.txt"
    references.write_text(f"{words(range(20, 40))}\n\n{words(range(30, 50))}\n", encoding="utf-8")
    zero = Edit(
        **{**vars(one.edit), "deltas": tuple(WeightDelta(layer=d.layer, place=d.place, left=d.left, right=0 * d.right)
           for d in one.deltas)}
    )  # fmt: skip
    spec = EvaluationSpec(texts=0, references=str(references))
    plain, moved = (evaluate(one.subject.handle, edit, [one.probes], spec) for edit in (zero, one.edit))
    texts = [row for row in plain.rows if row.probe.kind == "generation"]
    assert texts and all(row.text_before == row.text_after for row in texts)
    assert plain.texts.fluency_before == plain.texts.fluency_after == moved.texts.fluency_before
    assert plain.texts.consistency_before == plain.texts.consistency_after
    assert moved.texts.fluency_after != moved.texts.fluency_before
    assert plain.fact_scores()[0].essence == 1
    said = [row.probe.prompt + (row.text_after or "") for row in moved.rows if row.probe.kind == "generation"]
    assert moved.texts.fluency_after == pytest.approx(edit_texts.fluency(said))


# ---------------------------------------------------------------------------------------------------- every family


@lru_cache
def handle(family: str) -> ModelHandle:
    return handle_of(FAMILIES[family](0), name=family)


def on_family(family: str, size: float) -> tuple[Edit, tuple[Probe, ...]]:
    """A random edit of layer 2's down-projection, and a probe of each kind."""
    model = FAMILIES[family](0)
    ids = distinct_prompt(model, 14, seed=1)
    change = random_delta(Whole(model, wide=False), 2, "down_projection", rank=2, bias=True, seed=3, size=size)
    edit = Edit(
        method="ft", problem="error-injection", model=EditedModel.of(handle(family)), computed_on="x",
        facts=(EditFact(prompt=f"{words(ids[:3])} {{}} w50", subject=words(ids[3:5]), target="w60 w61", answer="w62"),),
        spec={}, deltas=(change,),
    )  # fmt: skip
    kinds = (("paraphrase", ids[3:9]), ("neighbour", ids[9:14]))
    return edit, tuple(Probe(kind=kind, prompt=words(some), answer="w63 w64") for kind, some in kinds)  # type: ignore[arg-type]


DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3", "mamba")]


@pytest.mark.parametrize("family", DENSE)
def test_an_edit_of_nothing_moves_nothing(family: str) -> None:
    edit, probes = on_family(family, size=0.0)
    result = evaluate(handle(family), edit, [probes], EvaluationSpec(texts=4, sampled=False))
    scores = result.fact_scores()[0]
    assert scores.neighbourhood == 1.0 and scores.rewrite == scores.paraphrase == 2e-8
    for row in result.rows:
        assert row.before == row.after and row.text_before == row.text_after
    assert result.fact_scores(base=True)[0].em == scores.em


@pytest.mark.parametrize("family", DENSE)
def test_after_is_the_model_with_the_edit_written_into_it(family: str) -> None:
    edit, probes = on_family(family, size=2.0)
    result = evaluate(handle(family), edit, [probes], EvaluationSpec(texts=4, sampled=False))
    model = merged(FAMILIES[family](0), [edit])
    moved = []
    for row in result.rows:
        prompt = [int(word[1:]) for word in row.probe.prompt.split()]
        answer = [int(word[1:]) for word in (row.probe.answer or "").split()]
        with torch.no_grad():
            log_p = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0].double().log_softmax(-1)
        wanted = [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        assert row.after is not None and row.before is not None
        assert row.after.answers[1].log_p == pytest.approx(wanted, abs=2e-3)
        moved.append(abs(row.after.answers[1].log_p[0] - row.before.answers[1].log_p[0]))
    assert max(moved) > 0.05


def test_there_are_enough_families() -> None:
    assert len(DENSE) >= 20


def test_evaluation_leaves_the_model_as_it_was() -> None:
    one = setting("gpt2", SPANS[1])
    ids = torch.tensor([one.prompts["fact"]])
    before = one.subject.handle.forward(ids)
    found("gpt2", SPANS[1], "error-injection")
    assert torch.equal(one.subject.handle.forward(ids), before)


# ------------------------------------------------------------------------------------------ several, and what fails


def test_several_edits_are_on_together_and_scored_apart() -> None:
    one = setting("gpt2", SPANS[1])
    other = Edit(
        **{**vars(one.edit), "deltas": one.deltas[:1], "problem": "fact-erasure",
           "facts": (EditFact(prompt="w70 {} w71", subject="w72", target="w73", answer="w73"),)}
    )  # fmt: skip
    result = evaluate(one.subject.handle, [one.edit, other], [one.probes, ()], NO_TEXTS)
    assert list(result.table()["subject"].unique()) == [words(one.named), "w72"]
    first, second = result.fact_scores()
    assert math.isnan(second.es) and not math.isnan(first.es)
    after = with_edits(one.subject.handle, [one.edit, other])
    assert result.edited.weights == after.info.weights != result.model.weights
    table = result.scores().set_index("name")
    assert table.loc["rewrite", "value"] == pytest.approx((first.rewrite + second.rewrite) / 2)
    assert table.loc["rewrite", "low"] <= table.loc["rewrite", "value"] <= table.loc["rewrite", "high"]
    assert set(result.summary()["intervals"]) >= {"rewrite"}


def test_an_edit_on_an_edited_model_is_compared_with_that_state() -> None:
    one = setting("gpt2", SPANS[1])
    first = Edit(**{**vars(one.edit), "deltas": one.deltas[:1]})
    second = Edit(**{**vars(one.edit), "deltas": one.deltas[1:]})
    state = with_edits(one.subject.handle, [first])
    result = evaluate(state, second, [one.probes], NO_TEXTS)
    plain = evaluate(one.subject.handle, first, [one.probes], NO_TEXTS)
    assert [row.before for row in result.rows] == [row.after for row in plain.rows]


def test_reasons_say_why_a_score_is_missing() -> None:
    one = setting("gpt2", SPANS[1])
    result = evaluate(one.subject.handle, one.edit, [one.probes[:1]], NO_TEXTS)
    table = result.scores().set_index("name")
    assert "another subject" in table.loc["neighbourhood", "reason"]
    assert "texts were not asked for" in table.loc["fluency", "reason"] == table.loc["essence", "reason"]
    missing = table[table["value"].isna()]
    assert len(missing) and (missing["reason"].str.len() > 10).all()
    assert (table[table["value"].notna()]["reason"] == "").all()
    assert set(result.summary()["not_scored"]) == set(missing.index)
    assert "told" in result.warnings


def test_the_size_of_an_edit_is_that_of_what_it_adds() -> None:
    one = setting("gpt2", SPANS[1])
    whole = math.sqrt(sum(float((d.left @ d.right).double().square().sum()) for d in one.deltas))  # type: ignore[operator]
    assert update_norm([one.edit]) == pytest.approx(whole, rel=1e-5)
    dense = WeightDelta(layer=1, place="down_projection", right=one.deltas[0].left @ one.deltas[0].right)  # type: ignore[operator]
    assert update_norm([Edit(**{**vars(one.edit), "deltas": (dense,)})]) == pytest.approx(
        update_norm([Edit(**{**vars(one.edit), "deltas": one.deltas[:1]})]), rel=1e-5
    )


def test_probes_of_ones_own_come_from_a_file(tmp_path: Path) -> None:
    one = setting("gpt2", SPANS[1])
    file = tmp_path / "probes.csv"
    file.write_text(
        "prompt,kind,answer\nw80 w81 w82,,\nw83 w84,neighbour,\nw85 w86,other-relation,w3\n", encoding="utf-8"
    )
    spec = EvaluationSpec(texts=0, sampled=False, probes=str(file))
    result = evaluate(one.subject.handle, one.edit, [one.probes], spec)
    rows = [(row.probe.kind, row.probe.prompt, row.probe.answer) for row in result.rows][-3:]
    true = one.true("fact")
    assert rows == [("own", "w80 w81 w82", None), ("neighbour", "w83 w84", true), ("other-relation", "w85 w86", "w3")]


def test_an_edit_of_another_model_is_refused() -> None:
    one = setting("gpt2", SPANS[1])
    with pytest.raises(EditError, match="llama"):
        evaluate(subject("llama").handle, one.edit)


def test_a_probe_that_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    one = setting("gpt2", SPANS[1])
    long = Probe(kind="own", prompt=words([5] * 63), answer="w1 w2 w3")
    with pytest.raises(TargetError, match="64"):
        evaluate(one.subject.handle, one.edit, [[long]], NO_TEXTS)
    with pytest.raises(DatasetError, match="nowhere"):
        evaluate(one.subject.handle, one.edit, [one.probes], EvaluationSpec(references=str(tmp_path / "nowhere.txt")))


def test_a_cancelled_run_keeps_what_was_asked() -> None:
    one = setting("gpt2", SPANS[1])
    kept: list[Any] = []

    def progress(done: int, total: int, partial: Any) -> None:
        if partial is not None:
            kept.append(partial)
            raise Cancelled()

    with pytest.raises(Cancelled):
        evaluate(one.subject.handle, one.edit, [one.probes], progress=progress)
    (partial,) = kept
    assert len(partial.table()) == 4 and partial.table()["p_target_after"].notna().all()
    assert partial.table()["text_after"].isna().all() and partial.summary()["scores"]["rewrite"] >= 0


def test_answers_of_several_lengths_share_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = subject("llama")
    model = chosen.handle
    lengths: list[tuple[int, ...]] = []
    original = ModelHandle.forward

    def seen(self: ModelHandle, ids: Tensor, *args: Any, **more: Any) -> Tensor:
        lengths.append(tuple(ids.shape))
        return original(self, ids, *args, **more)

    monkeypatch.setattr(ModelHandle, "forward", seen)
    asked = [
        Question(ids=(5, 6, 7), answers=((8,), (9, 10, 11))),
        Question(ids=(12, 13, 14), answers=((15, 16, 17), (15, 16), (18,))),
    ]
    replies = ask(model, asked)
    assert lengths == [(2, 5)]
    for question, reply in zip(asked, replies, strict=True):
        for answer, score in zip(question.answers, reply.answers, strict=True):
            wanted = plain_evaluation.token_log_p(chosen, question.ids, answer)
            assert np.exp(score.log_p) == pytest.approx(np.exp(wanted), abs=ROUNDING)
            assert score.greedy == plain_evaluation.first_choices(chosen, question.ids, answer)
        assert reply.top == plain_evaluation.greedy(chosen, question.ids, 1)[0]
