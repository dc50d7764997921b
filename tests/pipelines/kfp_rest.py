"""The part of Kubeflow Pipelines' v2beta1 REST API that `submit` and `schedule` use, in memory. It is no KFP.

Written from backend/api/v2beta1 of kubeflow/pipelines 2.17: paths, field names, paging, equality filters, errors. A
run does nothing here; a test says how it goes by `script`.
"""

import json
import re
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

PAGE = 2  # smaller than what is asked for, so that a caller that reads one page only is found out
PREFIX = "/apis/v2beta1"


class Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class State:
    def __init__(self):
        self.pipelines, self.versions, self.experiments, self.runs, self.recurring = {}, {}, {}, {}, {}
        self.script = []  # what the next looks at a run find: (state, {task: state}) or an HTTP status
        self.ended = {}  # runs as they were when they ended
        self.minutes = 30  # that every task takes
        self.multi_user = False
        self.log = []  # (method, path)

    def listed(self, collection, field, query):
        rows = list(collection.values())
        for predicate in json.loads(query.get("filter", ["{}"])[0]).get("predicates", []):
            value = predicate.get("stringValue", predicate.get("string_value"))
            rows = [row for row in rows if row.get(predicate["key"]) == value]
        start = int(query.get("page_token", ["0"])[0] or 0)
        answer = {field: rows[start : start + PAGE], "total_size": len(rows)}
        if start + PAGE < len(rows):
            answer["next_page_token"] = str(start + PAGE)
        return answer

    def create(self, collection, key, body):
        made = {**body, key: str(uuid.uuid4())}
        collection[made[key]] = made
        return made

    def find(self, collection, one):
        if one not in collection:
            raise Refused(404, f"{one} not found")
        return collection[one]

    def check_reference(self, body):
        reference = body["pipeline_version_reference"]
        version = self.find(self.versions, reference["pipeline_version_id"])
        if version["pipeline_id"] != reference["pipeline_id"]:
            raise Refused(400, "the version is not one of this pipeline")

    def look(self, run):
        if run["run_id"] in self.ended:
            return self.ended[run["run_id"]]
        step = self.script.pop(0) if len(self.script) > 1 else (self.script or [("SUCCEEDED", {})])[0]
        if isinstance(step, int):
            raise Refused(step, "not now")
        state, tasks = step
        clock = {"start_time": "2026-01-01T00:00:00Z", "end_time": f"2026-01-01T00:{self.minutes:02}:00Z"}
        details = [{"display_name": name, "state": value, "task_id": name, **clock} for name, value in tasks.items()]
        found = {**run, "state": state, "run_details": {"task_details": details}}
        if state in ("SUCCEEDED", "FAILED", "CANCELED"):
            self.ended[run["run_id"]] = found
        return found

    def answer(self, method, path, query, body):
        self.log.append((method, path))
        if path == "/healthz":
            return {"multi_user": self.multi_user}
        if path == "/pipelines":
            if method == "GET":
                return self.listed(self.pipelines, "pipelines", query)
            if any(one["name"] == body["name"] for one in self.pipelines.values()):
                raise Refused(409, f"the pipeline {body['name']} exists")
            return self.create(self.pipelines, "pipeline_id", body)
        if path == "/pipelines/upload_version":
            name, pipeline = query["name"][0], self.find(self.pipelines, query["pipelineid"][0])
            if any(one["name"] == name for one in self.versions.values()):
                raise Refused(409, f"the version {name} exists")
            return self.create(
                self.versions,
                "pipeline_version_id",
                {"pipeline_id": pipeline["pipeline_id"], "name": name, "display_name": name},
            )
        if match := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            mine = {key: one for key, one in self.versions.items() if one["pipeline_id"] == match[1]}
            return self.listed(mine, "pipeline_versions", query)
        if path == "/experiments":
            if method == "GET":
                return self.listed(self.experiments, "experiments", query)
            return self.create(self.experiments, "experiment_id", body)
        if match := re.fullmatch(r"/experiments/([^/]+)", path):
            return self.find(self.experiments, match[1])
        if path == "/runs" and method == "GET":
            newest = {key: self.ended.get(key, one) for key, one in reversed(self.runs.items())}
            return self.listed(newest, "runs", query)
        if path == "/runs" and method == "POST":
            self.check_reference(body)
            return self.create(self.runs, "run_id", {**body, "state": "PENDING"})
        if match := re.fullmatch(r"/runs/([^/]+)", path):
            return self.look(self.find(self.runs, match[1]))
        if path == "/recurringruns":
            if method == "GET":
                return self.listed(self.recurring, "recurringRuns", query)
            self.check_reference(body)
            if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                raise Refused(400, "Schedule cron is not supported")
            return self.create(self.recurring, "recurring_run_id", body)
        if match := re.fullmatch(r"/recurringruns/([^/:]+):disable", path):
            self.find(self.recurring, match[1])["mode"] = "DISABLE"
            return {}
        if (match := re.fullmatch(r"/recurringruns/([^/:]+)", path)) and method == "DELETE":
            if self.find(self.recurring, match[1])["mode"] != "DISABLE":
                raise Refused(400, "disable it first")  # stricter than KFP: a schedule that still fires is not deleted
            return self.recurring.pop(match[1]) and {}
        raise Refused(404, f"no {method} {path}")


@contextmanager
def serving(port=0):
    """The state, and the address at which it is served; at any free port, where none is given."""
    state = State()

    class Handler(BaseHTTPRequestHandler):
        def _do(self):
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlparse(self.path)
            path = address.path.removeprefix(PREFIX)
            is_json = "json" in (self.headers.get("Content-Type") or "")
            try:
                body = json.loads(data) if data and is_json else None
                answer, status = state.answer(self.command, path, parse_qs(address.query), body), 200
            except Refused as refused:
                answer, status = (
                    {"error": str(refused), "code": 5, "message": str(refused), "details": []},
                    refused.status,
                )
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = _do

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
