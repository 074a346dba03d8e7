# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.files import load_tensors, read_json, save_tensors


def test_a_damaged_file_is_one_clear_error(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)})
    content = (tmp_path / "x.safetensors").read_bytes()
    for damaged in (b"", content[:50], content[:-10], b"\xff" * 40):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file, or is damaged"):
            load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="weights not found"):
        load_tensors(tmp_path / "absent")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_json(tmp_path / "x.json")
