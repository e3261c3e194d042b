"""The data: tokenizers, and what there is to learn. Knows nothing of models.

Every data set gives the batch of any step by `batch(step)`, a function of (seed, step) and nothing else: evaluating,
resuming a run or spreading it over several processes changes no batch.
"""

import array
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import gzip
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
import zlib
from pathlib import Path

import numpy as np
import tiktoken
import torch

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


TOKENIZERS = {"bytes": 257, "gpt2": 50257}  # and how many tokens they have


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"gpt2": GPT-2's 50,257 tokens, from files that tiktoken downloads once. "bytes": the 256 bytes and an end token.
    """
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name != "gpt2":
        raise ValueError(f"tokenizer must be bytes or gpt2, not {name!r}")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets the exceptions of its HTTP library through
        raise ValueError("GPT-2's tokenizer files could not be fetched: connect to the network once, or point "
                         "TIKTOKEN_CACHE_DIR to a folder that has them, or use --tokenizer bytes "
                         f"({type(error).__name__})") from error


def seeded(*key) -> torch.Generator:
    """A random generator on the CPU whose numbers are a function of `key`."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch, device):
    return torch.randperm(n, generator=seeded("order", seed, epoch)).to(device)


def epoch_rows(n, batch_size, seed, step, device="cpu"):
    """Which of n rows make up the batch of a step. Every epoch goes through all of them, in an order of its own, which
    is sent to the device once.
    """
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    return torch.cat([shuffled(n, seed, epoch, device) for epoch in epochs])[first % n:][:batch_size]


def to_device(tensor, device):
    """A copy to a GPU runs beside the computation if it starts from pinned memory."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------------------
# UUID pairs (paper, sections 3 and 5.1)

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
    """Token ids (n, 73) of "key:value"; the last 36 of each row are the answer.

    Every character is a token of its own, whatever the tokenizer. GPT-2's would join digits to tokens of varying
    length, while the accuracy counts single characters, and the answer is to stand at the same place in every row.
    """
    ids = {char: tokenizer.encode_single_token(char) for char in "0123456789abcdef-:"}
    return torch.tensor([[ids[char] for char in f"{key}:{value}"] for key, value in pairs])


class UUIDPairs:
    """Random pairs to memorize. The targets are the value's tokens only."""

    def __init__(self, n_pairs, tokenizer, batch_size, seed, device="cpu"):
        self.batch_size, self.seed = batch_size, seed
        self.pairs = uuid_pairs(n_pairs, seed)
        self.tokens = encode_uuid_pairs(self.pairs, tokenizer).to(device)  # (n_pairs, 73)

    def batch(self, step):
        """idx (batch_size, 72) and targets (batch_size, 36). Every epoch goes through all pairs, in an order of its
        own.
        """
        tokens = self.tokens[epoch_rows(len(self.pairs), self.batch_size, self.seed, step, self.tokens.device)]
        return tokens[:, :-1], tokens[:, -UUID_LENGTH:]


# ----------------------------------------------------------------------------------------------------------------------
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
        tokens = torch.cat([text, encode_uuid_pairs(pairs, self.tokenizer)])  # (batch_size, 73)
        tokens = to_device(tokens, self.device)
        return tokens[:, :-1], tokens[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def reading(path):
    """Open a file, gzip'd or not: -> (its bytes, the file on the disk, whose position says how far it has been read).

    ValueError if it cannot be read, or turns out corrupt or cut short.
    """
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if str(path).lower().endswith(".gz") else raw) as file:
            yield file, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is corrupt or cut short ({error}): put a whole copy in its place; "
                         "if this program downloaded it, delete it and run again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def decode(line, path, number):
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows likes to put a mark first
    except UnicodeDecodeError as error:
        number += line.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason}): convert the file to UTF-8") from None


