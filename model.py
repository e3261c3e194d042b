"""A GPT in one file: GPT-2's architecture (Radford et al. 2019) and its published weights.

Pre-norm blocks, GELU, learned positions, an output head tied to the token embedding. Modules are named as in OpenAI's
checkpoint, but c_attn, c_proj and c_fc are nn.Linear, transposed. B sequences, T tokens, C = n_embd channels, H heads.
"""

import math
import os
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass

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
    dropout: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name != "dropout" and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, and {self.n_embd} is not one of {self.n_head}")


PRESETS = {
    "tiny": dict(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=257),
    "demo": dict(n_layer=2, n_head=4, n_embd=128, block_size=128, vocab_size=257),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, C/H) -> (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # the approximation that GPT-2 was trained with
        return F.dropout(self.c_proj(x), self.dropout, self.training)


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
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            residual = name.endswith("c_proj.weight")  # so that the sum over all layers' outputs keeps its size
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, idx):
        """(B, T) token ids -> what the head reads, (B, T, C). ValueError if T exceeds the context length."""
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens do not fit into the context of {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:idx.shape[1]]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """(B, T) token ids -> logits (B, T, vocab_size), and with `targets` the mean cross entropy in nats, else None.

        Targets (B, t) with t < T belong to the last t positions: logits (B, t, vocab_size) are computed for these only,
        which spares the vocabulary's softmax for a prompt. A target of -100 is left out of the mean.
        """
        x = self.features(idx)
        if targets is None:
            return F.linear(x, self.wte.weight), None
        logits = F.linear(x[:, -targets.shape[1]:], self.wte.weight)  # (B, t, C) -> (B, t, vocab_size)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.0, top_k=None, generator=None):
        """Append tokens to idx (B, T): the likeliest at temperature 0, else drawn from the `top_k` likeliest. Past the
        context length the model sees the last `block_size` tokens. Call eval() first if there is dropout.
        """
        for _ in range(max_new_tokens):
            x = self.features(idx[:, -self.config.block_size:])[:, -1]  # (B, C)
            logits = F.linear(x, self.wte.weight).float()  # (B, vocab_size)
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -math.inf
            token = (logits.argmax(-1, keepdim=True) if temperature == 0 else
                     torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator))  # (B, 1)
            idx = torch.cat([idx, token], dim=1)
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path: str, n_head: int | None = None, dropout: float = 0.0) -> "GPT":
        """A GPT with OpenAI's weights ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl": downloaded once) or those of a
        local file: a state dict written by torch.save with GPT-2's names, with or without the prefix "transformer.".
        The configuration is read off the shapes; the number of heads is what `export` noted, `n_head`, or GPT-2's for
        its width. ValueError says what does not fit.
        """
        state = load_checkpoint(name_or_path)
        foreign = f"{name_or_path} is not a GPT-2 checkpoint, as the model.pt of train.py --export is one"
        if not isinstance(state, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in state.items()):
            raise ValueError(f"{foreign}: it is no dict of named tensors")
        noted = state.n_head if type(getattr(state, "n_head", None)) is int else None
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()
                 if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # the causal mask
        head = state.pop("lm_head.weight", None)
        for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
            if name not in state or state[name].dim() != 2:
                raise ValueError(f"{foreign}: it has no {name} of 2 dimensions")
        for name, x in state.items():
            if x.layout != torch.strided or x.is_meta or not x.is_floating_point() or not x.float().isfinite().all():
                raise ValueError(f"{name_or_path}: {name} is not finite, or not of dense floating-point numbers")
        if head is not None and not torch.equal(head.float(), state["wte.weight"].float()):
            raise ValueError(f"{name_or_path}: lm_head.weight is not wte.weight, and this GPT has one weight for both")
        (vocab_size, n_embd), block_size = state["wte.weight"].shape, len(state["wpe.weight"])
        n_head = n_head or noted or {768: 12, 1024: 16, 1280: 20, 1600: 25}.get(n_embd)
        if not n_head or noted and noted != n_head:
            raise ValueError(f"{name_or_path}: n_head must be {noted or 'given'}, not {n_head}")
        n_layer = len({name.split(".")[1] for name in state if name.startswith("h.")})
        with torch.device("meta"):  # shapes only: random weights would be replaced at once
            model = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout))
        state, expected = {name: as_linear(name, tensor) for name, tensor in state.items()}, model.state_dict()
        for name in sorted(state.keys() | expected.keys()):
            ours, theirs = (tuple(d[name].shape) if name in d else "absent" for d in (expected, state))
            if ours != theirs:
                raise ValueError(f"{name_or_path}: {name} is {theirs} in the file, and {ours} in a GPT like that")
        model.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, assign=True)
        return model.train()

    def export(self, path):
        """Write the weights, without adapters, to a path or an open file, in GPT-2's format, for `from_pretrained` and
        transformers' GPT2LMHeadModel.
        """
        with torch.device("meta"):
            unknown = self.state_dict().keys() - GPT(self.config).state_dict().keys()
        if unknown:
            raise ValueError(f"GPT-2's format has no place for {min(unknown)}: merge the adapters first")
        state = OrderedDict((name, as_linear(name, tensor).contiguous()) for name, tensor in self.state_dict().items())
        state.n_head = self.config.n_head  # travels as an attribute, which other readers do not see
        torch.save(state, path)


def as_linear(name, tensor):
    """GPT-2's checkpoints hold these weights as (in_features, out_features), nn.Linear transposed: there and back."""
    return tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


def load_checkpoint(name_or_path):
    """The state dict in a local file, or of a published GPT-2, which is downloaded once into torch.hub's folder."""
    published = [name for name in PRESETS if name.startswith("gpt2")]
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{name_or_path}.bin")
    if os.path.isfile(name_or_path):
        return load_file(name_or_path)
    if name_or_path not in published:
        raise ValueError(f"{name_or_path!r} is neither a file nor one of {', '.join(published)}")
    if not os.path.isfile(path):
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # Hugging Face's own variable, for mirrors
        url = f"{host}/openai-community/{name_or_path}/resolve/main/pytorch_model.bin"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path)
        except OSError as error:
            raise ValueError(f"{name_or_path} cannot be downloaded ({error}): give the path of a copy") from error
    return load_file(path)


def load_file(path, device="cpu"):
    """The tensors and plain data that torch.save wrote to a file. ValueError for any other file, or a damaged one."""
    try:
        if zipfile.is_zipfile(path) and (record := zipfile.ZipFile(path).testzip()):  # torch.load has no checksums
            raise ValueError(f"the checksum of {record} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever torch.load meets in bytes that torch.save did not write
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:100]
        raise ValueError(f"{path} is damaged, or not tensors and plain data from torch.save ({reason})") from error
