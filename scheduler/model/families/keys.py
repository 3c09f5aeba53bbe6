"""Typed access to a model file's `<architecture>.*` keys; every error names file and key."""

from __future__ import annotations

from ....shm.errors import ModelFileError
from ....workers.checkpoint.file import names
from ....workers.checkpoint.file.gguf import GgufFile


class Keys:
    """Reads the keys of one file. A key without a default must be there; a default is the format's own."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self.architecture = architecture

    @property
    def label(self) -> str:
        """The file's name for messages."""
        return self._file.label

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; raises ModelFileError if it is missing without a default, or of another type."""
        name = f"{self.architecture}.{key}"
        return self._file.require(name, int) if default is None else self._file.get(name, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32; raises as `integer`."""
        name = f"{self.architecture}.{key}"
        return self._file.require(name, float) if default is None else self._file.get(name, float, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return a truth value; raises as `integer`."""
        name = f"{self.architecture}.{key}"
        return self._file.require(name, bool) if default is None else self._file.get(name, bool, default)

    def text(self, key: str, default: str) -> str:
        """Return a string; raises ModelFileError for another type."""
        return self._file.get(f"{self.architecture}.{key}", str, default)

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary: rows of the embedding, 0 without one."""
        embedding = names.find(self._file, "token_embd")
        return embedding.shape[0] if embedding is not None else 0

    def has(self, key: str) -> bool:
        """Return whether the file has the key."""
        return f"{self.architecture}.{key}" in self._file.metadata

    def has_tensor(self, role: str, layer: int | None = None) -> bool:
        """Return whether the file has a tensor of that role."""
        return names.find(self._file, role, layer) is not None

    def refuse(self, key: str, found: object, expected: str) -> ModelFileError:
        """Return the error for a value that cannot be used."""
        return ModelFileError(f"{self.label}: {self.architecture}.{key} is {found!r}, expected {expected}")
