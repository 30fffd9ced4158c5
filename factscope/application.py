"""Where the dashboard lies, and how it is started with safe settings."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from factscope.errors import SpecError

PACKAGED = "_app"
MODELS_ALLOWED = "FACTSCOPE_MODELS_ALLOWED"
ADDRESS_HINT = "use 127.0.0.1, or 0.0.0.0 for all of them"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def application_root() -> Path:
    """The folder that holds ``app.py``, ``pages/``, ``dashboard/`` and ``.streamlit/config.toml``.

    A wheel carries them under ``factscope/_app`` (pyproject.toml, force-include), so that an installation adds no
    top-level module but ``factscope``. In a checkout they lie beside the package.

    Raises:
        FileNotFoundError: neither place has an ``app.py``, so this installation is incomplete: a defect of the package.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / PACKAGED, package.parent)
    for root in candidates:
        if (root / "app.py").is_file() and (root / "dashboard").is_dir():
            return root
    places = " nor in ".join(str(root) for root in candidates)
    raise FileNotFoundError(f"the dashboard's app.py lies neither in {places}: install FactScope again")


def server_command(
    *,
    port: int = 8501,
    address: str = "127.0.0.1",
    models_allowed: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command that starts the dashboard, and the environment to start it in.

    The safe settings are in ``.streamlit/config.toml`` beside ``app.py``, which Streamlit reads wherever it is started.
    What depends on the call comes as flags: only known host names are answered, which keeps a foreign page from
    reaching the dashboard by a name that it owns. On an address that others can reach, only the named models can be
    asked for (the bundled one if none is named) and folders never.

    Args:
        port: the port to listen on.
        address: the address to listen on.
        models_allowed: the only model names that can be asked for; empty: what the environment says.
        allowed_hosts: further host names under which the page is reached.

    Raises:
        SpecError: a port, an address or a name that cannot be used, or a port that is taken.
    """
    root = application_root()
    _check_port(port)
    _check_free(address, port)
    public = not is_loopback(address)
    environment = dict(os.environ)
    names = tuple(models_allowed) or tuple(filter(None, environment.get(MODELS_ALLOWED, "").split(",")))
    if public:
        names = names or ("bundled",)
        _refuse_folders(names, address)
    if names:
        environment[MODELS_ALLOWED] = ",".join(name.strip() for name in names)
    hosts = _hosts(address, allowed_hosts)
    command = [sys.executable, "-m", "streamlit", "run", str(root / "app.py")]
    command += [f"--server.address={address}", f"--server.port={port}", "--server.headless=true"]
    command += [f"--browser.serverAddress={hosts[0]}", "--browser.gatherUsageStats=false"]
    command += [f"--server.allowedHosts={host}" for host in hosts]
    return command, environment


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address.lower() == "localhost"


def _hosts(address: str, allowed: Sequence[str]) -> list[str]:
    """Host names that are answered, the one that the page is known by first."""
    own = [] if address in ("0.0.0.0", "::") or address in LOOPBACK_HOSTS else [address]
    return list(dict.fromkeys([*allowed, *own, *LOOPBACK_HOSTS]))


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise SpecError(f"port {port} does not exist", "choose one from 1024 to 65535")


def _check_free(address: str, port: int) -> None:
    try:
        (family, kind, _, _, target), *_ = socket.getaddrinfo(address.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SpecError(f"address {address!r} is not an address of this machine", ADDRESS_HINT) from None
    with closing(socket.socket(family, kind)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(target)
        except PermissionError:
            raise SpecError(f"port {port} is reserved for the system", "choose one from 1024 to 65535") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise SpecError(f"address {address!r} is not an address of this machine", ADDRESS_HINT) from None
            raise SpecError(
                f"{address}:{port} cannot be listened on ({error.strerror or error})",
                f"stop what uses it, or choose another port such as --port {port + 1 if port < 65535 else 8501}",
            ) from None


def _refuse_folders(names: Sequence[str], address: str) -> None:
    for name in names:
        path = Path(name.strip().removeprefix("random:")).expanduser()
        if name.strip().startswith((".", "/", "~")) or path.is_dir():
            raise SpecError(
                f"model {name!r} is a folder, and on {address} others could then read this machine's folders",
                "name models of the hub or bundled, or serve on 127.0.0.1",
            )
