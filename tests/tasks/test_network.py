"""Ports of this machine."""

import random
from pathlib import Path

from tasks.network import free_port


def test_a_free_port_is_none_that_a_connection_takes_meanwhile() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    random.seed(0)
    ports = {free_port() for _ in range(20)}
    assert max(ports) < lowest
    random.seed(0)
    assert {free_port() for _ in range(20)} != ports  # two test processes seed alike
