# SPDX-License-Identifier: Apache-2.0
"""What stands behind the page: what may be asked, the queue, shared batches, stopping, files to take away."""

from __future__ import annotations

import dataclasses
import io
import shutil
import socket
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogview.config import SamplingConfig
from cogview.data.image_files import read_image
from cogview.generation.engine import DrawOptions
from cogview.model.decoder import Decoder
from cogview.run import PRETRAINED, load_run
from cogview.serving import uploads
from cogview.serving.asked import LONGEST_TEXT, Fields, Settings, read_settings, read_text
from cogview.serving.downloads import enlarged_file, picture_file, sheet_file
from cogview.serving.jobs import DrawJob, EnlargeJob, Job, ReadJob, ScoreJob, State, Stopped
from cogview.serving.models import Models, load_models
from cogview.serving.queue import Queue
from cogview.serving.service import Service
from cogview.serving.status import cap_loss_line, queue_line, status_line
from cogview.serving.strokes import MOST_POINTS, Painting
from cogview.serving.together import draw_together
from cogview.serving.uploads import load_drawn, load_upload

SAMPLING = SamplingConfig(temperature=0.7, top_k=20)
PATIENCE = 60  # seconds, for a machine that has other things to do


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, "cpu")


def draw_job(run, text="a handwritten seven", num=2, seed=5, **settings):
    sampling = settings.pop("sampling", SAMPLING)
    given = settings.pop("given", None)
    return DrawJob(
        text, run.pieces(text), Settings(num, seed, dataclasses.replace(sampling, **settings)), given
    )


def codes_of(job):
    return [drawing.codes.tolist() for drawing in sorted(job.drawings, key=lambda each: each.candidate)]


# ---- what is asked


def test_empty_fields_take_what_the_run_does_and_a_seed_at_random():
    settings = read_settings(Fields(), SAMPLING)
    assert (settings.num, settings.sampling) == (8, SAMPLING)
    own = dataclasses.replace(SAMPLING, guidance=1.5)
    assert read_settings(Fields(), own).sampling == own
    seeds = {read_settings(Fields(), SAMPLING).seed for _ in range(5)}
    assert len(seeds) > 1 and all(0 <= seed < 10**6 for seed in seeds)
    asked = read_settings(Fields(3, 7.0, 0.5, 9, 2.5), SAMPLING)
    assert asked == Settings(3, 7, SamplingConfig(temperature=0.5, top_k=9, guidance=2.5))


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"num": 0}, "pictures must be from 1 to 64, got 0"),
        ({"num": 65}, "pictures must be from 1 to 64, got 65"),
        ({"num": 1.5}, "pictures must be a whole number, got 1.5"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2.0**60}, "seed must be from 0 to"),
        ({"temperature": float("nan")}, "temperature must be from 0 to 10, got nan"),
        ({"top_k": "many" * 40}, "top-k must be from 0 to"),
        ({"guidance": 1e9}, "guidance must be from 0 to 20"),
        ({"guidance": True}, "guidance must be from 0 to 20"),
    ],
)
def test_a_setting_out_of_range_is_one_line_that_names_it(fields, line):
    with pytest.raises(ValueError) as caught:
        read_settings(Fields(**fields), SAMPLING)
    assert str(caught.value).startswith(line) and len(str(caught.value)) < 120


def test_a_text_is_one_line_without_what_steers_a_terminal():
    assert read_text("  a\nhandwritten\t\x1b[31mseven\x00 \ud800") == "a handwritten [31mseven"
    assert read_text("手写数字七 👩‍🚀") == "手写数字七 👩‍🚀"
    for empty in ("", " \n ", "\x00"):
        with pytest.raises(ValueError, match="the text is empty; type"):
            read_text(empty)
    with pytest.raises(ValueError, match=r"1,001 characters.*shorten it"):
        read_text("a" * (LONGEST_TEXT + 1))
    with pytest.raises(ValueError, match="must be words"):
        read_text(["a"])


def png(width, height):
    content = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(content, format="PNG")
    return content.getvalue()


def test_an_upload_is_the_picture_that_the_run_would_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(40, 30))
    loaded = load_upload(path.read_bytes(), 16)
    assert torch.equal(loaded.pixels, read_image(path, 16))
    assert loaded.shown.size == (uploads.SHOWN_SIDE, uploads.SHOWN_SIDE)
    drawn = load_drawn(Image.new("RGB", (16, 16), "red"), 16)
    assert drawn.shown.size == (384, 384) and drawn.pixels.shape == (3, 16, 16)


