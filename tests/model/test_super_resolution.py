# SPDX-License-Identifier: Apache-2.0
"""Super-resolution: the released windows and template, batches, finetuning, the command, and its figures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cogview.cli import main
from cogview.config import ImageTokenizerConfig, SamplingConfig, TrainConfig
from cogview.data.digits import DigitPairs
from cogview.data.enlargements import EnlargementDataset, LocalDataset, num_codes
from cogview.data.rows import Rows, open_rows
from cogview.evaluation.enlargement import peak_signal_to_noise, seam_contrast
from cogview.files import read_json
from cogview.generation import engine, local_super_resolution
from cogview.generation.captions import generate_captions
from cogview.generation.engine import DrawOptions
from cogview.generation.local_super_resolution import enlarge_locally, rounds_of
from cogview.generation.sampling import Noise, choose
from cogview.generation.super_resolution import Small, codes_to_draw, drawn_by, enlarge, windows_of
from cogview.generation.text_to_image import Request, draw_candidates
from cogview.model.local_grid import LocalGrid
from cogview.run import load_run
from cogview.seeding import derive_seed
from cogview.settings import load_model_settings
from cogview.tokens.sequence import (
    ENLARGEMENT_FRAME_TOKENS,
    LOCAL_FRAME_TOKENS,
    drop_codes,
    enlargement_row,
    local_enlargement_prefix,
    make_batch,
    masked_codes,
    text_to_image_row,
)
from cogview.training.finetune import Finetune, finetune_local_super_resolution, finetune_super_resolution
from cogview.training.flops import step_flops
from cogview.training.transformer import TransformerTrainer
from tests.model.helpers import VOCAB, small_model

SIDE = 4
SAMPLING = SamplingConfig(temperature=0.8)


# ---- windows and template


def test_the_windows_are_those_of_the_released_code():
    expected = [(0, 0, 18), (0, 1, 30), (0, 2, 30), (1, 1, 30), (1, 0, 30), (1, 2, 30), (2, 0, 32)]
    expected += [(2, 1, 32), (2, 2, 32)]
    assert windows_of(32, 32) == [(16 * i, 16 * j, rows) for i, j, rows in expected]
    counts = drawn_by(32, 32).flatten().bincount().tolist()
    assert counts == [576, 672, 480, 512, 448, 256, 576, 288, 288]  # 4096 in all
    assert codes_to_draw(32, 32) == 32 * (18 + 5 * 30 + 3 * 32)


@pytest.mark.parametrize("side", [4, 8, 16, 20])
def test_windows_of_any_side_draw_every_code(side):
    assert sorted(set(drawn_by(side, side).flatten().tolist())) == list(range(9))
    assert windows_of(side // 2, side) == [(0, 0, side)]


def test_sides_that_have_no_windows():
    with pytest.raises(ValueError, match="whose side 4 divides, got 6"):
        windows_of(6, 6)
    with pytest.raises(ValueError, match="4 x 4 or 8 x 8, got 5 x 5"):
        windows_of(5, 8)
    with pytest.raises(ValueError, match="got 3 x 3"):
        num_codes(ImageTokenizerConfig(image_size=24))


def test_high_codes_are_hidden_and_low_ones_are_not():
    rows = [
        enlargement_row(VOCAB, [7, 8], [0, 1, 2, 3], list(range(16))),
        text_to_image_row(VOCAB, [7], [0, 1, 2, 3]),  # one grid, whose codes are hidden
    ] * 20
    batch = make_batch(VOCAB, rows, length=len(rows[0]))
    is_hidden = drop_codes(VOCAB, batch, 1.0, seed=0).tokens != batch.tokens
    low, high = rows[0].index(VOCAB.command("BOI1")) + 1, rows[0].index(VOCAB.command("BOI2")) + 1
    assert not is_hidden[::2, :high].any() and bool((batch.tokens[0, low : low + 4] < 4).all())
    assert bool(is_hidden[::2, high : high + 16].any(0).all())
    assert is_hidden[1::2].any()


def test_positions_begin_anew_at_roi2():
    row = enlargement_row(VOCAB, [7, 8], [0, 1, 2, 3], list(range(16)))
    assert len(row) == ENLARGEMENT_FRAME_TOKENS + 2 + 4 + 16
    names = (
        "ROI1",
        None,
        None,
        "TINY",
        "BOI1",
        None,
        None,
        None,
        None,
        "EOI1",
        "ROI2",
        "POS0",
        "TINY",
        "BOI2",
    )
    assert all(name is None or row[i] == VOCAB.command(name) for i, name in enumerate(names))
    assert row[-1] == VOCAB.command("EOI2")
    plain = text_to_image_row(VOCAB, [7], [0, 1, 2, 3])
    batch = make_batch(VOCAB, [row, plain], len(row) + 2)
    assert batch.positions[0].tolist() == [*range(10), *range(len(row) + 1 - 10)]
    assert batch.positions[1].tolist() == list(range(len(row) + 1))
    assert torch.equal(batch.split(2)[1].to("cpu").positions, batch.positions[1:])
    assert make_batch(VOCAB, [plain], 20).positions is None


# ---- drawing


def pictures(low=SIDE, texts=((1, 2, 3), (), (4,))):
    torch.manual_seed(1)
    return [Small(text, torch.randint(0, 16, (low, low)), seed) for seed, text in enumerate(texts)]


def one_code_at_a_time(model, picture, side):
    """The definition: no cache, no batch; the whole row is read anew for every code."""
    low = len(picture.codes)
    high = torch.full((2 * low, 2 * low), -1)
    for number, (top, left, rows) in enumerate(windows_of(low, side)):
        seed = derive_seed(picture.seed, "window", number)
        noise = Noise(torch.tensor([seed]), rows * side, VOCAB.num_image_codes)
        given = picture.codes[top // 2 : (top + side) // 2, left // 2 : (left + side) // 2].flatten().tolist()
        drawn = []
        for i in range(rows * side):
            place = (top + i // side, left + i % side)
            if high[place] < 0:
                row = enlargement_row(
                    VOCAB, picture.pieces, given, [*drawn, *[0] * (side * side - len(drawn))]
                )
                restart = row.index(VOCAB.command("ROI2"))
                row = row[: restart + 4 + len(drawn)]
                positions = torch.tensor([*range(restart), *range(len(row) - restart)])
                with torch.no_grad():
                    hidden = model(torch.tensor([row]), positions=positions)[:, -1]
                logits = model.logits(hidden, 0, VOCAB.num_image_codes)[None]
                high[place] = choose(logits, SAMPLING, noise, torch.tensor([[i]]))
            drawn.append(int(high[place]))
    return high


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("low", [SIDE // 2, SIDE])
def test_a_batch_draws_what_each_picture_would_draw_alone(low, parallel):
    model = small_model(scale=3.0, max_positions=24)
    steps = []
    options = DrawOptions(SAMPLING, parallel=parallel, on_step=steps.append)
    small = pictures(low)
    found = enlarge(model, VOCAB, small, SIDE, options)
    for picture, codes in zip(small, found, strict=True):
        assert torch.equal(codes, one_code_at_a_time(model, picture, SIDE))
    assert len(set(found.flatten().tolist())) > 3
    assert sum(steps) == len(small) * codes_to_draw(low, SIDE)


def test_the_outcome_depends_on_seed_and_text_alone():
    model = small_model(scale=3.0, max_positions=24)
    small = pictures()

    def draw(some, guidance=1.0, **options):
        sampling = replace(SAMPLING, guidance=guidance)
        return enlarge(model, VOCAB, some, SIDE, DrawOptions(sampling, **options))

    together = draw(small)
    assert torch.equal(together, draw(small, max_batch=2))
    assert torch.equal(together[1:2], draw(small[1:2]))
    assert not torch.equal(draw([small[0]]), draw([small[0]._replace(seed=9)]))
    assert not torch.equal(draw([small[0]], guidance=3.0), draw([small[0]]))
    assert bool((together >= 0).all())


def test_no_two_uses_of_a_seed_have_the_same_noise(monkeypatch):
    """A picture, its enlargement of either kind and its caption may all be asked for with one seed."""
    seen = {}

    def noise_of(use):
        def noted(seeds, *arguments):
            seen.setdefault(use, set()).update(seeds.tolist())
            return Noise(seeds, *arguments)

        return noted

    model, options = small_model(max_positions=40), DrawOptions(SAMPLING, seed=5)
    small = [pictures()[0]._replace(seed=5)]
    for use, work in {
        "pictures": lambda: list(draw_candidates(model, VOCAB, [Request((1,), 5)], 16, 9, options)),
        "caption": lambda: generate_captions(model, VOCAB, torch.zeros(1, 16).long(), options=options),
        "windows": lambda: enlarge(model, VOCAB, small, SIDE, options),
        "local": lambda: enlarge_locally(model, VOCAB, small, 5, options),
    }.items():
        for module in (engine, local_super_resolution):
            monkeypatch.setattr(module, "Noise", noise_of(use))
        work()
    assert {use: len(seeds) for use, seeds in seen.items()} == {
        "pictures": 9,
        "caption": 1,
        "windows": 9,
        "local": 1,
    }
    assert len(set.union(*seen.values())) == 20


def test_any_whole_number_is_a_seed():
    model, picture = small_model(scale=3.0, max_positions=24), pictures()[0]._replace(seed=-(2**80))
    assert enlarge(model, VOCAB, [picture], SIDE, DrawOptions(SAMPLING)).min() >= 0
    assert enlarge_locally(small_model(), VOCAB, [picture], 5, DrawOptions(SAMPLING)).min() >= 0


# ---- finetuning and the command


@pytest.fixture(scope="module")
def enlarger(run_folder, tmp_path_factory):
    """A run that was finetuned for two steps, and its pictures."""
    folder = tmp_path_factory.mktemp("enlarger")
    torch.manual_seed(3)
    (folder / "photos").mkdir()
    for index in range(3):
        pixels = (torch.rand(33, 40, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    lines = [f"{index}.png\ta handwritten seven" for index in range(3)]
    (folder / "photos" / "captions.tsv").write_text("\n".join(lines))
    few = {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "validation": 0.4}
    options = {"device": "cpu", "progress": False}
    history = finetune_super_resolution(
        Finetune(run_folder, folder / "photos", folder / "run", few, **options)
    )
    assert len(history["image_loss"]) == 2 and all(map(math.isfinite, history["image_loss"]))
    return folder


def test_rows_hold_the_codes_of_a_square_and_of_its_half(enlarger):
    run, rows = load_run(enlarger / "run", "cpu"), open_rows(enlarger / "run" / "rows")
    assert len(rows) == 3 * 5
    tokenizer, size = run.tokenizers.image, run.image_size
    from cogview.data.pairs import open_pairs

    pairs = open_pairs(enlarger / "photos")
    twice = pairs.image(1, 2 * size)
    squares = [pairs.image(1, size)]
    for place in (4, 5, 6, 7):
        top, left = place // 3 * size // 2, place % 3 * size // 2
        squares.append(twice[:, top : top + size, left : left + size])
    for index, square in enumerate(squares):
        _, codes = rows.read(5 + index)
        low = tokenizer.encode(F.avg_pool2d(square[None], 2)).flatten()
        assert codes == [*low.tolist(), *tokenizer.encode(square[None]).flatten().tolist()]


def test_a_run_enlarges_pictures_of_either_size(enlarger):
    run = load_run(enlarger / "run", "cpu")
    photos = sorted((enlarger / "photos").glob("*.png"))
    large = run.super_resolve(photos, "a handwritten seven")
    assert [picture.size for picture in large] == [(32, 32)] * 3
    assert run.super_resolve(photos[0], from_half=True).size == (16, 16)
    assert run.super_resolve([]) == []
    with pytest.raises(ValueError, match=r"as many as images \(3\), got 2"):
        run.super_resolve(photos, ["a", "b"])


def test_enlarging_takes_what_generating_takes(enlarger, capsys):
    run, photo = load_run(enlarger / "run", "cpu"), enlarger / "photos" / "0.png"
    sampling = replace(run.sampling, temperature=0.5)

    def pixels(**options):
        return run.super_resolve(photo, "a seven", seed=3, **options).tobytes()

    def expected(sampling):
        return run.enlarge([photo], "a seven", DrawOptions(sampling), seed=3)[0].tobytes()

    assert pixels() == expected(run.sampling)
    assert pixels(sampling=sampling) == expected(sampling) != pixels()
    guided = replace(sampling, guidance=50.0)
    assert pixels(sampling=sampling, guidance=50.0) == expected(guided) != expected(sampling)
    assert not capsys.readouterr().err
    pixels(progress=True)
    codes = run.codes_to_enlarge()
    assert f"code {codes} of {codes}," in capsys.readouterr().err
    local = replace(run, finetuned_for="local-super-resolution")
    with pytest.raises(ValueError, match="guidance must be None for a run of local-super-resolution"):
        local.super_resolve(photo, guidance=2.0)


def test_a_run_that_never_learned_to_enlarge_says_so(run_folder, enlarger):
    run = load_run(run_folder, "cpu")
    with pytest.warns(UserWarning, match="not finetuned for super-resolution"):
        run.super_resolve(enlarger / "photos" / "0.png", from_half=True)


def test_the_command_refuses_a_run_that_never_learned_to_enlarge(run_folder, enlarger, tmp_path, capsys):
    words = ["super-resolve", str(enlarger / "photos" / "0.png"), "--run", str(run_folder)]
    assert main([*words, "--out", str(tmp_path / "large.png"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"{run_folder} never learned to enlarge; cogview finetune super-resolution" in said
    assert not (tmp_path / "large.png").exists()


def test_the_command_compares_and_writes(enlarger, tmp_path, capsys):
    out = tmp_path / "large"
    words = ["super-resolve", str(enlarger / "photos" / "0.png"), "--run", str(enlarger / "run")]
    assert main([*words, "--out", str(out), "--compare", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "PSNR: enlarged" in said and "bicubic" in said and "edges" in said
    assert Image.open(out / "0.png").size == (32, 32)
    assert main([*words, "--out", str(out)]) == 2
    assert "has pictures already" in capsys.readouterr().err


def test_a_picture_that_would_replace_another_in_the_folder_is_refused(run_folder, tmp_path, capsys):
    for name in ("a/x.png", "b/x.png", "sheet.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    out = tmp_path / "large"
    for names, taken in ((("a/x.png", "b/x.png"), "another picture has"), (("sheet.png",), "the sheet has")):
        words = ["super-resolve", *(str(tmp_path / name) for name in names), "--run", str(run_folder)]
        assert main([*words, "--out", str(out), "--device", "cpu"]) == 2
        assert f"a name that {taken}; rename it" in capsys.readouterr().err
        assert main([*words, "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
        assert "never learned to enlarge" in capsys.readouterr().err
    assert not out.exists()


# ---- the local mode of CogView2


def visible(grid, window, low, cell_of):
    """Which cells [low^2] a fine code at (y, x) sees."""
    rows, columns = torch.arange(low)[:, None], torch.arange(low)
    return lambda y, x: (
        ((rows - cell_of(y)).abs() <= window[0] // 2) & ((columns - cell_of(x)).abs() <= window[1] // 2)
    ).flatten()


def test_a_local_grid_is_dense_attention_under_its_mask():
    low, room = 6, 3
    grid = LocalGrid(low, 4 + low**2 + room)
    T = grid.prefix + 4 * low**2
    mask = torch.zeros(T, T, dtype=torch.bool)
    mask[: grid.prefix, : grid.prefix] = torch.ones(grid.prefix, grid.prefix).tril().bool()
    own = visible(grid, (9, 5), 2 * low, lambda i: i)
    far = visible(grid, (5, 5), low, lambda i: i // 2)
    for i in range(4 * low**2):
        y, x = divmod(i, 2 * low)
        mask[grid.prefix + i, grid.prefix :] = own(y, x)
        mask[grid.prefix + i, 2 : 2 + low**2] = far(y, x)
        mask[grid.prefix + i, 2 + low**2 : grid.prefix] = True
    q, k, v = torch.randn(3, 2, 2, T, 32, requires_grad=True)
    found = grid.attend(q, k, v, 0.0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    dout = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert grid.positions()[grid.prefix :].view(12, 12)[5, 7] == 2 + 2 * low + 3


def test_rounds_draw_every_code_once_and_the_first_ones_far_apart():
    assert rounds_of(8).flatten().bincount().tolist() == [4, 4, 8, 12, 16, 20]
    first = (rounds_of(8) == 0).nonzero()
    assert first.tolist() == [[0, 0], [0, 4], [4, 0], [4, 4]]
    assert rounds_of(6).shape == (6, 6)


@pytest.mark.parametrize(("kind", "inputs"), [(EnlargementDataset, 33), (LocalDataset, 29)])
def test_the_speed_of_a_finetuning_counts_the_tokens_of_its_rows(kind, inputs):
    """They are longer than the model's table of positions, by which they were counted."""
    codes = torch.randint(0, 16, (6, 20), generator=torch.Generator().manual_seed(0))
    rows = Rows.in_memory(VOCAB, codes, [[[1, 7]]] * 6)
    dataset = kind(VOCAB, rows, kind.frame_tokens + 5 + 20)
    model, config = small_model(max_positions=26), TrainConfig(steps=2, batch_size=4)
    trainer = TransformerTrainer(model, dataset, config)
    assert next(trainer.batches(0)).tokens.shape == (4, inputs)
    speed = trainer.speed(0.5)
    assert speed["tokens_per_second"] == 4 * inputs / 0.5
    expected = step_flops(model.config, 4, inputs).model / 0.5 / 1e12
    # Nobody has counted the pairs of query and key that local attention sees.
    assert speed.get("teraflops_per_second") == (expected if kind is EnlargementDataset else None)


