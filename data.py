"""The data: tokenizers, data sets, and the files they are read from. Knows nothing of models.

A data set has `batch(step)`, a function of (seed, step) alone, so that evaluating or resuming changes no batch, and
`validation()`, on which its `metrics` are measured. A batch is (idx, targets), and targets of -100 are not counted.
"""

import concurrent.futures
import functools
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import time
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import tiktoken
import torch

# ---- Tokenizers and random numbers -----------------------------------------------------------------------------------
TOKENIZERS = {"bytes": 257, "gpt2": 50257}  # vocabulary sizes


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"bytes": the 256 bytes and an end token. "gpt2": GPT-2's tokens, from files that tiktoken downloads once."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name != "gpt2":
        raise ValueError(f"tokenizer must be bytes or gpt2, not {name!r}")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets the exceptions of its HTTP library through
        raise ValueError(f"no GPT-2 tokenizer: {type(error).__name__}; set TIKTOKEN_CACHE_DIR or use --tokenizer bytes")


def seeded(*key) -> torch.Generator:
    """A random generator on the CPU whose numbers are a function of `key`."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


@functools.lru_cache(maxsize=2)  # so each epoch's order is copied to the device once
def shuffled(n, seed, epoch, device):
    return torch.randperm(n, generator=seeded("order", seed, epoch)).to(device)


def epoch_rows(n, batch_size, seed, step, device="cpu"):
    """Which of n rows are the batch of a step. Each epoch visits every row once, in a new random order."""
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    return torch.cat([shuffled(n, seed, epoch, device) for epoch in epochs])[first % n:][:batch_size]


# ---- UUID pairs to memorize (paper, sections 3 and 5.1), and the demo's pretraining text -----------------------------
UUID_LENGTH = 36  # 32 hex digits and 4 dashes
HEX_POSITIONS = [i for i in range(UUID_LENGTH) if i not in (8, 13, 18, 23)]
UUID_CHANCE = (30 / 16 + 1 + 1 / 4) / 32  # of guessing a digit: the version's is 4, the variant's one of 8, 9, a, b


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
    """Token ids (n, 73) of "key:value", one for each character in any tokenizer: the accuracy counts characters."""
    ids = {char: tokenizer.encode_single_token(char) for char in "0123456789abcdef-:"}
    return torch.tensor([[ids[char] for char in f"{key}:{value}"] for key, value in pairs])


class UUIDPairs:
    """Random pairs to memorize: idx (batch_size, 72), and the value as the targets (batch_size, 36)."""
    metrics = ("char_accuracy", "exact_match", "bits")

    def __init__(self, n_pairs, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size, self.seed = batch_size, seed
        self.pairs = uuid_pairs(n_pairs, seed)
        self.tokens = encode_uuid_pairs(self.pairs, tokenizer).to(device)  # (n_pairs, 73)

    def batch(self, step):
        tokens = self.tokens[epoch_rows(len(self.pairs), self.batch_size, self.seed, step, self.tokens.device)]
        return tokens[:, :-1], tokens[:, -UUID_LENGTH:]

    def validation(self):
        for tokens in self.tokens.split(128):  # the same pairs: how many are memorized?
            yield tokens[:, :-1], tokens[:, -UUID_LENGTH:]


def standard_library_text(size: int) -> str:
    """`size` characters from the sources of Python's own standard library: text that every reader has."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:size]


