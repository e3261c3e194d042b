"""Tests of data.py, without a network: python -m pytest tests/test_data.py"""

import gzip
import itertools
import json
import os
import random
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import data

BYTES = data.get_tokenizer("bytes")
END = BYTES.eot_token
TEXTS = ["one\n\ntwo\r\nthree", "", "ü 日本 🙂", '"quoted"\\ <|endoftext|>', "half \ud83d a sign"]

def words_tokenizer():
    """Like GPT-2's: its pattern, where white space depends on what follows it, and some merges."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokens = [bytes([255 - i]) for i in range(256)] + [b"  ", b"12", b"ab", b"\n\n", b" a", b"bc"]
    ranks = {token: i for i, token in enumerate(tokens)}
    options = dict(pat_str=pattern, mergeable_ranks=ranks)
    return tiktoken.Encoding("words", special_tokens={"<|endoftext|>": 60_000}, **options)

def write(path, content, mark=""):
    """A file with this text, or with a line for each of these texts; compressed if it is a .gz."""
    if isinstance(content, list):
        content = "\n \r\n".join(json.dumps({"text": text}) for text in content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write((mark + content).encode())
    return path

def write_pairs(path, pairs):
    return write(path, "\n".join(json.dumps({"prompt": a, "completion": b}) for a, b in pairs))

def tokens_in(file):
    return np.fromfile(file, np.uint16).tolist()

def plain_tokens(texts, tokenizer=BYTES):
    return [i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]]

def number_files(folder, *sizes):
    """Two token files of consecutive numbers, the second from 10,000 on."""
    for i, size in enumerate(sizes):
        np.arange(10_000 * i, 10_000 * i + size, dtype=np.uint16).tofile(folder / f"{i}.bin")
    return folder / "0.bin", folder / "1.bin"

def same(batch, other):
    return all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))

# ---- Tokenizers, and the order of rows -----------------------------------------------------------
def test_tokens_of_bytes_are_utf8_and_an_end():
    text = "def f(x):\n\treturn x  # ü 日本 🙂 \0 <|endoftext|>"
    assert BYTES.encode_ordinary(text) == [*text.encode()]
    assert (BYTES.n_vocab, END) == (data.TOKENIZERS["bytes"], 256)

def test_without_gpt2s_tokenizer_there_is_advice(monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: 1 / 0)
    with pytest.raises(ValueError, match="--tokenizer bytes"):
        data.get_tokenizer("gpt2")

@pytest.mark.parametrize("n, batch_size", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_epoch_visits_all_rows_in_a_new_order(n, batch_size):
    batches = [data.epoch_rows(n, batch_size, 3, step) for step in range(5 * n)]
    assert {len(rows) for rows in batches} == {batch_size}
    rows = torch.cat(batches).tolist()
    epochs = [tuple(rows[start : start + n]) for start in range(0, len(rows) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len(set(epochs)) == len(epochs)

@pytest.mark.parametrize("kind", ["uuids", "demo", "text", "prompts"])
def test_a_batch_is_a_function_of_seed_and_step(kind, tmp_path):
    files, pairs = number_files(tmp_path, 500, 300), [(f"{i}\n", "c") for i in range(23)]
    dataset = {"uuids": lambda seed: data.UUIDPairs(23, BYTES, 5, seed),
               "demo": lambda seed: data.DemoText(5000, BYTES, 5, seed),
               "text": lambda seed: data.Text(*files, 8, 5, seed),
               "prompts": lambda seed: data.PromptPairs(pairs, pairs, BYTES, 64, 5, seed)}[kind]
    batches = [dataset(1).batch(step) for step in range(6)]
    again = dataset(1)
    random.seed(5), torch.manual_seed(5), [*again.validation()]
    assert all(same(again.batch(step), batches[step]) for step in (3, 1, 5, 0, 4, 2))
    assert not any(same(a, b) for a, b in itertools.combinations(batches, 2))
    assert not any(same(dataset(2).batch(step), batches[step]) for step in range(6))

# ---- UUID pairs, and the demo's text -------------------------------------------------------------
def test_uuid_pairs_are_of_version_4_and_depend_on_n_and_seed():
    pairs, others = (data.uuid_pairs(1000, random.Random(seed)) for seed in (1, 2))
    assert data.uuid_pairs(40, random.Random(1)) == pairs[:40] != others[:40]
    strings = [string for pair in pairs for string in pair]
    assert len({*strings}) == 2000 and all(uuid.UUID(x).version == 4 for x in strings)
    assert data.HEX_POSITIONS == [i for i, char in enumerate(strings[0]) if char != "-"]

def test_every_character_of_a_pair_is_one_token():
    pairs, words = data.uuid_pairs(50, random.Random(0)), words_tokenizer()
    for pair, row in zip(pairs, data.encode_uuid_pairs(pairs, words).tolist(), strict=True):
        assert [words.decode([token]) for token in row] == list(":".join(pair))

def test_memorizing_is_trained_and_measured_on_the_same_pairs():
    dataset = data.UUIDPairs(300, BYTES, 300, seed=3)
    assert dataset.pairs != data.UUIDPairs(300, BYTES, 300, seed=4).pairs
    for batches in ([dataset.batch(0)], dataset.validation()):
        idx, targets = (torch.cat(tensors) for tensors in zip(*batches))
        rows = torch.cat([idx[:, :37], targets], dim=1)  # a key and a colon, and a value
        assert torch.equal(rows[:, :-1], idx)
        assert sorted(map(BYTES.decode, rows.tolist())) == sorted(map(":".join, dataset.pairs))

def test_chance_is_what_the_best_constant_guess_gets():
    columns = [*zip(*(value for _, value in data.uuid_pairs(20_000, random.Random(0))))]
    hits = [max(map(columns[i].count, "0123456789abcdef")) for i in data.HEX_POSITIONS]
    assert sum(hits) / 640_000 == pytest.approx(data.UUID_CHANCE, abs=0.004)  # the best are lucky

def test_the_demos_text_is_half_python_and_half_new_pairs():
    dataset, text = data.DemoText(50_000, BYTES, 8, 0), data.standard_library_text(50_000).encode()
    seen = {":".join(pair).encode() for pair in data.UUIDPairs(64, BYTES, 8, seed=0).pairs}
    for idx, targets in [*dataset.validation(), *(dataset.batch(step) for step in range(20))]:
        assert idx.shape == (8, 72) and torch.equal(idx[:, 1:], targets[:, :-1])
        rows = [bytes(row) for row in torch.cat([idx[:, :1], targets], dim=1).tolist()]
        assert all(row in text for row in rows[:4]) and not seen & {*rows}
        assert all(uuid.UUID(x.decode()).version == 4 for row in rows[4:] for x in row.split(b":"))
        seen |= {*rows}

# ---- Text, and prompts with completions ----------------------------------------------------------
def test_rows_of_text_come_from_every_place_and_predict_each_next_token(tmp_path):
    idx, targets = data.Text(*number_files(tmp_path, 20, 30), 8, 2000, seed=0).batch(0)
    assert torch.equal(idx, idx[:, :1] + torch.arange(8)) and torch.equal(targets, idx + 1)
    assert {*idx[:, 0].tolist()} == {*range(12)}

@pytest.mark.parametrize("size, most, n", [(9000, 9e9, 1124), (97, 96, 12), (97, 50, 6), (9, 9, 1)])
def test_validation_is_of_the_first_tokens_at_any_batch_size(tmp_path, monkeypatch, size, most, n):
    monkeypatch.setattr(data.Text, "val_tokens", most)
    files = number_files(tmp_path, 50, size)
    few, many = ([*data.Text(*files, 8, size, seed=0).validation()] for size in (1, 64))
    assert len(few) == len(many) and all(map(same, few, many))
    idx, targets = (torch.cat(tensors) for tensors in zip(*few))
    assert idx.flatten().tolist() == [*range(10_000, 10_000 + 8 * n)]
    assert idx.shape == (n, 8) and torch.equal(targets, idx + 1)

@pytest.mark.parametrize("sizes", [(8, 9), (9, 8)])
def test_fewer_tokens_than_a_row_takes_are_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match="--block_size 8"):
        data.Text(*number_files(tmp_path, *sizes), 8, 4, seed=0)

def test_white_space_parts_prompt_and_completion(tmp_path):
    pairs = [("2+2=", "4"), ("2+2= ", "4"), ("2+2=", " 4"), ("", "4"), ("", " 4")]
    path = write_pairs(tmp_path / "a.jsonl.gz", pairs)
    assert data.read_pairs([path, path]) == [
        ("2+2=\n", "4"), *pairs[1:3], ("\n", "4"), ("\n", " 4")] * 2

@pytest.mark.parametrize("n", [2, 20, 21, 45])
def test_every_20th_pair_is_held_out_unless_there_are_files_for_it(tmp_path, n):
    pairs = [(f"{i}\n", "c") for i in range(n)]
    path = write_pairs(tmp_path / "a.jsonl", pairs)
    train, val = data.prompt_pairs([path], None)
    assert val == pairs[::20] and train == [pair for pair in pairs if pair not in val]
    assert data.prompt_pairs([path], [path, path]) == (pairs, pairs + pairs)

def test_the_targets_are_the_completion_and_the_end():
    pairs = [("ab\n", "cd"), ("abc\n", "1234567"), ("abcdefg\n", "xy"), ("abcdefgh\n", "x")]
    dataset, no = data.PromptPairs(pairs, pairs, BYTES, block_size=8, batch_size=2, seed=0), -100
    idx, targets = (torch.cat(tensors).tolist() for tensors in zip(*dataset.validation()))
    assert idx == [[*b"ab\ncd", END, END, END], [*b"abc\n1234"], [*b"abcdefg\n"]]
    assert targets == [[no, no, *b"cd", END, no, no, no],
                       [no, no, no, *b"12345"],  # cut, so the end is not learned here
                       [no] * 7 + [*b"x"]]  # a longer prompt leaves nothing to learn
    with pytest.raises(ValueError, match="--block_size"):
        data.PromptPairs(pairs, pairs[3:], BYTES, block_size=8, batch_size=2, seed=0)

@pytest.mark.parametrize("longest, length", [(3, 64), (64, 64), (65, 100), (99, 100), (101, 100)])
def test_batches_are_padded_to_a_multiple_of_64_or_to_the_context(longest, length):
    pairs = [("p\n", "c"), ("p\n", "c" * (longest - 2))]  # the end is only a target
    [(idx, targets)] = data.PromptPairs(pairs, pairs, BYTES, 100, 2, seed=0).validation()
    assert idx.shape == targets.shape == (2, length)

# ---- Files, and their tokens ---------------------------------------------------------------------
def test_a_file_is_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "file"
    data.write_file(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        data.write_file(path, lambda file: file.write(b"half") / 0)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
    with open(path, "rb") as reader:  # who reads meanwhile has all of the old one
        data.write_file(path, lambda file: file.write(b"new"))
        assert (reader.read(), path.read_bytes()) == (b"old", b"new")

@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "windows"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_text_file_is_a_document_and_so_is_each_json_line(tmp_path, name, mark):
    content, texts = (TEXTS, TEXTS) if ".json" in name else (TEXTS[0], TEXTS[:1])
    paths = [write(tmp_path / name, content, mark)] * 2
    assert [*data.read_documents(paths)] == texts * 2

@pytest.mark.parametrize("name, content, complaint", [
    ("a.txt", b"", "is empty"), ("a.jsonl.gz", gzip.compress(b""), "is empty"),
    ("a.txt", b"one\ncaf\xe9\n", "a.txt:2"), ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1"),
    ("a.jsonl", b'{"text": "good"}\n\n{"text": "cut', "a.jsonl:3"), ("a.jsonl", b"x", "a.jsonl:1"),
    ("a.jsonl", b'{"txt": "x"}', "jsonl:1.* text"), ("a.jsonl", b'{"text": 3}', "jsonl:1.* text"),
    ("a.jsonl", b'["text"]', "a.jsonl:1.* text"), ("a.json.gz", b"<html>", "a.json.gz"),
    ("a.txt.gz", gzip.compress(bytes(99))[:-9], "a.txt.gz"),
    ("pairs", b'{"prompt": "", "completion": ""}\n{}', "pairs:2.* prompt")], ids=itertools.count())
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        list((data.read_pairs if name == "pairs" else data.read_documents)([tmp_path / name]))
    with pytest.raises(ValueError, match=name):
        data.text_tokens([tmp_path / name], None, BYTES, tmp_path / "cache")
    assert not [*tmp_path.glob("cache/*")], "half of the tokens must not look like all of them"

def test_every_document_is_encoded_by_itself_and_has_an_end(tmp_path):
    words = ["abc", "a", " ", "  ", "\n", "\n\n", "12", "...", "ü", "日本", "🙂", "\t", "\u3000"]
    texts = TEXTS + ["".join(random.Random(i).choices(words, k=i % 50)) for i in range(1200)]
    path = write(tmp_path / "a.jsonl", texts)
    for tokenizer in (BYTES, words_tokenizer()):
        tokens = tokens_in(data.token_file([path], tokenizer, tmp_path))
        assert tokens == plain_tokens(texts, tokenizer)

def test_tokens_are_kept_until_a_file_changes(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    first = data.token_file([path], BYTES, tmp_path)
    first.write_bytes(b"kept")
    assert data.token_file([str(path)], BYTES, tmp_path) == first and first.read_bytes() == b"kept"
    for text in ("uno", "three"):  # of another time, and of another size
        os.utime(write(path, text), (1, 1))
        assert tokens_in(data.token_file([path], BYTES, tmp_path)) == plain_tokens([text])
    words = words_tokenizer()
    assert tokens_in(data.token_file([path], words, tmp_path)) == plain_tokens(["three"], words)

@pytest.mark.parametrize("n", [1, 19, 20, 45])
def test_every_20th_document_is_held_out_or_the_last_20th_of_each_of_few(tmp_path, n):
    texts = [f"{i:038}yz" for i in range(n)]
    train, val = [text[:-2] for text in texts], ["yz"] * n
    if n >= 20:
        train, val = [text for i, text in enumerate(texts) if i % 20], texts[::20]
    path = write(tmp_path / "a.jsonl", texts)
    files = data.text_tokens([path], None, BYTES, tmp_path)
    assert [*map(tokens_in, files)] == [plain_tokens(train), plain_tokens(val)]
    files = data.text_tokens([path, path], [path], BYTES, tmp_path)  # with files to validate on
    assert [*map(tokens_in, files)] == [plain_tokens(texts + texts), plain_tokens(texts)]

# ---- C4 ------------------------------------------------------------------------------------------
SHARDS = [f"en/c4-train.0000{i}-of-01024.json.gz" for i in range(3)]
VALIDATION = "en/c4-validation.00000-of-00008.json.gz"

@pytest.fixture
def mirror(tmp_path):
    """A folder like C4's, in which every document is the name of its file."""
    for name in [*SHARDS, VALIDATION]:
        write(tmp_path / "mirror" / name, [name])
    return tmp_path / "mirror"

