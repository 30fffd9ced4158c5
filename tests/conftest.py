"""What all tests share: no network, few threads, fixed seeds, the bundled model.

The environment is set before torch, transformers or huggingface_hub is imported by any test, and processes that tests
start inherit it. Nothing is skipped because something is missing: the model ships, and a browser is installed by
`make test`.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import hypothesis
import pytest

from tools.prepare import find_chromium

_UNSET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")


def _set_environment() -> None:
    """Hermetic: nobody's cache, token or settings are read, and nothing is asked of a hub."""
    for name in [name for name in os.environ if name.startswith("FACTSCOPE_") and name != "FACTSCOPE_CHROMIUM"]:
        del os.environ[name]
    for name in _UNSET:
        os.environ.pop(name, None)
    caches = tempfile.mkdtemp(prefix="factscope-tests-")
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    os.environ["HF_HOME"] = str(Path(caches) / "hub")
    os.environ["XDG_CACHE_HOME"] = caches
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores: one thread each
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["FACTSCOPE_TORCH_THREADS"] = "1"


_set_environment()

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same draws, whichever ran before it."""
    import numpy
    import torch

    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def bundled_model_dir() -> Iterator[Path]:
    """The folder of the bundled model. It ships with FactScope: a test that needs it fails without it."""
    with resources.as_file(resources.files("factscope.demo") / "model") as folder:
        assert (folder / "config.json").is_file(), f"the bundled model is not in {folder}"
        assert list(folder.glob("*.safetensors")), f"the bundled model in {folder} has no weights"
        yield folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser that browser tests drive."""
    found = find_chromium()
    assert found is not None, "no browser: run `make test`, which installs one"
    return found
