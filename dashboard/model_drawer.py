"""Which model is asked: choosing it, what it will take before it is loaded, and what it supports, with reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import messages, parts, runs, stack, state
from dashboard.executor import Work
from dashboard.link import MAX_NAME, ModelChoice

_DRAWER = "model-drawer"
_KINDS = {
    "bundled": "Bundled",
    "hub": "Hub id",
    "folder": "Local folder",
    "random": "Random weights",
}
_HELP = {
    "hub": "A model of the Hugging Face hub, such as openai-community/gpt2. Gated ones need the server's HF_TOKEN.",
    "folder": "A folder on the server's machine with config.json, a tokenizer and safetensors weights.",
    "random": "The same architecture with seeded random weights: the null. What shows here too is no knowledge.",
}


def use_bundled() -> None:
    """Go back to the bundled model."""
    _change_to(ModelChoice())


def may_be_random() -> bool:
    """Whether this server lets a visitor ask a model with random weights."""
    from factscope.settings import get_settings

    return get_settings().models_allowed is None


def random_of(choice: ModelChoice) -> ModelChoice:
    """The null control of a model: its shape with random weights."""
    return replace(choice.original, name=f"random:{choice.name.removeprefix('random:')}")


def use_random() -> None:
    """Ask the null control of the model in use."""
    _change_to(random_of(state.view().model))


def show() -> None:
    """The drawer, behind its button."""
    drawer = st.popover("Model", icon=":material/deployed_code:", key=_DRAWER, on_change="rerun")
    if not drawer.open:
        return
    with drawer:
        choice = state.view().model
        parts.note("quiet", [f"In use: {choice.name}" + (f" at {choice.revision}" if choice.revision else "")])
        with messages.caught():
            _choose(choice)
        with messages.caught():
            _capabilities(choice)


def _choose(current: ModelChoice) -> None:
    from factscope.settings import get_settings

    allowed = get_settings().models_allowed
    kinds = [kind for kind in _KINDS if allowed is None or kind not in ("folder", "random")]
    kind = st.segmented_control(
        "Model",
        kinds,
        format_func=_KINDS.__getitem__,
        default=_kind(current.name) if _kind(current.name) in kinds else "bundled",
        key="model-kind",
        label_visibility="collapsed",
    )
    name, revision = "bundled", None
    if kind in ("hub", "folder"):
        label = "Model id" if kind == "hub" else "Folder"
        name = st.text_input(label, max_chars=1024, key=f"model-name-{kind}", help=_HELP[kind]).strip()
    if kind == "hub":
        revision = (
            st.text_input("Revision", max_chars=MAX_NAME, key="model-revision", placeholder="main").strip() or None
        )
    if kind == "random":
        base = st.text_input(
            "Architecture of", value="bundled", max_chars=1024, key="model-random", help=_HELP["random"]
        ).strip()
        name = f"random:{base}"
    first, second = st.columns(2)
    dtype: Any = first.selectbox("Type of the weights", ["float32", "bfloat16", "float16", "auto"], key="model-dtype")
    device = second.selectbox(
        "Device",
        ["auto", "cpu", "cuda", runs.SPREAD],
        key="model-device",
        help="spread: accelerate places the model over devices and disk.",
    )
    wanted = ModelChoice(name=name, revision=revision, dtype=dtype, device=device)
    check, use = st.columns(2)
    if check.button("What will it take?", disabled=not name, width="stretch"):
        st.session_state["model-estimate"] = wanted
        st.session_state["model-estimates"] = st.session_state.get("model-estimates", 0) + 1
    use.button(
        "Use this model",
        type="primary",
        disabled=not name or wanted == current.original,
        on_click=_use,
        args=[wanted],
        width="stretch",
    )
    if st.session_state.get("model-estimate") == wanted:
        _estimate(wanted)


def _kind(name: str) -> str:
    """What kind of name it is, for the drawer's first look."""
    if name == "bundled":
        return "bundled"
    if name.startswith("random:"):
        return "random"
    return "folder" if name.startswith((".", "/", "~")) else "hub"


def _use(choice: ModelChoice) -> None:
    st.session_state[_DRAWER] = False
    _change_to(choice)


def _change_to(choice: ModelChoice) -> None:
    """Ask another model, without what only the last one's tokens and layers gave a meaning to, with its own edits."""
    view = state.view()
    choice = replace(choice, edits=stack.mine().on(choice))
    if choice.name.removeprefix("random:") == view.model.name.removeprefix("random:"):
        state.change(model=choice)  # the same tokens and layers
        return
    state.change(
        model=choice,
        cursor=None,
        fact=replace(view.fact, span=None),
        lens=replace(view.lens, pinned=()),
        flow=replace(view.flow, window=None),
    )


def _estimate(choice: ModelChoice) -> None:
    def compute(_: Any, progress: Any) -> Any:
        from factscope.models.loading import estimate_memory

        device = "auto" if choice.device == runs.SPREAD else choice.device
        return estimate_memory(choice.name, choice.revision, choice.dtype, device=device)

    asked = st.session_state.get("model-estimates", 0)
    found = runs.do("reading-estimate", f"estimate {asked} {choice}", Work(compute=compute, label="estimate"))
    if found.error is not None:
        messages.show_error(found.error)
    elif found.result is not None:
        parts.note("good" if found.result.fits else "warn", [found.result.sentence])
    else:
        parts.note("quiet", ["Looking at the model's files …"])


def _capabilities(choice: ModelChoice) -> None:
    found = runs.capabilities(choice)
    if found is None:
        parts.note("quiet", ["What a model supports is measured when it is loaded."])
        return
    info, rows = found["model"], found["rows"]
    parts.note(
        "quiet",
        [
            f"{info['family']}, {info['n_layers']} layers, {info['n_heads']} heads, width {info['d_model']}, "
            f"{info['parameters']:,} weights, {info['dtype']}, weights {info['weights']}"
        ],
    )
    table = pd.DataFrame(
        [(row["meaning"], "yes" if row["supported"] else f"no: {row['reason']}") for row in rows],
        columns=["method", "supported"],
    )
    st.dataframe(table, hide_index=True, height="content")
