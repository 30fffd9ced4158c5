"""A and B: what is pinned, what differs, and every figure of a page as A | B | B - A.

A is a view that was pinned (``View.a``); B is what is asked now. Results are not kept with the view: A's runs have the
same keys as before, so they come from the store, or are computed again on a server that never saw them. A page names
its figures as ``Panel``s and asks ``show`` first; whatever a view holds, fact, model, weights, parameters, may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import figures, messages, model_drawer, panels, parts, picker, runs, stack, state
from dashboard.executor import Snapshot
from dashboard.link import View
from dashboard.runs import Kind
from factscope import charts, comparison
from factscope.charts import Figure, TokenRow
from factscope.columns import ROWS
from factscope.errors import SpecError
from factscope.queries import Query

ONLY_ROWS = 6
MOST_BARS = 12
MOST_ROWS = 24
"""Longer prompts keep the height of their figure."""
_LEGEND, _VALUE = 44, 46
_ON_PAGE = ("prompt", "subject", "answer")
_NAMES = {("model", "name"): "model", ("model", "edits"): "weights"}
_PAGES = {"fact": "", "model": ""}
"""Fields of a view whose own fields are named without them."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of a page, as it is asked for and drawn for any side.

    Attributes:
        name, heading, method: of the figure, its heading and its help card.
        slot: of its run. kind: the experiment. command: whose rows its table has. function: its public name.
        spec, passes: what is asked of the experiment, from a view and what the model predicts there.
        draw: the figure of one side; the view is B's, since A and B share how they are drawn. The text says why no
            place may be named, if none may.
        difference: the figure of both.
        height: of the drawing in pixels, or of one of its rows; None leaves it the figure's own.
        point: whether a click moves the cursor.
        places: whether the sentence names where an effect is largest, which it may only if the model knows the fact.
        located: the same of the difference, for which both models must know theirs.
        doubts: why a result's places may not be named although the model knows the fact.
        one_row: whether the result is one number for all layers, which meets the other side's whatever layers it cut.
        public: the spec as it may be shown to others.
        cost, far: as ``panels.run`` takes them.
    """

    name: str
    heading: str
    method: str
    slot: str
    kind: Kind
    command: str
    function: str
    spec: Callable[[View, Any], Any]
    passes: Callable[[View, Any], int]
    draw: Callable[[Any, View, str], Figure]
    difference: Callable[[Both, View], Figure]
    height: int | None = None
    row_height: int | None = None
    point: bool = True
    places: bool = True
    located: bool = True
    doubts: Callable[[Any], Sequence[str]] = lambda result: ()
    one_row: bool = False
    public: Callable[[Any], Any] = lambda spec: spec
    cost: Callable[[View, Any], runs.Cost] | None = None
    far: Callable[[Snapshot], str] | None = None


@dataclass(frozen=True)
class Side:
    """What one side asks of a panel."""

    view: View
    prediction: Any
    spec: Any

    @property
    def query(self) -> Query:
        """The question as the model could read it."""
        return self.prediction.query.query

    @property
    def asked(self) -> tuple[Any, ...]:
        """Everything that decides the result."""
        return self.query, self.view.model, self.spec


@dataclass(frozen=True, eq=False)
class Both:
    """Two results and the rows that they share.

    Attributes:
        table: as ``comparison.join`` gives it; positions are numbers of ``pairs``.
        pairs: tokens of A with those of B that play their part.
    """

    a: Any
    b: Any
    table: Any
    pairs: tuple[comparison.Pair, ...]

    @property
    def answer(self) -> str:
        """The answer's name, if both have the same."""
        names = {figures.scored(result).strip() for result in (self.a, self.b)}
        return names.pop() if len(names) == 1 else "the answer"

    def map(self, measure: str, rows: str, *, quantity: Any, what: str, axis_title: str = "layer") -> Figure:
        """The difference of a measure for tokens by layers.

        Args:
            rows: the axis that holds positions.
        """
        kept = [i for i, pair in enumerate(self.pairs) if pair.a is not None and pair.b is not None]
        layers = [layer for layer in self.b.layers if layer in set(self.a.layers)]
        found = self.table.drop_duplicates([rows, "layer"]).set_index([rows, "layer"])
        at = figures.cursor_in(self.b.query, layers)
        wanted = pd.MultiIndex.from_product([kept, layers])
        a, b = (
            found[f"{measure}_{side}"].reindex(wanted).to_numpy(dtype=float).reshape(len(kept), len(layers))
            for side in ("a", "b")
        )
        return charts.difference_map(
            [self._row(self.pairs[i]) for i in kept],
            layers,
            a,
            b,
            quantity=quantity,
            what=what,
            axis_title=axis_title,
            theme=figures.theme(),
            caption=self.caption,
            cursor=None if at is None else (at.layer, at.position),
        )

    def curves(self, measure: str, series: Any, *, quantity: Any, what: str, x_title: str = "layer") -> Figure:
        """The difference of a measure over layers.

        Args:
            series: names each row of the table; rows without a name are left out.
        """
        found = self.table.assign(series=series).dropna(subset=["series"])
        data = found.rename(columns={f"{measure}_a": "a", f"{measure}_b": "b"})[["layer", "series", "a", "b"]]
        return self.lines(data, quantity=quantity, what=what, x_title=x_title)

    def lines(self, data: pd.DataFrame, *, quantity: Any, what: str, x_title: str = "layer", **more: Any) -> Figure:
        """The difference of curves.

        Args:
            data, more: as ``charts.difference_curves`` takes them.
        """
        cursor = state.view().cursor
        return charts.difference_curves(
            data,
            quantity=quantity,
            what=what,
            x_title=x_title,
            theme=figures.theme(),
            caption=self.caption,
            cursor_layer=None if cursor is None else cursor.layer,
            **more,
        )

    def bars(self, measure: str, name: str, *, what: str) -> Figure:
        """The difference of a probability for each row, in the order of B, then what only A has."""
        sides = {side: self.table[f"{measure}_{side}"].astype(float) for side in ("a", "b")}
        tokens = {t.text: t.display for result in (self.a, self.b) for t in result.top}
        data: Any = pd.DataFrame({"token": [tokens[text] for text in self.table[name]], **sides})
        return charts.difference_bars(
            data.sort_values(["b", "a"], ascending=False, na_position="last").head(MOST_BARS),
            what=what,
            theme=figures.theme(),
            caption=self.caption,
        )

    def _row(self, pair: comparison.Pair) -> TokenRow:
        """A row of the difference: both tokens where they differ, clicked as B's."""
        a, b = self.a.query.tokens[pair.a], self.b.query.tokens[pair.b]
        row = charts.token_rows([b])[0]
        display = row.display if a.display == b.display else f"{charts.token_rows([a])[0].display} | {row.display}"
        place = str(b.position) if a.position == b.position else f"{a.position}|{b.position}"
        return dataclasses.replace(row, display=display, place=place)

    @property
    def caption(self) -> str:
        """Where both come from."""
        said = [
            f"{name}: {line}" for name, r in (("A", self.a), ("B", self.b)) for line in figures.caption(r).splitlines()
        ]
        return "\n".join(said)

    @property
    def left_out(self) -> list[str]:
        """Which tokens have no partner, and how the others were matched; nothing for equal prompts."""
        if all(pair.a == pair.b for pair in self.pairs):
            return []
        said = ["Rows are matched by role, subject-last with subject-last."]
        for name, result, alone in (
            ("A", self.a, [p.a for p in self.pairs if p.b is None and p.a is not None]),
            ("B", self.b, [p.b for p in self.pairs if p.a is None and p.b is not None]),
        ):
            shown = [f"{result.query.tokens[position].display} ({position})" for position in alone[:ONLY_ROWS]]
            more = f" and {len(alone) - ONLY_ROWS} more" if len(alone) > ONLY_ROWS else ""
            said += [f"Only in {name}: {', '.join(shown)}{more}."] if alone else []
        return [" ".join(said)]


