"""What a freshly loaded model really supports, measured with a few tiny forwards.

What fails here is a missing capability with a reason that a page shows, never a wrong number.

    causal         a later token never changes an earlier position's logits (refused otherwise)
    knockout       cutting one edge acts, on that position only, and the cut source does not matter any more
    head_knockout  the same in one head alone
    resume         skipping blocks below l and putting the recorded input in gives the same logits
    lens           states of any layer, many at a time, can be put in as the last block's output
    suffix         one token on cached keys and values gives the same logits, also with an edge cut
    packed         many runs together through the layers, on one shared prefix (sweep), give the same logits
    additive       attention update + MLP update = what each block adds
    heads          the parts of the heads and the bias add up to what the output projection gives (``splitting``)
    direct         what a part adds to the logits, norms held fast, is a linear map
    sources        attention weights are told, and weights times values are what the heads give
    mappings       values are a linear map of what the attention reads
    dense_mlp      the MLP ends in one linear map that an edit can change
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factscope.errors import ModelUnsupported
from factscope.models import splitting
from factscope.models.discovery import probe_ids
from factscope.models.dispatch import Plan
from factscope.models.head import measure_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factscope.interventions.base import Base, Update
    from factscope.interventions.intervention import Intervention, PatchSite
    from factscope.models.handle import Capability, ModelHandle

logger = logging.getLogger(__name__)


def verify(model: ModelHandle, *, interface: bool) -> None:
    """Measure the capabilities of a model and whether its output embedding is a plain matrix; write them down on it.

    Args:
        interface: its attention goes through ``dispatch.attention``.

    Raises:
        ModelUnsupported: attention is not causal.
    """
    from factscope.models.handle import Capability

    ids = probe_ids(model.vocabulary).to(model.device)
    plain = model.forward(ids)[0]
    tolerance = _tolerance(model, plain)
    _refuse_unless_causal(model, ids, plain, tolerance)
    resume = _resume(model, ids, plain, tolerance)
    capabilities = {
        "knockout": _knockout(model, ids, tolerance, resume),
        "head_knockout": _knockout(model, ids, tolerance, resume, head=0),
        "resume": resume,
        "lens": _lens(model, ids, plain, tolerance),
        "additive": _by_layer(model.parts.additive, "no pair of module outputs adds up to what the block adds"),
        "dense_mlp": _by_layer(
            tuple(part is not None for part in model.parts.wiring.down_projection),
            "the MLP has no single dense down-projection (a mixture of experts, for instance)",
        ),
    }
    if capabilities["lens"].ok:
        object.__setattr__(model, "head", measure_head(model, plain, tolerance))
    object.__setattr__(model, "capabilities", capabilities)
    reasons, reach = splitting.measure(model, ids, _share(model))
    object.__setattr__(model, "reach", reach)
    capabilities |= {name: Capability(ok=not reason, reason=reason) for name, reason in reasons.items()}
    object.__setattr__(model, "capabilities", {**capabilities, "suffix": Capability(ok=capabilities["resume"].ok)})
    capabilities["suffix"] = _suffix(model, ids, plain, tolerance, capabilities)
    object.__setattr__(model, "capabilities", {**capabilities, "packed": Capability(ok=False)})
    capabilities["packed"] = _packed(model, ids, tolerance, capabilities, interface)
    object.__setattr__(model, "capabilities", capabilities)
    object.__setattr__(model, "rides", capabilities["packed"].ok and _rides(model, ids, plain, tolerance))


def _tolerance(model: ModelHandle, logits: Tensor) -> float:
    """Largest difference in logits that counts as rounding: 1e-4 of their scale, eight units of the type for halves."""
    return _share(model) * max(1.0, float(logits.abs().max()))


def _share(model: ModelHandle) -> float:
    half = model.info.dtype in ("bfloat16", "float16")
    eps = float(torch.finfo(getattr(torch, model.info.dtype)).eps) if half else 0.0
    return max(1e-4, 8 * eps)


def _refuse_unless_causal(model: ModelHandle, ids: Tensor, plain: Tensor, tolerance: float) -> None:
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.vocabulary
    moved = float((model.forward(changed)[0, :-1] - plain[:-1]).abs().max())
    if not moved <= tolerance:
        raise ModelUnsupported(
            f"{model.info.name} ({model.info.family}) is not a causal model: a later token changes earlier logits",
            "choose a decoder-only causal language model",
        )


def _by_layer(flags: tuple[bool, ...], reason: str) -> Capability:
    from factscope.models.handle import Capability

    missing = [i for i, ok in enumerate(flags) if not ok]
    if not missing:
        return Capability(ok=True)
    where = "every layer" if len(missing) == len(flags) else f"layers {', '.join(map(str, missing))}"
    return Capability(ok=False, reason=f"{reason} ({where})")


def _knockout(
    model: ModelHandle, ids: Tensor, tolerance: float, resume: Capability, *, head: int | None = None
) -> Capability:
    """Cut last -> one earlier position, block by block, in one head or in all.

    Rows: plain; a near source cut; the same and the source's input disturbed; a far source cut; the same, disturbed.
    The cut must act on the last position alone, and with all heads cut a disturbed source must not matter any more:
    attention that has a second way to it is no attention that can be knocked out.
    """
    from factscope.models.handle import Capability

    if model.info.n_heads < 1 or any(part is None for part in model.parts.wiring.attention):
        return Capability(ok=False, reason="some blocks have no attention that takes a mask")
    if not resume.ok:
        return Capability(ok=False, reason=resume.reason)
    length, sources = ids.shape[1], (ids.shape[1] - 2, 1)
    recorded = Plan(capture=frozenset(("input", layer) for layer in range(model.info.n_layers)))
    model.forward(ids, recorded, last=1)
    keep = torch.ones(5, 1 if head is None else model.info.n_heads, length, length, dtype=torch.bool, device=ids.device)
    for row, source in zip((1, 2, 3, 4), (sources[0], sources[0], sources[1], sources[1]), strict=True):
        keep[row, head or 0, -1, source] = False
    acts = []
    for layer in range(model.info.n_layers):
        states = recorded.captured["input", layer]
        states = states.expand(5, *states.shape[1:]).clone()
        for row, source in ((2, sources[0]), (4, sources[1])):
            states[row, source] = states[row, source].flip(-1) * 1.5
        try:
            output, pattern = model.block(layer, ids.expand(5, -1), states, keep)
        except Exception as error:  # any failure is a missing capability
            return Capability(ok=False, reason=f"cutting an edge in layer {layer} fails ({type(error).__name__})")
        acts.append(_acts_alone(output, pattern, sources[0], tolerance, head))
    return _by_layer(tuple(acts), "cutting one edge does not act on that edge alone")


def _acts_alone(output: Tensor, pattern: Tensor | None, near: int, tolerance: float, head: int | None) -> bool:
    scale = tolerance * max(1.0, float(output.abs().max()))
    finite = bool(torch.isfinite(output).all())
    untouched = float((output[[1, 3], :-1] - output[0, :-1]).abs().max()) <= scale
    acted = float((output[1, -1] - output[0, -1]).abs().max()) > 0
    closed = head is not None or all(
        float((output[row, -1] - output[row + 1, -1]).abs().max()) <= scale for row in (1, 3)
    )
    weights = None if pattern is None else pattern[1, slice(None) if head is None else head, -1, near]
    return finite and untouched and acted and closed and (weights is None or bool((weights == 0).all()))


def _lens(model: ModelHandle, ids: Tensor, plain: Tensor, tolerance: float) -> Capability:
    """The last block's output, put in twice beside other states, gives the plain logits."""
    from factscope.models.handle import Capability

    n = model.info.n_layers
    plan = Plan(capture=frozenset({("input", 0), ("output", n - 1)}))
    model.forward(ids, plan, last=1)
    states = [plan.captured[key] for key in (("input", 0), ("output", n - 1), ("output", n - 1))]
    if any(state.dim() != 3 or state.shape != states[1].shape for state in states):
        return Capability(ok=False, reason="a token has several hidden states side by side")
    try:
        logits = model.forward(ids.expand(3, -1), Plan(start_layer=n, resume=torch.cat(states)))
    except Exception as error:  # any failure is a missing capability
        return Capability(ok=False, reason=f"projecting states fails ({type(error).__name__})")
    if not float((logits[1:] - plain).abs().max()) <= tolerance:
        return Capability(ok=False, reason="the last block's output, projected, does not give the plain logits")
    return Capability(ok=True)


