"""`rrtc export --push-to-hub`, against a small server that answers as a hub does where files are uploaded by its older
protocol (git-lfs's). The newer one (Xet), which the real hub offers as well, is not tested here."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import warm
import yaml
from typer.testing import CliRunner

from rrtc.cli.app import app

CHECKS = """
import sys
from rrtc.errors import RrtcError
from rrtc.export.push import check_push
for name in sys.argv[1:]:
    try:
        check_push(name.removesuffix(" (private)"), name.endswith(" (private)"))
        print("fine")
    except RrtcError as error:
        print(error.exit_code, error.sentence, "|", error.hint)
"""
DAMAGE = """
from rrtc.io.shard_writer import ShardWriter
add = ShardWriter.add_blocks
damaged = lambda name, block: block.flip(0) if name.endswith("up_proj.weight") else block
ShardWriter.add_blocks = lambda self, name, blocks: add(self, name, [damaged(name, block) for block in blocks])
"""
RUN = "from rrtc.cli.app import main; main()"


class Hub(ThreadingHTTPServer):
    """Knows the user "me", whose token is "good", and the repositories in `there`. Keeps what it was asked, and what
    was uploaded. Everything that holds NUL bytes or ends in .safetensors is for LFS."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.there = {"me/full": [".gitattributes", "model.safetensors"], "me/empty": [".gitattributes", "README.md"]}
        self.hidden: set[str] = set()  # that nobody else sees
        self.asked: list[str] = []
        self.made: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.full = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = "good") -> dict[str, str]:
        unset = {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"}
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        return kept | own | ({"HF_TOKEN": token} if token else {})


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self.answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self):
        path, body = self.path.split("?")[0], self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/agent-harnesses":  # huggingface_hub's own statistics
            return self.send(404, {})
        self.server.asked.append(f"{self.command} {path}")
        what = path.split("/")
        if self.command == "PUT":
            self.server.blobs[what[-1]] = body
            return self.send(200, {})
        if self.headers.get("Authorization") != "Bearer good":
            return self.send(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self.send(200, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.send(200, {"url": f"{self.server.url}/me/{self.server.made[-1]['name']}", "id": "1"})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if what[-2] == "preupload":
            files = json.loads(body)["files"]
            answers = [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in files
            ]  # fmt: skip
            return self.send(200, {"files": answers})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**blob, "actions": {"upload": {"href": f"{self.server.url}/blob/{blob['oid']}"}}}
                for blob in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if what[-2] == "commit":
            if self.server.full:
                return self.send(403, {"error": "Private storage is full."})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]
            return self.send(200, {"success": True, "commitUrl": f"{self.server.url}/c/1", "commitOid": "1"})
        name = "/".join(what[3:5])
        if path.startswith("/api/models/") and name in self.server.there:
            if len(what) == 5:
                return self.send(200, {"id": name, "private": name in self.server.hidden})
            files = self.server.there[name]
            return self.send(200, [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files])
        return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, value, headers: dict | None = None):
        body = json.dumps(value).encode()
        self.send_response(status)
        about = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, text in (about | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def python(code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    return warm.run([sys.executable, "-c", code, *map(str, arguments)], **environment)


@pytest.mark.slow
def test_a_verified_export_is_pushed_whole_and_what_was_asked_comes_before_the_work(rrt, hub, tmp_path):
    out = tmp_path / "out"
    arguments = ["export", rrt, "-o", out, "--push-to-hub", "me/new", "--private", "--max-shard-size", "100KB"]
    done = python(RUN, *arguments, "--json", tmp_path / "result.json", env=hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    written = {file.name: file.read_bytes() for file in out.iterdir()}
    assert hub.files | {"rrtc.yaml": b""} == written | {"rrtc.yaml": b""} and len(hub.blobs) > 2
    here = str(rrt.parent).encode()
    assert here in written["rrtc.yaml"] and not any(here in content for content in hub.files.values())
    said, public = yaml.safe_load(written["rrtc.yaml"]), yaml.safe_load(hub.files["rrtc.yaml"])
    assert public["measured"] == said["measured"] and public["base"]["path"] == Path(said["base"]["path"]).name
    assert [(made["name"], made.get("visibility") or made.get("private")) for made in hub.made] in (
        [("new", "private")], [("new", True)],
    )  # fmt: skip
    assert hub.asked[0] == "GET /api/whoami-v2" and hub.asked[-1] == "POST /api/models/me/new/commit/main"
    assert json.loads((tmp_path / "result.json").read_text())["pushed_to"] == f"{hub.url}/me/new"
    assert f"Pushed to {hub.url}/me/new." in done.stdout


@pytest.mark.slow
def test_nothing_is_pushed_where_verification_fails(rrt, hub, tmp_path):
    arguments = ["export", rrt, "-o", tmp_path / "out", "--push-to-hub", "me/new"]
    done = python(DAMAGE + RUN, *arguments, env=hub.environment(tmp_path))
    assert done.returncode == 1 and "a logit differs by" in done.stderr
    assert not hub.made and not hub.files and not (tmp_path / "out").exists()
    assert all(asked.startswith("GET ") for asked in hub.asked)


@pytest.mark.slow
def test_a_push_that_fails_leaves_the_export_and_says_how_to_go_on(rrt, hub, tmp_path):
    hub.full, out = True, tmp_path / "out"
    done = python(RUN, "export", rrt, "-o", out, "--push-to-hub", "me/new", env=hub.environment(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"The export in {out} is whole, but was not pushed to me/new: " in done.stderr
    assert f"Hint: Push it with: hf upload me/new {out}" in done.stderr
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
def test_what_is_checked_before_the_work(hub, tmp_path):
    hub.there["me/hidden"], hub.hidden = hub.there["me/empty"], {"me/hidden"}
    names = ("me/new", "new", "me/empty", "me/full", "full", "a/b/c", "not a name")
    names += ("me/empty (private)", "me/hidden (private)", "me/hidden", "me/new (private)")
    done = python(CHECKS, *names, env=hub.environment(tmp_path))
    full = (
        "1 There are files in me/full on the hub already, such as model.safetensors. | "
        "Name a new repository: rrtc overwrites nothing."
    )
    assert done.stdout.splitlines() == [
        "fine", "fine", "fine", full, full,
        "2 'a/b/c' is no name of a repository. | Write it as user/name.",
        "2 'not a name' is no name of a repository. | Write it as user/name.",
        "1 me/empty is on the hub already, where everybody sees it. | Make it private there, or name a new one.",
        "fine", "fine", "fine",
    ]  # fmt: skip
    login = "Run 'hf auth login', or set HF_TOKEN, to a token that may write."
    done = python(CHECKS, "me/new", env=hub.environment(tmp_path, token=None))
    assert done.stdout == f"1 There is no Hugging Face token on this machine, so nothing can be pushed. | {login}\n"
    asked = len(hub.asked)
    for environment in (hub.environment(tmp_path, token="bad"), hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}):
        done = python(CHECKS, "me/new", env=environment)
        assert done.stdout.startswith("1 The hub does not let you in: ") and done.stdout.endswith(f". | {login}\n")
    assert len(hub.asked) == asked + 1 and not hub.made


@pytest.mark.slow
def test_nobody_listens(tmp_path):
    hub = Hub()
    hub.server_close()
    done = python(CHECKS, "me/new", env=hub.environment(tmp_path))
    assert done.stdout.startswith("1 The hub does not let you in: ") and "Traceback" not in done.stderr


def test_private_is_for_what_is_pushed(rrt, tmp_path):
    done = CliRunner().invoke(app, ["export", str(rrt), "-o", str(tmp_path / "out"), "--private"])
    assert done.exit_code == 2 and "Only what is pushed can be private." in done.stderr
