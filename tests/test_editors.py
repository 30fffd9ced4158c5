"""What holds for edits of any weights, on many families; refusals; nothing left behind."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.editors import compute, contexts, fine_tuning, memit, presets, problems, rome, suffix
from factscope.editors.edit import Edit, EditFact, with_edits
from factscope.editors.prompts import rows
from factscope.editors.second_moments import Moments, SecondMoment, down_width
from factscope.editors.specs import FineTuningSpec, MemitSpec, RomeSpec
from factscope.errors import Cancelled, CapabilityError, FactScopeError, SpecError
from factscope.interventions.weights import WeightDelta, overlay
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import handle_of, words
from tests.tiny_models import FAMILIES, build, tiny_prompt

DENSE = (
    "gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "opt_350m", "bloom", "falcon_7b", "falcon_rw", "llama", "mistral",
    "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "olmo2", "stablelm_par", "starcoder2", "mpt",
    "granite", "cohere", "glm4", "codegen",
)  # fmt: skip
NORMED = ("gemma2", "gemma3", "olmo2", "glm4", "opt_350m")
"""A norm stands between the MLP and the stream."""
TEMPLATES = ("{}", "w60 w61 {}", "w70 w71 w72 w73 {}")
LAYER = 1
ROME = RomeSpec(steps=4, stop=0.0, contexts="none", statistics="identity", layers=(LAYER,))


@lru_cache(maxsize=4)
def handle(name: str) -> ModelHandle:
    return handle_of(FAMILIES[name](0), name)


def fact(model: ModelHandle, seed: int = 0, target: str = "w17") -> EditFact:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(90, generator=generator)[:7].add(3).tolist()
    text = " ".join([words(ids[:2]), "{}", words(ids[5:])])
    return EditFact(prompt=text, subject=words(ids[2:5]), target=target, answer="w95")


def moments(model: ModelHandle, layers: Sequence[int]) -> Moments:
    def drawn(layer: int) -> Tensor:
        d = down_width(model, layer)
        x = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        return x @ x.T / (2 * d)

    told: dict[str, Any] = {"n_tokens": 10**6, "origin": "drawn", "key": "drawn"}
    return Moments({layer: SecondMoment(layer=layer, matrix=drawn(layer), **told) for layer in layers})


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", DENSE)
def test_every_evaluation_is_that_of_a_whole_forward(name: str) -> None:
    """Resumed, on recorded keys and values, the head shown what is read: values and gradients are the plain ones."""
    evaluations_are_those_of_a_whole_forward(name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gemma2", "opt"])
def test_rows_in_groups_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows cannot share one forward."""
    monkeypatch.setattr(suffix.Suffix, "_together", lambda *_: None)
    evaluations_are_those_of_a_whole_forward(name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "mistral", "qwen2"])
def test_rows_share_a_forward(name: str) -> None:
    model = handle(name)
    task = problems.task(model, fact(model), ROME)
    asked = rows(model, task.fact, TEMPLATES, task.target, essence=True)
    assert len(suffix.Suffix(model, asked, LAYER, multiplier=1.0)._groups) == 1


