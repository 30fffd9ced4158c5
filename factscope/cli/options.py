"""The options of the command line: their choices, and the sentence that ``--help`` says of each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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


class KnockoutChoice(StrEnum):
    """Which updates are cancelled."""

    mlp = "mlp"
    attention = "attention"


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
