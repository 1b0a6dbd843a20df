"""Supervised finetuning of a LoRA adapter, as a program of its own: TRL's SFTTrainer and PEFT, on a CPU or a GPU.

    python -m tasks.training.sft --spec spec.json
    torchrun --nproc_per_node=2 -m tasks.training.sft --spec spec.json

tasks/training/launch.py writes the spec, starts this and stores what it leaves in the spec's work_dir: adapter/ in PEFT's
layout, and history.json. Progress goes to standard output, one JSON object a line: {"step", "total", "loss"}; an error that
the user can mend is {"error"}, with exit code 6.

The loss of an optimizer step is Σ weight · −log p(token) / N over its N learned tokens, on all devices and accumulated
batches. Three things make it fast: hardly anything but real tokens is computed (tasks/training/batches.py); the language
model's head, a large part of a small model, is computed for learned tokens alone; the frozen weights are held in bfloat16.
"""

import argparse
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tasks.artifact import read_rows
from tasks.config import Finetune
from tasks.errors import DragError, TrainingError
from tasks.training import batches, checkpoints
from tasks.training.examples import load_examples
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.spec import Spec, read_spec

_CHECKPOINTING_FROM = 1_000_000_000  # parameters from which activations are recomputed rather than kept


class Trainer(SFTTrainer):
    """SFTTrainer that takes laid-out batches, computes logits of learned tokens alone, and stops on a loss that is none."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_is_scaled_for_ga = True
        self._positions = torch.empty(0, dtype=torch.long)
        head = self.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[self._positions],))

    def get_batch_samples(self, *arguments: Any, **named: Any) -> tuple[list[Any], torch.Tensor]:
        """The batches of one optimizer step, and how many tokens they learn on all devices."""
        samples, _ = super().get_batch_samples(*arguments, **named)
        count = torch.tensor(sum(batch["labels"].numel() for batch in samples), device=self.accelerator.device)
        return samples, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This device's part of the step's loss; times the devices, since their gradients are averaged."""
        loss = self.token_losses(model, inputs).mul(inputs["weights"]).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes

    def token_losses(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """−log p of each learned token, [N]."""
        self._positions = inputs["positions"]
        of_model = {k: v for k, v in inputs.items() if k in ("input_ids", "position_ids", "attention_mask")}
        logits = model(**of_model, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float(), inputs["labels"], reduction="none")

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """One batch, forward and backward.

        Raises:
            TrainingError: the loss is no number.
        """
        loss = super().training_step(*arguments, **named)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate (--lr)"
            )
        return loss

    def mean_loss(self, prepared: list[dict[str, Any]]) -> float:
        """Mean −log p over the learned tokens of some batches, nothing learned."""
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in prepared:
                inputs = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
                total += self.token_losses(self.model, inputs).sum().item()
                count += inputs["labels"].numel()
        self.model.train()
        return total / count