def test_hidden_codes_are_what_is_learned():
    class TwoPictures:
        num_codes = 5 * 4

        def __len__(self):
            return 2

        def read(self, image, choice=0.0):
            return [3, 4], list(range(4)) + [image] * 16

    dataset = LocalDataset(VOCAB, TwoPictures(), 4 + 5 + 20)
    batch = dataset.batch(0, 64, text_weight=1.0, caption_fraction=0.0, seed=0, text_dropout=0.5)
    fine = slice(batch.grid.prefix, None)
    hidden = batch.weight[:, fine] > 0
    assert batch.weight[:, : batch.grid.prefix].sum() == 0
    shares = hidden.float().mean(1)
    assert shares.min() > 0 and shares.max() == 1 and 0.35 < shares.mean() < 0.65
    assert bool((batch.tokens[:, fine] < VOCAB.num_image_codes).eq(~hidden).all())
    assert torch.equal(batch.tokens[:, fine][hidden], masked_codes(VOCAB, 4).expand(64, -1)[hidden])
    assert batch.targets[:, fine].eq(batch.targets[:, -1:]).all()
    texts = (batch.text_mask & (batch.tokens < VOCAB.command_start)).sum(1)
    assert set(texts.tolist()) == {0, 2}
    assert torch.equal(batch.split(4)[3].weight, batch.weight[48:]) and batch.split(4)[0].grid is batch.grid


