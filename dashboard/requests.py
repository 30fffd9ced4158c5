"""What the pages ask of the experiments: one place, since the stored home example must answer exactly these."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

from dashboard.link import (
    HOME,
    Cursor,
    EditChoice,
    EnrichChoice,
    FlowChoice,
    HeadsChoice,
    LensChoice,
    PatchChoice,
    Sever,
    TraceChoice,
    TraceSite,
    View,
)
from factscope.editors import presets
from factscope.editors.second_moments import AUTO, IDENTITY
from factscope.errors import SpecError
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.experiments.attention_pattern import PatternSpec
from factscope.experiments.attribute_extraction import ExtractionSpec
from factscope.experiments.counterfactual_patching import CounterfactualSpec
from factscope.experiments.edit_evaluation import EvaluationSpec
from factscope.experiments.edit_layers import LayersSpec
from factscope.experiments.editing import EditingSpec
from factscope.experiments.heads import HeadsSpec
from factscope.experiments.logit_lens import LensSpec
from factscope.experiments.prediction import PredictionSpec
from factscope.experiments.sub_updates import SubUpdatesSpec
from factscope.experiments.subject_enrichment import POSITIONS, EnrichmentSpec, Sublayer
from factscope.experiments.traces import TraceSpec
from factscope.queries import Query
from factscope.settings import get_settings

BUNDLED = "bundled"
BUNDLED_LAYERS = 8
MAX_OWN = 4
MAX_WORDINGS = 12


def prediction() -> PredictionSpec:
    """The fact line and the Fact page."""
    return PredictionSpec()


def wording() -> PredictionSpec:
    """One paraphrase: probability and rank of the answer, no continuation."""
    return PredictionSpec(top_k=1, continuation_tokens=0)


def lens(choice: LensChoice | None = None) -> LensSpec:
    """The Lens page; with the defaults also the curve of the Fact page and the detail of a cell."""
    choice = choice or LensChoice()
    return LensSpec(site=choice.site, projection=choice.projection, pinned=choice.pinned)


def curve(choice: FlowChoice) -> KnockoutSpec:
    """The knockout curve with the random matched control of each set."""
    return KnockoutSpec(sources=choice.sources, window=choice.window, control=choice.control, seed=choice.seed)


def without_subject(choice: FlowChoice, found: Any) -> FlowChoice:
    """The choice as it can be asked of a prompt without a subject: no subject's sets, no control matched to them."""
    others = tuple(name for name in choice.sources if not name.startswith("subject"))
    if found.query.subject is not None or not others:
        return choice
    return replace(choice, sources=others, control=0)


def knockout_map(choice: FlowChoice) -> KnockoutSpec:
    """The map of one source token at a time."""
    return KnockoutSpec(sources=("each",), window=choice.window)


def edges(choice: FlowChoice) -> KnockoutSpec:
    """The edge builder's run."""
    return KnockoutSpec(sources=(), edges=choice.edges)


def trace(choice: TraceChoice, site: TraceSite) -> TraceSpec:
    """One panel of the Trace page. What is severed are updates behind a restored state, so that panel alone has it."""
    severed = choice.sever if site == "hidden" else "none"
    window = None if site == "hidden" else choice.window
    if choice.other:
        return TraceSpec(site=site, window=window, sever=severed, replace_subject=choice.other)
    return TraceSpec(
        site=site,
        window=window,
        samples=choice.samples,
        noise=choice.noise,
        replace=choice.replace,
        sever=severed,
        sever_draws=choice.draws if severed != "none" else "fixed",
        extra_tokens=choice.extra,
        seeds=choice.seeds,
    )


def severed(choice: TraceChoice, sever: Sever) -> TraceSpec:
    """One curve of the severed traces: the state of the subject's last token, restored in each layer."""
    return replace(trace(replace(choice, sever=sever), "hidden"), positions=("subject-last",))


def patching(choice: PatchChoice, window: int | None) -> CounterfactualSpec:
    """Counterfactual patching, whole map, with the window of the traces."""
    return CounterfactualSpec(
        prompt=choice.prompt,
        subject=choice.subject,
        answer=choice.answer,
        direction=choice.direction,
        site=choice.site,
        window=None if choice.site == "hidden" else window,
    )


def trace_passes(found: Any, choice: TraceChoice) -> int:
    """Interventions of one panel."""
    return map_passes(found) * (1 if choice.other else len(choice.seeds))


def trace_window(choice: TraceChoice, n_layers: int) -> int:
    """The window that the panels of updates use."""
    from factscope.experiments.causal_tracing import default_trace_window

    return choice.window if choice.window is not None else default_trace_window(n_layers)


def check_noise(choice: TraceChoice) -> None:
    """Refuse a rule once, before three panels do.

    Raises:
        SpecError: it cannot be read.
    """
    from factscope.interventions.noise import parse_rule

    if not choice.other:
        parse_rule(choice.noise)


