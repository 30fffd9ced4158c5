"""Subject enrichment on every family: against whole forwards in float64, and what must hold for any weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from factscope.errors import CapabilityError
from factscope.experiments.sub_updates import SubUpdatesSpec
from factscope.experiments.sub_updates import run as sub_updates
from factscope.experiments.subject_enrichment import EnrichmentSpec, default_read_layer, default_window, run
from factscope.interventions.base import record_base
from factscope.interventions.engine import run as engine_run
from factscope.interventions.intervention import Intervention, Patch
from factscope.models.handle import ModelHandle
from tests.oracle import enrichment
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, words
from tests.oracle.questions import on_path, paths_of
from tests.oracle.whole import Put, Whole
from tests.tiny_models import FAMILIES, MODEL_TYPES, N_LAYERS

LENGTH, SPAN, M, READ = 8, (2, 5), 20, 2
AT = SPAN[1] - 1
ABOUT = (31, 40, 77, 58, 90, 12, 66, 23, 84, 17, 19, 35, 36, 52, 53, 60, 61, 72, 80, 88, 93, 11, 49, 28, 43)
OTHER = (10, 44, 95, 20, 21, 22, 33, 34, 47, 48, 64, 65)
NOT_ADDITIVE = {"opt_350m", "mamba"}
NARROW_HEAD = {"opt_350m"}
ADDITIVE = tuple(name for name in FAMILIES if name not in NOT_ADDITIVE)
SITES: tuple[Literal["mlp", "attention"], ...] = ("mlp", "attention")


@lru_cache(maxsize=1)
def known(name: str) -> tuple[Any, ModelHandle, list[int]]:
    model = FAMILIES[name](0)
    return model, handle_of(model, name), distinct_prompt(model, LENGTH, seed=2)


@pytest.fixture
def table(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    _, _, ids = known(request.getfixturevalue("name"))
    about = {words(ids[slice(*SPAN)]): ABOUT, "other": OTHER}
    return enrichment.write_table(tmp_path / "about.csv", about)


def asked(table: str, **more: Any) -> EnrichmentSpec:
    return EnrichmentSpec(attributes=table, kept=M, others=1, **more)


def test_there_are_enough_families() -> None:
    assert len({MODEL_TYPES[name] for name in ADDITIVE}) >= 20


@pytest.mark.parametrize("name", ADDITIVE)
def test_rates_and_knockouts_are_those_of_whole_forwards(name: str, table: str) -> None:
    """On a copy of the model in float64, zeros put in by hooks for one forward."""
    model, handle, ids = known(name)
    whole, head = Whole(model), model.get_output_embeddings().weight.detach().double()
    own = enrichment.attribute_ids(ABOUT, ids[slice(*SPAN)])

    def expected(read: int, puts: list[Put]) -> float:
        state = whole.run(ids, puts=puts, record=True).states[read + 1][AT]
        return enrichment.rate(head @ state, own, ids[slice(*SPAN)], M)

    plain = run(handle, query_on(ids, SPAN), asked(table, positions=("subject-last",)))
    assert plain.rate[0] == pytest.approx([expected(layer, []) for layer in range(N_LAYERS)], abs=1e-5)
    zero = torch.zeros(whole.width, dtype=torch.float64)
    for site in SITES:
        result = run(handle, query_on(ids, SPAN), asked(table, knockout=site, window=1, read_layer=READ))
        puts = [
            [Put(layer=layer, site=site, position=p, vector=zero) for p in range(*SPAN)] for layer in range(N_LAYERS)
        ]
        assert result.rate[0] == pytest.approx([expected(READ, one) for one in puts], abs=1e-5)
        assert result.base_rate == plain.rate[0, READ]


@pytest.mark.parametrize("name", ADDITIVE)
def test_what_is_cancelled_above_the_layer_that_is_read_changes_nothing(name: str, table: str) -> None:
    _, handle, ids = known(name)
    for read in (0, 1):
        for site in SITES:
            result = run(handle, query_on(ids, SPAN), asked(table, knockout=site, window=1, read_layer=read))
            for center in range(read + 1, N_LAYERS):
                assert result.rate[0, center] == result.base_rate
                assert result.other_rates[:, 0, center].tolist() == list(result.base_other_rates)


@pytest.mark.parametrize("name", ADDITIVE)
def test_cancelling_nothing_is_the_plain_state_and_updates_above_leave_it_bit_for_bit(name: str) -> None:
    _, handle, ids = known(name)
    for path in paths_of(handle):
        own = on_path(handle, path)
        base = record_base(own, ids[: SPAN[1]], updates=SITES).up_to(READ)
        above = tuple(Patch(layer=N_LAYERS - 1, site=site, positions=(2, 3, 4)) for site in SITES)
        (found,) = engine_run(own, base, [Intervention(), Intervention(patches=above)])
        states = found[1].final_states()
        assert torch.equal(states, base.states[-1][None, :, -1:].expand_as(states))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NARROW_HEAD])
def test_what_follows_the_subject_does_not_matter_to_its_tokens(name: str, table: str) -> None:
    _, handle, ids = known(name)
    other = [*ids[: SPAN[1]], *reversed(ids[SPAN[1] :])]
    spec = asked(table, positions=("subject-first", "subject-last", "mean-embedding"))
    one, two = (run(handle, query_on(prompt, SPAN), spec) for prompt in (ids, other))
    assert np.array_equal(one.rate, two.rate, equal_nan=True)
    table_ = one.table()
    assert list(table_.columns) == ["position", "layer", "attributes_rate", "ceiling", "other_subject_rate"]
    assert len(table_) == 2 * N_LAYERS + 1
    assert table_["attributes_rate"].between(0, 100).all()
    assert (table_["attributes_rate"] <= table_["ceiling"] + 1e-9).all()


@pytest.mark.parametrize("name", [*ADDITIVE])
def test_sub_updates_sum_to_the_update(name: str, table: str) -> None:
    _, handle, ids = known(name)
    spec = SubUpdatesSpec(layer=1, attributes=table, kept=M, others=1, neurons=500)
    if not handle.capabilities["dense_mlp"].ok:
        with pytest.raises(CapabilityError, match="dense down-projection"):
            sub_updates(handle, query_on(ids, SPAN), spec)
        return
    result = sub_updates(handle, query_on(ids, SPAN), spec)
    before_norm: list[Any] = []
    projection: Any = handle.parts.wiring.down_projection[1]
    hook = projection.register_forward_hook(lambda module, args, output: before_norm.append(output.clone()))
    with torch.no_grad():
        handle._model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    given = before_norm[0].reshape(LENGTH, -1)[AT]
    bias = 0.0 if getattr(projection, "bias", None) is None else projection.bias
    assert result.total_size == pytest.approx(float((given - bias).norm()), rel=1e-4, abs=1e-5)
    assert (np.diff(result.size) <= 0).all()
    assert result.top_ids.shape == (len(result.neurons), 10)


@pytest.mark.parametrize("name", ["opt_350m", "mamba"])
def test_what_is_missing_is_refused_with_its_reason(name: str, table: str) -> None:
    _, handle, ids = known(name)
    for site in SITES:
        with pytest.raises(CapabilityError):
            run(handle, query_on(ids, SPAN), asked(table, knockout=site))
    if name in NARROW_HEAD:
        with pytest.raises(CapabilityError, match="no raw projection"):
            run(handle, query_on(ids, SPAN), asked(table))
    else:
        assert run(handle, query_on(ids, SPAN), asked(table)).n_attributes > 0


@pytest.mark.parametrize("name", ["gptj", "mixtral", "falcon_7b", "bloom"])
def test_the_notebooks_knockout_is_refused_where_it_cannot_be_made(name: str, table: str) -> None:
    _, handle, ids = known(name)
    refused = "mlp" if name == "mixtral" else "attention"
    for site in SITES:
        spec = asked(table, knockout=site, notebook=True)
        if site == refused:
            with pytest.raises(CapabilityError, match="notebook's knockout"):
                run(handle, query_on(ids, SPAN), spec)
        else:
            assert run(handle, query_on(ids, SPAN), spec).layers


def test_defaults_follow_the_papers_depth() -> None:
    assert [default_window(n) for n in (1, 2, 8, 28, 48)] == [1, 1, 2, 6, 10]
    assert [default_read_layer(n) for n in (1, 2, 8, 28, 48)] == [0, 1, 7, 23, 40]
