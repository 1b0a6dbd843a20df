"""infer: ask questions and watch the agent search; without --question, those that are typed in, until an empty line.

drag infer --question "How loud is the HX-40 pump?" "And how heavy?"
drag infer --adapter                                           # the newest; --adapter NAME for another
drag infer --adapter --in-process                              # by transformers, without vLLM
drag infer --base-url http://host:8000/v1 --model NAME
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from flows.serving import model_server, refuse_other_prompt
from flows.show import show_answer, show_turn
from tasks import adapter_names, config, storage
from tasks.agent.client import ImageUrl, open_client
from tasks.agent.completion import OpenConversation
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question, Trajectory
from tasks.artifact import Artifact
from tasks.errors import DragError, ServerError
from tasks.images import PageImages
from tasks.ingested import load_ingested, refuse_without_images
from tasks.pages import PageStore
from tasks.search.index import open_index

Opened = Callable[[ImageUrl], contextlib.AbstractAsyncContextManager[OpenConversation]]


def infer(settings: config.InferRun) -> None:
    """Answer questions, and show reasoning, queries and results of each turn as it ends.

    Of those typed in, one that fails is told, and the next one is asked for.

    Raises:
        ArtifactError: nothing was ingested yet, or an ingest is under way.
        ConfigError: the adapter was trained on another prompt than these settings make, or on another model; or images of
            pages are asked for that none can have.
        ServerError: the model server did not start, or a given question could not be asked.
    """
    root = storage.resolve(settings.storage)
    refuse_without_images(root, settings.agent)
    ingested = load_ingested(root, "index", "pages")
    searcher, pages = open_index(ingested["index"], settings.search), PageStore(ingested["pages"])
    adapter = adapter_names.chosen(root, settings.adapter)
    if adapter:
        refuse_other_prompt(adapter, settings.agent)
    sampling = resolve(settings.sampling_config, settings.sampling)
    console = Console()

    async def ask(opened: Opened, question: str) -> Trajectory:
        async with (
            PageImages(root, pages, settings.agent, settings.server.send_images) as images,
            opened(images.url) as conversation,
        ):
            return await rollout(
                Question("asked", question),
                settings=settings.agent,
                sampling=sampling,
                seed=0,
                complete=conversation(),
                search=search_with(searcher, settings.agent.top_k),
                page_text=pages.text,
                page_image=images.image,
                deadline_s=settings.server.rollout_timeout,
                on_turn=lambda turn: show_turn(turn, pages.text, console),
            )

    failed = 0
    with _model(settings, adapter, root) as opened:
        for question in settings.question or _typed(console):
            if len(settings.question) > 1:
                console.print(f"[bold]{escape(question)}[/]")
            try:
                trajectory = asyncio.run(ask(opened, question))
            except DragError as error:
                if settings.question:
                    raise
                console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
                continue
            show_answer(trajectory, console)
            failed += trajectory.status == "failed"
    if settings.question and failed:
        raise ServerError(f"the model could not be asked {failed} of {len(settings.question)} questions")


@contextlib.contextmanager
def _model(settings: config.InferRun, adapter: Artifact | None, root: str) -> Iterator[Opened]:
    """What opens conversations: with a model in this process, or with a server, which is started again if it died."""
    if settings.in_process:
        from tasks.in_process import open_in_process

        with Console(stderr=True).status("Loading the model"):
            images_root = root if settings.agent.sees_images else None
            conversation = open_in_process(settings.server, adapter, settings.serve.max_model_len, images_root)
        yield lambda image_url: contextlib.nullcontext(conversation)
        return
    with model_server(settings.server, settings.serve, root) as connect:
        connect(adapter)
        yield lambda image_url: open_client(connect(adapter), image_url)


def _typed(console: Console) -> Iterator[str]:
    while True:
        try:
            typed = console.input("[bold]question[/] (empty to end): ").strip()
        except EOFError:
            return
        if not typed:
            return
        yield typed