def test_each_round_draws_from_what_earlier_rounds_drew():
    model, picture = small_model(scale=3.0), pictures()[0]
    found = enlarge_locally(model, VOCAB, [picture], 5, DrawOptions(SAMPLING))[0].flatten()
    prefix = local_enlargement_prefix(VOCAB, 5, picture.pieces, picture.codes.flatten().tolist())
    grid, rounds = LocalGrid(SIDE, len(prefix)), rounds_of(2 * SIDE).flatten()
    seed = derive_seed(picture.seed, "local enlargement")
    noise = Noise(torch.tensor([seed]), 64, VOCAB.num_image_codes)
    for number in range(6):
        codes = torch.where(rounds < number, found, masked_codes(VOCAB, 2 * SIDE))
        row = torch.cat([torch.tensor(prefix), codes])[None]
        with torch.no_grad():
            hidden = model(row, positions=grid.positions(), layout=grid)[0]
        for cell in (rounds == number).nonzero()[:, 0].tolist():
            logits = model.logits(hidden[grid.prefix + cell], 0, VOCAB.num_image_codes)
            assert found[cell] == choose(logits[None, None], SAMPLING, noise, torch.tensor([[cell]]))


def test_local_pictures_do_not_depend_on_their_batch():
    model = small_model(scale=3.0)
    small, steps = pictures(), []
    options = DrawOptions(SAMPLING, on_step=steps.append)
    found = enlarge_locally(model, VOCAB, small, 5, options)
    assert found.shape == (3, 8, 8) and bool((found < VOCAB.num_image_codes).all())
    assert sum(steps) == found.numel()
    assert torch.equal(found[2:], enlarge_locally(model, VOCAB, small[2:], 5, options))
    assert torch.equal(found, enlarge_locally(model, VOCAB, small, 5, DrawOptions(SAMPLING, max_batch=2)))
    assert not torch.equal(
        found[0], enlarge_locally(model, VOCAB, [small[0]._replace(seed=8)], 5, options)[0]
    )


