"""The model that is trained: a base model with a LoRA adapter, and a scalar head where scores are learned.

The adapter is new, or one that an earlier training made; of that one a frozen copy stays beside it, as what training started
from. A reward model's adapter is stored as one of PEFT's for sequence classification, head and all, so that

    AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)

loads it where transformers has the base model in that form.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tasks.artifact import Artifact, fetch_folder
from tasks.config import LORA_SHAPE, Finetune, Part
from tasks.errors import TrainingError
from tasks.training.parts import adapted, lora_modules, part_of

LEARNED, REFERENCE = "default", "reference"  # names of adapters in a model
_HEAD, _STORED_HEAD = "lm_head", "score"


class ScoreHead(torch.nn.Linear):
    """One number for a hidden state, in float32 also where the rest is bfloat16, which has few numbers to order by."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.weight.float())


def give_score_head(model: Any) -> None:
    """Put a scalar head, small and random, in the place of the vocabulary's."""
    width = model.get_output_embeddings().in_features
    head = ScoreHead(width, 1, bias=False, device=model.device)
    torch.nn.init.normal_(head.weight, std=0.02)
    model.set_output_embeddings(head)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def with_adapter(
    model: Any, settings: Finetune, start: Artifact | None, *, scalar: bool, images: bool = False
) -> PeftModel:
    """A base model with an adapter to be trained.

    Args:
        start: an adapter to go on from; it stays beside as REFERENCE. What it has of other parts than those that are to be
            adapted is kept, and learns nothing.
        scalar: the model gives scores.
        images: the training set shows some.

    Raises:
        TrainingError: the settings want LoRA of another shape than that of `start`, or of parts that it does not have.
    """
    torch.manual_seed(settings.seed)
    if start is None:
        if scalar:
            give_score_head(model)
        lora = LoraConfig(
            task_type=None if scalar else "CAUSAL_LM",
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            modules_to_save=[_HEAD] if scalar else None,
            **lora_modules(model, adapted(model, settings, images=images)),
        )
        return get_peft_model(model, lora)
    folder = fetch_folder(start)
    kept = json.loads((folder / "adapter_config.json").read_text())
    for name, key in LORA_SHAPE.items():
        if getattr(settings, name) != kept[key]:
            raise TrainingError(
                f"the adapter to start from has {name} {kept[key]}, the settings {getattr(settings, name)}: set {name} "
                f"to {kept[key]}"
            )
    made = PeftModel.from_pretrained(model, folder, LEARNED, is_trainable=True)
    made.load_adapter(folder, REFERENCE)
    learn_only(made, _of_start(made, settings, adapted(model, settings, images=images)))
    return made


def learn_only(model: Any, parts: Collection[Part]) -> None:
    """Freeze what the adapter has of other parts of the model."""
    for name, parameter in model.named_parameters():
        if f".{LEARNED}." in name and part_of(name) not in parts:
            parameter.requires_grad_(False)


def _of_start(model: Any, settings: Finetune, wanted: set[Part]) -> set[Part]:
    """The parts that are learned of an adapter that is gone on from.

    Those that the settings name by default are learned where it has them; any other choice is what somebody asked for.
    """
    has = {part_of(name) for name, _ in model.named_parameters() if f".{LEARNED}." in name}
    missing = wanted - has
    if missing and (not wanted & has or settings.parts != Finetune.model_fields["parts"].default):
        raise TrainingError(
            f"the adapter to start from has no LoRA of {', '.join(sorted(missing))}, only of {', '.join(sorted(has))}: choose "
            "parts among these, or start from the base model"
        )
    return wanted & has


def load_scorer(model: Any, folder: Path) -> PeftModel:
    """A base model and its stored reward model's adapter, ready to score; one score where a token would be predicted."""
    give_score_head(model)
    lora = LoraConfig.from_pretrained(folder)
    lora.task_type, lora.modules_to_save = None, [_HEAD]
    return PeftModel.from_pretrained(
        model, folder, config=lora, key_mapping={rf"^{_STORED_HEAD}\.": f"{_HEAD}."}
    ).eval()


def store(folder: Path, base_name: str, *, scalar: bool) -> None:
    """Make what PEFT saved what is kept: the same bytes for the same training; no local path, no set in whatever order."""
    from safetensors.torch import load_file, save_file

    (folder / "README.md").unlink()  # PEFT's template; the card is written once all is known
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    if scalar:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [_STORED_HEAD]}
        tensors = folder / "adapter_model.safetensors"
        renamed = {name.replace(f".{_HEAD}.", f".{_STORED_HEAD}."): t for name, t in load_file(tensors).items()}
        save_file(renamed, tensors, metadata={"format": "pt"})
    file.write_text(json.dumps(config, indent=2, sort_keys=True))
