"""Transformers and llama.cpp agree on the tiny models; what transformers computes is stored anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .draw import tokens
from .llama_cpp_logits import logits as llama_cpp_logits
from .references import APART, LENGTH, store_logits, transformers_logits
from .tiny_files import write
from .tiny_models import NAMES, tiny_model


@pytest.mark.bench
@pytest.mark.parametrize("name", NAMES)
def test_stored_logits_are_regenerated(name: str, tmp_path: Path) -> None:
    """Compute them by transformers, compare all of them with llama.cpp's and store a part of them."""
    tiny, prompt = tiny_model(name), tokens(name, LENGTH)
    logits = transformers_logits(tiny, prompt)
    if name not in APART:
        difference = np.abs(logits - llama_cpp_logits(write(tiny, tmp_path / "model.gguf"), prompt)).max()
        print(f"\n{name}: llama.cpp's logits differ by {difference:.1e}")
        assert difference <= 5e-4
    store_logits(tiny, logits)
