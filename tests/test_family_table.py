"""The table of families that ships is what measuring gives; ``python tests/test_family_table.py`` writes it."""

import json

import pytest
from tiny_models import FAMILIES, build

from factscope.models.catalogue import FAMILIES as PATH
from factscope.models.catalogue import capability_words
from factscope.models.handle import build_handle


def measure(name: str) -> dict[str, object]:
    handle = build_handle(build(name), None, name=name, revision="-", dtype="float32", device="cpu")
    return {"family": handle.info.family, "capabilities": capability_words(handle)}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_as_shipped(name: str) -> None:
    assert json.loads(PATH.read_text())[name] == measure(name)


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: measure(name) for name in FAMILIES}, indent=1) + "\n")
