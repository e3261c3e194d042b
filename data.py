"""The data: tokenizers, pairs of UUIDs to memorize, and the text that the demo's base model is pretrained on. Knows nothing of models."""

import random
import sysconfig
import uuid
from pathlib import Path

import tiktoken
import torch

# ------------------------------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"gpt2": GPT-2's 50,257 tokens, whose files tiktoken downloads once. "bytes": the 256 bytes and an end token, made right here."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name != "gpt2":
        raise ValueError(f"tokenizer must be bytes or gpt2, not {name!r}")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets the exceptions of its HTTP library through
        raise ValueError("GPT-2's tokenizer files could not be fetched: connect to the network once, or point TIKTOKEN_CACHE_DIR to a "
                         f"folder that has them, or use --tokenizer bytes ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------------------------------------------
# UUID pairs (paper, sections 3 and 5.1)

UUID_LENGTH = 36  # 32 hex digits and 4 dashes
HEX_POSITIONS = [i for i in range(UUID_LENGTH) if i not in (8, 13, 18, 23)]
UUID_CHANCE = (30 / 16 + 1 + 1 / 4) / 32  # of guessing a digit: 30 are random, the version's is 4, the variant's one of 8, 9, a, b


def random_uuid_pairs(n: int, rng: random.Random) -> list[tuple[str, str]]:
    """n pairs (key, value) of version-4 UUIDs, with distinct keys."""
    pairs = {}
    while len(pairs) < n:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        pairs.setdefault(key, value)
    return list(pairs.items())


def uuid_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """The n pairs to memorize. With the same seed, a longer list begins with the shorter one."""
    return random_uuid_pairs(n, random.Random(f"uuid pairs {seed}"))


def encode_uuid_pairs(pairs, tokenizer) -> torch.Tensor:
    """Token ids (n, 73) of "key:value"; the last 36 of each row are the answer.

    Every character is a token of its own, whatever the tokenizer. GPT-2's would join a varying number of digits, while the accuracy
    counts single characters, all equally hard to guess, and at the same places in every row.
    """
    ids = {char: tokenizer.encode_single_token(char) for char in "0123456789abcdef-:"}
    return torch.tensor([[ids[char] for char in f"{key}:{value}"] for key, value in pairs])


# ------------------------------------------------------------------------------------------------------------------------------
# Text that every Python installation has


def standard_library_text(size: int) -> str:
    """`size` characters from the sources of Python's own standard library."""
    text = ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < size:
            text += file.read_text(encoding="utf-8", errors="replace")
    return text[:size]
