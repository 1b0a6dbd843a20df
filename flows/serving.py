"""A model to ask, for as long as a flow needs one: the server that the settings name, or a vLLM of our own.

Ours starts when the first stage really asks, so a flow whose stages are all cached starts none.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks import config, limits, serve
from tasks.agent.prompts import prompt_fingerprint
from tasks.artifact import Artifact, read_provenance
from tasks.errors import ConfigError, ServerError
from tasks.logs import run_logger
from tasks.model import fetch_model
from tasks.progress import progress
from tasks.training.merge import merge

Connect = Callable[[Artifact | None], config.Server]
"""Server settings to ask the base model with, or an adapter, which is loaded if need be."""


@contextlib.contextmanager
def model_server(server: config.Server, settings: config.Serve, work_dir: Path) -> Iterator[Connect]:
    """Yields `connect`; a vLLM that it started is stopped at the block's end.

    Raises:
        ServerError: a server did not start, or refused an adapter.
    """
    with contextlib.ExitStack() as stack:
        running: dict[str, serve.Served] = {}

        def start(model: str) -> serve.Served:
            """The server of a model, started when first asked for; another one makes room, as each wants the machine."""
            if model not in running:
                stack.close()
                running.clear()
                stack.enter_context(limits.slot("gpu-serving"))
                with progress("Starting vLLM") as on_progress:
                    timeout = round(settings.start_timeout)
                    running[model] = stack.enter_context(
                        serve.serving(model, settings, work_dir, on_wait=lambda s: on_progress(round(s), timeout))
                    )
            return running[model]

        def connect(adapter: Artifact | None) -> config.Server:
            if server.base_url:
                return _remote(server, adapter)
            if adapter and settings.adapters == "merged":
                started, name = start(_merged(server.model, adapter, work_dir)), serve.BASE_NAME
            else:
                started = start(server.model)
                name = serve.load_adapter(started, adapter) if adapter else serve.BASE_NAME
            return server.model_copy(update={"base_url": [started.base_url], "model": name})

        yield connect


def refuse_other_prompt(adapter: Artifact, agent: config.Agent) -> None:
    """An adapter is only what was trained if it is told, byte for byte, what it was told in training.

    Raises:
        ConfigError: the agent's settings make another prompt.
    """
    told, taught = prompt_fingerprint(agent), read_provenance(adapter)["prompt_fingerprints"]
    if told not in taught:
        raise ConfigError(
            f"the adapter was trained on prompt {', '.join(taught)} and would be served {told}: use the agent settings "
            "(protocol, examples, …) that `format` was given"
        )


def _merged(model: str, adapter: Artifact, work_dir: Path) -> str:
    """A local folder with the adapter merged into its base, made once."""
    folder = work_dir / "merged" / adapter.sha256[:16]
    if not (folder.with_suffix(".artifact.json")).exists():
        merge(adapter, str(fetch_model(model)), str(folder))
    return str(folder)


def _remote(server: config.Server, adapter: Artifact | None) -> config.Server:
    """The settings for servers that someone else runs; an adapter must be served by each under its own name.

    Raises:
        ServerError: none of them answers. One that does not while another does is left out until it does.
    """
    wanted = serve.adapter_name(adapter) if adapter else server.model
    silent = []
    for base_url in server.base_url:
        try:
            served = serve.served_models(base_url)
        except ServerError as error:
            silent.append(error)
            continue
        if wanted not in served:
            hint = f"; load it there as {wanted!r} (vLLM: --lora-modules {wanted}=FOLDER)" if adapter else ""
            raise ConfigError(f"{base_url} serves {', '.join(served)}, not {wanted}{hint}")
    if len(silent) == len(server.base_url):
        raise silent[-1]
    for reason in silent:
        run_logger().warning("%s", reason)
    return server.model_copy(update={"model": wanted})
