"""A server that ended, says that its engine is dead, or hangs is started again: a bounded number of times, at its address."""

import contextlib
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tasks import supervise
from tasks.errors import ServerError
from tasks.network import free_port
from tasks.serve import Served
from tasks.server_api import check_health
from tasks.supervise import Supervised, why_dead
from tests.model_server import Hang, ModelServer, Status
from tests.server_process import counts, server_process


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_ASK_AGAIN_S", 0.1)
    monkeypatch.setattr(supervise, "_WATCH_EVERY_S", 0.1)
    monkeypatch.setattr(supervise, "_SILENT_S", 3.0)
    monkeypatch.setattr(supervise, "_START_AGAIN_S", 0.1)


class Starts:
    """Starts servers on one port, each with the next flags, later ones with the last, and counts them."""

    def __init__(self, folder: Path, *flags: list[str]) -> None:
        self._folder, self._flags, self._port = folder, flags, free_port()
        self.made: list[Served] = []

    def __call__(self) -> AbstractContextManager[Served]:
        return self._start()

    @contextlib.contextmanager
    def _start(self) -> Iterator[Served]:
        flags = self._flags[min(len(self.made), len(self._flags) - 1)]
        with server_process(self._folder / f"{len(self.made)}.log", self._port, *flags) as served:
            self.made.append(served)
            yield served


def _ask(served: Served) -> None:
    body = b'{"model": "base", "messages": [{"role": "user", "content": "So?"}]}'
    with contextlib.suppress(urllib.error.URLError, OSError):
        urllib.request.urlopen(f"{served.base_url}/chat/completions", body, timeout=2).close()


def test_it_starts_when_first_needed_and_a_well_one_is_left_alone(tmp_path: Path) -> None:
    starts = Starts(tmp_path, [])
    with Supervised(starts, max_restarts=1) as supervised:
        assert not supervised.revive()
        assert starts.made == []
        served = supervised.served()
        assert supervised.served() is served
        assert not supervised.revive()
    assert len(starts.made) == 1
    with pytest.raises(ServerError):
        check_health(served.base_url)


def test_a_killed_one_is_started_again_at_its_address(tmp_path: Path) -> None:
    starts = Starts(tmp_path, [])
    with Supervised(starts, max_restarts=2) as supervised:
        first = supervised.served()
        os.kill(counts(first.base_url)["pid"], signal.SIGKILL)
        assert supervised.revive()
        os.kill(counts(supervised.served().base_url)["pid"], signal.SIGKILL)
        first.process.wait(60)
        starts.made[-1].process.wait(60)
        assert supervised.served().base_url == first.base_url
        assert counts(supervised.served().base_url)["calls"] == 0
    assert len(starts.made) == 3


def test_no_more_often_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        supervise, "_WATCH_EVERY_S", 60.0
    )  # or the watch may tell first, of a server that does not answer
    starts = Starts(tmp_path, ["--end-after", "1"])
    with Supervised(starts, max_restarts=1) as supervised:
        for _ in range(2):
            for _ in range(2):
                _ask(supervised.served())
            starts.made[-1].process.wait(60)
        with pytest.raises(ServerError, match=r"max_restarts \(1\) allows: it ended with code 1"):
            supervised.served()
    assert len(starts.made) == 2


def test_a_start_that_fails_is_one_of_those_that_are_allowed(tmp_path: Path) -> None:
    starts = Starts(tmp_path, [])
    tries = 0

    def flaky() -> AbstractContextManager[Served]:
        nonlocal tries
        tries += 1
        if tries == 2:
            raise ServerError("the card is not free yet")
        return starts()

    with Supervised(flaky, max_restarts=2) as supervised:
        for _ in range(2):
            os.kill(counts(supervised.served().base_url)["pid"], signal.SIGKILL)
            starts.made[-1].process.wait(60)
            if len(starts.made) == 1:
                assert supervised.revive()
        with pytest.raises(ServerError, match=r"max_restarts \(2\) allows"):
            supervised.revive()
    assert tries == 3


@pytest.mark.parametrize(("end", "said"), [("ill", "answers 503"), ("hang", "does not answer")])
def test_one_that_is_ill_or_hangs_is_ended_by_the_watch_and_started_again(
    tmp_path: Path, end: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(tmp_path, ["--end", end, "--end-after", "1"], [])
    with Supervised(starts, max_restarts=1) as supervised:
        for _ in range(2):
            _ask(supervised.served())
        starts.made[0].process.wait(60)
        assert supervised.revive()
        assert why_dead(supervised.served()) is None
    assert len(starts.made) == 2
    assert said in caplog.text, "the log tells why, not that we ended it"


def test_only_a_server_that_says_so_or_says_nothing_is_ill() -> None:
    with ModelServer() as server:
        check_health(server.url)
        server.ill = Status(404)  # a server that has no such address, and answers all the same
        check_health(server.url)
        server.models = None  # type: ignore[assignment]
        with pytest.raises(ServerError, match="no model server answers"):
            check_health(server.url)
        server.ill = Status(503)
        with pytest.raises(ServerError, match="answers 503"):
            check_health(server.url)
        server.ill = Hang()
        with pytest.raises(ServerError, match="does not answer"):
            check_health(server.url, timeout_s=0.3)
