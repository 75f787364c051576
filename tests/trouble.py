"""A proxy before an S3 server that makes trouble, once for each thing that is asked of the server."""

import http.client
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import psutil

from fruitray.s3server import HOST

STALL_S = 11
"""Longer than the readers wait."""
Trouble = Callable[[str, str, int], str]
"""(method, path, how often that was asked before) -> "" or one of

"busy"         503, and the server does not hear of it
"denied"       403, likewise
"short"        the connection breaks in the middle of the answer's body
"stall"        no answer for a long time, then the connection breaks
"lost"         the server does what it is asked, and the connection breaks before it can say so
"kill before"  the process that asks is killed before the server hears of it
"kill after"   it is killed when the server has done it
"""


@contextmanager
def trouble_before(endpoint: str, trouble: Trouble, host: str = HOST) -> Iterator[tuple[str, Counter[str]]]:
    """Yields (the proxy's endpoint, at this machine's address `host`; how often each trouble was made so far)."""
    made, asked, lock = Counter[str](), Counter[tuple[str, str]](), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                kind = trouble(self.command, self.path, asked[self.command, self.path])
                asked[self.command, self.path] += 1
                made[kind] += 1
            self.close_connection = bool(kind)
            if kind in ("busy", "denied"):
                self.send_response(503 if kind == "busy" else 403)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif kind == "stall":
                time.sleep(STALL_S)
            elif kind == "kill before":
                self._kill()
            else:
                self._forward(body, kind)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

        def _forward(self, body: bytes, kind: str) -> None:
            server = http.client.HTTPConnection(urlsplit(endpoint).netloc)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    server.putheader(name, value)
            server.endheaders(body)
            reply = server.getresponse()
            found = reply.read()
            server.close()
            if kind == "kill after":
                self._kill()
            if kind in ("lost", "kill after"):
                return
            self.send_response_only(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            size = reply.headers["Content-Length"] if self.command == "HEAD" else None
            self.send_header("Content-Length", size or str(len(found)))
            self.end_headers()
            self.wfile.write(found[: len(found) // 2] if kind == "short" else found)

        def _kill(self) -> None:
            ends = self.client_address, self.connection.getsockname()  # another may use the same port to talk elsewhere
            for connection in psutil.net_connections("tcp"):
                if (connection.laddr, connection.raddr) == ends and connection.pid not in (None, os.getpid()):
                    os.kill(connection.pid, signal.SIGKILL)

        def log_message(self, *_: object) -> None: ...

        def handle(self) -> None:
            with suppress(ConnectionError):  # whoever asked may hang up
                super().handle()

    with serving(Handler, host) as proxy:
        yield proxy, made


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], host: str = HOST) -> Iterator[str]:
    """The endpoint of an HTTP server while the context lasts."""
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
