"""An edit on its way into the stack: what is asked, what it will cost, the run, and what became of it.

The run has a slot of its own and is asked for by every run of the script while it is under way, whatever page is shown;
once it is done, the edit goes on top of the visitor's stack and is switched on. What a visitor asked for stands beside
his stack, so that a reload finds the run again.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import panels, requests, runs, stack, state, uploads, weights
from dashboard.executor import Snapshot, Work
from dashboard.link import ModelChoice
from dashboard.stack import Stack
from dashboard.weights import REFUSED
from factscope.errors import DatasetError, EditError, SpecError
from factscope.experiments.edit_evaluation import EvaluationSpec
from factscope.queries import Query

FACTS = ("prompt", "subject", "answer", "new_answer")
MAX_FACTS, MAX_PROBES, MAX_TEXT = 50, 20, 400
MAX_LINES = 6
_FIRST = {"rome": 12.0, "memit": 14.0, "ft": 4.0}
"""Forwards that one step of a method takes about, until it is measured."""
_PER_FACT_AFTER = 30.0
"""Forwards for the probes of one fact, in both states, with their continuations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """An edit that was asked for.

    Attributes:
        model: in the weight state that it is computed on.
    """

    number: int
    query: Query
    spec: Any
    model: ModelChoice


def begin() -> None:
    """Start of a run of the script: put an edit that is done into the stack, and go on watching one that is not."""
    own = stack.mine()
    if own.asked is None:
        return
    found = _watch(own.asked)
    if found.state == "done":
        _take(own, own.asked, found.result)
    elif found.state in ("failed", "cancelled"):
        own.asked = None
        st.session_state[REFUSED] = found.error or EditError(
            "the edit was cancelled, and nothing of it remains", "apply it again"
        )


def apply(query: Query, spec: Any) -> None:
    """Start the edit; one at a time."""
    own = stack.mine()
    st.session_state.pop(REFUSED, None)
    number = 1 if own.latest is None else own.latest + 1
    own.latest = number
    own.asked = Asked(number=number, query=query, spec=spec, model=state.view().model)


def under_way() -> Snapshot | None:
    """The run of the edit that was asked for."""
    asked = stack.mine().asked
    return None if asked is None else _watch(asked)


def refused() -> Exception | None:
    """Why the last edit did not come about; None where nothing was refused."""
    return st.session_state.get(REFUSED)


def cancel() -> None:
    """Stop it; nothing of it remains."""
    runs.cancel(runs.APPLY)


def _watch(asked: Asked) -> Snapshot:
    own, speeds = stack.mine(), _speeds()
    try:
        edits = stack.edits(asked.model)
    except EditError as error:
        return Snapshot(key="", state="failed", error=error)

    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors.compute import delta_bytes
        from factscope.experiments import editing

        settings = editing.chosen_settings(model, asked.spec)
        facts = len(editing.facts_to_edit(model, asked.query, asked.spec))
        own.refuse(delta_bytes(model, settings, facts))
        found = editing.run(model, asked.query, asked.spec, progress=progress)
        speeds[asked.spec.method, model.info.name] = found.seconds / max(1, facts)
        return found

    key = runs.digest([own.visitor, asked.number, asdict(asked.query), repr(asked.spec), asdict(asked.model)])
    prepare = lambda tell: runs.use(asked.model, tell, edits)  # noqa: E731
    return runs.do(runs.APPLY, key, Work(prepare=prepare, compute=compute, label="edit", keep=False))


@st.cache_resource(show_spinner=False)
def _speeds() -> dict[tuple[str, str], float]:
    """Seconds for one fact, by method and model, as last measured."""
    return {}


def _take(own: Stack, asked: Asked, result: Any) -> None:
    """Put what was made on top of the stack and switch it on."""
    own.asked = None
    runs.release(runs.APPLY)
    if own.find(result.edits[0].key) is not None:
        state.switch(result.edits[0].key, True)  # the same again, or another window of this visitor was faster
        return
    try:
        entry = own.push(result.edits[0], asked.model, result)
    except EditError as error:
        st.session_state[REFUSED] = error
        return
    if state.view().model.original == asked.model.original:
        state.switch(entry.key, True)


