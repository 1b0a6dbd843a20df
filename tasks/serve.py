"""Start vLLM for a base model and LoRA adapters, wait until it truly answers, stop it.

vLLM lives in an environment of its own (its fastapi is older than Prefect's): `make setup` puts it in .venv-serve;
DRAG_VLLM_PYTHON names another interpreter. The server binds to loopback and dies with whoever started it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tasks import config, folders, watchdog
from tasks.errors import ConfigError, ServerError
from tasks.logs import log_tail
from tasks.model import fetch_model
from tasks.network import is_loopback, loopback_only, refuse_taken
from tasks.secrets import quoted
from tasks.server_api import ask

BASE_NAME = "base"
_POLL_S = 0.5
_BESIDE_VLLM = str(Path(__file__).parent / "beside_vllm")
_KEPT_LOGS = 20
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only ones that vLLM takes as its largest


@dataclass(frozen=True)
class Served:
    """A running server: its OpenAI-compatible address, its process, and where its log is written."""

    base_url: str
    process: subprocess.Popen[bytes]
    log: Path


def vllm_python() -> str:
    """The interpreter that has vLLM.

    Raises:
        ServerError: there is none where it should be.
    """
    python = os.environ.get("DRAG_VLLM_PYTHON") or str(Path(sys.prefix).parent / ".venv-serve" / "bin" / "python")
    if not Path(python).exists():
        raise ServerError(
            f"no vLLM environment at {python}: run `make setup`, or set DRAG_VLLM_PYTHON, or give --base-url"
        )
    return python


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, which decides how vLLM is started."""
    return Path("/dev/nvidiactl").exists()


def command(
    model: Path,
    port: int,
    settings: config.Serve,
    *,
    names: Sequence[str] = (BASE_NAME,),
    trust_remote_code: bool = False,
    images: Path | None = None,
) -> list[str]:
    """The command line that serves `model` under its names, and takes adapters while it runs.

    Args:
        images: folder that requests may name files of.
    """
    args = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
    args += ["--model", str(model), "--served-model-name", *names, "--host", settings.host, "--port", str(port)]
    args += ["--dtype", "bfloat16", "--load-format", "safetensors"]  # by default it would read pickles too
    if os.environ.get("OPENAI_API_KEY"):
        args += ["--middleware", "key_everywhere.KeyEverywhere"]
    if trust_remote_code:
        args += ["--trust-remote-code"]
    if settings.adapters == "lora":
        rank = next(rank for rank in _RANKS if rank >= settings.max_lora_rank)
        args += ["--enable-lora", "--max-lora-rank", str(rank)]
        if settings.tower_lora:
            args += ["--enable-tower-connector-lora"]
    args += ["--max-num-seqs", str(settings.max_num_seqs), "--tensor-parallel-size", str(settings.tensor_parallel_size)]
    args += ["--data-parallel-size", str(settings.data_parallel_size)]
    if settings.images_per_prompt is not None:
        args += ["--limit-mm-per-prompt", json.dumps({"image": settings.images_per_prompt, "video": 0})]
    if images:
        args += ["--allowed-local-media-path", str(images)]
    if settings.max_model_len:
        args += ["--max-model-len", str(settings.max_model_len)]
    if settings.tool_call_parser:
        args += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if settings.reasoning_parser:
        args += ["--reasoning-parser", settings.reasoning_parser]
    if has_gpu():
        args += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    else:
        args += ["--enforce-eager"]  # starts in a third of the time, and compiling gains little on a CPU
        # vLLM 0.32 dies on a CPU when the prompt of a seeded request is cut in chunks: "CPU Generator does not use offset"
        args += ["--no-enable-chunked-prefill"]
    return args


