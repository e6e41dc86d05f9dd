"""Where a server listens, and what it needs, found out before any model is read: nothing here imports torch."""

import importlib.util
import ipaddress
import os
import socket

from rrtc.errors import RrtcError

NEEDED = ("starlette", "uvicorn")


def check_installed() -> None:
    """Raises RrtcError where the packages of the extra `serve` are not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RrtcError(
            f"Serving needs {' and '.join(missing)}, which is not installed.",
            "Install what it needs with 'pip install rrtc[serve]'.",
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. Raises RrtcError where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would take a port that is in use
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RrtcError(
            f"Nothing can listen at {host}, port {port}: {reason}.", "--port 0 takes a free port."
        ) from error
    return place


def url_of(place: socket.socket) -> str:
    """The beginning of its URLs."""
    host, port, *_ = place.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_open(place: socket.socket) -> bool:
    """Whether other machines can connect to it."""
    return not is_this_machine(place.getsockname()[0])


def is_this_machine(host: str) -> bool:
    """Whether `host` is a name or an address that no other machine has."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False
