"""Score search queries with a trained reward model."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from tasks.agent.message import scored_query
from tasks.artifact import Artifact, fetch_folder
from tasks.training.adapted import base_of
from tasks.training.batches import lay_out
from tasks.training.examples import Item
from tasks.training.loading import load_model, load_tokenizer, packs
from tasks.training.reward import example_of

_BATCH = 16  # queries computed at once

Score = Callable[[Sequence[tuple[str, str]]], list[float]]
"""(question, query), … → the score of each; the higher, the better its rank is thought to be."""


def open_scorer(reward_model: Artifact, model: str, trusted: Collection[str] = ()) -> Score:
    """Load a reward model, onto the GPU where there is one.

    Args:
        reward_model: reward-model/1.
        model: local folder or model hub name of its base.
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: as `tasks.training.adapted.base_of`.
    """
    import torch

    from tasks.training.peft_model import load_scorer

    base, trust = base_of(reward_model, model, trusted), model in trusted
    tokenizer = load_tokenizer(base, trust_remote_code=trust)
    on_gpu = torch.cuda.is_available()
    network = load_scorer(load_model(base, bf16=on_gpu, trust_remote_code=trust), fetch_folder(reward_model))
    network.to("cuda" if on_gpu else "cpu")

    @torch.no_grad()
    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        items = [Item((example_of(scored_query(question, query), tokenizer),)) for question, query in pairs]
        found = [0.0] * len(items)
        # alike ones together: they share a beginning
        order = sorted(range(len(items)), key=lambda i: items[i].examples[0].ids)
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            together = [items[i] for i in places]
            longest = max(len(item.examples[0].ids) for item in together)
            batching = "packing" if packs(base, longest, trust_remote_code=trust) else "length-grouped"
            batch = lay_out(together, batching, network.dtype)
            inputs: dict[str, Any] = {
                name: batch[name].to(network.device)
                for name in ("input_ids", "position_ids", "attention_mask")
                if name in batch
            }
            scores = network(**inputs, use_cache=False).logits.flatten()[batch["positions"].to(network.device)]
            for owner, value in zip(batch["owners"].tolist(), scores.tolist(), strict=True):
                found[places[owner]] = value
        return found

    return score
