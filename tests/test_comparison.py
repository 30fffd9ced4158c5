"""A, B and B - A: what meets what, what is refused, and the same from saved outputs and from two runs."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from cli_runner import FACT, Outcome, invoke, refused
from hypothesis import given
from hypothesis import strategies as st
from test_cli import COMMANDS, RUNS

from factscope.columns import COLUMNS, ROWS, Rows
from factscope.comparison import Pair, align, join
from factscope.errors import SpecError

JAPAN = ("--prompt", "The capital of Japan is", "--subject", "Japan")
OTHER = "--prompt 'The capital of Peru is' --subject Peru --answer Lima"
LAYERS = Rows(axes=("layer",), measures=("p",), labels=("text",))


def table(*rows: tuple[object, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["layer", "p", "text"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_column_of_a_command_is_an_axis_a_measure_or_a_label(command: str) -> None:
    rows = ROWS[command]
    named = [*rows.axes, *rows.measures, *rows.labels]
    assert sorted(named) == sorted(RUNS[command]().table().columns)
    assert all(name in COLUMNS for name in named)
    assert rows.position in ("", *rows.axes)
    assert not RUNS[command]().table().duplicated(list(rows.axes)).any()


def test_rows_meet_by_their_axes_whatever_their_order() -> None:
    joined = join(table((0, 0.5, "x"), (1, 0.25, "y")), table((1, 1.0, "z"), (0, 0.0, "w")), LAYERS)
    assert joined.table.to_dict("list") == {
        "layer": [0, 1],
        "text_a": ["x", "y"],
        "text_b": ["w", "z"],
        "p_a": [0.5, 0.25],
        "p_b": [0.0, 1.0],
        "p_difference": [-0.5, 0.75],
    }
    assert (joined.both, joined.only_a, joined.only_b) == (2, 0, 0)


def test_a_row_without_a_partner_stays_without_a_difference() -> None:
    joined = join(table((0, 3, "x"), (2, 4, "y")), table((2, 6, "z"), (5, 7, "w")), LAYERS)
    assert joined.table["layer"].tolist() == [0, 2, 5]
    assert joined.table["p_difference"].tolist() == [None, 2, None]
    assert joined.table["p_a"].tolist() == [3, 4, None]
    assert (joined.both, joined.only_a, joined.only_b) == (1, 1, 1)


def test_equal_rows_of_one_side_are_told_apart() -> None:
    joined = join(table((0, 1.0, "x"), (0, 2.0, "y")), table((0, 5.0, "x")), LAYERS)
    assert joined.table["p_difference"].tolist()[0] == 4.0
    assert joined.only_a == 1


@given(st.lists(st.tuples(st.integers(-1, 9), st.floats(0, 1)), min_size=1, unique_by=lambda row: row[0]))
def test_a_table_differs_in_nothing_from_itself_in_another_order(rows: list[tuple[int, float]]) -> None:
    one = table(*[(*row, "") for row in rows])
    joined = join(one, one.iloc[::-1], LAYERS)
    assert joined.both == len(rows)
    assert set(joined.table["p_difference"]) == {0.0}


def test_tables_that_share_no_row_are_refused() -> None:
    with pytest.raises(SpecError, match=r"layer is 0 in A and 1, 2 in B"):
        join(table((0, 1.0, "x")), table((1, 1.0, "x"), (2, 1.0, "x")), LAYERS)
    with pytest.raises(SpecError, match="no column 'p'"):
        join(table((0, 1.0, "x")).drop(columns="p"), table((1, 1.0, "x")), LAYERS)
    with pytest.raises(SpecError, match="'a lot' is no number"):
        join(table((0, "a lot", "x")), table((0, 1.0, "x")), LAYERS)


def tokens(roles: str) -> tuple[list[Any], tuple[int, int] | None]:
    """Tokens from one letter each: b(os), r(elation), s(ubject), l(ast); ids differ between calls."""
    words = {"b": "special", "r": "relation", "s": "subject", "l": "last"}
    made = [SimpleNamespace(position=i, id=hash((roles, i)), role=words[letter]) for i, letter in enumerate(roles)]
    at = [i for i, letter in enumerate(roles) if letter == "s"]
    return made, (at[0], at[-1] + 1) if at else None


def met(a: str, b: str) -> list[tuple[int | None, int | None]]:
    (left, left_subject), (right, right_subject) = tokens(a), tokens(b)
    return [(pair.a, pair.b) for pair in align(left, right, left_subject, right_subject)]


def test_tokens_meet_by_role() -> None:
    assert met("brsssrrl", "brrsrl") == [
        (0, 0), (None, 1), (1, 2), (2, None), (3, None), (4, 3), (5, 4), (6, None), (7, 5),
    ]  # fmt: skip
    assert met("ssrl", "brsrrl") == [(None, 0), (None, 1), (0, None), (1, 2), (2, 3), (None, 4), (3, 5)]
    assert met("rrrl", "rl") == [(0, 0), (1, None), (2, None), (3, 1)]


def test_equal_prompts_meet_by_position() -> None:
    left, subject = tokens("brsrl")
    assert align(left, left, subject, None) == tuple(Pair(a=i, b=i) for i in range(5))


ROLES = st.builds("{}{}{}{}l".format, *[st.text(letter, max_size=4) for letter in "brsr"])


@given(ROLES, ROLES)
def test_every_token_is_in_one_pair_and_the_order_is_kept(a: str, b: str) -> None:
    pairs = met(a, b)
    assert [x for x, _ in pairs if x is not None] == list(range(len(a)))
    assert [y for _, y in pairs if y is not None] == list(range(len(b)))
    assert pairs[-1] == (len(a) - 1, len(b) - 1)


# On the command line


def saved(folder: Path, name: str, *arguments: str) -> Path:
    assert invoke(*arguments, "--out", str(folder / name)).status == 0
    return folder / name


@pytest.mark.parametrize("command", COMMANDS)
def test_saved_outputs_and_two_runs_give_the_differences_of_the_rows(command: str, tmp_path: Path) -> None:
    options = COMMANDS[command][0]
    a = saved(tmp_path, "a.json", command, *FACT, *options)
    b = saved(tmp_path, "b.json", command, *FACT, *options, "--bos", "no", "--answer", "Paris")
    from_files = invoke("compare", "--a", str(a), "--b", str(b), "--format", "json").data
    from_runs = invoke("compare", command, *FACT, *options, "--b", "--bos no --answer Paris", "--format", "json").data
    for data in (from_files, from_runs):
        data["a"].pop("timing"), data["b"].pop("timing")
    assert from_files == from_runs
    assert list(from_files) == ["schema", "command", "compared", "a", "b", "warnings", "summary", "rows"]
    left, right = (json.loads(path.read_text())["rows"] for path in (a, b))
    rows = ROWS[command]
    for axes, row in zip([[r[x] for x in rows.axes] for r in from_files["rows"]], from_files["rows"], strict=True):
        mine, other = ([r for r in side if [r[x] for x in rows.axes] == axes] for side in (left, right))
        for measure in rows.measures:
            if mine and other:
                assert row[f"{measure}_difference"] == pytest.approx(other[0][measure] - mine[0][measure], abs=1e-12)
            else:
                assert row[f"{measure}_difference"] is None
    assert sum(from_files["summary"][name] for name in ("rows_both", "rows_only_a", "rows_only_b")) == len(
        from_files["rows"]
    )


def test_what_differs_is_named_and_positions_that_hold_other_tokens_are_said() -> None:
    outcome = invoke("compare", "lens", *FACT[:2], *JAPAN, "--answer", "Tokyo", "--b", OTHER, "--format", "json")
    data = outcome.data
    assert data["summary"]["differs"]["prompt"] == ["The capital of Japan is", "The capital of Peru is"]
    assert data["summary"]["differs"]["target"] == [" Tokyo", " Lima"]
    assert "name" not in data["summary"]["differs"]
    assert any("hold other tokens" in text and "'" in text for text in data["warnings"])
    assert any("The answer is 'Tokyo' in A and 'Lima' in B." in line for line in outcome.err.splitlines())


def test_the_same_run_twice_differs_in_nothing() -> None:
    outcome = invoke("compare", "flow", *FACT, "--sources", "subject", "--format", "json")
    assert outcome.data["summary"]["differs"] == {}
    assert {row["log_odds_change_difference"] for row in outcome.data["rows"]} == {0.0}
    assert "A and B are the same run" in invoke("compare", "flow", *FACT, "--sources", "subject").out


@pytest.mark.parametrize(
    ("options", "name", "values"),
    [
        ("--answer Paris --foil Rome", "foil", [None, " Rome"]),
        ("--answer Paris --score sequence", "score", ["token", "sequence"]),
        ("--bos no", "bos", ["auto", "no"]),
    ],
)
def test_what_the_query_asks_besides_its_words_is_named(options: str, name: str, values: list[Any]) -> None:
    same = ("--answer", "Paris") if "--answer" in options else ()
    own = options.removeprefix("--answer Paris ")
    outcome = invoke("compare", "flow", *FACT, *same, "--sources", "subject", "--b", own)
    assert "the same run" not in outcome.out
    told = invoke("compare", "flow", *FACT, *same, "--sources", "subject", "--b", own, "--format", "json").data
    assert [str(value).strip() for value in told["summary"]["differs"][name]] == [str(v).strip() for v in values]


def test_equal_questions_with_other_rows_are_not_called_the_same_run(tmp_path: Path) -> None:
    path, other, earlier = (tmp_path / f"{name}.json" for name in ("a", "b", "earlier"))
    invoke("flow", *FACT, "--sources", "subject", "--out", str(path))
    data = json.loads(path.read_text())
    data["rows"][1]["p_knockout"] += 0.25
    other.write_text(json.dumps(data))
    found = invoke("compare", "--a", str(path), "--b", str(other))
    assert "A and B are the same run" not in found.out
    assert "1 of their rows differ" in found.out
    assert "A and B are the same run" in invoke("compare", "--a", str(path), "--b", str(path)).out
    whole = json.loads(path.read_text())
    for name in ("foil", "score", "bos"):  # an output of an earlier version
        del whole["query"][name]
    earlier.write_text(json.dumps(whole))
    told = invoke("compare", "--a", str(path), "--b", str(earlier), "--format", "json").data
    assert told["summary"]["differs"] == {}
    assert told["summary"]["rows_changed"] == 0


def test_every_form_of_a_comparison_says_the_same(tmp_path: Path) -> None:
    asked = ("compare", "predict", *FACT, "--b", "--bos no")
    rows = invoke(*asked, "--format", "json").data["rows"]
    assert any(row["probability_difference"] is None for row in rows), "all tokens are in both lists: nothing is empty"
    assert invoke(*asked, "--out", str(tmp_path / "x.parquet")).status == 0
    assert invoke(*asked, "--out", str(tmp_path / "x.csv")).status == 0
    parquet = pd.read_parquet(tmp_path / "x.parquet")
    csv = pd.read_csv(tmp_path / "x.csv", keep_default_na=False)
    assert list(parquet) == list(csv) == list(rows[0])
    for name in ("rank_difference", "probability_difference"):
        kept = [row[name] for row in rows if row[name] is not None]
        assert parquet[name].dropna().tolist() == pytest.approx(kept)
        assert csv[name].replace("", None).dropna().astype(float).tolist() == pytest.approx(kept)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "no JSON"),
        (b"[1, 2]", "no output of factscope"),
        (b'{"schema": 2, "command": "flow"}', "no output of factscope"),
        (b'{"schema": 1, "command": "models"}', "predict, flow, lens"),
        (b'{"schema": 1, "command": "flow", "rows": []}', "lacks parts"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_files_that_are_no_outputs_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    refused(invoke("compare", "--a", str(tmp_path / "a.json"), "--b", str(tmp_path / "a.json")), says)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    flow = saved(tmp_path, "flow.json", "flow", *FACT, "--sources", "subject")
    last = saved(tmp_path, "last.json", "flow", *FACT, "--sources", "last")
    lens = saved(tmp_path, "lens.json", "lens", *FACT)
    refused(invoke("compare", "--a", str(flow), "--b", str(lens)), "an output of flow and B of lens")
    refused(invoke("compare", "--a", str(flow), "--b", str(last)), "source is 'subject' in A and 'last' in B")
    refused(invoke("compare", "--a", str(flow)), "--b names no saved output")
    refused(invoke("compare", "--a", str(tmp_path / "none.json"), "--b", str(flow)), "none.json", "No such file")
    refused(invoke("compare", "serve"), "'serve'")
    refused(invoke("compare", "flow", *FACT, "--b", "random:bundled"), "--b 'random:bundled'")
    refused(invoke("compare", "flow", *FACT, "--b", "--prompt 'open"), "--b", "quotes")
    refused(invoke("compare", "flow", *FACT, "--b", "--out x.json"), "--out", "outside")
    refused(invoke("compare", "flow", *FACT, "--b", "--windw 3"), "windw")
    refused(invoke("compare", "flow", *FACT, "--b", "--window 0"), "window 0")


@pytest.mark.parametrize(
    ("command", "option", "axes", "measure"),
    [
        ("heads", ("--by-source",), ["layer", "head", "position"], "direct_effect"),
        ("extract", ("--early", "subject"), ["early_layer", "layer"], "target_rank"),
        ("enrich", ("--sub-updates", "0"), ["layer", "neuron"], "activation"),
    ],
)
def test_other_rows_of_a_command_are_compared_too(
    command: str, option: tuple[str, ...], axes: list[str], measure: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    outcome = invoke(command, *FACT, *option, "--out", str(path))
    assert outcome.status == 0, outcome.err
    found = invoke("compare", "--a", str(path), "--b", str(path), "--format", "json").data
    assert list(found["rows"][0])[: len(axes)] == axes
    assert {row[f"{measure}_difference"] for row in found["rows"]} == {0}
    plain = tmp_path / "plain.json"
    invoke(command, *FACT, "--out", str(plain))
    refused(invoke("compare", "--a", str(path), "--b", str(plain)), f"rows of A are by {', '.join(axes)}")


def test_of_a_stopped_second_run_the_finished_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factscope.interventions.engine.WAVE_WORK", 1_000_000)
    done: list[int] = []

    def stop_b(progress: str) -> None:
        if not progress.startswith("flow: "):
            return
        done.append(int(progress.removeprefix("flow: ").partition("/")[0]))
        second = any(before > after for before, after in pairwise(done))
        if second and done[-1] > 0:
            os.kill(os.getpid(), signal.SIGINT)

    def run(tell: Any) -> Outcome:
        both = ("--sources", "each", "--control", "60", "--format", "json")
        return invoke("compare", "flow", *FACT, *both, "--b", "--window 1", tell=tell)

    outcome = run(stop_b)
    assert outcome.status == 3
    assert outcome.err.splitlines()[-1].endswith("what was finished is on standard output.")
    summary = outcome.data["summary"]
    assert summary["rows_both"] > 0
    assert summary["rows_only_a"] > 0
    stopped = run(lambda progress: progress.startswith("flow: ") and os.kill(os.getpid(), signal.SIGINT))
    assert (stopped.status, stopped.out) == (3, "")


# Edits


TOKYO = ("--new-answer", "Tokyo", "--layers", "1", "--preset", "rome", "--statistics", "identity")
EDITED: dict[str, tuple[tuple[str, ...], str]] = {
    "edit": ((*TOKYO, "--texts", "0", "--no-sampled"), "--layers 2"),
    "layers": ((*TOKYO[:2], *TOKYO[4:], "--noise", "0.8", "--samples", "2"), "--problem fact-erasure"),
}


@pytest.mark.parametrize("command", EDITED)
def test_edits_are_compared_row_by_row(command: str, tmp_path: Path) -> None:
    options, other = EDITED[command]
    shared = options if command == "edit" else options[2:]
    first = "" if command == "edit" else "--new-answer Tokyo"
    found = invoke(
        "compare", command, *FACT, "--answer", "Paris", *shared, "--a", first, "--b", other, "--format", "json"
    )
    assert found.status == 0, found.err
    a = saved(tmp_path, "a.json", command, *FACT, "--answer", "Paris", *shared, *first.split())
    b = saved(tmp_path, "b.json", command, *FACT, "--answer", "Paris", *shared, *other.split())
    from_files = invoke("compare", "--a", str(a), "--b", str(b), "--format", "json")
    left, right = (json.loads(path.read_text())["rows"] for path in (a, b))
    rows = ROWS[command]
    assert found.data["rows"] == from_files.data["rows"] and len(left) == len(right) == len(found.data["rows"])
    for row, before, after in zip(found.data["rows"], left, right, strict=True):
        assert all(row[axis] == before[axis] == after[axis] for axis in rows.axes)
        for name in rows.measures:
            assert (row[f"{name}_a"], row[f"{name}_b"]) == (before[name], after[name])
            if before[name] is not None and after[name] is not None:
                assert row[f"{name}_difference"] == after[name] - before[name]
    named = found.data["summary"]["differs"]
    assert ("layers" if command == "edit" else "problem") in named
    assert found.data["summary"]["rows_changed"] > 0
    assert sorted([*rows.axes, *rows.measures, *rows.labels]) == sorted(left[0])


def test_edits_to_two_answers_are_told_apart() -> None:
    options = (*FACT, "--answer", "Paris", *TOKYO[2:], "--texts", "0", "--no-sampled")
    found = invoke(
        "compare", "edit", *options, "--a", "--new-answer Tokyo", "--b", "--new-answer Rome", "--format", "json"
    )
    assert found.status == 0, found.err
    assert any("'Tokyo' in A and 'Rome' in B" in text for text in found.data["warnings"])


def test_what_is_no_run_of_a_query_is_not_compared(tmp_path: Path) -> None:
    kept = str(tmp_path / "one.safetensors")
    both = invoke("compare", "edit", *FACT, *TOKYO, "--save", kept, "--b", "--layers 2")
    refused(both, "--save", "in the place of that of A")
    assert not Path(kept).exists()
    for command in ("statistics", "export", "models", "serve"):
        refused(invoke("compare", command), f"'{command}' is no command that can be compared")
    (tmp_path / "statistics.json").write_text(json.dumps({"schema": 1, "command": "statistics", "rows": []}))
    refused(invoke("compare", "--a", str(tmp_path / "statistics.json"), "--b", "x"), "'statistics' gives no rows")
