# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cogview.config import ImageTokenizerConfig
from cogview.tokens import vqvae
from cogview.tokens.vqvae import CHROMA, ImageTokenizer, Quantizer, ResidualBlock

SMALL = ImageTokenizerConfig(num_codes=8, code_dim=4, channels=6, stages=2, image_size=16)


def test_names_and_shapes_of_the_released_state_dict():
    with torch.device("meta"):
        tokenizer = ImageTokenizer(ImageTokenizerConfig())
    shapes = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    expected = {
        "quantize_t.embed": [256, 8192],
        "quantize_t.cluster_size": [8192],
        "quantize_t.embed_avg": [256, 8192],
    }
    for index, shape in [
        (0, [512, 3, 4, 4]),
        (2, [512, 512, 4, 4]),
        (4, [512, 512, 4, 4]),
        (6, [256, 512, 1, 1]),
    ]:
        expected |= {f"enc_b.blocks.{index}.weight": shape, f"enc_b.blocks.{index}.bias": [shape[0]]}
    for index, shape in [
        (0, [256, 512, 4, 4]),
        (2, [512, 512, 4, 4]),
        (4, [512, 512, 4, 4]),
        (6, [3, 512, 1, 1]),
    ]:
        outputs = shape[0] if index == 6 else shape[1]
        expected |= {f"dec.blocks.{index}.weight": shape, f"dec.blocks.{index}.bias": [outputs]}
    assert shapes == expected
    encoder = sum(p.numel() for p in tokenizer.enc_b.parameters())
    decoder = sum(p.numel() for p in tokenizer.dec.parameters())
    assert (encoder, decoder) == (8_546_048, 10_488_835)


