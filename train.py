"""Train a GPT in full, with LoRA and its relatives, or with MoRA and ReMoRA, in one plain loop.

    python train.py                             the demo: memorize UUID pairs on a laptop, in minutes, no download
    python train.py uuid --methods lora mora --operator sharing rotation --rank 2 8 --seed 0 1 2
    python train.py c4 --methods full relora remora --groups cycle random
    python train.py text --data articles.jsonl --init gpt2 --methods full lora mora
    torchrun --standalone --nproc_per_node=8 train.py c4 ...
    python train.py -h                          every option

From top to bottom: settings, command line, device and processes, tasks, base model, optimizer, the loop, files, runs,
results.
"""

import argparse
import collections
import contextlib
import copy
import csv
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # torch takes seconds to import: Ctrl-C is no error then

import torch
import torch.distributed as dist

import data
import mora
from model import GPT, PRESETS, GPTConfig

# ----------------------------------------------------------------------------------------------------------------------
# Settings: what an option is when it is not given

METHODS = ("full", *mora.METHODS)
PROCESS, PROCESSES = (int(text) if text.isdecimal() else 0  # as torchrun sets them; `check` refuses the rest
                      for text in (os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")))

# Peak learning rates for --init demo, scratch, and given weights. The first two are the best of the README's sweeps,
# except relora's first and the second of lora+, asylora and dora, which are lora's or a neighbour's. For given weights
# nothing was swept: these are within what the paper searched for LLaMA-2 7B.
LEARNING_RATES = {
    "full": (2e-3, 1e-2, 3e-5),
    "lora": (2e-2, 3e-3, 2e-4),
    "lora+": (5e-3, 1e-3, 2e-4),
    "asylora": (5e-2, 3e-3, 2e-4),
    "dora": (2e-2, 3e-3, 2e-4),
    "relora": (2e-2, 3e-3, 2e-4),
    "mora truncation": (5e-2, 3e-2, 2e-4),
    "mora sharing": (1e-2, 1e-2, 5e-5),
    "mora decoupling": (5e-2, 3e-2, 2e-4),
    "mora rotation": (5e-2, 3e-2, 3e-4),
}


def own_rate(method, operator, init):
    """The peak learning rate of a method. An operator that is not in the table starts from rotation's."""
    name = f"mora {operator}" if operator else method
    return LEARNING_RATES.get(name, LEARNING_RATES["mora rotation"])[{"demo": 0, "scratch": 1}.get(init, 2)]


DEMO_SIZE = PRESETS["demo"]
DEMO_BASE = dict(text_size=4_000_000, seed=0, max_steps=300, batch_size=32, learning_rate=3e-3, schedule="linear",
                 warmup_steps=20, weight_decay=0.0, grad_clip=1.0)
TASKS = {
    "uuid": dict(methods=["full", "lora", "mora"], rank=[2], operator=["rotation"], init="demo", max_steps=500,
                 schedule="linear"),
    "c4": dict(methods=["full", "lora", "relora", "mora", "remora"], rank=[4], operator=["sharing"], init="scratch",
               max_steps=600, schedule="cosine"),
    "text": dict(methods=["mora"], rank=[8], operator=["rotation"], init="scratch", max_steps=1000, schedule="cosine"),
    "pairs": dict(methods=["mora"], rank=[8], operator=["rotation"], init="scratch", max_steps=1000, schedule="cosine"),
}
OPTIONS_OF_TASKS = {"n_pairs": ["uuid"], "c4_url": ["c4"], "shards": ["c4"], "data": ["text", "pairs"],
                    "val_data": ["text", "pairs"], "old_data": ["c4", "text"], "val_tokens": ["c4", "text"]}


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: error: {message} (python train.py -h explains every option)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, minimum, maximum=1_000_000_000):
    """The type of an option: an int or a float from `minimum` to `maximum`, past which most of what it sets overflows.
    """
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be a {'whole ' if kind is int else ''}number from {minimum} to "
                                             f"{maximum:,}, not {text!r}")
        return value
    return convert


