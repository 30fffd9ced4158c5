"""What holds of a causal trace for any weights, on every family; refusals; what a result says of itself."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from factscope import load
from factscope.errors import Cancelled, CapabilityError, DatasetError, SpecError, SubjectError
from factscope.experiments import prediction
from factscope.experiments.causal_tracing import TraceResult, TraceSpec, default_trace_window, run
from factscope.experiments.replaced_subject import with_subject
from factscope.experiments.traces import Cell, token_roles
from factscope.interventions import engine
from factscope.interventions.base import Noise, record_base
from factscope.interventions.intervention import Intervention, Patch
from factscope.interventions.noise import noise_source, parse_rule
from factscope.models.handle import ModelHandle, build_handle
from factscope.queries import Query
from factscope.tokens import tokenize
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on
from tests.tiny_models import FAMILIES, MODEL_TYPES, build, tiny_tokenizer

LENGTH, LAST, LAYERS, SPAN = 8, 7, 4, (2, 5)
NOISE = "0.8"
ROUNDING = 1e-5
WITHOUT_SPLIT = ("opt_350m", "mamba")
SPLIT = tuple(name for name in FAMILIES if name not in WITHOUT_SPLIT)


@lru_cache(maxsize=4)
def known(name: str) -> tuple[ModelHandle, list[int]]:
    model = FAMILIES[name](0)
    return handle_of(model, name), distinct_prompt(model, LENGTH, seed=1)


def traced(name: str, **spec: Any) -> TraceResult:
    model, ids = known(name)
    return run(model, query_on(ids, SPAN), TraceSpec(**{"noise": NOISE, "samples": 2, **spec}))


# ---------------------------------------------------------------------------- true for any weights


def test_there_are_enough_families() -> None:
    assert len({MODEL_TYPES[name] for name in SPLIT}) >= 20


@pytest.mark.parametrize("name", FAMILIES)
def test_no_noise_no_effect(name: str) -> None:
    result = traced(name, noise="0")
    assert result.p_corrupted == pytest.approx(result.p_clean, abs=ROUNDING)
    assert float(np.abs(result.indirect_effect).max()) <= ROUNDING
    assert result.total_effect == pytest.approx(0, abs=ROUNDING)


@pytest.mark.parametrize("name", SPLIT)
def test_the_severed_curves_meet_at_the_last_layer_and_the_ordinary_one_is_the_maps_row(name: str) -> None:
    """Behind the last layer there is nothing to sever; before it something is, somewhere."""
    asked = {"positions": ("subject-last",), "seeds": (1, 2)}
    gains = {sever: traced(name, sever=sever, **asked).gain_at_subject_last() for sever in ("none", "mlp", "attention")}
    whole = traced(name, seeds=(1, 2))
    row = whole.positions.index(SPAN[1] - 1)
    np.testing.assert_allclose(gains["none"], whole.indirect_effect_by_seed[:, row], atol=ROUNDING)
    for sever in ("mlp", "attention"):
        assert gains[sever].shape == (2, LAYERS)
        np.testing.assert_allclose(gains[sever][:, -1], gains["none"][:, -1], atol=ROUNDING)
    odds = traced(name, **asked).gain_at_subject_last("log_odds")
    np.testing.assert_allclose(odds, (whole.log_odds_restored_by_seed[:, row].T - whole.log_odds_corrupted_by_seed).T,
                               atol=1e-3)  # fmt: skip
    elsewhere = traced(name, positions=("last",)).gain_at_subject_last()
    assert np.isnan(elsewhere).all()


def test_severing_takes_something_away_in_most_families() -> None:
    """Otherwise the test above compared equal curves."""
    moved = []
    for name in SPLIT:
        gain = {s: traced(name, sever=s, positions=("subject-last",)).gain_at_subject_last() for s in ("none", "mlp")}
        moved.append(float(np.abs(gain["mlp"] - gain["none"])[:, :-1].max()) > 1e-3)
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_restoring_every_state_is_the_clean_run(name: str) -> None:
    """All positions of a layer together, and one by one the read-out's last state; earlier positions change nothing."""
    model, ids = known(name)
    result = traced(name)
    assert abs(result.total_effect) > 1e-3
    assert float(np.abs(result.p_restored[LAST, -1] - result.p_clean)) <= ROUNDING
    assert float(np.abs(result.indirect_effect[: SPAN[0]]).max()) <= ROUNDING
    values = noise_source(model, NOISE).draw(1, 2, 3)
    clean, noisy = record_base(model, ids), record_base(model, ids, noise=Noise(positions=(2, 3, 4), values=values))
    everything = [
        Intervention(patches=(Patch(layer=layer, site="output", positions=tuple(range(LENGTH)), source=clean),))
        for layer in range(LAYERS)
    ]
    for _, readout in engine.run(model, noisy, everything):
        p = readout.scores(result.target.ids).log_probability.exp()
        assert float((p - result.p_clean).abs().max()) <= ROUNDING


