"""A web server on 127.0.0.1 that serves the files of a model, with faults on demand."""

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ALWAYS = 1000  # requests
PIECE = 1 << 15  # bytes that are sent at a time
SO_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() discards unsent bytes and resets


@dataclass
class Fault:
    """How an answer differs from the correct one, which is the requested file or its rest."""

    status: int | None = None  # answer with this status and without the file
    headers: str = ""  # "Name: value", or "Name" alone to omit a header
    change: Callable[[bytes], bytes] | None = None  # another body, with its own Content-Length
    silent: bool = False  # `then` comes before the status line
    sends: int | None = None  # bytes of the body; None: all
    then: str | None = None  # after that: "close", "reset" or "stall" the connection
    ignores_range: bool = False


@dataclass
class Request:
    """A request, and what was sent."""

    size: str
    name: str
    headers: dict
    status: int | None = None
    sent: int = 0

    @property
    def start(self):
        """The offset in the Range header, or 0."""
        return int(self.headers.get("Range", "bytes=0-")[6:-1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 300
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.connections.append(self.connection)

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        size, name = self.path.removeprefix("/base/").split("/")
        request = Request(size, name, dict(self.headers))
        fault = self.server.note(request)
        self.server.gate.wait(300)
        if not fault.silent:
            self.answer(request, fault)
        if fault.then:
            self.leave(fault.then)

    def answer(self, request, fault):
        request.status, body, headers = self.file_or_rest(request, fault)
        if fault.change:
            body = fault.change(body)
        headers["Content-Length"] = len(body)
        name, colon, value = fault.headers.partition(": ")
        if colon:
            headers[name] = value.format(start=request.start)
        else:
            headers.pop(name, None)
        self.close_connection = "Content-Length" not in headers
        self.send_response(request.status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.send(body[: fault.sends], request)

    def file_or_rest(self, request, fault):
        """-> (status, body, headers) by RFC 9110, section 14."""
        if fault.status:
            return fault.status, b"an error's text", {"Content-Type": "text/plain"}
        whole = self.server.files[request.name]
        headers = {"Content-Type": "application/octet-stream"}
        start = request.start
        if start == 0 or fault.ignores_range:
            return 200, whole, headers
        if start >= len(whole):
            return 416, b"", headers | {"Content-Range": f"bytes */{len(whole)}"}
        headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        return 206, whole[start:], headers

    def send(self, body, request):
        for start in range(0, len(body), PIECE):
            piece = body[start : start + PIECE]
            request.sent += len(piece)  # first: tests may read it when the client has the bytes
            self.wfile.write(piece)

    def leave(self, then):
        self.close_connection = True
        if then == "stall":
            self.server.stopping.wait(300)
        elif then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_RESET)
            self.connection.close()  # before the server does, which would close it properly


class Server(ThreadingHTTPServer):
    """Serves `files` at {address}/{any size}/{name}; `with` starts and stops it."""

    daemon_threads = False  # closing waits for the threads, so none outlives its test
    request_queue_size = 64

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/base"
        self.files = files
        self.connections = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.gate = threading.Event()  # while it is not set, answers are held back
        self.gate.set()
        self.heal()

    def heal(self):
        """Forget the faults and the requests."""
        self.faults = {}
        self.requests = []

    def misbehave(self, name, *faults, times=1):
        """Answer requests for name with one fault each, and `times` of them with the last one.

        A number stands for a status, a text for a header.
        """
        kinds = {int: "status", str: "headers"}
        faults = [f if isinstance(f, Fault) else Fault(**{kinds[type(f)]: f}) for f in faults]
        self.faults[name] = faults[:-1] + faults[-1:] * times

    def asked(self, name):
        return [request for request in self.requests if request.name == name]

    def note(self, request):
        with self.lock:
            self.requests.append(request)
            faults = self.faults.get(request.name)
            return faults.pop(0) if faults else Fault()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # OSError: the client has disconnected
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
        for connection in self.connections:  # clients may keep them open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
