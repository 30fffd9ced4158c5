"""From a question to a result: the executor, the models, what a session watches, and what a run will cost.

A request is (experiment, query, spec) for a model. Requests that ship as stored examples are answered at once, without
any model; all others go through the one executor. A page draws snapshots; ``live`` draws it again while something runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import streamlit as st

from dashboard import messages, parts, stack, state
from dashboard.executor import Executor, Snapshot, Work
from dashboard.link import ModelChoice, View
from factscope import __version__
from factscope.errors import EditError, InputError, SubjectError
from factscope.queries import Query

Kind = Literal[
    "prediction", "attention_knockout", "logit_lens", "heads", "attribute_extraction", "attention_pattern",
    "causal_tracing", "counterfactual_patching", "subject_enrichment", "sub_updates", "edit_layers",
]  # fmt: skip
SPREAD = "spread"
"""The choice of device that lets accelerate spread a model over devices and disk."""
APPLY = "edit-apply"
"""The slot of an edit that is being computed: it goes on while the visitor looks at other things."""
OF_A = "-a"
"""How the slots of A's runs end, while something is compared with A."""
ASK_ABOVE_SECONDS = 20.0
POLL_SECONDS = 0.6
_PATIENCE_READING = 0.8  # the same for the answer itself, which everything else waits for
_MARKS_PER_TICK = 1500  # so many marks that are drawn again make the next tick wait one time longer
_MANY = 10  # jobs from which on pages ask half as often
_SHARE: dict[Kind, float] = {
    "prediction": 1.0,
    "attention_knockout": 0.04,
    "logit_lens": 0.2,
    "causal_tracing": 0.5,
    "counterfactual_patching": 0.1,
    "subject_enrichment": 0.3,
    "sub_updates": 1.0,
    "heads": 0.3,
    "attribute_extraction": 1.5,
    "attention_pattern": 1.0,
}
"""An intervention's part of a whole forward, until it is measured: a knockout recomputes one token, beside others, a
restored state the tokens behind it in ten samples."""
_SHARE_ALONE: dict[Kind, float] = {
    "prediction": 1.0,
    "attention_knockout": 0.25,
    "logit_lens": 1.0,
    "causal_tracing": 3.0,
    "counterfactual_patching": 0.5,
    "subject_enrichment": 0.6,
    "sub_updates": 1.0,
    "heads": 0.3,
    "attribute_extraction": 1.5,
    "attention_pattern": 1.0,
}
"""The same for models without the fast path."""
_PATIENCE = 0.35  # seconds that one run of the script may wait for quick results, so that nothing flickers
_UNDER_WAY = {"waiting", "running"}
_MARKS, _ASKED = "runs-marks", "runs-asked"
_WATCHED, _ARMED, _STARTED, _SPENT, _AGAIN = "runs-watched", "runs-armed", "runs-started", "runs-spent", "runs-again"


@st.cache_resource(show_spinner=False)
def executor() -> Executor:
    """The one executor of this process."""
    return Executor()


@st.cache_resource(show_spinner=False)
def registry() -> Any:
    """The models in memory."""
    from factscope.models.registry import ModelRegistry

    return ModelRegistry()


@dataclass(frozen=True)
class Visitor:
    """One browser session, as the executor knows it."""

    id: str
    executor: Executor


@st.cache_resource(scope="session", show_spinner=False, on_release=lambda visitor: visitor.executor.leave(visitor.id))
def _visitor() -> Visitor:
    return Visitor(uuid.uuid4().hex, executor())


@contextmanager
def use(
    choice: ModelChoice, tell: Callable[[str], None] = lambda stage: None, edits: Sequence[Any] = ()
) -> Iterator[Any]:
    """The chosen model, loaded if need be, for a ``with`` block; ``tell`` hears how far the loading is.

    Args:
        edits: those that the choice names, found by the visitor's script, since a run's thread knows no visitor.
    """
    from factscope.editors.edit import with_edits

    def progress(done: int, total: int, stage: str) -> None:
        tell(f"{stage}, {100 * done / total:.0f}%" if total else stage)

    device = {"device_map": "auto"} if choice.device == SPREAD else {"device": choice.device}
    with registry().use(
        choice.name, revision=choice.revision, dtype=choice.dtype, progress=progress, **device
    ) as model:
        yield with_edits(model, edits)


