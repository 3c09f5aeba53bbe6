"""What the daemon tells when it is ready: a line for scripts, or what its caller makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from ...scheduler.model.hyper import Hyperparameters
from ..config import Config
from ..memory.budget import MAX_DEFAULT_CONTEXT
from ..protocol.sockets import default_socket_url


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A daemon that serves from now on."""

    socket: str
    """ipc:// URL on which it listens."""
    name: str
    """Name of the model."""
    context: int
    """Tokens of prompt and answer together."""
    wished_context: int
    """What `context` would be with memory enough."""
    unused_precision: str = ""
    """The setting `precision` if it was given and changes nothing."""

    @property
    def is_default_socket(self) -> bool:
        """Whether a client finds the daemon without being told where."""
        return self.socket == default_socket_url()

    @property
    def shortage(self) -> str:
        """What is told after the number of tokens of a context that memory made shorter; "" for any other."""
        if self.context >= self.wished_context:
            return ""
        return f" instead of {self.wished_context}, for want of memory"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on how it differs from what was wished."""
        lines = []
        if self.shortage:
            lines.append(f"the context is {self.context} tokens{self.shortage}")
        if self.unused_precision:
            lines.append(
                f"precision {self.unused_precision} changes nothing: "
                "experts are ternary or no larger in the file"
            )
        return tuple(lines)

    def print_ready(self) -> None:
        """Print the line that scripts wait for."""
        print(f"ready socket={self.socket}", flush=True)


def wished_context(config: Config, hyper: Hyperparameters) -> int:
    """Return the context in tokens that the settings ask for, before memory is looked at."""
    return config.ctx_size or min(MAX_DEFAULT_CONTEXT, hyper.context_length)


def context_shortage(config: Config, hyper: Hyperparameters, context: int) -> str:
    """Return the end of an error about a context of `context` tokens: why it is no longer, "" if it is."""
    wished = wished_context(config, hyper)
    if context >= wished:
        return ""
    return f" ({wished} with more memory: raise memory, or set ctx_size, which is then kept)"
