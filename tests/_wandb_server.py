"""The part of wandb's server that its unpatched client uses, on 127.0.0.1.

It serves runs with their configurations and histories, sweeps of `method: grid`, and the agents that run
them. Nothing is kept on disk and nothing leaves the machine. Requests without an answer are listed in
`unknown`, so that the missing parts show when a newer client needs more.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

KEY = "0123456789" * 4
"""A key that the server accepts until `refusing` is set."""

USER = "tester"


@dataclass
class Run:
    """A run as the server stores it."""

    id: str
    project: str
    entity: str
    config: dict[str, Any] = field(default_factory=dict)
    """Values by key, without wandb's own `_wandb`."""
    group: str | None = None
    display_name: str | None = None
    tags: tuple[str, ...] = ()
    sweep: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per step, as logged."""
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None


@dataclass
class Artifact:
    """Files that a run has stored for later use."""

    id: str
    name: str
    type: str
    run: str
    metadata: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    """Contents by name; `manifest` is wandb's own list of the files."""
    committed: bool = False


@dataclass
class SweepRecord:
    """A registered sweep, and the number of its points that agents have received."""

    id: str
    project: str
    entity: str
    config: dict[str, Any]
    warnings: list[str]
    """Violations of wandb's schema in the configuration."""
    handed: int = 0

    @property
    def points(self) -> list[dict[str, Any]]:
        return grid(self.config["parameters"])


class WandbServer:
    """A server that runs for the duration of a `with` block.

    Attributes:
        refusing: while True, every key is answered with 401.
        runs, sweeps, artifacts: objects that clients have created, by id.
        asked: (operation, variables) of each GraphQL request, in order.
        unknown: requests that this server cannot answer.
    """

    def __init__(self) -> None:
        self.refusing = False
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, SweepRecord] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.agents: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self._http.unknown = self.unknown

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, key: str = KEY) -> dict[str, str]:
        """Return the environment variables with which a client connects to this server and to no other."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": key,
            "WANDB_ERROR_REPORTING": "false",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # Operations of wandb's GraphQL, by name. Each returns the `data` of its answer.

    def answer(self, operation: str, query: str, given: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((operation, given))
        answers = {
            "Viewer": self._viewer,
            "GetDefaultEntity": self._viewer,
            "ServerFeaturesQuery": self._features,
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._sweep_with_runs,
            "CreateAgent": self._create_agent,
            "Heartbeat": self._heartbeat,
            "UpsertBucket": self._upsert_run,
            "RunResumeStatus": self._resume_status,
            "CreateRunFiles": self._create_files,
            "OrganizationCoreWeaveOrganizationID": self._organization,
            "ArtifactType": self._artifact_type,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_manifest,
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": self._commit_artifact,
        }
        if operation not in answers:
            self.unknown.append(f"{operation} {given}\n{query}")
            return {}
        return answers[operation](given)

    def _viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": USER, "username": USER, "email": f"{USER}@localhost",
                           "flags": "{}", "teams": {"edges": [{"node": {"name": USER}}]}}}  # fmt: skip

    def _features(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _upsert_sweep(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["entityName"] not in (None, USER):
            raise PermissionError(f"permission denied for {given['entityName']}")
        config = yaml.safe_load(given["config"])
        sweep = SweepRecord(
            id=f"sweep{len(self.sweeps)}",
            project=given["projectName"],
            entity=given["entityName"] or USER,
            config=config,
            warnings=violations(config),
        )
        self.sweeps[sweep.id] = sweep
        named = {"id": "p", "name": sweep.project, "entity": {"id": "e", "name": sweep.entity}}
        return {"upsertSweep": {"sweep": {"name": sweep.id, "project": named},
                                "configValidationWarnings": sweep.warnings}}  # fmt: skip

    def _sweep_with_runs(self, given: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps.get(given["sweep"])
        if sweep is None or (sweep.entity, sweep.project) != (given["entity"], given["project"]):
            return {"project": None}
        described = {"id": sweep.id, "name": sweep.id, "method": "grid", "state": "RUNNING",
                     "config": yaml.safe_dump(sweep.config), "runs": {"edges": []}}  # fmt: skip
        return {"project": {"sweep": described}}

    def _create_agent(self, given: dict[str, Any]) -> dict[str, Any]:
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = given["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[self.agents[given["id"]]]
        commands: list[dict[str, Any]] = []
        if not json.loads(given["runState"]):  # an agent gets one run at a time
            if sweep.handed < len(sweep.points):
                point = sweep.points[sweep.handed]
                run = f"{sweep.id}run{sweep.handed}"
                sweep.handed += 1
                args = {key: {"value": value} for key, value in point.items()}
                commands = [{"type": "run", "run_id": run, "program": sweep.config["program"],
                             "args": args}]  # fmt: skip
            else:
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def _upsert_run(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        inserted = run is None
        if run is None:
            run = Run(given["name"], given["project"], given.get("entity") or USER)
            self.runs[run.id] = run
        config = json.loads(given.get("config") or "{}")
        run.config |= {key: entry["value"] for key, entry in config.items() if key != "_wandb"}
        run.summary |= json.loads(given.get("summaryMetrics") or "{}")
        run.group = given.get("groupName") or run.group
        run.display_name = given.get("displayName") or run.display_name or run.id
        run.sweep = given.get("sweep") or run.sweep
        run.tags = tuple(given.get("tags") or run.tags)
        return {"upsertBucket": {"bucket": self._described(run), "inserted": inserted}}

    def _resume_status(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = self._described(run) if run else None
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": USER},
                          "bucket": bucket}}  # fmt: skip

    def _described(self, run: Run) -> dict[str, Any]:
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}}
        return {
            "id": run.id,
            "name": run.id,
            "displayName": run.display_name,
            "description": None,
            "notes": None,
            "tags": list(run.tags),
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "sweepName": run.sweep,
            "project": project,
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }

    def _create_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _organization(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _artifact_type(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["input"]
        name = asked["artifactCollectionName"]
        artifact = Artifact(f"artifact{len(self.artifacts)}", name, asked["artifactTypeName"],
                            asked["runName"], json.loads(asked.get("metadata") or "{}"))  # fmt: skip
        self.artifacts[artifact.id] = artifact
        return {"createArtifact": {"artifact": {"id": artifact.id, "state": "PENDING",
                "artifactSequence": {"id": name, "latestArtifact": None}}}}  # fmt: skip

    def _create_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact_id = given["artifactID"]
        file = {"id": artifact_id, "name": "manifest", "displayName": "manifest", "storagePath": "manifest",
                "uploadUrl": f"{self.url}/artifact/{artifact_id}/manifest", "uploadHeaders": []}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact_id, "file": file}}}

    def _create_artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "node": {
                    "name": file["name"],
                    "displayName": file["name"],
                    "storagePath": file["name"],
                    "uploadUrl": f"{self.url}/artifact/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _commit_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[given["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}

    # Rows and files do not go through GraphQL.

    def stream(self, run_id: str, given: dict[str, Any]) -> None:
        run = self.runs[run_id]
        files = given.get("files") or {}
        rows = files.get("wandb-history.jsonl")
        if rows:
            del run.history[rows["offset"] :]
            run.history += [json.loads(line) for line in rows["content"]]
        for line in files.get("wandb-summary.json", {}).get("content", ()):
            run.summary |= json.loads(line)
        if given.get("complete"):
            run.exit_code = given["exitcode"]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    unknown: list[str]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client closed the connection
            self.unknown.append(traceback.format_exc())


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.body()
            with server.lock:
                self.reply(*self.posted(body))

        def do_PUT(self) -> None:
            body = self.body()
            with server.lock:
                _, kind, owner, name = unquote(self.path).split("/", 3)
                owners = {"upload": server.runs, "artifact": server.artifacts}[kind]
                owners[owner].files[name] = body  # type: ignore[attr-defined]
            self.reply(200, {})

        def do_GET(self) -> None:
            server.unknown.append(f"GET {self.path}")
            self.reply(404, {})

        def posted(self, body: bytes) -> tuple[int, dict[str, Any]]:
            if server.refusing or self.key() != KEY:
                return 401, {"errors": [{"message": "invalid API key"}]}
            given = json.loads(body)
            if self.path == "/graphql":
                asked = re.search(r"(query|mutation)\s+(\w+)", given["query"])
                assert asked is not None
                values = given.get("variables") or {}
                try:
                    return 200, {"data": server.answer(asked[2], given["query"], values)}
                except PermissionError as error:
                    return 200, {"errors": [{"message": str(error)}], "data": None}
            path = self.path.split("/")  # /files/ENTITY/PROJECT/RUN/file_stream
            if path[-1] == "file_stream" and path[-2] in server.runs:
                server.stream(path[-2], given)
                return 200, {}
            server.unknown.append(f"POST {self.path} {body[:200]!r}")
            return 404, {}

        def key(self) -> str:
            basic = self.headers.get("Authorization", "").removeprefix("Basic ")
            return base64.b64decode(basic).decode().partition(":")[2]

        def body(self) -> bytes:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            packed = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(content) if packed else content

        def reply(self, status: int, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


# The grid and the schema of wandb's server, modelled on wandb/sweeps 0.3.0 (MIT licence). That package
# cannot be installed here, since it requires numpy below 2.


def grid(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the points of a grid in the order in which agents get them: keys sorted, the last key fastest."""
    axes = {
        key: [spec["value"]] if "value" in spec else spec["values"]
        for key, spec in sorted(parameters.items())
    }
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