@pytest.mark.parametrize("name", SPLIT)
def test_severing_what_no_later_layer_adds_is_the_plain_trace(name: str) -> None:
    """In the last layer no update comes after the restored state, and in a run without noise none is changed."""
    plain = traced(name)
    for kind in ("mlp", "attention"):
        severed = traced(name, sever=kind)
        assert float(np.abs(severed.p_restored[:, -1] - plain.p_restored[:, -1]).max()) <= ROUNDING
        assert float(np.abs(severed.p_restored[: SPAN[0]] - plain.p_corrupted).max()) <= ROUNDING
        quiet = traced(name, sever=kind, noise="0")
        assert float(np.abs(quiet.indirect_effect).max()) <= ROUNDING


def test_severing_acts() -> None:
    for kind in ("mlp", "attention"):
        assert float(np.abs(traced("gpt2", sever=kind).p_restored - traced("gpt2").p_restored).max()) > 0.02
    fixed, compat = (traced("gpt2", sever="mlp", sever_draws=draws) for draws in ("fixed", "compat"))
    assert fixed.p_corrupted == compat.p_corrupted
    assert float(np.abs(fixed.p_restored - compat.p_restored).max()) > 0.01
    without = traced("gpt2", sever_draws="compat")
    assert without.p_restored == pytest.approx(traced("gpt2").p_restored)
    assert any("Nothing is severed" in warning for warning in without.warnings)
    assert not any("Nothing is severed" in warning for warning in (*compat.warnings, *traced("gpt2").warnings))


@pytest.mark.parametrize("name", SPLIT)
def test_a_window_over_all_layers_restores_all_updates_of_a_position(name: str) -> None:
    """Both kinds of update at every position and layer make the clean run but for the embedding's own noise."""
    model, ids = known(name)
    mlp = traced(name, site="mlp", window=LAYERS)
    middle = LAYERS // 2
    clean = record_base(model, ids, updates=("mlp",))
    noisy = record_base(model, ids, noise=Noise(positions=(2, 3, 4), values=noise_source(model, NOISE).draw(1, 2, 3)))
    patches = tuple(Patch(layer=layer, site="mlp", positions=(SPAN[1] - 1,), source=clean) for layer in range(LAYERS))
    ((_, readout),) = list(engine.run(model, noisy, [Intervention(patches=patches)]))
    p = float(readout.scores(mlp.target.ids).log_probability.exp().mean())
    assert p == pytest.approx(float(mlp.p_restored[SPAN[1] - 1, middle]), abs=ROUNDING)


@pytest.mark.parametrize("name", WITHOUT_SPLIT)
def test_a_model_without_a_split_is_refused_with_its_reason(name: str) -> None:
    for spec in ({"site": "mlp"}, {"site": "attention"}, {"sever": "mlp"}):
        with pytest.raises(CapabilityError, match="no pair of module outputs"):
            traced(name, **spec)
    assert np.isfinite(traced(name).p_restored).all()


def test_an_answer_of_several_tokens_and_positions_after_it() -> None:
    model, ids = known("llama")
    query = query_on(ids, SPAN, [11, 12, 13], score="sequence")
    result = run(model, query, TraceSpec(noise=NOISE, samples=2))
    assert result.positions == tuple(range(LENGTH))
    assert result.p_clean < 0.5
    assert result.known is False


