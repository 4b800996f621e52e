"""Talk to a running ComfyUI: build a graph in Python, queue it, follow it, collect what it made.

g = Graph()
ckpt = g.CheckpointLoaderSimple(ckpt_name="tiny_sd15.safetensors")
oft = g.OFT_Load(model=ckpt[0], clip=ckpt[1], oft_name="a.safetensors", strength_model=1.0, ...)
preview = g.PreviewImage(images=...)
result = client.run(g)
result.image(preview), result.text(oft), result.seconds
"""

from __future__ import annotations

import asyncio
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image


class PromptRejected(RuntimeError):
    """The server refused the graph. `error` and `node_errors` are the server's own answer."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.error: dict = answer.get("error") or {}
        self.node_errors: dict = answer.get("node_errors") or {}
        parts = [str(self.error.get("message", self.error)), str(self.error.get("details", ""))]
        for node, fault in self.node_errors.items():
            for e in fault.get("errors", []):
                parts.append(
                    f"node {node} ({fault.get('class_type')}): {e.get('message')}: {e.get('details')}"
                )
        super().__init__("; ".join(p for p in parts if p))


class PromptFailed(RuntimeError):
    """A node raised while the graph ran. Fields: node, node_type, kind (exception type), text, trace."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.node = str(data.get("node_id"))
        self.node_type = str(data.get("node_type"))
        self.kind = str(data.get("exception_type"))
        self.text = str(data.get("exception_message", "")).strip()
        self.trace = "".join(data.get("traceback") or [])
        super().__init__(f"node {self.node} ({self.node_type}) raised {self.kind}: {self.text}\n{self.trace}")


class Node:
    """A node in a `Graph`. ``node[i]`` is its output i; the node itself stands for output 0."""

    def __init__(self, graph: Graph, id: str, class_type: str, inputs: dict[str, Any]) -> None:
        self.graph, self.id, self.class_type, self.inputs = graph, id, class_type, inputs

    def __getitem__(self, slot: int) -> list:
        if not isinstance(slot, int) or slot < 0:
            raise IndexError(slot)
        return [self.id, slot]

    __iter__ = None  # a node has no fixed number of outputs here, so unpacking it would never end

    def set(self, **inputs: Any) -> Node:
        self.inputs.update({k: _link(v) for k, v in inputs.items()})
        return self


def _link(value: Any) -> Any:
    return value[0] if isinstance(value, Node) else value


class Graph:
    """An API-format prompt. ``g.KSampler(model=..., seed=1)`` and ``g.add("KSampler", ...)`` add a node."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, class_type: str, /, **inputs: Any) -> Node:
        node = Node(self, str(len(self.nodes) + 1), class_type, {k: _link(v) for k, v in inputs.items()})
        self.nodes[node.id] = node
        return node

    def __getattr__(self, class_type: str):
        if class_type.startswith("_"):
            raise AttributeError(class_type)
        return lambda **inputs: self.add(class_type, **inputs)

    def prompt(self) -> dict[str, dict]:
        return {n.id: {"class_type": n.class_type, "inputs": n.inputs} for n in self.nodes.values()}


@dataclass
class Result:
    """What one run made: `outputs` (node id -> ui dict) and `events` (websocket messages as (type, data))."""

    prompt_id: str
    client: Client
    seconds: float = 0.0
    outputs: dict[str, dict] = field(default_factory=dict)
    events: list[tuple[str, dict]] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    error: PromptFailed | None = None

    def of(self, node: Node | str) -> dict:
        return self.outputs.get(node.id if isinstance(node, Node) else str(node), {})

    def images(self, node: Node | str) -> list[np.ndarray]:
        """The node's pictures as uint8 arrays of shape (height, width, 3)."""
        return [self.client.picture(entry) for entry in self.of(node).get("images", [])]

    def image(self, node: Node | str) -> np.ndarray:
        pictures = self.images(node)
        if len(pictures) != 1:
            raise ValueError(f"expected one picture, the node has {len(pictures)}: {self.of(node)}")
        return pictures[0]

    def text(self, node: Node | str) -> str:
        """The text that the node shows (ui key ``text``), pieces joined by newlines."""
        return "\n".join(str(piece) for piece in self.of(node).get("text", []))

    def event(self, kind: str) -> list[dict]:
        return [data for k, data in self.events if k == kind]


