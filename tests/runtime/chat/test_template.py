"""Chat templates: what is rendered, what is refused when a model is loaded, and what a hostile one can do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import msgspec
import pytest

from sterna.runtime.chat.renderer import MEMORY_NBYTES
from sterna.runtime.chat.template import KEY, MAX_SOURCE_BYTES, ChatTemplate, describe_templates
from sterna.runtime.protocol.chat import MAX_MESSAGES, ChatMessage
from sterna.shm.errors import BadRequest, ModelFileError

NOW = datetime(2026, 11, 21, 12, 0)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": 'in a <city> & "more"', "parameters": {"ü": [1, 2.5]}},
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&'\""},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "a greeting"},
    {"role": "user", "content": [{"type": "text", "text": "2+2?"}, {"type": "text", "text": "Why?"}]},
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3 C"},
]

CHATML = """{%- for m in messages %}
{{ '<|im_start|>' + m.role + '\\n' + m['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
{{ '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set told = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + strftime_now("%d %b %Y") + "\\n" + told }}
{%- for message in messages if message.role != 'tool' %}
    {% generation %}
    {{- '<|' + message.role + '|>' + (message.reasoning_content or '') + '|' + message.content -}}
    {% endgeneration %}
    {%- if loop.index == 99 %}{% break %}{% endif %}
{%- endfor %}"""
GLM4 = """[gMASK]<sop>
{%- if tools -%}
<|system|>
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
{%- endif -%}
{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls -%}
{%- for call in m.tool_calls -%}
<tool_call>{{ call.function.name }}
{%- for k, v in call.function.arguments.items() %}<arg>{{ k }}={{ v }}</arg>{% endfor %}
{%- endfor -%}
{%- else -%}<|{{ m.role }}|>{{ m.content }}{%- endif -%}
{% endfor %}"""
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}.{% endfor %}{% endfor %}"
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NULL_TOOLS = "{% if tools is not none and tools|length > 0 %}T{% endif %}{{ messages[0].content }}"
# minijinja has no integers this large: jinja2 renders it, in the same environment.
FOR_JINJA2 = "{% if 1" + "0" * 60 + " %}\n{{ messages[0].content }}|{{ {'ü': 1} | tojson }}\n{% endif %}"

Load = Callable[..., ChatTemplate]


@pytest.fixture
def load() -> Iterator[Load]:
    """Return a function that loads a template, or several by name; they are closed at the end."""
    loaded: list[ChatTemplate] = []

    def load(source: str, context: int = 4096, **named: str) -> ChatTemplate:
        metadata = {KEY: source, **{f"{KEY}.{name}": text for name, text in named.items()}}
        template = ChatTemplate.from_metadata(metadata, tokens=TOKENS, source="m.gguf", context=context)
        assert template is not None
        loaded.append(template)
        return template

    yield load
    for template in loaded:
        template.close()


@pytest.fixture(scope="module")
def shown() -> Iterator[ChatTemplate]:
    """Return templates that many tests use, by name."""
    sources = {"": CHATML, ".llama3": LLAMA3, ".glm4": GLM4, ".parts": PARTS, ".calls": TEXT_ARGUMENTS}
    metadata = {f"{KEY}{name}": text for name, text in {**sources, ".null": NULL_TOOLS}.items()}
    template = ChatTemplate.from_metadata(metadata, tokens=TOKENS, source="m.gguf", context=4096)
    assert template is not None
    yield template
    template.close()


def turns(messages: list[dict[str, Any]]) -> list[ChatMessage]:
    return [msgspec.convert(message, ChatMessage) for message in messages]


def test_chatml(shown: ChatTemplate) -> None:
    text = shown.render(turns(TALK), now=NOW)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>&'\"<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n2+2?\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    short = shown.render(turns(TALK[:1]), now=NOW, options={"enable_thinking": False})
    assert short.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "assistant" not in shown.render(turns(TALK[:2]), now=NOW, add_generation_prompt=False)


def test_llama3_like(shown: ChatTemplate) -> None:
    assert shown.render(turns(TALK), now=NOW, template="llama3") == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 21 Nov 2026\nBe brief."
        "<|user|>|Hi <b>&'\"<|assistant|>a greeting|Hello!<|user|>|2+2?\nWhy?"
    )


def test_glm4_like_with_tools(shown: ChatTemplate) -> None:
    assert shown.render(turns(CALLS), now=NOW, tools=[TOOL], template="glm4") == (
        '[gMASK]<sop><|system|>\n<tools>\n{"type": "function", "function": {"name": "weather", '
        '"description": "in a <city> & \\"more\\"", "parameters": {"ü": [1, 2.5]}}}\n</tools>'
        "<|user|>Weather?<tool_call>weather<arg>city=Ulm</arg><|tool|>3 C"
    )
    text = shown.render(turns(TALK[1:2]), now=NOW, tools=[], template="glm4")
    assert text == "[gMASK]<sop><|user|>Hi <b>&'\""


def test_forms_that_a_template_needs_are_found_out(shown: ChatTemplate) -> None:
    assert shown.render(turns(TALK[2:]), now=NOW, template="parts") == "Hello!.2+2?\nWhy?."
    text = shown.render(turns(CALLS), now=NOW, template="calls")
    assert text == 'Weather?weather{"city": "Ulm"}3 C'
    assert shown.render(turns(CALLS), now=NOW, template="null") == "Weather?"


def test_named_templates(load: Load) -> None:
    template = load("plain", tool_use="tools", rag="rag {{ documents[0].title }}")
    assert template.render(turns(TALK), now=NOW) == "plain"
    assert template.render(turns(TALK), now=NOW, tools=[TOOL]) == "tools"
    assert template.render(turns(TALK), now=NOW, template="rag", documents=[{"title": "T"}]) == "rag T"
    with pytest.raises(BadRequest, match="template: expected one of default, tool_use, rag, found 'other'"):
        template.render(turns(TALK), now=NOW, template="other")


def test_refusals(load: Load) -> None:
    template = load("{{ raise_exception('Only users, no ' + messages[0].role) }}")
    with pytest.raises(BadRequest, match="chat template 'default': Only users, no system"):
        template.render(turns(TALK), now=NOW)
    with pytest.raises(BadRequest, match=r"options\.messages: is given"):
        template.render(turns(TALK), now=NOW, options={"messages": []})
    with pytest.raises(BadRequest, match=r"options\.bos_token: is given"):
        template.render(turns(TALK), now=NOW, options={"bos_token": "x"})
    long = load("{{ 'four' * 20000 }}", context=128)
    with pytest.raises(BadRequest, match="writes 80000 bytes, expected at most 65536"):
        long.render(turns(TALK), now=NOW)


@pytest.mark.parametrize("depth", [100, 990, 20_000])
def test_deeply_nested_arguments_are_an_error_at_worst(shown: ChatTemplate, depth: int) -> None:
    arguments = '{"a":' * depth + "1" + "}" * depth
    refused = depth > (900 if sys.version_info < (3, 12) else 1000)  # 3.11 counts calls in C with others
    with pytest.raises(BadRequest) if refused else contextlib.nullcontext():
        call = {"function": {"name": "f", "arguments": arguments}}
        shown.render(turns([{"role": "assistant", "tool_calls": [call]}]), now=NOW, template="glm4")
    assert shown.render(turns(TALK[2:3]), now=NOW, template="parts") == "Hello!."


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'text', found 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "a string `text`"),
        ({"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "a JSON object"),
        ({"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "expected JSON"),
        ({"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]}, "NaN"),
    ],
)  # fmt: skip
def test_wrong_messages(message: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        turns([message])


def test_errors_when_a_model_is_loaded(load: Load) -> None:
    unparsable = "one\n{% if x %}\n{{ y + }}{% endif %}"
    with pytest.raises(ModelFileError, match=rf"^m\.gguf: {KEY}: syntax error: .*{KEY}:3"):
        load(unparsable)
    with pytest.raises(ModelFileError, match=rf"^m\.gguf: {KEY}\.other: syntax error"):
        load("fine", other=unparsable)
    with pytest.raises(ModelFileError, match="expected at most 262144 bytes, found 262145"):
        load("x" * (MAX_SOURCE_BYTES + 1))
    with pytest.raises(ModelFileError, match=f"{KEY}: expected a string, found int"):
        ChatTemplate.from_metadata({KEY: 1}, tokens={}, source="m.gguf", context=1)
    assert ChatTemplate.from_metadata({KEY: " \n"}, tokens={}, source="m.gguf", context=1) is None
    assert describe_templates({}, "m.gguf") == "none"
    assert describe_templates({KEY: "abc"}, "m.gguf") == "default (3 characters)"


def test_long_conversations(load: Load) -> None:
    # As Gemma 4's: every turn looks at the one before it, among all.
    looks_back = load(
        "{% for m in messages %}{% set n = namespace(last='') %}{% for before in messages[:loop.index0] %}"
        "{% set n.last = before.role %}{% endfor %}{{ n.last[:1] }}{{ m.content }}{% endfor %}"
    )
    talk = [{"role": ("user", "assistant")[i % 2], "content": "."} for i in range(600)]
    assert looks_back.render(turns(talk), now=NOW) == "." + "u.a." * 299 + "u."
    most = turns([{"role": "user", "content": "."}] * MAX_MESSAGES)
    assert load("{% for m in messages %}{{ m.content }}{% endfor %}").render(most, now=NOW) == "." * len(most)


def test_jinja2_renders_what_minijinja_does_not_parse_within_the_same_limits(load: Load) -> None:
    pytest.importorskip("jinja2")
    digits = "{% if 1" + "0" * 60 + " %}"
    template = load(
        FOR_JINJA2,
        attack=digits + "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}{% endif %}",
        memory=digits + "{{ 'A' * 2000000000 }}{% endif %}",
    )
    assert template.render(turns(TALK), now=NOW) == 'Be brief.|{"ü": 1}\n'
    with pytest.raises(BadRequest, match=r"unsafe|undefined|no attribute"):
        template.render(turns(TALK), now=NOW, template="attack")
    with pytest.raises(BadRequest, match=f"more than {MEMORY_NBYTES >> 20} MiB"):
        template.render(turns(TALK), now=NOW, template="memory")
    # The process died or not: the next conversation is rendered.
    assert template.render(turns(TALK), now=NOW) == 'Be brief.|{"ü": 1}\n'
