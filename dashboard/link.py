"""What a page address holds: the fact, the model, the cursor and the parameters of each page. Plain Python.

One value, ``View``, is everything that a link restores. ``to_params`` leaves out what has its default, so the address
of the home example is just "/". ``parse`` takes an address that anybody may have written: each value that cannot be
used is replaced by its default and gives one sentence.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from factscope.errors import LinkError
from factscope.queries import Bos, Query, Score

Measure = Literal["percent", "log_odds", "logit_difference"]
Null = Literal["positions", "weights"]
Site = Literal["block", "mlp", "attention"]
Projection = Literal["normed", "raw"]
CellValue = Literal["top1", "answer", "rank", "entropy"]
TraceSite = Literal["hidden", "mlp", "attention"]
Sever = Literal["none", "mlp", "attention"]
SeverDraws = Literal["fixed", "compat"]
TraceMeasure = Literal["probability", "log_odds", "logit_difference"]
Direction = Literal["into_query", "into_other"]
PatchMeasure = Literal["probability", "logit_difference"]
AttributeSource = Literal["bundled", "table", "texts"]
Effect = Literal["answer", "foil"]
MappingSource = Literal["embedding", "state"]
Method = Literal["rome", "memit", "ft"]
Problem = Literal["error-injection", "tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing"]
Preset = Literal["bundled", "rome", "memit", "hase-paper", "hase-code"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]

HOME = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower", answer="Paris")
MAX_PROMPT = 2000
MAX_NAME = 200
MAX_ADDRESS = 16_000
MAX_EDGES = 8
MAX_PINNED = 4
MAX_SAMPLES = 100
MAX_SEEDS = 10
MAX_EDITS = 12
MAX_SETTINGS = 20
EDITS, ORIGINAL = "edits", "original"
"""The name of the edits in an address; their value where it says that none is on."""
DRAWN: Mapping[str, bool] = {"drawn": True}
"""Metadata of a parameter that only says how a result is drawn: A and B share it, and do not differ in it."""
_KEY = re.compile("[0-9a-f]{16}")
OF_A = "a."
"""What the names of A's parameters begin with in an address."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model is asked: arguments of ``factscope.load``, and the keys of the edits that are on, in their order."""

    name: str = "bundled"
    revision: str | None = None
    dtype: Dtype = "float32"
    device: str = "auto"
    edits: tuple[str, ...] = ()

    @property
    def original(self) -> ModelChoice:
        """The same model without edits."""
        return replace(self, edits=())


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The cell that all pages point at; layer -1 is the embedding. ``head`` None: none was pointed at."""

    position: int
    layer: int
    head: int | None = None


@dataclass(frozen=True, kw_only=True)
class FlowChoice:
    """Parameters of the Flow page; ``window`` None is the default for the model's depth.

    ``null`` is what an effect must surpass: matched positions (``control`` draws), or the same on random weights.
    """

    sources: tuple[str, ...] = ("subject", "relation", "last")
    window: int | None = None
    measure: Measure = field(default="percent", metadata=DRAWN)
    control: int = 5
    null: Null = field(default="positions", metadata=DRAWN)
    seed: int = 1
    edges: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LensChoice:
    """Parameters of the Lens page; ``pinned`` are token ids."""

    site: Site = "block"
    projection: Projection = "normed"
    value: CellValue = field(default="top1", metadata=DRAWN)
    transpose: bool = field(default=False, metadata=DRAWN)
    pinned: tuple[int, ...] = field(default=(), metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class TraceChoice:
    """Parameters of the Trace page; ``window`` None is the default for the model's depth.

    Attributes:
        roles: of which panel the means by role are shown.
        other: the subject whose tokens take the subject's place, instead of noise.
        null: whether the same is done on random weights beside it; None does so for the bundled model, which is small.
    """

    window: int | None = None
    samples: int = 10
    noise: str = "s3"
    seeds: tuple[int, ...] = (1,)
    sever: Sever = "none"
    draws: SeverDraws = "fixed"
    replace: bool = False
    extra: int = 0
    other: str | None = None
    measure: TraceMeasure = field(default="probability", metadata=DRAWN)
    roles: TraceSite = field(default="hidden", metadata=DRAWN)
    null: bool | None = field(default=None, metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class PatchChoice:
    """Counterfactual patching on the Trace page: the second question, and which states go where.

    Attributes:
        prompt, subject, answer: of the second question; without prompt and subject nothing is run.
    """

    prompt: str | None = None
    subject: str | None = None
    answer: str | None = None
    direction: Direction = "into_query"
    site: TraceSite = "hidden"
    measure: PatchMeasure = field(default="logit_difference", metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class EnrichChoice:
    """Parameters of subject enrichment on the Lens page; None is the default for the model's depth.

    Attributes:
        source: where attributes come from; a file is not in the link and has to be given again.
        first: whether position 0 has a curve.
        null: as on the Trace page, of the attributes rate.
    """

    source: AttributeSource = "bundled"
    first: bool = False
    window: int | None = None
    read_layer: int | None = None
    notebook: bool = False
    null: bool | None = field(default=None, metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class HeadsChoice:
    """Parameters of the Heads page.

    Attributes:
        effect: on the answer, or on answer - foil.
        mapping: of the subject's input embedding, or of its last state.
        edges: the variant of attribute extraction.
        null: whether the same is done on random weights beside it; None does so for the bundled model, which is small.
    """

    effect: Effect = field(default="answer", metadata=DRAWN)
    mapping: MappingSource = "embedding"
    edges: str = "none"
    null: bool | None = field(default=None, metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class EditChoice:
    """What the Edit page is asked to do; nothing of it changes another page before it is applied.

    Attributes:
        preset: None is that of the model, or else the method's own.
        layers: which are edited; empty takes the preset's.
        target: the new answer, for error injection.
        settings: fields of the preset that were set otherwise, as "name=value".
    """

    method: Method = field(default="rome", metadata=DRAWN)
    problem: Problem = field(default="error-injection", metadata=DRAWN)
    preset: Preset | None = field(default=None, metadata=DRAWN)
    layers: tuple[int, ...] = field(default=(), metadata=DRAWN)
    target: str | None = field(default=None, metadata=DRAWN)
    settings: tuple[str, ...] = field(default=(), metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class LayersChoice:
    """Parameters of the Layers page that are not the Edit page's (the edit) or the Trace page's (noise and window).

    Attributes:
        site: what the trace restores.
        together: layers that are edited together; None takes one, for MEMIT the preset's number.
    """

    site: TraceSite = field(default="mlp", metadata=DRAWN)
    together: int | None = field(default=None, metadata=DRAWN)


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that a link restores, but for the page, which is the path.

    ``a`` is what was pinned to be compared with: a view of its own, without a cursor.
    """

    fact: Query = HOME
    model: ModelChoice = field(default_factory=ModelChoice)
    cursor: Cursor | None = None
    flow: FlowChoice = field(default_factory=FlowChoice)
    lens: LensChoice = field(default_factory=LensChoice)
    trace: TraceChoice = field(default_factory=TraceChoice)
    patch: PatchChoice = field(default_factory=PatchChoice)
    enrich: EnrichChoice = field(default_factory=EnrichChoice)
    heads: HeadsChoice = field(default_factory=HeadsChoice)
    edit: EditChoice = field(default_factory=EditChoice)
    layers: LayersChoice = field(default_factory=LayersChoice)
    a: View | None = None


