"""Sharing bundles: what is uploaded comes back, bit for bit, from a stand-in that speaks the hub's protocol.

The stand-in asks for every file within the commit, as the hub does for small ones; the transfer of large ones is the
hub library's own.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from motionrag.bundle import EncoderSource, MotionBundle, resolve
from tests.test_bundle import PARTS, make

REPOSITORY = "someone/shapes"


def blob_id(content):
    """What git calls these bytes."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories in memory. Each is a list of commits, and a commit a dict of path to bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories = {}
        self.tokens = set()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository):
        """Hash and files of the last commit."""
        commits = self.repositories[repository]
        return f"{len(commits):040x}", commits[-1]


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code)

    def do_POST(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = "/".join(filter(None, (content.get("organization"), content["name"])))
            exists = name in self.server.repositories
            self.server.repositories.setdefault(name, [{}])
            return self.answer({"url": f"{self.server.endpoint}/{name}"}, 409 if exists else 200)
        if self.path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer({"errors": [], "warnings": []})
        repository, action = re.match(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path).groups()
        if action == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self.answer({"files": [{**each, "shouldIgnore": False} for each in files]})
        assert action == "commit"
        changed = dict(self.server.commit(repository)[1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.repositories[repository].append(changed)
        sha = self.server.commit(repository)[0]
        return self.answer({"commitUrl": f"{self.server.endpoint}/{repository}/commit/{sha}", "commitOid": sha})

    def do_GET(self):
        parsed = re.match(r"/(?:api/models/)?([^/]+/[^/?]+)(?:/(\w+)/(\w+)(?:/([^?]+))?)?", self.path)
        repository, action, _, path = parsed.groups()
        if repository not in self.server.repositories:
            return self.refuse("RepoNotFound")
        sha, files = self.server.commit(repository)
        if action == "tree":
            entries = ({"path": p, "size": len(c), "oid": blob_id(c), "type": "file"} for p, c in files.items())
            return self.answer(list(entries))
        if action == "resolve":
            if path not in files:
                return self.refuse("EntryNotFound")
            return self.answer(files[path], ETag=f'"{blob_id(files[path])}"', X_Repo_Commit=sha)
        names = [{"rfilename": path} for path in files]
        return self.answer({"id": repository, "sha": sha, "siblings": names, "private": False})

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(bundle, hub):
    return bundle.push_to_hub(REPOSITORY, endpoint=hub.endpoint, token="hf_secret")


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def front(card):
    return yaml.safe_load(card.split("---")[1])


# Up and down


def test_a_bundle_comes_back_from_the_hub_bit_for_bit(hub, tmp_path):
    original = make()
    original.save_pretrained(tmp_path / "local")
    address = push(original, hub)
    sha, uploaded = hub.commit(REPOSITORY)
    assert address == f"{hub.endpoint}/{REPOSITORY}/commit/{sha}"
    assert uploaded == files_of(tmp_path / "local")
    assert hub.tokens == {"Bearer hf_secret"}

    again = MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint)
    assert files_of(again.folder) == uploaded
    assert again.config == original.config
    for name in PARTS:
        assert again.part_fingerprint(name) == original.part_fingerprint(name)
    assert torch.equal(again.unconditional_tokens, original.unconditional_tokens)


def test_a_second_push_replaces_the_first(hub):
    push(make(seed=0), hub)
    push(make(seed=1), hub)
    again = MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint)
    assert again.part_fingerprint("cama") == make(seed=1).part_fingerprint("cama")
    assert front(hub.commit(REPOSITORY)[1]["README.md"].decode())["license"] == "apache-2.0"


def test_embedded_encoders_and_a_card_that_somebody_wrote_travel_along(hub, tmp_path):
    config = make("cama").config
    encoders = {**config.encoders, "video": EncoderSource("encoders/video", "MIT")}
    MotionBundle(replace(config, encoders=encoders), cama=make("cama").cama).save_pretrained(tmp_path / "local")
    (tmp_path / "local" / "encoders" / "video").mkdir(parents=True)
    (tmp_path / "local" / "encoders" / "video" / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "local" / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    push(MotionBundle.from_pretrained(tmp_path / "local"), hub)
    again = MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint)
    assert files_of(again.folder) == files_of(tmp_path / "local")
    assert Path(again.path_or_id("encoders/video"), "config.json").is_file()


def test_nothing_that_can_run_code_is_downloaded(hub):
    push(make(), hub)
    hub.repositories[REPOSITORY][-1].update({"evil.py": b"import os", "model.pkl": b"\x80", "weights.bin": b"\x80"})
    folder = resolve(REPOSITORY, endpoint=hub.endpoint)
    assert {Path(name).suffix for name in files_of(folder)} == {".json", ".md", ".safetensors"}
    MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint)


