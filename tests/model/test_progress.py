# SPDX-License-Identifier: Apache-2.0
import sys

import cogview.progress
from cogview.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_a_log_file_gets_a_line_every_few_seconds(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(cogview.progress, "time", clock)
    with Progress(1000, "train", initial=200) as progress:
        for step in range(800):
            clock.now += 0.1
            progress.update(values=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: step 201 of 1000, 0 s so far, 1 min 20 s left; loss 0"
    assert lines[-1] == "train: step 1000 of 1000, 1 min 20 s so far; loss 799"
    assert len(lines) == 17  # 80 seconds, a line every 5, and the last one
    assert not any("\r" in line for line in lines)


def test_the_last_line_is_not_repeated_and_nothing_done_is_not_reported(capsys):
    with Progress(1, "encode", unit="image") as progress:
        progress.update()
    with Progress(5, "train", initial=5):
        pass
    assert capsys.readouterr().err.splitlines() == ["encode: image 1 of 1, 0 s so far"]


def test_switched_off_it_shows_messages_alone(capsys):
    with Progress(3, "train", enabled=False) as progress:
        progress.update(3)
        progress.write("step 2 skipped")
    assert capsys.readouterr().err == "step 2 skipped\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(4, "train") as progress:
        progress.update(4, "loss 1.5")
    shown = capsys.readouterr().err
    assert "train: 100%" in shown and "4/4" in shown and "loss 1.5" in shown
