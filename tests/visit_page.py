# SPDX-License-Identifier: Apache-2.0
"""A visit to the page of ``cogview serve``, as a person makes it: type, wait, drop a file, paint, download.

A test makes it on a run with next to no training. By hand, on a real one, it also takes the pictures of docs/
and tells how long a visitor waits::

    python -m tests.visit_page --text "police officer: dark skin tone" --other "an astronaut" --shots docs
    python -m tests.visit_page --run runs/demo --enlarger runs/enlarger
    python -m tests.visit_page --requests 500
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cogview.serving.uploads import LARGEST_UPLOAD
from tests.helpers.browser import chromium

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60_000  # milliseconds, for a machine that has other things to do
WINDOW = {"width": 900, "height": 760}
RANKED = "best first by CapLoss"


@contextlib.contextmanager
def served(run: Path | None, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a page of ``run``, None for the one that ships, and the process that serves it."""
    words = [sys.executable, "-m", "cogview", "serve", "--port", "0", "--device", "cpu"]
    of_run = [] if run is None else ["--run", str(run)]
    server = subprocess.Popen([*words, *of_run, *options], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        yield found[0], server
    finally:
        server.terminate()
        server.wait(30)


@dataclass
class Visit:
    """One visitor, and what was measured: seconds by what was waited for."""

    page: Any
    shots: Path | None = None
    text: str = "a handwritten seven"  # what is drawn
    other: str = "a handwritten two"  # what a picture is compared with
    seconds: dict[str, float] = field(default_factory=dict)

    def arrive(self, address: str) -> None:
        self.page.set_default_timeout(PATIENCE)
        with self.measured("the page"):
            self.page.goto(address)
            self.page.get_by_label("What to draw").wait_for()

    @contextlib.contextmanager
    def measured(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - started, 2)

    def shot(self, name: str) -> None:
        """A small picture of the window."""
        if self.shots is not None:
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(400)  # Buttons and fields fade from one state to the next.
            with Image.open(io.BytesIO(self.page.screenshot())) as picture:
                small = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
                small.save(self.shots / f"page-{name}.png", optimize=True)

    # ---- what a person does

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def button(self, name: str, place: int = 0) -> Any:
        return self.page.get_by_role("button", name=name, exact=True).filter(visible=True).nth(place)

    def told(self, problem: str) -> None:
        """Wait for the line about what is wrong."""
        self.page.get_by_role("alert").filter(visible=True, has_text=problem).wait_for()

    def field(self, name: str) -> Any:
        return self.page.get_by_label(name).filter(visible=True)

    def pictures(self) -> list[bytes]:
        """The pixels of the candidates, in the order in which they stand."""
        shown = self.page.locator("img[alt^='picture ']").filter(visible=True)
        urls = [shown.nth(place).get_attribute("src") for place in range(shown.count())]
        return [pixels(base64.b64decode(url.partition(",")[2])) for url in urls]

    def wait_until(self, request: int, line: str) -> None:
        """Wait for what the page says of a request, the first of a tab being 1."""
        status = self.page.locator(f"[role=status][data-request='{request}']").filter(visible=True)
        status.filter(has_text=re.compile(line)).wait_for()

    def download(self, button: str) -> tuple[bytes, dict[str, str]]:
        """What the browser saves: its pixels, and what stands within the file."""
        with self.page.expect_download() as saved:
            self.button(button).click()
        name = saved.value.suggested_filename
        assert re.fullmatch(r"cogview-\d+-(\d+|sheet|\d+-large)\.png", name), name
        content = Path(saved.value.path()).read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            return pixels(content), dict(picture.info)

    def drop(self, content: bytes, kind: str, more: int = 0) -> None:
        """Let go of a file over the place for pictures; ``more`` zeros follow its content."""
        place = self.page.locator(".q-uploader").filter(visible=True)
        transfer = self.page.evaluate_handle(
            """([content, kind, more]) => {
                const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
                const transfer = new DataTransfer(), name = "../../it's $(touch mine).png";
                transfer.items.add(new File([bytes, new Uint8Array(more)], name, { type: kind }));
                return transfer;
            }""",
            [base64.b64encode(content).decode(), kind, more],
        )
        place.dispatch_event("dragover", {"dataTransfer": transfer})
        self.page.locator(".q-uploader__dnd").filter(visible=True).dispatch_event(
            "drop", {"dataTransfer": transfer}
        )


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB").tobytes()


def draw(visit: Visit, num: int) -> None:
    """Type a text, see candidates settle into their order, draw them again, take them away."""
    visit.button("Draw").click()
    visit.told("the text is empty; type what the picture shows")
    visit.field("What to draw").fill("word " * 199)
    visit.button("Draw").click()
    visit.told("tokens, at most")
    visit.field("pictures").fill(str(num))
    visit.field("What to draw").fill(visit.text)
    with visit.measured("the ranked set"):
        with visit.measured("the first partial picture"):
            visit.button("Draw").click()
            visit.page.locator("img[alt='picture 1']").wait_for()
        visit.wait_until(1, RANKED)
    first = visit.pictures()
    assert len(first) == num
    losses = visit.page.get_by_text(re.compile(r"^CapLoss \d")).filter(visible=True).all_inner_texts()
    numbers = [float(loss.split()[1]) for loss in losses]
    assert len(numbers) == num and numbers == sorted(numbers)
    visit.shot("draw")
    visit.button("Again with this seed").click()
    visit.wait_until(2, RANKED)
    assert visit.pictures() == first
    seed = visit.field("seed").input_value()
    visit.page.get_by_role("button", name="pick 2").click()
    picture, about = visit.download("Download picture")
    assert picture == first[1] and (about["prompt"], about["seed"]) == (visit.text, seed)
    _, about = visit.download("Download sheet")
    assert (about["prompt"], about["seed"]) == (visit.text, seed)


def stop(visit: Visit) -> None:
    """Ask for much, in Chinese and with the key Enter, and stop; then ask for less."""
    visit.field("pictures").fill("64")
    visit.field("seed").fill("")
    visit.field("What to draw").fill("手写数字七")
    visit.page.keyboard.press("Enter")
    visit.button("Stop").click()
    visit.wait_until(3, f"^stopped|{RANKED}")  # A fast machine may have drawn them all.
    visit.field("pictures").fill("4")
    visit.field("What to draw").fill(visit.text)
    visit.button("Draw").click()
    visit.wait_until(4, RANKED)


def read(visit: Visit, picture: bytes) -> None:
    """Drop files that are no pictures, then one that is; ask how well a text fits it."""
    visit.tab("Read a picture")
    visit.drop(b"no picture", "image/png")
    visit.told("cannot be read as a picture")
    visit.drop(picture, "image/png", more=LARGEST_UPLOAD)
    visit.told("larger than 20 MiB")
    visit.drop(picture, "image/png")
    caption = visit.page.locator("[data-part=caption]")
    caption.get_by_text("“").wait_for()
    visit.page.locator("img[alt='its reconstruction']").wait_for()
    visit.field("A text of your own").fill(visit.other)
    visit.button("How well does it fit?").click()
    visit.page.locator("[data-part=cap-loss]").get_by_text(re.compile(r"CapLoss \d")).wait_for()
    visit.shot("read")


def paint(visit: Visit) -> None:
    """Paint over a part of a drawn picture and have that part drawn anew."""
    visit.tab("Draw")
    visit.button("Paint over it").click()
    canvas = visit.page.locator("[data-part=canvas] img")
    visit.button("Draw it anew").click()
    visit.told("nothing is painted yet")
    box = canvas.bounding_box()
    visit.page.mouse.move(box["x"] + 0.35 * box["width"], box["y"] + 0.65 * box["height"])
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.9 * box["height"], steps=8)
    visit.page.mouse.up()
    strokes = visit.page.locator("[data-part=canvas] polyline")
    strokes.wait_for(state="attached")
    finger_stroke(visit, box)
    strokes.nth(1).wait_for(state="attached")
    visit.button("Draw it anew").click()
    visit.wait_until(1, RANKED)
    assert len(visit.pictures()) == 4
    visit.button("Download sheet").scroll_into_view_if_needed()
    visit.shot("paint")


