"""The keyword arguments of `generate` and `chat`: their types, what each does, and how `help` shows them.

In here: `GenerateOptions`, the one place that explains them, and the decorator that puts them into a method's
signature and docstring. Defaults and ranges are those of `protocol.messages.Generate`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from ..protocol.messages import Generate

F = TypeVar("F", bound=Callable[..., Any])


class GenerateOptions(TypedDict, total=False):
    """How an answer is generated; each option may be left out. The text beside a type explains the option."""

    max_tokens: Annotated[int, "Tokens that the answer may have, 1 to 1,048,576; a full context ends it too."]
    temperature: Annotated[float, "0 to 100, spread of the choice; 0 always takes the most probable token."]
    top_k: Annotated[int, "Choose among this number of the most probable tokens; 0 switches it off."]
    top_p: Annotated[
        float, "Choose among the most probable tokens whose probabilities add up to this; 1 switches it off."
    ]
    min_p: Annotated[
        float, "Leave out tokens with less than this share of the highest probability; 0 switches it off."
    ]
    seed: Annotated[
        int | None, "The same seed gives the same answer again; None draws one (it is in `Result.seed`)."
    ]
    stop: Annotated[Sequence[str], "At most 16 texts of 256 bytes each; the answer ends before the first."]
    logprobs: Annotated[
        int | None, "Report log-probabilities of tokens, each with 0 to 20 alternatives; None reports none."
    ]
    prompt_logprobs: Annotated[bool, "Report the log-probability of each token of the prompt."]
    ignore_eos: Annotated[bool, "Go on where the model would end its answer."]
    add_bos: Annotated[bool | None, "Put the token BOS before the prompt; None: as the model's file says."]
    special: Annotated[
        bool, "Read control tokens out of the prompt, as a chat template writes them (`chat` always does)."
    ]
    quality_budget: Annotated[
        float | None,
        "0 to 0.1, the fraction of perplexity that the answer may cost so that it needs fewer experts that "
        "are not in memory; 0 is exact, None the daemon's default.",
    ]
    lost_mass: Annotated[
        float | None,
        "0 to 1, mean share of the gate mass that may be lost, instead of `quality_budget`; for experiments.",
    ]
    stepped: Annotated[
        bool, "Compute the prompt one token per step and within the same budget as an answer; for scoring."
    ]


def check_names(options: Iterable[str], call: str) -> None:
    """Refuse what is no option of `call`; raises TypeError that says which one may have been meant."""
    for name in options:
        if name not in GenerateOptions.__annotations__:
            import difflib  # only for who made a mistake

            near = difflib.get_close_matches(name, GenerateOptions.__annotations__, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")


def shows_options(method: F) -> F:
    """Let `help` and completion show each option, its type and its default where `method` takes `**options`.

    Editors and type checkers read names and types from `Unpack[GenerateOptions]` in the overloads.
    """
    shown: Any = method
    signature = inspect.signature(method, eval_str=True)
    given = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    shown.__signature__ = signature.replace(parameters=[*given, *_PARAMETERS])
    shown.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\nOptions:\n{_EXPLAINED}"
    return method


_DEFAULTS = Generate(id="none", prompt="")
_HINTS = get_type_hints(GenerateOptions, include_extras=True)
_PARAMETERS = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=getattr(_DEFAULTS, name), annotation=hint.__origin__
    )
    for name, hint in _HINTS.items()
]
_EXPLAINED = "\n".join(
    textwrap.fill(f"{name}: {hint.__metadata__[0]}", 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
    for name, hint in _HINTS.items()
)
