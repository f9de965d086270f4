"""Whether ranks reach each other: each greets who connects to the address that gloo would use."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

_TIMEOUT_S = 5.0
_AT_ONCE = 32


@dataclass(frozen=True)
class Address:
    """Where a rank listens, and what it says to who connects: on a loopback another process may listen there."""

    host: str
    port: int
    greeting: str


class Listener:
    """Greets everybody who connects to ``host`` while it is entered."""

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.address = Address(host, int(self._socket.getsockname()[1]), uuid.uuid4().hex)
        self._thread = threading.Thread(target=self._greet, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _greet(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # it was closed
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.address.greeting.encode())


def unreachable(addresses: Sequence[Address], timeout_s: float = _TIMEOUT_S) -> tuple[str, ...]:
    """Connect to every rank's address; return one text for each that does not greet as it should."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = pool.map(lambda address: _connect(address, timeout_s), addresses)
        return tuple(f"rank {rank} at {addresses[rank].host}: {a}" for rank, a in enumerate(answers) if a)


def _connect(address: Address, timeout_s: float) -> str | None:
    """Return what is wrong with an address, None where it answers."""
    try:
        with socket.create_connection((address.host, address.port), timeout_s) as s:
            got = s.makefile("rb").read().decode(errors="replace")
    except OSError as e:
        return e.strerror or str(e)
    return None if got == address.greeting else "another process answers there"