def read_rows(path, seen=lambda position: None):
    """(where, row) for every line, an object of JSON; `where` is "path:line". `seen` is told the position in the file,
    in bytes.
    """
    where = None
    with reading(path) as (file, raw):
        for number, line in enumerate(file, 1):
            seen(raw.tell())
            if line.strip():
                where, text = f"{path}:{number}", decode(line, path, number)
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f'{where}: every line must be an object of JSON, such as {{"text": "..."}}, not '
                                     f'{text.strip()[:40]!r}')
                yield where, row
    if where is None:
        raise ValueError(f"{path} is empty")


def get_string(row, name, where):
    if not isinstance(row.get(name), str):
        raise ValueError(f"{where}: " + (f"the field {name} is not a string" if name in row else f"there is no field "
                         f"{name}"))
    return row[name]


def read_documents(path, seen=lambda position: None):
    """The texts of a file: the whole of a .txt, the field "text" of every line of a .jsonl or .json, each also with .gz
    after it.

    ValueError, naming the file and the line, for whatever is wrong with it.
    """
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    if suffix == ".txt":
        with reading(path) as (file, _):
            text = decode(file.read(), path, 1)
        if not text.strip():
            raise ValueError(f"{path} is empty")
        yield text
    elif suffix in (".jsonl", ".json"):
        for where, row in read_rows(path, seen):
            yield get_string(row, "text", where)
    else:
        raise ValueError(f"{path}: its name must end in .txt, .jsonl or .json, or in one of these and .gz")


PROGRESS_EVERY = 5.0  # seconds
HELD_OUT = 20  # without files of its own, validation gets one in so many documents or lines: the first, the 21st, ...


class Documents:
    """The documents of some files, one after another: "all", or the part for "train" or for "val". `share` of them has
    been read.

    Of a single document, the last 20th of its characters is for validation. ValueError if a file is not there.
    """

    def __init__(self, paths, part="all"):
        self.paths, self.part, self.share = [Path(path) for path in paths], part, 0.0
        try:
            self.stats = [path.stat() for path in self.paths]
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None

    def read(self):
        sizes = [stat.st_size for stat in self.stats]
        for i, path in enumerate(self.paths):
            def seen(position):
                self.share = (sum(sizes[:i]) + position) / sum(sizes)
            yield from read_documents(path, seen)

    def __iter__(self):
        documents = self.read()
        if self.part == "all":
            return documents
        first = list(itertools.islice(documents, 2))
        if len(first) == 1:
            cut = len(first[0]) - len(first[0]) // HELD_OUT
            return iter([first[0][:cut] if self.part == "train" else first[0][cut:]])
        numbered = enumerate(itertools.chain(first, documents))
        return (text for i, text in numbered if (self.part == "val") == (i % HELD_OUT == 0))


class Progress:
    """Prints, every few seconds, how far a long job is: "URL: 12.0 MB, 2.10 MB/s, 0:00:08 left"."""

    def __init__(self, what, unit, done=0):
        self.what, self.unit, self.first = what, unit, done
        self.start = self.printed = time.monotonic()

    def show(self, done, total=None):
        """Both in millionths of the unit; `total` may be unknown."""
        now = time.monotonic()
        if now - self.printed >= PROGRESS_EVERY and done > self.first:
            self.printed, speed = now, (done - self.first) / (now - self.start)
            left = f", {datetime.timedelta(seconds=int((total - done) / speed))} left" if total else ""
            print(f"{self.what}: {done / 1e6:,.1f} {self.unit}, {speed / 1e6:,.2f} {self.unit}/s{left}", flush=True)


