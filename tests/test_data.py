"""Tests of data.py, without a network, in seconds. From the repository's root: python -m pytest tests/test_data.py"""

import ast
import random
import uuid
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import torch

import data


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
