"""Which states carry it? Causal tracing: three panels of restored places, and their means by the role of the token."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboard import compare, counterfactual, figures, messages, panels, parts, requests, runs, state
from dashboard.link import MAX_NAME, MAX_SAMPLES, MAX_SEEDS, Sever, TraceSite, seeds
from factscope.errors import SpecError

PANELS: dict[TraceSite, str] = {"hidden": "State restored", "mlp": "MLP restored", "attention": "Attention restored"}
SHORT: dict[TraceSite, str] = {"hidden": "state", "mlp": "MLP", "attention": "attention"}
SEVERED: dict[Sever, str] = {"none": "nothing", "mlp": "MLP", "attention": "attention"}
MEASURES = {"probability": "p", "log_odds": "log-odds", "logit_difference": "logit − foil"}
NOISES = ["s3", "s2", "s1", "0.1", "u0.5", "m", "t5", "rome:gpt2-xl", "rome:gpt-j", "hase:gpt-j", "hase:other"]

_REFUSED = "trace-seeds-refused"


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    if prediction.query.subject is None:
        parts.note("plain", ["Causal tracing corrupts the subject. Name it in the fact line."], key="no-subject")
        return
    choice = state.view().trace
    _controls(prediction)
    requests.check_noise(choice)
    if compare.show(MAPS, prediction):
        return
    _run_all(prediction)
    head = st.container()
    found: dict[TraceSite, Any] = {}
    nulls: dict[TraceSite, Any] = {}
    for column, site in zip(st.columns(3, gap="small"), PANELS, strict=True):
        with column, messages.caught():
            found[site], nulls[site] = _panel(prediction, site)
    results: dict[TraceSite, Any] = {
        site: snapshot.value for site, snapshot in found.items() if snapshot is not None and snapshot.value
    }
    with head:
        _head(results, prediction)
    left, right = st.columns([0.7, 0.3], gap="medium")
    with left, messages.caught():
        _roles(prediction, found, nulls)
    with left, messages.caught():
        _severed(prediction, nulls.get("hidden"))
    with right, messages.caught():
        _detail(prediction, results)
    with messages.caught():
        _more(prediction)
    with messages.caught():
        counterfactual.show(prediction)


def _measure(prediction: Any) -> Any:
    """The measure as it can be asked of this question."""
    chosen = state.view().trace.measure
    return "probability" if chosen == "logit_difference" and prediction.query.query.foil is None else chosen


def _controls(prediction: Any) -> None:
    choice, layers = state.view().trace, prediction.model.n_layers
    places = st.columns([0.2, 0.14, 0.13, 0.12, 0.21, 0.2], gap="medium", vertical_alignment="bottom")
    window, noise, samples, seed, sever, measure = places
    noisy = choice.other is None
    size = min(requests.trace_window(choice, layers), layers)
    window.slider(
        "Window of MLP and attention",
        1,
        max(2, layers),
        size,
        key=state.seed("trace-window", size),
        on_change=state.on_change("trace-window", "trace", "window"),
        help="Layers of updates restored together. A state is restored in one layer. Default: 10 of 48, scaled.",
    )
    noise.selectbox(
        "Noise",
        list(dict.fromkeys([*NOISES, choice.noise])),
        list(dict.fromkeys([*NOISES, choice.noise])).index(choice.noise),
        key=state.seed("trace-noise", choice.noise),
        on_change=state.on_change("trace-noise", "trace", "noise", lambda value: value or "s3"),
        accept_new_options=True,
        disabled=not noisy,
        help="s3: three standard deviations of subjects' embeddings. 0.1: the sd itself. u0.5: uniform. m, t5: Gaussian"
        " or Student's t with the embeddings' covariance. Or a published constant. Type your own.",
    )
    samples.number_input(
        "Samples",
        1,
        MAX_SAMPLES,
        choice.samples,
        key=state.seed("trace-samples", choice.samples),
        on_change=state.on_change("trace-samples", "trace", "samples", int),
        disabled=not noisy,
        help="Draws of noise; the mean is over their probabilities.",
    )
    shown = ", ".join(map(str, choice.seeds))
    seed.text_input(
        "Seeds",
        shown,
        key=state.seed("trace-seeds", shown),
        on_change=_read_seeds,
        max_chars=120,
        disabled=not noisy,
        help="One seed, or several such as 1, 2, 3: the figures then show means, and the curves a band.",
    )
    _segmented(sever, "Severed", "sever", SEVERED, choice.sever, "At the restored token, these updates stay corrupted.")
    known = {k: word for k, word in MEASURES.items() if k != "logit_difference" or prediction.query.query.foil}
    _segmented(measure, "Effect in", "measure", known, _measure(prediction), "The logit difference needs a foil.")
    _show_refused()


def _segmented(place: Any, label: str, name: str, options: dict[Any, str], value: str, help_text: str) -> None:
    key = f"trace-{name}"
    place.segmented_control(
        label,
        list(options),
        format_func=options.__getitem__,
        default=value,
        key=state.seed(key, value),
        on_change=state.on_change(key, "trace", name, lambda chosen: chosen or value),
        help=help_text,
    )


def _read_seeds() -> None:
    typed = str(st.session_state["trace-seeds"])
    found = seeds(typed)
    if found is None:
        st.session_state[_REFUSED] = typed, state.view()
    else:
        state.choose("trace", seeds=found)


def _show_refused() -> None:
    """What was typed as seeds and cannot be used, until something else is chosen."""
    typed, before = st.session_state.get(_REFUSED, ("", None))
    if before == state.view():
        kept = ", ".join(map(str, before.trace.seeds))
        messages.show_error(
            SpecError(
                f"seeds {typed!r} cannot be used: they are no different whole numbers from 0 to {2**32 - 1:,}",
                f"write up to {MAX_SEEDS}, such as 1, 2, 3; until then the figures are those of {kept}",
            )
        )


def _more(prediction: Any) -> None:
    """What is changed rarely."""
    choice = state.view().trace
    box = st.expander("Another subject instead of noise, and other variants", key="trace-more", on_change="rerun")
    if not box.open:
        return
    with box:
        other, extra, draws, replace = st.columns([0.36, 0.16, 0.24, 0.24], gap="medium", vertical_alignment="bottom")
        other.text_input(
            "Another subject, of as many tokens",
            choice.other or "",
            key=state.seed("trace-other", choice.other or ""),
            on_change=state.on_change("trace-other", "trace", "other", lambda value: value.strip() or None),
            max_chars=MAX_NAME,
            placeholder="none: the subject is blurred with noise",
            help="Its tokens take the subject's place, first for first, in the corrupted run (Zhang and Nanda 2023).",
        )
        extra.number_input(
            "Extra tokens",
            0,
            len(prediction.query.ids),
            min(choice.extra, len(prediction.query.ids)),
            key=state.seed("trace-extra", choice.extra),
            on_change=state.on_change("trace-extra", "trace", "extra", int),
            disabled=choice.other is not None,
            help="So many tokens after the subject are corrupted too.",
        )
        options = {"fixed": "the same noise", "compat": "as released"}
        _segmented(
            draws, "Severed run's noise", "draws", options, choice.draws, "As released: the stream's second draw."
        )
        replace.toggle(
            "Noise in the embeddings' place",
            choice.replace,
            key=state.seed("trace-replace", choice.replace),
            on_change=state.on_change("trace-replace", "trace", "replace", bool),
            disabled=choice.other is not None,
            help="Instead of being added to them; in the corrupted run as well.",
        )


def _run_all(prediction: Any) -> None:
    """One click for all panels that wait for one."""
    query, choice = prediction.query.query, state.view().trace
    passes = requests.trace_passes(prediction, choice)
    asked = [(f"trace-{site}", requests.trace(choice, site)) for site in PANELS]
    keys = [panels.waits(slot, "causal_tracing", query, spec, passes, prediction) for slot, spec in asked]
    waiting = [key for key in keys if key is not None]
    if len(waiting) > 1:
        label = f"Run all {len(waiting)}"
        st.button(label, key="trace-run-all", icon=":material/fast_forward:", on_click=_start, args=[waiting])


def _start(keys: list[str]) -> None:
    for key in keys:
        runs.start(key)


def _panel(prediction: Any, site: TraceSite) -> tuple[Any, Any]:
    """One panel's run, and what there is of the same on random weights."""
    query, choice = prediction.query.query, state.view().trace
    line, spec = panels.heading(PANELS[site], "trace"), requests.trace(choice, site)
    passes = requests.trace_passes(prediction, choice)
    found = panels.run(line, f"trace-{site}", "causal_tracing", query, spec, passes, prediction)
    null = None
    if panels.with_null(choice, prediction, found):
        random = panels.null(line, f"trace-{site}-null", "causal_tracing", spec, passes, prediction)
        null = None if random is None else random.value
    if found is not None and found.value is not None:
        doubts = figures.trace_doubts(found.value, prediction)
        panels.figure(
            figures.trace_map(found.value, _measure(prediction), doubts, null=null),
            name=f"trace-{site}",
            found=found,
            code=panels.python_lines(query, spec, "causal_tracing"),
            height=panels.rows_height(len(found.value.positions)),
            legend=46,
            beside=len(PANELS),
        )
    return found, null


