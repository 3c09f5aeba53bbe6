"""Whether a model can be run, told from its header: every problem that is seen at once, and what is unused.

No tensor is read. Not in here: the plan itself, which finds the problems (`scheduler.model.planner`), memory
(`memory/choice.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ...scheduler.model.plan import ModelPlan
from ...scheduler.model.planner import read_plan
from ...shm.errors import ModelFileError
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.file.names import TensorProblem
from ...workers.checkpoint.file.tilings import find_tiling
from ...workers.checkpoint.held.formats import is_decoded_at_load
from ...workers.checkpoint.types.bitnet import CONFIG_NAME, TILED
from ...workers.checkpoint.types.table import TYPES_BY_NAME, TensorType
from ..chat.template import ChatTemplate, token_texts
from ..text.metadata import MetadataReader
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import merges_without_token

MAX_PROBLEMS: Final = 64

_F32: Final = TYPES_BY_NAME["F32"]
_IN_LAYER: Final = re.compile(r"(blk|model\.layers)\.([0-9]+)\.(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What was found: `plan` only without problems in architecture, keys and tensors; `used`: its tensors."""

    plan: ModelPlan | None
    problems: tuple[str, ...]
    used: frozenset[str]


def examine(file: GgufFile) -> Examined:
    """Return all that can be told of `file`, which is the caller's."""
    noted = NotedTensors(file.tensors)
    whole, file.tensors = file.tensors, noted
    try:
        plan, problems = _plan(file, noted)
        problems += noted.types_refused(file)
        used = noted.used & whole.keys()
        problems += _untiled(file, [whole[name] for name in whole if name in used])
        plan = None if problems else plan
        problems += _text_problems(file)
    finally:
        file.tensors = whole
    return Examined(plan=plan, problems=tuple(problems), used=frozenset(used))


class NotedTensors(Mapping[str, TensorInfo]):
    """A file's tensors; notes which `get` finds, and stands in for what is missing, so that more is found.

    Types that cannot be computed with count as F32 until `types_refused` names them.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = dict(tensors)
        self._refused: dict[str, TensorType] = {}
        for name, info in tensors.items():
            if is_decoded_at_load(info.type) and info.type.decode is None:
                self._refused[name] = info.type
                self._tensors[name] = replace(info, type=_F32)
        self._missing: dict[str, TensorInfo] = {}
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, name: str, default: object = None) -> TensorInfo | None:  # type: ignore[override]
        """Return a tensor, or one that stands in for a missing one of its role; None without either."""
        info = self._tensors.get(name) or self._missing.get(_role_of(name))
        if info is not None:
            self.used.add(name)
        return info

    def assume(self, problem: TensorProblem) -> bool:
        """Have what `problem` misses be there, in every layer; returns whether that was not known before."""
        name, role = problem.name, _role_of(problem.name)
        if (found := self._tensors.get(name)) is not None:
            self._tensors[name] = replace(found, shape=problem.shape)
            return found.shape != problem.shape
        if role in self._missing:
            return False
        # The type of its like: what is computed together must be of types that go together.
        twin = self._tensors.get(name.replace("gate", "up")) or self._tensors.get(name.replace("up", "gate"))
        like = twin or next((info for each, info in self._tensors.items() if _role_of(each) == role), None)
        stored = _F32 if like is None else like.type
        self._missing[role] = TensorInfo(name=name, shape=problem.shape, type=stored, offset=0, nbytes=0)
        return True

    def layers_without(self, name: str) -> int:
        """Return in how many layers a tensor with the role of `name` was asked for and is missing."""
        role = _role_of(name)
        return sum(each not in self._tensors and _role_of(each) == role for each in self.used)

    def types_refused(self, file: GgufFile) -> list[str]:
        """Return a line for each type in use that cannot be computed with."""
        lines = []
        used = {name: file_type for name, file_type in self._refused.items() if name in self.used}
        for file_type in {each.name: each for each in used.values()}.values():
            named = [name for name, each in used.items() if each is file_type]
            where = f"{file.label_of(self._tensors[named[0]])}: {named[0]}"
            more = _more(len(named))
            lines.append(f"{where}: type {file_type.name} cannot be computed with or decoded{more}")
        return lines


def _plan(file: GgufFile, noted: NotedTensors) -> tuple[ModelPlan | None, list[str]]:
    """Plan again and again, each time with what was missing before; return the last plan and all problems."""
    found: list[tuple[str, str]] = []
    plan = None
    while len(found) < MAX_PROBLEMS:
        try:
            plan = read_plan(file)
            break
        except TensorProblem as problem:
            found.append((str(problem), problem.name))
            if not noted.assume(problem):
                break
        except ModelFileError as error:
            found.append((str(error), ""))
            break
    return plan, [text + (_more(noted.layers_without(name)) if name else "") for text, name in found]


def _text_problems(file: GgufFile) -> list[str]:
    """Return what is against the tokenizer, or, if it can be built, against the chat templates."""
    try:
        tokens = token_texts(Tokenizer.from_metadata(file.metadata, file.label))
        template = ChatTemplate.from_metadata(file.metadata, tokens=tokens, source=file.label, context=1)
    except ModelFileError as error:
        return [str(error)]
    if template is not None:
        template.close()
    return []


def text_warnings(file: GgufFile) -> list[str]:
    """Return what is odd about a tokenizer that can be built."""
    line = merges_without_token(MetadataReader(file.metadata, file.label))
    return [f"{file.label}: {line}"] if line else []


def _untiled(file: GgufFile, tensors: list[TensorInfo]) -> list[str]:
    """Return a line for each tensor of BitNet's TL1 and TL2 whose tile sizes are nowhere or make no sense."""
    lines = []
    for info in tensors:
        if info.type.name not in TILED or len(info.shape) != 2:
            continue
        rows, columns = info.shape
        where = f"{file.label_of(info)}: {info.name}"
        try:
            if find_tiling(file, info.type.name, rows, columns) is None:
                key = f"sterna.{info.type.name.lower()}.{rows}x{columns}"
                lines.append(
                    f"{where}: expected its tile sizes in key {key!r} or {CONFIG_NAME} beside the file"
                )
        except ModelFileError as error:
            lines.append(f"{where}: {error}")
    return lines


def _role_of(name: str) -> str:
    """Return the name without the number of its layer."""
    found = _IN_LAYER.fullmatch(name)
    return name if found is None else f"{found[1]}.*.{found[3]}"


def _more(count: int) -> str:
    return f" ({count} such tensors)" if count > 1 else ""
