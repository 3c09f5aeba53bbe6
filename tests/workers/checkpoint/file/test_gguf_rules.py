"""Every rule of the GGUF reader against a hand-built file that breaks it, and the limits of size."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile

from .gguf_bytes import ALIGN_KEY, ARR, BOOL, KEY_AT, STR, U8, U32, U64, build, items, key, tensor, text


def refused(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        GgufFile.open(tmp_path / "m.gguf")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "m.gguf"))
    assert "\n" not in message
    return message


FOUR = b"\0" * 4
HUGE = 1 << 62
BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "magic": (b"GGML" + build()[4:], ("byte 0:", "b'GGUF'", "b'GGML'")),
    "version 1": (build(version=1), ("byte 4:", "version 1")),
    "version 4": (build(version=4), ("byte 4:", "version 4")),
    "big endian": (build(version=3 << 24), ("byte 4:", "big-endian version 3")),
    "cut in magic": (b"GG", ("byte 0:", "4 bytes of magic", "the end of the file after 2")),
    "cut in counts": (build()[:12], ("byte 8:", "number of tensors", "after 4")),
    "too many tensors": (
        build(num_tensors=65_537) + b"\0" * 64,
        ("byte 8:", "at most 65536 tensors", "65537"),
    ),
    "tensors beyond file": (build(num_tensors=1000), ("byte 8:", "1000 tensors", "bytes left")),
    "too many keys": (build(num_keys=65_537), ("byte 16:", "at most 65536 keys", "65537")),
    "keys beyond file": (build(num_keys=60_000), ("byte 16:", "60000 keys", "bytes left")),
    "key too long": (
        build((key("k" * 65_536, U8, b"\0"),)),
        (f"byte {KEY_AT}:", "at most 65535 bytes", "65536"),
    ),
    "key length huge": (
        build((struct.pack("<Q", HUGE) + b"\0" * 20,)),
        (f"byte {KEY_AT}:", "key 0", str(HUGE)),
    ),
    "key beyond file": (
        build((struct.pack("<Q", 5000) + b"\0" * 20,)),
        (f"byte {KEY_AT + 8}:", "key 0", "5000"),
    ),
    "key not utf-8": (
        build((key(b"a\xff", U8, b"\0"),)),
        (f"byte {KEY_AT + 8}:", "key 0", "UTF-8", r"b'a\xff'"),
    ),
    "duplicate key": (
        build((key("same", U8, b"\0"), key("same", U8, b"\0"))),
        (f"byte {KEY_AT + 17}:", "key 'same'", "duplicate"),
    ),
    "key type unknown": (
        build((key("odd", 13, b"\0"),)),
        (f"byte {KEY_AT + 11}:", "key 'odd'", "0..12", "13"),
    ),
    "key value cut": (
        build((key("odd", U64, FOUR),), alignment=1),
        (f"byte {KEY_AT + 15}:", "key 'odd'", "uint64"),
    ),
    "bool of 2": (build((key("b", BOOL, b"\2"),)), (f"byte {KEY_AT + 13}:", "key 'b'", "0 or 1", "found 2")),
    "string too long": (
        build((key("s", STR, struct.pack("<Q", (16 << 20) + 1)),)),
        (f"byte {KEY_AT + 13}:", "key 's'", "at most 16777216 bytes", "16777217"),
    ),
    "string beyond file": (
        build((key("s", STR, struct.pack("<Q", 1000)),)),
        (f"byte {KEY_AT + 21}:", "key 's'", "1000 bytes"),
    ),
    "array type unknown": (build((key("a", ARR, items(99, 0)),)), ("key 'a'", "element type of 0..12", "99")),
    "array length 2^63": (
        build((key("a", ARR, items(U8, 1 << 63)),)),
        (f"byte {KEY_AT + 17}:", "key 'a'", "at most 4194304", str(1 << 63)),
    ),
    "array beyond file": (
        build((key("a", ARR, items(U64, 100, FOUR)),)),
        (f"byte {KEY_AT + 17}:", "key 'a'", "100 elements of uint64, at least 800 bytes", "bytes left"),
    ),
    "array of strings beyond file": (
        build((key("a", ARR, items(STR, 100, FOUR)),)),
        ("key 'a'", "100 elements of string, at least 800 bytes"),
    ),
    "string in array too long": (
        build((key("a", ARR, items(STR, 2, text("x") + struct.pack("<Q", 1 << 40))),)),
        (f"byte {KEY_AT + 34}:", "key 'a' string 1", "at most 16777216", str(1 << 40)),
    ),
    "string in array beyond file": (
        build((key("a", ARR, items(STR, 2, text("x") + struct.pack("<Q", 5000))),)),
        (f"byte {KEY_AT + 42}:", "key 'a' string 1", "5000 bytes", "the end of the file"),
    ),
    "string length in array cut": (
        build((key("a", ARR, items(STR, 2, text(b"x" * 8) + FOUR)),), alignment=1),
        (f"byte {KEY_AT + 41}:", "key 'a' string 1", "8 bytes of the length", "after 4"),
    ),
    "nesting of 3": (
        build((key("a", ARR, items(ARR, 1, items(ARR, 1, items(ARR, 0)))),)),
        (f"byte {KEY_AT + 25}:", "key 'a'[0]", "nested at most 2", "third level"),
    ),
    "nested arrays of a file": (
        build((key("a", ARR, items(ARR, 65_537, items(U8, 0) * 65_537)),)),
        ("key 'a'", "at most 65536 nested arrays", "65537"),
    ),
    "alignment type": (build((key(ALIGN_KEY, U64, FOUR + FOUR),)), (ALIGN_KEY, "power of two", "found 0")),
    "alignment text": (build((key(ALIGN_KEY, STR, text("32")),)), (ALIGN_KEY, "an integer", "a string '32'")),
    "alignment 48": (
        build((key(ALIGN_KEY, U32, struct.pack("<I", 48)),)),
        (f"byte {KEY_AT + 29}:", ALIGN_KEY, "power of two from 8 to 1048576", "found 48"),
    ),
    "alignment 4": (build((key(ALIGN_KEY, U32, struct.pack("<I", 4)),)), (ALIGN_KEY, "found 4")),
    "alignment 2^21": (build((key(ALIGN_KEY, U32, struct.pack("<I", 1 << 21)),)), (ALIGN_KEY, "2097152")),
    "name too long": (
        build((), (tensor("n" * 65, (1,)),), FOUR),
        (f"byte {KEY_AT}:", "tensor 0", "64 bytes", "65"),
    ),
    "name not utf-8": (
        build((), (tensor(b"\x80", (1,)),), FOUR),
        (f"byte {KEY_AT + 8}:", "tensor 0", "UTF-8"),
    ),
    "duplicate name": (
        build((), (tensor("t", (1,)), tensor("t", (1,), 0, 32)), b"\0" * 36),
        (f"byte {KEY_AT + 33}:", "tensor 't'", "duplicate"),
    ),
    "no dimensions": (
        build((), (tensor("t", ()),), b"\0" * 64),
        (f"byte {KEY_AT + 9}:", "tensor 't'", "1 to 4", "found 0"),
    ),
    "5 dimensions": (
        build((), (tensor("t", (1, 1, 1, 1, 1)),), FOUR),
        ("tensor 't'", "1 to 4 dimensions", "found 5"),
    ),
    "dimension of 0": (
        build((), (tensor("t", (4, 0)),), FOUR),
        (f"byte {KEY_AT + 21}:", "tensor 't'", "dimension 1"),
    ),
    "2^63 elements": (
        build((), (tensor("t", (1 << 32, 1 << 31)),), FOUR),
        (f"byte {KEY_AT + 13}:", "tensor 't'", "2^63 elements", "4294967296 x 2147483648"),
    ),
    "product wraps to 0": (
        build((), (tensor("t", (1 << 32, 1 << 32)),), FOUR),
        ("tensor 't'", "2^63 elements"),
    ),
    "type unknown": (
        build((), (tensor("t", (1,), 99),), FOUR),
        (f"byte {KEY_AT + 21}:", "tensor 't'", "type id 99"),
    ),
    "type of a fork": (build((), (tensor("t", (1,), 36),), FOUR), ("tensor 't'", "type id 36", "I2_S")),
    "row not whole blocks": (
        build((), (tensor("t", (33, 2), 8),), b"\0" * 68),
        (f"byte {KEY_AT + 13}:", "tensor 't'", "divisible by the 32 of a Q8_0 block", "found 33"),
    ),
    "offset not aligned": (
        build((), (tensor("t", (1,), 0, 8),), b"\0" * 12),
        (f"byte {KEY_AT + 25}:", "tensor 't'", "multiple of 32", "found 8"),
    ),
    "data beyond file": (
        build((), (tensor("t", (9,)),), b"\0" * 35),
        (f"byte {KEY_AT + 25}:", "tensor 't'", "36 bytes of data at byte 64", "a file of 99 bytes"),
    ),
    "offset beyond file": (build((), (tensor("t", (1,), 0, HUGE),), FOUR), ("tensor 't'", str(HUGE + 64))),
    "overlap": (
        build((), (tensor("late", (8,), 0, 32), tensor("early", (9,), 0, 0)), b"\0" * 64),
        ("tensor 'late'", "behind that of 'early'", "overlaps"),
    ),
    "same place": (
        build((), (tensor("t", (1,)), tensor("u", (1,))), FOUR),
        ("tensor 'u'", "behind that of 't'", "overlaps"),
    ),
    "newline in a name": (build((), (tensor("a\nb", (0,)),), FOUR), (r"tensor 'a\nb'", "at least 1")),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_file_is_refused_where_it_is_broken(tmp_path: Path, rule: str) -> None:
    content, parts = BROKEN[rule]
    message = refused(tmp_path, content)
    for part in parts:
        assert part in message, message


def test_the_limits_themselves_are_allowed(tmp_path: Path) -> None:
    nested = items(ARR, 2, items(U8, 0) + items(STR, 1, text("deep")))
    content = build(
        (key("k" * 65_535, ARR, nested), key(ALIGN_KEY, U32, struct.pack("<I", 8))),
        (tensor("n" * 64, (1, 1, 1, 2)), tensor("next", (1,), 0, 8)),
        b"\0" * 12,
        alignment=8,
    )
    (tmp_path / "m.gguf").write_bytes(content)
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.tensors["n" * 64].shape == (2, 1, 1, 1)
        assert file.tensors["next"].offset == file.tensors["n" * 64].offset + 8


def test_limit_over_all_string_arrays(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    first = build((key("a", ARR, items(STR, 4 << 20)),), num_keys=2, alignment=1)
    with path.open("wb") as out:
        out.write(first)
        out.seek((4 << 20) * 8, os.SEEK_CUR)  # 4 Mi empty strings: zeros
        out.write(key("b", ARR, items(STR, 1, text("one more"))))
    with pytest.raises(ModelFileError, match="key 'b': expected at most 4194304 array strings in a file"):
        GgufFile.open(path)


def test_limit_over_all_keys(tmp_path: Path) -> None:
    message = refused(
        tmp_path, build(tuple(key(f"{index:05d}" + "k" * 65_000, U8, b"\0") for index in range(260)))
    )
    assert "key '00258" in message
    assert "at most 16777216 bytes of keys" in message


def test_header_size_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    string_bytes = 16 << 20
    with path.open("wb") as out:  # sparse: 17 strings, each as long as a string may be
        out.write(build(num_keys=17, alignment=1))
        for index in range(17):
            out.write(key(str(index), STR, struct.pack("<Q", string_bytes)))
            out.seek(string_bytes, os.SEEK_CUR)
        out.truncate()
    with pytest.raises(
        ModelFileError, match=r"key 16: expected a header of at most 268435456 bytes, found more"
    ):
        GgufFile.open(path)
