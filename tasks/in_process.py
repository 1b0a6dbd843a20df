"""Ask a model in this process, by transformers, one request at a time: no server is needed, and much speed is lost.

The prompt is the stored form of the conversation under the model's chat template, and its images, as in training. Of a
request, sampling, seed, stop strings and tools are honoured as a server does; what only guided decoding can force (an answer's
form, a certain tool) is left to the model. Nothing is parsed here: the raw text is all that comes back.

It lies in neither package that it joins: what is collected does not hang on how models are trained, nor the other way round.
"""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import config
from tasks.agent.completion import Complete, Completion, CompletionError, OpenConversation
from tasks.agent.message import Image, chat_content, images_of
from tasks.agent.protocol import as_stored
from tasks.agent.sampling import ResolvedSampling
from tasks.artifact import Artifact
from tasks.model import fetch_model
from tasks.training.adapted import load_adapted
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.sight import Sight, shown


def open_in_process(
    server: config.Server, adapter: Artifact | None, max_model_len: int | None, images_root: str | None = None
) -> OpenConversation:
    """Load `server.model`, with an adapter on it if one is given, on the GPU if there is one.

    Args:
        server: names the model, and says how long a request may take.
        max_model_len: tokens of prompt and answer at most; the model's own limit when None.
        images_root: storage root that page images lie below, where conversations show any.

    Raises:
        ConfigError: `fetch_model` or `load_adapted` refuses model or adapter.
        TrainingError: it is no causal language model with a chat template, or is to see images and is not of the Qwen-VL series.
    """
    import torch

    device, trusted = "cuda" if torch.cuda.is_available() else "cpu", server.trusted_remote_code
    folder, trust, bf16 = fetch_model(server.model, trusted), server.model in trusted, device == "cuda"
    sight = None if images_root is None else Sight(folder, images_root)
    if adapter:
        model = load_adapted(adapter, server.model, trusted, bf16=bf16)
    else:
        model = load_model(folder, bf16=bf16, trust_remote_code=trust)
    context = min((limit for limit in (max_model_len, server.context_length) if limit), default=None)
    running = _Running(model.to(device).eval(), load_tokenizer(folder, trust_remote_code=trust), context, sight)

    async def complete(
        messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], sampling: ResolvedSampling, seed: int
    ) -> Completion:
        given_up = threading.Event()
        try:
            async with asyncio.timeout(server.request_timeout):
                return await asyncio.to_thread(running.generate, messages, options, sampling, seed, given_up)
        except TimeoutError as error:
            raise CompletionError("deadline", f"no answer within {server.request_timeout:g} s") from error
        finally:
            given_up.set()  # the thread ends at its next token

    def conversation() -> Complete:
        return complete

    return conversation


class _Running:
    """A loaded model. Requests from several threads are answered one after the other."""

    def __init__(self, model: Any, tokenizer: Any, max_model_len: int | None, sight: Sight | None) -> None:
        self._sight = sight
        self._model, self._tokenizer, self._one_at_a_time = model, tokenizer, threading.Lock()
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context = min(limit for limit in (own, max_model_len, 2**31) if limit)
        ends = model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._ends = sorted({tokenizer.eos_token_id, *listed})

    def generate(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        sampling: ResolvedSampling,
        seed: int,
        given_up: threading.Event,
    ) -> Completion:
        """What the model writes next.

        Raises:
            CompletionError: the conversation does not fit the context, the chat template refuses it, or memory is short.
        """
        import torch

        started = time.perf_counter()
        prompt = self._prompt(messages, options.get("tools"))
        length = prompt["input_ids"].shape[1]
        room = self._context - length
        # an image gives way to the answer, as where a server is asked; where none is left, the answer is as long as it can be
        if room < (sampling.max_tokens if any(map(_shows_images, messages)) else 1):
            detail = f"the conversation has {length} tokens, the context length is {self._context}"
            raise CompletionError("http_status", detail, out_of_context=True)
        stops = list(options.get("stop", ()))
        # a token is a byte at least, so a stop string that has just ended lies within so many tokens
        reach = max((len(stop.encode()) for stop in stops), default=0)

        def over(ids: Any, scores: Any) -> Any:
            recent = self._text(ids[0, max(length, ids.shape[1] - reach) :]) if stops else ""
            ended = given_up.is_set() or any(stop in recent for stop in stops)
            return torch.tensor([ended], device=ids.device)

        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with self._one_at_a_time, torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            try:
                written = self._model.generate(
                    **prompt,
                    **self._drawing(sampling),
                    max_new_tokens=min(sampling.max_tokens, room),
                    eos_token_id=self._ends,
                    pad_token_id=self._tokenizer.pad_token_id or self._ends[0],
                    stopping_criteria=[over],
                )
            except torch.OutOfMemoryError as error:
                raise CompletionError("server_error", f"the GPU's memory is short for {length} tokens") from error
        ids = written[0, length:].tolist()
        text = self._text(ids)
        cut = _first_stop(text, stops, keep=bool(options.get("include_stop_str_in_output")))
        ended = cut is not None or bool(ids and ids[-1] in self._ends)
        return Completion(
            raw_text=text if cut is None else text[:cut],
            reasoning=None,
            tool_calls=(),
            finish_reason="stop" if ended else "length",
            prompt_tokens=length,
            completion_tokens=len(ids),
            latency_s=time.perf_counter() - started,
        )

    def _text(self, ids: Any) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Any:
        """The conversation as tensors, its images as the model is trained on them."""
        from jinja2 import TemplateError

        stored = [as_stored(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message["role"], "content": chat_content(message)} for message in stored],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            raise CompletionError("http_status", f"the chat template refuses the conversation: {error}") from error
        prompt = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        if images := [image for message in stored for image in images_of(message)]:
            assert self._sight
            prompt = _with_images(prompt["input_ids"][0].tolist(), images, self._sight)
        return {name: tensor.to(self._model.device) for name, tensor in prompt.items()}

    def _drawing(self, sampling: ResolvedSampling) -> dict[str, Any]:
        """How tokens are drawn, whatever the model's own generation settings say."""
        drawn: dict[str, Any] = {
            "do_sample": sampling.temperature > 0,
            "repetition_penalty": sampling.repetition_penalty,
        }
        if drawn["do_sample"]:
            drawn |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0}
        return drawn


def _shows_images(message: Mapping[str, Any]) -> bool:
    return bool(images_of(as_stored(message)))


def _with_images(ids: Sequence[int], images: Sequence[Image], sight: Sight) -> dict[str, Any]:
    """What the model is given of a prompt in which one token stands for each image."""
    import torch

    if ids.count(sight.token_id) != len(images):
        raise CompletionError("http_status", "a text of the conversation holds the token that stands for an image")
    tokens = iter([sight.tokens(image) for image in images])
    whole = [one for token in ids for one in (next(tokens) if token == sight.token_id else [token])]
    seen = torch.tensor([whole]) < 0
    return {
        "input_ids": torch.tensor([whole]).masked_fill(seen, sight.token_id),
        "attention_mask": torch.ones_like(seen, dtype=torch.long),
        "mm_token_type_ids": seen.int(),
        **sight.inputs(shown(whole)),
    }


def _first_stop(text: str, stops: Sequence[str], *, keep: bool) -> int | None:
    """Where the text ends: before the first stop string in it, or behind it; None when there is none.

    >>> _first_stop("<search>fees</search> and", ["</answer>", "</search>"], keep=True)
    21
    """
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return None
    at, stop = min(found)
    return at + len(stop) if keep else at
