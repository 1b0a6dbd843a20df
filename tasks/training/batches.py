"""Which examples share a batch, and how a batch is laid out so that hardly anything but real tokens is computed.

The whole training is planned beforehand, as a list of batches: a resumed run skips the first so many and is at the same
place.

Two ways, neither pads to a fixed length:

    length-grouped  batches of examples of like length, one a row, each row padded to the batch's longest. No attention mask
                    is needed: padding comes last, and no real token looks ahead.
    packing         batches drawn at random. Examples lie one behind the other in as few rows as is cheapest, each seeing
                    itself alone; the tokens that all of a batch begin with (the system prompt) are computed once a row, and
                    seen by all in it. What is computed for each example is what it would be alone.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

from tasks.training.examples import Example, shared_prefix

Plan = list[list[int]]
_WINDOW = 50  # batches that are sorted by length together: enough that neighbours are alike, few enough to stay random
_KNEE = 1024  # row length at which attention, quadratic in it, costs about what all the rest does (measured on a CPU)


def plan(lengths: Sequence[int], batch_size: int, batching: str, epochs: float, seed: int) -> Plan:
    """The batches of a whole training, as indexes of examples; a fraction of an epoch at the end is cut short.

    The same arguments give the same plan everywhere.
    """
    rng = random.Random(seed)
    batches: Plan = []
    for _ in range(math.ceil(epochs)):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        if batching == "length-grouped":
            window = _WINDOW * batch_size
            order = [
                index
                for start in range(0, len(order), window)
                for index in sorted(order[start : start + window], key=lambda i: lengths[i])
            ]
        epoch = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches[: math.ceil(len(batches) * epochs / math.ceil(epochs))]


def rows_of(lengths: Sequence[int], prefix: int) -> list[list[int]]:
    """Spread examples over rows so that rows × longest row × (1 + longest row / knee), the cost, is least.

    Args:
        lengths: tokens of each example.
        prefix: tokens at the beginning of every example that a row holds only once.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[list[int]] = []
    least = math.inf
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        fill = [prefix] * count
        for index in longest_first:
            row = fill.index(min(fill))
            rows[row].append(index)
            fill[row] += lengths[index] - prefix
        cost = count * max(fill) * (1 + max(fill) / _KNEE)
        if cost < least:
            best, least = rows, cost
    return best


def _arranged(examples: Sequence[Example], batching: str) -> tuple[int, list[list[int]], list[int]]:
    """Length of the shared beginning, the examples of each row, and the tokens in each row."""
    lengths = [len(example.ids) for example in examples]
    if batching == "length-grouped":
        return 0, [[i] for i in range(len(examples))], lengths
    prefix = shared_prefix([example.ids for example in examples])
    rows = rows_of(lengths, prefix)
    return prefix, rows, [prefix + sum(lengths[i] - prefix for i in row) for row in rows]


def size(examples: Sequence[Example], batching: str) -> tuple[int, int, int]:
    """Of one batch: tokens in its longest row, tokens that are computed, and how many of these are no padding."""
    _, _, fills = _arranged(examples, batching)
    return max(fills), len(fills) * max(fills), sum(fills)


def lay_out(examples: Sequence[Example], batching: str, dtype: Any) -> dict[str, Any]:
    """Tensors of one batch, R rows of T tokens with N tokens to learn.

    Returns:
        input_ids [R, T]; for packing, position_ids [R, T] and attention_mask [R, 1, T, T], added to the attention scores
        (0 where a token is seen); labels [N], the tokens to learn; positions [N], where in the flattened [R·T] each is
        predicted; weights [N].
    """
    import torch

    prefix, rows, fills = _arranged(examples, batching)
    width = max(fills)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.arange(width).repeat(len(rows), 1)
    owner = torch.full((len(rows), width), -1)  # which example a token is of; -1 the shared beginning, or padding
    labels: list[int] = []
    positions: list[int] = []
    weights: list[float] = []
    for r, row in enumerate(rows):
        input_ids[r, :prefix] = torch.tensor(examples[row[0]].ids[:prefix], dtype=torch.long)
        start = prefix
        for index in row:
            example = examples[index]
            end = start + len(example.ids) - prefix
            input_ids[r, start:end] = torch.tensor(example.ids[prefix:])
            position_ids[r, start:end] = torch.arange(prefix, len(example.ids))
            owner[r, start:end] = index
            for target in example.targets:
                before = target - 1
                positions.append(r * width + (before if before < prefix else start + before - prefix))
                labels.append(example.ids[target])
                weights.append(example.weight)
            start = end
    batch = {
        "input_ids": input_ids,
        "labels": torch.tensor(labels),
        "positions": torch.tensor(positions),
        "weights": torch.tensor(weights),
    }
    if batching == "packing":
        same = owner[:, :, None] == owner[:, None, :]
        seen = same | (torch.arange(width) < prefix)[None, None, :]
        seen &= torch.ones(width, width, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        batch |= {"position_ids": position_ids, "attention_mask": mask[:, None]}
    return batch
