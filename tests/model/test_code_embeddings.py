# SPDX-License-Identifier: Apache-2.0
"""Word embeddings of codes that begin as alike as the codes are."""

import pytest
import torch
import torch.nn.functional as F

from cogview.training.code_embeddings import OWN_SHARE, begin_like_codebook


def started(codebook, width=32, words=64):
    torch.manual_seed(0)
    embeddings = torch.nn.Embedding(words, width)
    torch.nn.init.normal_(embeddings.weight, std=0.02)
    before = embeddings.weight.detach().clone()
    begin_like_codebook(embeddings, codebook)
    return before, embeddings.weight.detach()


def test_codes_alike_have_embeddings_alike():
    torch.manual_seed(1)
    centres = 10 * torch.randn(2, 8)
    codebook = centres.repeat_interleave(20, 0) + torch.randn(40, 8)
    before, after = started(codebook)
    assert torch.equal(after[40:], before[40:])  # of other words
    assert after[:40].std().item() == pytest.approx(before[:40].std().item(), rel=0.1)
    alike = F.cosine_similarity(after[:40, None], after[None, :40], dim=-1)
    same = alike[:20, :20][~torch.eye(20, dtype=torch.bool)]
    assert same.mean() > alike[:20, 20:].mean() + 0.5
    assert same.max() < 0.9999  # and no two are the same


@pytest.mark.parametrize("shape", [(40, 100), (1, 8), (40, 8)], ids=["wider", "one code", "all equal"])
def test_any_codebook_gives_numbers(shape):
    codebook = torch.randn(shape) if shape[1] == 100 else torch.ones(shape)
    before, after = started(codebook)
    codes = shape[0]
    assert torch.isfinite(after).all()
    if shape[1] != 100:  # nothing to be told apart by, so only what is their own remains
        torch.testing.assert_close(after[:codes], OWN_SHARE * before[:codes], rtol=1e-4, atol=1e-5)