@contextlib.contextmanager
def writing(path):
    """What the system says against writing `path` becomes a ValueError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: flat files of uint16, an end token after each document

PIECE = 20_000  # characters that are encoded in one go


def pieces(text):
    """(piece, whether it is the last), so that threads share a long text. No token changes by it where there are words.

    A cut is at a space or newline that follows something else, where GPT-2's pattern starts anew anyway.
    """
    start = 0
    while len(text) - start > 2 * PIECE:
        space = re.compile(r"\S[ \n]").search(text, start + PIECE, start + 2 * PIECE)
        end = space.start() + 1 if space else start + 2 * PIECE
        yield text[start:end], False
        start = end
    yield text[start:], True


def encode(documents, tokenizer):
    """Lists of tokens, in order, with the end token after each document. All cores encode, while the next documents are
    read.
    """
    waiting, threads = collections.deque(), os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:  # encode_ordinary_batch wants all texts at once
        for piece, last in itertools.chain.from_iterable(map(pieces, documents)):
            waiting.append((pool.submit(tokenizer.encode_ordinary, piece), [tokenizer.eot_token] * last))
            if len(waiting) > 32 * threads:
                tokens, end = waiting.popleft()
                yield tokens.result() + end
        for tokens, end in waiting:
            yield tokens.result() + end


def tokenize(documents, tokenizer, path):
    """Write the tokens of an iterable of texts to `path`: flat uint16. The file appears under its name when it is
    whole.
    """
    if tokenizer.n_vocab > 1 << 16:
        raise ValueError(f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab:,} tokens: more than the 65,536 that "
                         "fit uint16")
    count, unfinished = 0, Path(f"{path}.{os.getpid()}.part")
    progress = Progress(f"tokenizing {path}", "million tokens")
    with writing(path):
        try:
            with open(unfinished, "wb", buffering=1 << 20) as file:
                for tokens in encode(documents, tokenizer):
                    file.write(array.array("H", tokens).tobytes())
                    count += len(tokens)
                    share = getattr(documents, "share", 0)
                    progress.show(count, count / share if share else None)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def token_file(documents, tokenizer, folder):
    """The path in `folder` of the tokens of some Documents. Made once: its name says of what, so files that changed get
    another.
    """
    files = zip(documents.paths, documents.stats)
    key = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in files]
    digest = hashlib.sha256(repr((HELD_OUT, key)).encode()).hexdigest()[:12]
    path = Path(folder) / f"{documents.paths[0].name[:80]}-{documents.part}-{tokenizer.name}-{digest}.bin"
    if not path.exists():
        tokenize(documents, tokenizer, path)
    return path


def text_tokens(data, val_data, tokenizer, folder):
    """Token files for Text, from the user's: (a list of one for training; one for validation).

    Without `val_data`, every 20th document is for validation.
    """
    train, val = Documents(data), Documents(val_data or data)
    if not val_data:
        train.part, val.part = "train", "val"
    return [token_file(train, tokenizer, folder)], token_file(val, tokenizer, folder)


# ----------------------------------------------------------------------------------------------------------------------
# C4 (paper, section 5.3)

C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main"
WAITS = (1, 2, 4, 8, 16)  # seconds before trying again, since a download last got on


def fetch(url, part):
    """Append to the file `part` what it lacks of `url`. An OSError or HTTPException says why that did not succeed.

    What is in `part` counts only if the server goes on right there; otherwise the file is begun anew.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        if response.status == 206:
            answer = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not answer:
                part.unlink(missing_ok=True)
                raise ConnectionError("the server did not continue where it was asked to")
            total = int(answer[1])
        else:
            have = 0
        progress = Progress(url, "MB", have)
        while chunk := response.read(1 << 16):
            if not have and not chunk.startswith(b"\x1f\x8b"):
                raise gzip.BadGzipFile(f"it is no gzip file, but begins with {chunk[:16]!r}")
            with writing(part), open(part, "ab" if have else "wb") as file:
                file.write(chunk)
            have += len(chunk)
            progress.show(have, total)
    if have == 0 or total not in (None, have):
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def download(url, path):
    """Get the gzip file at `url`, under the name `path` when it is whole. ValueError if it cannot be had.

    A broken download goes on where it stopped, now or in a later run.
    """
    part, most, waits = Path(f"{path}.part"), 0, iter(WAITS)
    while True:
        try:
            fetch(url, part)
            with writing(path):
                return os.replace(part, path)
        except (OSError, http.client.HTTPException) as error:  # a broken connection or a timeout is an OSError
            code = getattr(error, "code", None)
            if code == 416:  # there is nothing at that place: `part` is of something else
                part.unlink(missing_ok=True)
            final = url.startswith("file:") or isinstance(error, (gzip.BadGzipFile, http.client.InvalidURL))
            temporary = (408, 416, 429)  # timeout, range, too many requests
            final = final or code and 400 <= code < 500 and code not in temporary
            size = part.stat().st_size if part.exists() else 0
            if size > most:
                most, waits = size, iter(WAITS)
            wait = None if final else next(waits, None)
            if wait is None:
                raise ValueError(f"{url} cannot be downloaded ({str(error).strip('<>')}): give another address with "
                                 f"--c4_url, or get the file elsewhere and put it at {path}") from None
            print(f"{url}: {str(error).strip('<>')}; trying again in {wait} s", flush=True)
            time.sleep(wait)