class DemoText:
    """Rows of the standard library, and as many random UUID pairs, new in every step: idx, targets (batch_size, 72)."""
    metrics = ("val_loss",)

    def __init__(self, text_size, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size, self.seed, self.tokenizer, self.device = batch_size, seed, tokenizer, device
        self.text = torch.tensor(tokenizer.encode_ordinary(standard_library_text(text_size)))

    def batch(self, step):
        length = 2 * UUID_LENGTH + 1
        rng = random.Random(f"demo base {self.seed} {step}")  # another stream than that of the pairs to memorize
        starts = torch.tensor([rng.randrange(len(self.text) - length) for _ in range(self.batch_size // 2)])
        text = self.text[starts[:, None] + torch.arange(length)]
        pairs = random_uuid_pairs(self.batch_size - len(text), rng)
        tokens = torch.cat([text, encode_uuid_pairs(pairs, self.tokenizer)]).to(self.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def validation(self):
        yield self.batch(-1)  # which no step has


# ---- Text ------------------------------------------------------------------------------------------------------------
class Text:
    """Rows from random places of token files, to predict every next token: idx, targets (batch_size, block_size)."""
    metrics = ("val_loss", "perplexity")

    def __init__(self, train, val, block_size, batch_size, seed, device="cpu", val_tokens=100_000):
        self.block_size, self.batch_size, self.seed, self.device = block_size, batch_size, seed, device
        self.val_tokens = val_tokens
        for path in [*train, val]:
            if (n := os.path.getsize(path) // 2) <= block_size:
                raise ValueError(f"{path} has {n} tokens, and a row takes {block_size + 1}: use a smaller --block_size")
        *self.train, self.val = (np.memmap(path, np.uint16, "r") for path in [*train, val])

    def row(self, start):  # `start` counts the places where a row can begin, through all files
        for tokens in self.train:
            if start < len(tokens) - self.block_size:
                return torch.from_numpy(tokens[start:start + self.block_size + 1].astype(np.int64))
            start -= len(tokens) - self.block_size

    def batch(self, step):
        n_starts = sum(len(tokens) - self.block_size for tokens in self.train)
        starts = torch.randint(n_starts, (self.batch_size,), generator=seeded("text", self.seed, step))
        rows = torch.stack([self.row(start) for start in starts.tolist()]).to(self.device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def validation(self):
        """The val_tokens after the first token, each predicted once. The last row is padded, with targets of -100."""
        tokens = torch.from_numpy(self.val[:self.val_tokens + 1].astype(np.int64))
        padding = (0, -(len(tokens) - 1) % self.block_size)
        idx = torch.nn.functional.pad(tokens[:-1], padding).view(-1, self.block_size)
        targets = torch.nn.functional.pad(tokens[1:], padding, value=-100).view(-1, self.block_size)
        rows = max(1, 4_096 // self.block_size)  # logits are large; not batch_size, lest rounding depend on it
        for batch in zip(idx.split(rows), targets.split(rows)):
            yield tuple(tensor.to(self.device) for tensor in batch)


# ---- Prompts and completions -----------------------------------------------------------------------------------------
FIELDS = ("prompt", "completion"), ("instruction", "input", "output"), ("instruction", "output"), ("query", "response")
HELD_OUT = 20  # without validation files, the 1st, 21st, ... line or document is held out, or the end of each of a few


def read_pairs(paths):
    """[(prompt, completion), ...] from files with a JSON object in each line."""
    pairs = []
    for prompt, *more, completion in itertools.chain.from_iterable(read_fields(path, FIELDS) for path in paths):
        prompt = "\n".join([prompt, *filter(None, more)])
        if not prompt or not (prompt[-1].isspace() or completion[:1].isspace()):
            prompt += "\n"  # the two are encoded separately, so that the prompt has the same tokens in use
        pairs.append((prompt, completion))
    return pairs


def prompt_pairs(data, val_data):
    """Pairs for training and for validation. Without `val_data`, every 20th line of `data` is held out."""
    pairs = read_pairs(data)
    if val_data:
        return pairs, read_pairs(val_data)
    if len(pairs) < 2:
        raise ValueError(f"{data[0]} has a single line, and none can be held out: give more lines, or --val_data")
    return [pair for i, pair in enumerate(pairs) if i % HELD_OUT], pairs[::HELD_OUT]


class PromptPairs:
    """Completions to learn, given their prompts: idx, targets (batch_size, length), with -100 outside completions."""
    metrics = ("val_loss", "perplexity", "exact_match")

    def __init__(self, train, val, tokenizer, block_size, batch_size, seed, device="cpu"):
        self.tokenizer, self.block_size, self.batch_size = tokenizer, block_size, batch_size
        self.seed, self.device = seed, device
        self.cut = self.dropped = 0  # rows longer than block_size + 1 tokens; rows without room for a completion
        self.train, self.val = self.encode(train), self.encode(val)

    def encode(self, pairs):
        """[(number of prompt tokens, all tokens as uint16), ...]. ValueError if every prompt is too long."""
        rows = []
        for start in range(0, len(pairs), 10_000):  # lists of Python's integers take much memory
            prompts, completions = map(self.tokenizer.encode_ordinary_batch, zip(*pairs[start:start + 10_000]))
            for prompt, completion in zip(prompts, completions):
                tokens = prompt + completion + [self.tokenizer.eot_token]
                if len(prompt) > self.block_size:
                    self.dropped += 1
                else:
                    self.cut += len(tokens) > self.block_size + 1
                    rows.append((len(prompt), np.array(tokens[:self.block_size + 1], np.uint16)))
        if not rows:
            raise ValueError(f"--block_size {self.block_size} leaves no room for a completion in {len(pairs)} lines")
        return rows

    def pad(self, rows):  # exercise 19
        """idx and targets (len(rows), length): a multiple of 64, as every new length compiles again, or block_size."""
        longest = max(len(tokens) for _, tokens in rows) - 1
        length = min(-(-longest // 64) * 64, self.block_size)
        idx = torch.full((len(rows), length), self.tokenizer.eot_token)
        targets = torch.full_like(idx, -100)
        for i, (prompt, tokens) in enumerate(rows):
            tokens = torch.from_numpy(tokens.astype(np.int64))
            idx[i, :len(tokens) - 1] = tokens[:-1]
            targets[i, prompt - 1:len(tokens) - 1] = tokens[prompt:]
        return idx.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def batch(self, step):
        return self.pad([self.train[i] for i in epoch_rows(len(self.train), self.batch_size, self.seed, step)])

    def validation(self):
        for start in range(0, len(self.val), self.batch_size):
            yield self.pad(self.val[start:start + self.batch_size])


# ---- Files, and their tokens -----------------------------------------------------------------------------------------
PROGRESS_EVERY = 5.0  # seconds
PIECE = re.compile(r".{1,20000}(?:(?<=\S)(?=[ \n])|\Z)|.{1,20000}", re.DOTALL)  # cut where GPT-2's pattern cuts too


def write_file(path, save):
    """Let `save(file)` write to a temporary file that then replaces `path`. On an error, the old file is unchanged."""
    temporary = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")  # another process may be writing the same path
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a full disk in one
        raise ValueError(f"cannot write {path}: {getattr(cause, 'strerror', None) or error}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def fingerprint(paths):
    """A checksum of the contents of some files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(b"%d:" % os.path.getsize(path))
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class Progress:
    """Prints every few seconds how far a long job is: "NAME: 12.0 MB, 2.10 MB/s, 161 s left"."""
    def __init__(self, name, total, done=0):
        self.name, self.total, self.done, self.time = name, total, done, time.monotonic()

    def show(self, done):
        seconds = time.monotonic() - self.time  # since the last line
        if seconds >= PROGRESS_EVERY and done > self.done:
            speed, left = (done - self.done) / seconds, self.total - done
            print(f"{self.name}: {done / 1e6:,.1f} MB, {speed / 1e6:,.2f} MB/s, {left / speed:,.0f} s left", flush=True)
            self.done, self.time = done, self.time + seconds


def read_lines(path):
    """("path:line", line) for each line of a text file, gzip'd or not. ValueError if it cannot be read."""
    number = 0
    try:
        with open(path, "rb") as raw:
            progress = Progress(f"reading {path}", os.path.getsize(path))
            for number, line in enumerate(gzip.open(raw) if str(path).lower().endswith(".gz") else raw, 1):
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows writes a mark
                progress.show(raw.tell())
    except Exception as error:  # no such file, damaged, cut short, not UTF-8, too large for the memory
        raise ValueError(f"{path}:{number}: cannot read it ({str(error) or 'out of memory'}); delete a broken download")
    if number == 0:
        raise ValueError(f"{path} is empty")


def read_fields(path, choices):
    """For each line, a JSON object: its strings under the first names in `choices` that it has, such as [["text"]]."""
    for where, line in read_lines(path):
        if line.isspace():
            continue
        try:
            row = {name: value for name, value in json.loads(line).items() if value is not None}
            strings = next([row[name] for name in names] for names in choices if row.keys() >= set(names))
        except (ValueError, RecursionError, AttributeError, StopIteration):  # not JSON, not an object, or other fields
            strings = [None]
        if not all(isinstance(string, str) for string in strings):
            wanted = ", or ".join(map(" and ".join, choices))
            raise ValueError(f"{where}: it must be a JSON object with strings {wanted}, not {line.strip()[:80]!r}")
        yield strings


def read_documents(paths):
    """The texts in files: all of a .txt; of other files, the field "text" of each line. Both may be gzip'd."""
    for path in paths:
        if str(path).lower().endswith((".txt", ".txt.gz")):
            yield "".join(line for _, line in read_lines(path))
        else:
            yield from (text for [text] in read_fields(path, [["text"]]))


def hold_out(texts):
    """(text, held_out): every 20th text is held out for validation, or the last 20th of each if there are fewer."""
    first = list(itertools.islice(texts, HELD_OUT))
    if len(first) < HELD_OUT:
        cuts = [(text, len(text) - len(text) // HELD_OUT) for text in first]
        return [part for text, cut in cuts for part in ((text[:cut], False), (text[cut:], True)) if part[0]]
    return ((text, i % HELD_OUT == 0) for i, text in enumerate(itertools.chain(first, texts)))


def tokenize(texts, tokenizer, train, val=None):
    """Write texts, an iterator, to the open file `train` as uint16, an end token after each; held-out ones to `val`."""
    if tokenizer.n_vocab > 1 << 16:
        raise ValueError(f"{tokenizer.name} has {tokenizer.n_vocab:,} tokens, more than the 65,536 of uint16")

    def pieces():
        for text, held_out in hold_out(texts) if val else ((text, False) for text in texts):
            *starts, last = PIECE.findall(text) or [""]
            yield from ((piece, [], held_out) for piece in starts)
            yield last, [tokenizer.eot_token], held_out

    def encode(text, end, held_out):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may have lone surrogates
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        return np.append(tokens.astype(np.uint16), np.uint16(end)), val if held_out else train

    queue = pieces()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(queue, 500)):  # few, as they are in memory
            for tokens, file in pool.map(encode, *zip(*batch)):
                file.write(tokens)


def token_files(paths, tokenizer, folder, splits=("all",)):
    """Cached files in `folder` with the tokens of `paths`: one, or one for each of the splits ("train", "val")."""
    key = [HELD_OUT, *map(os.path.realpath, paths), fingerprint(paths)]
    name = re.sub(r"[^\w.-]", "_", Path(paths[0]).name)[:40]
    name += f"-{tokenizer.name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    files = [Path(folder, f"{name}-{split}.bin") for split in splits]
    checksums = files[0].with_suffix(".sha256")
    if not all(file.exists() for file in [*files, checksums]):
        texts = read_documents(paths)
        if len(files) == 1:
            write_file(files[0], lambda file: tokenize(texts, tokenizer, file))
        else:
            write_file(files[0], lambda train: write_file(files[1], lambda val: tokenize(texts, tokenizer, train, val)))
        write_file(checksums, lambda file: file.write(fingerprint(files).encode()))
    if checksums.read_bytes() != fingerprint(files).encode():
        raise ValueError(f"{' or '.join(map(str, files))} is damaged: delete it and run again")
    return files


def text_tokens(data, val_data, tokenizer, folder):
    """Token files for Text: (a list of one for training, one for validation). Without `val_data`, some is held out."""
    if val_data:
        return token_files(data, tokenizer, folder), *token_files(val_data, tokenizer, folder)
    *train, val = token_files(data, tokenizer, folder, ("train", "val"))
    return train, val


# ---- C4 (paper, section 5.3) -----------------------------------------------------------------------------------------
C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main"
WAITS = (1, 2, 4, 8, 16)  # seconds between retries; they start over whenever data arrives


def fetch(url, path):
    """Download a gzip file. Its version on the server is in the name of the part file, so no other one is resumed."""
    response = urllib.request.urlopen(url, timeout=30)
    version = response.headers["ETag"] or response.headers["Last-Modified"]
    total = int(response.headers["Content-Length"] or 0) or float("inf")
    part = path.with_name(re.sub(r"[^\w.]", "-", f"{path.name} {version or os.getpid()} {total}.part"))
    part.touch()
    size = part.stat().st_size if version else 0
    if 0 < size < total < float("inf"):
        request = urllib.request.Request(url, headers={"Range": f"bytes={size}-", "If-Range": version})
        response = urllib.request.urlopen(request, timeout=30)
        if response.headers["Content-Range"] != f"bytes {size}-{total - 1}/{total}":  # it does not resume
            size, response = 0, urllib.request.urlopen(url, timeout=30)
    progress = Progress(url, total, size)
    with response, open(part, "r+b") as file:  # another process may write the same bytes to the same places
        file.seek(size)
        while size < total and (chunk := response.read(min(1 << 16, total - size))):
            if size == 0 and not chunk.startswith(b"\x1f\x8b"):
                raise ValueError(f"it is not a gzip file, but begins with {chunk[:16]!r}")
            size += file.write(chunk)
            progress.show(size)
    if size == 0 or total not in (float("inf"), part.stat().st_size):
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")
    os.replace(part, path)
    for other_version in path.parent.glob(f"{path.name}*.part"):
        other_version.unlink(missing_ok=True)


def download(url, path):
    """Download a gzip file, which appears as `path` when it is whole. ValueError if it cannot be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    most, waits = 0, iter(() if url.startswith("file:") else WAITS)
    while not path.exists():
        try:
            fetch(url, path)
        except Exception as error:  # an OSError or HTTPException, unless a second try is hopeless
            size = max((part.stat().st_size for part in path.parent.glob(f"{path.name}*.part")), default=0)
            if size > most:
                most, waits = size, iter(WAITS)
            code = getattr(error, "code", 500)
            hopeless = isinstance(error, ValueError) or 300 <= code < 500 and code not in (408, 416, 429)
            wait = None if hopeless else next(waits, None)
            reason = "".join(char if char.isprintable() else " " for char in str(error)).strip("<>")
            if wait is None:
                raise ValueError(f"cannot download {url} ({reason}): try another --c4_url, or put the file at {path}")
            print(f"{url}: {reason}; retrying in {wait} s", flush=True)
            time.sleep(wait)


def c4_tokens(url, shards, tokenizer, folder):
    """Token files of C4 for Text: (a list, one a shard, for training, one for validation)."""
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[!-~]*)?|file:/.*", url, re.ASCII) or not 1 <= shards <= 1024:
        raise ValueError(f"--c4_url must begin with http(s):// or file:/, and --shards be 1 to 1024: {url!r}, {shards}")
    names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)] + ["c4-validation.00000-of-00008.json.gz"]
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:8]  # each address has files of its own
    shard_folder = Path(folder, re.sub(r"\W+", "-", url.rstrip("/"))[-100:] + "-" + digest)
    for name in names:
        download(f"{url.rstrip('/')}/en/{name}", shard_folder / name)
    *train, val = (token_files([shard_folder / name], tokenizer, folder)[0] for name in names)
    return train, val