def shown() -> stack.Entry | None:
    """The edit whose probes the page shows: the last one that is on."""
    model = state.view().model
    found = [entry for entry in stack.mine().entries(model) if entry.key in model.edits]
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------------------- beforehand


def cost(prediction: Any, settings: Any, n_facts: int) -> str:
    """How long Apply will take, and how much memory, in words."""
    known = _speeds().get((settings.method, prediction.model.name))
    if known is None:
        per_forward = prediction.seconds / max(1, prediction.passes)
        layers = len(settings.layers) if settings.method == "rome" else 1
        known = per_forward * (settings.steps * layers * _FIRST[settings.method] + _PER_FACT_AFTER)
    return runs.duration(known * n_facts)


def statistics(settings: Any) -> Snapshot:
    """Where the second moments of the keys come from, layer by layer; fails with the reason why this edit cannot be."""

    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors.compute import check
        from factscope.editors.second_moments import moments_for

        layers = check(model, settings)
        if settings.method == "ft":
            return []
        found = moments_for(model, layers, settings.statistics)
        return [found.told(layer) for layer in layers]

    return runs.ask("edit-statistics", "statistics of keys", [repr(settings)], compute)


def radius(query: Query, answer: str) -> Snapshot:
    """What an edit of this fact may move, and what the model says of it now."""

    def compute(model: Any, progress: Any) -> Any:
        from factscope.experiments.blast_radius import blast_radius

        return blast_radius(model, query.prompt, query.subject or "", answer, progress=progress)

    return runs.ask("edit-radius", "blast radius", [query.prompt, query.subject, answer], compute)


def used_layers(settings: Any, n_layers: int) -> tuple[int, ...]:
    """The layers that settings edit."""
    from factscope.editors.presets import default_layers

    return settings.layers or default_layers(settings.method, n_layers)


def choose(name: str, value: Any) -> None:
    """Choose method, problem or preset; what was set of the one before is no setting of the next."""
    if getattr(state.view().edit, name) != value:
        state.choose("edit", **{name: value}, **({} if name == "problem" else {"settings": (), "layers": ()}))
        if name == "method":
            state.choose("edit", preset=None)


def statistics_words(found: Snapshot) -> list[str]:
    """Where the second moments come from, in a line."""
    if found.error is not None:
        return ["Nothing is collected unasked."]
    if found.result is None:
        return ["Looking for statistics of keys \u2026"]
    if not found.result:
        return ["Finetuning needs no statistics of keys."]
    told = {str(one["origin"]): int(one["tokens"]) for one in found.result}
    ridges = [f"layer {one['layer']}: ridge {one['ridge']:g}" for one in found.result if "ridge" in one]
    said = "; ".join(o if "tokens" in o or not n else f"{o} ({n:,} tokens)" for o, n in told.items())
    return [f"Statistics of keys: {said}." + (f" Singular, so {', '.join(ridges)}." if ridges else "")]


# --------------------------------------------------------------------------------------------------- what was computed


def finished(entry: stack.Entry) -> Snapshot:
    """An edit of the stack as a run that is done."""
    return Snapshot(key=entry.key, state="done", result=entry.evaluation)


def targets(source: Any) -> list[str]:
    """What is made the answer, of every fact; also of an edit that is being computed."""
    return list(dict.fromkeys(fact.target.strip() or (fact.answer or "").strip() for fact in source.facts)) or [""]


def losses(source: Any) -> pd.DataFrame:
    """The loss at every step, of an edit or of one that is being computed; of many facts the first few."""
    from factscope.experiments.editing import losses as of_edits

    partial = getattr(source, "partial", None)
    if partial is None:
        found: Any = of_edits(source.edits)
        return found[found["fact"] < MAX_LINES] if len(found) else found
    return pd.DataFrame([asdict(step) for step in partial.steps], columns=["step", "loss"])


