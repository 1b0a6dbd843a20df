"""serve: hold a model server, with an adapter if one is named, until it is cancelled or interrupted.

drag serve --port 8000
"""

import socket
import time

from prefect.logging import get_run_logger
from rich.console import Console

from flows.form import settings_flow
from flows.serving import model_server
from tasks import adapter_names, config, storage
from tasks.server_api import served_models

_CHECK_EVERY_S = 10


@settings_flow(name="serve")
def serve(settings: config.ServeRun) -> None:
    """Serve the base model as "base" and under its own name, and an adapter under a name of its own, or merged into it.

    A server that ended, hangs or has a dead engine is started again, at the same address and with the same adapter.

    Raises:
        ServerError: the server did not start, or died more often than `max_restarts`.
    """
    root = storage.resolve(settings.storage)
    adapter = adapter_names.chosen(root, settings.adapter)
    asked = config.Server(model=settings.model, trusted_remote_code=settings.trusted_remote_code)
    with model_server(asked, settings.serve, root) as connect:
        while True:
            (base_url,) = connect(adapter).base_url
            models, reached_at = ", ".join(served_models(base_url)), base_url
            if settings.serve.host == "0.0.0.0":
                reached_at = base_url.replace("127.0.0.1", socket.getfqdn(), 1)
            serving = f"serving {models} at {reached_at}"
            get_run_logger().info(serving)
            Console(stderr=True).print(serving, soft_wrap=True, highlight=False)
            while not connect.revive():
                time.sleep(_CHECK_EVERY_S)
