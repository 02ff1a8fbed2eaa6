"""A web server on 127.0.0.1 that serves the files of a model, with faults on demand."""

import base64
import contextlib
import hashlib
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ALWAYS = 1000  # requests
SO_RESET = struct.pack(
    "ii", 1, 0
)  # SO_LINGER: close() discards unsent bytes and resets the connection


@dataclass
class Fault:
    """How an answer differs from the correct one, which is the requested file or the rest of it."""

    status: int | None = None  # answer with this status and without the file
    headers: dict = field(
        default_factory=dict
    )  # {name: value, None to omit it, or function(request)}
    change: object = None  # function(body) -> other body, which also changes Content-Length
    silent: bool = False  # `then` comes before the status line
    sends: int | None = None  # bytes of the body; None: all
    then: str | None = None  # after that: "close", "reset" or "stall" the connection
    chunked: bool = False
    ignores_range: bool = False
    ignores_if_range: bool = False


@dataclass
class Request:
    """A request, and what was sent."""

    name: str
    headers: dict
    status: int | None = None
    sent: int = 0

    @property
    def start(self):
        """The offset in the Range header; None without one."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(asked[1]) if asked else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        size, name = re.fullmatch(r"/base/([^/]+)/([^/]+)", self.path).groups()
        request = Request(name, dict(self.headers))
        fault = self.server.note(size, request)
        self.server.gate.wait(60)
        if fault.silent:
            self.leave(fault)
            return
        whole = self.server.files[name]
        headers = {
            "ETag": '"' + hashlib.md5(whole).hexdigest() + '"',
            "Last-Modified": "Wed, 06 Nov 2019 00:00:00 GMT",
            "Content-Type": "application/octet-stream",
        }
        headers |= {
            key: fault.headers[key] for key in ("ETag", "Last-Modified") if key in fault.headers
        }
        if fault.status:
            request.status, body, headers = (
                fault.status,
                b"an error's text",
                {"Content-Type": "text/plain"},
            )
        else:
            request.status, body, ranged = self.part_of(whole, request, fault, headers)
            headers |= ranged
        if fault.change:
            body = fault.change(body)
        headers["Transfer-Encoding" if fault.chunked else "Content-Length"] = (
            "chunked" if fault.chunked else len(body)
        )
        self.send_response(request.status)
        for key, value in (headers | fault.headers).items():
            if value is not None:
                self.send_header(key, str(value(request) if callable(value) else value))
        self.end_headers()
        self.send(body[: fault.sends], request, fault)

    def part_of(self, whole, request, fault, version):
        """-> (status, body, headers) by RFC 9110, sections 13.1.5 and 14, with the MD5 headers that Azure sends."""
        md5 = base64.b64encode(hashlib.md5(whole).digest()).decode()
        asked = request.headers.get("If-Range")
        matches = asked is None or (
            not asked.startswith("W/")
            and asked in (version.get("ETag"), version.get("Last-Modified"))
        )
        if request.start is None or fault.ignores_range or not (matches or fault.ignores_if_range):
            return 200, whole, {"Content-MD5": md5}
        if request.start >= len(whole):
            return 416, b"", {"Content-Range": f"bytes */{len(whole)}"}
        content_range = f"bytes {request.start}-{len(whole) - 1}/{len(whole)}"
        return (
            206,
            whole[request.start :],
            {"Content-Range": content_range, "x-ms-blob-content-md5": md5},
        )

    def send(self, body, request, fault):
        for start in range(0, len(body), self.server.piece):
            piece = body[start : start + self.server.piece]
            request.sent += len(
                piece
            )  # first: tests may read it as soon as the client has the bytes
            self.server.count(len(piece))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if fault.chunked else piece)
            self.server.pause()
        if fault.then:
            self.leave(fault)
        elif fault.chunked:
            self.wfile.write(b"0\r\n\r\n")
        elif fault.headers.get("Content-Length", 0) is None:
            self.close_connection = True

    def leave(self, fault):
        self.close_connection = True
        if fault.then == "stall":
            self.server.stopping.wait(60)
        elif fault.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_RESET)
            self.connection.close()  # before the server does, which would close it properly


class Server(ThreadingHTTPServer):
    """Serves `files` at {address}/{any size}/{name}; `with` starts and stops it."""

    daemon_threads = False  # closing waits for the threads, so none outlives its test
    request_queue_size = 64

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests, self.sizes, self.faults, self.connections = [], set(), {}, set()
        self.piece, self.seconds_per_piece = 1 << 16, 0
        self.sent, self.at_byte = (
            0,
            None,
        )  # at_byte: (n, function), called once after n bytes in total
        self.gate, self.stopping, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.gate.set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/base"

    def misbehave(self, name, *faults, times=1):
        """Answer the next requests for name with one fault each, and `times` requests with the last fault."""
        self.faults[name] = [*faults[:-1], *[faults[-1]] * times]

    def heal(self):
        """Forget the faults and the requests."""
        self.faults, self.requests, self.sent, self.at_byte = {}, [], 0, None

    def asked(self, name=None):
        return [request for request in self.requests if name in (None, request.name)]

    def note(self, size, request):
        with self.lock:
            self.sizes.add(size)
            self.requests.append(request)
            faults = self.faults.get(request.name)
            return faults.pop(0) if faults else Fault()

    def count(self, n_bytes):
        with self.lock:
            self.sent += n_bytes

    def pause(self):
        with self.lock:
            due = self.at_byte and self.sent >= self.at_byte[0]
            action, self.at_byte = (self.at_byte[1], None) if due else (None, self.at_byte)
        if action:
            action()
        time.sleep(self.seconds_per_piece)

    def wait_for_nobody(self):
        """Return when all clients have disconnected, so that the list of requests is complete."""
        while self.connections:
            time.sleep(0.01)

    def handle_error(self, request, client_address):
        if not isinstance(
            sys.exc_info()[1], OSError
        ):  # OSError: the client was killed or has disconnected
            super().handle_error(request, client_address)

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.thread.join()
        self.stopping.set()
        self.gate.set()
        for connection in self.connections.copy():  # connections that a client keeps open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