def finger_stroke(visit: Visit, box: dict[str, float]) -> None:
    """From the middle to the right, as on a telephone."""
    send = visit.page.context.new_cdp_session(visit.page).send
    send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    y = box["y"] + 0.5 * box["height"]
    for kind, across in (("touchStart", 0.5), ("touchMove", 0.6), ("touchMove", 0.7), ("touchEnd", None)):
        points = [] if across is None else [{"x": box["x"] + across * box["width"], "y": y}]
        send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    send("Emulation.setTouchEmulationEnabled", {"enabled": False})


def enlarge(visit: Visit) -> None:
    """Have a drawn picture enlarged and take it away."""
    visit.tab("Draw")
    with visit.measured("the enlarged picture"):
        visit.button("Enlarge").click()
        visit.page.locator("img[alt='the enlarged picture']").wait_for()
    visit.button("Download enlarged picture").scroll_into_view_if_needed()
    visit.shot("enlarge")
    visit.download("Download enlarged picture")


def vote(visit: Visit) -> None:
    """Choose between two pictures in the tab."""
    visit.tab("Vote")
    frame = visit.page.frame_locator("iframe[title=vote]")
    frame.get_by_text("0 of ").wait_for()
    frame.locator("#pictures button").first.click()
    frame.get_by_text("1 of ").wait_for()


