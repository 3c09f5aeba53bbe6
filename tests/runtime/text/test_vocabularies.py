"""Real vocabularies against the ids that llama.cpp ships for them (ggml-vocab-*.gguf with .inp and .out).

They come with the source archive of llama-cpp-python, 70 MB, which pip fetches once into a cache folder; pip
also asks the archive's build backend for its metadata, in an environment of its own. STERNA_LLAMA_CPP names
the folder of a llama.cpp source tree to take instead. Without either, the default run leaves this file out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from sterna.runtime.text.tokenizer import Tokenizer
from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile

ROOT = Path(__file__).parents[3]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sterna-tests"
ARCHIVE = "llama-cpp-python==0.3.36"
MODELS = "vendor/llama.cpp/models"
FOLDER = (
    Path(os.environ["STERNA_LLAMA_CPP"]) / "models" if "STERNA_LLAMA_CPP" in os.environ else CACHE / ARCHIVE
)
# Two of them in a second each; the others take ten times as long together.
QUICK = ("gpt-2", "llama-spm")
CHECKED = (
    *(
        "phi-3",
        "llama-bpe",
        "qwen2",
        "qwen35",
        "deepseek-llm",
        "deepseek-coder",
        "falcon",
        "starcoder",
        "refact",
    ),
    *("command-r", "mpt"),
)
REFUSED = {
    "bert-bge": r"model: 'bert' is not supported; supported: gpt2, llama",
    "nomic-bert-moe": r"model: 't5' is not supported",
    "gemma-4": r"model: 'gemma4' is not supported",
    "aquila": r"pre: is missing",
    "gpt-neox": r"pre: is missing",
}
fetches = () if FOLDER.is_dir() else (pytest.mark.slow,)
pytestmark = [] if FOLDER.is_dir() else [pytest.mark.timeout(1200)]  # for who comes first


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return the folder of the vocabularies, fetched if need be."""
    if FOLDER.is_dir():
        return FOLDER
    if "STERNA_LLAMA_CPP" in os.environ:
        pytest.skip(f"no folder {FOLDER}")
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        CACHE,
        ARCHIVE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    archives = sorted(CACHE.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        pytest.skip(f"pip could not fetch {ARCHIVE}: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    part = CACHE / f"{ARCHIVE}.{os.getpid()}"
    part.mkdir()
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            folders, _, name = member.name.rpartition("/")
            if member.isfile() and folders.endswith(MODELS) and name.startswith("ggml-vocab-"):
                source = archive.extractfile(member)
                assert source is not None
                (part / name).write_bytes(source.read())
    archives[0].unlink()
    part.rename(FOLDER)
    return FOLDER


def load(folder: Path, name: str) -> Tokenizer:
    with GgufFile.open(folder / f"ggml-vocab-{name}.gguf") as file:
        return Tokenizer.from_metadata(file.metadata, name)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=fetches) for n in QUICK),
        *(pytest.param(n, marks=pytest.mark.slow) for n in CHECKED),
    ],
)
def test_ids_are_llama_cpps(folder: Path, name: str) -> None:
    tok = load(folder, name)
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == len(expected) >= 47
    for text, ids in zip(texts, expected, strict=True):
        assert tok.encode(text, add_bos=False) == ids, text
        assert tok.decode(ids) == text
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("name", [pytest.param(name, marks=fetches) for name in REFUSED])
def test_other_kinds_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match=rf"^{name}: tokenizer\.ggml\.{REFUSED[name]}"):
        load(folder, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "llama-spm"])
def test_speed(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    started_s = time.process_time()
    tok = load(folder, name)
    report = [f"{name}: built in {time.process_time() - started_s:.1f} s"]
    prose = "\n".join(path.read_text() for path in sorted(ROOT.glob("*.md"))) * 8
    code = "\n".join(path.read_text() for path in sorted((ROOT / "runtime").glob("*.py")))
    for name, text in (("prose", prose), ("code", code)):
        started_s = time.process_time()
        ids = tok.encode(text, add_bos=False)
        rate = len(text.encode()) / (time.process_time() - started_s) / 1e6
        report.append(f"{name} {rate:.1f} MB/s ({len(ids)} tokens)")
        assert tok.decode(ids) == text
    for part in ("a", " ", "\n", "7", "\U0001f600"):
        text = part * (1_000_000 // len(part.encode())) + "x"
        started_s = time.process_time()
        ids = tok.encode(text, add_bos=False)
        report.append(f"1 MB of {part!a} {time.process_time() - started_s:.1f} s")
        assert tok.decode(ids) == text
    with capsys.disabled():
        print("\n" + ", ".join(report), end="")
