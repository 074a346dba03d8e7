# SPDX-License-Identifier: Apache-2.0
"""The page in a browser, as a person uses it, on a run with next to no training."""

from __future__ import annotations

import io
import json
import shutil
import urllib.error
import urllib.request

import pytest
import torch

from cogview.images import png_bytes, to_picture
from tests import visit_page
from tests.helpers.browser import chromium
from tests.model.test_vote import save_drawn
from tests.visit_page import WINDOW, Visit, served

pytest.importorskip("nicegui", reason="needs the extra serve")


@pytest.fixture
def enlarger(run_folder, tmp_path):
    """The same run, which now says that it has learned to enlarge."""
    folder = shutil.copytree(run_folder, tmp_path / "enlarger")
    settings = json.loads((folder / "model.json").read_text())
    settings["finetuned"] = {"task": "super-resolution", "run": str(run_folder), "caption": None}
    (folder / "model.json").write_text(json.dumps(settings))
    return folder


def test_people_draw_read_paint_enlarge_and_vote_in_a_browser(run_folder, enlarger, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    folders = [str(save_drawn(tmp_path / name, name, ["a tiger", "a seven"])) for name in ("red", "blue")]
    options = ["--enlarger", str(enlarger), "--vote", *folders, "--out", str(tmp_path / "votes")]
    shots = tmp_path / "shots"
    shots.mkdir()
    with chromium(viewport=WINDOW) as (page, said), served(run, *options) as (address, _):
        visit = Visit(page, shots)
        visit.arrive(address)
        visit_page.draw(visit, 3)
        visit_page.stop(visit)
        visit_page.read(visit, png_bytes(to_picture(torch.rand(3, 40, 30))))
        visit_page.paint(visit)
        visit_page.enlarge(visit)
        visit_page.vote(visit)
        shutil.rmtree(run)
        visit.tab("Draw")
        visit.button("Draw").click()
        visit.told("the run run is no longer there; put it back, or start cogview serve with another --run")
        assert said == []
    assert len(json.loads((tmp_path / "votes" / "votes.json").read_text())["votes"]) == 1
    assert sorted(path.stem for path in shots.iterdir()) == [
        "page-draw",
        "page-enlarge",
        "page-paint",
        "page-read",
    ]


def test_a_page_for_others_needs_the_token_that_is_printed(run_folder):
    with served(run_folder, "--host", "0.0.0.0") as (address, _):
        place, _, token = address.rpartition("/?token=")
        here = f"http://127.0.0.1:{place.rpartition(':')[2]}/"
        assert len(token) >= 32
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(here, timeout=visit_page.PATIENCE)
        assert refused.value.code == 403
        refused.value.close()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{here}?token={token}", timeout=visit_page.PATIENCE) as page:
            assert "What to draw" in io.TextIOWrapper(page, "utf-8").read()
            assert page.geturl() == here