def watch_memory(visit: Visit, address: str, server: subprocess.Popen, requests: int) -> None:
    """The memory of the server over many requests, a visitor coming and leaving every 25 of them."""
    for first in range(0, requests, 25):
        visit.arrive(address)
        visit.field("pictures").fill("4")
        visit.field("What to draw").fill(visit.text)
        for request in range(1, 26):
            visit.button("Draw").click()
            visit.wait_until(request, RANKED)
        status = Path(f"/proc/{server.pid}/status").read_text()
        held = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
        print(f"{first + 25:5} requests: {held:7.1f} MiB", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The visit by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="by default the one that ships")
    parser.add_argument("--enlarger", type=Path)
    parser.add_argument("--shots", type=Path)
    parser.add_argument("--text", default=Visit.text, help="what is drawn")
    parser.add_argument("--other", default=Visit.other, help="what the dropped picture is compared with")
    parser.add_argument("--picture", type=Path, help="a picture to drop; by default one that is drawn")
    parser.add_argument("--requests", type=int, help="rather watch the memory of the server over so many")
    given = parser.parse_args(arguments)
    options = ["--enlarger", str(given.enlarger)] if given.enlarger else []
    with chromium(viewport=WINDOW) as (page, said), served(given.run, *options) as (address, server):
        visit = Visit(page, given.shots, given.text, given.other)
        if given.requests:
            watch_memory(visit, address, server, given.requests)
            return
        visit.arrive(address)
        draw(visit, 8)
        stop(visit)
        with tempfile.NamedTemporaryFile(suffix=".png") as drawn:
            if given.picture is None:
                with page.expect_download() as saved:
                    visit.button("Download picture").click()
                saved.value.save_as(drawn.name)
            read(visit, Path(given.picture or drawn.name).read_bytes())
        paint(visit)
        if given.enlarger is not None:
            enlarge(visit)
        print("\n".join(f"{seconds:6.2f} s to {what}" for what, seconds in visit.seconds.items()))
        assert said == [], said


if __name__ == "__main__":
    main()