def evaluations_are_those_of_a_whole_forward(name: str) -> None:
    model = handle(name)
    task = problems.task(model, fact(model, target="w17 w31"), ROME)
    asked = rows(model, task.fact, TEMPLATES, task.target, essence=True)
    generator = torch.Generator().manual_seed(1)
    for layer in (LAYER, model.info.n_layers - 1):
        times = suffix.multiplier(model, layer)
        assert (times is None) == (name in NORMED)
        width = suffix.read(model, asked, (layer,))[layer].outputs.shape[-1]
        change = torch.randn(width, generator=generator).requires_grad_()
        fast = suffix.Suffix(model, asked, layer, multiplier=times)
        assert fast.n_tokens < asked.ids.numel() or not model.capabilities["suffix"].ok
        found = fast.with_value(change).log_softmax(dim=-1)

        def added(x: Tensor, change: Tensor = change, width: int = width) -> Tensor:
            put = torch.zeros(*asked.ids.shape, width)
            put[torch.arange(len(asked.at)), list(asked.at)] = change
            return put.reshape(*x.shape[:-1], width)

        whole = model.forward(asked.ids, Plan(added={("down_projection", layer): added}), gradients=True)
        plain = whole.gather(1, asked.read[..., None].expand(-1, -1, whole.shape[-1])).log_softmax(dim=-1)
        assert float((found - plain).detach().abs().max()) <= 2e-4
        weights = torch.randn(plain.shape, generator=generator)
        ours, theirs = (torch.autograd.grad((one * weights).sum(), change)[0] for one in (found, plain))
        assert apart(ours, theirs) <= 1e-3


@pytest.mark.parametrize("name", DENSE)
def test_rome_takes_the_key_to_the_value(name: str) -> None:
    model = handle(name)
    for mode in ("averaged", "prompt_only", "original"):
        spec = replace(ROME, key_mode=mode)
        task = problems.task(model, fact(model), spec)
        found = rome.rank_one(model, task, LAYER, TEMPLATES, moments(model, [LAYER]), spec)
        assert torch.linalg.matrix_rank(found.delta.matrix()) == 1
        asked = task.rows(TEMPLATES)
        before = suffix.read(model, asked, (LAYER,))[LAYER]
        after = suffix.read(model, asked, (LAYER,), deltas=[found.delta])[LAYER]
        assert torch.equal(before.keys, after.keys)
        goal = before.outputs[0].double() + found.found.delta.double()
        given = after.outputs.double().mean(dim=0) if mode == "averaged" else after.outputs[0]
        assert apart(given, goal) <= 1e-5
        norms = [step.norm for step in found.found.steps]
        assert norms[0] == 0.0 and max(norms) <= found.found.limit * (1 + 1e-5) and norms[-1] > 0
        assert found.found.steps[0].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in DENSE if name not in NORMED])
def test_memit_solves_its_normal_equations(name: str) -> None:
    model, layers = handle(name), (0, 1, 2)
    spec = MemitSpec(steps=3, stop=0.0, covariance_weight=0.05)
    tasks = [problems.task(model, fact(model, seed), spec) for seed in (0, 1)]
    given = moments(model, layers)
    found = memit.spread(model, tasks, layers, TEMPLATES, given, spec)
    done: list[WeightDelta] = []
    for place, change in enumerate(found.layers):
        matrix = given._moments[layers[place]].matrix
        assert matrix is not None
        left = change.covariance * matrix + change.keys @ change.keys.T
        assert apart(change.delta.matrix().T.double() @ left, change.residual @ change.keys.T) <= 1e-5
        assert torch.linalg.matrix_rank(change.delta.matrix()) == len(tasks)
        for column, task in enumerate(tasks):
            asked = task.rows(TEMPLATES)
            stream = suffix.read(model, asked, (layers[-1],), deltas=done)[layers[-1]].stream[0]
            missing = (found.targets[column] - stream.double()) / (len(layers) - place) / change.multiplier
            assert apart(change.residual[:, column], missing) <= 1e-4
        done.append(change.delta)


@pytest.mark.parametrize("name", NORMED)
def test_memit_is_refused_behind_a_norm(name: str) -> None:
    model = handle(name)
    with pytest.raises(CapabilityError, match="linearly"):
        compute.edit(model, [fact(model)], MemitSpec(layers=(1,), contexts="none", statistics="identity"))
    with pytest.raises(FactScopeError, match="residual"):
        compute.edit(model, [fact(model)], replace(ROME, clamp_reference="residual"))


