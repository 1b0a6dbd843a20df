"""Batches: every example once an epoch, hardly any padding, and each example computed as if it were alone."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.training.batches import common, lay_out, plan, rows_of, size, tree
from tasks.training.examples import Example, Item
from tasks.training.loading import load_model, packs

BATCHING = st.sampled_from(["length-grouped", "packing"])
LENGTHS = st.lists(st.integers(2, 2000), min_size=1, max_size=60)


@given(
    lengths=LENGTHS, batch_size=st.integers(1, 9), batching=BATCHING, epochs=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_every_epoch_holds_every_example_once(
    lengths: list[int], batch_size: int, batching: str, epochs: int, seed: int
) -> None:
    made = plan(lengths, batch_size, batching, epochs, seed)
    assert made == plan(lengths, batch_size, batching, epochs, seed)
    each = math.ceil(len(lengths) / batch_size)
    assert len(made) == epochs * each
    for epoch in range(epochs):
        batches = made[epoch * each : (epoch + 1) * each]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert max(len(batch) for batch in batches) <= batch_size


@given(lengths=LENGTHS, epochs=st.floats(0.1, 3))
def test_a_part_of_an_epoch_is_the_beginning_of_a_longer_training(lengths: list[int], epochs: float) -> None:
    made = plan(lengths, 4, "length-grouped", epochs, 0)
    whole = plan(lengths, 4, "length-grouped", math.ceil(epochs), 0)
    assert made == whole[: len(made)]
    assert len(made) == pytest.approx(len(whole) * epochs / math.ceil(epochs), abs=1.001)


@pytest.mark.parametrize("batching", ["length-grouped", "packing"])
def test_each_epoch_and_each_seed_mixes_anew_and_short_batches_do_not_come_first(batching: str) -> None:
    lengths = list(range(200))
    made = plan(lengths, 4, batching, 2, 0)
    first, second, other = made[:50], made[50:], plan(lengths, 4, batching, 1, 1)
    assert first != second
    assert first != other
    if batching == "packing":  # whose batches are drawn, not only their order
        assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in (*second, *other)}
    longest = [max(lengths[i] for i in batch) for batch in first]
    assert longest != sorted(longest)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=6))
def test_a_row_holds_every_beginning_once(sequences: list[tuple[int, ...]]) -> None:
    placed = tree([Example(ids, ()) for ids in sequences])
    assert sorted(i for i, _ in placed) == list(range(len(sequences)))
    before: list[tuple[int, ...]] = []
    for i, shared in placed:
        assert shared == max((common(sequences[i], other) for other in before), default=0)
        before.append(sequences[i])
    beginnings = {ids[:n] for ids in sequences for n in range(1, len(ids) + 1)}
    assert sum(len(sequences[i]) - shared for i, shared in placed) == len(beginnings)


@given(lengths=st.lists(st.integers(2, 500), min_size=1, max_size=12), prefix=st.integers(0, 1))
def test_rows_hold_every_example_once(lengths: list[int], prefix: int) -> None:
    rows = rows_of(lengths, prefix)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(rows)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), batching=BATCHING)
def test_at_least_nine_tenths_of_what_is_computed_is_real(seed: int, batching: str) -> None:
    rng = random.Random(seed)
    system = tuple(range(150))
    examples = [Example(system + (1000 + i,) * int(rng.lognormvariate(3.5, 0.6) + 2), (1,)) for i in range(400)]
    made = plan([len(example.ids) for example in examples], 8, batching, 1, seed)
    sizes = [size([Item((examples[i],)) for i in batch], batching) for batch in made]
    assert sum(real for _, _, real in sizes) / sum(computed for _, computed, _ in sizes) >= 0.9


@pytest.fixture(scope="module")
def network(model: Path) -> Any:
    return load_model(model, bf16=False).eval()


_OTHERS = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "head_dim": 16},
    "lfm2": {"full_attn_idxs": [1]},
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("kind", _OTHERS)
def test_what_may_share_a_row_is_computed_as_if_alone(kind: str, length: int, tmp_path: Path) -> None:
    """And what may not would be computed otherwise, so that nothing is refused for nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 200}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **shape | _OTHERS[kind])
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    # the first half is shared, as a prompt is
    ids = [(*range(100, 100 + length // 2), *((7 * n + i) % 99 for i in range(length // 2))) for n in range(3)]
    items = [Item((Example(one, tuple(range(length // 2, length))),)) for one in ids]
    batch = lay_out(items, "packing", torch.float32)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        found = other(**inputs).logits.flatten(0, 1)[batch["positions"]]
        alone = [other(input_ids=torch.tensor([one])).logits[0][length // 2 - 1 : -1] for one in ids]
    apart = max((found[batch["owners"] == n] - one).abs().max().item() for n, one in enumerate(alone))
    assert packs(tmp_path, length) == (apart < 1e-4), apart


@pytest.mark.parametrize("kind", ["recurrent_gemma", "rwkv", "gpt_neo"])
def test_what_does_not_name_its_layers_but_has_others_than_full_attention_shares_no_row(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert not packs(tmp_path, 8)


@settings(max_examples=8, deadline=None)
@given(data=st.data(), batching=BATCHING, attention=st.sampled_from(["eager", "sdpa"]))
def test_logits_are_those_of_each_example_alone(network: Any, data: Any, batching: str, attention: str) -> None:
    import torch

    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prefix = tuple(rng.randrange(900) for _ in range(data.draw(st.integers(0, 20))))
    items = []
    for _ in range(data.draw(st.integers(1, 4))):
        question = prefix + tuple(rng.randrange(900) for _ in range(rng.randrange(30)))
        examples = []
        for _ in range(data.draw(st.integers(1, 3))):
            ids = question + tuple(rng.randrange(900) for _ in range(rng.randrange(2, 30)))
            examples.append(Example(ids, tuple(sorted(rng.sample(range(1, len(ids)), rng.randrange(1, len(ids)))))))
        items.append(Item(tuple(examples)))

    network.set_attn_implementation(attention)
    batch = lay_out(items, batching, torch.float32)
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        found = network(**inputs).logits.flatten(0, 1)[batch["positions"]]
        for owner, example in enumerate(example for item in items for example in item.examples):
            alone = network(input_ids=torch.tensor([example.ids])).logits[0]
            own = batch["owners"] == owner
            assert batch["labels"][own].tolist() == [example.ids[target] for target in example.targets]
            assert (found[own] - alone[[target - 1 for target in example.targets]]).abs().max() < 1e-4
    if batching == "packing":
        alone_sizes = sum(size([item], batching)[2] for item in items)
        assert size(items, batching)[2] <= alone_sizes <= sum(len(e.ids) for item in items for e in item.examples)
