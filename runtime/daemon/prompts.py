"""A request's prompt as tokens, with the errors for what does not fit."""

from __future__ import annotations

from ...shm.errors import BadRequest, TooLong
from ..config import Config
from ..protocol.messages import Embed, Generate
from .announcement import context_shortage
from .model.served_model import ServedModel


class Prompts:
    """Tokenizes the prompts for one model."""

    def __init__(self, config: Config, model: ServedModel) -> None:
        self._model = model
        self._context_shortage = context_shortage(config, model.plan.hyper, model.context)

    def ids(self, request: Generate | Embed, *, to_embed: bool) -> list[int]:
        """Return the tokens of a request; with `to_embed` its vector is wanted, and no answer has to follow.

        For any thread, and takes a second for some million characters. Raises BadRequest and TooLong.
        """
        if request.token_ids is not None:
            ids = list(request.token_ids)
            limit = self._model.plan.vocab_size
            for position, token in enumerate(ids[: self._model.context]):
                if token >= limit:
                    raise BadRequest(f"token_ids[{position}]: expected 0 to {limit - 1}, found {token}")
        else:
            text = request.prompt or ""
            if len(text) > self._model.max_prompt_chars:
                # Not worth the time of tokenizing it, in which nobody else would be served.
                raise TooLong(
                    f"the prompt has {len(text)} characters; for a context of {self._model.context} tokens "
                    f"no more than {self._model.max_prompt_chars} are tokenized"
                )
            tokenizer = self._model.tokenizer
            special = isinstance(request, Generate) and request.special
            add_bos = request.add_bos if isinstance(request, Generate) else None
            ids = tokenizer.encode(text, add_bos=add_bos, special=special)
            if special and ids[:2] == [tokenizer.bos_id] * 2:
                del ids[0]  # chat templates write BOS themselves
        if not ids:
            raise BadRequest("prompt: expected at least one token, found none")
        if to_embed and request.token_ids is None and self._model.tokenizer.adds_eos:
            # Embedding models are trained to gather the text in it; a prompt that goes on must not end.
            ids.append(self._model.tokenizer.eos_id or 0)
        if len(ids) >= self._model.context + to_embed:
            rest = "" if to_embed else ", the answer included"
            raise TooLong(
                f"the prompt has {len(ids)} tokens; the context has {self._model.context}{rest}"
                f"{self._context_shortage}"
            )
        return ids