def test_a_damaged_file_on_the_hub_is_named(hub):
    push(make(), hub)
    commit = hub.repositories[REPOSITORY][-1]
    commit["cama.safetensors"] = commit["cama.safetensors"][:-40]
    with pytest.raises(ValueError, match=r"cama\.safetensors is damaged .*fetch the bundle again"):
        _ = MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint).cama


def test_a_repository_that_does_not_exist_is_named(hub):
    with pytest.raises(FileNotFoundError, match="someone/else' is neither 'pocket' nor 'pocket-control', nor a"):
        MotionBundle.from_pretrained("someone/else", endpoint=hub.endpoint)


def test_a_model_on_the_hub_is_told_from_a_bundle_before_it_is_downloaded(hub, tmp_path):
    push(make(), hub)
    commit = hub.repositories[REPOSITORY][-1]
    commit["model_index.json"] = commit.pop("config.json")
    with pytest.raises(
        FileNotFoundError, match=rf"{REPOSITORY} is no bundle.*diffusers model, name a bundle beside it"
    ):
        MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# The model card


def test_the_card_tells_parts_sizes_fingerprints_and_licences(tmp_path):
    bundle = make()
    bundle.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert front(card) == {
        "license": "apache-2.0",
        "library_name": "motionrag",
        "pipeline_tag": "image-to-video",
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "tags": ["motionrag", "cogvideox"],
    }
    for name in PARTS:
        count = sum(parameter.numel() for parameter in getattr(bundle, name).parameters())
        assert f"| `{name}` | {count} | float32 | `{bundle.part_fingerprint(name)}` |" in card
    assert "| video encoder | someone/videomae | CC-BY-NC-4.0 |" in card
    assert "| base model | someone/base | not stated |" in card
    assert "Untrained" not in card


def test_the_command_of_the_card_exists(tmp_path):
    from tests.test_cli import run

    make().save_pretrained(tmp_path)
    for command in re.findall(r"^motionrag (\w+) (.*)$", (tmp_path / "README.md").read_text(), re.MULTILINE):
        help_text = run(command[0], "--help").stdout
        assert all(option in help_text for option in re.findall(r"--[a-z]+", command[1]))


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", {"license": "mit"}),
        ("", {"license": "unknown"}),
        ('Stability "AI" License: v1', {"license": "other", "license_name": 'Stability "AI" License: v1'}),
    ],
)
def test_licences_as_the_hub_wants_them(tmp_path, licence, expected):
    bundle = make("cama")
    MotionBundle(replace(bundle.config, licence=licence, trained=False), cama=bundle.cama).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert {key: value for key, value in front(card).items() if key.startswith("license")} == expected
    assert "**Untrained:** these are random weights" in card


def test_a_base_model_in_a_folder_is_no_hub_id(tmp_path):
    shutil.copytree(MotionBundle.from_pretrained("pocket").folder, tmp_path / "pocket")
    (tmp_path / "pocket" / "README.md").unlink()
    MotionBundle.from_pretrained(tmp_path / "pocket").save_pretrained(tmp_path / "pocket")
    assert "base_model" not in front((tmp_path / "pocket" / "README.md").read_text())


def test_a_card_follows_the_weights_until_somebody_claims_it(tmp_path):
    make(seed=0).save_pretrained(tmp_path)
    old = (tmp_path / "README.md").read_text()
    make(seed=1).save_pretrained(tmp_path)
    new = (tmp_path / "README.md").read_text()
    assert make(seed=0).part_fingerprint("cama") in old
    assert make(seed=1).part_fingerprint("cama") in new
    mine = "\n".join(line for line in new.splitlines() if not line.startswith("# Written by motionrag"))
    (tmp_path / "README.md").write_text(mine)
    make(seed=2).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine


def test_the_fingerprints_are_those_of_what_is_saved(tmp_path):
    """Parts may have been trained, or cast, since they were given."""
    bundle = make()
    with torch.no_grad():
        bundle.cama.sos_token += 1
    bundle.motion_resampler.half()
    bundle.save_pretrained(tmp_path)
    saved = MotionBundle.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for name in PARTS:
        assert f"`{saved.part_fingerprint(name)}`" in card
    assert "float16" in card


def test_a_card_that_somebody_wrote_on_the_hub_is_kept(hub):
    push(make(seed=0), hub)
    hub.repositories[REPOSITORY][-1]["README.md"] = b"---\nlicense: mit\n---\nMine."
    push(make(seed=1), hub)
    uploaded = hub.commit(REPOSITORY)[1]
    assert uploaded["README.md"] == b"---\nlicense: mit\n---\nMine."
    again = MotionBundle.from_pretrained(REPOSITORY, endpoint=hub.endpoint)
    assert again.part_fingerprint("cama") == make(seed=1).part_fingerprint("cama")
