"""Tests of data.py, in seconds and with no network but 127.0.0.1: `python -m pytest tests/test_data.py`"""

import ast
import gzip
import http.server
import json
import os
import random
import threading
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data

BYTES = data.get_tokenizer("bytes")


def write(path, content):
    """A file with this text or these bytes, compressed if its name ends in .gz."""
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def tokens_of(path):
    return np.fromfile(path, np.uint16).tolist()


def plain_tokens(documents, tokenizer=BYTES):
    return [token for text in documents for token in tokenizer.encode_ordinary(text) + [tokenizer.eot_token]]


def test_knows_nothing_of_models():
    nodes = list(ast.walk(ast.parse(Path(data.__file__).read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"model", "mora", "train"}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("text", ["", "a", "def f(x):\n\treturn x  # ü", "日本語 🙂 \u0301\0", "<|endoftext|>", "0123-ab"])
def test_bytes_tokenizer_is_utf8_and_an_end_token(text):
    tokenizer = data.get_tokenizer("bytes")
    ids = tokenizer.encode_ordinary(text)
    assert ids == list(text.encode("utf-8")) and tokenizer.decode(ids) == text
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="bytes or gpt2, not 'nonsense'"):
        data.get_tokenizer("nonsense")


def test_gpt2s_tokenizer_without_network_names_the_ways_out(tmp_path, monkeypatch):
    def no_network(url):
        raise ConnectionError(f"cannot reach {url}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # what this process has loaded already
    with pytest.raises(ValueError, match="^.*TIKTOKEN_CACHE_DIR.*--tokenizer bytes.*ConnectionError.*$"):
        data.get_tokenizer("gpt2")


# ----------------------------------------------------------------------------------------------------------------------
# UUID pairs


def gpt2_like_tokenizer():
    """Like GPT-2's, 256 bytes in an order of their own and longer tokens, which the digits of a UUID merge into."""
    tokens = [bytes([i]) for i in range(256)]
    random.Random(0).shuffle(tokens)
    tokens += [a + b for a in tokens for b in tokens if (a + b).isalnum() and (a + b).isascii()]
    return tiktoken.Encoding("gpt2-like", pat_str=r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+", special_tokens={},
                             mergeable_ranks={token: i for i, token in enumerate(tokens)})


def test_uuid_pairs_depend_on_n_and_seed_alone():
    pairs = data.uuid_pairs(100, seed=1)
    random.seed(5)
    assert data.uuid_pairs(100, seed=1) == pairs
    assert data.uuid_pairs(40, seed=1) == pairs[:40] and data.uuid_pairs(0, seed=1) == []
    assert not {key for key, _ in data.uuid_pairs(100, seed=2)} & {key for key, _ in pairs}


def test_uuid_pairs_are_distinct_version_4_uuids():
    strings = [string for pair in data.uuid_pairs(1000, seed=0) for string in pair]
    assert len(strings) == len(set(strings)) == 2000
    for string in strings:
        parsed = uuid.UUID(string)
        assert str(parsed) == string and parsed.version == 4 and parsed.variant == uuid.RFC_4122
        assert data.HEX_POSITIONS == [i for i, char in enumerate(string) if char != "-"]


def test_keys_are_distinct_even_where_random_numbers_repeat():
    class Repeating(random.Random):
        def getrandbits(self, bits):
            return super().getrandbits(2) << 64

    assert sorted(key[17] for key, _ in data.random_uuid_pairs(4, Repeating(0))) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", ["bytes", "gpt2-like"])
def test_every_character_of_a_uuid_pair_is_one_token(name):
    tokenizer = gpt2_like_tokenizer() if name == "gpt2-like" else data.get_tokenizer(name)
    pairs = data.uuid_pairs(50, seed=0)
    rows = data.encode_uuid_pairs(pairs, tokenizer)
    assert rows.shape == (50, 73) and rows.dtype == torch.long
    for (key, value), row in zip(pairs, rows.tolist()):
        assert [tokenizer.decode([token]) for token in row] == list(f"{key}:{value}")
        assert tokenizer.decode(row[-data.UUID_LENGTH:]) == value


def test_chance_is_what_the_best_constant_guess_gets():
    values = [value for _, value in data.uuid_pairs(20_000, seed=0)]
    hits = 0
    for i in data.HEX_POSITIONS:  # guess from one half and measure on the other: on the same one, luck would count
        guess = Counter(value[i] for value in values[:10_000]).most_common(1)[0][0]
        hits += sum(value[i] == guess for value in values[10_000:])
    assert hits / 320_000 == pytest.approx(data.UUID_CHANCE, abs=0.002)  # four standard errors
    assert data.UUID_CHANCE == pytest.approx(0.0977, abs=5e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_standard_library_text_has_the_size_asked_for(size):
    text = data.standard_library_text(size)
    assert len(text) == size and text == data.standard_library_text(300_000)[:size]
    assert size < 1000 or "import" in text


# ----------------------------------------------------------------------------------------------------------------------
# Documents from files

TEXTS = ["one\n\ntwo", "", "drei ü 日本 🙂", 'a "quote"\\ and <|endoftext|>']


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
@pytest.mark.parametrize("text", ["one\n\ntwo\n\n\nthree", "ü 日本 🙂\r\nno newline at the end"])
def test_a_txt_file_is_one_document(tmp_path, name, text):
    assert list(data.read_documents(write(tmp_path / name, text))) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.json"])
def test_every_line_of_json_is_a_document(tmp_path, name):
    rows = [{"text": text, "url": "https://x", "timestamp": i} for i, text in enumerate(TEXTS)]
    assert list(data.read_documents(write(tmp_path / name, json_lines(rows)))) == TEXTS
    assert list(data.read_documents(write(tmp_path / name,
                                          "\n" + json_lines(rows).replace("\n", "\r\n \n").rstrip()))) == TEXTS


@pytest.mark.parametrize("name, content", [("a.txt", "text"), ("a.jsonl", '{"text": "text"}')])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    assert list(data.read_documents(write(tmp_path / name, "\ufeff" + content))) == ["text"]


def test_documents_are_read_as_they_are_asked_for(tmp_path):
    documents = data.read_documents(write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nwrong'))
    assert (next(documents), next(documents)) == ("one", "two")
    with pytest.raises(ValueError, match="a.jsonl:3: "):
        next(documents)


@pytest.mark.parametrize("line, complaint", [
    (b"{'text': 1}", "object of JSON.*'text'"), (b'{"text": "cut', "object of JSON"), (b'["text"]', "object of JSON"),
    (b"12", "object of JSON"),
    (b'{"txt": "x"}', "no field text"), (b'{"text": 3}', "text is not a string"),
    (b'{"text": null}', "text is not a string"),
    (b'{"text": "\xff"}', "not UTF-8"), (b"[" * 100_000, "object of JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "object of JSON|not a string"),
], ids=range(10))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_a_bad_line_is_named(tmp_path, name, line, complaint):
    path = write(tmp_path / name, b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError, match=rf"{name}:3: .*({complaint})") as caught:
        list(data.read_documents(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_txt_file_that_is_no_utf8_is_named_with_the_line(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}:3: not UTF-8"):
        list(data.read_documents(write(tmp_path / name, b"one\ntwo\nthr\xe9e\nfour\xff\n")))


WHOLE = gzip.compress(json_lines({"text": str(number)}
                                 for number in np.random.default_rng(0).random(5000).tolist()).encode())


@pytest.mark.parametrize("name, content, complaint", [
    ("a.txt", b"", "is empty"), ("a.txt", b" \n\n", "is empty"), ("a.jsonl", b"", "is empty"),
    ("a.jsonl", b"\n\n", "is empty"),
    ("a.jsonl.gz", b"", "is empty"), ("a.txt.gz", gzip.compress(b""), "is empty"),
    ("a.txt", b"\x89PNG\r\n\x1a\n\x00\xff", "a.txt:1: not UTF-8"),
    ("a.jsonl", b"\x89PNG\r\n\x1a\n", "a.jsonl:1: not UTF-8"),
    ("a.json.gz", b"<!DOCTYPE html>", "corrupt or cut short"),
    ("a.json.gz", WHOLE[:-4000], "cut short.*delete it and run again"),
    ("a.txt.gz", WHOLE[:-1], "cut short.*delete it and run again"),
    ("a.txt.gz", WHOLE[:9000] + b"\xff" * 40_000, "corrupt"),
    ("a.json.gz", WHOLE[:-8] + bytes(8), "corrupt"),
    ("a.pdf", b"text", "must end in .txt, .jsonl"), ("a", b"text", "must end in"), ("a.gz", b"text", "must end in"),
], ids=range(16))
def test_a_file_without_text_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        list(data.read_documents(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, complaint in [("none.jsonl", "No such file"), ("none.txt.gz", "No such file"),
                            ("folder.txt", "directory|denied")]:
        with pytest.raises(ValueError, match=rf"{name} cannot be read: .*({complaint})"):
            list(data.read_documents(tmp_path / name))
    with pytest.raises(ValueError, match="none.jsonl cannot be read: No such file"):
        data.Documents([tmp_path / "none.jsonl"])


# ----------------------------------------------------------------------------------------------------------------------
# Training and validation


def parts(*paths):
    return list(data.Documents(paths, "train")), list(data.Documents(paths, "val"))


@pytest.mark.parametrize("n", [2, 19, 20, 21, 41, 100])
def test_every_20th_document_is_for_validation(tmp_path, n):
    texts = [f"text {i}" for i in range(n)]
    halves = [write(tmp_path / f"{i}.jsonl", json_lines({"text": text} for text in half))
              for i, half in enumerate([texts[:1], texts[1:]])]
    train, val = parts(*halves)
    assert val == texts[::20] and train == [text for text in texts if text not in val]
    assert list(data.Documents(halves)) == texts


def test_a_single_document_is_cut(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (train,), (val,) = parts(write(tmp_path / "a.txt", text))
    assert train + val == text and len(val) == 50


def test_share_is_how_much_of_the_files_has_been_read(tmp_path):
    paths = [write(tmp_path / name, json_lines({"text": os.urandom(5000).hex()} for _ in range(50)))
             for name in ("a.jsonl", "b.jsonl.gz")]
    documents = data.Documents(paths)
    shares = [documents.share for _ in documents]
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1
    assert shares[49] == pytest.approx(paths[0].stat().st_size / sum(path.stat().st_size for path in paths), abs=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def words_tokenizer(end=60_000):
    """Bytes and a few merges, under GPT-2's own pattern, whose runs of white space depend on what follows."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokens = [bytes([i]) for i in range(256)] + [b"  ", b"\n\n", b" a", b"bc", b" abc", b"\n ", b"    "]
    return tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": end})


def random_text(size, seed=0):
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(["abc", "a", " ", "  ", "\n", "\n\n", "12", "...", "ü", "日本", "🙂", "\t", "\x1c",
                               "\u3000"], size))


@pytest.mark.parametrize("size", [50, 200])  # so that there is always a place to cut in time
def test_no_token_changes_where_a_text_is_cut_into_pieces(monkeypatch, size):
    monkeypatch.setattr(data, "PIECE", size)
    for seed in range(20):
        tokenizer, text = words_tokenizer(), random_text(3000, seed)
        cut = list(data.pieces(text))
        assert "".join(piece for piece, _ in cut) == text and len(cut) > len(text) / (3 * size)
        assert [last for _, last in cut] == [False] * (len(cut) - 1) + [True]
        tokens = [token for piece, _ in cut for token in tokenizer.encode_ordinary(piece)]
        assert tokens == tokenizer.encode_ordinary(text)


def test_a_text_without_spaces_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 10)
    assert [len(piece) for piece, _ in data.pieces("x" * 95)] == [20, 20, 20, 20, 15]
    assert list(data.pieces("")) == [("", True)] and list(data.pieces("x" * 20)) == [("x" * 20, True)]


@pytest.mark.parametrize("tokenizer", [BYTES, words_tokenizer()], ids=["bytes", "words"])
def test_the_tokens_are_those_of_each_document_and_an_end(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(data, "PIECE", 100)
    texts = TEXTS + [random_text(size, seed) for seed, size in enumerate([0, 1, 50, 5000, 3, 700] * 30)]
    path = tmp_path / "new" / "tokens.bin"
    data.tokenize(iter(texts), tokenizer, path)
    assert tokens_of(path) == plain_tokens(texts, tokenizer)
    assert os.listdir(path.parent) == ["tokens.bin"]


def test_no_more_than_a_few_documents_are_in_memory(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    read = []
    tokens = data.encode((read.append(i) or "text" for i in range(1000)), BYTES)
    for i in range(900):
        next(tokens)
        assert len(read) <= i + 70
    tokens.close()


def test_a_failure_leaves_no_token_file(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n' * 500 + "bad")
    with pytest.raises(ValueError, match="a.jsonl:501"):
        data.tokenize(data.Documents([path]), BYTES, tmp_path / "tokens" / "tokens.bin")
    assert os.listdir(tmp_path / "tokens") == []


def test_tokens_that_do_not_fit_or_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ValueError, match="words has 65,537 tokens"):
        data.tokenize(["text"], words_tokenizer(end=65_536), tmp_path / "tokens.bin")
    data.tokenize([""], words_tokenizer(end=65_535), tmp_path / "tokens.bin")
    assert tokens_of(tmp_path / "tokens.bin") == [65_535]
    write(tmp_path / "file", "not a folder")
    with pytest.raises(ValueError, match="tokens.bin cannot be written"):
        data.tokenize(["text"], BYTES, tmp_path / "file" / "tokens.bin")


def test_progress_has_speed_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PROGRESS_EVERY", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    path = write(tmp_path / "a.jsonl", json_lines({"text": "x" * 1000} for _ in range(200)))
    data.tokenize(data.Documents([path]), BYTES, tmp_path / "tokens.bin")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 200 and all("tokens.bin" in line and "million tokens/s" in line for line in lines)
    assert lines[99].endswith("left") and "0.1 million tokens," in lines[99] and "0.2 million tokens," in lines[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The cache of tokens


def test_tokens_are_made_once_and_anew_after_a_change(tmp_path, monkeypatch):
    made, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *args: made.append(args[-1]) or tokenize(*args))
    one, two = (write(tmp_path / name, json_lines({"text": f"{name} {i}"} for i in range(40)))
                for name in ("a.jsonl", "b.jsonl"))

    def get(paths=(one, two), val=None, tokenizer=BYTES):
        before = len(made)
        (train,), val = data.text_tokens(paths, val, tokenizer, tmp_path / "cache")
        return train, val, len(made) - before

    train, val, n = get()
    texts = [f"{name} {i}" for name in ("a.jsonl", "b.jsonl") for i in range(40)]
    assert n == 2 and tokens_of(val) == plain_tokens(texts[::20])
    assert tokens_of(train) == plain_tokens(text for text in texts if text not in texts[::20])
    assert get() == (train, val, 0) and get([str(one), str(two)]) == (train, val, 0)

    assert get(tokenizer=words_tokenizer())[2] == 2 and get([one])[2] == 2 and get([two, one])[2] == 2
    all_of_one, all_of_two, n = get([one], [two])
    assert n == 2 and tokens_of(all_of_one) == plain_tokens(texts[:40])
    assert tokens_of(all_of_two) == plain_tokens(texts[40:])
    assert get() == (train, val, 0)

    time = one.stat().st_mtime_ns
    write(one, one.read_text().replace('"a.jsonl 1"', '"A.jsonl 1"'))  # of the same size
    os.utime(one, ns=(time, time + 10**9))
    train, val, n = get()
    assert n == 2 and tokens_of(train)[:9] == list(b"A.jsonl 1")
    time = two.stat().st_mtime_ns
    write(two, two.read_text() + '{"text": "more"}\n')  # at the same time
    os.utime(two, ns=(time, time))
    assert get()[2] == 2 and {path.name for path in (tmp_path / "cache").iterdir()} == {path.name for path in made}


# ----------------------------------------------------------------------------------------------------------------------
# C4


class Server:
    """Serves `files`, {path: bytes}, on 127.0.0.1, and does to each request what the next of `faults` says:

    ("cut", n): n bytes, and the connection ends; "no range", "wrong range", "chunked"; a number: this HTTP status.
    """

    def __init__(self, files):
        self.files, self.faults, self.requests = files, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.requests.append((self.path, self.headers["Range"]))
                outer.answer(self, outer.faults.pop(0) if outer.faults else None)
                self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request, fault):
        content, asked = self.files.get(request.path, b""), request.headers["Range"]
        first = 0 if fault in ("no range", "wrong range") or not asked else int(asked[len("bytes="):-1])
        status = 206 if asked and fault != "no range" else 200
        if type(fault) is int or request.path not in self.files:
            status, content, first = fault or 404, b"no such luck", 0
        elif asked and first >= len(content):
            status, content, first = 416, b"no such place", 0
        body = content[first:]
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if fault == "chunked":
            request.send_header("Transfer-Encoding", "chunked")
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        else:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:fault[1]] if type(fault) is tuple else body)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


SHARD = gzip.compress(os.urandom(200_000))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data, "WAITS", (0, 0, 0))
    server = Server({"/shard.gz": SHARD})
    yield server
    server.close()


@pytest.mark.parametrize("faults", [[], ["chunked"], [500], [503, 429, 408]])
def test_a_file_is_downloaded(server, tmp_path, faults):
    server.faults = faults
    data.download(f"{server.url}/shard.gz", tmp_path / "new" / "a.gz")
    assert (tmp_path / "new" / "a.gz").read_bytes() == SHARD and os.listdir(tmp_path / "new") == ["a.gz"]
    assert server.faults == []


def test_a_broken_download_continues_where_it_stopped(server, tmp_path, capsys):
    server.faults = [("cut", 100_000), ("cut", 70_000), 500, ("cut", 0)]
    data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == SHARD and os.listdir(tmp_path) == ["a.gz"]
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-"] + 3 * ["bytes=170000-"]
    assert "the connection ended after 100000 of" in capsys.readouterr().out


def test_a_download_that_gets_on_is_not_given_up(server, tmp_path):
    server.faults = [("cut", 70_000)] + [("cut", 10)] * 20
    data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == SHARD and len(server.requests) == 22


def test_a_download_that_only_ever_starts_over_is_given_up(server, tmp_path):
    server.faults = [("cut", 5000), "wrong range", ("cut", 4000), "wrong range"] * 20
    with pytest.raises(ValueError, match="cannot be downloaded"):
        data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert "a.gz" not in os.listdir(tmp_path) and len(server.requests) < 8


def test_a_download_given_up_leaves_no_half_file_and_continues_next_time(server, tmp_path):
    server.faults = [("cut", 100_000)] + [("cut", 0)] * 3
    with pytest.raises(ValueError, match=r"shard.gz cannot be downloaded \(.*\): .*--c4_url.*put it at .*a\.gz$"):
        data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert os.listdir(tmp_path) == ["a.gz.part"] and (tmp_path / "a.gz.part").read_bytes() == SHARD[:100_000]
    server.requests.clear()
    data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert server.requests == [("/shard.gz", "bytes=100000-")]
    assert (tmp_path / "a.gz").read_bytes() == SHARD and os.listdir(tmp_path) == ["a.gz"]


@pytest.mark.parametrize("fault", ["no range", "wrong range"])
def test_a_server_that_does_not_continue_makes_it_start_over(server, tmp_path, fault):
    (tmp_path / "a.gz.part").write_bytes(b"\x1f\x8b" + bytes(5000))  # of something else, so that no byte of it may stay
    server.faults = [fault]
    data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == SHARD and os.listdir(tmp_path) == ["a.gz"]


@pytest.mark.parametrize("more", [0, 1000])
def test_a_part_as_long_as_the_file_or_longer_is_begun_anew(server, tmp_path, more):
    (tmp_path / "a.gz.part").write_bytes(SHARD + bytes(more))
    data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == SHARD


def test_waits_grow_and_end(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(data, "WAITS", (1, 2, 4))
    monkeypatch.setattr("time.sleep", waits.append)
    server.faults = [503] * 10
    with pytest.raises(ValueError, match="shard.gz cannot be downloaded .*503"):
        data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert waits == [1, 2, 4] and len(server.requests) == 4 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("path, content, complaint", [
    ("/none.gz", None, "404"), ("/shard.gz", 403, "403"),
    ("/page.gz", b"<!DOCTYPE html><html>Log in</html>", "no gzip file, but begins with b'<!DOCTYPE"),
    ("/page.gz", b"version https://git-lfs.github.com/spec/v1", "no gzip file"),
])
def test_what_no_second_try_can_help_is_said_at_once(server, tmp_path, path, content, complaint):
    if isinstance(content, bytes):
        server.files[path] = content
    else:
        server.faults = [content]
    message = rf"^http.*{path} cannot be downloaded \(.*{complaint}.*--c4_url.*put it at .*a\.gz$"
    with pytest.raises(ValueError, match=message) as caught:
        data.download(server.url + path, tmp_path / "a.gz")
    assert len(server.requests) == 1 and os.listdir(tmp_path) == [] and "\n" not in str(caught.value)


def test_a_page_instead_of_the_shard_does_not_undo_what_is_there(server, tmp_path):
    (tmp_path / "a.gz.part").write_bytes(SHARD[:1000])
    server.faults, server.files["/shard.gz"] = ["no range"], b"<html>Log in to the hotel's network</html>"
    with pytest.raises(ValueError, match="no gzip file"):
        data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert (tmp_path / "a.gz.part").read_bytes() == SHARD[:1000]


def test_a_host_that_cannot_be_reached_is_named(server, tmp_path):
    server.server.server_close()
    with pytest.raises(ValueError, match="127.0.0.1.*cannot be downloaded .*refused.*--c4_url"):
        data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")


def test_a_folder_that_cannot_be_written_is_named_and_not_tried_again(server, tmp_path):
    write(tmp_path / "file", "not a folder")
    with pytest.raises(ValueError, match="cannot be written"):
        data.download(f"{server.url}/shard.gz", tmp_path / "file" / "a.gz")
    assert len(server.requests) <= 1


def test_progress_of_a_download(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PROGRESS_EVERY", 0)
    data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
    assert "shard.gz: 0.2 MB, " in (out := capsys.readouterr().out) and "MB/s, 0:00:00 left" in out


def c4_mirror(shards):
    names = [*(f"/en/c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)),
             "/en/c4-validation.00000-of-00008.json.gz"]
    texts = [[f"text {i} of {name}" for i in range(25)] for name in names]
    shard = [gzip.compress(json_lines({"text": text} for text in some).encode()) for some in texts]
    return dict(zip(names, shard)), texts


def test_c4_is_downloaded_and_tokenized_once(server, tmp_path):
    server.files, texts = c4_mirror(2)
    train, val = data.c4_tokens(server.url + "/", 1, BYTES, tmp_path)
    assert [tokens_of(path) for path in train] == [plain_tokens(texts[0])] and tokens_of(val) == plain_tokens(texts[-1])
    more, val_again = data.c4_tokens(server.url, 2, BYTES, tmp_path)
    assert more[:1] == train and val_again == val and tokens_of(more[1]) == plain_tokens(texts[1])
    assert [path for path, _ in server.requests] == [list(server.files)[i] for i in (0, 2, 1)]


def test_c4_from_a_folder(server, tmp_path, capsys):
    files, texts = c4_mirror(1)
    (tmp_path / "mirror" / "en").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "mirror" / name[1:]).write_bytes(content)
    url = (tmp_path / "mirror").as_uri()
    train, val = data.c4_files(url, 1, tmp_path / "cache")
    assert list(data.read_documents(train[0])) == texts[0] and list(data.read_documents(val)) == texts[-1]
    with pytest.raises(ValueError, match=r"c4-train.00001-of-01024.json.gz cannot be downloaded \(.*--c4_url"):
        data.c4_files(url, 2, tmp_path / "cache")
    assert "trying again" not in capsys.readouterr().out
    server.files = c4_mirror(1)[0]
    assert data.c4_files(server.url, 1, tmp_path / "cache")[0] != train  # another address, other files


def test_a_corrupt_shard_is_named(server, tmp_path):
    server.files, _ = c4_mirror(1)
    name = "/en/c4-train.00000-of-01024.json.gz"
    server.files[name] = server.files[name][:-30]
    with pytest.raises(ValueError,
                       match=r"c4-train.00000-of-01024.json.gz is corrupt or cut short .*delete it and run again"):
        data.c4_tokens(server.url, 1, BYTES, tmp_path)
    assert not list(tmp_path.glob("*.bin*"))


@pytest.mark.parametrize("url, shards, complaint", [
    ("huggingface.co/c4", 1, "--c4_url must begin with"), ("/data/c4", 1, "--c4_url"), ("ftp://x/c4", 1, "--c4_url"),
    (data.C4_URL, 0, "--shards"), (data.C4_URL, 1025, "--shards"),
])
def test_a_wrong_address_or_number_of_shards_is_refused(tmp_path, url, shards, complaint):
    with pytest.raises(ValueError, match=complaint):
        data.c4_files(url, shards, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Language modelling


def token_files(folder, *sizes):
    """Files of consecutive numbers, so that every token says where it is from."""
    paths = [folder / f"{i}.bin" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes)):
        np.arange(10_000 * i, 10_000 * i + size, dtype=np.uint16).tofile(path)
    return paths


def test_text_batches_are_a_function_of_seed_and_step(tmp_path):
    *train, val = token_files(tmp_path, 500, 300)
    text, again = (data.Text(train, val, 8, 4, seed=1) for _ in range(2))
    batches = [text.batch(step) for step in range(5)]
    list(again.validation())
    for step in (3, 1, 4, 0, 2):
        assert all(torch.equal(a, b) for a, b in zip(again.batch(step), batches[step]))
    assert not torch.equal(batches[0][0], batches[1][0])
    assert not torch.equal(data.Text(train, val, 8, 4, seed=2).batch(0)[0], batches[0][0])


def test_the_targets_of_text_are_the_next_tokens(tmp_path):
    *train, val = token_files(tmp_path, 500, 300)
    text = data.Text(train, val, 8, 4, seed=0)
    (idx, targets), (val_idx, val_targets) = text.batch(7), next(text.validation())
    assert idx.shape == targets.shape == (4, 8)
    val_idx, val_targets = val_idx[:-1], val_targets[:-1]  # the last row of validation may be filled up
    for idx, targets in ((idx, targets), (val_idx, val_targets)):
        assert idx.dtype == targets.dtype == torch.long
        assert torch.equal(targets, idx + 1) and torch.equal(idx, idx[:, :1] + torch.arange(8))


def test_text_rows_come_from_every_place_of_every_file_and_never_cross_files(tmp_path):
    *train, val = token_files(tmp_path, 12, 9, 20, 30)
    text = data.Text(train, val, 8, 2000, seed=0)
    idx, targets = text.batch(0)
    starts = idx[:, 0].tolist()
    assert sorted(set(starts)) == [0, 1, 2, 3, 10_000] + list(range(20_000, 20_012)) and torch.equal(targets, idx + 1)
    some = (0, 3, 10_000, 20_000, 20_011)
    assert all(70 < starts.count(place) < 170 for place in some)  # 2000 / 17 each, and 4 deviations


@pytest.mark.parametrize("size, val_tokens, predicted",
                         [(100, 1000, 99), (97, 96, 96), (100, 50, 50), (9, 50, 8), (1000, 17, 17)])
def test_validation_predicts_each_token_once_at_any_batch_size(tmp_path, size, val_tokens, predicted):
    train, val = token_files(tmp_path, 50, size)
    for batch_size in (1, 3, 64):
        batches = list(data.Text([train], val, 8, batch_size, seed=batch_size, val_tokens=val_tokens).validation())
        idx, targets = (torch.cat(tensors) for tensors in zip(*batches))
        assert all(len(idx) == batch_size for idx, _ in batches[:-1]) and idx.shape[1] == 8
        kept = targets != -100
        assert targets[kept].tolist() == list(range(10_001, 10_001 + predicted))
        assert torch.equal(idx[kept], targets[kept] - 1)
        assert kept[:-1].all() and idx.min() >= 0


def test_fewer_tokens_than_a_row_takes_are_refused(tmp_path):
    small, large = token_files(tmp_path, 8, 9)
    for train, val in [([small], large), ([large], small), ([large, small], large)]:
        with pytest.raises(ValueError, match="0.bin has 8 tokens.*--block_size 8 takes 9"):
            data.Text(train, val, 8, 4, seed=0)
    small.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 tokens"):
        data.Text([small], large, 8, 4, seed=0)
    assert torch.equal(data.Text([large], large, 8, 1, seed=0).batch(0)[0], torch.arange(10_000, 10_008)[None])


def test_the_largest_token_fits(tmp_path):
    np.full(17, 65_535, np.uint16).tofile(tmp_path / "a.bin")
    text = data.Text([tmp_path / "a.bin"], tmp_path / "a.bin", 8, 2, seed=0)
    assert text.batch(0)[0].unique().tolist() == next(text.validation())[0].unique().tolist() == [65_535]


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and completions


@pytest.mark.parametrize("row, pair", [
    ({"prompt": "2 + 2 =", "completion": "4"}, ("2 + 2 =\n", "4")),
    ({"prompt": "2 + 2 = ", "completion": "4"}, ("2 + 2 = ", "4")),
    ({"prompt": "2 + 2 =", "completion": " 4"}, ("2 + 2 =", " 4")), ({"prompt": "", "completion": " 4"}, ("\n", " 4")),
    ({"query": "Q\n", "response": "R", "type": 3}, ("Q\n", "R")), ({"prompt": "p", "completion": ""}, ("p\n", "")),
    ({"instruction": "Add", "input": "2 2", "output": "4"}, ("Add\n2 2\n", "4")),
    ({"instruction": "Add", "input": "", "output": "4"}, ("Add\n", "4")),
    ({"instruction": "Add", "output": "4"}, ("Add\n", "4")),
    ({"prompt": "p", "input": "not this", "completion": "c"}, ("p\n", "c")),
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_the_usual_names_of_prompt_and_completion(tmp_path, name, row, pair):
    assert data.read_pairs([write(tmp_path / name, json_lines([row]))] * 2) == [pair] * 2


@pytest.mark.parametrize("line, complaint", [
    ('{"prompt": "p", "response": "r"}',
     "prompt and completion, instruction and output, query and response, not prompt and response"),
    ("{}", "none"),
    ('{"prompt": "p", "completion": 4}', "completion is not a string"),
    ('{"query": null, "response": "r"}', "query is not a string"),
    ('{"instruction": "i", "input": 3, "output": "o"}', "input is not a string"), ("text", "object of JSON"),
])
def test_a_bad_pair_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "a.jsonl", '{"query": "q", "response": "r"}\n' + line)
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{complaint}"):
        data.read_pairs([path])


@pytest.mark.parametrize("n", [2, 20, 21, 45])
def test_every_20th_pair_is_for_validation(tmp_path, n):
    one, two = (write(tmp_path / f"{q}.jsonl", json_lines({"query": f"{q}{i}", "response": "r"} for i in range(n)))
                for q in "qw")
    pairs = [(f"q{i}\n", "r") for i in range(n)]
    train, val = data.prompt_pairs([one], None)
    assert val == pairs[::20] and train == [pair for pair in pairs if pair not in val]
    assert data.prompt_pairs([one], [two]) == (pairs, [(f"w{i}\n", "r") for i in range(n)])


def test_a_single_pair_cannot_be_split(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines([{"query": "q", "response": "r"}]))
    with pytest.raises(ValueError, match="a.jsonl has a single line.*--val_data"):
        data.prompt_pairs([path], None)
    assert len(data.prompt_pairs([path], [path])[0]) == 1


def some_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"key {i} {'p' * rng.integers(40)}\n", f"value ü {i} {'c' * rng.integers(40)}") for i in range(n)]


def decoded(idx, targets):
    """The rows as [(the whole text, the text of the targets)], without end tokens."""
    rows = []
    for tokens, wanted in zip(idx.tolist(), targets.tolist()):
        assert wanted.count(BYTES.eot_token) <= 1 and all(a == b for a, b in zip(tokens[1:], wanted) if b != -100)
        rows.append(tuple(BYTES.decode([token for token in some if token not in (-100, BYTES.eot_token)])
                          for some in (tokens, wanted)))
    return rows


@pytest.mark.ex15
def test_the_targets_are_the_completion_and_the_end():
    pairs = some_pairs(23)
    data_set = data.PromptPairs(pairs, pairs, BYTES, block_size=256, batch_size=5, seed=0)
    batches = list(data_set.validation())
    expected = [(prompt + completion, completion) for prompt, completion in pairs]
    assert [row for batch in batches for row in decoded(*batch)] == expected
    assert (data_set.cut, data_set.dropped) == (0, 0) and [len(idx) for idx, _ in batches] == [5, 5, 5, 5, 3]
    for tokens, wanted in (row for batch in batches for row in zip(*batch)):
        kept = (wanted != -100).nonzero().flatten().tolist()
        assert kept == list(range(kept[0], kept[-1] + 1)), "in one piece"
        assert wanted[kept[-1]] == BYTES.eot_token, "the end last"
        assert (tokens[kept[-1] + 1:] == BYTES.eot_token).all() and BYTES.eot_token not in tokens[:kept[-1] + 1]


@pytest.mark.ex15
@pytest.mark.parametrize("longest, block_size, length", [
    (64, 256, 64), (65, 256, 128), (3, 256, 64), (128, 256, 128), (90, 100, 100), (60, 50, 50),
])
def test_batches_are_padded_to_a_multiple_of_64(longest, block_size, length):
    pairs = [("p\n", "c"), ("p\n", "c" * (longest - 2))]  # and the end token, less the one that is only a target
    idx, targets = next(data.PromptPairs(pairs, pairs, BYTES, block_size, 2, seed=0).validation())
    assert idx.shape == targets.shape == (2, length) and idx.dtype == targets.dtype == torch.long


def test_long_rows_are_cut_or_dropped_and_counted():
    pairs = [("p" * p, "c" * c) for p, c in [(5, 5), (5, 6), (5, 50), (9, 1), (10, 1), (11, 1), (30, 1), (10, 0)]]
    data_set = data.PromptPairs(pairs, pairs[:3], BYTES, block_size=10, batch_size=8, seed=0)
    expected = [("pppppccccc", "ccccc"), ("pppppccccc", "cccccc"), ("pppppccccc", "cccccc"), ("pppppppppc", "c"),
                ("pppppppppp", "c"), ("pppppppppp", "")]
    assert decoded(*data_set.pad(data_set.train)) == expected and decoded(*next(data_set.validation())) == expected[:3]
    assert (data_set.cut, data_set.dropped) == (5, 2)  # three of the training rows, two of validation
    with pytest.raises(ValueError,
                       match="no prompt of the 2 lines leaves room for its completion within --block_size 10"):
        data.PromptPairs(pairs, pairs[5:7], BYTES, 10, 8, seed=0)


@pytest.mark.parametrize("n, batch_size", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_epoch_goes_through_all_pairs(n, batch_size):
    pairs = some_pairs(n)
    data_set = data.PromptPairs(pairs, pairs, BYTES, 256, batch_size, seed=3)
    batches = [data_set.batch(step) for step in range(5 * n)]
    assert all(len(idx) == batch_size for idx, _ in batches)
    rows = [row for batch in batches for row in decoded(*batch)]
    epochs = [rows[start:start + n] for start in range(0, len(rows) - n + 1, n)]
    expected = sorted((prompt + completion, completion) for prompt, completion in pairs)
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert n < 7 or len(set(map(tuple, epochs))) == len(epochs)


def test_batches_of_pairs_are_a_function_of_seed_and_step():
    pairs = some_pairs(30)
    one, two, other = (data.PromptPairs(pairs, pairs, BYTES, 256, 4, seed) for seed in (1, 1, 2))
    batches = [one.batch(step) for step in range(20)]
    list(two.validation())
    for step in reversed(range(20)):
        assert all(torch.equal(a, b) for a, b in zip(two.batch(step), batches[step]))
    assert decoded(*other.batch(0)) != decoded(*batches[0])


def test_many_pairs_are_encoded_in_order():
    pairs = [(f"{i}\n", f"{i}") for i in range(10_050)]
    data_set = data.PromptPairs(pairs, pairs[:1], BYTES, 256, 4, seed=0)
    texts = [BYTES.decode(tokens[:-1].tolist()) for _, tokens in data_set.train]
    assert texts == [prompt + completion for prompt, completion in pairs]
