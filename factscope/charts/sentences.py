"""Every figure in one sentence, computed from its numbers: the alternative for those who do not see it.

A peak is called a peak only if it beats its null: where a band of the random matched control is given, a change inside
it is said to be no larger than the control's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factscope.charts.text import TokenRow, change, layer_name, level, measured, probability, signed

NOTHING = "Nothing is computed yet."
NEGLIGIBLE = {"percent": 0.5, "log_odds": 0.005, "logit_difference": 0.005}
"""Smaller changes are not spoken of as an effect."""
_NAMES = {
    "subject": "the subject",
    "relation": "the relation",
    "last": "the last token itself",
    "special": "the special tokens",
}


def source_name(source: str) -> str:
    """A known set in words, a number as a position, anything else as given."""
    if source in _NAMES:
        return _NAMES[source]
    return f"position {source}" if source.isdigit() else source


def _so_far(done: int, total: int) -> str:
    return f"So far, {done} of {total} computed: " if done < total else ""


def _sentence(text: str) -> str:
    start = text[:1] if text.startswith("p(") else text[:1].upper()
    return start + text[1:] + ("" if text.endswith(".") else ".")


def knockout_curve(
    table: Any, total: int, *, answer: str, measure: str, band: Any = None, null: str = "random control"
) -> str:
    """The strongest effect of each source, against the control.

    Args:
        table: source, layer, value, p_base, p_knockout, without control rows; a missing value is not computed yet.
        total: cells of the finished curve.
        band: layer, low, high of a null of all sources; with ``of``, each source's random matched control; or None.
        null: its name.
    """
    known = table.dropna(subset=["value"])
    if known.empty:
        return NOTHING
    ranges: dict[str, dict[Any, tuple[float, float]]] = {}
    for row in [] if band is None else band.dropna().to_dict("records"):
        ranges.setdefault(row.get("of", ""), {})[row["layer"]] = (row["low"], row["high"])
    parts = []
    for source, rows in known.groupby("source", sort=False):
        bounds = ranges.get("", ranges.get(str(source), {}))
        alone = ranges and not bounds
        said = _effect(source_name(source), rows.to_dict("records"), bounds, answer, measure, null)
        parts.append(f"{said}, with no control to compare" if alone else said)
    drawn = "random matched positions" if null == "random control" else null
    ends = [
        f"between {change(min(low for low, _ in found.values()), measure)} and "
        f"{change(max(high for _, high in found.values()), measure)}{f' for {source_name(of)}' if of else ''}"
        for of, found in ranges.items()
    ]
    if ends:
        parts.append(f"{drawn}: {', '.join(ends)}")
    return _sentence(_so_far(len(known), total) + "; ".join(parts))


def _effect(
    name: str, rows: list[Any], bounds: dict[Any, tuple[float, float]], answer: str, measure: str, null: str
) -> str:
    """The largest change of one source, whether its null reaches that, and what else surpasses the null."""
    target = measured(answer, measure)
    largest = max(rows, key=lambda row: abs(row["value"]))
    if abs(largest["value"]) < NEGLIGIBLE[measure]:
        return f"blocking {name} changes {target} nowhere"
    verb = "lowers" if largest["value"] < 0 else "raises"
    if not _within(largest, bounds):
        return f"blocking {name} {verb} {target} most {_where(largest, measure)}"
    low, high = (change(bound, measure) for bound in bounds[largest["layer"]])
    said = (
        f"blocking {name} changes {target} by {change(largest['value'], measure)} at most, no more than the {null} does"
        f" there ({low} to {high})"
    )
    beyond = [row for row in rows if abs(row["value"]) >= NEGLIGIBLE[measure] and not _within(row, bounds)]
    if not beyond:
        return said
    best = max(beyond, key=lambda row: abs(row["value"]))
    return f"{said}; what surpasses it is largest {_where(best, measure)}"


def _within(row: Any, bounds: Mapping[Any, tuple[float, float]]) -> bool:
    """Whether the null reaches a value at its layer, 0 included."""
    low, high = bounds.get(row["layer"], (math.inf, -math.inf))
    return min(low, 0.0) <= row["value"] <= max(high, 0.0)


def _where(row: Any, measure: str) -> str:
    moved = f"{probability(row['p_base'])} to {probability(row['p_knockout'])}"
    return f"around layer {row['layer']}: {change(row['value'], measure)} (p {moved})"


def knockout_map(
    tokens: Sequence[TokenRow], layers: Sequence[int], grid: NDArray[np.float64], *, answer: str, measure: str
) -> str:
    """The cell that lowers the answer most, and the one that raises it most if any does."""
    done = int((~np.isnan(grid)).sum())
    if not done:
        return NOTHING
    rise = "; no single token raises it"
    t, j = np.unravel_index(np.nanargmin(grid), grid.shape)
    lowest = float(grid[t, j])
    if lowest > -NEGLIGIBLE[measure]:
        head = f"no single blocked token lowers {measured(answer, measure)}"
    else:
        token = tokens[int(t)]
        head = (
            f"blocking {token.display} (position {token.position}) around layer {layers[int(j)]} "
            f"lowers {measured(answer, measure)} most: {change(lowest, measure)}"
        )
    u, k = np.unravel_index(np.nanargmax(grid), grid.shape)
    highest = float(grid[u, k])
    if highest > NEGLIGIBLE[measure]:
        other = tokens[int(u)]
        where = f"{other.display} (position {other.position}) around layer {layers[int(k)]}"
        rise = f"; the largest rise is {change(highest, measure)}, {where}"
    return _sentence(f"{_so_far(done, grid.size)}{head}{rise}")


def lens_grid(
    tokens: Sequence[TokenRow],
    layers: Sequence[int],
    grid: NDArray[np.float64],
    labels: NDArray[Any],
    *,
    answer: str,
    value: str,
    token: str = "",
    unnamed: str = "",
) -> str:
    """What the read-out row says, from the first layer to the last.

    Args:
        token: display form of the answer's first token, where it is not the whole answer.
        unnamed: why no layer may be named but the last.
    """
    done = int((~np.isnan(grid)).sum())
    if not done:
        return NOTHING
    row = next((i for i, token in enumerate(tokens) if token.role == "last"), len(tokens) - 1)
    where = f"at {tokens[row].display} (position {tokens[row].position})"
    known = [j for j in range(len(layers)) if not math.isnan(grid[row, j])]
    start = _so_far(done, grid.size)
    if not known:
        return _sentence(f"{start}nothing yet {where}")
    last = known[-1]
    end = layer_name(layers[last])
    final = float(grid[row, last])
    place = [layer_name(layer) for layer in layers]
    if unnamed:
        said = {
            "entropy": f"the entropy is {final:.2f} nats at {end}",
            "rank": f"{answer} has rank {final:,.0f} at {end}",
            "answer": f"p({answer}) is {probability(final)} at {end}",
        }.get(value, f"the top token at {end} is {labels[row, last]} with probability {probability(final)}")
        return _sentence(f"{start}{where} {said}; no layer is named: {unnamed}")
    if value == "entropy":
        first = known[0]
        said = f"the entropy goes from {grid[row, first]:.2f} nats at {place[first]} to {final:.2f} nats at {end}"
    elif value == "rank":
        best = next((j for j in known if grid[row, j] == 1), None)
        reached = "never reaches rank 1" if best is None else f"reaches rank 1 first at {place[best]}"
        said = f"{answer} {reached} and ends at rank {final:,.0f} at {end}"
    elif value == "answer":
        half = next((j for j in known if grid[row, j] > 0.5), None)
        reached = "never exceeds 0.5" if half is None else f"first exceeds 0.5 at {place[half]}"
        said = f"p({answer}) {reached} and is {probability(final)} at {end}"
    else:
        top = [j for j in known if _bare(labels[row, j]) == _bare(token or answer)]
        appears = f"is first the top token at {place[top[0]]}" if top else "is never the top token"
        said = (
            f"{answer} {appears}; at {end} the top token is {labels[row, last]} with probability {probability(final)}"
        )
    return _sentence(f"{start}{where} {said}")


def _bare(label: str) -> str:
    return str(label).strip("\u00b7 ")


def layer_curves(data: Any, *, quantity: str, answer: str = "", unnamed: str = "") -> str:
    """Where each series starts and ends, and its best point if that lies between.

    Args:
        data: columns layer, series, value.
        answer: of which token, where all series are about one.
        unnamed: why no best point may be named.
    """
    known = data.dropna(subset=["value"])
    if known.empty:
        return NOTHING
    parts = [
        _course(series, rows.sort_values("layer").to_dict("records"), quantity, peak=not unnamed)
        for series, rows in known.groupby("series", sort=False)
    ]
    what = (
        {"probability": f"p({answer})", "rank": f"rank of {answer}", "entropy": "entropy"}[quantity]
        if answer
        else quantity
    )
    why = f"; no layer is named: {unnamed}" if unnamed else ""
    return _sentence(f"{what}: {'; '.join(parts)}{why}")


def _course(name: str, rows: list[Any], quantity: str, *, peak: bool) -> str:
    first, last = rows[0], rows[-1]
    ends = [f"{amount(row['value'], quantity)} at {layer_name(row['layer'])}" for row in (first, last)]
    best = (min if quantity == "rank" else max)(rows, key=lambda row: row["value"])
    between = quantity != "entropy" and best["value"] not in (first["value"], last["value"])
    word = "best" if quantity == "rank" else "highest"
    most = f", {word} {amount(best['value'], quantity)} at {layer_name(best['layer'])}" if between and peak else ""
    return f"{name} goes from {ends[0]} to {ends[1]}{most}"


def amount(value: float, quantity: str) -> str:
    """A value of a quantity in words."""
    if quantity == "rank":
        return f"rank {value:,.0f}"
    return f"{value:.2f} nats" if quantity == "entropy" else probability(float(value))


def top_tokens(data: Any, *, answer: str, is_answer: Mapping[int, bool]) -> str:
    """The first token, and where the answer stands."""
    if data.empty:
        return NOTHING
    first = data.sort_values("rank").iloc[0]
    head = f"the model's first choice is {first['display']} with probability {probability(float(first['probability']))}"
    found = [row for row in data.to_dict("records") if is_answer.get(int(row["rank"]))]
    if not answer:
        return _sentence(head)
    if not found:
        return _sentence(f"{head}; {answer} is not among the first {len(data)}")
    rank, p = int(found[0]["rank"]), float(found[0]["probability"])
    return (
        _sentence(f"{head}, the answer")
        if rank == 1
        else _sentence(f"{head}; {answer} is number {rank} with {probability(p)}")
    )


def before_after(p_base: float, p_knockout: float, log_odds: tuple[float, float], *, answer: str, n_layers: int) -> str:
    """Probability and log-odds of an answer before and after edges were cut together."""
    if math.isnan(p_knockout):
        return NOTHING
    moved = f"{signed(100 * (p_knockout - p_base) / p_base, 1)}%" if p_base > 0 else "from 0"
    before, after = (signed(value, 2) for value in log_odds)
    layers = "1 layer" if n_layers == 1 else f"{n_layers} layers"
    return (
        f"p({answer}) {p_base:.4g} \u2192 {p_knockout:.4g} ({moved}); log-odds {before} \u2192 {after} nats, cut in"
        f" {layers}."
    )


_RESTORED = {"hidden": "the state", "mlp": "MLP updates", "attention": "attention updates"}
_AT = {"hidden": "at", "mlp": "around", "attention": "around"}
LITTLE = {"probability": 0.01, "log_odds": 0.05, "logit_difference": 0.05}
"""Smaller effects are not spoken of."""


def trace_map(
    tokens: Sequence[TokenRow],
    layers: Sequence[int],
    grid: NDArray[np.float64],
    *,
    site: str,
    corrupted: float,
    clean: float,
    name: str,
    measure: str,
    doubts: Sequence[str],
    counterfactual: bool = False,
    reached: NDArray[np.bool_] | None = None,
    corrupted_tokens: Sequence[int] = (),
    carried_from: int = 0,
    written: Mapping[tuple[int, int], str] | None = None,
) -> str:
    """The place that gives back most, unless it is so by construction or may not be named.

    The read-out's own last states are all that is read out, so of states those before the read-out alone are named.

    Args:
        reached: which cells the null reaches; they are not named.
        corrupted_tokens: positions; where it is one alone, restoring it before layer ``carried_from`` undoes the
            corruption. Of several, the others stay corrupted, and nothing is so by construction.
        written: what an edit that is on writes, in words, by position and layer.
    """
    done = int((~np.isnan(grid)).sum())
    if not done:
        return NOTHING
    high, low = level(clean, measure), level(corrupted, measure)
    ends = f"{name} is {high} clean and {low} corrupted"
    does, verb = "gives back", "restoring"
    if counterfactual:
        ends, does, verb = f"{name} is {high} where the states come from and {low} here", "brings", "putting in"
    if doubts:
        return f"{_sentence(_so_far(done, grid.size) + ends)} No place is named: {_sentence(doubts[0])}"
    rows = [i for i, token in enumerate(tokens) if site != "hidden" or token.role != "last"]
    known = np.full(grid.shape, -np.inf)
    known[rows] = np.where(np.isnan(grid[rows]), -np.inf, grid[rows])
    grey = "" if reached is None else " Grey cells move it no more than the same on random weights does."
    if reached is not None:
        known[reached] = -np.inf
    t, j = np.unravel_index(np.argmax(known), grid.shape)
    best = float(known[t, j])
    where = " before the read-out" if site == "hidden" else ""
    if not best - corrupted > LITTLE[measure]:
        more = "anything" if reached is None else "more than random weights"
        return _sentence(f"{_so_far(done, grid.size)}{ends}; no place{where} {does} {more}") + grey
    token = tokens[int(t)]
    found = _sentence(
        f"{_so_far(done, grid.size)}{ends}; {verb} {_RESTORED[site]} of {token.display} (position {token.position}) "
        f"{_AT[site]} layer {layers[int(j)]} {does} most{where}: {level(best, measure)}"
    )
    edited = (written or {}).get((token.position, int(layers[int(j)])), "")
    found += f" {_sentence(f'That is where {edited}')}" if edited else ""
    if tuple(corrupted_tokens) != (token.position,) or layers[int(j)] >= carried_from:
        return found + grey
    built = f" That is so by construction: before layer {carried_from} the corrupted token alone differs."
    for i in (i for i, row in enumerate(tokens) if row.position in corrupted_tokens):
        known[i, [j for j, layer in enumerate(layers) if layer < carried_from]] = -np.inf
    t, j = np.unravel_index(np.argmax(known), grid.shape)
    if known[t, j] - corrupted > LITTLE[measure]:
        token = tokens[int(t)]
        place = f"{token.display} (position {token.position}) {_AT[site]} layer {layers[int(j)]}"
        built += f" Of the others, {place} {does} most: {level(float(known[t, j]), measure)}."
    return found + built + grey


def trace_roles(
    table: Any,
    *,
    clean: float,
    corrupted: float,
    name: str,
    measure: str,
    doubts: Sequence[str],
    carried_from: int = 0,
) -> str:
    """Where each role of token gives back most.

    Args:
        carried_from: restoring the subject's one token before this layer undoes the corruption; 0 where it has more.
        table: role, layer, value, and ``null``, whether the null reaches it; a missing value is not computed yet.
    """
    known = table.dropna(subset=["value"])
    if known.empty:
        return NOTHING
    ends = f"{name} is {level(clean, measure)} clean and {level(corrupted, measure)} corrupted"
    start = _so_far(len(known), len(table))
    if doubts:
        return f"{_sentence(start + ends)} No layer is named: {_sentence(doubts[0])}"
    parts = []
    for role, rows in known.groupby("role", sort=False):
        beyond = rows[~rows["null"]]
        if beyond.empty:
            continue
        best = beyond.loc[beyond["value"].idxmax()]
        if best["value"] - corrupted > LITTLE[measure]:
            built = ", by construction" if role.endswith("subject") and best["layer"] < carried_from else ""
            parts.append(f"{role} up to {level(float(best['value']), measure)} at layer {int(best['layer'])}{built}")
    return _sentence(f"{start}{ends}; mean restored by role: {', '.join(parts) or 'nothing anywhere'}")
