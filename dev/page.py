"""Drive ComfyUI's page in the system's Chromium: find nodes, build a graph, run it, look at what is shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from typing_extensions import Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_PATHS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
NO_BROWSER = (
    "The page tests need Chromium or Chrome, and none was found. Install one (Debian, Ubuntu: "
    "apt-get install chromium), or give its path in the environment variable OFT_BROWSER."
)
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--mute-audio",
)


def find_browser() -> str | None:
    """Path of a Chromium-family browser: OFT_BROWSER, or the first usual name that is installed."""
    named = os.environ.get("OFT_BROWSER")
    if named:
        return named if Path(named).exists() else shutil.which(named)
    return next((p for p in map(shutil.which, _NAMES) if p), None) or next(
        (p for p in _PATHS if Path(p).exists()), None
    )


def install_browser(log: Path) -> str | None:
    """Install Chromium with apt where that is possible (root on Debian, Ubuntu); returns its path or None."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
        return None
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(log, "wb") as out:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            if subprocess.call(["apt-get", "-qq", *command], stdout=out, stderr=out, env=env):
                return None
    return find_browser()


class Window:
    """One browser window on one local server.

        with Window(url) as window:
            window.page.get_by_text("Load").click()

    `errors` collects console errors and uncaught exceptions as (text, source URL). Requests to anything but
    this server are refused and listed in `refused`.
    """

    def __init__(self, url: str, *, size: tuple[int, int] = (1600, 1000)) -> None:
        self.url, self.size = url, size
        self.errors: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.page: Page

    def __enter__(self) -> Self:
        from playwright.sync_api import sync_playwright

        browser = find_browser()
        if browser is None:
            raise RuntimeError(NO_BROWSER)
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._playwright = sync_playwright().start()
        width, height = self.size
        self._context = self._playwright.chromium.launch_persistent_context(
            self._profile.name,
            executable_path=browser,
            headless=True,
            args=list(_FLAGS),
            viewport={"width": width, "height": height},
        )
        self._context.route("**/*", self._gate)
        self.page = self._context.pages[0] if self._context.pages else self._context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda fault: self.errors.append((str(fault), "")))
        self.page.goto(self.url, wait_until="domcontentloaded")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._context.close()
        self._playwright.stop()
        self._profile.cleanup()

    def _gate(self, route: Any) -> None:
        address = route.request.url
        if address.startswith((self.url, self.url.replace("http", "ws", 1), "data:", "blob:")):
            route.continue_()
        else:
            self.refused.append(address)
            route.abort()

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append((message.text, message.location.get("url", "")))


