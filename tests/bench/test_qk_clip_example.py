"""The QK-clip example: logits explode without it, stay near the threshold with it, are drawn."""

import json
import sys

import pytest
import torch
from helpers.paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import qk_clip


def test_logits_explode_without_it_and_not_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(qk_clip, "SHAPE", {"d": 32, "layers": 1, "heads": 2, "seq": 24})
    monkeypatch.setattr(qk_clip, "BATCH", 4)
    monkeypatch.setattr(qk_clip, "validate", lambda model, corpus: 0.0)
    text = tmp_path / "text.txt"
    text.write_bytes((EXAMPLES / "common.py").read_bytes())
    threads = torch.get_num_threads()
    options = ["--steps", "50", "--lr", "0.3", "--corpus", str(text), "--out", str(tmp_path)]
    assert qk_clip.main(options) == 0
    torch.set_num_threads(threads)
    assert (tmp_path / "qk_clip.png").read_bytes().startswith(b"\x89PNG")
    without, clipped = json.loads((tmp_path / "results.json").read_text())
    assert without["largest"][-1] > 500 and max(clipped["largest"][20:]) < 250
    first = next(i for i, x in enumerate(without["largest"]) if x > 100)
    assert without["largest"][: first + 1] == pytest.approx(clipped["largest"][: first + 1])
    assert "with QK-clip" in capsys.readouterr().out


def test_the_recorded_logits_are_those_of_the_blocks_by_name():
    model = qk_clip.EagerLM(32, 2, 2, 8)
    record = qk_clip.MaxLogits(model)
    for block in model.blocks:
        block.record = record
    model(torch.arange(8)[None])
    found = record.take()
    assert list(found) == ["blocks.0", "blocks.1"] and all(len(S) == 2 for S in found.values())
