"""The data: tokenizers, data sets, and the files they come from. Knows nothing of models.

A data set has `batch(step)`, a function of (seed, step) alone, so that neither evaluating nor
resuming changes a batch, and `validation()`, on which its `metrics` are measured. A batch is idx
and targets, token ids; a target of -100 does not count."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import uuid
from pathlib import Path

import numpy as np
import tiktoken
import torch

# ---- Tokenizers and random numbers ---------------------------------------------------------------
TOKENIZERS = {"bytes": 257, "gpt2": 50257}  # vocabulary sizes

def get_tokenizer(name):
    """The tokenizer "bytes" (256 bytes, an end token) or "gpt2" (tiktoken downloads it once)."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        options = dict(pat_str=r"[\s\S]", mergeable_ranks=ranks)
        return tiktoken.Encoding(name, special_tokens={"<|endoftext|>": 256}, **options)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of tiktoken's HTTP library
        advice = "set TIKTOKEN_CACHE_DIR, or use --tokenizer bytes"
        raise ValueError(f"cannot get GPT-2's tokenizer ({error}): {advice}") from error

def seeded(*key):
    """A random generator on the CPU whose numbers are a function of `key`."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))

def epoch_rows(n, batch_size, seed, step):
    """Which of n rows are in a step's batch. Each epoch visits every row once, in a new order."""
    first = step * batch_size
    last = first + batch_size - 1
    orders = []
    for epoch in range(first // n, last // n + 1):
        orders.append(torch.randperm(n, generator=seeded("order", seed, epoch)))
    return torch.cat(orders)[first % n :][:batch_size]

# ---- UUID pairs to memorize (paper, sections 3 and 5.1), and the text that the demo starts from --
UUID_LENGTH = 36  # 32 hex digits and 4 dashes
HEX_POSITIONS = [i for i in range(UUID_LENGTH) if i not in (8, 13, 18, 23)]
# Guessing: of 32 digits, 30 are any of 16, the version is always 4, the variant is 8, 9, a or b
UUID_CHANCE = (30 / 16 + 1 + 1 / 4) / 32

def uuid_pairs(n, rng):
    """n pairs (key, value) of version-4 UUIDs, with distinct keys, drawn by a random.Random."""
    pairs = {}
    while len(pairs) < n:
        key = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        value = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        pairs.setdefault(key, value)
    return list(pairs.items())

def encode_uuid_pairs(pairs, tokenizer):
    """Token ids (n, 73) of "key:value", one for each character, since accuracy is of characters."""
    ids = {char: tokenizer.encode_single_token(char) for char in "0123456789abcdef-:"}
    return torch.tensor([[ids[char] for char in f"{key}:{value}"] for key, value in pairs])

class UUIDPairs:
    """Pairs to memorize: idx (batch_size, 72), and the value as targets (batch_size, 36)."""
    metrics = ("char_accuracy", "exact_match", "bits")

    def __init__(self, n_pairs, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size = batch_size
        self.seed = seed
        self.pairs = uuid_pairs(n_pairs, random.Random(f"uuid pairs {seed}"))
        self.tokens = encode_uuid_pairs(self.pairs, tokenizer).to(device)  # (n_pairs, 73)

    def batch(self, step):
        tokens = self.tokens[epoch_rows(len(self.pairs), self.batch_size, self.seed, step)]
        return tokens[:, :-1], tokens[:, -UUID_LENGTH:]

    def validation(self):  # the same pairs: how many are memorized?
        for tokens in self.tokens.split(128):
            yield tokens[:, :-1], tokens[:, -UUID_LENGTH:]

def standard_library_text(size):
    """`size` characters of the sources of Python's standard library, a text that everyone has."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:size]

class DemoText:
    """Half standard library, half random UUID pairs, new in each step: (batch_size, 72) each."""
    metrics = ("val_loss",)

    def __init__(self, text_size, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.tokenizer = tokenizer
        self.text = torch.tensor(tokenizer.encode_ordinary(standard_library_text(text_size)))

    def batch(self, step):
        length = 2 * UUID_LENGTH + 1
        rng = random.Random(f"demo base {self.seed} {step}")  # other pairs than those to memorize
        last = len(self.text) - length
        starts = torch.tensor([rng.randrange(last) for _ in range(self.batch_size // 2)])
        text = self.text[starts[:, None] + torch.arange(length)]  # (batch_size // 2, 73)
        pairs = uuid_pairs(self.batch_size - len(text), rng)
        tokens = torch.cat([text, encode_uuid_pairs(pairs, self.tokenizer)]).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def validation(self):
        yield self.batch(-1)  # which no step trains on

# ---- Text ----------------------------------------------------------------------------------------
class Text:
    """Rows from random places of a token file, to predict each next token."""
    metrics = ("val_loss", "perplexity")
    val_tokens = 100_000

    def __init__(self, train, val, block_size, batch_size, seed, device="cpu"):
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.train = np.memmap(train, np.uint16, "r")
        self.val = np.memmap(val, np.uint16, "r")
        shorter = min(len(self.train), len(self.val))
        if shorter <= block_size:
            raise ValueError(f"{shorter} tokens of text are too few for --block_size {block_size}")

    def batch(self, step):
        generator = seeded("text", self.seed, step)
        places = len(self.train) - self.block_size
        starts = torch.randint(places, (self.batch_size,), generator=generator)
        rows = np.stack([self.train[i : i + self.block_size + 1] for i in starts])
        tokens = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def validation(self):
        # The first val_tokens, in rows of block_size
        n_rows = min(self.val_tokens, len(self.val) - 1) // self.block_size
        tokens = torch.from_numpy(self.val[: n_rows * self.block_size + 1].astype(np.int64))
        idx = tokens[:-1].view(n_rows, self.block_size).to(self.device)
        targets = tokens[1:].view(n_rows, self.block_size).to(self.device)
        # 4,096 tokens at once, whatever batch_size is, so that the loss is rounded alike
        few = max(1, 4_096 // self.block_size)
        yield from zip(idx.split(few), targets.split(few))

# ---- Prompts and completions ---------------------------------------------------------------------
HELD_OUT = 20  # without validation files, every 20th document or pair is held out

def read_pairs(paths):
    """[(prompt, completion), ...] from lines like {"prompt": "...", "completion": "..."}."""
    pairs = []
    for path in paths:
        for prompt, completion in read_fields(path, "prompt", "completion"):
            # The two are encoded apart, so that a prompt has the same tokens when it is used. Where
            # no space stands between them a newline is added, and later prompts need it, too
            if not prompt or not (prompt[-1].isspace() or completion[:1].isspace()):
                prompt += "\n"
            pairs.append((prompt, completion))
    return pairs

def prompt_pairs(data, val_data):
    """Pairs to train on, and to validate on: those of `val_data`, or every 20th of `data`."""
    pairs = read_pairs(data)
    if val_data:
        return pairs, read_pairs(val_data)
    return [pair for i, pair in enumerate(pairs) if i % HELD_OUT], pairs[::HELD_OUT]

class PromptPairs:
    """Completions to learn, given prompts: idx, targets (batch_size, length), -100 in prompts."""
    metrics = ("val_loss", "perplexity", "exact_match")

    def __init__(self, train, val, tokenizer, block_size, batch_size, seed, device="cpu"):
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.train = self.encode(train)
        self.val = self.encode(val)

    def encode(self, pairs):
        """[(number of prompt tokens, all tokens), ...], cut to block_size + 1 tokens."""
        rows = []
        for prompt, completion in pairs:
            tokens = self.tokenizer.encode_ordinary(prompt)
            n_prompt = len(tokens)
            tokens += self.tokenizer.encode_ordinary(completion)
            tokens.append(self.tokenizer.eot_token)
            if n_prompt <= self.block_size:
                rows.append((n_prompt, np.array(tokens[: self.block_size + 1], np.uint16)))
        if not rows:
            raise ValueError(f"of {len(pairs)} prompts none fits into --block_size {self.block_size}")
        return rows

    def pad(self, rows):  # exercise 19
        """idx, targets (len(rows), length): a multiple of 64, as each new length compiles anew."""
        longest = max(len(tokens) for _, tokens in rows) - 1
        length = min(-(-longest // 64) * 64, self.block_size)
        idx = torch.full((len(rows), length), self.tokenizer.eot_token)
        targets = torch.full_like(idx, -100)
        for i, (n_prompt, tokens) in enumerate(rows):
            tokens = torch.from_numpy(tokens.astype(np.int64))
            idx[i, : len(tokens) - 1] = tokens[:-1]
            targets[i, n_prompt - 1 : len(tokens) - 1] = tokens[n_prompt:]
        return idx.to(self.device), targets.to(self.device)

    def batch(self, step):
        rows = epoch_rows(len(self.train), self.batch_size, self.seed, step)
        return self.pad([self.train[i] for i in rows])

    def validation(self):
        for start in range(0, len(self.val), self.batch_size):
            yield self.pad(self.val[start : start + self.batch_size])

# ---- Files, and their tokens ---------------------------------------------------------------------
def write_file(path, save):
    """Let `save(file)` write a temporary file that then becomes `path`: it is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def read_lines(path):
    """("path:line", line) for each line of a text file, gzip'd or not."""
    number = 0
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line.decode("utf-8-sig")  # Windows may begin with a mark
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}:{number} cannot be read: {error}") from error
    if not number:
        raise ValueError(f"{path} is empty")

def read_fields(path, *names):
    """The strings under these names in the JSON object of each line."""
    for where, line in read_lines(path):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            strings = [row[name] for name in names]
            "".join(strings)  # TypeError unless they are strings
        except (ValueError, KeyError, TypeError):
            wanted = " and ".join(names)
            raise ValueError(f"{where} is not a JSON object with text in {wanted}: {line[:80]!r}")
        yield strings

def read_documents(paths):
    """The texts in files: all of a .txt, and the field "text" of each line of other files."""
    for path in paths:
        if str(path).endswith((".txt", ".txt.gz")):
            yield "".join(line for _, line in read_lines(path))
        else:
            for (text,) in read_fields(path, "text"):
                yield text

def split_documents(texts, split):
    """Those to train on or to validate on: every 20th, or of fewer texts the last 20th of each."""
    first = list(itertools.islice(texts, HELD_OUT))
    for i, text in enumerate(itertools.chain(first, texts)):
        if len(first) < HELD_OUT:
            cut = len(text) - len(text) // HELD_OUT
            yield text[:cut] if split == "train" else text[cut:]
        elif (i % HELD_OUT == 0) == (split == "val"):
            yield text

def token_file(paths, tokenizer, folder, split="all"):
    """A file in `folder` with the tokens of `paths` as uint16, an end token after each document."""
    # A file that has changed since has another size or time, and so another name here
    key = [(str(path), os.path.getsize(path), os.path.getmtime(path)) for path in paths]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    file = Path(folder, f"{Path(paths[0]).name}-{tokenizer.name}-{digest}-{split}.bin")
    texts = read_documents(paths)
    if split != "all":
        texts = split_documents(texts, split)

    def save(file):
        while batch := list(itertools.islice(texts, 500)):  # few at once, as they are in memory
            for tokens in tokenizer.encode_ordinary_batch(batch):
                tokens.append(tokenizer.eot_token)
                file.write(np.array(tokens, np.uint16))

    if not file.exists():
        print(f"reading {paths[0]} ...", flush=True)
        write_file(file, save)
    return file

def text_tokens(data, val_data, tokenizer, folder):
    """Token files for Text: training, and validation, from `val_data` or from what is held out."""
    if val_data:
        return token_file(data, tokenizer, folder), token_file(val_data, tokenizer, folder)
    train = token_file(data, tokenizer, folder, "train")
    return train, token_file(data, tokenizer, folder, "val")

# ---- C4 (paper, section 5.3) ---------------------------------------------------------------------
C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main"

def download(url, path, tries=2):
    """Download a file, which appears as `path` when it is whole, unless it is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        print(f"downloading {url}", flush=True)
        tries -= 1
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            if tries == 0:
                advice = f"put the file at {path}, or give another --c4_url"
                raise ValueError(f"cannot download {url} ({error}): {advice}") from error

def c4_tokens(url, shards, tokenizer, folder):
    """Token files of C4 for Text: training, and validation."""
    names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)]
    names.append("c4-validation.00000-of-00008.json.gz")
    url = url.rstrip("/")
    folder = Path(folder, re.sub(r"\W+", "-", url))
    for name in names:
        download(f"{url}/en/{name}", folder / name)
    *train, val = [folder / name for name in names]
    return token_file(train, tokenizer, folder), token_file([val], tokenizer, folder)
