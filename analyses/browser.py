"""Pictures of figures, drawn by a browser that is installed: one that is started once for many of them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any, BinaryIO

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCALE = 2  # pixels of a picture per pixel of a page: sharp on screens and in print
PATIENCE = 600.0  # seconds without an answer after which the browser is ended
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PAGE = "document.write(`<!DOCTYPE html><body style='margin:0'><div id='plot'></div>`); document.close()"
_DRAW = """
Plotly.purge('plot');
Plotly.newPlot('plot', FIGURE.data, FIGURE.layout, {displayModeBar: false})
  .then(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done()))))
"""


def pictures(figures: Sequence[Any]) -> list[bytes] | None:
    """Figures of plotly as .png, of the sizes that their layouts have; None without a browser that answers."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None or not figures:
        return None
    try:
        with drawing(browser) as draw:
            return [draw(figure) for figure in figures]
    except (OSError, KeyError):
        return None


@contextmanager
def drawing(browser: str) -> Iterator[Callable[[Any], bytes]]:
    """What makes a .png of a figure, in a browser that has the plotting library loaded.

    Raises:
        OSError: the browser has gone, or did not answer in time.
        KeyError: it refuses what is asked.
    """
    from plotly.offline import get_plotlyjs

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _started(browser, folder) as ask:
        # An empty page that is filled by hand: there is no loading that could be waited for too early.
        target = ask("Target.createTarget", url="about:blank")["targetId"]
        session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def run(script: str) -> None:
            said = ask("Runtime.evaluate", session, expression=script, awaitPromise=True)
            if "exceptionDetails" in said:
                raise OSError(f"the figure cannot be drawn: {said['exceptionDetails']}")

        run(_PAGE)
        run(get_plotlyjs())

        def draw(figure: Any) -> bytes:
            size = {"width": figure.layout.width, "height": figure.layout.height}
            ask("Emulation.setDeviceMetricsOverride", session, **size, deviceScaleFactor=SCALE, mobile=False)
            run(_DRAW.replace("FIGURE", "figure").join((f"{{const figure = {figure.to_json()};", "}")))
            return base64.b64decode(ask("Page.captureScreenshot", session)["data"])

        yield draw


@contextmanager
def _started(browser: str, folder: str) -> Iterator[Callable[..., dict]]:
    """What asks a browser through its debugging pipe and waits for the answer."""
    to_read, to_us = os.pipe()
    from_us, to_write = os.pipe()
    # The browser reads descriptor 3 and writes to 4.
    command = ["bash", "-c", f'exec 8<&{from_us} 9>&{to_us}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"', "browser"]
    command += [browser, *_FLAGS, f"--user-data-dir={folder}/profile"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=(from_us, to_us), **quiet)
    os.close(from_us)
    os.close(to_us)
    with os.fdopen(to_write, "wb", 0) as out, os.fdopen(to_read, "rb") as back:
        count = 0

        def ask(method: str, session: str | None = None, **params: Any) -> dict:
            nonlocal count
            count += 1
            message = {"id": count, "method": method, "params": params} | ({"sessionId": session} if session else {})
            timer = Timer(PATIENCE, process.kill)
            timer.start()
            try:
                out.write(json.dumps(message).encode() + b"\0")
                while True:
                    answer = json.loads(_message(back))
                    if answer.get("id") == count:
                        return answer["result"]
            finally:
                timer.cancel()

        try:
            yield ask
        finally:
            process.terminate()
            process.wait(30)


def _message(back: BinaryIO) -> bytes:
    """What the browser says next; messages end with a zero byte."""
    found = bytearray()
    while (byte := back.read(1)) != b"\0":
        if not byte:
            raise OSError("the browser has gone")
        found += byte
    return bytes(found)
