"""Merge a LoRA adapter into its base model, which any server then serves without knowing of LoRA."""

import shutil
from collections.abc import Collection

from tasks import folders
from tasks.artifact import Artifact, fetch_folder, provenance, write_folder
from tasks.model import model_fingerprint
from tasks.training.adapted import base_of, load_adapted
from tasks.training.loading import base_name, load_model, load_tokenizer, sees
from tasks.training.reader import as_classifier


def merge(adapter: Artifact, model: str, uri: str, trusted: Collection[str] = ()) -> Artifact:
    """Write base + adapter as one checkpoint (model/1), with the tokenizer, in the base's own precision.

    A reward model becomes one for sequence classification with one label, its score; of a base that sees, one that reads alone.

    Args:
        adapter: adapter/1 or reward-model/1.
        model: local folder or model hub name of its base.
        uri: folder to write to.
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: `load_adapted` refuses adapter or base.
        TrainingError: there is no such form of a reward model's base.
    """
    import torch
    from transformers import AutoConfig

    from tasks.training.peft_model import load_scorer

    base, trust = base_of(adapter, model, trusted), model in trusted
    known = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    precision = known.dtype or known.get_text_config().dtype or torch.float32  # Qwen3-VL says it of its text alone
    of_text = adapter.schema == "reward-model/1" and sees(known)
    # Added up in float32 and rounded once: adding in bfloat16 would lose most of the adapter.
    if of_text:
        whole = load_scorer(load_model(base, bf16=False, trust_remote_code=trust), fetch_folder(adapter))
    else:
        whole = load_adapted(adapter, model, trusted, bf16=False)
    merged = whole.merge_and_unload(safe_merge=True)
    tokenizer = load_tokenizer(base, trust_remote_code=trust)
    if of_text:
        merged = as_classifier(merged)
        merged.config.pad_token_id = tokenizer.pad_token_id  # how it finds the last token of a text among several
    merged = merged.to(precision)
    with folders.scratch("merge") as scratch:
        merged.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in () if of_text else base.glob("*processor_config.json"):  # how images are seen
            shutil.copy(file, scratch)
        facts = provenance({"adapter": adapter}, base_model=base_name(model), base_fingerprint=model_fingerprint(base))
        return write_folder(scratch, uri, "model/1", 1, facts)