def test_a_wrong_or_huge_upload_is_one_line(monkeypatch):
    for content in (
        b"",
        b"no picture",
        png(20, 20)[:40],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):
        with pytest.raises(ValueError, match="cannot be read as a picture; PNG, "):
            load_upload(content, 16)
    with pytest.raises(ValueError, match="the file cannot be read as an image: it is cut short or damaged"):
        load_upload(png(64, 64)[:-2000], 16)
    # A file of a few bytes that says that it is 30,000 pixels wide and high.
    head = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = len(head[4:]).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
    with pytest.raises(ValueError, match="more than 40 million pixels; scale it down"):
        load_upload(b"\x89PNG\r\n\x1a\n" + chunk + png(1, 1)[33:], 16)
    monkeypatch.setattr(uploads, "LARGEST_UPLOAD", 1 << 20)
    with pytest.raises(ValueError, match="larger than 1 MiB; save it smaller"):
        load_upload(bytes((1 << 20) + 1), 16)


def test_strokes_are_a_mask_and_an_overlay():
    painting = Painting()
    with pytest.raises(ValueError, match="nothing is painted yet"):
        painting.mask(100)
    painting.begin(0.5, 0.25, 0.1)
    painting.go_on(0.5, 0.75)
    mask = painting.mask(100)
    white = {(x, y) for x in range(100) for y in range(100) if mask.getpixel((x, y)) > 127}
    assert (50, 50) in white and (50, 25) in white and (20, 50) not in white and (50, 90) not in white
    assert 400 < len(white) < 700  # Half the side long, a tenth wide, and two round ends.
    assert painting.overlay(100).startswith('<polyline points="50.0,25.0 50.0,75.0"')
    painting.begin(float("nan"), 0.5, 0.1)
    painting.begin(3.0, -1.0, 5.0)
    painting.go_on(float("inf"), 0.5)
    assert painting.strokes[1:] == [(1.0, [(1.0, 0.0)])]
    painting.undo()
    assert len(painting.strokes) == 1 and painting.mask(100).tobytes() == mask.tobytes()
    for _ in range(MOST_POINTS + 10):
        painting.go_on(0.5, 0.5)
    assert len(painting.strokes[0][1]) == MOST_POINTS
    painting.clear()
    assert painting.overlay(100) == ""


# ---- the queue


class Alike(Job):
    """A job that shares with those of its kind."""

    def __init__(self, kind, rows=1):
        super().__init__()
        self.kind, self.rows = kind, rows

    def shares_with(self, other):
        return self.kind == other.kind


def test_those_who_are_alike_are_taken_together_and_the_others_keep_their_places():
    queue = Queue(most_rows=4)
    first, other, alike, large, last = (Alike("a"), Alike("b"), Alike("a"), Alike("a", 3), Alike("a"))
    for job in (first, other, alike, large, last):
        queue.put(job)
    assert [queue.before(job) for job in (first, other, last)] == [0, 1, 4]
    assert queue.counts == (0, 5)
    assert queue.take() == [first, alike, last]  # With the large one, these would be six rows.
    assert [queue.before(job) for job in (other, large)] == [3, 4]
    assert queue.counts == (3, 2)
    first.finish()
    assert queue.before(other) == 2
    queue.stop(other)
    assert (other.state, queue.before(large)) == (State.STOPPED, 2)
    assert queue.take() == [large]
    queue.stop(large)
    assert queue.counts == (0, 0)
    with pytest.raises(Stopped):
        large.check()


def test_a_full_queue_says_so_and_a_closed_one_ends_whoever_waits():
    queue = Queue(most_waiting=2)
    jobs = [Alike("a"), Alike("b")]
    for job in jobs:
        queue.put(job)
    with pytest.raises(ValueError, match="2 requests wait already; try again in a minute"):
        queue.put(Alike("c"))
    queue.close()
    assert queue.take() == [] and all(job.state is State.STOPPED for job in jobs)


def test_what_a_page_says():
    job = Alike("a")
    assert status_line(job, 0) == "in the queue: yours is next"
    assert status_line(job, 1) == "in the queue: 1 request before yours"
    assert status_line(job, 2) == "in the queue: 2 requests before yours"
    job.begin()
    assert status_line(job, 0) == "at work"
    job.fail("one\nline")
    assert (status_line(job, 0), job.problem) == ("", "one line")
    job.stop()  # It is over already.
    assert job.state is State.FAILED
    assert queue_line(0, 0) == "nobody is waiting" and queue_line(1, 2) == "1 request at work, 2 waiting"
    assert cap_loss_line(1.23456) == "CapLoss 1.235" and cap_loss_line(float("nan")) == "no CapLoss"


# ---- drawing


