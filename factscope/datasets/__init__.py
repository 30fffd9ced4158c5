"""Facts from files: CSV, CounterFact, known_1000, zsRE, LRE, and the bundled ones."""

from __future__ import annotations

from factscope.datasets.files import MAX_BYTES, MAX_ROWS, Dataset, read_facts
from factscope.queries import Fact

__all__ = ["MAX_BYTES", "MAX_ROWS", "Dataset", "bundled_facts", "read_facts"]


def bundled_facts() -> tuple[Fact, ...]:
    """The facts that the bundled model was taught, each with paraphrases and neighbours."""
    from factscope.demo.facts import load_facts

    return load_facts()
