"""The top of every page: the question, its tokens with the subject underlined, the answer, the verdict."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import compare, messages, model_drawer, parts, picker, runs, state, weights
from dashboard.link import MAX_NAME, MAX_PROMPT
from factscope.demo.lookup import untaught
from factscope.queries import Query

_HINT = "Wrong subject? Click its first, then its last token."
_TEXTS = "fact-token-texts"
_RANDOM = "These are random weights, the null: nothing was learned, and no place is named."
_UNTOLD = "No subject is named, so it cannot be told whether the model was taught this."
_CONTINUATION = 70
_WORD = re.compile(r"[^\W\d_](?:[\w.&-]|['’](?!s\b))*")
_SMALL = frozenset({"of", "the", "de", "da", "van", "von", "der", "del", "di", "la", "le", "and", "for"})
_OPENERS = frozenset({"The", "In", "A", "An", "On", "I", "Q", "What", "Who", "Where", "Which", "My", "It"})


def show() -> runs.Reading:
    """Draw the frame's top; gives what the model reads, for the page below."""
    messages.show_warnings([messages.sentence(error) for error in state.link_problems()])
    weights.notes()
    _form()
    reading = runs.reading()
    with st.container(
        key="tools", horizontal=True, horizontal_alignment="right", vertical_alignment="center", gap="small"
    ):
        weights.badge()
        compare.button()
        picker.show()
        _options()
        model_drawer.show()
    _tokens(reading)
    _judgement(reading)
    return reading


def suggest_subject(prompt: str, known: Iterable[str] = ()) -> str | None:
    """The subject that a prompt is probably about.

    Args:
        known: names of subjects; the longest one in the prompt wins.

    Returns:
        A piece of the prompt, or None. Without a known name the longest run of capitalised words, the word that only
        starts the sentence left out where there is another.
    """
    lowered = prompt.casefold()
    found = [
        name for name in known if len(name) > 2 and re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", lowered)
    ]
    if found:
        start = lowered.index(max(found, key=len).casefold())
        return prompt[start : start + len(max(found, key=len))]
    names = [prompt[start:stop] for start, stop in _runs(prompt)]
    inner = [prompt[start:stop] for start, stop in _runs(prompt) if start > 0]
    return max(inner or names, key=len, default=None)


def _runs(prompt: str) -> list[tuple[int, int]]:
    """Where runs of capitalised words stand, small words inside them included, a leading article and a genitive not."""
    words = list(_WORD.finditer(prompt))
    found: list[tuple[int, int]] = []
    i = 0
    while i < len(words):
        if not words[i].group()[0].isupper() or words[i].group() in _OPENERS:
            i += 1
            continue
        last = after = i
        while after + 1 < len(words) and prompt[words[after].end() : words[after + 1].start()] == " ":
            after += 1
            if words[after].group()[0].isupper():
                last = after
            elif words[after].group() not in _SMALL:
                break
        found.append((words[i].start(), words[last].end()))
        i = last + 1
    return found


def _form() -> None:
    fact = state.view().fact
    with st.form("fact", border=False, enter_to_submit=True):
        prompt, subject, answer, foil, ask = st.columns(
            [5, 2.3, 1.5, 1.5, 0.7], vertical_alignment="bottom", gap="small"
        )
        prompt.text_input(
            "Prompt, up to the answer",
            value=fact.prompt,
            key=state.seed("fact-prompt", fact.prompt),
            max_chars=5 * MAX_PROMPT,  # what is too long is refused with a sentence, not dropped by the field
            help="A sentence that ends right before the answer.",
        )
        subject.text_input(
            "Subject",
            value=fact.subject or "",
            key=state.seed("fact-subject", fact.subject or ""),
            max_chars=MAX_NAME,
            placeholder="found by itself",
            help="What the sentence is about, as it stands in the prompt. Left empty, it is suggested.",
        )
        answer.text_input(
            "Answer",
            value=fact.answer or "",
            key=state.seed("fact-answer", fact.answer or ""),
            max_chars=MAX_NAME,
            placeholder="the model's own",
            help="The attribute. Left empty, the model's own first choice is the target.",
        )
        foil.text_input(
            "Foil",
            value=fact.foil or "",
            key=state.seed("fact-foil", fact.foil or ""),
            max_chars=MAX_NAME,
            placeholder="none",
            help="A competing answer to compare with.",
        )
        ask.form_submit_button("Ask", on_click=_ask, type="primary", width="stretch")


