"""How the named pre-tokenizers cut words; every cut here is llama.cpp's too."""

from __future__ import annotations

import time
from functools import cache

import pytest
from tests.runtime.text.small_vocabularies import byte_level

from sterna.runtime.text.metadata import TokenType
from sterna.runtime.text.pre_tokenizers import PRE_TOKENIZERS, Splitting
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.runtime.text.vocabulary import ALPHABET, ByteLevelBpe, digits_in_threes
from sterna.shm.errors import BadRequest

FAMILIES = {splitting: name for name, splitting in reversed(PRE_TOKENIZERS.items())}


def words(name: str, text: str) -> list[str]:
    """Return the words of an ASCII text."""
    cut = PRE_TOKENIZERS[name].pre_tokenizer().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'm  a1234 b!\n\n", ["I", "'m", " ", " a", "1234", " b", "!", "\n\n"]),
        ("gpt-2", "I'M x", ["I", "'", "M", " x"]),
        (
            "llama-bpe",
            "I'M  (a) 12345!\n\n x",
            ["I", "'M", " ", " (", "a", ")", " ", "123", "45", "!\n\n", " x"],
        ),
        ("qwen2", "a12 \n x", ["a", "1", "2", " \n", " x"]),
        ("qwen35", "a12 \n x", ["a", "1", "2", " \n", " x"]),
        ("ufakzeka", "It's", ["It", "'s"]),
        ("laguna", "a \n\nb", ["a", " ", "\n\n", "b"]),
        ("minicpm5", "12345 a", ["123", "45", " a"]),
        ("seed-coder", "a!!\nb", ["a", "!!", "\n", "b"]),
        ("bailingmoe", "we'RE\n\n!", ["we", "'RE", "\n\n", "!"]),
        ("exaone-moe", "one two  3", ["one two", " ", " ", "3"]),
        ("jais-2", "a" + " " * 7 + "b", ["a", " " * 4, " " * 2, " b"]),
        ("tekken", "camelCase HTTPServer's 12", ["camel", "Case", " HTTPServer", "'s", " ", "1", "2"]),
        ("gpt-4o", "camelCase it's 1234/\n", ["camel", "Case", " it's", " ", "123", "4", "/\n"]),
        ("kimi-k2", "camelCase it's 1234", ["camel", "Case", " it's", " ", "123", "4"]),
        ("youtu", "it's 12", ["it's", " ", "1", "2"]),
        ("deepseek-llm", "ab1234, c  \n", ["ab", "1234", ",", " c", "  ", "\n"]),
        ("deepseek-coder", "ab12, c", ["ab", "1", "2", ",", " c"]),
        ("deepseek-v3", "ab1234 .x+y\n", ["ab", "123", "4", " .", "x", "+y", "\n"]),
        ("spark2_5", "a!\n\n", ["a", "!", "\n", "\n"]),
        ("falcon", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("starcoder", "x12 y", ["x", "1", "2", " y"]),
        ("bloom", "a b12, (c)", ["a", " b12", ", (", "c", ")"]),
        ("viking", "a b12", ["a", " b", "1", "2"]),
        ("chameleon", "<a> x  1.", ["<", "a", ">", " x", "  ", "1", "."]),
    ],
)
def test_words(name: str, text: str, expected: list[str]) -> None:
    assert words(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2", "e|\u0301a"),
        ("qwen35", "e\u0301a"),
        ("kimi-k2", "中文|abc"),
        ("deepseek-v3", "中文|abc|り"),
        ("youtu", "한국어|中"),
        ("bloom", "a|。|b"),
    ],
)
def test_words_beyond_ascii(name: str, text: str) -> None:
    cut = "".join(text.split("|"))
    found = PRE_TOKENIZERS[name].pre_tokenizer().pre_tokenize_str(cut)
    assert "|".join(cut[start:end] for _, (start, end) in found) == text


def test_digits_are_grouped_from_the_right() -> None:
    assert {name for name, s in PRE_TOKENIZERS.items() if s.right_aligned} == {
        *("superbpe", "tiny_aya", "cohere2moe", "afmoe"),
    }
    for text in (
        "",
        "1",
        "12|345",
        "1|234",
        "x|123|456|y",
        "1|234|567",
        "12| |3| |12|345",
        "\u00b2\u00bd|\u2167\u0663\uff11",
    ):
        assert "|".join(digits_in_threes(text.replace("|", ""))) == text
    tok = Tokenizer.from_metadata(byte_level("superbpe"), "digits.gguf")
    assert [tok.token_bytes(i) for i in tok.encode("1123 1231")] == [
        b"1",
        b"123",
        b" ",
        b"1",
        b"2",
        b"3",
        b"1",
    ]


