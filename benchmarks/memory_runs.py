"""One run of `memory.py`: a daemon of ours or llama-bench, cold, in its cgroup, and what it did.

Not in here: which runs there are, medians, output.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import psutil
from memory_cgroup import MemoryCgroup, Usage, make_cold

from sterna.runtime.client.client import Client
from sterna.shm.errors import SternaError

SERVE: Final = [sys.executable, "-m", "sterna.runtime.cli.main", "serve"]
_READY: Final = b"ready socket="
_STOP_S: Final = 30.0
# What status()["experts"] counts since the start, if it does: lookups that found an expert, and that did not.
_HITS, _MISSES = "hits", "misses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a run has to do; `confined`: in a cgroup, which also tells its peak of memory."""

    model: Path
    limit_bytes: int | None
    confined: bool
    prompt_tokens: int
    answer_tokens: int
    seed: int
    peer_threads: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a run did, None for what is not known; rates in tokens per second, per token of the answer."""

    runner: str
    limit_bytes: int | None
    prompt_rate: float | None = None
    answer_rate: float | None = None
    faults_per_token: float | None = None
    read_bytes_per_token: float | None = None
    hit_rate: float | None = None
    peak_bytes: float | None = None
    reread_bytes: float | None = None
    """Bytes of files that the kernel had dropped for want of memory, in the whole run."""
    cached_at_start: float | None = None
    start_s: float | None = None
    load_at_start: float | None = None
    """Load average of the minute before."""
    error: str | None = None
    """None or one line."""


class Runner(Protocol):
    """Somebody who can do a task."""

    name: str

    def run(self, task: Task) -> Measurement:
        """Return what was measured; a run that fails is a measurement with an error."""


class RunFailed(Exception):
    """A run ended before it was done; the text is one line."""


@contextlib.contextmanager
def _group(task: Task) -> Iterator[MemoryCgroup | None]:
    if not task.confined:
        yield None
        return
    with MemoryCgroup(task.limit_bytes) as group:
        yield group


def _last_line(stderr: Path) -> str:
    lines = [line.strip() for line in stderr.read_text(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][-300:]}" if lines else ""


def _death(code: int, stderr: Path) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if -code == signal.SIGKILL:
        how += " (out of memory, perhaps)"
    return how + _last_line(stderr)


@contextlib.contextmanager
def _daemon(arguments: list[str], group: MemoryCgroup | None, timeout_s: float) -> Iterator[tuple[str, int]]:
    """Run `sterna serve` until the block ends; yield its URL and process id once it is ready."""
    with tempfile.TemporaryDirectory(prefix="stb-", ignore_cleanup_errors=True) as folder:
        url = f"ipc://{folder}/sterna.sock"
        stderr_path = Path(folder) / "stderr"
        command = [*SERVE, *arguments, "--socket", url]
        if group is not None:
            command = group.command_inside(command)
        with stderr_path.open("wb") as stderr:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        try:
            _await_ready(child, stderr_path, timeout_s)
            yield url, child.pid
        finally:
            child.terminate()
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(_STOP_S)
            if child.stdout is not None:
                child.stdout.close()


def _await_ready(child: subprocess.Popen[bytes], stderr: Path, timeout_s: float) -> None:
    if child.stdout is None:
        raise RunFailed("the daemon has no pipe for its output")
    until_s = time.monotonic() + timeout_s
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not any(line.startswith(_READY) for line in seen.split(b"\n")[:-1]):
            if not selector.select(max(0.0, until_s - time.monotonic())):
                raise RunFailed(f"not ready after {timeout_s:g} s{_last_line(stderr)}")
            part = os.read(child.stdout.fileno(), 4096)
            if not part:
                raise RunFailed(_death(child.wait(_STOP_S), stderr))
            seen += part


def compile_kernels(model: Path, timeout_s: float) -> None:
    """Start and stop a daemon without a limit, so that no run compiles what this model needs."""
    with _daemon([str(model), "--max-num-seqs", "1", "--ctx-size", "512"], None, timeout_s):
        pass


class Ours:
    """`sterna serve` with some flags; asked through the blocking client."""

    def __init__(self, name: str, flags: tuple[str, ...] = ()) -> None:
        self.name = name
        self._flags = flags

    def run(self, task: Task) -> Measurement:
        """See `Runner`."""
        context = str(max(task.prompt_tokens, task.answer_tokens) + 64)
        arguments = [str(task.model), *self._flags, "--max-num-seqs", "1", "--ctx-size", context]
        cached, load = make_cold(task.model), os.getloadavg()[0]
        began_s = time.monotonic()
        try:
            with _group(task) as group, _daemon(arguments, group, task.timeout_s) as (url, pid):
                start_s = time.monotonic() - began_s
                found = self._ask(task, url, pid)
                return Measurement(
                    runner=self.name,
                    limit_bytes=task.limit_bytes,
                    peak_bytes=group.peak_bytes if group else None,
                    reread_bytes=group.reread_bytes if group else None,
                    cached_at_start=cached,
                    load_at_start=load,
                    start_s=start_s,
                    **found,
                )
        except (RunFailed, SternaError, psutil.Error) as e:
            return Measurement(runner=self.name, limit_bytes=task.limit_bytes, error=str(e))

    def _ask(self, task: Task, url: str, pid: int) -> dict[str, Any]:
        """Return prompt_rate, answer_rate and so on."""
        with Client(url, timeout_s=task.timeout_s) as client:
            tokens = np.random.default_rng(task.seed).integers(
                1, client.connect().model.vocab_size, (3, task.prompt_tokens)
            )
            warm, prompt, start = tokens.tolist()

            def ask(token_ids: list[int], count: int) -> Any:  # noqa: ANN401 - a Result
                return client.generate(
                    token_ids=token_ids, max_tokens=count, temperature=0.0, ignore_eos=True, add_bos=False
                )

            ask(warm[:8], 2)
            prefill = ask(prompt, 1)
            before, counted = Usage.of(pid), client.status().get("experts")
            answer = ask(start[:8], task.answer_tokens)
            used, counts = Usage.of(pid) - before, client.status().get("experts")
        made = answer.usage.completion_tokens
        # The first token comes out of the prompt's step.
        return {
            "prompt_rate": task.prompt_tokens / prefill.timings.prefill_s,
            "answer_rate": (made - 1) / answer.timings.decode_s if made > 1 else None,
            "faults_per_token": used.major_faults / made,
            "read_bytes_per_token": used.read_bytes / made,
            "hit_rate": _hit_rate(counted, counts),
        }


def _hit_rate(before: object, after: object) -> float | None:
    """Return the share of lookups between two states that found their expert."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return None
    if not all(key in counts for key in (_HITS, _MISSES) for counts in (before, after)):
        return None
    hits, misses = (after[key] - before[key] for key in (_HITS, _MISSES))
    return float(hits / (hits + misses)) if hits + misses else None


