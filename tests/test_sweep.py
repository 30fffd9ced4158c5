"""The fast path refuses what it does not follow, its limits change no number, and neither do tuning and the head."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from factscope import measures
from factscope.errors import Cancelled
from factscope.interventions import engine
from factscope.interventions.attention import Cut
from factscope.interventions.base import Base, Noise
from factscope.interventions.engine import no_step
from factscope.interventions.intervention import Intervention, Patch
from factscope.interventions.packing import Joining
from factscope.interventions.sweep import Sweep, SweepRefused
from factscope.models import head as heads
from factscope.models.creation import creating
from factscope.models.discovery import discover
from factscope.models.dispatch import _ACTIVE, ATTENTION
from factscope.models.handle import ModelHandle
from factscope.models.head import distribution_of_logits, distribution_of_states, scores_of_states
from factscope.models.tuning import tune
from tests.oracle.laboratory import handle_of
from tests.oracle.questions import Path, Setting, answered, expected, on_path
from tests.oracle.whole import Put, Whole
from tests.tiny_models import FAMILIES, N_LAYERS, redraw

LENGTH, LAST, END = 8, 7, N_LAYERS - 1
IDS = (11, 45, 7, 62, 30, 88, 19, 53)
ROUNDING = 1e-5
PATHS: tuple[Path, ...] = ("swept", "rows")
OWN_WAY = ("gptj", "gpt_neo", "bloom", "falcon_7b", "falcon_40b", "falcon_rw", "mpt", "codegen")
"""Families whose attention does not go through transformers' interface."""


@lru_cache(maxsize=8)
def verified(family: str) -> ModelHandle:
    return handle_of(FAMILIES[family](0), family)


def handle(family: str, path: Path = "swept") -> ModelHandle:
    return on_path(verified(family), path)


def noisy(handle: ModelHandle, *positions: int, n_readout: int = 1, samples: int = 2) -> Setting:
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(samples, len(positions), handle.info.d_model, generator=generator).double()
    return Setting(ids=IDS, n_readout=n_readout, noise=Noise(positions=positions, values=values))


def cut(layer: int, *keys: int, query: int = LAST) -> Cut:
    return Cut(layer=layer, queries=(query,), keys=keys)


def many_runs(clean: Base) -> list[Intervention]:
    """Cuts and patches that begin at every layer and at several positions."""
    cuts = [Intervention(cuts=(cut(layer, key),)) for layer in range(N_LAYERS) for key in (1, 4, 6)]
    early = [Intervention(cuts=(cut(1, 2, query=4), cut(2, 3, 5))), Intervention(cuts=(cut(0, 0, query=2),))]
    patches = [
        Intervention(patches=(Patch(layer=layer, site=site, positions=(position,), source=clean),))
        for layer in range(N_LAYERS - 1)
        for site in ("output", "attention", "mlp")
        for position in (3, 5)
    ]
    return [*cuts, *early, *patches]


@lru_cache(maxsize=2)
def right(family: str) -> Tensor:
    """Probabilities of ``many_runs`` on noisy samples, by whole forwards."""
    model, whole = handle(family, "rows"), Whole(FAMILIES[family](0))
    settings = Setting(ids=IDS, n_readout=2), noisy(model, 2, 3, n_readout=2)
    clean = settings[0].base(model)
    sources = {id(clean): settings[0].forwards(whole)}
    return expected(whole, settings[1], many_runs(clean), sources)


def asked(model: ModelHandle) -> tuple[Base, list[Intervention]]:
    """The same question for the engine."""
    clean, own = (setting.base(model) for setting in (Setting(ids=IDS, n_readout=2), noisy(model, 2, 3, n_readout=2)))
    return own, many_runs(clean)


def off(found: Tensor, expected_: Tensor) -> float:
    return float((found - expected_).abs().max())


# ---------------------------------------------------------------------------- what a sweep refuses


def _sweeping() -> bool:
    active = _ACTIVE.get()
    return active is not None and active[1].attend is not None


def _twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _sweeping():
            original(*args, **kwargs)
        return original(*args, **kwargs)

    return forward


