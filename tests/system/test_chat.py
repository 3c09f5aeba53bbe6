"""Conversations through a daemon whose model file has a chat template."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import gguf
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from sterna import AsyncClient
from sterna.runtime.config import embedded_model
from sterna.shm.errors import BadRequest

from .conftest import Serve
from .daemon_process import COMMAND, Daemon, clean_env

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools\n{% endif %}"
    "{% if mood is defined %}({{ mood }})\n{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [{"role": "system", "content": "Tell a tale."}, {"role": "user", "content": "Go on"}]
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def with_template(path: Path, template: str) -> Path:
    """Write the embedded model with a chat template to `path`."""
    reader = gguf.GGUFReader(embedded_model())
    writer = gguf.GGUFWriter(path, "deepseek2")
    added = {"tokenizer.chat_template": MetadataDetails(gguf.GGUFValueType.STRING, template)}
    copy_with_new_metadata(reader, writer, added, [])
    return path


def test_conversation_becomes_a_prompt_and_its_answer(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(str(with_template(tmp_path / "chat.gguf", TEMPLATE)), "--workers", "1")
    with daemon.client() as client:
        bos = client.tokenize("", add_bos=True)
        text = client.apply_template(TALK)
        assert text.endswith("system: Tell a tale.\nuser: Go on\nassistant: ")
        assert len(text) > len("system: Tell a tale.\nuser: Go on\nassistant: ")  # BOS by its name
        assert client.apply_template(TALK[1:], [{"type": "function"}], False, mood="sad").endswith(
            "user: Go on\n1 tools\n(sad)\n"
        )
        result = client.chat(TALK, **GREEDY)
        ids = list(result.prompt_token_ids)
        assert ids[:1] == bos
        assert ids.count(bos[0]) == 1
        assert ids == client.tokenize(text, add_bos=False, special=True)
        assert client.generate(token_ids=ids, **GREEDY).token_ids == result.token_ids
        with client.chat(TALK, stream=True, **GREEDY) as stream:
            assert "".join(chunk.text for chunk in stream) == result.text
        with pytest.raises(BadRequest, match=r"messages\[1\]"):
            client.apply_template([TALK[0], {"role": 1}])
        with pytest.raises(BadRequest, match="found 'image_url'"):
            client.apply_template([{"role": "user", "content": [{"type": "image_url"}]}])

    async def several() -> list[str]:
        async with AsyncClient(daemon.url) as client:
            texts = asyncio.gather(*[client.apply_template(TALK, mood=n) for n in range(8)])
            chatted = await client.chat(TALK, **GREEDY)
            assert chatted.text == result.text
            return await texts

    assert [text[-15:-12] for text in asyncio.run(several())] == [f"({n})" for n in range(8)]
    done = subprocess.run(
        [*COMMAND, "generate", "Go on", "--system", "Tell a tale.", "-t", "0", "-n", "8", "--no-stats",
         "--socket", daemon.url],
        capture_output=True, text=True, env=clean_env(tmp_path), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, result.text + "\n"), done.stderr


def test_model_without_a_template(shared: Daemon, tmp_path: Path) -> None:
    with shared.client() as client, pytest.raises(BadRequest, match="no chat template in /"):
        client.chat(TALK)
    done = subprocess.run(
        [*COMMAND, "generate", "Go on", "--chat", "--socket", shared.url],
        capture_output=True, text=True, env=clean_env(tmp_path), timeout=60,
    )  # fmt: skip
    assert done.returncode == 64
    assert done.stderr.startswith("sterna: error: no chat template in /")
    assert done.stderr.endswith(": leave out --chat\n")


def test_template_that_does_not_parse_stops_the_start(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(str(with_template(tmp_path / "bad.gguf", "a\n{% if %}")), ready=False)
    assert daemon.wait() == 65
    assert "bad.gguf: tokenizer.chat_template: syntax error" in daemon.stderr
    assert ":2)" in daemon.stderr
