"""What was given instead of a model file, and what to do about it: a URL, a name, a file of another format.

In here: telling it by its name and first bytes. Not in here: whether a GGUF file is sound (`check.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ...shm.errors import ModelFileError, ModelNotFound

READS: Final = "Sterna reads GGUF files"
_CONVERT: Final = "convert the model with convert_hf_to_gguf.py of llama.cpp, or get it as GGUF"
# A path keeps one of the two slashes.
_URL: Final = re.compile(r"[a-z]+:/|hf\.co/|huggingface\.co/")
_HEADER_NBYTES: Final = 9


def refuse_other_files(model: str) -> None:
    """Raise ModelNotFound or ModelFileError with a hint, if `model` is plainly no GGUF file.

    What cannot be told here is left to whoever opens it.
    """
    if _URL.match(model):
        raise ModelNotFound(f"{model}: a URL; {READS} from this machine's disk: download it first")
    path = Path(model).expanduser()
    try:
        if path.exists() and not path.is_file():
            return  # opening a pipe waits for whoever writes into it
        with path.open("rb") as file:
            head = file.read(_HEADER_NBYTES)
    except FileNotFoundError:
        if "/" not in model and not model.lower().endswith(".gguf"):
            raise ModelNotFound(
                f"{model}: no such model file; {READS}, and knows no models by name: give the path of one"
            ) from None
        return
    except (OSError, ValueError):  # the errors of the file's own reader say more
        return
    if found := _other_format(head):
        raise ModelFileError(f"{model}: {found}; {READS}: {_CONVERT}")


def _other_format(head: bytes) -> str:
    """Return what a file that begins so is, if it is one that holds models and no GGUF file."""
    if len(head) == _HEADER_NBYTES and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "a safetensors file"
    if head.startswith(b"PK\x03\x04"):
        return "a file of PyTorch"
    return ""
