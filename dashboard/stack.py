"""The edits of each visitor: his stack, on the server, while it runs. Plain Python but for what is of this session.

An edit is found by its key, which is made of all its numbers; the session's view says which keys are on (``ModelChoice.
edits``), so that runs, links and A/B treat the weight state as they treat the model. A key is worth something only to
the visitor whose stack holds the edit, or to whoever has a link whose owner lets it carry the edit. Weights are never
written: undoing an edit takes its changes away, and leaves those of later edits as they are.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from dashboard import visitors
from dashboard.link import MAX_EDITS, ModelChoice, View
from factscope.errors import EditError, LinkError

METHODS = {"rome": "ROME", "memit": "MEMIT", "ft": "FT"}
UNSEEN_SECONDS = 24 * 3600.0
"""A stack that was not looked at for so long gives its memory to others who need it."""
MANY, EMPTY_SECONDS = 1000, 3600.0
"""From so many stacks on, empty ones that were not looked at for so long are forgotten."""
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One edit in a stack.

    Attributes:
        number: in the order of the stack, from 1; it stays when earlier ones are undone.
        model: the model that it belongs to, without edits.
        evaluation: its probes before and after, where it was made here.
        shared: whether links carry it.
        made_with: numbers of the edits that were on when it was computed; None if they were not in the stack.
    """

    number: int
    edit: Any
    model: ModelChoice
    evaluation: Any = None
    shared: bool = False
    made_with: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The edit's key."""
        return self.edit.key

    @property
    def words(self) -> str:
        """For the badge: "ROME, layer 5"."""
        return words(self.edit)


def words(edit: Any) -> str:
    """An edit in two words: method and layers."""
    layers = edit.layers
    consecutive = len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1))
    named = f"{layers[0]}\u2013{layers[-1]}" if consecutive else ", ".join(map(str, layers))
    return f"{METHODS.get(edit.method, edit.method)}, layer{'s' if len(layers) > 1 else ''} {named}"