Params = dict[str, list[str]]


def to_params(view: View) -> Params:
    """The address's parameters, without those that have their default."""
    fact, model, flow, lens = view.fact, view.model, view.flow, view.lens
    home = fact == HOME
    entries: list[tuple[str, object, object]] = [
        ("prompt", fact.prompt, fact.prompt if home else None),
        ("subject", fact.subject, fact.subject if home else None),
        ("answer", fact.answer, fact.answer if home else None),
        ("foil", fact.foil, None),
        ("occurrence", fact.occurrence, None),
        ("span", None if fact.span is None else f"{fact.span[0]}-{fact.span[1]}", None),
        ("bos", fact.bos, "auto"),
        ("score", fact.score, "token"),
        ("model", model.name, "bundled"),
        ("revision", model.revision, None),
        ("dtype", model.dtype, "float32"),
        ("device", model.device, "auto"),
        (EDITS, ",".join(model.edits), ""),
        ("cell", None if view.cursor is None else _cell_text(view.cursor), None),
        ("sources", ",".join(flow.sources), ",".join(FlowChoice().sources)),
        ("window", flow.window, None),
        ("measure", flow.measure, "percent"),
        ("control", flow.control, FlowChoice().control),
        ("null", flow.null, "positions"),
        ("seed", flow.seed, 1),
        ("site", lens.site, "block"),
        ("projection", lens.projection, "normed"),
        ("value", lens.value, "top1"),
        ("transpose", int(lens.transpose), 0),
        ("attributes", view.enrich.source, "bundled"),
        ("position0", int(view.enrich.first), 0),
        ("cancel", view.enrich.window, None),
        ("read", view.enrich.read_layer, None),
        ("notebook", int(view.enrich.notebook), 0),
        ("effect", view.heads.effect, "answer"),
        ("mapping", view.heads.mapping, "embedding"),
        ("variant", view.heads.edges, "none"),
        ("heads-null", None if view.heads.null is None else int(view.heads.null), None),
        ("enrich-null", None if view.enrich.null is None else int(view.enrich.null), None),
        ("layers-site", view.layers.site, "mlp"),
        ("edit-window", view.layers.together, None),
    ]
    params = {name: [str(value)] for name, value, default in entries if value is not None and value != default}
    if flow.edges:
        params["edge"] = list(flow.edges)
    if lens.pinned:
        params["pin"] = [str(token) for token in lens.pinned]
    params |= _trace_params(view.trace) | _patch_params(view.patch) | _edit_params(view.edit)
    if view.a is not None:
        params |= {"a": ["1"], **{f"{OF_A}{name}": values for name, values in to_params(view.a).items()}}
    return params


