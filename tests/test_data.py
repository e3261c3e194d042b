"""Tests of data.py, in seconds and with no network but 127.0.0.1: `python -m pytest tests/test_data.py`"""

import concurrent.futures
import contextlib
import gzip
import http.server
import io
import json
import os
import random
import re
import threading
import time
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


def read(*paths):
    return list(data.read_documents(paths))


def tokens_of(path):
    return np.fromfile(path, np.uint16).tolist()


def plain_tokens(documents, tokenizer=BYTES):
    return [token for text in documents for token in tokenizer.encode_ordinary(text) + [tokenizer.eot_token]]


def same(batch, other):
    return all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_knows_nothing_of_models():
    names = re.findall(r"^ *(?:import|from) (\w+)", Path(data.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 10 and not {"model", "mora", "train"} & {*names}


# ---- Tokenizers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "a", "def f(x):\n\treturn x  # ü", "日本語 🙂 \u0301\0", "<|endoftext|>", "0123-ab"])
def test_bytes_tokenizer_is_utf8_and_an_end_token(text):
    ids = BYTES.encode_ordinary(text)
    assert ids == list(text.encode()) and BYTES.decode(ids) == text and (BYTES.n_vocab, BYTES.eot_token) == (257, 256)


def test_a_tokenizer_that_cannot_be_had_is_named_with_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: 1 / 0)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # those that this process has loaded
    with pytest.raises(ValueError, match="^.*ZeroDivisionError.*TIKTOKEN_CACHE_DIR.*--tokenizer bytes$"):
        data.get_tokenizer("gpt2")
    with pytest.raises(ValueError, match="bytes or gpt2, not 'nonsense'"):
        data.get_tokenizer("nonsense")


# ---- UUID pairs ------------------------------------------------------------------------------------------------------
def test_uuid_pairs_are_distinct_version_4_uuids_and_depend_on_n_and_seed_alone(monkeypatch):
    pairs = data.uuid_pairs(100, seed=1)
    random.seed(5)
    assert data.uuid_pairs(100, seed=1) == pairs
    assert data.uuid_pairs(40, seed=1) == pairs[:40] and data.uuid_pairs(0, seed=1) == []
    assert not {key for key, _ in data.uuid_pairs(100, seed=2)} & {key for key, _ in pairs}
    strings = [string for pair in data.uuid_pairs(1000, seed=0) for string in pair]
    assert len(strings) == len(set(strings)) == 2000
    for string in strings:
        parsed = uuid.UUID(string)
        assert str(parsed) == string and parsed.version == 4 and parsed.variant == uuid.RFC_4122
        assert data.HEX_POSITIONS == [i for i, char in enumerate(string) if char != "-"]
    few = iter([0, 1, 0, 2, 1, 3, 2, 0])  # numbers that repeat
    monkeypatch.setattr(random.Random, "getrandbits", lambda self, bits: next(few) << 64)
    assert [key[17] for key, _ in data.uuid_pairs(3, seed=0)] == ["0", "1", "2"]


@pytest.mark.parametrize("make_tokenizer", [lambda: BYTES, lambda: words_tokenizer()], ids=["bytes", "words"])
def test_every_character_of_a_uuid_pair_is_one_token(make_tokenizer):
    tokenizer, pairs = make_tokenizer(), data.uuid_pairs(50, seed=0)
    rows = data.encode_uuid_pairs(pairs, tokenizer)
    assert rows.shape == (50, 2 * data.UUID_LENGTH + 1) == (50, 73) and rows.dtype == torch.long
    for (key, value), row in zip(pairs, rows.tolist()):
        assert [tokenizer.decode([token]) for token in row] == list(f"{key}:{value}")


@pytest.mark.parametrize("n, sizes", [(1, [1]), (128, [128]), (300, [128, 128, 44])])
def test_memorizing_is_measured_on_all_pairs_in_order(n, sizes):
    pairs = data.UUIDPairs(n, BYTES, batch_size=4, seed=3)
    batches = list(pairs.validation())
    assert [(idx.shape, targets.shape) for idx, targets in batches] == [((size, 72), (size, 36)) for size in sizes]
    assert torch.equal(torch.cat([idx for idx, _ in batches]), pairs.tokens[:, :-1])
    values = [BYTES.decode(row) for _, targets in batches for row in targets.tolist()]
    assert values == [value for _, value in data.uuid_pairs(n, seed=3)]


def test_chance_is_what_the_best_constant_guess_gets():
    columns = list(zip(*(value for _, value in data.uuid_pairs(20_000, seed=0))))
    hits = sum(Counter(columns[i]).most_common(1)[0][1] for i in data.HEX_POSITIONS)
    assert hits / 640_000 == pytest.approx(data.UUID_CHANCE, abs=0.004)  # the best guesses are lucky, by 0.3 %


def test_the_demos_text():
    long = data.standard_library_text(300_000)
    assert len(long) == 300_000 and "import" in long
    assert all(data.standard_library_text(n) == long[:n] for n in (0, 1, 1000))
    text, again = (data.DemoText(5000, BYTES, batch_size=8, seed=0) for _ in range(2))
    [batch], [batch_again] = text.validation(), again.validation()
    assert batch[0].shape == (8, 72) and torch.equal(batch[0][:, 1:], batch[1][:, :-1]) and same(batch, batch_again)
    assert not any(torch.equal(batch[0], text.batch(step)[0]) for step in range(20))


# ---- Text ------------------------------------------------------------------------------------------------------------
def number_files(folder, *sizes):
    """Token files of consecutive numbers, so that every token says where it is from."""
    paths = [folder / f"{i}.bin" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes)):
        np.arange(10_000 * i, 10_000 * i + size, dtype=np.uint16).tofile(path)
    return paths