def _ask() -> None:
    asked = {name: str(st.session_state.get(f"fact-{name}", "")) for name in ("prompt", "subject", "answer", "foil")}
    old = state.view().fact
    subject = asked["subject"].strip() or None
    stale = (
        asked["prompt"] != old.prompt
        and subject == old.subject
        and subject is not None
        and subject not in asked["prompt"]
    )
    if subject is None or stale:
        subject = suggest_subject(asked["prompt"], picker.known_subjects())
    same = asked["prompt"] == old.prompt and subject == old.subject
    fact = replace(
        old,
        prompt=asked["prompt"],
        subject=subject,
        answer=asked["answer"].strip() or None,
        foil=asked["foil"].strip() or None,
        occurrence=old.occurrence if same else None,
        span=old.span if same else None,
    )
    state.ask(fact)


def _options() -> None:
    """What is rarely needed: which occurrence, BOS, what of the answer is scored, a span chosen by hand."""
    fact = state.view().fact
    with st.popover("Options", icon=":material/tune:"):
        st.number_input(
            "Which occurrence of the subject",
            min_value=0,
            max_value=999,
            step=1,
            value=fact.occurrence or 0,
            key=state.seed("fact-occurrence", fact.occurrence or 0),
            on_change=_change("occurrence"),
            help="0 where the subject occurs once.",
        )
        st.segmented_control(
            "Token that begins the sequence (BOS)",
            ["auto", "yes", "no"],
            default=fact.bos,
            key=state.seed("fact-bos", fact.bos),
            on_change=_change("bos"),
            help="auto does as the tokenizer does.",
        )
        st.segmented_control(
            "Score",
            ["token", "sequence"],
            default=fact.score,
            key=state.seed("fact-score", fact.score),
            on_change=_change("score"),
            format_func={"token": "first token of the answer", "sequence": "whole answer"}.__getitem__,
        )
        if fact.span is not None:
            st.button("Find the subject from its text again", on_click=lambda: _replace(span=None))


def _change(name: str) -> Any:
    def write() -> None:
        value = st.session_state[f"fact-{name}"]
        fields = {name: (value or None) if name == "occurrence" else value or getattr(Query(prompt=""), name)}
        if name == "bos":  # positions shift by one: a span chosen by hand would be of other tokens
            fields["span"] = None
        _replace(**fields)

    return write


def _replace(**fields: Any) -> None:
    state.change(fact=replace(state.view().fact, **fields))


def _tokens(reading: runs.Reading) -> None:
    prediction = reading.prediction
    if prediction is None:
        return
    start, stop = prediction.query.subject or (0, 0)
    tokens = []
    for token in prediction.query.tokens:
        inside = start <= token.position < stop
        kind = " ".join(
            filter(
                None,
                [
                    "subject" if inside else "",
                    "special" if token.role == "special" else "",
                    "last" if token.role == "last" else "",
                ],
            )
        )
        roles = " and ".join(
            filter(None, ["subject" if inside else "", "read-out" if token.role == "last" else token.role])
        )
        roles = "subject" if roles == "subject and subject" else roles
        tokens.append(
            {
                "n": token.position,
                "text": token.display,
                "kind": kind,
                "title": f"{token.text!r}\nposition {token.position}, id {token.id}, {roles}\n{_HINT}",
                "label": f"token {token.position} {token.display}, {roles}",
            }
        )
    st.session_state[_TEXTS] = tuple(token.text for token in prediction.query.tokens)
    parts.token_line(tokens, _chips(prediction), hint="" if prediction.p_foil is not None else _HINT, on_span=_on_span)


def _chips(prediction: Any) -> list[dict[str, str]]:
    given = prediction.query.query.answer is not None
    whole = prediction.query.query.score == "sequence" and prediction.target.n_tokens > 1
    what = "the whole answer" if whole else "its first token"
    chips = [
        {
            "name": "answer" if given else "first choice",
            "text": prediction.target.text.strip() or prediction.target.text,
            "detail": f"{prediction.p_target:.2f} #{prediction.rank}",
            "tone": "warn" if prediction.known is False else "good",
            "title": f"probability {prediction.p_target:.4g} of {what}, rank {prediction.rank}",
        }
    ]
    if prediction.p_foil is not None:
        foil = prediction.query.query.foil or ""
        chips.append(
            {
                "name": "foil",
                "text": foil,
                "detail": f"{prediction.p_foil:.2f}",
                "tone": "plain",
                "title": f"probability {prediction.p_foil:.4g} of the foil's first token",
            }
        )
    name = prediction.model.name
    chips.append(
        {
            "name": "model",
            "text": name if len(name) <= 24 else f"…{name[-23:]}",
            "detail": "",
            "tone": "plain",
            "title": f"{name}, revision {prediction.model.revision}, {prediction.model.dtype}",
        }
    )
    return chips