def _head(results: dict[TraceSite, Any], prediction: Any) -> None:
    """Clean and corrupted probability, and why nothing may be named, in all panels or in one."""
    if not results:
        return
    parts.note("plain", [figures.trace_head(next(iter(results.values())))], key="trace-head")
    found = {site: figures.trace_doubts(result, prediction) for site, result in results.items()}
    common = [doubt for doubt in next(iter(found.values())) if all(doubt in said for said in found.values())]
    own = [f"{PANELS[site]}: {doubt}" for site in results for doubt in found[site] if doubt not in common]
    if common or own:
        named = "No place is named as the strongest" + ("." if common else " there.")
        parts.note("warn", [*common, *own, named], key="trace-doubts")
    told = [warning for result in results.values() for warning in result.warnings]
    messages.show_warnings([warning for warning in told if warning not in prediction.warnings])


def _roles(prediction: Any, found: dict[TraceSite, Any], nulls: dict[TraceSite, Any]) -> None:
    choice = state.view().trace
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        panels.heading("By the role of the token", "roles")
        _segmented(st, "Restored", "roles", SHORT, choice.roles, "Which panel's means are drawn.")
        panels.null_toggle("trace", choice, prediction)
    snapshot = found.get(choice.roles)
    if snapshot is None or snapshot.value is None:
        return
    query, spec = prediction.query.query, requests.trace(choice, choice.roles)
    doubts = figures.trace_doubts(snapshot.value, prediction)
    panels.figure(
        figures.trace_roles(snapshot.value, _measure(prediction), doubts, null=nulls.get(choice.roles)),
        name="trace-roles",
        found=snapshot,
        code=panels.python_lines(query, spec, "causal_tracing").replace("result.table()", "result.by_role()"),
        height=250,
    )