def _edit_params(edit: EditChoice) -> dict[str, list[str]]:
    default = EditChoice()
    entries: list[tuple[str, str | None, str | None]] = [
        ("method", edit.method, default.method),
        ("problem", edit.problem, default.problem),
        ("preset", edit.preset, None),
        ("layers", layers_text(edit.layers), ""),
        ("new-answer", edit.target, None),
    ]
    params = {name: [value] for name, value, usual in entries if value is not None and value != usual}
    return params | ({"set": list(edit.settings)} if edit.settings else {})


def _patch_params(patch: PatchChoice) -> dict[str, list[str]]:
    default = PatchChoice()
    entries: list[tuple[str, str | None, str | None]] = [
        ("cf-prompt", patch.prompt, None),
        ("cf-subject", patch.subject, None),
        ("cf-answer", patch.answer, None),
        ("cf-direction", patch.direction, default.direction),
        ("cf-site", patch.site, default.site),
        ("cf-measure", patch.measure, default.measure),
    ]
    return {name: [value] for name, value, usual in entries if value is not None and value != usual}


def _trace_params(trace: TraceChoice) -> dict[str, list[str]]:
    default = TraceChoice()
    entries: list[tuple[str, object, object]] = [
        ("trace-window", trace.window, None),
        ("samples", trace.samples, default.samples),
        ("noise", trace.noise, default.noise),
        ("seeds", ",".join(map(str, trace.seeds)), "1"),
        ("sever", trace.sever, default.sever),
        ("draws", trace.draws, default.draws),
        ("replace", int(trace.replace), 0),
        ("extra", trace.extra, 0),
        ("other", trace.other, None),
        ("trace-measure", trace.measure, default.measure),
        ("roles", trace.roles, default.roles),
        ("trace-null", None if trace.null is None else int(trace.null), None),
    ]
    return {name: [str(value)] for name, value, usual in entries if value is not None and value != usual}


