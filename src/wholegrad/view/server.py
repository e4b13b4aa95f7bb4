"""The viewer's HTTP server: this machine alone, a secret in the address, and nothing but what the page needs.

The standard library's server is enough for one person's browser: tiles take longer to decode than to send. What guards
it:

- it listens on a loopback address;
- every address starts with a random token, compared in constant time, so that other users of the machine, and pages
  that guess the port, get nothing;
- a request whose ``Host`` is not this machine is refused (DNS rebinding: a page of another site whose name was made to
  point here); any port will do, so that a tunnel works;
- no CORS header is sent, and a policy forbids the page to load anything from elsewhere;
- whatever is wrong, the answer is "not found", without detail.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from wholegrad.errors import ConfigError, WholegradError
from wholegrad.view.app import Answer

HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
LOOPBACK = "127.0.0.1"
OSD_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"  # the one rule that OpenSeadragon 6.1.1 adds itself
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {OSD_STYLE}; img-src 'self' blob: data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # or links would carry the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
IDLE = 60.0  # seconds after which a connection that says nothing is closed
FIRST = 10.0  # likewise, before it has shown the token
LONGEST = 2048  # bytes of an address
CONNECTIONS = 64  # at a time, each with a thread; a browser opens six


class Answering(Protocol):
    """What a server asks. Thread-safe."""

    def answer(self, path: str, query: str) -> Answer | None: ...
    def note(self, problem: str) -> None: ...
    def close(self) -> None: ...


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "wholegrad", ""
    timeout = FIRST
    disable_nagle_algorithm = True  # or a small tile waits 40 ms for the browser to acknowledge its headers
    server: Server

    def do_GET(self) -> None:
        answer = self._answer()
        if answer is not None:
            self._send(answer)

    do_HEAD = do_GET  # noqa: N815

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any other method
            return self._refuse
        raise AttributeError(name)

    def _refuse(self) -> None:
        self.close_connection = True  # a body may follow that nobody reads
        self._send(NOT_FOUND)

    def _answer(self) -> Answer | None:
        """What to send; None if nobody waits for it."""
        if len(self.path) > LONGEST or not self.server.allowed(self.headers.get_all("Host") or []):
            return NOT_FOUND
        try:
            parts = urlsplit(self.path)
        except ValueError:  # such as "http://[/"
            return NOT_FOUND
        _, _, below = parts.path.partition("/")
        token, slash, path = below.partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.close_connection = True  # connections are few, and for whom has the token
            return NOT_FOUND
        self.server.trust(self.connection)
        if self._gone():
            self.close_connection = True
            return None
        app = self.server.app
        self.server.asked = time.monotonic()
        try:
            return app.answer(path, parts.query) or NOT_FOUND
        except WholegradError as error:
            app.note(str(error))
            return BROKEN
        except Exception as error:  # a mistake of ours must not look like the end of the server
            app.note(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return BROKEN

    def _gone(self) -> bool:
        """Whether the browser has given up, as it does with tiles that it has moved past."""
        self.connection.setblocking(False)
        try:
            waiting: bytes = self.connection.recv(1, socket.MSG_PEEK)
            return not waiting
        except BlockingIOError:  # it waits
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(IDLE)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.mime)
        self.send_header("Content-Length", str(len(answer.data)))
        self.send_header("Cache-Control", "no-store" if answer.fresh else "private, max-age=86400")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A request that is no HTTP gets no page that repeats it."""
        self.close_connection = True
        self.send_response(HTTPStatus(code), None)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold the token."""


NOT_FOUND = Answer(b"Not found\n", "text/plain; charset=utf-8", status=404)
BROKEN = Answer(b"Unreadable\n", "text/plain; charset=utf-8", status=500)


class Server(ThreadingHTTPServer):
    """Serves an app until it is closed.

    Args:
        app: stays the caller's to close; may be replaced while requests come.
        port: 0 for any that is free.

    Attributes:
        asked: when something was asked for last, by ``time.monotonic``.

    Raises:
        ConfigError: the port is taken.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, app: Answering, port: int = 0) -> None:
        self.app, self.token = app, secrets.token_urlsafe(24)
        self.asked = float("-inf")
        self._thread: threading.Thread | None = None
        self._open: dict[socket.socket, bool] = {}  # oldest first, and whether it has shown the token
        self._lock = threading.Lock()
        try:
            super().__init__((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"port {port}", f"cannot be listened on ({said})", "choose another --port, or none"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is, secret included."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/{self.token}/"

    @staticmethod
    def allowed(hosts: list[str]) -> bool:
        """Whether a request's one ``Host`` is this machine, whatever the port."""
        if len(hosts) != 1:
            return False
        try:
            return urlsplit(f"//{hosts[0]}").hostname in HOSTS
        except ValueError:
            return False

    def start(self) -> None:
        """Serve on a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="wholegrad-view", daemon=True)
        self._thread.start()

    def trust(self, connection: socket.socket) -> None:
        """The connection showed the token: none that did not takes its place."""
        with self._lock:
            if connection in self._open:
                self._open[connection] = True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a new connection; where there are as many as may be, in place of the oldest without the token."""
        with self._lock:
            stranger = None
            if full := len(self._open) >= CONNECTIONS:
                stranger = next((each for each, trusted in self._open.items() if not trusted), None)
                if stranger is not None:
                    del self._open[stranger]
            if not full or stranger is not None:
                self._open[request] = False
        if stranger is not None:
            with suppress(OSError):  # its thread sees the end, and closes it
                stranger.shutdown(socket.SHUT_RDWR)
        elif full:
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up in the middle of a tile is no news."""

    def close(self) -> None:
        """Stop listening, and hang up on every connection."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()
        with self._lock:
            left, self._open = self._open, {}
        for connection in left:
            with suppress(OSError):  # it may be closed already
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