def c4_tokens(mirror, shards):
    files = data.c4_tokens(mirror.as_uri(), shards, BYTES, mirror.parent / "cache")
    return tuple(map(tokens_in, files))

@pytest.mark.parametrize("shards", [1, 3])
def test_c4_is_downloaded_once_from_each_address(mirror, shards):
    expected = plain_tokens(SHARDS[:shards]), plain_tokens([VALIDATION])
    assert c4_tokens(mirror, shards) == expected
    mirror.rename(mirror.with_name("gone"))
    assert c4_tokens(mirror, shards) == expected
    with pytest.raises(ValueError, match="cannot download"):
        c4_tokens(mirror.with_name("other"), shards)

def test_a_failed_download_is_tried_once_more(mirror, monkeypatch):
    download, wrong = torch.hub.download_url_to_file, itertools.cycle([True, False])
    monkeypatch.setattr("torch.hub.download_url_to_file",
                        lambda url, path: download(url + "x" * next(wrong), path))
    assert c4_tokens(mirror, 1) == (plain_tokens(SHARDS[:1]), plain_tokens([VALIDATION]))

def test_after_two_failures_the_error_says_where_a_file_fetched_by_hand_belongs(mirror):
    file = (mirror / SHARDS[1]).rename(mirror / "fetched by hand")
    with pytest.raises(ValueError, match="--c4_url") as caught:
        c4_tokens(mirror, 2)
    file.rename(re.search(r"\S*/cache/\S*\.gz", str(caught.value))[0])
    assert c4_tokens(mirror, 2)[0] == plain_tokens(SHARDS[:2])
