"""No process compiles a kernel, or loads one, after the daemon is ready: in no mode, for no request."""

from __future__ import annotations

from pathlib import Path

import pytest

from sterna import Client

from ...families.tiny_files import write
from ...families.tiny_models import NAMES, tiny_model
from ..conftest import Serve
from ..daemon_process import Daemon

TIGHT = ("--workers", "1", "--resident-experts", "25%")

MODES: dict[str, tuple[str, ...]] = {
    "plain": ("--workers", "2"),
    "one thread": ("--workers", "1", "--threads", "1"),
    "prefetch auto": TIGHT,
    "prefetch on": (*TIGHT, "--prefetch", "on"),
    "budget": (*TIGHT, "--routing", "budget", "--prefetch", "on"),
    "trace": (*TIGHT, "--trace", "{folder}/trace.csv"),
    "trace, all resident": ("--workers", "1", "--trace", "{folder}/trace.csv"),
    "float32 cache": ("--workers", "1", "--cache-type", "f32"),
    "base 3": ("--workers", "1", "--ternary", "1.6"),
    "one scale a token": ("--workers", "1", "--activations", "token"),
    "small batches": ("--workers", "1", "--max-batch-tokens", "64", "--max-num-seqs", "2"),
}


def ask_everything(client: Client) -> None:
    """Send one request of each sort: long and short prompts, scores, embeddings, one token per step."""
    context = client.connect().model.context_length
    ids = [5 + i % 60 for i in range(min(context, 200) - 20)]
    client.generate(token_ids=ids, max_tokens=8, ignore_eos=True, seed=1)
    client.generate(token_ids=ids[:3], max_tokens=8, ignore_eos=True, temperature=0.0, logprobs=3)
    client.generate(token_ids=ids, max_tokens=1, prompt_logprobs=True)
    client.generate(token_ids=ids[:12], max_tokens=1, prompt_logprobs=True, stepped=True)
    client.generate(token_ids=ids[:12], max_tokens=4, lost_mass=0.02, stepped=True, ignore_eos=True)
    client.generate(token_ids=ids[:2], max_tokens=4, lost_mass=0.02, ignore_eos=True)
    for pooling in ("mean", "cls", "last"):
        client.embed([ids[:5], ids[:40]], pooling=pooling)


def check(daemon: Daemon) -> None:
    with daemon.client() as client:
        ask_everything(client)
    assert daemon.late_kernels() == []


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_meets_a_kernel_that_is_not_there(serve: Serve, tmp_path: Path, mode: str) -> None:
    check(serve(*(word.format(folder=tmp_path) for word in MODES[mode])))


QUICK = ("deepseek2-v3", "gpt-oss", "qwen3", "bitnet")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_no_family_does(serve: Serve, tmp_path: Path, name: str) -> None:
    path = write(tiny_model(name, 256), tmp_path / "tiny.gguf", "Q8_0", "Q4_K")
    dense = name in ("llama", "bitnet", "bitnet-b1.58", "qwen2", "qwen3")
    check(serve(str(path), "--workers", "1", *(() if dense else ("--resident-experts", "60%"))))


@pytest.mark.slow
@pytest.mark.parametrize("types", ["F16", "BF16", "Q4_0", "Q6_K", "Q3_K"])
def test_no_file_type_does(serve: Serve, tmp_path: Path, types: str) -> None:
    check(serve(str(write(tiny_model("qwen3moe", 256), tmp_path / "tiny.gguf", types)), "--workers", "1"))


@pytest.mark.parametrize("precision", ["default", pytest.param("memory-constrained", marks=pytest.mark.slow)])
def test_converted_experts_do_not(serve: Serve, tmp_path: Path, precision: str) -> None:
    path = write(tiny_model("qwen3moe", 256), tmp_path / "tiny.gguf", "Q8_0")
    check(serve(str(path), "--workers", "1", "--precision", precision))
