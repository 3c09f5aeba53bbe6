"""`sterna warm` and `sterna bench kernels` as users and scripts meet them, on tiny sizes; real kernels."""

from __future__ import annotations

import json
import os
import platform
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sterna.runtime.bench.llama import LlamaCpp, best_rate, their_name
from sterna.runtime.cli.render import grid
from sterna.shm.errors import ModelFileError, StartFailed, UsageError
from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.checkpoint.held.samples import file_type_of, sample
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, dequantize
from sterna.workers.pinned import PinnedThreads

COMMAND = [sys.executable, "-m", "sterna.runtime.cli.main"]
ENV = {key: value for key, value in os.environ.items() if not key.startswith("STERNA_")}
compiles = pytest.mark.timeout(600)  # everything, in an empty cache
TINY = ("--shapes", "256x512", "--tokens", "8,1", "--seconds", "0.005", "--threads", "1")
# What the program prints, from a run on x86-64; elsewhere the cycles are 0.
PRINTED = """tq2_0
  vec_dot_q
    2048 values (0.01 MB)
      min cycles/32 vals   :      7.22
      avg cycles/32 vals   :      9.02
      float32 throughput   :     27.20 GB/s
      quantized throughput :      1.75 GB/s
    16384 values (0.06 MB)
      min cycles/32 vals   :      5.00
      avg cycles/32 vals   :     10.00
      float32 throughput   :     32.00 GB/s
      quantized throughput :      2.06 GB/s

"""


