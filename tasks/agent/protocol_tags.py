"""The protocol of plain text: <think>why</think> <search>words</search>, and in the end <answer>…</answer>.

It needs nothing of the server or the chat template, so the smallest model can follow it. Reading is forgiving: a missing
opening <think>, a last tag that was never closed, text around the tags; of several actions the first counts, and the
conversation keeps nothing that the model wrote after it (results that it made up, say).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.agent.completion import Completion
from tasks.agent.protocol import (
    Actions,
    Answer,
    Ask,
    Protocol,
    Step,
    WireMessage,
    clean,
    one_line,
    page_numbers,
    split_reasoning,
    with_reasoning,
)
from tasks.reward import Page

SYSTEM = (
    "You answer questions from a collection of documents. "
    "First find pages: write <search>a few words that are on the page</search>. "
    "You can think before in <think></think>, and search again with other words. When the pages show the answer, write "
    '<answer>the answer <cite file="name.pdf" page="1"/></answer>.'
)
LAST_TURN = (
    "You cannot search any more. Write <answer>the answer</answer> now, "
    "a line for each part of it and a <cite/> for each page."
)

# What guided decoding lets the model write: short, so that an action is whole before its tokens run out; a file name may be
# as long as file systems allow.
_THOUGHT = r"(<think>[^<>]{1,300}</think>\n?)?"
_GUIDES = {
    "search": r"<search>[^<>\s][^<>\n]{0,119}</search>",
    # as many texts, one a line, and as many citations as a call of the tools may hold when it is guided
    "answer": r"<answer>[^<>\s][^<>\n]{0,119}(\n[^<>\s][^<>\n]{0,119}){0,4}"
    r'([ \n]?<cite file="[^"<>\s][^"<>\n]{0,254}" page="[1-9][0-9]{0,3}"/>){0,15}</answer>',
}

_ACTION = re.compile(r"<(search|answer)\b[^<>]*>", re.IGNORECASE)
_CLOSE = {name: re.compile(rf"</\s*{name}\s*>", re.IGNORECASE) for name in ("search", "answer")}
_CITE = re.compile(r"<cite\b([^<>]*?)/?>(?:([^<>]*)</cite>)?", re.IGNORECASE)
_FILE = re.compile(r"""\bfile\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)
_PAGES = re.compile(r"""\bpages?\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+))""", re.IGNORECASE)
_TEXTUAL = re.compile(r"^(.+?)[\s,]+(?:pages?|pp?\.?)\s*(\d[\d\s,–-]*)$", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-z]+\b[^<>]*>", re.IGNORECASE)


def options(actions: Actions, guided: bool) -> Mapping[str, Any]:
    """Generation stops at the end of an action; vLLM is asked to leave the closing tag in, others may cut it off.

    Guided, and always in the turn that must answer, vLLM lets the model write nothing but such an action: told in words
    alone, a small model goes on searching (SmolLM2-135M answered in 2 of 24 such turns).
    """
    ends = {"stop": ["</search>", "</answer>"], "include_stop_str_in_output": True}
    must_answer = actions == ("answer",)
    if not guided and not must_answer:
        return ends
    choice = "|".join(_GUIDES[action] for action in actions)
    return ends | {"structured_outputs": {"regex": choice if must_answer else f"{_THOUGHT}({choice})"}}


def parse(completion: Completion) -> Step:
    """What the text means. Never raises."""
    raw = clean(with_reasoning(completion.reasoning, completion.raw_text))
    reasoning, text = split_reasoning(raw)
    found = _ACTION.search(text)
    if found is None:  # an action within the reasoning counts only when none follows it
        reasoning, text, found = None, raw, _ACTION.search(raw)
    if found is None:
        reasoning = split_reasoning(raw)[0] or raw.partition("<think>")[2].strip() or None
        return _not_understood(raw, raw, reasoning, Ask(None, "no_action", "neither <search> nor <answer> was written"))
    reasoning = reasoning or text[: found.start()].replace("<think>", "").replace("</think>", "").strip() or None
    name = found[1].lower()
    start = len(raw) - len(text) + found.end()
    close = _CLOSE[name].search(raw, start)
    body = raw[start : close.start() if close else len(raw)]
    if close is None and completion.finish_reason == "length":
        return _not_understood(
            raw, raw, reasoning, Ask(None, "unparsable_call", f"<{name}> was cut off before its end")
        )
    # A server that cuts the stop string off leaves the tag open; the conversation shows it closed, as it was meant.
    kept = raw[: close.end()] if close else f"{raw.rstrip()}</{name}>"
    if name == "search":
        query = one_line(_TAG.sub(" ", body))
        ask = Ask(query) if query else Ask(None, "empty_query", "there are no words in <search>")
        return Step(raw, _assistant(kept), reasoning, (ask,), read_by="parser")
    answer = read_answer(body)
    if not answer.texts:
        return _not_understood(raw, kept, reasoning, Ask(None, "bad_arguments", "there is nothing in <answer>"))
    return Step(raw, _assistant(kept), reasoning, (), answer, read_by="parser")


def read_answer(body: str) -> Answer:
    """Texts, one a line, and citations, as <cite file="x.pdf" page="3"/> or <cite>x.pdf page 3</cite>; also of several pages."""
    citations: list[Page] = []
    for attributes, inner in _CITE.findall(body):
        file, pages = _FILE.search(attributes), _PAGES.search(_FILE.sub("", attributes))
        textual = _TEXTUAL.match(inner.strip())
        if file and pages:
            name, said = file[1] or file[2] or "", pages[1] or pages[2] or pages[3] or ""
        elif textual:
            name, said = textual[1], textual[2]
        else:
            continue
        if name.strip():
            citations += [(name.strip(), number) for number in page_numbers(said)]
    lines = [one_line(line) for line in _TAG.sub("", _CITE.sub("", body)).splitlines()]
    return Answer(tuple(line for line in lines if line), tuple(dict.fromkeys(citations)))


def _not_understood(raw: str, kept: str, reasoning: str | None, ask: Ask) -> Step:
    return Step(raw, _assistant(kept), reasoning, (ask,))


def _assistant(content: str) -> WireMessage:
    return {"role": "assistant", "content": content}


def reply(step: Step, texts: Sequence[str]) -> list[WireMessage]:
    """Results and complaints come back as the user's message."""
    del step
    return [{"role": "user", "content": "\n\n".join(texts)}]


def _thought(reasoning: str | None) -> str:
    return f"<think>{reasoning}</think>\n" if reasoning else ""


def search(reasoning: str | None, query: str) -> WireMessage:
    """The message that a model is taught to search with."""
    return _assistant(f"{_thought(reasoning)}<search>{query}</search>")


def answer(reasoning: str | None, answer: Answer) -> WireMessage:
    """The message that a model is taught to answer with."""
    cites = "".join(f' <cite file="{file}" page="{page}"/>' for file, page in answer.citations)
    lines = "\n".join(answer.texts)
    return _assistant(f"{_thought(reasoning)}<answer>{lines}{cites}</answer>")


PROTOCOL = Protocol(SYSTEM, None, LAST_TURN, options, parse, reply, search, answer)
