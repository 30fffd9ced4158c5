"""Where an edit's statistics of keys come from; and, where there are none, what can be done about it.

Nothing is collected unasked: the page names what is missing and what collecting will cost, and the visitor starts it
from a text of his own. A collection that was cancelled goes on where it stopped. What is collected serves everybody who
edits this model on this machine, so that a server for others takes no texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard import messages, panels, parts, runs, state, uploads
from dashboard.executor import Snapshot
from factscope.errors import SpecError

COLLECT = "edit-collect"
_TEXT = "edit-collect-text"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is there for an edit.

    Attributes:
        told: provenance, layer by layer; empty where the method needs none. missing: layers that have none.
        error: what the missing ones are refused with.
    """

    told: tuple[dict[str, Any], ...] = ()
    missing: tuple[int, ...] = ()
    error: SpecError | None = None


def ask(settings: Any) -> Snapshot:
    """Where the second moments of the keys come from; fails with the reason why this edit cannot be."""

    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors.compute import check
        from factscope.editors.second_moments import missing_layers, moments_for

        layers = check(model, settings)
        if settings.method == "ft":
            return Statistics()
        try:
            found = moments_for(model, layers, settings.statistics)
        except SpecError as error:
            missing = missing_layers(model, layers, settings.statistics)
            if not missing:
                raise
            return Statistics(missing=missing, error=error)
        return Statistics(told=tuple(found.told(layer) for layer in layers))

    return runs.ask("edit-statistics", "statistics of keys", [repr(settings), _collected()], compute)


def _collected() -> list[str]:
    """What has been collected so far: with more of it, the question is another one."""
    from factscope.editors.second_moments import folder

    return sorted(path.stem for path in folder().glob("*.safetensors"))


def show(found: Snapshot) -> bool:
    """Say it; whether the edit can be computed as far as statistics go."""
    if found.error is not None:
        messages.show_error(found.error)
        return False
    if found.result is None:
        parts.note("quiet", ["Looking for statistics of keys \u2026"], key="edit-statistics")
        return True
    if found.result.error is not None:
        _missing(found.result)
        return False
    parts.note("quiet", [_words(found.result.told)], key="edit-statistics")
    return True


def _words(told: tuple[dict[str, Any], ...]) -> str:
    if not told:
        return "Finetuning needs no statistics of keys."
    origins = {str(one["origin"]): int(one["tokens"]) for one in told}
    ridges = [f"layer {one['layer']}: ridge {one['ridge']:g}" for one in told if "ridge" in one]
    said = "; ".join(o if "tokens" in o or not n else f"{o} ({n:,} tokens)" for o, n in origins.items())
    return f"Statistics of keys: {said}." + (f" Singular, so {', '.join(ridges)}." if ridges else "")


# ---------------------------------------------------------------------------------------------------- what is missing


def _missing(found: Statistics) -> None:
    """The refusal with its ways out: no statistics at all, or those of a text."""
    named = f"layer{'s' if len(found.missing) > 1 else ''} {', '.join(map(str, found.missing))}"
    lines = [
        f"There are no statistics of keys for {state.view().model.name}, {named}: this method weighs by them which "
        "directions must not move. Nothing is collected unasked."
    ]
    parts.note("warn", lines, key="edit-statistics")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="edit-statistics-ways"):
        st.button(
            "Edit without statistics (identity)",
            key="edit-identity",
            on_click=_without,
            help="Every direction weighs the same. This is another method, not an estimate, and the edit says so: it "
            "moves more of what is near.",
        )
    with st.expander("Collect them from a text", icon=":material/functions:", key="edit-collect-box"):
        _collect(found.missing)


def _without() -> None:
    kept = tuple(text for text in state.view().edit.settings if not text.startswith("statistics="))
    state.choose("edit", settings=(*kept, "statistics=identity"))


def allowed() -> bool:
    """Whether visitors may collect: not on a server that offers named models only, since all would edit with it."""
    from factscope.settings import get_settings

    return get_settings().models_allowed is None


def _collect(layers: tuple[int, ...]) -> None:
    line = f"factscope statistics --model {state.view().model.name} --layers {','.join(map(str, layers))} --text FILE"
    if not allowed():
        parts.note(
            "quiet", ["This server takes no texts for statistics; whoever runs it collects them:"], key="collect-not"
        )
        st.code(line, language="bash")
        return
    given = uploads.text("A text that is like what the model was trained on", "edit-collect-file")
    if given is not None:
        st.session_state[_TEXT] = given
    path = st.session_state.get(_TEXT)
    under_way = runs.look(COLLECT)
    if under_way is not None and not under_way.finished:
        _progress(under_way)
    elif path is None or not Path(path).is_file():
        st.caption("At most 5 MB, .txt or .md, paragraphs parted by empty lines. For larger corpora:")
        st.code(line, language="bash")
    else:
        _offer(path, layers, under_way)


def _offer(path: str, layers: tuple[int, ...], before: Snapshot | None) -> None:
    """The cost of collecting from a text, and the button that starts it, or goes on with it."""
    cost = _cost(path, layers)
    if cost.error is not None:
        messages.show_error(cost.error)
        return
    if cost.result is None:
        st.caption("Counting its tokens \u2026")
        return
    parts.note("plain", [f"{Path(path).name}: {_cost_words(cost.result)}."], key="collect-cost")
    messages.show_warnings(cost.result.warnings)
    stopped = before is not None and before.state == "cancelled"
    if stopped:
        parts.note("quiet", ["Stopped. What was summed is kept, and goes on from there."], key="collect-stopped")
    if before is not None and before.error is not None:
        messages.show_error(before.error)
    st.button(
        "Go on" if stopped else "Collect",
        key="edit-collect",
        type="primary",
        icon=":material/play_arrow:",
        on_click=_start,
        args=[path, layers],
    )


def _cost_words(cost: Any) -> str:
    mib = cost.n_bytes / 2**20
    return (
        f"about {cost.tokens:,} tokens of {cost.n_texts:,} paragraphs, {runs.duration(cost.seconds)}, "
        f"{_mib(3 * mib)} of memory meanwhile and {_mib(mib)} on disk"
    )


def _mib(size: float) -> str:
    return "under 1 MiB" if size < 1 else f"{size:,.0f} MiB"


def _cost(path: str, layers: tuple[int, ...]) -> Snapshot:
    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors import collecting

        progress(0, 1, None)
        return collecting.estimate(model, collecting.read_corpus(path), layers)

    return runs.ask("edit-collect-cost", "cost of collecting", [path, list(layers)], compute)


def _start(path: str, layers: tuple[int, ...]) -> None:
    """Start collecting, or go on with it; the page then finds it under way."""

    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors import collecting

        return collecting.collect(model, collecting.read_corpus(path), layers, progress=progress)

    runs.again(COLLECT)
    runs.ask(COLLECT, "statistics of keys from text", [path, list(layers)], compute, keep=False)


def watch() -> Snapshot | None:
    """A collection that is under way, so that the page is drawn again while it is; None where there is none."""
    found = runs.look(COLLECT)
    if found is not None and not found.finished:
        runs.watch(COLLECT, found)
        return found
    return None


def _progress(found: Snapshot) -> None:
    counted = f", {found.partial.tokens:,} tokens" if found.partial is not None else ""
    st.progress(found.done / found.total if found.total else 0.0, text=f"{panels.progress_words(found)}{counted}")
    st.button("Cancel", key="cancel-edit-collect", on_click=runs.cancel, args=[COLLECT], type="tertiary")