def sterna(*arguments: str, timeout: float = 60, **env: str) -> tuple[int, str, str]:
    """Run the command and return its exit code, stdout and stderr."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENV | env, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def error_line(stderr: str) -> str:
    """Return the text of the last line, which is the only error."""
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("sterna: error: ")] == lines[-1:]
    assert "Traceback" not in stderr
    return lines[-1].removeprefix("sterna: error: ")


# ---- warm ----


@pytest.mark.slow  # a minute; every start compiles the same way
@compiles
def test_warm_compiles_once() -> None:
    code, out, err = sterna("warm", timeout=600)
    assert code == 0, err
    assert "kernels for " in out
    code, out, err = sterna("warm", "--json", timeout=600)
    assert code == 0, err
    body = json.loads(out)
    assert set(body) == {"seconds", "compiled", "kept", "target", "cache", "steps"}
    assert body["compiled"] == 0
    assert body["kept"] == len(list(Path(body["cache"]).glob("*/*.nbc"))) > 10
    assert all(set(step) == {"name", "seconds"} for step in body["steps"])
    assert sterna("warm")[1].startswith(f"all {body['kept']} kernels for {body['target']} were there")


@pytest.mark.slow
@compiles
def test_warm_uses_the_cache_of_the_daemon() -> None:
    """The nursery's own environment names the same folder."""
    body = json.loads(sterna("warm", "--json", timeout=600)[1])
    script = (
        "import os\nfrom sterna.runtime.processes.nursery import Nursery\nimport socket\n"
        "Nursery(socket.socketpair()[0])._prepare_imports()\nprint(os.environ['NUMBA_CACHE_DIR'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout.strip() == body["cache"]


def test_warm_gives_up_in_time(tmp_path: Path) -> None:
    code, out, err = sterna(
        "warm", "--timeout", "0.1", NUMBA_CACHE_DIR=str(tmp_path), STERNA_KERNEL_TARGET="generic"
    )
    assert (code, out) == (70, "")
    assert error_line(err).startswith("kernels not compiled after 0.1 s; last step that was done: ")


def test_warm_without_a_place_for_kernels() -> None:
    code, out, err = sterna("warm", NUMBA_CACHE_DIR="/proc/none", STERNA_KERNEL_TARGET="generic")
    assert (code, out) == (77, "")
    assert error_line(err).startswith("no folder for compiled kernels: /proc/none/kernels-")


def test_warm_with_an_unknown_target() -> None:
    code, _, err = sterna("warm", STERNA_KERNEL_TARGET="avx1024")
    assert code == 78
    assert "STERNA_KERNEL_TARGET=avx1024" in error_line(err)


def test_warm_with_the_target_of_another_machine() -> None:
    """LLVM aborted the process: exit code 134."""
    foreign = "avx2" if platform.machine() == "aarch64" else "neon"
    code, _, err = sterna("warm", STERNA_KERNEL_TARGET=foreign)
    assert code == 78
    assert f"STERNA_KERNEL_TARGET={foreign}: this machine has no such" in error_line(err)
    assert error_line(err).endswith("generic")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_warm_interrupted(tmp_path: Path, number: signal.Signals, code: int) -> None:
    env = ENV | {"NUMBA_CACHE_DIR": str(tmp_path), "STERNA_KERNEL_TARGET": "generic"}
    with subprocess.Popen([*COMMAND, "warm"], stderr=subprocess.PIPE, text=True, env=env) as child:
        assert child.stderr is not None
        lines = iter(child.stderr)
        assert any("compiling kernels" in line for line in lines)
        child.send_signal(number)
        assert child.wait(30) == code
        assert "".join(lines).strip() == ""


# ---- bench kernels ----


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    code, out, err = sterna("bench", "kernels", "--json", "--formats", "tq2_0,Q8,f16", *TINY, timeout=600)
    assert code == 0, err
    body: dict[str, Any] = json.loads(out)
    return body


@compiles
def test_bench_report(report: dict[str, Any]) -> None:
    assert set(report) == {
        "schema", "machine", "seconds_per_figure", "read_bandwidth", "peak_gmac_per_s", "products", "packing",
        "experts", "llama_cpp",
    }  # fmt: skip
    assert (report["schema"], report["llama_cpp"]) == (1, None)
    machine = report["machine"]
    for name in ("cpu", "target", "system", "python", "numba", "llvmlite", "numpy", "sterna"):
        assert isinstance(machine[name], str)
        assert machine[name]
    read = report["read_bandwidth"]
    assert list(read["gb_per_s"]) == ["1"]
    assert read["streaming_threads"] == 1
    assert min(read["gb_per_s"]["1"], report["peak_gmac_per_s"]) > 0


@compiles
def test_bench_products(report: dict[str, Any]) -> None:
    rows = report["products"]
    found = [(row["format"], row["weights"], row["tokens"]) for row in rows]
    each = [("cached", 1), ("cached", 8), ("streamed", 1)]
    assert found == [(form, *case) for form in ("TL1", "Q8", "F16") for case in each]
    for row in rows:
        assert (row["rows"], row["columns"], row["threads"]) == (256, 512, 1)
        assert 0 < row["seconds"] <= row["median_seconds"]
        assert row["gmac_per_s"] == pytest.approx(256 * 512 * row["tokens"] / row["seconds"] / 1e9)
        nbytes = MatrixShape(form=Format[row["format"]], rows=256, columns=512).nbytes
        assert row["gb_per_s"] == pytest.approx(nbytes / row["seconds"] / 1e9)
        assert (row["bandwidth_share"] is not None) == (row["weights"] == "streamed")
        assert (row["peak_share"] is not None) == (row["weights"] == "cached" and row["format"] != "F16")


@compiles
def test_bench_experts_and_packing(report: dict[str, Any]) -> None:
    for row in report["experts"]:
        assert (row["d_model"], row["d_ff"]) == (256, 512)
        assert row["experts"] >= 1
        assert row["ratio"] == row["expert_seconds"] / row["products_seconds"] > 0
    assert [row["format"] for row in report["experts"]] == ["TL1", "Q8", "F16"]
    assert [row["file_type"] for row in report["packing"]] == ["TQ2_0", "Q8_0", "F16"]
    assert all(row["gb_per_s"] > 0 for row in report["packing"])
    assert [row["quantise_seconds_per_token"] > 0 for row in report["packing"]] == [True, True, False]


@pytest.mark.slow
@compiles
def test_bench_prints_markdown_into_a_pipe_and_frames_on_a_terminal() -> None:
    arguments = ("bench", "kernels", "--formats", "TL1", *TINY)
    code, out, err = sterna(*arguments, timeout=600)
    assert code == 0, err
    for title in ("Matrix products", "A whole expert, one token", "Packing from file bytes"):
        assert f"\n{title}\n\n| " in out
    assert "| TL1 " in out
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, *arguments], stdout=theirs, stderr=subprocess.PIPE, env=ENV) as child:
        os.close(theirs)
        shown = read_all(ours)
        assert child.wait(60) == 0
    assert "Matrix products" in shown
    assert "┃" in shown


