"""HTTP: who is asking, for what, and what befalls the request."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.wandb_server.faults import Faults
from tests.support.wandb_server.graphql import Answers, Refused, path_of
from tests.support.wandb_server.store import EVENTS, HISTORY, OUTPUT, SUMMARY, Breach, Store


class Server(ThreadingHTTPServer):
    """One W&B."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, directory: Path, *, key: str, entities: tuple[str, ...], port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store = Store(directory / "store.db")
        self.faults = Faults()
        self.key = key
        self.answers = Answers(self.store, entities=entities, base_url=self.base_url)

    def base_url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error; anything else is a breach."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.store.breach(f"{client_address}: {error!r}")


class Cut(Exception):
    """The connection is closed now."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def handle_any(self) -> None:
        """Answer one request, or let a fault befall it."""
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:  # its sender was killed
            self.close_connection = True
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            status, answer = self._answer(body)
        except Cut:
            self.close_connection = True
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names that http.server looks for

    def log_message(self, *_: Any) -> None:
        """Nothing: the store knows."""

    def _answer(self, body: bytes) -> tuple[int, Any]:
        path = self.path.strip("/").split("/")
        if path[0] == "control":
            return 200, self._control(path[1], json.loads(body or b"{}"))
        name = self._name(path, body)
        fault = self.server.faults.take(name)
        if fault:
            self.server.store.tally(f"fault {fault['kind']}")
            self._befall(fault)
        if fault and fault["kind"] == "status":
            return fault["status"], {"errors": [{"message": f"told to answer {fault['status']}"}]}
        self.server.store.tally(name)
        answer = self._do(path, name, body)
        if fault and fault["kind"] == "unsaid":
            raise Cut
        return answer

    def _befall(self, fault: Any) -> None:
        match fault["kind"]:
            case "late":
                time.sleep(fault["seconds"])
            case "hang":
                self.server.faults.wait_lifted()
                raise Cut
            case "cut":
                raise Cut

    def _name(self, path: list[str], body: bytes) -> str:
        if path == ["graphql"]:
            return f"graphql/{operation_of(json.loads(body))}"
        return path[-1] if path[0] == "files" else path[0]

    def _do(self, path: list[str], name: str, body: bytes) -> tuple[int, Any]:
        if path[0] == "storage":  # its URL is the permission
            return 200, {}
        if not self._is_known():
            return 401, {"errors": [{"message": "user is not logged in"}]}
        try:
            if path == ["graphql"]:
                asked = json.loads(body)
                return 200, {"data": self.server.answers(operation_of(asked), asked.get("variables") or {})}
            if path[0] == "files" and path[-1] == "file_stream":
                return 200, self._file_stream(path_of(*path[1:4]), path[1:4], json.loads(body))
        except Refused as refused:
            return refused.status, {"data": None, "errors": [{"message": str(refused)}]}
        except Breach as breach:
            self.server.store.breach(str(breach))
            return 400, {"error": str(breach)}
        except KeyError as unknown:
            self.server.store.breach(f"{name}: {unknown} is not known")
            return 400, {"errors": [{"message": f"{name} is not known"}]}
        self.server.store.breach(f"{self.command} {self.path} is not known")
        return 404, {"error": "not found"}

    def _is_known(self) -> bool:
        expected = base64.b64encode(f"api:{self.server.key}".encode()).decode()
        return self.headers.get("Authorization") == f"Basic {expected}"

    def _file_stream(self, run: str, place: list[str], said: dict[str, Any]) -> dict[str, Any]:
        store = self.server.store
        if store.run(*place) is None:
            raise Refused(404, f"run {run} not found")
        for file, chunk in said.get("files", {}).items():
            if file == SUMMARY:
                store.replace(run, file, chunk["content"])
            elif file in (HISTORY, EVENTS, OUTPUT):
                store.put(run, file, chunk["offset"], chunk["content"])
            else:
                raise Breach(f"{run}: {file} is no file of the stream")
        if said.get("complete"):
            store.upsert(*place, {"exitcode": said["exitcode"]})
        unknown = said.keys() - {"files", "complete", "exitcode", "uploaded", "preempting"}
        if unknown:
            raise Breach(f"{run}: {sorted(unknown)} is not known in a stream")
        return {}

    def _control(self, what: str, said: dict[str, Any]) -> Any:
        server = self.server
        match what:
            case "fault":
                server.faults.give(said)
            case "lift":
                server.faults.lift()
            case "breaches":
                return server.store.breaches()
            case "tallies":
                return server.store.tallies()
            case "artifacts":
                return server.store.artifacts()
            case "runs":
                return server.store.runs()
            case "make":
                server.store.upsert(said["entity"], said["project"], said["name"], {})
            case "replace":
                server.store.replace(said["run"], said["file"], said["lines"])
            case "lines":
                return server.store.lines(said["run"], said["file"])
        return {}


def operation_of(asked: dict[str, Any]) -> str:
    """What is asked: by its name, or where that is not said, by what the query calls itself."""
    said = (
        asked.get("operationName") or re.findall(r"^\s*(?:query|mutation)\s+(\w+)", asked.get("query") or "")[:1]
    )
    return said if isinstance(said, str) else "".join(said)


def serve(directory: Path, *, key: str, entities: tuple[str, ...]) -> None:
    """Listen until killed."""
    noted = directory / "port"
    server = Server(directory, key=key, entities=entities, port=int(noted.read_text()) if noted.exists() else 0)
    draft = directory / ".port"
    draft.write_text(str(server.server_address[1]))
    draft.rename(noted)
    server.serve_forever(poll_interval=0.05)
