"""Commands that ask how a fact is recalled: one for each experiment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from factscope.cli.options import (
    Control,
    Edges,
    ExtraTokens,
    Heads,
    InPlace,
    KnockoutChoice,
    MappingChoice,
    NoiseFacts,
    NoiseText,
    Positions,
    ProcedureChoice,
    Projection,
    ProjectionChoice,
    ReplaceSubject,
    Samples,
    Seeds,
    SeverDraws,
    SeverDrawsChoice,
    SeverOption,
    Site,
    SiteChoice,
    Sources,
    TargetPosition,
    TopK,
    TraceSiteChoice,
    TraceSiteOption,
    TraceWindow,
    Window,
)
from factscope.cli.query import Asked, on_a_query
from factscope.cli.reading import layer_number, names
from factscope.cli.running import run
from factscope.cli.telling import cut
from factscope.errors import SpecError


@on_a_query
def predict(
    asked: Asked,
    top_k: TopK = 10,
) -> None:
    """What the model predicts after the prompt, and whether it knows the answer."""

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import prediction

        return prediction.run(handle, asked.query, prediction.PredictionSpec(top_k=top_k), progress=progress)

    run("predict", compute, asked)


@on_a_query
def flow(
    asked: Asked,
    sources: Sources = None,
    target_position: TargetPosition = "last",
    window: Window = None,
    heads: Heads = None,
    edges: Edges = None,
    control: Control = 0,
) -> None:
    """Attention knockout: which tokens must be read, and in which layers."""
    chosen = {
        "sources": () if edges else names("--sources", sources) or _default_sources(asked.query.subject),
        "target_position": _position(target_position),
        "window": window,
        "heads": names("--heads", heads),
        "edges": tuple(edges or ()),
        "control": control,
        "seed": asked.seed,
    }
    if edges:
        _refuse_beside_edges(
            edges, sources=sources, window=window, heads=heads, control=control, target_position=target_position
        )

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import attention_knockout

        return attention_knockout.run(handle, asked.query, attention_knockout.KnockoutSpec(**chosen), progress=progress)

    run("flow", compute, asked)


@on_a_query
def lens(
    asked: Asked,
    site: Site = SiteChoice.block,
    projection: Projection = ProjectionChoice.normed,
    top_k: TopK = 10,
) -> None:
    """Hidden states and updates projected to tokens, for every layer and position."""

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import logit_lens

        spec = logit_lens.LensSpec(site=site.value, projection=projection.value, top_k=top_k)
        return logit_lens.run(handle, asked.query, spec, progress=progress)

    run("lens", compute, asked)


@on_a_query
def trace(
    asked: Asked,
    site: TraceSiteOption = TraceSiteChoice.hidden,
    window: TraceWindow = None,
    samples: Samples = 10,
    noise: NoiseText = "s3",
    noise_facts: NoiseFacts = None,
    replace: InPlace = False,
    replace_subject: ReplaceSubject = None,
    positions: Positions = "all",
    sever: SeverOption = None,
    sever_draws: SeverDraws = SeverDrawsChoice.fixed,
    extra_tokens: ExtraTokens = 0,
    seeds: Seeds = None,
) -> None:
    """Causal tracing: which restored states bring the answer back, once the subject is corrupted."""
    chosen: dict[str, Any] = {
        "site": site.value,
        "window": window,
        "samples": samples,
        "noise": noise,
        "noise_facts": None if noise_facts is None else str(noise_facts),
        "replace": replace,
        "replace_subject": replace_subject,
        "positions": names("--positions", positions),
        "sever": "none" if sever is None else sever.value,
        "sever_draws": sever_draws.value,
        "extra_tokens": extra_tokens,
        "seeds": _seeds(asked.seed, seeds),
    }

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import causal_tracing

        return causal_tracing.run(handle, asked.query, causal_tracing.TraceSpec(**chosen), progress=progress)

    run("trace", compute, asked)


@on_a_query
def enrich(
    asked: Asked,
    attributes: Annotated[
        str,
        typer.Option(
            "--attributes",
            help="A CSV file (subject, paragraphs), a folder of text, or bundled for the taught facts.",
        ),
    ] = "bundled",
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            help="Comma-separated: subject-first, subject-last, subject-after, last, mean-embedding, or one position"
            " such as 0. [default: all of these but single positions]",
        ),
    ] = None,
    kept: Annotated[int, typer.Option("--kept", help="m: how many tokens of each projection are counted.")] = 50,
    precision: Annotated[
        bool, typer.Option("--precision", help="Count as many tokens as there are attributes instead.")
    ] = False,
    others: Annotated[int, typer.Option("--others", help="Other subjects that are drawn, the null.")] = 10,
    knockout: Annotated[
        KnockoutChoice | None,
        typer.Option("--knockout", help="Cancel these updates at the subject first, around each layer."),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Layers cancelled together. [default: about a fifth of them]")
    ] = None,
    read_layer: Annotated[
        int | None, typer.Option("--read-layer", help="Whose output is read after a knockout. [default: 0.83 of them]")
    ] = None,
    sub_updates: Annotated[
        int | None,
        typer.Option("--sub-updates", help="Instead: what this layer's MLP neurons write at the subject."),
    ] = None,
    notebook: Annotated[bool, typer.Option("--notebook", help="As the paper's notebook does it.")] = False,
) -> None:
    """Subject enrichment: how many of the tokens that states speak for are attributes of the subject."""
    shared: dict[str, Any] = {
        "attributes": attributes, "kept": None if precision else kept, "others": others, "notebook": notebook,
        "seed": asked.seed,
    }  # fmt: skip
    named = names("--positions", positions)
    chosen: dict[str, Any] = {
        "knockout": None if knockout is None else knockout.value,
        "window": window,
        "read_layer": read_layer,
    }
    _refuse_unread(chosen, named, sub_updates)

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import subject_enrichment

        if sub_updates is not None:
            from factscope.experiments import sub_updates as neurons

            return neurons.run(
                handle, asked.query, neurons.SubUpdatesSpec(layer=sub_updates, **shared), progress=progress
            )
        where: dict[str, Any] = {"positions": named} if named else {}
        spec = subject_enrichment.EnrichmentSpec(**shared, **chosen, **where)
        return subject_enrichment.run(handle, asked.query, spec, progress=progress)

    run("enrich", compute, asked)


@on_a_query
def extract(
    asked: Asked,
    edges: Annotated[
        str, typer.Option("--edges", help="none, block:SET, keep:SET or block:all; sets as in flow, joined by +.")
    ] = "none",
    early: Annotated[
        str | None, typer.Option("--early", help="SET whose states are replaced by those of earlier layers.")
    ] = None,
    early_layers: Annotated[
        str | None, typer.Option("--early-layers", help="Which ones. [default: 0,1,5,10,20 of 48, scaled]")
    ] = None,
    procedure: Annotated[
        ProcedureChoice, typer.Option("--procedure", help="default, or notebook for that of the released code.")
    ] = ProcedureChoice.default,
) -> None:
    """Attribute extraction: the layers whose attention or MLP writes the answer at the read-out."""
    if early_layers is not None and early is None:
        raise SpecError(f"--early-layers {cut(early_layers)!r} stands without --early", "name the set of tokens")
    layers = tuple(layer_number("--early-layers", name) for name in names("--early-layers", early_layers))

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import attribute_extraction

        spec = attribute_extraction.ExtractionSpec(
            edges=edges, early=early or "", early_layers=layers or None, procedure=procedure.value
        )
        return attribute_extraction.run(handle, asked.query, spec, progress=progress)

    run("extract", compute, asked)


@on_a_query
def heads(
    asked: Asked,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="A row for every token that a head reads, instead of one a head.")
    ] = False,
    mapping: Annotated[
        MappingChoice,
        typer.Option("--mapping", help="Of the subject's input embedding, or of what attention reads at its end."),
    ] = MappingChoice.embedding,
    top_k: TopK = 10,
) -> None:
    """What every attention head adds to the answer, split exactly."""

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import heads

        spec = heads.HeadsSpec(top_k=top_k, mapping=mapping.value, by_source=by_source)
        return heads.run(handle, asked.query, spec, progress=progress)

    run("heads", compute, asked)


def _default_sources(subject: str | None) -> tuple[str, ...]:
    return ("last",) if subject is None else ("subject", "relation", "last")


def _position(text: str) -> int | None:
    if text.strip().lower() == "last":
        return None
    if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text):
        raise SpecError(
            f"--target-position {cut(text)!r} is neither 'last' nor a whole number", "name a position from 0"
        )
    return int(text)


def _seeds(seed: int, text: str | None) -> tuple[int, ...]:
    """Several seeds where they are given, else the one."""
    if text is None:
        return (seed,)
    if seed != 1:
        raise SpecError(f"--seed {seed} stands beside --seeds {cut(text)!r}", "give one or the other")
    found = names("--seeds", text)
    for name in found:
        if not re.fullmatch(r"[0-9]{1,10}", name):
            raise SpecError(f"--seeds {cut(name)!r} is not a whole number", "write for instance 1,2,3")
    return tuple(int(name) for name in found)


def _refuse_beside_edges(edges: Sequence[str], **others: object) -> None:
    """An edge names positions, layers and heads itself."""
    usual = {"control": 0, "target_position": "last"}
    for name, value in others.items():
        if value != usual.get(name):
            option = f"--{name.replace('_', '-')} {cut(str(value))!r}"
            raise SpecError(
                f"{option} stands beside --edges {cut(edges[0])!r}, which names its own positions, layers and heads",
                "give one or the other",
            )


def _refuse_unread(chosen: dict[str, Any], positions: tuple[str, ...], sub_updates: int | None) -> None:
    """Options of enrich that would change nothing."""
    for name in ("window", "read_layer"):
        if chosen["knockout"] is None and chosen[name] is not None:
            raise SpecError(
                f"--{name.replace('_', '-')} {chosen[name]} stands without --knockout", "name what is knocked out"
            )
    if positions and (chosen["knockout"] is not None or sub_updates is not None):
        other = "--knockout" if sub_updates is None else "--sub-updates"
        raise SpecError(
            f"--positions {cut(','.join(positions))!r} stands beside {other}, which reads subject-last",
            "leave one of them out",
        )
    if sub_updates is not None and chosen["knockout"] is not None:
        raise SpecError(
            f"--sub-updates {sub_updates} stands beside --knockout {chosen['knockout']}", "give one or the other"
        )