def both(command: str, a: Any, b: Any, *, one_row: bool = False) -> Both:
    """Two results of one command, their rows joined, tokens matched by role.

    Args:
        one_row: each has one row, whatever its layer.

    Raises:
        SpecError: they share no row.
    """
    pairs = comparison.align(a.query.tokens, b.query.tokens, a.query.subject, b.query.subject)
    rows = ROWS[command]
    tables = []
    for result, own in ((a, [pair.a for pair in pairs]), (b, [pair.b for pair in pairs])):
        table = result.table().assign(layer=0) if one_row else result.table()
        if rows.position:
            if "rank" in rows.axes:  # a cell's numbers stand in each of its rows, one for each token that it lists
                table = table[table["rank"] == 1].reset_index(drop=True)
            pair = {position: i for i, position in enumerate(own)}
            numbers = [at if isinstance(at, str) else pair[at] for at in table[rows.position].tolist()]
            table[rows.position] = pd.Series(numbers, dtype=object)
        tables.append(table)
    return Both(a=a, b=b, table=comparison.join(tables[0], tables[1], rows).table, pairs=pairs)


# ------------------------------------------------------------------------------------------------ what differs, said


def differing(a: View, b: View) -> list[tuple[str, str, str]]:
    """What A and B differ in: name, A's value, B's value. What only says how a result is drawn is no difference.

    The values of the fact are left out where both stand on the page anyway.
    """
    found = []
    for part in dataclasses.fields(View):
        left, right = getattr(a, part.name), getattr(b, part.name)
        if not dataclasses.is_dataclass(left) or part.name in ("a", "cursor") or left == right:
            continue
        for parameter in dataclasses.fields(left):
            values = getattr(left, parameter.name), getattr(right, parameter.name)
            if values[0] == values[1] or parameter.metadata.get("drawn"):
                continue
            prefix = _PAGES.get(part.name, f"{part.name.capitalize()} ")
            name = _NAMES.get((part.name, parameter.name), parameter.name)
            value = _weights if name == "weights" else _value
            shown = ("", "") if name in _ON_PAGE else (value(values[0]), value(values[1]))
            found.append((f"{prefix}{name}", *shown))
    return found


