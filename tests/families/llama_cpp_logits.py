"""Logits by llama.cpp, through llama-cpp-python: a peer to compare with where it is installed.

LLAMA_CPP_LIB_PATH names the folder with libllama.so where the package brings none of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .draw import Floats


def logits(path: Path, tokens: Sequence[int], *, at_once: bool = True, threads: int = 1) -> Floats:
    """Return (len(tokens), vocabulary) logits; keys and values are kept in float32.

    at_once: all in one batch, else one by one. Skips the test if llama-cpp-python is not installed.
    """
    lib, _ = _library()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    assert model, f"llama.cpp does not load {path}"
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(len(tokens), 64)
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    settings.flash_attn_type = 0
    context = lib.llama_init_from_model(model, settings)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    out = np.empty((len(tokens), vocab), np.float32)
    step = len(tokens) if at_once else 1
    batch = lib.llama_batch_init(step, 0, 1)
    for first in range(0, len(tokens), step):
        batch.n_tokens = step
        for position in range(step):
            batch.token[position] = tokens[first + position]
            batch.pos[position] = first + position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = 1
        assert lib.llama_decode(context, batch) == 0
        for position in range(step):
            row = lib.llama_get_logits_ith(context, position)
            out[first + position] = np.ctypeslib.as_array(row, (vocab,))
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return out


@cache
def _library() -> tuple[Any, Any]:
    """Return the bindings and what silences them, which must live as long as they do."""
    lib = pytest.importorskip("llama_cpp.llama_cpp")
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    return lib, silent