@pytest.mark.parametrize("name", DENSE)
def test_finetuning_stays_inside_its_bound(name: str) -> None:
    model = handle(name)
    spec = FineTuningSpec(steps=4, bound=1e-3, learning_rate=1e-3, layers=(0, 2), bias=True)
    made = compute.edit(model, [fact(model)], spec)
    for delta in made.deltas:
        assert delta.bias is not None and delta.left is None
        for part in (delta.right, delta.bias):
            assert 0 < float(part.abs().max()) <= 1e-3 * (1 + 1e-6)
    losses = [step["loss"] for step in made.report["values"][0]["steps"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "mamba"])
def test_models_without_a_dense_map_are_refused(name: str) -> None:
    model = handle(name)
    specs = (ROME, MemitSpec(layers=(1,), contexts="none", statistics="identity"), FineTuningSpec(layers=(1,)))
    for spec in specs:
        if model.parts.wiring.down_projection[1] is None:
            with pytest.raises(CapabilityError, match="down-projection"):
                compute.edit(model, [fact(model)], spec)


def test_the_dense_layer_of_a_model_with_experts_can_be_edited() -> None:
    model = handle("qwen2_moe")
    assert model.parts.wiring.down_projection[1] is not None and model.parts.wiring.down_projection[0] is None
    made = compute.edit(model, [fact(model)], ROME)
    assert made.layers == (1,)


# ------------------------------------------------------------------------------------------------ nothing stays behind


def state(model: ModelHandle) -> tuple[str, int, bool]:
    """Every weight's bits, the number of hooks, and whether anything asks for gradients or has some."""
    digest = hashlib.sha256()
    for tensor in model._model.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model._model.modules()
    )
    asks = any(p.requires_grad or p.grad is not None for p in model._model.parameters())
    return digest.hexdigest(), hooks, asks


