"""The command line: thin over the same ``run`` functions as the pages, so its numbers are the pages' numbers.

Exit status: 0 on success; 2 for input that cannot be used, with one line on standard error; 3 for a run that was
stopped; 1 for a defect of ours, with the traceback in a log file. The reference is docs/command-line.md.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from factscope import output
from factscope.columns import ROWS as COMPARABLE
from factscope.errors import Cancelled, FactScopeError, ModelTooLarge, SpecError

app = typer.Typer(
    name="factscope",
    help="See how a causal language model recalls a fact.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Format(StrEnum):
    """What standard output carries."""

    table = "table"
    json = "json"
    csv = "csv"


class Dtype(StrEnum):
    """Type of the weights and of the computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


class Choice(StrEnum):
    """Whether a beginning-of-sequence token is put first."""

    auto = "auto"
    yes = "yes"
    no = "no"


class ScoreChoice(StrEnum):
    """What of the answer is scored."""

    token = "token"
    sequence = "sequence"


class SiteChoice(StrEnum):
    """What the lens projects."""

    block = "block"
    mlp = "mlp"
    attention = "attention"


class ProjectionChoice(StrEnum):
    """How the lens projects it."""

    normed = "normed"
    raw = "raw"


class TraceSiteChoice(StrEnum):
    """What a causal trace restores."""

    hidden = "hidden"
    mlp = "mlp"
    attention = "attention"


class SeverChoice(StrEnum):
    """Whose updates stay corrupted at the restored position."""

    mlp = "mlp"
    attention = "attention"


class SeverDrawsChoice(StrEnum):
    """Which noise the restored run of a severed trace has."""

    fixed = "fixed"
    compat = "compat"


class ProcedureChoice(StrEnum):
    """How attribute extraction blocks edges."""

    default = "default"
    notebook = "notebook"


class FormChoice(StrEnum):
    """As what edits leave FactScope."""

    merged = "merged"
    peft = "peft"


class StoredChoice(StrEnum):
    """In which type a merged model is written."""

    loaded = "loaded"
    float32 = "float32"


class MappingChoice(StrEnum):
    """What the parameters of heads map to tokens."""

    embedding = "embedding"
    state = "state"


class MethodChoice(StrEnum):
    """How a fact is edited."""

    rome = "rome"
    memit = "memit"
    ft = "ft"


class ProblemChoice(StrEnum):
    """What an edit is to do."""

    error_injection = "error-injection"
    tracing_reversal = "tracing-reversal"
    fact_erasure = "fact-erasure"
    fact_amplification = "fact-amplification"
    fact_forcing = "fact-forcing"


class PresetChoice(StrEnum):
    """Whose settings an edit has."""

    bundled = "bundled"
    rome = "rome"
    memit = "memit"
    hase_paper = "hase-paper"
    hase_code = "hase-code"


class AveragingChoice(StrEnum):
    """Over which paraphrases and neighbours Hase's scores are taken."""

    mean = "mean"
    first = "first"


