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
from cogview.generation import beam, captions, engine, super_resolution
from cogview.generation.engine import DrawOptions
from cogview.images import save_overview
from cogview.model import memory
from cogview.model.memory import cache_bytes, weight_bytes
from cogview.model.precision import in_precision
from cogview.run import sample_sheet
from cogview.settings import load_model_settings

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


def test_guidance_is_the_run_s_unless_told_otherwise(run_folder):
    plain, guided = cogview.load_run(run_folder), cogview.load_run(run_folder)
    guided.sampling = dataclasses.replace(guided.sampling, guidance=50.0)
    losses = guided.generate(SEVEN, num=4)[1]
    assert losses == plain.generate(SEVEN, num=4, guidance=50.0)[1] != plain.generate(SEVEN, num=4)[1]
    assert guided.generate(SEVEN, num=4, guidance=1.0)[1] == plain.generate(SEVEN, num=4)[1]


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


def test_bytes_of_a_terminal_without_unicode_are_read_as_utf_8(run):
    assert run.pieces(CHINESE.encode().decode("ascii", "surrogateescape")) == run.pieces(CHINESE)


def test_a_text_has_its_own_seed_whatever_is_drawn_beside_it(run, drawn):
    images, losses = run.generate([CHINESE, SEVEN], num=5, seed=[8, 3])
    assert [image.tobytes() for image in images[1]] == [image.tobytes() for image in drawn[0]]
    assert losses[1] == pytest.approx(drawn[1])
    with pytest.raises(ValueError, match=r"one or as many as texts \(2\), got 3"):
        run.generate([CHINESE, SEVEN], seed=[1, 2, 3])
    for wrong in ("0", 1.0, [0, "1"], None):
        with pytest.raises(TypeError, match="seed must be an integer, or one for each text, got"):
            run.generate([CHINESE, SEVEN], seed=wrong)
    other, _ = run.generate([CHINESE, SEVEN], num=5, seed=np.array([8, 3]))
    pictures = [[image.tobytes() for group in groups for image in group] for groups in (images, other)]
    assert pictures[0] == pictures[1]


def test_pictures_come_batch_by_batch_with_what_draws_them_again(run):
    partial = []
    options = DrawOptions(run.sampling, max_batch=4)
    requests = run.requests([SEVEN, CHINESE], [3, 8])
    batches = list(run.draw(requests, 3, options, partial.append))
    assert [[place for place, _ in batch] for batch in batches] == [[0, 0, 0, 1], [1, 1]]
    places, drawings = zip(*(pair for batch in batches for pair in batch), strict=True)
    assert [drawing.candidate for drawing in drawings] == [0, 1, 2, 0, 1, 2]
    for place, text, seed in ((0, SEVEN, 3), (1, CHINESE, 8)):
        own = [drawing for at, drawing in zip(places, drawings, strict=True) if at == place]
        assert {(drawing.text, drawing.seed) for drawing in own} == {(text, seed)}
        images, losses = run.generate(text, num=3, seed=seed, ranked=False)
        assert [drawing.image.tobytes() for drawing in own] == [image.tobytes() for image in images]
        assert [drawing.loss for drawing in own] == pytest.approx(losses)
        assert all(run.decode(drawing.codes).tobytes() == drawing.image.tobytes() for drawing in own)
    # 4 x 4 codes: four rows of each batch are told, and the last tells the whole.
    assert [[place for place, _ in batch] for batch in partial] == [[0, 0, 0, 1]] * 4 + [[1, 1]] * 4
    assert partial[3][1][1].tobytes() == drawings[1].image.tobytes()
    one_row = np.asarray(partial[0][1][1])
    assert (one_row[4:] == 255).all() and not (one_row[:4] == 255).all()


def test_infilling_keeps_codes_where_the_mask_is_black(run, drawn):
    picture, mask = drawn[0][0], Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    codes, white = run.encode(picture), torch.arange(16) % 4 >= 2
    kept = run.kept_codes(picture, mask)
    assert torch.equal(kept, codes.masked_fill(white, -1))
    images, losses = run.infill(SEVEN, picture, mask, num=6, seed=2)
    assert losses == sorted(losses) and len({image.tobytes() for image in images}) > 1
    options = DrawOptions(run.sampling)
    (batch,) = run.draw(run.requests([SEVEN], [2], kept), 6, options)
    assert {drawing.image.tobytes() for _, drawing in batch} == {image.tobytes() for image in images}
    assert all(torch.equal(drawing.codes[~white], codes[~white]) for _, drawing in batch)
    top, _ = run.infill(SEVEN, picture, keep_top=0.5, num=1)
    assert len(top) == 1
    for arguments in ({}, {"mask": mask, "keep_top": 0.5}):
        with pytest.raises(ValueError, match="either mask or keep_top"):
            run.infill(SEVEN, picture, **arguments)