def test_flags_that_go_with_the_names() -> None:
    by_flag = {
        name: (s.ignore_merges, s.adds_bos)
        for name, s in PRE_TOKENIZERS.items()
        if s.ignore_merges or s.adds_bos
    }
    both = (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "tekken",
    )
    merges_only = ("glm4", "glm5", "minicpm5", "youtu", "granite-embed-multi-97m")
    expected = dict.fromkeys((*both, "jina-v5-nano"), (True, True)) | dict.fromkeys(
        merges_only, (True, False)
    )
    assert by_flag == expected | {"chameleon": (False, True)}
    assert Tokenizer.from_metadata(byte_level("llama-bpe"), "l.gguf").adds_bos
    assert not Tokenizer.from_metadata(byte_level("llama-bpe", add_bos_token=False), "l.gguf").adds_bos
    assert not Tokenizer.from_metadata(byte_level("llama-bpe", bos_token_id=None), "l.gguf").adds_bos
    assert not Tokenizer.from_metadata(byte_level("glm4"), "g.gguf").adds_bos


def test_whole_words_are_taken_as_they_are_but_never_control_tokens() -> None:
    whole = (("hello", 1), ("secret", 3))
    for pre, expected in (("llama-bpe", ["hello"]), ("dbrx", list("hello"))):
        tok = Tokenizer.from_metadata(byte_level(pre, whole), "w.gguf")
        assert [tok.id_to_piece(i) for i in tok.encode("hello", add_bos=False)] == expected
        assert [tok.id_to_piece(i) for i in tok.encode("secret", add_bos=False)] == list("secret")
        assert len(tok.encode("secret", add_bos=False, special=True)) == 1


@cache
def family(splitting: Splitting) -> ByteLevelBpe:
    return ByteLevelBpe(list(ALPHABET), [TokenType.NORMAL] * 256, [], splitting)


HOSTILE = (
    *(
        "a",
        "A",
        " ",
        "\n",
        "7",
        "'",
        ".",
        "aA",
        "a ",
        " \n",
        "\t.",
        "!A",
        "a\u0301",
        "\u0301",
        "中",
        "\u0e01",
    ),
    *("\U0001f600", "\u00a0.", "\u3000", "IMGIMG", "<sentinel:"),
)


def hostile(n_chars: int) -> list[str]:
    """Texts that make expressions step back; each again before a letter and behind one."""
    repeated = [part * (n_chars // len(part)) for part in HOSTILE]
    return [*repeated, *(text + "x" for text in repeated), *("1" + text for text in repeated)]


@pytest.mark.parametrize("splitting", FAMILIES, ids=FAMILIES.get)
def test_nothing_is_lost_of_hostile_texts(splitting: Splitting) -> None:
    texts = hostile(1000)
    assert [bytes(ids) for ids in family(splitting).encode(texts)] == [text.encode() for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("splitting", FAMILIES, ids=FAMILIES.get)
def test_hostile_texts_take_linear_time(splitting: Splitting, capsys: pytest.CaptureFixture[str]) -> None:
    slowest = (0.0, "")
    for text in hostile(50_000):
        started_s = time.process_time()
        (ids,) = family(splitting).encode([text])
        slowest = max(slowest, (time.process_time() - started_s, ascii(text[:3])))
        assert len(ids) == len(text.encode())
    with capsys.disabled():
        print(f"\n{FAMILIES[splitting]}: {slowest[0]:.2f} s for 50,000 characters of {slowest[1]}", end="")


@pytest.mark.slow
def test_where_an_expression_gives_up_the_text_is_refused() -> None:
    tok = Tokenizer.from_metadata(byte_level("llama-bpe"), "l.gguf")
    with pytest.raises(BadRequest, match="text: holds too long a run of like characters"):
        tok.encode(" " * 11_000_000 + "x")
    assert tok.decode(tok.encode(" the", add_bos=False)) == " the"
