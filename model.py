"""A GPT in one file: GPT-2's architecture (Radford et al., 2019), and its published weights.

Pre-norm blocks, GELU, learned positions, and an output head that is the token embedding. Modules
have the names of OpenAI's checkpoint, but its transposed Conv1D layers are nn.Linear here. Shapes:
B sequences, T tokens, C = n_embd channels, H = n_head heads.
"""

import math
import os
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

PRESETS = {
    "demo": dict(n_layer=2, n_head=4, n_embd=128, block_size=128, vocab_size=257),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        qkv = self.c_attn(x)  # (B, T, 3 C)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, C/H)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, C/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, C/H) -> (B, T, C)
        return self.c_proj(y)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh approximation of GELU
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, C) -> (B, T, 4 C)
        return self.c_proj(x)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # 2 n_layer of these are added up, and the sum should not grow with their number
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, idx):
        """What the head reads: (B, T) token ids -> (B, T, C)."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into the context of {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """(B, T) token ids -> logits (B, T, vocab_size), and the mean cross entropy of targets in
        nats, None without targets. Targets (B, t) with t < T belong to the last t positions, and so
        do the logits then: a prompt costs no softmax. Targets of -100 do not count."""
        x = self.features(idx)
        if targets is None:
            return F.linear(x, self.wte.weight), None
        x = x[:, -targets.shape[1] :]  # (B, t, C)
        logits = F.linear(x, self.wte.weight)  # (B, t, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.0, top_k=None, generator=None):
        """Append tokens to idx (B, T): the likeliest one at temperature 0, else one drawn from the
        `top_k` likeliest. Only the last block_size tokens are seen."""
        for _ in range(max_new_tokens):
            x = self.features(idx[:, -self.config.block_size :])[:, -1]  # (B, C)
            logits = F.linear(x, self.wte.weight).float()  # (B, vocab_size)
            if top_k is not None:
                lowest = logits.topk(top_k).values[:, -1:]
                logits[logits < lowest] = -math.inf
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                p = F.softmax(logits / temperature, dim=-1)
                token = torch.multinomial(p, 1, generator=generator)  # (B, 1)
            idx = torch.cat([idx, token], dim=1)
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path, n_head=None):
        """A GPT with OpenAI's weights ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", downloaded
        once), or with those of a local file: a state dict with GPT-2's names, with or without the
        prefix "transformer.". The configuration is read off the shapes. The number of heads cannot
        be: it is what `export` noted, or n_head, or GPT-2's for that width."""
        state = load_checkpoint(name_or_path)
        noted = getattr(state, "n_head", None)
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        if "wte.weight" not in state or "wpe.weight" not in state:
            raise ValueError(f"{name_or_path} is no GPT-2 checkpoint, as train.py --export writes")
        vocab_size, n_embd = state["wte.weight"].shape
        n_head = n_head or noted or {768: 12, 1024: 16, 1280: 20, 1600: 25}.get(n_embd)
        if n_head is None:
            raise ValueError(f"{name_or_path} does not say how many heads it has: give --n_head")
        n_layer = sum(name.endswith("ln_1.weight") for name in state)
        block_size = len(state["wpe.weight"])
        with torch.device("meta"):  # no memory, and no random weights
            model = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
        # What else a file has, a causal mask or a copy of wte as the head, is not read
        own = {name: as_linear(name, state[name]) for name in model.state_dict()}
        own = {name: tensor.float().contiguous() for name, tensor in own.items()}
        model.load_state_dict(own, assign=True)
        return model.train()

    def export(self, path):
        """Write the weights in GPT-2's format, for `from_pretrained` and for transformers."""
        state = OrderedDict()
        for name, tensor in self.state_dict().items():
            state[name] = as_linear(name, tensor).contiguous()
        state.n_head = self.config.n_head  # an attribute, which other readers do not see
        torch.save(state, path)

def as_linear(name, tensor):
    """GPT-2 stores these weights as (in_features, out_features): transposed, there and back."""
    transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.T if transposed else tensor

def load_checkpoint(name_or_path):
    """The state dict in a local file, or of a published GPT-2, from torch.hub's folder."""
    if os.path.isfile(name_or_path):
        return load_file(name_or_path)
    published = [name for name in PRESETS if name.startswith("gpt2")]
    if name_or_path not in published:
        raise ValueError(f"{name_or_path!r} is neither a file nor one of {', '.join(published)}")
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # or a mirror
    url = f"{host}/openai-community/{name_or_path}/resolve/main/pytorch_model.bin"
    try:
        load = torch.hub.load_state_dict_from_url
        return load(url, map_location="cpu", file_name=f"{name_or_path}.bin", weights_only=True)
    except OSError as error:
        raise ValueError(f"{name_or_path} cannot be downloaded ({error}): give a file") from error

def load_file(path, device="cpu"):
    """What torch.save wrote: only tensors and plain data, so that nothing in it is executed."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{path} is damaged, or not tensors that torch.save wrote") from error
