"""Which file of this folder reads which architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from ....shm.errors import ModelFileError
from ....workers.checkpoint.file.gguf import GgufFile
from ..hyper import Hyperparameters
from . import bitnet, deepseek2, glm4moe, gpt_oss, granitemoe, llama, olmoe, qwen2, qwen2moe, qwen3, qwen3moe
from .keys import Keys

FAMILIES: Final[Mapping[str, Callable[[Keys], Hyperparameters]]] = MappingProxyType(
    {
        "deepseek2": deepseek2.read,
        "qwen3moe": qwen3moe.read,
        "qwen2moe": qwen2moe.read,
        "olmoe": olmoe.read,
        "llama": llama.read,
        "granitemoe": granitemoe.read,
        "gpt-oss": gpt_oss.read,
        "glm4moe": glm4moe.read,
        "bitnet": bitnet.read,
        **dict.fromkeys(bitnet.SQUARED, bitnet.read),
        "qwen2": qwen2.read,
        "qwen3": qwen3.read,
    }
)
"""By `general.architecture`."""


def read_hyperparameters(file: GgufFile) -> Hyperparameters:
    """Read and cross-check the keys of a file's architecture.

    Raises ModelFileError naming file and key for what is missing, misshapen or not supported.
    """
    architecture = file.require("general.architecture", str)
    if architecture not in FAMILIES:
        raise ModelFileError(
            f"{file.label}: general.architecture is {architecture!r}; supported: {', '.join(FAMILIES)}"
        )
    hyper = FAMILIES[architecture](Keys(file, architecture))
    hyper.check(file.label)
    return hyper
