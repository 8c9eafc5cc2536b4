"""Headless Chromium, driven over its DevTools protocol. Tests that use it are skipped where there is none."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


aiohttp = pytest.importorskip("aiohttp", reason="DevTools are reached through aiohttp, which comes with datasets")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is on the PATH")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
).split()
# No name is resolved but this machine's own, which DevTools need: what the page has, it brought along.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
PATIENCE = 60


class Tab:
    """A page in a browser: its calls wait for their answers, and what it reports meanwhile is kept."""

    def __init__(self, port):
        self.loop = asyncio.new_event_loop()
        self.events, self.num_calls = [], 0
        self.session, self.socket = self.loop.run_until_complete(self._connect(port))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), PATIENCE))

    def open(self, url):
        """Loads a page and waits until all of it is there."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page was not loaded"
            self.call("Runtime.evaluate", expression="1")

    def run(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, text, box="#query"):
        """Puts text in the place of what is in a box, the search box of a report by default, as typing does."""
        self.run(f"(box => {{ box.focus(); box.select(); }})(document.querySelector({box!r}))")
        self.call("Input.insertText", text=text) if text else self.press("Delete", 46)

    def press(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def resize(self, width, height=900, scheme="light"):
        """As on a screen of this size, on a phone if it is narrow, with this `prefers-color-scheme`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def wait_for(self, expression):
        """The value of a JavaScript expression as soon as it is true."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"{expression} did not become true"
            time.sleep(0.05)
        return value

    def requests(self):
        """Addresses that the page asked for since it was opened."""
        events = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events]

    def complaints(self):
        """Errors that the page or the browser reported."""
        entries = [event["params"] for event in self.events if event["method"] == "Log.entryAdded"]
        messages = [entry for entry in entries if entry["entry"]["level"] in ("error", "warning")]
        return messages + [
            event["params"]
            for event in self.events
            if event["method"] == "Runtime.exceptionThrown"
            or (event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"))
        ]

    def close(self):
        self.loop.run_until_complete(self.socket.close())
        self.loop.run_until_complete(self.session.close())
        self.loop.close()

    async def _connect(self, port):
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [each for each in await answer.json() if each["type"] == "page"]
        return session, await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    async def _call(self, method, parameters):
        self.num_calls += 1
        own = self.num_calls
        await self.socket.send_json({"id": own, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == own:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)


@contextmanager
def open_browser(profile: Path) -> Iterator[Tab]:
    """A browser with its files in a folder, and one tab."""
    log = open(profile / "log", "w")
    process = subprocess.Popen([BROWSER, *FLAGS, OFFLINE, f"--user-data-dir={profile}", "about:blank"], stderr=log)
    port_file, deadline, tab = profile / "DevToolsActivePort", time.monotonic() + PATIENCE, None
    try:
        while not port_file.exists() or not port_file.read_text():
            assert process.poll() is None and time.monotonic() < deadline, (profile / "log").read_text()[-2000:]
            time.sleep(0.1)
        tab = Tab(port_file.read_text().split()[0])
        yield tab
    finally:
        if tab:
            tab.close()
        process.terminate()
        process.wait(PATIENCE)
        log.close()
