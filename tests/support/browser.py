"""Headless Chromium over its debugging pipe: open a page, run a line of JavaScript, take a picture."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium(profile: Path, size: str = "1600,1000") -> Iterator["Browser"]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium")
    from_us, to_us = os.pipe(), os.pipe()

    def as_3_and_4() -> None:  # the two descriptors that --remote-debugging-pipe uses
        read_end, write_end = os.dup(from_us[0]), os.dup(to_us[1])
        os.dup2(read_end, 3)
        os.dup2(write_end, 4)

    process = subprocess.Popen(
        [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", f"--window-size={size}", "about:blank",
        ],
        preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(from_us[0])
    os.close(to_us[1])
    try:
        yield Browser(from_us[1], to_us[0])
    finally:
        process.terminate()
        process.wait(timeout=20)
        os.close(from_us[1])
        os.close(to_us[0])


class Browser:
    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.count, self.rest = to, back, 0, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.back, 1 << 20)
            text, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.enable")
        self.call("Page.navigate", url=url)

    def open_report(self, page: Path) -> int:
        """Open a report: all its figures are drawn, and nothing is wider than the window. Returns how many
        figures it has.
        """
        self.open(page.as_uri())
        self.wait_for("document.readyState === 'complete'")
        figures = self.run("document.querySelectorAll('figure[data-spec]').length")
        assert self.run("document.querySelectorAll('figure[data-spec] > svg').length") == figures
        assert self.run("document.documentElement.scrollWidth <= window.innerWidth")
        return figures

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script: str, seconds: float = 180) -> Any:
        """Until the script's value is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := self.run(script):
                    return value
            except AssertionError as error:
                # "navigated": the page leads to another one, as ours without a secret does
                if "navigated" not in str(error):
                    raise
            time.sleep(0.3)
        raise AssertionError(f"not in {seconds} s: {script}\n{self.run('document.body.innerText')}")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def print_page(self, path: Path) -> None:
        """As PDF, on the paper that the page asks for."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(found["data"]))
