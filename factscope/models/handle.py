"""The loaded model, its parts, what it can do, and its key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from factscope.errors import CapabilityError, ModelUnsupported
from factscope.models.discovery import Parts, discover, probe_ids
from factscope.models.dispatch import Dispatcher, Overlay, Plan, Stopped, first
from factscope.models.head import Head
from factscope.models.offload import there, weight_of
from factscope.models.splitting import Reach
from factscope.models.tuning import tune

if TYPE_CHECKING:
    from factscope.editors.edit import Edit


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Whether the model supports something, and if not, why, in words for a page."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a caption needs to know of a model; plain values."""

    name: str
    revision: str
    dtype: str
    family: str
    n_layers: int
    n_heads: int
    d_model: int
    weights: str
    """Fingerprint of the weight state."""

    @property
    def key(self) -> str:
        """Identifies model, dtype and weight state; part of every result's key."""
        return f"{self.name}@{self.revision}:{self.dtype}:{self.weights}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelHandle:
    """A loaded model in one weight state. Shared by every session: nothing on it changes after it is built.

    Edits are a weight state beside the weights: every forward of an edited handle sees them, and handles of other
    states share its modules and see nothing of them (``factscope.editors.edit.with_edits`` makes such handles).

    Attributes:
        info: name, shape and fingerprint.
        tokenizer: the model's tokenizer.
        capabilities: by name, as ``verification`` lists them.
        max_tokens: the longest prompt that the model takes; None where the configuration names no limit.
        head: the output embedding as a plain matrix; None where it is none, or more than a scale follows it.
        rides: whether runs on the last position were verified to go along with the plain forward.
        reach: the linear way from attention updates to the logits; None where there is none.
        edits: the edits that are on, in their order; empty where the weights are as loaded.
        unedited: the model as loaded, where edits are on.
    """

    info: ModelInfo
    tokenizer: Any
    capabilities: Mapping[str, Capability]
    parts: Parts
    device: torch.device
    vocabulary: int
    n_parameters: int
    max_tokens: int | None
    warnings: tuple[str, ...] = ()
    head: Head | None = None
    rides: bool = False
    reach: Reach | None = None
    edits: tuple[Edit, ...] = ()
    unedited: ModelHandle | None = field(default=None, repr=False)
    _model: nn.Module = field(repr=False)
    _dispatcher: Dispatcher = field(repr=False)
    _keeps_last_only: bool = field(repr=False)
    _weights: Overlay = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """Identifies model, dtype and weight state."""
        return self.info.key

    @property
    def original(self) -> ModelHandle:
        """The same model with its weights as loaded; itself where no edit is on."""
        return self.unedited or self

    @property
    def probe(self) -> Int[Tensor, "row position"]:
        """Random token ids, one row, on which the model is verified."""
        return probe_ids(self.vocabulary).to(self.device)

    def require(self, capability: str, purpose: str) -> None:
        """Refuse an experiment that this model cannot carry.

        Raises:
            CapabilityError: with the measured reason.
        """
        found = self.capabilities[capability]
        if not found.ok:
            raise CapabilityError(
                f"{self.info.name} ({self.info.family}) does not support {purpose}: {found.reason}",
                "choose another model or experiment",
            )

    def forward(
        self,
        ids: Int[Tensor, "row position"],
        plan: Plan | None = None,
        *,
        cache: Any = None,
        last: int | None = None,
        positions: Int[Tensor, "row position"] | None = None,
        gradients: bool = False,
    ) -> Float[Tensor, "row position vocabulary"]:
        """Logits of the model's own forward, float32 or wider, under a plan.

        Args:
            ids: token ids; with a cache only the tokens after the cached ones.
            plan: what happens on the way; None runs the plain model.
            cache: keys and values of the positions before ``ids``.
            last: only the logits of this many last positions; None gives all.
            positions: where the tokens stand; None counts on from the cached ones.
            gradients: the logits remember what the plan put in that asks for gradients; weights ask for none.
        """
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if cache is not None:
            arguments["past_key_values"] = cache
        if positions is not None:
            arguments["position_ids"] = positions
        if last is not None and self._keeps_last_only:
            arguments["logits_to_keep"] = last
        with torch.set_grad_enabled(gradients), self._dispatcher.running(plan or Plan(), self._weights):
            logits = self._model(**arguments).logits
        logits = logits if last is None else logits[:, -last:]
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "token width"]:
        """What the embedding module gives for some tokens, before positions are added."""
        with torch.no_grad():
            return self.parts.wiring.embedding(torch.tensor([list(tokens)], device=self.device))[0]

    def block(
        self,
        layer: int,
        ids: Int[Tensor, "row position"],
        states: Float[Tensor, "row position d_model"],
        keep: Bool[Tensor, "row head query key"] | None = None,
    ) -> tuple[Float[Tensor, "row position d_model"], Tensor | None]:
        """One block alone, some attention edges cut: its output for states put in, and weights if it tells."""
        plan = Plan(
            start_layer=layer,
            resume=states,
            keep={} if keep is None else {layer: keep},
            stop_after=layer,
            capture=frozenset({("output", layer), ("pattern", layer)}),
        )
        with suppress(Stopped):
            self.forward(ids, plan, last=1)
        return plan.captured["output", layer], plan.captured.get(("pattern", layer))

    def logits(self, states: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position vocabulary"]:
        """Logits of states put in as the output of the last block: the model's own norm, head, scale and soft-cap."""
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.device)
        return self.forward(ids, Plan(start_layer=self.info.n_layers, resume=states))

    def normed(self, states: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position width"]:
        """What the output embedding is given for states put in as the output of the last block."""
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.device)
        plan = Plan(start_layer=self.info.n_layers, resume=states, stop_at_head=True)
        with suppress(Stopped):
            self.forward(ids, plan)
        return plan.captured["head", 0]

    def project(self, layer: int, heads: Float[Tensor, "row width"]) -> Float[Tensor, "row d_model"]:
        """A layer's output projection on what its heads give, side by side; keeps gradients of its input."""
        module: Any = self.parts.wiring.output_projection[layer]
        with self._dispatcher.running(Plan(), self._weights):
            return module(heads)

    def weight(self, module: nn.Module) -> Tensor:
        """The weight of a linear map as loaded, wherever it is kept; edits are not in it."""
        return weight_of(self._model, module)

    def require_square_head(self, width: int) -> None:
        """Refuse a raw projection of states of another width than the output embedding's.

        Raises:
            CapabilityError: names both widths.
        """
        head: Any = self.parts.wiring.head
        if width != head.weight.shape[-1]:
            raise CapabilityError(
                f"{self.info.name} ({self.info.family}) has states of width {width} and an output embedding "
                f"of width {head.weight.shape[-1]}, so that there is no raw projection",
                "choose the normed one",
            )

    def unembed(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocabulary"]:
        """``E h``: the output embedding alone, without final norm, bias, scale or soft-cap.

        Raises:
            CapabilityError: the states are not as wide as the output embedding.
        """
        self.require_square_head(states.shape[-1])
        head: Any = self.parts.wiring.head
        with torch.no_grad():
            values = head(states.to(self.device))
            if (bias := getattr(head, "bias", None)) is not None:
                values = values - bias
        return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def build_handle(
    model: nn.Module,
    tokenizer: Any,
    *,
    name: str,
    revision: str,
    dtype: str,
    device: str,
    warnings: tuple[str, ...] = (),
) -> ModelHandle:
    """Discover a model's parts, install the dispatcher and measure what works.

    Raises:
        ModelUnsupported: not a causal decoder.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    place = torch.device("cpu" if device == "auto" else device)
    parts = discover(model, place)
    interface = tune(model, parts.wiring, place)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    info = ModelInfo(
        name=name,
        revision=revision,
        dtype=dtype,
        family=str(config.model_type),
        n_layers=len(parts.wiring.layers),
        n_heads=parts.n_heads,
        d_model=int(getattr(text, "hidden_size", 0) or 0),
        weights=fingerprint(model),
    )
    maximum = getattr(text, "max_position_embeddings", None)
    code: Callable[..., Any] = model.forward
    handle = ModelHandle(
        info=info,
        tokenizer=tokenizer,
        capabilities={},
        parts=parts,
        device=place,
        vocabulary=vocabulary,
        n_parameters=sum(p.numel() for p in model.parameters()),
        max_tokens=int(maximum) if maximum else None,
        warnings=warnings,
        _model=model,
        _dispatcher=Dispatcher(parts.wiring),
        _keeps_last_only="logits_to_keep" in _argument_names(code),
    )
    from factscope.models.verification import verify  # verification runs the finished handle

    verify(handle, interface=interface)
    return handle


def _argument_names(function: Callable[..., Any]) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that change with any tensor's name, shape, type or (sampled) values.

    At most 65,536 evenly spread values of each tensor are hashed, of those that are offloaded as well: where a weight
    lies is no part of what it is.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel() == 0:
            continue
        flat = there(model, name, tensor).reshape(-1)
        step = max(1, flat.numel() // 65_536)
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


__all__ = [
    "Capability",
    "ModelHandle",
    "ModelInfo",
    "ModelUnsupported",
    "build_handle",
    "first",
    "fingerprint",
    "probe_ids",
]