def environment(host: str = "127.0.0.1") -> dict[str, str]:
    """The environment of a server that listens at `host`: adapters may be loaded while it runs, nothing is reported home, every
    core is used; and where only this machine is to reach it, its processes talk to each other on loopback."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([_BESIDE_VLLM, *filter(None, [env.get("PYTHONPATH")])])
    if is_loopback(host):
        env |= {"VLLM_HOST_IP": "127.0.0.1", **loopback_only()}
    env |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    if key := os.environ.get("OPENAI_API_KEY"):
        env["VLLM_API_KEY"] = key
    if not has_gpu():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))  # by default it leaves a core idle
    return env


@contextlib.contextmanager
def serving(
    model: str,
    settings: config.Serve,
    work_dir: Path,
    port: int,
    on_wait: Callable[[float], None] | None = None,
    trusted: Collection[str] = (),
    images: Path | None = None,
) -> Iterator[Served]:
    """A vLLM server for as long as the block runs; it is stopped however the block ends.

    Args:
        model: local folder or model hub name.
        port: that it is to listen at.
        on_wait: told the seconds waited so far, about once a second, until the server answers.
        trusted: names of models whose own code may run.
        images: folder of page images that requests may name files of; made if it is not there.

    Raises:
        ConfigError: the model is not to be had, or is refused, see `fetch_model`.
        ServerError: something listens at `port`; or it ended or did not answer in time, and the message holds the end of its log.
    """
    if not is_loopback(settings.host) and not os.environ.get("OPENAI_API_KEY"):
        raise ConfigError(
            f"vLLM would answer anybody who reaches {settings.host}: set OPENAI_API_KEY, or leave host alone"
        )
    refuse_taken(settings.host, port)
    folders.make(work_dir)
    for old in sorted(work_dir.glob("vllm-*.log"))[:-_KEPT_LOGS]:  # their names begin with the time
        old.unlink(missing_ok=True)
    log = work_dir / f"vllm-{time.strftime('%Y%m%dT%H%M%S')}-{port}.log"
    own = f"started-{uuid.uuid4().hex[:12]}"  # what another server, of another model, does not answer for
    if images:
        folders.make(images)  # vLLM does not start without it
    args = command(
        fetch_model(model, trusted),
        port,
        settings,
        names=(BASE_NAME, model, own),
        trust_remote_code=model in trusted,
        images=images,
    )
    with log.open("wb") as output:
        process = watchdog.start(args, env=environment(settings.host), output=output)
    at = settings.host if settings.host != "0.0.0.0" else "127.0.0.1"
    served = Served(f"http://{f'[{at}]' if ':' in at else at}:{port}/v1", process, log)
    try:
        _wait_until_it_answers(served, own, settings.start_timeout, on_wait)
        yield served
    finally:
        watchdog.stop(process)


def _wait_until_it_answers(served: Served, own: str, timeout_s: float, on_wait: Callable[[float], None] | None) -> None:
    """Return once a completion came back: a healthy port alone may hide an engine that is still loading.

    Args:
        own: a name that this server alone answers for.
    """
    started = time.monotonic()
    probe = {"model": own, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    told = 0.0
    while True:
        waited = time.monotonic() - started
        if served.process.poll() is not None:
            raise ServerError(
                f"vLLM ended with code {served.process.returncode} while starting:\n{log_tail(served.log)}"
            )
        if waited > timeout_s:
            raise ServerError(f"vLLM did not answer within {timeout_s:.0f} s:\n{log_tail(served.log)}")
        with contextlib.suppress(httpx2.HTTPError):  # not listening yet: that is what we wait for
            reply = ask(f"{served.base_url}/chat/completions", timeout_s=60, body=probe)
            if reply.is_success:
                return
            if reply.status_code == 404:
                raise ServerError(f"another server listens at {served.base_url}: stop it, or name another --port")
            if not reply.is_server_error:  # it is up, and says what is wrong
                raise ServerError(f"vLLM answers with {reply.status_code}: {quoted(reply.text, 500)}")
        if on_wait and waited - told >= 1:
            on_wait(told := waited)
        time.sleep(_POLL_S)
