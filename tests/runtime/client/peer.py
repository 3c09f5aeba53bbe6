"""A daemon in miniature for tests of clients: a ROUTER in a thread that speaks the codec, without a model.

What it does with a `generate` stands in the prompt:

    anything else      one token per character, then `finished`
    "slow"             a token every 5 ms until cancelled
    "mute"             accepted, then nothing
    "soon ..."         as anything else, but one such prompt after the other, `soon_s` each
    "gap"              a token is left out
    "fail CODE"        fails with that code

An `embed` gets [number of characters or ids, whether normalized], "mute" and "fail CODE" as above. Requests
beyond `limits` fail with "overloaded".
"""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Self

import numpy as np
import zmq

from sterna.runtime.protocol import codec
from sterna.runtime.protocol import messages as m
from sterna.runtime.protocol.sockets import server_socket

FACTS = m.ModelFacts(
    name="tiny", path="/models/tiny.gguf", architecture="test", context_length=512, vocab_size=256
)


class Peer:
    """Listens at `url` inside `with`; `seen` holds what came, with the identity of the connection."""

    def __init__(
        self,
        folder: Path,
        *,
        max_frame_bytes: int = codec.MAX_FRAME_BYTES,
        max_queue: int = 4,
        max_sequences: int = 4,
        soon_s: float = 0.0,
    ) -> None:
        self.url = f"ipc://{folder}/peer.sock"
        self.answers_hello = True
        self.answers_pings = True
        self.refuses = False
        self.seen: list[tuple[bytes, m.Message]] = []
        self._pause = threading.Event()
        self._paused = threading.Event()
        self.limits = m.Limits(
            max_frame_bytes=max_frame_bytes, max_queue=max_queue, max_sequences=max_sequences
        )
        self._soon_s = soon_s
        self._soon: deque[tuple[bytes, m.Generate]] = deque()
        self._slow: dict[str, tuple[bytes, int]] = {}
        self._owners: dict[str, bytes] = {}
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._say_goodbye = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Vanish, as a killed daemon does."""
        self._stop.set()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def go_away(self) -> None:
        """Tell every client that has spoken."""
        self._say_goodbye.set()

    def pause(self) -> None:
        """Live on and read nothing, until `resume`."""
        self._pause.set()
        assert self._paused.wait(5)

    def resume(self) -> None:
        self._pause.clear()

    def messages(self, of: type[m.Message]) -> list[m.Message]:
        """Return the messages of a class that came."""
        return [message for _, message in self.seen if isinstance(message, of)]

    def wait_for(self, of: type[m.Message], count: int = 1) -> list[m.Message]:
        """Return the messages of a class as soon as `count` of them have come."""
        until_s = time.monotonic() + 5
        while len(found := self.messages(of)) < count:
            assert time.monotonic() < until_s, f"no {of.__name__} in {self.seen}"
            time.sleep(0.002)
        return found

    def connections(self) -> set[bytes]:
        """Return the identities of all connections there were."""
        return {identity for identity, _ in self.seen}

    def _run(self) -> None:
        context = zmq.Context()
        self._router = server_socket(context)
        try:
            # One message per token fills the queue of a busy client; a lost one would be our fault.
            self._router.setsockopt(zmq.SNDTIMEO, 5000)
            self._router.bind(self.url)
            self._ready.set()
            while not self._stop.is_set():
                if self._pause.is_set():
                    self._paused.set()
                    time.sleep(0.005)
                    continue
                self._paused.clear()
                self._router.poll(0 if self._soon else 5)
                for _ in range(64):
                    if not self._router.poll(0):
                        break
                    identity, frame = self._router.recv_multipart()
                    message = codec.decode_request(frame)
                    self.seen.append((identity, message))
                    self._answer(identity, message)
                if self._say_goodbye.is_set():
                    self._say_goodbye.clear()
                    for identity in self.connections():
                        self._send(identity, m.GoingAway(text="stopping"))
                if self._soon:
                    self._finish_one()
                for request_id, (identity, index) in list(self._slow.items()):
                    self._slow[request_id] = identity, index + 1
                    self._token(identity, request_id, index, "x")
        finally:
            self._router.close(0)
            context.term()

    def _send(self, identity: bytes, message: m.Message) -> None:
        try:
            self._router.send_multipart([identity, codec.encode(message)])
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise

    def _token(self, identity: bytes, request_id: str, index: int, text: str) -> None:
        logprob = m.TokenLogprob(token_id=ord(text), logprob=-0.5, top=[(ord(text), -0.5)])
        token_ids = [ord(text)]
        item = m.TokenItem(id=request_id, index=index, token_ids=token_ids, text=text, logprobs=[logprob])
        self._send(identity, m.Tokens(items=[item]))

    def _finish(
        self, identity: bytes, request_id: str, reason: m.FinishReason, count: int, text: str
    ) -> None:
        usage = m.Usage(prompt_tokens=2, completion_tokens=count)
        timings = m.Timings(queue_s=0.0, prefill_s=0.5, decode_s=0.25)
        end = m.Finished(
            id=request_id,
            reason=reason,
            text=text,
            usage=usage,
            timings=timings,
            seed=7,
            prompt_logprobs=[None, -1.5],
        )
        self._send(identity, end)

    def _answer(self, identity: bytes, message: m.Message) -> None:
        match message:
            case m.Hello() if self.refuses:
                self._send(identity, m.Failed(id=None, code="protocol", text="not you", retryable=False))
            case m.Hello() if self.answers_hello:
                self._send(identity, m.Welcome(version="0", model=FACTS, limits=self.limits))
            case m.Ping(nonce=nonce) if self.answers_pings:
                self._send(identity, m.Pong(nonce=nonce))
            case m.Generate():
                self._generate(identity, message)
            case m.Embed():
                self._embed(identity, message)
            case m.Cancel(id=request_id) if request_id in self._owners:
                owner = self._owners.pop(request_id)
                _, count = self._slow.pop(request_id, (owner, 0))
                self._finish(owner, request_id, "cancelled", count, "")
            case m.Cancel(id=request_id):
                failed = m.Failed(id=request_id, code="not_found", text="no such request", retryable=False)
                self._send(identity, failed)
            case m.Status(id=request_id):
                self._send(
                    identity, m.Report(id=request_id, body={"model": {"name": "tiny"}, "workers": [1]})
                )
            case m.Tokenize(id=request_id, text=text):
                self._send(identity, m.Tokenized(id=request_id, token_ids=list(map(ord, text))))
            case m.Detokenize(id=request_id, token_ids=token_ids):
                self._send(identity, m.Detokenized(id=request_id, text="".join(map(chr, token_ids))))
            case m.Drain(id=request_id):
                self._send(identity, m.Drained(id=request_id))

    def _embed(self, identity: bytes, request: m.Embed) -> None:
        text = "ids" if request.prompt is None else request.prompt
        if text.startswith("fail "):
            self._fail(identity, request.id, text.removeprefix("fail "))
        elif text != "mute":
            length = len(request.prompt if request.token_ids is None else request.token_ids)  # type: ignore[arg-type]
            self._send(
                identity,
                m.Embedded(
                    id=request.id,
                    vector=np.array([length, request.normalize], "<f4").tobytes(),
                    dim=2,
                    pooling=request.pooling or "last",
                    usage=m.Usage(prompt_tokens=length, completion_tokens=0),
                    timings=m.Timings(queue_s=0.0, prefill_s=0.5, decode_s=0.0),
                ),
            )

    def _fail(self, identity: bytes, request_id: str, code: str) -> None:
        failed = m.Failed(id=request_id, code=code, text="as you wish", retryable=True, retry_after_s=1.0)
        self._send(identity, failed)

    def _generate(self, identity: bytes, request: m.Generate) -> None:
        prompt = "ids" if request.prompt is None else request.prompt
        if prompt.startswith("fail "):
            self._fail(identity, request.id, prompt.removeprefix("fail "))
            return
        if len(self._owners) >= self.limits.max_queue + self.limits.max_sequences:
            self._fail(identity, request.id, "overloaded")
            return
        self._owners[request.id] = identity
        self._send(identity, m.Accepted(id=request.id, prompt_token_ids=[1, 2], queue_position=0))
        if prompt == "slow":
            self._slow[request.id] = identity, 0
        elif prompt.startswith("soon "):
            self._soon.append((identity, request))
        elif prompt != "mute":
            self._say(identity, request.id, prompt)

    def _say(self, identity: bytes, request_id: str, text: str) -> None:
        for index, character in enumerate(text):
            self._token(identity, request_id, index + (text == "gap" and index > 0), character)
        del self._owners[request_id]
        self._finish(identity, request_id, "stop", len(text), "!")

    def _finish_one(self) -> None:
        identity, request = self._soon.popleft()
        if request.id in self._owners:  # it was not cancelled
            time.sleep(self._soon_s)
            self._say(identity, request.id, (request.prompt or "").removeprefix("soon "))
