"""One result, four forms: the JSON object, CSV, parquet and the table say the same."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_runner import PROMPT, SUBJECT, tiny_handle

from factscope import output
from factscope.errors import SpecError
from factscope.experiments import attention_knockout, logit_lens, prediction
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.queries import Query

QUERY = Query(prompt=PROMPT, subject=SUBJECT)
ODD_TEXTS = [
    "a,b",
    'say "x"',
    "line\nbreak",
    "tab\t",
    "\r",
    " ",
    "",
    "NA",
    "null",
    "😀",
    "<E6>",
    "\x00",
    "\x1b[31m",
    "é\u0301",
]


@pytest.fixture(scope="module")
def result() -> attention_knockout.KnockoutResult:
    return attention_knockout.run(tiny_handle(), QUERY, KnockoutSpec(sources=("each",), control=2))


def document(result: object) -> dict[str, object]:
    return output.document("flow", result, result.table(), {}, ["one"])  # type: ignore[attr-defined]


def test_what_is_no_number_is_null(result: attention_knockout.KnockoutResult) -> None:
    lost = dataclasses.replace(result, p_base=0.0, log_odds_base=-math.inf)
    data = json.loads(output.as_json(document(lost)), parse_constant=pytest.fail)
    assert {row["relative_change_percent"] for row in data["rows"]} == {None}
    assert {row["log_odds_change"] for row in data["rows"]} == {None}
    assert data["query"]["p_target"] == 0.0


def test_numpy_values_become_plain_ones() -> None:
    rows = pd.DataFrame({"a": np.array([1, 2]), "b": np.array([np.nan, np.inf]), "c": [True, False], "d": ["x", None]})
    assert output.records(rows) == [
        {"a": 1, "b": None, "c": True, "d": "x"},
        {"a": 2, "b": None, "c": False, "d": None},
    ]
    assert [type(value) for value in output.records(rows)[0].values()] == [int, type(None), bool, str]


def test_all_forms_agree(result: attention_knockout.KnockoutResult, tmp_path: Path) -> None:
    rows, data = result.table(), document(result)
    for suffix in output.SUFFIXES:
        output.write(tmp_path / f"rows{suffix}", data, rows)
    from_json = json.loads((tmp_path / "rows.json").read_text())["rows"]
    from_csv = pd.read_csv(tmp_path / "rows.csv", keep_default_na=False)
    from_parquet = pd.read_parquet(tmp_path / "rows.parquet")
    assert list(from_csv) == list(from_parquet) == list(from_json[0]) == list(rows)
    assert [str(row["source"]) for row in from_json] == list(from_csv["source"]) == list(from_parquet["source"])
    for name in list(rows)[1:]:
        exact = [row[name] for row in from_json]
        assert exact == from_csv[name].tolist() == from_parquet[name].tolist() == rows[name].tolist()


def test_positions_are_integers_where_all_sources_are(tmp_path: Path) -> None:
    rows = attention_knockout.run(tiny_handle(), QUERY, KnockoutSpec(sources=("each",))).table()
    assert rows["source"].dtype == np.int64
    output.write(tmp_path / "rows.parquet", {}, rows)
    read = pd.read_parquet(tmp_path / "rows.parquet")
    assert read["source"].dtype == np.int64
    assert sorted(set(read["source"])) == list(range(16))


def test_mixed_sources_are_words_in_parquet_and_themselves_in_json(
    result: attention_knockout.KnockoutResult, tmp_path: Path
) -> None:
    output.write(tmp_path / "rows.parquet", {}, result.table())
    read = set(pd.read_parquet(tmp_path / "rows.parquet")["source"])
    assert {"0", "15", "control-1"} <= read
    assert {0, 15, "control-1"} <= {row["source"] for row in output.records(result.table())}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_odd_texts_come_back(tmp_path: Path, suffix: str) -> None:
    rows = pd.DataFrame({"rank": range(len(ODD_TEXTS)), "text": ODD_TEXTS})
    path = tmp_path / f"rows{suffix}"
    output.write(path, {}, rows)
    if suffix == ".parquet":
        read = pd.read_parquet(path)["text"].tolist()
    else:
        content = path.read_bytes().decode()
        read = pd.read_csv(io.StringIO(content, newline=""), keep_default_na=False, engine="python")["text"].tolist()
    assert read == ODD_TEXTS


def test_the_table_for_people_steers_no_terminal() -> None:
    rows = pd.DataFrame({"text": [*ODD_TEXTS, "\x9b31m", "\u202e"], "name": ["\x1b[2J"] * (len(ODD_TEXTS) + 2)})
    shown = output.as_text(rows)
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert len(shown.splitlines()) == len(rows) + 1


def test_reasons_become_notes() -> None:
    rows = pd.DataFrame({"name": ["a", "b", "c"], "lens": ["yes", "no: why", "no: why"], "size_mb": [None, 1.5, None]})
    shown = output.as_text(rows)
    assert shown.count("no (1)") == 2
    assert shown.endswith("\n\n(1) why\n")
    assert "nan" not in shown.lower()
    assert "None" not in shown


def test_a_table_without_rows_can_be_shown_and_written(tmp_path: Path) -> None:
    rows = pd.DataFrame(columns=["source", "layer"])
    assert output.as_text(rows).endswith("\n")
    for suffix in output.SUFFIXES:
        output.write(tmp_path / f"rows{suffix}", {"rows": output.records(rows)}, rows)


def test_a_file_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SpecError, match=r"rows\.json.*cannot be written \(No space left on device\)"):
        output.write(path, {"a": 1}, pd.DataFrame())
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]
    assert path.read_text() == "old"


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    output.check_out(tmp_path / "rows.json")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_the_umask_respected(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    before = os.umask(0o077)
    try:
        output.write(tmp_path / "link.json", {"a": 1}, pd.DataFrame())
    finally:
        os.umask(before)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o600


def test_a_name_as_long_as_the_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    output.check_out(path)
    output.write(path, {}, pd.DataFrame())
    assert path.exists()


def test_every_experiment_has_a_document() -> None:
    for command, experiment in (("predict", prediction), ("flow", attention_knockout), ("lens", logit_lens)):
        found = experiment.run(tiny_handle(), QUERY)
        data = json.loads(output.as_json(output.document(command, found, found.table(), {}, ())))
        assert data["query"]["p_target"] == pytest.approx(found.p_target)
        assert len(data["rows"]) == len(found.table())
