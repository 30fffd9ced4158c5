"""Every command takes saved edits: its numbers are those of the edited model, and the model itself stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import FACT, PROMPT, SUBJECT, TINY, invoke, refused, save_tiny, tiny_handle

from factscope.editors.edit import Edit, EditFact, with_edits
from factscope.editors.files import save_edit
from factscope.experiments import (
    attention_knockout,
    attribute_extraction,
    causal_tracing,
    heads,
    logit_lens,
    prediction,
    subject_enrichment,
)
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle
from factscope.output import records
from factscope.queries import Query
from tests.oracle.edits import edit_of

ANSWERED = (*FACT, "--answer", "Paris")
QUERY = Query(prompt=PROMPT, subject=SUBJECT, answer="Paris")
TRACE = causal_tracing.TraceSpec(samples=2, noise="0.8", seeds=(1,), site="mlp")
RUNS: dict[str, tuple[tuple[str, ...], Callable[[ModelHandle], Any]]] = {
    "predict": ((), lambda handle: prediction.run(handle, QUERY, prediction.PredictionSpec())),
    "flow": (("--sources", "each"), lambda handle: attention_knockout.run(
        handle, QUERY, attention_knockout.KnockoutSpec(sources=("each",)))),
    "lens": (("--top-k", "2"), lambda handle: logit_lens.run(handle, QUERY, logit_lens.LensSpec(top_k=2))),
    "trace": (("--site", "mlp", "--samples", "2", "--noise", "0.8"), lambda handle: causal_tracing.run(
        handle, QUERY, TRACE)),
    "enrich": ((), lambda handle: subject_enrichment.run(handle, QUERY, subject_enrichment.EnrichmentSpec())),
    "extract": ((), lambda handle: attribute_extraction.run(handle, QUERY, attribute_extraction.ExtractionSpec())),
    "heads": ((), lambda handle: heads.run(handle, QUERY, heads.HeadsSpec())),
}  # fmt: skip


@cache
def edits() -> tuple[Edit, Edit]:
    """Two edits of the tiny model; the second was computed with the first one on."""
    generator = torch.Generator().manual_seed(5)
    handle = tiny_handle()

    def change(layer: int, rank: int) -> WeightDelta:
        left, right = (torch.randn(shape, generator=generator) for shape in ((144, rank), (rank, 36)))
        return WeightDelta(layer=layer, place="down_projection", left=0.1 * left, right=right)

    one = edit_of(handle, [change(1, 1)])
    fact = EditFact(prompt="{} stands in", subject="Eiffel\u202eTower", target="Rome")
    return one, edit_of(handle, [change(2, 2), change(3, 1)], after=[one], method="memit", facts=(fact,))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, edit in zip(paths, edits(), strict=True):
        save_edit(edit, path)
    return [str(path) for path in paths]


@pytest.mark.parametrize("command", RUNS)
def test_the_numbers_are_those_of_the_edited_model(command: str, files: list[str]) -> None:
    options, run = RUNS[command]
    asked = (command, *ANSWERED, *options, "--format", "json")
    before = invoke(*asked).data
    found = invoke(*asked, "--edit", files[0], "--edit", files[1])
    assert found.status == 0, found.err
    expected = run(with_edits(tiny_handle(), edits()))
    assert found.data["rows"] == records(expected.table())
    assert found.data["rows"] != before["rows"]
    assert found.data["model"]["weights"] == expected.model.weights != before["model"]["weights"]
    assert [edit["key"] for edit in found.data["model"]["edits"]] == [edit.key for edit in edits()]
    assert "edits" not in before["model"]
    after = invoke(*asked).data
    assert after["rows"] == before["rows"]
    assert after["model"] == before["model"]


def test_edits_stand_above_the_table_and_warnings_beside_it(files: list[str]) -> None:
    one, two = edits()
    shown = invoke("predict", *ANSWERED, "--edit", files[1])
    assert (
        f"edit    memit, layers 2, 3, error-injection: 'Eiffel\\u202eTower stands in' -> 'Rome' ({two.key})"
        in shown.out
    )
    assert f"was computed in the weight state {two.computed_on}" in shown.err
    both = invoke("predict", *ANSWERED, "--edit", files[0], "--edit", files[1])
    assert f"({one.key})" in both.out and f"({two.key})" in both.out
    assert "was computed in" not in both.err


def test_an_edited_model_is_compared_with_the_original(files: list[str]) -> None:
    asked = ("compare", "predict", *ANSWERED, "--top-k", "50", "--format", "json")
    found = invoke(*asked, "--b", f"--edit {files[0]}").data
    alone = [invoke("predict", *ANSWERED, "--format", "json", *more).data for more in ((), ("--edit", files[0]))]
    assert found["summary"]["differs"]["weights"] == [side["model"]["weights"] for side in alone]
    assert "edits" in found["summary"]["differs"]
    assert any(row["probability_difference"] for row in found["rows"] if row["probability_difference"] is not None)
    swapped = invoke(*asked, "--a", f"--edit {files[0]}").data
    assert swapped["summary"]["differs"]["weights"] == found["summary"]["differs"]["weights"][::-1]


def test_models_takes_edits(files: list[str]) -> None:
    found = invoke("models", "--model", TINY, "--edit", files[0], "--format", "json").data
    assert found["model"]["weights"] == with_edits(tiny_handle(), edits()[:1]).info.weights
    refused(invoke("models", "--edit", files[0]), "one.safetensors", "stands without --model")


def test_an_answer_that_an_edit_put_in_is_told_from_one_that_nobody_put_there() -> None:
    from types import SimpleNamespace

    from factscope.cli.notes import notes

    def said(answer: str, *on: Edit) -> list[str]:
        query = Query(prompt="Eiffel Tower stands in", subject="Eiffel Tower", answer=answer)
        result = SimpleNamespace(query=SimpleNamespace(query=query), model=SimpleNamespace(name="bundled"))
        return notes("flow", result, on)

    fact = EditFact(prompt="{} stands in", subject="Eiffel Tower", target="Rome")
    on = replace(edits()[0], facts=(fact,))
    untaught = "not among the facts this model was taught; "
    assert said("Rome", on) == [f"'Eiffel Tower' with 'Rome': {untaught}an edit put it there."]
    assert said("Oslo", on) == [f"'Eiffel Tower' with 'Oslo': {untaught}its confidence says nothing."]
    assert said("Rome") == [f"'Eiffel Tower' with 'Rome': {untaught}its confidence says nothing."]
    assert said("Paris", on) == []


def test_above_the_table_a_reason_stands_once_and_the_edit_in_words() -> None:
    from factscope.cli.telling import headline

    edit = {
        "key": "k1", "method": "rome", "problem": "error-injection", "layers": [1], "computed_on": "w0",
        "spec": {"steps": 40, "clamp": 1.0}, "report": {"update_norm": {"1": 45.32}, "seconds": 3.0},
    }  # fmt: skip
    data: dict[str, Any] = {
        "command": "edit", "query": {"prompt": "It is in", "target": {"text": " Paris"}, "p_target": 0.9, "rank": 1},
        "model": {"name": "bundled", "family": "gpt2", "n_layers": 8, "dtype": "float32", "weights": "w0"},
        "summary": {"not_scored": {"ns": "none known", "nm": "none known", "essence": "no text"}, "edits": [edit]},
    }  # fmt: skip
    lines = headline(data).splitlines()
    assert "not_scored ns, nm (none known); essence (no text)" in lines
    assert "edits   rome, layer 1, error-injection, update norm 45.32, at most 40 steps (k1)" in lines


def test_an_empty_column_of_layers_is_explained() -> None:
    from types import SimpleNamespace

    import pandas as pd

    from factscope.cli.notes import notes

    def said(neighbourhood: float, rewrite: float = 0.5) -> list[str]:
        rows = {"layer": [0], "rewrite": [rewrite], "paraphrase": [0.5], "neighbourhood": [neighbourhood]}
        asked = SimpleNamespace(query=Query(prompt="It is in"))
        table = pd.DataFrame(rows)
        return notes("layers", SimpleNamespace(query=asked, model=SimpleNamespace(name="x"), table=lambda: table))

    assert said(float("nan"))[0].startswith("The column neighbourhood is empty: no question about another subject")
    assert said(0.9) == said(float("nan"), float("nan")) == []


# ------------------------------------------------------------------------------------------------------ refusals


def test_an_edit_of_another_model_is_refused(files: list[str], tmp_path: Path) -> None:
    save_tiny(tmp_path / "llama", "llama")
    other = invoke("predict", "--model", str(tmp_path / "llama"), *FACT[2:], "--edit", files[0])
    refused(other, "was made for tiny@test", tiny_handle().info.weights, "load that model")


def test_an_edit_that_cannot_be_read_is_refused_before_the_model_is_loaded(files: list[str], tmp_path: Path) -> None:
    def none(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    content = Path(files[0]).read_bytes()
    Path(files[0]).write_bytes(content[:-5])
    refused(invoke("flow", *FACT, "--edit", files[0], load=none), "one.safetensors", "damaged")
    refused(invoke("flow", *FACT, "--edit", files[1], "--edit", "none.safetensors", load=none), "none.safetensors")
    refused(invoke("models", "--model", TINY, "--edit", files[0], load=none), "one.safetensors", "damaged")
    refused(invoke("flow", *FACT, "--edit", str(tmp_path), load=none), tmp_path.name, "no file")
    refused(invoke("compare", "flow", *FACT, "--b", f"--edit {files[0]}"), "one.safetensors", "damaged")


def test_what_an_edit_asks_and_the_model_lacks_is_refused(tmp_path: Path) -> None:
    one, _ = edits()
    path = tmp_path / "edit.safetensors"
    save_edit(replace(one, deltas=(replace(one.deltas[0], layer=99),)), path)
    refused(invoke("predict", *FACT, "--edit", str(path)), "layer 99 is not between 0 and 3")
    save_edit(replace(one, deltas=(replace(one.deltas[0], right=torch.ones(1, 35)),)), path)
    refused(invoke("predict", *FACT, "--edit", str(path)), "to 35 numbers", "from 144 to 36")
    save_edit(one, path)
    refused(invoke("predict", *FACT, "--edit", str(path), "--edit", str(path)), one.key, "given twice")


def test_nothing_of_an_edit_remains_after_a_failure(files: list[str]) -> None:
    before = invoke("flow", *ANSWERED, "--format", "json").data
    refused(invoke("flow", *ANSWERED, "--edit", files[0], "--window", "0"), "window")
    assert invoke("flow", *ANSWERED, "--format", "json").data["rows"] == before["rows"]