def test_infilling_takes_what_generating_takes(run, drawn, capsys):
    picture, sampling = drawn[0][0], dataclasses.replace(run.sampling, temperature=0.5)
    kept = run.kept_codes(picture, None, 0.5)

    def expected(sampling):
        batches = run.draw(run.requests([SEVEN], [4], kept), 5, DrawOptions(sampling))
        return [drawing.loss for batch in batches for _, drawing in batch]

    def losses(**options):
        return run.infill(SEVEN, picture, keep_top=0.5, num=5, seed=4, ranked=False, **options)[1]

    assert losses() == expected(run.sampling)
    assert losses(sampling=sampling) == expected(sampling) != losses()
    guided = dataclasses.replace(sampling, guidance=50.0)
    assert losses(sampling=sampling, guidance=50.0) == expected(guided) != expected(sampling)
    assert not capsys.readouterr().err
    assert run.infill(SEVEN, picture, keep_top=0.5, num=5, seed=4, progress=True)[1] == sorted(losses())
    assert "code 80 of 80," in capsys.readouterr().err


def test_captions_by_beam_search(run, drawn):
    assert len(run.caption(drawn[0], beams=4)) == 5
    with pytest.raises(ValueError, match="beams must be a whole number from 1 to 100"):
        run.caption(drawn[0], beams=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_16_bits_draws_and_judges_much_the_same(run, run_folder, drawn, precision):
    narrow = cogview.load_run(run_folder, "cpu", precision)
    assert (
        narrow.model.word_embeddings.weight.dtype
        == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    )
    assert narrow.cap_loss(SEVEN, drawn[0]) == pytest.approx(run.cap_loss(SEVEN, drawn[0]), abs=0.05)
    assert len(narrow.generate(SEVEN, num=2)[0]) == 2
    assert weight_bytes(narrow.model) * 2 == weight_bytes(run.model)


def test_weights_in_8_bits_cost_little(run, run_folder, drawn):
    pytest.importorskip("torchao", reason="int8 needs the optional package torchao")
    small = cogview.load_run(run_folder, "cpu", "int8")
    assert small.cap_loss(SEVEN, drawn[0]) == pytest.approx(run.cap_loss(SEVEN, drawn[0]), abs=0.1)
    assert len(small.generate(SEVEN, num=2)[0]) == 2
    embeddings = weight_bytes(run.model.word_embeddings) + weight_bytes(
        run.model.transformer.position_embeddings
    )
    layers = weight_bytes(run.model) - embeddings
    assert weight_bytes(small.model) - embeddings // 2 < 0.33 * layers


def test_memory_bounds_how_many_are_drawn_together(run, monkeypatch):
    row = cache_bytes(run.model.config, 1, torch.float32)
    assert row == 2 * 2 * 64 * run.model.config.max_positions * 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(5.5 * row / memory.SHARE))
    assert [memory.rows_that_fit(run.model.config, torch.float32, "cpu", most) for most in (3, 99)] == [3, 5]
    batches = run.draw(run.requests([SEVEN], [0]), 7, DrawOptions(run.sampling))
    assert [len(batch) for batch in batches] == [5, 2]
    rows = []

    def noted(model, prompts, *arguments, **options):
        rows.append(len(prompts))
        return engine.prefill(model, prompts, *arguments, **options)

    for module in (captions, beam, super_resolution):
        monkeypatch.setattr(module, "prefill", noted)
    pictures = torch.rand(7, 3, 16, 16)
    run.caption(pictures)
    run.caption(pictures[:3], beams=2)
    assert rows == [5, 2, 4, 2]
    rows.clear()
    enlarger = dataclasses.replace(run, finetuned_for="super-resolution")
    enlarger.super_resolve(pictures, from_half=True)
    assert rows == [5, 2]
    monkeypatch.undo()
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20


def test_numbers_that_are_not_finite_are_an_error_everywhere(run_folder, drawn):
    broken = cogview.load_run(run_folder, "cpu")
    with torch.no_grad():
        broken.model.transformer.layers[0].mlp.dense_h_to_4h.bias[0] = torch.nan
    for ask in (
        lambda: broken.generate(SEVEN, num=1),
        lambda: broken.caption(drawn[0][0]),
        lambda: broken.caption(drawn[0][0], beams=2),
        lambda: broken.rerank(SEVEN, drawn[0]),
    ):
        with pytest.raises(FloatingPointError, match="not finite"):
            ask()
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got nan"):
        broken.encode(torch.full((3, 16, 16), torch.nan))
    broken.tokenizers.image.dec.blocks[-1].bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="image tokenizer is damaged"):
        broken.decode(torch.zeros(16, dtype=torch.int64))


def test_a_sheet_of_samples_is_the_same_every_time(run, run_folder):
    settings = load_model_settings(run_folder)
    sheet = sample_sheet(run.model, run.tokenizers, settings, [SEVEN, CHINESE])
    assert sheet.size == (4 * 68 + 4, 2 * 68 + 4)
    assert sheet.tobytes() == sample_sheet(run.model, run.tokenizers, settings, [SEVEN, CHINESE]).tobytes()


