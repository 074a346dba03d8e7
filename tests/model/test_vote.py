# SPDX-License-Identifier: Apache-2.0
"""Votes: shuffled questions, a file that is gone on with, shares with intervals, and the page itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
from PIL import Image

from cogview.cli import main
from cogview.commands.outlet import Outlet
from cogview.evaluation import vote_server
from cogview.evaluation.vote import Ballot, wilson_interval
from cogview.evaluation.vote_server import VoteServer
from cogview.files import ASIDE
from tests.helpers.browser import chromium

TEXTS = [f"a picture of thing {number}" for number in range(12)]


def save_drawn(folder, colour, texts=TEXTS):
    """As ``cogview generate --out folder`` writes pictures: each with its text within, beside a sheet."""
    outlet, picture = Outlet(f"{folder}/"), Image.new("RGB", (16, 16), colour)
    for number, text in enumerate(texts):
        outlet.write_picture(f"{number:04d}", picture, {"prompt": text, "seed": 0, "candidate": 0})
    outlet.write_sheet([[picture] for _ in texts], {"prompt": "\n".join(texts), "seed": 0})
    return folder


@pytest.fixture
def folders(tmp_path):
    return [save_drawn(tmp_path / colour, colour) for colour in ("red", "blue")]


@pytest.fixture
def opened():
    """Ballots that are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *given, **options: stack.enter_context(Ballot(*given, **options))


def test_questions_and_candidates_are_shuffled_the_same_way_for_the_same_seed(folders, tmp_path, opened):
    ballot = opened(folders, tmp_path / "one", seed=0)
    assert sorted(question.prompt for question in ballot.questions) == sorted(TEXTS)
    assert [question.prompt for question in ballot.questions] != TEXTS
    firsts = {question.folders[0] for question in ballot.questions}
    assert firsts == {str(folder) for folder in folders}  # Neither always stands at the left.
    for question in ballot.questions:
        for picture, folder in zip(question.pictures, question.folders, strict=True):
            assert str(picture.parent) == folder
    assert ballot.questions == opened(folders, tmp_path / "two", seed=0).questions
    assert ballot.questions != opened(folders, tmp_path / "three", seed=1).questions


def test_a_vote_is_kept_at_once_and_a_ballot_goes_on(folders, tmp_path, opened):
    with Ballot(folders, tmp_path) as ballot:
        ballot.vote(0, 1)
        ballot.vote(0, 0)  # It has a vote already.
        assert len(ballot.votes) == 1
    again = opened(folders, tmp_path)
    assert again.votes == ballot.votes
    assert again.votes[0].chosen == ballot.questions[0].folders[1]
    assert again.next_question == 1
    again.close()
    with pytest.raises(ValueError, match="has votes on other pictures; choose another --out"):
        opened(folders[::-1], tmp_path)
    for question, place in ((len(TEXTS), 0), (-1, 0), (1, 2), (1, -1)):
        with pytest.raises(ValueError, match="must be from 0 to"):
            ballot.vote(question, place)


def test_two_ballots_never_keep_votes_in_one_folder(folders, tmp_path):
    """Each would write the votes that it knows over those of the other."""
    out = tmp_path / "votes"
    with Ballot(folders, out) as ballot:
        ballot.vote(0, 1)
        with pytest.raises(BlockingIOError, match="choose another folder") as error:
            Ballot(folders, out)
        assert f"{out} is used for a vote by process {os.getpid()} on" in str(error.value)
        Ballot(folders, tmp_path / "elsewhere").close()
    with Ballot(folders, out) as again:
        assert len(again.votes) == 1
    with pytest.raises(ValueError, match="has votes on other pictures"):
        Ballot(folders[::-1], out)
    Ballot(folders, out).close()  # A refused one holds nothing.


