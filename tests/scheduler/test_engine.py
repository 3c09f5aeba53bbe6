"""The engine in one process on the embedded model: golden answers, invariance, types, bad weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as ValueType

from sterna.scheduler import state as st
from sterna.scheduler.messages import Sampling, Submit
from sterna.scheduler.model.storage import measure_activations
from sterna.shm.errors import InternalError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import Storage
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

from ..workers.checkpoint.types import ternary_bytes
from . import altered_model as altered
from .local_engine import GREEDY, Generated, LocalEngine

GOLDEN = Path(__file__).parent.parent / "data" / "tales-golden.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
PROMPTS = [case["prompt_ids"] for case in CASES]
NEAR_TIE = 0.05
SEEDED = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, seed=1234)


@cache
def engine(workers: int = 1, max_batch_tokens: int = 512) -> LocalEngine:
    return LocalEngine(workers=workers, max_batch_tokens=max_batch_tokens, streams=16)


@pytest.fixture(scope="module", autouse=True)
def forget_engines() -> Iterator[None]:
    yield
    engine.cache_clear()


# ---- against llama.cpp ----


@cache
def golden_run() -> list[Generated]:
    return engine().run(PROMPTS, 48)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_greedy_tokens_are_llama_cpps_or_differ_at_a_near_tie(number: int) -> None:
    case, found = CASES[number], golden_run()[number]
    expected = case["greedy_ids"][:48]
    assert len(found.tokens) == 48
    different = [
        i for i, (ours, theirs) in enumerate(zip(found.tokens, expected, strict=True)) if ours != theirs
    ]
    if different:
        assert case["gaps"][different[0]] < NEAR_TIE
    same = different[0] if different else 48
    assert same >= 1 or case["gaps"][0] < NEAR_TIE
    theirs = case["greedy_logprobs"][:same]
    assert np.abs(np.array(found.logprobs[:same]) - theirs).max(initial=0.0) < 0.1


def test_prompt_log_probabilities_are_llama_cpps() -> None:
    apart: list[float] = []
    for case, found in zip(CASES, golden_run(), strict=True):
        assert len(found.prompt_logprobs) == len(case["prompt_logprobs"]) == len(case["prompt_ids"]) - 1
        apart += np.abs(np.array(found.prompt_logprobs) - case["prompt_logprobs"]).tolist()
    assert len(apart) > 200
    assert float(np.mean(apart)) < 0.02


# ---- the same bits however it is computed ----


@cache
def alone(number: int, seeded: bool) -> Generated:
    return engine().run([PROMPTS[number]], 16, sampling=[SEEDED if seeded else GREEDY])[0]


VARIANTS: dict[str, Callable[[], LocalEngine]] = {
    "in a batch": engine,
    "in chunks of 7": lambda: engine(max_batch_tokens=7),
    "with 2 workers": lambda: engine(workers=2),
    "with 3 workers in chunks of 24": lambda: engine(workers=3, max_batch_tokens=24),
}


@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_do_not_depend_on_batch_chunks_or_workers(variant: str, seeded: bool) -> None:
    numbers = (1, 4, 11, 12, 8, 6)
    sampling = [SEEDED if seeded else GREEDY] * len(numbers)
    found = VARIANTS[variant]().run([PROMPTS[number] for number in numbers], 16, sampling=sampling)
    for number, ours in zip(numbers, found, strict=True):
        assert ours == alone(number, seeded)


def test_seeds_matter() -> None:
    sampling = [Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, seed=seed) for seed in (1, 1, 2)]
    first, second, third = engine().run([PROMPTS[4]] * 3, 16, sampling=sampling)
    assert first == second
    assert first.tokens != third.tokens


def test_a_step_repeated_gives_the_same() -> None:
    """A worker's loss breaks a step off at any layer; what it wrote is written again."""
    local = LocalEngine(streams=2)
    local.streams.tokens[0, :6] = PROMPTS[0]
    local.streams.tables[0, 0] = 5
    request = Submit(
        stream=0, serial=1, prompt_length=6, committed=6, computed=0, max_length=9, sampling=GREEDY,
        stop_ids=[], logprobs=3, prompt_logprobs=True,
    )  # fmt: skip
    local.engine.admit(request)
    segment = st.Segment(stream=0, serial=1, start=0, count=6, sample=True)
    work = [st.Work(segment=segment, request=request)]
    first = local.engine.step(work)
    assert local.engine.step(work) == first
    assert first[0].token == CASES[0]["greedy_ids"][0]
    assert first[0].score is not None
    assert first[0].score.top[0][0] == first[0].token