_TYPES: dict[str, type] = {"apiVersion": str, "kind": str, "controller": dict, "description": str,
                           "program": str, "job": str, "image_uri": str, "entity": str, "project": str,
                           "method": str, "command": list, "name": str, "run_cap": int, "metric": dict,
                           "early_terminate": dict, "parameters": dict}  # fmt: skip
"""Types of a sweep's keys. `metrics` and `scheduler` are left out, since a grid cannot have them."""


def violations(config: Any) -> list[str]:
    """Return the violations of wandb's schema in a sweep of `method: grid`."""
    if not isinstance(config, dict):
        return [f"{config!r} is not of type 'object'"]
    messages = [
        f"{key}: {value!r} is not allowed here"
        for key, value in config.items()
        if not isinstance(value, _TYPES.get(key, ()))
    ]
    if config.get("method") != "grid":
        messages.append(f"method: {config.get('method')!r} is not 'grid'")
    parameters = config.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        return [*messages, "'parameters' is a required property"]
    for name, spec in parameters.items():
        if not re.match(r"^[A-Za-z_][A-Za-z0-9_.-]*$", str(name)):
            messages.append(f"{name!r} does not match the pattern of a parameter's name")
        of_values = (
            isinstance(spec, dict) and isinstance(spec.get("values"), list) and spec["values"]
        )
        one_value = isinstance(spec, dict) and "value" in spec
        kind = "categorical" if of_values else "constant"
        rest = set(spec) - {"values" if of_values else "value"} if of_values or one_value else {"?"}
        if rest - {"distribution"} or (rest and spec["distribution"] != kind):
            messages.append(f"{name}: {spec!r} is not valid under any of the given schemas")
    return messages