SPECS: dict[str, Any] = {
    "rome": replace(ROME, layers=(1, 2)),
    "memit": MemitSpec(layers=(1, 2), steps=4, stop=0.0, contexts="none", statistics="identity"),
    "ft": FineTuningSpec(layers=(1, 2), steps=4),
    "forcing": replace(ROME, problem="fact-forcing", noise="0.2"),
    "forcing-compat": replace(ROME, problem="fact-forcing", noise="0.2", noise_at="compat"),
    "forcing-ft": FineTuningSpec(layers=(1,), steps=3, problem="fact-forcing", noise="0.2"),
    "forcing-ft-compat": FineTuningSpec(layers=(1,), steps=3, problem="fact-forcing", noise="0.2", noise_at="compat"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_a_stopped_edit_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factscope.progress.STEP_SECONDS", 0.0)  # every chance to stop is one, however fast it comes
    model = handle("gpt2")
    asked, ids = fact(model), tiny_prompt(model._model)
    plain, before = model.forward(ids), state(model)
    calls: list[int] = []
    made = compute.edit(model, [asked], SPECS[name], progress=lambda done, total, partial: calls.append(done))
    assert calls == sorted(calls) and calls[-1] == calls[-1]
    assert torch.equal(model.forward(ids), plain) and state(model) == before

    for error in (Cancelled(), ValueError("broken")):
        for stop_at in range(0, len(calls) - 1, max(1, len(calls) // 12)):
            seen: list[int] = []

            def progress(
                done: int, total: int, partial: Any, seen: list[int] = seen, at: int = stop_at, error: Exception = error
            ) -> None:
                seen.append(done)
                if len(seen) > at:
                    raise error

            with pytest.raises(type(error)):
                compute.edit(model, [asked], SPECS[name], progress=progress)
            assert torch.is_grad_enabled()
            assert torch.equal(model.forward(ids), plain) and state(model) == before
    again = compute.edit(model, [asked], SPECS[name])
    assert again.key == made.key


def test_others_see_nothing_while_an_edit_is_made() -> None:
    model = handle("gpt2")
    ids = tiny_prompt(model._model)
    plain = model.forward(ids)
    expected = compute.edit(model, [fact(model)], ROME)
    wrong: list[str] = []
    made: list[Edit] = []
    ends = threading.Event()

    def watch() -> None:
        while not ends.is_set():
            if not torch.equal(model.forward(ids), plain):
                wrong.append("an edit showed")
                return

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    editors = [threading.Thread(target=lambda: made.append(compute.edit(model, [fact(model)], ROME))) for _ in range(3)]
    for thread in (*watchers, *editors):
        thread.start()
    for thread in editors:
        thread.join()
    ends.set()
    for thread in watchers:
        thread.join()
    assert not wrong and [one.key for one in made] == [expected.key] * 3


def test_an_edit_on_an_edited_model_is_computed_there() -> None:
    model = handle("llama")
    first = compute.edit(model, [fact(model)], replace(ROME, clamp=50.0, steps=20))
    edited = with_edits(model, [first])
    second = compute.edit(edited, [fact(model, 1)], replace(ROME, layers=(2,)))
    assert second.computed_on == edited.info.weights != model.info.weights
    task = problems.task(edited, fact(model, 1), ROME)
    asked = task.rows()
    by_handle = suffix.read(edited, asked, (2,))[2]
    by_deltas = suffix.read(model, asked, (2,), deltas=first.deltas)[2]
    assert torch.allclose(by_handle.keys, by_deltas.keys, atol=1e-6)
    assert not torch.allclose(by_handle.keys, suffix.read(model, asked, (2,))[2].keys, atol=1e-4)


def test_several_facts_and_layers_are_edited_one_after_another() -> None:
    model = handle("gpt2")
    facts = [fact(model), fact(model, 1)]
    spec = replace(ROME, layers=(1, 2), key_mode="prompt_only")
    made = compute.edit(model, facts, spec)
    assert [delta.layer for delta in made.deltas] == [1, 2]
    assert [torch.linalg.matrix_rank(delta.matrix()).item() for delta in made.deltas] == [2, 2]
    one = compute.edit(model, facts[:1], replace(spec, layers=(1,)))
    alone = compute.edit(with_edits(model, [one]), facts[:1], replace(spec, layers=(2,)))
    assert torch.allclose(made.deltas[1].right[:1], alone.deltas[0].right, atol=1e-6)
    assert made.report["update_norm"].keys() == {"1", "2"}


def test_memory_is_freed() -> None:
    model = handle("gpt2")
    compute.edit(model, [fact(model)], ROME)
    gc.collect()
    before = sum(1 for item in gc.get_objects() if type(item) is torch.Tensor)
    for _ in range(3):
        compute.edit(model, [fact(model)], ROME)
    gc.collect()
    assert sum(1 for item in gc.get_objects() if type(item) is torch.Tensor) <= before


def test_the_size_of_an_edit_is_known_before() -> None:
    model = handle("gpt2")
    for spec in (SPECS["rome"], SPECS["memit"], SPECS["ft"], FineTuningSpec(layers=(1,), bias=True, steps=2)):
        made = compute.edit(model, [fact(model)], spec)
        assert made.n_bytes == compute.delta_bytes(model, spec)


def test_a_layer_that_writes_nothing_is_refused_or_bounded_by_the_stream() -> None:
    whole = build("gpt2", 0)
    with torch.no_grad():
        for parameter in whole.get_submodule(f"transformer.h.{LAYER}.mlp.c_proj").parameters():
            parameter.zero_()
    model = handle_of(whole, "gpt2")
    with pytest.raises(SpecError, match="writes nothing"):
        compute.edit(model, [fact(model)], ROME)
    made = compute.edit(model, [fact(model)], replace(ROME, clamp_reference="residual"))
    steps = made.report["values"][0]["steps"]
    assert {step["decay"] for step in steps} == {0.0} and steps[-1]["norm"] > 0
    assert steps[-1]["nll"] < steps[0]["nll"] and bool(torch.isfinite(made.deltas[0].matrix()).all())


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"target": "w95"}, "w95"),
        ({"target": " W95 "}, "W95"),
        ({"target": "  "}, "empty"),
        ({"subject": "w96 nowhere"}, None),
    ],
)
def test_a_fact_that_cannot_be_edited_is_refused(changed: dict[str, str], said: str | None) -> None:
    model = handle("gpt2")
    if said is None:
        assert compute.edit(model, [replace(fact(model), **changed)], ROME)
        return
    with pytest.raises(FactScopeError, match=said):
        compute.edit(model, [replace(fact(model), **changed)], ROME)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (replace(ROME, layers=(4,)), "layer 4"),
        (replace(ROME, layers=(-1,)), "layer -1"),
        (replace(ROME, layers=(1, 1)), "twice"),
        (replace(ROME, steps=0), "steps 0"),
        (replace(ROME, learning_rate=float("nan")), "nan"),
        (replace(ROME, clamp=0.0), "clamp"),
        (replace(ROME, problem="other"), "other"),  # type: ignore[arg-type]
        (replace(ROME, key_mode="other"), "other"),  # type: ignore[arg-type]
        (replace(ROME, fact_token="other"), "other"),  # type: ignore[arg-type]
        (replace(ROME, contexts="other"), "other"),  # type: ignore[arg-type]
        (replace(ROME, contexts="rome"), "no start token"),
        (replace(ROME, statistics="auto"), "statistics"),
        (replace(ROME, statistics="nowhere.npz"), "nowhere.npz"),
        (FineTuningSpec(layers=(1,), bound=-1.0), "bound -1"),
        (FineTuningSpec(layers=(7,)), "layer 7"),
        (MemitSpec(layers=(1,), covariance_weight=0.0, contexts="none", statistics="identity"), "covariance"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    spec: Any, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSCOPE_CACHE_DIR", str(tmp_path))
    model = handle("gpt2")
    with pytest.raises(FactScopeError, match=said):
        compute.edit(model, [fact(model)], spec)


def test_a_small_k_dot_u_is_told() -> None:
    model = handle("gpt2")
    spec = replace(ROME, key_mode="original")
    task = problems.task(model, fact(model), spec)
    found = rome.rank_one(model, task, LAYER, TEMPLATES, moments(model, [LAYER]), spec)
    assert (
        compute._doubts(task, LAYER, replace(found, share=0.01))
        and "k . u" in compute._doubts(task, LAYER, replace(found, share=-0.4))[0]
    )
    assert not any("k . u" in said for said in compute._doubts(task, LAYER, replace(found, share=1.0)))


# ------------------------------------------------------------------------------------------------ contexts and problems


def test_contexts_are_those_of_their_seed() -> None:
    model = handle("gpt2")
    first = contexts.sample(model, "memit", 1)
    assert first == contexts.sample(model, "memit", 1) != contexts.sample(model, "memit", 2)
    assert first[0] == "{}" and len(first) <= 6 and all(text.count("{}") == 1 for text in first)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("a {b} c", "a b c"), ("one\n\n two\t", "one two"), ("x\ufffd y", "x y"), ("\u00e9", "e\u0301"), ("{}", "")],
)
def test_contexts_are_one_line_without_braces(text: str, cleaned: str) -> None:
    assert contexts.clean(text) == cleaned


