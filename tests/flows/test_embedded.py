"""The server that the command line brings along."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from flows.embedded import server_process
from tasks import locks


def test_two_commands_at_once_each_have_one_over_the_same_database(tmp_path: Path) -> None:
    both_run = threading.Barrier(2, timeout=200)

    def command(name: str) -> list[str]:
        with server_process(tmp_path / "home") as url:
            httpx.post(f"{url}/flows/", json={"name": name}, timeout=60).raise_for_status()
            both_run.wait()
            found = httpx.post(f"{url}/flows/filter", json={}, timeout=60).raise_for_status().json()
            both_run.wait()
        return sorted(flow["name"] for flow in found)

    with ThreadPoolExecutor() as commands:
        assert list(commands.map(command, ("one", "two"))) == [["one", "two"]] * 2


def test_its_ui_lies_in_its_home_as_its_environment_may_be_read_only(tmp_path: Path) -> None:
    with server_process(tmp_path / "home") as url:
        page = httpx.get(url.removesuffix("api"), headers={"Accept": "text/html"}, follow_redirects=True)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert list((tmp_path / "home").rglob("index.html"))


def test_it_starts_where_a_share_knows_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with server_process(tmp_path / "home") as url:
        assert httpx.get(f"{url}/health", timeout=60).is_success
