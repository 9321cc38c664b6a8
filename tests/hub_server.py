"""A model hub on loopback: as much of its protocol as `huggingface_hub` needs to write files and read them back.

`python hub_server.py` prints its port. Only the token "hf_right" may write; `GET /seen` tells the paths asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> bytes
SEEN: list[str] = []


def blob(raw: bytes) -> str:
    """Git's own name for a file."""
    return hashlib.sha1(f"blob {len(raw)}\0".encode() + raw).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        asked, path = json.loads(lines[0]), self.path.split("?")[0]
        SEEN.append(path)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in COMMITS else 200
            COMMITS.setdefault(name, {"0" * 40: {}})
            return self.answer({"url": self.url(name), "name": name}, status)
        _, _, _, org, name, action, _ = path.split("/")
        commits = COMMITS[f"{org}/{name}"]
        if action == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked["files"]]
            return self.answer({"files": files})
        files = dict(list(commits.values())[-1])
        for line in map(json.loads, lines[1:]):
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits[commit] = files
        self.answer({"commitOid": commit, "commitUrl": f"{self.url(f'{org}/{name}')}/commit/{commit}", "success": True})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/seen":
            return self.answer(SEEN)
        SEEN.append(path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repo not in COMMITS:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commits, revision = COMMITS[repo], rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.answer({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if not api:
            raw = files.get(rest[2])
            if raw is None:
                return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.answer(raw, headers={"X-Repo-Commit": commit, "ETag": f'"{blob(raw)}"'})
        if rest and rest[0] == "tree":
            tree = [{"type": "file", "path": k, "size": len(raw), "oid": blob(raw)} for k, raw in files.items()]
            return self.answer(tree)
        self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    do_HEAD = do_GET

    def url(self, name: str) -> str:
        return f"http://{self.headers['Host']}/{name}"

    def answer(self, body: object, status: int = 200, headers: dict | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Say nothing: the port is all that is printed."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
