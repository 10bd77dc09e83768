"""Models on the hub: which files are fetched, the offline cache, and what is said when there is nothing to fetch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fairhuman_jax.weights.hub import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
SHARDS = {
    "weight_map": {
        "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
}
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
FILES = {
    "model_index.json": json.dumps(INDEX),
    "README.md": "no",
    "pytorch_model.bin": "of somebody's own",
    "whole.safetensors": "no",
    **{f"vae/{name}": name for name in (*WEIGHTS, "config.json")},
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors.index.json": json.dumps(SHARDS),
    **{f"unet/{name}": name for name in (*SHARDS["weight_map"].values(), "diffusion_pytorch_model.fp16.safetensors")},
    **{
        f"text_encoder_2/{name}": name
        for name in ("config.json", "model.safetensors", "model.fp16.safetensors", "flax_model.msgpack")
    },
    **{f"tokenizer_2/{name}": name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")},
    "scheduler/scheduler_config.json": "{}",
    "safety_checker/model.safetensors": "no",
}


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for org/model (at main and v2), org/gated, and any other name."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if repo not in ("org/model", "org/gated"):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[:1] and len(rest) > 1 and rest[1] not in ("main", "v2", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if self.path.startswith("/api"):
            entries = [{"type": "file", "path": name, "size": len(text), "oid": "0"} for name, text in FILES.items()]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            return self._send(200, json.dumps(entries if rest[:1] == ["tree"] else info).encode(), {})
        if repo == "org/gated":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        name = "/".join(rest[2:])
        if self.command == "GET":
            self.server.fetched.append(name)
        body = FILES[name].encode()
        self._send(200, body, {"ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, status, body, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


SCRIPT = """
import json, sys
from pathlib import Path
from fairhuman_jax.weights.hub import fetch_file, fetch_model, fetch_pipeline
results = []
for call in json.loads(sys.argv[1]):
    function = {"model": fetch_model, "pipeline": fetch_pipeline, "file": fetch_file}[call.pop(0)]
    try:
        folder = function(*call)
        if folder.is_file():
            results.append(folder.read_text())
            continue
        results.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    except (OSError, ValueError) as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


def run(cache: Path, endpoint: str, *calls, **environment):
    environment = (
        os.environ
        | environment
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    )
    command = [sys.executable, "-c", SCRIPT, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_only_what_is_needed_is_fetched_and_the_cache_serves_offline(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    calls = [
        ["model", "org/model", "vae"],
        ["model", "org/model", "vae", "fp16", "v2"],
        ["pipeline", "org/model"],
        ["model", "org/model", "vae", "int8"],
        ["model", "org/model", "controlnet"],
        ["model", "org/model", "vae", None, "v3"],
        ["model", "org/gated", "vae"],
        ["pipeline", "org/nothing"],
    ]
    vae, half, pipeline, *errors = run(tmp_path, endpoint, *calls)
    assert vae == ["config.json", WEIGHTS[0]]
    assert half == ["config.json", WEIGHTS[1], WEIGHTS[0]]
    unet = ["config.json", *SHARDS["weight_map"].values(), "diffusion_pytorch_model.safetensors.index.json"]
    needed = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        *(f"tokenizer_2/{name}" for name in ("merges.txt", "tokenizer_config.json", "vocab.json")),
        *(f"unet/{name}" for name in unet),
        *(f"vae/{name}" for name in half),
    ]
    assert pipeline == sorted(needed)
    assert sorted(hub.fetched) == sorted(needed)  # each once: what is in the cache is not fetched again
    homes = "text_encoder_2, unet, vae"
    login = "with `hf auth login`"
    assert errors == [
        "FileNotFoundError: org/model/vae has no weights of the variant 'int8'; it holds " + ", ".join(sorted(WEIGHTS)),
        f"FileNotFoundError: org/model on the hub has no controlnet/config.json; folders with one: {homes}",
        "FileNotFoundError: org/model on the hub has no revision 'v3'",
        f"PermissionError: org/gated is gated: accept its terms at {endpoint}/org/gated, then log in {login}",
        "FileNotFoundError: org/nothing: no such folder, and no such model on the hub "
        "(a private one needs `hf auth login`)",
    ]
    offline = run(tmp_path, endpoint, calls[0], calls[2], calls[7], HF_HUB_OFFLINE="1")
    assert offline[0] == half and offline[1] == pipeline
    assert offline[2].startswith("FileNotFoundError: org/nothing: no such folder; the hub cannot be asked (OfflineMode")
    assert offline[2].endswith("holds no model_index.json of it") and "\n" not in offline[2]
    unreachable = run(tmp_path, "http://127.0.0.1:9", calls[0], calls[7])
    assert unreachable[0] == half
    assert unreachable[1].startswith("FileNotFoundError: org/nothing: no such folder; the hub cannot be asked (")


def test_one_file_is_fetched_and_kept(hub, tmp_path):
    endpoint, call = f"http://127.0.0.1:{hub.server_address[1]}", ["file", "org/model", "pytorch_model.bin"]
    found, missing = run(tmp_path, endpoint, call, ["file", "org/model", "model.bin"])
    assert found == "of somebody's own" and hub.fetched.count("pytorch_model.bin") == 1
    assert missing == "FileNotFoundError: org/model on the hub has no model.bin"
    offline, missing = run(tmp_path, endpoint, call, ["file", "org/model", "model.bin"], HF_HUB_OFFLINE="1")
    assert offline == found and missing.endswith("holds no model.bin of it")


def test_what_reads_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert is_hub_id("stabilityai/stable-diffusion-xl-base-1.0")
    assert not any(is_hub_id(path) for path in ("runs/base", "people", "/org/name", "./org/name", "a/b/c", "../a"))