def test_shapes_ranges_and_any_multiple_of_the_factor():
    tokenizer = ImageTokenizer(SMALL).eval()
    codes = tokenizer.encode(torch.rand(3, 3, 16, 24))
    assert codes.shape == (3, 4, 6)
    assert codes.dtype == torch.int64
    images = tokenizer.decode(codes)
    assert images.shape == (3, 3, 16, 24)
    assert 0 <= images.min() <= images.max() <= 1
    with pytest.raises(ValueError, match="divisible by 4"):
        tokenizer.encode(torch.rand(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        tokenizer.encode(torch.rand(1, 1, 16, 16))


def test_nearest_code_is_the_nearest():
    quantizer = Quantizer(SMALL)
    z = torch.randn(5, 7, 4)
    distance = torch.cdist(z.reshape(-1, 4), quantizer.embed.t())
    assert torch.equal(quantizer.nearest(z).reshape(-1), distance.argmin(1))


@pytest.mark.parametrize("held", [1, 24, 40])  # one vector at a time, three, as many as there are
def test_how_many_distances_are_held_does_not_change_the_codes(monkeypatch, held):
    quantizer = Quantizer(SMALL)
    z = torch.randn(5, 4)
    expected = torch.cdist(z, quantizer.embed.t()).argmin(1)
    monkeypatch.setattr(vqvae, "DISTANCES_ON_CPU", held)
    assert torch.equal(quantizer.nearest(z), expected)


def test_moving_averages_by_hand():
    quantizer = Quantizer(SMALL)
    quantizer.revive_below = 0.0
    embed, size, average = (
        quantizer.embed.clone(),
        quantizer.cluster_size.clone(),
        quantizer.embed_avg.clone(),
    )
    z, codes = torch.randn(6, 4), torch.tensor([0, 0, 0, 5, 5, 7])
    quantizer.update(z, codes)
    for code in range(8):
        chosen = z[codes == code]
        size[code] = 0.99 * size[code] + 0.01 * len(chosen)
        average[:, code] = 0.99 * average[:, code] + 0.01 * chosen.sum(0)
    smoothed = (size + 1e-5) / (size.sum() + 8e-5) * size.sum()
    torch.testing.assert_close(quantizer.embed, average / smoothed)
    assert not torch.allclose(quantizer.embed, embed)


def test_a_code_that_is_never_used_restarts_at_an_encoder_output():
    quantizer = Quantizer(SMALL)
    quantizer.cluster_size.fill_(9.0)[3] = 0.01
    z = torch.randn(20, 4) + 50
    quantizer.update(z, torch.zeros(20, dtype=torch.int64))
    distance = (quantizer.embed[:, [3]] - z.t()).abs().amax(0)
    assert distance.min() < 0.1  # up to the smoothing of the counts
    assert (quantizer.embed[:, 4] - z.mean(0)).abs().min() > 10


def test_straight_through_gradient_and_commitment():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL)
    images = torch.rand(2, 3, 16, 16)
    result = tokenizer(images)
    F.mse_loss(result.images, images).backward()
    assert tokenizer.enc_b.blocks[0].weight.grad.abs().sum() > 0
    tokenizer.zero_grad()
    result = tokenizer(images)
    result.commitment.backward()
    assert tokenizer.enc_b.blocks[0].weight.grad.abs().sum() > 0
    assert tokenizer.dec.blocks[0].weight.grad is None


def test_evaluation_leaves_the_codebook_alone():
    tokenizer = ImageTokenizer(SMALL).eval()
    before = tokenizer.quantize_t.embed.clone()
    tokenizer(torch.rand(2, 3, 16, 16))
    assert torch.equal(tokenizer.quantize_t.embed, before)


def quantized(method, seed=0):
    torch.manual_seed(seed)
    quantizer = Quantizer(SMALL).train()
    quantizer.learn_by(method)
    z = torch.randn(40, 4, requires_grad=True)
    before = quantizer.embed.detach().clone()
    return quantizer, z, before, quantizer(z)


@pytest.mark.parametrize("method", ["moving-average", "straight-through", "fixed"])
def test_the_nearest_code_passes_its_gradient_straight_through(method):
    quantizer, z, before, out = quantized(method)
    assert torch.equal(out.codes, torch.cdist(z, before.t()).argmin(1))
    torch.testing.assert_close(out.vectors.detach(), before.t()[out.codes])
    gradient = torch.randn(40, 4)
    assert torch.equal(torch.autograd.grad(out.vectors, z, gradient)[0], gradient)
    moved = not torch.equal(quantizer.embed, before)
    assert moved == (method == "moving-average")
    assert quantizer.embed.requires_grad == out.codebook.requires_grad == (method == "straight-through")


def test_the_codebook_loss_draws_each_code_to_its_vectors():
    quantizer, z, before, out = quantized("straight-through")
    out.codebook.backward()
    for code in range(8):
        chosen = z.detach()[out.codes == code]
        expected = 2 * (before[:, code] - chosen).sum(0) / z.numel()
        torch.testing.assert_close(quantizer.embed.grad[:, code], expected)
    assert z.grad is None


def test_gumbel_draws_by_distance_over_temperature_and_the_nearest_when_cold():
    torch.manual_seed(0)
    quantizer = Quantizer(SMALL).train()
    quantizer.learn_by("gumbel")
    z = torch.randn(4, requires_grad=True)
    quantizer.temperature = 0.7
    out = quantizer(z.expand(20_000, 4))
    expected = torch.softmax(-torch.cdist(z[None], quantizer.embed.t()).square() / 0.7, 1)[0]
    found = torch.bincount(out.codes, minlength=8) / 20_000
    torch.testing.assert_close(found, expected.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(out.vectors, quantizer.lookup(out.codes))
    out.vectors.sum().backward()
    assert float(z.grad.abs().sum()) > 0 and float(quantizer.embed.grad.abs().sum()) > 0
    quantizer.temperature = 1e-6
    many = torch.randn(50, 4)
    assert torch.equal(quantizer(many).codes, quantizer.nearest(many))
    quantizer.eval()
    quantizer.temperature = 10.0
    assert torch.equal(quantizer(many).codes, quantizer.nearest(many))


def test_residual_blocks_let_a_code_know_its_neighbours():
    config = dataclasses.replace(SMALL, residual_blocks=1, patches=True)
    image = torch.rand(1, 3, 16, 16)
    other = image.clone()
    other[..., 11:, :] = 1 - other[..., 11:, :]  # Convolutions of the second row of cells end before.
    for shape, sees in ((SMALL, False), (config, True)):
        torch.manual_seed(0)
        tokenizer = ImageTokenizer(shape).eval()
        for block in (part for part in tokenizer.modules() if isinstance(part, ResidualBlock)):
            torch.nn.init.normal_(block.blocks[3].weight)  # They begin as the identity.
        at = [tokenizer.vectors(pixels)[0, 1, 1] for pixels in (image, other)]
        assert torch.equal(*at) != sees
        assert tokenizer.decode(tokenizer.encode(image)).shape == image.shape


def test_without_quantisation_the_vectors_are_decoded_and_the_book_stays():
    tokenizer = ImageTokenizer(SMALL).train()
    before, images = tokenizer.quantize_t.embed.clone(), torch.rand(2, 3, 16, 16)
    out = tokenizer(images, quantise=False)
    torch.testing.assert_close(out.images, tokenizer.rebuild(tokenizer.vectors(images)))
    assert torch.equal(tokenizer.quantize_t.embed, before) and float(out.commitment) == 0
    for distinct in (5, 15):
        z = torch.randn(distinct, 1, 4).expand(distinct, 6, 4)
        tokenizer.quantize_t.begin_at(z)
        codes = {tuple(code) for code in tokenizer.quantize_t.embed.t().tolist()}
        assert codes <= {tuple(row) for row in z.reshape(-1, 4).tolist()} and len(codes) == min(8, distinct)
    assert torch.equal(tokenizer.quantize_t.embed_avg, tokenizer.quantize_t.embed)


@pytest.mark.parametrize("residual_blocks", [0, 2])
def test_a_tokenizer_of_patches_begins_without_a_loss_where_its_codes_have_room(residual_blocks):
    config = dataclasses.replace(
        SMALL, code_dim=48, channels=50, patches=True, residual_blocks=residual_blocks, pixel_std=(0.5,) * 3
    )
    images = torch.rand(2, 3, 16, 24)
    other = images.clone()
    other[0, :, :4, :4] += 0.1 * torch.randn(3, 4, 4)
    tokenizer = ImageTokenizer(config)
    for color_weight in (0.0, 8.0):
        tokenizer.begin_with_patches(color_weight)
        torch.testing.assert_close(tokenizer(images, quantise=False).images, images, atol=1e-5, rtol=0)
        distance = (tokenizer.vectors(images) - tokenizer.vectors(other)).square().sum()
        error = (images - other)[0, :, :4, :4] / 0.5
        mean = error.mean((1, 2))
        colors = 16 * (mean.mean() + CHROMA * (mean - mean.mean())).square().sum()
        torch.testing.assert_close(distance, error.square().sum() + color_weight * colors)
    narrow = ImageTokenizer(dataclasses.replace(config, code_dim=30))
    narrow.begin_with_patches()
    mse = F.mse_loss(narrow(images, quantise=False).images, images).item()
    assert 0 < mse < float(images.var())