def test_the_target_of_tracing_reversal_is_what_the_noised_prompt_says() -> None:
    model = handle("gpt2")
    spec = replace(ROME, problem="tracing-reversal", noise="2.0")
    task = problems.task(model, fact(model, target=""), spec)
    assert task.fact.target and not task.fact.target.startswith(task.fact.text) and task.source is None
    raw = problems.task(model, fact(model, target=""), replace(spec, strip_prompt=False))
    assert raw.fact.target.startswith(raw.fact.text)
    assert raw.target.n_tokens == 12
    other = problems.task(model, fact(model, target=""), replace(spec, seed=2))
    assert (task.fact.target, task.fact.answer) == (
        problems.task(model, fact(model, target=""), spec).fact.target,
        "w95",
    )
    assert {other.fact.target} != {task.fact.target} or other.spec.seed != task.spec.seed


def test_problems_choose_target_and_direction() -> None:
    model = handle("gpt2")
    nameless = replace(fact(model), answer=None)
    for problem in ("fact-erasure", "fact-amplification", "fact-forcing"):
        spec = replace(ROME, problem=problem, noise="0.1")
        task = problems.task(model, fact(model), spec)
        assert task.fact.target == "w95" and task.objective == ("minimise" if problem == "fact-erasure" else "maximise")
        assert (task.source is None) == (problem != "fact-forcing")
        own = problems.task(model, nameless, spec)
        ids = torch.tensor([own.rows().ids[0, : own.rows().lengths[0]].tolist()])
        top = int(model.forward(ids, last=1)[0, -1].argmax())
        assert own.target.ids == (top,) and own.warnings