def read_all(terminal: int) -> str:
    """Return what comes out of a terminal until its other end is closed, which is an OSError."""
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError:
        pass
    finally:
        os.close(terminal)
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shapes", "2048"], "--shapes: expected ROWSxCOLUMNS such as 2048x1536, found '2048'"),
        (["--shapes", "0x256"], "--shapes: expected an integer from 1 to 1048576, found '0'"),
        (["--shapes", "64x288", "--formats", "Q8,TL1"], "--shapes: 64x288: TL1 needs columns that are a"),
        (["--tokens", "1,,8"], "--tokens: expected an integer from 1 to 4096, found ''"),
        (["--formats", "TL1,Q9"], "--formats: 'q9' is unknown; expected some of F32, F16"),
        (["--threads", "1024"], "--threads: 1024, but this process may use"),
        (["--threads", "0"], "0 is not in the range"),
        (["--seconds", "x"], "'x' is not a valid float"),
        (["--llama-cpp", "/none"], "--llama-cpp: no test-quantize-perf in /none (nor in its bin"),
    ],
)  # fmt: skip
def test_wrong_command_line(arguments: list[str], text: str) -> None:
    code, out, err = sterna("bench", "kernels", *arguments)
    assert (code, out) == (64, "")
    assert text in error_line(err)
    assert err.count("\n") == 1  # found before anything was compiled


@compiles
def test_a_matrix_that_does_not_fit_the_memory_is_refused() -> None:
    code, out, err = sterna("bench", "kernels", "--formats", "Q8", "--shapes", "1048576x1048576", timeout=600)
    assert (code, out) == (71, "")
    assert "matrices of 1048576x1048576 Q8 need" in error_line(err)


def test_bench_without_a_command() -> None:
    code, out, err = sterna("bench")
    assert (code, out) == (64, "")
    assert "kernels" in err


# ---- matrices ----


@pytest.mark.parametrize("form", list(Format), ids=lambda form: form.name)
def test_random_matrices_are_valid_and_sane(form: Format) -> None:
    """Each format has one; no weight is zero by chance of its scale, denormal or infinite, and it packs."""
    file_type = TYPES_BY_NAME[file_type_of(form)]
    raw = sample(file_type, 32, 512, np.random.default_rng(5))
    values = dequantize(file_type, raw, (32, 512))
    sizes = np.abs(values[values != 0])
    assert np.isfinite(values).all()
    assert 1e-5 < sizes.min() <= sizes.max() <= 8 * 127
    assert len(sizes) > values.size // 2
    shape = MatrixShape(form=form, rows=32, columns=512)
    packed = np.zeros(shape.nbytes, np.uint8)
    pack_matrix(raw, file_type, shape, packed, 0)
    assert packed.any()


def test_both_ternary_file_types_can_be_made() -> None:
    for name in ("TQ1_0", "TQ2_0"):
        values = dequantize(
            TYPES_BY_NAME[name], sample(TYPES_BY_NAME[name], 16, 256, np.random.default_rng(1)), (16, 256)
        )
        scales = np.abs(values).max(axis=1, keepdims=True)
        assert set(np.unique(values / scales)) == {-1.0, 0.0, 1.0}
    with pytest.raises(KeyError):
        sample(TYPES_BY_NAME["IQ1_S"], 16, 256, np.random.default_rng(1))
    with pytest.raises(ModelFileError):
        sample(TYPES_BY_NAME["TQ1_0"], 16, 100, np.random.default_rng(1))


