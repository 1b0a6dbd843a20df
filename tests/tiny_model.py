"""A tiny, randomly initialised Llama with a real tokenizer and a ChatML chat template, made in a folder in well under a second.

It is a whole checkpoint: transformers trains it, PEFT adapts it, vLLM serves it (its head size has a CPU attention kernel).
It knows nothing, so tests use it for what must hold of any model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tasks.artifact import Artifact, write_folder

# What the tokenizer's merges are learned from: enough for words of pages, questions and protocol tags to be a few tokens.
_TEXT = """
You search a collection of documents. Think first, then ask for pages with <search>words of the page</search>, and answer
with <answer>the answer</answer>. <think>The question names a warranty; the manual of the pump should say how long it
lasts.</think> What was the total revenue in the fiscal year 2021? Which page of the annual report shows the balance sheet,
the net income, and the number of employees? How many days after delivery can the contract be terminated in writing? The
supplier shall deliver the goods within thirty days. Maximum operating temperature, pressure, voltage, part number, serial
number. The committee approved the minutes of the last meeting on 12 March 2019. <tool_call>
{"name": "search_documents", "arguments": {"query": "warranty period of the pump"}}
</tool_call> <tool_response> file page_number rank score manual.pdf report.pdf contract.pdf datasheet.pdf </tool_response>
{"name": "provide_answer", "arguments": {"answer": ["24 months"], "citations": [{"file": "manual.pdf", "page": 3}]}}
"""

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nCall one as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def tiny_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (so any text goes in and comes out), with ChatML's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(
    folder: Path, *, hidden: int = 128, layers: int = 2, vocab_size: int = 1024, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Write the model and its tokenizer into `folder`, and return it. The same arguments give the same weights.

    Args:
        hidden: width of the model, a multiple of 64 (the head size).
        vocab_size: rows of the embedding, which may be more than the tokenizer has tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(min(vocab_size, 1024))
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(model: Path, folder: Path, lora: Mapping[str, Any], **facts: Any) -> Artifact:
    """An untrained LoRA adapter of a model, stored below `folder` with `facts` as its provenance."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=8, **lora))
    adapted.save_pretrained(folder / "adapter")
    return write_folder(folder / "adapter", str(folder / "stored"), "adapter/1", 1, facts)
