"""An S3 server in front of another one, on a socket of its own, that fails, or breaks off, the reads it is told to."""

import contextlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx

HOP_BY_HOP = {"connection", "content-encoding", "content-length", "transfer-encoding"}


class FlakyS3:
    """Passes requests on to `behind`; a GET of an object whose address holds `failing` is answered with 503.

    The next `cut` answers of more than a mebibyte end after half a mebibyte.
    """

    def __init__(self, behind: str) -> None:
        self.failing, self.cut = "", 0
        flaky = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.command == "GET" and flaky.failing and flaky.failing in self.path.partition("?")[0]:
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                got = httpx.request(self.command, behind + self.path, headers=headers, content=body, timeout=60)
                self.send_response(got.status_code)
                for name, value in got.headers.items():
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                length = got.headers["Content-Length"] if self.command == "HEAD" else str(len(got.content))
                self.send_header("Content-Length", length)
                self.end_headers()
                if flaky.cut and len(got.content) > 2**20:
                    flaky.cut -= 1
                    self.wfile.write(got.content[: 2**19])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(got.content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def flaky_s3(behind: str) -> Iterator[FlakyS3]:
    """The server for the length of the block."""
    made = FlakyS3(behind)
    thread = Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        thread.join()
        made.server.server_close()
