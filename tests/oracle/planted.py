"""Mistakes planted in the code itself: a function with some of its text replaced, for the length of one test."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

ANNOTATIONS = __future__.annotations.compiler_flag


def plant(patch: pytest.MonkeyPatch, function: Callable[..., Any], right: str, wrong: str) -> None:
    """Let a function run with ``wrong`` in the place of ``right``, wherever it was imported to.

    Args:
        function: of a module or a class, with nothing of an enclosing function in it.
        right: stands in its source once.
    """
    code: Any = function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{function.__qualname__} has {right!r} {source.count(right)} times"
    assert not code.__closure__ and source.startswith("def "), "decorators and closures cannot be made again"
    there: dict[str, Any] = dict(code.__globals__)
    changed = compile(source.replace(right, wrong), inspect.getfile(function), "exec", ANNOTATIONS, dont_inherit=True)
    exec(changed, there)
    patch.setattr(function, "__code__", there[function.__name__].__code__)