def make_parser():
    """The command line's options. None stands for a default that depends on the task or on other options."""
    parser = Parser(usage=f"train.py [{' | '.join(TASKS)}] [options]", description=__doc__.split("\n")[0],
                    formatter_class=HelpFormatter)
    parser.add_argument("task", nargs="?", default="uuid", choices=TASKS,
                        help="uuid: memorize pairs of random UUIDs. c4: pretrain on C4. text: pretrain on --data. "
                        "pairs: learn the completions of --data's prompts")

    several = "an option that takes several values makes a run of each combination"
    add = parser.add_argument_group(f"method ({several})").add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"among {', '.join(METHODS)} (default: full lora mora for uuid, full lora relora mora remora for c4, else "
        "mora)")
    add("--rank", nargs="+", type=number(int, 1), metavar="R",
        help="LoRA's rank; MoRA's matrix gets as many parameters (default: uuid 2, c4 4, else 8)")
    add("--operator", nargs="+", choices=list(mora.OPERATORS), metavar="OP",
        help=f"MoRA's, among {', '.join(mora.OPERATORS)} (default: sharing for c4, else rotation)")
    add("--groups", nargs="+", choices=["strided", "contiguous", "random", "cycle"], metavar="HOW",
        help="how sharing deals its groups: strided, contiguous, random, or cycle, the paper's for ReMoRA (default: "
        "cycle for remora, else strided)")
    add("--fold", action="store_true",
        help="rotation and decoupling add what lies past the outputs instead of cutting it off")
    add("--alpha", type=number(float, 0),
        help="LoRA's alpha, whose update is scaled by alpha / rank (default: twice the rank)")
    add("--rslora", action="store_true", help="scale LoRA's update by alpha / sqrt(rank)")
    add("--lora_plus_ratio", type=number(float, 0), default=16.0, metavar="X",
        help="B's learning rate in lora+, as a multiple of A's")
    add("--dropout", type=number(float, 0, 1), default=0.0, metavar="P", help="dropout on the adapters' input")
    add("--targets", nargs="+", metavar="LAYER", help="the linear layers to adapt, such as c_attn c_fc (default: all)")
    add("--merge_every", type=number(int, 1), metavar="N",
        help="steps between the merges of relora and remora (default: a fifth of max_steps)")
    add("--restart_warmup", type=number(int, 0), metavar="N",
        help="steps over which the learning rate rises again after a merge (default: a hundredth of max_steps)")
    add("--full_warmup", type=number(int, 0), default=0, metavar="N",
        help="steps in which all weights train, at the rate of full, before the adapters begin")

    add = parser.add_argument_group("model and data").add_argument
    add("--init", help="initial weights: demo (a small base, pretrained once), scratch, gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, or a file (default: demo for uuid, else scratch)")
    add("--tokenizer", choices=list(data.TOKENIZERS),
        help="default: the one that the initial weights were trained with; bytes for scratch")
    for name, meaning, most in (("n_layer", "layers", 1000), ("n_head", "attention heads", 1000),
                                ("n_embd", "width", 100_000)):
        add(f"--{name}", type=number(int, 1, most), metavar="N",
            help=f"{meaning} of a demo or scratch model (default: {DEMO_SIZE[name]})")
    add("--block_size", type=number(int, 2), metavar="N",
        help=f"longest sequence in tokens (default: {DEMO_SIZE['block_size']}, or what the weights allow)")
    add("--n_pairs", type=number(int, 1, 10_000_000), default=32, metavar="N", help="pairs of UUIDs to memorize")
    add("--data", nargs="+", metavar="FILE",
        help="text: .txt, or JSON lines with a field text; pairs: JSON lines with prompt and completion; any of them "
        "gzip'd")
    add("--val_data", nargs="+", metavar="FILE",
        help="held-out data (default: every 20th document or pair of --data)")
    add("--old_data", nargs="+", metavar="FILE",
        help="text on which the loss is reported as well, to see what was forgotten")
    add("--val_tokens", type=number(int, 1), default=100_000, metavar="N",
        help="how many tokens of the held-out text each evaluation reads")
    add("--c4_url", default=data.C4_URL, metavar="URL",
        help="where C4 is: http(s) or file, with the original's layout")
    add("--shards", type=number(int, 1, 1024), default=1, metavar="N",
        help="training shards of C4 to use, of about 350 MB each")

    add = parser.add_argument_group("training").add_argument
    add("--seed", nargs="+", type=number(int, 0, 2**64 - 1), default=[0], metavar="N",
        help="seed of the pairs, the batches and the adapters")
    add("--max_steps", type=number(int, 1), metavar="N",
        help="optimizer steps (default: 500 for uuid, 600 for c4, else 1000)")
    add("--batch_size", type=number(int, 1, 1_000_000), metavar="N",
        help="sequences a step, in all processes together (default: uuid 64 or all pairs, else 32)")
    add("--accumulate", type=number(int, 1), default=1, metavar="N",
        help="micro-batches that a batch is cut into, to save memory")
    add("--learning_rate", nargs="+", type=number(float, 0), metavar="X",
        help="peak learning rate (default: the method's own)")
    add("--schedule", choices=["linear", "cosine", "constant"],
        help="how the learning rate falls (default: linear for uuid, else cosine)")
    add("--warmup_steps", type=number(int, 0), metavar="N",
        help="steps over which it rises before (default: a tenth of max_steps)")
    add("--weight_decay", type=number(float, 0), default=0.0, metavar="X", help="AdamW's weight decay")
    add("--grad_clip", type=number(float, 0), default=1.0, metavar="X",
        help="largest norm of the gradient; 0 is no limit")
    add("--eval_every", type=number(int, 1), metavar="N",
        help="steps between evaluations (default: a quarter of max_steps)")

    add = parser.add_argument_group("running").add_argument
    add("--out_dir", default="out", metavar="DIR", help="where every run gets its folder, and prepared data is kept")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of activations and products; weights stay float32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the model (default: on CUDA, where it works)")
    add("--resume", action="store_true",
        help="continue the runs in out_dir where they stopped, and keep those that are done")
    add("--spectrum", action="store_true",
        help="show the singular values of the updates, and draw them if matplotlib is installed")
    add("--export", action="store_true",
        help="write every trained model, merged, in GPT-2's format to model.pt, for --init")
    return parser


