"""The embedded model with its ternary weights stored as other types: it runs, and says nearly the same."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from sterna.runtime.client.results import Result

from . import gguf_copy as gc
from .conftest import Serve
from .daemon_process import Daemon
from .requests import Request, run_alone

TEXT = (
    "Once upon a time there was a poor woodcutter who lived with his wife and his two children "
    "at the edge of a great forest."
)
REQUEST: Request = {
    "prompt": TEXT, "max_tokens": 16, "temperature": 0.0, "prompt_logprobs": True, "ignore_eos": True,
}  # fmt: skip


def mean_difference(one: Result, other: Result) -> float:
    pairs = zip(one.prompt_logprobs or (), other.prompt_logprobs or (), strict=True)
    return statistics.mean(abs(a - b) for a, b in pairs if a is not None and b is not None)


# TQ1_0 is the same numbers in other bits. The others hold them exactly or nearly; what differs is that
# ternary weights meet activations of 8 bits.
LIMITS = {Type.TQ1_0: 1e-6, Type.F32: 0.03, Type.F16: 0.03, Type.BF16: 0.04, Type.Q8_0: 0.04}


# A daemon for each; the formats are compared kernel by kernel elsewhere.
QUICK = (Type.Q8_0,)


@pytest.mark.parametrize(
    "tensor_type",
    [
        tensor_type if tensor_type in QUICK else pytest.param(tensor_type, marks=pytest.mark.slow)
        for tensor_type in LIMITS
    ],
    ids=lambda tensor_type: tensor_type.name,
)
def test_type_of_the_experts(serve: Serve, shared: Daemon, tmp_path: Path, tensor_type: Type) -> None:
    path = gc.copy_model(tmp_path / "model.gguf", gc.experts_as(tensor_type))
    daemon = serve(str(path), "--workers", "2")
    (expected,) = run_alone(shared.url, [REQUEST])
    (found,) = run_alone(daemon.url, [REQUEST])
    difference = mean_difference(expected, found)
    print(f"\n{tensor_type.name}: mean difference of prompt log-probabilities {difference:.5f}")
    assert difference < LIMITS[tensor_type]
    assert len(found.token_ids) == 16