def test_text_batches_are_a_function_of_seed_and_step(tmp_path):
    *train, val = number_files(tmp_path, 500, 300)
    text, again = (data.Text(train, val, 8, 4, seed=1) for _ in range(2))
    batches = [text.batch(step) for step in range(5)]
    assert all(tensor.shape == (4, 8) and tensor.dtype == torch.long for tensor in batches[0])
    list(again.validation())
    assert all(same(again.batch(step), batches[step]) for step in (3, 1, 4, 0, 2))
    assert not same(batches[0], batches[1]) and not same(data.Text(train, val, 8, 4, seed=2).batch(0), batches[0])


def test_text_rows_come_from_every_place_of_every_file_and_never_cross_files(tmp_path):
    *train, val = number_files(tmp_path, 12, 9, 20, 30)
    idx, targets = data.Text(train, val, 8, 2000, seed=0).batch(0)
    starts = idx[:, 0].tolist()
    assert sorted(set(starts)) == [0, 1, 2, 3, 10_000] + list(range(20_000, 20_012))
    assert torch.equal(targets, idx + 1) and torch.equal(idx, idx[:, :1] + torch.arange(8))
    assert all(70 < starts.count(start) < 170 for start in {*starts})  # 2000 / 17 each, and 4 deviations


@pytest.mark.parametrize("size, val_tokens, predicted",
                         [(100, 1000, 99), (97, 96, 96), (100, 50, 50), (9, 50, 8), (1000, 17, 17)])
def test_validation_predicts_each_token_once_at_any_batch_size(tmp_path, size, val_tokens, predicted):
    train, val = number_files(tmp_path, 50, size)
    for batch_size in (1, 3, 64):
        batches = list(data.Text([train], val, 8, batch_size, seed=batch_size, val_tokens=val_tokens).validation())
        idx, targets = (torch.cat(tensors) for tensors in zip(*batches))
        kept = targets != -100
        assert targets[kept].tolist() == list(range(10_001, 10_001 + predicted))
        assert torch.equal(idx[kept], targets[kept] - 1)
        assert kept[:-1].all() and idx.min() >= 0 and idx.shape[1] == 8


def test_fewer_tokens_than_a_row_takes_are_refused(tmp_path):
    small, large = number_files(tmp_path, 8, 9)
    for train, val in [([small], large), ([large], small), ([large, small], large)]:
        with pytest.raises(ValueError, match="0.bin has 8 tokens.* takes 9.*--block_size"):
            data.Text(train, val, 8, 4, seed=0)
    small.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 tokens"):
        data.Text([small], large, 8, 4, seed=0)
    np.full(9, 65_535, np.uint16).tofile(large)
    assert data.Text([large], large, 8, 1, seed=0).batch(0)[0].tolist() == [[65_535] * 8]


# ---- Prompts and completions -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("row, pair", [
    ({"prompt": "2 + 2 =", "completion": "4"}, ("2 + 2 =\n", "4")),
    ({"prompt": "2 + 2 = ", "completion": "4"}, ("2 + 2 = ", "4")),
    ({"prompt": "2 + 2 =", "completion": " 4"}, ("2 + 2 =", " 4")), ({"prompt": "", "completion": " 4"}, ("\n", " 4")),
    ({"query": "Q\n", "response": "R", "type": 3}, ("Q\n", "R")), ({"prompt": "p", "completion": ""}, ("p\n", "")),
    ({"instruction": "Add", "input": "2 2", "output": "4"}, ("Add\n2 2\n", "4")),
    ({"instruction": "Add", "output": "4"}, ("Add\n", "4")), ({"query": "", "response": "", "input": "x"}, ("\n", "")),
    *(({"instruction": "Add", "input": nothing, "output": " 4"}, ("Add", " 4")) for nothing in ("", None)),
    ({"prompt": "p", "input": "not this", "completion": "c"}, ("p\n", "c")),
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_the_usual_names_of_prompt_and_completion(tmp_path, name, row, pair):
    assert data.read_pairs([write(tmp_path / name, json_lines([row]))] * 2) == [pair] * 2


@pytest.mark.parametrize("line", ['{"prompt": "p", "response": "r"}', "{}", '{"prompt": "p", "completion": 4}', "text",
                                  '{"query": null, "response": "r"}', '{"instruction": "", "input": 3, "output": ""}'])