def parse_args(argv=None):
    """The settings as a namespace. Wrong ones end the program with one line and exit status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, tasks in OPTIONS_OF_TASKS.items():
        if args.task not in tasks and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} means nothing to the task {args.task}: it is for {' and '.join(tasks)}")
    for name, value in TASKS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.batch_size = args.batch_size or (min(64, args.n_pairs) if args.task == "uuid" else 32)
    args.eval_every = args.eval_every or math.ceil(args.max_steps / 4)
    args.warmup_steps = args.max_steps // 10 if args.warmup_steps is None else args.warmup_steps
    args.merge_every = args.merge_every or math.ceil(args.max_steps / 5)
    args.restart_warmup = args.max_steps // 100 if args.restart_warmup is None else args.restart_warmup
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args):
    """ValueError for settings that are wrong together, each being right by itself."""
    if PROCESS >= PROCESSES:
        raise ValueError("the environment's RANK and WORLD_SIZE are not those of a process among several: unset them, "
                         "or start with torchrun")
    for name, values in vars(args).items():
        if isinstance(values, list) and len(set(values)) < len(values):
            raise ValueError(f"--{name} names something twice: {' '.join(map(str, values))}")
    if args.init not in ("demo", "scratch"):
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for --init demo or scratch: {args.init} has its own")
    if args.init == "demo" and args.tokenizer == "gpt2":
        raise ValueError("--init demo reads bytes: --tokenizer gpt2 goes with --init gpt2 or scratch")
    if args.task == "uuid" and args.batch_size > args.n_pairs:
        raise ValueError(f"--batch_size {args.batch_size} exceeds the {args.n_pairs} pairs of --n_pairs")
    if args.task == "uuid" or args.init == "demo":
        check_context(args.block_size or DEMO_SIZE["block_size"], f"--block_size {args.block_size}")
    if args.batch_size % (args.accumulate * PROCESSES):
        raise ValueError(f"--batch_size {args.batch_size} cannot be cut into {args.accumulate} micro-batches for each "
                         f"of {PROCESSES} processes")
    if max(args.warmup_steps, args.full_warmup) >= args.max_steps:
        raise ValueError(f"--warmup_steps and --full_warmup must leave something of --max_steps {args.max_steps}")
    if args.restart_warmup >= args.merge_every and {"relora", "remora"} & set(args.methods):
        raise ValueError(f"--restart_warmup {args.restart_warmup} must be below --merge_every {args.merge_every}")
    if args.task in ("text", "pairs") and not args.data:
        raise ValueError(f"the task {args.task} needs --data FILE")
    for file in itertools.chain(*(files or [] for files in (args.data, args.val_data, args.old_data))):
        if not os.path.isfile(file):
            raise ValueError(f"{file!r} is not a file")
    for name in ("fold", "groups"):
        for operator in args.operator if getattr(args, name) else []:
            if name not in mora.OPERATORS[operator].options:
                raise ValueError(f"--{name} means nothing to the operator {operator}")


def check_context(n, name):
    """ValueError if n tokens, which `name` allows, are too few for a pair of UUIDs."""
    if n < 2 * data.UUID_LENGTH:
        raise ValueError(f"{name} is too short: a pair of UUIDs takes {2 * data.UUID_LENGTH} tokens")


# ----------------------------------------------------------------------------------------------------------------------
# Device and processes

def say(text):
    """Print, once for all processes."""
    if PROCESS == 0:
        print(text, flush=True)


@contextlib.contextmanager
def first_process_first():
    """What the first process prepares in this block, the others find when they enter it."""
    if PROCESS and PROCESSES > 1:
        dist.barrier()
    yield
    if not PROCESS and PROCESSES > 1:
        dist.barrier()


def choose_device(args):
    """Settle args.device, dtype and compile; -> a line that says what was chosen, and why."""
    why = why_dtype = "as asked"
    if args.device == "auto":
        args.device, why = ("cuda", why) if torch.cuda.is_available() else ("cpu", "no CUDA device was found")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:  # torch gives the reason in its first sentence
        reason = re.split(r"\. |\n", str(error))[0]
        raise ValueError(f"--device {args.device} cannot be used ({reason}): --device cpu always can") from error
    args.device_name = torch.device(args.device).type
    on_cuda = args.device_name == "cuda"
    if on_cuda:
        torch.cuda.set_device(args.device)
        args.device_name = why = torch.cuda.get_device_name(args.device)
    if args.dtype == "auto":
        if not on_cuda:
            args.dtype, why_dtype = "float32", "mixed precision is for CUDA"
        elif torch.cuda.is_bf16_supported(including_emulation=False):
            args.dtype, why_dtype = "bfloat16", "mixed precision; weights stay float32"
        else:
            args.dtype, why_dtype = "float16", "mixed precision; the card has no bfloat16, so gradients are scaled"
    compiled = "compiled" if args.compile else "not compiled"
    if args.compile is None:
        args.compile = on_cuda and can_compile(args.device)
        compiled = "compiled" if args.compile else "not compiled" + " (torch.compile does not work here)" * on_cuda
    return (f"device: {args.device} ({why}), {args.dtype} ({why_dtype}), {compiled}, "
            f"torch {torch.__version__}" + (f", {PROCESSES} processes" if PROCESSES > 1 else ""))


def can_compile(device):
    """Whether torch.compile works on a device: on CUDA it takes Triton and a C compiler, which not everybody has."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception:  # of any of the libraries that take part
        return False
    return True


def connect(device):
    """Let the processes that torchrun started find each other."""
    patience = datetime.timedelta(hours=2)  # the first process may have data to prepare
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{PROCESSES} processes (WORLD_SIZE) cannot be connected: start them with torchrun, or unset "
                         f"WORLD_SIZE ({str(error).splitlines()[0]})") from error


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: what is measured. `data` says what is learned.


def uuid_metrics(model, pairs):
    """The accuracy on the values' hex digits, as a fraction, and the fraction of values that are right as a whole.

    A digit is right if it is the likeliest after the key and the true digits before it. Where all 32 are, greedy
    decoding finds them from the key alone, so exact match means what it says; the accuracy of decoded values is lower,
    as one wrong digit misleads the next.
    """
    right = []
    for tokens in pairs.tokens.split(128):
        answer = tokens[:, -data.UUID_LENGTH:]
        right.append(model(tokens[:, :-1], answer)[0].argmax(-1) == answer)
    right = torch.cat(right)  # (n_pairs, 36)
    digits = right[:, data.HEX_POSITIONS]  # (n_pairs, 32)
    return {"char_accuracy": digits.float().mean().item(), "exact_match": right.all(dim=1).float().mean().item()}


def held_out(model, dataset):
    """On the held-out rows: the mean loss in nats per target, and the fraction of rows in which every target is the
    likeliest token.
    """
    loss, n_targets, right, n_rows = 0.0, 0, 0, 0
    for idx, targets in dataset.validation():
        (logits, mean), counts = model(idx, targets), targets != -100
        loss += mean.item() * counts.sum().item()
        n_targets += counts.sum().item()
        right += ((logits.argmax(-1) == targets) | ~counts).all(dim=1).sum().item()
        n_rows += len(targets)
    return loss / n_targets, right / n_rows


def held_out_metrics(model, dataset, old_text=None):
    """Loss and perplexity on the held-out rows; for pairs, the fraction of completions that greedy decoding would get
    right; and the loss on a text learned earlier, if there is one.
    """
    loss, right = held_out(model, dataset)
    metrics = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if isinstance(dataset, data.PromptPairs):
        metrics["exact_match"] = right
    if old_text:
        metrics["old_loss"], _ = held_out(model, old_text)
    return metrics


