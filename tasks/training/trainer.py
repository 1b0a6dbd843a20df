"""How TRL's trainer is made ours: laid-out batches, a method's own loss, a record of each step, checkpoints that survive kills.

Everything here holds for one process, for several that each have the model (DDP), and for several among which its parameters
are sharded (FSDP2): there every forward pass is one of all processes together, so none may make one alone.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import use_adapter

from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.training import checkpoints
from tasks.training.examples import Item
from tasks.training.messages import tell
from tasks.training.method import Batch, Columns, Method
from tasks.training.parts import learning_rate, part_of
from tasks.training.peft_model import LEARNED, REFERENCE, learn_only

_WARMUP_SHARE = 0.03  # of the steps, in which the learning rate rises
_OF_MODEL = ("input_ids", "position_ids", "attention_mask", "pixel_values", "image_grid_thw")


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of a step, from 0, of so many: a share of its peak, above 0 in each.

    >>> [round(share_of_peak(step, 100), 2) for step in (0, 1, 2, 3, 4, 99)]
    [0.25, 0.5, 0.75, 1.0, 0.99, 0.01]
    """
    rising = int(steps * _WARMUP_SHARE)
    return min((step + 1) / (rising + 1), (steps - step) / (steps - rising))


class Trainer(SFTTrainer):
    """SFTTrainer that takes laid-out batches, computes logits of learned tokens alone, learns what a method says, and stops on a
    loss that is none."""

    def __init__(self, method: Method, settings: Finetune, *, model: Any, **arguments: Any) -> None:
        learned = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(model=model, **arguments)
        for name, parameter in self.model.named_parameters():
            # TRL rounds what learns beside four-bit weights to bfloat16, in which steps that are small beside a weight are lost.
            if name in learned and parameter.dtype != learned[name].dtype:
                parameter.data = learned[name].to(parameter.device)
        self.loss_is_scaled_for_ga = True
        self._method, self._settings = method, settings
        self._parts = {part_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._positions = torch.empty(0, dtype=torch.long)
        head = self.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[self._positions],))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The usual optimizer, each part of the model with a learning rate of its own."""
        if getattr(self, "optimizer", None) is None:
            learned: dict[float, list[torch.nn.Parameter]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    learned.setdefault(learning_rate(part_of(name), self._settings), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            groups = [{"params": parameters, "lr": lr} for lr, parameters in sorted(learned.items())]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate rises to its peak, then falls in a straight line; transformers' own schedules begin with a step of 0,
        with which a training of one step learns nothing."""
        if getattr(self, "lr_scheduler", None) is None:
            rate = functools.partial(share_of_peak, steps=num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def get_batch_samples(self, *arguments: Any, **named: Any) -> tuple[list[Any], torch.Tensor]:
        """The batches of one optimizer step, and how many units they learn on all devices."""
        samples, _ = super().get_batch_samples(*arguments, **named)
        count = torch.tensor(sum(batch["weights"].numel() for batch in samples), device=self.accelerator.device)
        return samples, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This device's part of the step's loss; times the devices, since their gradients are averaged."""
        loss = self._columns(model, inputs)["loss"].mul(inputs["weights"]).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes

    def _columns(self, model: Any, inputs: Batch) -> Columns:
        """What the method computes of a batch."""
        logits = self._logits(model, inputs)
        # Not before: FSDP looks at its first pass which parameters learn, and the reference has none.
        reference = self._reference_logits(inputs) if self._method.REFERENCE else None
        return self._method.columns(logits, inputs, self._settings, reference)

    def _logits(self, model: Any, inputs: Batch) -> torch.Tensor:
        """What the model says where each learned token is predicted, [N, width of its head]."""
        self._positions = inputs["positions"]
        of_model = {name: inputs[name] for name in _OF_MODEL if name in inputs}
        return model(**of_model, use_cache=False).logits

    def _reference_logits(self, inputs: Batch) -> torch.Tensor:
        """The same, of the model that training started from; nothing is learned through it."""
        training = self.model.training
        self.model.eval()
        adapter = REFERENCE if REFERENCE in self.model.peft_config else None
        with torch.no_grad(), use_adapter(self.model, adapter):
            logits = self._logits(self.model, inputs)
        learn_only(self.model, self._parts)  # PEFT lets all of an adapter learn that is made the active one
        self.model.train(training)
        return logits

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

    def measure(
        self, batches: Sequence[Sequence[Item]], lay_out: Callable[[Sequence[Item]], Batch]
    ) -> dict[str, list[float]]:
        """The method's columns over some batches, in their order; all processes share the work and the result."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine: dict[int, dict[str, list[float]]] = {}
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(batches), processes):
                # Processes beyond the last batch compute it too, uncounted: a sharded model needs every one of them.
                batch = lay_out(batches[min(start + rank, len(batches) - 1)])
                inputs = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
                columns = self._columns(self.model, inputs)
                if start + rank < len(batches):
                    mine[start + rank] = {name: column.tolist() for name, column in columns.items()}
        self.model.train()
        of_batches = {number: columns for part in of_all_processes(mine) for number, columns in part.items()}
        found: dict[str, list[float]] = {}
        for _, columns in sorted(of_batches.items()):
            for name, column in columns.items():
                found.setdefault(name, []).extend(column)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter in PEFT's layout, once, gathered from all processes; the frozen weights are never gathered."""
        state = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.model.state_dict().items()
            if f".{LEARNED}." in name
        }
        if self.args.should_save:
            # Embeddings are never trained; to make sure of that, PEFT would ask the model hub.
            self.accelerator.unwrap_model(self.model).save_pretrained(
                output_dir, state_dict=state, selected_adapters=[LEARNED], save_embedding_layers=False
            )


class Record(TrainerCallback):
    """Reports each step, measures where told, and seals checkpoints.

    What it records lies in the trainer's own history, which checkpoints carry: a resumed run's curve has no gap.
    """

    def __init__(
        self,
        training: str,
        checkpoints_uri: str | None,
        tokens_by_step: list[int],
        epochs: float,
        measure_at: set[int],
        measure: Callable[[], Mapping[str, float | None]] | None,
    ) -> None:
        self._training, self._checkpoints_uri = training, checkpoints_uri
        self._tokens_by_step, self._epochs = tokens_by_step, epochs
        self._measure_at, self._measure = measure_at, measure
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
        """At the end of each epoch, measure on what is not learned from."""
        if self._measure and state.global_step in self._measure_at:
            state.log_history.append({"step": state.global_step, "measured": dict(self._measure())})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint once every process has written its part, and every machine has copied it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            checkpoints.clear(folder, self._checkpoints_uri)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        files = checkpoints.copy(folder, self._checkpoints_uri) if state.is_local_process_zero else {}
        files = {name: digest for part in of_all_processes(files) for name, digest in part.items()}
        if state.is_world_process_zero:
            checkpoints.seal(folder, self._training, self._checkpoints_uri, files)


def of_all_processes(value: Any) -> list[Any]:
    """What each process has, on every process; all must call it."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