def enrichment(choice: EnrichChoice, attributes: str) -> EnrichmentSpec:
    """The attributes rate by position."""
    positions = (*POSITIONS, "0") if choice.first else POSITIONS
    return EnrichmentSpec(attributes=attributes, positions=positions, notebook=choice.notebook)


def sublayer(choice: EnrichChoice, attributes: str, site: Sublayer) -> EnrichmentSpec:
    """The rate of the subject's last token when a sublayer's updates are cancelled."""
    return EnrichmentSpec(
        attributes=attributes, knockout=site, window=choice.window, read_layer=choice.read_layer,
        notebook=choice.notebook,
    )  # fmt: skip


def neurons(choice: EnrichChoice, attributes: str, layer: int) -> SubUpdatesSpec:
    """What the neurons of one MLP write."""
    return SubUpdatesSpec(layer=layer, attributes=attributes, notebook=choice.notebook)


def knockout_defaults(choice: EnrichChoice, n_layers: int) -> tuple[int, int]:
    """The window and the read layer that a sublayer knockout uses."""
    from factscope.experiments import subject_enrichment as method

    window = method.NOTEBOOK_WINDOW if choice.notebook else method.default_window(n_layers)
    read = method.default_read_layer(n_layers)
    return (
        window if choice.window is None else choice.window,
        read if choice.read_layer is None else choice.read_layer,
    )


def shareable(spec: EnrichmentSpec) -> EnrichmentSpec:
    """The spec with a name in place of where an uploaded file lies on the server."""
    if spec.attributes == BUNDLED:
        return spec
    return replace(spec, attributes="about.csv" if spec.attributes.endswith(".csv") else "texts")


def heads(choice: HeadsChoice) -> HeadsSpec:
    """The map of heads and the panel of one."""
    return HeadsSpec(mapping=choice.mapping)


def extraction(choice: HeadsChoice) -> ExtractionSpec:
    """The extraction events under the map."""
    return ExtractionSpec(edges=choice.edges)


def pattern(layer: int) -> PatternSpec:
    """Where the heads of the cursor's layer look."""
    return PatternSpec(layer=layer)


def with_null(choice: HeadsChoice | EnrichChoice | TraceChoice, model: str) -> bool:
    """Whether effects are compared with random weights; by themselves only where that costs little."""
    if model.startswith("random:"):
        return False
    return model == "bundled" if choice.null is None else choice.null


def heads_passes(found: Any) -> int:
    """Layers that are split, and the forward."""
    return found.model.n_layers + 1


def edge_of_head(layer: int, head: int, last: int) -> str:
    """The edge that leaves one head of the read-out nothing but the read-out itself to look at."""
    return f"last:0-{last - 1}:{layer}:{head}"


def lens_passes(found: Any) -> int:
    """Projections of a lens run: one a layer, and the embedding."""
    return found.model.n_layers + 1


def curve_passes(found: Any, choice: FlowChoice) -> int:
    """Interventions of the curve."""
    return len(choice.sources) * (1 + choice.control) * found.model.n_layers


def map_passes(found: Any) -> int:
    """Interventions of the map."""
    return len(found.query.ids) * found.model.n_layers


def editing(choice: EditChoice, info: Any, *, facts: str | None = None, probes: str | None = None) -> EditingSpec:
    """What Apply asks for.

    Args:
        info: of the model, which decides the preset.
        facts, probes: files with facts that are edited together, and with prompts of the visitor's own.

    Raises:
        SpecError: a setting cannot be read.
    """
    return EditingSpec(
        method=choice.method,
        problem=choice.problem,
        preset=preset_name(choice, info),
        layers=choice.layers,
        settings=tuple(_setting(choice, text) for text in choice.settings),
        new_answer=choice.target if choice.problem == INJECTION else None,
        facts=facts,
        evaluation=EvaluationSpec(probes=probes),
    )


INJECTION = "error-injection"


def preset_name(choice: EditChoice, info: Any) -> str:
    """The preset whose settings an edit has."""
    if choice.preset is not None:
        return choice.preset
    if presets.shape_of(info) == presets.BUNDLED and presets.BUNDLED in preset_names(choice.method):
        return presets.BUNDLED
    return "memit" if choice.method == "memit" else "rome"


def preset_names(method: str) -> list[str]:
    """The presets that have settings for a method."""
    return [name for name in presets.NAMES if any((s.preset, s.method) == (name, method) for s in presets.SETTINGS)]


def edit_settings(choice: EditChoice, info: Any) -> Any:
    """The settings of an edit, as the methods take them: the preset's, with what was set otherwise.

    Raises:
        SpecError: names what cannot be used.
    """
    changed = dict(_setting(choice, text) for text in choice.settings)
    return presets.preset(preset_name(choice, info), choice.method, choice.problem, info, choice.layers, **changed)


