"""The parts of a model that LoRA may adapt: what reads and writes, what sees, and what joins the two.

    language  the layers of the language model; of a model that only reads, every linear module
    merger    what brings an image's features into the language model's width (merger, deepstack mergers, projector)
    vision    the tower that sees: its blocks, not how it cuts an image into patches

Heads and embeddings are adapted in none. Servers have ignored adapters of what sees without a word: tasks/adapters.py checks it.
"""

import re
from collections.abc import Collection
from typing import Any

from tasks.config import Finetune, Part
from tasks.errors import TrainingError
from tasks.training.loading import sees

# how models name what sees images, and what joins it to the language model
_TOWERS = ("visual", "vision_tower", "vision_model", "image_tower")
_MERGERS = ("merger", "deepstack_merger_list", "connector", "multi_modal_projector", "mm_projector")
SEEING = frozenset((*_TOWERS, *_MERGERS))

_MERGER, _TOWER = (rf"({'|'.join(names)})\." for names in (_MERGERS, _TOWERS))
_WHERE: dict[Part, str] = {
    "language": r"(.*\.)?language_model\..*",
    "merger": rf"(.*\.)?{_MERGER}.*",
    "vision": rf"(?!(.*\.)?({_MERGER}|patch_embed\.))(.*\.)?{_TOWER}.*",
}


def part_of(name: str) -> Part:
    """The part that a module or parameter belongs to, by its name in a model that sees; what is in no other is language."""
    return next((part for part in ("merger", "vision") if re.match(_WHERE[part], name)), "language")


def adapted(model: Any, settings: Finetune, *, images: bool) -> set[Part]:
    """The parts that are to be adapted. What sees learns nothing where no image is shown, and is then left alone.

    Raises:
        TrainingError: none is left.
    """
    chosen: set[Part] = {part for part in settings.parts if part == "language" or (images and sees(model.config))}
    if not chosen:
        raise TrainingError(
            f"parts {', '.join(settings.parts)} learn nothing from a training set without images: add language"
        )
    return chosen


def lora_modules(model: Any, parts: Collection[Part]) -> dict[str, Any]:
    """Which modules LoRA adapts, as PEFT's LoraConfig takes it: every linear one of some parts."""
    import torch

    if not sees(model.config):
        return {"target_modules": "all-linear"}
    wanted = "|".join(_WHERE[part] for part in sorted(parts))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    # A number names layers too, and says no more than with the name before it.
    ends = re.compile(r"[^.]+(\.\d+)*$")
    names = {match.group() for name in linear if re.fullmatch(wanted, name) and (match := ends.search(name))}
    return {"target_modules": sorted(names), "exclude_modules": rf"(?!(?:{wanted})$).*"}


def learning_rate(part: Part, settings: Finetune) -> float:
    """A part's peak learning rate."""
    factors: dict[Part, float] = {"merger": settings.merger_lr_factor, "vision": settings.vision_lr_factor}
    return settings.lr * factors.get(part, 1.0)
