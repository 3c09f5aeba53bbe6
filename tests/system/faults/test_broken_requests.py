"""Requests and frames that are wrong: one typed error each, and the daemon serves on undisturbed."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Any

import msgpack
import psutil
import pytest

from sterna import AsyncClient
from sterna.runtime.client.results import Result
from sterna.shm.errors import BadRequest, NotFound, Overloaded, TooLong

from ..conftest import Serve
from ..daemon_process import Daemon, wait_until
from ..raw_client import frame, raw_client
from ..requests import run_alone, run_while, sampled

NUM_GARBAGE_FRAMES = 2000


def generate(**fields: object) -> bytes:
    return frame("generate", **({"id": "r1", "prompt": "abc", "max_tokens": 1} | fields))


def test_prompt_over_the_context_names_both_numbers(shared: Daemon) -> None:
    with shared.client() as client, pytest.raises(TooLong, match=r"^the prompt has 600 tokens.*512"):
        client.generate(token_ids=[5] * 600)


def test_prompt_of_megabytes_is_refused_without_being_tokenized(shared: Daemon) -> None:
    with shared.client() as client, pytest.raises(TooLong, match=r"3000000 characters.*512"):
        client.generate("tale " * 600_000)


def test_context_that_ends_an_answer(shared: Daemon) -> None:
    with shared.client() as client:
        result = client.generate(token_ids=[5] * 500, max_tokens=100, ignore_eos=True)
    assert result.finish_reason == "length"
    assert result.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temprature": 1.0}, "unknown field 'temprature', did you mean 'temperature'?"),
        ({"max_tokens": 0}, "max_tokens: expected int >= 1, found 0"),
        ({"max_tokens": "3"}, "max_tokens: expected int, found '3'"),
        ({"temperature": float("nan")}, "temperature: expected a finite number, found nan"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"prompt": None}, "expected exactly one of the two, found neither"),
        ({"token_ids": [1]}, "expected exactly one of the two, found both"),
        ({"prompt": None, "token_ids": []}, "expected at least one token, found none"),
        ({"prompt": None, "token_ids": [1, 99999]}, "token_ids[1]: expected 0 to 2047, found 99999"),
        ({"prompt": None, "token_ids": [-1]}, "token_ids[0]: expected int >= 0, found -1"),
        ({"stop": [""]}, "stop[0]: expected str of length >= 1"),
        ({"seed": 2**63}, "seed: expected"),
        ({"logprobs": 21}, "logprobs: expected int <= 20, found 21"),
    ],
)
def test_wrong_field(shared: Daemon, fields: dict[str, Any], words: str) -> None:
    with raw_client(shared.url) as client:
        client.hello()
        request_id, code, text = client.failure(generate(**fields))
        assert (request_id, code) == ("r1", "bad_request")
        assert words in text
        client.send(generate(id="good"))  # the connection is as good as before
        assert client.receive()[0] == "accepted"
        assert client.receive()[0] == "tokens"
        assert client.receive()[0] == "finished"


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b""], "not msgpack"),
        ([b"\xc1"], "not msgpack"),
        ([msgpack.packb("hello")], "not [protocol, tag, body]"),
        ([msgpack.packb([2, "hello", {}])], "speaks protocol 2, this side speaks 1"),
        ([frame("unheard_of")], "unknown message 'unheard_of'"),
        ([b"\x93\x01\xa4ping\x81\xa5nonce\xa2\xff\xfe"], "text that is not UTF-8"),
        ([frame("ping", nonce=1), b"more"], "expected one frame, found 2"),
        ([msgpack.packb([1, "ping", [1]])], "expected a map"),
        ([b"\x91" * 100_000], "not msgpack"),
        ([b"\xdd\xff\xff\xff\xff"], "not msgpack"),
    ],
)
def test_broken_frame(shared: Daemon, frames: list[bytes], words: str) -> None:
    refused = shared.status()["totals"]["frames_refused"]
    with raw_client(shared.url) as client:
        client.hello()
        request_id, code, text = client.failure(*frames)
        assert (request_id, code) == (None, "protocol")
        assert words in text
        client.send(frame("ping", nonce=7))
        assert client.receive() == ("pong", {"nonce": 7})
    assert shared.status()["totals"]["frames_refused"] == refused + 1


def test_nothing_goes_before_hello(shared: Daemon) -> None:
    with raw_client(shared.url) as client:
        assert client.failure(generate()) == (
            "r1",
            "protocol",
            "the first message of a connection must be hello",
        )
        client.hello()
        client.send(generate())
        assert client.receive()[0] == "accepted"
        while client.receive()[0] != "finished":
            pass


def test_id_that_runs_already(shared: Daemon) -> None:
    with raw_client(shared.url) as client:
        client.hello()
        client.send(generate(max_tokens=300, ignore_eos=True))
        assert client.receive()[0] == "accepted"
        client.send(generate())
        while (answer := client.receive())[0] == "tokens":
            pass
        assert answer[1]["code"] == "bad_request"
        assert "'r1' is running already" in answer[1]["text"]
        client.send(frame("cancel", id="r1"))
        while (answer := client.receive())[0] == "tokens":
            pass
        assert answer[0] == "finished"
        assert answer[1]["reason"] == "cancelled"


def test_cancel_of_a_stranger_s_request(shared: Daemon) -> None:
    with shared.client() as owner, shared.client() as stranger:
        with owner.generate(stream=True, **sampled(0, 300)) as stream:
            next(stream)
            with pytest.raises(NotFound, match=f"no request '{stream.id}' of this client"):
                stranger.cancel(stream.id)
            owner.cancel(stream.id)
            assert stream.read().finish_reason == "cancelled"
        with pytest.raises(NotFound):
            owner.cancel(stream.id)


def test_detokenize_and_tokenize_of_odd_input(shared: Daemon) -> None:
    with shared.client() as client:
        with pytest.raises(BadRequest, match="token id 100000 is outside the vocabulary, 0 to 2047"):
            client.detokenize([1, 100_000])
        assert client.detokenize([]) == ""
        assert client.tokenize("", add_bos=False) == []
        text = "\0 \u202e \U0001f600 \r\n\t"
        assert client.detokenize(client.tokenize(text, add_bos=False)) == text


def test_long_text_to_tokenize_does_not_stop_the_others(shared: Daemon) -> None:
    """A megabyte takes about a second to tokenize; meanwhile the loop has to go round."""
    text = "a tale of old " * 74_000
    with shared.client() as client, raw_client(shared.url) as raw:
        raw.hello()
        for number in range(3):
            raw.send(frame("tokenize", id=f"t{number}", text=text))
        slowest_s = max(client.ping() for _ in range(100))
        answers = [raw.receive() for _ in range(3)]
        assert [(tag, body["id"]) for tag, body in answers] == [("tokenized", f"t{i}") for i in range(3)]
        first = client.tokenize("a tale of old a tale")
        assert answers[0][1]["token_ids"][: len(first)] == first
        assert raw.failure(frame("tokenize", id="t", text=text * 10))[:2] == ("t", "too_long")
        assert raw.failure(frame("detokenize", id="d", token_ids=[5] * 1_048_577))[:2] == (None, "protocol")
    assert slowest_s < 5.0


def test_long_prompts_become_tokens_beside_the_loop(shared: Daemon) -> None:
    """One at a time; whoever waits for that holds up nobody."""
    text = "a tale of old " * 2_000
    with shared.client() as client, raw_client(shared.url) as raw:
        raw.hello()
        for number in range(20):
            raw.send(frame("generate", id=f"g{number}", prompt=text))
        raw.send(frame("embed", id="e", prompt=text))
        slowest_s = max(client.ping() for _ in range(20))
        answers = [raw.receive()[1] for _ in range(21)]
        codes = {body["id"]: (body["code"], body["text"]) for body in answers}
        assert len(codes) == 21
        assert codes["g0"][0] == "too_long"
        assert "tokens; the context has" in codes["g0"][1]
        assert {code for code, _ in codes.values()} == {"too_long"}
        assert client.generate("Once upon a time", max_tokens=2).usage.completion_tokens == 2
    assert slowest_s < 5.0


def test_second_long_prompt_of_the_same_id_is_refused(shared: Daemon) -> None:
    text = "a tale of old " * 2_000
    with raw_client(shared.url) as raw:
        raw.hello()
        for _ in range(2):
            raw.send(frame("generate", id="twice", prompt=text))
        answers = [raw.receive()[1] for _ in range(2)]
    assert [(body["id"], body["code"]) for body in answers] == [
        ("twice", "bad_request"),
        ("twice", "too_long"),
    ]


def test_sixty_long_texts_gathered_over_one_client_wait_for_their_turn(shared: Daemon) -> None:
    text = "a tale of old " * 7_200  # 100 kB

    async def talk() -> tuple[list[list[int]], list[BaseException | Result]]:
        async with asyncio.timeout(120), AsyncClient(shared.url, timeout_s=120) as client:
            tokens = await asyncio.gather(*(client.tokenize(text) for _ in range(60)))
            prompts = [client.generate(text, max_tokens=1) for _ in range(60)]
            return tokens, await asyncio.gather(*prompts, return_exceptions=True)

    tokens, refused = asyncio.run(talk())
    assert len(tokens) == 60
    assert all(ids == tokens[0] for ids in tokens)
    assert [type(error) for error in refused] == [TooLong] * 60


def test_long_texts_of_a_client_that_goes_away_are_dropped(shared: Daemon) -> None:
    text = "a tale of old " * 74_000  # takes half a second
    with shared.client() as client:
        with raw_client(shared.url) as raw:
            raw.hello()
            for number in range(55):
                raw.send(frame("tokenize", id=f"t{number}", text=text))
            raw.send(frame("ping", nonce=1))
            while raw.receive()[0] != "pong":  # all were taken before it
                pass
        start_s = time.monotonic()
        client.tokenize("a tale of old " * 1_000)  # its turn comes when the others are gone
        assert time.monotonic() - start_s < 10.0


def test_long_texts_that_wait_when_the_daemon_stops_are_refused(serve: Serve) -> None:
    daemon = serve("--workers", "1")
    text = "a tale of old " * 74_000
    with raw_client(daemon.url) as raw:
        raw.hello()
        for number in range(20):
            raw.send(frame("tokenize", id=f"t{number}", text=text))
        raw.send(frame("ping", nonce=1))
        answers = [raw.receive()]
        while answers[-1][0] != "pong":
            answers.append(raw.receive())
        daemon.signal(signal.SIGTERM)
        while len({body["id"] for _, body in answers if body.get("id")}) < 20:
            answers.append(raw.receive())
    codes = {body["code"] for tag, body in answers if tag == "failed"}
    assert codes == {"shutting_down"}
    assert daemon.wait() == 0


def test_frame_of_a_hundred_megabytes(shared: Daemon) -> None:
    rss_before = psutil.Process(shared.pid).memory_info().rss
    with raw_client(shared.url) as client, shared.client() as good:
        client.hello()
        client.send(b"\xc6" + (100 * 2**20).to_bytes(4, "big") + bytes(100 * 2**20))
        assert good.generate("Once upon a time", max_tokens=4).usage.completion_tokens == 4
    assert shared.process.poll() is None
    assert psutil.Process(shared.pid).memory_info().rss - rss_before < 40 * 2**20


def test_frame_at_the_limit_is_taken_apart(shared: Daemon) -> None:
    with raw_client(shared.url) as client:
        limit = client.hello()["limits"]["max_frame_bytes"]
        text = "x" * (limit - 100)
        _, code, words = client.failure(generate(prompt=text))
        assert (code, "512" in words) == ("too_long", True)


def test_full_queue(serve: Serve) -> None:
    daemon = serve("--max-num-seqs", "1", "--max-queue", "1")
    with daemon.client() as first, daemon.client() as second, daemon.client() as third:
        running = first.generate(stream=True, **sampled(0, 300))
        waiting = second.generate(stream=True, **sampled(1, 4))
        wait_until(lambda: daemon.status()["sequences"]["waiting"] == 1, 5.0, "one waits")
        with pytest.raises(Overloaded, match="1 requests wait") as caught:
            third.generate(**sampled(2, 4))
        assert caught.value.retryable
        assert caught.value.retry_after_s is None  # nothing has ended yet
        progress = daemon.status()["progress"]
        assert progress["oldest_waiting_s"] >= 0
        assert progress["last_step_age_s"] < 5
        running.cancel()
        assert waiting.read().usage.completion_tokens == 4
        assert third.generate(**sampled(2, 4)).usage.completion_tokens == 4
        running.close()
        running = first.generate(stream=True, **sampled(0, 300))
        with second.generate(stream=True, **sampled(1, 4)):
            wait_until(lambda: daemon.status()["sequences"]["waiting"] == 1, 5.0, "one waits")
            with pytest.raises(Overloaded) as caught:
                third.generate(**sampled(2, 4))
            # Three have ended within the ten seconds that are looked at.
            assert caught.value.retry_after_s == pytest.approx(10 / 3)
        running.close()


def test_garbage_while_others_stream(shared: Daemon) -> None:
    """Two thousand frames: noise, mutated good ones, and deep or huge claims; half of them before a hello."""
    requests = [sampled(number, 150) for number in range(2)]
    expected = [result.text for result in run_alone(shared.url, requests)]
    refused = shared.status()["totals"]["frames_refused"]
    found = run_while(shared.url, requests, lambda: send_garbage(shared.url))
    assert [result.text for result in found] == expected
    assert shared.status()["totals"]["frames_refused"] > refused + NUM_GARBAGE_FRAMES // 2


def send_garbage(url: str) -> None:
    dice = random.Random(20260101)
    good = [
        generate(id="g", max_tokens=1),
        frame("cancel", id="g"),
        frame("ping", nonce=3),
        frame("status", id="s"),
    ]
    for says_hello in (False, True):
        with raw_client(url) as client:
            if says_hello:
                client.hello()
            for _ in range(NUM_GARBAGE_FRAMES // 2):
                client.drain()
                client.send(*[garbage(dice, good) for _ in range(dice.choice([1, 1, 1, 2]))])
            client.send(frame("hello", client="garbage", version="0"))
            while client.receive()[0] != "welcome":  # all of it was read
                pass


def garbage(dice: random.Random, good: list[bytes]) -> bytes:
    if dice.random() < 0.3:
        return dice.randbytes(dice.randrange(200))
    data = bytearray(dice.choice(good))
    for _ in range(dice.randrange(1, 4)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data[: dice.randrange(1, len(data) + 1)]) if dice.random() < 0.3 else bytes(data)


def test_identity_of_another_connection_cannot_be_taken(shared: Daemon) -> None:
    """A peer may name itself, with any bytes; a second one of that name is not heard."""
    name = b"\xffme" * 80
    with raw_client(shared.url, identity=name) as owner:
        assert owner.failure(*[b""] * 50)[1:] == ("protocol", "expected one frame, found 50")
        owner.hello()
        with raw_client(shared.url, identity=name) as thief:
            thief.send(frame("ping", nonce=1))
            owner.send(frame("ping", nonce=2))
            assert owner.receive() == ("pong", {"nonce": 2})
            assert thief.drain() == 0
        owner.send(frame("ping", nonce=3))
        assert owner.receive() == ("pong", {"nonce": 3})