def _never(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _sweeping():
            return args[0] if args else kwargs["hidden_states"], None
        return original(*args, **kwargs)

    return forward


def assert_refused_and_answered(
    model: ModelHandle, family: str, because: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The sweep refuses, and the engine gives right numbers all the same."""
    base, runs = asked(model)
    with pytest.raises(SweepRefused, match=because):
        Sweep(model, base, [(0, [run.effective(base) for run in runs])], Joining(model, base), no_step).run()
    with caplog.at_level(logging.WARNING):
        assert off(answered(model, base, runs, "rows"), right(family)) <= ROUNDING
    assert because in caplog.text
    assert _ACTIVE.get() is None


@pytest.mark.parametrize("change", [_twice, _never])
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_that_does_not_run_once_in_every_layer_is_refused(
    change: Callable[[Callable[..., Any]], Callable[..., Any]],
    layer: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = handle("llama")
    attention: Any = model.parts.wiring.attention[layer]
    monkeypatch.setattr(attention, "forward", change(attention.forward))
    assert_refused_and_answered(model, "llama", "attention ran", caplog)


@pytest.mark.parametrize("error", [1e-2, float("nan"), float("inf")])
def test_an_unchanged_row_that_deviates_is_refused(error: float, caplog: pytest.LogCaptureFixture) -> None:
    """Some families might mix rows; here the last one, which nothing was changed in, comes out otherwise."""
    model = handle("gpt2")
    projection: Any = model.parts.wiring.down_projection[1]

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not _sweeping():
            return None
        changed = output.clone()
        changed[..., -1, :] += error
        return changed

    hook = projection.register_forward_hook(disturb)
    try:
        assert_refused_and_answered(model, "gpt2", "a row without a change", caplog)
    finally:
        hook.remove()


def test_an_argument_of_attention_that_nobody_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, original = handle("llama"), Sweep._attend
    base, runs = asked(model)
    monkeypatch.setattr(Sweep, "_attend", lambda *args, **kwargs: original(*args, **kwargs, position_bias=None))
    assert off(answered(model, base, runs, "swept"), right("llama")) <= ROUNDING  # not given, in fact
    bias = torch.zeros(1)
    monkeypatch.setattr(Sweep, "_attend", lambda *args, **kwargs: original(*args, **kwargs, position_bias=bias))
    assert_refused_and_answered(model, "llama", "position_bias", caplog)


def test_keys_that_the_cache_does_not_hold_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """DeepSeek's attention reads keys that it makes of what is cached: no sweep, right numbers."""
    model = handle("deepseek_v3", "rows")
    assert "cache" in verified("deepseek_v3").capabilities["packed"].reason
    assert off(answered(model, *asked(model), "rows"), right("deepseek_v3")) <= ROUNDING


# ---------------------------------------------------------------------------- what must be so for any weights


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_restoring_the_last_output_gives_the_clean_run(family: str, path: Path) -> None:
    model = handle(family, path)
    clean, base = Setting(ids=IDS).base(model), noisy(model, 2, 3).base(model)
    p_clean, p_noisy = (one.logits.double().softmax(-1) for one in (clean, base))
    assert float((p_clean - p_noisy).abs().amax(-1).min()) > 1e-2
    everywhere = tuple(range(LENGTH))
    runs = [Intervention(patches=(Patch(layer=END, site="output", positions=(LAST,), source=clean),))]
    runs += [
        Intervention(patches=(Patch(layer=layer, site="output", positions=everywhere, source=clean),))
        for layer in range(-1, N_LAYERS)
    ]
    found = answered(model, base, runs, path)
    assert off(found, p_clean.expand_as(found)) <= ROUNDING
    ((indices, readout),) = engine.run(model, base, runs[:1])
    assert indices == [0]
    assert torch.equal(readout.logits().argmax(-1), clean.logits.argmax(-1).expand(1, 2, 1)[0][None])


@pytest.mark.parametrize("path", PATHS)
def test_restoring_what_the_noise_has_not_reached_costs_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = handle("llama", path)
    clean, base = Setting(ids=IDS).base(model), noisy(model, 3).base(model)
    runs = [
        Intervention(patches=(Patch(layer=layer, site="output", positions=(0, 2), source=clean),))
        for layer in range(-1, N_LAYERS)
    ]
    runs += [Intervention(patches=tuple(run.patches[0] for run in runs))]
    for name in ("run_rows", "Sweep"):
        monkeypatch.setattr(engine, name, None)
    ((indices, readout),) = engine.run(model, base, runs)
    assert sorted(indices) == list(range(len(runs)))
    assert torch.equal(readout.logits(), base.logits.expand(len(runs), -1, -1, -1))
    reached = Intervention(patches=(Patch(layer=1, site="output", positions=(0, 3), source=clean),))
    assert reached.effective(base).changes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_clean_state_undoes_what_the_same_run_changed(family: str, path: Path) -> None:
    """Put in where nothing else changed anything, it changes nothing; behind another change it does."""
    model, whole = handle(family, path), Whole(FAMILIES[family](0))
    setting = Setting(ids=IDS)
    clean, base = setting.base(model), setting.base(model)
    zero = Patch(layer=1, site="mlp", positions=(2,))
    again = Patch(layer=2, site="output", positions=(2,), source=clean)
    before = Patch(layer=-1, site="output", positions=(2,), source=clean)
    elsewhere = Patch(layer=1, site="output", positions=(1,), source=clean)
    severed = cut(0, 1, query=3)
    own = Patch(layer=1, site="mlp", positions=(LAST,), source=base)
    runs = [
        Intervention(patches=(zero, again)),
        Intervention(patches=(zero, before, elsewhere)),
        Intervention(patches=(Patch(layer=1, site="output", positions=(3,), source=clean),), cuts=(severed,)),
        Intervention(patches=(own,), cuts=(severed,)),
        Intervention(patches=(again, Patch(layer=2, site="output", positions=(2,)))),
        Intervention(patches=(Patch(layer=2, site="output", positions=(2,)), again)),
        Intervention(cuts=(severed,)),
        Intervention(patches=(zero,)),
    ]
    seen = setting.forwards(whole)
    plain = expected(whole, setting, runs, {id(clean): seen, id(base): seen})
    assert off(answered(model, base, runs, path), plain) <= ROUNDING
    for one, other in ((0, 7), (2, 6), (3, 6), (4, 5)):
        assert off(plain[one], plain[other]) > 1e-3  # the clean state matters
    assert runs[1].effective(base).patches == (zero,)  # and here it does not


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_a_replaced_output_stands_over_an_update_of_its_layer(site: Any, path: Path) -> None:
    """Whichever is named first; the base need not have its own updates on record."""
    model, whole = handle("gpt2", path), Whole(FAMILIES["gpt2"](0))
    setting, other = Setting(ids=IDS), Setting(ids=IDS[::-1])
    base, source = setting.base(model, updates=False), other.base(model)
    update = Patch(layer=1, site=site, positions=(2, 4), source=source)
    output = Patch(layer=1, site="output", positions=(2,), source=source)
    runs = [Intervention(patches=found) for found in ((update, output), (output, update), (update,), (output,))]
    plain = expected(whole, setting, runs, {id(source): other.forwards(whole)})
    assert off(plain[0], plain[1]) == 0
    assert off(plain[0], plain[2]) > 1e-3
    assert off(plain[0], plain[3]) > 1e-3
    assert off(answered(model, base, runs, path), plain) <= ROUNDING


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss", "phi"])
def test_runs_may_begin_at_the_first_position(family: str) -> None:
    """There is no prefix then."""
    model, whole, setting = handle(family), Whole(FAMILIES[family](0)), Setting(ids=IDS[:4])
    runs = [Intervention(patches=(Patch(layer=layer, site="output", positions=(0,)),)) for layer in range(-1, END)]
    plain = expected(whole, setting, runs, {})
    assert off(answered(model, setting.base(model), runs, "swept"), plain) <= ROUNDING


# ---------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("module", "name", "values"),
    [
        (engine, "WAVE_WORK", (0, 200_000, 3_000_000)),
        (engine, "WAVE_BYTES", (0, 40_000)),
        (heads, "STRETCH", (1, 2, 10, 96, 97, 98)),
        (heads, "ROWS", (1, 3)),
        (heads, "WHOLE_ROWS", (1, 5)),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_limits_change_no_number(
    family: str, module: Any, name: str, values: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither whole logits nor scores; tokens at the edges of the vocabulary are scored, too."""
    model = handle(family)
    base, runs = asked(model)
    tokens = ((0, 96), (95, 1), (48, 48))
    plain = [right(family)[:, :, 0, a].log() + right(family)[:, :, 1, b].log() for a, b in tokens]
    for value in values:
        monkeypatch.setattr(module, name, value)
        assert off(answered(model, base, runs, "swept"), right(family)) <= ROUNDING
        waves, begins = 0, []
        for indices, readout in engine.run(model, base, runs):
            waves += 1
            begins.append(len(indices))
            for ids, log_p in zip(tokens, plain, strict=True):
                assert off(readout.scores(ids).log_probability.exp(), log_p[indices].exp()) <= ROUNDING
        assert sum(begins) == len(runs)
        if name.startswith("WAVE"):
            assert waves == (len(runs) if value == 0 else waves)
            assert waves > 1


def test_runs_that_begin_at_different_positions_are_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above compare several groups; no token before a run's first changed one is computed."""
    model = handle("llama")
    base, runs = asked(model)
    effective = [found for found in (run.effective(base) for run in runs) if found.changes]
    groups = engine._groups(base, effective)
    assert len(groups) > 2
    assert sorted(map(id, (run for _, some in groups for run in some))) == sorted(map(id, effective))
    assert all(begin == min(run.first_position, base.length - 2) for begin, some in groups for run in some)
    lengths: list[int] = []
    original = Sweep._enter

    def remember(self: Sweep, layer: int, hidden: Tensor) -> Tensor:
        entered = original(self, layer, hidden)
        lengths.append(entered.shape[1])
        return entered

    monkeypatch.setattr(Sweep, "_enter", remember)
    sweep = Sweep(model, base, groups, Joining(model, base), no_step)
    together = sweep.run()
    own = [sum(group.n_tokens(layer) for group in sweep._groups) for layer in range(sweep._start, base.n_layers)]
    assert lengths == [n + base.length - min(begin for begin, _ in groups) for n in own]
    apart = [Sweep(model, base, [group], Joining(model, base), no_step).run() for group in groups]
    assert off(together, torch.cat(apart)) <= ROUNDING


def state_of(model: ModelHandle) -> list[Any]:
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
        for name, m in model._model.named_modules()
    ]
    return [hooks, repr(model._model.config)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS)
def test_a_step_may_end_a_run_anywhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = handle("llama", path)
    base, runs = asked(model)
    monkeypatch.setattr(engine, "MAX_ROWS", 8)
    counted: list[None] = []
    whole = answered(model, base, runs, path, step=lambda: counted.append(None))
    assert len(counted) >= N_LAYERS
    kept = [t.clone() for t in (*base.states, *base.keys, *base.values, base.logits)]
    before = state_of(model)
    for last in {0, 1, len(counted) // 2, len(counted) - 1}:
        left = [last]

        def stop(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Cancelled

        with pytest.raises(Cancelled):
            list(engine.run(model, base, runs, step=stop))
        assert _ACTIVE.get() is None
        assert state_of(model) == before
    after = [*base.states, *base.keys, *base.values, base.logits]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert torch.equal(answered(model, base, runs, path), whole)


# ---------------------------------------------------------------------------- tuning


def wide_gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Some of its maps have rows of exactly 4 KiB."""
    settings: dict[str, Any] = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 97}
    settings |= {"bos_token_id": 0, "eos_token_id": 1}
    config = CONFIG_MAPPING["gpt2"](**settings)
    with creating(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    redraw(model, 0)
    return model.to(dtype).eval().requires_grad_(False)


def test_tuning_changes_no_number_beyond_rounding() -> None:
    plain = wide_gpt2()
    tuned = copy.deepcopy(plain)
    assert tune(tuned, discover(tuned, torch.device("cpu")).wiring, torch.device("cpu"))
    activations = [type(module).__name__ for module in tuned.modules()]
    assert NewGELUActivation.__name__ not in activations
    assert "GELU" in activations
    stored = {name: value for name, value in tuned.named_parameters() if not value.is_contiguous()}
    assert {name.rpartition(".h.")[2] for name in stored} == {f"{i}.mlp.c_fc.weight" for i in range(2)}
    for (name, before), after in zip(plain.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(before, after), name
    ids = torch.tensor([IDS])
    exact = Whole(plain).run(IDS).logits.softmax(-1)
    with torch.no_grad():
        for model in (plain, tuned):
            assert off(model(ids).logits[0].double().softmax(-1), exact) <= ROUNDING
    x = torch.linspace(-12, 12, 4001)
    assert off(nn.GELU(approximate="tanh")(x), NewGELUActivation()(x)) <= 2e-6


def test_half_precision_keeps_its_gelu() -> None:
    """Its eight roundings are part of the model: bit for bit the same."""
    plain = wide_gpt2(torch.bfloat16)
    tuned = copy.deepcopy(plain)
    tune(tuned, discover(tuned, torch.device("cpu")).wiring, torch.device("cpu"))
    assert any(isinstance(module, NewGELUActivation) for module in tuned.modules())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_only_families_with_the_interface_get_another_attention(family: str) -> None:
    plain = FAMILIES[family](0)
    tuned = copy.deepcopy(plain)
    installed = tune(tuned, discover(tuned, torch.device("cpu")).wiring, torch.device("cpu"))
    assert installed == (family not in (*OWN_WAY, "mamba"))
    now: Any = tuned.config._attn_implementation
    assert now == (ATTENTION if installed else plain.config._attn_implementation)
    with torch.no_grad():
        found, before = (model(torch.tensor([IDS]), use_cache=False).logits for model in (tuned, plain))
    assert off(found.double().softmax(-1), before.double().softmax(-1)) <= ROUNDING


# ---------------------------------------------------------------------------- the head


@lru_cache(maxsize=1)
def sharpened(family: str, gain: float) -> tuple[ModelHandle, Whole]:
    """A family whose logits are so many times larger."""
    model = FAMILIES[family](0)
    with torch.no_grad():
        output: Any = model.get_output_embeddings()
        if output.weight is model.get_input_embeddings().weight:  # type: ignore[union-attr]
            output.weight = nn.Parameter(output.weight * gain, requires_grad=False)
        else:
            output.weight.mul_(gain)
    return handle_of(model, family), Whole(model)


def states_of(whole: Whole, rows: int, n_readout: int) -> tuple[Tensor, Tensor]:
    """Random final states [row, readout, width], and the float64 logits that the whole model makes of them."""
    states = torch.randn(rows, n_readout, whole.width, generator=torch.Generator().manual_seed(4)) * 2
    logits = [
        whole.run(
            IDS[:n_readout],
            puts=[Put(layer=END, site="output", position=p, vector=v) for p, v in enumerate(row)],
        ).logits
        for row in states
    ]
    return states, torch.stack(logits)


@pytest.mark.parametrize("stretch", [1, 10, 4096])
@pytest.mark.parametrize("gain", [1.0, 8.0])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere", "granite", "gptj", "opt_350m"])
def test_scores_are_those_of_a_float64_softmax(
    family: str, gain: float, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = sharpened(family, gain)
    assert (model.head is None) == (family == "gemma2")  # its logits are capped
    if family in ("cohere", "granite"):
        assert model.head is not None
        assert model.head.multiplier == pytest.approx(0.25, rel=1e-4)
    monkeypatch.setattr(heads, "STRETCH", stretch)
    for n_readout in (1, 3):
        states, logits = states_of(whole, 6, n_readout)
        best, worst = logits[0, 0].argmax(), logits[0, 0].argmin()
        for ids in ([int(best), 5, 0], [int(worst), 96, 5]):
            chosen = logits.gather(-1, torch.tensor(ids[:n_readout]).expand(6, -1)[..., None])[..., 0]
            others = logits.scatter(-1, torch.tensor(ids[:n_readout]).expand(6, -1)[..., None], -torch.inf)
            log_p = (chosen - logits.logsumexp(-1)).sum(-1)
            found = scores_of_states(model, states, ids[:n_readout])
            tolerance = 3e-6 * max(10.0, float(logits.abs().max()))
            assert off(found.log_probability.exp(), log_p.exp()) <= tolerance
            assert off(found.log_probability, log_p) <= n_readout * tolerance
            if n_readout == 1:
                assert off(found.log_odds, (chosen - others.logsumexp(-1))[:, 0]) <= 2 * tolerance
    if gain > 1 and family != "gemma2":
        p = logits.softmax(-1)
        assert float(p.max()) > 1 - 1e-6
        assert float(p.min()) < 1e-12


@pytest.mark.parametrize("stretch", [1, 8, 10, 40, 96, 4096])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "cohere", "gemma2", "phi"])
def test_distributions_are_those_of_whole_logits(
    family: str, raw: bool, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, probabilities, entropies and the most probable tokens, also in stretches and with a bias (Phi)."""
    model, whole = verified(family), Whole(FAMILIES[family](0))
    monkeypatch.setattr(heads, "STRETCH", stretch)
    states, logits = states_of(whole, 6, 1)
    states, logits = states[:, 0], logits[:, 0]
    if raw:
        weight: Any = FAMILIES[family](0).get_output_embeddings()
        states = states * 0.5
        logits = states.double() @ weight.weight.double().T
    tokens = [0, 96, int(logits[0].argmax()), 50]
    found = distribution_of_states(model, states, tokens, 5, raw=raw)
    log_p = logits.log_softmax(-1)
    top_p, top_ids = log_p.exp().topk(5, dim=-1)
    assert torch.equal(found.top_ids, top_ids)
    assert off(found.top_probability, top_p) <= ROUNDING
    assert torch.equal(found.rank, 1 + (logits[:, None] > logits[:, tokens, None]).sum(-1))
    assert off(found.probability, log_p[:, tokens].exp()) <= ROUNDING
    assert off(found.entropy, -(log_p.exp() * log_p).sum(-1)) <= ROUNDING
    assert float(found.entropy.max()) > 0.5


@pytest.mark.parametrize("stretch", [10, 40, 4096])
def test_ties_share_a_rank(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens with the same row in the output embedding: only those above count, in the same stretch and in others."""
    model = FAMILIES["llama"](0)
    with torch.no_grad():
        output: Any = model.get_output_embeddings()
        # One number a row: sums of many depend in their last bit on where a row stands, on some processors.
        for token in (5, 7, 20, 60, 96):
            output.weight[token] = torch.where(torch.arange(output.weight.shape[1]) == 3, 0.4, 0.0)
    tied = handle_of(model, "llama")
    states, logits = states_of(Whole(model), 6, 1)
    monkeypatch.setattr(heads, "STRETCH", stretch)
    tokens = [5, 7, 20, 60, 96, 3]
    found = distribution_of_states(tied, states[:, 0], tokens, 1)
    higher = 1 + (logits[:, 0, None] > logits[:, 0, tokens, None] + 1e-9).sum(-1)
    assert torch.equal(found.rank, higher)
    plain = distribution_of_logits(tied.logits(states)[:, 0], tokens, 1)
    assert torch.equal(plain.rank, higher)
    assert measures.rank(logits[0, 0], 5) == higher[0, 0]


def test_a_token_that_has_a_stretch_to_itself_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """97 tokens in stretches of 48: the last one is alone, and nothing is left of its stretch."""
    model, whole = verified("llama"), Whole(FAMILIES["llama"](0))
    states, logits = states_of(whole, 4, 1)
    monkeypatch.setattr(heads, "STRETCH", 48)
    found = scores_of_states(model, states, [96])
    assert off(found.log_probability, logits[:, 0].log_softmax(-1)[:, 96]) <= 1e-4
