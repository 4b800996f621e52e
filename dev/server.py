"""Start and stop a real ComfyUI on the loopback interface, with this pack linked into it.

    with ComfyServer(host_dir, work_dir, python=python, models_dir=models) as server:
        result = server.client().run(graph)

Everything the server writes lies under `work_dir`: models/{loras,oft,...}, input, output, user, custom_nodes,
the database and server.log. The host tree itself is only read, so several servers can share it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .client import Client

if TYPE_CHECKING:
    from typing_extensions import Self

REPO = Path(__file__).resolve().parent.parent
PACK_FOLDER = "comfyui-oft"
TEST_PACK_FOLDER = "tiny-models-for-tests"
_NOT_PART_OF_THE_PACK = (".git", ".cache", ".ci", ".github", "tests", "dev", "benchmarks", "__pycache__")


class ServerError(RuntimeError):
    """The server did not start, or died. The message ends with the tail of its log."""


def free_port(first: int = 0, last: int = 0) -> int:
    """A port that is free on 127.0.0.1 now; inside `first`..`last` where those are given."""
    for port in range(first, last + 1) if first else [0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise ServerError(f"no free port from {first} to {last}")


def link_folder(source: Path, target: Path, ignore: Sequence[str] = ()) -> None:
    """Make `target` show `source`: a symlink, or a copy without `ignore` where symlinks are not allowed."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*ignore))


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a text file, or an empty string where there is none."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class ComfyServer:
    """One ComfyUI process.

    host_dir    the ComfyUI tree (with main.py); only read
    work_dir    everything this instance writes; made if missing
    python      interpreter of the host's virtual environment
    models_dir  read-only model files that instances share (checkpoints/, diffusion_models/, ...)
    pack        the folder to link as custom_nodes/comfyui-oft, or None
    test_pack   also link the tiny-model nodes of dev/host_nodes
    port        0 = any free port
    extra_args  appended to ComfyUI's command line; `device_args` replaces the default ``--cpu``
    env         extra environment variables
    """

    def __init__(
        self,
        host_dir: Path | str,
        work_dir: Path | str,
        *,
        python: Path | str = sys.executable,
        models_dir: Path | str | None = None,
        pack: Path | str | None = REPO,
        test_pack: bool = True,
        port: int = 0,
        device_args: Sequence[str] = ("--cpu",),
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_timeout: float = 180.0,
    ) -> None:
        self.host_dir = Path(host_dir).resolve()
        self.work_dir = Path(work_dir).resolve()
        self.python = str(python)
        self.models_dir = Path(models_dir).resolve() if models_dir else None
        self.pack = Path(pack).resolve() if pack else None
        self.test_pack = test_pack
        self.port = port
        self.device_args = list(device_args)
        self.extra_args = list(extra_args)
        self.env = dict(env or {})
        self.start_timeout = start_timeout
        self.log = self.work_dir / "server.log"
        self.seconds_to_start = 0.0
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models(self) -> Path:
        """This instance's own models folder; adapter files go into ``models / "oft"`` or ``"loras"``."""
        return self.work_dir / "models"

    @property
    def output(self) -> Path:
        return self.work_dir / "output"

    @property
    def input(self) -> Path:
        return self.work_dir / "input"

    def client(self) -> Client:
        return Client(self.url)

    def start(self) -> Self:
        """Start the process and wait until it answers. Raises ServerError."""
        begun = time.monotonic()
        for name in ("models/loras", "models/oft", "input", "output", "temp", "user", "custom_nodes"):
            (self.work_dir / name).mkdir(parents=True, exist_ok=True)
        for name in (PACK_FOLDER, TEST_PACK_FOLDER):
            old = self.work_dir / "custom_nodes" / name
            if old.is_symlink():
                old.unlink()
        if self.pack:
            link_folder(self.pack, self.work_dir / "custom_nodes" / PACK_FOLDER, _NOT_PART_OF_THE_PACK)
        if self.test_pack:
            link_folder(REPO / "dev" / "host_nodes", self.work_dir / "custom_nodes" / TEST_PACK_FOLDER)
        for attempt in (1, 2, 3):
            port_was_free = not self.port
            self.port = self.port or free_port()
            self._spawn()
            if self._wait_until_it_answers(begun):
                self.seconds_to_start = time.monotonic() - begun
                return self
            # Between choosing a free port and listening on it, another program may have taken it.
            if port_was_free and attempt < 3 and "address already in use" in tail(self.log).lower():
                self.port = 0
                continue
            break
        raise ServerError(f"ComfyUI did not start. Its log {self.log} ends with:\n{tail(self.log)}")

    def _spawn(self) -> None:
        command = [
            self.python,
            "main.py",
            *self.device_args,
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(self.work_dir)]
        command += ["--database-url", f"sqlite:///{(self.work_dir / 'user' / 'comfyui.db').as_posix()}"]
        if self.models_dir:
            paths = self.work_dir / "model_paths.yaml"
            folders = ("checkpoints", "diffusion_models", "text_encoders", "vae")
            base = self.models_dir.as_posix()
            paths.write_text(f"tiny:\n  base_path: '{base}'\n" + "".join(f"  {f}: {f}\n" for f in folders))
            command += ["--extra-model-paths-config", str(paths)]
        command += self.extra_args
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **self.env}
        env.setdefault("PYTHONUNBUFFERED", "1")
        env.pop(
            "PYTHONPATH", None
        )  # the repository must not be importable: its folder `nodes` would hide ComfyUI's
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.host_dir,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",  # Ctrl-C in the terminal is ours to handle
            )

    def _wait_until_it_answers(self, begun: float) -> bool:
        while time.monotonic() - begun < self.start_timeout:
            if self.process.poll() is not None:
                return False
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as answer:
                    return answer.status == 200
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        self.stop()
        raise ServerError(
            f"ComfyUI gave no answer within {self.start_timeout:.0f} s. "
            f"Its log {self.log} ends with:\n{tail(self.log)}"
        )

    def stop(self, patience: float = 10.0) -> None:
        """End the process: ask, wait `patience` seconds, then kill. Safe to call twice."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait(self) -> None:
        """Block until the process ends by itself."""
        if self.process is not None:
            self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()
