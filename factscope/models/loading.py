"""Load a model by name, or refuse it with the reason.

1. Decide what the name means (sources). 2. Ask the hub or the cache, within seconds (hub). 3. Check names,
configuration and headers of the files (checkpoint). 4. Compare the memory it needs with what is free (memory). 5. Read
tokenizer and weights: safetensors only, never a repository's code, no tensor missing. 6. Measure what the model's parts
are (handle). The device is chosen here and nowhere else.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from factscope.errors import FactScopeError, ModelFilesError, ModelTooLarge, ModelUnsupported, SpecError
from factscope.models import hub
from factscope.models.checkpoint import Checkpoint, files_fingerprint, inspect
from factscope.models.creation import creating
from factscope.models.hub import LoadProgress, LocalModel, causes, list_local_models, silent
from factscope.models.memory import MemoryEstimate, estimate
from factscope.models.sources import Source, parse_name, shown
from factscope.settings import Settings, get_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from factscope.models.handle import ModelHandle

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "auto")
_STORED_NAMES: Mapping[torch.dtype, str] = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
DeviceMap = str | Mapping[str, int | str]


def load(
    name: str = "bundled",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    local_only: bool = False,
    force: bool = False,
    progress: LoadProgress | None = None,
    settings: Settings | None = None,
    make_room: Callable[[], None] | None = None,
) -> ModelHandle:
    """Load a model.

    Args:
        name: ``bundled``, a hub id, a folder, or the null control ``random:NAME`` or ``random:NAME:SEED``: architecture
            and tokenizer of NAME with weights drawn by its own initialisation.
        revision: branch, tag or commit on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the type that is stored.
        device: ``auto`` takes a GPU if there is one; else as torch names devices.
        device_map: how accelerate spreads the model over devices and disk; ``auto`` or a mapping from module to device.
        local_only: never ask the network.
        force: load even if the memory estimate says that it does not fit.
        progress: told how far it is; may raise to cancel.
        settings: in place of those of the environment.
        make_room: called once it is clear that the model can be tried, before its memory is compared with what is free.

    Raises:
        ModelError: of the kind that says why it cannot be loaded.
        SpecError: an unknown ``dtype``, ``device`` or ``device_map``.
    """
    chosen = settings or get_settings()
    tell = progress or silent
    place = choose_device(device, chosen)
    _check_choice(dtype, device_map)
    source = parse_name(name, revision=revision, settings=chosen)
    tell(0, 0, f"looking for {name}")
    request = _Request(source=source, revision=revision, dtype=dtype, device=place, device_map=device_map)
    room = make_room or (lambda: None)
    with QUIET:
        found = _obtain(request, chosen, tell, local_only=local_only, force=force, make_room=room)
        tell(0, 0, f"reading {name}")
        with _explained(source.shown, found.checkpoint):
            _read_config(found.checkpoint.folder)  # before the tokenizer, which reads it too and would be blamed
            tokenizer = _read_tokenizer(found.checkpoint)
            with creating(lambda: tell(0, 0, "waiting for another model to be read")):
                model = _make_model(request, found.checkpoint, chosen)
            _refuse_foreign_tokenizer(tokenizer, model, source.shown)
        tell(0, 0, f"measuring {name}")
        return _measure(model, tokenizer, request, found)


def _measure(model: PreTrainedModel, tokenizer: Any, request: _Request, found: _Found) -> ModelHandle:
    """The handle: a model whose parts cannot be found is refused like any other that cannot be used."""
    from factscope.models.handle import build_handle

    source = request.source
    try:
        return build_handle(
            model,
            tokenizer,
            name=source.name,
            revision=found.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            device=_input_device(model, request.device),
            warnings=found.warnings,
        )
    except FactScopeError:
        raise
    except Exception as error:
        if any(_is_out_of_memory(cause) for cause in causes(error)):
            raise explain_load_error(error, source.shown, found.checkpoint) from error
        logger.debug("the parts of %s cannot be found", source.shown, exc_info=True)
        raise ModelUnsupported(
            f"the parts of {source.shown} ({found.checkpoint.model_type}) cannot be found ({_brief(error)})",
            "choose another model",
        ) from error


def estimate_memory(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    *,
    device: str = "auto",
    local_only: bool = False,
    settings: Settings | None = None,
) -> MemoryEstimate:
    """What a model will take, from the headers of its weights, the hub's word or its configuration; no weight is read.

    Raises:
        ModelError: as ``load``.
        SpecError: an unknown ``dtype`` or ``device``.
    """
    chosen = settings or get_settings()
    place = choose_device(device, chosen)
    _check_choice(dtype, None)
    source = parse_name(name, revision=revision, settings=chosen)
    weights = source.seed is None
    if source.folder is not None:
        return estimate(
            source.shown, _counts(inspect(source.folder, source.shown, weights=weights), source), dtype, place
        )
    assert source.repo is not None
    seconds = chosen.hub_timeout_seconds
    lookup = hub.look_up(source.repo, revision, seconds=seconds, local_only=local_only)
    if lookup.listing is None:
        assert lookup.cached is not None
        return estimate(
            source.shown, _counts(inspect(lookup.cached, source.shown, weights=weights), source), dtype, place
        )
    counts = lookup.listing.counts
    if not counts:
        folder = hub.fetch_config(source.repo, revision, lookup.listing, weights=weights, seconds=seconds)
        counts = _counts_of_config(folder, source.shown)
    return estimate(source.shown, counts, dtype, place)


def choose_device(device: str, settings: Settings) -> str:
    """The device to run on.

    Raises:
        SpecError: torch does not know the device, or this machine does not have it.
    """
    wanted = settings.device if device == "auto" else device
    gpu = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if gpu else "cpu"
    try:
        parsed = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError):
        raise SpecError(f"the device {shown(wanted)} is unknown", "use 'auto', 'cpu' or 'cuda'") from None
    if parsed.type == "cpu":
        return "cpu"
    if parsed.type == "cuda" and (parsed.index or 0) < gpu:
        return wanted
    raise SpecError(f"the device {shown(wanted)} is not available on this machine", "use 'auto' or 'cpu'")


def _check_choice(dtype: str, device_map: DeviceMap | None) -> None:
    if dtype not in DTYPES:
        raise SpecError(f"the dtype {shown(dtype)} is unknown", f"use one of {', '.join(DTYPES)}")
    named = ("auto", "balanced", "balanced_low_0", "sequential")
    if isinstance(device_map, str) and device_map not in named:
        raise SpecError(
            f"the device map {shown(device_map)} is unknown", f"use one of {', '.join(named)}, or a mapping"
        )


@dataclass(frozen=True, kw_only=True)
class _Request:
    source: Source
    revision: str | None
    dtype: str
    device: str
    device_map: DeviceMap | None


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Files that can be tried, and which state of the model they are."""

    checkpoint: Checkpoint
    revision: str
    warnings: tuple[str, ...]