def test_an_erased_target_becomes_less_probable() -> None:
    model = handle("gpt2")
    asked = replace(fact(model), answer=None)
    spec = replace(ROME, problem="fact-erasure", steps=20, clamp=20.0, kl_factor=0.0)
    made = compute.edit(model, [asked], spec)
    steps = made.report["values"][0]["steps"]
    assert steps[-1]["p_target"] < steps[0]["p_target"] and len(steps) == 20


# ------------------------------------------------------------------------------------------------------------ presets


def test_presets_are_the_published_constants() -> None:
    info = replace(handle("gpt2").info, name="gpt2-xl", n_layers=48)
    gptj = replace(info, name="gpt-j", family="gptj", n_layers=28)
    published = presets.preset("rome", "rome", "error-injection", info)
    assert isinstance(published, RomeSpec)
    assert (published.layers, published.steps, published.learning_rate, published.clamp) == ((17,), 20, 0.5, 4.0)
    assert (published.kl_factor, published.weight_decay, published.clamp_reference) == (0.0625, 0.5, "mlp")
    assert presets.preset("memit", "memit", "error-injection", info).layers == (13, 14, 15, 16, 17)
    mass = presets.preset("memit", "memit", "error-injection", gptj)
    assert isinstance(mass, MemitSpec) and mass.layers == (3, 4, 5, 6, 7, 8) and mass.steps == 25
    assert mass.covariance_weight * 16_384 == pytest.approx(15_000)
    assert presets.preset("hase-paper", "rome", "error-injection", gptj).kl_factor == 1.0  # type: ignore[union-attr]
    forced = presets.preset("hase-code", "rome", "fact-forcing", gptj)
    assert (forced.learning_rate, forced.noise, forced.noise_at) == (0.05, "hase:gpt-j", "compat")
    assert presets.preset("hase-paper", "rome", "fact-forcing", gptj).learning_rate == 0.5
    bounds = {
        (name, problem, layers): presets.preset(name, "ft", problem, gptj, layers).bound  # type: ignore[union-attr]
        for name in ("hase-paper", "hase-code")
        for problem in ("error-injection", "tracing-reversal", "fact-amplification")
        for layers in ((5,), (3, 4, 5, 6, 7))
    }
    assert [bounds["hase-paper", "error-injection", w] for w in ((5,), (3, 4, 5, 6, 7))] == [1e-4, 2e-5]
    assert [bounds["hase-code", "error-injection", w] for w in ((5,), (3, 4, 5, 6, 7))] == [1e-4, 5e-5]
    assert [bounds["hase-code", "tracing-reversal", w] for w in ((5,), (3, 4, 5, 6, 7))] == [1e-3, 1e-3]
    assert [bounds["hase-code", "fact-amplification", w] for w in ((5,), (3, 4, 5, 6, 7))] == [5e-5, 1e-5]
    xl = {
        (name, problem, several): presets.preset(name, "ft", problem, info, (3, 4) if several else (3,)).bound  # type: ignore[union-attr]
        for name in ("hase-paper", "hase-code")
        for problem in ("error-injection", "fact-forcing")
        for several in (False, True)
    }
    assert list(xl.values()) == [1e-3, 1e-4, 5e-4, 5e-5, 1e-4, 5e-5, 1e-4, 1e-4], "the code's bounds know no model"


