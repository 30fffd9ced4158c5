"""An edit's probes and scores as the Edit page shows them: before | after | difference, in words and numbers."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import edit_verdict, figures, help, panels, parts
from dashboard.executor import Snapshot
from factscope import output
from factscope.charts import text
from factscope.columns import COLUMNS

KINDS = {
    "fact": "fact", "paraphrase": "other words", "neighbour": "neighbour", "other-relation": "same subject",
    "own": "own",
}  # fmt: skip
KINDS_HELP = (
    "fact: the edited sentence. other words: the same question, in sentences that the model never saw. neighbour: the "
    "same question about another subject with the same true answer. same subject: another fact about the subject."
)
TEXT = "generation"
SHOWN = (
    "rewrite", "paraphrase", "neighbourhood", "other_relations_kept", "neighbours_kept", "es", "ps", "ns", "s", "em",
    "pm", "nm", "exact_rewrite", "exact_paraphrase", "exact_neighbourhood", "overall", "overall_harmonic", "essence",
    "overall_essence", "fluency", "consistency",
)  # fmt: skip
FIRST = 8
"""Scores that stand on the page; the others are one click away."""


def table(evaluation: Any) -> pd.DataFrame:
    """Every probe before and after, with the difference; texts apart."""
    found = evaluation.table()
    found = found[found["kind"] != TEXT]
    rows = {
        "kind": [KINDS.get(kind, kind) for kind in found["kind"]],
        "prompt": found["prompt"],
        **({"subject": found["subject"]} if "subject" in found else {}),
    }
    for name in ("target", "true"):
        before, after = (found[f"p_{name}_{when}"].astype(float) for when in ("before", "after"))
        rows |= {f"{name} before": before, f"{name} after": after, f"{name} change": after - before}
    for when in ("before", "after"):
        text, top = found[f"text_{when}"], found[f"top_{when}"]
        rows[f"says {when}"] = [_one_line(t if t is not None and t == t else p) for t, p in zip(text, top, strict=True)]
    return pd.DataFrame(rows)


def texts(evaluation: Any) -> pd.DataFrame:
    """What the model writes by itself after some beginnings, before and after."""
    found = evaluation.table()
    found = found[found["kind"] == TEXT]
    return pd.DataFrame(
        {
            "begins with": found["prompt"],
            "before": [_one_line(text) for text in found["text_before"]],
            "after": [_one_line(text) for text in found["text_after"]],
        }
    )


def _one_line(text: Any) -> str:
    return " ".join(str(text or "").split())


def show(evaluation: Any, code: str, *, stale: bool = False) -> None:
    """The verdict in words, the table or its bars, and what the model writes by itself.

    Args:
        stale: the probes are of another weight state than the pages show: the verdict has no colour.
    """
    tone, lines = edit_verdict.sentences(evaluation)
    parts.note("plain" if stale else tone, lines, strong=True, key="edit-verdict")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="edit-probes-line"):
        form = st.segmented_control(
            "Probes as", ["Table", "Bars"], default="Table", key="edit-probes-form", label_visibility="collapsed"
        )
        _export(evaluation, code)
    if form == "Bars":
        key = f"{evaluation.edits[0].key}-{evaluation.edited.weights}"
        found = Snapshot(key=key, state="done", result=evaluation)
        panels.figure(figures.probe_bars(evaluation), name="probes", found=found, code=code, point=False)
    else:
        _table(evaluation)
    _texts(evaluation)


def _table(evaluation: Any) -> None:
    """The table; text of the model is text of a cell."""
    shown = table(evaluation)
    config: dict[str, Any] = {
        "kind": st.column_config.TextColumn("", width=82, help=KINDS_HELP),
        "prompt": st.column_config.TextColumn("prompt", width=236),
    }
    for name, words in (("target", "p(new)"), ("true", "p(true)")):
        for when in ("before", "after"):
            config[f"{name} {when}"] = st.column_config.NumberColumn(
                f"{words} {when}", width=88, help=help.definition(f"p_{name}_{when}")
            )
        config[f"{name} change"] = st.column_config.NumberColumn("change", width=62, help="After minus before.")
    config |= {
        f"says {when}": st.column_config.TextColumn(
            f"says {when}", width=112, help=f"How the model goes on greedily after the prompt, {when} the edit."
        )
        for when in ("before", "after")
    }
    written = {f"{name} {when}": _probability for name in ("target", "true") for when in ("before", "after")}
    changes = {f"{name} change": _change for name in ("target", "true")}
    st.dataframe(
        shown.style.format({**written, **changes}),
        hide_index=True,
        height=40 + 26 * min(len(shown), 16),
        row_height=26,
        key="edit-probes",
        column_config=config,
    )


def _probability(p: float) -> str:
    return "" if math.isnan(p) else text.probability(p)


def _change(difference: float) -> str:
    if math.isnan(difference):
        return ""
    return "0" if abs(difference) < 0.0005 else text.signed(difference, 3)


def _texts(evaluation: Any) -> None:
    written = texts(evaluation)
    if not len(written):
        return
    st.caption("What it writes by itself: sampled among the five most probable tokens, the same draws before and after")
    st.dataframe(written, hide_index=True, height=38 + 26 * min(len(written), 6), row_height=26, key="edit-texts")


def _export(evaluation: Any, code: str) -> None:
    """The probes and scores as files, and the Python lines that compute them."""
    drawer = st.popover(
        "", icon=":material/download:", type="tertiary", key="export-edit-probes", on_change="rerun",
        help="CSV, JSON, Python",
    )  # fmt: skip
    if not drawer.open:
        return
    with drawer:
        key = evaluation.edits[0].key[:8]
        with st.container(horizontal=True):
            for form, mime, write in (("CSV", "text/csv", as_csv), ("JSON", "application/json", as_json)):
                st.download_button(
                    form, data=lambda write=write: write(evaluation),
                    file_name=f"factscope-probes-{key}.{form.lower()}", mime=mime,
                    on_click="ignore", key=f"download-probes-{form}",
                )  # fmt: skip
        st.caption("The same from Python:")
        st.code(code, language="python")


def as_csv(evaluation: Any) -> bytes:
    """The probes with the columns of the command line."""
    return output.as_csv(evaluation.table()).encode("utf-8", "backslashreplace")


def as_json(evaluation: Any) -> bytes:
    """The probes, the scores with their definitions, and how the edit was made."""
    found = {
        "model": evaluation.model.name,
        "revision": evaluation.model.revision,
        "weights": evaluation.model.weights,
        "probes": output.records(evaluation.table()),
        "scores": output.records(evaluation.scores()),
        "summary": evaluation.summary(),
    }
    return output.as_json(found).encode("utf-8", "backslashreplace")


def scores(evaluation: Any) -> None:
    """The scores, each with what it means on hover; those that are not there with the reason."""
    found = evaluation.scores().set_index("name")
    there = [name for name in SHOWN if name in found.index and found.loc[name, "value"] == found.loc[name, "value"]]
    with st.container(horizontal=True, gap="small", key="edit-scores"):
        for name in there[:FIRST]:
            _score(found, name)
    missing = [name for name in SHOWN if name in found.index and name not in there]
    rest = len(there[FIRST:])
    more = [f"{rest} more score{'s' if rest > 1 else ''}"] if rest else []
    more += [f"{len(missing)} that this edit does not have, with the reason"] if missing else []
    if not more:
        return
    with st.expander(", and ".join(more)):
        with st.container(horizontal=True, gap="medium"):
            for name in there[FIRST:]:
                _score(found, name)
        reasons: dict[str, list[str]] = {}
        for name in missing:
            reasons.setdefault(str(found.loc[name, "reason"]), []).append(_word(name))
        if reasons:
            parts.note("quiet", [f"No {', '.join(names)}: {why}." for why, names in reasons.items()], key="not-scored")


def _score(found: Any, name: str) -> None:
    row = found.loc[name]
    definition = help.definition(name) or ""
    source = COLUMNS[name].source.replace("[", "\\[")
    before = f" Before: {row['before']:.3f}." if row["before"] == row["before"] else ""
    st.markdown(f"{_word(name)} **{row['value']:.3f}**", width="content", help=f"{definition}. {source}.{before}")


def _word(name: str) -> str:
    return name.upper() if len(name) == 2 else "S" if name == "s" else name.replace("_", " ")


def near(result: Any) -> None:
    """The blast radius: what is near the fact, and what the model says of it now."""
    found = result.table()
    if not len(found):
        parts.note("quiet", [f"{result.reason[:1].upper()}{result.reason[1:]}."], key="no-radius")
        return
    kinds = {"other-relation": "same subject", "same-answer": "same answer"}
    shown = pd.DataFrame(
        {
            "kind": [kinds[kind] for kind in found["kind"]],
            "prompt": found["prompt"],
            "answer": found["answer"],
            "p": found["p_true"].astype(float),
            "says": [_one_line(text) for text in found["top_before"]],
        }
    )
    st.dataframe(
        shown,
        hide_index=True,
        height=38 + 26 * min(len(shown), 12),
        row_height=26,
        key="edit-radius",
        column_config={
            "kind": st.column_config.TextColumn("", width=90),
            "prompt": st.column_config.TextColumn("prompt", width=300),
            "answer": st.column_config.TextColumn("true answer", width=95),
            "p": st.column_config.ProgressColumn(
                "p", min_value=0, max_value=1, format="%.2f", width=80, help=help.definition("p_true")
            ),
            "says": st.column_config.TextColumn("says", width=95, help="The model's first choice now."),
        },
    )
    own = int((found["kind"] == "other-relation").sum())
    asked = len(found) - own
    more = f", {asked} of them asked" if asked < result.n_sharing else ""
    parts.note(
        "quiet",
        [
            f"{own} other fact{'' if own == 1 else 's'} about {result.subject}; "
            f"{result.n_sharing} facts share the answer {result.answer}{more}."
        ],
        key="radius-said",
    )