def test_a_stop_id_ends_the_answer() -> None:
    tokens = CASES[0]["greedy_ids"]
    (found,) = engine().run([PROMPTS[0]], 48, stop_ids=[tokens[5]])
    assert found.reason == "stop"
    assert found.tokens == tokens[:6]


def test_a_full_context_can_be_used_to_its_last_position() -> None:
    local = LocalEngine(streams=1, context=40)
    (found,) = local.run([PROMPTS[11]], 6)  # 34 tokens
    assert found.reason == "length"
    assert found.tokens == alone(11, False).tokens[:6]


# ---- types of weights ----


def run_file(path: Path) -> list[Generated]:
    return LocalEngine(path, streams=3).run(PROMPTS[:3], 12)


@cache
def ternary_run() -> list[Generated]:
    return engine().run(PROMPTS[:3], 12)


def apart(ours: list[Generated], theirs: list[Generated]) -> float:
    """Return the mean absolute difference of the prompts' log-probabilities."""
    pairs = [
        (a, b)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine.prompt_logprobs, other.prompt_logprobs, strict=True)
    ]
    return float(np.mean([abs(a - b) for a, b in pairs]))


def test_ternary_experts_of_the_other_packing_give_the_same_bits(tmp_path: Path) -> None:
    change = altered.converted(altered.EXPERTS, lambda name: (altered.values(name), Type.TQ1_0))
    assert run_file(altered.write(tmp_path / "m.gguf", change=change)) == ternary_run()


FLOATS = {"F32": Type.F32, "F16": Type.F16}


def as_floats(name: str, tensor_type: Type) -> altered.Tensor:
    return altered.values(name).astype(np.float16 if tensor_type is Type.F16 else np.float32), tensor_type


@cache
def float_run(path: Path) -> list[Generated]:
    change = altered.converted(altered.EXPERTS, lambda name: as_floats(name, Type.F32))
    return run_file(altered.write(path / "f32.gguf", change=change))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> list[Generated]:
    return float_run(tmp_path_factory.mktemp("floats"))


def test_float_experts_run_and_agree(floats: list[Generated]) -> None:
    """Only the activations' int8 codes lie between them and the ternary ones."""
    assert apart(floats, ternary_run()) < 0.02


def test_half_precision_experts_hold_the_same_weights_and_give_the_same_bits(
    floats: list[Generated], tmp_path: Path
) -> None:
    change = altered.converted(altered.EXPERTS, lambda name: as_floats(name, Type.F16))
    assert run_file(altered.write(tmp_path / "m.gguf", change=change)) == floats


def test_bfloat_experts_give_the_bits_of_floats_rounded_so(tmp_path: Path) -> None:
    def rounded(name: str) -> np.ndarray:  # type: ignore[type-arg]
        bits = altered.values(name).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

    brief = altered.converted(altered.EXPERTS, lambda name: (rounded(name), Type.BF16))
    whole = altered.converted(altered.EXPERTS, lambda name: (rounded(name), Type.F32))
    first = run_file(altered.write(tmp_path / "bf16.gguf", change=brief))
    assert first == run_file(altered.write(tmp_path / "f32.gguf", change=whole))
    assert apart(first, ternary_run()) < 0.05


def test_8_bit_experts_run_and_agree(floats: list[Generated], tmp_path: Path) -> None:
    path = altered.write(tmp_path / "m.gguf", change=altered.converted(altered.EXPERTS, altered.exact_q8))
    found = run_file(path)
    assert apart(found, floats) < 0.02


@pytest.mark.parametrize("type_name", ["Q8_0", "F16"])
def test_a_down_projection_may_have_a_type_of_its_own(type_name: str, tmp_path: Path) -> None:
    """Routed, shared and dense alike."""
    down = ("ffn_down_exps", "ffn_down_shexp", "ffn_down.weight")
    convert = altered.exact_q8 if type_name == "Q8_0" else lambda name: as_floats(name, Type.F16)
    found = run_file(altered.write(tmp_path / "m.gguf", change=altered.converted(down, convert)))
    assert apart(found, ternary_run()) < 0.02


def test_a_model_without_an_output_matrix_uses_its_embedding(tmp_path: Path) -> None:
    embedding = altered.tensors()["token_embd.weight"]
    tied = run_file(altered.write(tmp_path / "tied.gguf", change=altered.only("output.weight", None)))
    copied = run_file(
        altered.write(tmp_path / "copied.gguf", change=altered.only("output.weight", embedding))
    )
    assert tied == copied
    assert tied != ternary_run()


def test_softmax_gating_and_no_shared_expert_run(tmp_path: Path) -> None:
    """Another model than the trained one: it need only differ and stay finite."""
    path = altered.write(
        tmp_path / "m.gguf",
        keys={"deepseek2.expert_gating_func": None, "deepseek2.expert_shared_count": (0, ValueType.UINT32)},
        change=lambda name, tensor: None if "shexp" in name else tensor,
    )
    found = run_file(path)
    assert [len(each.tokens) for each in found] == [12] * 3
    assert apart(found, ternary_run()) > 0.1


