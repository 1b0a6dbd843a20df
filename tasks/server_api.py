"""Ask a model server what it is and serves, whoever started it: whether it is well, its models, its context, its version; and
have it load an adapter.

The key comes from the environment variable OPENAI_API_KEY ("EMPTY" where none is set, as vLLM wants no key).
"""

import functools
import os
from typing import Any

import httpx2

from tasks.artifact import Artifact, fetch_folder
from tasks.errors import ConfigError, ServerError
from tasks.network import is_loopback
from tasks.secrets import quoted

_NO_ANSWER = (httpx2.HTTPError, httpx2.InvalidURL)
_OTHER_ANSWER = (ValueError, LookupError, TypeError)  # no JSON, or of something else


def adapter_name(adapter: Artifact) -> str:
    """The name an adapter is served under: unique to its content, as vLLM may answer a reused name from a stale cache."""
    return f"adapter-{adapter.sha256[:12]}"


def load_adapter(base_url: str, adapter: Artifact) -> str:
    """Load an adapter into the running server; returns the name to ask for. Loading it twice is no error.

    Raises:
        ServerError: the server refused it (a rank above max_lora_rank, say).
    """
    name = adapter_name(adapter)
    if name in served_models(base_url):
        return name
    body = {"lora_name": name, "lora_path": str(fetch_folder(adapter))}
    try:
        reply = ask(f"{base_url}/load_lora_adapter", timeout_s=120, body=body)
    except _NO_ANSWER as error:
        raise ServerError(f"{base_url} did not answer while it loaded adapter {adapter.uri}: {error}") from error
    if not reply.is_success:
        raise ServerError(f"vLLM refused adapter {adapter.uri}: {quoted(reply.text, 500)}")
    return name


def served_models(base_url: str) -> list[str]:
    """Names of the models and adapters that a server answers for.

    Raises:
        ServerError: nothing answers at `base_url`, or not as a model server does.
    """
    return [entry["id"] for entry in _models(base_url)]


def context_length(base_url: str) -> int | None:
    """Tokens that prompt and answer may have together, as vLLM tells; None where a server does not tell.

    Raises:
        ServerError: nothing answers at `base_url`, or not as a model server does.
    """
    lengths = [entry.get("max_model_len") for entry in _models(base_url)]  # an adapter's own is empty
    return min((length for length in lengths if isinstance(length, int) and length > 0), default=None)


def _models(base_url: str) -> list[dict[str, Any]]:
    try:
        reply = ask(f"{base_url}/models", timeout_s=30)
        if reply.is_success:
            return [{**entry, "id": entry["id"]} for entry in reply.json()["data"]]
    except (*_NO_ANSWER, *_OTHER_ANSWER) as error:
        raise ServerError(f"no model server answers at {base_url}: {error}") from error
    raise ServerError(f"no model server answers at {base_url}, but {reply.status_code} {reply.reason_phrase}")


def engine_version(base_url: str) -> str | None:
    """The version of the vLLM that answers at `base_url`; None where it is no vLLM, or does not say."""
    try:
        reply = ask(f"{base_url.removesuffix('/v1')}/version", timeout_s=5)
        return str(reply.json()["version"]) if reply.is_success else None
    except (*_NO_ANSWER, *_OTHER_ANSWER):
        return None


def check_health(base_url: str, timeout_s: float = 5.0) -> None:
    """Return if a model server is well: what it says at /health, or, where there is no such thing, that it answers at all.

    Raises:
        ServerError: it says that it is not (vLLM answers 503 once its engine is dead), or nothing within `timeout_s`.
    """
    url = f"{base_url.removesuffix('/v1')}/health"
    try:
        reply = ask(url, timeout_s=timeout_s)
    except _NO_ANSWER as error:
        raise ServerError(f"{url} does not answer: {error}") from error
    if reply.is_server_error:
        raise ServerError(f"{url} answers {reply.status_code}")
    if not reply.is_success:
        served_models(base_url)


def ask(url: str, *, timeout_s: float, body: object = None) -> httpx2.Response:
    """GET `url`, or POST `body` to it as JSON; any status is an answer.

    Args:
        timeout_s: seconds without a sign of life.

    Raises:
        httpx2.HTTPError: nothing answers there, or no HTTP.
        httpx2.InvalidURL: `url` is none.
        ConfigError: the environment names a proxy that cannot be used; on this machine itself none is.
    """
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '').strip() or 'EMPTY'}"}
    client = _client(proxied=not is_loopback(httpx2.URL(url).host))
    return client.request("GET" if body is None else "POST", url, headers=headers, timeout=timeout_s, json=body)


@functools.cache
def _client(*, proxied: bool) -> httpx2.Client:
    """One for all, as reading the system's certificates takes tens of milliseconds. It keeps no connection, which a server may
    have closed meanwhile; and where it is sent on to another host, that is not given the key."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    try:
        return httpx2.Client(follow_redirects=True, limits=limits, trust_env=proxied)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"the proxy that the environment names (ALL_PROXY, HTTPS_PROXY, …) cannot be used: {error}"
        ) from error
