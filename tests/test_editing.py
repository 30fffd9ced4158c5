"""Edits made and evaluated, from Python and from the command line: the numbers are those of their parts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cli_runner import FACT, PROMPT, SUBJECT, TINY, Outcome, invoke, refused, tiny_handle

from factscope.editors.compute import edit
from factscope.editors.edit import EditFact, with_edits
from factscope.editors.files import load_edit
from factscope.errors import Cancelled, FactScopeError, SpecError, SubjectError
from factscope.experiments import causal_tracing, edit_layers, edit_probes, editing
from factscope.experiments.edit_evaluation import EditEvaluation, EvaluationSpec, evaluate
from factscope.experiments.editing import Computing, EditingSpec, losses
from factscope.experiments.results import coarse_to_fine, tokenized
from factscope.models.handle import ModelHandle
from factscope.models.loading import load
from factscope.queries import Query
from tests.oracle.edits import merged
from tests.tiny_models import build, tiny_tokenizer

SETTINGS = (("statistics", "identity"), ("contexts", "none"), ("steps", 20), ("clamp", 40.0))
QUERY = Query(prompt=PROMPT, subject=SUBJECT, answer="Paris")
SPEC = EditingSpec(
    new_answer="Tokyo", preset="rome", layers=(1,), settings=SETTINGS, evaluation=EvaluationSpec(texts=3, sampled=False)
)
COLUMNS = [
    "kind", "prompt", "p_target_before", "p_target_after", "p_true_before", "p_true_after", "top_before", "top_after",
    "text_before", "text_after",
]  # fmt: skip
EDIT = ("edit", *FACT, "--answer", "Paris", "--new-answer", "Tokyo", "--layers", "1", "--preset", "rome",
        "--statistics", "identity", "--texts", "0", "--no-sampled")  # fmt: skip
LAYERS = ("layers", *FACT, "--answer", "Paris", "--new-answer", "Tokyo", "--preset", "rome", "--statistics", "identity",
          "--noise", "0.8", "--samples", "2")  # fmt: skip


@lru_cache
def found() -> EditEvaluation:
    return editing.run(tiny_handle(), QUERY, SPEC)


@lru_cache
def commanded() -> Outcome:
    return invoke(*EDIT, "--format", "json")


def probability(model: Any, handle: ModelHandle, prompt: str, answer: str) -> float:
    """Of the answer's first token, by a plain forward."""
    ids = handle.tokenizer(prompt)["input_ids"]
    target = handle.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[target])


def test_the_table_is_that_of_the_model_with_the_edit_in_its_weights() -> None:
    result = found()
    plain = build("gpt2", vocab_size=len(tiny_tokenizer("byte")))
    row = result.table().set_index("kind").loc["fact"]
    for name, answer in (("p_target", "Tokyo"), ("p_true", "Paris")):
        for when, model in (("before", plain), ("after", merged(plain, result.edits))):
            assert row[f"{name}_{when}"] == pytest.approx(probability(model, tiny_handle(), PROMPT, answer), abs=1e-5)
    replies = result.rows[0]
    assert replies.before is not None and replies.after is not None
    gained = replies.after.answers[0].log_probability - replies.before.answers[0].log_probability
    assert gained > 1, "the edit must be visible"


def test_the_columns_are_the_contract() -> None:
    assert list(found().table()) == COLUMNS
    data = commanded().data
    assert list(data["rows"][0]) == COLUMNS
    assert data["spec"]["method"] == "rome" and data["spec"]["evaluation"]["texts"] == 0
    summary = data["summary"]
    assert set(summary["scores"]) >= {"rewrite", "es", "em", "exact_rewrite"}
    assert all(summary["not_scored"].values()) and summary["update_norm"] > 0
    (edit,) = summary["edits"]
    assert edit["report"]["statistics"] and edit["report"]["values"][0]["steps"][0]["loss"] > 0
    assert data["model"]["weights"] != summary["weights_after"]


def test_an_edit_that_exists_gives_the_same_rows() -> None:
    result = found()
    again = evaluate(tiny_handle(), result.edits[0], spec=SPEC.evaluation)
    pd.testing.assert_frame_equal(again.table(), result.table())
    assert repr(again.fact_scores()) == repr(result.fact_scores())