def begin() -> None:
    """Start of a run of the script: patience is fresh, nothing is watched yet; runs for another question stop now.

    An edit that is being computed goes on. A's runs stop when another A is pinned, B's when another B is asked.
    """
    view = state.view()
    asked = view.fact, view.model, view.a
    before = st.session_state.get(_ASKED, asked)
    if before[:2] != asked[:2]:
        executor().release_all(_visitor().id, but=lambda slot: slot.endswith(OF_A) or slot == APPLY)
    if before[2] != asked[2]:
        executor().release_all(_visitor().id, but=lambda slot: not slot.endswith(OF_A) or slot == APPLY)
    st.session_state[_ASKED] = asked
    st.session_state[_WATCHED] = {}
    st.session_state[_SPENT] = 0.0
    parts.begin(0)


def request(slot: str, kind: Kind, query: Query, spec: Any, *, model: ModelChoice | None = None) -> Snapshot:
    """The state of a run: stored, kept, under way or started now."""
    choice = model or state.view().model
    stored = _stored(kind, query, spec, choice)
    if stored is not None:
        executor().release(_visitor().id, slot)
        return Snapshot(key=_key(kind, query, spec, choice), state="done", result=stored)
    speeds = _speeds()
    try:
        edits = stack.edits(choice)
    except EditError as error:
        executor().release(_visitor().id, slot)
        return Snapshot(key=_key(kind, query, spec, choice), state="failed", error=error)

    def compute(handle: Any, progress: Any) -> Any:
        experiment = importlib.import_module(f"factscope.experiments.{kind}")
        result = experiment.run(handle, query, spec, progress=progress)
        if result.passes > 1:
            speeds[kind, handle.key] = result.seconds / result.passes
        return result

    work = Work(prepare=lambda tell: use(choice, tell, edits), compute=compute, label=kind)
    return do(slot, _key(kind, query, spec, choice), work)


def ask(
    slot: str, name: str, asked: Sequence[Any], compute: Callable[[Any, Any], Any], *, keep: bool = True
) -> Snapshot:
    """Any other computation on the session's model in its weight state.

    Args:
        asked: everything besides the model that decides the result.
        compute: called with the model and with ``progress``.
    """
    choice = state.view().model
    key = digest([name, asdict(choice), *asked])
    try:
        edits = stack.edits(choice)
    except EditError as error:
        return Snapshot(key=key, state="failed", error=error)
    return do(slot, key, Work(prepare=lambda tell: use(choice, tell, edits), compute=compute, label=name, keep=keep))


def look(slot: str) -> Snapshot | None:
    """What a slot shows, or None."""
    return executor().look(_visitor().id, slot)


def watch(slot: str, found: Snapshot) -> None:
    """Draw the page again while a slot's run, which another run of the script has started, is under way."""
    st.session_state.setdefault(_WATCHED, {})[slot] = found.state


def again(slot: str) -> None:
    """Let a slot's next request run although it failed or was cancelled."""
    st.session_state.setdefault(_AGAIN, set()).add(slot)


def do(slot: str, key: str, work: Work) -> Snapshot:
    """The state of any work, started now if it is not under way. Waits a moment, so that quick results come at once.

    An edit is none of them: its progress and its Cancel are what comes at once.
    """
    visitor = _visitor().id
    repeat = slot in st.session_state.get(_AGAIN, ())
    if repeat:
        st.session_state[_AGAIN].discard(slot)
    found = executor().submit(visitor, slot, key, work, again=repeat)
    left = (_PATIENCE_READING if slot == "reading" else _PATIENCE) - st.session_state.get(_SPENT, 0.0)
    if not found.finished and left > 0.01 and slot != APPLY:
        began = time.monotonic()
        found = executor().wait(visitor, slot, left) or found
        st.session_state[_SPENT] = st.session_state.get(_SPENT, 0.0) + time.monotonic() - began
    st.session_state.setdefault(_WATCHED, {})[slot] = found.state
    return found