def _resume(model: ModelHandle, ids: Tensor, plain: Tensor, tolerance: float) -> Capability:
    from factscope.models.handle import Capability

    n = model.info.n_layers
    plan = Plan(capture=frozenset(("input", layer) for layer in range(n)) | {("output", n - 1)})
    model.forward(ids, plan)
    for layer in sorted({0, 1, n // 2, n - 1, n}):
        states = plan.captured["output", n - 1] if layer == n else plan.captured["input", layer]
        try:
            logits = model.forward(ids, Plan(start_layer=layer, resume=states.clone()))[0]
        except Exception as error:  # any failure is a missing capability
            return Capability(ok=False, reason=f"resuming at layer {layer} fails ({type(error).__name__})")
        if not float((logits - plain).abs().max()) <= tolerance:
            return Capability(ok=False, reason=f"resuming at layer {layer} does not give the plain logits")
    return Capability(ok=True)


def _suffix(
    model: ModelHandle, ids: Tensor, plain: Tensor, tolerance: float, found: dict[str, Capability]
) -> Capability:
    """One token on the cached prefix, from several layers, plain and with an edge cut, against whole forwards."""
    from factscope.interventions.attention import Cut, keep_masks
    from factscope.interventions.base import record_base
    from factscope.interventions.engine import run_rows
    from factscope.interventions.intervention import Intervention
    from factscope.models.handle import Capability

    if not found["resume"].ok:
        return Capability(ok=False, reason=found["resume"].reason)
    if not found["knockout"].ok:
        return Capability(ok=False, reason=found["knockout"].reason)
    length, n = ids.shape[1], model.info.n_layers
    try:
        base = record_base(model, ids[0].tolist())
        for layer in sorted({0, n // 2, n - 1}):
            for position in (length - 1, length - 3):
                cut = Cut(layer=layer, queries=(position,), keys=(1,))
                fast = run_rows(model, base, [Intervention(cuts=(cut,))], position)[0]
                keep = keep_masks([(cut,)], length, 0, model.info.n_heads, model.device)
                whole = model.forward(ids, Plan(keep=keep), last=1)
                if not float((fast - whole).abs().max()) <= tolerance:
                    return Capability(ok=False, reason=f"a cached prefix gives other logits at layer {layer}")
        if not float((base.logits[0, 0] - plain[-1]).abs().max()) <= tolerance:
            return Capability(ok=False, reason="the model gives other logits when it fills a cache")
    except Exception as error:  # any failure is a missing capability
        return Capability(ok=False, reason=f"running on a cached prefix fails ({type(error).__name__}: {error})")
    return Capability(ok=True)


def _packed(
    model: ModelHandle, ids: Tensor, tolerance: float, found: dict[str, Capability], interface: bool
) -> Capability:
    """A sweep of cuts and patches, plain and on noisy samples, against one row per run."""
    from factscope.interventions.base import Noise, record_base
    from factscope.interventions.engine import no_step, run_rows
    from factscope.interventions.packing import Joining
    from factscope.interventions.sweep import Sweep, SweepRefused
    from factscope.models.handle import Capability

    for needed in ("suffix", "lens"):
        if not found[needed].ok:
            return Capability(ok=False, reason=found[needed].reason)
    if not interface:
        return Capability(ok=False, reason="its attention does not go through transformers' attention interface")
    updates = ("attention", "mlp") if found["additive"].ok else ()
    generator = torch.Generator().manual_seed(3)
    embedding: Any = model.parts.wiring.embedding
    values = torch.randn(2, 2, embedding.weight.shape[-1], generator=generator, dtype=torch.float64)
    try:
        for n_readout, noise in ((1, None), (2, Noise(positions=(1, 2), values=values))):
            clean = record_base(model, ids[0].tolist(), n_readout=n_readout, updates=updates)
            base = clean
            if noise is not None:
                base = record_base(model, ids[0].tolist(), n_readout=n_readout, updates=updates, noise=noise)
            runs = _runs_to_pack(model, clean, heads=found["head_knockout"].ok, updates=updates)
            swept = model.logits(Sweep(model, base, [(2, runs)], Joining(model, base), no_step).run().flatten(0, 1))
            apart = run_rows(model, base, runs, 2).flatten(0, 1)
            if not float((swept - apart).abs().max()) <= tolerance:
                return Capability(ok=False, reason="runs swept together give other logits")
    except SweepRefused as refused:
        return Capability(ok=False, reason=f"runs cannot be swept together: {refused}")
    except Exception as error:  # any failure is a missing capability
        return Capability(ok=False, reason=f"runs cannot be swept together ({type(error).__name__}: {error})")
    return Capability(ok=True)


def _rides(model: ModelHandle, ids: Tensor, plain: Tensor, tolerance: float) -> bool:
    """Runs on the last position that go along with the plain forward give what they give apart."""
    from factscope.interventions.base import outline_base, record_base
    from factscope.interventions.engine import run_rows
    from factscope.interventions.sweep import Ride, SweepRefused

    outline = outline_base(model, ids[0].tolist())
    recorded = record_base(model, ids[0].tolist())
    runs = [
        run
        for run in _runs_to_pack(model, recorded, heads=model.capabilities["head_knockout"].ok, updates=())
        if Ride.carries([run], outline)
    ]
    try:
        base, states = Ride(model, outline, runs, lambda: None).record()
        swept = model.logits(states.flatten(0, 1))
        apart = run_rows(model, base, runs, ids.shape[1] - 1).flatten(0, 1)
        from_other = run_rows(model, recorded, runs, ids.shape[1] - 1).flatten(0, 1)
    except SweepRefused:
        return False
    except Exception as error:  # any failure: the runs go after the plain forward
        logger.debug("%s: runs cannot ride (%s)", model.info.name, error)
        return False
    off = [float((swept - apart).abs().max()), float((from_other - apart).abs().max())]
    off.append(float((base.logits[0, 0] - plain[-1]).abs().max()))
    same_masks = all(torch.equal(one, other) for one, other in zip(base.allowed, recorded.allowed, strict=True))
    return same_masks and max(off) <= tolerance


def _runs_to_pack(model: ModelHandle, clean: Base, *, heads: bool, updates: Sequence[Update]) -> list[Intervention]:
    from factscope.interventions.attention import Cut
    from factscope.interventions.intervention import Intervention, Patch

    n, last = model.info.n_layers, clean.length - 1
    chosen = (0,) if heads else None
    middle = n // 2
    runs = [
        Intervention(cuts=(Cut(layer=layer, queries=(query,), keys=(1, query - 1)),))
        for layer in sorted({0, middle, n - 1})
        for query in (last, 4)
    ]
    runs.append(Intervention(cuts=tuple(Cut(layer=i, queries=(last,), keys=(2,), heads=chosen) for i in range(n))))
    sites: list[tuple[PatchSite, Base | None]] = [("output", clean), ("output", None)]
    sites.extend((site, None) for site in updates)
    for site, source in sites:
        for layer in sorted({0, middle, n - 1}):
            runs.append(Intervention(patches=(Patch(layer=layer, site=site, positions=(2, last), source=source),)))
    several = tuple(Patch(layer=i, site=site, positions=(3,)) for site in updates for i in range(middle, n))
    if several:
        runs.append(Intervention(patches=several, cuts=(Cut(layer=middle, queries=(5,), keys=(0,)),)))
    return [run for run in (one.effective(clean) for one in runs) if run.changes]
