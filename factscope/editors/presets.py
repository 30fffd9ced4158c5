"""Settings of edits by name, as data, with where they come from. A person may change each of them.

``bundled`` was chosen by error injections into the bundled model, 5 to 10 facts a setting, of the half of subjects that
is for choosing (``demo.sentences.is_dev``); for the other problems the same settings are taken over, unmeasured. The
others are published constants, which belong to the models they were tuned on: elsewhere they are a start, and a warning
says so. Where a preset names no layer for a model, the layer is the same share of the depth as in GPT-2 XL.

Released code and paper disagree in places; ``hase-paper`` has what the paper's appendix prints, ``hase-code`` what the
released code does when it is given no option, defects included: the original key mode, no early stop, prompts left in
the targets of tracing reversal, noise at the wrong tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from factscope.editors.specs import EditSpec, FineTuningSpec, MemitSpec, Problem, RomeSpec
from factscope.errors import SpecError
from factscope.interventions.attention import window
from factscope.models.handle import ModelInfo

ROME = "Meng et al. 2022 (arXiv 2202.05262), released hyper-parameters"
MEMIT = "Meng et al. 2022 (arXiv 2210.07229), released hyper-parameters"
HASE_PAPER = "Hase et al. 2023 (arXiv 2301.04213), appendix A"
HASE_CODE = "Hase et al. 2023, released code without options"
MEASURED = "chosen by error injections into the bundled model, on facts that no figure is reported of"
SOURCES: Mapping[str, str] = {
    "bundled": MEASURED, "rome": ROME, "memit": MEMIT, "hase-paper": HASE_PAPER, "hase-code": HASE_CODE,
}  # fmt: skip
NAMES = tuple(SOURCES)
METHODS: Mapping[str, type[RomeSpec] | type[MemitSpec] | type[FineTuningSpec]] = {
    "rome": RomeSpec,
    "memit": MemitSpec,
    "ft": FineTuningSpec,
}
SHAPES: Mapping[tuple[str, int], str] = {
    ("gpt2", 48): "gpt2-xl",
    ("gpt2", 36): "gpt2-large",
    ("gpt2", 24): "gpt2-medium",
    ("gptj", 28): "gpt-j",
    ("gpt_neox", 44): "gpt-neox-20b",
}
"""Family and number of layers of the models that constants were published for."""
BUNDLED = "bundled"
DEPTHS: Mapping[str, tuple[float, int]] = {"rome": (17 / 48, 1), "memit": (17 / 48, 5), "ft": (17 / 48, 1)}
"""Where nothing is named: the share of the depth of the last edited layer, and how many layers of 48 end there."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Some fields of a spec, for what they hold.

    Attributes:
        problem, shape: None for all. ``several``: only where several layers are edited.
    """

    preset: str
    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    shape: str | None = None
    several: bool = False


def _hase(preset: str, method: str, values: Mapping[str, Any], **where: Any) -> Setting:
    return Setting(preset=preset, method=method, values=values, **where)


_PAPER, _CODE = "hase-paper", "hase-code"
_COMPAT = {"strip_prompt": False, "noise_at": "compat"}
_XL, _J = "gpt2-xl", "gpt-j"
_VALUE = {
    "learning_rate": 1.0, "steps": 40, "clamp": 1.0, "clamp_reference": "residual", "stop": 0.02, "stop_on": "nll",
}  # fmt: skip
_MASS = {"layers": (0, 1), "clamp": 0.75, "covariance_weight": 0.01}
_TUNED = {"layers": (1,), "steps": 40, "learning_rate": 1e-2, "bound": 0.04}
SETTINGS: tuple[Setting, ...] = (
    # The bundled model: a small model's v* needs larger steps, more of them, and the stream's norm as its limit
    Setting(preset="bundled", method="rome", values={"layers": (1,), **_VALUE}),
    Setting(preset="bundled", method="memit", values={**_VALUE, **_MASS}),
    Setting(preset="bundled", method="ft", values=_TUNED),
    # ROME and its finetuning baseline with a bound
    Setting(preset="rome", method="rome"),
    Setting(preset="rome", method="rome", shape=_XL, values={"layers": (17,)}),
    Setting(preset="rome", method="rome", shape=_J, values={"layers": (5,)}),
    Setting(preset="rome", method="rome", shape="gpt2-medium", values={"layers": (8,), "clamp": 3.0}),
    Setting(preset="rome", method="rome", shape="gpt2-large", values={"layers": (12,)}),
    Setting(preset="rome", method="rome", shape="gpt-neox-20b", values={"layers": (15,)}),
    Setting(preset="rome", method="ft", values={"layers": (0,)}),
    Setting(preset="rome", method="ft", shape=_J, values={"bound": 5e-5}),
    Setting(preset="rome", method="ft", shape="gpt2-medium", values={"bound": 2e-3}),
    Setting(preset="rome", method="ft", shape="gpt2-large", values={"bound": 1e-3}),
    # MEMIT
    Setting(preset="memit", method="memit"),
    Setting(
        preset="memit", method="memit", shape=_XL,
        values={"layers": (13, 14, 15, 16, 17), "covariance_weight": 20_000 / 6_400},
    ),
    Setting(preset="memit", method="memit", shape=_J, values={"layers": (3, 4, 5, 6, 7, 8), "steps": 25}),
    # Hase et al.: layers come from a sweep; these are where ROME edits, and windows of five around them
    *(
        _hase(preset, method, {"layers": layers}, shape=shape)
        for preset in (_PAPER, _CODE)
        for method, shape, layers in (
            ("rome", _XL, (17,)), ("rome", _J, (5,)), ("ft", _XL, (17,)), ("ft", _J, (5,)),
            ("memit", _XL, (15, 16, 17, 18, 19)), ("memit", _J, (3, 4, 5, 6, 7)),
        )
    ),
    *(_hase(_PAPER, method, {}) for method in METHODS),
    _hase(_CODE, "rome", {**_COMPAT, "stop": 0.0, "key_mode": "original"}),
    _hase(_CODE, "memit", {**_COMPAT, "stop": 0.0}),
    _hase(_CODE, "ft", {**_COMPAT, "bias": True}),
    *(
        _hase(preset, "memit", {"covariance_weight": 20_000 / 6_400, "steps": 20}, shape=_XL)
        for preset in (_PAPER, _CODE)
    ),
    *(_hase(preset, "memit", {"steps": 25}, shape=_J) for preset in (_PAPER, _CODE)),
    *(
        _hase(preset, method, {"noise": noise}, shape=shape)
        for preset in (_PAPER, _CODE)
        for method in METHODS
        for shape, noise in ((_XL, "hase:gpt2-xl"), (_J, "hase:gpt-j"))
    ),
    _hase(_PAPER, "rome", {"kl_factor": 1.0}, problem="error-injection"),
    _hase(_PAPER, "memit", {"kl_factor": 0.9}, problem="error-injection"),
    _hase(_CODE, "rome", {"steps": 21}, problem="fact-erasure"),  # there the last step updates too
    _hase(_PAPER, "rome", {"steps": 25}, problem="fact-forcing"),
    _hase(_CODE, "rome", {"steps": 25, "learning_rate": 0.05}, problem="fact-forcing"),
    *(_hase(preset, "ft", {"steps": 50}, problem="fact-forcing") for preset in (_PAPER, _CODE)),
    *(
        _hase(preset, "ft", {"bound": bound}, problem=problem, several=several)
        for preset, several, bounds in (
            (_PAPER, False, (1e-4, 1e-5, 1e-5, 1e-5, 1e-4)),
            (_CODE, False, (1e-4, 1e-3, 1e-5, 5e-5, 1e-4)),
            (_PAPER, True, (2e-5, 2e-5, 1e-5, 1e-5, 1e-4)),
            (_CODE, True, (5e-5, 1e-3, 1e-5, 1e-5, 1e-4)),
        )
        for problem, bound in zip(
            ("error-injection", "tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing"),
            bounds,
            strict=True,
        )
    ),
    *(
        _hase(_PAPER, "ft", {"bound": bound}, problem=problem, shape=_XL, several=several)
        for several, bounds in ((False, (1e-3, 5e-4)), (True, (1e-4, 5e-5)))
        for problem, bound in zip(("error-injection", "fact-forcing"), bounds, strict=True)
    ),
)  # fmt: skip


def preset(
    name: str, method: str, problem: Problem, model: ModelInfo, layers: tuple[int, ...] = (), **changed: Any
) -> EditSpec:
    """A preset's settings for a method, a problem and a model.

    Args:
        layers: which are edited; empty takes the preset's.
        changed: fields that a person set otherwise.

    Raises:
        SpecError: there is no such preset or method, or the preset does not know the method.
    """
    if method not in METHODS:
        raise SpecError(f"method {method!r} is unknown", f"choose one of {', '.join(METHODS)}")
    if name not in NAMES:
        raise SpecError(f"preset {name!r} is unknown", f"choose one of {', '.join(NAMES)}")
    known = [setting for setting in SETTINGS if (setting.preset, setting.method) == (name, method)]
    if not known:
        others = sorted({setting.preset for setting in SETTINGS if setting.method == method})
        raise SpecError(f"preset {name!r} has no settings for {method}", f"choose one of {', '.join(others)}")
    shape = shape_of(model)
    values: dict[str, Any] = {}
    for setting in known:
        fits = setting.problem in (None, problem) and setting.shape in (None, shape)
        if fits and (not setting.several or len(layers) > 1):
            values |= setting.values
    spec = METHODS[method](**{**values, "preset": name, "problem": problem})
    chosen = layers or tuple(values.get("layers", ())) or default_layers(method, model.n_layers)
    _refuse_unknown(spec, changed)
    return replace(spec, layers=tuple(layer for layer in chosen), **changed)


def _refuse_unknown(spec: EditSpec, changed: Mapping[str, Any]) -> None:
    names = {one.name for one in fields(spec)}
    for name in changed:
        if name not in names:
            raise SpecError(f"{name!r} is no setting of {spec.method}", f"choose among {', '.join(sorted(names))}")


def default_layers(method: str, n_layers: int) -> tuple[int, ...]:
    """The layers that are edited where neither a person nor a preset names any: GPT-2 XL's, scaled to the depth."""
    depth, count = DEPTHS[method]
    last = min(n_layers - 1, round(depth * n_layers))
    number = max(1, round(count * n_layers / 48)) if count > 1 else 1
    return tuple(range(max(0, last - number + 1), last + 1))


def layers_around(center: int, size: int, n_layers: int) -> tuple[int, ...]:
    """A window of layers, as in the other methods."""
    return tuple(window(center, size, n_layers))


def shape_of(model: ModelInfo) -> str | None:
    """The published model that this one has the shape of; None where constants are not for it."""
    return BUNDLED if model.name == BUNDLED else SHAPES.get((model.family, model.n_layers))


def doubts(spec: EditSpec, model: ModelInfo) -> tuple[str, ...]:
    """A warning where a preset's constants belong to another model."""
    shape = shape_of(model)
    if spec.preset == BUNDLED:
        own = shape == BUNDLED
    elif spec.preset.startswith("hase"):
        own = shape in (_XL, _J)
    else:
        own = shape in SHAPES.values()
    if own or spec.preset not in NAMES:
        return ()
    whose = "the bundled model" if spec.preset == BUNDLED else "GPT-J and GPT-2 models"
    return (f"The settings of preset {spec.preset} belong to {whose}; for {model.name} they are a start, no more.",)