def test_a_bad_pair_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", '{"query": "q", "response": "r"}\n' + line)
    wanted = "prompt and completion, or instruction and input and output, or .* or query and response"
    with pytest.raises(ValueError, match=f"a.jsonl:2: it must be a JSON object with strings {wanted}, not .{line}.$"):
        data.read_pairs([path])


@pytest.mark.parametrize("n", [2, 20, 21, 45])
def test_every_20th_pair_is_held_out(tmp_path, n):
    path = write(tmp_path / "a.jsonl", json_lines({"query": f"{i}", "response": "r"} for i in range(n)))
    pairs = [(f"{i}\n", "r") for i in range(n)]
    train, val = data.prompt_pairs([path], None)
    assert val == pairs[::20] and train == [pair for pair in pairs if pair not in val]
    assert data.prompt_pairs([path], [path, path]) == (pairs, pairs + pairs)
    with pytest.raises(ValueError, match="c.jsonl has a single line.*--val_data"):
        data.prompt_pairs([write(tmp_path / "c.jsonl", '{"query": "q", "response": "r"}')], None)


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


def test_the_targets_are_the_completion_and_the_end():
    pairs = some_pairs(23)
    dataset = data.PromptPairs(pairs, pairs, BYTES, block_size=256, batch_size=5, seed=0)
    batches = list(dataset.validation())
    expected = [(prompt + completion, completion) for prompt, completion in pairs]
    assert [row for batch in batches for row in decoded(*batch)] == expected
    assert (dataset.cut, dataset.dropped) == (0, 0) and [len(idx) for idx, _ in batches] == [5, 5, 5, 5, 3]
    for tokens, wanted in (row for batch in batches for row in zip(*batch)):
        kept = (wanted != -100).nonzero().flatten().tolist()
        assert kept == list(range(kept[0], kept[-1] + 1)), "in one piece"
        assert wanted[kept[-1]] == BYTES.eot_token, "the end last"
        assert (tokens[kept[-1] + 1:] == BYTES.eot_token).all() and BYTES.eot_token not in tokens[:kept[-1] + 1]


@pytest.mark.parametrize("longest, block_size, length",
                         [(64, 256, 64), (65, 256, 128), (3, 256, 64), (128, 256, 128), (90, 100, 100), (60, 50, 50)])
def test_batches_are_padded_to_a_multiple_of_64(longest, block_size, length):
    pairs = [("p\n", "c"), ("p\n", "c" * (longest - 2))]  # and the end token, less the one that is only a target
    idx, targets = next(data.PromptPairs(pairs, pairs, BYTES, block_size, 2, seed=0).validation())
    assert idx.shape == targets.shape == (2, length) and idx.dtype == targets.dtype == torch.long


def test_long_rows_are_cut_or_dropped_and_counted():
    pairs = [("p" * p, "c" * c) for p, c in [(5, 5), (5, 6), (5, 50), (9, 1), (10, 1), (11, 1), (30, 1), (10, 0)]]
    dataset = data.PromptPairs(pairs, pairs[:3], BYTES, block_size=10, batch_size=8, seed=0)
    expected = [("pppppccccc", "ccccc"), ("pppppccccc", "cccccc"), ("pppppccccc", "cccccc"), ("pppppppppc", "c"),
                ("pppppppppp", "c"), ("pppppppppp", "")]
    assert decoded(*dataset.pad(dataset.train)) == expected and decoded(*next(dataset.validation())) == expected[:3]
    assert (dataset.cut, dataset.dropped) == (5, 2)  # three of the training rows, two of validation
    with pytest.raises(ValueError, match="--block_size 10 leaves no room for a completion in 2 lines"):
        data.PromptPairs(pairs, pairs[5:7], BYTES, 10, 8, seed=0)