def _obtain(
    request: _Request,
    settings: Settings,
    progress: LoadProgress,
    *,
    local_only: bool,
    force: bool,
    make_room: Callable[[], None],
) -> _Found:
    """Find the files, on this machine or from the hub, and refuse what does not fit before any of it is downloaded."""
    source, weights = request.source, request.source.seed is None

    def refuse_too_large(counts: Mapping[str, int]) -> None:
        make_room()
        guess = estimate(source.shown, counts, request.dtype, request.device)
        if not guess.fits and not force and request.device_map is None:
            raise ModelTooLarge(
                guess.sentence, "choose a smaller model, 'bfloat16', or a device map that uses the disk"
            )

    if source.folder is not None:
        checkpoint = inspect(source.folder, source.shown, weights=weights)
        refuse_too_large(_counts(checkpoint, source))
        return _Found(checkpoint=checkpoint, revision=f"files-{files_fingerprint(source.folder)}", warnings=())
    assert source.repo is not None
    seconds = settings.hub_timeout_seconds
    lookup = hub.look_up(source.repo, request.revision, seconds=seconds, local_only=local_only)
    if lookup.listing is None:
        assert lookup.cached is not None
        checkpoint = inspect(lookup.cached, source.shown, weights=weights)
        refuse_too_large(_counts(checkpoint, source))
        return _Found(checkpoint=checkpoint, revision=lookup.cached.name, warnings=lookup.warnings)
    folder = hub.fetch_config(source.repo, request.revision, lookup.listing, weights=weights, seconds=seconds)
    counts = lookup.listing.counts if weights else {}
    refuse_too_large(counts or _counts_of_config(folder, source.shown))
    hub.fetch_files(source.repo, folder, lookup.listing, weights=weights, seconds=seconds, progress=progress)
    return _Found(checkpoint=inspect(folder, source.shown, weights=weights), revision=folder.name, warnings=())


