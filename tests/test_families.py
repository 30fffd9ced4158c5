"""Knockout, lens and capabilities on every family of tests/tiny_models, against multiplied attention weights."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from factscope.errors import CapabilityError, ModelUnsupported
from factscope.experiments.attention_knockout import KnockoutSpec, run
from factscope.experiments.logit_lens import LensSpec, record_states
from factscope.experiments.logit_lens import run as lens
from factscope.experiments.prediction import run as predict
from factscope.models.catalogue import MEANINGS
from factscope.models.creation import creating
from factscope.models.handle import ModelHandle
from factscope.tokens import tokenize
from tests.oracle import brute_force
from tests.oracle.comparison import curve_sets, grid
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on
from tests.oracle.plain import edges
from tests.tiny_models import FAMILIES, MODEL_TYPES

ROUNDING = 1e-5
LENGTH = 8
LAST = LENGTH - 1
LAYERS = 4
SPAN = (2, 5)
NO_ATTENTION = {"mamba"}
CUTTABLE = tuple(name for name in FAMILIES if name not in NO_ATTENTION)

NO_SPLIT = "no pair of module outputs adds up to what the block adds (every layer)"
NOT_DENSE = "no single dense down-projection"
NO_MASK = "no attention that takes a mask"
UNSUPPORTED: dict[str, dict[str, str]] = {
    "opt_350m": {"additive": NO_SPLIT, "direct": NO_SPLIT},  # the norm comes after the sum
    "falcon_rw": {"sources": "does not tell its weights"},  # its ALiBi is right in the fused attention alone
    "mixtral": {"dense_mlp": NOT_DENSE},
    "qwen2_moe": {"dense_mlp": f"{NOT_DENSE}|layers 0, 2, 3"},
    "olmoe": {"dense_mlp": NOT_DENSE},
    "gpt_oss": {"dense_mlp": NOT_DENSE},
    "deepseek_v3": {"dense_mlp": f"{NOT_DENSE}|layers 1, 2, 3", "mappings": "no linear map"},  # a norm inside
    "mamba": {
        "knockout": NO_MASK,
        "head_knockout": NO_MASK,
        "suffix": NO_MASK,
        "additive": NO_SPLIT,
        **dict.fromkeys(("heads", "direct", "sources", "mappings"), "does not split into heads"),
        "dense_mlp": NOT_DENSE,
    },
}
"""What a family lacks, and words that its reason must contain; everything else must be there."""


@lru_cache(maxsize=4)
def family(name: str, seed: int = 0) -> tuple[PreTrainedModel, ModelHandle]:
    """The plain model, without hooks, and a handle of its copy."""
    model = FAMILIES[name](seed)
    return model, handle_of(model, name)


def cells_of(size: int) -> list[set[Any]]:
    """Map, then curve, row by row."""
    sets = [[p] for p in range(LENGTH)] + curve_sets(LENGTH, SPAN)
    return list(grid(sets, size, LAYERS, [LAST]).values())


def visible_prompt(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> tuple[list[int], np.ndarray, float]:
    """A prompt of which at least half of the cells move p by more than 0.05, the expected p of each cell, and p_base.

    Sliding windows leave some cells without an edge to cut, so not every prompt will do.
    """
    runs = [set(), *cells_of(1), *cells_of(3)]
    for seed in range(40):
        ids = distinct_prompt(model, LENGTH, seed)
        p = brute_force.logits(model, ids, runs, patch).double().softmax(dim=-1)
        target = p[0].argmax()
        moved = (p[1:, target] - p[0, target]).abs() > 0.05
        if float(moved.double().mean()) >= 0.5:
            return ids, p[1:, target].numpy(), float(p[0, target])
    raise AssertionError("no prompt on which the knockouts show")


def test_there_are_enough_families() -> None:
    assert len(CUTTABLE) >= 30
    assert len({MODEL_TYPES[name] for name in CUTTABLE}) >= 20


@pytest.mark.parametrize("name", CUTTABLE)
def test_knockout_is_the_multiplied_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = family(name)
    ids, expected, p_base = visible_prompt(model, monkeypatch)
    found = []
    for size in (1, 3):
        for sources in (("each",), ("subject", "relation", "last")):
            result = run(handle, query_on(ids, SPAN), KnockoutSpec(sources=sources, window=size))
            assert result.p_base == pytest.approx(p_base, abs=ROUNDING)
            found.append(result.p_knockout.ravel())
    assert float(np.abs(np.concatenate(found) - expected).max()) <= ROUNDING


@pytest.mark.parametrize("name", CUTTABLE)
def test_edges_and_heads_are_the_multiplied_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier queries and chosen heads: more than one token runs on the cached prefix."""
    model, handle = family(name)
    ids = distinct_prompt(model, LENGTH, seed=2)
    n_heads = handle.info.n_heads
    cases: dict[tuple[str, ...], set[Any]] = {
        ("5-6:3+4:*", "last:subject:2-3:0"): edges(range(4), [5, 6], [3, 4]) | edges([2, 3], [LAST], [2, 3, 4], [0]),
        ("4:3:1-3", "last:5-6:0-1:1-2"): edges([1, 2, 3], [4], [3]) | edges([0, 1], [LAST], [5, 6], [1, 2]),
        ("2-7:1:*", "last:6:3:*"): edges(range(4), range(2, 8), [1]) | edges([3], [LAST], [6]),
    }
    p = brute_force.logits(model, ids, [set(), *cases.values()], monkeypatch).double().softmax(dim=-1)
    target = p[0].argmax()
    assert n_heads >= 3
    for texts, expected in zip(cases, p[1:, target], strict=True):
        result = run(handle, query_on(ids, SPAN), KnockoutSpec(edges=texts))
        assert float(result.p_knockout[0, 0]) == pytest.approx(float(expected), abs=ROUNDING)
    assert float((p[1:, target] - p[0, target]).abs().max()) > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_capabilities_and_their_reasons(name: str) -> None:
    _, handle = family(name)
    assert set(handle.capabilities) == set(MEANINGS)
    missing = {key: found.reason for key, found in handle.capabilities.items() if not found.ok}
    missing.pop("packed", None)  # only a matter of speed: the same numbers come out without it
    expected = UNSUPPORTED.get(name, {})
    assert set(missing) == set(expected), missing
    for key, wanted in expected.items():
        assert all(part in missing[key] for part in wanted.split("|")), missing[key]
    assert all(found.reason == "" for found in handle.capabilities.values() if found.ok)


