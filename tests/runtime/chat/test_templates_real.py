"""The templates that llama.cpp ships, as the Hugging Face environment renders them; needs its source.

The source is looked for in STERNA_LLAMA_CPP, a folder like `vendor/llama.cpp` in the source distribution of
llama-cpp-python, then where the tokenizer tests unpack that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sterna.runtime.chat.template import KEY, ChatTemplate
from sterna.runtime.protocol.chat import ChatMessage
from sterna.shm.errors import SternaError

pytestmark = pytest.mark.slow

NOW = datetime(2026, 11, 21, 12, 0)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NUM_TEMPLATES = 70
AT_LEAST = 67
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather in a <city> & "more"',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name, e.g. Zürich"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "user": ([{"role": "user", "content": "Hello, who are you? <b>&'\" ü"}], []),
    "system and turns": (
        [
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."},
            {"role": "user", "content": "2+2?\n\nExplain."},
        ],
        [],
    ),
    "tools": (
        [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather in Zürich?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I should look.",
                "tool_calls": [{"id": "abcdef123", "type": "function", "function": CALL}],
            },
            {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": '{"t": 3.5}'},
            {"role": "assistant", "content": "3.5 degrees."},
            {"role": "user", "content": "Thanks"},
        ],
        TOOLS,
    ),
}
# (template, conversation): why the two differ.
DIFFERENT = {
    **{
        (f"{name}-tool_use", conversation): "jinja2 fails: it loops over tools, which are None without any"
        for name in (
            "CohereForAI-c4ai-command-r-plus",
            "NousResearch-Hermes-2-Pro-Llama-3-8B",
            "NousResearch-Hermes-3-Llama-3.1-8B",
        )
        for conversation in ("user", "system and turns")
    },
    ("llama-cpp-deepseek-r1", "tools"): "jinja2 fails: its `map` is a generator, which is no JSON",
    ("meetkai-functionary-medium-v3.1", "tools"): "jinja2 escapes HTML in what is added to `|safe` text",
}


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    unpacked = cache / "sterna-tests/llama_cpp_python-0.3.36/vendor/llama.cpp"
    found = Path(os.environ.get("STERNA_LLAMA_CPP") or unpacked) / "models/templates"
    if not found.is_dir():
        pytest.skip(f"no llama.cpp templates in {found}: set STERNA_LLAMA_CPP, or run the tokenizer tests")
    return found


def reference(source: str, context: dict[str, Any]) -> str:
    """Render with jinja2 set up as `transformers` does for chat templates, `generation` blocks included."""
    jinja2 = pytest.importorskip("jinja2")
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> Any:  # noqa: ANN401 - jinja2's types are private
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> Any:  # noqa: ANN401
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    return environment.from_string(source).render(**context)


def outcomes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield for each conversation its name and "same", "both refuse" or how the two differ."""
    source = path.read_text()
    template = ChatTemplate.from_metadata({KEY: source}, tokens=TOKENS, source=path.name, context=8192)
    assert template is not None
    try:
        for name, (messages, tools) in CONVERSATIONS.items():
            turns = [msgspec.convert(message, ChatMessage) for message in messages]
            # Both get the messages in the forms that the template shows; jinja2 as `transformers`
            # gives the rest.
            plain = [turn.plain(template._forms["default"]) for turn in turns]
            context = {**TOKENS, "messages": plain, "tools": tools or None, "documents": None}
            ours = theirs = ""
            try:
                ours = template.render(turns, now=NOW, tools=tools)
            except SternaError as error:
                ours_failed = str(error)
            try:
                theirs = reference(source, {**context, "add_generation_prompt": True})
            except Exception as error:
                theirs_failed = f"{type(error).__name__}: {error}"
            if ours and theirs:
                yield name, "same" if ours == theirs else "different text"
            elif ours:
                yield name, f"only jinja2 fails: {theirs_failed}"
            elif theirs:
                yield name, f"only minijinja fails: {ours_failed}"
            else:
                yield name, "both refuse"
    finally:
        template.close()


def test_real_templates_render_as_in_the_hugging_face_environment(capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(folder().glob("*.jinja"))
    assert len(paths) >= NUM_TEMPLATES
    found = {(path.stem, name): outcome for path in paths for name, outcome in outcomes(path)}
    agreed = ("same", "both refuse")
    different = {key: outcome for key, outcome in found.items() if outcome not in agreed}
    with capsys.disabled():
        for name in CONVERSATIONS:
            count = sum(key[1] == name and outcome == "same" for key, outcome in found.items())
            refused = [key[0] for key, out in found.items() if key[1] == name and out == "both refuse"]
            print(f"\n{name}: {count} of {len(paths)} the same, both refuse {refused}", end="")
        for key, outcome in different.items():
            print(f"\n{key}: {outcome}", end="")
    assert set(different) == set(DIFFERENT)
    for name in CONVERSATIONS:
        assert sum(key[1] == name and out in agreed for key, out in found.items()) >= AT_LEAST