def load_task(config, tokenizer, context):
    """-> the data set to learn, and the function that measures a model on it. `context` is the model's, in tokens."""
    if config.task == "uuid":
        dataset = data.UUIDPairs(config.n_pairs, tokenizer, config.batch_size, config.seed, config.device)
        return dataset, functools.partial(uuid_metrics, pairs=dataset)
    block_size = config.block_size or context
    common = dict(block_size=block_size, batch_size=config.batch_size, seed=config.seed, device=config.device)
    if config.task == "pairs":
        dataset = data.PromptPairs(*data.prompt_pairs(config.data, config.val_data), tokenizer, **common)
        say(f"{len(dataset.train):,} pairs to learn, {len(dataset.val):,} held out; {dataset.cut} cut to {block_size} "
            f"tokens, {dataset.dropped} too long to use")
        return dataset, functools.partial(held_out_metrics, dataset=dataset)
    folder, old_text = Path(config.out_dir, "data"), None
    with first_process_first():
        files = (data.c4_tokens(config.c4_url, config.shards, tokenizer, folder) if config.task == "c4" else
                 data.text_tokens(config.data, config.val_data, tokenizer, folder))
        if config.old_data:
            old = data.token_file(data.Documents(config.old_data), tokenizer, folder)
            old_text = data.Text([old], old, val_tokens=config.val_tokens, **common)
    text = data.Text(*files, val_tokens=config.val_tokens, **common)
    measured = min(len(text.val) - 1, config.val_tokens)
    say(f"{sum(map(len, text.train)):,} tokens to learn from, {measured:,} to measure on")
    return text, functools.partial(held_out_metrics, dataset=text, old_text=old_text)


