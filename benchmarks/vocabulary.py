"""A vocabulary of 150,000 tokens like those of byte-level BPE, made in a second: no merges, no training."""

import random
from collections.abc import Callable
from string import ascii_lowercase

# Punctuation that tokenizers of code and JSON have as single tokens.
MARKS = (
    '","',
    '":"',
    '": "',
    '", "',
    '{"',
    '"}',
    '"]',
    '["',
    "},{",
    "</",
    "/>",
    '":',
    '",',
    "()",
    "[]",
    "{}",
    "\\n",
    "\\u",
    '\\"',
)
SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\n"


def texts(size: int = 150_000, seed: int = 0) -> tuple[bytes, ...]:
    """Texts of the tokens, without duplicates: all bytes first, then runs of digits and of white space, punctuation, Chinese
    characters and parts of them, Cyrillic and accented words, and for three quarters English-looking words and pieces of words."""
    rng = random.Random(seed)
    found = dict.fromkeys(bytes([byte]) for byte in range(256))
    found |= dict.fromkeys(f"{n:0{digits}d}".encode() for digits in (2, 3) for n in range(10**digits))
    found |= dict.fromkeys(sign.encode() * n for sign in " \n\t-=*#" for n in range(2, 65))
    found |= dict.fromkeys((space + mark).encode() for mark in MARKS for space in ("", " "))

    def fill(count: int, make: Callable[[], bytes]) -> None:
        while len(found) < count:
            found[make()] = None

    def letters(alphabet: str, low: int, high: int) -> bytes:
        return "".join(rng.choices(alphabet, k=rng.randint(low, high))).encode()

    chinese = "".join(map(chr, range(0x4E00, 0x9FA5)))
    cyrillic = "".join(map(chr, range(0x430, 0x450)))
    share = size / 100
    fill(int(2 * share), lambda: letters(SIGNS, 2, 4))
    fill(int(14 * share), lambda: letters(chinese, 1, 3))
    fill(int(16 * share), lambda: letters(chinese, 2, 2)[rng.randint(1, 2) : rng.randint(3, 5)])
    fill(int(21 * share), lambda: rng.choice((b"", b" ")) + letters(cyrillic, 2, 8))
    fill(int(24 * share), lambda: rng.choice((b"", b" ")) + letters(ascii_lowercase + "éüñçö", 3, 9))
    case = (bytes.lower, bytes.lower, bytes.capitalize)
    fill(size, lambda: rng.choice((b"", b" ", b" ")) + rng.choice(case)(letters(ascii_lowercase, 2, 10)))
    return tuple(found)