@pytest.mark.parametrize("n, batch_size", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
@pytest.mark.parametrize("kind", ["prompts", "uuids"])
def test_every_epoch_visits_all_rows_in_a_new_order(n, batch_size, kind):
    pairs = some_pairs(n)
    one, two, other = (data.UUIDPairs(n, BYTES, batch_size, seed) if kind == "uuids" else
                       data.PromptPairs(pairs, pairs, BYTES, 256, batch_size, seed) for seed in (3, 3, 4))
    batches = [one.batch(step) for step in range(5 * n)]
    assert all(len(idx) == batch_size for idx, _ in batches)
    rows = [BYTES.decode([token for token in row if token < 256]) for idx, _ in batches for row in idx.tolist()]
    expected = [f"{a}:{b}"[:-1] for a, b in one.pairs] if kind == "uuids" else [a + b for a, b in pairs]
    epochs = [rows[start:start + n] for start in range(0, len(rows) - n + 1, n)]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert n < 7 or len(set(map(tuple, epochs))) == len(epochs)
    list(two.validation())
    assert all(same(two.batch(step), batches[step]) for step in reversed(range(5 * n)))  # of (seed, step) alone
    assert n < 7 or not any(same(other.batch(step), batches[step]) for step in range(3))


def test_many_pairs_are_encoded_in_order():
    pairs = [(f"{i}\n", f"{i}") for i in range(10_050)]
    rows = data.PromptPairs(pairs, pairs[:1], BYTES, 256, 4, seed=0).train
    assert [BYTES.decode(tokens[:-1].tolist()) for _, tokens in rows] == [a + b for a, b in pairs]


# ---- Writing files ---------------------------------------------------------------------------------------------------
class FullDisk:
    room = 3000  # bytes

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("save, error", [
    (lambda _: FullDisk().write(bytes(9000)), "cannot write .*a: No space left on device"), (lambda _: 1 / 0, "zero"),
    (lambda _: torch.save({"a": torch.ones(9000)}, FullDisk()), "cannot write .*a: No space left on device"),
    (lambda file: file.write(b"half") + next(iter(())), ""), (lambda _: torch.ones(3)[5], "index 5"),
])
def test_after_an_error_the_old_file_is_unchanged_and_a_full_disk_is_called_that(tmp_path, save, error):
    path = write(tmp_path / "a", "old")
    with pytest.raises(Exception, match=f"^.*{error}.*$"):
        data.write_file(path, save)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(ValueError, match=f"^cannot write {path / 'b'}: .*(directory|exists)"):
        data.write_file(path / "b", save)


def test_a_file_is_written_and_replaced_and_two_who_write_it_do_not_mix(tmp_path, monkeypatch):
    def save(file):
        torch.save(torch.ones(3), file)
        data.write_file(str(path), lambda other: other.write(b"inner"))
        assert path.read_bytes() == b"inner"

    path, synced = tmp_path / "new" / "folder" / "a", []
    monkeypatch.setattr("os.fsync", lambda file: synced.append((os.fstat(file).st_size, os.fstat(file).st_ino)))
    data.write_file(path, save)
    assert torch.load(path).tolist() == [1, 1, 1] and os.listdir(path.parent) == ["a"]
    assert synced[0][0] == 5 and synced[1] == (path.stat().st_size, path.stat().st_ino)  # before it got its name


def test_a_fingerprint_is_of_the_contents(tmp_path):
    one, two = write(tmp_path / "one", "a" * 3_000_000), write(tmp_path / "two", "b")
    first = data.fingerprint([one, str(two)])
    one = one.rename(tmp_path / "three")
    assert data.fingerprint([one, two]) == first != data.fingerprint([two, one])
    modified = two.stat().st_mtime_ns
    os.utime(write(two, "c"), ns=(modified, modified))
    assert data.fingerprint([one, two]) != first
    cut = [data.fingerprint([write(one, text[:i]), write(two, text[i:])]) for text in ["abc"] for i in (1, 2)]
    assert cut[0] != cut[1], "a line that moved from one file to the next"


# ---- Documents from files --------------------------------------------------------------------------------------------
TEXTS = ["one\n\ntwo", "", "drei ü 日本 🙂", 'a "quote"\\ and <|endoftext|>']
WHOLE = gzip.compress(json_lines({"text": str(number)} for number in np.random.default_rng(0).random(5000)).encode())


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.json"])
def test_the_documents_of_a_file(tmp_path, name):
    rows = json_lines({"text": text, "url": "https://x", "timestamp": i} for i, text in enumerate(TEXTS))
    for whole in ("one\n\ntwo\n\n\nthree", "ü 日本 🙂\r\nno newline at the end"):
        content, texts = (whole, [whole]) if "txt" in name.lower() else (rows, TEXTS)
        assert read(write(tmp_path / name, content)) == read(write(tmp_path / name, "\ufeff" + content)) == texts
    if texts == TEXTS:
        assert read(write(tmp_path / name, "\n" + rows.replace("\n", "\r\n \n").rstrip())) == TEXTS


@pytest.mark.parametrize("line, complaint", [
    (b"{'text': 1}", "not .*'text'"), (b'{"text": "cut', "not .*cut"), (b'["text"]', "not"), (b"12", "not '12'"),
    (b'{"txt": "x"}', "not .*txt"), (b'{"text": 3}', "not .*3"), (b'{"text": null}', "not .*null"),
    (b'{"text": "\xff"}', "utf-8"), (b"[" * 100_000, "not"), (b'{"text": ' + b"1" * 5000 + b"}", "not .*1"),
], ids=range(10))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_a_bad_line_is_named(tmp_path, name, line, complaint):
    path = write(tmp_path / name, b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError, match=rf"{name}:3: .*{complaint}") as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name, content, complaint", [
    ("a.txt", b"", "is empty"), ("a.jsonl", b"", "is empty"), ("a.txt.gz", gzip.compress(b""), "is empty"),
    ("a.txt", b"one\ntwo\nthr\xe9e\nfour\xff\n", "a.txt:3: .*utf-8"), ("a.jsonl", WHOLE, "a.jsonl:1: .*utf-8"),
    ("a.json.gz", b"<!DOCTYPE html>", "Not a gzip.*delete"), ("a.json.gz", WHOLE[:-4000], "ended before.*delete"),
    ("a.txt.gz", WHOLE[:-1], "ended before.*delete"), ("a.txt.gz", WHOLE[:9000] + b"\xff" * 40_000, "delete"),
    ("a.json.gz", WHOLE[:-8] + bytes(8), "CRC.*delete"), ("a.pdf", b"text", "a.pdf:1: .*JSON"),
], ids=range(11))
def test_a_file_without_text_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_opened_or_does_not_fit_in_memory_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder.txt").mkdir()
    monkeypatch.setattr("gzip.open", lambda _: bytes(1 << 60))
    write(tmp_path / "huge.txt.gz", "text")
    for name, complaint in [("no.json", "No such file"), ("folder.txt", "directory|denied"), ("huge.txt.gz", "memory")]:
        with pytest.raises(ValueError, match=rf"{name}:0: cannot read it .*({complaint})"):
            read(tmp_path / name)
    for work in (data.fingerprint, lambda paths: data.text_tokens(paths, None, BYTES, tmp_path)):
        with pytest.raises(OSError, match="No such file.*no.json"):
            work([tmp_path / "no.json"])


