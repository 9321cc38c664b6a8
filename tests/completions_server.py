"""A completions endpoint on loopback with a real bundled model behind it, and faults on demand.

`python completions_server.py` prints its port. `POST /faults` sets faults from then on and forgets what was counted;
`GET /seen` tells how many completions were asked for, and the prompts of those that were answered.
"""

from __future__ import annotations

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from chassis_utils import load
from chassis_utils.tokens import token_bytes

MODEL = load("pocket-phi", device="cpu")
PIECES = token_bytes(MODEL.tokenizer)

#: Seconds before an answer; requests that get `status` first (0: none, -1: all) and `after` with it; answers before
#: the process dies; most logprobs given; a body sent instead of an answer; what is written over an answer's logprobs;
#: the key wanted; `text`, `openai` (part of a character as `bytes:`) or `content` (bytes in a field of their own).
USUAL = {
    "slow": 0.0,
    "busy": 0,
    "status": 429,
    "after": "0",
    "die_after": -1,
    "most": 20,
    "body": None,
    "logprobs": None,
}
USUAL |= {"key": None, "form": "openai"}
STATE = dict(USUAL)
SEEN: dict = {"asked": 0, "answered": []}


def written(piece: bytes | None, form: str) -> str:
    """A token as text."""
    if piece is None:
        return MODEL.tokenizer.eos_token
    try:
        return piece.decode()
    except UnicodeDecodeError:
        shown = "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in piece)
        return f"bytes:{shown}" if form == "openai" else piece.decode(errors="replace")


def completed(prompt: str, k: int, form: str) -> dict:
    """The likeliest next token, with the k likeliest ones."""
    with torch.inference_mode():
        ids = MODEL.tokenizer(prompt, return_tensors="pt")["input_ids"]
        top = MODEL.model(ids).logits[0, -1, : MODEL.vocab_size].double().log_softmax(-1).topk(k)
    several = [(PIECES[i], x) for x, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    if form == "content":
        rows = [{"token": written(p, form), "bytes": p and [*p], "logprob": x} for p, x in several]
        logprobs = {"content": [rows[0] | {"top_logprobs": rows}]}
    else:
        names = {written(p, form): x for p, x in reversed(several)}
        first = written(several[0][0], form)
        logprobs = {"tokens": [first], "token_logprobs": [several[0][1]], "top_logprobs": [names], "text_offset": [0]}
    return {"object": "text_completion", "choices": [{"text": "", "index": 0, "logprobs": logprobs}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(200, SEEN)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/faults":
            STATE.update(USUAL | body)
            SEEN.update(asked=0, answered=[])
            return self.answer(200, {})
        SEEN["asked"] += 1
        faults = dict(STATE)
        time.sleep(faults["slow"])
        if SEEN["asked"] <= faults["busy"] or faults["busy"] < 0:
            return self.answer(faults["status"], {"error": "later"}, {"Retry-After": faults["after"]})
        if faults["key"] and self.headers.get("Authorization") != f"Bearer {faults['key']}":
            return self.answer(401, {"error": f"wrong key {self.headers.get('Authorization')}"})
        if self.path != "/v1/completions" or body["model"] != MODEL.name:
            return self.answer(404, {"error": f"no model {body['model']}"})
        if len(MODEL.tokenizer(body["prompt"], verbose=False)["input_ids"]) > MODEL.context:
            # Some servers show what they were sent.
            return self.answer(400, {"error": f"at most {MODEL.context} tokens", "headers": dict(self.headers)})
        if len(SEEN["answered"]) == faults["die_after"]:
            os._exit(1)
        assert body["max_tokens"] == 1 and body["temperature"] == 0
        answer = completed(body["prompt"], min(body["logprobs"], faults["most"] or 1), faults["form"])
        if faults["logprobs"] is not None:
            answer["choices"][0]["logprobs"] = faults["logprobs"] or None
        SEEN["answered"].append(body["prompt"])
        self.answer(200, answer if faults["body"] is None else faults["body"])

    def answer(self, status: int, body: object, headers: dict | None = None) -> None:
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Say nothing: the port is all that is printed."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