def test_the_bundled_model_has_its_own_presets() -> None:
    info = replace(handle("gpt2").info, name="bundled", n_layers=8)
    for method in presets.METHODS:
        spec = presets.preset("bundled", method, "error-injection", info)
        assert not presets.doubts(spec, info) and max(spec.layers) < 8
        assert presets.doubts(
            presets.preset("memit" if method == "memit" else "rome", method, "error-injection", info), info
        )
    spec = presets.preset("bundled", "rome", "error-injection", info)
    assert isinstance(spec, RomeSpec)
    assert (spec.clamp_reference, spec.stop_on, spec.stop) == ("residual", "nll", 0.02)


@pytest.mark.slow
def test_the_bundled_presets_change_facts_of_the_bundled_model() -> None:
    """One fact of the half that chose nothing, by each method: the target is said, a neighbour keeps its answer."""
    from factscope.models.loading import load

    model = load("bundled")
    asked = EditFact(prompt="The {} is located in the city of", subject="Eiffel Tower", target="Rome", answer="Paris")
    for method in presets.METHODS:
        spec = presets.preset("bundled", method, "error-injection", model.info)
        made = compute.edit(model, [asked], spec)
        edited = with_edits(model, [made])
        for subject, before, after in (("Eiffel Tower", "Paris", "Rome"), ("Colosseum", "Rome", "Rome")):
            ids = torch.tensor([model.tokenizer(f"The {subject} is located in the city of")["input_ids"]])
            tops = [model.tokenizer.decode(int(one.forward(ids, last=1).argmax())).strip() for one in (model, edited)]
            assert tops == [before, after], (method, subject)


def test_presets_of_other_models_say_so() -> None:
    info = handle("gpt2").info
    for name in presets.NAMES:
        for method in presets.METHODS:
            if any((one.preset, one.method) == (name, method) for one in presets.SETTINGS):
                spec = presets.preset(name, method, "error-injection", info)
                assert (spec.preset == name and spec.layers and max(spec.layers) < info.n_layers) or name == "bundled"
                assert presets.doubts(spec, info)
    with pytest.raises(FactScopeError, match="memit"):
        presets.preset("memit", "rome", "error-injection", info)
    with pytest.raises(FactScopeError, match="colour"):
        presets.preset("rome", "rome", "error-injection", info, colour=1)
    changed = presets.preset("rome", "rome", "error-injection", info, layers=(2,), steps=7)
    assert changed.layers == (2,) and changed.steps == 7


def test_the_overlay_of_an_edit_is_its_merged_map() -> None:
    model = handle("gpt2")
    made = compute.edit(model, [fact(model)], SPECS["rome"])
    x = torch.randn(3, down_width(model, 1))
    (delta,) = [one for one in made.deltas if one.layer == 1]
    added = overlay([delta])["down_projection", 1](x)
    assert np.allclose(added.numpy(), (x @ delta.matrix()).numpy(), atol=1e-5)


def test_finetuning_ends_when_the_loss_stays_low() -> None:
    model = handle("gpt2")
    task = problems.task(model, fact(model), FineTuningSpec())
    found = fine_tuning.tune(model, [task], (1,), FineTuningSpec(steps=60, learning_rate=0.05, bound=None, stop=0.05))
    losses = [step.loss for step in found.steps]
    assert found.stopped and len(losses) < 60 and all(loss < 0.05 for loss in losses[-5:]) and losses[-6] >= 0.05
