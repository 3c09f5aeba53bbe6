"""Transformers and llama.cpp agree on the tiny models; what transformers computes is stored again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .draw import tokens
from .engine_logits import Loaded
from .llama_cpp_logits import logits as llama_cpp_logits
from .references import APART, LENGTH, store_logits, transformers_logits
from .tiny_files import write
from .tiny_models import NAMES, tiny_model


@pytest.mark.bench
@pytest.mark.parametrize("name", NAMES)
def test_stored_logits_are_regenerated(name: str, tmp_path: Path) -> None:
    """Compute them by transformers, compare all with ours and llama.cpp's, and store a part of them."""
    tiny, prompt = tiny_model(name), tokens(name, LENGTH)
    logits = transformers_logits(tiny, prompt)
    path = write(tiny, tmp_path / "model.gguf")
    loaded = Loaded(path, LENGTH)
    ours = [float(np.abs(logits - loaded.logits(prompt, chunk)).max()) for chunk in (LENGTH, 1)]
    print(f"\n{name}: ours differ by {ours[0]:.1e}, one by one by {ours[1]:.1e}", end="")
    if name not in APART:
        difference = np.abs(logits - llama_cpp_logits(path, prompt)).max()
        print(f", llama.cpp's by {difference:.1e}")
        assert difference <= 5e-4
    assert max(ours) <= 2e-3
    store_logits(tiny, logits)