def capabilities(choice: ModelChoice) -> dict[str, Any] | None:
    """What a model supports, if it is in memory."""
    from factscope.models.catalogue import inspect

    handle = loaded(choice)
    return None if handle is None else inspect(handle)


def loaded(choice: ModelChoice) -> Any | None:
    """A model without edits, if it is in memory."""
    from factscope.models.registry import ModelKey
    from factscope.models.sources import folder_state

    spread = choice.device == SPREAD
    key = ModelKey(
        name=choice.name,
        revision=choice.revision,
        dtype=choice.dtype,
        device="auto" if spread else choice.device,
        device_map="auto" if spread else None,
        state=folder_state(choice.name),
    )
    return registry().peek(key)


def peek(slot: str, kind: Kind, query: Query, spec: Any, *, model: ModelChoice | None = None) -> Any | None:
    """A stored or kept result, or what the slot shows of this request; None where it would have to be started.

    Results on edited weights are found only by whoever has the edits.
    """
    choice = model or state.view().model
    stored = _stored(kind, query, spec, choice)
    if stored is not None:
        return stored
    try:
        stack.edits(choice)
    except EditError:
        return None
    key = _key(kind, query, spec, choice)
    shown = executor().look(_visitor().id, slot)
    return shown if shown is not None and shown.key == key else executor().kept(key)


def cancel(slot: str) -> None:
    """Stop a slot's run; what it has is kept."""
    executor().cancel(_visitor().id, slot)


def release(slot: str) -> None:
    """Leave a slot's run."""
    executor().release(_visitor().id, slot)


@dataclass(frozen=True)
class Reading:
    """The question as the model reads it.

    Attributes:
        snapshot: the prediction's run.
        refusal: why the subject could not be used; the prediction is then that of the prompt alone.
    """

    snapshot: Snapshot
    refusal: InputError | None = None

    @property
    def prediction(self) -> Any | None:
        """The prediction, once it is there."""
        return self.snapshot.result if self.snapshot.state == "done" else None


def reading() -> Reading:
    """What the model predicts for the session's fact; with a subject that cannot be used, for the prompt alone."""
    return _reading(state.view(), "")


def reading_of_a() -> Reading | None:
    """The same for what is pinned as A; None where nothing is."""
    pinned = state.view().a
    return None if pinned is None else _reading(pinned, OF_A)


def _reading(view: View, side: str) -> Reading:
    from dashboard import requests

    fact, choice = view.fact, view.model
    found = request(f"reading{side}", "prediction", fact, requests.prediction(), model=choice)
    if isinstance(found.error, SubjectError) or (fact.span is not None and isinstance(found.error, InputError)):
        bare = replace(fact, subject=None, span=None, occurrence=None)
        return Reading(
            request(f"reading-bare{side}", "prediction", bare, requests.prediction(), model=choice), found.error
        )
    release(f"reading-bare{side}")
    return Reading(found)


@dataclass(frozen=True)
class Cost:
    """What a run will take: interventions and seconds, measured on this model where something was run already.

    Attributes:
        what: one of the passes. unasked: whether a short run may start by itself.
    """

    passes: int
    seconds: float
    what: str = "run"
    unasked: bool = True

    @property
    def asks(self) -> bool:
        """Whether it is so long that a person should start it."""
        return not self.unasked or self.seconds > ASK_ABOVE_SECONDS

    def words(self) -> str:
        """For the run bar: "96 runs, about 3 s"."""
        return f"{self.passes:,} {self.what}{'' if self.passes == 1 else 's'}, {duration(self.seconds)}"


