"""The Prefect UI as people use it: a collection started by its form, in which rollouts fail, and retried by the button.

A real server, a real worker, a real browser (Debian's package chromium). The two pictures of the README are made anew by

    pytest tests/flows/test_browser.py --screenshots deployments/screenshots
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deploy import deploy
from flows.embedded import server_process
from tasks import config, storage
from tasks.artifact import read_rows
from tasks.refs import load_ref
from tests.model_server import ModelServer, Reply, Status
from tests.servers import missing
from tests.small_collection import ingest_small, searcher
from tests.workers import worker

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]
BUCKET = "drag"
FAIL = ("piston", "rotor")
_PAGE_MS = 120_000  # never waited for unless something is broken: a busy machine may be slow
_RUN_MS = 500_000
_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, documents: Path, s3_server: str) -> Iterator[str]:
    """Address of a Prefect server with everything deployed, documents ingested, and a worker for collections."""
    folder = tmp_path_factory.mktemp("browser")
    storage._client().create_bucket(Bucket=BUCKET)
    root = f"s3://{BUCKET}/team"
    with server_process(folder / "server") as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", url)
        with temporary_settings({PREFECT_API_URL: url}):
            deploy(config.Deploy(storage=root))
            ingest_small(root, documents)
            with worker("gpu-serving", folder / "worker"):
                yield url.removesuffix("/api")


@pytest.fixture
def page() -> Iterator[Page]:
    """A browser's window."""
    if not (chromium := shutil.which("chromium")):
        missing("chromium", "Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_ARGUMENTS.split())
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(_PAGE_MS)
        expect.set_options(timeout=_PAGE_MS)
        yield opened
        browser.close()


@pytest.fixture
def shoot(request: pytest.FixtureRequest, page: Page) -> Callable[[str, int, int], None]:
    """Take a picture of the window, made so many pixels wide and high, if pictures are asked for."""
    folder = request.config.getoption("--screenshots")

    def take(name: str, width: int, height: int) -> None:
        if folder:
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(2000)  # for what moves to come to rest; only a picture needs it
            page.screenshot(path=Path(folder) / f"{name}.png")

    return take


def field(page: Page, label: str) -> Locator:
    """A form's field by its label, with everything that belongs to it."""
    header = f'./div[contains(@class, "p-label__header")]//span[normalize-space()="{label} (Optional)"]'
    return page.locator(f'xpath=//div[contains(@class, "schema-form-property")][{header}]')


def choose(page: Page, label: str, option: str) -> None:
    """Choose one of the values of a field; by keyboard, as a click may open the list and close it again."""
    control = field(page, label).locator(".p-select-button__control")
    control.focus()
    control.press("ArrowDown")
    page.get_by_role("option", name=option, exact=True).click()


def fill(page: Page, label: str, value: object) -> None:
    """Type into a field of text or of a number."""
    inputs = field(page, label)
    inputs.get_by_role("textbox").or_(inputs.get_by_role("spinbutton")).fill(str(value))


def open_tab(page: Page, name: str) -> Locator:
    """Open a tab of a run's page; returns what it shows."""
    page.get_by_role("tablist").get_by_text(name, exact=True).click()
    return page.get_by_role("tabpanel", name=name)


def state(page: Page, name: str) -> Locator:
    """The state at the head of a run's page."""
    return page.get_by_role("banner").get_by_text(name, exact=True)


def press(page: Page, button: Locator, call: str) -> None:
    """Press a button whose call the server may put off: over SQLite, a busy one says now and then that it is unavailable."""
    for _ in range(10):
        with page.expect_response(lambda reply: call in reply.url and reply.request.method == "POST") as answered:
            button.click()
        if answered.value.status != 503:
            break
    assert answered.value.ok, answered.value.text()


def asked_about(request: dict[str, Any]) -> str:
    """The topic of a request's question; none for what the model is asked beforehand, which is no question of ours."""
    found = re.findall(r"How heavy is the (\w+)\?", str(request["messages"]))
    return found[-1] if found else ""


def test_a_run_is_started_by_the_form_and_retried_by_the_button(
    server: str, page: Page, shoot: Callable[[str, int, int], None]
) -> None:
    broken = True
    asked: list[str] = []

    def script(request: dict[str, Any], call: int) -> Reply | Status:
        asked.append(asked_about(request))
        if broken and asked[-1] in FAIL:
            return Status(503, '{"error": {"message": "the engine is out of memory"}}')
        return searcher(request, call)

    with ModelServer(script) as model:
        page.goto(f"{server}/deployments")
        page.get_by_role("link", name="collect", exact=True).first.click()
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_role("button", name="Custom run").click()

        named = page.locator(".p-label").filter(has=page.get_by_text("Run Name", exact=True))
        named.get_by_role("textbox").fill("first-try")
        choose(page, "Split", "all")
        fill(page, "Shard size", 2)
        field(page, "Base URLs").get_by_role("button", name="Add item").click()
        fill(page, "Base URLs", model.url)
        fill(page, "Model", "base")
        fill(page, "Max retries", 0)
        choose(page, "Protocol", "tags")
        fill(page, "Max iterations", 3)
        field(page, "Storage").scroll_into_view_if_needed()
        shoot("collect-form", 1280, 1700)
        press(page, page.get_by_role("button", name="Submit"), "/create_flow_run")

        page.get_by_role("link", name=re.compile("first-try$")).first.click()
        state(page, "Failed").wait_for(timeout=_RUN_MS)
        run = page.url
        told = open_tab(page, "Artifacts").get_by_role("link", name=re.compile("failed-rollouts"))
        expect(told).to_contain_text("2 of 10 rollouts failed (server_error 2). Retry redoes only these.")
        told.click()
        rows = page.get_by_role("row").filter(has_text="out of memory")
        expect(rows).to_have_count(len(FAIL))
        shoot("failed-rollouts", 1500, 640)

        broken = False
        before = len(asked)
        page.goto(run)
        page.get_by_role("button", name="Retry", exact=True).click()
        press(page, page.get_by_role("dialog").get_by_role("button", name="Retry", exact=True), "/set_state")
        state(page, "Completed").wait_for(timeout=_RUN_MS)
        expect(page.get_by_role("banner")).to_contain_text(re.compile(r"collect-all-\d{4}-\d\d-\d\d-first-try"))

    again = set(asked[before:]) - {""}
    assert again == set(FAIL)
    rows_ = read_rows(load_ref(f"s3://{BUCKET}/team", "trajectories"))
    assert sorted(row["attempt"] for row in rows_) == [1] * 8 + [2] * 2
    assert {row["status"] for row in rows_} == {"finished"}
