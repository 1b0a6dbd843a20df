"""What the flow `improve` takes: every stage's settings, and that they fit together."""

from pydantic import Field, model_validator

from tasks.config.documents import Index, Ingest
from tasks.config.evaluation import VARIANTS, Evaluate, Variants
from tasks.config.rollouts import Collect, Format, FormatName, Mine, Process
from tasks.config.runs import ModelRun
from tasks.config.serving import Agent
from tasks.config.training import LEARNS_FROM, LORA_SHAPE, Finetune, Launch


class Improve(ModelRun):
    """Parameters of the flow `improve`: the whole loop, once round."""

    ingest: Ingest = Field(title="Documents and questions", description="What is read, and how questions are split.")
    index: Index = Field(default=Index(), title="Index", description="How pages are indexed.")
    collect: Collect = Field(default=Collect(), title="Collection", description="Which rollouts are run.")
    collect_agent: Agent | None = Field(
        default=None,
        description="Agent for collection where it is to differ; when empty, the same with worked examples in its prompt.",
    )
    mine: Mine | None = Field(
        default=None,
        title="Mining",
        description="Learn from mined queries instead of trajectories, which are then collected only where they are gone on from.",
    )
    process: Process = Field(
        default=Process(), title="Scoring and pairs", description="Which rollouts are kept, and compared."
    )
    format: Format = Field(
        default=Format(),
        title="Training sets",
        description="Of those that are named, the first that a training's method learns from is learned from.",
    )
    finetune: Finetune = Field(default=Finetune(), title="Training", description="How the adapter is trained.")
    refine: Finetune | None = Field(
        default=None,
        title="Second training",
        description="Goes on from the adapter that the first one made, such as dpo after sft, and keeps its LoRA shape; none when empty.",
    )
    launch: Launch = Field(
        default=Launch(), title="Training processes", description="How many train together, and where they meet."
    )
    evaluate: Evaluate = Field(default=Evaluate(), title="Measurement", description="What runs are measured on.")
    variants: Variants = Field(
        default=list(VARIANTS), description="Runs to compare; each is compared with those before it."
    )

    @property
    def agents(self) -> list[Agent]:
        """Every agent that asks the model."""
        return [self.agent, *([self.collect_agent] if self.collect_agent else [])]

    @property
    def trainings(self) -> list[Finetune]:
        """One after the other, each from the adapter that the one before made, and so of its LoRA shape."""
        shape = {name: getattr(self.finetune, name) for name in LORA_SHAPE}
        return [self.finetune, *([self.refine.model_copy(update=shape)] if self.refine else [])]

    def learned_from(self, training: Finetune) -> FormatName | None:
        """The training set that one of the trainings learns from."""
        return next((name for name in self.format.formats if name in LEARNS_FROM[training.method]), None)

    @model_validator(mode="after")
    def _fits_together(self) -> "Improve":
        """What would else be found out only after hours of collection."""
        if self.collect.dt or (self.mine and self.mine.dt):
            raise ValueError(
                "a night's collection is not what improve learns from: leave dt empty, or run collect (and mine), prepare and "
                "finetune one after the other"
            )
        for training in self.trainings:
            if (method := training.method) == "reward":
                raise ValueError("a reward model scores queries and makes none: learn by method sft or dpo")
            if self.learned_from(training) is None:
                raise ValueError(
                    f"formats names no training set that {method} learns from ({' or '.join(LEARNS_FROM[method])})"
                )
        said = self.refine.model_dump(include=self.refine.model_fields_set) if self.refine else {}
        for name in LORA_SHAPE:
            if said.get(name, getattr(self.finetune, name)) != getattr(self.finetune, name):
                raise ValueError(f"refine goes on from finetune's adapter: leave its {name} out, or set it to the same")
        if self.serve.adapters == "lora" and self.finetune.lora_r > self.serve.max_lora_rank:
            raise ValueError("lora_r is above max_lora_rank: the server would refuse the adapter")
        left_out = self.serve.adapters == "lora" and not self.serve.tower_lora
        whole = {"sft_trajectory", "sft_context"} & {self.learned_from(training) for training in self.trainings}
        if self.mine and whole:
            raise ValueError("what is mined are single queries, and no conversations: learn from sft_best or dpo")
        # a mined query of a later turn is learned behind what was shown before it
        behind_pages = whole or (self.mine is not None and self.mine.states != "questions")
        parts = {part for training in self.trainings for part in training.parts}
        if self.agent.sees_images and behind_pages and {"merger", "vision"} & parts and left_out:
            raise ValueError(
                "the server would leave out what an adapter changes of what sees: set tower_lora, serve it merged into its base "
                "(adapters), or adapt the language model alone (parts)"
            )
        if any(variant.model == "adapter" and variant.examples != self.agent.examples for variant in self.variants):
            raise ValueError(
                "an adapter is served with the prompt it is trained on: its variant's examples are the agent's"
            )
        return self
