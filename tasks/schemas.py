"""Every artifact's Arrow schema, with a version, in one place.

A schema's name is "<what>/<version>". Change a schema, raise its version: artifacts of the old one are then refused
with a clear error instead of being misread. `FOLDERS` names the artifacts that are folders of files, not tables.
"""

import pyarrow as pa

LARGEST = 2**31 - 1  # whole number that a column holds
_text, _int, _float, _bool = pa.string(), pa.int32(), pa.float64(), pa.bool_()


def _struct(**fields: pa.DataType) -> pa.StructType:
    return pa.struct([pa.field(name, kind) for name, kind in fields.items()])


def _schema(**fields: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()])


LOCATION = _struct(document=_text, page=_int)
# `seen`: whether a search of the rollout had shown the model the page; null where the rollout went on from a stored conversation
CITATION = _struct(file=_text, page=_int, seen=_bool)
HIT = _struct(rank=_int, file=_text, page_number=_int, score=_float)
# a page's image; `key` says where it lies below the storage root (tasks/images.py)
IMAGE = _struct(file=_text, page=_int, key=_text, width=_int, height=_int)
# in `content` each image stands as one U+FFFC, in the order of `images`, which is null where there are none
MESSAGE = _struct(role=_text, content=_text, images=pa.list_(IMAGE))
SEARCH = _struct(
    query=_text,  # what the model asked for
    searched=_text,  # what the engine was given (differs when the question's words were added)
    read_as=_text,  # "query", or "words" when it could not be parsed and was searched as plain words
    results=pa.list_(HIT),
    gt_rank=_int,  # rank of the best-ranked answer location, from 1; null when not in the top k
    rank_score=_float,  # (k - rank + 1) / k, else 0; in processed, by the reward that was chosen (tasks/reward.py)
    shown=_bool,  # whether the model saw what it found: not in its last turn, nor where it was only read later (drag reparse)
)
TURN = _struct(
    turn=_int,  # from 1
    # what the model generated; where the server took out reasoning or calls, with these put back in one form
    raw_text=_text,
    reasoning=_text,
    action=_text,  # "search" | "answer" | "none"
    searches=pa.list_(SEARCH),
    images_shown=_int,  # pages that its searches found and whose images the model was then shown
    images_missing=_int,  # pages that were shown by their text instead, as they have no PDF, or cannot be rendered
    images_replaced=_int,  # images of earlier turns that gave way to text before its request, so that it fits the context
    failure=_text,  # null, or why the turn brought no valid action (tasks/agent/trajectory.py: TurnFailure)
    failure_detail=_text,
    read_by=_text,  # "server" | "parser" | "reparse"; null where nothing could be read (tasks/agent/trajectory.py: ReadBy)
    repaired=_bool,  # broken JSON of a call was mended
    finish_reason=_text,
    prompt_tokens=_int,
    completion_tokens=_int,
    latency_s=_float,
)

_QUESTION = {
    "question_id": _text,
    "question": _text,
    "answers": pa.list_(pa.list_(_text)),
    "answer_locations": pa.list_(LOCATION),
    "category": _text,
    "split": _text,
}