def _severed(prediction: Any, null: Any) -> None:
    """By which way the state of the subject's last token acts: three traces of one row."""
    query, choice = prediction.query.query, state.view().trace
    line = panels.heading("By which way subject-last acts", "severed")
    passes = prediction.model.n_layers * (1 if choice.other else len(choice.seeds))
    results: dict[str, Any] = {}
    found = None
    for sever in SEVERED:
        one = panels.run(
            line, f"trace-severed-{sever}", "causal_tracing", query, requests.severed(choice, sever), passes, prediction
        )
        if one is None or one.value is None:
            break
        results[sever], found = one.value, one
    if found is None:
        return
    doubts = figures.trace_doubts(results["none"], prediction)
    shown = figures.severed(results, _measure(prediction), doubts, null=null)
    panels.figure(shown, name="trace-severed", found=found, code=_severed_lines(query, choice), height=250)


def _severed_lines(query: Any, choice: Any) -> str:
    """The three traces and their figure with the public interface."""
    draw = (
        'results = {sever: causal_tracing(model, query, replace(spec, sever=sever)) for sever in ("none", "mlp", '
        '"attention")}\n'
        "curves = {sever: found.gain_at_subject_last() for sever, found in results.items()}\n"
        'plain = results["none"]\n'
        "charts.severed_curves(plain.layers, curves, total=plain.total_effect, answer=plain.target.text).chart()"
    )
    lines = panels.python_lines(query, requests.severed(choice, "mlp"), "causal_tracing", draw=draw)
    return "from dataclasses import replace\n\nfrom factscope import charts\n" + lines.replace(
        "result = causal_tracing(model, query, ", "spec = "
    ).replace(")\nresult.table()", "")


def _detail(prediction: Any, results: dict[TraceSite, Any]) -> None:
    line, query = panels.heading("Cell", "lens"), prediction.query.query
    lens = panels.run(
        line, "lens-block", "logit_lens", query, requests.lens(), requests.lens_passes(prediction), prediction
    )

    def effects(cursor: Any) -> list[str]:
        return [words for result in results.values() for words in figures.trace_effect(result, cursor)]

    panels.detail(None if lens is None else lens.value, effects=effects, leads_to_trace=False)


def _side(result: Any, view: Any, unnamed: str) -> Any:
    """One side of a comparison; without a foil there is no logit difference."""
    measure = view.trace.measure
    bare = measure == "logit_difference" and result.query.query.foil is None
    return figures.trace_map(result, "probability" if bare else measure, result.doubts)


def _both(site: TraceSite) -> compare.Panel:
    """A panel as A | B | B - A."""
    return compare.Panel(
        name=f"trace-{site}",
        heading=PANELS[site],
        method="trace",
        slot=f"trace-{site}",
        kind="causal_tracing",
        command="trace",
        function="causal_tracing",
        spec=lambda view, found: requests.trace(view.trace, site),
        passes=lambda view, found: requests.trace_passes(found, view.trace),
        draw=_side,
        doubts=lambda result: (*result.doubts, *figures.incomplete(result)),
        difference=lambda both, view: both.map(
            "p_restored",
            "position",
            quantity="probability",
            what=f"p({both.answer}) restored",
            axis_title="layer" if site == "hidden" else "layer (centre of the window restored)",
        ),
        row_height=15,
    )


MAPS = tuple(_both(site) for site in PANELS)

runs.live(draw)