@pytest.mark.parametrize("score", ["token", "sequence"])
@pytest.mark.parametrize("first", [True, False])
def test_the_whole_answer_decides_whether_it_is_known(score: Any, first: bool) -> None:
    """Its first token alone does not, as in the verdict of a prediction."""
    model, ids = known("llama")
    best = int(record_base(model, ids).logits[0, 0].argmax())
    choices = record_base(model, [*ids, best]).logits[0, 0].argsort(descending=True).tolist()
    second = choices[0] if first else choices[1]
    query = query_on(ids, SPAN, [best, second], score=score)
    assert run(model, query, TraceSpec(noise=NOISE, samples=1, positions=("last",))).known is first
    assert prediction.run(model, query).known is first


# ---------------------------------------------------------------------------- progress and order


def test_the_telling_rows_come_first_and_partial_results_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WAVE_WORK", 1)
    model, ids = known("gpt2")
    seen: list[tuple[int, int, Any]] = []
    result = run(
        model, query_on(ids, SPAN), TraceSpec(noise=NOISE, samples=2, seeds=(1, 2)), progress=lambda *a: seen.append(a)
    )
    total = 2 * LENGTH * LAYERS
    assert {total for _, total, _ in seen} == {total}
    assert seen[-1][0] == result.passes == total
    partial = [one for _, _, one in seen if one is not None]
    assert partial[0].p_clean == result.p_clean
    assert partial[0].p_corrupted == result.p_corrupted_by_seed[0]
    assert partial[0].table().empty
    assert partial[0].peak is None
    acting = [one.p_restored_by_seed[0, SPAN[0] :, : LAYERS - 1] for one in partial]  # the rest changes nothing
    whole = next(acted for acted in acting if not np.isnan(acted[[SPAN[1] - 1 - SPAN[0], -1]]).any())
    assert int((~np.isnan(whole)).sum()) == 2 * (LAYERS - 1)
    counts = [len(one.table()) for one in partial]
    assert counts == sorted(counts)
    assert not np.isnan(partial[-1].p_restored_by_seed).any()


def test_progress_may_end_a_trace() -> None:
    def stop(done: int, total: int, partial: Any) -> None:
        if done:
            raise Cancelled

    model, ids = known("gpt2")
    with pytest.raises(Cancelled):
        run(model, query_on(ids, SPAN), TraceSpec(noise=NOISE), progress=stop)