ModelName = Annotated[
    str, typer.Option("--model", help="bundled, a hub id, a folder, or random:NAME (same shape, random weights).")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
DtypeName = Annotated[Dtype, typer.Option("--dtype", help="Type of the weights; auto takes the checkpoint's.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
EditFiles = Annotated[
    list[Path] | None, typer.Option("--edit", help="A saved edit that is on during the run; repeatable, in order.")
]
Prompt = Annotated[str, typer.Option("--prompt", help="Text that ends right before the answer.")]
Subject = Annotated[str | None, typer.Option("--subject", help="The subject's text inside the prompt.")]
Occurrence = Annotated[int | None, typer.Option("--occurrence", help="Which occurrence of the subject, from 1.")]
Answer = Annotated[str | None, typer.Option("--answer", help="The attribute; without it the model's own top token.")]
Foil = Annotated[str | None, typer.Option("--foil", help="A competing answer, for predict and heads.")]
Scored = Annotated[ScoreChoice, typer.Option("--score", help="First token of the answer, or all of it.")]
BosChoice = Annotated[Choice, typer.Option("--bos", help="auto does as the tokenizer does.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of random draws.")]
OutputFormat = Annotated[Format, typer.Option("--format", help="What standard output carries.")]
Out = Annotated[Path | None, typer.Option("--out", help="A file instead: .json, .csv or .parquet.")]
TopK = Annotated[int, typer.Option("--top-k", help="How many tokens are listed.")]
Sources = Annotated[
    str | None,
    typer.Option(
        "--sources",
        help="Comma-separated: subject, relation, last, subject-last, special, positions such as 3-5; or each."
        " [default: subject,relation,last]",
    ),
]
TargetPosition = Annotated[str, typer.Option("--target-position", help="Who may not read them: last, or a position.")]
Window = Annotated[
    int | None, typer.Option("--window", help="Layers cut around each layer. [default: about a fifth of them]")
]
Heads = Annotated[str | None, typer.Option("--heads", help="Heads that are cut: 5.3,6.*; without it all.")]
Edges = Annotated[
    list[str] | None,
    typer.Option("--edges", help="FROM:TO:LAYERS[:HEADS], FROM may not read TO; repeatable, instead of sources."),
]
Control = Annotated[int, typer.Option("--control", help="Draws of random positions matched to each source.")]
Site = Annotated[SiteChoice, typer.Option("--site", help="Block output, or the update of the MLP or of the attention.")]
Projection = Annotated[ProjectionChoice, typer.Option("--projection", help="Through the final norm, or the raw state.")]


TraceSiteOption = Annotated[
    TraceSiteChoice, typer.Option("--site", help="A block's output, or the updates of its MLP or its attention.")
]
TraceWindow = Annotated[
    int | None, typer.Option("--window", help="Layers of updates restored together. [default: about a fifth of them]")
]
Samples = Annotated[int, typer.Option("--samples", help="Draws of noise, over which probabilities are averaged.")]
NoiseText = Annotated[
    str, typer.Option("--noise", help="0.1 (the sd), s3 (3 sd of subjects' embeddings), u0.1, m, t5, rome:gpt2-xl ...")
]
NoiseFacts = Annotated[
    Path | None, typer.Option("--noise-facts", help="Facts whose subjects set the scale. [default: the bundled ones]")
]
InPlace = Annotated[bool, typer.Option("--replace", help="Noise takes the embeddings' place instead of being added.")]
ReplaceSubject = Annotated[
    str | None, typer.Option("--replace-subject", help="Another subject of as many tokens, instead of noise.")
]
Positions = Annotated[
    str, typer.Option("--positions", help="Comma-separated: all, subject, subject-last, last, relation, 3-5 ...")
]
SeverOption = Annotated[
    SeverChoice | None, typer.Option("--sever", help="At the restored token, these updates stay corrupted.")
]
SeverDraws = Annotated[
    SeverDrawsChoice, typer.Option("--sever-draws", help="compat: the restored run has the stream's second draw.")
]
ExtraTokens = Annotated[int, typer.Option("--extra-tokens", help="Tokens after the subject that are corrupted too.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Several seeds instead of --seed: 1,2,3. Gives bands.")]

EditMethod = Annotated[MethodChoice, typer.Option("--method", help="How the fact is edited.")]
EditLayers = Annotated[
    str | None, typer.Option("--layers", help="Which are edited: 5, 3-7 or 3,5. [default: the preset's]")
]
NewAnswer = Annotated[
    str | None, typer.Option("--new-answer", help="What the model is to say instead; for error-injection alone.")
]
EditProblem = Annotated[ProblemChoice, typer.Option("--problem", help="What the edit is to do (Hase et al.).")]
EditPreset = Annotated[
    PresetChoice | None, typer.Option("--preset", help="Whose settings. [default: the model's own, or the method's]")
]
Statistics = Annotated[
    str | None,
    typer.Option("--statistics", help="Of keys: auto, identity, or a file. [default: the preset's, mostly auto]"),
]
ProbesFile = Annotated[
    Path | None, typer.Option("--probes", help="CSV or JSON with your own prompts: prompt, kind, answer.")
]
Averaged = Annotated[
    AveragingChoice,
    typer.Option("--averaging", help="Hase's scores over all paraphrases and neighbours, or the first."),
]


@app.callback()
def _commands() -> None:
    """See how a causal language model recalls a fact."""


@app.command()
def predict(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
    top_k: TopK = 10,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """What the model predicts after the prompt, and whether it knows the answer."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import prediction

        return prediction.run(handle, query, prediction.PredictionSpec(top_k=top_k), progress=progress)

    _run("predict", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command()
def flow(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
    sources: Sources = None,
    target_position: TargetPosition = "last",
    window: Window = None,
    heads: Heads = None,
    edges: Edges = None,
    control: Control = 0,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Attention knockout: which tokens must be read, and in which layers."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    chosen = {
        "sources": () if edges else _names("--sources", sources) or _default_sources(subject),
        "target_position": _position(target_position),
        "window": window,
        "heads": _names("--heads", heads),
        "edges": tuple(edges or ()),
        "control": control,
        "seed": seed,
    }
    if edges:
        _refuse_beside_edges(
            edges, sources=sources, window=window, heads=heads, control=control, target_position=target_position
        )

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import attention_knockout

        return attention_knockout.run(handle, query, attention_knockout.KnockoutSpec(**chosen), progress=progress)

    _run("flow", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command()
def lens(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
    site: Site = SiteChoice.block,
    projection: Projection = ProjectionChoice.normed,
    top_k: TopK = 10,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Hidden states and updates projected to tokens, for every layer and position."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import logit_lens

        spec = logit_lens.LensSpec(site=site.value, projection=projection.value, top_k=top_k)
        return logit_lens.run(handle, query, spec, progress=progress)

    _run("lens", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    a: Annotated[
        str, typer.Option("--a", help="A saved JSON output; with a COMMAND, the options that only A has.")
    ] = "",
    b: Annotated[str, typer.Option("--b", help="The same for B: --b '--model random:bundled'.")] = "",
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """The rows of A and B joined on their axes, and B - A.

    Two saved outputs of one command: compare --a A.json --b B.json. Or one command run twice: compare COMMAND
    [options of both] --b "options of B".
    """
    if out is not None:
        output.check_out(out)
    if not context.args:
        from factscope import comparison

        sides = [comparison.read(Path(_saved(name, given)), name) for name, given in (("--a", a), ("--b", b))]
        _compared(sides, format, out)
        return
    command = context.args[0]
    if command not in COMPARABLE:
        raise SpecError(f"{_cut(command)!r} is no command that can be compared", f"name one of {', '.join(COMPARABLE)}")
    sides, stopped = [], False
    kept = _Kept()
    for name, own in (("--a", a), ("--b", b)):
        try:
            _run_kept(kept, [command, *context.args[1:], *_options(name, own)])
        except Cancelled:
            if not sides or kept.data is None:
                raise
            stopped = True
        sides.append(kept.data)
    _compared(sides, format, out, stopped=stopped)


@app.command()
def trace(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
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
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    seeds: Seeds = None,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Causal tracing: which restored states bring the answer back, once the subject is corrupted."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    chosen: dict[str, Any] = {
        "site": site.value,
        "window": window,
        "samples": samples,
        "noise": noise,
        "noise_facts": None if noise_facts is None else str(noise_facts),
        "replace": replace,
        "replace_subject": replace_subject,
        "positions": _names("--positions", positions),
        "sever": "none" if sever is None else sever.value,
        "sever_draws": sever_draws.value,
        "extra_tokens": extra_tokens,
        "seeds": _seeds(seed, seeds),
    }

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import causal_tracing

        return causal_tracing.run(handle, query, causal_tracing.TraceSpec(**chosen), progress=progress)

    _run("trace", compute, _wanted(model, revision, dtype, device), edit, format, out)


class KnockoutChoice(StrEnum):
    """Which updates are cancelled."""

    mlp = "mlp"
    attention = "attention"


@app.command()
def enrich(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
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
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Subject enrichment: how many of the tokens that states speak for are attributes of the subject."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    shared: dict[str, Any] = {
        "attributes": attributes, "kept": None if precision else kept, "others": others, "notebook": notebook,
        "seed": seed,
    }  # fmt: skip
    named = _names("--positions", positions)
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

            return neurons.run(handle, query, neurons.SubUpdatesSpec(layer=sub_updates, **shared), progress=progress)
        where: dict[str, Any] = {"positions": named} if named else {}
        spec = subject_enrichment.EnrichmentSpec(**shared, **chosen, **where)
        return subject_enrichment.run(handle, query, spec, progress=progress)

    _run("enrich", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command()
def extract(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
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
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Attribute extraction: the layers whose attention or MLP writes the answer at the read-out."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    if early_layers is not None and early is None:
        raise SpecError(f"--early-layers {_cut(early_layers)!r} stands without --early", "name the set of tokens")
    layers = tuple(_layer_number("--early-layers", name) for name in _names("--early-layers", early_layers))

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import attribute_extraction

        spec = attribute_extraction.ExtractionSpec(
            edges=edges, early=early or "", early_layers=layers or None, procedure=procedure.value
        )
        return attribute_extraction.run(handle, query, spec, progress=progress)

    _run("extract", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command()
def heads(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="A row for every token that a head reads, instead of one a head.")
    ] = False,
    mapping: Annotated[
        MappingChoice,
        typer.Option("--mapping", help="Of the subject's input embedding, or of what attention reads at its end."),
    ] = MappingChoice.embedding,
    top_k: TopK = 10,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """What every attention head adds to the answer, split exactly."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import heads

        spec = heads.HeadsSpec(top_k=top_k, mapping=mapping.value, by_source=by_source)
        return heads.run(handle, query, spec, progress=progress)

    _run("heads", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command("edit")
def edit_fact(
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text that ends right before the answer; not needed with --facts.")
    ] = None,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
    method: EditMethod = MethodChoice.rome,
    layers: EditLayers = None,
    new_answer: NewAnswer = None,
    problem: EditProblem = ProblemChoice.error_injection,
    preset: EditPreset = None,
    statistics: Statistics = None,
    probes: ProbesFile = None,
    facts: Annotated[
        Path | None, typer.Option("--facts", help="A file of facts that are edited together, new_answer beside each.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Keep the edit in this .safetensors file, for --edit and export.")
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", help="Tokens of the continuation of every probe; 0 writes none.", min=0, max=1000)
    ] = 24,
    sampled: Annotated[
        bool, typer.Option("--sampled/--no-sampled", help="Sample texts: fluency, consistency, essence.")
    ] = True,
    references: Annotated[
        Path | None, typer.Option("--references", help="Reference texts for the consistency, parted by empty lines.")
    ] = None,
    averaging: Averaged = AveragingChoice.mean,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Edit a fact, or several, and ask before and after."""
    if prompt is None and facts is None:
        raise SpecError("neither --prompt nor --facts is given", "name the fact that is to be edited")
    query = None if prompt is None else _query(prompt, subject, occurrence, answer, foil, score, bos)
    _refuse_beside_facts(prompt, subject=subject, answer=answer, new_answer=new_answer, occurrence=occurrence)
    if save is not None:
        _check_save(save)
    asked: dict[str, Any] = {
        "texts": texts, "sampled": sampled, "averaging": averaging.value, "seed": seed,
        "probes": None if probes is None else str(probes),
        "references": None if references is None else str(references),
    }  # fmt: skip
    chosen: dict[str, Any] = {
        "method": method.value, "problem": problem.value, "preset": None if preset is None else preset.value,
        "layers": _layer_range("--layers", layers), "new_answer": new_answer,
        "facts": None if facts is None else str(facts),
        "settings": _settings(seed, statistics),
    }  # fmt: skip

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.editors.files import save_edit
        from factscope.experiments import editing

        spec = editing.EditingSpec(**chosen, evaluation=editing.EvaluationSpec(**asked))
        found = editing.run(handle, query, spec, progress=progress)
        if save is not None:
            save_edit(found.edits[0], save)
        return found

    _run("edit", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command("layers")
def edit_layers(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
    method: EditMethod = MethodChoice.rome,
    problem: EditProblem = ProblemChoice.error_injection,
    new_answer: NewAnswer = None,
    preset: EditPreset = None,
    statistics: Statistics = None,
    only: Annotated[str | None, typer.Option("--layers", help="Which are tried: 0-5 or 3,5. [default: all]")] = None,
    edit_window: Annotated[
        int | None, typer.Option("--edit-window", help="Layers edited together. [default: 1; for memit the preset's]")
    ] = None,
    site: Annotated[TraceSiteChoice, typer.Option("--site", help="What the trace restores.")] = TraceSiteChoice.mlp,
    window: TraceWindow = None,
    samples: Samples = 10,
    noise: NoiseText = "s3",
    probes: ProbesFile = None,
    averaging: Averaged = AveragingChoice.mean,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """The same edit at every layer, beside that layer's tracing effect."""
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    chosen: dict[str, Any] = {
        "method": method.value, "problem": problem.value, "preset": None if preset is None else preset.value,
        "new_answer": new_answer, "layers": _layer_range("--layers", only), "edit_window": edit_window,
        "site": site.value, "window": window, "samples": samples, "noise": noise, "averaging": averaging.value,
        "probes": None if probes is None else str(probes), "seed": seed,
        "settings": () if statistics is None else (("statistics", statistics),),
    }  # fmt: skip

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import edit_layers as by_layer

        return by_layer.run(handle, query, by_layer.LayersSpec(**chosen), progress=progress)

    _run("layers", compute, _wanted(model, revision, dtype, device), edit, format, out)


@app.command()
def models(
    model: Annotated[str | None, typer.Option("--model", help="Load this one and measure what it supports.")] = None,
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """What can be loaded, what each family supports and why not."""
    if model is None and revision is not None:
        raise SpecError(f"--revision {revision!r} stands without --model", "name the model that has it")
    if model is None and edit:
        raise SpecError(f"--edit {_cut(edit[0].name)!r} stands without --model", "name the model that it changes")
    if out is not None:
        output.check_out(out)
    with _Stop() as stop:
        import pandas as pd

        from factscope.models import catalogue

        wanted, edits = None if model is None else _wanted(model, revision, dtype, device), _edits(edit)
        data = catalogue.overview() if wanted is None else catalogue.inspect(_edited(_load(wanted, stop), edits))
    _emit({"schema": 1, "command": "models", **data}, pd.DataFrame(data["rows"]), format, out)


@app.command()
def export(
    edit: Annotated[list[Path], typer.Option("--edit", help="A saved edit; repeatable, in order.")],
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    form: Annotated[
        FormChoice, typer.Option("--as", help="The whole model with the edits in its weights, or a LoRA adapter.")
    ] = FormChoice.merged,
    stored: Annotated[
        StoredChoice, typer.Option("--stored", help="Type of a merged model's weights: as loaded, or float32.")
    ] = StoredChoice.loaded,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the model lies. [default: where it lay for the first edit]")
    ] = None,
    revision: Revision = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type in which it is loaded. [default: that of the first edit]")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write an edited model for other programs: merged into a new folder, or as a LoRA adapter for PEFT."""
    if form is FormChoice.peft and stored is not StoredChoice.loaded:
        raise SpecError(f"--stored {stored.value} stands beside --as peft, which is float32", "leave it out")
    with _Stop() as stop:
        from factscope.editors import export as files

        edits = _edits(edit)
        files.refuse_taken(to)
        chosen = dtype or Dtype(files.type_of(edits[0]))
        name, own = (model, None) if model is not None else files.where(edits[0])
        wanted = _wanted(name, revision or own, chosen, device)
        handle = _edited(_load(wanted, stop), edits)
        if form is FormChoice.peft:
            files.export_peft(handle, to)
            said: tuple[str, ...] = ()
        else:
            said = files.export_merged(handle, to, stored=stored.value)
    for warning in (*handle.warnings, *said):
        _say(f"warning: {warning}")
    count = f"{len(edits)} edit{'s' if len(edits) > 1 else ''}"
    done = f"{handle.info.name} with {count}, weights {handle.info.weights}, is in {to} ({form.value})"
    _print(f"{output.printable(done)}\n")


@app.command()
def statistics(
    layers: Annotated[str | None, typer.Option("--layers", help="Whose statistics: 5, 3-7 or 2,5.")] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Collect from this text file, or folder of .txt and .md files.")
    ] = None,
    texts: Annotated[
        int | None, typer.Option("--texts", help="Draw so many texts (paragraphs) from it. [default: all]")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what collecting would cost.")] = False,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Take over a file of ROME's or MEMIT's (.npz) for one layer.")
    ] = None,
    remove: Annotated[str | None, typer.Option("--remove", help="Remove what has this key.")] = None,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Second moments of MLP keys, which ROME and MEMIT need: lists, collects, takes over, removes.

    Without options it lists what was collected. A collection that is stopped goes on when it is asked for again.
    """
    _refuse_statistics(layers, text, texts, estimate, import_, remove)
    if out is not None:
        output.check_out(out)
    import pandas as pd

    from factscope.editors import collecting
    from factscope.editors.second_moments import stored

    rows: list[dict[str, Any]]
    if remove is not None:
        rows = [collecting.remove(remove).row()]
        _say(f"removed {rows[0]['key']}")
    elif text is None and import_ is None:
        rows = [entry.row() for entry in stored()]
    else:
        chosen = _layers("--layers", layers)
        with _Stop() as stop:
            if import_ is not None:
                handle = _load(_wanted(model, revision, dtype, device), stop)
                rows = [collecting.take_over(handle, import_, layer).row() for layer in chosen]
            else:
                assert text is not None
                corpus = collecting.read_corpus(text)
                handle = _load(_wanted(model, revision, dtype, device), stop)
                rows = _collect(handle, corpus, chosen, texts, seed, estimate, stop)
    _emit({"schema": 1, "command": "statistics", "rows": rows}, pd.DataFrame(rows), format, out)


def _collect(
    handle: Any, corpus: Any, layers: tuple[int, ...], texts: int | None, seed: int, estimate: bool, stop: _Stop
) -> list[dict[str, Any]]:
    """Say what it costs, and unless that is all that was asked, collect."""
    from factscope.editors import collecting

    cost = collecting.estimate(handle, corpus, layers, n_texts=texts, seed=seed)
    for warning in cost.warnings:
        _say(f"warning: {warning}")
    _say(cost.sentence)
    if estimate:
        return [cost.row()]

    def progress(done: int, total: int, partial: Any) -> None:
        _tell(f"statistics: {done}/{total}" if done < total else "")
        if done < total:
            stop.check()

    try:
        return [
            e.row() for e in collecting.collect(handle, corpus, layers, n_texts=texts, seed=seed, progress=progress)
        ]
    except Cancelled:
        raise Cancelled("the collection was cancelled; what was summed is kept", "ask again to go on with it") from None


@app.command()
def serve(
    port: Annotated[int, typer.Option("--port", help="Port of the dashboard.")] = 8501,
    address: Annotated[str, typer.Option("--address", help="Address to listen on.")] = "127.0.0.1",
    models_allowed: Annotated[
        str | None,
        typer.Option("--models-allowed", help="Comma-separated names; on any other address only these, no folders."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="Host name under which the page is reached; repeatable."),
    ] = None,
) -> None:
    """Start the dashboard with safe settings."""
    from factscope.application import application_root, server_command

    command, environment = server_command(
        port=port,
        address=address,
        models_allowed=_names("--models-allowed", models_allowed),
        allowed_hosts=tuple(allowed_host or ()),
    )
    where = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    _say(f"FactScope starts on http://{f'[{where}]' if ':' in where else where}:{port} (stop it with Ctrl-C)")
    os.chdir(application_root())
    os.execve(command[0], command, environment)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every failure becomes one line and an exit status.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _quieten_libraries()
    try:
        command = typer.main.get_command(app)
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            with command.make_context("factscope", list(given)) as context:
                command.invoke(context)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except FactScopeError as error:
        _fail(str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        _fail(str(Cancelled()), Cancelled.exit_status)
    except TyperException as error:
        _fail(_usage(error, given), 2)
    except BrokenPipeError:  # whoever reads standard output has enough
        _forget_standard_output()
        sys.exit(0)
    except Exception:
        _fail(f"FactScope has a defect; please report it with the traceback in {_log_defect()}.", 1)
    sys.exit(0)


# ------------------------------------------------------------------------------------------------- what was asked


def _default_sources(subject: str | None) -> tuple[str, ...]:
    return ("last",) if subject is None else ("subject", "relation", "last")


def _query(
    prompt: str,
    subject: str | None,
    occurrence: int | None,
    answer: str | None,
    foil: str | None,
    score: ScoreChoice,
    bos: Choice,
) -> Any:
    from factscope.queries import Query

    if occurrence is not None and subject is None:
        raise SpecError(f"--occurrence {occurrence} stands without --subject", "name the subject that occurs so often")
    return Query(
        prompt=prompt,
        subject=subject,
        answer=answer,
        foil=foil,
        occurrence=occurrence,
        bos=bos.value,
        score=score.value,
    )


def _names(option: str, text: str | None) -> tuple[str, ...]:
    """The parts of a comma-separated list; none where the option is not given."""
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not names:
        raise SpecError(f"{option} {_cut(text)!r} names nothing", "name at least one, or leave the option out")
    return names


def _layers(option: str, text: str | None) -> tuple[int, ...]:
    """Layers as they are typed: 5, 3-7, or several of these joined by commas."""
    if text is None:
        raise SpecError(f"{option} is missing", "name layers from 0, such as 5 or 3-7")
    found: list[int] = []
    for part in _names(option, text):
        ends = [_layer_number(option, end.strip()) for end in part.split("-", 1)]
        if ends[0] > ends[-1]:
            raise SpecError(f"{option} {_cut(part)!r} runs backwards", f"write {ends[-1]}-{ends[0]}")
        if ends[-1] - ends[0] > 10_000:
            raise SpecError(f"{option} {_cut(part)!r} names more layers than any model has", "name fewer")
        found += range(ends[0], ends[-1] + 1)
    return tuple(found)


def _refuse_statistics(
    layers: str | None, text: Path | None, texts: int | None, estimate: bool, import_: Path | None, remove: str | None
) -> None:
    """One thing at a time, and no option that would change nothing."""
    asked = {"--text": text, "--import": import_, "--remove": remove}
    given = [f"{name} {_cut(str(value))!r}" for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise SpecError(f"{given[0]} stands beside {given[1]}", "ask for one of them")
    if layers is not None and text is None and import_ is None:
        raise SpecError(f"--layers {_cut(layers)!r} stands without --text or --import", "name the text to collect from")
    if text is None and (texts is not None or estimate):
        named = "--estimate" if texts is None else f"--texts {texts}"
        raise SpecError(f"{named} stands without --text", "name the text to collect from")


def _layer_number(option: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise SpecError(f"{option} {_cut(text)!r} is not a whole number", "name layers from 0, such as 0,1,5")
    return int(text)


def _layer_range(option: str, text: str | None) -> tuple[int, ...]:
    """Layers of 5, 3-7 or 3,5-7; none where the option is not given."""
    found: list[int] = []
    for name in _names(option, text):
        first, dash, last = name.partition("-")
        ends = _layer_number(option, first), _layer_number(option, last if dash else first)
        if ends[0] > ends[1]:
            raise SpecError(f"{option} {_cut(name)!r} runs backwards", f"write {ends[1]}-{ends[0]}")
        if ends[1] - ends[0] >= 10_000:
            raise SpecError(f"{option} {_cut(name)!r} names too many layers", "name layers that the model has")
        found += range(ends[0], ends[1] + 1)
    return tuple(found)


def _settings(seed: int, statistics: str | None) -> tuple[tuple[str, Any], ...]:
    """What the options set otherwise than the preset."""
    given = (("seed", seed),)
    return given if statistics is None else (*given, ("statistics", statistics))


def _refuse_beside_facts(prompt: str | None, **others: object) -> None:
    """Without a prompt, what belongs to it says nothing."""
    for name, value in others.items():
        if prompt is None and value is not None:
            raise SpecError(
                f"--{name.replace('_', '-')} {_cut(str(value))!r} stands without --prompt",
                "give the prompt, or leave it",
            )


def _check_save(path: Path) -> None:
    """Refuse a file for the edit that could not be written, before anything is computed."""
    from factscope.editors.files import SUFFIX

    output.check_out(path, "--save", (SUFFIX,))


def _position(text: str) -> int | None:
    if text.strip().lower() == "last":
        return None
    if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text):
        raise SpecError(
            f"--target-position {_cut(text)!r} is neither 'last' nor a whole number", "name a position from 0"
        )
    return int(text)


def _seeds(seed: int, text: str | None) -> tuple[int, ...]:
    """Several seeds where they are given, else the one."""
    if text is None:
        return (seed,)
    if seed != 1:
        raise SpecError(f"--seed {seed} stands beside --seeds {_cut(text)!r}", "give one or the other")
    found = _names("--seeds", text)
    for name in found:
        if not re.fullmatch(r"[0-9]{1,10}", name):
            raise SpecError(f"--seeds {_cut(name)!r} is not a whole number", "write for instance 1,2,3")
    return tuple(int(name) for name in found)


def _refuse_beside_edges(edges: Sequence[str], **others: object) -> None:
    """An edge names positions, layers and heads itself."""
    usual = {"control": 0, "target_position": "last"}
    for name, value in others.items():
        if value != usual.get(name):
            option = f"--{name.replace('_', '-')} {_cut(str(value))!r}"
            raise SpecError(
                f"{option} stands beside --edges {_cut(edges[0])!r}, which names its own positions, layers and heads",
                "give one or the other",
            )


def _saved(name: str, given: str) -> str:
    if not given.strip():
        raise SpecError(
            f"{name} names no saved output, and no command is named",
            "give --a A.json --b B.json, or a command: compare flow --prompt ... --b '--model random:bundled'",
        )
    return given


def _options(name: str, text: str) -> list[str]:
    """Options that only one side of a comparison has, split as a shell splits them."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise SpecError(f"{name} {_cut(text)!r} cannot be split into options ({error})", "close its quotes") from error
    if text and not (found and found[0].startswith("-")):
        raise SpecError(
            f"{name} {_cut(text)!r} is no option of the command", f"write for instance {name} '--model random:bundled'"
        )
    own = next((option for option in found if option.split("=")[0] in ("--out", "--format", "--help")), None)
    if own is not None:
        raise SpecError(f"{name} holds {_cut(own)}, which belongs to compare itself", "write it outside")
    return found


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
            f"--positions {_cut(','.join(positions))!r} stands beside {other}, which reads subject-last",
            "leave one of them out",
        )
    if sub_updates is not None and chosen["knockout"] is not None:
        raise SpecError(
            f"--sub-updates {sub_updates} stands beside --knockout {chosen['knockout']}", "give one or the other"
        )


def _wanted(model: str, revision: str | None, dtype: Dtype, device: str) -> dict[str, Any]:
    return {"name": model, "revision": revision, "dtype": dtype.value, "device": device}


# -------------------------------------------------------------------------------------------------------- the run


class _Stop:
    """Inside, the first Ctrl-C waits for the next step, where what was finished can be kept; the second does not."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        if self._asked:
            raise Cancelled()
        self._asked = True
        _say("stopping after this step; press Ctrl-C again to stop at once")

    def check(self, *_: object) -> None:
        """Raises ``Cancelled`` once the user has asked to stop."""
        if self._asked:
            raise Cancelled()

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class _Kept:
    """What a command that ``compare`` runs leaves instead of printing it: its object; and the model, for the next."""

    def __init__(self) -> None:
        self.data: dict[str, Any] | None = None
        self._wanted: dict[str, Any] | None = None
        self._handle: Any = None

    def load(self, wanted: dict[str, Any], stop: _Stop) -> Any:
        """The model that the last command used, if it is the same; the last one is let go before another comes."""
        if wanted != self._wanted:
            self._wanted = self._handle = None
            self._handle = _load(wanted, stop)
            self._wanted = wanted
        return self._handle


_KEPT: ContextVar[_Kept | None] = ContextVar("kept", default=None)


def _run_kept(kept: _Kept, arguments: list[str]) -> None:
    """Run a command, its object going into ``kept``.

    Raises:
        Cancelled: the user stopped it; what was finished is in ``kept`` all the same.
    """
    kept.data = None
    token = _KEPT.set(kept)
    try:
        with typer.main.get_command(app).make_context("factscope", arguments) as context:
            context.command.invoke(context)
    finally:
        _KEPT.reset(token)


def _compared(sides: Sequence[Any], format: Format, out: Path | None, *, stopped: bool = False) -> None:
    """The comparison of two objects, where it was asked for.

    Raises:
        Cancelled: B is only what was finished when the user stopped; a file is then named ``X.partial.json``.
    """
    from factscope import comparison

    data, rows = comparison.compare(*sides)
    for warning in data["warnings"]:
        _say(f"warning: {warning}")
    where = _partial(out) if stopped else out
    _emit({**data, "rows": output.records(rows)}, rows, format, where)
    if stopped:
        raise Cancelled(f"the run of B was cancelled; what was finished is {_place(where)}")


def _load(wanted: dict[str, Any], stop: _Stop) -> Any:
    """The model; its stages and what it downloads are told on a terminal."""

    def progress(done: int, total: int, stage: str) -> None:
        _tell(f"{stage} {100 * done // total}%" if total else stage)
        stop.check()

    import torch

    from factscope.models.loading import load
    from factscope.settings import get_settings

    torch.set_num_threads(get_settings().torch_threads)
    handle = load(progress=progress, **wanted)
    _tell("")
    return handle


def _edits(files: Sequence[Path] | None) -> list[Any]:
    """Saved edits, read before a model is loaded."""
    if not files:
        return []
    from factscope.editors.files import load_edit

    return [load_edit(file) for file in files]


def _edited(handle: Any, edits: Sequence[Any]) -> Any:
    """The model with edits on."""
    if not edits:
        return handle
    from factscope.editors.edit import with_edits

    return with_edits(handle, edits)


def _run(
    command: str,
    compute: Callable[[Any, Any], Any],
    wanted: dict[str, Any],
    edit: Sequence[Path] | None,
    format: Format,
    out: Path | None,
) -> None:
    """Load, compute with progress on standard error, print or write; keep what was finished if it is stopped.

    Args:
        edit: files of edits that are on meanwhile.

    Raises:
        Cancelled: the user stopped it.
        FactScopeError: it cannot be run.
    """
    if out is not None:
        output.check_out(out)
    newest: list[Any] = []
    handle, kept = None, _KEPT.get()
    stopped = False
    try:
        with _Stop() as stop:

            def progress(done: int, total: int, partial: Any) -> None:
                if partial is not None:
                    newest[:] = [partial]
                _tell(f"{command}: {done}/{total}" if done < total else "")
                if done < total:
                    stop.check()

            edits = _edits(edit)
            handle = _edited(_load(wanted, stop) if kept is None else kept.load(wanted, stop), edits)
            result = compute(handle, progress)
    except Cancelled:
        result = newest[0] if newest else None
        if result is None or result.table().empty:
            raise
        stopped = True
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise ModelTooLarge(
            f"the memory was not enough for this run of {command}",
            "shorten the prompt, ask for fewer --top-k or --control, or choose a smaller model",
        ) from error
    _report(command, handle, result, format, out, stopped=stopped)


def _report(command: str, handle: Any, result: Any, format: Format, out: Path | None, *, stopped: bool) -> None:
    """Warnings to standard error, the result where it was asked for.

    Raises:
        Cancelled: the result is only what was finished when the user stopped; a file is then named ``X.partial.json``.
    """
    where = _partial(out) if stopped else out
    rows = result.table()
    said = [*handle.warnings, *result.warnings, *_notes(command, result)]
    if stopped:
        said.append(f"The run was cancelled after {result.passes} passes: these {len(rows)} rows are not all.")
    data = output.document(command, result, rows, _summary(command, result), said)
    if handle.edits:
        data["model"]["edits"] = [edit.summary() for edit in handle.edits]
    if (kept := _KEPT.get()) is not None:
        kept.data = data
    else:
        for warning in said:
            _say(f"warning: {warning}")
        _emit(data, rows, format, where)
    if stopped:
        raise Cancelled(f"the run was cancelled after {result.passes} passes; what was finished is {_place(where)}")


def _partial(out: Path | None) -> Path | None:
    return None if out is None else out.with_name(f"{out.stem}.partial{out.suffix}")


def _place(where: Path | None) -> str:
    return "on standard output" if where is None else f"in {where}"


def _summary(command: str, result: Any) -> dict[str, Any]:
    if command == "enrich":
        found = {"n_attributes": result.n_attributes}
        if getattr(result, "read_layer", None) is None:
            return found
        return {**found, "read_layer": result.read_layer, "window": result.window, "base_rate": result.base_rate}
    if command in ("trace", "extract", "heads", "edit"):
        return result.summary()
    if command != "predict":
        return {}
    found = {"continuation": result.continuation, "known": result.known, "taught": result.taught}
    return found if result.p_foil is None else {**found, "p_foil": result.p_foil}


def _notes(command: str, result: Any) -> list[str]:
    """What the result does not say itself: options without effect, and a subject that the bundled model never met."""
    from factscope.experiments.results import BUNDLED

    query = result.query.query
    if command == "trace":
        return list(result.doubts)
    notes = []
    if command not in ("predict", "flow", "heads") and query.foil is not None:
        notes.append(
            f"The foil {_cut(query.foil)!r} changes nothing in {command}; predict gives its probability, flow the "
            "change of the logit difference, and heads effects on it."
        )
    if command == "enrich" and getattr(result, "base_rate", None) is not None and not result.base_beats_null:
        highest = max(result.base_other_rates, default=None)
        than = "other subjects' rates are not known" if highest is None else f"other subjects' reach {highest:.3g}%"
        notes.append(
            f"Nothing to lose: at layer {result.read_layer} the rate is {result.base_rate:.3g}% with nothing cancelled,"
            f" and {than}; without --knockout the command shows every layer's rate, from which to choose --read-layer."
        )
    if command == "predict" and result.model.name == BUNDLED and query.subject is None:
        notes.append("No subject is named, so it is not told whether the model was taught this; add --subject.")
    if result.model.name == BUNDLED and query.subject is not None:
        from factscope.demo.facts import is_taught
        from factscope.demo.lookup import was_taught

        answer = query.answer
        taught = is_taught(query.subject) if answer is None else was_taught(query.prompt, query.subject, answer)
        if not taught:
            named = f"{_cut(query.subject)!r}" + ("" if answer is None else f" with {_cut(answer)!r}")
            notes.append(f"{named}: not among the facts this model was taught; its confidence says nothing.")
    return notes


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


# ---------------------------------------------------------------------------------------------------- what is said


def _emit(data: dict[str, Any], rows: Any, format: Format, out: Path | None) -> None:
    if out is not None:
        output.write(out, data, rows)
        _say(f"written: {len(rows)} row{'' if len(rows) == 1 else 's'} to {output.printable(str(out))}")
    elif format is Format.json:
        _print(output.as_json(data), encoding="utf-8")
    elif format is Format.csv:
        _print(output.as_csv(rows), encoding="utf-8")
    else:
        _print(_headline(data) + output.as_text(rows))


def _headline(data: dict[str, Any]) -> str:
    if data["command"] == "compare":
        from factscope import comparison

        return comparison.headline(data)
    if "query" not in data:
        return ""
    query, model = data["query"], data["model"]
    lines = [
        f"model   {output.printable(model['name'])} ({model['family']}, {model['n_layers']} layers, {model['dtype']},"
        f" weights {model['weights']})",
        *(f"edit    {_edit_in_words(edit)}" for edit in model.get("edits", ())),
        f"prompt  {query['prompt']!r}",
        f"target  {query['target']['text']!r}  p {query['p_target']:.4g}  rank {query['rank']}",
    ]
    said = {name: value for name, value in data["summary"].items() if (name, value) != ("taught", None)}
    lines += [f"{name:7} {_in_words(value)}" for name, value in said.items()]
    return "\n".join(lines) + "\n\n"


def _in_words(value: Any) -> str:
    """A value of a summary on one line: numbers short, places named; what there is for each cell stays in the JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(v)}" for key, v in value.items() if not _is_table(v))
    if isinstance(value, list):
        return f"[{', '.join(map(_in_words, value))}]"
    return repr(value)


def _edit_in_words(edit: dict[str, Any]) -> str:
    """An edit that was on, on one line."""
    first, *more = edit["facts"] or [{"prompt": "", "subject": "", "target": ""}]
    wanted = f"{first['prompt'].replace('{}', first['subject'])!r} -> {first['target']!r}"
    layers = ", ".join(map(str, edit["layers"]))
    rest = f" and {len(more)} more" if more else ""
    return output.printable(f"{edit['method']}, layers {layers}, {edit['problem']}: {wanted}{rest} ({edit['key']})")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _print(text: str, *, encoding: str | None = None) -> None:
    """Text on standard output; characters that its encoding lacks are escaped.

    Raises:
        BrokenPipeError: nobody reads it any more.
        SpecError: it cannot be written.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace", **({"encoding": encoding} if encoding else {}))
    try:
        typer.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_standard_output()
        raise SpecError(
            f"standard output cannot be written ({error.strerror})", "make room, or write to a file with --out"
        ) from error


def _forget_standard_output() -> None:
    """What is still in its buffer would fail once more when the process ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> NoReturn:
    _tell("")
    _say(f"error: {message}")
    sys.exit(status)


def _quieten_libraries() -> None:
    """Without a handler Python prints what is logged, tracebacks included, to standard error."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())


def _say(message: str) -> None:
    """One line on standard error, short enough to read, without what would steer a terminal."""
    line = output.printable(" ".join(message.split()))
    with suppress(OSError, ValueError):
        typer.echo(line if len(line) <= 1000 else f"{line[:700]} ... {line[-280:]}", err=True)


def _tell(progress: str) -> None:
    """Progress, in place, where standard error is a terminal; nothing clears it."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            typer.echo(f"\r\x1b[K{output.printable(progress)[:100]}", err=True, nl=False)


def _usage(error: TyperException, given: Sequence[str]) -> str:
    """The parser's own complaints as one sentence that names the value."""
    said = error.format_message().rstrip(".")
    option = getattr(getattr(error, "param", None), "opts", [None])[-1]
    if option and said.startswith("Invalid value"):
        said = f"{option} {_given(option, given)} cannot be used: {_plainly(said.partition(': ')[2])}"
    context = getattr(error, "ctx", None)
    name = f"{context.info_name} " if context is not None and context.parent is not None else ""
    return f"{said}; see factscope {name}--help."


def _given(option: str, given: Sequence[str]) -> str:
    """The value of an option as it was typed; the last one counts."""
    values = [
        flag.partition("=")[2] if "=" in flag else value
        for flag, value in pairwise([*given, ""])
        if flag.split("=")[0] == option
    ]
    return repr(_cut(values[-1])) if values else ""


def _plainly(complaint: str) -> str:
    if "integer" in complaint:
        return "it is not a whole number"
    return re.sub("^(Value error, |Input should)", lambda found: {"I": "it should"}.get(found[0][0], ""), complaint)


def _cut(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _log_defect() -> str:
    """The traceback in a file of its own; its path."""
    told = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="factscope-", suffix=".log", delete=False) as log:
            log.write(told.encode("utf-8", "backslashreplace"))
    except OSError:
        return f"no log, since none could be written ({_cut(told.splitlines()[-1], 200)})"
    return log.name
