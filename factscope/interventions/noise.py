"""How a subject is blurred: the rules for the noise of causal tracing, its scale, and where that scale comes from.

Source: Meng et al. 2022 (arXiv 2202.05262), section 2.1, appendix B.1 and the command line of the released code; the
constants of Hase et al. 2023 (arXiv 2301.04213), section 3.

1. A rule is a number (the standard deviation itself), ``sK`` (K times the standard deviation of subjects' embeddings),
   ``uX`` (uniform between -X and X), ``m`` (a Gaussian with the mean and covariance of subjects' embeddings), ``tD``
   (Student's t with D degrees of freedom and that covariance), or the name of a published constant.
2. Subjects' embeddings are what the embedding module gives for the tokens of every fact's subject, tokenized alone
   without special tokens; tokens that occur often count often.
3. The stream is ``RandomState(seed).randn(samples, tokens, width)`` in float64 (``uniform`` for ``uX``), scaled in
   float64. Student's t takes its chi-square draws from the seed after it.

Where this differs from the released code: its ``m`` and ``tD`` describe the tokens of an encyclopedia, ours those of
the subjects; its root of the covariance has signs that depend on the linear algebra library, ours is the symmetric one;
its ``tD`` stretches the mean as well, ours only what varies.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from factscope.errors import SpecError
from factscope.models.handle import ModelHandle

Kind = Literal["number", "subjects", "uniform", "gaussian", "student"]

PRESETS: dict[str, float] = {
    "rome:gpt2-xl": 0.1,
    "rome:gpt-j": 0.025,
    "rome:gpt-neox-20b": 0.03,
    "hase:gpt-j": 0.094,
    "hase:gpt2-xl": 0.1,
    "hase:gpt-neox-20b": 0.03,
    "hase:other": 0.01,
}
"""Published standard deviations by name: those of the released ROME script and of Hase et al."""

_RULE = re.compile(r"(?P<letter>[sutm]?)(?P<number>[0-9]*\.?[0-9]+(?:e-?[0-9]{1,2})?)?", re.IGNORECASE)
_FORMS = f"write 0.1, s3, u0.1, m, t5, or one of {', '.join(PRESETS)}"
_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class NoiseRule:
    """A rule as it was read.

    Attributes:
        amount: the standard deviation, the factor, the half width or the degrees of freedom; 1 for ``gaussian``.
        preset: name of the published constant, if it is one.
    """

    kind: Kind
    amount: float
    preset: str = ""


def parse_rule(text: str) -> NoiseRule:
    """Read a rule.

    Raises:
        SpecError: it is none of the forms, or its number cannot be used.
    """
    key = text.strip().lower()
    if key in PRESETS:
        return NoiseRule(kind="number", amount=PRESETS[key], preset=key)
    found = _RULE.fullmatch(key)
    letter, number = (found["letter"], found["number"]) if found else ("", None)
    if found is None or (number is None and letter not in ("s", "m")) or (number is not None and letter == "m"):
        raise SpecError(f"noise {text[:40]!r} is no rule", _FORMS)
    amount = 1.0 if number is None else float(number)
    if letter == "t" and amount <= 2:
        raise SpecError(f"noise {text[:40]!r} has no variance to match", "give more than 2 degrees of freedom: t5")
    if not amount < 1e6:
        raise SpecError(f"noise {text[:40]!r} is too large", _FORMS)
    kinds: dict[str, Kind] = {"": "number", "s": "subjects", "u": "uniform", "m": "gaussian", "t": "student"}
    return NoiseRule(kind=kinds[letter], amount=amount)


@dataclass(frozen=True, kw_only=True, eq=False)
class SubjectEmbeddings:
    """What the embedding module gives for the tokens of many subjects, each token once, with its number of occurrences.

    Attributes:
        origin: where the subjects come from, in words.
    """

    vectors: Float[Tensor, "token width"]
    counts: Float[Tensor, " token"]
    n_subjects: int
    origin: str

    @property
    def n_tokens(self) -> int:
        """Tokens of all subjects, repeats counted."""
        return int(self.counts.sum())

    @cached_property
    def std(self) -> float:
        """Of all numbers together, unbiased, in float64."""
        n = self.n_tokens * self.vectors.shape[1]
        mean = (self.counts @ self.vectors).sum() / n
        squares = self.counts @ (self.vectors - mean).square()
        return math.sqrt(float(squares.sum()) / (n - 1))

    @cached_property
    def mean(self) -> Float[Tensor, " width"]:
        """Of the vectors."""
        return self.counts @ self.vectors / self.n_tokens

    @cached_property
    def root(self) -> Float[Tensor, "width width"]:
        """The symmetric square root of their covariance, unbiased."""
        centred = self.vectors - self.mean
        covariance = (centred * self.counts[:, None]).T @ centred / (self.n_tokens - 1)
        values, vectors = torch.linalg.eigh(covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSource:
    """A rule with everything it needs of a model: draws can be taken.

    Attributes:
        width: of the embedding module's output.
        std: standard deviation of one drawn number, on average over the width.
        provenance: the rule and its scale in a sentence.
    """

    rule: NoiseRule
    width: int
    std: float
    provenance: str
    subjects: SubjectEmbeddings | None = None

    def draw(self, seed: int, samples: int, tokens: int, which: int = 1) -> Float[Tensor, "sample token width"]:
        """One draw of the stream, float64, on the CPU.

        Args:
            seed: of the stream, which starts anew at every call.
            which: the first draw of the stream, or a later one of the same shape.
        """
        stream, shape = np.random.RandomState(seed), (which, samples, tokens, self.width)
        drawn = stream.uniform(-1, 1, shape) if self.rule.kind == "uniform" else stream.randn(*shape)
        values = torch.from_numpy(drawn[-1])
        if self.subjects is None or self.rule.kind == "subjects":
            return (self.rule.amount if self.rule.kind == "uniform" else self.std) * values
        varied = values @ self.subjects.root
        if self.rule.kind == "student":
            squares = np.random.RandomState((seed + 1) % 2**32).chisquare(self.rule.amount, (which, samples, tokens))
            varied = varied * torch.from_numpy(np.sqrt((self.rule.amount - 2) / squares[-1]))[..., None]
        return self.subjects.mean + varied


def noise_source(model: ModelHandle, rule: str, facts: str | None = None) -> NoiseSource:
    """A rule's noise for this model.

    Args:
        facts: file of facts whose subjects set the scale; None takes the bundled ones.

    Raises:
        SpecError: the rule cannot be read, or the subjects have too few tokens.
        DatasetError: the file cannot be used.
    """
    read = parse_rule(rule)
    width = model.embed([0]).shape[-1]
    if read.kind == "number":
        named = f"the constant {read.preset}" if read.preset else "given as a number"
        return NoiseSource(rule=read, width=width, std=read.amount, provenance=f"sd {read.amount:g}, {named}")
    if read.kind == "uniform":
        said = f"uniform between -{read.amount:g} and {read.amount:g}"
        return NoiseSource(rule=read, width=width, std=read.amount / math.sqrt(3), provenance=said)
    known = subject_embeddings(model, facts)
    whose = f"{known.n_subjects:,} subjects ({known.n_tokens:,} tokens) of {known.origin}"
    if read.kind == "subjects":
        said = f"{read.amount:g} times {known.std:.6g}, the sd of the embeddings of {whose}"
        return NoiseSource(rule=read, width=width, std=read.amount * known.std, provenance=said, subjects=known)
    shape = "Gaussian" if read.kind == "gaussian" else f"Student's t with {read.amount:g} degrees of freedom"
    std = float(known.root.square().sum(dim=-1).mean().sqrt())
    said = f"{shape} with the mean and covariance of the embeddings of {whose}"
    return NoiseSource(rule=read, width=width, std=std, provenance=said, subjects=known)


def subject_embeddings(model: ModelHandle, facts: str | None = None) -> SubjectEmbeddings:
    """Embeddings of the subjects' tokens, each subject tokenized alone without special tokens.

    Raises:
        SpecError: there are fewer than two tokens.
        DatasetError: the file cannot be used.
    """
    subjects, origin = _subjects(facts)
    encoded = model.tokenizer(list(subjects), add_special_tokens=False)["input_ids"]
    counted = Counter(int(token) for ids in encoded for token in ids if int(token) < model.vocabulary)
    if counted.total() < 2:
        raise SpecError(f"the subjects of {origin} have fewer than two tokens", "give the noise as a number: 0.1")
    tokens = sorted(counted)
    parts = [model.embed(tokens[i : i + _CHUNK]).cpu().double() for i in range(0, len(tokens), _CHUNK)]
    return SubjectEmbeddings(
        vectors=torch.cat(parts),
        counts=torch.tensor([counted[token] for token in tokens], dtype=torch.float64),
        n_subjects=len(subjects),
        origin=origin,
    )


def _subjects(facts: str | None) -> tuple[tuple[str, ...], str]:
    """One subject for every fact, and where the facts come from."""
    if facts is not None:
        from factscope.datasets import read_facts

        found = read_facts(facts)
        return _texts(fact.subject for fact in found.facts), found.name
    from factscope.demo.facts import read_rows

    return _texts(row.subject for row in read_rows()), "the bundled facts"


def _texts(subjects: Iterable[str]) -> tuple[str, ...]:
    return tuple(subject for subject in subjects if subject.strip())
