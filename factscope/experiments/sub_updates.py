"""Which neurons of an MLP write the attributes? Its update at the subject's last token, neuron by neuron.

Source: Geva et al. 2022, *Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary
Space* (arXiv 2203.14680), section 3; LM-Debugger (Geva et al. 2022, arXiv 2204.12130) shows the same.

1. An MLP's update is a sum over its neurons: activation m_i times the row v_i of the down-projection, and the bias.
2. Rank the neurons by the size of what they write, ``|m_i| * norm(v_i)``.
3. Project each sub-update m_i v_i with the output embedding, and report its top tokens and its attributes rate.

In families with a norm behind the MLP the parts are those before that norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from factscope import measures
from factscope.errors import SpecError
from factscope.experiments.attributes_rate import KEPT, TOP, Attribute, gather
from factscope.experiments.results import Progress, Timed, resolve_target, silent, target_warnings, tokenized
from factscope.interventions.weights import down_weight
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import distribution_of_states
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, token_text


@dataclass(frozen=True, kw_only=True)
class SubUpdatesSpec:
    """What is listed.

    Attributes:
        layer: whose MLP.
        neurons: how many neurons, the largest sub-updates first. tokens: how many top tokens of each.
        attributes, kept, top, others, notebook, seed: of the attributes rate (``EnrichmentSpec``).
    """

    layer: int = 0
    neurons: int = 10
    tokens: int = 10
    attributes: str = "bundled"
    kept: int | None = KEPT
    top: int = TOP
    others: int = 10
    notebook: bool = False
    seed: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SubUpdatesResult:
    """The largest sub-updates of one MLP at the subject's last token.

    Attributes:
        p_target, rank: of the target in the model's output.
        attributes: the subject's attribute tokens.
        neurons: by size. activation: m_i of each. size: ``|m_i| * norm(v_i)``; total_size: the norm of their sum over
            all neurons, without the bias.
        rate, other_rate: attributes rate of each sub-update in percent, and its mean for other subjects' attributes.
        top_ids: [neuron, token].
        texts: text and display form of these.
    """

    spec: SubUpdatesSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    p_target: float
    rank: int
    source: str
    attributes: tuple[Attribute, ...]
    neurons: tuple[int, ...]
    activation: np.ndarray
    size: np.ndarray
    total_size: float
    rate: np.ndarray
    other_rate: np.ndarray
    top_ids: np.ndarray
    texts: dict[int, tuple[str, str]]
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def n_attributes(self) -> int:
        """How many attribute tokens are known."""
        return len(self.attributes)

    def table(self) -> pd.DataFrame:
        """One row per neuron."""
        rows = [
            (
                self.spec.layer, neuron, float(self.activation[i]), float(self.size[i]), float(self.rate[i]),
                float(self.other_rate[i]), " ".join(self.texts[int(id)][1] for id in self.top_ids[i]),
            )
            for i, neuron in enumerate(self.neurons)
        ]  # fmt: skip
        names = ["layer", "neuron", "activation", "size", "attributes_rate", "other_subject_rate", "top_tokens"]
        return pd.DataFrame(rows, columns=names)


def run(
    model: ModelHandle,
    query: Query | TokenizedQuery,
    spec: SubUpdatesSpec | None = None,
    *,
    progress: Progress = silent,
) -> SubUpdatesResult:
    """List the neurons that write most at the subject's last token, and what they write.

    Raises:
        InputError: the query, the spec or the source of attributes cannot be used, or it knows none of the subject.
        CapabilityError: the MLP has no neurons that write into one matrix, or states cannot be projected.
    """
    spec = spec or SubUpdatesSpec()
    _check(model, spec)
    model.require("lens", "the attributes rate")
    timed = Timed(progress)
    seen = tokenized(model, query)
    attributes = gather(
        model, seen, spec.attributes,
        kept=spec.kept, top=spec.top, others=spec.others, notebook=spec.notebook, seed=spec.seed,
    )  # fmt: skip
    weight = down_weight(model, spec.layer)
    timed(0, 1, None)
    plan = Plan(capture=frozenset({("neurons", spec.layer)}))
    logits = model.forward(torch.tensor([seen.ids], device=model.device), plan, last=1)[0, -1]
    target = resolve_target(model, seen, logits)
    at = seen.positions("subject-last")[0]
    activation = plan.captured["neurons", spec.layer].reshape(len(seen.ids), -1)[at]
    size = activation.abs().float() * weight.float().norm(dim=-1)
    largest = size.topk(min(spec.neurons, len(size))).indices
    parts = activation[largest, None] * weight[largest]
    rates = attributes.rates(parts)
    top_ids = distribution_of_states(model, parts, (0,), min(spec.tokens, model.vocabulary), raw=True).top_ids
    result = SubUpdatesResult(
        spec=spec, query=seen, model=model.info, target=target,
        p_target=float(measures.probability(logits, target.id)), rank=int(measures.rank(logits, target.id)),
        source=attributes.source, attributes=attributes.listed,
        neurons=tuple(largest.tolist()),
        activation=activation[largest].float().cpu().numpy(), size=size[largest].cpu().numpy(),
        total_size=float((activation @ weight).float().norm()),
        rate=rates.rate,
        other_rate=rates.others.mean(axis=0) if len(rates.others) else np.full(len(largest), np.nan),
        top_ids=top_ids.cpu().numpy(),
        texts={id: token_text(model.tokenizer, id) for id in set(top_ids.flatten().tolist())},
        warnings=(*seen.warnings, *target_warnings(model, seen, target), *attributes.warnings),
        seconds=timed.seconds, passes=1,
    )  # fmt: skip
    timed(1, 1, result)
    return result


def _check(model: ModelHandle, spec: SubUpdatesSpec) -> None:
    layers = model.info.n_layers
    if not 0 <= spec.layer < layers:
        raise SpecError(f"layer {spec.layer} is not between 0 and {layers - 1}", "choose a layer that the model has")
    for name in ("neurons", "tokens"):
        if not 1 <= getattr(spec, name) <= 500:
            raise SpecError(f"{name} {getattr(spec, name)} is not between 1 and 500", "choose a number in that range")
