"""infer: ask a question and watch the agent search; without --question, ask again and again.

drag infer --question "How loud is the HX-40 pump?"
drag infer --adapter
"""

import asyncio
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from flows.serving import model_server, refuse_other_prompt
from flows.summary import work_dir
from tasks import config, storage
from tasks.agent.client import open_client
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question, Trajectory
from tasks.artifact import load_ref
from tasks.pages import PageStore
from tasks.search.index import open_index


def infer(settings: config.InferRun) -> None:
    """Answer one question, or those typed in, and show reasoning, queries and results of each turn.

    Raises:
        ArtifactError: nothing was ingested yet.
        ConfigError: the adapter was trained on another prompt than these settings make.
        ServerError: the model server did not start.
    """
    root = storage.resolve(settings.storage)
    searcher = open_index(load_ref(root, "index"), settings.search)
    pages = PageStore(load_ref(root, "pages"))
    adapter = load_ref(root, "adapter") if settings.adapter else None
    if adapter:
        refuse_other_prompt(adapter, settings.agent)
    sampling = resolve(settings.sampling_config, settings.sampling)

    async def ask(server: config.Server, question: str) -> Trajectory:
        async with open_client(server) as conversation:
            return await rollout(
                Question("asked", question),
                settings=settings.agent,
                sampling=sampling,
                seed=0,
                complete=conversation(),
                search=search_with(searcher, settings.agent.top_k),
                page_text=pages.text,
                deadline_s=server.rollout_timeout,
            )

    console = Console()
    with model_server(settings.server, settings.serve, work_dir(root)) as connect:
        connect(adapter)
        for question in _questions(settings.question, console):
            _show(asyncio.run(ask(connect(adapter), question)), console)


def _questions(given: str | None, console: Console) -> Iterator[str]:
    if given:
        yield given
        return
    while True:
        try:
            typed = console.input("[bold]question[/] (empty to end): ").strip()
        except EOFError:
            return
        if not typed:
            return
        yield typed


def _show(trajectory: Trajectory, console: Console) -> None:
    for turn in trajectory.turns:
        lines = []
        if turn.reasoning:
            lines.append(f"[italic dim]{escape(turn.reasoning.strip())}[/]")
        for search in turn.searches:
            lines.append(f"[bold cyan]search[/] {escape(search.query)}")
            if search.read_as == "words":
                lines.append("  [yellow]not a valid query: searched as plain words[/]")
            lines += [f"  {rank}. {escape(file)}, page {page}" for rank, file, page, _ in search.results]
            if not search.results:
                lines.append("  nothing found")
        if turn.failure:
            lines.append(f"[red]{turn.failure}[/] {escape(turn.failure_detail or '')}")
        if turn.action != "search":
            lines.append(f"[dim]{escape(turn.raw_text.strip())}[/]")
        console.print(Panel("\n".join(lines), title=f"turn {turn.turn}", title_align="left"))
    if trajectory.answer:
        console.print(f"[bold green]answer[/] {escape('; '.join(trajectory.answer))}")
        for file, page in trajectory.citations:
            console.print(f"  from {escape(file)}, page {page}")
    else:
        console.print(f"[yellow]no answer[/]: {trajectory.outcome} {escape(trajectory.failure_detail or '')}")