def parse(params: Mapping[str, Sequence[str]]) -> tuple[View, list[LinkError]]:
    """Read an address.

    Returns:
        The view, and one error for each value that cannot be used, in the order of the address's own fields.
    """
    if sum(len(name) + sum(map(len, values)) for name, values in params.items()) > MAX_ADDRESS:
        return View(), [LinkError(f"the page address is longer than {MAX_ADDRESS:,} characters", "open a shorter link")]
    reader = _Reader(params)
    view = _view(reader)
    if reader.number("a", 0, 1, 0) == 1:
        of_a = _Reader(params, OF_A)
        view = replace(view, a=replace(_view(of_a), cursor=None))
        reader.errors += of_a.errors
    return view, reader.errors


def _view(reader: _Reader) -> View:
    """What one side of an address says."""
    flow, lens = FlowChoice(), LensChoice()
    return View(
        fact=_fact(reader),
        model=ModelChoice(
            name=reader.text("model", 1024) or "bundled",
            revision=reader.text("revision", MAX_NAME),
            dtype=reader.choice("dtype", get_args(Dtype), "float32"),
            device=reader.text("device", 40) or "auto",
            edits=reader.read(EDITS, _edits, (), f"up to {MAX_EDITS} keys of edits, parted by commas, or {ORIGINAL}"),
        ),
        cursor=reader.read("cell", _cell, None, "POSITION.LAYER or POSITION.LAYER.HEAD, for instance 4.2"),
        flow=FlowChoice(
            sources=reader.read("sources", _names, flow.sources, "sets such as subject,relation,last or positions 3-5"),
            window=reader.number("window", 1, 999, None),
            measure=reader.choice("measure", get_args(Measure), "percent"),
            control=reader.number("control", 0, 50, flow.control),
            null=reader.choice("null", get_args(Null), "positions"),
            seed=reader.number("seed", 0, 2**32 - 1, 1),
            edges=reader.texts("edge", MAX_EDGES, 120),
        ),
        lens=LensChoice(
            site=reader.choice("site", get_args(Site), "block"),
            projection=reader.choice("projection", get_args(Projection), "normed"),
            value=reader.choice("value", get_args(CellValue), "top1"),
            transpose=reader.number("transpose", 0, 1, 0) == 1,
            pinned=tuple(dict.fromkeys(reader.numbers("pin", MAX_PINNED, 10_000_000))) or lens.pinned,
        ),
        enrich=EnrichChoice(
            source=reader.choice("attributes", get_args(AttributeSource), "bundled"),
            first=reader.number("position0", 0, 1, 0) == 1,
            window=reader.number("cancel", 1, 999, None),
            read_layer=reader.number("read", 0, 998, None),
            notebook=reader.number("notebook", 0, 1, 0) == 1,
            null=reader.switch("enrich-null"),
        ),
        heads=HeadsChoice(
            effect=reader.choice("effect", get_args(Effect), "answer"),
            mapping=reader.choice("mapping", get_args(MappingSource), "embedding"),
            edges=reader.text("variant", 120) or "none",
            null=reader.switch("heads-null"),
        ),
        trace=_trace(reader),
        edit=EditChoice(
            method=reader.choice("method", get_args(Method), "rome"),
            problem=reader.choice("problem", get_args(Problem), "error-injection"),
            preset=reader.choice("preset", get_args(Preset), None),
            layers=reader.read("layers", layers, (), "layers such as 5, 3-7 or 3,5"),
            target=reader.text("new-answer", MAX_NAME),
            settings=reader.texts("set", MAX_SETTINGS, 120),
        ),
        layers=LayersChoice(
            site=reader.choice("layers-site", get_args(TraceSite), "mlp"),
            together=reader.number("edit-window", 1, 999, None),
        ),
        patch=PatchChoice(
            prompt=reader.text("cf-prompt", MAX_PROMPT),
            subject=reader.text("cf-subject", MAX_NAME),
            answer=reader.text("cf-answer", MAX_NAME),
            direction=reader.choice("cf-direction", get_args(Direction), "into_query"),
            site=reader.choice("cf-site", get_args(TraceSite), "hidden"),
            measure=reader.choice("cf-measure", get_args(PatchMeasure), "logit_difference"),
        ),
    )


