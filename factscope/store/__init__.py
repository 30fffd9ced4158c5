"""Results as JSON, and the results that ship with the project."""

from factscope.store.examples import stored_result
from factscope.store.results import from_json, to_json

__all__ = ["from_json", "stored_result", "to_json"]
