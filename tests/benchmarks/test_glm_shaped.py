"""The random model: variances, sizes, its vocabulary, and the order of its tokens."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from sterna.runtime.text.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
spec = importlib.util.spec_from_file_location("glm_shaped", BENCHMARKS / "glm_shaped.py")
assert spec is not None
assert spec.loader is not None
glm_shaped = importlib.util.module_from_spec(spec)
sys.modules["glm_shaped"] = glm_shaped
spec.loader.exec_module(glm_shaped)


def values(tensor: glm_shaped.Tensor) -> np.ndarray:  # type: ignore[name-defined,type-arg]
    data = tensor.make(np.random.default_rng(3))
    assert data.shape == tensor.shape
    assert data.nbytes == tensor.nbytes
    return dequantize(data, tensor.tensor_type)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [glm_shaped.ternary, glm_shaped.eight_bit])
@pytest.mark.parametrize("columns", [512, 2048])
def test_products_of_normed_vectors_have_variance_one(make: object, columns: int) -> None:
    weights = values(make("x", 3, 200, columns))  # type: ignore[operator]
    assert weights.shape == (3, 200, columns)
    assert abs(weights.mean()) < 0.01 / columns**0.5
    assert weights.var() * columns == pytest.approx(1.0, rel=0.02)


def test_ternary_weights_are_three_values_times_a_scale() -> None:
    weights = values(glm_shaped.ternary("x", 1, 8, 256))
    for row in weights.reshape(8, 256):
        assert len(np.unique(row)) == 3
        assert abs((row == 0).mean() - 1 / 3) < 0.15


def test_eight_layers_take_what_the_documentation_says() -> None:
    everything = list(glm_shaped.tensors(8, 8192, flat=False, seed=1))
    assert len({tensor.name for tensor in everything}) == len(everything)
    assert sum(tensor.nbytes for tensor in everything) == pytest.approx(1.45e9, rel=0.005)
    experts = [tensor for tensor in everything if tensor.name.endswith("_exps.weight")]
    assert sum(tensor.nbytes for tensor in experts) == pytest.approx(1.09e9, rel=0.001)
    assert {tensor.tensor_type for tensor in experts} == {GGMLQuantizationType.TQ2_0}


def test_a_greedy_answer_goes_through_all_tokens_before_it_repeats_one() -> None:
    embedding, _, output = (values(t) for t in glm_shaped._embedding_and_output(512, seed=1))
    logits = embedding @ output.T
    following = logits.argmax(axis=1)
    token, seen = 0, set()
    for _ in range(512):
        seen.add(token)
        token = int(following[token])
    assert len(seen) == 512
    others = np.sort(logits, axis=1)[:, -2]
    assert (logits.max(axis=1) > others + 15).all()


def test_preferences_are_the_same_in_another_order_and_flat_has_none() -> None:
    for flat in (False, True):
        biases = [values(t) for t in glm_shaped.tensors(4, 512, flat, seed=1) if "exp_probs_b" in t.name]
        assert len(biases) == 3
        assert all(np.ptp(bias) == pytest.approx(0 if flat else 0.1 * np.log(64)) for bias in biases)


def test_the_vocabulary_is_one_that_we_load() -> None:
    tokens, merges = glm_shaped.tokenizer(1024, np.random.default_rng(1))
    assert len(set(tokens)) == 1024
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3] + [1] * 1023,
            "tokenizer.ggml.eos_token_id": 0,
        },
        "this test",
    )
    word = tokens[-1].replace("\u0120", " ")
    assert len(tokenizer.encode(word)) < len(word)  # merges are used
    text = f"The quick{word}brown fox: \u00fc 1\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
