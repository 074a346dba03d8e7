# SPDX-License-Identifier: Apache-2.0
"""The Python door: what a run takes, what it gives, and that one in gives one out."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogview
from cogview.images import save_png

ROOT = Path(__file__).parents[2]
SEVEN, CHINESE = "a handwritten seven", "手写的数字七"


@pytest.fixture(scope="module")
def run(run_folder):
    return cogview.load_run(str(run_folder), "cpu")


@pytest.fixture(scope="module")
def drawn(run):
    return run.generate(SEVEN, num=5, seed=3)


def test_one_text_gives_one_list_best_first(run, drawn):
    images, losses = drawn
    assert len(images) == len(losses) == 5
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in images)
    assert losses == sorted(losses) and all(isinstance(loss, float) for loss in losses)
    again, _ = run.generate(SEVEN, num=5, seed=3)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]


def test_several_texts_give_lists_and_a_text_is_not_its_letters(run, drawn):
    images, losses = run.generate([SEVEN, CHINESE], num=5, seed=3)
    assert [len(row) for row in images] == [len(row) for row in losses] == [5, 5]
    assert losses[0] == pytest.approx(drawn[1])
    alone, _ = run.generate([SEVEN], num=1)
    assert len(alone) == len(alone[0]) == 1
    assert run.generate([]) == ([], [])


def test_unranked_pictures_come_in_the_order_drawn(run, drawn):
    images, losses = run.generate(SEVEN, num=5, seed=3, ranked=False)
    assert sorted(losses) == pytest.approx(drawn[1])
    assert losses != sorted(losses)
    first, _ = run.generate(SEVEN, num=1, seed=3, ranked=False)
    assert first[0].tobytes() == images[0].tobytes()


def test_sampling_is_the_runs_unless_given(run):
    def codes(**options):
        return [image.tobytes() for image in run.generate(SEVEN, num=4, ranked=False, **options)[0]]

    assert codes() == codes(sampling=run.sampling)
    greedy = dataclasses.replace(run.sampling, top_k=1)
    assert len(set(codes(sampling=greedy))) == 1
    assert len(set(codes())) > 1


def test_images_are_paths_pictures_or_tensors(run, drawn, tmp_path):
    picture = drawn[0][0]
    save_png(tmp_path / "x.png", picture)
    floats = run.pixels(run.encode(picture))
    eight_bits = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    kinds = [str(tmp_path / "x.png"), tmp_path / "x.png", picture, eight_bits]
    for image in kinds:
        assert torch.equal(run.encode(image), run.encode(picture))
        assert run.caption(image) == run.caption(picture)
    assert run.caption(floats) == run.caption(run.decode(run.encode(picture)))
    assert run.caption(kinds) == [run.caption(picture)] * 4
    assert run.caption(torch.stack([floats, floats])) == [run.caption(floats)] * 2
    assert run.caption([]) == []


def test_codes_go_to_pictures_and_back(run, drawn):
    codes = run.encode(drawn[0])
    assert codes.shape == (5, 16) and codes.dtype == torch.int64
    assert run.encode([]).shape == (0, 16)
    assert run.decode(codes[0]).size == (16, 16)
    nested = run.decode(codes[:4].view(2, 2, 16))
    assert [[picture.size for picture in row] for row in nested] == [[(16, 16)] * 2] * 2
    assert torch.equal(run.encode(nested[1][0]), run.encode(run.decode(codes[2])))
    assert run.pixels(codes).shape == (5, 3, 16, 16)


def test_rerank_gives_places_best_first(run, drawn):
    images = drawn[0][::-1]
    losses = run.cap_loss(SEVEN, images)
    order = run.rerank(SEVEN, images)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert [losses[place] for place in order] == sorted(losses)
    assert losses == pytest.approx([run.cap_loss(SEVEN, image)[0] for image in images])
    assert run.cap_loss([SEVEN] * 5, images) == losses
    assert run.rerank(SEVEN, []) == []


def test_several_texts_rerank_all_images_or_each_its_own(run, drawn):
    images = drawn[0]
    both = run.rerank([SEVEN, CHINESE], images)
    assert both == [run.rerank(SEVEN, images), run.rerank(CHINESE, images)]
    own = run.rerank([SEVEN, CHINESE], [images[:2], images[2:]])
    assert own == [run.rerank(SEVEN, images[:2]), run.rerank(CHINESE, images[2:])]


def test_describe_gives_the_loss_of_each_caption(run, drawn):
    captions = list(run.describe(drawn[0]))
    assert [caption.text for caption in captions] == run.caption(drawn[0])
    for (text, loss), image in zip(captions, drawn[0], strict=True):
        assert not text or loss == pytest.approx(run.cap_loss(text, [image])[0], rel=1e-4)


def test_parts_of_a_text_that_were_never_learned_give_a_warning(run):
    with pytest.warns(UserWarning, match='"a Ω" has parts the model never learned: Ω'):
        run.generate("a Ω", num=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.generate(SEVEN, num=1)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(run, drawn, default_dtype, default):
    expected = run.cap_loss(SEVEN, drawn[0]), run.caption(drawn[0])
    default_dtype(default)
    images, losses = run.generate(SEVEN, num=5, seed=3)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in drawn[0]]
    assert losses == drawn[1]
    assert (run.cap_loss(SEVEN, images), run.caption(images)) == expected


def test_errors(run, drawn, tmp_path):
    with pytest.raises(ValueError, match="the text is empty"):
        run.generate(" ")
    with pytest.raises(ValueError, match="at most 5 fit"):
        run.generate("seven " * 20)
    with pytest.raises(ValueError, match="num must be at least 1 and at most 100,000, got 0"):
        run.generate(SEVEN, num=0)
    with pytest.raises(TypeError, match="texts must be a str or a list of str, got 7"):
        run.generate(7)
    with pytest.raises(TypeError, match="texts must be a str"):
        run.rerank([SEVEN, 7], drawn[0])
    with pytest.raises(ValueError, match=r"as many as images \(5\), got 2"):
        run.cap_loss([SEVEN] * 2, drawn[0])
    with pytest.raises(FileNotFoundError, match="image not found"):
        run.caption(str(tmp_path / "absent.png"))
    with pytest.raises(ValueError, match=r"must be \[3, H, W\], got \[1, 16, 16\]"):
        run.caption([torch.zeros(1, 16, 16)])
    with pytest.raises(TypeError, match="a path, a PIL picture or a tensor, got int"):
        run.caption(7)
    with pytest.raises(ValueError, match=r"codes must be \[\.\.\., 16\], got \[3\]"):
        run.decode(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 48\), got 0\.\.48"):
        run.decode(torch.arange(16) * 48 // 15)
    with pytest.raises(FileNotFoundError, match="run folder not found"):
        cogview.load_run(tmp_path / "absent")
    with pytest.raises(ValueError, match="device nonsense cannot be used here"):
        cogview.load_run(tmp_path, "nonsense")


def fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy():
    fresh_interpreter(
        "import sys, cogview\n"
        "heavy = {'torch', 'PIL', 'matplotlib', 'sklearn', 'tensorboard', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'load_run', 'Run', 'CogView', 'PRESETS'} <= set(dir(cogview))\n"
        "cogview.load_run, cogview.Run, cogview.CogView, cogview.PRESETS\n"
        "late = {'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules)\n"
        "assert not late, late"
    )


def test_without_its_extra_the_package_says_which_one_to_install():
    fresh_interpreter(
        "import sys\n"
        "sys.modules['PIL'] = None\n"
        "import cogview\n"
        "try: cogview.load_run\n"
        "except ModuleNotFoundError as error:\n"
        "    assert \"needs PIL\" in str(error) and 'cogview-kernels[model]' in str(error), error\n"
        "else: raise AssertionError"
    )


def test_a_model_in_float64_draws_and_describes(run_folder):
    run = cogview.load_run(run_folder, "cpu")
    run.model.double()
    images, losses = run.generate(SEVEN, num=2, seed=3)
    assert len(images) == 2 and all(loss > 0 for loss in losses)
    assert isinstance(run.caption(images[0]), str)
