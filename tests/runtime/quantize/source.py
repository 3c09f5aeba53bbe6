"""A file for tests of `sterna quantize`: every sort of tensor, seeded floats. No model can be made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sterna.workers.checkpoint.file.writer import lay_out, string_value, uint32_value
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

SHAPES = {
    "token_embd.weight": (32, 512),
    "output.weight": (32, 512),
    "output_norm.weight": (512,),
    "rope_freqs.weight": (64,),
    "blk.0.attn_q.weight": (512, 512),
    "blk.0.attn_k_b.weight": (2, 64, 96),
    "blk.0.attn_sinks.weight": (8,),
    "blk.0.attn_q.bias": (512,),
    "blk.0.ffn_gate_inp.weight": (4, 512),
    "blk.0.exp_probs_b.bias": (4,),
    "blk.0.ffn_gate_up_exps.weight": (4, 256, 512),
    "blk.0.ffn_down_exps.weight": (4, 512, 256),
    "blk.0.ffn_down_shexp.weight": (512, 256),
    "blk.10.ffn_up.3.weight": (64, 256),
}


def write_source(path: Path) -> Path:
    """Write the file and return `path`."""
    keys = [
        ("general.architecture", string_value("llama")),
        ("general.file_type", uint32_value(0)),
        ("general.license", string_value("CC0-1.0")),
        ("split.count", uint32_value(1)),
    ]
    layout = lay_out(keys, [(n, shape, TYPES_BY_NAME["F32"]) for n, shape in SHAPES.items()], 32)
    random = np.random.default_rng(1)
    image = bytearray(layout.header.ljust(layout.nbytes, b"\0"))
    for info in layout.tensors:
        image[info.offset : info.offset + info.nbytes] = (
            random.standard_normal(info.shape).astype(np.float32).tobytes()
        )
    path.write_bytes(image)
    return path
