"""Does the bundled model recall as the published models do? Attention knockout and the lens, over many facts.

Source: Geva et al. 2023 (arXiv 2304.14767, sections 4 and 5). Steps for the knockout: take facts that the model
answers, in the sentence asked first; forbid attention from the last position to the subject (or to the relation: every
position that is not subject, last or the end token in front) in a window of layers; note the relative change of the
answer's probability, in percent; average over facts. The lens reads the answers' ranks off the states at the subject's
last token, through the final norm, among the first tokens of all answers that were taught.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from factscope.demo.facts import TaughtFact
from factscope.demo.plain import forward, head
from factscope.demo.prompts import Asked
from factscope.demo.scoring import batches, first_token

Source = Literal["subject", "relation", "subject-last", "subject-others"]

FEWEST_ANSWERS, LARGEST_SHARE = 10, 1 / 3


@dataclass(frozen=True, kw_only=True)
class Knockout:
    """One fact's reaction to cuts.

    Attributes:
        subject_tokens: how many tokens the subject has.
        p: probability of the answer with nothing cut.
        change: per source, the relative change in percent for each window (one entry: every layer cut).
    """

    row: TaughtFact
    subject_tokens: int
    p: float
    change: dict[Source, list[float]]


@dataclass(frozen=True, kw_only=True)
class LensRanks:
    """Ranks at one subject's last token, per block: of its own answers, and of others' answers.

    Attributes:
        others: answers of a random other subject. alike: answers of a random other subject of the same type.
    """

    subject: str
    subject_tokens: int
    own: list[list[int]]
    others: list[list[int]]
    alike: list[list[int]]


def low_diversity(rows: Sequence[TaughtFact]) -> set[str]:
    """Relations left out here: fewer than ten answers, or one answer for more than a third of the facts."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row.relation][row.answer] += 1
    return {
        name
        for name, counts in answers.items()
        if len(counts) < FEWEST_ANSWERS or counts.most_common(1)[0][1] > LARGEST_SHARE * counts.total()
    }