def c4_files(url, shards, folder):
    """Paths of C4's first training shards (a list), and of one of validation. Those not yet in `folder` are downloaded
    from below `url`.
    """
    if not re.match(r"https?://[^/]|file:/", url):
        raise ValueError(f"--c4_url must begin with http://, https:// or file:, not {url!r}")
    if not 1 <= shards <= 1024:
        raise ValueError(f"--shards must be from 1 to 1024, not {shards}")
    names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)] + ["c4-validation.00000-of-00008.json.gz"]
    folder = Path(folder) / re.sub(r"\W+", "-", url.rstrip("/"))[-100:]  # each address has files of its own
    paths = [folder / name for name in names]
    for name, path in zip(names, paths):
        if not path.exists():
            download(f"{url.rstrip('/')}/en/{name}", path)
    return paths[:-1], paths[-1]


def c4_tokens(url, shards, tokenizer, folder):
    """Token files for Text: (a list, one a shard, for training; one for validation)."""
    train, val = c4_files(url, shards, folder)
    *train, val = (token_file(Documents([path]), tokenizer, folder) for path in [*train, val])
    return train, val


# ----------------------------------------------------------------------------------------------------------------------
# Language modelling on token files


def open_tokens(path, least):
    """The tokens in a file, which stay on the disk. ValueError if they are fewer than `least`."""
    n = os.path.getsize(path) // 2
    if n < least:
        raise ValueError(f"{path} has {n} tokens, but a row of --block_size {least - 1} takes {least}: give more text, "
                         "or a smaller block")
    return np.memmap(path, np.uint16, "r")


