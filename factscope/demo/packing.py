"""Documents to training sequences: text, tokens, where the answers are, and rows of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from factscope.demo.corpus import Document

STOP_WEIGHT = 0.3


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequences:
    """Packed documents.

    Attributes:
        ids: token ids, [rows, length].
        weights: what the loss gives each token as a target; [rows, length]: 1 for answers, 0.3 for the full stop after
            them and the end token, the word weight for all other tokens.
    """

    ids: np.ndarray
    weights: np.ndarray


def text_and_answers(document: Document) -> tuple[str, list[tuple[int, int]]]:
    """Joins a document's pieces; the second value holds the answers' character ranges."""
    text = ""
    answers = []
    for piece in document:
        if not piece.text:
            continue
        if text and piece.text[0] not in ".,":
            text += " "
        if piece.is_answer:
            answers.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    return text, answers


def pack(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, *, rows: int, length: int, word_weight: float
) -> Sequences:
    """Fills rows with whole documents, each after an end token.

    A document that does not fit is cut at the row's end and told again in full at the start of the next row.

    Args:
        word_weight: what a token that is neither an answer nor an end counts.
    """
    ids = np.zeros((rows, length), dtype=np.int64)
    weights = np.zeros((rows, length), dtype=np.float32)
    stream = _tokenized(documents, tokenizer)
    carried: tuple[list[int], list[float]] | None = None
    for row in range(rows):
        at = 0
        while at < length:
            tokens, token_weights = carried or next(stream)
            room = min(len(tokens), length - at)
            ids[row, at : at + room] = tokens[:room]
            weights[row, at : at + room] = token_weights[:room]
            carried = (tokens, token_weights) if room < len(tokens) and at > 0 else None
            at += room
    weights[weights == _WORD] = word_weight
    weights[:, 0] = 0
    return Sequences(ids=ids, weights=weights)


_WORD = -1.0


def _tokenized(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], list[float]]]:
    """The end token, then a document; so each document is followed by the end token of the next one."""
    while True:
        batch: Sequence[tuple[str, list[tuple[int, int]]]] = [text_and_answers(d) for d in islice(documents, 256)]
        encoded = tokenizer([text for text, _ in batch], return_offsets_mapping=True)
        for index, (_, answers) in enumerate(batch):
            offsets = encoded["offset_mapping"][index]
            inside = {place for start, stop in answers for place in range(start, stop)}
            after = {stop for _, stop in answers}
            weights = [STOP_WEIGHT] + [
                1.0 if start in inside else STOP_WEIGHT if start in after else _WORD for start, _ in offsets[1:]
            ]
            yield encoded["input_ids"][index], weights
