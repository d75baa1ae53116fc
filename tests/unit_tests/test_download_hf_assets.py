"""The download script against a stand-in for the Hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest

COMMIT = "c" * 40
FILES = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"eos_token": "end"}',
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00001.safetensors": bytes(range(256)) * 100_000,  # the library writes 10 MB at a time
    "original/tokenizer.model": b"other software's",
    "README.md": b"words",
}


class Hub(BaseHTTPRequestHandler):
    """One model, team/tiny; `gone` says after how many bytes of weights the line drops, once."""

    gone: int | None = None
    ranges: list[str] = []

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = urlparse(self.path).path
        model, revisions = "/api/models/team/tiny", ("main", COMMIT)
        if path in [f"{model}/tree/{revision}" for revision in revisions]:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in FILES.items()
            ]
            self.reply(json.dumps(tree).encode(), with_body)
        elif path in (model, *(f"{model}/revision/{revision}" for revision in revisions)):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "team/tiny", "sha": COMMIT, "siblings": siblings}
            self.reply(json.dumps(info).encode(), with_body)
        elif "/team/tiny/resolve/" in path and (name := path.split("/", 5)[5]) in FILES:
            self.reply(FILES[name], with_body)
        elif "/team/gated/" in path or path.endswith("/team/gated"):
            self.refuse(403, "GatedRepo")
        elif path.startswith(model):
            self.refuse(404, "RevisionNotFound")
        else:
            self.refuse(404, "RepoNotFound")

    def reply(self, body, with_body):
        etag, whole = hashlib.sha256(body).hexdigest(), len(body)
        first = 0
        if given := self.headers.get("Range"):
            Hub.ranges.append(given)
            first = int(given.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{whole - 1}/{whole}")
        self.send_header("Content-Length", str(whole - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if with_body:
            stop = whole
            if Hub.gone is not None and whole > Hub.gone:
                stop, Hub.gone = Hub.gone, None
                self.close_connection = True
            self.wfile.write(body[first:stop])

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.gone, Hub.ranges = None, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(hub, folder, *arguments, repo="team/tiny"):
    command = [sys.executable, "scripts/download_hf_assets.py", "--repo_id", repo]
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {k: v for k, v in os.environ.items() if "PROXY" not in k.upper()} | quiet
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home")}
    return subprocess.run(
        [*command, "--local_dir", str(folder / "assets"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )


def names(folder):
    found = folder / "assets" / "tiny"
    return sorted(path.name for path in found.rglob("*") if path.is_file() and ".cache" not in str(path))


def test_what_is_asked_for_is_fetched(hub, tmp_path):
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["tokenizer.json", "tokenizer_config.json"]
    assert done.stdout == f"{tmp_path}/assets/tiny: tokenizer.json, tokenizer_config.json\n"
    done = download(hub, tmp_path, "--assets", "all")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == sorted(n for n in FILES if "/" not in n and n != "README.md")
    for name in names(tmp_path):
        assert (tmp_path / "assets" / "tiny" / name).read_bytes() == FILES[name]


def test_an_interrupted_download_goes_on(hub, tmp_path):
    Hub.gone = 15_000_000
    first = download(hub, tmp_path, "--assets", "safetensors")
    if first.returncode:  # else the library has gone on by itself
        assert "goes on where it stopped" in first.stderr
        assert download(hub, tmp_path, "--assets", "safetensors").returncode == 0
    assert any(not given.startswith("bytes=0-") for given in Hub.ranges)
    (name,) = names(tmp_path)
    assert (tmp_path / "assets" / "tiny" / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(
    ("repo", "arguments", "expected"),
    [
        ("team/none", (), "team/none: there is no such model, or it is private"),
        ("team/gated", (), "team/gated: is behind a license."),
        ("team/tiny", ("--revision", "v9"), "team/tiny: has no revision 'v9'."),
    ],
)
def test_refusals_say_what_to_do(hub, tmp_path, repo, arguments, expected):
    done = download(hub, tmp_path, *arguments, repo=repo)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(expected)
    assert "Traceback" not in done.stderr