# ---- weights that are not numbers ----


def with_bad_scale(name: str) -> altered.Tensor:
    """Return a quantised tensor with NaN in the float16 scale of each row's first block."""
    data, tensor_type = altered.tensors()[name]
    raw = np.array(data)
    block, at = {Type.Q8_0: (34, 0), Type.TQ2_0: (66, 64)}[tensor_type]
    assert raw.shape[-1] % block == 0
    raw[..., at], raw[..., at + 1] = 0x00, 0x7E
    return raw, tensor_type


def with_nan(name: str) -> altered.Tensor:
    """Return a float tensor whose first value, of each row if it is a matrix, is NaN."""
    data = np.array(altered.values(name))
    data[..., 0] = np.nan
    return data, Type.F32


BAD = {
    "token_embd.weight": with_bad_scale,
    "blk.0.attn_norm.weight": with_nan,
    "blk.2.attn_q_b.weight": with_bad_scale,
    "blk.3.attn_kv_a_mqa.weight": with_bad_scale,
    "blk.0.ffn_down.weight": with_bad_scale,
    "blk.4.ffn_up_shexp.weight": with_bad_scale,
    "blk.5.ffn_gate_exps.weight": with_bad_scale,
    "blk.1.ffn_gate_inp.weight": with_nan,
    "output_norm.weight": with_nan,
    "output.weight": with_bad_scale,
}


@pytest.mark.parametrize("name", BAD)
def test_a_nan_weight_is_an_error_and_no_answer(name: str, tmp_path: Path) -> None:
    path = altered.write(tmp_path / "m.gguf", change=altered.only(name, BAD[name](name)))
    with pytest.raises(InternalError, match="finite"):
        LocalEngine(path, streams=1).run([PROMPTS[0]], 2)


def test_one_nan_row_of_the_output_matrix_is_an_error(tmp_path: Path) -> None:
    """It would otherwise win every greedy choice: argmax takes a NaN for the largest."""
    data, tensor_type = altered.tensors()["output.weight"]
    raw = np.array(data)
    raw[1000, :2] = 0x00, 0x7E
    path = altered.write(tmp_path / "m.gguf", change=altered.only("output.weight", (raw, tensor_type)))
    with pytest.raises(InternalError, match="finite"):
        LocalEngine(path, streams=1).run([PROMPTS[0]], 2)


def test_base_3_gives_the_same_bits_as_two_bits() -> None:
    plain, small = LocalEngine(streams=3), LocalEngine(streams=3, storage=Storage(small=True))
    assert small.plan.slot_sizes() < plain.plan.slot_sizes()
    assert small.run(PROMPTS[:3], 12) == plain.run(PROMPTS[:3], 12)


def row_scaled(tmp_path: Path) -> Path:
    """Write the embedded model with attention output and shared experts as IQ2_BN, one scale a row.

    The gguf package has no such type: the tensors are written as bytes, and their ids put in after.
    """
    names = [name for name in altered.tensors() if name.endswith(("attn_output.weight", "_shexp.weight"))]

    def convert(name: str) -> altered.Tensor:
        values = altered.values(name)
        codes = (np.sign(values) + 1).astype(np.uint8)
        scales = np.abs(values).max(axis=1).astype(np.float32)
        return ternary_bytes.iq2_bn(codes, scales).reshape(len(values), -1), altered.Type.I8

    path = altered.write(tmp_path / "rows.gguf", change=altered.converted(tuple(names), convert))
    return altered.retyped(
        path, {name: altered.values(name).shape[1] for name in names}, TYPES_BY_NAME["IQ2_BN"].id
    )


def test_row_scaled_matrices_run_with_both_kinds_of_activations(tmp_path: Path) -> None:
    """Close to each other, and to the same weights as float16; the block form in every batch alike."""
    path = row_scaled(tmp_path)
    found = {
        storage.per_token: LocalEngine(path, streams=3, storage=storage).run(PROMPTS[:3], 4)
        for storage in (Storage(), Storage(per_token=True))
    }
    alone = [LocalEngine(path, streams=1).run([prompt], 4)[0] for prompt in PROMPTS[:3]]
    assert alone == found[False]
    for block, token in zip(found[False], found[True], strict=True):
        assert abs(block.logprobs[0] - token.logprobs[0]) < 0.2
    with GgufFile.open(path) as file:
        error = measure_activations(file)
    assert error is not None
    assert 1e-6 < error.block < 1e-3
    assert 1e-6 < error.token < 1e-2
