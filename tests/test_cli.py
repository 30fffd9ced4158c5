"""The command line keeps its contract: columns, JSON, exit status, files; its numbers are the run functions'."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cli_runner import FACT, PROMPT, SUBJECT, TINY, invoke, refused, save_tiny, tiny_handle

from factscope import cli
from factscope.experiments import (
    attention_knockout,
    attribute_extraction,
    causal_tracing,
    heads,
    logit_lens,
    prediction,
    subject_enrichment,
)
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.experiments.attribute_extraction import ExtractionSpec
from factscope.experiments.causal_tracing import TraceSpec
from factscope.experiments.heads import HeadsSpec
from factscope.experiments.logit_lens import LensSpec
from factscope.experiments.prediction import PredictionSpec
from factscope.experiments.subject_enrichment import EnrichmentSpec
from factscope.queries import Query

QUERY = Query(prompt=PROMPT, subject=SUBJECT, answer="Paris")
ANSWERED = (*FACT, "--answer", "Paris")
COMMANDS: dict[str, tuple[tuple[str, ...], list[str], list[str]]] = {
    "predict": ((), ["rank", "id", "text", "probability"], ["continuation", "known", "taught"]),
    "flow": (
        ("--sources", "subject,last", "--control", "2"),
        ["source", "layer", "window", "p_base", "p_knockout", "relative_change_percent", "log_odds_change"],
        [],
    ),
    "lens": (
        ("--site", "mlp", "--top-k", "3"),
        [
            "site", "layer", "position", "rank", "id", "text", "probability", "target_rank", "target_probability",
            "entropy",
        ],
        [],
    ),
    "enrich": (
        ("--kept", "20"),
        ["position", "layer", "attributes_rate", "ceiling", "other_subject_rate"],
        ["n_attributes"],
    ),
    "trace": (
        ("--site", "mlp", "--positions", "subject,last", "--seeds", "3,4", "--samples", "2", "--noise", "0.8"),
        ["site", "position", "layer", "p_restored", "indirect_effect"],
        ["p_clean", "p_corrupted", "noise_std", "total_effect", "peak", "early_peak", "noise", "bands"],
    ),
    "extract": (
        ("--edges", "block:subject-last", "--procedure", "notebook"),
        ["site", "layer", "extracted", "target_rank", "target_score"],
        ["first_extracting_layer"],
    ),
    "heads": (
        ("--mapping", "state", "--foil", "Rome"),
        [
            "layer", "head", "direct_effect", "direct_effect_foil", "attention_to_subject", "mapping_rank",
            "top_promoted",
        ],
        ["bias_effect", "residual", "split_before_norm"],
    ),
}  # fmt: skip
RUNS: dict[str, Callable[[], Any]] = {
    "predict": lambda: prediction.run(tiny_handle(), QUERY, PredictionSpec()),
    "flow": lambda: attention_knockout.run(
        tiny_handle(), QUERY, KnockoutSpec(sources=("subject", "last"), control=2, seed=1)
    ),
    "lens": lambda: logit_lens.run(tiny_handle(), QUERY, LensSpec(site="mlp", top_k=3)),
    "enrich": lambda: subject_enrichment.run(tiny_handle(), QUERY, EnrichmentSpec(kept=20)),
    "trace": lambda: causal_tracing.run(
        tiny_handle(),
        QUERY,
        TraceSpec(site="mlp", positions=("subject", "last"), seeds=(3, 4), samples=2, noise="0.8"),
    ),
    "extract": lambda: attribute_extraction.run(
        tiny_handle(), QUERY, ExtractionSpec(edges="block:subject-last", procedure="notebook")
    ),
    "heads": lambda: heads.run(tiny_handle(), dataclasses.replace(QUERY, foil="Rome"), HeadsSpec(mapping="state")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_object_is_the_contract(command: str) -> None:
    options, columns, summary = COMMANDS[command]
    data = invoke(command, *ANSWERED, *options, "--format", "json").data
    assert list(data) == [
        "schema", "command", "model", "query", "spec", "warnings", "summary", "timing", "rows",
    ]  # fmt: skip
    assert (data["schema"], data["command"]) == (1, command)
    assert list(data["model"]) == [
        "name", "revision", "dtype", "family", "n_layers", "n_heads", "d_model", "weights",
    ]  # fmt: skip
    assert list(data["query"]) == [
        "prompt", "tokens", "subject", "target", "p_target", "rank", "foil", "score", "bos",
    ]  # fmt: skip
    assert list(data["query"]["tokens"][0]) == ["position", "id", "text", "role"]
    assert list(data["query"]["target"]) == ["id", "text", "n_tokens"]
    assert list(data["timing"]) == ["seconds", "passes"]
    assert data["timing"]["seconds"] > 0
    assert data["timing"]["passes"] >= 1
    assert list(data["summary"]) == summary
    assert all(list(row) == columns for row in data["rows"])
    roles = [token["role"] for token in data["query"]["tokens"]]
    start, stop = data["query"]["subject"]
    assert roles[0] == "special"
    assert roles[-1] == "last"
    assert set(roles[start:stop]) == {"subject"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_numbers_are_those_of_the_run_functions(command: str) -> None:
    options, columns, _ = COMMANDS[command]
    result = RUNS[command]()
    data = invoke(command, *ANSWERED, *options, "--format", "json").data
    assert data["rows"] == result.table().to_dict("records")
    assert list(result.table()) == columns
    assert data["query"]["p_target"] == result.p_target
    assert data["query"]["rank"] == result.rank
    assert [token["id"] for token in data["query"]["tokens"]] == list(result.query.ids)
    assert data["model"]["weights"] == result.model.weights


@pytest.mark.parametrize("command", COMMANDS)
def test_every_form_says_the_same(command: str, tmp_path: Path) -> None:
    options, columns, _ = COMMANDS[command]
    asked = (command, *ANSWERED, *options)
    rows = invoke(*asked, "--format", "json").data["rows"]
    (tmp_path / "shown.csv").write_text(invoke(*asked, "--format", "csv").out, newline="")
    for suffix in ("json", "csv", "parquet"):
        written = invoke(*asked, "--out", str(tmp_path / f"rows.{suffix}"))
        assert f"to {tmp_path / 'rows'}.{suffix}" in written.err
        assert (written.status, written.out) == (0, "")
    assert (tmp_path / "shown.csv").read_bytes() == (tmp_path / "rows.csv").read_bytes()
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    parquet = pd.read_parquet(tmp_path / "rows.parquet")
    csv = pd.read_csv(tmp_path / "rows.csv", keep_default_na=False)
    for name in columns:
        assert parquet[name].tolist() == [row[name] for row in rows], name
        if name not in ("text", "top_promoted"):
            assert csv[name].tolist() == [row[name] for row in rows], name
    table = invoke(*asked).out
    heading, body = table.split("\n\n")
    assert body.splitlines()[0].split() == columns
    assert len(body.splitlines()) == len(rows) + 1
    assert repr(PROMPT) in heading
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.csv", "rows.json", "rows.parquet", "shown.csv"]


@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_give_the_same_rows(command: str) -> None:
    options = COMMANDS[command][0]
    first, second = (invoke(command, *ANSWERED, *options, "--format", "csv").out for _ in range(2))
    assert first == second


def test_another_seed_draws_other_controls() -> None:
    draws = {
        seed: invoke("flow", *FACT, "--sources", "last", "--control", "3", "--seed", seed, "--format", "csv").out
        for seed in ("1", "2")
    }
    assert draws["1"] != draws["2"]


def test_each_names_positions_as_integers() -> None:
    rows = invoke("flow", *FACT, "--sources", "each", "--format", "json").data["rows"]
    assert [row["source"] for row in rows[::4]] == list(range(16))
    rows = invoke("flow", *FACT, "--sources", "3,subject", "--format", "json").data["rows"]
    assert {row["source"] for row in rows} == {"3", "subject"}


def test_edges_are_cut_together() -> None:
    edges = ("last:subject:1-2", "last:2:0:1,3")
    asked = [part for edge in edges for part in ("--edges", edge)]
    (row,) = invoke("flow", *ANSWERED, *asked, "--format", "json").data["rows"]
    result = attention_knockout.run(tiny_handle(), QUERY, KnockoutSpec(edges=edges))
    assert row == result.table().to_dict("records")[0]
    assert row["source"] == "edges"
    alone = invoke("flow", *ANSWERED, "--edges", edges[0], "--format", "json").data["rows"][0]
    assert alone["p_knockout"] != row["p_knockout"]


def test_an_edge_equals_the_same_cut_by_sources() -> None:
    by_sources = invoke("flow", *FACT, "--sources", "subject", "--window", "1", "--format", "json").data["rows"]
    for row in by_sources:
        edge = invoke("flow", *FACT, "--edges", f"last:subject:{row['layer']}", "--format", "json").data["rows"][0]
        assert edge["p_knockout"] == pytest.approx(row["p_knockout"], abs=1e-6)


def test_the_last_layer_of_the_lens_is_the_prediction() -> None:
    predicted = invoke("predict", *FACT, "--top-k", "5", "--format", "json").data
    rows = invoke("lens", *FACT, "--top-k", "5", "--format", "json").data["rows"]
    assert {row["layer"] for row in rows} == {-1, 0, 1, 2, 3}
    last = [row for row in rows if (row["layer"], row["position"]) == (3, 15)]
    assert [row["id"] for row in last] == [row["id"] for row in predicted["rows"]]
    assert [row["probability"] for row in last] == pytest.approx(
        [row["probability"] for row in predicted["rows"]], abs=1e-6
    )


def test_the_default_window_is_named() -> None:
    rows = invoke("flow", *FACT, "--sources", "subject", "--format", "json").data["rows"]
    assert {row["window"] for row in rows} == {3}


def test_without_a_subject_the_last_token_is_cut() -> None:
    rows = invoke("flow", "--model", TINY, "--prompt", PROMPT, "--format", "json").data["rows"]
    assert {row["source"] for row in rows} == {"last"}


def test_a_foil_has_its_probability_in_the_summary() -> None:
    summary = invoke("predict", *ANSWERED, "--foil", "Rome", "--format", "json").data["summary"]
    assert 0 < summary["p_foil"] < 1


def test_a_trace_tells_its_peak_its_bands_and_its_doubts() -> None:
    asked = ("trace", *ANSWERED, "--samples", "2", "--noise", "0.8")
    data = invoke(*asked, "--seeds", "1,2", "--format", "json").data
    summary, rows = data["summary"], data["rows"]
    best = max(rows, key=lambda row: row["indirect_effect"])
    assert summary["peak"] == {name: best[name] for name in summary["peak"]}
    assert summary["total_effect"] == pytest.approx(summary["p_clean"] - summary["p_corrupted"])
    assert summary["noise_std"] == 0.8
    assert len(rows) == 16 * 4 == len(summary["bands"]["indirect_effect"])
    for row, band in zip(rows, summary["bands"]["indirect_effect"], strict=True):
        assert (row["position"], row["layer"]) == (band["position"], band["layer"])
        assert band["low"] - 1e-9 <= row["indirect_effect"] <= band["high"] + 1e-9
    assert any("does not know this" in warning for warning in data["warnings"])
    table = invoke(*asked, "--seeds", "1,2").out
    assert "peak    position " in table
    assert max(map(len, table.splitlines())) < 400


def test_a_foil_gives_a_trace_its_logit_differences() -> None:
    asked = ("trace", *ANSWERED, "--foil", "Tokyo", "--positions", "last", "--samples", "2", "--format", "json")
    data = invoke(*asked).data
    assert list(data["rows"][0])[-1] == "logit_difference"
    last = data["rows"][-1]["logit_difference"]
    assert last == pytest.approx(data["summary"]["logit_difference_clean"], abs=1e-4)
    assert data["summary"]["logit_difference_corrupted"] != data["summary"]["logit_difference_clean"]
    assert not any("foil" in warning for warning in data["warnings"])


def test_a_trace_takes_other_corruptions() -> None:
    asked = ("trace", *ANSWERED, "--positions", "last", "--samples", "2", "--format", "json")
    plain = invoke(*asked, "--noise", "0.8").data
    for more in (("--seed", "2"), ("--replace",), ("--extra-tokens", "1"), ("--sever", "mlp"), ("--noise", "u2")):
        other = invoke(*asked, "--noise", "0.8", *more).data
        assert other["rows"] != plain["rows"], more
    compat = invoke(*asked, "--noise", "0.8", "--sever", "mlp", "--sever-draws", "compat").data
    assert compat["summary"]["p_corrupted"] == plain["summary"]["p_corrupted"]
    refused(invoke("trace", *ANSWERED, "--replace-subject", "X"), "'X' takes")
    refused(invoke("trace", *ANSWERED, "--seed", "2", "--seeds", "1,2"), "--seed 2")
    refused(invoke("trace", *ANSWERED, "--seeds", "1,a"), "--seeds 'a'")
    refused(invoke("trace", *ANSWERED, "--noise-facts", "/nowhere.csv"), "nowhere.csv")
    refused(invoke("trace", "--model", TINY, "--prompt", PROMPT), "has none")


def test_a_foil_adds_the_change_of_the_logit_difference() -> None:
    rows = invoke("flow", *ANSWERED, "--foil", "Rome", "--format", "json").data["rows"]
    assert all(list(row) == [*COMMANDS["flow"][1], "logit_difference_change"] for row in rows)
    compared = invoke("compare", "flow", *ANSWERED, "--foil", "Rome", "--b", "--window 1", "--format", "json").data
    assert all("logit_difference_change_difference" in row for row in compared["rows"])
    compared = invoke("compare", "flow", *ANSWERED, "--b", "--foil Rome", "--format", "json").data
    assert not any("logit_difference_change_b" in row for row in compared["rows"])


def test_options_without_effect_are_told() -> None:
    outcome = invoke("lens", *ANSWERED, "--foil", "Rome", "--format", "json")
    assert "The foil 'Rome' changes nothing in lens" in outcome.err
    assert any("Rome" in warning for warning in outcome.data["warnings"])
    said = invoke("lens", *ANSWERED, "--score", "sequence").err
    assert "the lens follows the first of the 2 tokens of 'Paris'" in said


def test_a_warning_of_the_model_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = tiny_handle()
    monkeypatch.setitem(vars(handle), "warnings", ("the copy in the local cache is used",))
    outcome = invoke("predict", *FACT, "--format", "json")
    assert outcome.err == "warning: the copy in the local cache is used\n"
    assert outcome.data["warnings"] == ["the copy in the local cache is used"]


def test_random_weights_are_the_same_twice_and_not_the_real_ones(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    asked = ("--prompt", PROMPT, "--format", "json")
    real, drawn, again = (
        invoke("predict", "--model", name, *asked).data
        for name in (str(folder), f"random:{folder}", f"random:{folder}")
    )
    assert drawn["rows"] == again["rows"] != real["rows"]
    assert drawn["model"]["weights"] == again["model"]["weights"] != real["model"]["weights"]
    assert real["model"]["family"] == drawn["model"]["family"] == "gpt2"


# Models and help


def test_models_lists_families_and_why_not() -> None:
    outcome = invoke("models", "--format", "json")
    assert outcome.status == 0
    data = outcome.data
    assert (data["schema"], data["command"]) == (1, "models")
    families = {row["name"]: row for row in data["rows"] if row["kind"] == "family"}
    assert families["gpt2"]["knockout"] == "yes"
    assert families["mamba"]["knockout"].startswith("no: ")
    columns = ["kind", "name", "family", "size_mb", *data["meanings"]]
    assert all(sorted(row) == sorted(columns) for row in data["rows"])
    assert "no (1)" in invoke("models").out


def test_a_model_is_inspected(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    data = invoke("models", "--model", str(folder), "--format", "json").data
    assert data["model"]["n_layers"] == 4
    assert {row["capability"]: row["supported"] for row in data["rows"]}["knockout"] is True
    assert list(data["rows"][0]) == ["capability", "meaning", "supported", "reason"]
    for suffix in ("csv", "parquet", "json"):
        assert invoke("models", "--out", str(tmp_path / f"models.{suffix}")).status == 0
    assert len(pd.read_parquet(tmp_path / "models.parquet")) == len(pd.read_csv(tmp_path / "models.csv"))


@pytest.mark.parametrize(
    "command",
    ["predict", "flow", "lens", "enrich", "extract", "heads", "compare", "models", "export", "statistics", "serve"],
)
def test_every_command_explains_itself(command: str, repository: Path) -> None:
    outcome = invoke(command, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    options = {word.strip(",") for word in outcome.out.split() if word.startswith("--")}
    reference = (repository / "docs" / "command-line.md").read_text()
    assert all(f"`{option}" in reference for option in options - {"--help"}), options
    assert "default" in outcome.out


def test_the_program_explains_itself() -> None:
    outcome = invoke("--help")
    assert outcome.status == 0
    assert all(
        command in outcome.out
        for command in ("predict", "flow", "lens", "enrich", "compare", "models", "export", "statistics", "serve")
    )


# What goes wrong on the way


class Interrupted:
    """Ctrl-C at a step of a run, as the terminal sends it; while nothing is done only where ``at`` says so."""

    def __init__(self, at: str, *, step: int = 0) -> None:
        self._at, self._steps = at, step

    def __call__(self, progress: str) -> None:
        if progress.startswith(self._at) and not progress.startswith(f"{self._at}0/"):
            self._steps -= 1
            if self._steps == -1:
                os.kill(os.getpid(), signal.SIGINT)


def test_what_was_finished_is_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factscope.interventions.engine.WAVE_WORK", 1_000_000)
    before = signal.getsignal(signal.SIGINT)
    full = invoke("flow", *FACT, "--sources", "each", "--control", "60", "--format", "json").data["rows"]
    outcome = invoke(
        "flow", *FACT, "--sources", "each", "--control", "60", "--format", "json", tell=Interrupted("flow: ", step=2)
    )
    assert outcome.status == 3
    lines = outcome.err.splitlines()
    assert lines[0].startswith("stopping after this step")
    assert lines[-1].startswith("error: the run was cancelled after ")
    assert lines[-1].endswith("what was finished is on standard output.")
    rows = outcome.data["rows"]
    assert 0 < len(rows) < len(full)
    assert all(row in full for row in rows)
    assert "are not all" in outcome.data["warnings"][-1]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_was_finished_is_kept_beside_the_file(tmp_path: Path) -> None:
    out = tmp_path / "lens.json"
    outcome = invoke("lens", *FACT, "--out", str(out), tell=Interrupted("lens: 0/"))
    assert outcome.status == 3
    assert not out.exists()
    if (partial := tmp_path / "lens.partial.json").exists():
        assert f"what was finished is in {partial}" in outcome.err
        assert json.loads(partial.read_text())["rows"]


def test_a_run_without_anything_finished_says_only_that() -> None:
    for command, at in (("flow", "flow: 0/"), ("predict", "predict: 1/"), ("lens", "lens: 0/")):
        outcome = invoke(command, *FACT, "--format", "json", tell=Interrupted(at))
        assert outcome.status == 3, command
        assert outcome.out == ""
        assert outcome.err.splitlines()[-1] == "error: the run was cancelled."


def test_a_load_can_be_stopped(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    outcome = invoke("predict", "--model", str(folder), "--prompt", PROMPT, tell=Interrupted("reading "))
    assert (outcome.status, outcome.out) == (3, "")
    assert outcome.err.splitlines()[-1] == "error: the run was cancelled."


def test_the_second_ctrl_c_stops_at_once() -> None:
    def twice(progress: str) -> None:
        if progress.startswith("flow: 0/"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert invoke("flow", *FACT, tell=twice).status == 3


def test_a_defect_is_logged_and_its_place_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*_: object) -> None:
        raise RuntimeError("a defect of ours")

    outcome = invoke("predict", *FACT, load=fail)
    assert (outcome.status, outcome.out) == (1, "")
    (log,) = tmp_path.iterdir()
    assert outcome.err == f"error: FactScope has a defect; please report it with the traceback in {log}.\n"
    assert "a defect of ours" in log.read_text()


def test_a_defect_without_a_place_for_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")

    def fail(*_: object) -> None:
        raise RuntimeError("a defect of ours")

    outcome = invoke("predict", *FACT, load=fail)
    assert outcome.status == 1
    assert "RuntimeError: a defect of ours" in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_defect(error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    refused(invoke("flow", *FACT, load=fail), "the memory was not enough for this run of flow")


def test_a_disk_that_is_full_when_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    outcome = invoke("predict", *FACT, "--out", str(tmp_path / "x.json"))
    refused(outcome, "cannot be written (No space left on device)")
    assert list(tmp_path.iterdir()) == []


def test_serving_replaces_the_process(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(os, "chdir", lambda folder: started.append((folder,)))
    outcome = invoke("serve", "--port", "18777", "--models-allowed", "bundled,tester/tiny")
    assert outcome.status == 0
    assert outcome.err == "FactScope starts on http://127.0.0.1:18777 (stop it with Ctrl-C)\n"
    (folder,), (_, command, environment) = started
    assert folder == repository
    assert "--server.port=18777" in command
    assert environment["FACTSCOPE_MODELS_ALLOWED"] == "bundled,tester/tiny"


def test_main_reads_the_command_line_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["factscope", "nonsense"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: No such command 'nonsense'; see factscope --help.\n"


def test_heads_by_source_and_with_a_foil() -> None:
    """The command's rows are the experiment's, one a token; a foil has a column instead of a warning."""
    rows = invoke("heads", *ANSWERED, "--by-source", "--format", "json").data["rows"]
    result = heads.run(tiny_handle(), QUERY, HeadsSpec(by_source=True))
    assert list(rows[0]) == ["layer", "head", "position", "direct_effect"]
    assert [row["direct_effect"] for row in rows] == pytest.approx(result.by_source.ravel().tolist())
    for options, given in (((), False), (("--foil", "Rome"), True)):
        data = invoke("heads", *ANSWERED, *options, "--format", "json").data
        assert all((row["direct_effect_foil"] is not None) == given for row in data["rows"])
        assert not any("foil" in warning for warning in data["warnings"])


def test_extract_with_early_states() -> None:
    data = invoke("extract", *ANSWERED, "--early", "subject", "--early-layers", "0,1", "--format", "json").data
    spec = ExtractionSpec(early="subject", early_layers=(0, 1))
    expected = attribute_extraction.run(tiny_handle(), QUERY, spec)
    assert [list(row.values()) for row in data["rows"]] == expected.table().to_numpy().tolist()
    assert list(data["summary"]["extracted_with_early_state"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("extract", ("--edges", "cut:subject"), "'cut:subject'"),
        ("extract", ("--early-layers", "1"), "--early-layers '1'"),
        ("extract", ("--early", "subject", "--early-layers", "x"), "--early-layers 'x'"),
        ("extract", ("--early", "subject", "--early-layers", "9"), "early layer 9"),
        ("extract", ("--procedure", "other"), "--procedure 'other'"),
        ("heads", ("--mapping", "other"), "--mapping 'other'"),
        ("heads", ("--top-k", "0"), "top-k 0"),
    ],
)
def test_options_of_heads_and_extract_that_cannot_be_used(command: str, options: tuple[str, ...], says: str) -> None:
    refused(invoke(command, *ANSWERED, *options), says)
