"""Train a LoRA adapter by any method, as a program of its own: TRL's trainer and PEFT, on a CPU or on GPUs.

    python -m tasks.training.train --spec spec.json
    torchrun --nproc_per_node=2 -m tasks.training.train --spec spec.json

tasks/training/launch.py writes the spec, starts this (alone, or several by tasks/training/ranks.py) and stores what it leaves
in the spec's work_dir: adapter/ in PEFT's layout, and history.json, both written by the first process. Progress goes to
standard output as tasks/training/messages.py says; an error that the user can mend ends it with exit code 6. A signal ends
it at once: what is lost are the steps since the last checkpoint.

What is learned is the method's (tasks/training/method.py): the loss of an optimizer step is Σ weight · loss / n over its n units,
on all devices and accumulated batches. Three things make it fast: hardly anything but real tokens is computed, and what examples
share once (tasks/training/batches.py); the model's head, a large part of a small model, is computed for learned tokens alone; the
frozen weights are held in bfloat16.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PrinterCallback
from trl import SFTConfig

from tasks import watchdog
from tasks.agent.message import images_of
from tasks.artifact import read_rows
from tasks.config import Finetune
from tasks.errors import DragError, TrainingError
from tasks.training import batches, checkpoints, dpo, reward, sft
from tasks.training.examples import Item, Row
from tasks.training.loading import load_model, load_tokenizer, packs
from tasks.training.messages import tell
from tasks.training.method import Batch, Method
from tasks.training.parts import part_of
from tasks.training.peft_model import store, with_adapter
from tasks.training.sight import Sight
from tasks.training.spec import Spec, read_spec
from tasks.training.trainer import Record, Trainer, of_all_processes

METHODS: dict[str, Method] = {"sft": sft, "dpo": dpo, "reward": reward}
_CHECKPOINTING_FROM = 1_000_000_000  # parameters from which activations are recomputed where that is left open
DRIVER = Path("/dev/nvidiactl")  # there where NVIDIA's driver is


def train(spec: Spec) -> None:
    """Train the adapter that a spec describes, from its last checkpoint on, and leave it in the spec's work_dir.

    Raises:
        TrainingError: there is nothing to learn from, the loss is no number, or the strategy asks for more GPUs than there are.
    """
    settings = spec.settings
    if settings.strategy == "fsdp" and spec.world_size == 1:
        raise TrainingError(
            "strategy fsdp shards a model over processes: raise --processes-per-node, or take --strategy ddp"
        )
    method = METHODS[settings.method]
    tokenizer = load_tokenizer(spec.model, trust_remote_code=spec.trust_remote_code)
    rows = read_rows(spec.training_set)
    sight = Sight(Path(spec.model), spec.images_root) if _shows_images(rows) else None
    items = method.load(rows, tokenizer, settings, sight)
    if not items.train:
        raise TrainingError(
            f"nothing to learn from: of the rows, {items.set_aside or 'none is for training'} were set aside; collect more,"
            " raise --max-length, or choose another --mask-strategy or --weight-scheme"
        )
    lengths = [longest(item) for item in items.train]
    batching = settings.batching
    if batching == "packing" and not packs(
        spec.model, max(map(longest, [*items.train, *items.val])), trust_remote_code=spec.trust_remote_code
    ):
        batching = "length-grouped"
        if os.environ.get("RANK", "0") == "0":
            tell(warning="batching is length-grouped: packed, this model would compute examples otherwise than alone")
    plan = batches.plan(lengths, settings.batch_size, batching, settings.epochs, settings.seed)
    # Every process takes as many: what the first ones would be given again, they are given knowingly.
    plan += itertools.islice(itertools.cycle(tuple(plan)), -len(plan) % spec.world_size)
    measured_on = sorted(items.val, key=longest)
    val = [measured_on[i : i + settings.batch_size] for i in range(0, len(measured_on), settings.batch_size)]
    batched = [[items.train[i] for i in batch] for batch in plan]

    def computed(batch: Sequence[Item]) -> Sequence[Item]:
        # Shards are gathered by all processes together, those of what sees as well: so each has to see, whatever its batch.
        return batches.with_image(batch, sight) if sight and settings.strategy == "fsdp" else batch

    sizes = [batches.size(computed(batch), batching) for batch in batched]
    longest_row = max(width for width, _, _ in [*sizes, *(batches.size(computed(b), batching) for b in val)])

    base = load_model(
        spec.model,
        bf16=settings.bf16,
        longest_row=longest_row,
        quantize=settings.quantize,
        trust_remote_code=spec.trust_remote_code,
    )
    if sight:
        sight.bind(base)

    def lay_out(batch: Sequence[Item]) -> Batch:
        laid_out = batches.lay_out(computed(batch), batching, base.dtype, sight)
        return laid_out | method.terms(batch, laid_out, settings)

    large = base.num_parameters() >= _CHECKPOINTING_FROM
    recompute = settings.recompute == "on" or (settings.recompute == "auto" and large)
    arguments = _arguments(settings, spec.work_dir, recompute=recompute, images=sight is not None)
    trainer = Trainer(
        method,
        settings,
        model=with_adapter(base, settings, spec.start, scalar=method.SCALAR, images=sight is not None),
        args=arguments,
        # One row of the data set is one batch of the plan.
        train_dataset=Dataset.from_dict({"batch": plan}),
        data_collator=lambda rows: lay_out([items.train[i] for i in rows[0]["batch"]]),
        processing_class=tokenizer,
    )
    if settings.strategy == "fsdp" and not trainer.is_fsdp_enabled:  # accelerate says nothing and trains with DDP
        raise TrainingError("strategy fsdp shards a model over GPUs, and here is none: take --strategy ddp")
    print(f"process {arguments.process_index + 1} of {spec.world_size} on {arguments.device}", flush=True)
    if arguments.process_index == 0:
        warn_of_an_unused_gpu()
    trainer.remove_callback(PrinterCallback)  # `tell` is how progress is reported
    per_step = settings.gradient_accumulation * spec.world_size
    tokens = [sum(len(example.ids) for item in batch for example in item.examples) for batch in batched]
    tokens_by_step = [sum(tokens[: step * per_step]) for step in range(math.ceil(len(plan) / per_step) + 1)]
    trainer.add_callback(
        Record(
            spec.training,
            spec.checkpoints_uri,
            tokens_by_step,
            settings.epochs,
            _epoch_ends(settings.epochs, len(tokens_by_step) - 1),
            (lambda: method.metrics(measured_on, trainer.measure(val, lay_out))) if val else None,
        )
    )
    trainer.train(resume_from_checkpoint=_checkpoint(Path(arguments.output_dir), spec.training))
    adapter = spec.work_dir / "adapter"
    if trainer.accelerator.is_main_process:
        shutil.rmtree(adapter, ignore_errors=True)
    trainer.save_model(str(adapter))
    if trainer.accelerator.is_main_process:
        store(adapter, spec.base_name, scalar=method.SCALAR)
        all_tokens = sum(size[1] for size in sizes)
        real_tokens = sum(batches.size(batch, batching)[2] for batch in batched)
        learned = [example for batch in batched for item in batch for example in item.examples]
        facts = {
            "batching": batching,
            "examples": sum(item.count for item in items.train),
            "measured_on": sum(item.count for item in items.val),
            "set_aside": items.set_aside,
            "images": sight.count if sight else 0,
            "parts": sorted({part_of(n) for n, p in trainer.model.named_parameters() if p.requires_grad}),
            "steps": trainer.state.max_steps,
            "tokens": sum(tokens),
            "learned_tokens": sum(len(example.targets) for example in learned),
            "computed_tokens": all_tokens,
            "real_share": real_tokens / all_tokens,
            "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        }
        (spec.work_dir / "history.json").write_text(json.dumps({"facts": facts, "history": trainer.state.log_history}))


def warn_of_an_unused_gpu() -> None:
    """Tell the user where the host has a GPU and training does not take place on it.

    Raises:
        TrainingError: CUDA_VISIBLE_DEVICES names GPUs, and none of them is there.
    """
    if not DRIVER.exists() or torch.cuda.is_available():
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES", "").strip() not in ("", "-1"):
        raise TrainingError(
            f"PyTorch {torch.__version__} sees none of the GPUs that CUDA_VISIBLE_DEVICES names "
            f"({os.environ['CUDA_VISIBLE_DEVICES']}): name GPUs of this host, or install a build of PyTorch for CUDA"
        )
    tell(
        warning=f"PyTorch {torch.__version__} sees no GPU, though NVIDIA's driver is here: training takes place on the CPU. "
        "Where it is a build for CPUs (pip's index may be), install one for CUDA; else see whether the driver is old"
    )


def longest(item: Item) -> int:
    """Tokens of an item's longest example."""
    return max(len(example.ids) for example in item.examples)