def _counts(checkpoint: Checkpoint, source: Source) -> Mapping[str, int]:
    return checkpoint.counts if source.seed is None else _counts_of_config(checkpoint.folder, source.shown)


def _counts_of_config(folder: Path, name: str) -> Mapping[str, int]:
    """How many values a model of this configuration has, built without memory for them."""
    from transformers import AutoModelForCausalLM

    with QUIET, _explained(name, None):
        config = _read_config(folder)
        with creating(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        stored = _STORED_NAMES.get(getattr(config, "dtype", None) or torch.float32, "F32")
        return {stored: sum(parameter.numel() for parameter in model.parameters())}


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _read_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:
        raise _TokenizerFailed from error


class _TokenizerFailed(Exception):
    """Reading the tokenizer failed; the cause says how."""


def _make_model(request: _Request, checkpoint: Checkpoint, settings: Settings) -> PreTrainedModel:
    """The model on its device, evaluating, without gradients."""
    if request.source.seed is not None:
        model = _draw_model(checkpoint, request.source.seed, request.dtype)
    else:
        model = _read_model(request, checkpoint, settings)
    if request.device_map is None:
        model.to(request.device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def _attention(checkpoint: Checkpoint) -> str:
    """Eager attention has one kind of mask and shows its weights, but in Falcon with ALiBi it adds that twice."""
    alibi = checkpoint.model_type == "falcon" and bool(checkpoint.config.get("alibi"))
    return "sdpa" if alibi else "eager"


def _draw_model(checkpoint: Checkpoint, seed: int, dtype: str) -> PreTrainedModel:
    """The architecture with the weights that its own initialisation draws, the same for every type and device."""
    from transformers import AutoModelForCausalLM

    config = _read_config(checkpoint.folder)
    stored = getattr(config, "dtype", None) or torch.float32
    target = stored if dtype == "auto" else getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(checkpoint), dtype=torch.float32, trust_remote_code=False
        )
    for parameter in model.parameters():  # not buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(target)
    return model


def _read_model(request: _Request, checkpoint: Checkpoint, settings: Settings) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if request.device_map is not None:
        settings.cache_dir.mkdir(parents=True, exist_ok=True)
        offload = tempfile.mkdtemp(prefix="offload-", dir=settings.cache_dir)
        options = {"device_map": request.device_map, "offload_folder": offload}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype="auto" if request.dtype == "auto" else getattr(torch, request.dtype),
            attn_implementation=_attention(checkpoint),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
            **options,
        )
    except BaseException:
        if options:
            shutil.rmtree(options["offload_folder"], ignore_errors=True)
        raise
    model, report = loaded
    if options:
        weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
    _refuse_incomplete(model, report, request)
    return model


