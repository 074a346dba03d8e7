# SPDX-License-Identifier: Apache-2.0
"""The vote page of ``cogview evaluate --vote`` under an address of this server."""

from __future__ import annotations

import threading

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic import BaseModel, ConfigDict

from cogview.evaluation.vote import Ballot
from cogview.evaluation.vote_server import as_json, ballot_state, vote_page


class Choice(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(strict=True)

    question: int
    place: int


def vote_routes(ballot: Ballot) -> APIRouter:
    """The addresses that :mod:`cogview.evaluation.vote_server` has."""
    routes, lock = APIRouter(prefix="/vote"), threading.Lock()

    def state() -> Response:
        return Response(as_json(ballot_state(ballot)), media_type="application/json")

    @routes.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(vote_page())

    @routes.get("/question")
    def question() -> Response:
        with lock:
            return state()

    @routes.get("/picture/{number}/{place}")
    def picture(number: int, place: int) -> FileResponse:
        try:
            path = ballot.picture(number, place)
        except ValueError:
            raise HTTPException(404) from None
        if not path.is_file():
            raise HTTPException(404)
        return FileResponse(path, headers={"Cache-Control": "no-store"})

    @routes.post("/vote")
    def vote(choice: Choice) -> Response:
        with lock:
            try:
                ballot.vote(choice.question, choice.place)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            except OSError as error:
                raise HTTPException(500, str(error)) from None
            return state()

    return routes
