"""mine: questions, and conversations before one of their turns → several queries each, which the index alone scores.

    drag mine --limit 800 --samples 8 --examples                 # the base model's first turns
    drag mine --states trajectories --max-states 4               # where its conversations went on
    drag process --source mined

A mined query is a rollout of one turn: what holds for `drag collect` (shards, retries, going on from where it was killed, nights)
holds here. As there, the prompt of an untrained model has worked examples, and that of the training sets those of `drag format`.
"""

from flows.collect import collected, dated
from flows.form import settings_flow
from flows.serving import model_server
from flows.summary import show_stages, show_turns
from tasks import adapter_names, config, nights, refs, storage
from tasks.cache import stage_key
from tasks.ingested import refuse_without_images
from tasks.refs import load_ref
from tasks.stage_tasks import find_states, mine_queries
from tasks.stages import StageRun, run_stage

# what chooses states
_CHOOSING = {"states", "found", "max_states", "split"}
_ONE_TURN = {"max_iterations": 1, "answer": False}


def _found(root: str, settings: config.MineRun) -> StageRun:
    """The states to go on from.

    Raises:
        ConfigError: the conversations are of another protocol or view of pages than the agent's.
        EmptyError: there is none.
    """
    chosen = settings.nights
    trajectories = nights.collections(root, ["trajectories"], chosen.since, chosen.until)
    questions = load_ref(root, "questions")
    key = stage_key(
        "tasks.states",
        settings={"agent": settings.agent},
        inputs={"questions": questions, **trajectories},
        facts=settings.mine.model_dump(mode="json", include=_CHOOSING),
    )
    return run_stage(
        find_states,
        root=root,
        key=key,
        uri=storage.join(root, "states", key),
        settings=settings.mine,
        agent=settings.agent,
        questions=questions,
        trajectories=trajectories,
    )


def _of_one_turn(settings: config.MineRun) -> config.CollectRun:
    sampled = {name: getattr(settings.mine, name) for name in config.Collect.model_fields}
    agent = settings.agent.model_copy(update=_ONE_TURN)
    return config.CollectRun(**settings.asking | {"agent": agent}, collect=config.Collect(**sampled))


@settings_flow(name="mine", about=lambda settings: settings.mine.split, zone=lambda settings: settings.mine.time_zone)
def mine(settings: config.MineRun) -> list[StageRun]:
    """Sample queries of the base model, or of an adapter, and score each by what a search for it finds."""
    root = storage.resolve(settings.storage)
    refuse_without_images(root, settings.agent)
    adapter = adapter_names.chosen(root, settings.adapter)
    settings = settings.model_copy(update={"mine": dated(settings.mine)})
    runs = [_found(root, settings)] if settings.mine.states != "questions" else []
    began = runs[0].artifacts["states"] if runs else None
    title = f"{settings.mine.split} questions" + (f" of {settings.mine.dt}" if settings.mine.dt else "")
    with model_server(settings.server, settings.serve, root) as connect:
        runs.append(collected(root, _of_one_turn(settings), connect, adapter, title, stage=mine_queries, began=began))
    if settings.mine.dt is None:  # nights are found by their dates
        refs.save_ref(root, "mined", runs[-1].artifacts["mined"])
    show_turns("Turns of the mined queries", runs[-1].artifacts["mined"])
    show_stages(runs)
    return runs
