# SPDX-License-Identifier: Apache-2.0
"""Who is let through to the page: this machine alone, or whoever has the token; never another site's page."""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import pytest

from cogview.evaluation.vote import Ballot
from cogview.files import ASIDE
from cogview.serving.guard import Guard, is_loopback
from tests.model.test_vote import save_drawn

LARGEST = 1000


class Behind:
    """The application behind a guard: it reads all that is sent, and says that it was reached."""

    def __init__(self):
        self.received = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            self.received.append(scope["type"])
            return
        body, more = b"", True
        while more:
            message = await receive()
            self.received.append(message["type"])
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(guard, kind="http", query="", chunks=(b"",), **headers):
    """Status, headers and body of the answer; of a websocket the type of the first message."""
    answer = []
    parts = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
        for number, chunk in enumerate(chunks, start=1)
    ]

    async def receive():
        return parts.pop(0)

    async def send(message):
        answer.append(message)

    names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": "/", "query_string": query.encode(), "headers": names}
    asyncio.run(guard(scope, receive, send))
    if kind != "http" or not answer:
        return answer[0]["type"] if answer else None
    return answer[0]["status"], dict(answer[0]["headers"]), answer[1]["body"]


def test_on_the_loopback_address_this_machine_is_let_in_and_other_names_and_sites_are_not():
    guard = Guard(Behind(), None, LARGEST)
    for host in ("127.0.0.1:8766", "127.8.8.8:8766", "localhost:8766", "[::1]:8766", "localhost"):
        assert ask(guard, host=host)[0] == 200
        assert ask(guard, host=host, origin=f"http://{host}")[0] == 200
    for host in ("example.org:8766", "127.0.0.1.example.org", "", "[::1"):
        assert ask(guard, host=host)[0] == 403
    for origin in ("http://example.org", "null", "http://127.0.0.1:9000", "http://["):
        assert ask(guard, host="127.0.0.1:8766", origin=origin)[0] == 403
        assert ask(guard, "websocket", host="127.0.0.1:8766", origin=origin) == "websocket.close"
    behind = Behind()
    ask(Guard(behind, None, LARGEST), "websocket", host="127.0.0.1:8766", origin="http://127.0.0.1:8766")
    ask(Guard(behind, None, LARGEST), "lifespan")
    assert behind.received == ["websocket", "lifespan"]


def test_elsewhere_the_token_is_needed_and_a_cookie_keeps_it():
    guard = Guard(Behind(), "a-token", LARGEST)
    status, _, body = ask(guard, host="box:8766")
    assert status == 403 and b"open the whole address" in body
    assert ask(guard, query="token=other", host="box:8766")[0] == 403
    assert ask(guard, host="box:8766", cookie="cogview-token=other")[0] == 403
    assert ask(guard, host="box:8766", cookie="cogview-token=été; \x01")[0] == 403
    assert ask(guard, "websocket", query="token=a-token", host="box:8766") == "websocket.close"
    status, headers, _ = ask(guard, query="token=a-token", host="box:8766")
    assert (status, headers[b"location"]) == (303, b"/")
    cookie, *rules = headers[b"set-cookie"].decode().split("; ")
    assert set(rules) == {"Path=/", "HttpOnly", "SameSite=Lax"}
    assert ask(guard, host="box:8766", cookie=f"other=1; {cookie}")[0] == 200
    assert ask(guard, host="box:8766", cookie=cookie, origin="http://example.org")[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "box", ""])
def test_not_loopback(host):
    assert not is_loopback(host)


def test_what_is_too_large_is_refused_whether_or_not_it_says_so():
    behind = Behind()
    guard = Guard(behind, None, LARGEST)
    status, _, body = ask(guard, host="localhost", content_length="1001")
    assert status == 413 and b"are refused" in body
    assert ask(guard, host="localhost", content_length="-1")[0] == 413
    assert ask(guard, host="localhost", chunks=[b"x" * 600, b"y" * 400])[2] == b"x" * 600 + b"y" * 400
    behind.received.clear()
    assert ask(guard, host="localhost", chunks=[b"x" * 600, b"y" * 401]) is None
    assert behind.received == ["http.request", "http.disconnect"]


def test_the_vote_page_is_served_under_an_address_of_the_page(tmp_path, request):
    pytest.importorskip("nicegui", reason="needs the extra serve")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from cogview.serving.vote_routes import vote_routes

    names = {"red": os.fsdecode(b"a \xff"), "blue": os.fsdecode(b"b \xff")}
    folders = [save_drawn(tmp_path / name, colour, ["a tiger", "a seven"]) for colour, name in names.items()]
    ballot = Ballot(folders, tmp_path / "votes")
    request.addfinalizer(ballot.close)
    application = FastAPI()
    application.include_router(vote_routes(ballot))
    visitor = TestClient(application)
    assert 'ask("question")' in visitor.get("/vote/").text
    state = visitor.get("/vote/question").json()
    assert state["pictures"] == ["picture/0/0", "picture/0/1"]
    picture = visitor.get("/vote/picture/0/1")
    assert picture.content == ballot.questions[0].pictures[1].read_bytes()
    for path in ("picture/9/0", "picture/0/2", "picture/-1/0", "picture/0/..%2f..%2fvotes.json"):
        assert visitor.get(f"/vote/{path}").status_code in (404, 422)
    for choice in ({"question": 9, "place": 0}, {"question": "0", "place": 0}, {"place": 0}, [], "x" * 2000):
        assert visitor.post("/vote/vote", json=choice).status_code in (400, 422)
    assert not ballot.votes
    hindrance = tmp_path / "votes" / f"votes.json{ASIDE}" / "deep"
    hindrance.mkdir(parents=True)
    answer = visitor.post("/vote/vote", json={"question": 0, "place": 1})
    assert answer.status_code == 500 and "votes.json cannot be written: " in answer.json()["detail"]
    shutil.rmtree(hindrance.parent)
    for question in range(2):
        state = visitor.post("/vote/vote", json={"question": question, "place": 1}).json()
    assert [vote["question"] for vote in json.loads(ballot.path.read_text())["votes"]] == [0, 1]
    assert sum(share["votes"] for share in state["shares"]) == 2
    assert state["shares"][0]["folder"].endswith("?")
