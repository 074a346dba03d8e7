# SPDX-License-Identifier: Apache-2.0
"""A CLIP of next to no size, as transformers saves one."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def save_tiny_clip(folder: Path, width: int = 8, seed: int = 0) -> Path:
    """Random weights, 16-pixel pictures, a tokenizer that knows letters."""
    import transformers

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    last = len(pieces) - 1
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(pieces), "eos_token_id": last, "bos_token_id": last - 1}
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 24, "pad_token_id": last},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=width,
    )
    torch.manual_seed(seed)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    seen = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.3, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    return folder
