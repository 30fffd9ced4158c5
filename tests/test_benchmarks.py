"""The benchmark measures what it says: its references are the engine's numbers, and its report has a word for all."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks import device, growth, memory, peers, report, rows, shapes, table
from benchmarks.rows import Row, Task, measure
from benchmarks.why import explain

TOKENS = 7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> shapes.Shape:
    return shapes.sized("a tiny GPT-2", 3, 64, vocab_size=300)


TASKS = {
    "knockout, one by one": lambda shape: rows.knockouts(shape, TOKENS, size=2),
    "knockout, batched": lambda shape: rows.knockouts(shape, TOKENS, size=3, batched=True),
    "trace of block outputs": lambda shape: rows.traces(shape, TOKENS),
    "trace of MLP windows": lambda shape: rows.traces(shape, TOKENS, site="mlp", size=2),
    "trace of attention windows": lambda shape: rows.traces(shape, TOKENS, site="attention", size=3),
    "zeroed MLP": lambda shape: rows.zeros(shape, TOKENS, site="mlp", size=2),
    "zeroed attention": lambda shape: rows.zeros(shape, TOKENS, site="attention", size=2),
    "lens": lambda shape: rows.lenses(shape, TOKENS),
    "v* of ROME": lambda shape: rows.values(shape, TOKENS, steps=8, layer=0),
}


@pytest.mark.parametrize("name", TASKS)
def test_reference_and_engine_give_one_answer_that_moves(name: str, tiny: shapes.Shape) -> None:
    task: Task = TASKS[name](tiny)
    row = measure(task, 1)
    assert row.same_numbers, row.difference
    assert rows.apart(task.fast(task.cells), task.slow(task.cells)) <= rows.ROUNDING
    assert row.moved > 0, "numbers that do not move are equal whatever is done"
    assert row.ratio > 0
    assert row.sampled == 0


def test_experiments_on_the_bundled_model_are_compared_too() -> None:
    shape = shapes.bundled()
    for task in (rows.bundled_knockouts(shape, 5, size=3), rows.bundled_lens(shape, 5)):
        row = measure(task, 1)
        assert row.same_numbers, row.difference
        assert row.moved > 0


def test_samples_are_drawn_anew_each_round_and_scaled(tiny: shapes.Shape) -> None:
    task = replace(rows.traces(tiny, TOKENS), sample=5, seed=3)
    drawn = [tuple(task.chosen(number)) for number in range(3)]
    assert [len(cells) for cells in drawn] == [5, 5, 5]
    assert len(set(drawn)) == 3
    assert drawn == [tuple(task.chosen(number)) for number in range(3)]
    assert measure(task, 1).sampled == 5


def test_a_whole_reference_may_run_once(tiny: shapes.Shape) -> None:
    row = measure(replace(rows.knockouts(tiny, TOKENS), once=True), 2)
    assert (len(row.seconds), len(row.reference_seconds)) == (2, 1)
    assert row.ok
    assert row.ratio > 0


@pytest.mark.parametrize(("way", "off"), [("fast", 2e-5), ("slow", 2e-4)])
def test_different_numbers_are_never_timed(way: str, off: float, tiny: shapes.Shape) -> None:
    task = rows.knockouts(tiny, TOKENS)
    right = getattr(task, way)
    wrong = replace(task, **{way: lambda cells: {cell: p + off for cell, p in right(cells).items()}})
    row = measure(wrong, 1)
    assert not row.same_numbers
    assert not row.seconds
    assert not row.ok
    assert row.ratio == 0


def test_numbers_of_the_timed_runs_are_compared(tiny: shapes.Shape) -> None:
    task = rows.knockouts(tiny, TOKENS)

    def late(cells: Any) -> Any:
        shift = 1e-3 if len(cells) == len(task.cells) else 0.0
        return {cell: p + shift for cell, p in task.fast(cells).items()}

    row = measure(replace(task, fast=late), 1)
    assert row.seconds
    assert not row.ok


def test_a_missing_number_is_a_difference() -> None:
    assert rows.apart({(0, 0): float("nan")}, {(0, 0): 0.5}) == float("inf")


def test_every_mark_of_the_table_is_a_must_below_its_aim() -> None:
    marked = (table.KNOCKOUT, table.KNOCKOUT_BATCHED, table.TRACE, table.WINDOWS, table.LENS, table.ZERO, table.VALUE)
    for marks in marked:
        assert all(must < aim for must, aim in marks.values())


def test_a_missed_row_is_explained(tiny: shapes.Shape) -> None:
    task = replace(rows.traces(tiny, TOKENS), at_least=1e6)
    row = measure(task, 1)
    seen = explain(task, row, peak=50.0)
    assert seen["gflop"] > 0
    assert seen["reference_gflop"] > seen["gflop"]
    assert sum(share for _, share in seen["top"]) <= 1 + 1e-9
    assert "aten::" in json.dumps(seen["top"])


def test_where_float32_is_too_coarse_float64_judges(tiny: shapes.Shape) -> None:
    """A reference with an error of its own does not fail us; an error of ours does."""
    task = replace(rows.zeros(tiny, TOKENS), at_least=None, aim=None)
    slow, fast = task.slow, task.fast
    shifted = measure(replace(task, slow=lambda cells: {cell: p + 2e-5 for cell, p in slow(cells).items()}), 1)
    assert shifted.exact and shifted.same_numbers and shifted.difference < 5e-6
    wrong = measure(replace(task, fast=lambda cells: {cell: p + 2e-5 for cell, p in fast(cells).items()}), 1)
    assert wrong.exact and not wrong.same_numbers
    plain = measure(task, 1)
    assert plain.same_numbers and not plain.exact


def test_a_row_that_is_measured_again_takes_its_own_place(tiny: shapes.Shape) -> None:
    first = [measure(rows.zeros(tiny, TOKENS, site=site), 1) for site in ("mlp", "attention")]
    before = report.record(first, "standard", "aaaaaaa")
    again = report.record([replace(first[1], seconds=[9.0])], "standard", "bbbbbbb")
    found = report.replaced(before, again)
    assert [row["seconds"] for row in found["rows"]] == [first[0].seconds, [9.0]]
    assert found["commit"] == "aaaaaaa"
    assert list(found["again"].values()) == ["bbbbbbb"]
    assert "attention updates" in next(iter(found["again"]))


def test_the_reference_of_a_lens_is_counted_once(tiny: shapes.Shape) -> None:
    """It gives all its numbers together, not a cell at a time."""
    task = rows.lenses(tiny, TOKENS)
    row = measure(task, 1)
    seen = explain(task, row, peak=50.0)
    assert 0.5 * seen["gflop"] < seen["reference_gflop"] < 3 * seen["gflop"]


def test_memory_is_watched(tiny: shapes.Shape) -> None:
    watch = memory.settled()
    with watch.watching():
        torch.ones(40 * 2**20 // 4)
    assert watch.peak - watch.start > 30 * 2**20


def test_large_trace_shows_its_first_curve_before_its_end() -> None:
    found = memory.large_trace(shapes.sized("a tiny GPT-2", 9, 64, vocab_size=300, copied=False), 8)
    assert found["cells"] == 18
    assert found["first_seconds"] <= found["wall_seconds"]
    assert found["difference"] <= rows.ROUNDING
    assert found["spread"] > 0


def test_gpu_rows_run_on_what_is_there() -> None:
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, **shapes.EAGER)
    llama = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=100, **shapes.EAGER,
    )  # fmt: skip
    found = list(
        device.rows("cpu", {"a": (GPT2LMHeadModel, gpt2), "b": (LlamaForCausalLM, llama)}, dtype=torch.float32)
    )
    assert len(found) == 4
    assert all(row["difference"] <= rows.ROUNDING and row["ratio"] > 0 for row in found)


def test_a_gpu_that_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert device.main("cuda") == 2
    assert "no GPU" in capsys.readouterr().out


def test_a_library_that_cannot_be_installed_is_skipped(
    tiny: shapes.Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.sys, "executable", str(tmp_path / "no-python"))
    found = list(peers.measured(tiny, 8, {}, at_least={"causal trace": 1}, folder=tmp_path / "environment"))
    assert [one["peer"] for one in found] == list(peers.NAMES)
    assert all("could not be made" in one["skipped"] and "\n" not in one["skipped"] for one in found)
    assert all(peers.met(one) for one in found)


def test_what_other_processes_need_is_written(tiny: shapes.Shape, tmp_path: Path) -> None:
    chosen = peers.export(tiny, {"causal trace": rows.traces(tiny, 8)}, tmp_path, sample=4, rounds=2)
    task = json.loads((tmp_path / "task.json").read_text())
    assert [tuple(cell) for cell in task["cells"]] == chosen
    assert len(task["ids"]) == 8
    assert (tmp_path / "model" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------- the report


def _row(**fields: Any) -> Row:
    values: dict[str, Any] = {
        "experiment": "causal trace, block outputs, 10 samples", "model": "a model", "tokens": 8,
        "reference": "one forward per cell", "seconds": [1.0, 1.1, 1.2], "reference_seconds": [8.0, 8.8, 9.6],
        "cells": 96, "sampled": 16, "difference": 1e-7, "moved": 0.5, "at_least": 7.5, "aim": 11,
    }  # fmt: skip
    return Row(**values | fields)


_PROFILE = {
    "cells": 24, "seconds": 1.0, "top": [("aten::addmm", 0.7), ("aten::copy_", 0.1)], "gflop": 40.0, "gflops": 40.0,
    "reference_gflop": 400.0, "reference_gflops": 55.0, "peak": 90.0, "at_peak": 0.44, "bound": 18.0,
}  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    measured = [
        _row(aim=8),
        _row(profile=_PROFILE, tokens=16),
        _row(experiment="attention knockout, window 9", at_least=20, aim=40, profile=_PROFILE),
        _row(experiment="zeroed MLP updates, window 10", difference=0.1, seconds=[], reference_seconds=[], sampled=0),
        _row(experiment="lens, top 10", at_least=None, aim=None),
    ]
    watched = {"tokens": 16, "threads": 2, "model_bytes": 6e9, "above_bytes": 3e8, "wall_seconds": 60.0, "model": "m"}
    measured_peer = {
        "peer": "nnsight", "experiment": "causal trace", "tokens": 8, "label": "own process", "version": "1",
        "cells": 96, "sampled": 16, "seconds": [1.0], "peer_seconds": [9.0], "difference": 1e-7, "ratio": 9.0,
    }  # fmt: skip
    return report.record(measured, "standard", "abc", 90.0) | {
        "peers": [
            measured_peer | {"at_least": 7.5},
            measured_peer | {"at_least": 25},
            {"peer": "TransformerLens", "experiment": "causal trace", "skipped": "no environment"},
        ],
        "memory": [
            watched | {"what": "trace", "cells": 192},
            watched | {"what": "xl", "cells": 96, "first_seconds": 6.0, "difference": 1e-7},
            watched | {"what": "xl", "cells": 96, "first_seconds": 60.0, "difference": 1e-7},
            {"what": "knockout", "error": "killed"},
        ],
        "growth": [
            {"experiment": name, "axis": axis, "value": value, "seconds": value**2 / 100}
            for name in growth.EXPERIMENTS
            for axis, values in (("tokens", growth.TOKENS), ("layers", growth.LAYERS), ("width", growth.WIDTHS))
            for value in values
        ],
    }


def test_page_has_a_word_for_everything(results: dict[str, Any]) -> None:
    page = report.page(json.loads(json.dumps(results)))
    for words in (
        "aim met", "must met", "must missed", "numbers differ", "not timed", "sample of 16 of 96 cells, scaled",
        "`aten::addmm` 70%", "profiled on 24 of 96 cells", "would be 18.0x", "10.0 times as many operations",
        "| TransformerLens | causal trace | skipped: no environment |", "own process", "Both met.", "**Missed.**",
        "not measured: killed", "growth.svg", "| 2.0 |", "none exists yet", "make bench ARGS=--quick",
    ):  # fmt: skip
        assert words in page, words


def test_only_what_must_be_fails(results: dict[str, Any]) -> None:
    lines = report.failures(results)
    assert len(lines) == 5
    for words in ("8.0x, below 20x", "differ by 1.0e-01", "must be 25x", "after 60.0 s", "killed"):
        assert sum(words in line for line in lines) == 1, words


def test_growth_is_one_picture_that_brings_its_background(results: dict[str, Any]) -> None:
    picture = growth.plot(results["growth"])
    texts = "".join(ElementTree.fromstring(picture).itertext())
    assert "#ffffff" in picture
    assert all(title in texts for title in growth.AXES.values())
    assert growth.exponents(results["growth"])["causal trace", "width"] == pytest.approx(2)


def test_page_in_the_docs_is_the_record(repository: Path) -> None:
    data = json.loads((repository / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    assert (repository / "docs" / "performance.md").read_text(encoding="utf-8") == report.page(data)
