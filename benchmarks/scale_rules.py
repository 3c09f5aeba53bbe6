"""Perplexity of the embedded model after each way to give ternary blocks a scale, as in docs/quantize.md.

Three models: the float export, whose experts are ternary already; the same with seeded noise on its experts,
so that no rule can be exact; and the export with its attention made ternary, whose weights were trained as
floats. Usage: `python benchmarks/scale_rules.py HELDOUT.txt CALIBRATION.txt [--tokens N]`. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sterna.runtime.cli.render import grid
from sterna.runtime.quantize.plan import WEIGHTED
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.file.writer import lay_out
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, dequantize

RULES = ("absmean", "least-squares", "lloyd-max")
ATTENTION = ("blk.*.attn_q_?.weight", "blk.*.attn_kv_a_mqa.weight", "blk.*.attn_output.weight")
NOISE, SEED = 0.3, 20


def sterna(*arguments: str) -> str:
    """Run a command and return its stdout."""
    command = [sys.executable, "-m", "sterna.runtime.cli.main", *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


def perplexity(model: Path, text: Path, tokens: int) -> float:
    """Return the perplexity of the first `tokens` tokens of `text`."""
    found = sterna("perplexity", str(model), str(text), "--tokens", str(tokens), "--json")
    return float(json.loads(found)["perplexity"])


def noisy(source: Path, target: Path) -> None:
    """Copy a float export with normal noise on its experts: NOISE times the largest of each 256 weights."""
    random = np.random.default_rng(SEED)
    with GgufFile.open(source) as file:
        layout = lay_out(
            [(key, file.raw_value(key)) for key in file.metadata],
            [(info.name, info.shape, info.type) for info in file.tensors.values()],
            file.alignment,
        )
        with target.open("wb") as out:
            out.write(layout.header)
            for info in layout.tensors:
                data = file.data(file.tensors[info.name])
                if "_exps" in info.name and info.type is TYPES_BY_NAME["F32"]:
                    blocks = dequantize(info.type, data, info.shape).reshape(-1, 256)
                    scales = np.abs(blocks).max(axis=1, keepdims=True)
                    blocks += NOISE * scales * random.standard_normal(blocks.shape, np.float32)
                    data = blocks.view(np.uint8).reshape(-1)
                out.seek(info.offset)
                out.write(data.tobytes())
            out.truncate(layout.nbytes)


def quantized(source: Path, folder: Path, *options: str) -> Path:
    """Return a file made by `sterna quantize` with these options."""
    out = folder / "quantized.gguf"
    sterna("quantize", str(source), str(out), "--force", *options)
    return out


def attention(type_name: str) -> list[str]:
    """Return options that change attention and nothing else."""
    changed = [part for pattern in ATTENTION for part in ("--tensor-type", f"{pattern}={type_name}")]
    return ["--type", type_name, *changed, "--tensor-type", "*=keep"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make every file, score it and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, noise = folder / "plain.gguf", folder / "noise.gguf"
        sterna("quantize", "embedded", str(plain), "--type", "F32")
        noisy(plain, noise)

        def score(model: Path) -> str:
            found = f"{perplexity(model, given.heldout, given.tokens):.2f}"
            print(found, file=sys.stderr, flush=True)
            return found

        experts = ["--type", "TQ2_0", "--experts-only"]
        calibrations = ([], ["--calibrate", str(given.calibration)])
        rows = [("floats, not quantised", score(plain), score(noise), score(plain))]
        rows += [
            (
                rule + (", calibrated" if calibrated else ""),
                score(quantized(plain, folder, *experts, "--scales", rule, *calibrated)),
                score(quantized(noise, folder, *experts, "--scales", rule, *calibrated)),
                score(quantized(plain, folder, *attention("TQ2_0"), "--scales", rule, *calibrated)),
            )
            for calibrated in calibrations
            for rule in RULES
        ]
        print(grid(("TQ2_0 scales", "ternary experts", f"experts with noise {NOISE}", "attention"), rows))
        others = [
            (
                type_name,
                *(
                    score(
                        quantized(plain, folder, *attention(type_name), *(c if type_name in WEIGHTED else ()))
                    )
                    for c in calibrations
                ),
            )
            for type_name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
        ]
        print("\n" + grid(("attention as", "alone", "calibrated"), others))


if __name__ == "__main__":
    main()
