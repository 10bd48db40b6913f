"""A real local HTTP server of files, with ranges, that fails on demand: 500, reset, silence, slow and short answers."""

import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Where = tuple[str, int, int]
"""file, first byte, last byte + 1"""
Fault = Callable[[int, Where], str]
"""(number of the request, what it asks for) -> "" | 500 | 404 | reset | silent | slow | short | cut | whole | gzip |
other range | redirect to ADDRESS"""
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST


class FaultyServer:
    """Serves `files` at `url`; `fault` decides what goes wrong; `seen` counts requests by what became of them."""

    def __init__(self, files: dict[str, bytes], fault: Fault = lambda number, where: "") -> None:
        self.files, self.fault, self.seen = files, fault, Counter[str]()
        self._lock, self._count = threading.Lock(), 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self, where: Where) -> str:
        with self._lock:
            self._count += 1
            fault = self.fault(self._count, where)
            self.seen[fault or "fine"] += 1
        return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._head(200, len(outer.files.get(self.path[1:], b"")))

            def do_GET(self) -> None:
                content = outer.files.get(self.path[1:])
                if content is None:
                    return self._head(404, 0)
                asked = self.headers.get("Range")
                start, stop = 0, len(content)
                if asked:
                    first, last = asked.removeprefix("bytes=").split("-")
                    start, stop = int(first), min(stop, int(last) + 1) if last else stop
                fault = outer._next_fault((self.path[1:], start, stop))
                if fault in ("500", "404"):
                    return self._head(int(fault), 0)
                if fault.startswith("redirect to "):
                    self.send_response(302)
                    self.send_header("Location", fault.removeprefix("redirect to "))
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                if fault == "other range":
                    start, stop = start + 1, stop + 1
                if asked and start >= len(content):
                    return self._head(416, 0, f"bytes */{len(content)}")
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    self.close_connection = True
                    return self.connection.close()
                if fault == "silent":
                    time.sleep(1.5)
                    self.close_connection = True
                    return None
                if fault == "whole":
                    asked, start, stop = None, 0, len(content)
                body = content[start:stop]
                if fault == "short":  # a complete answer of too few bytes
                    body = body[: len(body) // 2]
                place = f"bytes {start}-{stop - 1}/{len(content)}" if asked else ""
                self._head(206 if asked else 200, len(body), place, encoding="gzip" if fault == "gzip" else "")
                if fault == "cut":  # the connection ends within the answer
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return None
                if fault == "slow":
                    for piece in (body[: len(body) // 2], body[len(body) // 2 :]):
                        time.sleep(0.1)
                        self.wfile.write(piece)
                        self.wfile.flush()
                    return None
                self.wfile.write(body)

            def _head(self, status: int, length: int, content_range: str = "", encoding: str = "") -> None:
                self.send_response(status)
                if encoding:
                    self.send_header("Content-Encoding", encoding)
                if self.path[1:] in outer.files:
                    self.send_header("ETag", f'"{zlib.crc32(outer.files[self.path[1:]]):08x}"')
                self.send_header("Content-Length", str(length))
                self.send_header("Accept-Ranges", "bytes")
                if content_range:
                    self.send_header("Content-Range", content_range)
                self.end_headers()

        return Handler
