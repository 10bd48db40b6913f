"""A headless Chromium that opens a file from disk, and what it has to say: errors, requests, values, pictures.

with Browser(file) as page: page.value("document.title"); page.press("ArrowRight"); page.errors
"""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


class Browser:
    """One page of one browser, over its debugging protocol."""

    def __init__(self, file: Path, width: int = 1400, height: int = 900, *, dark: bool = False, script: bool = True):
        self._file, self._size, self._dark, self._script = file, (width, height), dark, script
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0

    def __enter__(self) -> "Browser":
        assert CHROMIUM
        self._loop = asyncio.new_event_loop()
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-port=0",
                "--hide-scrollbars",
                f"--user-data-dir={self._profile}",
                "--disable-background-networking",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr
        port = next(found[1] for line in self._process.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)/", line)))
        self._loop.run_until_complete(self._open(int(port)))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._close())
        self._process.terminate()
        self._process.wait(20)
        self._loop.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    async def _open(self, port: int) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession(trust_env=False)
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            place = next(one["webSocketDebuggerUrl"] for one in await answer.json() if one["type"] == "page")
        self._socket = await self._session.ws_connect(place, max_msg_size=1 << 28)
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._ask(f"{domain}.enable")
        width, height = self._size
        await self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        await self._ask("Emulation.setEmulatedMedia", features=[scheme])
        await self._ask("Emulation.setScriptExecutionDisabled", value=not self._script)
        await self._ask("Page.navigate", url=self._file.resolve().as_uri())
        while True:
            event = await self._hear()
            if event.get("method") == "Page.loadEventFired":
                return

    async def _close(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def _hear(self) -> dict[str, Any]:
        message = json.loads((await asyncio.wait_for(self._socket.receive(), 60)).data)
        method, reported = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(reported["exceptionDetails"].get("exception", reported["exceptionDetails"]))[:500])
        elif method == "Log.entryAdded" and reported["entry"]["level"] in ("error", "warning"):
            self.errors.append(reported["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(reported["request"]["url"][:200])
        return message

    async def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._hear()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def ask(self, method: str, **params: Any) -> Any:
        """One command of the protocol."""
        return self._loop.run_until_complete(self._ask(method, **params))

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is worth in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """A key, where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    def drag(self, x0: float, x1: float, y: float) -> None:
        """The mouse, with its button held, from one place to another."""
        for kind, x in (("mousePressed", x0), ("mouseMoved", (x0 + x1) / 2), ("mouseMoved", x1), ("mouseReleased", x1)):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self, file: Path) -> None:
        """The whole page as a PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.ask("Page.printToPDF")["data"])