class Record(TrainerCallback):
    """Reports each step, measures the loss where told, and seals checkpoints.

    What it records lies in the trainer's own history, which checkpoints carry: a resumed run's curve has no gap.
    """

    def __init__(
        self,
        tokens_by_step: list[int],
        epochs: float,
        measure_at: set[int],
        measure: Callable[[], float] | None,
        seal: Callable[[Path], None],
    ) -> None:
        self._tokens_by_step, self._epochs = tokens_by_step, epochs
        self._measure_at, self._measure, self._seal = measure_at, measure, seal
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the clock to the seconds that earlier, killed runs took."""
        self._started = time.monotonic() - max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Complete the step's record, and tell whoever started the training."""
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        state.log_history[-1] |= {
            "tokens": self._tokens_by_step[min(step, len(self._tokens_by_step) - 1)],
            "seconds": time.monotonic() - self._started,
            "epoch": self._epochs * step / state.max_steps,
        }
        if state.is_world_process_zero:
            tell(step=step, total=state.max_steps, loss=logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """At the end of each epoch, measure the loss on what is not learned from."""
        if self._measure and state.is_world_process_zero and state.global_step in self._measure_at:
            state.log_history.append({"step": state.global_step, "eval_loss": self._measure()})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint once every process has written its part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            self._seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def tell(**message: Any) -> None:
    """One line to whoever started this program."""
    print(json.dumps(message), flush=True)


def train(spec: Spec) -> None:
    """Train the adapter that a spec describes, from its last checkpoint on, and leave it in the spec's work_dir.

    Raises:
        TrainingError: there is nothing to learn from, or the loss is no number.
    """
    settings = spec.settings
    tokenizer = load_tokenizer(spec.model)
    examples = load_examples(read_rows(spec.training_set), tokenizer, settings)
    if not examples.train:
        raise TrainingError(
            f"nothing to learn from: of the rows, {examples.set_aside or 'none is for training'} were set aside; collect more,"
            " raise --max-length, or choose another --mask-strategy or --weight-scheme"
        )
    arguments = _arguments(settings, spec.work_dir)
    lengths = [len(example.ids) for example in examples.train]
    plan = batches.plan(lengths, settings.batch_size, settings.batching, settings.epochs, settings.seed)
    by_length = sorted(examples.val, key=lambda example: len(example.ids))
    val = [by_length[i : i + settings.batch_size] for i in range(0, len(by_length), settings.batch_size)]
    batched = [[examples.train[i] for i in batch] for batch in plan]
    sizes = [batches.size(batch, settings.batching) for batch in batched]
    longest_row = max(width for width, _, _ in [*sizes, *(batches.size(batch, settings.batching) for batch in val)])

    model = load_model(spec.model, bf16=settings.bf16, longest_row=longest_row)
    lay_out = functools.partial(batches.lay_out, batching=settings.batching, dtype=model.dtype)
    if model.num_parameters() >= _CHECKPOINTING_FROM:
        arguments.gradient_checkpointing = True
    trainer = Trainer(
        model=model,
        args=arguments,
        # One row of the data set is one batch of the plan.
        train_dataset=Dataset.from_dict({"batch": plan}),
        data_collator=lambda rows: lay_out([examples.train[i] for i in rows[0]["batch"]]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
        ),
    )
    trainer.remove_callback(PrinterCallback)  # `tell` is how progress is reported
    per_step = settings.gradient_accumulation * arguments.world_size
    tokens = [sum(len(example.ids) for example in batch) for batch in batched]
    tokens_by_step = [sum(tokens[: step * per_step]) for step in range(math.ceil(len(plan) / per_step) + 1)]
    trainer.add_callback(
        Record(
            tokens_by_step,
            settings.epochs,
            _epoch_ends(settings.epochs, len(tokens_by_step) - 1),
            (lambda: trainer.mean_loss([lay_out(batch) for batch in val])) if val else None,
            lambda folder: checkpoints.seal(folder, spec.training, spec.checkpoints_uri),
        )
    )
    checkpoint = checkpoints.latest(Path(arguments.output_dir), spec.training)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.accelerator.is_main_process:
        _save_adapter(trainer, spec.work_dir / "adapter", spec.base_name)
        computed = sum(size[1] for size in sizes)
        facts = {
            "examples": len(examples.train),
            "measured_on": len(examples.val),
            "set_aside": examples.set_aside,
            "steps": trainer.state.max_steps,
            "tokens": sum(tokens),
            "learned_tokens": sum(len(example.targets) for batch in batched for example in batch),
            "computed_tokens": computed,
            "real_share": sum(size[2] for size in sizes) / computed,
            "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        }
        (spec.work_dir / "history.json").write_text(json.dumps({"facts": facts, "history": trainer.state.log_history}))


def _arguments(settings: Finetune, work_dir: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(work_dir / "checkpoints"),
        num_train_epochs=1,  # the plan holds all of them
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        train_sampling_strategy="sequential",
        learning_rate=settings.lr,
        warmup_steps=0.03,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        gradient_checkpointing=False,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,  # while one is written, the one before it still counts
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _epoch_ends(epochs: float, steps: int) -> set[int]:
    """The steps at which the epochs end, and the last one."""
    return {round(steps * epoch / epochs) for epoch in range(1, math.floor(epochs) + 1)} | {steps}


def _save_adapter(trainer: Trainer, folder: Path, base_name: str) -> None:
    """PEFT's layout, the same bytes for the same training: no local path, no set in whatever order."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer.model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True, help="JSON file that tasks/training/spec.py describes")
    options = parser.parse_args(arguments)
    try:
        train(read_spec(options.spec))
    except DragError as error:
        tell(error=str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
