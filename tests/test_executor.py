"""The executor: sharing, fairness, cancelling, errors, grace, shut-down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dashboard.executor import Executor, TooManyRuns, Work
from factscope.errors import SpecError

Step = Callable[[int, int, Any], None]


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor(grace=0.15, turn_seconds=0.0)
    yield made
    made.shutdown()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def steps(n: int, record: list[str] | None = None, name: str = "", gate: threading.Event | None = None) -> Work:
    """A job of n steps; it says its name at each, and waits before the first until the gate is open."""

    def compute(_: Any, progress: Step) -> str:
        if gate is not None:
            gate.wait(5)
        for i in range(n):
            if record is not None:
                record.append(name)
            time.sleep(0.001)
            progress(i + 1, n, f"{i + 1} of {n}")
        return f"{name} done"

    return Work(compute=compute, label=name)


def endless(started: threading.Event | None = None) -> Work:
    def compute(_: Any, progress: Step) -> None:
        for i in range(1_000_000):
            time.sleep(0.001)
            progress(i + 1, 1_000_000, i)
            if started is not None:
                started.set()

    return Work(compute=compute)


def test_a_run_gives_its_result(executor: Executor) -> None:
    executor.submit("a", "map", "k", steps(3, name="x"))
    seen = executor.wait("a", "map", 5)
    assert seen is not None
    assert (seen.state, seen.result, seen.value) == ("done", "x done", "x done")


def test_two_visitors_who_ask_the_same_share_one_job(executor: Executor) -> None:
    record: list[str] = []
    gate = threading.Event()
    executor.submit("a", "map", "k", steps(5, record, "x", gate))
    executor.submit("b", "map", "k", steps(5, record, "x", gate))
    gate.set()
    assert executor.wait("a", "map", 5).result == executor.wait("b", "map", 5).result == "x done"  # type: ignore[union-attr]
    assert len(record) == 5


def test_a_finished_result_is_kept_for_later_visitors(executor: Executor) -> None:
    record: list[str] = []
    executor.submit("a", "map", "k", steps(1, record, "x"))
    executor.wait("a", "map", 5)
    seen = executor.submit("b", "map", "k", steps(1, record, "x"))
    assert seen.state == "done"
    assert len(record) == 1


def test_the_least_recently_used_result_is_forgotten_first() -> None:
    executor = Executor(keep=2)
    for key in ("k1", "k2"):
        executor.submit("a", key, key, steps(1, name=key))
        executor.wait("a", key, 5)
    executor.submit("b", "s", "k1", steps(1, name="again"))
    executor.submit("a", "k3", "k3", steps(1, name="k3"))
    executor.wait("a", "k3", 5)
    assert executor.submit("c", "s", "k1", steps(1, name="again")).result == "k1 done"
    assert executor.submit("c", "t", "k2", steps(1, name="again")).state != "done"
    executor.shutdown()


def test_a_short_run_does_not_wait_behind_a_long_one(executor: Executor) -> None:
    record: list[str] = []
    gate = threading.Event()
    executor.submit("a", "map", "long", steps(400, record, "long", gate))
    executor.submit("b", "map", "short", steps(3, record, "short"))
    gate.set()
    executor.wait("b", "map", 5)
    last = max(i for i, name in enumerate(record) if name == "short")
    assert record[:last].count("long") <= 5
    assert executor.look("a", "map").state == "running"  # type: ignore[union-attr]


def test_turns_go_round_by_visitor_and_not_by_job(executor: Executor) -> None:
    record: list[str] = []
    gate = threading.Event()
    blocker = Work(compute=lambda _, progress: gate.wait(5))
    executor.submit("z", "s", "blocker", blocker)
    until(lambda: executor.look("z", "s").state == "running")  # type: ignore[union-attr]
    for i in range(4):
        executor.submit("a", f"s{i}", f"a{i}", steps(12, record, "a"))
    executor.submit("b", "s", "b", steps(12, record, "b"))
    until(lambda: executor.look("b", "s").ahead > 0)  # type: ignore[union-attr]
    gate.set()
    executor.wait("b", "s", 5)
    last = max(i for i, name in enumerate(record) if name == "b")
    assert 10 <= record[:last].count("a") <= 14


def test_what_is_short_is_done_in_one_turn() -> None:
    executor = Executor(turn_seconds=0.02)
    record: list[str] = []
    gate = threading.Event()
    executor.submit("a", "map", "long", steps(2000, record, "long", gate))
    executor.submit("b", "map", "short", steps(5, record, "short"))
    gate.set()
    executor.wait("b", "map", 5)
    first = record.index("short")
    assert record[first : first + 5] == ["short"] * 5
    assert executor.look("a", "map").state == "running"  # type: ignore[union-attr]
    executor.shutdown()


def test_only_one_job_computes_at_a_time(executor: Executor) -> None:
    inside: list[int] = []
    most = [0]

    def compute(_: Any, progress: Step) -> None:
        for i in range(20):
            inside.append(1)
            most[0] = max(most[0], len(inside))
            time.sleep(0.0005)
            inside.pop()
            progress(i + 1, 20, None)

    for visitor in "abcd":
        executor.submit(visitor, "s", visitor, Work(compute=compute))
    for visitor in "abcd":
        assert executor.wait(visitor, "s", 5).state == "done"  # type: ignore[union-attr]
    assert most == [1]


def test_preparing_does_not_hold_the_turn(executor: Executor) -> None:
    gate = threading.Event()

    @contextmanager
    def slow_model(tell: Callable[[str], None]) -> Iterator[str]:
        gate.wait(5)
        yield "model"

    executor.submit("a", "s", "slow", Work(prepare=slow_model, compute=lambda model, progress: model))
    executor.submit("b", "s", "quick", steps(3, name="quick"))
    assert executor.wait("b", "s", 5).state == "done"  # type: ignore[union-attr]
    gate.set()
    assert executor.wait("a", "s", 5).result == "model"  # type: ignore[union-attr]


def test_cancel_stops_within_a_chunk_and_keeps_the_partial_result(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "k", endless(started))
    started.wait(5)
    executor.cancel("a", "map")
    assert executor.look("a", "map").state == "cancelled"  # type: ignore[union-attr]
    until(lambda: executor.under_way() == 0, 1.0)
    seen = executor.look("a", "map")
    assert seen is not None
    assert seen.state == "cancelled"
    assert seen.value is not None


def test_a_cancelled_run_stays_cancelled_until_it_is_asked_for_again(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "k", endless(started))
    started.wait(5)
    executor.cancel("a", "map")
    assert executor.submit("a", "map", "k", steps(2, name="x")).state == "cancelled"
    executor.submit("a", "map", "k", steps(2, name="x"), again=True)
    assert executor.wait("a", "map", 5).result == "x done"  # type: ignore[union-attr]


def test_a_stopping_job_is_not_given_to_another_visitor(executor: Executor) -> None:
    gate, inside = threading.Event(), threading.Event()

    def stubborn(_: Any, progress: Step) -> str:
        inside.set()
        gate.wait(5)
        progress(1, 2, None)
        return "never"

    executor.submit("a", "map", "k", Work(compute=stubborn))
    inside.wait(5)
    executor.cancel("a", "map")
    executor.submit("b", "map", "k", steps(2, name="fresh"))
    gate.set()
    assert executor.wait("b", "map", 5).result == "fresh done"  # type: ignore[union-attr]


def test_cancel_by_one_of_two_leaves_the_other_his_run(executor: Executor) -> None:
    gate = threading.Event()
    executor.submit("a", "map", "k", steps(5, name="x", gate=gate))
    executor.submit("b", "map", "k", steps(5, name="x", gate=gate))
    executor.cancel("a", "map")
    gate.set()
    assert executor.wait("b", "map", 5).state == "done"  # type: ignore[union-attr]
    assert executor.look("a", "map").state == "cancelled"  # type: ignore[union-attr]


def test_changed_input_stops_the_old_run_at_once(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "old", endless(started))
    started.wait(5)
    executor.submit("a", "map", "new", steps(2, name="new"))
    assert executor.wait("a", "map", 5).result == "new done"  # type: ignore[union-attr]
    until(lambda: executor.under_way() == 0, 1.0)


def test_another_question_stops_all_runs_of_the_old_one(executor: Executor) -> None:
    for i in range(3):
        executor.submit("a", f"s{i}", f"k{i}", endless())
    executor.submit("b", "s", "k0", endless())
    executor.release_all("a")
    until(lambda: executor.under_way() == 1, 1.0)
    assert executor.look("a", "s0") is None
    assert executor.look("b", "s").state == "running"  # type: ignore[union-attr]


def test_an_error_is_kept_and_not_run_again_by_itself(executor: Executor) -> None:
    calls = []

    def compute(_: Any, progress: Step) -> None:
        calls.append(1)
        raise SpecError("window 0 is not between 1 and 8", "choose another")

    executor.submit("a", "map", "k", Work(compute=compute))
    seen = executor.wait("a", "map", 5)
    assert seen is not None
    assert seen.state == "failed"
    assert isinstance(seen.error, SpecError)
    executor.submit("a", "map", "k", Work(compute=compute))
    assert len(calls) == 1
    executor.submit("a", "map", "k", Work(compute=compute), again=True)
    executor.wait("a", "map", 5)
    assert len(calls) == 2


def test_a_defect_frees_the_turn(executor: Executor) -> None:
    def compute(_: Any, progress: Step) -> None:
        progress(1, 2, None)
        raise ZeroDivisionError

    executor.submit("a", "map", "k", Work(compute=compute))
    assert isinstance(executor.wait("a", "map", 5).error, ZeroDivisionError)  # type: ignore[union-attr]
    executor.submit("a", "map", "k2", steps(2, name="x"))
    assert executor.wait("a", "map", 5).state == "done"  # type: ignore[union-attr]


def test_a_failing_prepare_is_an_error_and_not_a_hang(executor: Executor) -> None:
    @contextmanager
    def broken(tell: Callable[[str], None]) -> Iterator[None]:
        raise SpecError("no such model")
        yield

    executor.submit("a", "map", "k", Work(prepare=broken, compute=lambda *_: None))
    assert executor.wait("a", "map", 5).state == "failed"  # type: ignore[union-attr]


def test_preparing_says_what_it_does_and_can_be_stopped(executor: Executor) -> None:
    ended = threading.Event()

    @contextmanager
    def loading(tell: Callable[[str], None]) -> Iterator[None]:
        try:
            while True:
                tell("reading weights")
                time.sleep(0.005)
        finally:
            ended.set()
        yield

    executor.submit("a", "map", "k", Work(prepare=loading, compute=lambda *_: None))
    until(lambda: executor.look("a", "map").stage == "reading weights")  # type: ignore[union-attr]
    executor.cancel("a", "map")
    assert ended.wait(2)


def test_who_leaves_is_stopped_after_the_grace(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "k", endless(started))
    started.wait(5)
    executor.leave("a")
    assert executor.under_way() == 1
    until(lambda: executor.under_way() == 0, 2.0)
    assert executor.look("a", "map") is None


def test_a_reload_within_the_grace_finds_the_run(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "k", endless(started))
    started.wait(5)
    executor.leave("a")
    executor.submit("a2", "map", "k", endless())
    time.sleep(0.3)
    seen = executor.look("a2", "map")
    assert seen is not None
    assert seen.state == "running"
    assert executor.under_way() == 1


def test_the_same_visitor_may_come_back(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "k", endless(started))
    started.wait(5)
    executor.leave("a")
    executor.submit("a", "other", "k2", steps(1, name="x"))
    time.sleep(0.3)
    assert executor.look("a", "map").state == "running"  # type: ignore[union-attr]


def test_one_visitor_may_not_start_without_end() -> None:
    executor = Executor(per_visitor=2)
    executor.submit("a", "1", "k1", endless())
    executor.submit("a", "2", "k2", endless())
    with pytest.raises(TooManyRuns, match="2 of your runs"):
        executor.submit("a", "3", "k3", endless())
    executor.submit("b", "1", "k4", endless())
    executor.shutdown()


def test_the_server_takes_a_bounded_number() -> None:
    executor = Executor(in_all=1)
    executor.submit("a", "1", "k1", endless())
    with pytest.raises(TooManyRuns, match="this server"):
        executor.submit("b", "1", "k2", endless())
    executor.shutdown()


def test_shut_down_stops_all_and_takes_no_more() -> None:
    executor = Executor()
    for visitor in "abc":
        executor.submit(visitor, "s", visitor, endless())
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < 2
    assert executor.under_way() == 0
    with pytest.raises(TooManyRuns, match="stopping"):
        executor.submit("a", "t", "new", steps(1))


def test_time_left_and_place_are_told(executor: Executor) -> None:
    started = threading.Event()
    executor.submit("a", "map", "k", endless(started))
    started.wait(5)
    until(lambda: executor.look("a", "map").seconds_left is not None)  # type: ignore[union-attr]
    seen = executor.look("a", "map")
    assert seen is not None
    assert seen.total == 1_000_000
    assert seen.seconds_left is not None
    assert seen.seconds_left > 1


def test_results_are_read_only(executor: Executor) -> None:
    @dataclass
    class Grid:
        values: np.ndarray

    executor.submit("a", "map", "k", Work(compute=lambda *_: Grid(np.zeros(3))))
    seen = executor.wait("a", "map", 5)
    assert seen is not None
    with pytest.raises(ValueError, match="read-only"):
        seen.result.values[0] = 1.0


def test_waiting_jobs_leave_the_queue_when_cancelled(executor: Executor) -> None:
    gate = threading.Event()
    executor.submit("z", "s", "blocker", Work(compute=lambda *_: gate.wait(5)))
    until(lambda: executor.look("z", "s").state == "running")  # type: ignore[union-attr]
    executor.submit("a", "s", "k", steps(2, name="a"))
    until(lambda: executor.look("a", "s").ahead == 1)  # type: ignore[union-attr]
    executor.cancel("a", "s")
    until(lambda: executor.under_way() == 1, 1.0)
    gate.set()
    assert executor.wait("z", "s", 5).state == "done"  # type: ignore[union-attr]
