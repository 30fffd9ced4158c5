"""The registry keeps few models, loads each once, and never gives up one that is in use."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, tiny_tokenizer

from factscope.errors import Cancelled, ModelError, ModelNotFound
from factscope.models.registry import ModelKey, ModelRegistry


class StandIn:
    """What a loader gives in place of a handle."""

    def __init__(self, name: str) -> None:
        self.name = name


class Loader:
    """Counts its calls, and how many run at the same time; waits for ``gate`` where there is one."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.most_at_once = 0
        self.gate: threading.Event | None = None
        self.started = threading.Event()
        self.fail_with: Callable[[], BaseException] | None = None
        self.left_behind: list[weakref.ref[StandIn]] = []
        self._running = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, *, progress: Any, make_room: Callable[[], None], **options: Any) -> Any:
        with self._lock:
            self.calls.append(name)
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            progress(0, 0, f"reading {name}")
            self.started.set()
            if name.startswith("unknown"):
                raise ModelNotFound(f"{name!r} is not on the hub", "check the spelling")
            make_room()
            if self.gate is not None:
                assert self.gate.wait(10)
            half_loaded = StandIn(name)
            if self.fail_with is not None:
                self.left_behind.append(weakref.ref(half_loaded))
                raise self.fail_with()
            return half_loaded
        finally:
            with self._lock:
                self._running -= 1


@pytest.fixture
def loader() -> Loader:
    return Loader()


def together(*works: Callable[[], object]) -> list[BaseException | None]:
    """Run each in a thread; what each raised."""
    raised: list[BaseException | None] = [None] * len(works)

    def run(number: int, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return raised


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def names(registry: ModelRegistry) -> set[str]:
    return {row.key.name for row in registry.loaded()}


def test_a_model_is_loaded_once(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    with registry.use("a") as first, registry.use("a") as second:
        assert first is second
        assert [row.users for row in registry.loaded()] == [2]
    with registry.use("a") as third:
        assert third is first
    assert loader.calls == ["a"]
    assert registry.peek(ModelKey(name="a")) is first
    assert registry.peek(ModelKey(name="b")) is None
    (row,) = registry.loaded()
    assert (row.users, row.handle) == (0, first)
    assert row.idle_seconds >= 0


def test_what_differs_in_type_or_place_is_another_model(loader: Loader) -> None:
    registry = ModelRegistry(max_models=4, loader=loader)
    choices: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"revision": "v1"}, {"device_map": {"": "cpu"}}]
    for choice in choices:
        with registry.use("a", **choice):
            pass
    assert loader.calls == ["a"] * 4