def _trace(reader: _Reader) -> TraceChoice:
    default = TraceChoice()
    return TraceChoice(
        window=reader.number("trace-window", 1, 999, None),
        samples=reader.number("samples", 1, MAX_SAMPLES, default.samples),
        noise=reader.text("noise", 40) or default.noise,
        seeds=reader.read("seeds", seeds, default.seeds, f"up to {MAX_SEEDS} different whole numbers such as 1,2,3"),
        sever=reader.choice("sever", get_args(Sever), default.sever),
        draws=reader.choice("draws", get_args(SeverDraws), default.draws),
        replace=reader.number("replace", 0, 1, 0) == 1,
        extra=reader.number("extra", 0, 999, 0),
        other=reader.text("other", MAX_NAME),
        measure=reader.choice("trace-measure", get_args(TraceMeasure), default.measure),
        roles=reader.choice("roles", get_args(TraceSite), default.roles),
        null=reader.switch("trace-null"),
    )


def _fact(reader: _Reader) -> Query:
    prompt = reader.text("prompt", MAX_PROMPT)
    if prompt is None:
        for name in ("subject", "answer", "occurrence"):
            value = reader.text(name, MAX_NAME)
            if value is not None:
                reader.refuse(name, value, "but has no prompt that can be used", "add prompt=")
        return replace(
            HOME,
            foil=reader.text("foil", MAX_NAME),
            bos=reader.choice("bos", get_args(Bos), "auto"),
            score=reader.choice("score", get_args(Score), "token"),
            span=reader.read("span", _span, None, "START-STOP in tokens, for instance 1-6"),
        )
    return Query(
        prompt=prompt,
        subject=reader.text("subject", MAX_NAME),
        answer=reader.text("answer", MAX_NAME),
        foil=reader.text("foil", MAX_NAME),
        occurrence=reader.number("occurrence", 1, 999, None),
        span=reader.read("span", _span, None, "START-STOP in tokens, for instance 1-6"),
        bos=reader.choice("bos", get_args(Bos), "auto"),
        score=reader.choice("score", get_args(Score), "token"),
    )


class _Reader:
    """Reads single values, and collects what cannot be used. All names begin with a prefix."""

    def __init__(self, params: Mapping[str, Sequence[str]], prefix: str = "") -> None:
        self._params, self._prefix = params, prefix
        self.errors: list[LinkError] = []

    def refuse(self, name: str, value: str, why: str, instead: str) -> None:
        shown = repr(value if len(value) <= 60 else value[:57] + "...")
        self.errors.append(LinkError(f"the address says {self._prefix}{name}={shown}, {why}", instead))

    def text(self, name: str, longest: int) -> str | None:
        found = self.texts(name, 1, longest)
        return found[0] if found else None

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        kept = []
        for value in list(self._params.get(f"{self._prefix}{name}", ()))[-most:]:
            if len(value) > longest:
                self.refuse(name, value, f"which has {len(value):,} characters", f"use at most {longest:,}")
            elif any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in value):
                self.refuse(name, value, "which holds characters that are not text", "remove them")
            elif value.strip():
                kept.append(value)
        return tuple(kept)

    def choice(self, name: str, options: tuple[Any, ...], default: Any) -> Any:
        value = self.text(name, 400)
        if value is None or value in options:
            return default if value is None else value
        self.refuse(name, value, "which is not a choice there", f"use {', '.join(map(str, options))}")
        return default

    def number(self, name: str, low: int, high: int, default: int | None) -> Any:
        value = self.text(name, 400)
        if value is None:
            return default
        number = _integer(value)
        if number is not None and low <= number <= high:
            return number
        self.refuse(name, value, f"which is not a whole number from {low} to {high}", "correct it or leave it out")
        return default

    def switch(self, name: str) -> bool | None:
        found = self.number(name, 0, 1, None)
        return None if found is None else found == 1

    def numbers(self, name: str, most: int, high: int) -> list[int]:
        found = []
        for value in self.texts(name, most, 400):
            number = _integer(value)
            if number is not None and 0 <= number <= high:
                found.append(number)
            else:
                self.refuse(
                    name, value, f"which is not a whole number from 0 to {high:,}", "correct it or leave it out"
                )
        return found

    def read(self, name: str, read: Callable[[str], Any], default: Any, form: str) -> Any:
        value = self.text(name, 400)
        if value is None:
            return default
        found = read(value)
        if found is not None:
            return found
        self.refuse(name, value, "which cannot be read", f"write {form}")
        return default


