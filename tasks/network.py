"""This machine's own addresses: loopback, and ports on it."""

import contextlib
import random
import socket

from tasks.errors import ServerError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at an address."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def loopback_only() -> dict[str, str]:
    """Environment of processes that talk to each other by Gloo or NCCL: only this machine is to reach what they open."""
    name = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now, and that no connection will be given as its own end.

    Systems take those from 32768 up (Linux; others higher). What is started here listens only after seconds, and a port from
    up there is then sometimes gone. Raises ServerError if a hundred are taken.
    """
    # not the seeded generator: two processes with one seed would be given the same port
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("a hundred ports on 127.0.0.1 are all taken or forbidden; free some, or name one by --port")


def refuse_taken(host: str, port: int) -> None:
    """Raise ServerError if something listens there: it might be taken for what is to be started."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ServerError(
            f"vLLM cannot listen at {host}:{port} ({error.strerror}): stop what listens there, or name another --port"
        ) from error
