"""Which items share a batch, and how a batch is laid out so that hardly anything but real tokens is computed.

The whole training is planned beforehand, as a list of batches: a resumed run skips the first so many and is at the same
place.

Two ways, neither pads to a fixed length:

    length-grouped  batches of items of like length, one example a row, each row padded to the batch's longest. No attention
                    mask is needed: padding comes last, and no real token looks ahead.
    packing         batches drawn at random, in as few rows as is cheapest. A row is a tree: examples that begin alike share
                    the tokens they begin with (the system prompt; the question, of which several queries are compared), and
                    each sees what it is made of alone. What is computed for each example is what it would be alone.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.training.examples import Example, Item
from tasks.training.sight import Sight, shown

Plan = list[list[int]]
_WINDOW = 50  # batches that are sorted by length together: enough that neighbours are alike, few enough to stay random
_KNEE = 1024  # row length at which attention, quadratic in it, costs about what all the rest does (measured on a CPU)


def plan(lengths: Sequence[int], batch_size: int, batching: str, epochs: float, seed: int) -> Plan:
    """The batches of a whole training, as indexes of items; a fraction of an epoch at the end is cut short.

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


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def tree(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """The order in which examples lie in a row, by index, and how many leading tokens each shares with the one before it.

    In lexical order, in which whatever an example shares with any earlier one it shares with the last.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].ids)
    before = [(), *(examples[i].ids for i in order)]
    return [(i, common(last, examples[i].ids)) for last, i in zip(before, order, strict=False)]


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(examples[i].ids) - shared for i, shared in tree(examples))


def rows_of(lengths: Sequence[int], prefix: int) -> list[list[int]]:
    """Spread items over rows so that rows × longest row × (1 + longest row / knee), the cost, is least.

    Args:
        lengths: tokens of each item.
        prefix: tokens at the beginning of every item that a row holds only once.
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


def _arranged(items: Sequence[Item], batching: str) -> list[list[int]]:
    """The examples of each row, by their place among the examples of all items."""
    starts = [0]
    for item in items:
        starts.append(starts[-1] + len(item.examples))
    if batching == "length-grouped":
        return [[i] for i in range(starts[-1])]
    sequences = [example.ids for item in items for example in item.examples]
    prefix = common(min(sequences), max(sequences))  # in lexical order: what these two share, all share
    rows = rows_of([_tokens(item.examples) for item in items], prefix)
    return [[i for item in row for i in range(starts[item], starts[item + 1])] for row in rows]


def with_image(items: Sequence[Item], sight: Sight) -> Sequence[Item]:
    """The items of a batch, showing one image at least.

    Where they show none, a white one stands behind the first example's last token: nothing that is learned looks at it, but what
    sees is computed, with a gradient of zero.
    """
    if any(shown(example.ids) for item in items for example in item.examples):
        return items
    first, *others = items[0].examples
    seeing = replace(first, ids=(*first.ids, *sight.blank()))
    return [replace(items[0], examples=(seeing, *others)), *items[1:]]


def size(items: Sequence[Item], batching: str) -> tuple[int, int, int]:
    """Of one batch: tokens in its longest row, tokens that are computed, and how many of these are no padding."""
    examples = [example for item in items for example in item.examples]
    fills = [_tokens([examples[i] for i in row]) for row in _arranged(items, batching)]
    return max(fills), len(fills) * max(fills), sum(fills)


def lay_out(items: Sequence[Item], batching: str, dtype: Any, sight: Sight | None = None) -> dict[str, Any]:
    """Tensors of one batch, R rows of T tokens with N tokens to learn.

    Args:
        sight: what the model makes of images, where the training set shows any.

    Returns:
        input_ids [R, T]; for packing, position_ids [R, T] and attention_mask [R, 1, T, T], added to the attention scores
        (0 where a token is seen); labels [N], the tokens to learn; positions [N], where in the flattened [R·T] each is
        predicted; owners [N], which example each is of, by its place among the examples of all items. With `sight`,
        position_ids are [4, R, T], and there is what `Sight.inputs` gives.
    """
    import torch

    examples = [example for item in items for example in item.examples]
    rows = _arranged(items, batching)
    width = max(_tokens([examples[i] for i in row]) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.arange(width).repeat(4 if sight else 1, len(rows), 1)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    labels: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    for r, row in enumerate(rows):
        path: list[int] = []  # where in the row each token of the example lies
        end = 0
        for i, shared in tree([examples[i] for i in row]):
            example = examples[row[i]]
            own = range(end, end + len(example.ids) - shared)
            path, start, end = [*path[:shared], *own], own.start, own.stop
            input_ids[r, start:end] = torch.tensor(example.ids[shared:])
            places = sight.positions(example.ids) if sight else torch.arange(len(example.ids))[None]
            position_ids[:, r, start:end] = places[:, shared:]
            seen[r, start:end, path] = torch.ones(len(own), len(path), dtype=torch.bool).tril(shared)
            positions += [r * width + path[target - 1] for target in example.targets]
            labels += [example.ids[target] for target in example.targets]
            owners += [row[i]] * len(example.targets)
    images = [number for row in input_ids.tolist() for number in shown(row)]
    batch = {
        "input_ids": input_ids.where(input_ids >= 0, sight.token_id) if sight else input_ids,
        "labels": torch.tensor(labels),
        "positions": torch.tensor(positions),
        "owners": torch.tensor(owners),
    }
    if batching == "packing":
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        batch |= {"position_ids": position_ids[0], "attention_mask": mask[:, None]}
    return batch | {"position_ids": position_ids} | dict(sight.inputs(images)) if sight else batch
