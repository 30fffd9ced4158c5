"""What does an edit do to texts? Fluency, consistency with reference texts, and the essence of the subject.

Sources: Meng et al. 2022 (arXiv 2202.05262), section 3.4 (GE and RS); Hase et al. 2023 (arXiv 2301.04213), section 4.2
and appendix B (essence); each with its released code.

1. Texts are sampled among the five most probable tokens, to 100 tokens in all, the same draws before and after.
2. Fluency: ``(2/3 H2 + 4/3 H3) / 2``, H_n the entropy in bits of a text's n-grams of words; mean over texts, times 100.
3. Consistency: cosine between the TF-IDF vectors of all texts joined and of all reference texts joined, times 100.
4. Essence: five texts after "{subject} is a", sampled before the edit; the mean of their perplexities
   ``exp(-(1/N) sum log p)``, N all tokens, before and after.

Where this differs from the released code: words are split without a model of sentences (nltk's ``preserve_line``), so
that nothing is downloaded; the weights of words come from the reference texts, ``ln((1 + n) / (1 + df)) + 1``, since an
encyclopedia's are not at hand, and a word that no reference has counts as in none of them; a text ends where the model
ends it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from factscope.experiments.answers import Question, ask
from factscope.experiments.results import BUNDLED
from factscope.generation import Continuation, Sampling, continue_prompt
from factscope.models.handle import ModelHandle

TOKENS = 100
"""Tokens of a text, its beginning included."""
TOP_K = 5
ESSENCE_TEXTS = 5
ESSENCE_PROMPT = "{} is a"
_WORD = re.compile(r"\b\w\w+\b")


def recites(model: ModelHandle) -> str:
    """Why texts say nothing about this model; empty where they do."""
    if model.info.name.removeprefix("random:") != BUNDLED:
        return ""
    return "the bundled model only recites facts: it has no general text that an edit could spoil"


def words(text: str) -> list[str]:
    """The words and marks of a text, as nltk splits them."""
    from nltk.tokenize import word_tokenize  # a quarter of a second, and for texts alone

    return word_tokenize(text, preserve_line=True)


def n_gram_entropy(text: str) -> float:
    """``(2/3 H2 + 4/3 H3) / 2`` in bits; 0 for a text without any pair of words."""
    said = words(text)
    return (2 / 3 * _entropy(said, 2) + 4 / 3 * _entropy(said, 3)) / 2


def fluency(texts: Sequence[str]) -> float:
    """GE: the mean entropy, times 100; NaN without texts."""
    return 100 * float(np.mean([n_gram_entropy(text) for text in texts])) if texts else math.nan


def consistency(texts: Sequence[str], references: Sequence[str]) -> float:
    """RS: cosine of TF-IDF vectors, times 100; NaN without words on either side."""
    documents = [Counter(_WORD.findall(text.lower())) for text in references]
    seen = Counter(word for document in documents for word in document)
    weight = {
        word: math.log((1 + len(documents)) / (1 + seen[word])) + 1
        for word in {*seen, *_WORD.findall(" ".join(texts).lower())}
    }
    left, right = (
        {word: n * weight[word] for word, n in Counter(_WORD.findall(" ".join(side).lower())).items()}
        for side in (texts, references)
    )
    lengths = math.hypot(*left.values()) * math.hypot(*right.values())
    return 100 * sum(value * right.get(word, 0.0) for word, value in left.items()) / lengths if lengths else math.nan


def write_texts(
    model: ModelHandle, ids: Sequence[int], seed: int, *, rows: int = 1, step: Callable[[], None] = lambda: None
) -> list[tuple[int, ...]]:
    """Sampled texts that begin with a prompt: all tokens, those of the prompt included."""
    return [(*ids, *text.ids) for text in _sampled(model, ids, seed, rows, step)]


def continued(model: ModelHandle, ids: Sequence[int], seed: int, *, step: Callable[[], None] = lambda: None) -> str:
    """How a sampled text goes on after its beginning."""
    return _sampled(model, ids, seed, 1, step)[0].text


def _sampled(
    model: ModelHandle, ids: Sequence[int], seed: int, rows: int, step: Callable[[], None]
) -> list[Continuation]:
    sampling = Sampling(top_k=min(TOP_K, model.vocabulary), seed=seed)
    return continue_prompt(model, ids, max(0, TOKENS - len(ids)), sampling=sampling, rows=rows, step=step)


def perplexities(
    model: ModelHandle, questions: Sequence[Question], *, step: Callable[[], None] = lambda: None
) -> list[float]:
    """``exp(-(1/N) sum log p)`` of texts; a question's prompt is the first token, its answer all others.

    A text of one token says nothing: 1.
    """
    replies = ask(model, questions, step=step)
    return [
        math.exp(-reply.answers[0].log_probability / (len(question.ids) + len(question.answers[0])))
        for question, reply in zip(questions, replies, strict=True)
    ]


def _entropy(said: Sequence[str], n: int) -> float:
    counts = np.array(list(Counter(zip(*(said[i:] for i in range(n)), strict=False)).values()), dtype=float)
    shares = counts / counts.sum() if counts.size else counts
    return float(-(shares * np.log2(shares)).sum())
