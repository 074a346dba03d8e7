# SPDX-License-Identifier: Apache-2.0
"""One page on this machine alone that shows the questions of a ballot and takes the votes.

::

    GET  /                      the page, vote.html
    GET  /question              the next question, or the shares once there is none left
    GET  /picture/NUMBER/PLACE  a picture of it; nothing tells from which folder it comes
    POST /vote                  {"question": NUMBER, "place": PLACE}; answers as /question does, or with
                                {"detail": REASON} where the vote is not taken or cannot be kept
"""

from __future__ import annotations

import json
import mimetypes
import re
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from cogview.evaluation.vote import Ballot

LOOPBACK = "127.0.0.1"
LONGEST_VOTE = 1000  # bytes


class VoteServer(ThreadingHTTPServer):
    """Serves a ballot on the loopback address, in threads of its own; a context manager.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, ballot: Ballot, port: int = 0) -> None:
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise OSError(f"port {port} cannot be used: {error.strerror}; choose another --port") from None
        self.ballot = ballot
        self.lock = threading.Lock()
        self.finished = threading.Event()  # set once there is nobody left to answer after the last vote
        if ballot.next_question is None:
            self.finished.set()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def __enter__(self) -> VoteServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that reloads or goes away drops its requests, which is no mistake of anybody's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


def ballot_state(ballot: Ballot) -> dict[str, Any]:
    """What the page shows next; the addresses of pictures are relative to its own."""
    number = ballot.next_question
    done = {"answered": len(ballot.votes), "of": len(ballot.questions)}
    if number is None:
        return {**done, "shares": [share._asdict() for share in ballot.shares()]}
    question = ballot.questions[number]
    pictures = [f"picture/{number}/{place}" for place in range(len(question.pictures))]
    return {**done, "question": number, "prompt": question.prompt, "pictures": pictures}


def as_json(content: dict[str, Any]) -> bytes:
    """What the page is told. A name that is no UTF-8 has question marks in it."""
    return json.dumps(content, ensure_ascii=False).encode(errors="replace")


def vote_page() -> bytes:
    """``vote.html``."""
    return files("cogview.evaluation").joinpath("vote.html").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self._is_for_this_machine():
            return
        picture = re.fullmatch(r"/picture/(\d{1,9})/(\d{1,9})", self.path)
        if self.path == "/":
            self._answer(vote_page(), "text/html; charset=utf-8")
        elif self.path == "/question":
            with self.server.lock:
                state = ballot_state(self.server.ballot)
            self._answer_json(state)
        elif picture is not None:
            self._answer_picture(int(picture[1]), int(picture[2]))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_for_this_machine():
            return
        # Another site's page can post a form, but not JSON, without asking this server first.
        if self.path != "/vote" or self.headers.get("Content-Type") != "application/json":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= LONGEST_VOTE:
                raise ValueError("a vote has up to 1,000 bytes")
            given = json.loads(self.rfile.read(length))
            question, place = given["question"], given["place"]
            if type(question) is not int or type(place) is not int:
                raise ValueError("question and place are whole numbers")
            with self.server.lock:
                self.server.ballot.vote(question, place)
                state = ballot_state(self.server.ballot)
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last for many brackets
            self.close_connection = True
            self._answer_json({"detail": str(error)}, HTTPStatus.BAD_REQUEST)
            return
        except OSError as error:
            self._answer_json({"detail": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        try:
            self._answer_json(state)
        finally:  # A browser that is gone already has nothing more to say.
            if "shares" in state:
                self.server.finished.set()

    def _is_for_this_machine(self) -> bool:
        """A name of another site that was made to lead here is refused, so that no other site reads along."""
        host = self.headers.get("Host", "").partition(":")[0]
        if host in (LOOPBACK, "localhost"):
            return True
        self.send_error(HTTPStatus.FORBIDDEN)
        return False

    def _answer_picture(self, number: int, place: int) -> None:
        try:
            path = self.server.ballot.picture(number, place)
            content = path.read_bytes()
        except (ValueError, OSError):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._answer(content, mimetypes.guess_type(path)[0] or "application/octet-stream")

    def _answer_json(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._answer(as_json(content), "application/json", status)

    def _answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each picture would hide what the command says."""
