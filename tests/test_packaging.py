"""The frame around the code: pins agree, the wheel carries everything, the container file keeps its promises."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools import prepare

# Needed though nothing of ours imports it: who does.
IMPORTED_BY_OTHERS = {"accelerate": "transformers, for device maps", "pyarrow": "pandas, for parquet"}
MODULE_OF = {"huggingface-hub": "huggingface_hub", "vl-convert-python": "vl_convert"}


def pins(file: Path) -> dict[str, str]:
    """Names and versions of a requirements file, extras left out."""
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("-r"))
    return {name.split("[")[0]: version for name, version in pairs}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def test_dependencies_agree_with_requirements(project: dict, repository: Path) -> None:
    listed = dict(dependency.split("==") for dependency in project["project"]["dependencies"])
    assert listed == pins(repository / "requirements.txt")


def test_extras_are_what_is_tested(project: dict, repository: Path) -> None:
    tested = pins(repository / "requirements-dev.txt")
    for extra in project["project"]["optional-dependencies"].values():
        assert all(tested[name] == version for name, version in (one.split("==") for one in extra))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_and_has_its_reason(name: str, repository: Path) -> None:
    for line in (repository / name).read_text().splitlines():
        if not line or line.startswith(("#", "-r")):
            continue
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?==\S+ +# .+", line), line
    assert not re.search(r"https?://|index-url|find-links", (repository / name).read_text())


def test_requirements_are_what_the_code_imports(repository: Path) -> None:
    files = [repository / "app.py"]
    for folder in ("factscope", "dashboard", "pages"):
        files += (repository / folder).rglob("*.py")
    imported: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    ours = {"factscope", "dashboard", "pages", "app"}
    listed = {MODULE_OF.get(name, name.replace("-", "_")) for name in pins(repository / "requirements.txt")}
    assert imported - ours - set(sys.stdlib_module_names) - listed == set(), "imported, but not in requirements.txt"
    assert listed - imported - set(IMPORTED_BY_OTHERS) == set(), "in requirements.txt, but not imported"


def test_versions_agree(project: dict) -> None:
    import factscope

    assert factscope.__version__ == project["project"]["version"]


# -- make ------------------------------------------------------------------------------------------------------------


def test_make_alone_lists_every_target(repository: Path) -> None:
    said = subprocess.run(["make", "-C", str(repository)], capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for target in set(phony[1].split()) - {"help"}:
        assert f"make {target} " in said


def test_a_prepared_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second `make run` starts at once: with a fitting stamp nothing is asked of pip."""
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text("pytest==1\n")
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "VENV", tmp_path / ".venv")
    calls: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    monkeypatch.setattr(prepare, "make_venv", lambda: (tmp_path / ".venv").mkdir(exist_ok=True))
    prepare.prepare_environment("test")
    prepare.prepare_environment("test")
    prepare.prepare_environment("run")
    assert [command[-1] for command in calls] == ["requirements-dev.txt"]
    (tmp_path / "requirements.txt").write_text("pytest==2\n")
    prepare.prepare_environment("run")
    assert [command[-1] for command in calls] == ["requirements-dev.txt", "requirements.txt"]


def test_an_installation_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("pytest==1\n")
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(prepare, "make_venv", lambda: None)
    monkeypatch.setattr(
        prepare.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, returncode=1)
    )
    with pytest.raises(prepare.PreparationError, match=r"requirements\.txt"):
        prepare.prepare_environment("run")
    assert list((tmp_path / ".venv").iterdir()) == []


def test_an_unknown_step_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["everything"]) == 1
    assert "'everything' is no step" in capsys.readouterr().err


def test_ci_runs_what_people_run(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert text.index("make check") < text.index("make test")


# -- the container ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instructions(repository: Path) -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, argument)."""
    text = re.sub(r"^\s*#.*\n", "", (repository / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def last_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    start = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[start:]


def test_container_has_two_stages_on_one_named_base(instructions: list[tuple[str, str]]) -> None:
    assert [argument for name, argument in instructions if name == "FROM"] == ["${BASE} AS build", "${BASE}"]
    base = next(argument for name, argument in instructions if name == "ARG" and argument.startswith("BASE="))
    assert ":" in base
    assert "latest" not in base


def test_container_runs_without_rights(instructions: list[tuple[str, str]]) -> None:
    users = [argument for name, argument in last_stage(instructions) if name == "USER"]
    assert users == ["10001"]


def test_container_tells_its_health_and_serves_safely(instructions: list[tuple[str, str]]) -> None:
    final = last_stage(instructions)
    health = next(argument for name, argument in final if name == "HEALTHCHECK")
    assert "/_stcore/health" in health
    command = ast.literal_eval(next(argument for name, argument in final if name == "ENTRYPOINT"))
    assert command[:4] == ["python", "-m", "factscope", "serve"]
    assert "0.0.0.0" in command
    environment = dict(
        pair.split("=", 1) for name, argument in final if name == "ENV" for pair in shlex.split(argument)
    )
    assert environment["FACTSCOPE_MODELS_ALLOWED"] == "bundled"
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert ("EXPOSE", "8501") in final
    assert f"VOLUME {environment['HF_HOME']}" in [" ".join(pair) for pair in final]


def test_torch_has_a_layer_of_its_own_before_the_rest(instructions: list[tuple[str, str]]) -> None:
    runs = [argument for name, argument in instructions if name == "RUN" and "pip install" in argument]
    assert "^torch==" in runs[0]
    assert "requirements.txt" in runs[1]
    copies = [index for index, pair in enumerate(instructions) if pair == ("COPY", ". /build/")]
    assert instructions.index(("RUN", runs[1])) < copies[0], "a changed line of code must not install torch again"


def test_no_registry_host_is_named(repository: Path) -> None:
    for name in ("Dockerfile", "Makefile", "pyproject.toml", ".ci/run", "tools/prepare.py"):
        hosts = re.findall(r"https?://([^/\s\"':]+)", (repository / name).read_text())
        assert set(hosts) <= {"127.0.0.1", "$(ADDRESS)"}, name


# -- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_carries_model_facts_and_dashboard(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "factscope = factscope.cli:main" in archive.read(about).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"factscope"}
    for folder in ("dashboard", "pages"):
        for file in (repository / folder).rglob("*.py"):
            assert f"factscope/_app/{file.relative_to(repository)}" in names
    for name in ("app.py", ".streamlit/config.toml"):
        assert f"factscope/_app/{name}" in names
    tracked = subprocess.run(
        ["git", "ls-files", "factscope"], cwd=repository, capture_output=True, text=True, check=False
    ).stdout.split()
    assert set(tracked) <= names
    assert any(re.fullmatch(r"factscope/demo/model/.*\.safetensors", name) for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.slow
def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed beside the dependencies of this environment, with no checkout on the path."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    program = (
        "from factscope.application import application_root, server_command; print(application_root()); "
        "print(' '.join(server_command(port=18597)[0]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert Path(said[0]) == site / "factscope" / "_app"
    assert str(site / "factscope" / "_app" / "app.py") in said[1]
    asked = ["predict", "--prompt", "The capital of Japan is", "--subject", "Japan", "--format", "csv"]
    answer = subprocess.run(
        [sys.executable, "-m", "factscope", *asked],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Tokyo" in answer


def test_no_placeholder_is_left_in_a_page_for_readers(repository: Path) -> None:
    for page in (*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("factscope/demo/*.md")):
        assert "@@" not in page.read_text(encoding="utf-8"), page.name
