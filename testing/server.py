"""A real ComfyUI server with the pack, driven over HTTP and websocket, for tests, `demo` and `serve`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
import websocket

from wanquant.testing.hosts import ROOT, checkout, link_folder

Graph = dict[str, dict[str, Any]]
"""A prompt in API format: node id -> {"class_type", "inputs"}."""
Event = dict[str, Any]
"""A websocket message: {"type", "data"}."""

# The flags of each purpose, newest first: a server gets the first that its ComfyUI knows, or none.
FLAGS = (
    (["--listen", "127.0.0.1"],),
    (["--disable-auto-launch"],),
    (["--offline"], ["--disable-api-nodes"]),
    (["--disable-assets"],),
    (["--database-url", "sqlite:///:memory:"],),
)
_KNOWN_FLAGS = """
import sys
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import parser
print(*parser._option_string_actions)
"""
STARTUP_SECONDS = 240
_TEXT_EVENT = (3).to_bytes(4, "big")  # the one binary message that is not a preview: protocol.py BinaryEventTypes


class GraphError(Exception):
    """A graph was refused or failed; `details` is the answer (node_errors, or the data of execution_error)."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(f"{message}: {json.dumps(details, indent=1)[:4000]}")
        self.details = details


def flags_of(comfyui: Path) -> list[str]:
    """Return the flags of `FLAGS` that a ComfyUI knows."""
    command = [sys.executable, "-I", "-c", _KNOWN_FLAGS, str(comfyui)]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    usable = (next((flag for flag in alternatives if flag[0] in known), []) for alternatives in FLAGS)
    return [part for flag in usable for part in flag]


class HostServer:
    """A server that runs during a `with` block, in its own base directory and on a port of 127.0.0.1.

    Args:
        base: the folder of models, input, output and custom_nodes; made if it does not exist, and kept.
        folder: the name of the pack's folder below custom_nodes.
        pack: the checkout that this folder links to.
        port: 0 chooses a free port.
        log: the file for the server's output; None leaves it on the terminal.
        flags: further command line flags.
    """

    def __init__(
        self,
        base: Path,
        *,
        folder: str = "ComfyUI-WanQuant",
        pack: Path = ROOT,
        port: int = 0,
        log: Path | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.base = base.resolve()
        self.folder = folder
        self.models = self.base / "models"
        self.output = self.base / "output"
        self.log = log
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        device = [] if torch.accelerator.is_available() else ["--cpu"]
        where = ["--base-directory", str(self.base), "--port", str(self.port)]
        launcher = Path(__file__).resolve().parent / "launch.py"
        self.pack_log = self.base / f"custom_nodes-{self.port}.log"
        self._command = [sys.executable, str(launcher), str(checkout()), str(self.pack_log), *flags_of(checkout())]
        self._command += [*device, *where, *flags]
        for name in ("diffusion_models", "text_encoders", "conditioning"):
            (self.models / name).mkdir(parents=True, exist_ok=True)
        for name in ("input", "output", "custom_nodes"):
            (self.base / name).mkdir(exist_ok=True)
        link_folder(self.base / "custom_nodes" / folder, pack)

    def __enter__(self) -> HostServer:
        with self.log.open("w") if self.log else nullcontext() as output:
            # In its own process group, so that __exit__ also ends its children.
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, start_new_session=True)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if os.name == "nt":
            self.process.kill()
        else:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except urllib.error.URLError:
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log_tail()}")

    def log_tail(self, lines: int = 60) -> str:
        """Return the end of the server's log, for error messages."""
        return "\n".join(self.log.read_text().splitlines()[-lines:]) if self.log else "see the terminal"

    def get(self, path: str) -> Any:
        """Return the parsed JSON of GET `path`."""
        return json.loads(self.fetch(path))

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """Return the parsed JSON of POST `path`, or None if the answer is empty."""
        return json.loads(self.fetch(path, json.dumps(content).encode()) or b"null")

    def fetch(self, path: str, body: bytes | None = None, **query: str) -> bytes:
        """Return the content of GET `path`, or of POST if there is a body."""
        request = urllib.request.Request(f"{self.url}{path}?{urlencode(query)}", body)
        request.add_header("Content-Type", "application/json")
        # A proxy configured for the internet must not see requests to this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            content: bytes = response.read()
        return content

    def version(self) -> str:
        return str(self.get("/system_stats")["system"]["comfyui_version"])

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def submit(self, graph: Graph, client: str) -> str:
        """Queue a graph and return its prompt id.

        Raises:
            GraphError: the graph failed validation; `details` holds node_errors.
        """
        try:
            return str(self.post("/prompt", {"prompt": graph, "client_id": client})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise GraphError("graph refused", json.loads(error.read())) from error

    def run(
        self, graph: Graph, on_event: Callable[[Event], None] | None = None, timeout: float = 600
    ) -> dict[str, dict[str, Any]]:
        """Run a graph to its end, and pass every websocket message to `on_event`.

        Returns:
            The outputs of each node in /history: node id -> {"images": [...], "text": [...], ...}.

        Raises:
            GraphError: the graph was refused, failed or interrupted.
        """
        client = uuid.uuid4().hex
        url = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        # The socket is made here, because the library would use a configured proxy.
        direct = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        with closing(websocket.create_connection(url, timeout=10, socket=direct)) as connection:
            prompt = self.submit(graph, client)
            failure = None
            for event in self._events(connection, timeout):
                kind, data = event["type"], event["data"]
                if on_event:
                    on_event(event)
                if kind in ("execution_error", "execution_interrupted") and data["prompt_id"] == prompt:
                    failure = GraphError(kind, data)
                # This message comes last, when the history is complete.
                if kind == "executing" and data["node"] is None and data.get("prompt_id") == prompt:
                    break
        if failure:
            raise failure
        outputs: dict[str, dict[str, Any]] = self.get(f"/history/{prompt}")[prompt]["outputs"]
        return outputs

    def _events(self, connection: websocket.WebSocket, timeout: float) -> Iterator[Event]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                continue
            except websocket.WebSocketConnectionClosedException:
                break
            if isinstance(message, str):
                if message:
                    yield json.loads(message)
            elif message[:4] == _TEXT_EVENT:
                length = int.from_bytes(message[4:8], "big")
                node, text = message[8 : 8 + length].decode(), message[8 + length :].decode()
                yield {"type": "progress_text", "data": {"node": node, "text": text}}
        raise RuntimeError(f"ComfyUI ended, or did not finish the graph within {timeout:.0f} s:\n{self.log_tail()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    with HostServer(options.base, port=options.port) as server:
        print(f"\nComfyUI {server.version()}: {server.url}, models in {server.models}; Ctrl-C ends it", flush=True)
        server.process.wait()


if __name__ == "__main__":
    main()
