# SPDX-License-Identifier: Apache-2.0
import os
import sys
import threading

import pytest
from PIL import Image

from cogview.commands import outlet
from cogview.commands.outlet import Outlet

RED = Image.new("RGB", (70, 70), "red")


def is_red(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and picture.getcolors() == [(4900, (255, 0, 0))]


def test_a_png_is_a_sheet_and_nothing_is_replaced_without_force(tmp_path):
    path = tmp_path / "deep" / "x.png"
    to = Outlet(str(path))
    assert not path.parent.exists()  # looking makes nothing
    to.write_sheet([[RED]], {})
    assert is_red(path) and to.write_picture("1", RED, {}) is None
    with pytest.raises(FileExistsError, match=r"x\.png exists; --force replaces it"):
        Outlet(str(path))
    path.write_bytes(b"old")
    Outlet(str(path), force=True).write_sheet([[RED]], {})
    assert is_red(path)
    assert os.listdir(path.parent) == ["x.png"]


def test_a_folder_has_a_file_for_each_picture_and_the_sheet(tmp_path):
    for name in ("pictures", "pictures.of.today/"):
        to = Outlet(str(tmp_path) + "/" + name)
        assert is_red(to.write_picture("0007", RED, {"seed": 5}))
        to.write_sheet([[RED]], {})
        assert sorted(os.listdir(to.folder)) == ["0007.png", "sheet.png"]
        with pytest.raises(FileExistsError, match="has pictures already; --force"):
            Outlet(str(tmp_path / name))
    (tmp_path / "empty.png").mkdir()
    assert Outlet(str(tmp_path / "empty.png")).folder is not None


def test_what_cannot_be_written_is_noticed_first(tmp_path):
    with pytest.raises(ValueError, match=r"--out must be a \.png file, a folder .* got .*x\.jpg"):
        Outlet(str(tmp_path / "x.jpg"))
    with pytest.raises(ValueError, match=r"name of more than .* bytes"):
        Outlet(str(tmp_path / ("x" * 248 + ".png")))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file is not a folder"):
        Outlet(str(tmp_path / "file" / "x.png"))
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="no permission to write"):
        Outlet(str(tmp_path / "closed" / "x.png"))


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    Outlet(str(tmp_path / "link.png")).write_sheet([[RED]], {})
    assert (tmp_path / "link.png").is_symlink() and is_red(tmp_path / "real.png")


def test_a_loop_of_links_is_told(tmp_path):
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(name)
    with pytest.raises(FileNotFoundError, match=r"loop is a link that leads nowhere; remove it"):
        Outlet(str(tmp_path / "loop"))
    with pytest.raises(FileExistsError, match=r"loop\.png exists; --force"):
        Outlet(str(tmp_path / "loop.png"))


def test_devices_and_pipes_take_the_sheet_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    Outlet(str(tmp_path / "pipe")).write_sheet([[RED]], {})
    reader.join(10)
    assert received[0].startswith(b"\x89PNG") and (tmp_path / "pipe").is_fifo()
    Outlet("/dev/null").write_sheet([[RED]], {})
    with pytest.raises(OSError, match=r"No space left.*/dev/full"):
        Outlet("/dev/full").write_sheet([[RED]], {})
    assert all(os.path.exists(name) and not os.path.isfile(name) for name in ("/dev/null", "/dev/full"))


def test_a_dash_is_standard_output(capsysbinary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Outlet("-").write_sheet([[RED]], {})
    sys.stdout.flush()
    assert capsysbinary.readouterr().out.startswith(b"\x89PNG")
    assert os.listdir() == []


def test_a_sheet_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(outlet, "LARGEST_SHEET", 68 * 80)
    with pytest.raises(ValueError, match=r"a sheet of 2 pictures would have 140 x 72 pixels"):
        Outlet(str(tmp_path / "x.png")).check_size([2], 16)
    to = Outlet(str(tmp_path / "folder"))
    to.check_size([2], 16)
    to.write_sheet([[RED, RED]], {})
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_takes_no_file_is_told_before_anything_is_drawn():
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc here")
    with pytest.raises(OSError, match=r"--out /proc/x\.png cannot be written: no file can be made in /proc"):
        Outlet("/proc/x.png")
    with pytest.raises(ValueError, match=r"a name of more than 243 bytes"):
        Outlet("/proc/" + "x" * 1000)


def test_closed_standard_output_is_told(monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", None)
    with pytest.raises(OSError, match="standard output is closed; name a file"):
        Outlet("-")


def test_a_file_of_somebody_else_beside_it_stays(tmp_path):
    (tmp_path / "x.png.tmp").write_text("precious")
    Outlet(str(tmp_path / "x.png")).write_sheet([[RED]], {})
    assert (tmp_path / "x.png.tmp").read_text() == "precious" and is_red(tmp_path / "x.png")
