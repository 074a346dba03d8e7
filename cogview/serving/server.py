# SPDX-License-Identifier: Apache-2.0
"""What ``cogview serve`` does: loads the runs, takes an address, serves the page until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import warnings
import webbrowser

import uvicorn
from fastapi import FastAPI
from nicegui import Client, ui

from cogview import options
from cogview.evaluation.vote import Ballot
from cogview.serving.guard import Application, Guard, is_loopback
from cogview.serving.models import load_models
from cogview.serving.page import build_page
from cogview.serving.picture_box import upload_routes
from cogview.serving.service import Service
from cogview.serving.uploads import LARGEST_UPLOAD
from cogview.serving.vote_routes import vote_routes

SPARE = 1 << 20  # bytes of a request around the file that it brings
KEPT_MESSAGES = 50  # that a page which lost its connection is sent again
# Seconds until a page that lost its connection is given up; 0.4 of them without an answer are such a loss. On
# a busy machine the usual 3 gave up visitors who were still there.
PATIENCE = 10.0


def serve(given: options.Serve) -> None:
    """Serve the page of a run until Ctrl-C, which is no mistake here."""
    # NiceGUI looks at every object there is, and this one of PyTorch takes offence.
    warnings.filterwarnings("ignore", message=".*reduce_op. is deprecated", category=FutureWarning)
    # What the model never learned is told on the page, to the visitor who typed it.
    warnings.filterwarnings("ignore", message=".* has parts the model never learned", category=UserWarning)
    with (
        Ballot(given.vote, given.out) if given.vote else contextlib.nullcontext() as ballot,
        contextlib.closing(_listen(given.host, given.port)) as listener,
        Service(load_models(given.run, given.enlarger, given.device, given.precision)) as service,
    ):
        token = None if is_loopback(given.host) else secrets.token_urlsafe(24)
        address = _address(given.host, listener.getsockname()[1], token)
        print(f"open {address} (Ctrl-C ends)", flush=True)
        if given.open and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(address)
        guarded = Guard(_application(service, ballot), token, LARGEST_UPLOAD + SPARE)
        config = uvicorn.Config(
            guarded, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=1
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Python names the address a second time, in brackets.
        reason = str(error.strerror or error).partition(" (while attempting")[0]
        raise OSError(f"{host}:{port} cannot be used: {reason}; choose another --port or --host") from None


def _address(host: str, port: int, token: str | None) -> str:
    """Where a browser finds the page. A server on all addresses is named by the machine's name."""
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def _application(service: Service, ballot: Ballot | None) -> Application:
    application = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    application.include_router(upload_routes())
    if ballot is not None:
        application.include_router(vote_routes(ballot))

    @ui.page("/")
    def page(client: Client) -> None:
        build_page(client, service, ballot is not None)

    ui.run_with(
        application,
        title=f"CogView: {service.models.name}",
        favicon="🎨",
        tailwind=False,
        show_welcome_message=False,
        message_history_length=KEPT_MESSAGES,
        reconnect_timeout=PATIENCE,
    )
    return application
