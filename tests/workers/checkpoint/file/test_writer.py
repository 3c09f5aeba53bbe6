"""Files laid out by us, read by the gguf package and by our own reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.file.writer import GgufLayout, lay_out, string_value, uint32_value
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

F32, TQ2_0 = TYPES_BY_NAME["F32"], TYPES_BY_NAME["TQ2_0"]


def write(path: Path, layout: GgufLayout, seed: int = 1) -> list[bytes]:
    """Write a layout with random data; return the bytes of each tensor."""
    random = np.random.default_rng(seed)
    data = [random.bytes(info.nbytes) for info in layout.tensors]
    image = bytearray(layout.header.ljust(layout.nbytes, b"\0"))
    for info, raw in zip(layout.tensors, data, strict=True):
        image[info.offset : info.offset + info.nbytes] = raw
    path.write_bytes(image)
    return data


def test_the_reference_package_reads_it(tmp_path: Path) -> None:
    keys = [("general.architecture", string_value("llama")), ("llama.block_count", uint32_value(7))]
    shapes = [("a.weight", (3, 5, 256), TQ2_0), ("b", (7,), F32), ("c.weight", (2, 9), F32)]
    data = write(tmp_path / "x.gguf", lay_out(keys, shapes, 32))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.block_count"].contents() == 7
    assert [(t.name, tuple(t.shape)) for t in reader.tensors] == [
        ("a.weight", (256, 5, 3)),
        ("b", (7,)),
        ("c.weight", (9, 2)),
    ]
    assert [t.tensor_type.name for t in reader.tensors] == ["TQ2_0", "F32", "F32"]
    assert [t.data.tobytes() for t in reader.tensors] == data


@pytest.mark.parametrize("alignment", [32, 4096])
def test_a_copy_of_a_real_header_is_the_same_file(tmp_path: Path, alignment: int) -> None:
    with GgufFile.open(embedded_model()) as file:
        keys = [(key, file.raw_value(key)) for key in file.metadata]
        if alignment != 32:
            keys.append(("general.alignment", uint32_value(alignment)))
        layout = lay_out(keys, [(t.name, t.shape, t.type) for t in file.tensors.values()], alignment)
        write(tmp_path / "x.gguf", layout)
        with GgufFile.open(tmp_path / "x.gguf") as copy:
            assert [(key, copy.raw_value(key)) for key in copy.metadata] == keys
            assert tuple(copy.tensors.values()) == layout.tensors
            assert copy.size_bytes == layout.nbytes
            assert copy.data_offset == len(layout.header)
            if alignment == 32:
                assert (copy.data_offset, copy.size_bytes) == (file.data_offset, file.size_bytes)


def test_an_id_that_was_given_twice_is_written_as_its_files_have_it(tmp_path: Path) -> None:
    file_type = TYPES_BY_NAME["BITNET_T158"]
    layout = lay_out(
        [], [("a", (4, 256), file_type), ("b", (4,), F32), ("c", (8, 256), file_type), ("d", (4,), F32)], 32
    )
    write(tmp_path / "x.gguf", layout)
    with GgufFile.open(tmp_path / "x.gguf") as file:
        assert tuple(file.tensors.values()) == layout.tensors


def test_what_no_reader_would_take_is_not_laid_out() -> None:
    with pytest.raises(ModelFileError, match="at most 63 bytes"):
        lay_out([], [("x" * 64, (4,), F32)], 32)
    with pytest.raises(ModelFileError, match="1 to 4 dimensions"):
        lay_out([], [("x", (1, 1, 1, 1, 4), F32)], 32)
    with pytest.raises(ModelFileError, match="divisible by 256, found 255"):
        lay_out([], [("x", (2, 255), TQ2_0)], 32)
