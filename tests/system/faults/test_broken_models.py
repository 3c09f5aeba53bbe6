"""Model files that cannot be run: one clear line, the documented exit code, and nothing half started."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sterna.runtime.config import embedded_model

from .. import gguf_copy as gc
from ..conftest import Serve
from ..daemon_process import Daemon, left_behind, processes_in, wait_until


def error_of(daemon: Daemon, code: int) -> str:
    """Wait for the end of a daemon that cannot start; return its one line."""
    assert daemon.wait(60) == code, daemon.stderr
    assert daemon.stdout == ""
    (line,) = [line for line in daemon.stderr.splitlines() if line.startswith("sterna: ")]
    assert line == daemon.stderr.splitlines()[-1]
    assert line.startswith("sterna: error: ")
    wait_until(lambda: not processes_in(daemon.folder), 3.0, "all processes are gone")
    assert left_behind(daemon.folder) == []
    return line.removeprefix("sterna: error: ")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def truncated(path: Path) -> Path:
    return write(path, embedded_model().read_bytes()[:2_000_000])


def header_only(path: Path) -> Path:
    return write(path, embedded_model().read_bytes()[:1000])


def wrong_magic(path: Path) -> Path:
    return write(path, b"GGML" + embedded_model().read_bytes()[4:])


def unknown_architecture(path: Path) -> Path:
    return gc.copy_model(path, architecture="unheardof")


def missing_tensor(path: Path) -> Path:
    return gc.copy_model(path, gc.without("blk.3.ffn_up_exps.weight"))


def missing_norm(path: Path) -> Path:
    return gc.copy_model(path, gc.without("blk.2.attn_kv_a_norm.weight"))


def misshapen_tensor(path: Path) -> Path:
    return gc.copy_model(path, gc.half_of("blk.1.attn_output.weight"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: write(path, b""), ["empty"]),
        (header_only, ["byte "]),
        (truncated, ["byte ", "2000000"]),
        (wrong_magic, ["GGML"]),
        (unknown_architecture, ["unheardof", "deepseek2"]),
        (missing_tensor, ["blk.3.ffn_up_exps.weight"]),
        (missing_norm, ["blk.2.attn_kv_a_norm.weight"]),
        (misshapen_tensor, ["blk.1.attn_output.weight", "128", "256"]),
    ],
)
def test_broken_file(serve: Serve, tmp_path: Path, make: Callable[[Path], Path], words: list[str]) -> None:
    path = make(tmp_path / "model.gguf")
    line = error_of(serve(str(path), ready=False), 65)
    assert str(path) in line
    for word in words:
        assert word in line, line


def test_copy_of_the_model_is_sound(serve: Serve, tmp_path: Path) -> None:
    """The tests above must fail by what they change, not by how they write."""
    daemon = serve(str(gc.copy_model(tmp_path / "model.gguf")))
    with daemon.client() as client:
        assert client.generate("Once upon a time", max_tokens=4).usage.completion_tokens == 4


def test_missing_file(serve: Serve, tmp_path: Path) -> None:
    line = error_of(serve(str(tmp_path / "none.gguf"), ready=False), 66)
    assert line == f"{tmp_path}/none.gguf: no such model file (No such file or directory)"


def test_folder_instead_of_a_file(serve: Serve, tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(serve(str(tmp_path), ready=False), 65)


def test_device_instead_of_a_file(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert f"{path}: expected a GGUF file, found a device" in error_of(serve(str(path), ready=False), 65)


def test_file_that_shrinks_under_a_running_daemon_harms_nobody(serve: Serve, tmp_path: Path) -> None:
    """All weights are in memory: the file is only read again when something is replaced."""
    path = tmp_path / "model.gguf"
    shutil.copy(embedded_model(), path)
    path.chmod(0o600)
    daemon = serve(str(path))
    with path.open("r+b") as file:
        file.truncate(1000)
    with daemon.client() as client:
        assert client.generate("Once upon a time", max_tokens=8).usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--workers", "many"], 78, "--workers: expected an integer from 0 to 256, found 'many'"),
        (["--workers", "1000"], 78, "--workers: expected an integer from 0 to 256, found 1000"),
        (["--unheard-of", "1"], 64, "No such option '--unheard-of'"),
        (["a.gguf", "b.gguf"], 64, "unexpected extra argument"),
        (["--config", "/nowhere.toml"], 78, "config file /nowhere.toml: No such file or directory"),
        (["--start-timeout", "0.1"], 70, "0.1 s"),
    ],
)
def test_wrong_settings(serve: Serve, arguments: list[str], code: int, words: str) -> None:
    assert words in error_of(serve(*arguments, ready=False), code)


def test_kernels_of_another_machine_are_a_wrong_setting(serve: Serve) -> None:
    foreign = "avx2" if platform.machine() == "aarch64" else "neon"
    line = error_of(serve(ready=False, env={"STERNA_KERNEL_TARGET": foreign}), 78)
    assert f"STERNA_KERNEL_TARGET={foreign}: this machine has no such instructions; expected one of" in line


def test_out_of_memory_for_the_streams_is_one_line(serve: Serve) -> None:
    line = error_of(serve("--max-num-seqs", "1024", ready=False, limit_bytes=2**30), 71)
    assert line.startswith("no memory for the streams arena")
    assert "962.2 MiB" in line
