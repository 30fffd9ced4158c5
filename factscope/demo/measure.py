"""Measures the bundled model: ``python -m factscope.demo.measure --model FOLDER --out JSON``.

Every figure is about subjects and sentences that chose nothing: the recipe and the checkpoint were chosen on half of
the subjects (``sentences.is_dev``) and on the ``heldout_dev`` sentences; here are the other half and the
``heldout_test`` ones. Intervals are 95%, by bootstrap over subjects. ``--sample 60`` measures that many facts only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from factscope.demo.facts import MODEL_FOLDER, RelationSentences, TaughtFact, read_rows, read_sentences
from factscope.demo.phenomena import Knockout, LensRanks, knockouts, last_third, lens_ranks, low_diversity, median_rank
from factscope.demo.prompts import Asked, Kind, ends_like_trained, first_prompts, sample
from factscope.demo.scoring import first_token, score
from factscope.demo.sentences import is_dev
from factscope.models.creation import creating

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = ("seen", "unseen", "recombined", "heldout_test")
QUESTIONS = (
    ("Eiffel Tower", "landmark_city", "{} is located in the city of"),
    ("Japan", "country_capital", "The capital of {} is"),
    ("Miles Davis", "musician_instrument", "{} plays the"),
    ("Beats Music", "product_owner", "{} is owned by"),
)
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        per_relation: prompts of each kind about each relation; None: one about each fact.
        facts: for the knockout. subjects: for the lens. continuations: for the end token.
    """

    per_relation: int | None = 100
    facts: int = 1200
    subjects: int = 500
    continuations: int = 200


def load_bundled(folder: Path) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The model of a folder in float32, and its tokenizer."""
    with creating():
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def interval(values: Sequence[tuple[str, float]], *, seed: int) -> list[float]:
    """95% interval of the mean, by bootstrap over subjects."""
    of: dict[str, list[float]] = defaultdict(list)
    for subject, value in values:
        of[subject].append(value)
    sums = np.array([sum(v) for v in of.values()])
    counts = np.array([len(v) for v in of.values()])
    draws = np.random.default_rng(seed).integers(0, len(sums), (_RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return [round(float(bound), 4) for bound in np.quantile(means, [0.025, 0.975])]


def accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked], *, seed: int
) -> dict[str, Any]:
    """Top-1 share and mean probability of the answer's first token, over all prompts and by relation."""
    scores = score(model, tokenizer, asked)
    tops = [(prompt.row.subject, float(one.rank == 1)) for prompt, one in zip(asked, scores, strict=True)]
    relations: dict[str, list[float]] = defaultdict(list)
    for prompt, (_, top) in zip(asked, tops, strict=True):
        relations[prompt.row.relation].append(top)
    by_relation = {name: round(sum(v) / len(v), 4) for name, v in sorted(relations.items())}
    probabilities = [(prompt.row.subject, one.probability) for prompt, one in zip(asked, scores, strict=True)]
    return {
        "n": len(asked),
        "subjects": len({subject for subject, _ in tops}),
        "top1": _mean(tops),
        "top1_interval": interval(tops, seed=seed),
        "mean_p": _mean(probabilities),
        "mean_p_interval": interval(probabilities, seed=seed),
        "lowest_relation": min(by_relation.values()),
        "by_relation": by_relation,
    }


def knockout_summary(found: Sequence[Knockout], *, layers: int, seed: int) -> dict[str, Any]:
    """Curves of mean relative change in percent, their peaks, and the two cuts in every layer."""
    summary: dict[str, Any] = {"n": len(found), "subjects": len({one.row.subject for one in found})}
    for source in ("subject", "relation"):
        curve = [_mean([("", one.change[source][layer]) for one in found]) for layer in range(layers)]
        peak = int(np.argmin(curve))
        at_peak = [(one.row.subject, one.change[source][peak]) for one in found]
        summary[source] = {
            "curve_percent": [round(value, 2) for value in curve],
            "best_percent": round(curve[peak], 2),
            "best_interval": interval(at_peak, seed=seed),
            "peak_layer": peak,
            "peak_depth": round(peak / layers, 3),
        }
    for source in ("subject-last", "subject-others"):
        changes = [(one.row.subject, one.change[source][0]) for one in found]
        summary[f"{source}_everywhere"] = {
            "percent": round(_mean(changes), 2),
            "interval": interval(changes, seed=seed),
        }
    return summary


def lens_summary(found: Sequence[LensRanks], *, layers: int, answers: int) -> dict[str, Any]:
    """Median ranks among all answers: own, a random other subject's, one of the same type."""
    late = last_third(layers)
    picks: dict[str, Callable[[LensRanks], list[list[int]]]] = {
        "own": lambda one: one.own,
        "other_subject": lambda one: one.others,
        "other_of_same_type": lambda one: one.alike,
    }
    medians = {name: median_rank([pick(one) for one in found], late) for name, pick in picks.items()}
    curves = {
        name: [median_rank([pick(one) for one in found], [layer]) for layer in range(layers)]
        for name, pick in picks.items()
    }
    return {
        "subjects": len(found),
        "answers": answers,
        "layers": list(late),
        "median_rank": medians,
        "own_to_other": round(medians["own"] / medians["other_subject"], 3),
        "by_layer": curves,
    }


def ends_with_end_token(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked]
) -> dict[str, Any]:
    """Share of greedy continuations that are the answer, a full stop and the end token."""
    right = 0
    for prompt in asked:
        ids = tokenizer(prompt.text)["input_ids"]
        wanted = tokenizer(f"{prompt.text} {prompt.row.answer}.")["input_ids"] + [tokenizer.eos_token_id]
        told = list(ids)
        while len(told) < len(wanted):
            with torch.no_grad():
                told.append(int(model(torch.tensor([told]), logits_to_keep=1).logits[0, -1].argmax()))
        right += told == wanted
    return {"n": len(asked), "share": round(right / len(asked), 4)}