def test_losses_are_told_step_by_step() -> None:
    table = losses(found().edits)
    assert {"edit", "fact", "layer", "step", "loss"} <= set(table) and table["step"].is_monotonic_increasing
    assert table["loss"].iloc[-1] < table["loss"].iloc[0]
    assert losses([]).empty


def test_progress_shows_the_loss_and_then_the_probes() -> None:
    seen: list[Any] = []
    done: list[int] = []

    def progress(now: int, total: int, partial: Any) -> None:
        done.append(now)
        seen.append(partial)

    editing.run(tiny_handle(), QUERY, SPEC, progress=progress)
    assert done == sorted(done) and done[-1] == editing.PARTS
    computing = [one for one in seen if isinstance(one, Computing)]
    tables = [one for one in seen if isinstance(one, EditEvaluation)]
    assert computing and computing[-1].partial.steps and computing[-1].table().empty
    assert tables and tables[-1].spec == SPEC and len(tables[-1].table()) == 1


@pytest.mark.parametrize("problem", ["tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing"])
@pytest.mark.parametrize("method", ["rome", "memit", "ft"])
def test_every_method_and_problem_is_made_and_scored(method: str, problem: str) -> None:
    preset = "memit" if method == "memit" else "rome"
    settings = (("steps", 4), ("noise", "0.8"))
    settings += () if method == "ft" else (("statistics", "identity"), ("contexts", "none"))
    spec = EditingSpec(
        method=method, problem=problem, preset=preset, layers=(1, 2) if method == "memit" else (1,), settings=settings,  # type: ignore[arg-type]
        evaluation=EvaluationSpec(texts=0, sampled=False),
    )  # fmt: skip
    result = editing.run(tiny_handle(), QUERY, spec)
    scores = result.fact_scores()[0]
    assert 0 <= scores.rewrite <= 1 and result.facts[0].problem == problem
    assert (result.facts[0].noise is not None) == (problem == "fact-forcing")
    assert math.isnan(scores.es) == (problem != "tracing-reversal" or not result.facts[0].contrasts)