class Client:
    """HTTP and websocket access to one server. All methods block; none keeps a connection open."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    # --- plain HTTP ---
    def fetch(
        self, path: str, *, data: Any = None, method: str | None = None, timeout: float = 30.0
    ) -> tuple[int, bytes]:
        """(status, body) of a request; `data` is sent as JSON. Error statuses do not raise."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as fault:
            return fault.code, fault.read()

    def json(self, path: str, **options: Any) -> Any:
        """Parsed JSON body. Raises RuntimeError for any status but 200."""
        status, body = self.fetch(path, **options)
        if status != 200:
            raise RuntimeError(f"{path} answered {status}: {body[:300]!r}")
        return json.loads(body)

    def object_info(self, node: str | None = None) -> dict:
        """The server's description of all nodes, or of one (KeyError where it is not registered)."""
        return self.json("/object_info") if node is None else self.json(f"/object_info/{node}")[node]

    def choices(self, node: str, name: str) -> list:
        """The entries of a combo input as the server lists them now."""
        spec = self.object_info(node)["input"]
        kind, *options = (spec.get("required", {}) | spec.get("optional", {}))[name]
        return kind if isinstance(kind, list) else options[0]["options"]

    def picture(self, entry: Mapping[str, str]) -> np.ndarray:
        """A picture named by an ``images`` entry, as (height, width, 3) uint8."""
        status, body = self.fetch("/view?" + urllib.parse.urlencode(entry))
        if status != 200:
            raise RuntimeError(f"/view answered {status} for {dict(entry)}")
        return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))

    def interrupt(self) -> None:
        self.fetch("/interrupt", data={})

    def free(self) -> None:
        """Ask the server to unload all models and forget cached results before the next prompt."""
        self.fetch("/free", data={"unload_models": True, "free_memory": True})

    # --- prompts ---
    def run(self, graph: Graph | Mapping[str, dict], *, timeout: float = 120.0, check: bool = True) -> Result:
        """Queue a graph and follow it to its end.

        Raises PromptRejected, TimeoutError, and (with `check`) PromptFailed; without `check` that one is put
        into ``result.error``.
        """
        prompt = graph.prompt() if isinstance(graph, Graph) else dict(graph)
        # In a thread of its own, because the caller's thread may have an event loop (a browser driver's).
        with ThreadPoolExecutor(1) as worker:
            result = worker.submit(asyncio.run, asyncio.wait_for(self._run(prompt), timeout)).result()
        if check and result.error:
            raise result.error
        return result

    async def _run(self, prompt: dict) -> Result:
        client_id = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session:
            socket = session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=64 << 20)
            async with socket as ws:
                begun = time.monotonic()
                async with session.post(
                    f"{self.url}/prompt", json={"prompt": prompt, "client_id": client_id}
                ) as r:
                    answer = await r.json()
                    if r.status != 200:
                        raise PromptRejected(answer)
                result = Result(answer["prompt_id"], self)
                await self._follow(ws, result)
                result.seconds = time.monotonic() - begun
            # The history entry is written just after the last message.
            while True:
                async with session.get(f"{self.url}/history/{result.prompt_id}") as r:
                    entry = (await r.json()).get(result.prompt_id)
                if entry:
                    break
                await asyncio.sleep(0.02)
        result.outputs = entry["outputs"]
        return result

    async def _follow(self, ws: aiohttp.ClientWebSocketResponse, result: Result) -> None:
        while True:
            message = await ws.receive()
            if message.type == aiohttp.WSMsgType.BINARY:
                result.events.append(("binary", {"bytes": len(message.data)}))
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ConnectionError(f"the server closed the connection ({message.type.name})")
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id", result.prompt_id) != result.prompt_id:
                continue
            result.events.append((kind, data))
            if kind == "execution_cached":
                result.cached = [str(n) for n in data.get("nodes", [])]
            elif kind == "execution_error":
                result.error = PromptFailed(data)
                return
            elif kind == "execution_interrupted":
                result.error = PromptFailed(
                    {**data, "exception_type": "Interrupted", "exception_message": "stopped"}
                )
                return
            elif kind == "execution_success":
                return