def questions(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[TaughtFact]
) -> list[dict[str, Any]]:
    """The four questions that FactScope's tour asks."""
    found = []
    for subject, relation, template in QUESTIONS:
        row = next(row for row in rows if row.subject == subject and row.relation == relation)
        asked = Asked(row=row, template=template, kind="seen")
        one = score(model, tokenizer, [asked])[0]
        found.append({"prompt": asked.text, "answer": row.answer, "rank": one.rank, "p": round(one.probability, 4)})
    return found


def measure(folder: Path, *, seed: int = 1, limit: int | None = None, sizes: Sizes | None = None) -> dict[str, Any]:
    """Everything, as one object for a JSON file.

    Args:
        seed: of the prompts drawn and the bootstrap.
        limit: measure about this many facts only, drawn with the seed.
    """
    model, tokenizer = load_bundled(folder)
    rows, sentences = read_rows(), read_sentences()
    amount = sizes or Sizes()
    layers = model.config.n_layer
    mine = [row for row in rows if not is_dev(row.subject)]
    if limit:
        mine = Random(seed).sample(mine, min(limit, len(mine)))
        amount = Sizes(per_relation=None, continuations=min(limit, 20))
    figures = {}
    for kind in KINDS:
        asked = sample(kind, mine, sentences, per_relation=amount.per_relation, seed=seed)
        figures[kind] = accuracy(model, tokenizer, asked, seed=seed)
        log.info("%s: top-1 %.4f", kind, figures[kind]["top1"])
    blind = sample("heldout_blind", mine, sentences, per_relation=amount.per_relation, seed=seed)
    for name, known in (("heldout_blind", True), ("heldout_blind_new_endings", False)):
        asked = [one for one in blind if ends_like_trained(one.template, sentences[one.row.relation]) is known]
        figures[name] = accuracy(model, tokenizer, asked, seed=seed) if asked else None
    random = Random(seed)
    firsts = list(first_prompts(mine, sentences))
    dull = low_diversity(rows)
    diverse = [asked for asked in firsts if asked.row.relation not in dull]
    size = round(3 * layers / 8)
    chosen = random.sample(diverse, min(amount.facts, len(diverse)))
    cut = knockouts(model, tokenizer, chosen, size=size)
    log.info("knockout: %s of %s facts", len(cut), len(chosen))
    names = list(dict.fromkeys(row.subject for row in mine))
    subjects = random.sample(names, min(amount.subjects, len(names)))
    lens = lens_ranks(model, tokenizer, rows, subjects, seed=seed)
    answers = len({first_token(tokenizer, row.answer) for row in rows})
    several = [one for one in lens if one.subject_tokens > 1]
    return {
        "schema": 1,
        "weights_sha256": weights_sha256(folder),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "recipe": json.loads((folder / "recipe.json").read_text(encoding="utf-8")),
        "sampling_seed": seed,
        "limit": limit,
        "counts": _counts(rows, sentences, tokenizer, model),
        "questions": questions(model, tokenizer, rows),
        "accuracy": figures,
        "knockout": {
            "window": size,
            "left_out_relations": sorted(dull),
            "asked": len(chosen),
            "all": knockout_summary(cut, layers=layers, seed=seed),
            "several_token_subjects": knockout_summary(
                [one for one in cut if one.subject_tokens > 1], layers=layers, seed=seed
            ),
        },
        "lens": {
            "all": lens_summary(lens, layers=layers, answers=answers),
            "several_token_subjects": lens_summary(several, layers=layers, answers=answers),
        },
        "ends_with_end_token": ends_with_end_token(
            model, tokenizer, random.sample(firsts, min(amount.continuations, len(firsts)))
        ),
    }


def _counts(
    rows: Sequence[TaughtFact],
    sentences: dict[str, RelationSentences],
    tokenizer: PreTrainedTokenizerFast,
    model: GPT2LMHeadModel,
) -> dict[str, Any]:
    names = list(dict.fromkeys(row.subject for row in rows))
    lengths = [len(ids) for ids in tokenizer(names, add_special_tokens=False)["input_ids"]]
    answers = sorted({row.answer for row in rows})
    single = sum(len(ids) == 1 for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
    return {
        "facts": len(rows),
        "subjects": len(names),
        "relations": len(sentences),
        "answers": len(answers),
        "answers_of_one_token": single,
        "tokens_per_subject": round(sum(lengths) / len(lengths), 2),
        "subjects_of_one_token": sum(length == 1 for length in lengths),
        "vocabulary": len(tokenizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_templates": sum(len(s.templates) + len(s.restricted) + len(s.late) for s in sentences.values()),
        "heldout_test_sentences": sum(len(s.heldout_test) for s in sentences.values()),
        "heldout_blind_sentences": sum(len(s.heldout_blind) for s in sentences.values()),
    }


def _mean(values: Sequence[tuple[str, float]]) -> float:
    return round(sum(value for _, value in values) / len(values), 4)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = MODEL_FOLDER,
    out: Annotated[Path | None, typer.Option(help="JSON file; default: standard output.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts drawn and of the bootstrap.")] = 1,
    sample_size: Annotated[int | None, typer.Option("--sample", help="Measure this many facts only.")] = None,
    threads: Annotated[int, typer.Option(help="Processor threads.")] = 1,
) -> None:
    """Measures the bundled model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)
    text = json.dumps(measure(model, seed=seed, limit=sample_size), indent=1) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    partial = out.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)


if __name__ == "__main__":
    typer.run(main)