def _shows_images(rows: Sequence[Row]) -> bool:
    said = (row.get(part) or () for row in rows for part in ("prompt", "completion", "chosen", "rejected"))
    return any(images_of(message) for messages in said for message in messages)


def _arguments(settings: Finetune, work_dir: Path, *, recompute: bool, images: bool) -> SFTConfig:
    """What TRL, transformers and accelerate are told.

    Args:
        recompute: activations are computed again in the backward pass rather than kept.
        images: some batches show images, and others may not, through which what sees learns nothing.
    """
    sharded = settings.strategy == "fsdp"
    return SFTConfig(
        output_dir=str(work_dir / "checkpoints"),
        num_train_epochs=1,  # the plan holds all of them
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        train_sampling_strategy="sequential",
        learning_rate=settings.lr,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        # Not accelerate's for FSDP: under that PEFT saves nothing of the layers, and dropout falls otherwise the second time.
        gradient_checkpointing=recompute,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,  # while one is written, the one before it still counts
        ddp_find_unused_parameters=images,
        fsdp=sharded or None,
        # Whole state dictionaries: a checkpoint is the adapter and its optimizer alone, and any machine reads it.
        fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"} if sharded else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _checkpoint(folder: Path, training: str) -> str | None:
    """The checkpoint that all processes go on from.

    Raises:
        TrainingError: machines that train together found different ones.
    """
    found = checkpoints.latest(folder, training)
    names = {path and path.name for path in of_all_processes(found)}
    if len(names) > 1:
        raise TrainingError(
            f"the machines go on from different checkpoints {names}: run the same command again on each"
        )
    return str(found) if found else None


def _epoch_ends(epochs: float, steps: int) -> set[int]:
    """The steps at which the epochs end, and the last one."""
    return {round(steps * epoch / epochs) for epoch in range(1, math.floor(epochs) + 1)} | {steps}


@record  # how an exception gets into the file that torchrun reads
def run(file: Path) -> int:
    """Train as a spec file says; returns the exit code. An error that the user can mend is told, any other is raised."""
    try:
        train(read_spec(file))
    except DragError as error:
        tell(error=str(error))
        return error.exit_code
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True, help="JSON file that tasks/training/spec.py describes")
    options = parser.parse_args(arguments)
    if torch.distributed.is_torchelastic_launched():
        watchdog.die_with_parent()
    return run(options.spec)


if __name__ == "__main__":
    sys.exit(main())
