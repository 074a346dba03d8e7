# SPDX-License-Identifier: Apache-2.0
"""A run works where its model is, whatever ``torch.set_default_device`` says.

The device meta stands for a GPU that the model is not on: what is made there by mistake has no values.
"""

import pytest
import torch

from cogview.clip_gen_run import ClipDrawing, ranked
from cogview.config import SamplingConfig, TrainConfig
from cogview.data.enlargements import LocalDataset
from cogview.data.rows import Rows
from cogview.data.tokens import TokenDataset
from cogview.run import load_run
from cogview.training.transformer import train
from tests.model.helpers import VOCAB, small_model

SEVEN = "a handwritten seven"


@pytest.fixture
def default_device():
    """``default_device(name)`` sets PyTorch's default until the test ends."""
    yield torch.set_default_device
    torch.set_default_device(None)


def used(run, image):
    """What every method of a run gives."""
    _, losses = run.generate([SEVEN, "a three"], num=2)
    _, by_top_p = run.generate(SEVEN, num=1, guidance=1.5, sampling=SamplingConfig(top_p=0.9))
    _, infilled = run.infill(SEVEN, image, keep_top=0.5, num=2)
    codes = run.encode([image, image])
    described = run.caption(image), run.caption(image, beams=2), run.rerank(SEVEN, [image, image])
    return losses, by_top_p, infilled, codes.tolist(), run.decode(codes)[0].tobytes(), described


def test_a_run_works_on_its_own_device(run_folder, default_device):
    run = load_run(run_folder, "cpu")
    image = run.generate(SEVEN, num=1)[0][0]
    expected = used(run, image)
    default_device("meta")
    assert used(run, image) == expected


@pytest.mark.parametrize("task", ["super-resolution", "local-super-resolution"])
def test_pictures_are_enlarged_on_the_device_of_the_run(run_folder, default_device, task):
    run = load_run(run_folder, "cpu")
    run.finetuned_for = task
    image = run.generate(SEVEN, num=1)[0][0]
    expected = run.super_resolve(image).tobytes()
    default_device("meta")
    assert run.super_resolve(image).tobytes() == expected


def test_training_is_where_its_model_is(tmp_path, default_device):
    def losses(folder):
        codes = torch.arange(20 * 16, device="cpu").view(20, 16) % 13
        rows = Rows.in_memory(VOCAB, codes, [[[1 + index % 4, 7]] for index in range(20)])
        config = TrainConfig(steps=3, batch_size=4, text_dropout=0.2, code_dropout=0.5, checkpoint_every=2)
        dataset = TokenDataset(VOCAB, rows, length=25)
        return train(models.pop(), dataset, config, tmp_path / folder, progress=False)

    models = [small_model(), small_model()]
    expected = losses("without")
    default_device("meta")
    assert losses("with") == expected


def test_rows_of_two_grids_are_made_on_the_cpu(default_device):
    codes = torch.arange(6 * 20, device="cpu").view(6, 20) % 13
    dataset = LocalDataset(VOCAB, Rows.in_memory(VOCAB, codes, [[[1, 7]]] * 6), length=30)

    def made():
        batch = dataset.batch(3, 4, text_weight=1.0, caption_fraction=0.0, seed=0, text_dropout=0.5)
        return [batch.tokens, batch.weight, batch.positions]

    expected = made()
    default_device("meta")
    assert all(torch.equal(a, b) for a, b in zip(made(), expected, strict=True))


def test_drawings_of_clip_gen_are_ranked_on_the_cpu(default_device):
    row = [ClipDrawing(None, "a cat", 0, cosine, 1.0) for cosine in (0.1, 0.3, 0.2)]
    default_device("meta")
    assert [drawing.cosine for drawing in ranked(row, "clip")] == [0.3, 0.2, 0.1]
