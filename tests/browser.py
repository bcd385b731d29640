"""A headless Chromium that a test drives through the DevTools protocol, over two pipes.

    with Browser("chromium", Path("page.html").resolve().as_uri()) as page:
        page.value("document.title")
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13,
        " ": 32}


class Browser:
    """One page. `errors` collects what its console complains about."""

    def __init__(self, program: str, address: str, width: int = 1280):
        self.program, self.address, self.width = program, address, width
        self.errors, self.count, self.session = [], 0, None

    def __enter__(self) -> "Browser":
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        mine_out, its_in = self._pipe()[::-1]
        mine_in, its_out = self._pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}", "about:blank"]
        # As root Chromium gives itself real-time priority; on a busy machine it was seen to spin
        # with it and to stop all else, so it may not.
        humble = os.geteuid() == 0 and shutil.which("setpriv")
        prefix = ["setpriv", "--bounding-set=-sys_nice"] if humble else []
        # The protocol's pipes are number 3 and 4.
        script = f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}'
        line = ["bash", "-c", script, *prefix, self.program, *flags]
        self.process = subprocess.Popen(line, pass_fds=(its_in, its_out),
                                        stderr=subprocess.DEVNULL)
        os.close(its_in), os.close(its_out)
        self.out, self.into = os.fdopen(mine_out, "wb"), os.fdopen(mine_in, "rb")
        self.buffer = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(self.width)
        self.call("Page.navigate", url=self.address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.out.close(), self.into.close()
        self.folder.cleanup()

    @staticmethod
    def _pipe() -> list[int]:
        """A pipe whose ends are not 3 or 4."""
        ends = os.pipe()
        moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
        os.close(ends[0]), os.close(ends[1])
        return moved

    def call(self, method: str, **params: Any) -> dict:
        """One command and its answer; events on the way are looked at."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.into.fileno(), 1 << 20)
                assert part, "the browser has gone"
                self.buffer += part
            told, _, self.buffer = self.buffer.partition(b"\0")
            told = json.loads(told)
            if told.get("id") == self.count:
                assert "error" not in told, told["error"]
                return told["result"]
            if "method" in told:
                self._event(told["method"], told["params"])

    def _event(self, method: str, params: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(params["args"])
        elif method == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if not address.startswith(("data:", "about:")) and address != self.address:
                self.errors.append(f"asked for {address}")

    def value(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        end = time.time() + seconds
        while not self.value(script):
            assert time.time() < end, f"never came: {script}"
            time.sleep(0.05)

    def resize(self, width: int, height: int = 900) -> None:
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def press(self, key: str) -> None:
        keys = {"key": key, "code": key if len(key) > 1 else "Space",
                "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **keys, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def point(self, selector: str, across: float, down: float, touch: bool = False) -> None:
        """Press an element there; 0..1 of its width and height."""
        x, y = self.value(f"""(() => {{ const e = document.querySelector({selector!r});
            e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.left + {across} * b.width, b.top + {down} * b.height]; }})()""")
        if touch:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                          clickCount=1)

    def photograph(self, path: Path, selector: str) -> None:
        box = self.value(f"""(() => {{ const b = document.querySelector({selector!r})
            .getBoundingClientRect(); return {{x: b.left + scrollX, y: b.top + scrollY,
            width: b.width, height: b.height, scale: 1}}; }})()""")
        shot = self.call("Page.captureScreenshot", clip=box, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