def _integer(text: str) -> int | None:
    digits = text.strip().removeprefix("-")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 12:
        return None
    return -int(digits) if text.strip().startswith("-") else int(digits)


def seeds(text: str) -> tuple[int, ...] | None:
    """The seeds in "1,2,3"; None where they cannot be used."""
    found = [_integer(part) for part in text.split(",") if part.strip()]
    usable = [seed for seed in found if seed is not None and 0 <= seed < 2**32]
    if len(usable) < len(found) or not 1 <= len(set(usable)) == len(usable) <= MAX_SEEDS:
        return None
    return tuple(usable)


def layers(text: str) -> tuple[int, ...] | None:
    """The layers in "5", "3-7" or "3,5-7"; none in an empty text; None where they cannot be read."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        low = _integer(first)
        high = _integer(last) if dash else low
        if low is None or high is None or not 0 <= low <= high < 1000:
            return None
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def layers_text(layers: Sequence[int]) -> str:
    """Layers as ``layers`` reads them: "3-5,7"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _span(text: str) -> tuple[int, int] | None:
    low, dash, high = text.partition("-")
    start, stop = _integer(low), _integer(high)
    return (start, stop) if dash and start is not None and stop is not None and 0 <= start < stop < 10_000 else None


def _cell(text: str) -> Cursor | None:
    left, dot, rest = text.partition(".")
    right, second, last = rest.partition(".")
    position, layer, head = _integer(left), _integer(right), _integer(last) if second else None
    if not dot or position is None or layer is None or not (0 <= position < 10_000 and -1 <= layer < 1000):
        return None
    if second and (head is None or not 0 <= head < 1000):
        return None
    return Cursor(position=position, layer=layer, head=head)


def _cell_text(cursor: Cursor) -> str:
    place = f"{cursor.position}.{cursor.layer}"
    return place if cursor.head is None else f"{place}.{cursor.head}"


def _edits(text: str) -> tuple[str, ...] | None:
    if text == ORIGINAL:
        return ()
    keys = tuple(dict.fromkeys(text.split(",")))
    return keys if len(keys) <= MAX_EDITS and all(_KEY.fullmatch(key) for key in keys) else None


def _names(text: str) -> tuple[str, ...] | None:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    return names if 1 <= len(names) <= 8 else None


def clamp(cursor: Cursor | None, n_positions: int, layers: Sequence[int]) -> Cursor | None:
    """The cursor moved into a grid, since a link may point outside; None for no cursor or no grid."""
    if cursor is None or n_positions < 1 or not layers:
        return None
    layer = min(layers, key=lambda known: (math.fabs(known - cursor.layer), known))
    return replace(cursor, position=min(cursor.position, n_positions - 1), layer=layer)
