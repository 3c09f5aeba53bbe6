"""How each named pre-tokenizer cuts text into words, as data: `tokenizer.ggml.pre` -> `Splitting`.

In here: the regular expressions (Oniguruma syntax) and flags by name. The expressions are those of the
models' published `tokenizer.json` files; the names, and which models share one, are those that llama.cpp
writes and reads (src/llama-vocab.cpp). Not in here: merges and bytes (`vocabulary.py`).
Where llama.cpp only approximates a published expression (it has no case classes), the published one is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """How text is cut before merges, and what goes with the name.

    Each pattern in turn cuts the pieces that the ones before it left; what it matches and what lies between
    two matches are pieces of their own. `right_aligned` first cuts runs of digits in threes from their end.
    """

    patterns: tuple[str, ...]
    right_aligned: bool = False
    ignore_merges: bool = False  # a piece that is a whole token is taken as it is
    adds_bos: bool = False  # if the file does not say

    def pre_tokenizer(self) -> PreTokenizer:
        """Return the patterns and the byte alphabet as one step; without `right_aligned`."""
        cuts = [Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


def _ranges(codes: str) -> str:
    """Return the inside of a character class for "A-B C ..." in hexadecimal."""
    return "".join("-".join(rf"\x{{{end}}}" for end in item.split("-")) for item in codes.split())


def _any(*patterns: str) -> str:
    return "|".join(patterns)


_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _any(_ENDINGS, _LETTERS, r"\p{N}{1,3}", _MARKS, _SPACES)
_QWEN2 = _any(_ENDINGS, _LETTERS, r"\p{N}", _MARKS, _SPACES)

# Words that begin with capitals or end in small letters.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, ending: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"


_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _any(_cased(_UPPER, _LOWER, ""), r"\p{N}", _PATHS, _SPACES)
_GPT4O = _any(_cased(_UPPER, _LOWER, _ENDINGS + "?"), r"\p{N}{1,3}", _PATHS, _SPACES)
_YOUTU = _any(_cased(_UPPER, _LOWER, _ENDINGS + "?"), r"\p{N}", _PATHS, _SPACES)
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI = _any(
    r"\p{Han}+",
    _cased(_UPPER[:-1] + _NO_HAN, _LOWER[:-1] + _NO_HAN, _ENDINGS + "?"),
    r"\p{N}{1,3}",
    _MARKS,
    _SPACES,
)

_IDEOGRAPHS_AND_KANA = "[" + _ranges("4E00-9FA5 3040-309F 30A0-30FF") + "]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_V3 = (
    _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_EAST_ASIAN = "[" + _ranges("4E00-9FA5 800-4E00 AC00-D7FF") + "]+"
_CASED_LETTERS = "A-Za-z" + _ranges(
    "B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D "
    "1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 "
    "2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 "
    "2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E "
    "AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 "
    "10CC0-10CF2 118A0-118DF 1E900-1E943 "
)
_BLOOM = " ?[^(\\s|.,!?" + _ranges("2026 3002 FF0C 3001 964 6D4 60C") + ")]+"

_FAMILIES: tuple[tuple[str, Splitting], ...] = (
    (
        # The last three are encoders whose separators llama.cpp does not add for this one either.
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais "
        "trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
        Splitting(patterns=(_GPT2,)),
    ),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Splitting(patterns=(_LLAMA3,), ignore_merges=True, adds_bos=True),
    ),
    ("glm4 glm5", Splitting(patterns=(_LLAMA3,), ignore_merges=True)),
    ("chatglm-bpe dbrx smaug-bpe", Splitting(patterns=(_LLAMA3,))),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        Splitting(patterns=(_QWEN2,)),
    ),
    (
        "qwen35",
        Splitting(
            patterns=(
                _any(
                    _ENDINGS,
                    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                    _SPACES,
                ),
            )
        ),
    ),
    ("ufakzeka", Splitting(patterns=(_any(_LETTERS, r"\p{N}", _MARKS, _SPACES),))),
    ("laguna", Splitting(patterns=(r"[^\n]+|\n+", _QWEN2))),
    (
        "minicpm5",
        Splitting(
            patterns=(r"\p{N}{1,3}", _any(_ENDINGS, _LETTERS, r"\p{N}+", _MARKS, _SPACES)),
            ignore_merges=True,
        ),
    ),
    (
        "seed-coder",
        Splitting(patterns=(_any(_ENDINGS, _LETTERS, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES),)),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        Splitting(
            patterns=(
                _any(
                    "'(?i:[sdmt]|ll|ve|re)",
                    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
                    r"\s*[\r\n]|\s+(?!\S)|\s+",
                ),
            )
        ),
    ),
    (
        "exaone-moe",
        Splitting(
            patterns=(
                _any(
                    _ENDINGS,
                    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    r"\s*[\r\n]|\s+(?!\S)|\s+",
                ),
            )
        ),
    ),
    (
        "jais-2",
        Splitting(
            patterns=(
                _any(
                    _ENDINGS,
                    _LETTERS,
                    r"\p{N}{1,3}",
                    _MARKS,
                    r"\s*[\r\n]+",
                    *(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)),
                    r"\s{1,2}(?!\S)|\s",
                ),
            )
        ),
    ),
    ("tekken", Splitting(patterns=(_TEKKEN,), ignore_merges=True, adds_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Splitting(patterns=(_GPT4O,))),
    ("granite-embed-multi-97m", Splitting(patterns=(_GPT4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", Splitting(patterns=(_GPT4O,), right_aligned=True)),
    ("kimi-k2", Splitting(patterns=(_KIMI,))),
    (
        "youtu",
        Splitting(
            patterns=(
                _any(
                    "[" + _ranges("AC00-D7A3 3131-318E") + "]+",
                    "["
                    + _ranges("FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F")
                    + "]+",
                    "[" + _ranges("3105-312F") + "]+",
                    _IDEOGRAPHS_AND_KANA,
                ),
                _YOUTU,
            ),
            ignore_merges=True,
        ),
    ),
    (
        "deepseek-llm",
        Splitting(
            patterns=(
                r"[\r\n]",
                rf"\s?[{_CASED_LETTERS}]+",
                r"\s?[!-/:-~" + _ranges("FF01-FF0F FF1A-FF5E 2018-201F 3000-3002") + "]+",
                # Published as \s+$, which takes quadratic time before a word.
                r"(?<!\s)\s++\z",
                _EAST_ASIAN,
                r"\p{N}+",
            )
        ),
    ),
    (
        "deepseek-coder",
        Splitting(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    ),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        Splitting(patterns=(r"\p{N}{1,3}", _IDEOGRAPHS_AND_KANA, _DEEPSEEK_V3)),
    ),
    (
        "spark2_5",
        Splitting(
            patterns=(
                r"\p{N}{1,3}",
                _IDEOGRAPHS_AND_KANA,
                _ASCII_MARKS
                + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
                r"\p{N}",
            )
        ),
    ),
    (
        "afmoe",
        Splitting(
            patterns=(
                "["
                + _ranges(
                    "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF "
                    "1780-17FF 1000-109F AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
                )
                + "]+",
                _DEEPSEEK_V3,
            ),
            right_aligned=True,
        ),
    ),
    ("superbpe", Splitting(patterns=(r"\p{N}+",), right_aligned=True)),
    ("falcon", Splitting(patterns=(r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("default", Splitting(patterns=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        Splitting(patterns=(r"\p{N}", _GPT2)),
    ),
    ("bloom poro-chat gpt3-finnish", Splitting(patterns=(_BLOOM,))),
    ("viking", Splitting(patterns=(_BLOOM, r"\p{N}"))),
    (
        "chameleon",
        Splitting(
            patterns=(
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            adds_bos=True,
        ),
    ),
)

# The file holds only the name, so a name that is not here is refused, never guessed.
PRE_TOKENIZERS: Final[dict[str, Splitting]] = {
    name: splitting for names, splitting in _FAMILIES for name in names.split()
}