def _value(value: Any) -> str:
    if value is None:
        return "default"
    said = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return said if len(said) <= _VALUE else f"{said[: _VALUE - 1]}…"


def _weights(keys: tuple[str, ...]) -> str:
    """A weight state: "original", or the edits' words where they are still known."""
    if not keys:
        return "original"
    own, others = stack.mine(), stack.borrowed()
    found = [(own.find(key), others.get(key)) for key in keys]
    return _value(
        ", ".join(
            e.words if e is not None else stack.words(other) if other is not None else f"edit {key[:8]}"
            for key, (e, other) in zip(keys, found, strict=True)
        )
    )


def button() -> None:
    """Pin what is asked now as A; of edited weights, offer the original ones as A."""
    if state.view().a is None:
        if state.view().model.edits:
            st.button(
                "Compare",
                icon=":material/compare_arrows:",
                key="pin-original",
                type="tertiary",
                on_click=state.pin_original,
                help="Keep the original weights as A, and see original | edited | difference on every page.",
            )
            return
        st.button(
            "Pin as A",
            icon=":material/keep:",
            key="pin-as-a",
            type="tertiary",
            on_click=state.pin,
            help="Keep this fact, model and parameters as A; then change anything and see A | B | B − A on every page.",
        )


def banner() -> None:
    """What A is, what differs, and the way out; above every page while something is pinned."""
    view = state.view()
    if view.a is None:
        return
    found = differing(view.a, view)
    with st.container(key="ab-banner", horizontal=True, vertical_alignment="center", gap="small"):
        parts.note("plain", [f"A: {_what_a_is(view.a)}.  {_what_differs(found)}"], key="ab")
        if not found:
            _quick(view)
        else:
            st.button("Back to A", key="ab-back", type="tertiary", on_click=state.back_to_a)
        st.button("Unpin", key="ab-unpin", icon=":material/keep_off:", on_click=state.unpin)


