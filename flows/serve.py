"""serve: hold a model server, with the newest adapter if there is one, until it is cancelled or interrupted.

drag serve
"""

import time

from prefect.logging import get_run_logger

from flows.form import settings_flow
from flows.serving import model_server
from flows.summary import work_dir
from tasks import artifact, config, storage
from tasks.errors import ServerError
from tasks.serve import served_models

_CHECK_EVERY_S = 10


@settings_flow(name="serve")
def serve(settings: config.ServeRun) -> None:
    """Serve the base model as "base", and the newest adapter under a name of its own; merged into it, as "base" alone.

    Raises:
        ServerError: the server did not start, or died.
    """
    root = storage.resolve(settings.storage)
    with model_server(config.Server(model=settings.model), settings.serve, work_dir(root)) as connect:
        served = connect(artifact.load_ref(root, "adapter") if settings.adapter else None)
        (base_url,) = served.base_url
        get_run_logger().info("serving %s at %s", ", ".join(served_models(base_url)), base_url)
        while True:
            time.sleep(_CHECK_EVERY_S)
            try:
                served_models(base_url)
            except ServerError as error:
                raise ServerError(f"the model server died; its log is below {work_dir(root)}") from error
