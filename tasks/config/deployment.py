"""Settings of `drag deploy`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tasks.config.base import Settings

PoolType = Literal["process", "kubernetes"]


class Deploy(Settings):
    """What the files in deployments/ leave open."""

    storage: str = Field(
        description="Storage root of every deployment, also of its input: s3://bucket/prefix, or a folder that all workers share."
    )
    pool_type: PoolType = Field(
        default="process",
        description="What a run is: a process beside its worker, or a job in the worker's Kubernetes cluster.",
    )

    @model_validator(mode="after")
    def _reachable(self) -> "Deploy":
        """A run has a folder of its own, which goes when the run does."""
        if self.storage.startswith("s3://"):
            return self
        if self.pool_type == "kubernetes":
            raise ValueError("storage must be s3://bucket/prefix where runs are Kubernetes jobs")
        if not Path(self.storage).is_absolute():
            raise ValueError("storage must be s3://bucket/prefix or an absolute path")
        return self