def steps(source: Any) -> int:
    """How many steps there will be at most, for the axis."""
    asked = stack.mine().asked
    if getattr(source, "partial", None) is None:
        return int(source.edits[0].spec.get("steps", 0))
    return int(dict(asked.spec.settings).get("steps", 0)) if asked is not None else 0


def caption(source: Any) -> str:
    """Where the loss comes from."""
    if hasattr(source, "edits"):
        edit = source.edits[0]
        return f"{edit.model}\n{edit}, {edit.problem}, preset {edit.spec.get('preset')}, computed on {edit.computed_on}"
    return "\n".join(fact.text for fact in source.facts[:3])


def report_words(edit: Any) -> list[str]:
    """What is worth knowing of how an edit was computed."""
    report = edit.report
    lines = [f"{weights.said(edit)}: preset {edit.spec.get('preset')}, seed {edit.spec.get('seed')}."]
    norms = ", ".join(f"layer {layer} {norm:.3g}" for layer, norm in dict(report.get("update_norm", {})).items())
    lines += [f"Norm of the change: {norms}."] if norms else []
    for value in list(report.get("values", ()))[:3]:
        if "k_dot_u" in value:
            lines.append(f"k \u00b7 u {value['k_dot_u']:.3g}, {value['share_of_k_dot_u']:.2f} of the averaged key's.")
    for layer in report.get("layers", ()):
        shares = layer["share_written"]
        lines.append(f"Layer {layer['layer']} writes {min(shares):.0%} to {max(shares):.0%} of what is left to write.")
    lines += [f"{len(edit.templates)} contexts were sampled and are stored with it."] if edit.templates else []
    return lines


def python_lines(source: Any) -> str:
    """The same edit with the public interface."""
    asked = stack.mine().asked
    if getattr(source, "partial", None) is None:
        spec, query = source.spec, source.query.query
    elif asked is not None:
        spec, query = asked.spec, asked.query
    else:
        return ""
    names, loading = panels.load_lines(state.view().model.original)
    return "\n".join(
        [
            f"from factscope import {', '.join([*names, 'Query', 'with_edits'])}",
            "from factscope.experiments import editing",
            "",
            *loading,
            f"query = {panels.short(query)}",
            f"spec = editing.{panels.short(replace(spec, evaluation=EvaluationSpec()))}",
            "result = editing.run(model, query, spec)",
            "result.table(), result.scores()",
            "edited = with_edits(model, result.edits)",
        ]
    )


# ------------------------------------------------------------------------------------------------------- own entries


def more(prediction: Any, settings: Any, choice: Any) -> tuple[list[dict[str, Any]], str]:
    """Settings one by one, more facts, and probes of one's own: gives the facts and the probes as they were written."""
    box = st.expander("Settings, more facts at once, your own probes", key="edit-more", on_change="rerun")
    if box.open:
        with box:
            own, facts = st.columns([0.42, 0.58], gap="medium")
            with own:
                _settings(prediction, settings, choice)
            with facts:
                _own_facts()
                st.text_area(
                    "Your own probes, one a line; behind a bar the true answer",
                    key="edit-own-probes",
                    max_chars=4000,
                    persist_state="session",
                    height=80,
                    placeholder="The tower that Gustave Eiffel built stands in | Paris",
                )
    return _written(), str(st.session_state.get("edit-own-probes") or "")


