"""Files made by `sterna quantize` in llama.cpp: they load, and say what Sterna says.

Needs the package `llama_cpp`; with a build of the library at hand and the unpacked source of its bindings:
`PYTHONPATH=src:BINDINGS LLAMA_CPP_LIB_PATH=BUILD/bin pytest -m bench tests/runtime/quantize/test_peer.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.runtime.quantize.convert import quantize
from sterna.runtime.quantize.plan import TYPES, Wanted
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.workers.checkpoint.file.gguf import GgufFile

from ...scheduler.local_engine import LocalEngine

PROMPT = (
    "Once upon a time there lived in a cottage on the edge of a great forest a poor woodcutter with his wife"
    " and his two children. One morning the boy went out to gather sticks, and"
)
ANSWER = 48
NEAR_TIE = 0.2  # of a logit
ALLOWED = 0.02  # nats, mean over the prompt


def log_softmax(logits: Any) -> Any:  # noqa: ANN401 - arrays of a package without types
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("floats") / "F32.gguf"
    with GgufFile.open(embedded_model()) as file:
        quantize(file, path, Wanted(type="F32"))
    return path


@pytest.mark.bench
@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_says_what_we_say(tmp_path: Path, floats: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = floats if name == "F32" else tmp_path / f"{name}.gguf"
    # Ternary attention was never trained: what it gives is noise, and noise is full of ties.
    wanted = Wanted(type=name, experts_only=name in ("TQ1_0", "TQ2_0"))
    with GgufFile.open(floats) as file:
        ids = Tokenizer.from_metadata(file.metadata, file.label).encode(PROMPT)
        if path != floats:
            quantize(file, path, wanted)
    ours = LocalEngine(path).run([ids], ANSWER)[0]
    theirs = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False, n_threads=1, type_k=1, type_v=1
    )
    theirs.eval(ids)
    scores = log_softmax(theirs.scores[: len(ids) - 1])
    differences = np.abs(scores[np.arange(len(ids) - 1), ids[1:]] - np.array(ours.prompt_logprobs))
    equal = 0
    for token in ours.tokens:
        row = theirs.scores[theirs.n_tokens - 1]
        if (best := int(np.argmax(row))) != token:
            assert row[best] - row[token] < NEAR_TIE, f"token {equal} of the answer"
            break
        equal += 1
        theirs.eval([token])
    print(f"\n{name}: {equal} of {len(ours.tokens)} tokens equal, prompt {differences.mean():.4f} nats apart")
    theirs.close()
    assert differences.mean() <= ALLOWED