def test_a_shared_batch_draws_what_each_would_draw_alone(run):
    jobs = [draw_job(run, num=3), draw_job(run, "手写数字七", num=2, seed=9), draw_job(run, num=1, seed=9)]
    assert all(jobs[0].shares_with(job) for job in jobs)
    draw_together(run, jobs)
    assert [job.state for job in jobs] == [State.DONE] * 3
    for job in jobs:
        settings = job.settings
        options = DrawOptions(SAMPLING)
        requests = run.requests([job.text], [settings.seed])
        alone = [drawing for batch in run.draw(requests, settings.num, options) for _, drawing in batch]
        assert codes_of(job) == [drawing.codes.tolist() for drawing in alone]
        losses = [drawing.loss for drawing in job.ranked]
        assert losses == sorted(losses)
        assert losses == pytest.approx(sorted(drawing.loss for drawing in alone), rel=1e-4)
        assert set(job.partial) == set(range(settings.num))  # They were seen while they were drawn.


def test_only_like_settings_share(run):
    job = draw_job(run)
    given = torch.full((run.num_codes,), -1)
    assert job.shares_with(draw_job(run, "手写数字七", num=5, seed=1))
    assert not job.shares_with(draw_job(run, guidance=2.0))
    assert not job.shares_with(draw_job(run, sampling=SamplingConfig(temperature=0.2)))
    assert not job.shares_with(draw_job(run, given=given))
    assert draw_job(run, given=given).shares_with(draw_job(run, given=given))
    assert not job.shares_with(ReadJob(torch.zeros(3, 16, 16)))


@pytest.fixture
def steps(monkeypatch):
    """The number of rows of every step, and what is to happen after a number of them."""
    rows, after = [], {}
    decode, whole_step = Decoder.__call__, Decoder.whole_step

    def count(number):
        rows.append(number)
        after.get(len(rows), lambda: None)()

    def counted(decoder, tokens, *others):
        hidden = decode(decoder, tokens, *others)
        if tokens.shape[1] == 1:  # Prompts are longer.
            count(len(tokens))
        return hidden

    def counted_at_once(decoder, drawn, *others):
        step = whole_step(decoder, drawn, *others)
        return step and (lambda: (step(), count(len(drawn[0]))))

    monkeypatch.setattr(Decoder, "whole_step", counted_at_once)
    monkeypatch.setattr(Decoder, "__call__", counted)
    return rows, after


def test_who_leaves_a_shared_batch_costs_nothing_from_the_next_step_on(run, steps):
    rows, after = steps
    wanted = draw_job(run, num=2)
    draw_together(run, [wanted])
    assert rows == [2] * (run.num_codes - 1)
    rows.clear()
    stays, leaves = draw_job(run, num=2), draw_job(run, num=5, seed=1)
    after[6] = leaves.stop
    draw_together(run, [leaves, stays])
    # Six steps of seven rows; the seventh code of each is read again, and the rest drawn by two rows alone.
    assert rows == [7] * 6 + [2] * (run.num_codes - 1 - 6 - 1)
    assert (stays.state, leaves.state, leaves.drawings) == (State.DONE, State.STOPPED, ())
    assert codes_of(stays) == codes_of(wanted)


def test_who_leaves_alone_ends_the_drawing(run, steps):
    rows, after = steps
    job = draw_job(run, num=4)
    after[3] = job.stop
    draw_together(run, [job])
    assert rows == [4] * 3 and job.state is State.STOPPED


def test_a_part_is_drawn_anew_and_the_rest_kept(run):
    picture = torch.rand(3, 16, 16)
    painting = Painting()
    painting.begin(0.9, 0.9, 0.01)  # The thinnest brush: a sixth of a pixel.
    kept = run.kept_codes(picture, painting.mask(run.image_size))
    assert int((kept < 0).sum()) == 1
    job = draw_job(run, num=3, given=kept)
    draw_together(run, [job])
    for codes in codes_of(job):
        assert [code for code, own in zip(codes, kept.tolist(), strict=True) if own >= 0] == kept[
            kept >= 0
        ].tolist()


# ---- the service


def wait_for(job):
    end = time.monotonic() + PATIENCE
    while not job.is_over:
        assert time.monotonic() < end, job.state
        time.sleep(0.01)
    return job


def test_a_service_draws_reads_scores_and_enlarges(run, run_folder):
    # It has learned nothing of it, but enlarges.
    enlarger = dataclasses.replace(run, finetuned_for="super-resolution")
    with Service(Models(run, run_folder, enlarger)) as service:
        drawn = draw_job(run, num=2)
        pixels = torch.rand(3, 16, 16)
        read, score = ReadJob(pixels), ScoreJob(pixels, "seven", run.pieces("seven"))
        for job in (drawn, read, score):
            service.submit(job)
        assert [wait_for(job).state for job in (drawn, read, score)] == [State.DONE] * 3
        assert read.caption == run.caption(pixels) and read.rebuilt.size == (16, 16)
        assert score.loss == pytest.approx(run.cap_loss("seven", [pixels])[0], rel=1e-5)
        enlarge = EnlargeJob(drawn.ranked[0])
        service.submit(enlarge)
        assert wait_for(enlarge).state is State.DONE, enlarge.problem
        assert enlarge.enlarged.size == (32, 32)
    assert "best first by CapLoss; seed 5" in status_line(drawn, 0)