def _settings(prediction: Any, settings: Any, choice: Any) -> None:
    from factscope.editors.presets import SOURCES

    names = [field.name for field in fields(settings) if field.name not in requests.OF_THE_PAGE]
    shown = pd.DataFrame({"setting": names, "value": [str(getattr(settings, name)) for name in names]})
    key = f"edit-settings-{choice.method}-{settings.preset}-{choice.problem}"
    st.caption(f"{settings.preset}: {SOURCES[settings.preset]}. Values can be changed.")
    st.data_editor(
        shown,
        key=key,
        hide_index=True,
        disabled=["setting"],
        height=220,
        on_change=lambda: _changed(names, st.session_state[key], prediction.model),
    )
    if choice.settings:
        st.button("As the preset says", key="edit-settings-back", on_click=lambda: state.choose("edit", settings=()))


def _changed(names: list[str], edited: Any, info: Any) -> None:
    """Take a changed value if it can be one."""
    choice = state.view().edit
    values = dict(text.split("=", 1) for text in choice.settings)
    values |= {names[int(row)]: str(cells["value"]) for row, cells in edited["edited_rows"].items() if "value" in cells}
    told = tuple(f"{name}={value}" for name, value in values.items())
    try:
        requests.edit_settings(replace(choice, settings=told), info)
    except SpecError as error:
        st.session_state[REFUSED] = error
        return
    st.session_state.pop(REFUSED, None)
    state.choose("edit", settings=told)


def _own_facts() -> None:
    """A table of facts that are edited together with the one above."""
    st.caption(
        "Facts that are edited together with this one: MEMIT spreads all over its layers, the others take turns."
    )
    given = st.session_state.setdefault(_OWN_FACTS, pd.DataFrame(columns=list(FACTS), dtype=str))
    st.session_state[_WRITTEN] = st.data_editor(
        given,
        key="edit-facts",
        num_rows="dynamic",
        hide_index=True,
        height=150,
        column_config={"new_answer": "new answer"},
    ).to_dict("records")


def _written() -> list[dict[str, Any]]:
    return st.session_state.get(_WRITTEN, [])


_OWN_FACTS, _WRITTEN = "edit-facts-given", "edit-facts-written"


def facts_file(rows: Any) -> tuple[str | None, int]:
    """The facts of a table as a file, and how many there are.

    Raises:
        DatasetError: a row is incomplete.
    """
    kept = []
    for number, row in enumerate(rows, start=1):
        values = [str(row.get(name) or "").strip()[:MAX_TEXT] for name in FACTS]
        if not any(values):
            continue
        if not values[0] or not values[1] or not values[2]:
            raise DatasetError(
                f"fact {number} of the table lacks prompt, subject or answer", "fill the row or empty it"
            )
        kept.append(values)
    if len(kept) > MAX_FACTS:
        raise DatasetError(f"{len(kept)} facts are more than {MAX_FACTS}", "edit fewer at once")
    return (_csv(FACTS, kept) if kept else None), len(kept)


def probes_file(text: str) -> str | None:
    """One's own probes, one a line, as a file: the prompt, and behind a bar its true answer where it has one."""
    rows = []
    for line in text.splitlines()[:MAX_PROBES]:
        prompt, _, answer = line.partition("|")
        if prompt.strip():
            rows.append([prompt.rstrip(), "own", answer.strip()])
    return _csv(("prompt", "kind", "answer"), rows) if rows else None


def _csv(names: Any, rows: Any) -> str:
    written = io.StringIO()
    csv.writer(written).writerows([names, *rows])
    content = written.getvalue().encode("utf-8", "surrogatepass")
    place = Path(uploads.folder()) / f"{hashlib.sha256(content).hexdigest()[:16]}.csv"
    if not place.exists():
        place.write_bytes(content)
    return str(place)


def take_file(content: bytes) -> Any:
    """Read an uploaded edit and put it on top of the stack, off; whether it fits the model is asked when it is on.

    Raises:
        EditError: it is damaged, too large, or there is no room.
    """
    from factscope.editors.files import load_edit

    own, choice = stack.mine(), state.view().model
    own.refuse(len(content))
    place = Path(uploads.folder()) / f"{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    place.write_bytes(content)
    try:
        edit = load_edit(place)
    finally:
        place.unlink(missing_ok=True)
    return own.push(edit, choice)
