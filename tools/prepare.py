"""Prepares what the Makefile needs: the environment in .venv, and a browser for the tests.

Standard library only, since it runs before anything is installed. Each step says in one sentence what it does, and a
step that was done before takes no time: a stamp in .venv holds the hash of the requirements that are installed.

    python tools/prepare.py run            what FactScope runs on
    python tools/prepare.py test browser   what its tests need besides
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
REQUIREMENTS = {"run": ("requirements.txt",), "test": ("requirements.txt", "requirements-dev.txt")}
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


class PreparationError(Exception):
    """A step that failed, as one sentence with what to try."""


def say(sentence: str) -> None:
    print(sentence, flush=True)


def main(steps: list[str]) -> int:
    """Carries out the steps in order; 0 if all went well."""
    try:
        for step in steps or ["run"]:
            if step == "browser":
                prepare_browser()
            elif step in REQUIREMENTS:
                prepare_environment(step)
            else:
                raise PreparationError(f"{step!r} is no step: say {', '.join(REQUIREMENTS)} or browser.")
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the next try goes on from here", file=sys.stderr)
        return 130
    return 0


def prepare_environment(purpose: str) -> None:
    """Makes .venv hold what ``purpose`` needs, and remembers it."""
    make_venv()
    name_checkout()
    wanted = fingerprint(purpose)
    stamp = VENV / f"factscope-{purpose}.stamp"
    if stamp.is_file() and stamp.read_text().strip() == wanted:
        return
    file = REQUIREMENTS[purpose][-1]
    say(f"Installing {file} into .venv: once, some minutes, about 2 GB on disk with the CPU build of torch.")
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *quiet]
    command += shlex.split(os.environ.get("PIP_ARGS", ""))
    if subprocess.run([*command, "-r", file], cwd=ROOT, check=False).returncode:
        raise PreparationError(f"pip could not install {file} (its message is above); the next try goes on from here.")
    for done, files in REQUIREMENTS.items():
        if set(files) <= set(REQUIREMENTS[purpose]):
            (VENV / f"factscope-{done}.stamp").write_text(fingerprint(done) + "\n")
    say("Installed.")


def make_venv() -> None:
    """Makes .venv if there is none that works."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this very script is what an older Python is told by)
        raise PreparationError(f"Python {sys.version.split()[0]} is too old: FactScope needs 3.11 or later.")
    if works(VENV_PYTHON):
        return
    if VENV.exists():
        say(".venv does not work (was this folder moved?): making it anew.")
    else:
        say(f"Making .venv with Python {sys.version.split()[0]}.")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made.returncode or not works(VENV_PYTHON):
        raise PreparationError(
            "the environment .venv could not be made: this Python has no venv or no pip "
            "(on Debian and Ubuntu: apt-get install python3-venv)."
        )


def name_checkout() -> None:
    """Lets .venv's Python import factscope from this folder, wherever it is started: scripts under examples/ do."""
    for packages in VENV.glob("lib/python3*/site-packages"):
        (packages / "factscope-checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")


def works(python: Path) -> bool:
    """Whether this is a Python of a usable version with pip."""
    if not python.exists():
        return False
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([str(python), "-c", probe], stderr=subprocess.DEVNULL, check=False).returncode == 0


def fingerprint(purpose: str) -> str:
    """The hash of the requirements, of where .venv lies (its scripts hold the path) and of what pip was told."""
    digest = hashlib.sha256()
    for file in REQUIREMENTS[purpose]:
        digest.update((ROOT / file).read_bytes())
    digest.update(str(VENV).encode())
    digest.update(os.environ.get("PIP_ARGS", "").encode())
    return digest.hexdigest()


def prepare_browser() -> None:
    """Installs Chromium unless there is one."""
    if find_chromium() is not None:
        return
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        say("The tests need a browser and there is none: installing Debian's chromium and fonts with apt-get.")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        packages = ["chromium", "fonts-dejavu-core"]
        for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL, check=False)
            if done.returncode and command[0] == "install":
                say("apt-get could not install it (its message is above); trying Playwright's own.")
    if find_chromium() is None:
        say("The tests need a browser and there is none: downloading Playwright's Chromium into its cache.")
        subprocess.run([str(VENV_PYTHON), "-m", "playwright", "install", "chromium"], check=False)
    if find_chromium() is None:
        raise PreparationError(
            "no browser could be installed: install Chromium by hand, or name one in FACTSCOPE_CHROMIUM."
        )


def find_chromium() -> str | None:
    """The browser that the tests drive: named in FACTSCOPE_CHROMIUM, on PATH, or Playwright's own."""
    named = os.environ.get("FACTSCOPE_CHROMIUM")
    if named:
        return named
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    return _playwright_chromium()


def _playwright_chromium() -> str | None:
    program = (
        "from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as p: print(p.chromium.executable_path)"
    )
    asked = subprocess.run([str(VENV_PYTHON), "-c", program], capture_output=True, text=True, check=False)
    path = asked.stdout.strip()
    return path if asked.returncode == 0 and Path(path).is_file() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