class Text:
    """Rows from random places of the training files. The target of every token is the one that follows."""

    def __init__(self, train, val, block_size, batch_size, seed, device="cpu", val_tokens=100_000):
        self.block_size, self.batch_size, self.seed, self.device = block_size, batch_size, seed, device
        self.val_tokens = val_tokens
        self.train, self.val = [open_tokens(path, block_size + 1) for path in train], open_tokens(val, block_size + 1)

    def row(self, place):
        """The block_size + 1 tokens from one of the places where a row can begin, counted through all files."""
        for tokens in self.train:
            if place < len(tokens) - self.block_size:
                return torch.from_numpy(tokens[place:place + self.block_size + 1].astype(np.int64))
            place -= len(tokens) - self.block_size

    def batch(self, step):
        """idx and targets, (batch_size, block_size) each."""
        places = sum(len(tokens) - self.block_size for tokens in self.train)
        chosen = torch.randint(places, (self.batch_size,), generator=seeded("text", self.seed, step))
        rows = torch.stack([self.row(place) for place in chosen.tolist()])  # (batch_size, block_size + 1)
        rows = to_device(rows, self.device)
        return rows[:, :-1], rows[:, 1:]

    def validation(self):
        """Batches (idx, targets) in which each of the first val_tokens tokens is predicted once.

        The last batch may have fewer rows. Its last row is filled up: the targets there are -100, which no loss counts.
        """
        tokens = torch.from_numpy(self.val[:self.val_tokens + 1].astype(np.int64))
        missing = -(len(tokens) - 1) % self.block_size
        idx = torch.nn.functional.pad(tokens[:-1], (0, missing)).view(-1, self.block_size)
        targets = torch.nn.functional.pad(tokens[1:], (0, missing), value=-100).view(-1, self.block_size)
        rows = max(1, 4_096 // self.block_size)  # few, as logits are large; not training's, lest rounding depend on it
        for batch in zip(idx.split(rows), targets.split(rows)):
            yield tuple(tensor.to(self.device) for tensor in batch)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and completions

PAIR_FIELDS = ("prompt", "completion"), ("instruction", "output"), ("query", "response")


def read_pairs(paths):
    """[(prompt, completion), ...] from files with an object of JSON in each line.

    The prompt gets a newline at its end if there is no white space at the seam. So both can be encoded separately, the
    same tokens being the prompt's in training and when the model is asked.
    """
    pairs = []
    for where, row in itertools.chain.from_iterable(map(read_rows, paths)):
        names = next((names for names in PAIR_FIELDS if row.keys() >= set(names)), None)
        if names is None:
            wanted = ", ".join(" and ".join(names) for names in PAIR_FIELDS)
            raise ValueError(f"{where}: its fields must be {wanted}, not {' and '.join(row) or 'none'}")
        prompt, completion = (get_string(row, name, where) for name in names)
        if names[0] == "instruction" and row.get("input"):
            prompt += "\n" + get_string(row, "input", where)
        if not prompt or not (prompt[-1].isspace() or completion[:1].isspace()):
            prompt += "\n"
        pairs.append((prompt, completion))
    return pairs


def prompt_pairs(data, val_data):
    """Pairs for training and for validation, from the user's files. Without `val_data`, some lines are held out."""
    pairs = read_pairs(data)
    if val_data:
        return pairs, read_pairs(val_data)
    if len(pairs) < 2:
        raise ValueError(f"{data[0]} has a single line, and nothing is left for validation: give more lines, or "
                         "--val_data")
    return [pair for i, pair in enumerate(pairs) if i % HELD_OUT], pairs[::HELD_OUT]


class PromptPairs:
    """Completions to learn, given their prompts. The targets are the completion's tokens and the end token, and -100
    elsewhere.

    Rows longer than block_size + 1 tokens are cut: `cut` of them. Those of whose completion nothing would be left are
    not used: `dropped`.
    """

    def __init__(self, train, val, tokenizer, block_size, batch_size, seed, device="cpu"):
        self.tokenizer, self.block_size, self.batch_size = tokenizer, block_size, batch_size
        self.seed, self.device = seed, device
        self.cut = self.dropped = 0
        self.train, self.val = self.encode(train), self.encode(val)

    def encode(self, pairs):
        """[(number of the prompt's tokens, all tokens as uint16), ...]"""
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
            raise ValueError(f"no prompt of the {len(pairs)} lines leaves room for its completion within --block_size "
                             f"{self.block_size}")
        return rows

    def pad(self, rows):  # exercise 15
        """idx and targets (len(rows), length): the longest row's length up to a multiple of 64, as each new one costs a
        compilation.
        """
        longest = max(len(tokens) for _, tokens in rows) - 1
        length = min(-(-longest // 64) * 64, self.block_size)
        idx = torch.full((len(rows), length), self.tokenizer.eot_token)
        targets = torch.full_like(idx, -100)
        for i, (prompt, tokens) in enumerate(rows):
            tokens = torch.from_numpy(tokens.astype(np.int64))
            idx[i, :len(tokens) - 1] = tokens[:-1]
            targets[i, prompt - 1:len(tokens) - 1] = tokens[prompt:]
        return to_device(idx, self.device), to_device(targets, self.device)

    def batch(self, step):
        """idx and targets, (batch_size, length) each. Every epoch goes through all rows, in an order of its own."""
        return self.pad([self.train[i] for i in epoch_rows(len(self.train), self.batch_size, self.seed, step)])

    def validation(self):
        """Batches (idx, targets) of the held-out rows, in order. A completion is right if all targets but -100 are
        predicted.
        """
        for start in range(0, len(self.val), self.batch_size):
            yield self.pad(self.val[start:start + self.batch_size])