def window(center: int, size: int, layers: int) -> range:
    """Layers of a window of a size around a layer, clipped at the ends."""
    return range(max(0, center - size // 2), min(layers, center + (size + 1) // 2))


def subject_span(tokenizer: PreTrainedTokenizerFast, asked: Asked) -> tuple[int, int]:
    """Token positions [start, stop) of the subject in a prompt."""
    first = asked.text.index(asked.row.subject)
    last = first + len(asked.row.subject)
    offsets = tokenizer(asked.text, return_offsets_mapping=True)["offset_mapping"]
    inside = [index for index, (start, stop) in enumerate(offsets) if start < last and stop > first]
    return inside[0], inside[-1] + 1


def knockouts(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked], *, size: int
) -> list[Knockout]:
    """Cuts the last position off from subject and relation, window by window, and from parts of the subject everywhere.

    Prompts that the model does not answer at rank 1 are left out, and those in which the subject ends the prompt.
    """
    layers = model.config.n_layer
    found = []
    for chosen, ids in batches(tokenizer, [prompt.text for prompt in asked], size=32):
        prompts = [asked[index] for index in chosen]
        answers = torch.tensor([first_token(tokenizer, prompt.row.answer) for prompt in prompts])
        spans = [subject_span(tokenizer, prompt) for prompt in prompts]
        with torch.no_grad():
            base = torch.softmax(forward(model, ids).logits, dim=-1)
            right = base.argmax(dim=-1) == answers
            p_base = base.gather(1, answers[:, None])[:, 0]
            change: dict[Source, list[Tensor]] = defaultdict(list)
            for source in ("subject", "relation"):
                places = _places(source, spans, ids)
                for center in range(layers):
                    cut = _cut(places, layers, window(center, size, layers))
                    change[source].append(_relative_change(model, ids, cut, answers, p_base))
            for source in ("subject-last", "subject-others"):
                cut = _cut(_places(source, spans, ids), layers, range(layers))
                change[source].append(_relative_change(model, ids, cut, answers, p_base))
        found += [
            Knockout(
                row=prompt.row,
                subject_tokens=spans[index][1] - spans[index][0],
                p=float(p_base[index]),
                change={source: [float(values[index]) for values in curve] for source, curve in change.items()},
            )
            for index, prompt in enumerate(prompts)
            if right[index] and spans[index][1] < ids.shape[1]
        ]
    return found


def lens_ranks(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[TaughtFact],
    subjects: Iterable[str],
    *,
    seed: int,
) -> list[LensRanks]:
    """Ranks of answers at the last token of each subject, which stands alone after the end token (and its article)."""
    dull = low_diversity(rows)
    of: dict[str, list[TaughtFact]] = defaultdict(list)
    for row in rows:
        if row.relation not in dull:
            of[row.subject].append(row)
    everyone = sorted({first_token(tokenizer, row.answer) for row in rows})
    place = {token: index for index, token in enumerate(everyone)}
    random = Random(f"{seed}|lens")
    found = []
    for subject in subjects:
        mine = of.get(subject)
        if not mine:
            continue
        ids = tokenizer(f"{mine[0].article.capitalize()} {subject}".strip(), return_tensors="pt")["input_ids"]
        own = {place[first_token(tokenizer, row.answer)] for row in mine}
        kin = [other for other, facts in of.items() if facts[0].type == mine[0].type and other != subject]
        with torch.no_grad():
            states = torch.stack([block[0, -1] for block in forward(model, ids).blocks])
            scores = head(model, states)[:, everyone]
        ranks = (scores[:, None, :] > scores[:, :, None]).sum(-1) + 1
        n_tokens = ids.shape[1] - 1 - (1 if mine[0].article else 0)
        found.append(
            LensRanks(
                subject=subject,
                subject_tokens=n_tokens,
                own=[[int(layer[index]) for index in sorted(own)] for layer in ranks],
                others=_foreign(ranks, own, of[random.choice([s for s in of if s != subject])], place, tokenizer),
                alike=_foreign(ranks, own, of[random.choice(kin)], place, tokenizer),
            )
        )
    return found


def last_third(layers: int) -> range:
    """The blocks of the last third, by rounding: 5, 6 and 7 of 8."""
    return range(layers - round(layers / 3), layers)


def median_rank(ranks: Iterable[list[list[int]]], layers: Iterable[int]) -> float:
    """Median over subjects, answers and the given layers."""
    chosen = list(layers)
    return median(rank for subject in ranks for layer in chosen for rank in subject[layer])


def _foreign(
    ranks: Int[Tensor, "layer answer other"],
    own: set[int],
    facts: Sequence[TaughtFact],
    place: dict[int, int],
    tokenizer: PreTrainedTokenizerFast,
) -> list[list[int]]:
    theirs = sorted({place[first_token(tokenizer, row.answer)] for row in facts} - own)
    return [[int(layer[index]) for index in theirs] for layer in ranks]


def _places(source: Source, spans: Sequence[tuple[int, int]], ids: Tensor) -> Bool[Tensor, "batch position"]:
    places = torch.zeros(ids.shape, dtype=torch.bool)
    for index, (start, stop) in enumerate(spans):
        if source == "subject":
            places[index, start:stop] = True
        elif source == "relation":
            places[index, 1:-1] = True
            places[index, start:stop] = False
        elif source == "subject-last":
            places[index, stop - 1] = True
        else:
            places[index, start : stop - 1] = True
    return places


def _cut(
    places: Bool[Tensor, "batch position"], layers: int, chosen: range
) -> Bool[Tensor, "layer batch target source"]:
    batch, length = places.shape
    cut = torch.zeros(layers, batch, length, length, dtype=torch.bool)
    for layer in chosen:
        cut[layer, :, -1] = places
    return cut


def _relative_change(model: GPT2LMHeadModel, ids: Tensor, cut: Tensor, answers: Tensor, p_base: Tensor) -> Tensor:
    p = torch.softmax(forward(model, ids, cut).logits, dim=-1).gather(1, answers[:, None])[:, 0]
    return (p - p_base) / p_base * 100