@pytest.fixture(scope="module")
def local_run(run_folder, enlarger):
    """A run that was finetuned for two steps."""
    out, few = enlarger / "local", {"steps": 2, "batch_size": 4, "checkpoint_every": 1}
    finetune_local_super_resolution(
        Finetune(run_folder, enlarger / "photos", out, few, device="cpu", progress=False)
    )
    return out


def test_the_rows_of_a_finetuning_are_told(run_folder, enlarger, tmp_path, capsys):
    few = {"steps": 1, "batch_size": 1}
    finetune_local_super_resolution(
        Finetune(run_folder, enlarger / "photos", tmp_path / "run", few, device="cpu")
    )
    room, codes = load_model_settings(tmp_path / "run").max_text_tokens, 5 * 4 * 4
    length = LOCAL_FRAME_TOKENS + room + codes
    assert f"rows of {length} tokens, {room} for text and {codes} for the picture" in capsys.readouterr().err


def test_a_local_run_is_finetuned_and_enlarges(local_run, enlarger, tmp_path, capsys):
    photo = str(enlarger / "photos" / "0.png")
    words = ["super-resolve", photo, "--run", str(local_run), "--out", str(tmp_path / "large")]
    assert main([*words, "--text", "a seven", "--device", "cpu", "--compare"]) == 0
    said = capsys.readouterr().out
    assert "PSNR: enlarged" in said and "edges" not in said
    assert Image.open(tmp_path / "large" / "0.png").size == (32, 32)
    assert main([*words, "--from-half", "--force"]) == 2
    assert "--from-half must be False" in capsys.readouterr().err


