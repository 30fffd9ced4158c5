"""Who may import whom, where import-linter does not look: what an import loads, and Streamlit's three places."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "streamlit")
LIGHT_MODULES = (
    "factscope",
    "factscope.application",
    "factscope.errors",
    "factscope.columns",
    "factscope.queries",
    "factscope.tokens",
    "factscope.datasets",
    "factscope.settings",
    "factscope.comparison",
    "factscope.methods",
    "factscope.charts",
)


def imported_names(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, at import time or later."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def sources(root: Path, *folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_text_and_figures_loads_nothing_heavy(module: str, repository: Path) -> None:
    program = f"import {module}, sys, json; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_streamlit_is_imported_only_by_the_dashboard(repository: Path) -> None:
    elsewhere = sources(repository, "factscope", "benchmarks", "examples")
    assert [str(file) for file in elsewhere if "streamlit" in imported_names(file)] == []


def test_pages_compute_nothing(repository: Path) -> None:
    """Only the server's start-up touches torch: it chooses the threads before a page is asked for."""
    forbidden = {"torch", "transformers", "accelerate", "safetensors", "tokenizers"}
    offenders = {
        str(file.relative_to(repository)): sorted(imported_names(file) & forbidden)
        for file in sources(repository, "pages", "dashboard")
        if file != repository / "dashboard" / "server.py"
    }
    assert {file: names for file, names in offenders.items() if names} == {}


def test_pages_know_no_interventions(repository: Path) -> None:
    offenders = [file.name for file in sources(repository, "pages") if "factscope.interventions" in file.read_text()]
    assert offenders == []


def test_package_itself_imports_nothing_at_import_time(repository: Path) -> None:
    """Public names of ``factscope`` are looked up on first use, so that ``import factscope`` costs nothing."""
    tree = ast.parse((repository / "factscope" / "__init__.py").read_text(encoding="utf-8"))
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in eager for alias in node.names}
    modules = {node.module for node in eager if isinstance(node, ast.ImportFrom)}
    assert not any((module or "").startswith("factscope") for module in modules), modules
    assert names.isdisjoint(HEAVY), names


def test_public_names_exist(repository: Path) -> None:
    program = "import factscope as f; print(len([getattr(f, name) for name in f.__all__]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