@pytest.mark.parametrize("name", FAMILIES)
def test_last_lens_row_is_the_output(name: str) -> None:
    model, handle = family(name)
    ids = distinct_prompt(model, LENGTH, seed=1)
    result = lens(handle, query_on(ids, SPAN), LensSpec(top_k=5))
    with torch.no_grad():
        p = model(torch.tensor([ids]), use_cache=False).logits[0].softmax(-1).numpy()
    own = np.take_along_axis(p, result.top_ids[-1], -1)
    assert float(np.abs(own - result.top_probability[-1]).max()) <= ROUNDING
    assert float(np.abs(p[:, result.target.ids[0]] - result.target_probability[-1]).max()) <= ROUNDING
    assert float(np.abs(result.target_probability[0] - result.target_probability[-1]).max()) > 0.05


@pytest.mark.parametrize("name", [name for name in FAMILIES if "additive" not in UNSUPPORTED.get(name, {})])
def test_updates_add_up_to_the_stream(name: str) -> None:
    """Embedding, attention updates and MLP updates sum to every block's output."""
    model, handle = family(name)
    query = tokenize(query_on(distinct_prompt(model, LENGTH, seed=1), SPAN), handle.tokenizer)
    _, blocks, _ = record_states(handle, query, "block")
    _, attention, _ = record_states(handle, query, "attention")
    _, mlp, _ = record_states(handle, query, "mlp")
    assert blocks.shape[0] == LAYERS + 1
    added = blocks[0] + (attention + mlp).cumsum(dim=0)
    scale = float(blocks.abs().max())
    assert float((added - blocks[1:]).abs().max()) <= 1e-5 * scale
    assert float(attention.norm(dim=-1).amin()) > 0
    assert float(mlp.norm(dim=-1).amin()) > 0


@pytest.mark.parametrize("name", ["mamba", "opt_350m"])
def test_what_is_missing_is_refused_with_its_reason(name: str) -> None:
    model, handle = family(name)
    query = query_on(distinct_prompt(model, LENGTH, seed=1), SPAN)
    for site in ("mlp", "attention"):
        with pytest.raises(CapabilityError, match="no pair of module outputs"):
            lens(handle, query, LensSpec(site=site))
    assert lens(handle, query, LensSpec(site="block")).rank == 1
    assert predict(handle, query).rank == 1
    if name == "mamba":
        with pytest.raises(CapabilityError, match=NO_MASK):
            run(handle, query)


def test_a_raw_lens_of_states_that_do_not_fit_the_embedding_is_refused() -> None:
    """OPT-350m's stream is wider than its output embedding."""
    model, handle = family("opt_350m")
    query = query_on(distinct_prompt(model, LENGTH, seed=1), SPAN)
    with pytest.raises(CapabilityError):
        lens(handle, query, LensSpec(projection="raw"))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_model_that_reads_both_ways_is_refused(model_type: str) -> None:
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING[model_type](**settings, intermediate_size=48, max_position_embeddings=64)
    with creating(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ModelUnsupported, match="not a causal model"):
        handle_of(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen2", "mistral", "falcon_7b"])
def test_fused_attention_gives_the_same(name: str) -> None:
    """Under sdpa a layer gets no mask, a boolean one, or, in one model, now this and now that."""
    model, handle = family(name)
    fused = copy.deepcopy(model)
    fused.set_attn_implementation("sdpa")
    other = handle_of(fused, name)
    assert all(found.ok for key, found in other.capabilities.items() if key not in ("packed", "sources"))
    told = other.capabilities["sources"]
    assert told.ok == (name == "falcon_7b") or "does not tell its weights" in told.reason
    ids = distinct_prompt(model, LENGTH, seed=1)
    specs = (KnockoutSpec(sources=("each",), window=1), KnockoutSpec(edges=("5-6:3+4:*", "last:subject:2-3:0")))
    for spec in specs:
        expected, found = (run(one, query_on(ids, SPAN), spec) for one in (handle, other))
        assert float(np.abs(expected.p_knockout - found.p_knockout).max()) <= ROUNDING


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_half_precision_agrees_with_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 keeps three digits: knockouts agree with multiplied attention in the same type within 0.03."""
    model = copy.deepcopy(FAMILIES[name](0)).to(torch.bfloat16)
    handle = handle_of(model, name, dtype="bfloat16")
    assert handle.capabilities["knockout"].ok
    assert handle.capabilities["suffix"].ok
    assert handle.capabilities["additive"].ok
    ids, expected, _ = visible_prompt(model, monkeypatch)
    result = run(handle, query_on(ids, SPAN), KnockoutSpec(sources=("each",), window=1))
    error = np.abs(result.p_knockout.ravel() - expected[: LENGTH * LAYERS])
    assert result.model.dtype == "bfloat16"
    assert float(error.max()) <= 0.1
    assert float(error.mean()) <= 0.015
