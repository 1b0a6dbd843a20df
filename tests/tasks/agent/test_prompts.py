"""One source of prompts, and the same bytes under a chat template whether a conversation is served or trained on."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from tasks import config
from tasks.agent.completion import Completion, ToolCall
from tasks.agent.prompts import (
    PROTOCOLS,
    prompt_fingerprint,
    prompt_messages,
    refuse_other_conversations,
    search_message,
    told_by,
    tool_definitions,
    wire_prompt,
)
from tasks.agent.protocol import as_stored
from tasks.errors import ConfigError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tool calls and tool results in the form that Hermes and Qwen models were trained on.
HERMES = """{%- if tools %}{{- '<|im_start|>system\\n' + messages[0].content + '\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif not (loop.first and tools) %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

AGENTS = [config.Agent(protocol=p, examples=e) for p in ("tags", "tools") for e in (False, True)]


def rendered(messages: list[Any], tools: list[Any] | None, template: str) -> str:
    """As a server does it: arguments are parsed before the template writes them."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    texts, _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=True)
    return texts[0]


@pytest.mark.parametrize("agent", AGENTS)
def test_prompt_ends_with_the_question_and_is_the_same_served_and_trained_on(agent: config.Agent) -> None:
    tools = tool_definitions(agent)
    stored = prompt_messages("Où?", agent)
    assert stored[-1]["role"] == "user"
    assert stored[-1]["content"].endswith("Où?")
    assert all(set(message) == {"role", "content"} for message in stored)
    trained = rendered(stored, None if tools is None else json.loads(json.dumps(tools)), HERMES)
    assert rendered(wire_prompt("Où?", agent), tools, HERMES) == trained


def test_fingerprint_is_of_what_the_model_is_told() -> None:
    assert len({prompt_fingerprint(agent) for agent in AGENTS}) == len(AGENTS)
    same = config.Agent(protocol="tags", max_iterations=9, top_k=7)
    assert prompt_fingerprint(same) == prompt_fingerprint(config.Agent(protocol="tags"))


@pytest.mark.parametrize("name", ["image_dpi", "image_min_pixels", "image_max_pixels", "image_max_bytes"])
def test_images_of_another_size_are_another_conversation_to_who_sees_them(name: str) -> None:
    seeing, reading = (config.Agent(observation=observation) for observation in ("image", "text"))
    other = {name: getattr(seeing, name) + 1}
    with pytest.raises(ConfigError, match=f"collected with {name}"):
        refuse_other_conversations({**seeing.model_dump(), **other}, seeing)
    refuse_other_conversations({**reading.model_dump(), **other}, reading)
    assert told_by(seeing) != told_by(seeing.model_copy(update=other))
    assert told_by(reading) == told_by(reading.model_copy(update=other))


@pytest.mark.parametrize("agent", AGENTS)
def test_what_a_model_is_taught_to_write_is_read_as_that_search(agent: config.Agent) -> None:
    text = search_message("why", "net income", agent)["content"]
    step = PROTOCOLS[agent.protocol].parse(Completion(text, None, (), "stop", 1, 1, 0.0))
    assert (step.queries, step.reasoning) == (["net income"], "why")


ARGUMENTS = st.fixed_dictionaries({"query": st.text(min_size=1, max_size=12)}, optional={"n": st.integers()})


@settings(max_examples=100, deadline=None)
@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.text(max_size=8), st.none() | st.text(max_size=8), st.booleans())
def test_a_turn_of_tool_calls_is_the_same_served_and_trained_on(
    arguments: list[Any], text: str, reasoning: str | None, compact: bool
) -> None:
    agent = config.Agent(protocol="tools")
    separators = (",", ":") if compact else None
    calls = [
        ToolCall(f"c{n}", "search_documents", json.dumps(a, separators=separators)) for n, a in enumerate(arguments)
    ]
    protocol = PROTOCOLS["tools"]
    step = protocol.parse(Completion(text, reasoning, tuple(calls), "tool_calls", 1, 1, 0.0))
    wire = [*wire_prompt("q", agent), step.message, *protocol.reply(step, [f"seen {n}" for n in range(len(step.asks))])]
    tools = tool_definitions(agent)
    assert rendered([as_stored(message) for message in wire], tools, HERMES) == rendered(wire, tools, HERMES)


def test_tags_are_the_same_under_any_template() -> None:
    agent = config.Agent(protocol="tags", examples=True)
    assert rendered(wire_prompt("q", agent), None, CHATML) == rendered(prompt_messages("q", agent), None, CHATML)
