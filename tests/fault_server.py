"""A judge's endpoint on this machine that fails in the ways real ones do; loopback HTTP only."""

import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "429", "429 retry-after", "500", "502", "503", "529", "timeout", "reset", "cut", "no json",
    "no choices", "error in 200",
)  # fmt: skip
"""Faults that pass: the same question asked again may be answered."""

FATAL = {
    "401": (401, {"message": "Incorrect API key provided: {key}.", "code": "invalid_api_key"}),
    "403": (403, {"message": "You have no access to this project, {key}.", "code": None}),
    "402": (402, {"message": "Payment required.", "code": None}),
    "insufficient_quota": (429, {"message": "You exceeded your quota.",
                                 "type": "insufficient_quota", "code": "insufficient_quota"}),
    "model gone": (404, {"message": "The model `m` does not exist.", "code": "model_not_found"}),
    "no such address": (404, {"message": "Not Found", "code": None}),
    "model gone, 400": (400, {"message": "m is no model.", "code": "model_not_found"}),
}  # fmt: skip
"""Faults that stay for every question."""


def marked(text: str) -> str:
    """Return what stands between the last two marks of a question: the text to be rated."""
    return re.findall(r"<<<TEXT (\w+)>>>\n(.*)\n<<<END TEXT \1>>>", text, flags=re.DOTALL)[-1][1]


def honest(text: str) -> str:
    """Rate a text by its bytes, from 1 to 10, so that a test can tell the score beforehand."""
    return str(1 + hashlib.sha256(text.encode()).digest()[0] % 10)


class Endpoint:
    """What is answered, what goes wrong, and what was asked."""

    def __init__(self, rate=honest, seed=0) -> None:
        self.rate = rate
        self.faults: dict[str, float] = {}
        """How often each fault happens; what is left over is answered."""
        self.script: list[str] = []
        """Faults of the next requests, before any chance; an empty text is an answer."""
        self.fatal = ""
        self.retry_after = "0.01"
        self.hang = 0.5
        """Seconds that a request which times out is kept open."""
        self.slow = 0.0
        self.finish: str | None = "stop"
        self.usage: tuple[int, int] | None = (100, 2)
        self.message: dict = {}
        """Fields of the answer's message in place of its content."""
        self.requests: list[tuple[float, dict, dict]] = []
        """When each request came, its headers and its body."""
        self.answered: Counter[str] = Counter()
        """How often each text was answered in full."""
        self.at_once = self.most_at_once = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def texts(self) -> list[str]:
        return [marked(body["messages"][-1]["content"]) for _, _, body in self.requests]

    def next_fault(self) -> str:
        with self._lock:
            if self.fatal:
                return self.fatal
            if self.script:
                return self.script.pop(0)
            drawn = self._random.random()
            for fault, share in self.faults.items():
                drawn -= share
                if drawn < 0:
                    return fault
            return ""


def handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            return

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint._lock:
                headers = {name.lower(): value for name, value in self.headers.items()}
                endpoint.requests.append((time.monotonic(), headers, body))
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                time.sleep(endpoint.slow)
                self.answer(body, endpoint.next_fault())
            finally:
                with endpoint._lock:
                    endpoint.at_once -= 1

        def answer(self, body, fault):
            if fault in FATAL or fault in endpoint_statuses:
                self.refuse(fault)
            elif fault == "timeout":
                time.sleep(endpoint.hang)
                self.close_connection = True
            elif fault == "reset":
                # Zero seconds of lingering: it ends with a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.close_connection = True
                self.connection.close()
            elif fault == "no json":
                self.send(200, b"<html>Bad gateway</html>", {})
            elif fault == "no choices":
                self.send(200, b'{"id": "x", "object": "chat.completion", "choices": []}', {})
            elif fault == "error in 200":
                self.send(200, b'{"error": {"message": "upstream failed", "code": 502}}', {})
            else:
                assert fault in ("", "cut"), fault
                self.complete(body, cut=fault == "cut")

        def complete(self, body, cut):
            text = marked(body["messages"][-1]["content"])
            message = {"role": "assistant", "content": endpoint.rate(text), **endpoint.message}
            reply = {
                "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": endpoint.finish}],
            }  # fmt: skip
            if endpoint.usage is not None:
                prompt, completion = endpoint.usage
                reply["usage"] = {
                    "prompt_tokens": prompt, "completion_tokens": completion,
                    "total_tokens": prompt + completion,
                }  # fmt: skip
            if not cut:
                with endpoint._lock:
                    endpoint.answered[text] += 1
            self.send(200, json.dumps(reply).encode(), {}, cut=cut)

        def refuse(self, fault):
            headers = {}
            if fault in FATAL:
                status, error = FATAL[fault]
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                error = {**error, "message": error["message"].format(key=key)}
            else:
                status = int(fault.split()[0])
                error = {"message": f"{fault}, sorry", "type": "server_error", "code": None}
                if fault.endswith("retry-after"):
                    headers["Retry-After"] = endpoint.retry_after
            self.send(status, json.dumps({"error": error}).encode(), headers)

        def send(self, status, data, headers, cut=False):
            self.send_response(status)
            headers = {"Content-Type": "application/json", **headers}
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

    return Handler


endpoint_statuses = {
    fault for fault in (*FAULTS, "400", "408", "422") if fault.split()[0].isdecimal()
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Say nothing of connections that a test broke on purpose."""


@contextmanager
def serving(endpoint: Endpoint):
    """Serve an endpoint; give its address."""
    server = _Server(("127.0.0.1", 0), handler(endpoint))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
