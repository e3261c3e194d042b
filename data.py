"""The data: tokenizers, and what there is to learn. Knows nothing of models.

Every data set gives the batch of any step by `batch(step)`, a function of (seed, step) and nothing else: evaluating, resuming a run or
spreading it over several processes changes no batch.
"""

import functools
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


def seeded(*key) -> torch.Generator:
    """A random generator on the CPU whose numbers are a function of `key`."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


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

    Every character is a token of its own, whatever the tokenizer. GPT-2's would join digits to tokens of varying length, while the
    accuracy counts single characters, and the answer is to stand at the same place in every row.
    """
    ids = {char: tokenizer.encode_single_token(char) for char in "0123456789abcdef-:"}
    return torch.tensor([[ids[char] for char in f"{key}:{value}"] for key, value in pairs])


class UUIDPairs:
    """Random pairs to memorize. The targets are the value's tokens only."""

    def __init__(self, n_pairs, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size, self.seed = batch_size, seed
        self.pairs = uuid_pairs(n_pairs, seed)
        self.tokens = encode_uuid_pairs(self.pairs, tokenizer).to(device)  # (n_pairs, 73)

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        return torch.randperm(len(self.pairs), generator=seeded("order", self.seed, epoch)).to(self.tokens.device)

    def batch(self, step):
        """idx (batch_size, 72) and targets (batch_size, 36). Every epoch goes through all pairs, in an order of its own."""
        epoch, start = divmod(step * self.batch_size, len(self.pairs))
        order = torch.cat([self.order(epoch), self.order(epoch + 1)])
        tokens = self.tokens[order[start:start + self.batch_size]]
        return tokens[:, :-1], tokens[:, -UUID_LENGTH:]


# ------------------------------------------------------------------------------------------------------------------------------
# What the demo's base is pretrained on


def standard_library_text(size: int) -> str:
    """`size` characters from the sources of Python's own standard library: text that every reader has."""
    text = ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < size:
            text += file.read_text(encoding="utf-8", errors="replace")
    return text[:size]


class DemoText:
    """Rows from the standard library, and as many pairs of random UUIDs, new in every step.

    So the base knows what a pair looks like, and none of those to memorize: they come from another random stream.
    """

    def __init__(self, text_size, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size, self.seed, self.tokenizer, self.device = batch_size, seed, tokenizer, device
        self.text = torch.tensor(tokenizer.encode_ordinary(standard_library_text(text_size)))

    def batch(self, step):
        """idx and targets, (batch_size, 72) each."""
        length = 2 * UUID_LENGTH + 1
        rng = random.Random(f"demo base {self.seed} {step}")
        starts = torch.tensor([rng.randrange(len(self.text) - length) for _ in range(self.batch_size // 2)])
        text = self.text[starts[:, None] + torch.arange(length)]
        pairs = random_uuid_pairs(self.batch_size - len(text), rng)
        tokens = torch.cat([text, encode_uuid_pairs(pairs, self.tokenizer)]).to(self.device)  # (batch_size, 73)
        return tokens[:, :-1], tokens[:, 1:]
