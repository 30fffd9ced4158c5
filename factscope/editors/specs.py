"""What a person may choose of an edit. The defaults are those of the published code; ``presets`` has the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Problem = Literal["error-injection", "tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing"]
PROBLEMS: tuple[Problem, ...] = (
    "error-injection", "tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing",
)  # fmt: skip
FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]
KeyMode = Literal["averaged", "prompt_only", "original"]
Reference = Literal["mlp", "residual"]


@dataclass(frozen=True, kw_only=True)
class ProblemSpec:
    """What every method asks.

    Attributes:
        preset: the name of the settings that these came from.
        layers: which are edited; empty takes the preset's.
        problem: one of Hase et al.'s five.
        seed: of the context templates, of the noise and of the sampled target.
        noise: the rule for the noise of fact forcing and tracing reversal, as in causal tracing.
        noise_at: ``aligned`` puts one draw for each row on that row's own subject; ``compat`` draws anew at every step
            and puts it where the plain prompt has its subject, whatever stands there, as the released code does.
        strip_prompt: the target of tracing reversal is what the model goes on with; False keeps the prompt in front of
            it, as the released code does.
    """

    preset: str = "rome"
    layers: tuple[int, ...] = ()
    problem: Problem = "error-injection"
    seed: int = 1
    noise: str = "s3"
    noise_at: Literal["aligned", "compat"] = "aligned"
    strip_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class ValueSpec(ProblemSpec):
    """How the value that an MLP is to write is found, and where the statistics of its keys come from.

    Attributes:
        steps: evaluations of the loss; the last one is followed by no update, so there is one update less.
        learning_rate: Adam's.
        weight_decay: times ``|delta| / |v0|^2``; for MEMIT v0 is the block's output.
        kl_factor: times KL(edited || original) of what follows "{subject} is a".
        clamp: the longest delta, in units of ``clamp_reference``.
        clamp_reference: the norm of what the MLP wrote (``mlp``, published), or of the residual stream behind the block
            (``residual``; MEMIT's published one): a small model's MLP outputs are short beside its stream.
        stop: the optimisation ends when ``stop_on`` falls below; 0 never. An erasure never stops early.
        stop_on: the whole ``loss`` (published), or the negative log-probability ``nll`` alone.
        fact_token: the token whose key and value are edited.
        contexts: what is put before the prompt: ``rome`` (twenty sampled beginnings), ``memit`` (five, begun by seed
            words), ``none``.
        statistics: of the keys: ``auto`` (those that ship or were collected for this model), ``identity``, or a file
            (.npz of ROME or MEMIT, .safetensors of ours).
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    clamp_reference: Reference = "mlp"
    stop: float = 0.05
    stop_on: Literal["loss", "nll"] = "loss"
    fact_token: FactToken = "subject_last"
    contexts: Literal["rome", "memit", "none"] = "rome"
    statistics: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RomeSpec(ValueSpec):
    """Rank-one model editing (Meng et al. 2022a); several layers are edited one after another.

    Attributes:
        key_mode: whose key is edited. ``averaged``: the mean over the contexts, throughout. ``prompt_only``: the plain
            prompt's, throughout. ``original``: the mean in u, the plain prompt's in the update, as published; where the
            two disagree, the update explodes.
    """

    key_mode: KeyMode = "averaged"

    @property
    def method(self) -> str:
        """The name of the method."""
        return "rome"


@dataclass(frozen=True, kw_only=True)
class MemitSpec(ValueSpec):
    """Mass-editing memory in a transformer (Meng et al. 2022b): several layers share what is written.

    Attributes:
        covariance_weight: lambda as a multiple of the MLP's width. A key of average size has ``k' C^-1 k`` equal to the
            width, so this decides the share of the residual that one fact writes: 1 / (1 + covariance_weight).
    """

    preset: str = "memit"
    clamp: float = 0.75
    clamp_reference: Reference = "residual"
    contexts: Literal["rome", "memit", "none"] = "memit"
    covariance_weight: float = 15_000 / 16_384

    @property
    def method(self) -> str:
        """The name of the method."""
        return "memit"


@dataclass(frozen=True, kw_only=True)
class FineTuningSpec(ProblemSpec):
    """Finetuning of down-projections, bounded (FT with an L-infinity bound) or not.

    Attributes:
        steps, learning_rate: of Adam.
        bound: how far any single weight may move; None sets no bound.
        bias: the down-projection's bias moves as well.
        loss: ``correct`` scores every token of the target after those before it, summed; ``compat`` scores them all at
            the prompt's last token and takes the mean, as the released code of ROME does.
        stop: steps are skipped while the loss is below; after ``patience`` of them in a row the end is reached.
        rows: noisy copies of the prompt in fact forcing.
    """

    preset: str = "rome"
    steps: int = 25
    learning_rate: float = 5e-4
    bound: float | None = 5e-4
    bias: bool = False
    loss: Literal["correct", "compat"] = "correct"
    stop: float = 0.01
    patience: int = 5
    rows: int = 10

    @property
    def method(self) -> str:
        """The name of the method."""
        return "ft"


EditSpec = RomeSpec | MemitSpec | FineTuningSpec