class Llama:
    """llama-bench: prompt and answer are two tests of one process, each after a warm-up of its own."""

    def __init__(self, name: str, program: Path) -> None:
        self.name = name
        self._program = program.resolve()

    def run(self, task: Task) -> Measurement:
        """See `Runner`."""
        command = [
            str(self._program), "-m", str(task.model), "-p", str(task.prompt_tokens),
            "-n", str(task.answer_tokens), "-t", str(task.peer_threads), "-r", "1", "-o", "json",
        ]  # fmt: skip
        cached, load = make_cold(task.model), os.getloadavg()[0]
        try:
            with _group(task) as group, tempfile.TemporaryDirectory(prefix="stb-") as folder:
                inside = group.command_inside(command) if group else command
                tests, used = self._call(inside, Path(folder) / "stderr", task.timeout_s)
                rates = {"prompt" if test["n_prompt"] else "answer": test["avg_ts"] for test in tests}
                tokens = task.prompt_tokens + task.answer_tokens
                return Measurement(
                    runner=self.name,
                    limit_bytes=task.limit_bytes,
                    prompt_rate=rates.get("prompt"),
                    answer_rate=rates.get("answer"),
                    faults_per_token=used.major_faults / tokens,
                    read_bytes_per_token=used.read_bytes / tokens,
                    peak_bytes=group.peak_bytes if group else None,
                    reread_bytes=group.reread_bytes if group else None,
                    cached_at_start=cached,
                    load_at_start=load,
                )
        except RunFailed as e:
            return Measurement(runner=self.name, limit_bytes=task.limit_bytes, error=str(e))

    def _call(self, command: list[str], stderr_path: Path, timeout_s: float) -> tuple[Any, Usage]:
        """Return the parsed output and what the process used until it had written it."""
        libraries = f"{self._program.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        with (
            stderr_path.open("wb") as stderr,
            (stderr_path.parent / "stdout").open("w+b") as stdout,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "LD_LIBRARY_PATH": libraries},
            ) as child,
        ):
            try:
                # Wait, but leave the process to be read once more: its counters go when it is reaped.
                used = _await_end(child, timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                raise RunFailed(f"not done after {timeout_s:g} s{_last_line(stderr_path)}") from None
            except BaseException:  # Ctrl-C or SIGTERM: leaving the block waits for the process
                child.kill()
                raise
            code = child.wait(_STOP_S)
            if code:
                raise RunFailed(_death(code, stderr_path))
            stdout.seek(0)
            return json.loads(stdout.read()), used


def _await_end(child: subprocess.Popen[bytes], timeout_s: float) -> Usage:
    until_s = time.monotonic() + timeout_s
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until_s:
            raise subprocess.TimeoutExpired(child.args, timeout_s)
        time.sleep(0.02)
    return Usage.of(child.pid)
