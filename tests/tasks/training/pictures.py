"""Rows that show page images, and what the model's own code makes of them."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image as Picture
from PIL import ImageDraw
from transformers import AutoImageProcessor, Qwen3VLProcessor

from tasks.agent.message import PLACEHOLDER, Image, chat_content, images_of
from tests.tasks.training.training_rows import row

SIZES = [(200, 260), (96, 64), (150, 150)]


def draw_pages(folder: Path) -> None:
    """The images of three pages: a black bar on white."""
    for number, size in enumerate(SIZES):
        picture = Picture.new("RGB", size, "white")
        ImageDraw.Draw(picture).rectangle((10, 10, 30 + 20 * number, 50), fill="black")
        picture.save(folder / f"{number}.png")


def page(number: int) -> Image:
    width, height = SIZES[number]
    return Image(file=f"{number}.pdf", page=1, key=f"{number}.png", width=width, height=height)


def shown(question: str, query: str, *pages: int, **values: Any) -> dict[str, Any]:
    """A row that has searched before, and was shown pages."""
    made = row(question, f"<search>{query}</search>", **values)
    found = "\n".join(f"[{n}] {n}.pdf page 1\n{PLACEHOLDER}" for n in pages)
    made["prompt"] += [
        {"role": "assistant", "content": "<search>pump</search>"},
        {"role": "user", "content": f"<results>\n{found}\n</results>", "images": [page(n) for n in pages]},
    ]
    return made


def own_log_p(
    network: Any, tokenizer: Any, model: Path, root: Path, prompt: list[dict[str, Any]], completion: str
) -> torch.Tensor:
    """Log-probabilities of a completion's tokens, the end of the turn included, behind a prompt with images.

    The model's own processor expands the images, and the model finds their positions by itself.
    """
    processor = object.__new__(Qwen3VLProcessor)  # its video half needs torchvision
    processor.image_processor, processor.tokenizer = AutoImageProcessor.from_pretrained(model), tokenizer
    messages = [{"role": m["role"], "content": chat_content(m)} for m in prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [Picture.open(root / image["key"]) for m in prompt for image in images_of(m)]
    pixels = dict(processor.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    for n in range(len(pictures)):
        tokens = int(pixels["image_grid_thw"][n].prod()) // 4
        text = text.replace("<|image_pad|>", "<|seen|>" * tokens, 1)
    before = tokenizer(text.replace("<|seen|>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
    learned = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*before, *learned]])
    kinds = (ids == network.config.image_token_id).int()
    with torch.no_grad():
        logits = network(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[0, len(before) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, ids[0, len(before) :], reduction="none")
