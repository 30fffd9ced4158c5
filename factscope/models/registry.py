"""The models in memory, shared by every session: few, loaded once, never taken from whoever is using them."""

from __future__ import annotations

import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from factscope.errors import Cancelled, FactScopeError, ModelError
from factscope.models.hub import LoadProgress, causes, silent
from factscope.models.loading import DeviceMap, load
from factscope.models.sources import folder_state, shown

if TYPE_CHECKING:
    from factscope.models.handle import ModelHandle

logger = logging.getLogger(__name__)

Loader = Callable[..., "ModelHandle"]
_POLL_SECONDS = 0.2
"""How often whoever waits for another's load looks whether it was cancelled itself."""


@dataclass(frozen=True, kw_only=True)
class ModelKey:
    """What makes two requests ask for the same loaded model.

    Attributes:
        state: of a local folder, its files' sizes and times, so that a folder that changed is another model.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | tuple[tuple[str, int | str], ...] | None = None
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """One model in memory, for display.

    Attributes:
        users: how many computations are using it now.
        idle_seconds: since when nobody has; 0 while it is used.
    """

    key: ModelKey
    handle: ModelHandle
    users: int
    idle_seconds: float


@dataclass(kw_only=True, eq=False)
class _Slot:
    handle: ModelHandle
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True, eq=False)
class _Pending:
    """A load that is going on: whoever asks for the same waits for it and shares its outcome."""

    key: ModelKey
    options: Mapping[str, Any]
    done: bool = False
    error: BaseException | None = None
    last_report: tuple[int, int, str] = (0, 0, "")


class ModelRegistry:
    """At most ``max_models`` models in memory, the least recently used given up for a new one.

    Args:
        max_models: how many.
        wait_seconds: how long a request waits for a place while all models are in use.
        loader: ``loading.load``, or what stands for it in a test.
    """

    def __init__(self, max_models: int = 2, *, wait_seconds: float = 60.0, loader: Loader = load) -> None:
        if max_models < 1:
            raise ValueError("a registry holds at least one model")
        self._max_models = max_models
        self._wait_seconds = wait_seconds
        self._loader = loader
        self._changed = threading.Condition()
        self._slots: dict[ModelKey, _Slot] = {}
        self._pending: _Pending | None = None

    @contextmanager
    def use(
        self,
        name: str = "bundled",
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        device_map: DeviceMap | None = None,
        local_only: bool = False,
        force: bool = False,
        progress: LoadProgress | None = None,
    ) -> Iterator[ModelHandle]:
        """A model for the length of a ``with``; during it the model is not given up.

        The parameters are those of ``loading.load``.

        Raises:
            ModelError: as ``load``, or all places are in use for too long.
        """
        frozen = tuple(sorted(device_map.items())) if isinstance(device_map, Mapping) else device_map
        state = folder_state(name)
        key = ModelKey(name=name, revision=revision, dtype=dtype, device=device, device_map=frozen, state=state)
        options = {"device_map": device_map, "local_only": local_only, "force": force}
        slot = self._acquire(key, options, progress or silent)
        try:
            yield slot.handle
        finally:
            with self._changed:
                slot.users -= 1
                slot.last_used = time.monotonic()
                self._changed.notify_all()

    def peek(self, key: ModelKey) -> ModelHandle | None:
        """A model if it is in memory, without claiming it."""
        with self._changed:
            slot = self._slots.get(key)
            return slot.handle if slot is not None else None

    def loaded(self) -> tuple[LoadedModel, ...]:
        """What is in memory, the most recently used first."""
        with self._changed:
            now = time.monotonic()
            rows = [
                LoadedModel(
                    key=key,
                    handle=slot.handle,
                    users=slot.users,
                    idle_seconds=0.0 if slot.users else now - slot.last_used,
                )
                for key, slot in self._slots.items()
            ]
        return tuple(sorted(rows, key=lambda row: row.idle_seconds))

    def clear(self) -> None:
        """Give up every model that is not in use."""
        with self._changed:
            for key in [key for key, slot in self._slots.items() if slot.users == 0]:
                del self._slots[key]
        gc.collect()

    def _acquire(self, key: ModelKey, options: Mapping[str, Any], progress: LoadProgress) -> _Slot:
        """The slot of a model, counted as used once more; loads it if nobody has."""
        while True:
            with self._changed:
                slot = self._slots.get(key)
                if slot is not None:
                    slot.users += 1
                    return slot
                pending = self._pending
                if pending is None:
                    mine = _Pending(key=key, options=options)
                    self._pending = mine
                    break
            self._wait_for(pending, progress)
            if pending.error is not None and (pending.key, pending.options) == (key, options):
                raise _fresh(pending.error)
        return self._load(mine, progress)

    def _wait_for(self, pending: _Pending, progress: LoadProgress) -> None:
        """Until another's load is over; ``progress`` may raise, which ends the waiting and not the load."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: pending.done, timeout=_POLL_SECONDS)
                if pending.done:
                    return
                report = pending.last_report
            progress(*report)

    def _load(self, mine: _Pending, progress: LoadProgress) -> _Slot:
        """Load one model while no other is loaded; nothing of it stays if that fails."""
        key = mine.key

        def report(done: int, total: int, stage: str) -> None:
            mine.last_report = (done, total, stage)
            progress(done, total, stage)

        failure: BaseException
        try:
            handle = self._loader(
                key.name,
                revision=key.revision,
                dtype=key.dtype,
                device=key.device,
                progress=report,
                make_room=lambda: self._make_room(key, report),
                **mine.options,
            )
            self._make_room(key, report)  # a loader that found no reason to ask
            with self._changed:
                slot = _Slot(handle=handle, users=1)
                self._slots[key] = slot
                self._finish(mine, None)
            return slot
        except BaseException as error:
            # Frames of the traceback hold what was loaded so far.
            logger.debug("loading %s failed", shown(key.name), exc_info=True)
            for cause in causes(error):
                traceback.clear_frames(cause.__traceback__)
            failure = _fresh(error)
            with self._changed:
                self._finish(mine, _shareable(error))
        gc.collect()
        raise failure

    def _finish(self, mine: _Pending, error: BaseException | None) -> None:
        mine.done, mine.error = True, error
        self._pending = None
        self._changed.notify_all()

    def _make_room(self, key: ModelKey, report: LoadProgress) -> None:
        """Give up the least recently used idle model if all places are taken.

        Raises:
            ModelError: all of them stay in use for too long.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            with self._changed:
                if len(self._slots) < self._max_models:
                    return
                idle = [(slot.last_used, found) for found, slot in self._slots.items() if slot.users == 0]
                if idle:
                    oldest = min(idle, key=lambda pair: pair[0])[1]
                    del self._slots[oldest]
                    break
                if time.monotonic() >= deadline:
                    busy = ", ".join(shown(found.name) for found in self._slots)
                    raise ModelError(
                        f"{shown(key.name)} finds no place in memory: {busy} stay in use ({self._wait_seconds:g} s)",
                        "wait for the running computations, or raise FACTSCOPE_MAX_MODELS",
                    )
                self._changed.wait(timeout=_POLL_SECONDS)
            report(0, 0, "waiting for a place in memory")
        logger.info("%s left memory", shown(oldest.name))
        gc.collect()


def _fresh(error: BaseException) -> BaseException:
    """A failure for the user without the frames it came through; anything else unchanged."""
    return type(error)(error.what, error.try_) if isinstance(error, FactScopeError) else error


def _shareable(error: BaseException) -> BaseException | None:
    """What others who waited for the same load are told; None lets them try themselves.

    A load that its owner cancelled, or that met a defect, says nothing about the model.
    """
    return _fresh(error) if isinstance(error, FactScopeError) and not isinstance(error, Cancelled) else None