def cost(kind: Kind, prediction: Any, passes: int, *, model: ModelChoice | None = None) -> Cost:
    """The cost of so many interventions, from what earlier ones took on this model, or the prediction's forwards."""
    per_pass = _speeds().get((kind, prediction.model.key))
    if per_pass is None:
        found = capabilities(model or state.view().model)
        fast = found is None or any(row["capability"] == "packed" and row["supported"] for row in found["rows"])
        per_pass = (_SHARE if fast else _SHARE_ALONE)[kind] * prediction.seconds / max(1, prediction.passes)
    return Cost(passes=passes, seconds=passes * per_pass)


@st.cache_resource(show_spinner=False)
def _speeds() -> dict[tuple[str, str], float]:
    """Seconds for one intervention, by experiment and model, as last measured."""
    return {}


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min"


def was_started(key: str) -> bool:
    """Whether the person clicked Run for this key."""
    return key in st.session_state.get(_STARTED, set())


def start(key: str) -> None:
    """Remember that the person clicked Run for this key."""
    st.session_state.setdefault(_STARTED, set()).add(key)


def key_of(kind: Kind, query: Query, spec: Any, *, model: ModelChoice | None = None) -> str:
    """The key under which a request runs for a model, the session's by default."""
    return _key(kind, query, spec, model or state.view().model)


def drawn(marks: int) -> None:
    """A figure of so many marks is drawn: heavy pages are drawn again less often."""
    st.session_state[_MARKS] = st.session_state.get(_MARKS, 0) + marks


def live(draw: Callable[[], None]) -> None:
    """Draw a page's body, and draw it again by itself while one of its runs is under way.

    One fragment per page. When the first run has begun, the last has ended, or the state of a run that the frame above
    shows has changed, the whole script runs once more.
    """
    armed = bool(st.session_state.get(_ARMED))
    pace = 2.0 if executor().under_way() > _MANY else 0.5 if _UNDER_WAY & set(_frame().values()) else 1.0
    pace += st.session_state.get(_MARKS, 0) / _MARKS_PER_TICK

    @st.fragment(run_every=pace * POLL_SECONDS if armed else None, key="page-body")
    def body() -> None:
        before = _frame()
        st.session_state[_SPENT] = 0.0
        st.session_state[_WATCHED] = dict(before)
        parts.begin(1000)
        st.session_state[_MARKS] = 0
        with messages.caught():
            reading()
            if _frame() != before and not _UNDER_WAY & set(_frame().values()):
                st.rerun()  # the frame first: it is about to grow, and would move the buttons that are drawn here
            draw()
        state.write_link()
        watched: dict[str, str] = st.session_state[_WATCHED]
        for slot in before:
            seen = executor().look(_visitor().id, slot)
            watched[slot] = watched[slot] if seen is None else seen.state
        pending = bool(_UNDER_WAY & set(watched.values()))
        if pending != armed or _frame() != before:
            st.session_state[_ARMED] = pending
            st.rerun()

    body()


def _frame() -> dict[str, str]:
    """The state of the runs that the frame shows, as far as this run of the script knows."""
    watched: dict[str, str] = st.session_state.get(_WATCHED, {})
    return {slot: seen for slot, seen in watched.items() if slot.startswith("reading")}


def _stored(kind: Kind, query: Query, spec: Any, choice: ModelChoice) -> Any | None:
    if choice != ModelChoice():
        return None
    from factscope.store import stored_result

    return stored_result(kind, query, spec)


def _key(kind: Kind, query: Query, spec: Any, choice: ModelChoice) -> str:
    from factscope.models.sources import folder_state

    weights = folder_state(choice.name)
    return digest([kind, asdict(query), repr(spec), asdict(choice), weights])


def digest(parts: Sequence[Any]) -> str:
    """A key of plain values."""
    text = json.dumps([__version__, *parts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
