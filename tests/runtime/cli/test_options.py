"""Options come from what they set: ranges, choices and defaults of the help texts are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import click
import pytest
from click.testing import CliRunner

from sterna.runtime.cli import main
from sterna.runtime.cli.options import _SAMPLING, model_path
from sterna.runtime.config import SETTINGS, Config, embedded_model, flag_of
from sterna.runtime.protocol.messages import Generate
from sterna.shm.errors import ModelFileError, ModelNotFound

CLI_FOLDER = Path(main.__file__).parent


def commands() -> dict[str, click.Command]:
    """Return every command by its words, groups left out."""
    found = {}
    for name, command in main.cli.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        found.update({f"{name} {sub}".strip(): each for sub, each in inner.items()})
    return found


def help_of(name: str) -> str:
    """Return the help text of a command with each run of white space as one space."""
    return " ".join(CliRunner().invoke(main.cli, [*name.split(), "--help"]).output.split())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main.run(list(arguments))
    return code, capsys.readouterr().err


def test_choices_are_those_of_the_types() -> None:
    for name, hint in get_type_hints(Config).items():
        assert SETTINGS[name].choices == (get_args(hint) if SETTINGS[name].syntax == "choice" else ())


@pytest.mark.parametrize("command", ["serve", "plan", "inspect", "perplexity", "calibrate", "trace"])
def test_help_tells_ranges_and_defaults_alike(command: str) -> None:
    text = help_of(command)
    defaults = {each.name: each.default for each in dataclasses.fields(Config)}
    shown = 0
    for name, rule in SETTINGS.items():
        found = re.search(rf"{flag_of(name)} (\S+) ([^()]*?) \[([^\]]*)\] \(STERNA_{name.upper()}\)\.", text)
        if found is None:
            continue
        shown += 1
        default = defaults[name]
        if default not in (None, dataclasses.MISSING):
            assert found[3].startswith(f"{default:g}" if isinstance(default, float) else str(default)), name
        assert found[1] == ("|".join(rule.choices) or found[1])
        assert found[1] != "TEXT"
    assert shown == {"serve": len(SETTINGS) - 1, "plan": 9, "inspect": 3}.get(command, 11)


@pytest.mark.parametrize("command", [["serve"], ["plan"], ["perplexity", "none.txt"], ["trace", "none.txt"]])
@pytest.mark.parametrize("flag", ["-c", "--ctx", "--ctx-size"])
def test_every_spelling_of_the_context(
    capsys: pytest.CaptureFixture[str], command: list[str], flag: str
) -> None:
    code, text = refusal(capsys, *command, flag, "x", *(["-o", "x"] if command[0] == "trace" else []))
    assert code in {64, 78}
    assert "--ctx-size" in text
    assert "No such option" not in text
    assert "--ctx " not in help_of(command[0])


def test_sampling_options_name_the_defaults_of_a_request() -> None:
    text = help_of("generate")
    request = Generate(id="none", prompt="")
    for spellings, _, metavar, told in _SAMPLING:
        name = spellings[-1].removeprefix("--").replace("-", "_")
        default = getattr(request, name)
        ending = told if default is None else f"{told.removesuffix('.')} [{default}]."
        assert f"{', '.join(spellings)} {metavar} {ending}" in text


def test_every_command_stands_in_a_group_and_its_line_is_whole() -> None:
    text = CliRunner().invoke(main.cli, ["--help"]).output
    for title, grouped in main.SECTIONS.items():
        assert f"\n{title}:\n" in text
        assert grouped
    lines = text.split(":\n", 2)[2].splitlines()
    told = {line.split()[0]: line for line in lines if re.match(r"  [a-z]", line)}
    assert told.keys() == main.cli.commands.keys()
    assert all(line.endswith(".") and "..." not in line for line in told.values())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", commands())
def test_help_is_of_whole_sentences(name: str) -> None:
    command = commands()[name]
    assert (command.help or "").split("\n")[0].endswith(".")
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            text = re.sub(r" \[[^\]]*\]| \([A-Z_]+\)", "", option.help or "")
            assert re.fullmatch(r"[A-Za-z].*\.", text), (option.name, text)


def test_no_command_imports_main() -> None:
    for path in CLI_FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "main", path
                assert "main" not in {alias.name for alias in node.names}, path


# ---- what is given in place of a model file ----


@pytest.mark.parametrize("model", [None, "embedded"])
def test_the_embedded_model(model: str | None) -> None:
    assert model_path(model) == embedded_model()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("https://example.org/m.gguf", "a URL; Sterna reads GGUF files from this machine's disk"),
        ("hf.co/user/repository:Q4_K_M", "a URL"),
        ("llama3.2", "no such model file; Sterna reads GGUF files, and knows no models by name"),
    ],
)
def test_what_is_no_path(capsys: pytest.CaptureFixture[str], model: str, text: str) -> None:
    with pytest.raises(ModelNotFound, match=f"^{re.escape(model)}: {text}"):
        model_path(model)
    for command in ("inspect", "validate", "plan", "serve"):
        assert refusal(capsys, command, model)[0] == 66
    assert refusal(capsys, "generate", "a", "-m", model)[0] == 66


def test_other_kinds_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = b'{"weight":{}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04" + bytes(40))
    for name, text in (("model.safetensors", "a safetensors file"), ("model.bin", "a file of PyTorch")):
        with pytest.raises(ModelFileError, match=f"{text}; Sterna reads GGUF files: convert the model"):
            model_path(str(tmp_path / name))
    code, text = refusal(capsys, "serve", str(path))
    assert (code, text.count("\n")) == (65, 1)
    assert "a safetensors file" in text


def test_a_missing_gguf_file_and_a_broken_one_are_left_to_the_reader(tmp_path: Path) -> None:
    assert model_path("none.gguf") == Path("none.gguf").absolute()
    assert model_path(str(tmp_path)) == tmp_path


def test_types_of_quantize(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refusal(capsys, "quantize", "embedded", "x.gguf", "--type", "Q4_K_M")
    assert code == 64
    assert "'Q4_K_M' is not one of F32, " in text
    assert text.rstrip().endswith("Q4_K_M is a mix of types, try Q4_K")
