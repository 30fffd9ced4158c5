"""What one fact shows of recall: every number that the claims of the two papers are about, as one flat record.

Geva et al. 2023 (arXiv 2304.14767): knockouts, attributes rates, extraction, mappings. Meng et al. 2022 (arXiv
2202.05262) and Hase et al. 2023 (arXiv 2301.04213): traces of states and of updates, severed ones, zeroed updates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from factscope import (
    EnrichmentSpec,
    ExtractionSpec,
    HeadsSpec,
    KnockoutSpec,
    ModelHandle,
    PredictionSpec,
    Query,
    TraceSpec,
    ZeroingSpec,
    attention_knockout,
    attribute_extraction,
    causal_tracing,
    heads,
    predict,
    representation_zeroing,
    subject_enrichment,
    tokenize,
)
from factscope.demo.facts import read_rows, read_sentences
from factscope.demo.phenomena import low_diversity
from factscope.demo.prompts import Asked, first_prompts
from factscope.demo.sentences import is_dev
from factscope.experiments.traces import TraceResult

CONTROLS = 5
BLOCKED = ("subject", "subject-last", "relation", "last")

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Facts in a seeded order: to choose layers on, and to measure. No subject is in both."""

    choosing: tuple[Asked, ...]
    measured: tuple[Asked, ...]
    left_out: tuple[str, ...]


def draw(seed: int) -> Drawn:
    """All facts of relations with many answers, in the sentence that is asked first, in an order of the seed.

    Layers are chosen on the half of the subjects on which the model's recipe was chosen, too.
    """
    rows = read_rows()
    dull = low_diversity(rows)
    asked = [one for one in first_prompts(rows, read_sentences()) if one.row.relation not in dull]
    order = Random(seed).sample(asked, len(asked))
    halves: dict[bool, list[Asked]] = defaultdict(list)
    for one in order:
        halves[is_dev(one.row.subject)].append(one)
    return Drawn(choosing=tuple(halves[True]), measured=tuple(halves[False]), left_out=tuple(sorted(dull)))


def query_of(asked: Asked, *, own_answer: bool = False) -> Query:
    """The question; with ``own_answer`` about whatever the model's first choice is."""
    return Query(prompt=asked.text, subject=asked.row.subject, answer=None if own_answer else asked.row.answer)


def why_not(model: ModelHandle, asked: Asked) -> str | None:
    """Why a fact cannot be measured: no position between subject and read-out, or an answer the model does not give."""
    found = predict(model, query_of(asked), PredictionSpec(continuation_tokens=0))
    if found.query.subject is None or found.query.subject[1] > found.query.last:
        return "the subject ends the prompt"
    return None if found.known else "the model does not answer it"


def measure(model: ModelHandle, asked: Asked, *, read_layer: int, own_answer: bool = False) -> Record:
    """One record.

    Args:
        read_layer: whose output the attributes rate of the sublayer knockout is read from.
        own_answer: measure the model's own first choice, as for random weights, which know nothing.
    """
    query = query_of(asked, own_answer=own_answer)
    seen = tokenize(query, model.tokenizer)
    assert seen.subject is not None
    record: Record = {
        "prompt": asked.text,
        "subject": asked.row.subject,
        "relation": asked.row.relation,
        "subject_tokens": seen.subject[1] - seen.subject[0],
    }
    for part in (_flow(model, query), _enrichment(model, query, read_layer), _extraction(model, query)):
        record |= part
    return record | _traces(model, query)


def _flow(model: ModelHandle, query: Query) -> Record:
    found = attention_knockout(model, query, KnockoutSpec(control=CONTROLS))
    removed = -found.relative_change_percent
    record: Record = {"p": found.p_base, "rank": found.rank}
    for source in ("subject", "relation", "last"):
        if source in found.sources:
            index = found.sources.index(source)
            record[f"removed {source}"] = removed[index].tolist()
            record[f"odds {source}"] = found.log_odds_change[index].tolist()
    controls = [removed[i] for i, source in enumerate(found.sources) if source.startswith("control")]
    if controls:
        record["removed control"] = np.mean(controls, axis=0).tolist()
    return record


def rates(model: ModelHandle, query: Query) -> Record:
    """Attributes rates by position and layer, beside those of other subjects' attributes."""
    found = subject_enrichment(model, query, EnrichmentSpec())
    record: Record = {"ceiling": found.ceiling, "attributes": found.n_attributes}
    for index, name in enumerate(found.positions):
        shown = ~np.isnan(found.rate[index])
        record[f"rate {name}"] = found.rate[index][shown].tolist()
        record[f"other rate {name}"] = found.other_rate[index][shown].tolist()
    return record


def _enrichment(model: ModelHandle, query: Query, read_layer: int) -> Record:
    record = rates(model, query)
    for site in ("mlp", "attention"):
        found = subject_enrichment(model, query, EnrichmentSpec(knockout=site, read_layer=read_layer))
        record[f"rate without {site}"] = found.rate[0].tolist()
        record["rate to lose"] = found.base_rate
    return record


def _extraction(model: ModelHandle, query: Query) -> Record:
    plain = attribute_extraction(model, query, ExtractionSpec(early="subject"))
    record: Record = {
        "update rank attention": plain.target_rank[plain.sites.index("attention")].tolist(),
        "update rank mlp": plain.target_rank[plain.sites.index("mlp")].tolist(),
        "state rank": plain.state_rank.tolist(),
        "early layers": list(plain.early_layers),
        "early rank": plain.early_rank.tolist(),
    }
    for name in BLOCKED:
        blocked = attribute_extraction(model, query, ExtractionSpec(edges=f"block:{name}"))
        record[f"update rank without {name}"] = blocked.target_rank[blocked.sites.index("attention")].tolist()
    record["mapping"] = heads(model, query, HeadsSpec()).mapping_found.any(axis=1).tolist()
    return record


def _traces(model: ModelHandle, query: Query) -> Record:
    whole = causal_tracing(model, query, TraceSpec())
    record: Record = {"total effect": whole.total_effect, "effect last": _effect(whole, whole.query.last)}
    assert whole.query.subject is not None
    first, stop = whole.query.subject
    record |= {"effect subject-last": _effect(whole, stop - 1), "effect subject-first": _effect(whole, first)}
    for site in ("mlp", "attention"):
        updates = causal_tracing(model, query, TraceSpec(site=site, positions=("subject-last", "last")))
        record[f"{site} subject-last"] = _effect(updates, stop - 1)
        record[f"{site} last"] = _effect(updates, whole.query.last)
        severed = causal_tracing(model, query, TraceSpec(sever=site, positions=("subject-last",)))
        record[f"severed {site}"] = _effect(severed, stop - 1)
    traced = causal_tracing(model, query, TraceSpec(site="mlp", positions=("subject", "relation", "last")))
    record["tracing effect"] = traced.tracing_effect().tolist()
    zeroed = representation_zeroing(model, query, ZeroingSpec())
    record["zeroed"] = zeroed.fraction_removed[0].tolist()
    return record


def _effect(result: TraceResult, position: int) -> list[float]:
    return result.indirect_effect[result.positions.index(position)].tolist()


def known(model: ModelHandle, asked: Sequence[Asked], count: int) -> Iterator[tuple[Asked, str | None]]:
    """Facts in their order with the reason why one is left out, until so many are not."""
    taken = 0
    for one in asked:
        if taken >= count:
            return
        reason = why_not(model, one)
        taken += reason is None
        yield one, reason
