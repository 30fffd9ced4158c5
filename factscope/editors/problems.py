"""What an edit is asked to do. Hase et al.'s five problems.

Source: Hase et al. 2023 (arXiv 2301.04213), section 5 and appendix A, and the released code.

| problem | target | prompt at the edit | the edit makes it |
|---|---|---|---|
| error injection | another answer | as it is | more probable |
| tracing reversal | what the model says once its subject is noised | as it is | more probable |
| fact erasure | the true answer | as it is | less probable |
| fact amplification | the true answer | as it is | more probable |
| fact forcing | the true answer | subject noised | more probable |

The true answer is the one that the fact names; where it names none, the model's own first token. Noise is that of
causal tracing, its scale measured on this model. The target of tracing reversal is one text sampled among the five most
probable tokens after the prompt with its first noise sample, up to twelve tokens with the prompt and at least one, to
the end of its sentence. The released code keeps the prompt in that target (``strip_prompt=False``), so that the edit
makes the model repeat the prompt, and gives prompts of twelve tokens no new token at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from factscope.editors.edit import EditFact
from factscope.editors.noise import RowNoise
from factscope.editors.prompts import PLAIN, Rows, asked, rows, target_of
from factscope.editors.specs import PROBLEMS, FactToken, ProblemSpec
from factscope.editors.targets import Objective
from factscope.errors import SpecError, TargetError
from factscope.generation import Sampling, continue_prompt
from factscope.interventions.base import Noise
from factscope.interventions.noise import NoiseSource, noise_source
from factscope.models.handle import ModelHandle
from factscope.tokens import Target, token_text

REVERSAL_TOKENS = 12
REVERSAL_TOP_K = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One fact as one problem asks for it.

    Attributes:
        fact: with the target that is edited and the true answer filled in.
        target: its tokens behind the plain prompt.
        source: of the noise on the subject; None where there is none.
        warnings: for the user.
    """

    model: ModelHandle
    fact: EditFact
    target: Target
    objective: Objective
    spec: ProblemSpec
    source: NoiseSource | None
    warnings: tuple[str, ...] = ()

    def rows(
        self, templates: Sequence[str] = (PLAIN,), fact_token: FactToken = "subject_last", *, essence: bool = False
    ) -> Rows:
        """The prompt in every context, the target behind it."""
        return rows(self.model, self.fact, templates, self.target, fact_token, essence=essence)

    def noise(self, seen: Rows) -> RowNoise | None:
        """The noise of these rows, from the beginning of its stream."""
        if self.source is None:
            return None
        return RowNoise(self.source, seen.subjects, seed=self.spec.seed, fresh=self.spec.noise_at == "compat")


def task(model: ModelHandle, fact: EditFact, spec: ProblemSpec, *, step: Callable[[], None] = lambda: None) -> Task:
    """What a problem makes of a fact.

    Args:
        step: called between forwards; may raise to end it.

    Raises:
        InputError: the fact's prompt, subject or target cannot be used.
        SpecError: the problem is unknown, or a rule for the noise cannot be read.
    """
    if spec.problem not in PROBLEMS:
        raise SpecError(f"problem {spec.problem!r} is unknown", f"choose one of {', '.join(PROBLEMS)}")
    if spec.noise_at not in ("aligned", "compat"):
        raise SpecError(f"noise at {spec.noise_at!r} is unknown", "choose aligned or compat")
    step()
    noisy = spec.problem in ("tracing-reversal", "fact-forcing")
    source = noise_source(model, spec.noise) if noisy else None
    text, answer, said = _target(model, fact, spec, source, step)
    target = target_of(model, fact, text)
    if spec.problem == "error-injection" and answer is not None and _alike(text, answer):
        raise TargetError(
            f"the target {text.strip()!r} is the answer that is to be changed",
            "choose another target, or another problem",
        )
    return Task(
        model=model,
        fact=replace(fact, target=text.strip(), answer=answer),
        target=target,
        objective="minimise" if spec.problem == "fact-erasure" else "maximise",
        spec=spec,
        source=source if spec.problem == "fact-forcing" else None,
        warnings=said,
    )


def _target(
    model: ModelHandle, fact: EditFact, spec: ProblemSpec, source: NoiseSource | None, step: Callable[[], None]
) -> tuple[str, str | None, tuple[str, ...]]:
    """Target, true answer, and what is to be said of them."""
    own = _first_choice(model, fact)
    if spec.problem == "error-injection":
        if not fact.target.strip():
            raise TargetError("the target is empty", "name what the model is to say instead")
        target = target_of(model, fact, fact.target)
        already = fact.answer is None and _is_first_choice(model, fact, target)
        said = (f"{fact.target.strip()!r} is the model's first choice already.",) if already else ()
        return fact.target, fact.answer, said
    answer = fact.answer if fact.answer is not None and fact.answer.strip() else own
    named = (
        () if fact.answer else (f"No true answer was named; the model's own first token {own.strip()!r} was taken.",)
    )
    if spec.problem != "tracing-reversal":
        return answer, answer, named
    assert source is not None
    text = _noised_text(model, fact, spec, source, step)
    same = (f"The noised prompt gives the true answer {answer.strip()!r} too.",) if _alike(text, answer) else ()
    return text, answer, (*named, *same)


def _first_choice(model: ModelHandle, fact: EditFact) -> str:
    ids = torch.tensor([asked(model, fact).ids], device=model.device)
    return token_text(model.tokenizer, int(model.forward(ids, last=1)[0, -1].argmax()))[0]


def _is_first_choice(model: ModelHandle, fact: EditFact, target: Target) -> bool:
    ids = torch.tensor([[*asked(model, fact).ids, *target.ids[:-1]]], device=model.device)
    return model.forward(ids, last=target.n_tokens)[0].argmax(dim=-1).tolist() == list(target.ids)


def _noised_text(
    model: ModelHandle, fact: EditFact, spec: ProblemSpec, source: NoiseSource, step: Callable[[], None]
) -> str:
    """What the model goes on with once the subject is noised; with the prompt before it where that is asked for."""
    seen = asked(model, fact)
    assert seen.subject is not None
    start, stop = seen.subject
    noise = Noise(positions=tuple(range(start, stop)), values=source.draw(spec.seed, 1, stop - start))
    room = REVERSAL_TOKENS - len(seen.ids)
    limit = max(1, room) if spec.strip_prompt else max(0, room)
    sampling = Sampling(top_k=min(REVERSAL_TOP_K, model.vocabulary), seed=spec.seed)
    found = continue_prompt(
        model, seen.ids, limit, sampling=sampling, noise=noise, sentence=spec.strip_prompt, step=step
    )[0]
    if not spec.strip_prompt:
        return model.tokenizer.decode([*seen.ids, *found.ids], skip_special_tokens=True)
    text = found.text.strip()
    text = text.rstrip(".!?\n") or text
    if not text.strip():
        raise TargetError(
            f"the noised prompt {seen.query.prompt[:60]!r} goes on with nothing", "choose another seed or another noise"
        )
    return text


def _alike(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()
