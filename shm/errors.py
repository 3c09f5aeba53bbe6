"""Every error that Sterna raises on purpose, as one tree.

    SternaError
    |-- ConfigError          a setting is wrong                               exit 78
    |-- UsageError           a command line is wrong                          exit 64
    |-- ModelFileError       a model file is corrupt or cannot be run         exit 65
    |-- ModelNotFound        no such model file                               exit 66
    |-- ModelReadError       the medium failed while a model was read         exit 74
    |-- DaemonUnreachable    no daemon answers at that socket                 exit 69
    |-- AlreadyRunning       another daemon holds the socket                  exit 75
    |-- OutOfResources       memory or descriptors ran out                    exit 71
    |-- NotPermitted         the system refused access                        exit 77
    |-- StartFailed          a process did not start in time                  exit 70
    `-- RequestError         one request failed; travels over the wire by code
        |-- BadRequest (NoChatTemplate), TooLong, Overloaded, NotFound, Cancelled
        `-- WorkerLost, EngineLost, ShuttingDown, InternalError, ProtocolError

The lowest folder holds them because every folder raises some. Exit codes follow sysexits.
"""

from __future__ import annotations

from typing import ClassVar


class SternaError(Exception):
    """Base of all: `code` names the class, `retryable` says whether asking again may help."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class ConfigError(SternaError):
    """A configuration value, file or environment variable is wrong."""

    code = "bad_config"
    exit_code = 78


class UsageError(SternaError):
    """The command line is wrong."""

    code = "usage"
    exit_code = 64


class ModelFileError(SternaError):
    """A model file is corrupt, incomplete or cannot be run."""

    code = "bad_model"
    exit_code = 65


class ModelNotFound(SternaError):
    """There is no model file under that path."""

    code = "model_not_found"
    exit_code = 66


class ModelReadError(SternaError):
    """Reading the model file failed on the medium."""

    code = "model_read"
    retryable = True
    exit_code = 74


class DaemonUnreachable(SternaError):
    """No daemon answered at the socket."""

    code = "unreachable"
    retryable = True
    exit_code = 69


class AlreadyRunning(SternaError):
    """Another daemon holds the socket's lock."""

    code = "already_running"
    retryable = True
    exit_code = 75


class OutOfResources(SternaError):
    """The system has no memory or file descriptors left for what was asked."""

    code = "out_of_resources"
    exit_code = 71


class NotPermitted(SternaError):
    """The system refused access to a file or socket."""

    code = "not_permitted"
    exit_code = 77


class StartFailed(SternaError):
    """A process of the daemon did not become ready."""

    code = "start_failed"
    exit_code = 70


class RequestError(SternaError):
    """One request ended with an error; the daemon lives on."""


class BadRequest(RequestError):
    """A field of the request is missing, unknown or out of range."""

    code = "bad_request"
    exit_code = 64


class NoChatTemplate(BadRequest):
    """The model's file has no chat template, so that a conversation cannot become a prompt."""

    code = "no_chat_template"


class TooLong(RequestError):
    """Prompt and answer do not fit the context."""

    code = "too_long"
    exit_code = 65


class Overloaded(RequestError):
    """The queue is full, or memory is short for the moment.

    `retry_after_s`: mean time in which a position in the queue became free lately; None if that is not known.
    """

    code = "overloaded"
    retryable = True
    exit_code = 75

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class NotFound(RequestError):
    """No request of that id belongs to this client."""

    code = "not_found"


class Cancelled(RequestError):
    """The request was cancelled."""

    code = "cancelled"
    exit_code = 130


class WorkerLost(RequestError):
    """An expert worker died while it computed for this request."""

    code = "worker_lost"
    retryable = True
    exit_code = 75


class EngineLost(RequestError):
    """The scheduler process died while it computed for this request."""

    code = "engine_lost"
    retryable = True
    exit_code = 75


class ShuttingDown(RequestError):
    """The daemon takes no new requests because it is stopping."""

    code = "shutting_down"
    retryable = True
    exit_code = 75


class InternalError(RequestError):
    """An invariant broke; the message says which."""

    code = "internal"
    exit_code = 70


class ProtocolError(RequestError):
    """A frame is not what the protocol says."""

    code = "protocol"
    exit_code = 70


REQUEST_ERRORS: dict[str, type[SternaError]] = {
    cls.code: cls
    for cls in (
        BadRequest, NoChatTemplate, TooLong, Overloaded, NotFound, Cancelled, WorkerLost,
        EngineLost, ShuttingDown, InternalError, ProtocolError, ModelReadError, ModelFileError,
    )
}  # fmt: skip
"""What may end a request, by code: also the file's errors, for one whose experts cannot be had from it."""


def error_of(code: str, text: str) -> SternaError:
    """Return the error of whatever class `code` names; an unknown code is an InternalError."""
    classes = [SternaError]
    for cls in classes:
        if cls.code == code and cls is not SternaError and cls is not RequestError:
            return cls(text)
        classes.extend(cls.__subclasses__())
    return InternalError(text)


def error_of_exit(exit_code: int) -> type[SternaError]:
    """Return the class that a daemon which ended with that code met; StartFailed for a code of no class."""
    found = (cls for cls in SternaError.__subclasses__() if cls.exit_code == exit_code)
    return next((cls for cls in found if cls is not RequestError), StartFailed)


def request_error(code: str, text: str, retry_after_s: float | None = None) -> SternaError:
    """Return the error that `code` names on the wire; an unknown code is an InternalError."""
    error = error_of(code, text)
    if isinstance(error, Overloaded):
        error.retry_after_s = retry_after_s
    return error
