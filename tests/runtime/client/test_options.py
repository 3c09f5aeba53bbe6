"""The options of `generate` and `chat`: what `help` and completion show of them."""

from __future__ import annotations

import inspect
import io
import pydoc
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import pytest

import sterna
from sterna import AsyncClient, Client
from sterna.runtime.client.options import GenerateOptions
from sterna.runtime.protocol.messages import Generate
from sterna.shm.errors import BadRequest

METHODS = [Client.generate, Client.chat, AsyncClient.generate, AsyncClient.chat]
TALK = [{"role": "user", "content": "Hi"}]


def test_options_are_the_fields_of_the_message() -> None:
    given_otherwise = {"id", "prompt", "token_ids"}
    assert set(GenerateOptions.__annotations__) == set(Generate.__struct_fields__) - given_otherwise


@pytest.mark.parametrize("method", METHODS)
def test_help_names_and_explains_each_option_with_its_default(method: Callable[..., Any]) -> None:
    parameters = inspect.signature(method).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    sent = Generate(id="x", prompt="")
    explained = inspect.getdoc(method) or ""
    for name in GenerateOptions.__annotations__:
        assert parameters[name].default == getattr(sent, name)
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"    {name}: " in explained
    out = io.StringIO()
    with redirect_stdout(out):
        pydoc.Helper(output=out).help(method)
    shown = out.getvalue()
    assert "max_tokens: int = 256" in shown
    assert "seed: int | None = None" in shown
    assert "**options" not in shown


def test_unknown_options_are_refused_with_a_hint() -> None:
    # Before there is a connection: no daemon is asked.
    with Client("ipc:///nowhere/sterna.sock") as client:
        with pytest.raises(TypeError, match=r"^generate\(\) got an unexpected keyword argument 'max_token'"):
            client.generate("a", max_token=1)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"^chat\(\) got .* 'top_pp', did you mean 'top_p'\?$"):
            client.chat(TALK, top_pp=0.5)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="'prompt'"):
            client.chat(TALK, prompt="a")  # type: ignore[call-overload]
        with pytest.raises(BadRequest, match=r"^top_p: "):
            client.chat(TALK, top_p=2)


def test_public_names_can_be_completed() -> None:
    assert {"AsyncClient", "Client", "SternaError", "__version__"} <= set(dir(sterna))
    assert set(sterna.__all__) <= set(dir(sterna))
