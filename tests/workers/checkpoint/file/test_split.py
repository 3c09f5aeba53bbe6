"""Models in several files: they are one model, and what does not belong together is named."""

from __future__ import annotations

import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.scheduler.model.planner import read_plan
from sterna.scheduler.spec import model_id
from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.file.split import MAX_SHARDS
from sterna.workers.paging.reading import ModelFile, Staging

from ....system.gguf_copy import copy_model, shard_path
from .gguf_bytes import STR, U16, build, key, tensor, text

SHARDS = 3


@pytest.fixture(scope="module", params=[False, True], ids=["even", "small-first"])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the first of three files of the embedded model."""
    folder = tmp_path_factory.mktemp("split")
    return copy_model(folder / "m.gguf", shards=SHARDS, small_first_shard=request.param)


@pytest.mark.parametrize("number", range(1, SHARDS + 1))
def test_any_file_opens_the_whole_model(split: Path, number: int) -> None:
    path = shard_path(split.with_name("m.gguf"), number, SHARDS)
    with GgufFile.open(path) as file, GgufFile.open(embedded_model()) as whole:
        assert file.path == str(path)
        assert file.label == str(split)
        assert [Path(each).name[:7] for each in file.paths] == ["m-00001", "m-00002", "m-00003"]
        assert list(file.tensors) == list(whole.tensors)
        for name, info in file.tensors.items():
            assert (file.data(info) == whole.data(whole.tensors[name])).all(), name
        keys = [each for each in file.metadata if not each.startswith("split.")]
        assert keys == list(whole.metadata)
        assert file.size_bytes == sum(Path(each).stat().st_size for each in file.paths)
        assert {info.file for info in file.tensors.values()} >= {1, 2}


def test_experts_are_read_from_the_file_they_lie_in(split: Path) -> None:
    with GgufFile.open(split) as file, GgufFile.open(embedded_model()) as whole:
        plan, expected = read_plan(file), read_plan(whole)
        reader, staging, used = ModelFile(*file.fds), Staging(), set()
        for layer in plan.hyper.moe_layers:
            page, twin = (p.expert_page(f, layer, 3, 0) for p, f in ((plan, file), (expected, whole)))
            for slab, other in zip(page.slabs, twin.slabs, strict=True):
                used.add(slab.file)
                raw = os.pread(whole.fd, other.nbytes, other.offset)
                assert reader.read(slab, staging).tobytes() == raw
        assert len(used) > 1
        reader.close()


def test_all_files_are_the_models_identity(tmp_path: Path) -> None:
    first = copy_model(tmp_path / "m.gguf", shards=SHARDS)
    second, third = (shard_path(tmp_path / "m.gguf", number, SHARDS) for number in (2, 3))
    before = model_id(str(first))
    assert before == model_id(str(third))
    assert before[2] == sum(path.stat().st_size for path in (first, second, third))
    os.utime(second)
    assert model_id(str(first)) != before
    assert model_id(str(embedded_model()))[3] == embedded_model().stat().st_mtime_ns


# ---- what does not belong together ----


OF_TWO = r"-00002-of-00002\.gguf"


def shard(number: object, count: object, total: object, *names: str, keys: tuple[bytes, ...] = ()) -> bytes:
    said = (("no", number), ("count", count), ("tensors.count", total))
    own = (key(f"split.{name}", U16, struct.pack("<H", value)) for name, value in said if value is not None)
    tensors = (tensor(name, (8,), 0, 32 * i) for i, name in enumerate(names))
    return build((*own, *keys), tuple(tensors), bytes(64))


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def named(name: str) -> bytes:
    return key("general.name", STR, text(name))


GOOD = {1: shard(0, 2, 2, "a"), 2: shard(1, 2, 2, "b")}
BROKEN = {
    "missing": ({2: None}, rf"gguf: 1 of 2 parts are missing beside it: m{OF_TWO}$"),
    "count": ({2: shard(1, 3, 2, "b")}, r"m-00002.*split\.count': expected 2 as in .*m-00001.*, found 3$"),
    "number": ({2: shard(0, 2, 2, "b")}, r"m-00002.*split\.no': expected 1, as its name says, found 0$"),
    "own number": ({1: shard(1, 2, 2, "a")}, rf"m-00001.* say part 2 of 2, .* must end in {OF_TWO}$"),
    "duplicate": ({2: shard(1, 2, 2, "a")}, r"m-00002.*tensor 'a': .* found a duplicate of .*m-00001"),
    "total": ({2: shard(1, 2, 9, "b")}, r"m-00002.*split\.tensors\.count': expected 2 as in .*, found 9$"),
    "tensors": ({2: shard(1, 2, 2)}, r"m-00001.*expected the 1 tensors of all 2 parts, found 2"),
    "model": (
        {1: shard(0, 2, 2, "a", keys=(named("x"),)), 2: shard(1, 2, 2, "b", keys=(named("y"),))},
        r"m-00002.*general\.name': expected 'x' as in .*m-00001.* \(another model\?\), found 'y'$",
    ),
    "no number": ({1: shard(None, 2, 2, "a")}, r"m-00001.*'split\.no': expected an integer, found no"),
    "no total": ({1: shard(0, 2, None, "a")}, r"m-00001.*'split\.tensors\.count': expected an integer"),
    "too many": ({1: shard(0, 60_000, 2, "a")}, rf"m-00001.*split\.count': expected at most {MAX_SHARDS}, "),
    "cut": ({2: GOOD[2][:-60]}, rf"m{OF_TWO}: byte \d+: tensor 'b'.*\(cut short\?\)"),
    "folder": ({2: "folder"}, rf"m{OF_TWO}: expected a GGUF file, found a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_one_line_names_the_file_that_is_wrong(tmp_path: Path, case: str) -> None:
    changed, message = BROKEN[case]
    for number, content in {**GOOD, **changed}.items():
        path = tmp_path / f"m-{number:05d}-of-00002.gguf"
        if content == "folder":
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
    descriptors = num_descriptors()
    with pytest.raises(ModelFileError) as caught:
        GgufFile.open(tmp_path / "m-00001-of-00002.gguf")
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert num_descriptors() == descriptors


def test_a_part_under_another_name_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(GOOD[1])
    with pytest.raises(ModelFileError, match=r"part 1 of 2, whose name must end in -00001-of-00002"):
        GgufFile.open(tmp_path / "model.gguf")


@pytest.mark.parametrize("count", [0, 1])
def test_one_part_is_a_model(tmp_path: Path, count: int) -> None:
    """llama.cpp writes a count of 0 into a model that it has merged."""
    path = tmp_path / "merged.gguf"
    path.write_bytes(shard(0, count, 1, "a"))
    with GgufFile.open(path) as file:
        assert list(file.tensors) == ["a"]


def test_links_to_blobs_with_other_names_are_followed(split: Path, tmp_path: Path) -> None:
    """As in the cache of a hub's client: only the links have the names."""
    for index, path in enumerate(split.parent.iterdir()):
        shutil.copyfile(path, tmp_path / f"blob{index}")
        (tmp_path / path.name).symlink_to(tmp_path / f"blob{index}")
    with GgufFile.open(tmp_path / split.name) as file:
        assert np.prod(file.tensors["token_embd.weight"].shape) > 0
        assert len(file.fds) == SHARDS
