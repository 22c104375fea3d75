"""A small server of OpenAI's protocol that runs adapters with stock PEFT: for `bayes_kernels.serving`."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel


class Adapters:
    """A base model, and the adapter folders in a folder as models by their names.

    Adapters are read at their first request. At least `least` of the likeliest tokens are listed.
    """

    def __init__(self, base: Any, tokenizer: Any, folder: Path, least: int) -> None:
        self.least = least
        self.base, self.tokenizer, self.folder = base, tokenizer, folder
        self.model: Any = None
        self.lock = threading.Lock()

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/adapter_config.json"))

    @torch.no_grad()
    def log_probs(self, name: str, ids: list[int]) -> torch.Tensor:
        """(T, V) of the next token behind each one."""
        with self.lock:
            folder = self.folder / name
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name)
            elif name not in self.model.peft_config:
                self.model.load_adapter(str(folder), adapter_name=name)
            assert type(self.model.peft_config[name]) is LoraConfig
            self.model.set_adapter(name)
            logits = self.model.eval()(input_ids=torch.tensor([ids])).logits[0]
        return logits.double().log_softmax(-1)

    def token(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>"
        return token.replace("▁", " ")

    def reply(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        chat = path.endswith("/chat/completions")
        if chat:
            text = self.tokenizer.apply_chat_template(
                asked["messages"], tokenize=False, add_generation_prompt=True
            )
        else:
            text = asked["prompt"]
        ids = self.tokenizer(text)["input_ids"]
        log_probs = self.log_probs(asked["model"], ids)
        made = int(log_probs[-1].argmax())
        count = asked["top_logprobs"] if chat else asked["logprobs"]
        best = log_probs[-1].topk(min(max(count, self.least), log_probs.shape[1]))
        likeliest = {
            self.token(i): value
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        }
        if chat:
            listed = [{"token": token, "logprob": value} for token, value in likeliest.items()]
            found: dict[str, Any] = {"content": [{"top_logprobs": listed}]}
        else:
            tokens, values = [made], [float(log_probs[-1, made])]
            if asked.get("echo"):
                own = [float(log_probs[i, token]) for i, token in enumerate(ids[1:])]
                tokens, values = [*ids, made], [None, *own, *values]  # type: ignore[list-item]
            found = {"tokens": [self.token(i) for i in tokens], "token_logprobs": values}
            found["top_logprobs"] = [likeliest]
        return {"choices": [{"logprobs": found}], "usage": {"completion_tokens": 1}}


@contextlib.contextmanager
def peft_server(base: Any, tokenizer: Any, folder: Path, least: int = 1) -> Iterator[str]:
    """Inside, a server on a free port; its address."""
    adapters = Adapters(base, tokenizer, folder, least)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = [{"id": name} for name in adapters.names()]
            self.answer(200, {"data": listed} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["model"] in adapters.names():
                self.answer(200, adapters.reply(self.path, asked))
            else:
                self.answer(404, {"error": "no such model"})

        def answer(self, code: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def saved_server(base: Path, folder: Path) -> Any:
    """`peft_server` of a base model with random weights, which has no favourites, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft_server(model, transformers.AutoTokenizer.from_pretrained(base), folder, least=64)
