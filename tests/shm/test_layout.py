"""Layouts: aligned, disjoint, inside the memory, the same on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.shm.layout import ALIGNMENT, Field, Layout, align

RECORD = np.dtype([("a", np.int32), ("b", np.float64)])
DTYPES = (np.uint8, np.int8, np.float16, np.int32, np.int64, np.float32, RECORD)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    drawn = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=8))
    return Layout(Field(name=f"f{i}", dtype=dtype, shape=shape) for i, (dtype, shape) in enumerate(drawn))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts())
def test_fields_are_aligned_disjoint_and_inside(layout: Layout) -> None:
    memory = np.zeros(layout.nbytes, np.uint8)
    end = 0
    for name, field in layout.fields.items():
        assert layout.offsets[name] % ALIGNMENT == 0
        assert layout.offsets[name] >= end
        end = layout.offsets[name] + field.nbytes
        view = layout.view(memory, name)
        assert view.shape == field.shape
        assert view.dtype == np.dtype(field.dtype)
        assert field.nbytes == view.nbytes
    assert end <= layout.nbytes
    assert layout.nbytes % ALIGNMENT == 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(layouts())
def test_views_share_the_memory_and_touch_no_other_field(layout: Layout) -> None:
    memory = np.zeros(layout.nbytes + 64, np.uint8)
    for number, name in enumerate(layout.fields, 1):
        layout.view(memory, name).reshape(-1).view(np.uint8)[:] = number
    for number, name in enumerate(layout.fields, 1):
        assert (layout.view(memory, name).reshape(-1).view(np.uint8) == number).all()
    assert not memory[layout.nbytes :].any()


def test_offsets_are_the_sum_of_the_padded_sizes() -> None:
    layout = Layout(
        (
            Field(name="records", dtype=RECORD, shape=(7,)),  # 84 bytes
            Field(name="byte", dtype=np.uint8, shape=(1,)),
            Field(name="table", dtype=np.int32, shape=(4, 4)),
        )
    )
    assert layout.offsets == {"records": 0, "byte": 128, "table": 192}
    assert layout.nbytes == 256


def test_a_memory_that_is_too_small_is_refused() -> None:
    layout = Layout((Field(name="a", dtype=np.int32, shape=(32,)),))
    with pytest.raises(ValueError, match="reshape"):
        layout.view(np.zeros(64, np.uint8), "a")


@pytest.mark.parametrize(
    ("nbytes", "padded"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128), (128, 128), (129, 192)]
)
def test_rounding_up_to_a_cache_line(nbytes: int, padded: int) -> None:
    """Sizes around one and two lines."""
    assert align(nbytes) == padded


@pytest.mark.parametrize(("nbytes", "padded"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_rounding_up_to_a_page(nbytes: int, padded: int) -> None:
    assert align(nbytes, 4096) == padded
