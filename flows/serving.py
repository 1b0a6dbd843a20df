"""A model to ask, for as long as a flow needs one: the servers that the settings name, or a vLLM of our own.

Ours starts when the first stage really asks, so a flow whose stages are all cached, or in which every rollout is finished, starts
none; and again when it died.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from flows.summary import work_dir
from tasks import config, folders, images, limits, network, serve, server_api, storage
from tasks.adapters import check_adapter
from tasks.agent.prompts import prompt_fingerprint, refuse_other_conversations
from tasks.artifact import Artifact, fetch_folder, read_provenance
from tasks.errors import ConfigError, ServerError
from tasks.logs import run_logger
from tasks.model import fetch_model
from tasks.progress import progress
from tasks.supervise import Connect, Supervised
from tasks.training.merge import merge


@contextlib.contextmanager
def model_server(server: config.Server, settings: config.Serve, root: str) -> Iterator[Connect]:
    """Yields `connect`; a vLLM that it started is stopped at the block's end.

    Args:
        root: storage root. Where it is local, ours may read its page images by their paths.

    Raises:
        ConfigError: adapters are to be merged where the packages that merge are not installed.
        ServerError: a server did not start, died more often than `max_restarts`, or refused an adapter.
    """
    if server.base_url:
        yield _Remote(server, settings)
    else:
        if settings.adapters == "merged" and not importlib.util.find_spec("peft"):  # rather than after a training
            raise ConfigError(
                "to serve adapters merged, this machine needs the training packages (pip install -e '.[train]'), which the "
                "image of the serving pool has not: take adapters lora"
            )
        with contextlib.ExitStack() as merged, contextlib.ExitStack() as servers:
            yield _Own(server, settings, root, servers, merged)


class _Own:
    """A vLLM that is started here, one at a time."""

    def __init__(
        self,
        server: config.Server,
        settings: config.Serve,
        root: str,
        stack: contextlib.ExitStack,
        until_the_end: contextlib.ExitStack,
    ) -> None:
        self._server, self._settings, self._stack = server, settings, stack
        self._until_the_end = until_the_end
        self._work_dir = work_dir(root)
        self._images = None if storage.is_s3(root) else Path(images.folder(root))
        self._model: str | None = None  # whose server runs
        self._running: Supervised | None = None
        self._merged: dict[str, str] = {}  # adapter → folder of it and its base as one model

    def __call__(self, adapter: Artifact | None) -> config.Server:
        if adapter and self._settings.adapters == "merged":
            started = self._serve(self._merge(adapter))
            name = serve.BASE_NAME
        else:
            if adapter:
                base = fetch_model(self._server.model, self._server.trusted_remote_code)
                check_adapter(fetch_folder(adapter), base, self._settings)
            started = self._serve(self._server.model)
            name = server_api.load_adapter(started.base_url, adapter) if adapter else serve.BASE_NAME
        return self._server.model_copy(update={"base_url": [started.base_url], "model": name})

    def revive(self) -> bool:
        return self._running is not None and self._running.revive()

    def _merge(self, adapter: Artifact) -> str:
        """A folder with the adapter merged into its base, which is as large as the base, and goes when no server needs it."""
        if adapter.sha256 not in self._merged:
            scratch = self._until_the_end.enter_context(folders.scratch("merged", self._work_dir))
            folder = str(scratch / "model")
            merge(adapter, self._server.model, folder, self._server.trusted_remote_code)
            self._merged[adapter.sha256] = folder
        return self._merged[adapter.sha256]

    def _serve(self, model: str) -> serve.Served:
        """The server of a model, started when first asked for; another one makes room, as each wants the machine."""
        if self._running is None or model != self._model:
            self._stack.close()
            self._running = None
            self._stack.enter_context(limits.slot("gpu-serving"))
            port = self._settings.port or network.free_port()  # the same after a restart: whoever asks there goes on
            supervised = Supervised(lambda: self._start(model, port), self._settings.max_restarts)
            self._running, self._model = self._stack.enter_context(supervised), model
        return self._running.served()

    @contextlib.contextmanager
    def _start(self, model: str, port: int) -> Iterator[serve.Served]:
        timeout = round(self._settings.start_timeout)
        with contextlib.ExitStack() as stack:
            with progress("Starting vLLM, seconds") as on_progress:
                served = stack.enter_context(
                    serve.serving(
                        model,
                        self._settings,
                        self._work_dir,
                        port,
                        on_wait=lambda seconds: on_progress(round(seconds), timeout),
                        trusted=self._server.trusted_remote_code,
                        images=self._images,
                    )
                )
            yield served


class _Remote:
    """Servers that someone else runs."""

    def __init__(self, server: config.Server, settings: config.Serve) -> None:
        self._server, self._settings = server, settings

    def __call__(self, adapter: Artifact | None) -> config.Server:
        """An adapter is served by each under its own name; one that does not yet loads it, if it can read the adapter's files.

        Raises:
            ConfigError: one of them serves something else, would leave out a part of the adapter, or does not load it.
            ServerError: none of them answers. One that does not while another does is left out until it does.
        """
        wanted = server_api.adapter_name(adapter) if adapter else self._server.model
        silent = []
        for base_url in self._server.base_url:
            try:
                served = server_api.served_models(base_url)
            except ServerError as error:
                silent.append(error)
                continue
            if wanted not in served and adapter:
                self._load(base_url, adapter)
            elif wanted not in served:
                raise ConfigError(f"{base_url} serves {', '.join(served)}, not {wanted}")
        if len(silent) == len(self._server.base_url):
            raise silent[-1]
        for reason in silent:
            run_logger().warning("%s", reason)
        return self._server.model_copy(update={"model": wanted})

    def _load(self, base_url: str, adapter: Artifact) -> None:
        base = fetch_model(self._server.model, self._server.trusted_remote_code)
        check_adapter(fetch_folder(adapter), base, self._settings)
        try:
            server_api.load_adapter(base_url, adapter)
        except ServerError as error:
            name = server_api.adapter_name(adapter)
            raise ConfigError(
                f"{base_url} does not serve the adapter: {error}; let it load adapters (vLLM: --enable-lora and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, on a machine that can read the folder), or load it there as {name!r} "
                f"(--lora-modules {name}=FOLDER)"
            ) from error

    def revive(self) -> bool:
        return False


def refuse_other_prompt(adapter: Artifact, agent: config.Agent) -> None:
    """An adapter is only what was trained if it is told, byte for byte, what it was told in training, and shown pages alike.

    What an imported adapter was told, nobody knows; that is said, and it is taken.

    Raises:
        ConfigError: the agent's settings make another prompt, or other conversations than it has learned from.
    """
    made_of = read_provenance(adapter)
    told, taught = prompt_fingerprint(agent), made_of["prompt_fingerprints"]
    if not taught:
        run_logger().warning("the adapter was imported: nothing tells whether it was trained on this prompt (%s)", told)
    elif told not in taught:
        raise ConfigError(
            f"the adapter was trained on prompt {', '.join(taught)} and would be served {told}: use the agent settings "
            "(protocol, examples, …) that `format` was given"
        )
    if conversed_as := made_of.get("conversed_as"):
        refuse_other_conversations(conversed_as, agent)