def _on_span() -> None:
    chosen = getattr(st.session_state.get("token-line"), "span", None)
    if not (isinstance(chosen, list | tuple) and len(chosen) == 2 and all(isinstance(n, int | float) for n in chosen)):
        return
    start, stop = int(chosen[0]), int(chosen[1])
    if 0 <= start < stop < 10_000:
        fact = state.view().fact
        spelled = "".join(st.session_state.get(_TEXTS, ())[start:stop]).strip()
        subject = spelled if spelled and spelled in fact.prompt else fact.subject
        state.change(fact=replace(fact, subject=subject, span=(start, stop), occurrence=None))


def verdict(prediction: Any) -> tuple[parts.Tone, list[str]]:
    """Whether the model knows the fact: the tone, and the sentences."""
    target, top = prediction.target.text.strip(), prediction.top[0]
    continuation = " ".join(prediction.continuation.split())
    short = continuation if len(continuation) <= _CONTINUATION else continuation[: _CONTINUATION - 1] + "…"
    goes_on = f" It goes on: “{short}”" if short else ""
    asked = prediction.query
    not_taught = (
        untaught(asked.query.prompt, asked.subject_text, asked.query.answer) if prediction.taught is False else ""
    )
    if prediction.model.name.startswith("random:"):
        return "warn", [
            _RANDOM,
            f"“{target}” has rank {prediction.rank} (p {prediction.p_target:.2f}); its first choice is"
            f" “{top.text.strip()}” (p {top.probability:.2f}).",
        ]
    if prediction.known is None:
        lines = [
            f"No answer was given, so the first choice, “{target}” (p {prediction.p_target:.2f}), is the target."
            + goes_on
        ]
        if prediction.taught is False:
            return "warn", [not_taught, *lines]
        return "plain", [*lines, _UNTOLD] if _untold(prediction) else lines
    if prediction.known and _untold(prediction):
        said = f"“{target}” is the model's first choice (p {prediction.p_target:.2f}).{goes_on}"
        return "plain", [said, _UNTOLD]
    if prediction.known and prediction.taught is not False:
        near = " So near 1 percentages saturate: compare log-odds." if prediction.p_target > 0.98 else ""
        return "good", [
            f"The model knows this: “{target}” is its first choice (p {prediction.p_target:.2f}).{goes_on}{near}"
        ]
    if prediction.known:
        return "warn", [not_taught, f"“{target}” is its first choice (p {prediction.p_target:.2f}).{goes_on}"]
    first = f"it expects “{top.text.strip()}” (p {top.probability:.2f}), and “{target}” has rank {prediction.rank}"
    if prediction.rank == 1:
        first = f"“{target}” begins like its first choice, but does not go on so"
    lines = [
        f"The model does not know this: {first}. Effects below are about an answer that it would not give.{goes_on}"
    ]
    return "warn", lines if prediction.taught is not False else [not_taught, *lines]


def _untold(prediction: Any) -> bool:
    """Whether the model is the bundled one, and nobody can tell what it was taught here."""
    return prediction.model.name == "bundled" and prediction.taught is None


def _way_out(fact: Query) -> str:
    """Where on the page a subject that was refused can be set right."""
    if fact.subject and fact.occurrence is None and fact.prompt.count(fact.subject) > 1:
        return "Its number goes into Options, top right; or click the subject's first and last token above."
    return "Or click the subject's first and last token above."


def _judgement(reading: runs.Reading) -> None:
    """The verdict and what else must be said, before any effect is drawn."""
    snapshot = reading.snapshot
    if reading.refusal is not None:
        parts.note(
            "warn",
            [messages.sentence(reading.refusal), _way_out(state.view().fact)],
            key="refusal",
        )
    if snapshot.state == "failed" and snapshot.error is not None:
        messages.show_error(snapshot.error)
        with st.container(horizontal=True):
            st.button("Try again", key="reading-again", on_click=runs.again, args=["reading"])
            if state.view().model.name != "bundled":
                st.button("Use the bundled model", key="use-bundled", on_click=model_drawer.use_bundled)
    elif snapshot.state == "done":
        tone, lines = verdict(snapshot.result)
        if state.view().model.edits:
            lines = [line.replace("The model", "The edited model", 1) for line in lines]
        warnings = list(dict.fromkeys(snapshot.result.warnings))
        parts.note("warn" if warnings and tone == "good" else tone, [*lines, *warnings], key="verdict")