class Bad(Job):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def work(self, models):
        raise self.error


def test_a_request_that_fails_is_one_line_and_the_next_one_is_served(run, run_folder, caplog):
    with Service(Models(run, run_folder)) as service:
        lines = {}
        for error in (ValueError("so\nlong"), MemoryError(), KeyError("a mistake"), Stopped()):
            job = Bad(error)
            service.submit(job)
            if isinstance(error, Stopped):
                job.stop()
            lines[type(error)] = wait_for(job).problem
        read = ReadJob(torch.rand(3, 16, 16))
        service.submit(read)
        assert wait_for(read).state is State.DONE
    assert lines[ValueError] == "so long" and "ask for fewer pictures" in lines[MemoryError]
    assert "made a mistake" in lines[KeyError] and "KeyError: 'a mistake'" in caplog.text


def test_a_service_that_ends_stops_what_it_works_on(run, run_folder, monkeypatch):
    begun, decode = threading.Event(), Decoder.__call__

    def slow(*arguments):
        begun.set()
        time.sleep(0.05)
        return decode(*arguments)

    monkeypatch.setattr(Decoder, "__call__", slow)
    job = draw_job(run, num=1)
    with Service(Models(run, run_folder)) as service:
        service.submit(job)
        assert begun.wait(PATIENCE)
    assert job.state is State.STOPPED and not job.drawings


def test_a_run_that_disappears_is_one_line(run, run_folder, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    shutil.copy(run_folder / "model.json", folder)
    with Service(Models(run, folder)) as service:
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError, match="the run gone is no longer there; put it back, or start"):
            service.submit(draw_job(run))
        assert service.queue.counts == (0, 0)


def test_an_enlarger_must_be_one(run_folder):
    with pytest.raises(ValueError, match="--enlarger must be a run of cogview finetune super-resolution"):
        load_models(run_folder, run_folder, "cpu", "fp32")
    assert load_models(run_folder, None, "cpu", "fp32").enlarger is None


def test_parts_that_the_model_never_learned_are_told(run, run_folder):
    models = Models(run, run_folder)
    assert models.unknown("seven") == ""
    assert models.unknown("seven ☃").startswith("the model never learned these parts: ")


# ---- files to take away


def test_files_hold_prompt_and_seed_and_are_named_by_numbers_alone(run):
    job = draw_job(run, "手写数字七", num=3, seed=12)
    assert job.pictures == []
    draw_together(run, [job])
    best = job.ranked[0]
    assert [number for number, _ in job.pictures] == [drawing.candidate for drawing in job.ranked]
    one, sheet = picture_file(job, best), sheet_file(job)
    large = enlarged_file(best, best.image.resize((32, 32)))
    assert (one.name, sheet.name) == (f"cogview-12-{best.candidate}.png", "cogview-12-sheet.png")
    assert large.name == f"cogview-12-{best.candidate}-large.png"
    for file in (one, sheet, large):
        with Image.open(io.BytesIO(file.content)) as picture:
            assert (picture.info["prompt"], picture.info["seed"]) == ("手写数字七", "12")
    with Image.open(io.BytesIO(one.content)) as picture:
        assert picture.info["candidate"] == str(best.candidate)
        assert picture.info["cap_loss"] == f"{best.loss:.4f}"
        assert picture.tobytes() == best.image.tobytes()


def test_the_command_names_a_wrong_option(run_folder, capsys):
    from cogview.cli import main

    for words, line in (
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--vote", "a"], "--vote compares two folders or more, got 1"),
    ):
        assert main(["serve", "--run", str(run_folder), *words]) == 2
        assert line in capsys.readouterr().err


def test_a_port_in_use_is_one_line(run_folder, capsys):
    from cogview.cli import main

    pytest.importorskip("nicegui", reason="needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--run", str(run_folder), "--port", str(port)]) == 2
    line = f"cogview serve: 127.0.0.1:{port} cannot be used: Address already in use; choose another --port or"
    assert capsys.readouterr().err == f"{line} --host\n"


def test_a_run_is_called_by_its_folder_wherever_the_command_runs(run, run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    assert Models(run, Path()).name == Models(run, run_folder).name == run_folder.name
    assert Models(run, PRETRAINED).name == "emoji"