class Stack:
    """One visitor's edits.

    Args:
        visitor: his name. all_stacks: those of everybody.

    Attributes:
        asked: the edit that is being computed for him, so that a reload finds its run again. latest: its number.
        taken: the keys of those that were computed, by number.
    """

    def __init__(self, visitor: str, all_stacks: Stacks) -> None:
        self.visitor, self._all = visitor, all_stacks
        self._lock = threading.RLock()
        self._entries: tuple[Entry, ...] = ()
        self._on: dict[ModelChoice, tuple[str, ...]] = {}
        self._count = 0
        self.asked: Any = None
        self.latest: int | None = None
        self.taken: dict[int | None, str] = {}
        self.seen = time.monotonic()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Memory that the edits take."""
        return sum(entry.edit.n_bytes for entry in self._entries)

    def entries(self, model: ModelChoice | None = None) -> tuple[Entry, ...]:
        """All edits, or those of one model, in their order."""
        return tuple(entry for entry in self._entries if model is None or entry.model == model.original)

    def find(self, key: str) -> Entry | None:
        """The edit of a key."""
        return next((entry for entry in self._entries if entry.key == key), None)

    def refuse(self, n_bytes: int) -> None:
        """Refuse an edit before it is made, or taken.

        Raises:
            EditError: there is no room; says how much is taken.
        """
        if len(self._entries) >= MAX_EDITS:
            raise EditError(
                f"your stack has {len(self._entries)} edits, as many as one visitor may keep", "undo one first"
            )
        self._all.refuse(self, n_bytes)

    def push(self, edit: Any, model: ModelChoice, evaluation: Any = None) -> Entry:
        """Put an edit on top.

        Raises:
            EditError: it is there already, or there is no room.
        """
        with self._lock, self._all.lock:
            if (there := self.find(edit.key)) is not None:
                raise EditError(f"{edit} is edit {there.number} of your stack already", "switch it on there")
            self.refuse(edit.n_bytes)
            self._count += 1
            entry = Entry(number=self._count, edit=edit, model=model.original, evaluation=evaluation)
            entry = replace(entry, made_with=self._made_with(entry))
            self._entries = (*self._entries, entry)
            return entry

    def ask(self, make: Callable[[int], Any]) -> int:
        """Note what is to be computed; gives its number.

        Args:
            make: called with the number.

        Raises:
            EditError: something is being computed already; it goes on.
        """
        with self._lock:
            if self.asked is not None:
                raise EditError("an edit is being computed in another window", "wait for it or cancel it there")
            number = 1 if self.latest is None else self.latest + 1
            self.asked, self.latest = make(number), number
            return number

    def undo(self, key: str) -> None:
        """Take an edit away; the others stay as they are."""
        with self._lock:
            self._entries = tuple(entry for entry in self._entries if entry.key != key)
            self._on = {model: tuple(k for k in keys if k != key) for model, keys in self._on.items()}

    def share(self, key: str, shared: bool) -> None:
        """Let links carry an edit, or no longer."""
        with self._lock:
            self._entries = tuple(replace(e, shared=shared) if e.key == key else e for e in self._entries)

    def remember(self, model: ModelChoice) -> None:
        """Which edits of a model are on, for the visitor's next session."""
        with self._lock:
            self._on[model.original] = model.edits

    def on(self, model: ModelChoice) -> tuple[str, ...]:
        """Which edits of a model were on when it was last asked."""
        return tuple(key for key in self._on.get(model.original, ()) if self.find(key) is not None)

    def ordered(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Keys in the order of the stack, those of others behind them."""
        own = tuple(entry.key for entry in self._entries if entry.key in keys)
        return (*own, *(key for key in keys if key not in own))

    def made_with(self, entry: Entry) -> tuple[int, ...] | None:
        """Numbers of the edits that were on when an edit was computed, undone ones too; None if never here."""
        return self._made_with(entry) if entry.made_with is None else entry.made_with

    def _made_with(self, entry: Entry) -> tuple[int, ...] | None:
        from factscope.editors.edit import fingerprint

        others = [other for other in self.entries(entry.model) if other.key != entry.key]
        weights = entry.edit.model.weights
        for size in range(len(others) + 1):
            for some in itertools.combinations(others, size):
                if fingerprint(weights, [other.edit for other in some]) == entry.edit.computed_on:
                    return tuple(other.number for other in some)
        return None


class Stacks:
    """The stacks of all visitors.

    Args:
        each, in_all: bytes that the edits of one visitor, and of all, may take.
    """

    def __init__(self, *, each: int, in_all: int) -> None:
        self.lock = threading.RLock()
        self._each, self._in_all = each, in_all
        self._stacks: dict[str, Stack] = {}

    def of(self, visitor: str) -> Stack:
        """A visitor's stack."""
        with self.lock:
            found = self._stacks.get(visitor)
            if found is None:
                self._forget_empty()
                found = self._stacks[visitor] = Stack(visitor, self)
            found.seen = time.monotonic()
            return found

    def shared(self, key: str) -> Any | None:
        """The edit of a key that its owner lets links carry."""
        with self.lock:
            found = (stack.find(key) for stack in self._stacks.values())
            return next((entry.edit for entry in found if entry is not None and entry.shared), None)

    def refuse(self, stack: Stack, n_bytes: int) -> None:
        """Refuse more edits than there is memory for; stacks that nobody has looked at for long are forgotten first.

        Raises:
            EditError: says whose memory is full.
        """
        with self.lock:
            if stack.n_bytes + n_bytes > self._each:
                raise EditError(
                    f"this edit takes {n_bytes / _MIB:,.1f} MiB, and {stack.n_bytes / _MIB:,.1f} of the "
                    f"{self._each / _MIB:,.0f} MiB that one visitor may use are taken",
                    "undo an edit, or edit fewer layers",
                )
            if self._taken() + n_bytes > self._in_all:
                self._forget(UNSEEN_SECONDS, spared=stack)
            if self._taken() + n_bytes > self._in_all:
                raise EditError(
                    f"the edits of all visitors together take {self._taken() / _MIB:,.0f} MiB, as much as this server "
                    "keeps",
                    "save your edit with the command line, or try again later",
                )

    def _forget_empty(self) -> None:
        """Visitors who never edited do not fill the memory."""
        if len(self._stacks) > MANY:
            before = time.monotonic() - EMPTY_SECONDS
            self._stacks = {name: s for name, s in self._stacks.items() if len(s) or s.seen > before}

    def _forget(self, seconds: float, spared: Stack) -> None:
        before = time.monotonic() - seconds
        self._stacks = {name: s for name, s in self._stacks.items() if s is spared or s.seen > before}

    def _taken(self) -> int:
        return sum(stack.n_bytes for stack in self._stacks.values())


# --------------------------------------------------------------------------------------------------- of this session

_BORROWED = "stack-borrowed"


@st.cache_resource(show_spinner=False)
def stacks() -> Stacks:
    """The stacks of this process."""
    from factscope.settings import get_settings

    settings = get_settings()
    return Stacks(each=settings.edits_mib * _MIB, in_all=settings.edits_mib_in_all * _MIB)


def mine() -> Stack:
    """The stack of whoever looks at the page."""
    return stacks().of(visitors.name())


def borrowed() -> dict[str, Any]:
    """Edits that this session's link carried, by key."""
    return st.session_state.setdefault(_BORROWED, {})


def edits(model: ModelChoice) -> tuple[Any, ...]:
    """The edits that a choice of model names.

    Raises:
        EditError: one is not in the visitor's stack, and no link of this session carried it.
    """
    if not model.edits:
        return ()
    stack, others = mine(), borrowed()
    found = []
    for key in model.edits:
        entry = stack.find(key)
        edit = others.get(key) if entry is None else entry.edit
        if edit is None:
            raise EditError(f"the edit {key} is not in your stack", "load its file on the Edit page, or apply it again")
        found.append(edit)
    return tuple(found)


def described(weights: str, *choices: ModelChoice) -> str | None:
    """A weight state in words, if it is that of one of these choices with edits on."""
    return "; ".join(words(edit) for edit in edits_of(weights, *choices)) or None


def edits_of(weights: str, *choices: ModelChoice) -> tuple[Any, ...]:
    """The edits that are on in a weight state, if it is that of one of these choices."""
    from factscope.editors.edit import fingerprint

    for choice in choices:
        try:
            found = edits(choice)
        except EditError:
            continue
        if found and fingerprint(found[0].model.weights, found) == weights:
            return tuple(found)
    return ()


def settle(view: View, *, said: bool) -> tuple[View, list[LinkError]]:
    """A view as a session may begin with it: only edits that this visitor has, or that the link carries.

    Args:
        said: whether the address says which edits are on; if not, those that were on last stay on.
    """
    if not said:
        view = replace(view, model=replace(view.model, edits=mine().on(view.model)))
    model, errors = _settled(view.model)
    view = replace(view, model=model)
    if view.a is not None:
        of_a, more = _settled(view.a.model)
        view, errors = replace(view, a=replace(view.a, model=of_a)), errors + more
    return view, errors


def _settled(model: ModelChoice) -> tuple[ModelChoice, list[LinkError]]:
    stack, others = mine(), borrowed()
    missing = []
    for key in model.edits:
        if stack.find(key) is None:
            edit = stacks().shared(key)
            if edit is None:
                missing.append(key)
            else:
                others[key] = edit
    if not missing:
        return model, []
    count = "an edit" if len(missing) == 1 else f"{len(missing)} edits"
    return model.original, [
        LinkError(
            f"the address shows edited weights, with {count} that it does not carry and that your stack does not have "
            f"({', '.join(missing)}); these are the original weights",
            "ask the owner to let the link carry the edit, or load its file on the Edit page",
        )
    ]
