"""A small W&B server on this machine, to see what a client sends: no more than the client needs."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


class Server(ThreadingHTTPServer):
    """What it got: runs by id with their history lines, artifacts by name, and who used which."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.exits: dict[str, list[int]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.used: list[tuple[str, str]] = []
        self.operations: list[str] = []
        self.troubles: list[str] = []  # of this server, so that a test can say there were none

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client that leaves is no trouble
            self.troubles.append(repr(error))

    def rows(self, run: str) -> list[dict[str, Any]]:
        """A run's history in the order of its lines."""
        lines = self.history.get(run, {})
        return [lines[number] for number in sorted(lines)]

    def config(self, run: str) -> dict[str, Any]:
        config = json.loads(self.runs[run]["config"])
        return {key: entry["value"] for key, entry in config.items() if key != "_wandb"}

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer to an operation with its variables."""
        self.operations.append(name)
        handle = getattr(self, f"_{name}", None)
        return handle(given.get("input", given)) if handle else {}

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        """Take a part of a run's files."""
        part = sent.get("files", {}).get(HISTORY, {})
        for number, line in enumerate(part.get("content", []), part.get("offset", 0)):
            self.history.setdefault(run, {})[number] = json.loads(line)
        if sent.get("complete"):
            self.exits.setdefault(run, []).append(sent["exitcode"])

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "username": "me", "entity": "me", "flags": "{}"}}

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = given["name"]
        bucket = None
        if run in self.runs:
            tail = [json.dumps(row) for row in self.rows(run)[-1:]]
            bucket = {
                "id": run, "name": run, "displayName": self.runs[run]["displayName"],
                "summaryMetrics": "{}", "config": self.runs[run]["config"], "tags": [],
                "historyLineCount": len(self.rows(run)), "eventsLineCount": 0, "logLineCount": 0,
                "historyTail": json.dumps(tail), "eventsTail": "[]", "wandbConfig": '{"t": 1}',
            }  # fmt: skip
        return {"model": {"id": "p", "name": given["project"], "bucket": bucket} | ENTITY}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        run = given["name"]
        known = self.runs.setdefault(run, {})
        inserted = not known
        known |= {key: value for key, value in given.items() if value is not None}
        project = {"id": "p", "name": given.get("project") or known["project"]} | ENTITY
        lines = len(self.rows(run))
        bucket = {"id": run, "name": run, "displayName": known.get("displayName"),
                  "description": None, "config": known.get("config"), "sweepName": None,
                  "historyLineCount": lines, "project": project}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in given["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["artifactCollectionName"]
        self.artifacts.setdefault(name, given)
        sequence = {"id": name, "latestArtifact": None}
        artifact = {"id": name, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": f"{self.address}/upload",
                "uploadHeaders": []}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        answer = self._CreateArtifactManifest(given)["createArtifactManifest"]
        return {"updateArtifactManifest": answer}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {"node": {"id": spec["name"], "name": spec["name"], "displayName": spec["name"],
                      "uploadUrl": f"{self.address}/upload", "uploadHeaders": [],
                      "storagePath": "s", "uploadMultipartUrls": None,
                      "artifact": {"id": spec["artifactID"]}}}
            for spec in given["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def _UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.used.append((given["runName"], given["artifactID"]))
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}


ENTITY = {"entity": {"id": "e", "name": "me"}}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self._body()
        if self.path == "/graphql":
            asked = json.loads(sent)
            found = re.match(r"\s*(?:query|mutation)\s+(\w+)", asked["query"])
            name = found[1] if found else asked["query"][:80]
            self._reply({"data": self.server.answer(name, asked.get("variables") or {})})
        elif "/file_stream" in self.path:
            self.server.stream(self.path.split("/")[-2], json.loads(sent))
            self._reply({})
        else:
            self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        return body

    def _reply(self, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
