"""How fast our trainer learns, against TRL's SFTTrainer and DPOTrainer with their defaults on the same data and the same model.

    python -m tests.bench.bench_finetune [--quick]
    DRAG_BENCH_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct python -m tests.bench.bench_finetune

Without DRAG_BENCH_MODEL it makes a randomly initialised Llama with a vocabulary of 49,152, whose layers are smaller than
SmolLM2's. The examples are questions of 5 to 40 words behind the agent's own system prompt, and short queries. Ours and the
peer take turns; of each round the first steps, which also pay for what is loaded once, are left out. Both train LoRA of the
same rank on all linear layers, with the same batch size and bfloat16 autocast. Tokens are counted as the examples have them,
so that what packing saves by computing a shared beginning once counts as speed, and not as tokens. For DPO pairs are counted: a
question has five queries, which make ten pairs.

About three minutes on two cores; --quick, one.
"""

import json
import os
import random
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from tasks.agent.prompts import prompt_fingerprint, prompt_messages, search_message
from tasks.artifact import Artifact, read_rows, table_of, write_table
from tasks.config import Agent, Finetune
from tasks.model import fetch_model
from tests.bench import harness
from tests.tiny_model import tiny_model

AGENT = Agent(protocol="tags")
WARM = 2  # steps that are left out
_PAIRS = 10  # of a question's five queries
_WORDS = ("revenue", "income", "report", "warranty", "pump", "contract", "delivery", "annual", "voltage", "meeting")


def run(quick: bool = False) -> list[harness.Row]:
    """Measure; one row a number."""
    steps, rounds = (6, 1) if quick else (8, 3)
    settings = Finetune(epochs=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        name = os.environ.get("DRAG_BENCH_MODEL")
        model = fetch_model(name) if name else tiny_model(folder / "model", hidden=384, layers=6, vocab_size=49152)
        training_set = _training_set(folder, steps * settings.batch_size)
        peer: list[float] = []
        ours: dict[str, list[float]] = {"length-grouped": [], "packing": []}
        real: dict[str, float] = {}
        pairs = _pairs(folder, steps)
        preferring = settings.model_copy(update={"method": "dpo", "batch_size": 1})
        ours_dpo: list[float] = []
        peer_dpo: list[float] = []
        for _ in range(rounds):
            seconds = _time_ours(pairs, model, preferring, folder / "ours")[0]
            ours_dpo.append(_PAIRS * (steps - WARM) / seconds)
            seconds = _time_peer(pairs, model, preferring.model_copy(update={"batch_size": _PAIRS}), folder / "peer")
            peer_dpo.append(_PAIRS * (steps - WARM) / seconds)
            seconds = _time_peer(training_set, model, settings, folder / "peer")
            peer.append(_tokens(training_set, model) * (steps - WARM) / steps / seconds)
            for batching in ours:
                chosen = settings.model_copy(update={"batching": batching})
                seconds, tokens, real[batching] = _time_ours(training_set, model, chosen, folder / "ours")
                ours[batching].append(tokens / seconds)
    trl = statistics.median(peer)
    rows = []
    for batching, speeds in ours.items():
        speed = statistics.median(speeds)
        rows.append(harness.row(f"finetune, {batching}, against TRL's SFTTrainer", speed, trl, "≥ 1.0", "tokens/s"))
        rows.append(harness.row(f"computed tokens that are real, {batching}", real[batching], 1.0, "≥ 0.9", "share"))
    speed, trl = statistics.median(ours_dpo), statistics.median(peer_dpo)
    rows.append(harness.row("finetune, DPO, against TRL's DPOTrainer", speed, trl, "≥ 1.0", "pairs/s"))
    return rows


def _training_set(folder: Path, count: int) -> Artifact:
    """Questions and queries as sft_best has them."""
    draw = random.Random(0)
    rows = []
    for n in range(count):
        words = draw.choices(_WORDS, k=draw.randint(5, 40))
        rows.append(
            {
                "question_id": f"q{n}",
                "split": "train",
                "format": "sft_best",
                "prompt": prompt_messages(f"What does the report say about {' '.join(words)}?", AGENT),
                "completion": [search_message(None, " ".join(words[: draw.randint(3, 6)]), AGENT)],
                "tools": None,
                "rank_score": 1.0,
                "effort": 1.0,
                "gt_rank": 1,
                "prompt_fingerprint": prompt_fingerprint(AGENT),
            }
        )
    return write_table(table_of(rows, "sft/2"), str(folder / "sft.parquet"), "sft/2", {})


def _pairs(folder: Path, count: int) -> Artifact:
    """All pairs of five queries for each question, as dpo has them."""
    draw = random.Random(0)
    rows = []
    for n in range(count):
        words = draw.choices(_WORDS, k=draw.randint(8, 40))
        queries = [search_message(None, f"{n} {' '.join(words[k : k + 4])}", AGENT) for k in range(5)]
        for (i, better), (j, worse) in combinations(enumerate(queries), 2):
            rows.append(
                {
                    "question_id": f"q{n}",
                    "split": "train",
                    "prompt": prompt_messages(f"What does the report say about {' '.join(words)}?", AGENT),
                    "chosen": [better],
                    "rejected": [worse],
                    "tools": None,
                    "chosen_score": 1 - i / 5,
                    "rejected_score": 1 - j / 5,
                    "rank_score": 1 - i / 5,
                    "effort": 1.0,
                    "gt_rank": 1,
                    "prompt_fingerprint": prompt_fingerprint(AGENT),
                }
            )
    return write_table(table_of(rows, "dpo/3"), str(folder / "dpo.parquet"), "dpo/3", {})


def _time_ours(training_set: Artifact, model: Path, settings: Finetune, work_dir: Path) -> tuple[float, float, float]:
    """Seconds and tokens of all steps but the first, and the share of computed tokens that are real."""
    from tasks.training.spec import Spec
    from tasks.training.train import train

    with tempfile.TemporaryDirectory(dir=work_dir.parent) as scratch:
        train(Spec("bench", training_set, str(model), "bench", False, settings, Path(scratch), 1, None))
        left = json.loads((Path(scratch) / "history.json").read_text())
    steps = [entry for entry in left["history"] if "loss" in entry]
    first, last = steps[WARM - 1], steps[-1]
    return last["seconds"] - first["seconds"], last["tokens"] - first["tokens"], left["facts"]["real_share"]


def _tokens(training_set: Artifact, model: Path) -> int:
    """Tokens of a training set's conversations."""
    from tasks.training.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    texts = [
        tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in read_rows(training_set)
    ]
    return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def _time_peer(training_set: Artifact, model: Path, settings: Finetune, work_dir: Path) -> float:
    """Seconds that TRL's trainer takes for all steps but the first, as its documentation starts it, on the same conversations."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    of_dpo = settings.method == "dpo"
    columns = ("prompt", "chosen", "rejected") if of_dpo else ("prompt", "completion")
    said = [{column: [_plain(m) for m in row[column]] for column in columns} for row in read_rows(training_set)]
    clock = Clock()
    trainer_of, config_of = (DPOTrainer, DPOConfig) if of_dpo else (SFTTrainer, SFTConfig)
    trainer = trainer_of(
        model=str(model),
        args=config_of(
            output_dir=str(work_dir),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(said),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    return clock.ends[-1] - clock.ends[WARM - 1]


def _plain(message: dict[str, Any]) -> dict[str, str]:
    """A message as others than we know it."""
    return {"role": message["role"], "content": message["content"]}


if __name__ == "__main__":
    harness.main(__doc__, run)
