"""Writes tiny models as GGUF files with weights of a chosen type and a vocabulary of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUFWriter, TokenType
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from sterna.workers.checkpoint.held.encode import Encoder
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

from .draw import Floats
from .tiny_models import VOCAB, Tiny

_ENDS: Final = ("token_embd.weight", "output.weight")
_ALWAYS_F32: Final = ("ffn_gate_inp", "rope_freqs", "_norm", "exp_probs_b", "nextn")
SPECIAL: Final = ("<|endoftext|>", "<|start|>", "<|end|>")


def write(tiny: Tiny, path: Path, types: str = "F32", experts: str | None = None) -> Path:
    """Write the model with matrices of type `types` and experts of `experts` (default the same); return path.

    A matrix whose rows do not fill blocks of its type becomes Q8_0, embedding and head Q8_0 unless
    `types` is F32 or F16. One-dimensional tensors, norms and routers stay F32.
    """
    writer = GGUFWriter(path, tiny.arch)
    writer.add_name(tiny.name)
    for key, value in tiny.keys.items():
        name = f"{tiny.arch}.{key}"
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](name, value)
    _vocabulary(writer)
    for name, values in tiny.tensors.items():
        stored = _type(name, values, Type[types], Type[experts or types])
        writer.add_tensor(name, encoded(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(values: Floats, stored: Type) -> npt.NDArray[np.generic]:
    """Return the bytes (or floats) of a tensor in type `stored`, rows along the last axis."""
    if stored is Type.F32:
        return values
    try:
        return np.asarray(quantize(values, stored))
    except NotImplementedError:
        target = TYPES_BY_NAME[stored.name]
        rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
        out = np.empty(target.nbytes(rows.shape), np.uint8)
        Encoder().encode(rows, target, out)
        return out.reshape(*values.shape[:-1], -1)


def _type(name: str, values: Floats, matrices: Type, experts: Type) -> Type:
    if values.ndim == 1 or name.endswith(".bias") or any(part in name for part in _ALWAYS_F32):
        return Type.F32
    wanted = experts if "_exps" in name else matrices
    whole = values.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    if not whole or (name in _ENDS and wanted not in (Type.F32, Type.F16)):
        return Type.Q8_0
    return wanted


def byte_letters() -> list[str]:
    """Return the character that stands for each byte in a vocabulary of the gpt2 model."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _vocabulary(writer: GGUFWriter) -> None:
    """Write VOCAB tokens: i < 256 is byte i, then come merges of two letters and three special tokens."""
    letters = byte_letters()
    pairs = [(a, b) for a in "etaoin" for b in "rhsd nl"][: VOCAB - 256 - len(SPECIAL)]
    pairs = [(letters[ord(a)], letters[ord(b)]) for a, b in pairs]
    words = [*letters, *(a + b for a, b in pairs), *SPECIAL]
    token_types = [TokenType.NORMAL] * (VOCAB - len(SPECIAL)) + [TokenType.CONTROL] * len(SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(token_types)
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(words.index(SPECIAL[0]))
    writer.add_eos_token_id(words.index(SPECIAL[0]))
    writer.add_add_bos_token(False)