def test_a_place_that_takes_no_votes_is_told_before_anybody_is_asked(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out .*votes cannot be written: .*file is not a folder"):
        Ballot(folders, tmp_path / "file" / "votes")
    if os.path.isdir("/proc/self"):
        with pytest.raises(
            OSError, match=r"--out /proc/votes cannot be written: no file can be made in /proc"
        ):
            Ballot(folders, "/proc/votes")


def test_a_vote_that_cannot_be_kept_is_refused_with_the_reason_and_can_be_given_again(folders, tmp_path):
    with Ballot(folders, tmp_path) as ballot, VoteServer(ballot) as server:
        hindrance = tmp_path / f"votes.json{ASIDE}"
        (hindrance / "deep").mkdir(parents=True)
        vote = {"question": 0, "place": 1}
        with pytest.raises(urllib.error.HTTPError) as error:
            fetch(f"{server.url}vote", vote)
        assert error.value.code == 500
        assert f"{tmp_path}/votes.json cannot be written: " in json.load(error.value)["detail"]
        error.value.close()
        assert not ballot.votes and ballot.next_question == 0
        shutil.rmtree(hindrance)
        assert json.loads(fetch(f"{server.url}vote", vote)[1])["answered"] == 1


def test_a_vote_that_ends_without_votes_says_so(folders, tmp_path, capsys, monkeypatch):
    def interrupted(event):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", interrupted)
    monkeypatch.setattr(VoteServer, "__enter__", lambda server: server)
    monkeypatch.setattr(VoteServer, "__exit__", lambda server, *_: server.server_close())
    assert main(["evaluate", "--vote", *map(str, folders), "--port", "0", "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"no votes yet: 0 of {len(TEXTS)} questions answered"


def test_the_last_vote_ends_it_though_the_browser_is_gone(tmp_path, monkeypatch, capsys):
    def gone(*_):
        raise BrokenPipeError

    folders = [save_drawn(tmp_path / name, name, TEXTS[:1]) for name in ("red", "blue")]
    with Ballot(folders, tmp_path / "votes") as ballot, VoteServer(ballot) as server:
        monkeypatch.setattr(vote_server._Handler, "_answer", gone)
        with pytest.raises((OSError, http.client.HTTPException)):
            fetch(f"{server.url}vote", {"question": 0, "place": 1})
        assert server.finished.wait(10)
    assert len(ballot.votes) == 1
    assert capsys.readouterr().err == ""


def test_a_visitor_who_reloads_leaves_no_traceback(folders, tmp_path, capsys):
    with Ballot(folders, tmp_path) as ballot, VoteServer(ballot) as server:
        large = ballot.picture(0, 0)
        os.truncate(large, 1 << 25)  # More than the buffers of a connection take.
        before = threading.active_count()
        for _ in range(3):
            visitor = socket.create_connection(("127.0.0.1", server.server_port))
            # The connection is reset when it is closed.
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            visitor.sendall(b"GET /picture/0/0 HTTP/1.1\r\nHost: localhost:1\r\n\r\n")
            assert visitor.recv(100).startswith(b"HTTP/1.1 200")
            visitor.close()
        assert len(fetch(f"{server.url}picture/0/1")[1]) < 1 << 20
        for _ in range(1000):
            if threading.active_count() <= before:
                break
            time.sleep(0.01)
    assert threading.active_count() <= before
    assert capsys.readouterr().err == ""


def test_other_mistakes_of_the_server_are_still_told(folders, tmp_path, monkeypatch, capsys):
    def wrong(*_):
        raise RuntimeError("wrong")

    with Ballot(folders, tmp_path) as ballot, VoteServer(ballot) as server:
        monkeypatch.setattr(vote_server, "ballot_state", wrong)
        with pytest.raises((OSError, http.client.HTTPException)):
            fetch(f"{server.url}question")
    assert "RuntimeError: wrong" in capsys.readouterr().err


def test_shares_have_intervals(folders, tmp_path, opened):
    ballot = opened(folders, tmp_path)
    for number, question in enumerate(ballot.questions):
        wanted = str(folders[0] if number < 9 else folders[1])
        ballot.vote(number, question.folders.index(wanted))
    red, blue = ballot.shares()
    assert (red.folder, red.votes, red.share) == (str(folders[0]), 9, 0.75)
    # The ends of Wilson's interval are the shares from which what was seen lies just 1.96 deviations away.
    for end in (red.low, red.high):
        assert (0.75 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 12, rel=1e-9)
    assert red.low < 0.75 < red.high
    assert blue.share == 0.25
    assert wilson_interval(0, 5)[1] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(5, 5)[2] == pytest.approx(1, abs=1e-12)
    assert wilson_interval(0, 0)[1:] == (0, 1)


def test_captions_or_names_stand_for_texts_that_are_not_within_the_files(tmp_path, opened):
    named, listed = tmp_path / "named", tmp_path / "listed"
    named.mkdir()
    listed.mkdir()
    Image.new("RGB", (4, 4)).save(named / "a tiger.png")
    Image.new("RGB", (4, 4)).save(listed / "1.png")
    (listed / "captions.tsv").write_text("1.png\ta tiger")
    (question,) = opened([named, listed], tmp_path).questions
    assert question.prompt == "a tiger"
    shutil.rmtree(listed)
    listed.mkdir()
    Image.new("RGB", (4, 4)).save(listed / "1.png")
    with pytest.raises(ValueError, match="have no picture of the same text"):
        opened([named, listed], tmp_path)


def test_one_folder_is_no_choice(folders, tmp_path, capsys):
    assert main(["evaluate", "--vote", str(folders[0]), "--out", str(tmp_path)]) == 2
    assert "--vote compares two folders or more" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(folders[0])
    for same in (folders[0], tmp_path / "link"):
        with pytest.raises(ValueError, match="two or more, each named once"):
            Ballot([folders[0], same], tmp_path)


class Page(HTMLParser):
    """The ids of a page, and whether every element is closed."""

    EMPTY = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.ids, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def fetch(url, body=None, **headers):
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read()


def test_the_server_gives_the_page_the_pictures_and_the_shares_and_takes_the_votes(folders, tmp_path, opened):
    ballot = opened(folders, tmp_path)
    with VoteServer(ballot) as server:
        page = Page(fetch(server.url)[1].decode())
        assert not page.open
        assert {"prompt", "pictures", "shares", "problem"} <= set(page.ids)
        state = json.loads(fetch(f"{server.url}question")[1])
        while "shares" not in state:
            assert str(tmp_path) not in json.dumps(state)  # It does not tell which folder is which.
            kind, picture = fetch(server.url + state["pictures"][0].lstrip("/"))
            question = ballot.questions[state["question"]]
            assert (kind, picture) == ("image/png", question.pictures[0].read_bytes())
            assert state["prompt"] == question.prompt
            vote = {"question": state["question"], "place": question.folders.index(str(folders[1]))}
            state = json.loads(fetch(f"{server.url}vote", vote)[1])
        assert server.finished.wait(10)
    assert state["shares"][0]["folder"] == str(folders[1])
    assert state["shares"][0]["votes"] == len(TEXTS)
    assert len(json.loads((tmp_path / "votes.json").read_text())["votes"]) == len(TEXTS)


def test_pictures_and_folders_with_names_that_are_no_utf8_get_their_votes(tmp_path, opened):
    folders = [tmp_path / os.fsdecode(name) for name in (b"a\xff", b"b\xff")]
    for folder in folders:
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / os.fsdecode(b"tiger \xff.png"), "PNG")
    with Ballot(folders, tmp_path) as ballot, VoteServer(ballot) as server:
        state = json.loads(fetch(f"{server.url}question")[1])
        assert state["prompt"] == "tiger ?"
        assert fetch(server.url + state["pictures"][1])[0] == "image/png"
        state = json.loads(fetch(f"{server.url}vote", {"question": 0, "place": 1})[1])
    assert {share["folder"] for share in state["shares"]} == {f"{tmp_path}/a?", f"{tmp_path}/b?"}
    again = opened(folders, tmp_path)
    assert again.votes == ballot.votes and again.next_question is None


def test_a_browser_that_leaves_out_the_usual_port_is_let_in(folders, tmp_path, opened):
    with VoteServer(opened(folders, tmp_path)) as server:
        for host in ("127.0.0.1", "localhost"):
            assert fetch(f"{server.url}question", Host=host)[0] == "application/json"


def test_what_is_no_vote_is_refused_and_other_sites_are_kept_out(folders, tmp_path, opened):
    with VoteServer(opened(folders, tmp_path)) as server:

        def status(path, body=None, **headers):
            with pytest.raises(urllib.error.HTTPError) as error:
                fetch(server.url + path, body, **headers)
            said.append(error.value.read())
            error.value.close()
            return error.value.code

        said = []
        for vote in (
            {"question": 99, "place": 0},
            {"question": 0, "place": 5},
            {"question": True, "place": 0},
        ):
            assert status("vote", vote) == 400
        assert status("vote", [1]) == status("vote", {"place": 0}) == status("vote", "x" * 2000) == 400
        assert status("vote", {"question": 0, "place": 0}, **{"Content-Type": "text/plain"}) == 404
        deep = b"[" * 990
        assert status("vote", deep) == status("vote", b"", **{"Content-Length": ""}) == 400
        assert json.loads(said[-1]) == {"detail": "a vote has up to 1,000 bytes"}
        assert status("question", Host="example.org:80") == status("vote", {}, Host="example.org") == 403
        assert status("picture/0/9") == status("picture/99/0") == status("../votes.json") == 404
        assert not server.ballot.votes
        with pytest.raises(OSError, match=r"cannot be used: .*choose another --port"):
            VoteServer(server.ballot, server.server_port)


def test_people_vote_in_a_browser_by_click_and_by_key(folders, tmp_path, opened):
    ballot = opened(folders, tmp_path)
    with chromium() as (page, problems), VoteServer(ballot) as server:
        page.goto(server.url)
        for number, question in enumerate(ballot.questions):
            page.wait_for_function(f"document.getElementById('count').textContent.startsWith('{number} ')")
            assert page.inner_text("#prompt") == question.prompt
            loaded = "[...document.images].every(image => image.complete && image.naturalWidth == 16)"
            page.wait_for_function(loaded)
            place = question.folders.index(str(folders[number % 2]))
            if number % 3:
                page.keyboard.press(str(place + 1))
            else:
                page.click(f"#pictures button:nth-child({place + 1})")
        page.wait_for_selector("#shares td")
        assert page.inner_text("#shares").count("50.0 %") == 2
        assert server.finished.wait(10)
        assert problems == []
    assert [vote.chosen for vote in ballot.votes] == [str(folders[n % 2]) for n in range(len(TEXTS))]


def test_the_page_keeps_the_question_where_a_vote_is_not_kept(folders, tmp_path, opened):
    ballot = opened(folders, tmp_path)
    with chromium() as (page, _), VoteServer(ballot) as server:
        page.goto(server.url)
        page.wait_for_selector("#pictures button")
        hindrance = tmp_path / f"votes.json{ASIDE}"
        (hindrance / "deep").mkdir(parents=True)
        page.keyboard.press("1")
        page.wait_for_function(
            "document.getElementById('problem').textContent.includes('votes.json cannot be')"
        )
        assert page.inner_text("#prompt") == ballot.questions[0].prompt
        shutil.rmtree(hindrance)
        page.click("#pictures button:nth-child(2)")
        page.wait_for_function("document.getElementById('count').textContent.startsWith('1 ')")
        assert page.inner_text("#problem") == ""
    assert [vote.chosen for vote in ballot.votes] == [ballot.questions[0].folders[1]]
