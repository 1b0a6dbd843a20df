"""Where this process and those that it started listen: whom they could be reached by."""

import contextlib

import psutil


def listening(name: str | None = None) -> dict[int, str]:
    """Addresses by TCP port, of programs called `name` or of all."""
    this = psutil.Process()
    found = {}
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            if name in (None, process.name()):
                sockets = process.net_connections(kind="tcp")
                found |= {s.laddr.port: s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return found