# ---- the peer ----


def program(folder: Path, text: str) -> Path:
    """Put an executable where the peer's program would be."""
    path = folder / "test-quantize-perf"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_rate_is_the_best_of_all_lengths() -> None:
    first = 27.20 * 2**30 / 4 * 9.02 / 7.22
    second = 32.00 * 2**30 / 4 * 10 / 5
    assert best_rate(PRINTED, "x") == pytest.approx(max(first, second))
    without_cycles = PRINTED.replace("7.22", "0.00").replace("5.00", "0.00")
    assert best_rate(without_cycles, "x") == pytest.approx(32.00 * 2**30 / 4)
    with pytest.raises(StartFailed, match="no figures"):
        best_rate("tq2_0\n", "x")


def test_their_names() -> None:
    assert [their_name(name) for name in ("TQ2_0", "Q4_K", "IQ4_NL")] == ["tq2_0", "q4_K", "iq4_nl"]


@pytest.mark.parametrize("subfolder", ["", "bin", "build/bin"])
def test_a_build_is_found_in_three_folders(tmp_path: Path, subfolder: str) -> None:
    program(tmp_path / subfolder, "echo '  --type TYPE  set test type as f16 tq2_0 q4_K (all)'; exit 1")
    peer = LlamaCpp.find(tmp_path)
    assert peer.program == tmp_path / subfolder / "test-quantize-perf"
    assert peer.measures("Q4_K")
    assert not peer.measures("F32")


def test_the_program_gets_its_arguments_and_libraries(tmp_path: Path) -> None:
    said = tmp_path / "said"
    path = program(tmp_path, f"echo \"$LD_LIBRARY_PATH $*\" >{said}\ncat <<'END'\n{PRINTED}END")
    with PinnedThreads(1) as thread:
        rate = LlamaCpp(path, frozenset({"tq2_0"})).weights_per_s("TQ2_0", 2048, 0.001, thread)
    assert rate == pytest.approx(32.00 * 2**30 / 2)
    library_path, arguments = said.read_text().split(" ", 1)
    assert library_path.split(":")[0] == str(tmp_path)
    assert arguments == "--op vec_dot_q --type tq2_0 -i 1085 --size 2048 --size 16384\n"


def test_a_program_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    path = program(tmp_path, "echo one >&2; echo 'libggml.so: cannot open' >&2; exit 127")
    with pytest.raises(StartFailed, match=r"ended with status 127: libggml\.so: cannot open"):
        LlamaCpp.find(tmp_path)
    path.write_text("no program at all")
    with pytest.raises(StartFailed, match="does not run"):
        LlamaCpp.find(tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=str(tmp_path)):
        LlamaCpp.find(tmp_path)


@compiles
@pytest.mark.bench
def test_against_a_real_build() -> None:
    """STERNA_TEST_LLAMA_CPP names a build of llama.cpp; `make test` leaves this out."""
    folder = os.environ.get("STERNA_TEST_LLAMA_CPP")
    if not folder:
        pytest.skip("STERNA_TEST_LLAMA_CPP is not set")
    code, out, err = sterna(
        "bench", "kernels", "--json", "--formats", "TL1,F32", "--llama-cpp", folder, *TINY, timeout=600
    )
    assert code == 0, err
    rows = json.loads(out)["llama_cpp"]["products"]
    assert [(row["file_type"], row["tokens"]) for row in rows] == [
        ("TQ2_0", 1),
        ("TQ2_0", 8),
    ]  # it has no F32
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours_gmac_per_s"] / row["theirs_gmac_per_s"])
        assert len(row["ratios"]) == 3
        assert min(row["ratios"]) > 0


# ---- tables ----


def test_grid() -> None:
    assert grid(("name", "us"), [("a", "1.5"), ("long name", "10")]).splitlines() == [
        "| name      |  us |",
        "|-----------|----:|",
        "| a         | 1.5 |",
        "| long name |  10 |",
    ]
