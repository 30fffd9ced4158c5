"""Answers' ranks and probabilities for many prompts at once, by the plain model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from factscope.demo.prompts import Asked


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one prompt was answered: rank of the answer's first token (from 1) and its probability."""

    rank: int
    probability: float


def first_token(tokenizer: PreTrainedTokenizerFast, answer: str) -> int:
    """Id of an answer's first token after a space."""
    return tokenizer(answer, add_special_tokens=False)["input_ids"][0]


def batches(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, size: int = 64
) -> Iterator[tuple[list[int], Int[Tensor, "batch position"]]]:
    """Token ids of the texts, grouped by equal length so that nothing is padded; with each text's index."""
    ids = tokenizer(list(texts))["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and stop - start < size and len(ids[order[stop]]) == len(ids[order[start]]):
            stop += 1
        chosen = order[start:stop]
        yield chosen, torch.tensor([ids[index] for index in chosen])
        start = stop


def last_probabilities(model: GPT2LMHeadModel, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch vocabulary"]:
    """Next-token probabilities after each row, in float32."""
    with torch.no_grad():
        logits = model(ids.to(model.device), logits_to_keep=1).logits
    return torch.softmax(logits[:, -1].float(), dim=-1).cpu()


def score(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked]) -> list[Score]:
    """Rank and probability of each prompt's answer (its first token)."""
    was_training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    for chosen, ids in batches(tokenizer, [prompt.text for prompt in asked]):
        probabilities = last_probabilities(model, ids)
        for row, index in zip(probabilities, chosen, strict=True):
            p = row[first_token(tokenizer, asked[index].row.answer)]
            scores[index] = Score(rank=int((row > p).sum()) + 1, probability=float(p))
    model.train(was_training)
    return [scores[index] for index in range(len(asked))]


def top1_share(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked]) -> float:
    """Share of prompts whose answer is the top token."""
    scores = score(model, tokenizer, asked)
    return sum(one.rank == 1 for one in scores) / len(scores)