def test_both_ways_are_compared_on_held_out_pictures(enlarger, local_run, tmp_path, monkeypatch):
    monkeypatch.setattr(DigitPairs, "__len__", lambda self: 3)
    words = ["study", "super-resolution", "--device", "cpu", "--out", str(tmp_path), "--runs"]
    assert main([*words, str(enlarger / "run"), str(local_run)]) == 0
    ways = read_json(tmp_path / "super-resolution.json")["ways"]
    kinds = [way["way"].partition(",")[0] for way in ways]
    assert kinds == ["bicubic", "super-resolution", "local-super-resolution", "codes of the truth"]
    assert all(way["psnr_db"] > 0 for way in ways) and all(way["seconds_a_picture"] > 0 for way in ways[:3])
    assert all(0 < way["feature_distance"] < 2 and way["sharpness"] > 0 for way in ways)
    for name in ("super-resolution.png", "super-resolution-sheet.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_what_a_comparison_refuses(enlarger, run_folder, tmp_path, capsys):
    words = ["study", "super-resolution", "--device", "cpu", "--out", str(tmp_path)]
    for more, line in (
        ([], "--runs must be given for super-resolution and style"),
        (["--runs", str(run_folder)], "--runs must be of cogview finetune super-resolution or"),
        (["--runs", str(enlarger / "run"), "--steps", "3"], "--steps belongs to a study that trains"),
    ):
        assert main([*words, *more]) == 2
        assert line in capsys.readouterr().err


# ---- figures


def test_peak_signal_to_noise():
    truth = torch.rand(2, 3, 4, 4) * 0.5
    assert peak_signal_to_noise(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)
    assert peak_signal_to_noise(truth, truth) == math.inf


def test_seams_are_steps_between_windows():
    windows = torch.zeros(4, 4, dtype=torch.int64)
    windows[2:] = 1
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    assert seam_contrast(ramp + ramp.transpose(2, 3), windows) == pytest.approx(1)
    broken = (ramp + ramp.transpose(2, 3)).clone()
    broken[:, :, 4:] += 3
    assert seam_contrast(broken, windows) == pytest.approx(4)
