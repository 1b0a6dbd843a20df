"""A tiny, randomly initialised Qwen3-VL: the real architecture, with its processor, in a folder in well under a second.

transformers reads and trains it, vLLM serves it with page images (its head sizes have CPU attention kernels). It sees
nothing and knows nothing, so tests use it for what must hold of any model of that architecture.
"""

import json
import subprocess
from pathlib import Path

from tests.tiny_model import CHAT_TEMPLATE, tiny_tokenizer

_VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_PATCH, _MERGE = 16, 2
_CONTENT = """\
{%- macro said(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}{%- for part in content %}
        {%- if part.type == 'text' %}{{- part.text }}{%- else %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endif %}
    {%- endfor %}{%- endif %}
{%- endmacro %}
"""


def tiny_vlm(folder: Path, *, seed: int = 0) -> Path:
    """Write the model, its tokenizer and its processor's configuration into `folder`, and return it.

    Two layers that read, two that see, of which the first also feeds a deepstack merger, as in the real ones.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _VISION_TOKENS})
    tokenizer.chat_template = _CONTENT + CHAT_TEMPLATE.replace("message.content", "said(message.content)").replace(
        "messages[0].content", "said(messages[0].content)"
    )
    ids = dict(zip(_VISION_TOKENS, tokenizer.convert_tokens_to_ids(_VISION_TOKENS), strict=True))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 1088,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "out_hidden_size": 128,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen = {"patch_size": _PATCH, "temporal_patch_size": 2, "merge_size": _MERGE}
    edges = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "Qwen3VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessor",
                "size": edges,
                **seen,
                **normal,
            }
        )
    )
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "Qwen3VLProcessor",
                "video_processor_type": "Qwen3VLVideoProcessor",
                "size": edges,
                **seen,
                **normal,
            }
        )
    )
    return folder


_ON_A_CPU = '''\
"""Found before any other module: torchvision's builds are made for CUDA, and import on a CPU once these are declared."""

import sys
from importlib.abc import MetaPathFinder


class _Declare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            from torch import library

            self.operators = vars(library)["Library"]("torchvision", "DEF")
            self.operators.define("nms(Tensor dets, Tensor scores, float threshold) -> Tensor")
            self.operators.define("qnms(Tensor dets, Tensor scores, float threshold) -> Tensor")
            self.operators.define(
                "roi_align(Tensor input, Tensor rois, float scale, int height, int width, int ratio, bool aligned) -> Tensor"
            )
            declared.append(self.operators)


declared = []
sys.meta_path.insert(0, _Declare())
'''


def torchvision_on_a_cpu(python: str, folder: Path) -> Path:
    """A folder for PYTHONPATH with a torchvision that `python` can import without a GPU; Qwen3-VL's processor wants one.

    On a machine with a GPU it is part of the serving environment, where torch and torchvision match.
    """
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "torchvision<0.30"]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "sitecustomize.py").write_text(_ON_A_CPU)
    return folder
