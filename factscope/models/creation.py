"""One model at a time is created in a process.

While transformers builds a model it puts other functions in the place of some of torch's and of its own, and sets the
default dtype, for the whole process. Two threads that do so at once put back what the other had put there: from then on
no model's head is tied to its embedding, or nothing is drawn at random, until the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()
_PATIENCE_SECONDS = 0.1


@contextmanager
def creating(waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold this while a model is created, from its configuration or from its weights.

    Args:
        waiting: called every tenth of a second while another thread creates one; may raise to stop waiting.
    """
    while not _LOCK.acquire(timeout=_PATIENCE_SECONDS):
        waiting()
    try:
        yield
    finally:
        _LOCK.release()
