# SPDX-License-Identifier: Apache-2.0
"""VQGAN: the names of taming-transformers, pictures of any size, and weights that were published."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cogview.cli import main
from cogview.config import ImageTokenizerConfig, VQGANConfig
from cogview.files import load_tensors
from cogview.model.transformer import CogView
from cogview.parsing import parse
from cogview.presets import PRESETS, with_vqgan
from cogview.settings import TokenizerSettings, tokenizer_options, write_options
from cogview.tokens.vqgan import PIXELS, VQGAN
from cogview.training.loop import backward, descend
from cogview.training.memory import MicroBatch, count_parameters, step_memory
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy

SMALL = ImageTokenizerConfig(
    num_codes=24,
    code_dim=8,
    channels=16,
    stages=2,
    image_size=256,
    pixel_mean=PIXELS,
    pixel_std=PIXELS,
    vqgan=VQGANConfig((1, 1, 2), residual_blocks=2, attention_levels=(2,), latent_channels=12),
)


def published(channels=128, multipliers=(1, 1, 2, 2, 4), attention=(4,), latent=256, book=(1024, 256)):
    """Names and shapes in the state dict of a ``vqgan_imagenet_f16_1024``, put down from its structure."""
    blocks = 2
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": book}

    def conv(name, inner, outer, kernel=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner, kernel, kernel), (outer,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, inner, outer):
        norm(f"{name}.norm1", inner), conv(f"{name}.conv1", inner, outer)
        norm(f"{name}.norm2", outer), conv(f"{name}.conv2", outer, outer)
        if inner != outer:
            conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths, last = [channels * multiplier for multiplier in multipliers], len(multipliers) - 1
    conv("encoder.conv_in", 3, channels), conv("encoder.conv_out", widths[-1], latent)
    conv("decoder.conv_in", latent, widths[-1]), conv("decoder.conv_out", widths[0], 3)
    norm("encoder.norm_out", widths[-1]), norm("decoder.norm_out", widths[0])
    conv("quant_conv", latent, book[1], 1), conv("post_quant_conv", book[1], latent, 1)
    for side in ("encoder", "decoder"):
        (
            block(f"{side}.mid.block_1", widths[-1], widths[-1]),
            block(f"{side}.mid.block_2", widths[-1], widths[-1]),
        )
        attend(f"{side}.mid.attn_1", widths[-1])
    for level, width in enumerate(widths):
        before, behind = widths[max(level - 1, 0)], widths[min(level + 1, last)]
        for number in range(blocks + 1):
            block(f"decoder.up.{level}.block.{number}", width if number else behind, width)
            if number < blocks:
                first = before if level else channels
                block(f"encoder.down.{level}.block.{number}", width if number else first, width)
            if level in attention:
                attend(f"decoder.up.{level}.attn.{number}", width)
                if number < blocks:
                    attend(f"encoder.down.{level}.attn.{number}", width)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    return shapes


AVERAGES = {"quantize.cluster_size", "quantize.embed_avg"}


def test_names_and_shapes_are_those_of_taming_transformers():
    shape = ImageTokenizerConfig(num_codes=1024, channels=128, stages=4, vqgan=VQGANConfig())
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in VQGAN(shape).state_dict().items()}
    assert {name: size for name, size in found.items() if name not in AVERAGES} == published()


def test_any_size_that_the_stride_divides():
    tokenizer = VQGAN(SMALL).eval()
    codes = tokenizer.encode(torch.rand(2, 3, 8, 12))
    assert codes.shape == (2, 2, 3) and codes.max() < 24
    assert tokenizer.decode(codes).shape == (2, 3, 8, 12)
    with pytest.raises(ValueError, match="divisible by 4"):
        tokenizer.encode(torch.rand(1, 3, 8, 10))


def a_published_file(path, **changes):
    sizes = published(16, (1, 1, 2), (2,), 12, (24, 8))
    state = {name: torch.randn(size) * 0.1 for name, size in sizes.items()}
    state["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    torch.save({"epoch": 3, "state_dict": {**state, **changes}, "callbacks": {}}, path)
    return state


def test_published_weights_convert_and_compute_the_same(tmp_path):
    state = a_published_file(tmp_path / "last.ckpt")
    assert main(["convert", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "a.safetensors")]) == 0
    tensors = load_tensors(tmp_path / "a.safetensors")
    tokenizer = VQGAN(SMALL).eval()
    tokenizer.load_state_dict(tensors)
    assert torch.equal(tokenizer.quantizer.embed, state["quantize.embedding.weight"].t())
    z = torch.randn(5, 8)
    nearest = torch.cdist(z, state["quantize.embedding.weight"]).argmin(1)
    assert torch.equal(tokenizer.quantizer.nearest(z), nearest)
    # The first convolution by hand: pixels in [-1, 1].
    image = torch.rand(1, 3, 8, 8)
    expected = torch.conv2d(
        2 * image - 1, state["encoder.conv_in.weight"], state["encoder.conv_in.bias"], padding=1
    )
    seen = []
    tokenizer.encoder.conv_in.register_forward_hook(lambda module, given, out: seen.append(out))
    tokenizer.encode(image)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.down.0.strange.weight": torch.zeros(1)}, "unknown architecture"),
        ({"decoder.conv_out.weight": torch.zeros(4, 16, 3, 3)}, "decoder.conv_out.weight must be"),
        ({"quantize.embedding.weight": torch.zeros(8, 4, 1, 1)}, "must be a matrix"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, capsys, changes, message):
    a_published_file(tmp_path / "last.ckpt", **changes)
    assert main(["convert", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "a.safetensors")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "a.safetensors").exists()


def test_every_preset_has_a_vqgan_of_as_many_codes():
    for name, preset in PRESETS.items():
        other = with_vqgan(preset)
        ours, theirs = preset.image_tokenizer, other.image_tokenizer
        assert (theirs.num_codes, theirs.grid) == (ours.num_codes, ours.grid), name
        assert theirs.image_size >= other.image_tokenizer_train.vqgan.smallest_image, name
    assert with_vqgan(PRESETS["fashion"]) == PRESETS["fashion"]


def test_the_command_line_and_a_file_of_settings_mean_the_same(tmp_path):
    words = ["--data", "photos", "--out", "run", "--kind", "vqgan"]
    given = parse("train-tokenizer", [*words, "--image-tokenizer.vqgan.residual-blocks", "3"], "")
    wanted = with_vqgan(PRESETS["small"])
    assert given.image_tokenizer_train == wanted.image_tokenizer_train
    assert given.image_tokenizer.vqgan == dataclasses.replace(wanted.image_tokenizer.vqgan, residual_blocks=3)
    settings = TokenizerSettings("photos", 9, given.image_tokenizer, given.image_tokenizer_train, "small")
    write_options(tmp_path / "train-tokenizer.toml", tokenizer_options(settings))
    again = parse("train-tokenizer", ["--settings", str(tmp_path / "train-tokenizer.toml"), "--out", "b"], "")
    assert again.image_tokenizer == given.image_tokenizer
    assert again.image_tokenizer_train == given.image_tokenizer_train
    with pytest.raises(ValueError, match="--kind must be vqgan for the preset fashion"):
        parse("train-tokenizer", [*words[:4], "--preset", "fashion", "--kind", "vqvae"], "")


def test_fashion_is_the_paper_s_design():
    preset = PRESETS["fashion"]
    assert preset.image_tokenizer.grid == 50 and preset.image_tokenizer.image_size == 800
    assert 2.9e9 < count_parameters(preset.model).total < 3.1e9
    with torch.device("meta"):
        tokenizer = VQGAN(preset.image_tokenizer)
    # Encoder 29.3 M, decoder 42.4 M as in taming-transformers, 8192 codes of 256 numbers.
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 73_976_707


def test_fashion_fits_one_gpu_of_80_gb_a_row_at_a_time():
    preset = PRESETS["fashion"]
    tokens = preset.model.max_positions - 1
    alone = step_memory(preset.model, MicroBatch(1, tokens, size=2, accumulates=True))
    shared = step_memory(preset.model, MicroBatch(1, tokens, size=2, accumulates=True, gpus=8))
    assert 50e9 < alone.total < 52e9 and 10e9 < shared.total < 11e9


def test_fashion_takes_a_step_at_full_length_and_reduced_width():
    preset = PRESETS["fashion"]
    narrow = {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "vocab_size": 512}
    model = CogView(dataclasses.replace(preset.model, **narrow))
    length, three_region = preset.model.max_positions - 1, preset.model.three_region
    assert length == preset.max_text_tokens + preset.image_tokenizer.codes_per_image + 4
    is_text = torch.arange(length)[None] < preset.max_text_tokens
    layout = ThreeRegionLayout.sample(
        is_text,
        three_region.num_pivots,
        block_size=three_region.block_size,
        window_blocks=three_region.window_blocks,
    )
    row = torch.randint(512, (1, length + 1))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    hidden = model(row[:, :-1], layout=layout)
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.word_embeddings.weight, row[:, 1:].flatten())
    backward(loss)
    assert not descend(loss, model, optimizer).skipped
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) == len(before)


def test_what_does_not_fit_a_vqgan_is_refused():
    with pytest.raises(ValueError, match="multipliers must be one for each of 3 levels"):
        dataclasses.replace(SMALL, vqgan=VQGANConfig())
    with pytest.raises(ValueError, match="patches must be False for a VQGAN"):
        dataclasses.replace(SMALL, patches=True)
    with pytest.raises(ValueError, match="attention_levels must be from 0 to 4"):
        VQGANConfig(attention_levels=(5,))
    with pytest.raises(ValueError, match=r"image_tokenizer_train\.vqgan must be given"):
        dataclasses.replace(PRESETS["digits"], image_tokenizer=with_vqgan(PRESETS["digits"]).image_tokenizer)