def _what_a_is(a: View) -> str:
    reading = runs.reading_of_a()
    assert reading is not None
    who = a.model.name if len(a.model.name) <= _VALUE else f"…{a.model.name[1 - _VALUE :]}"
    who += f", {_weights(a.model.edits)} weights" if a.model.edits or state.view().model.edits else ""
    said = f"{a.fact.prompt} → {a.fact.answer or 'its own first choice'}, {who}"
    prediction, snapshot = reading.prediction, reading.snapshot
    if prediction is not None:
        p = f"p {prediction.p_target:.2f} #{prediction.rank}, weights {prediction.model.weights[:8]}"
        why = figures.no_peak(prediction)
        known = "" if why is None else f" ({why})"
        return f"{a.fact.prompt} → {prediction.target.text.strip()} ({p}), {who}{known}"
    if snapshot.error is not None:
        return f"{said}: {messages.sentence(snapshot.error)}"
    return f"{said}: asking …"


def _what_differs(found: Sequence[tuple[str, str, str]]) -> str:
    if not found:
        return "B is the same so far: change fact, model, control or parameters to see A | B | B − A."
    return "B differs in " + "; ".join(f"{name} ({a} | {b})" if a or b else name for name, a, b in found) + "."


def _quick(view: View) -> None:
    """The nulls, one click away: random weights, another subject."""
    if not view.model.name.startswith("random:") and model_drawer.may_be_random():
        st.button("Random weights", key="ab-random", type="tertiary", on_click=model_drawer.use_random)
    other = picker.other_subject(view.fact)
    if other is not None:
        st.button("Another subject", key="ab-subject", type="tertiary", on_click=state.ask, args=[other])


# ------------------------------------------------------------------------------------------------------- the figures


def show(page: Sequence[Panel], prediction: Any) -> bool:
    """Draw a page's figures as A | B | B - A.

    Returns:
        False where nothing is pinned, A has no answer yet, or A and B are the same on this page: draw it as usual.
    """
    view = state.view()
    reading = runs.reading_of_a()
    if view.a is None or reading is None or reading.prediction is None:
        return False
    rows = []
    for panel in page:
        sides = [
            Side(of, said, panel.spec(of, said)) for of, said in ((view.a, reading.prediction), (view, prediction))
        ]
        rows.append((panel, sides))
    if all(a.asked == b.asked for _, (a, b) in rows):
        return False
    for panel, sides in rows:
        with messages.caught():
            _row(panel, sides)
    return True


def _row(panel: Panel, sides: Sequence[Side]) -> None:
    columns = st.columns(3, gap="small")
    found: list[Snapshot | None] = []
    for column, name, ending, side in zip(columns[:2], "AB", (runs.OF_A, ""), sides, strict=True):
        with column:
            line = panels.heading(f"{panel.heading}: {name}{_state_of(side, sides)}", panel.method)
            passes = panel.passes(side.view, side.prediction)
            slot, model = f"{panel.slot}{ending}", side.view.model
            cost = None if panel.cost is None else panel.cost(side.view, side.prediction)
            found.append(
                panels.run(
                    line, slot, panel.kind, side.query, side.spec, passes, side.prediction, model=model, cost=cost,
                    far=panel.far,
                )
            )  # fmt: skip
    drawn = [
        None if seen is None or seen.value is None else _drawn(panel, seen.value, side)
        for seen, side in zip(found, sides, strict=True)
    ]
    if drawn[0] is not None and drawn[1] is not None:
        drawn = list(charts.lock(drawn[0], drawn[1]))
    for column, name, seen, shown, side in zip(columns[:2], "ab", found, drawn, sides, strict=True):
        if seen is not None and shown is not None:
            with column, messages.caught():
                same = side.query.prompt == state.view().fact.prompt
                code = panels.python_lines(side.query, panel.public(side.spec), panel.function, model=side.view.model)
                _figure(panel, name, shown, seen, code, point=panel.point and same)
    with columns[2], messages.caught():
        _difference(panel, sides, found)


def _state_of(side: Side, sides: Sequence[Side]) -> str:
    """In which weights a side is, where the two differ in that."""
    if len({one.view.model.edits for one in sides}) == 1:
        return ""
    return ", edited" if side.view.model.edits else ", original"