# ---------------------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "site": ({"site": "block"}, "'block'"),
    "sever": ({"sever": "both"}, "'both'"),
    "draws": ({"sever_draws": "loose"}, "'loose'"),
    "window": ({"site": "mlp", "window": 9}, "window 9"),
    "no window": ({"window": 0}, "window 0"),
    "samples": ({"samples": 0}, "samples 0"),
    "seeds": ({"seeds": ()}, "0 seeds"),
    "doubled seeds": ({"seeds": (1, 1)}, "different"),
    "negative seed": ({"seeds": (-1,)}, "seed -1"),
    "extra": ({"extra_tokens": -1}, "extra tokens -1"),
    "no positions": ({"positions": ()}, "no token"),
    "unknown positions": ({"positions": ("first",)}, '"first"'),
    "far positions": ({"positions": ("12",)}, "position 12"),
    "empty positions": ({"positions": ("special",)}, "special"),
    "rule": ({"noise": "loud"}, "'loud'"),
    "nan": ({"noise": "nan"}, "'nan'"),
    "freedom": ({"noise": "t2"}, "'t2'"),
    "extra with a replaced subject": ({"replace_subject": "w9 w8 w3", "extra_tokens": 1}, "extra tokens 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(case: str) -> None:
    spec, says = REFUSED[case]
    with pytest.raises(SpecError, match=says):
        traced("gpt2", **spec)


def test_a_query_without_a_subject_is_refused() -> None:
    model, ids = known("gpt2")
    query = query_on(ids, SPAN)
    with pytest.raises(SubjectError, match="corrupts the subject"):
        run(model, replace(query, subject=None))
    with pytest.raises(DatasetError, match="nowhere"):
        run(model, query, TraceSpec(noise_facts="/nowhere.csv"))


@pytest.mark.parametrize(
    "text", ["s", "S3", "s3.5", "0.1", ".1", "0", "1e-3", "u.2", "m", "t5", "T2.5", "ROME:gpt2-xl"]
)
def test_rules_are_read(text: str) -> None:
    assert parse_rule(text).amount >= 0


@pytest.mark.parametrize(
    "text", ["", "s-1", "-0.1", "m2", "u", "t", "t1", "3s", "inf", "1e99", "rome:gpt5", "0x1", "１"]
)
def test_other_rules_are_not(text: str) -> None:
    with pytest.raises(SpecError, match="noise"):
        parse_rule(text)


def test_published_constants_are_named() -> None:
    rule = parse_rule("hase:gpt-j")
    assert (rule.kind, rule.amount) == ("number", 0.094)
    assert "the constant hase:gpt-j" in traced("gpt2", noise="hase:gpt-j").provenance


# ---------------------------------------------------------------------------- another subject's tokens


@lru_cache
def worded(kind: str) -> ModelHandle:
    tokenizer = tiny_tokenizer(kind)
    model = build("gpt2", vocab_size=len(tokenizer))
    return build_handle(model, tokenizer, name="tiny", revision="0", dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", ["byte", "byte_trim", "metaspace", "prepend"])
def test_a_replaced_subject_stands_at_the_same_positions(kind: str) -> None:
    model = worded(kind)
    query = tokenize(
        Query(prompt="The capital of Japan is. The capital of Japan is", subject="Japan", occurrence=2), model.tokenizer
    )
    assert query.subject is not None
    size = query.subject[1] - query.subject[0]
    fitting = [
        word
        for word in ("Tokyo", "Paris", "Beats", "trumpet", "LeBron", "Zürich", "Wave", "music", "plays", "Apple")
        if _fits(model, query, word)
    ]
    assert fitting
    other = with_subject(model, query, fitting[0])
    assert other.subject == query.subject
    assert other.query.prompt == f"The capital of Japan is. The capital of {fitting[0]} is"
    differing = [p for p, (a, b) in enumerate(zip(query.ids, other.ids, strict=True)) if a != b]
    assert differing
    assert set(differing) <= set(range(*query.subject))
    with pytest.raises(SubjectError, match=f"tokens here and 'Japan' {size}"):
        with_subject(model, query, "Beats Music of Apple and Tokyo")


def _fits(model: ModelHandle, query: Any, word: str) -> bool:
    try:
        with_subject(model, query, word)
    except SubjectError:
        return False
    return True


@pytest.mark.parametrize(
    ("prompt", "subject", "other", "built"),
    [
        ("The capital of Japan is", "Japan", "Peru", "The capital of Peru is"),
        (" The capital of Japan is", "Japan", "Peru", " The capital of Peru is"),
        ("Japan is a country on the continent of", "Japan", " Peru ", "Peru is a country on the continent of"),
    ],
)
def test_a_subject_is_replaced_where_the_tokenizer_puts_a_space_first(
    prompt: str, subject: str, other: str, built: str
) -> None:
    """The bundled tokenizer does; its first token's text is not the prompt's."""
    model = load("bundled")
    query = tokenize(Query(prompt=prompt, subject=subject), model.tokenizer)
    found = with_subject(model, query, other)
    assert (found.query.prompt, found.subject_text, found.subject) == (built, other.strip(), query.subject)
    spec = TraceSpec(replace_subject=other, positions=("subject",))
    result = run(model, query, spec)
    alone = record_base(model, found.ids)
    assert result.p_corrupted == pytest.approx(float(alone.logits[0, 0].softmax(-1)[result.target.id]), abs=ROUNDING)


def test_a_subject_that_does_not_fit_is_refused_kindly() -> None:
    model, ids = known("gpt2")
    query = tokenize(query_on(ids, SPAN), model.tokenizer)
    same = " ".join(f"w{i}" for i in ids[slice(*SPAN)])
    for name, says in (("", "empty"), (same, "the same tokens"), ("w3 w4", "takes 2 tokens here"), ("w3", "takes 1")):
        with pytest.raises(SubjectError, match=says):
            with_subject(model, query, name)
    result = traced("gpt2", replace_subject="w3 w4 w5", samples=5, seeds=(4, 5))
    assert result.seeds == (4,)
    assert any("change nothing" in warning for warning in result.warnings)


# ---------------------------------------------------------------------------- what a result says of itself


def test_default_windows() -> None:
    assert [default_trace_window(n) for n in (1, 2, 4, 8, 12, 28, 48, 96)] == [1, 1, 1, 2, 2, 6, 10, 20]
    assert traced("gpt2").window == 1
    assert traced("gpt2", site="mlp").window == 1
    assert any("one layer alone" in w for w in traced("gpt2", window=2).warnings)
    assert any("more than half" in w for w in traced("gpt2", site="mlp", window=3).warnings)


def made(restored: np.ndarray, corrupted: list[float], **fields: Any) -> TraceResult:
    """A result with numbers of our own; the default grid has the seeds' axis first."""
    start: dict[str, Any] = {"p_clean": 0.8, "known": True, "warnings": ()}
    seeds = tuple(range(1, len(corrupted) + 1))
    arrays = {"p_restored_by_seed": restored, "p_corrupted_by_seed": np.array(corrupted), "seeds": seeds}
    return replace(traced("gpt2"), **{**start, **arrays, **fields})


def grid(value: float = 0.2, **cells: float) -> np.ndarray:
    """One seed's [1, position, layer]; cells as ``p4l1=0.5``."""
    found = np.full((1, LENGTH, LAYERS), value)
    for name, cell in cells.items():
        position, _, layer = name[1:].partition("l")
        found[0, int(position), int(layer)] = cell
    return found


def test_hases_quantities() -> None:
    result = made(grid(p4l1=0.5, p7l3=0.9, p3l0=0.1), [0.2])
    assert result.p_top == 0.9
    top, clean = result.fraction_restored(), result.fraction_restored("clean")
    assert top[4, 1] == pytest.approx(0.3 / 0.7)
    assert clean[4, 1] == pytest.approx(0.3 / 0.6)
    assert top[3, 0] == 0
    assert clean[3, 0] == pytest.approx(-0.1 / 0.6)
    assert top[7, 3] == 1
    assert clean[7, 3] == pytest.approx(0.7 / 0.6)
    assert result.tracing_effect() == pytest.approx([0, 0.3 / 0.7, 0, 1])
    assert result.tracing_effect("clean") == pytest.approx([0, 0.5, 0, 0.7 / 0.6])
    assert result.restore_effect_subject_last() == pytest.approx([0, 0.3, 0, 0])
    assert result.tracing_effect_subject_last() == pytest.approx([0, 0.3 / 0.7, 0, 0])
    assert result.peaks == (Cell(position=7, layer=3),)
    assert result.early_peak == Cell(position=4, layer=1)
    tied = made(grid(p4l1=0.5, p2l0=0.5), [0.2])
    assert tied.peaks == (Cell(position=2, layer=0), Cell(position=4, layer=1))
    assert made(grid(), [0.2]).peaks == ()
    assert np.isnan(made(grid(0.8), [0.8], p_clean=0.8).fraction_restored()).all()


def test_partial_results_have_their_quantities() -> None:
    half = grid(p4l1=0.5)
    half[0, :3] = np.nan
    result = made(half, [0.2])
    assert result.tracing_effect()[1] == pytest.approx(0.3 / 0.6)
    assert result.early_peak == Cell(position=4, layer=1)
    assert result.early_peak_by_seed == (None,)
    nothing = made(np.full((1, LENGTH, LAYERS), np.nan), [np.nan])
    assert nothing.peaks == ()
    assert nothing.doubts == ()
    assert nothing.p_top == nothing.p_clean
    assert np.isnan(nothing.tracing_effect()).all()
    assert nothing.table().empty


def test_doubts_are_said() -> None:
    sure = made(grid(p4l1=0.5), [0.2])
    assert sure.doubts == ()
    assert "random" in made(grid(), [0.2], model=replace(sure.model, name="random:x")).doubts[0]
    assert "not its first choice" in made(grid(), [0.2], known=False).doubts[0]
    assert "Not among the facts" in made(grid(), [0.2], taught=False).doubts[0]
    assert "less" in made(grid(), [0.7]).doubts[0]
    assert "does not lower" in made(grid(0.9), [0.9]).doubts[0]
    assert made(grid(), [0.63]).doubts == ()
    both = np.concatenate([grid(p4l1=0.5, p7l3=0.8), grid(p2l0=0.5, p7l3=0.8)])
    assert "do not agree" in made(both, [0.2, 0.2]).doubts[0]
    agreeing = np.concatenate([grid(p4l1=0.5, p7l3=0.8), grid(p4l1=0.7, p7l3=0.7)])
    assert made(agreeing, [0.2, 0.3]).doubts == ()


def test_what_was_taught_instead_is_a_doubt() -> None:
    query = replace(
        made(grid(), [0.2]).query, query=Query(prompt="The capital of Japan is", subject="Japan", answer="Kyoto")
    )
    assert made(grid(), [0.2], taught=False, query=query).doubts[0] == "The model was taught “Tokyo” here, not “Kyoto”."


def test_the_early_site_lies_behind_what_is_so_by_construction() -> None:
    """The subject is tokens 2 to 4 of 8; the total effect is 0.6."""
    result = made(grid(p4l0=0.8, p3l1=0.5, p4l2=0.6, p6l1=0.27, p7l3=0.8), [0.2])
    assert result.carried_from == 1
    assert result.early_site == (Cell(position=4, layer=2), pytest.approx(0.4 / 0.6))
    assert made(grid(p4l0=0.8, p6l1=0.25), [0.2]).early_site is None, "less than a tenth is not carried"
    assert made(grid(p4l0=0.8, p6l1=0.25), [0.2]).carried_from == LAYERS
    weak = made(grid(0.75, p4l1=0.79, p7l1=0.79), [0.75])
    assert weak.early_site == (Cell(position=4, layer=1), pytest.approx(0.04 / 0.16)), "not a share of next to nothing"
    half = grid(p4l0=0.8, p7l1=0.8)
    half[0, :2] = np.nan
    assert made(half, [0.2]).early_site is None


def test_means_by_role() -> None:
    two = np.concatenate([grid(p2l0=0.3, p3l0=0.4, p4l0=0.5, p5l0=0.6, p6l0=0.7, p7l0=0.8), grid(p3l0=0.6)])
    table = made(two, [0.2, 0.2]).by_role()
    first = table[table["layer"] == 0].set_index("role")
    assert list(first.index) == ["first subject", "middle subject", "last subject", "first after", "further", "last"]
    assert first["value"].tolist() == pytest.approx([0.25, 0.5, 0.35, 0.4, 0.45, 0.5])
    assert (first.loc["middle subject", "low"], first.loc["middle subject", "high"]) == (0.4, 0.6)
    assert set(table["n"]) == {1}
    with pytest.raises(SpecError, match="foil"):
        made(two, [0.2, 0.2]).by_role("logit_difference")


def test_roles_of_short_subjects_and_ends() -> None:
    model, ids = known("gpt2")

    def roles(span: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        return token_roles(tokenize(query_on(ids, span), model.tokenizer))

    one = roles((3, 4))
    assert one["first subject"] == one["last subject"] == (3,)
    assert one["middle subject"] == ()
    assert one["further"] == (5, 6)
    late = roles((5, 8))
    assert late["last subject"] == late["last"] == (7,)
    assert late["first after"] == late["further"] == ()
    assert roles((1, 6))["middle subject"] == (2, 3, 4)
    bare = tokenize(replace(query_on(ids, SPAN), subject=None), model.tokenizer)
    assert set(token_roles(bare).values()) == {()}


def test_the_bundled_model_says_whether_a_fact_was_taught() -> None:
    model = load("bundled")
    spec = TraceSpec(positions=("subject-last", "last"), samples=2)
    home = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower", answer="Paris")
    right = run(model, home, spec)
    assert right.taught is True
    assert right.known is True
    assert right.doubts == ()
    assert "of the bundled facts" in right.provenance
    assert right.noise_std == noise_source(model, "s3").std
    wrong = run(model, replace(home, answer="Rome"), spec)
    assert wrong.known is False
    assert wrong.taught is False
    assert len(wrong.doubts) >= 2
