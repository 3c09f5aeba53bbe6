"""Models of several files, `NAME-00001-of-00003.gguf` and so on: which files they are, and whether they fit.

The keys are those of llama.cpp's gguf-split: `split.no` (from 0), `split.count`, `split.tensors.count` (of
all files together). The first file has the metadata of the model, the others need none. Not here: what a file
holds (`shard.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ....shm.errors import ModelFileError
from .metadata import GgufArray
from .shard import MAX_TENSORS, Shard, TensorInfo
from .source import quoted, refusal

MAX_SHARDS: Final = 120  # each is a descriptor in every process, and one message carries at most 128
_NAME: Final = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the paths of all files of the model that `path` belongs to, by its name alone.

    Some may not exist. A name that is not one of a split model is a model of its own.
    """
    path = Path(path)
    named = _NAME.fullmatch(path.name)
    count = int(named[3]) if named else 1
    if named is None or not 1 <= int(named[2]) <= count <= MAX_SHARDS:
        return [path]
    return [path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def open_shards(path: str | os.PathLike[str]) -> tuple[Shard, ...]:
    """Open the file at `path` and all others of its model, in their order; the caller closes them.

    Raises as `GgufFile.open`, and ModelFileError for a part that is missing or does not belong to the others.
    """
    with ExitStack() as stack:
        opened = Shard.open(path)
        stack.callback(opened.close)
        count = opened.get("split.count", int, 1)
        if count > 1:  # llama.cpp writes 0 into a file that it has merged
            shards = _others(opened, Path(path), count, stack)
            _check_set(shards)
        else:
            shards = [opened]
        stack.pop_all()
        return tuple(shards)


def merged_tensors(shards: Sequence[Shard]) -> Mapping[str, TensorInfo]:
    """Return the tensors of all shards; each knows its file. Raises ModelFileError for a name in two."""
    if len(shards) == 1:
        return shards[0].tensors
    tensors: dict[str, TensorInfo] = {}
    for index, shard in enumerate(shards):
        for name, info in shard.tensors.items():
            if name in tensors:
                other = shards[tensors[name].file].label
                found = f"a duplicate of the one in {other}"
                raise refusal(shard.label, info.offset, f"tensor {quoted(name)}", "a new name", found)
            tensors[name] = replace(info, file=index)
    return MappingProxyType(tensors)


def _others(opened: Shard, path: Path, count: int, stack: ExitStack) -> list[Shard]:
    if count > MAX_SHARDS:
        raise _wrong(opened, "split.count", f"at most {MAX_SHARDS}", count)
    number = opened.metadata.typed("split.no", int)
    paths = parts_of(path)
    expected = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if len(paths) != count or not path.name.endswith(expected):
        raise ModelFileError(
            f"{opened.label}: split.no {number} and split.count {count} say part {number + 1} of {count},"
            f" whose name must end in {expected}"
        )
    missing = [each.name for each in paths if not each.exists()]
    if missing:
        named = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ModelFileError(
            f"{opened.label}: {len(missing)} of {count} parts are missing beside it: {named}"
        )
    shards = []
    for index, each in enumerate(paths):
        if index == number:
            shards.append(opened)
            continue
        shards.append(Shard.open(each))
        stack.callback(shards[-1].close)
    return shards


def _check_set(shards: Sequence[Shard]) -> None:
    """Refuse shards that are not those of one model."""
    first, count = shards[0], len(shards)
    total = sum(len(shard.tensors) for shard in shards)
    expected = first.metadata.typed("split.tensors.count", int)
    for index, shard in enumerate(shards):
        if (found := shard.metadata.typed("split.count", int)) != count:
            raise _wrong(shard, "split.count", f"{count} as in {first.label}", found)
        if (found := shard.metadata.typed("split.no", int)) != index:
            raise _wrong(shard, "split.no", f"{index}, as its name says", found)
        if (found := shard.get("split.tensors.count", int, expected)) != expected:
            raise _wrong(shard, "split.tensors.count", f"{expected} as in {first.label}", found)
        _check_same_model(first, shard)
    if total != expected or total > MAX_TENSORS:
        raise _wrong(first, "split.tensors.count", f"the {total} tensors of all {count} parts", expected)


def _check_same_model(first: Shard, shard: Shard) -> None:
    """Refuse keys that say otherwise than the first shard's; mostly there are none."""
    for key in shard.metadata:
        if key not in first.metadata or key == "general.alignment" or key.startswith("split."):
            continue
        found, expected = shard.metadata[key], first.metadata[key]
        if isinstance(found, GgufArray) or isinstance(expected, GgufArray) or found == expected:
            continue
        raise _wrong(shard, key, f"{_shown(expected)} as in {first.label} (another model?)", _shown(found))


def _wrong(shard: Shard, key: str, expected: str, found: object) -> ModelFileError:
    at = shard.metadata.offset(key)
    return refusal(shard.label, at, f"key {quoted(key)}", expected, found)


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else str(value)
