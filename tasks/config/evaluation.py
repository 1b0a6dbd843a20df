"""Settings of measurement."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tasks.config.adapters import NEWEST, AdapterName
from tasks.config.base import Settings, Share, Split
from tasks.config.documents import Search


class Evaluate(Settings):
    """What runs are measured on, and with which searches."""

    split: Split = Field(default="test", description="Which questions.")
    limit: int | None = Field(
        default=None, ge=1, description="Take only the first so many questions, in an order fixed by hash."
    )
    question_id: list[str] = Field(
        default=[],
        title="Questions",
        description="Ask only the questions with these ids, show what came of each, and leave the comparison and the report as they are.",
    )
    rescore: list[Search] = Field(
        default=[],
        description="Further search settings under which each run's first query is ranked again, at no model cost.",
    )
    depth: int = Field(default=10, ge=10, description="Depth to which first searches are ranked, for Hit@k and MRR.")
    resamples: int = Field(default=10_000, ge=100, description="Bootstrap resamples behind an interval.")
    allow_failed_share: Share = Field(default=0.0, description="Share of rollouts that may fail, counting as misses.")


class Variant(Settings):
    """One run of the comparison."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9 -]*$", description="Its name in tables.")
    model: Literal["question", "base", "adapter"] = Field(
        description="'question' searches the raw question, without a model."
    )
    adapter: AdapterName = Field(
        default=NEWEST,
        min_length=1,
        description="Name of the adapter that is asked, where one is: 'newest', or what finetune kept it under.",
    )
    examples: bool = Field(default=False, description="Worked examples in the prompt.")


VARIANTS = (
    Variant(name="question", model="question"),
    Variant(name="base", model="base", examples=True),
    Variant(name="adapter", model="adapter"),
)


def _distinct(variants: list[Variant]) -> list[Variant]:
    if len({variant.name for variant in variants}) < max(2, len(variants)):
        raise ValueError("two or more runs with different names are needed to compare")
    return variants


Variants = Annotated[list[Variant], AfterValidator(_distinct)]