class ComfyPage(Window):
    """ComfyUI's page.

    with ComfyPage(server.url, vue_nodes=False) as page:
        page.search_and_place("Load OFT", ...)
    """

    def __init__(self, url: str, *, vue_nodes: bool = False, size: tuple[int, int] = (1600, 1000)) -> None:
        super().__init__(url, size=size)
        self.vue_nodes = vue_nodes

    def _setting(self, name: str, value: Any) -> None:
        request = urllib.request.Request(
            f"{self.url}/settings/{name}", json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=10).close()

    def __enter__(self) -> Self:
        self._setting("Comfy.TutorialCompleted", True)  # else the first visit opens the template browser
        self._setting("Comfy.VueNodes.Enabled", self.vue_nodes)
        super().__enter__()
        self.page.wait_for_selector("#graph-canvas", timeout=60_000)
        self.page.wait_for_function(
            "() => window.app?.graph && window.LiteGraph && app.extensionManager"
            " && Object.keys(LiteGraph.registered_node_types).length > 100",
            timeout=60_000,
        )
        self.page.wait_for_function("() => !document.querySelector('#splash-loader, .p-blockui-mask')")
        self.page.wait_for_timeout(500)
        self.close_dialogs()
        return self

    # --- what a person does ---

    def close_dialogs(self) -> None:
        for _ in range(5):
            if not self.page.locator("[role=dialog]:visible").count():
                return
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(300)

    def search(self, text: str, x: int, y: int) -> list[str]:
        """Double-click the canvas at (x, y), type `text`; returns the names that the search box offers."""
        self.page.mouse.dblclick(x, y)
        box = self.page.get_by_placeholder("Search Nodes", exact=False).first
        box.wait_for(timeout=10_000)
        box.fill(text)
        self.page.wait_for_timeout(700)
        options = self.page.locator("[role=option]:visible")
        # Each entry is the node's name, its category and its pack, a line each; one entry is an empty filler.
        return [o.strip().splitlines()[0].strip() for o in options.all_inner_texts() if o.strip()]

    def choose(self, name: str) -> int:
        """Click the search result whose text starts with `name`; returns the id of the node that appears."""
        before = set(self.node_ids())
        options = self.page.locator("[role=option]:visible")
        for i in range(options.count()):
            if options.nth(i).inner_text().strip().partition("\n")[0].strip() == name:
                options.nth(i).click()
                break
        else:
            raise LookupError(f"{name!r} is not among {options.all_inner_texts()}")
        for _ in range(50):
            new = set(self.node_ids()) - before
            if new:
                return new.pop()
            self.page.wait_for_timeout(100)
        raise TimeoutError(f"choosing {name!r} added no node")

    # --- the graph ---
    def node_ids(self) -> list[int]:
        return self.page.evaluate("app.graph.nodes.map(n => n.id)")

    def clear(self) -> None:
        self.page.evaluate("app.graph.clear()")

    def add(self, kind: str, x: int, y: int, **widgets: Any) -> int:
        """Add a node at graph position (x, y) with widget values; returns its id."""
        return self.page.evaluate(
            """([kind, x, y, widgets]) => {
                const node = LiteGraph.createNode(kind);
                node.pos = [x, y];
                app.graph.add(node);
                for (const [name, value] of Object.entries(widgets)) {
                    const widget = node.widgets.find((w) => w.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
                return node.id;
            }""",
            [kind, x, y, widgets],
        )

    def set(self, node: int, **widgets: Any) -> None:
        self.page.evaluate(
            """([id, widgets]) => {
                const node = app.graph.getNodeById(id);
                for (const [name, value] of Object.entries(widgets)) {
                    const widget = node.widgets.find((w) => w.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
            }""",
            [node, widgets],
        )

    def connect(self, source: int, output: int | str, target: int, name: str) -> None:
        done = self.page.evaluate(
            """([source, output, target, name]) => {
                const from = app.graph.getNodeById(source), to = app.graph.getNodeById(target);
                return Boolean(from.connect(output, to, to.inputs.findIndex((i) => i.name === name)));
            }""",
            [source, output, target, name],
        )
        if not done:
            raise ValueError(f"cannot connect {source}[{output}] to {target}.{name}")

    def load_workflow(self, workflow: dict) -> None:
        """Load a saved workflow (page format), as dropping the file onto the page does."""
        self.page.evaluate("(w) => app.loadGraphData(w)", workflow)
        self.page.wait_for_timeout(200)

    def prompt(self) -> dict:
        """The API-format prompt that the page would send."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def fit(self) -> None:
        """Show the whole graph."""
        self.page.evaluate(
            """async () => {
                await app.extensionManager.command.execute('Comfy.Canvas.FitView');
                app.canvas.setDirty(true, true);
            }"""
        )
        self.page.wait_for_timeout(300)

    def run(self, timeout: float = 120.0) -> dict:
        """Queue the graph as the Run button does, and wait; returns the history entry. Or TimeoutError."""
        before = set(self._history())
        self.page.evaluate("() => { app.queuePrompt(0, 1); }")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entries = self._history()
            new = set(entries) - before
            if new:
                self.page.wait_for_timeout(200)
                return entries[new.pop()]
            self.page.wait_for_timeout(100)
        raise TimeoutError(f"no finished prompt after {timeout:.0f} s; dialogs: {self.dialog_texts()}")

    def _history(self) -> dict:
        with urllib.request.urlopen(f"{self.url}/history", timeout=30) as answer:
            return json.load(answer)

    def dialog_texts(self) -> list[str]:
        return self.page.locator("[role=dialog]:visible").all_inner_texts()

    def node_box(self, node: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a node in page pixels, title included."""
        return tuple(
            self.page.evaluate(
                """(id) => {
                    const node = app.graph.getNodeById(id), ds = app.canvas.ds;
                    const canvas = app.canvas.canvas.getBoundingClientRect();
                    const title = LiteGraph.NODE_TITLE_HEIGHT;
                    const x = (v) => canvas.left + (v + ds.offset[0]) * ds.scale;
                    const y = (v) => canvas.top + (v + ds.offset[1]) * ds.scale;
                    const [left, top] = node.pos, [width, height] = node.size;
                    return [x(left), y(top - title), x(left + width), y(top + height)];
                }""",
                node,
            )
        )

    def screenshot(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return path
