"""A headless browser, driven by the WebDriver protocol: a page as a person sees it."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of a reference


def missing() -> str | None:
    """Says what does not run here; ``None`` if all does."""
    if _program() is None:
        return f"none of {', '.join(NAMES)} runs here; tools/browser.sh installs one"
    if not _runs("chromedriver"):
        return "chromedriver does not run here; tools/browser.sh installs it"
    return None


@cache
def _program() -> str | None:
    return next(filter(_runs, NAMES), None)


def _runs(name: str) -> bool:
    """Whether a program is there, and not only a script that tells how to install it."""
    path = shutil.which(name)
    return (
        path is not None and not subprocess.run([path, "--version"], capture_output=True).returncode
    )


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._session = f"{address}/session/{session}"

    def open(self, path: Path) -> None:
        """Opens a report, and waits until it is drawn."""
        self._post("url", url=path.as_uri())
        drawn = "document.getElementById('rows').dataset.whole"
        self._post(
            "execute/async",
            script="const [done] = arguments; const look = () =>"
            f" ({drawn} ? done() : requestAnimationFrame(look));"
            "look();",
            args=[],
        )

    def script(self, source: str, *arguments: Any) -> Any:
        """Runs the body of a function in the page."""
        return self._post("execute/sync", script=source, args=list(arguments))

    def text(self, selector: str) -> str:
        """Text of an element as the page holds it."""
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        """Clicks on the middle of an element."""
        found = self._post("element", using="css selector", value=selector)
        self._post(f"element/{found[_ELEMENT]}/click")
        self.settle()

    def move(self, x: float, y: float) -> None:
        """Moves the mouse to a place of the window."""
        self._act("pointer", [_move(x, y)])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drags from one place of the window to another."""
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        self._act("pointer", [_move(*start), down, _move(*end), up])

    def wheel(self, x: float, y: float, *, by: int) -> None:
        """Turns the wheel at a place of the window."""
        turn = {"type": "scroll", "x": round(x), "y": round(y), "deltaX": 0, "deltaY": by}
        self._act("wheel", [{**turn, "origin": "viewport", "duration": 0}])

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        self._act("key", [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}])

    def settle(self) -> None:
        """Waits until the page has drawn what has happened."""
        self._post(
            "execute/async",
            script="requestAnimationFrame(() => requestAnimationFrame(arguments[0]))",
            args=[],
        )

    def resize(self, width: int, height: int) -> None:
        """Gives the window a size."""
        self._post("window/rect", width=width, height=height)

    def prefer(self, scheme: str) -> None:
        """Sets the system's colours: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._post(
            "goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features}
        )
        self.settle()

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries of a log since the last call: ``browser`` or ``performance``."""
        return self._post("se/log", type=kind)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        with urllib.request.urlopen(f"{self._session}/screenshot", timeout=60) as answer:
            return base64.b64decode(json.load(answer)["value"])

    def _act(self, kind: str, actions: list[dict[str, Any]]) -> None:
        # Without a duration of its own a move takes a quarter of a second.
        source = {"type": kind, "id": kind, "actions": actions}
        self._post("actions", actions=[source])
        self.settle()

    def _post(self, command: str, **body: Any) -> Any:
        return _post(f"{self._session}/{command}", body)


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """Starts a browser that keeps its profile in a folder, and ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}", "--log-level=OFF"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(address)
        session = _post(f"{address}/session", {"capabilities": {"alwaysMatch": _wishes(folder)}})
        try:
            yield Browser(address, session["sessionId"])
        finally:
            request = urllib.request.Request(
                f"{address}/session/{session['sessionId']}", method="DELETE"
            )
            urllib.request.urlopen(request, timeout=30).close()
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _wishes(folder: Path) -> dict[str, Any]:
    arguments = [
        "--headless",
        "--no-sandbox",  # a container has no user namespaces to make one with
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-proxy-server",
        "--window-size=1440,1000",
        f"--user-data-dir={folder}",
    ]
    return {
        "goog:chromeOptions": {"binary": shutil.which(_program() or ""), "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }


def _wait_until_ready(address: str) -> None:
    for _ in range(200):
        try:
            with urllib.request.urlopen(f"{address}/status", timeout=5) as answer:
                if json.load(answer)["value"]["ready"]:
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise TimeoutError(f"chromedriver at {address} is not ready after 10 s")


def _post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


def _move(x: float, y: float) -> dict[str, Any]:
    return {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
