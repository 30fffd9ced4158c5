"""The same as a person meets it: a process of its own, its exit status, its two streams."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from cli_runner import PROMPT, SUBJECT, invoke, save_tiny

from tests.tiny_models import save_gpt2

MAIN = (sys.executable, "-m", "factscope")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("process") / "tiny")


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "FACTSCOPE_TORCH_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def run(*arguments: str | bytes, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[bytes]:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [*MAIN, *arguments],
        cwd=cwd or root,
        env=environment(PYTHONPATH=str(root), **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=240,
        check=False,
    )


def refused(process: subprocess.CompletedProcess[bytes], *fragments: str) -> None:
    assert process.returncode == 2, process.stderr
    assert process.stdout == b""
    (line,) = process.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert all(fragment in line for fragment in fragments), line


# Without torch: within a second


def test_no_command() -> None:
    refused(run(), "Missing command", "factscope --help")


def test_an_option_that_is_no_number() -> None:
    refused(
        run("flow", "--prompt", PROMPT, "--window", "nan"), "--window 'nan'", "whole number", "factscope flow --help"
    )


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    refused(run("predict", "--prompt", PROMPT, "--out", str(tmp_path / "x.xlsx")), "x.xlsx'", "ends in '.xlsx'")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        refused(run("serve", "--port", str(port)), f"127.0.0.1:{port} cannot be listened on", "another port")


def test_help_on_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([*MAIN, "models"], env=environment(), stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


# With a model


def test_a_process_gives_the_rows_of_the_function_and_nothing_else(folder: Path) -> None:
    asked = ("predict", "--model", str(folder), "--prompt", PROMPT, "--subject", SUBJECT, "--format", "json")
    process = run(*asked)
    assert (process.returncode, process.stderr) == (0, b"")
    theirs, ours = json.loads(process.stdout), invoke(*asked).data
    assert theirs["rows"] == ours["rows"]
    assert theirs["model"] == ours["model"]
    assert process.stdout.count(b"\n") == 1


def test_from_another_folder_to_a_file(folder: Path, tmp_path: Path) -> None:
    asked = ("--prompt", PROMPT, "--subject", SUBJECT, "--sources", "each", "--control", "2")
    process = run("flow", "--model", str(folder), *asked, "--out", "rows.parquet", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (0, b"")
    assert process.stderr.splitlines()[-1].startswith(b"written: ") and b"rows.parquet" in process.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == (16 + 2) * 4


def test_a_terminal_that_knows_few_letters(folder: Path) -> None:
    process = run("predict", "--model", str(folder), "--prompt", "東京 😀 é is", PYTHONIOENCODING="latin-1")
    assert process.returncode == 0, process.stderr
    assert b"\\u6771\\u4eac \\U0001f600 \xe9 is" in process.stdout


def test_a_full_disk_behind_standard_output(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [*MAIN, "predict", "--model", str(folder), "--prompt", PROMPT, "--format", "json"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert process.returncode == 2
    (line,) = process.stderr.decode().splitlines()
    assert "standard output cannot be written (No space left on device)" in line


def test_bytes_that_are_no_text(folder: Path) -> None:
    refused(run("predict", "--model", str(folder), "--prompt", b"caf\xe9 is"), "<U+DCE9>", "at character 3")


def test_weights_that_are_cut(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-1] if file.suffix == ".safetensors" else data)
    refused(run("lens", "--model", str(broken), "--prompt", PROMPT), "broken", "is damaged: it should have")


def test_a_model_that_gives_no_numbers(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    found = json.loads((broken / "config.json").read_text()) | {"layer_norm_epsilon": -100.0}
    (broken / "config.json").write_text(json.dumps(found))
    refused(run("flow", "--model", str(broken), "--prompt", PROMPT), "not finite")


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    slow = save_gpt2(tmp_path / "slow", layers=24, width=512, positions=512)
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [*MAIN, "flow", "--model", str(slow), "--prompt", " of" * 60, "--sources", "each", "--format", "json"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    while b"flow: 0/" not in seen:
        seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    os.close(terminal)
    assert process.returncode == 3
    if said:
        assert 0 < len(json.loads(said)["rows"]) < 61 * 24


def test_the_bundled_model_answers() -> None:
    process = run("predict", "--prompt", PROMPT, "--subject", SUBJECT, "--answer", "Paris", "--format", "json")
    assert process.returncode == 0, process.stderr
    data = json.loads(process.stdout)
    assert data["model"]["name"] == "bundled"
    assert (data["query"]["rank"], data["summary"]["known"], data["summary"]["taught"]) == (1, True, True)
    assert data["query"]["p_target"] >= 0.5
