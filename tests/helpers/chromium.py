"""A page in a headless Chromium, driven over its debugging pipe: commands and answers in JSON, each ended by a zero
byte. The usual debugging port speaks WebSocket, which Python has nothing for."""

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """A context manager. program: the Chromium to run. profile: a folder for it that does not exist yet.

    Everything raises TimeoutError where no answer comes within `patience` seconds.
    """

    def __init__(self, program: str, profile: Path, patience: float = 60):
        self.patience = patience
        (commands, self._commands), (self._answers, answers) = os.pipe(), os.pipe()
        # Chromium reads from 3 and writes to 4. Only a shell can give it those numbers whatever is open here.
        shell = f'exec "$0" "$@" 3</dev/fd/{commands} 4>/dev/fd/{answers}'
        self._process = subprocess.Popen(
            ["sh", "-c", shell, program, *FLAGS, f"--user-data-dir={profile}"], pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._unread, self._number, self._session = b"", 0, {}

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)  # its children too; the profile is nobody's
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters) -> dict:
        """What the command of the DevTools protocol returns."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + self.patience
        while (message := self._next(until)).get("id") != self._number:  # what comes besides are events
            pass
        assert "error" not in message, message["error"]
        return message["result"]

    def _next(self, until: float) -> dict:
        while b"\0" not in self._unread:
            if not select.select([self._answers], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium gave no answer")
            read = os.read(self._answers, 1 << 16)
            assert read, "Chromium has ended"
            self._unread += read
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str) -> None:
        """Opens an address, and returns when the page is there."""
        for url, there in (("about:blank", "=="), (address, "!=")):  # so that the page before cannot be taken for it
            self.call("Page.navigate", url=url)
            self.wait_until(f"location.href {there} 'about:blank' && document.readyState == 'complete'")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Returns when the JavaScript expression is true."""
        until = time.monotonic() + self.patience
        while not self.evaluate(condition):
            if time.monotonic() > until:
                raise TimeoutError(f"It never came to {condition}")
            time.sleep(0.05)