def test_several_facts_of_a_file_are_edited_together(tmp_path: Path) -> None:
    file = tmp_path / "facts.csv"
    file.write_text(
        "subject,prompt,answer,new_answer\nJapan,The capital of Japan is,Tokyo,Paris\n"
        "Miles Davis,Miles Davis plays the,trumpet,French\n",
        encoding="utf-8",
    )
    outcome = invoke(
        "edit", "--model", TINY, "--facts", str(file), "--method", "memit", "--preset", "memit", "--layers", "1-2",
        "--statistics", "identity", "--texts", "0", "--no-sampled", "--format", "json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    rows = outcome.data["rows"]
    assert [(row["subject"], row["kind"]) for row in rows] == [("Japan", "fact"), ("Miles Davis", "fact")]
    assert set(outcome.data["summary"]["intervals"]["rewrite"]) and outcome.data["summary"]["target"] == [
        "Paris",
        "French",
    ]
    beside = invoke(*EDIT, "--facts", str(file), "--format", "json")
    assert beside.status == 0, beside.err
    assert [row["subject"] for row in beside.data["rows"]] == [SUBJECT, "Japan", "Miles Davis"]


def test_a_saved_edit_gives_the_numbers_again(tmp_path: Path) -> None:
    file = tmp_path / "tokyo.safetensors"
    outcome = invoke(*EDIT, "--save", str(file), "--format", "json")
    assert outcome.status == 0, outcome.err
    edit = load_edit(file)
    assert edit.facts == (
        EditFact(prompt="The {} is located in the city of", subject=SUBJECT, target="Tokyo", answer="Paris"),
    )
    after = outcome.data["rows"][0]["p_target_after"]
    said = invoke("predict", *FACT, "--answer", "Tokyo", "--edit", str(file), "--format", "json")
    assert said.data["query"]["p_target"] == pytest.approx(after, abs=1e-6)
    assert said.data["model"]["weights"] == outcome.data["summary"]["weights_after"]


# ------------------------------------------------------------------------------------------------------------ layers


def test_layers_are_single_edits_beside_the_trace() -> None:
    outcome = invoke(*LAYERS, "--format", "json")
    assert outcome.status == 0, outcome.err
    rows = outcome.data["rows"]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert list(rows[0]) == ["layer", "rewrite", "paraphrase", "neighbourhood", "tracing_effect"]
    traced = causal_tracing.run(
        tiny_handle(),
        Query(prompt=PROMPT, subject=SUBJECT, answer="Paris", score="sequence"),
        causal_tracing.TraceSpec(site="mlp", samples=2, noise="0.8"),
    )
    assert [row["tracing_effect"] for row in rows] == pytest.approx(traced.tracing_effect().tolist(), abs=1e-9)
    alone = invoke(*EDIT, "--format", "json").data["summary"]["scores"]["rewrite"]
    assert rows[1]["rewrite"] == pytest.approx(alone, abs=1e-6)
    assert outcome.data["summary"] == {}, "one fact has no correlation"


def test_layers_fill_in_coarse_to_fine_and_keep_what_was_done() -> None:
    spec = edit_layers.LayersSpec(
        method="ft", preset="rome", new_answer="Tokyo", settings=(("steps", 3),), noise="0.8", samples=2, edit_window=2
    )
    seen: list[list[int]] = []

    def progress(done: int, total: int, partial: Any) -> None:
        if partial is not None:
            seen.append(partial.table()["layer"].tolist())
            assert np.isfinite(partial.tracing_effect).all()
            if len(seen) == 3:
                raise Cancelled()

    with pytest.raises(Cancelled):
        edit_layers.run(tiny_handle(), QUERY, spec, progress=progress)
    order = coarse_to_fine(4)
    assert seen == [sorted(order[:n]) for n in range(3)]


def test_a_window_of_layers_is_edited_together() -> None:
    spec = edit_layers.LayersSpec(
        method="ft", preset="rome", new_answer="Tokyo", settings=(("steps", 3),), noise="0.8", samples=2, layers=(2,),
        edit_window=2,
    )  # fmt: skip
    result = edit_layers.run(tiny_handle(), QUERY, spec)
    both = EditingSpec(
        method="ft", preset="rome", new_answer="Tokyo", layers=(1, 2), settings=(("steps", 3),),
        evaluation=EvaluationSpec(texts=0, sampled=False),
    )  # fmt: skip
    alone = editing.run(tiny_handle(), QUERY, both).fact_scores()[0].rewrite
    assert result.layers == (2,) and result.score("rewrite")[0] == pytest.approx(alone, abs=1e-9)


def test_an_edit_that_no_later_token_reads_is_said_and_found_useless() -> None:
    spec = edit_layers.LayersSpec(
        method="rome", preset="rome", new_answer="Tokyo", noise="0.8", samples=2,
        settings=(("steps", 3), ("contexts", "none"), ("statistics", "identity")),
    )  # fmt: skip
    model = tiny_handle()
    seen = tokenized(model, QUERY)
    settings = edit_layers.settings_by_layer(model, spec)
    assert edit_layers.unread(seen, settings, model.info.n_layers) == (model.info.n_layers - 1,)
    result = edit_layers.run(model, QUERY, spec)
    last = result.layers[-1]
    assert any(f"layer {last} can hardly work" in text for text in result.warnings)
    assert not any("more steps" in text and f"layer {last}" in text for text in result.warnings)
    sought = {layer: _sought(model, settings[layer]) for layer in (0, last)}
    assert np.ptp(sought[last]) < 1e-3 < 1 < np.ptp(sought[0]), "whatever is written there, nothing of it arrives"
    memit = replace(spec, method="memit", preset="memit", edit_window=2)
    windows = edit_layers.settings_by_layer(model, memit)
    assert [one.layers[-1] for one in windows.values()][-1] == last
    assert last in edit_layers.unread(seen, windows, model.info.n_layers)
    at_the_end = {last: replace(settings[last], fact_token="last")}
    assert edit_layers.unread(seen, at_the_end, model.info.n_layers) == ()
    tuned = edit_layers.settings_by_layer(model, replace(spec, method="ft", settings=()))
    assert edit_layers.unread(seen, tuned, model.info.n_layers) == ()


def _sought(model: ModelHandle, settings: Any) -> list[float]:
    """The target's log-probability at every step, while the value is sought."""
    fact = EditFact(prompt=PROMPT.replace(SUBJECT, "{}"), subject=SUBJECT, target="Tokyo", answer="Paris")
    (value,) = edit(model, [fact], settings).report["values"]
    return [math.log(step["p_target"]) for step in value["steps"]]


def test_what_cannot_be_done_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = tiny_handle()
    spec = edit_layers.LayersSpec(method="rome", preset="rome", new_answer="Tokyo")
    with pytest.raises(SpecError, match=r"no statistics of keys for .*, layer 0, 1, 2, 3"):
        edit_layers.prepare(model, QUERY, spec)
    one = (("statistics", str(tmp_path / "layer.npz")),)
    with pytest.raises(SpecError, match="is one file, and several layers are edited"):
        edit_layers.run(model, QUERY, replace(spec, settings=one))
    with pytest.raises(SubjectError):
        edit_layers.prepare(model, Query(prompt="The capital of Japan is"), spec)
    few = replace(spec, method="ft", settings=(("steps", 2),), layers=(1,))
    one, all_layers = (edit_layers.prepare(model, QUERY, asked) for asked in (few, replace(few, layers=())))
    assert 0 < one < all_layers


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--new-answer", "Paris"), "'Paris'"),
        (("--new-answer", "  "), "' '"),
        (("--new-answer", ""), "''"),
        (("--layers", "4"), "layer 4"),
        (("--layers", "3-1"), "'3-1'"),
        (("--layers", "one"), "'one'"),
        (("--problem", "fact-erasure"), "fact-erasure"),
        (("--bos", "no"), "'no'"),
        (("--probes", "nowhere.csv"), "nowhere.csv"),
        (("--facts", "nowhere.csv"), "nowhere.csv"),
        (("--save", "edit.json"), "edit.json"),
        (("--save", "/nowhere/edit.safetensors"), "/nowhere/edit.safetensors"),
        (("--method", "mend"), "mend"),
        (("--preset", "mine"), "mine"),
        (("--method", "memit", "--preset", "rome"), "memit"),
        (("--statistics", "nowhere.npz"), "nowhere.npz"),
        (("--references", "nowhere.txt", "--texts", "0"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_edited_is_refused(change: tuple[str, ...], said: str) -> None:
    refused(invoke(*EDIT, *change), said)


def test_a_missing_target_or_subject_is_refused() -> None:
    refused(invoke("edit", *FACT, "--answer", "Paris"), "new answer")
    refused(invoke("edit", "--model", TINY), "--prompt")
    refused(invoke("edit", "--model", TINY, "--prompt", PROMPT, "--new-answer", "Tokyo"), "subject")
    refused(invoke("edit", "--model", TINY, "--facts", "x.csv", "--new-answer", "Tokyo"), "--new-answer", "'Tokyo'")
    refused(invoke(*LAYERS, "--edit-window", "9"), "9")
    refused(invoke(*LAYERS, "--layers", "7"), "layer 7")


def test_a_file_without_new_answers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([{"subject": "Japan", "prompt": "The capital of Japan is", "answer": "Tokyo"}]), "utf-8")
    refused(invoke("edit", "--model", TINY, "--facts", str(file)), "Japan", "new_answer")


def test_statistics_are_never_collected_unasked() -> None:
    with pytest.raises(FactScopeError, match=r"statistics|second moment"):
        editing.run(tiny_handle(), QUERY, EditingSpec(new_answer="Tokyo", preset="rome", layers=(1,)))


def test_a_cancelled_edit_leaves_nothing(tmp_path: Path) -> None:
    ids = torch.tensor([tiny_handle().tokenizer(PROMPT)["input_ids"]])
    before = tiny_handle().forward(ids)

    def progress(done: int, total: int, partial: Any) -> None:
        if done > 200:
            raise Cancelled()

    with pytest.raises(Cancelled):
        editing.run(tiny_handle(), QUERY, SPEC, progress=progress)
    assert torch.equal(tiny_handle().forward(ids), before)


def test_the_bundled_model_hides_what_says_nothing_of_it() -> None:
    model = load("bundled")
    query = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower", answer="Paris")
    settings = (("statistics", "identity"), ("contexts", "none"), ("steps", 3))
    spec = EditingSpec(new_answer="Rome", preset="rome", layers=(0,), settings=settings)
    result = editing.run(model, query, spec)
    table = result.table()
    assert set(table["kind"]) == {"fact", "paraphrase", "neighbour", "other-relation", "generation"}
    reasons = result.summary()["not_scored"]
    assert all("recites" in reasons[name] for name in ("fluency", "consistency", "essence", "overall_essence"))
    assert table[table["kind"] == "generation"]["text_before"].str.len().gt(0).all()
    assert result.edited.weights == with_edits(model, result.edits).info.weights


# ------------------------------------------------------------------------------------- which fact, which words of it


REPEATED = "Japan, I mean Japan, has the capital"


def test_noise_of_fact_forcing_is_put_where_the_edit_put_it() -> None:
    model = tiny_handle()
    asked = Query(prompt=REPEATED, subject="Japan", answer="Tokyo", occurrence=2)
    settings = (("steps", 2), ("noise", "0.5"))
    spec = EditingSpec(
        method="ft", problem="fact-forcing", preset="rome", layers=(1,), settings=settings, evaluation=SPEC.evaluation
    )
    result = editing.run(model, asked, spec)
    seen = tokenized(model, asked)
    (fact,) = result.facts
    question = edit_probes.prompts_of(model, [fact])[0].question
    assert question.noise is not None and seen.subject is not None and seen.subject[0] > 5
    assert question.noise.positions == tuple(range(*seen.subject))
    first = editing.run(model, replace(asked, occurrence=1), spec)
    p_first, p_second = (one.table()["p_target_before"].iloc[0] for one in (first, result))
    assert p_first != p_second


def test_a_repeated_subject_is_edited_at_every_layer_and_from_a_file(tmp_path: Path) -> None:
    model = tiny_handle()
    asked = Query(prompt=REPEATED, subject="Japan", answer="Tokyo", occurrence=2)
    few = edit_layers.LayersSpec(
        method="ft", preset="rome", new_answer="Paris", layers=(1,), settings=(("steps", 2),), noise="0.5", samples=2
    )
    assert len(edit_layers.run(model, asked, few).table()) == 1
    (tmp_path / "facts.csv").write_text(f'prompt,subject,answer,new_answer\n"{REPEATED}",Japan,Tokyo,Paris\n')
    spec = replace(SPEC, method="ft", new_answer=None, settings=(("steps", 2),), facts=str(tmp_path / "facts.csv"))
    assert editing.run(model, None, spec).facts[0].occurrence == 1


def test_records_that_are_not_edited_are_named(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text(
        "prompt,subject,answer,new_answer\n"
        "The capital of Japan is,Japan,Tokyo,Paris\n"
        "The capital of Peru is,Peruu,Lima,Rome\n"
        "The capital of Japan is,Japan,Tokyo,Rome\n"
    )
    spec = replace(SPEC, method="ft", new_answer=None, settings=(("steps", 1),), facts=str(tmp_path / "facts.csv"))
    said = editing.run(tiny_handle(), None, spec).warnings
    assert any("Record 2" in text and "Peruu" in text for text in said)
    assert any("Record 3" in text and "repeats record 1" in text for text in said)
    given = Query(prompt="The capital of Japan is", subject="Japan", answer="Tokyo")
    said = editing.run(tiny_handle(), given, replace(spec, new_answer="Madrid")).warnings
    assert any("'Paris'" in text and "is not used" in text for text in said)


def test_own_probes_reach_a_fact_of_several_and_have_their_own_answers(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text(
        "prompt,subject,answer,new_answer\n"
        "The capital of Japan is,Japan,Tokyo,Paris\nThe capital of Peru is,Peru,Lima,Rome\n"
    )
    (tmp_path / "probes.csv").write_text(
        "prompt,kind,answer\nThe capital of China is,neighbour,Beijing\n"
        "The currency of Peru is,own,\nThe capital of Chile is,own,\n"
    )
    spec = replace(
        SPEC, method="ft", new_answer=None, settings=(("steps", 1),), facts=str(tmp_path / "facts.csv"),
        evaluation=replace(SPEC.evaluation, probes=str(tmp_path / "probes.csv")),
    )  # fmt: skip
    table = editing.run(tiny_handle(), None, spec).table().set_index("prompt")
    assert table.loc["The currency of Peru is", "subject"] == "Peru"
    assert {table.loc[f"The capital of {name} is", "subject"] for name in ("China", "Chile")} == {"Japan"}
    assert pd.isna(table.loc["The currency of Peru is", "p_true_before"]), "it has no true answer of its own"
    assert table.loc["The capital of China is", "p_true_before"] > 0