def layers(view: View, info: Any) -> LayersSpec:
    """The edit of the Edit page at every layer, beside the trace of the Trace page.

    An edit's own noise and seed are those of its settings, so that it is the edit that Apply would make.

    Raises:
        SpecError: a setting cannot be read.
    """
    choice, trace = view.edit, view.trace
    own = edit_settings(replace(choice, layers=()), info)
    changed = dict(_setting(choice, text) for text in choice.settings)
    kept = {"noise": own.noise} if own.noise != trace.noise else {}
    kept |= {"seed": own.seed} if own.seed != trace.seeds[0] else {}
    return LayersSpec(
        method=choice.method,
        problem=choice.problem,
        preset=preset_name(choice, info),
        settings=tuple({**kept, **changed}.items()),
        new_answer=choice.target if choice.problem == INJECTION else None,
        edit_window=view.layers.together,
        site=view.layers.site,
        window=None if view.layers.site == "hidden" else trace.window,
        samples=trace.samples,
        noise=trace.noise,
        seed=trace.seeds[0],
    )


def _setting(choice: EditChoice, text: str) -> tuple[str, Any]:
    """A field of the settings and its value, read as the type that it has."""
    name, _, value = (part.strip() for part in text.partition("="))
    known = {field.name: field for field in fields(presets.METHODS[choice.method])}
    if name not in known or name in OF_THE_PAGE:
        raise SpecError(f"{name[:40]!r} is no setting of {choice.method}", f"choose among {', '.join(known)}")
    if name == "statistics" and value not in (AUTO, IDENTITY) and get_settings().models_allowed is not None:
        raise SpecError(f"statistics={value[:40]!r} is a file, and this server reads none", f"use {AUTO} or {IDENTITY}")
    return name, read_setting(name, value, str(known[name].type))


OF_THE_PAGE = ("preset", "layers", "problem")
"""Settings that have a field of their own."""


def read_setting(name: str, text: str, kind: str) -> Any:
    """A setting's value from its text.

    Args:
        kind: the type, as the settings declare it.

    Raises:
        SpecError: the text is no such value.
    """
    if "None" in kind and text.lower() in ("", "none"):
        return None
    if kind.startswith("bool"):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif kind.startswith(("int", "float")):
        try:
            return int(text) if kind.startswith("int") else float(text)
        except ValueError:
            pass
    else:
        return text
    raise SpecError(f"{name}={text[:40]!r} is no {kind.split(' ')[0]}", "correct the setting")


def home_enrichment(n_layers: int) -> list[tuple[str, Query, Any]]:
    """What the Lens page asks besides the lens: rates, both knockouts, and every MLP's neurons."""
    choice = EnrichChoice()
    return [
        ("subject_enrichment", HOME, enrichment(choice, BUNDLED)),
        ("subject_enrichment", HOME, sublayer(choice, BUNDLED, "mlp")),
        ("subject_enrichment", HOME, sublayer(choice, BUNDLED, "attention")),
        *(("sub_updates", HOME, neurons(choice, BUNDLED, layer)) for layer in range(n_layers)),
    ]


def home(wordings: tuple[str, ...] = (), n_layers: int = BUNDLED_LAYERS) -> list[tuple[str, Query, Any]]:
    """Every (experiment, query, spec) that the home example needs on all pages with their default parameters.

    Args:
        wordings: the home fact's paraphrases.
        n_layers: of the bundled model.
    """
    flow = FlowChoice()
    asked: list[tuple[str, Query, Any]] = [
        ("prediction", HOME, prediction()),
        ("logit_lens", HOME, lens()),
        ("attention_knockout", HOME, curve(flow)),
        ("attention_knockout", HOME, knockout_map(flow)),
        *(("causal_tracing", HOME, trace(TraceChoice(), site)) for site in get_args(TraceSite)),
        *(("causal_tracing", HOME, severed(TraceChoice(), sever)) for sever in get_args(Sever)),
        *home_enrichment(n_layers),
        ("heads", HOME, heads(HeadsChoice())),
        ("attribute_extraction", HOME, extraction(HeadsChoice())),
    ]
    return asked + [("prediction", Query(prompt=prompt, answer=HOME.answer), wording()) for prompt in wordings]


def window(choice: FlowChoice, n_layers: int) -> int:
    """The window that a run uses."""
    from factscope.interventions.attention import default_flow_window

    return choice.window if choice.window is not None else default_flow_window(n_layers)


def edge_from(cursor: Cursor, choice: FlowChoice, n_layers: int) -> str:
    """The edge that forbids the read-out to read the cursor's token around the cursor's layer."""
    from factscope.interventions.attention import window as layers_around

    layers = layers_around(max(0, cursor.layer), window(choice, n_layers), n_layers)
    return f"last:{cursor.position}:{layers[0]}-{layers[-1]}"
