"""vLLM's key, demanded of every request: `--middleware key_everywhere.KeyEverywhere`, with VLLM_API_KEY in the environment.

vLLM 0.32 asks for its key below /v1, /v2, /inference and /cohere alone, while /invocations generates as well, and /adapters loads
and unloads adapters (vllm/entrypoints/serve/middleware/authenticate.py).
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN = "/health"  # says nothing but whether the engine lives: container engines and load balancers ask it


class KeyEverywhere:
    """ASGI middleware: what does not hold "Authorization: Bearer KEY" is answered with 401."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] == _OPEN:
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
