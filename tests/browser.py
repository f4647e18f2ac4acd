"""Chromium, driven through its debugging protocol, with no way to the network but loopback."""

import base64
import json
import subprocess
import time
import urllib.request

import websocket

COUNT_WORDS = "document.body.innerText.split(/\\s+/).filter(Boolean).length"
"""Of all that is seen: what stands in closed details is not, and what is drawn is."""


class Browser:
    """A page in Chromium."""

    def __init__(self, url, folder, size=(1400, 900)):
        flags = "headless no-sandbox disable-gpu no-first-run remote-debugging-port=0 remote-allow-origins=*"
        command = ["chromium", *(f"--{flag}" for flag in flags.split()), f"--window-size={size[0]},{size[1]}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder}", url]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        self.until(lambda: port_file.is_file() and port_file.read_text().strip())
        port = port_file.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        (address,) = [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]
        self.socket, self.sent = websocket.create_connection(address, timeout=60), 0
        self.resize(*size)

    @staticmethod
    def until(done, seconds=60.0):
        """Wait until `done()` is true. Raises AssertionError after so many seconds."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.2)

    def command(self, method, **parameters):
        """What the browser answers to a command of its protocol."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.sent:
                return answer["result"]

    def value(self, expression):
        """What an expression of JavaScript is; of a promise, what it comes to."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """Press and release a key, by its name in the browser such as "Enter" or "ArrowRight"."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text
            )

    def resize(self, width, height):
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def scheme(self, name):
        """Show the page as in a "light" or a "dark" system."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path, whole=False):
        """A PNG of what is seen, or of the whole page."""
        answer = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self.command("Page.getLayoutMetrics")["cssContentSize"]
            answer = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=size | {"scale": 1})
        path.write_bytes(base64.b64decode(answer["data"]))

    def printed(self, path):
        """The page as a PDF, on A4."""
        answer = self.command("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)
