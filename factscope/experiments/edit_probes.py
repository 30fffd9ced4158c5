"""What an edited fact is asked before and after: its probes, where they come from, and their replies as rows.

1. A taught fact of the bundled model brings paraphrases, neighbours and the subject's other relations; a fact of a file
   those of its record, and what else the file says about its subject. Probes of one's own come from a file.
2. Every probe is tokenized as its own prompt; the edit target and the prompt's true answer follow it.
3. In fact forcing the subject is corrupted here as it was when the edit was made: every prompt that names it has the
   first sample of a causal trace at its own subject tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from factscope.demo.probes import probes_of, taught_fact
from factscope.errors import SubjectError
from factscope.experiments.answers import Question, Reply, ask
from factscope.experiments.edit_scores import Asked, FactProbes, Pair
from factscope.experiments.results import BUNDLED, checked_target, tokenized
from factscope.generation import continue_prompt
from factscope.interventions.base import Noise
from factscope.interventions.noise import NoiseSource
from factscope.models.handle import ModelHandle
from factscope.queries import Fact, Probe, Query
from factscope.tokens import TokenizedQuery, find_spans, token_text

GENERATIONS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedFact:
    """One edited fact with all that is asked about it.

    Attributes:
        prompt: the edited sentence, subject filled in. target: what the edit is to make the answer.
        answer: the true answer; None where it is not known.
        problem: which of the five the edit solves.
        occurrence: which of the prompt's occurrences of the subject is edited, from 1.
        noise: of the subject's embeddings while it is asked; None but in fact forcing. seed: of its draws.
    """

    prompt: str
    subject: str
    target: str
    answer: str | None
    problem: str
    occurrence: int = 1
    probes: tuple[Probe, ...] = ()
    noise: NoiseSource | None = None
    seed: int = 1

    @property
    def contrasts(self) -> bool:
        """Whether the target is another answer than the true one."""
        return self.answer is not None and plain(self.target) != plain(self.answer)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRow:
    """One prompt before and after.

    Attributes:
        fact: number of the fact that it belongs to.
        before, after: replies about the edit target and, where it is known, the true answer; None for texts, and
            ``after`` where it was not asked yet.
        top_before, top_after: the most probable next token. text_before, text_after: how the model goes on.
    """

    fact: int
    probe: Probe
    before: Reply | None = None
    after: Reply | None = None
    top_before: str | None = None
    top_after: str | None = None
    text_before: str | None = None
    text_after: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A probe as the model reads it.

    Attributes:
        seen: its tokens, the subject's among them if it names the edited subject.
    """

    fact: int
    probe: Probe
    seen: TokenizedQuery
    question: Question


def plain(text: str) -> str:
    """An answer without what does not tell it from another one."""
    return " ".join(text.split()).casefold()


def probes_for(
    model: ModelHandle, prompt: str, subject: str, answer: str | None, own: Iterable[Probe] = ()
) -> tuple[Probe, ...]:
    """What there is to ask about one fact: of the bundled model's, what was taught; and one's own probes.

    Args:
        own: probes of a file.
    """
    found: list[Probe] = []
    if model.info.name.removeprefix("random:") == BUNDLED and answer is not None:
        row = taught_fact(prompt, subject, answer)
        found += [] if row is None else probes_of(row, prompt)
    found += answered(own, answer)
    return completed(prompt, found)


