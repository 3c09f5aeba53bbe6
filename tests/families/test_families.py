"""Every family's logits are those of transformers (stored) and, quantised, nearly those of llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from .draw import Floats, tokens
from .engine_logits import Loaded
from .llama_cpp_logits import logits as llama_cpp_logits
from .references import APART, LENGTH, POSITIONS, stored_logits
from .tiny_files import write
from .tiny_models import NAMES, Tiny, calmer, tiny_model

TOLERANCE = 2e-3
QUANTISED = (("Q8_0", "Q8_0"), ("Q4_K", "Q4_K"), ("TQ2_0", "TQ2_0"))
"""Types of matrices and of experts."""
MIXED = {"gpt-oss": (("Q8_0", "MXFP4"),)}
LIMIT = 0.02
# llama.cpp unpacks keys and values from attn_kv_b, we keep them packed: activations are rounded elsewhere.
LIMITS = {"deepseek2-legacy": 0.06}
QUICK = ("deepseek2-v3", "qwen2moe", "olmoe", "llama", "granitemoe-shared", "gpt-oss", "glm4moe-normed")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *REST])
def test_logits_are_those_of_transformers_however_a_prompt_is_cut(name: str, tmp_path: Path) -> None:
    tiny = tiny_model(name)
    expected = stored_logits(tiny)
    loaded = Loaded(write(tiny, tmp_path / "model.gguf"), LENGTH)
    for chunk in (LENGTH, 7, 1):
        found = loaded.logits(tokens(name, LENGTH), chunk)[list(POSITIONS)]
        assert np.abs(found - expected).max() <= TOLERANCE, f"{chunk} tokens at a time"


@pytest.mark.bench
@pytest.mark.parametrize("name", [name for name in NAMES if name not in APART])
def test_quantised_log_probabilities_are_nearly_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Print how far the two are from each other, and llama.cpp from exact products with the same weights."""
    tiny, prompt = calmer(tiny_model(name, 256)), tokens(name, LENGTH)
    limit = LIMITS.get(name, LIMIT)
    print(f"\n{name:20}", end="")
    for types, experts in QUANTISED + MIXED.get(tiny.arch, ()):
        path = write(tiny, tmp_path / "model.gguf", types, experts)
        peer = log_probabilities(llama_cpp_logits(path, prompt), prompt)
        exact = write(decoded(tiny, path), tmp_path / "exact.gguf")
        rounding = np.abs(peer - log_probabilities(llama_cpp_logits(exact, prompt), prompt)).mean()
        found = log_probabilities(Loaded(path, LENGTH).logits(prompt, LENGTH), prompt)
        difference = np.abs(found - peer).mean()
        print(f" {experts:>5}: {difference:.4f} (llama.cpp {rounding:.4f})", end="")
        assert difference <= limit, experts


def log_probabilities(logits: Floats, prompt: list[int]) -> npt.NDArray[np.float64]:
    """Return the log-probability of each token of the prompt but the first, (len(prompt) - 1,)."""
    wide = logits[:-1].astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = wide[np.arange(len(wide)), prompt[1:]]
    return np.asarray(chosen - np.log(np.exp(wide).sum(axis=1)))


def decoded(tiny: Tiny, path: Path) -> Tiny:
    """Return `tiny` with the values that the tensors of its file `path` stand for."""
    values = {each.name: dequantize(each.data, each.tensor_type) for each in GGUFReader(path).tensors}
    shapes = {name: each.shape for name, each in tiny.tensors.items()}
    return replace(
        tiny, tensors={name: each.reshape(shapes[name]).astype(np.float32) for name, each in values.items()}
    )