def summary(rows):
    """What the last table says of a run: for UUIDs the accuracy in % at four moments, as in the paper's Table 2."""
    last = rows[-1]
    if "char_accuracy" in last:
        moments = [rows[math.ceil(len(rows) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
        columns = {f"step {row['step']}": 100 * row["char_accuracy"] for row in moments}
        return columns | {"exact": 100 * last["exact_match"]}
    columns = {name.replace("_", " "): last[name] for name in ("val_loss", "perplexity", "old_loss") if name in last}
    return columns | ({"exact": 100 * last["exact_match"]} if "exact_match" in last else {})


# ----------------------------------------------------------------------------------------------------------------------
# The base model


def load_base(args):
    """The model that every run starts from, and its tokenizer."""
    if args.init == "demo":
        return demo_base(args)
    if args.init == "scratch":
        tokenizer = data.get_tokenizer(args.tokenizer or "bytes")
        torch.manual_seed(0)
        return GPT(GPTConfig(**size_of(args) | {"vocab_size": tokenizer.n_vocab})), tokenizer
    with first_process_first():
        model = GPT.from_pretrained(args.init)
    known = model.config.vocab_size
    name = args.tokenizer or ("bytes" if known == data.TOKENIZERS["bytes"] else "gpt2")
    if data.TOKENIZERS[name] > known:
        raise ValueError(f"--tokenizer {name} has {data.TOKENIZERS[name]} tokens, and {args.init} knows {known}")
    return model, data.get_tokenizer(name)


def size_of(args):
    """The size of a demo or scratch model, as arguments of GPTConfig."""
    return {name: getattr(args, name, None) or value for name, value in DEMO_SIZE.items()}


def demo_base(args):
    """The demo's base and its tokenizer; if out_dir does not hold the base, it is pretrained first."""
    size, tokenizer = size_of(args), data.get_tokenizer("bytes")
    identity = json.dumps([size, DEMO_BASE, args.dtype, sys.version_info[:2]])  # each Python has another library
    folder = Path(args.out_dir, f"base-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
    if not (folder / "model.pt").exists():
        fixed = dict(method="full", accumulate=1, full_warmup=0, eval_every=DEMO_BASE["max_steps"] // 4)
        machine = {name: getattr(args, name) for name in ("device", "dtype", "compile", "resume")}
        config = argparse.Namespace(**DEMO_BASE, **fixed, **machine)
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(**size)).to(config.device)
        mora.find_targets(model, args.targets)  # a wrong name is found before the work
        say("pretraining the demo's base, once: half Python's standard library, half random pairs")
        text = data.DemoText(config.text_size, tokenizer, config.batch_size, config.seed, config.device)
        train(model, text, lambda model: {"loss_on_new_rows": model(*text.batch(-1))[1].item()}, config, folder)
        write(folder / "model.pt", model.export)
    say(f"base: {folder / 'model.pt'}")
    with first_process_first():
        return GPT.from_pretrained(str(folder / "model.pt")), tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(model, config):
    """AdamW on what trains. The learning rate of a group is the schedule's times its `multiple`: 1, but for B in LoRA+.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fast = [name for name in trainable if config.method == "lora+" and name.endswith(".B")]
    groups = [{"params": [trainable[name] for name in trainable if name not in fast], "multiple": 1.0}]
    if fast:
        groups.append({"params": [trainable[name] for name in fast], "multiple": config.lora_plus_ratio})
    fused = torch.device(config.device).type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=fused)


def merges_after(step, config):  # exercise 16
    """Whether adapters are merged and reset after this step: every `merge_every` steps in ReLoRA and ReMoRA, but not
    after the last.
    """
    restarts = config.method in ("relora", "remora")
    return restarts and (step + 1) % config.merge_every == 0 and step + 1 < config.max_steps


def restart(model, optimizer, generator):  # exercise 13
    """Merge the adapters and start them anew, and the optimizer's memory of them too: it belongs to what was merged."""
    mora.merge_and_reset(model, generator)
    for adapter in mora.find_adapters(model).values():
        for parameter in adapter.parameters():
            optimizer.state.pop(parameter, None)


def learning_rate(step, config):  # exercise 16
    """Linear warm-up to the peak, then the schedule's fall, which would reach 0 at `max_steps`.

    Where adapters start anew, after a merge or a full-rank warm-up, the rate rises once more, over `restart_warmup`
    steps from 0 back onto that curve: ReLoRA's jagged schedule.
    """
    progress = max(0.0, (step - config.warmup_steps) / (config.max_steps - config.warmup_steps))
    fall = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[config.schedule]
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    restarted = config.full_warmup if config.method != "full" else 0
    if config.method in ("relora", "remora"):
        restarted = max(restarted, step // config.merge_every * config.merge_every)
    if restarted:
        rise = min(rise, (step - restarted + 1) / max(1, config.restart_warmup))
    return config.learning_rate * rise * fall


# ----------------------------------------------------------------------------------------------------------------------
# The loop


class Loss(torch.nn.Module):
    """A model's loss alone. Logits that leave what is compiled would get a gradient there: zeros, as many as they are.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model(idx, targets)[1]


def autocast(config):
    """Mixed precision, where the settings ask for it."""
    enabled = config.dtype != "float32"
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.dtype), enabled=enabled)


def train(model, dataset, evaluate, config, folder, first=0, last=None):
    """Train `model` in place from step `first` to `last`; -> the rows of folder/metrics.csv, one an evaluation."""
    last = last or config.max_steps
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
    optimizer = make_optimizer(model, config)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.compiler.reset()  # what was compiled for an earlier run serves no other, and its place is limited
    network = torch.compile(Loss(model)) if config.compile else Loss(model)
    rows, losses = [], []
    if config.resume and (folder / "checkpoint.pt").exists():
        first, rows, losses = load_checkpoint(folder / "checkpoint.pt", config, model, optimizer, scaler)
        say(f"resumed after step {first}")
    if PROCESSES > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)

    tokens = lap = begin = 0
    with interrupts() as interrupted:
        for step in range(first, last):
            # Whatever is random in a step follows from (seed, step), so that a resumed run draws what an uninterrupted
            # one draws
            torch.manual_seed(data.seeded("step", config.seed, step, PROCESS).initial_seed())
            idx, targets = dataset.batch(step)
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]

            # Forward and backward
            model.train()
            losses.append(backward(network, idx, targets, config, scaler))
            tokens += idx.numel()

            # Clip and step
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            if step == first:  # the clock starts after the step that compiles
                losses[-1].item()
                tokens, lap, begin = 0, time.perf_counter(), time.perf_counter()

            # Merge
            if merges_after(step, config):
                restart(model, optimizer, data.seeded("merge", config.seed, step + 1))

            # Evaluate, save, report
            if (step + 1) % config.eval_every == 0 or step + 1 == last:
                loss, speed = mean_loss(losses, step, folder), tokens / (time.perf_counter() - lap)
                with torch.no_grad(), autocast(config):
                    metrics = evaluate(model.eval())
                rows.append(dict(step=step + 1, loss=loss, learning_rate=rate, tokens_per_second=speed, **metrics))
                losses = []
                save_checkpoint(folder, step + 1, rows, losses, config, model, optimizer, scaler)
                left = (time.perf_counter() - begin) / max(1, step - first) * (last - step - 1)
                width = len(str(config.max_steps))
                say(f"step {step + 1:{width}}/{config.max_steps}  loss {loss:.4f}  {format_metrics(metrics)}  "
                    f"{speed:,.0f} tokens/s  {left:.0f} s left")
                tokens, lap = 0, time.perf_counter()
            if in_any_process(interrupted):
                save_checkpoint(folder, step + 1, rows, losses, config, model, optimizer, scaler)
                raise KeyboardInterrupt(f"stopped after step {step + 1}, which is saved: the same command with "
                                        "--resume goes on from there")
    return rows


def backward(network, idx, targets, config, scaler):
    """Forward and backward of a batch, in micro-batches; -> its mean loss.

    A micro-batch counts by its share of the targets, so the gradient is that of the whole batch, however it is cut; DDP
    averages over processes, hence the factor PROCESSES.
    """
    n_targets = (targets != -100).sum()
    own = slice(PROCESS, None, PROCESSES)  # of the batch's rows
    parts = list(zip(idx[own].chunk(config.accumulate), targets[own].chunk(config.accumulate)))
    loss = 0.0
    for i, (part, part_targets) in enumerate(parts):
        with contextlib.nullcontext() if PROCESSES == 1 or i == len(parts) - 1 else network.no_sync():
            with autocast(config):
                part_loss = network(part, part_targets) * (part_targets != -100).sum() / n_targets
            scaler.scale(part_loss * PROCESSES).backward()
        loss += part_loss.detach()
    if PROCESSES > 1:
        dist.all_reduce(loss)
    return loss


class Diverged(ValueError):
    """The loss is not finite."""


def mean_loss(losses, step, folder):
    """The mean of the last steps' losses, the last one being that of `step`. Diverged if one is not finite."""
    losses = torch.stack(losses)
    bad = (~losses.isfinite()).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        checkpoint = folder / "checkpoint.pt"
        saved = f"{checkpoint} holds the last good state" if checkpoint.exists() else "nothing was saved before"
        raise Diverged(f"{folder}: the loss is {losses[i]:g} at step {step - len(losses) + i + 2}: try a lower "
                       f"--learning_rate; {saved}")
    return losses.mean().item()


def format_metrics(metrics):
    """Metrics as people read them."""
    forms = {"char_accuracy": ".1%", "exact_match": ".1%"}
    return "  ".join(f"{name.replace('_', ' ')} {value:{forms.get(name, '.4f')}}" for name, value in metrics.items())


@contextlib.contextmanager
def interrupts():
    """In this block SIGINT and SIGTERM only fill the list that it gives, so that a step can end; a second signal does
    not wait.
    """
    received = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if PROCESS == 0:  # print may be busy
            os.write(2, b"\ntrain.py: stopping when this step is saved; once more stops at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_any_process(interrupted):
    """Whether one of the processes was interrupted: all have to stop after the same step."""
    flag = torch.tensor(len(interrupted))
    if PROCESSES > 1:
        dist.all_reduce(flag)
    return bool(flag)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def check_folder(folder):
    """ValueError, before the work, if `folder` cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another --out_dir") from error


def write(path, save):
    """Let `save` write a file under a temporary name, so that `path` never stands for half a file. One process writes
    for all.
    """
    if PROCESS:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}; what was there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(folder, step, rows, losses, config, model, optimizer, scaler):
    """Write checkpoint.pt, all that resuming needs, and metrics.csv."""
    state = dict(step=step, rows=rows, losses=losses, config=vars(config), model=model.state_dict(),
                 optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    write(folder / "checkpoint.pt", lambda path: torch.save(state, path))
    if rows:
        write(folder / "metrics.csv", lambda path: write_csv(path, rows))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def load_checkpoint(path, config, model, optimizer, scaler):
    """Restore a run; -> the number of steps done, the rows so far and the losses since. ValueError if its settings were
    others.
    """
    with usable(path):
        state = torch.load(path, map_location=config.device, weights_only=True)
        saved = dict(state["config"])
    check_same(path, saved, config)
    with usable(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return state["step"], state["rows"], state["losses"]


@contextlib.contextmanager
def usable(path):
    """Whatever goes wrong with the contents of a damaged or foreign file becomes a ValueError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise ValueError(f"{path} is damaged, or of another model ({reason}): move it away to go on without it"
                         ) from error


MAY_CHANGE = {"out_dir", "device", "device_name", "compile", "resume", "eval_every", "spectrum", "export"}


def check_same(path, saved, config):
    """ValueError if a saved run's settings are others than `config`'s, but for where and how it runs."""
    now = {name: value for name, value in vars(config).items() if name not in MAY_CHANGE}
    if config.schedule == "constant" and saved.get("max_steps", 0) <= config.max_steps:
        del now["max_steps"]  # only where the schedule's beginning does not depend on its end can a run be prolonged
    others = [f"--{name} {saved.get(name)} instead of {value}" for name, value in now.items()
              if saved.get(name) != value]
    if others:
        raise ValueError(f"{path} was made with {', '.join(others)}: --resume needs the same settings, or another "
                         "--out_dir")


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def runs(args):
    """A configuration for every combination of the options that take several values, as far as they concern the method.
    """
    for method in args.methods:
        is_mora = mora.METHODS.get(method) is mora.MoRALinear
        ranks = args.rank if method != "full" else [None]
        operators = args.operator if is_mora else [None]
        for rank, operator in itertools.product(ranks, operators):
            own_groups = args.groups or ["cycle" if method == "remora" else "strided"]
            all_groups = own_groups if operator and "groups" in mora.OPERATORS[operator].options else [None]
            rates = args.learning_rate or [own_rate(method, operator, args.init)]
            for groups, rate, seed in itertools.product(all_groups, rates, args.seed):
                config = argparse.Namespace(**vars(args))
                config.method, config.rank, config.operator, config.groups = method, rank, operator, groups
                config.learning_rate, config.seed, config.fold = rate, seed, args.fold and is_mora
                if method not in ("relora", "remora"):
                    config.merge_every = None
                    config.restart_warmup = args.restart_warmup if args.full_warmup else None
                del config.methods
                yield config


def label(config):
    """A setting's name, such as "mora rotation fold r2"."""
    groups = config.groups if config.method == "remora" or config.groups != "strided" else None
    parts = (config.method, config.operator, groups, config.fold and "fold", config.rank and f"r{config.rank}")
    return " ".join(part for part in parts if part)


def adapt(model, config):
    """Give the model the adapters that the settings ask for."""
    if config.method == "full":
        return model
    names = mora.OPERATORS[config.operator].options if config.operator else ("alpha", "rslora")
    options = {name: getattr(config, name) for name in names}
    options["dropout"] = config.dropout
    mora.add_adapters(model, config.method, config.rank, config.operator, config.targets, **options)
    if config.init == "scratch":  # only linear layers can stay at random values: norms, embeddings and head learn
        for module in model.modules():
            if not isinstance(module, (torch.nn.Linear, mora.Adapter)):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    return model


def run(config, base, tokenizer):
    """Train a copy of `base` by one method with one seed; -> what its results.json holds."""
    parts = [config.task, *label(config).split(), f"lr{config.learning_rate:g}", f"seed{config.seed}"]
    folder = Path(config.out_dir, "-".join(parts))
    if config.resume and (results := finished(folder, config)):
        say(f"{folder}: done before")
        return results
    say(f"\n{folder}")
    prepare(folder, config)
    dataset, evaluate = load_task(config, tokenizer, base.config.block_size)
    start, begin, first = base, time.perf_counter(), 0
    if config.full_warmup and config.method != "full":
        start, first = copy.deepcopy(base), config.full_warmup
        warmup = argparse.Namespace(**vars(config))
        warmup.method, warmup.learning_rate = "full", own_rate("full", None, config.init)
        train(start, dataset, evaluate, warmup, folder / "full_warmup", last=first)
    torch.manual_seed(config.seed)  # for the adapters' random numbers
    model = adapt(copy.deepcopy(start), config)
    counts = count(model)
    say("{trainable_parameters:,} of {total_parameters:,} parameters train".format(**counts)
        + (f", {counts['adapter_parameters']:,} of them in adapters" if config.method != "full" else "")
        + (f", r̂ = {counts['size']}" if config.operator else ""))
    if config.method == "remora" and not config.groups:
        say(f"{config.operator} has no groups to draw: a merge starts M anew, and adds nothing that M could not")
    check_start(model, start, dataset, evaluate, config)

    rows = train(model, dataset, evaluate, config, folder, first)
    quick = base.config.n_embd <= 512 or torch.device(config.device).type == "cuda"  # GPT-2's take minutes on a CPU
    results = dict(
        label=label(config), method=config.method, rank=config.rank, operator=config.operator, seed=config.seed,
        **counts, steps=config.max_steps, seconds=time.perf_counter() - begin, metrics=rows[-1], rows=rows,
        summary=summary(rows), spectra=update_spectra(model, base) if quick or config.spectrum else {},
        config=vars(config), torch=torch.__version__, device=config.device_name)
    if config.task == "uuid":
        results["completions"] = complete(model, dataset, tokenizer)
    if config.method != "full":
        write(folder / "adapter.pt", lambda path: torch.save(mora.adapter_state_dict(model), path))
    write(folder / "results.json", lambda path: path.write_text(
        json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8"))
    if config.export:
        write(folder / "model.pt", (mora.merge_adapters(model) if config.method != "full" else model).export)
    return results


def finished(folder, config):
    """The results of a run that is done, or None. ValueError if its settings were others."""
    path = folder / "results.json"
    if not path.exists():
        return None
    with usable(path):
        results = json.loads(path.read_text(encoding="utf-8"))
        saved, steps = dict(results["config"]), results["steps"]
        results_table([results])  # what it lacks for the last table shows now, and not after all runs
    check_same(path, saved, config)
    return results if steps == config.max_steps and (not config.export or (folder / "model.pt").exists()) else None


def prepare(folder, config):
    """See that a run can go on in its folder, or move an earlier one out of its way."""
    if config.resume and folder.exists():
        check_folder(folder)
    elif folder.exists() and PROCESS == 0:
        kept = next(path for path in (Path(f"{folder}.{i}") for i in itertools.count(1)) if not path.exists())
        folder.rename(kept)
        say(f"starts anew: the earlier run is kept in {kept}; --resume would have continued it")


def count(model):
    """How many parameters there are, train, and train in adapters; and r̂, from the least to the largest."""
    adapters = [module for module in model.modules() if isinstance(module, mora.Adapter)]
    sizes = [adapter.operator.size for adapter in adapters if isinstance(adapter, mora.MoRALinear)]
    own = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    return {"size": "-".join(map(str, sorted({min(sizes), max(sizes)}))) if sizes else None,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "adapter_parameters": sum(p.numel() for p in own),
            "total_parameters": sum(p.numel() for p in model.parameters())}


def complete(model, pairs, tokenizer):
    """What greedy decoding answers to the first three keys."""
    keys = pairs.tokens[:3, :data.UUID_LENGTH + 1]  # with the colon
    answers = model.eval().generate(keys, data.UUID_LENGTH)[:, data.UUID_LENGTH + 1:]
    answers = answers.clamp(max=tokenizer.eot_token)  # a model may have been given more tokens than are in use
    return [tokenizer.decode(answer.tolist()) for answer in answers]


@torch.no_grad()
def check_start(model, start, dataset, evaluate, config):
    """See that adapters change nothing before they are trained, and say how the model does."""
    idx, targets = dataset.batch(0)
    rows = math.ceil(1000 / idx.shape[1])  # logits take much memory
    logits, start_logits = (network.eval()(idx[:rows], targets[:rows])[0] for network in (model, start))
    difference = (logits - start_logits).abs().max().item()
    if not difference <= 1e-4 * start_logits.abs().max():
        raise RuntimeError(f"an adapted model must start as its base, but its logits differ by {difference:g}")
    with autocast(config):
        metrics = evaluate(model)
    say(f"before training: logits differ from the base's by {difference:.1g}  {format_metrics(metrics)}")


@torch.no_grad()
def update_spectra(model, base):
    """The singular values s of what training added to the linear layers, over all merges, by kind of layer.

    Means over the layers of a kind: rank, the count above 0.1 (the paper's Figure 5), effective rank (exp of the
    entropy of s / Σ s), stable rank (Σ s² / max s²), and the values themselves.
    """
    kinds = collections.defaultdict(list)
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            tuned = model.get_submodule(name)
            weight = tuned.merged_weight() if isinstance(tuned, mora.Adapter) else tuned.weight
            values = torch.linalg.svdvals(weight - layer.weight)
            if values[0] > 0:
                kinds[re.sub(r"^h\.\d+\.", "", name)].append(values)
    spectra = {}
    for kind, layers in kinds.items():
        values = torch.stack(layers)  # (layers, min(d, k)), descending
        noise = values[:, :1] * max(base.get_submodule(f"h.0.{kind}").weight.shape) * torch.finfo(values.dtype).eps
        share = values / values.sum(1, keepdim=True)
        measures = {"rank": (values > noise).sum(1), "above 0.1": (values > 0.1).sum(1),
                    "effective rank": torch.special.entr(share).sum(1).exp(),
                    "stable rank": (values / values[:, :1]).square().sum(1)}
        spectra[kind] = {name: value.float().mean().item() for name, value in measures.items()}
        spectra[kind]["values"] = [float(f"{value:.4g}") for value in values.mean(0).tolist()]
    return spectra


# ----------------------------------------------------------------------------------------------------------------------
# Results


def mean_and_deviation(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(values, digits=1):
    """The mean, and the standard deviation if there are several."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def markdown(rows):
    """Dicts as the rows of a Markdown table that reads well as text; "-" where a row lacks a column."""
    keys = dict.fromkeys(key for row in rows for key in row)
    widths = {key: max(len(row.get(key, "-")) for row in [{key: key}, *rows]) for key in keys}
    lines = [{key: key for key in keys}, {key: "-" * width for key, width in widths.items()}, *rows]
    cells = [[line.get(key, "-").ljust(width) for key, width in widths.items()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def results_table(results):
    """One row for all seeds of a setting."""
    settings = collections.defaultdict(list)
    for result in results:
        settings[result["label"], result["config"]["learning_rate"]].append(result)
    rows = []
    for (name, rate), group in settings.items():
        first = group[0]
        ranks = [statistics.mean(kind["rank"] for kind in result["spectra"].values())
                 for result in group if result["spectra"]]
        row = {"method": name, "r̂": first["size"] or "-", "peak rate": f"{rate:g}",
               "parameters": f"{first['adapter_parameters'] or first['trainable_parameters']:,}"}
        for key in first["summary"]:
            values = [result["summary"][key] for result in group if key in result["summary"]]
            row[key] = over_seeds(values, 1 if "exact" in first["summary"] else 3)
        row["rank of ΔW"] = over_seeds(ranks, 0) if ranks else "-"
        row["seconds"] = f"{statistics.mean(result['seconds'] for result in group):.0f}"
        rows.append(row)
    return markdown(rows)


def at_best_rate(results):  # exercise 17
    """Of every setting, the results at its best learning rate: by the last accuracy, or loss, in the mean over seeds.

    A rate that lacks a seed, because its run diverged, is not compared. A tie goes to the rate that comes first.
    """
    def score(result):
        metrics = result["metrics"]
        return metrics["char_accuracy"] if "char_accuracy" in metrics else -metrics["val_loss"]

    settings = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in results:
        if math.isfinite(score(result)):
            settings[result["label"]][result["config"]["learning_rate"]].append(result)
    best = []
    for rates in settings.values():
        seeds = max(map(len, rates.values()))
        complete = [group for group in rates.values() if len(group) == seeds]
        best += max(complete, key=lambda group: statistics.mean(map(score, group)))
    return best


def spectrum_table(results):
    """One row for each kind of layer in each run."""
    return markdown([{"run": f"{result['label']} seed{result['seed']}", "layers": kind}
                     | {name: f"{value:.1f}" for name, value in spectrum.items() if name != "values"}
                     for result in results for kind, spectrum in result["spectra"].items()])


def draw_spectra(results, path):
    """The singular values of every setting's update with its first seed: a panel for each kind of layer."""
    panels = collections.defaultdict(dict)
    for result in results:
        for kind, spectrum in result["spectra"].items():
            panels[kind].setdefault(result["label"], (range(len(spectrum["values"])), spectrum["values"], None))
    draw(panels, path, xlabel="index", ylabel="singular value of ΔW", yscale="log", ylim=(1e-4, None))


def draw(panels, path, **axes_settings):
    """Write {title: {label: (x, y, error bars or None)}} as a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("matplotlib is not installed: no picture")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure = Figure(figsize=(4 * len(panels) + 2, 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items()):
        for label, (x, y, error) in lines.items():
            axes.errorbar(x, y, error, label=label, color=f"C{labels.index(label)}", capsize=2)
        axes.set(title=title, **axes_settings)
        axes.label_outer()
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    say(f"drawn: {path}")


def show_completions(results, pairs):
    """The pairs, and what every run's model says to their keys, with wrong characters marked below."""
    names = [result["label"] for result in results]
    width = max(map(len, ["value", *names]))
    for i, (key, value) in enumerate(pairs):
        say(f"\n{'key':{width}}  {key}\n{'value':{width}}  {value}")
        for name, result in zip(names, results):
            guess = result["completions"][i]
            say(f"{name:{width}}  {guess}")
            if guess != value:
                say(" " * (width + 2) + "".join(" " if a == b else "^" for a, b in zip(guess, value)))


def report(results, args):
    """Print the tables of all runs, and for UUIDs some completions."""
    if not results:
        return
    say("\n" + results_table(results))
    best = at_best_rate(results)
    if 0 < len(best) < len(results):
        say("\nEach setting at the best of its learning rates:\n" + results_table(best))
    if args.spectrum and any(result["spectra"] for result in results):
        say("\n" + spectrum_table(results))
        draw_spectra(results, Path(args.out_dir, f"{args.task}-spectra.png"))
    if args.task == "uuid":
        first = [result for result in results if result["seed"] == args.seed[0]]
        show_completions(first, data.uuid_pairs(3, args.seed[0])[:args.n_pairs])


NEXT = """
Next, for example:
  python train.py --methods mora --operator truncation sharing decoupling rotation     the four operators
  python train.py --rank 1 8                                                           a smaller and a larger budget
  python train.py --seed 0 1 2                                                         the spread over seeds
  python train.py --init gpt2 --rank 8 --n_pairs 10000 --batch_size 1000 --max_steps 1000
                                                                                       the paper's setting, on a GPU"""


def complain(error):
    """Say what is wrong; -> the exit status."""
    print(f"train.py: error: {error}", file=sys.stderr)
    return 2


def run_all(argv):
    """All runs of a command line, then their tables; -> the exit status: 2 if one diverged, else 0."""
    args = parse_args(argv)
    say(choose_device(args))
    if PROCESSES > 1:
        connect(args.device)
    check_folder(args.out_dir)
    base, tokenizer = load_base(args)
    base.to(args.device)
    mora.find_targets(base, args.targets)  # a wrong name is found before, not between, the runs
    context = base.config.block_size
    if (args.block_size or 0) > context:
        raise ValueError(f"--block_size {args.block_size} exceeds the context of {args.init}, {context} tokens")
    if args.task == "uuid":
        check_context(context, f"the context of {args.init}")
        say(f"{args.n_pairs} pairs to memorize; guessing gets {data.UUID_CHANCE:.1%} of the hex digits right")
    results, status = [], 0
    for config in runs(args):
        try:
            results.append(run(config, base, tokenizer))
        except Diverged as error:  # one run of several may, at a rate too high
            status = complain(error)
    report(results, args)
    if not argv:
        say(NEXT)
    return status


def main(argv=None):
    """Run the command line and end with status 0, 2 for wrong input, 130 if stopped."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = run_all(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # nobody reads on, as in `python train.py | head`
        status = 141  # as if SIGPIPE had ended the program
    except (ValueError, OSError) as error:
        status = complain(error)
    except (MemoryError, RuntimeError) as error:  # torch has an exception of its own on CUDA only
        if isinstance(error, RuntimeError) and not re.search("(allocate|out of|enough) memory", str(error)):
            raise
        status = complain("there is not enough memory: try a smaller --batch_size, more micro-batches (--accumulate), "
                          "or a smaller model")
    except KeyboardInterrupt as interrupt:
        print(f"\ntrain.py: {str(interrupt) or 'stopped: the same command with --resume goes on from what is saved'}",
              file=sys.stderr)
        status = 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal has an r̂
    main()