def _refuse_incomplete(model: PreTrainedModel, report: Mapping[str, Any], request: _Request) -> None:
    """transformers fills what a checkpoint lacks with random values and goes on; here that is an error.

    Raises:
        ModelFilesError: tensors are missing, have other shapes, or hold no numbers.
    """
    name = request.source.shown
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelFilesError(
            f"{name} lacks {len(missing)} of the {len(model.state_dict())} tensors that its config.json asks for, "
            f"the first is {missing[0]}",
            "download or save the model completely",
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        tensor, stored, wanted = mismatched[0]
        raise ModelFilesError(
            f"{len(mismatched)} tensors of {name} do not fit its config.json, the first is {tensor}: "
            f"{tuple(stored)} stored, {tuple(wanted)} expected",
            "use the config.json that belongs to the weights",
        )
    for tensor, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            hint = " as float16" if model.dtype == torch.float16 else ""
            raise ModelFilesError(
                f"{tensor} of {name} holds values that are not finite numbers{hint}",
                "choose 'float32' or 'bfloat16'" if hint else "download or save the model again",
            )


def _refuse_foreign_tokenizer(tokenizer: Any, model: PreTrainedModel, name: str) -> None:
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[union-attr, arg-type]
    if int(tokenizer.vocab_size) > rows:
        raise ModelFilesError(
            f"the tokenizer of {name} has {int(tokenizer.vocab_size):,} tokens and the model only {rows:,}",
            "use the tokenizer that belongs to the model",
        )


def _input_device(model: PreTrainedModel, device: str) -> str:
    """Where token ids go: with a device map, wherever the embedding runs."""
    embedding: Any = model.get_input_embeddings()
    where = embedding.weight.device
    if where.type != "meta":
        return str(where)
    hook = getattr(embedding, "_hf_hook", None)
    return str(torch.device(getattr(hook, "execution_device", None) or device))


@contextmanager
def _explained(name: str, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Whatever goes wrong inside becomes a sentence about this model."""
    try:
        yield
    except FactScopeError:
        raise
    except Exception as error:
        logger.debug("loading %s failed", name, exc_info=True)
        raise explain_load_error(error, name, checkpoint) from error


def explain_load_error(error: BaseException, name: str, checkpoint: Checkpoint | None) -> FactScopeError:
    """The sentence for a failure of transformers or torch, found by the types of the exception and of its causes.

    Args:
        name: the model in quotes.
        checkpoint: its files, as far as they are known.
    """
    chain = tuple(causes(error))
    named = next((found for found in chain if isinstance(found, FactScopeError)), None)
    if named is not None:
        return named
    again = "download or save the model again"
    if any(_is_out_of_memory(found) for found in chain):
        return ModelTooLarge(f"the memory was not enough to load {name}", "choose a smaller model, or 'bfloat16'")
    if any(isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT) for found in chain):
        return ModelTooLarge(f"the disk was full while loading {name}", "make room, or set FACTSCOPE_CACHE_DIR")
    package = next((found for found in chain if isinstance(found, ImportError)), None)
    if package is not None:
        quantised = checkpoint is not None and "quantization_config" in checkpoint.config
        what = "is quantised in a way that needs" if quantised else "needs"
        return ModelUnsupported(
            f"{name} {what} a package that is not installed ({_brief(package)})", "install it, or choose another model"
        )
    if any("trust_remote_code" in str(found) for found in chain):
        return ModelUnsupported(
            f"{name} needs code from its own repository, which is never run here",
            "choose a model that transformers itself contains",
        )
    if any(isinstance(found, SafetensorError) for found in chain):
        return ModelFilesError(f"the weights of {name} are damaged ({_brief(chain[-1])})", again)
    if any(isinstance(found, _TokenizerFailed) for found in chain):
        return ModelFilesError(f"the tokenizer of {name} cannot be read ({_brief(chain[1])})", again)
    return ModelFilesError(f"{name} cannot be built from its config.json ({_brief(error)})", again)


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)
    )


def _brief(error: BaseException) -> str:
    """One line of an exception, cut: a detail for whoever repairs it, never the whole message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if type(error).__name__.startswith("Strict") and lines else next(iter(lines), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text.rstrip(".") if len(text) <= 160 else f"{text[:157]}..."


class _Quiet:
    """Keeps transformers and huggingface_hub off standard error while at least one thread is inside.

    Their verbosity belongs to the process, so the first thread in saves it and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore = _silence()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()


def _silence() -> Callable[[], None]:
    """Turn off progress bars and everything below errors; returns what puts it back."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    transformers_logging.disable_progress_bar()

    def restore() -> None:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bar:
            transformers_logging.enable_progress_bar()

    return restore


QUIET = _Quiet()

__all__ = [
    "DTYPES",
    "LoadProgress",
    "LocalModel",
    "MemoryEstimate",
    "choose_device",
    "estimate_memory",
    "explain_load_error",
    "list_local_models",
    "load",
]