def completed(prompt: str, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Without repetitions and the edited sentence itself; with beginnings of texts, if there are none."""
    found = list(probes)
    if not any(probe.kind == "generation" for probe in found):
        begins = dict.fromkeys([prompt, *(probe.prompt for probe in found if probe.kind == "paraphrase")])
        found += [Probe(kind="generation", prompt=text) for text in list(begins)[:GENERATIONS]]
    kept = {(probe.kind, probe.prompt): probe for probe in found}
    return tuple(probe for (kind, text), probe in kept.items() if text != prompt or kind in ("own", "generation"))


def answered(own: Iterable[Probe], answer: str | None) -> list[Probe]:
    """Probes of a file: paraphrases and neighbours that name no answer have the fact's."""
    shares = ("paraphrase", "neighbour")
    return [
        Probe(kind=p.kind, prompt=p.prompt, answer=answer if p.answer is None and p.kind in shares else p.answer)
        for p in own
    ]


def of_one_fact(own: Sequence[Probe], subjects: Sequence[str], number: int) -> list[Probe]:
    """Of one's own probes, what is asked about one of several facts: what names its subject; about the first one also
    what names none of them.
    """
    if len(subjects) == 1:
        return list(own)
    return [
        probe
        for probe in own
        if subjects[number] in probe.prompt or (number == 0 and not any(name in probe.prompt for name in subjects))
    ]


def probes_of_file(fact: Fact, facts: Sequence[Fact]) -> tuple[Probe, ...]:
    """What a file of facts has to ask about one of them."""
    found = [Probe(kind="paraphrase", prompt=text, answer=fact.answer) for text in fact.paraphrases]
    found += [Probe(kind="neighbour", prompt=text, answer=fact.answer) for text in fact.neighbours]
    found += [
        Probe(kind="other-relation", prompt=other.prompt, answer=other.answer)
        for other in facts
        if other.subject == fact.subject and (other.relation, other.answer) != (fact.relation, fact.answer)
    ]
    return (*found, *(Probe(kind="generation", prompt=text) for text in fact.generations[:GENERATIONS]))


def template_of(seen: TokenizedQuery) -> tuple[str, str]:
    """The prompt with ``{}`` where its subject is, and the subject as it stands there.

    Raises:
        SubjectError: the query has no subject, or its tokens do not spell text of the prompt.
    """
    subject, prompt = seen.subject_text, seen.query.prompt
    if seen.subject is None or subject is None:
        raise SubjectError("an edit changes what the model says of a subject, and the query has none", "name it")
    found = find_spans(prompt, subject)
    if not found:
        raise SubjectError(f"the chosen tokens {subject!r} are no text of the prompt", "name the subject in words")
    before = sum(len(token.text) for token in seen.tokens[: seen.subject[0]] if token.role != "special")
    start, stop = min(found, key=lambda span: abs(span[0] - before))
    return f"{prompt[:start]}{{}}{prompt[stop:]}", prompt[start:stop]


# --------------------------------------------------------------------------------------------------------- asking


def prompts_of(model: ModelHandle, facts: Sequence[ProbedFact]) -> list[Prompt]:
    """Every prompt of every fact, texts apart, the edited sentence first.

    Raises:
        InputError: a prompt or an answer cannot be used.
        ModelFilesError: the tokenizer is not this model's.
    """
    return [
        _prompt(model, number, fact, probe)
        for number, fact in enumerate(facts)
        for probe in (Probe(kind="fact", prompt=fact.prompt, answer=fact.answer), *fact.probes)
        if probe.kind != "generation"
    ]


def _prompt(model: ModelHandle, number: int, fact: ProbedFact, probe: Probe) -> Prompt:
    seen = read_prompt(model, probe.prompt, fact.subject, fact.occurrence if probe.kind == "fact" else 1)
    texts = [fact.target] if probe.answer is None else [fact.target, probe.answer]
    answers = tuple(checked_target(model, seen, text, "answer").ids for text in texts)
    question = Question(ids=seen.ids, answers=answers, noise=noise_on(fact, seen))
    return Prompt(fact=number, probe=probe, seen=seen, question=question)


def read_prompt(model: ModelHandle, prompt: str, subject: str, occurrence: int = 1) -> TokenizedQuery:
    """A prompt's tokens; where it does not name the subject, without one."""
    try:
        return tokenized(model, Query(prompt=prompt, subject=subject, occurrence=occurrence))
    except SubjectError:
        return tokenized(model, Query(prompt=prompt))


def noise_on(fact: ProbedFact, seen: TokenizedQuery) -> Noise | None:
    """The noise that a prompt has in fact forcing: the first sample of a trace, at its own subject tokens."""
    if fact.noise is None or seen.subject is None:
        return None
    positions = tuple(range(*seen.subject))
    return Noise(positions=positions, values=fact.noise.draw(fact.seed, 1, len(positions)))


def replies(model: ModelHandle, prompts: Sequence[Prompt], step: Callable[[], None]) -> list[Reply]:
    """What a model answers to all of them."""
    return ask(model, [prompt.question for prompt in prompts], step=step)


def goes_on(model: ModelHandle, prompt: Prompt, tokens: int, step: Callable[[], None]) -> str:
    """How the model goes on, greedily, to the end of the sentence."""
    noise = prompt.question.noise
    return continue_prompt(model, prompt.seen.ids, tokens, sentence=True, noise=noise, step=step)[0].text


def top_text(model: ModelHandle, reply: Reply) -> str:
    """The most probable next token."""
    return token_text(model.tokenizer, reply.top)[0]


def probed(rows: Sequence[ProbeRow], facts: Sequence[ProbedFact], *, base: bool = False) -> list[FactProbes]:
    """Every fact's prompts for scoring.

    Args:
        base: the state before in the place of that after, for the scores that say how it was.
    """
    found = []
    for number, fact in enumerate(facts):
        pairs: dict[str, list[Pair]] = {}
        for row in rows:
            if row.fact == number and row.before is not None and row.after is not None:
                after = row.before if base else row.after
                pairs.setdefault(row.probe.kind, []).append(Pair(before=_asked(row.before), after=_asked(after)))
        found.append(
            FactProbes(
                fact=next(iter(pairs["fact"])),
                paraphrases=tuple(pairs.get("paraphrase", ())),
                neighbours=tuple(pairs.get("neighbour", ())),
                others=tuple(pairs.get("other-relation", ())),
                contrasts=fact.contrasts,
            )
        )
    return found


def _asked(reply: Reply) -> Asked:
    target, *rest = reply.answers
    return Asked(target=target, true=rest[0] if rest else None)
