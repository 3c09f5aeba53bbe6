"""What replies mean, without a socket."""

from __future__ import annotations

import pytest

from sterna.runtime.client import replies
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import (
    ShuttingDown,
)


def test_going_away_instead_of_welcome() -> None:
    with pytest.raises(ShuttingDown, match="stopping"):
        replies.settle(m.GoingAway(text="stopping"), m.Welcome)