# ---- Tokens ----------------------------------------------------------------------------------------------------------
def words_tokenizer(end=60_000):
    """GPT-2's pattern, whose runs of white space depend on what follows, the bytes in some order, and a few merges."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokens = [bytes([i]) for i in random.Random(0).sample(range(256), 256)]
    tokens += [b"  ", b"12", b"ab", b"\n\n", b" a", b"bc", b" abc", b"\n ", b"    "]
    return tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": end})


def random_text(size, seed):
    words = ["abc", "a", " ", "  ", "\n", "\n\n", "12", "...", "ü", "日本", "🙂", "\t", "\x1c", "\u3000"]
    return "".join(np.random.default_rng(seed).choice(words, size))


def small_pieces(size):
    return re.compile(data.PIECE.pattern.replace("20000", str(size)), data.PIECE.flags)


@pytest.mark.parametrize("size", [100, 300])  # so that there is always a place to cut
def test_no_token_changes_where_a_text_is_cut_into_pieces(size):
    for seed in range(20):
        tokenizer, text = words_tokenizer(), random_text(3000, seed)
        pieces = small_pieces(size).findall(text)
        assert "".join(pieces) == text and len(pieces) > len(text) / size and max(map(len, pieces)) <= size
        assert sum(map(tokenizer.encode_ordinary, pieces), []) == tokenizer.encode_ordinary(text)
    assert [len(piece) for piece in data.PIECE.findall("x" * 50_001)] == [20_000, 20_000, 10_001]  # no place to cut


@pytest.mark.parametrize("tokenizer", [BYTES, words_tokenizer()], ids=["bytes", "words"])
@pytest.mark.parametrize("split", [False, True])
def test_the_tokens_are_those_of_each_document_and_an_end(monkeypatch, tokenizer, split):
    monkeypatch.setattr(data, "PIECE", small_pieces(200))
    texts = [random_text(size, seed) for seed, size in enumerate([0, 1, 50, 5000, 3, 700] * 30)]
    texts += TEXTS + ["half \ud83d a character", "\ufeffmark"]
    train, val = io.BytesIO(), io.BytesIO()
    data.tokenize(iter(texts), tokenizer, train, val if split else None)
    expected = [[text for i, text in enumerate(texts) if not split or i % 20], texts[::20] if split else []]
    for file, documents in zip((train, val), expected):
        assert np.frombuffer(file.getvalue(), np.uint16).tolist() == plain_tokens(documents, tokenizer)
    data.tokenize([""], words_tokenizer(end=65_535), train)
    assert train.getvalue().endswith(b"\xff\xff")
    with pytest.raises(ValueError, match="words has 65,537 tokens"):
        data.tokenize(["text"], words_tokenizer(end=65_536), train)


def test_no_more_than_a_few_documents_are_in_memory():
    class File:
        def write(self, tokens):
            ended.extend(token for token in tokens if token == BYTES.eot_token)
            assert len(read) <= len(ended) + 600

    read, ended = [], []
    data.tokenize((read.append(i) or "text" for i in range(2000)), BYTES, File())
    assert len(ended) == 2000


def test_progress_has_speed_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PROGRESS_EVERY", 0)
    path = write(tmp_path / "a.jsonl", json_lines({"text": "x" * 1000} for _ in range(200)))
    data.token_files([path], BYTES, tmp_path)
    lines = re.findall(r"reading .*a.jsonl: ([\d.]+) MB, [\d.]+ MB/s, (\d+) s left\n", capsys.readouterr().out)
    assert len(lines) > 10 and lines[len(lines) // 2][0] == "0.1" and lines[-1] == ("0.2", "0")


# ---- The cache of tokens ---------------------------------------------------------------------------------------------
def test_tokens_are_made_once_and_again_after_a_change(tmp_path, monkeypatch):
    calls, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
    texts = [f"{name} {i}" for name in "ab" for i in range(40)]
    one, two = (write(tmp_path / name, json_lines({"text": text} for text in some))
                for name, some in [("a.jsonl", texts[:40]), ("b.jsonl", texts[40:])])

    def get(paths=(one, two), val=None, tokenizer=BYTES):
        calls.clear()
        (train,), val = data.text_tokens(paths, val, tokenizer, tmp_path / "cache")
        return train, val, len(calls)

    train, val, n = get()
    assert n == 1 and tokens_of(val) == plain_tokens(texts[::20])  # the files are read once for both
    assert tokens_of(train) == plain_tokens(text for text in texts if text not in texts[::20])
    assert get() == (train, val, 0) and get([str(one), str(two)]) == (train, val, 0)
    assert get(tokenizer=words_tokenizer())[2] == 1 and get([one])[2] == 1 and get([two, one])[2] == 1
    all_of_one, all_of_two, n = get([one], [two])
    assert n == 2 and tokens_of(all_of_one) == plain_tokens(texts[:40])
    assert tokens_of(all_of_two) == plain_tokens(texts[40:])
    assert data.token_files([one], BYTES, tmp_path / "cache") == [all_of_one] and get() == (train, val, 0)
    modified = one.stat().st_mtime_ns
    os.utime(write(one, one.read_text().replace("a 1", "A 1")), ns=(modified, modified))
    assert get()[2] == 1 and get()[2] == 0, "other contents of the same size and time"


def test_a_single_document_is_cut(tmp_path):
    text = "x" * 95 + "y" * 5
    for path in (write(tmp_path / "a.txt", text), write(tmp_path / "b.json", json_lines([{"text": text}]))):
        [train], val = data.text_tokens([path], None, BYTES, tmp_path)
        assert (tokens_of(train), tokens_of(val)) == (plain_tokens(["x" * 95]), plain_tokens(["y" * 5]))


@pytest.mark.parametrize("n", [2, 19])
def test_each_of_a_few_documents_is_cut(tmp_path, n):
    paths = [write(tmp_path / f"{i:02}.txt", chr(97 + i) * 40) for i in range(n)]
    [train], val = data.text_tokens(paths, None, BYTES, tmp_path)
    assert tokens_of(train) == plain_tokens(chr(97 + i) * 38 for i in range(n))
    assert tokens_of(val) == plain_tokens(chr(97 + i) * 2 for i in range(n))
    short = list(data.hold_out(["0123456789"] * n))
    assert not any(held_out for _, held_out in short), "what is too short to be cut leaves no end tokens to predict"


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:len(content) // 2], lambda content: b"",
    lambda content: bytes(len(content)), lambda content: content[:100] + b"\xff\xff" + content[102:],
], ids=["odd", "halved", "empty", "zeros", "no token"])
@pytest.mark.parametrize("split", [0, 1])
def test_a_damaged_token_file_is_named_and_made_again_once_deleted(tmp_path, damage, split):
    path = write(tmp_path / "a.jsonl", json_lines({"text": f"text {i}"} for i in range(400)) + "bad")
    with pytest.raises(ValueError, match="a.jsonl:401"):
        data.text_tokens([path], None, BYTES, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []
    write(path, path.read_text()[:-3])
    [train], val = data.text_tokens([path], None, BYTES, tmp_path / "cache")
    damaged, whole = (train, val)[split], [train.read_bytes(), val.read_bytes()]
    damaged.write_bytes(damage(whole[split]))
    with pytest.raises(ValueError, match=f"^.*{damaged.name}.* is damaged: delete it.*$"):
        data.text_tokens([path], None, BYTES, tmp_path / "cache")
    damaged.write_bytes(whole[split])
    checksum, = (tmp_path / "cache").glob("*.sha256")
    checksum.write_bytes(damage(checksum.read_bytes()))
    with pytest.raises(ValueError, match="is damaged: delete it"):
        data.text_tokens([path], None, BYTES, tmp_path / "cache")
    for missing in (damaged, checksum):
        missing.unlink()
        data.text_tokens([path], None, BYTES, tmp_path / "cache")
        assert [train.read_bytes(), val.read_bytes()] == whole and len(os.listdir(tmp_path / "cache")) == 3


@pytest.mark.parametrize("name", ["語" * 80 + ".txt", "🙂" * 60 + ".txt", "a\nb\udce9.txt"], ids=range(3))
def test_any_name_of_a_file_makes_a_name_of_a_token_file(tmp_path, name):
    [train], val = data.text_tokens([write(tmp_path / name, "text " * 100)], None, BYTES, tmp_path / "cache")
    assert len(tokens_of(train)) == 476 and train.name.isprintable()


# ---- C4 --------------------------------------------------------------------------------------------------------------
SHARD = gzip.compress(os.urandom(200_000))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, {path: bytes}. The next of `server.faults` says what is wrong with an answer: a number is
    its status, ("cut", n) ends it after n bytes, bytes are the file from now on, and words are explained by the code.
    """
    def do_GET(self):
        server, asked, first, status = self.server, self.headers["Range"], 0, 200
        server.requests.append((self.path, asked))
        fault = server.faults.pop(0) if server.faults else None
        content = server.files[self.path] = fault if type(fault) is bytes else server.files.get(self.path)
        version = f'"{hash(content)}"'
        if type(fault) is int or not content:
            status, content = fault or 404, b"no such luck"
        elif fault == "loop":
            status = 302
        elif asked and fault != "no range" and self.headers["If-Range"] in (None, version):
            status, first = 206, 0 if fault == "wrong range" else int(asked[len("bytes="):-1])
        body = content[first:] * (fault != "nothing") + b"and more" * 20_000 * (fault == "more" and status == 206)
        self.send_response(status, "no\x1b[31m luck")
        self.send_header("Location", self.path)
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}" * (status == 206))
        if fault not in ("no length", "nothing"):
            self.send_header("Content-Length", "abc" if fault == "odd length" else str(len(body)))
        if server.has_versions:
            self.send_header("ETag", version)
        self.end_headers()
        for start in range(0, fault[1] if type(fault) is tuple else len(body), 10_000):
            with contextlib.suppress(ConnectionError):  # the client may only want the headers
                self.wfile.write(body[start:start + 10_000])
            time.sleep(0.005 * (fault == "slow"))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data, "WAITS", (0, 0, 0))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests, server.has_versions = {"/shard.gz": SHARD}, [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(server, folder, faults=(), path="/shard.gz"):
    server.faults = list(faults)
    server.requests.clear()
    data.download(server.url + path, folder / "a.gz")
    assert (folder / "a.gz").read_bytes() == server.files[path] and os.listdir(folder) == ["a.gz"]
    return [asked for _, asked in server.requests]  # the ranges


@pytest.mark.parametrize("faults", [
    [], [500], [503, 429, 408], [("cut", 0)], ["no length"], ["nothing"], [("cut", 10_000), "no length"],
    [("cut", 100_000), *["more"] * 9], *([("cut", 100_000), None, fault] for fault in ("no range", "wrong range", 416)),
])
@pytest.mark.parametrize("has_versions", [True, False])
def test_a_file_is_downloaded(server, tmp_path, faults, has_versions, capsys):
    server.has_versions = has_versions
    download(server, tmp_path / "new", faults)
    assert len(server.requests) <= len(faults) + 2
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_a_broken_download_continues_where_it_stopped(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "PROGRESS_EVERY", 0)
    ranges = download(server, tmp_path, [("cut", 100_000), None, ("cut", 70_000), 500, None, ("cut", 0)])
    assert ranges == [None, None, "bytes=100000-", None, None, "bytes=170000-", None, "bytes=170000-"]
    out = capsys.readouterr().out
    assert "the connection ended after 100000 of" in out and re.search(r"shard.gz: 0.2 MB, [\d.]+ MB/s, 0 s left", out)


def test_a_download_is_given_up_unless_data_arrives(server, tmp_path):
    assert len(download(server, tmp_path, [("cut", 70_000)] + [None, ("cut", 10_000)] * 12)) == 27
    for server.has_versions in (True, False):
        with pytest.raises(ValueError, match="cannot download .*the connection ended"):
            download(server, tmp_path / "new", [("cut", 20_000), *[None, "no range", ("cut", 10_000)] * 20]
                     if server.has_versions else [("cut", 20_000)] * 20)
        assert not (tmp_path / "new" / "a.gz").exists() and len(server.requests) < 20


def test_a_download_given_up_leaves_no_half_file_and_continues_next_time(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(data, "WAITS", (1, 2, 4))
    monkeypatch.setattr("time.sleep", lambda wait: wait and waits.append(wait))
    message = r"^cannot download .*shard.gz \(.*500.*\): .*--c4_url.*put the file at .*a\.gz$"
    with pytest.raises(ValueError, match=message):
        download(server, tmp_path, [500, ("cut", 100_000)] + [500] * 4)
    assert waits == [1, 1, 2, 4]
    server.files["/shard.gz"] = b"<html>Log in to the hotel's network</html>"
    with pytest.raises(ValueError, match="not a gzip file, but begins with b'<html>"):
        download(server, tmp_path)
    assert len(server.requests) == 1 and not (tmp_path / "a.gz").exists()
    server.files["/shard.gz"] = SHARD
    assert download(server, tmp_path) == [None, "bytes=100000-"]


def test_a_whole_file_that_was_not_yet_renamed_is_not_downloaded_again(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="division"):
        patch.setattr("os.replace", lambda *_: 1 / 0)
        download(server, tmp_path)
    assert download(server, tmp_path) == [None]


@pytest.mark.parametrize("changed", [gzip.compress(os.urandom(200_000)), gzip.compress(os.urandom(150_000))],
                         ids=["other", "shorter"])
@pytest.mark.parametrize("when", [[], [None]])  # before the second try, or in it
def test_a_file_that_changed_on_the_server_is_not_continued(server, tmp_path, changed, when):
    download(server, tmp_path, [("cut", 100_000), *when, changed])


@pytest.mark.parametrize("faults", [["slow"] * 9, ["slow", "slow", ("cut", 90_000), ("cut", 50_000), "slow", "slow"]])
def test_several_may_download_the_same_file(server, tmp_path, faults):
    def start(i):
        time.sleep(0.03 * i)
        data.download(f"{server.url}/shard.gz", tmp_path / "a.gz")
        assert (tmp_path / "a.gz").read_bytes() == SHARD

    server.faults = faults
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(start, range(3)))
    assert os.listdir(tmp_path) == ["a.gz"]


@pytest.mark.parametrize("path, fault, complaint", [("/none.gz", None, "404"), ("/shard.gz", 403, "403"),
                                                    ("/shard.gz", "loop", "loop"), ("/shard.gz", "odd length", "abc")])
def test_what_no_second_try_can_help_is_said_at_once(server, tmp_path, path, fault, complaint):
    message = rf"^cannot download http.*{path} \(.*{complaint}.*--c4_url.*put the file at .*a\.gz$"
    with pytest.raises(ValueError, match=message) as caught:
        download(server, tmp_path, [fault] * 20, path)
    assert len(server.requests) <= (11 if fault == "loop" else 1) and os.listdir(tmp_path) == []
    assert str(caught.value).isprintable()


def test_a_host_or_a_folder_that_cannot_be_had_is_named(server, tmp_path):
    write(tmp_path / "file", "not a folder")
    with pytest.raises(OSError, match=f"(directory|exists).*{tmp_path / 'file'}"):
        download(server, tmp_path / "file")
    assert server.requests == []
    server.server_close()
    with pytest.raises(ValueError, match="cannot download .*127.0.0.1.* .*refused.*--c4_url"):
        download(server, tmp_path)


def test_c4_is_downloaded_and_tokenized_once_from_each_address(server, tmp_path, capsys):
    names = [f"c4-train.0000{i}-of-01024.json.gz" for i in range(2)] + ["c4-validation.00000-of-00008.json.gz"]
    texts = [[f"text {i} of {name}" for i in range(25)] for name in names]
    (tmp_path / "mirror" / "en").mkdir(parents=True)
    for name, some in zip(names, texts):
        path = write(tmp_path / "mirror" / "en" / name, json_lines({"text": text} for text in some))
        server.files[f"/en/{name}"] = path.read_bytes()
    for url in (server.url, (tmp_path / "mirror").as_uri()):
        [train], val = data.c4_tokens(url + "/", 1, BYTES, tmp_path / "cache")
        assert (tokens_of(train), tokens_of(val)) == (plain_tokens(texts[0]), plain_tokens(texts[2]))
        [train_again, more], val_again = data.c4_tokens(url, 2, BYTES, tmp_path / "cache")
        assert (train_again, val_again) == (train, val) and tokens_of(more) == plain_tokens(texts[1])
        with pytest.raises(ValueError, match=r"cannot download .*c4-train.00002-of-01024.json.gz \(.*--c4_url"):
            data.c4_tokens(url, 3, BYTES, tmp_path / "cache")
    assert [path for path, _ in server.requests[:-1]] == [f"/en/{names[i]}" for i in (0, 2, 1)]
    assert "retrying" not in capsys.readouterr().out
    one, two = (tmp_path / "cache").glob(f"*/{names[2]}")
    for shard in (one, two):
        shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{names[2]}:.* delete a broken download"):
        data.c4_tokens(url, 2, BYTES, tmp_path / "cache")


def test_addresses_that_read_alike_do_not_share_their_files(tmp_path):
    for folder in ("c.4", "c-4"):
        (tmp_path / folder / "en").mkdir(parents=True)
        for name in ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"):
            write(tmp_path / folder / "en" / name, json_lines([{"text": folder}]))
        _, val = data.c4_tokens((tmp_path / folder).as_uri(), 1, BYTES, tmp_path / "cache")
        assert tokens_of(val) == plain_tokens([folder])


@pytest.mark.parametrize("url, shards, complaint", [
    *((url, 1, "--c4_url must") for url in ("huggingface.co/c4", "/data/c4", "ftp://x/c4", "http://ü/c", "http://a/b c",
                                            "http://[::1/c4", "http://a:b/c")),
    ("http://a..b/c", 1, "cannot download .*--c4_url"), (data.C4_URL, 0, "--shards"), (data.C4_URL, 1025, "--shards"),
])
def test_a_wrong_address_or_number_of_shards_is_refused(tmp_path, url, shards, complaint):
    with pytest.raises(ValueError, match=complaint):
        data.c4_tokens(url, shards, BYTES, tmp_path)
