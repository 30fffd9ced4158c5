"""Results by key, and the results that ship with the project."""

from factscope.store.examples import stored_result
from factscope.store.results import ResultStore, from_json, result_key, to_json

__all__ = ["ResultStore", "from_json", "result_key", "stored_result", "to_json"]