def _drawn(panel: Panel, result: Any, side: Side) -> Figure:
    """One side; its sentence names no place where the model does not know the fact."""
    why = figures.no_peak(side.prediction) or ""
    shown = panel.draw(result, state.view(), why)
    return figures.judged(shown, why) if panel.places else shown


def _located(panel: Panel, shown: Figure, sides: Sequence[Side], results: Sequence[Any]) -> Figure:
    """The difference; its sentence names no place where either model does not know its fact, or its result is in doubt.

    What is nothing in A differs from A by what it is in B. Where the two sides are one question to one model with other
    edits on, the side that does not give the answer is what the other is measured against: the difference is named.
    """
    if not panel.located:
        return shown
    found, untold = [], []
    for name, side, result in zip("AB", sides, results, strict=True):
        why = figures.no_peak(side.prediction)
        doubt = next(iter(panel.doubts(result)), "").rstrip(".")
        found += [f"in {name} {why or doubt[:1].lower() + doubt[1:]}"] if why or doubt else []
        untold += [name] if why and not figures.incomplete(result) else []
    if len(found) == len(untold) == 1 and _other_edits(sides):
        what = f"This is B \u2212 A under other edits; no place of {untold[0]} alone is named, since {found[0]}."
        return dataclasses.replace(shown, sentence=f"{shown.sentence} {what}")
    return figures.judged(shown, " and ".join(found))


def _other_edits(sides: Sequence[Side]) -> bool:
    """Whether both sides ask one model for the same answer to the same question, with other edits on."""
    a, b = sides
    bare = [dataclasses.replace(side.view.model, edits=()) for side in sides]
    asked = [(side.query.prompt, side.query.subject, side.query.answer, side.prediction.target.ids) for side in sides]
    return (
        bare[0] == bare[1]
        and a.view.model.edits != b.view.model.edits
        and a.query.answer is not None
        and asked[0] == asked[1]
    )


def _difference(panel: Panel, sides: Sequence[Side], found: Sequence[Snapshot | None]) -> None:
    panels.heading(f"{panel.heading}: B − A", "compare")
    seen = [snapshot for snapshot in found if snapshot is not None and snapshot.value is not None]
    if len(seen) < 2:
        parts.note("quiet", ["The difference comes with both sides."], key=f"difference-{panel.name}")
        return
    try:
        joined = both(panel.command, seen[0].value, seen[1].value, one_row=panel.one_row)
    except SpecError as error:
        running = not all(snapshot.finished for snapshot in seen)
        said = "Nothing is in both yet." if running else f"{error.what}."
        parts.note("quiet", [said], key=f"difference-{panel.name}")
        return
    finished = all(snapshot.finished for snapshot in seen)
    whole = Snapshot(key="".join(s.key[:5] for s in seen), state="done" if finished else "running")
    shown = _located(panel, panel.difference(joined, state.view()), sides, [snapshot.value for snapshot in seen])
    _figure(panel, "difference", shown, whole, _join_lines(panel, sides), point=panel.point)
    if joined.left_out and ROWS[panel.command].position:
        parts.note("quiet", joined.left_out, key=f"matched-{panel.name}")


def _figure(panel: Panel, name: str, shown: Figure, found: Snapshot, code: str, *, point: bool) -> None:
    rows = len(set(shown.data["row"])) if "row" in shown.data else 0
    height = panel.row_height * rows if panel.row_height and 2 <= rows <= MOST_ROWS else panel.height
    panels.figure(
        shown, name=f"{panel.name}-{name}", found=found, code=code, height=height, legend=_LEGEND, point=point
    )


def _join_lines(panel: Panel, sides: Sequence[Side]) -> str:
    """Both computations and their difference with the public interface."""
    lines = []
    for name, side in zip("ab", sides, strict=True):
        own = panels.python_lines(side.query, panel.public(side.spec), panel.function, model=side.view.model)
        lines.append(own.replace("result = ", f"{name} = ").replace("\nresult.table()", ""))
    table = "table().assign(layer=0)" if panel.one_row else "table()"
    joined = f'join(a.{table}, b.{table}, ROWS["{panel.command}"]).table'
    return "\n".join(
        [*lines, "", "from factscope.columns import ROWS", "from factscope.comparison import join", joined]
    )