def test_sampling_is_the_runs_unless_given(run):
    def codes(**options):
        return [image.tobytes() for image in run.generate(SEVEN, num=4, ranked=False, **options)[0]]

    assert codes() == codes(sampling=run.sampling)
    greedy = dataclasses.replace(run.sampling, top_k=1)
    assert len(set(codes(sampling=greedy))) == 1
    assert len(set(codes())) > 1


def test_images_are_paths_pictures_or_tensors(run, drawn, tmp_path):
    picture = drawn[0][0]
    save_overview(tmp_path / "x.png", picture)
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


def test_tensors_that_hold_no_plain_values_are_one_clear_error(run):
    nested = torch.nested.nested_tensor([torch.zeros(3, 16, 16)] * 2, layout=torch.jagged)
    for images in (torch.zeros(3, 16, 16).to_sparse(), torch.zeros(2, 3, 16, 16, device="meta"), nested):
        for method in (run.encode, run.caption):
            with pytest.raises(
                ValueError, match=r"images must be a (dense tensor|tensor with values), got one"
            ):
                method(images)
    codes = torch.zeros(16, dtype=torch.int64)
    for unusable in (codes.to_sparse(), codes.to("meta")):
        with pytest.raises(ValueError, match=r"codes must be a (dense tensor|tensor with values), got one"):
            run.decode(unusable)
    with pytest.raises(TypeError, match=r"tensor of whole numbers, got one of torch\.complex64"):
        run.decode(torch.zeros(16, dtype=torch.complex64))


def test_rerank_gives_places_best_first(run, drawn):
    images = drawn[0][::-1]
    losses = run.cap_loss(SEVEN, images)
    order = run.rerank(SEVEN, images)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert [losses[place] for place in order] == sorted(losses)
    assert losses == pytest.approx([run.cap_loss(SEVEN, image) for image in images])
    assert run.cap_loss(SEVEN, images[:1]) == pytest.approx(losses[:1])
    assert run.rerank(SEVEN, images[0]) == run.rerank(SEVEN, images[:1]) == [0]
    assert run.cap_loss([SEVEN] * 5, images) == losses
    assert run.rerank(SEVEN, []) == []


def test_several_texts_rerank_all_images_or_each_its_own(run, drawn, monkeypatch):
    images, encoded, real = drawn[0], [], run.tokenizers.image.encode
    monkeypatch.setattr(run.tokenizers.image, "encode", lambda x: encoded.append(len(x)) or real(x))
    both = run.rerank([SEVEN, CHINESE], images)
    assert encoded == [5]  # once for all texts
    assert both == [run.rerank(SEVEN, images), run.rerank(CHINESE, images)]
    own = run.rerank([SEVEN, CHINESE], [images[:2], images[2:]])
    assert own == [run.rerank(SEVEN, images[:2]), run.rerank(CHINESE, images[2:])]


def test_describe_gives_the_loss_of_each_caption(run, drawn):
    captions = list(run.describe(drawn[0]))
    assert [caption.text for caption in captions] == run.caption(drawn[0])
    for (text, loss), image in zip(captions, drawn[0], strict=True):
        # What a model of two steps says may be other pieces, and more of them, when it is read again.
        if text and len(run.tokenizers.text.encode(text)) <= run.max_text_tokens:
            assert loss == pytest.approx(run.cap_loss(text, [image])[0], rel=1e-4)


def test_parts_of_a_text_that_were_never_learned_give_a_warning(run):
    for ask in (lambda: run.generate("a Ω", num=1), lambda: run.rerank("a Ω", [Image.new("RGB", (9, 9))])):
        with pytest.warns(UserWarning, match='"a Ω" has parts the model never learned: Ω'):
            ask()
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
    with pytest.raises(ValueError, match=r"'a \\udcff' is not valid UTF-8: character 3"):
        run.generate("a \udcff")
    with pytest.raises(ValueError, match="device meta cannot be used here"):
        cogview.load_run(tmp_path, "meta")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, int8, got 'fp8'"):
        in_precision(run.model, "fp8")
    with pytest.raises(ValueError, match="num must be at least 1 and at most 100,000, got 0"):
        run.generate(SEVEN, num=0)
    for odd in (2.0, "2", None):
        with pytest.raises(TypeError, match=f"num must be a whole number, got {odd!r}"):
            run.generate(SEVEN, num=odd)
    with pytest.raises(TypeError, match="sampling must be a SamplingConfig or None"):
        run.generate(SEVEN, sampling={"top_k": 5})
    with pytest.raises(ValueError, match="beams must be a whole number from 1 to 100"):
        run.caption(drawn[0], beams=2.0)
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
    for wrong, said in ((torch.zeros(16), "torch.float32"), ([0] * 16, "list")):
        with pytest.raises(TypeError, match=f"codes must be a tensor of whole numbers, got .*{said}"):
            run.decode(wrong)
    assert run.decode(torch.zeros(16, dtype=torch.uint8)).size == (16, 16)
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