TABLES: dict[str, pa.Schema] = {
    "pages/2": _schema(
        file=_text,
        page_number=_int,
        total_pages=_int,
        title=_text,
        text=_text,
        text_source=_text,  # "pdf" | "ocr" | "ocr_jsonl"
        confidence=_float,  # mean word confidence of OCR, 0 to 1; null where the text is not from our OCR
        source_uri=_text,  # where the page can be rendered from; null where there is no PDF
        source_sha256=_text,
        pictures=_bool,  # whether a PDF's page of little text has pictures, in which text may be; null with an OCR file's text
    ),
    "set_aside/1": _schema(source=_text, row=_int, reason=_text, detail=_text),
    # `group` is the connected group of documents that decides the split
    "questions/1": _schema(**_QUESTION, group=_text),
    # one row an attempt at a rollout; the folded artifact holds the earliest finished attempt, else the latest failed one
    "trajectories/2": _schema(
        rollout_id=_text,
        attempt=_int,
        status=_text,  # "finished" | "failed"
        outcome=_text,  # an Outcome when finished, else a Failure (tasks/agent/trajectory.py)
        failure_detail=_text,
        **_QUESTION,
        state=_text,  # the conversation that the rollout went on from (tasks/states.py); null when it began with the question
        state_messages=_int,  # how many messages that conversation holds after the prompt
        model=_text,
        protocol=_text,
        observation=_text,
        sampling=_text,  # name of the sampling configuration
        sample=_int,
        seed=_int,
        top_k=_int,
        turns=pa.list_(TURN),
        answer=pa.list_(_text),
        citations=pa.list_(CITATION),
        messages=pa.list_(MESSAGE),  # the whole conversation, as it was sent and answered
        tools=_text,  # JSON of the tool definitions that the chat template was given; null without tools
        prompt_tokens=_int,  # of all turns, as is the next; null where the server did not tell those of one
        completion_tokens=_int,
        elapsed_s=_float,
        model_fingerprint=_text,
        sampling_fingerprint=_text,
        prompt_fingerprint=_text,
        index_fingerprint=_text,
        code_fingerprint=_text,
    ),
    # where queries are mined: one row a conversation, or a question alone (tasks/states.py)
    "states/1": _schema(
        state=_text,  # names the question and the messages; null for the question alone
        question_id=_text,
        messages=pa.list_(MESSAGE),  # after the prompt, up to a turn
        rollout_id=_text,  # the first whose conversation it was
        turn=_int,  # the turn that comes next, from 1
    ),
    # what later nights know of a night: one row a question and sampling configuration (tasks/nights.py)
    "night-scores/2": _schema(
        run=_text,  # key that runs of the same rollouts share
        question_id=_text,
        sampling=_text,
        rollouts=_int,  # finished ones
        reciprocal_rank=_float,  # mean, over these, of the best search's; 0 where none found it
    ),
    # one row a question, in the order in which a night takes them
    "order/2": _schema(
        question_id=_text,
        rollouts=_int,  # finished ones of earlier nights
        reciprocal_rank=_float,  # mean, over these, of the best search's; null where there are none
    ),
    # one row a rollout, scored
    "processed/4": _schema(
        rollout_id=_text,
        **_QUESTION,
        state=_text,
        state_messages=_int,
        model=_text,
        protocol=_text,
        observation=_text,
        sampling=_text,
        sample=_int,
        outcome=_text,
        top_k=_int,
        searches=pa.list_(SEARCH),  # of all turns, in order
        reasonings=pa.list_(_text),  # of the turn that made each search
        search_messages=pa.list_(_int),  # index into messages, from 0, of what the assistant wrote for each search
        best_search=_int,  # index into searches, from 0; null when none found it
        best_query=_text,
        best_rank=_int,
        rank_score=_float,  # of the best search
        first_success=_int,  # number of the first search that found it, from 1
        effort=_float,
        messages=pa.list_(MESSAGE),
        prompt_messages=_int,  # how many messages the prompt has; those of the state follow, then the model's
        as_answered=_int,  # index into messages: what the model wrote before it, it wrote seeing images that have since given way
        tools=_text,
        reasoning=_text,  # of the turn that holds the best search
        right=_bool,  # whether the answer is; null where none was given, or there is nothing to tell by
        prompt_fingerprint=_text,
    ),
    "pairs/3": _schema(
        question_id=_text,
        question=_text,
        state=_text,
        earlier=pa.list_(MESSAGE),  # the messages of the state; none when it is the question alone
        source=_text,  # "within" one rollout | "across" rollouts of the question
        chosen=_text,
        rejected=_text,
        chosen_reasoning=_text,
        rejected_reasoning=_text,
        chosen_score=_float,
        rejected_score=_float,
        chosen_rank=_int,
        rejected_rank=_int,
        chosen_effort=_float,  # of the rollout that the query is of
        rejected_effort=_float,
        split=_text,
        prompt_fingerprint=_text,
    ),
    # what a collection holds, one row a number: a count, or a share or mean, which is null where there is nothing to divide
    "statistics/1": _schema(section=_text, name=_text, count=_int, value=_float),
    # TRL's conversational prompt-completion shape
    "sft/2": _schema(
        question_id=_text,
        split=_text,  # "train" | "val"
        format=_text,
        prompt=pa.list_(MESSAGE),
        completion=pa.list_(MESSAGE),
        tools=_text,
        rank_score=_float,
        effort=_float,
        gt_rank=_int,
        prompt_fingerprint=_text,
    ),
    # TRL's conversational preference shape
    "dpo/3": _schema(
        question_id=_text,
        split=_text,
        prompt=pa.list_(MESSAGE),
        chosen=pa.list_(MESSAGE),
        rejected=pa.list_(MESSAGE),
        tools=_text,
        chosen_score=_float,
        rejected_score=_float,
        rank_score=_float,  # of the chosen query, as are effort and gt_rank
        effort=_float,
        gt_rank=_int,
        prompt_fingerprint=_text,
    ),
    "reward/3": _schema(
        question_id=_text,
        split=_text,
        prompt=pa.list_(MESSAGE),  # the question
        completion=pa.list_(MESSAGE),  # the query
        score=_float,  # rank score
        effort=_float,
        gt_rank=_int,
        prompt_fingerprint=_text,
    ),
    # one row a question and a run; null where a run has no such thing (the raw question gives no answer)
    "results/4": _schema(
        run=_text,
        rollout_id=_text,
        **_QUESTION,
        fate=_text,  # how the question ended (tasks/fate.py); null where only the first search was scored
        first_query=_text,
        first_rank=_int,
        first_ranks=pa.list_(_int),  # in the first search, of all answer locations found, rising
        best_rank=_int,
        best_known=_bool,  # false where only the first search was scored, so that best_rank says nothing
        seen_ranks=pa.list_(_int),  # the same among the pages of all searches, to top_k each, in the order first seen
        searches=_int,
        searches_to_success=_int,
        calls_to_success=_int,  # model calls up to that search's own; null where there is no model
        first_hit_rank=_int,  # in that search
        zero_results=_int,  # searches that matched no page
        turns=_int,
        valid_turns=_int,  # turns that brought a valid action
        outcome=_text,
        anls=_float,
        cited=_int,  # distinct pages that the answer cites
        cited_seen=_int,  # of these, pages that a search had shown the model, the others being made up; null if unknown
        page_precision=_float,
        page_recall=_float,
        page_f1=_float,
        document_precision=_float,
        document_recall=_float,
        document_f1=_float,
        prompt_tokens=_int,
        completion_tokens=_int,
        elapsed_s=_float,
    ),
    "comparison/1": _schema(
        metric=_text,
        run=_text,
        baseline=_text,
        n=_int,  # questions
        groups=_int,  # groups of questions that share a document, which are what is resampled
        run_mean=_float,
        baseline_mean=_float,
        difference=_float,
        low=_float,  # 95 % paired bootstrap interval of the difference
        high=_float,
        p_value=_float,
        smallest_visible=_float,  # the smallest difference that n questions could have shown
        verdict=_text,  # "improved" | "worse" | "cannot tell"
    ),
    # one row an optimizer step; eval_loss, and by name what else the method measures, where they were measured
    "loss_curve/2": _schema(
        step=_int,
        epoch=_float,
        loss=_float,
        eval_loss=_float,
        measured=pa.list_(_struct(name=_text, value=_float)),
        tokens=pa.int64(),
        seconds=_float,
    ),
}

FOLDERS: frozenset[str] = frozenset({"index/1", "adapter/1", "reward-model/1", "model/1", "report/1", "jsonl/1"})
