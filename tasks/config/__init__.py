"""Every setting of every stage: typed, described, validated once.

These models are the flows' parameters (the Prefect UI renders them as forms), the recipes in deployments/recipes are YAML
of the same models, and the command line takes the same names. Secrets are not settings: keys come from the environment.
"""

from tasks.config.base import Settings, Share, Split
from tasks.config.deployment import Deploy
from tasks.config.documents import Index, Ingest, Scans, Search
from tasks.config.evaluation import VARIANTS, Evaluate, Variant, Variants
from tasks.config.improve import Improve
from tasks.config.rollouts import Collect, Format, FormatName, Mine, Nights, Process, RewardName, Source
from tasks.config.runs import (
    BaseRun,
    CollectRun,
    CompareRun,
    EvaluateRun,
    ExportRun,
    FinetuneRun,
    FormatRun,
    ImportRun,
    InferRun,
    IngestRun,
    MergeRun,
    MineRun,
    ModelRun,
    PrepareRun,
    ProcessRun,
    ReparseRun,
    Run,
    ServeRun,
)
from tasks.config.serving import Agent, Sampling, SamplingName, Serve, Server
from tasks.config.training import LORA_SHAPE, Finetune, Launch, Part

__all__ = [
    "LORA_SHAPE",
    "VARIANTS",
    "Agent",
    "BaseRun",
    "Collect",
    "CollectRun",
    "CompareRun",
    "Deploy",
    "Evaluate",
    "EvaluateRun",
    "ExportRun",
    "Finetune",
    "FinetuneRun",
    "Format",
    "FormatName",
    "FormatRun",
    "ImportRun",
    "Improve",
    "Index",
    "InferRun",
    "Ingest",
    "IngestRun",
    "Launch",
    "MergeRun",
    "Mine",
    "MineRun",
    "ModelRun",
    "Nights",
    "Part",
    "PrepareRun",
    "Process",
    "ProcessRun",
    "ReparseRun",
    "RewardName",
    "Run",
    "Sampling",
    "SamplingName",
    "Scans",
    "Search",
    "Serve",
    "ServeRun",
    "Server",
    "Settings",
    "Share",
    "Source",
    "Split",
    "Variant",
    "Variants",
]
