"""What the UI cannot show of progress is told once, and stops nothing."""

import logging
import time
import uuid

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks.progress import progress, slug


def test_progress_that_the_ui_does_not_take_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    title = f"Counting {uuid.uuid4()}"
    chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[slug(title)]))

    @flow
    def counting() -> int:
        with get_client(sync_client=True) as client, progress(title) as on_progress:
            on_progress(3, 3)
            while not (shown := client.read_artifacts(artifact_filter=chosen)):
                time.sleep(0.05)
            client.delete_artifact(shown[0].id)
            on_progress(3, 3)
            on_progress(3, 3)
        return 3

    with caplog.at_level(logging.WARNING):
        assert counting() == 3
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (said,) = [text for text in warnings if title in text]
    assert said.startswith(f"{title}: the UI does not show how far it is: ")
    assert "Artifact not found" in said