def test_the_least_recently_used_goes(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    for name in ("a", "b", "a", "c"):
        with registry.use(name):
            assert len(registry.loaded()) <= 2
    assert names(registry) == {"a", "c"}


def test_what_is_given_up_is_freed(loader: Loader) -> None:
    registry = ModelRegistry(max_models=1, loader=loader)
    with registry.use("a") as handle:
        gone = weakref.ref(handle)
    del handle
    with registry.use("b"):
        gc.collect()
        assert gone() is None


def test_what_is_in_use_stays(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader, wait_seconds=0.3)
    with registry.use("a"):
        with registry.use("b"):
            pass
        with registry.use("c"):
            assert names(registry) == {"a", "c"}, "b was idle although a is older"
            started = time.monotonic()
            with pytest.raises(ModelError) as refusal, registry.use("d"):
                pass
            assert 0.25 < time.monotonic() - started < 5
            text = str(refusal.value)
            assert "'d' finds no place in memory" in text
            assert "'a'" in text
            assert "'c'" in text
            assert names(registry) == {"a", "c"}
    with registry.use("d"):
        assert len(registry.loaded()) == 2


def test_a_third_request_waits_for_a_place(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader, wait_seconds=10)
    release = threading.Event()

    def hold(name: str) -> None:
        with registry.use(name):
            assert release.wait(10)

    def third() -> None:
        until(lambda: len(registry.loaded()) == 2)
        threading.Timer(0.2, release.set).start()
        with registry.use("c"):
            assert release.is_set()

    assert together(lambda: hold("a"), lambda: hold("b"), third) == [None] * 3


def test_requests_for_one_model_share_one_load(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    loader.gate = threading.Event()
    seen: set[int] = set()

    def ask() -> None:
        with registry.use("a") as handle:
            seen.add(id(handle))

    threading.Timer(0.3, loader.gate.set).start()
    assert together(*[ask] * 8) == [None] * 8
    assert loader.calls == ["a"]
    assert len(seen) == 1


def test_two_loads_never_overlap(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)

    def ask(name: str) -> None:
        with registry.use(name):
            time.sleep(0.01)

    assert together(*[lambda name=name: ask(name) for name in "abcdabcd"]) == [None] * 8
    assert loader.most_at_once == 1
    assert len(registry.loaded()) == 2
    assert all(row.users == 0 for row in registry.loaded())


def test_a_loaded_model_is_had_while_another_is_loaded(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    with registry.use("a"):
        pass
    loader.gate = threading.Event()
    loader.started.clear()

    def load_slowly() -> None:
        with registry.use("b"):
            pass

    slow = threading.Thread(target=load_slowly)
    slow.start()
    assert loader.started.wait(10)
    started = time.monotonic()
    with registry.use("a"):
        assert time.monotonic() - started < 5
    loader.gate.set()
    slow.join(10)


def test_nothing_stays_of_a_load_that_fails(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    loader.fail_with = lambda: ModelError("'a' is damaged", "download it again")
    with pytest.raises(ModelError) as refusal, registry.use("a"):
        pass
    assert str(refusal.value) == "'a' is damaged; download it again."
    assert registry.loaded() == ()
    gc.collect()
    assert [reference() for reference in loader.left_behind] == [None], "while the failure is still at hand"
    loader.fail_with = None
    with registry.use("a"):
        assert loader.calls == ["a", "a"]


def test_whoever_waited_for_a_load_is_told_why_it_failed(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    loader.gate = threading.Event()
    loader.fail_with = lambda: ModelError("'a' is damaged", "download it again")

    def ask() -> None:
        with registry.use("a"):
            pass

    threading.Timer(0.3, loader.gate.set).start()
    raised = together(*[ask] * 4)
    assert {str(error) for error in raised} == {"'a' is damaged; download it again."}
    assert len({id(error) for error in raised}) == 4, "each has its own"
    assert loader.calls == ["a"]


def test_a_name_that_fails_early_costs_no_model(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    for name in ("a", "b"):
        with registry.use(name):
            pass
    with pytest.raises(ModelNotFound), registry.use("unknown"):
        pass
    assert names(registry) == {"a", "b"}


def test_a_defect_is_not_dressed_up(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    loader.fail_with = lambda: ZeroDivisionError("a defect of ours")
    with pytest.raises(ZeroDivisionError, match="a defect of ours"), registry.use("a"):
        pass
    assert registry.loaded() == ()


def test_who_cancels_a_load_does_not_cancel_it_for_others(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    loader.gate = threading.Event()
    cancelled = threading.Event()

    def first() -> None:
        def stop(done: int, total: int, stage: str) -> None:
            loader.started.wait(0.2)
            if len(loader.calls) == 1:
                time.sleep(0.3)  # until the other waits
                cancelled.set()
                raise Cancelled

        with registry.use("a", progress=stop):
            pass

    def second() -> None:
        until(lambda: bool(loader.calls))
        loader.gate = None
        with registry.use("a"):
            assert cancelled.is_set()

    raised = together(first, second)
    assert isinstance(raised[0], Cancelled)
    assert raised[1] is None
    assert loader.calls == ["a", "a"]


def test_who_waits_for_a_load_can_be_cancelled(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    loader.gate = threading.Event()

    def load_it() -> None:
        with registry.use("a"):
            pass

    owner = threading.Thread(target=load_it)
    owner.start()
    assert loader.started.wait(10)
    reports: list[tuple[int, int, str]] = []

    def stop(*report: Any) -> None:
        reports.append(report)
        raise Cancelled

    with pytest.raises(Cancelled), registry.use("a", progress=stop):
        pass
    assert reports == [(0, 0, "reading a")], "it sees how far the other's load is"
    loader.gate.set()
    owner.join(10)
    assert names(registry) == {"a"}


def test_a_use_ends_when_its_body_fails(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    with pytest.raises(ValueError, match="body"), registry.use("a"):
        raise ValueError("body")
    assert [row.users for row in registry.loaded()] == [0]


def test_clearing_spares_what_is_in_use(loader: Loader) -> None:
    registry = ModelRegistry(loader=loader)
    with registry.use("a"):
        with registry.use("b"):
            pass
        registry.clear()
        assert names(registry) == {"a"}
    registry.clear()
    assert registry.loaded() == ()


def test_a_registry_needs_a_place() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ModelRegistry(max_models=0)


def test_real_models_come_and_go(tmp_path: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer("byte")
    for family in ("gpt2", "llama"):
        build(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    registry = ModelRegistry()
    with registry.use(str(tmp_path / "gpt2")) as handle:
        gone = weakref.ref(handle._model)
    del handle
    with registry.use(f"random:{tmp_path / 'gpt2'}"), registry.use(str(tmp_path / "llama")) as last:
        assert last.info.family == "llama"
        gc.collect()
        assert gone() is None, "its memory is free"
    with pytest.raises(ModelNotFound), registry.use("/no/such/folder"):
        pass
    assert len(registry.loaded()) == 2
