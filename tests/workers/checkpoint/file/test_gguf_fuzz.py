"""Mutated headers: each is refused with a SternaError or gives tensors that lie inside the file."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sterna.shm.errors import SternaError
from sterna.workers.checkpoint.file.gguf import GgufArray, GgufFile

INTERESTING = (0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 35, 36, 64, 255, 256, 65_535, 65_536, 65_537)
POWERS = (31, 32, 40, 62, 63)


def original(folder: Path) -> tuple[bytes, int]:
    """Return a file with every type of value and several tensor types, and where its data starts."""
    path = folder / "original.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_uint32("deepseek2.block_count", 6)
    writer.add_float32("deepseek2.rope.freq_base", 10_000.0)
    writer.add_bool("deepseek2.expert_weights_norm", True)
    writer.add_custom_alignment(64)
    writer.add_uint64("big", 1 << 40)
    writer.add_array("tokenizer.ggml.tokens", [f"token {index}" for index in range(20)])
    writer.add_array("tokenizer.ggml.token_type", list(range(20)))
    writer.add_array("scores", [0.5, 1.5, 2.5])
    writer.add_array("flags", [True, False, True])
    writer.add_array("nested", [[1, 2], [3, 4, 5]])
    rng = np.random.default_rng(1)
    for index, type_name in enumerate(("F32", "F16", "Q8_0", "TQ1_0", "TQ2_0", "BF16")):
        values = rng.standard_normal((2, 3, 256)[index % 3 :]).astype(np.float32)
        number = GGMLQuantizationType[type_name]
        writer.add_tensor(f"blk.{index}.weight", gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        assert exercise(file) == 6
        assert len(file.metadata) == 11
        return path.read_bytes(), file.data_offset


def mutated(content: bytes, header_bytes: int, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(header_bytes, len(data)) or 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << rng.randrange(8))])
            case 1:
                value = rng.choice((*INTERESTING, *((1 << p) - rng.randrange(2) for p in (31, 32))))
                data[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
            case 2:
                value = rng.choice(
                    (*INTERESTING, (1 << 64) - 1, *((1 << p) + rng.randrange(-1, 2) for p in POWERS))
                )
                data[at : at + 8] = struct.pack("<Q", value)
            case 3:
                del data[rng.randrange(len(data)) :]
            case 4:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 33)))
            case _:
                del data[at : at + rng.choice((1, 4, 8, 33))]
        if not data:
            break
    return bytes(data)


def read_all(value: object) -> int:
    """Read every element of a metadata value; the sum of all lengths keeps it from being skipped."""
    if not isinstance(value, GgufArray):
        return 1
    return sum(read_all(element) for element in value) + len(value)


def exercise(file: GgufFile) -> int:
    """Touch everything the file offers; return how many tensors lie inside it (all must)."""
    end = 0
    for info in sorted(file.tensors.values(), key=lambda info: info.offset):
        assert file.data_offset <= info.offset
        assert end <= info.offset
        end = info.offset + info.nbytes
        assert end <= file.size_bytes
        assert info.nbytes == info.type.nbytes(info.shape) > 0
        assert len(file.data(info)) == info.nbytes
        int(file.data(info).sum())
        if len(info.shape) == 3:
            offset, nbytes = file.slab(info, info.shape[0] - 1)
            assert offset + nbytes == end
    for key in file.metadata:
        try:
            read_all(file.metadata[key])
        except SternaError as error:
            check_message(error, file.path)
    return len(file.tensors)


def check_message(error: SternaError, path: str) -> None:
    message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(path) + 500
    assert "byte" in message or "key" in message or "empty file" in message, message


def fuzz(folder: Path, rounds: int, seed: int) -> tuple[int, int]:
    content, header_bytes = original(folder)
    rng = random.Random(seed)
    path = folder / "mutant.gguf"
    refused = accepted = 0
    slowest_s = 0.0
    for number in range(rounds):
        mutant = mutated(content, header_bytes, rng)
        path.write_bytes(mutant)
        start = time.perf_counter()
        try:
            with GgufFile.open(path) as file:
                exercise(file)
            accepted += 1
        except SternaError as error:
            check_message(error, str(path))
            refused += 1
        except BaseException:
            (folder / "failing.gguf").write_bytes(mutant)
            print(f"mutant {number} of seed {seed} kept as {folder}/failing.gguf")
            raise
        slowest_s = max(slowest_s, time.perf_counter() - start)
    print(f"{rounds} mutants: {refused} refused, {accepted} harmless, slowest {slowest_s * 1e3:.1f} ms")
    assert slowest_s < 2
    return refused, accepted


def test_mutated_headers(tmp_path: Path) -> None:
    refused, accepted = fuzz(tmp_path, rounds=2_000, seed=20_250_101)
    assert refused > 1_000  # the mutations reach the checks
    assert accepted > 50  # and some are harmless


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(4))
def test_many_mutated_headers(tmp_path: Path, seed: int) -> None:
    refused, accepted = fuzz(tmp_path, rounds=10_000, seed=seed)
    assert refused + accepted == 10_000


def test_every_cut_is_refused(tmp_path: Path) -> None:
    content, header_bytes = original(tmp_path)
    path = tmp_path / "cut.gguf"
    with GgufFile.open(tmp_path / "original.gguf") as file:
        data_end = max(info.offset + info.nbytes for info in file.tensors.values())
    for length in (*range(header_bytes + 1), *range(header_bytes + 1, data_end, 97), data_end - 1):
        path.write_bytes(content[:length])
        with pytest.raises(SternaError) as caught:
            GgufFile.open(path)
        check_message(caught.value, str(path))
