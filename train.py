"""Train a GPT in full, with LoRA and its relatives, or with MoRA and ReMoRA, in one plain loop.

    python train.py                           the demo: memorize UUID pairs on a laptop, in minutes, no data to download
    python train.py uuid --methods lora mora --operator sharing rotation --rank 2 8 --seed 0 1 2
    python train.py c4 --methods full relora remora --groups cycle random
    torchrun --standalone --nproc_per_node=8 train.py c4 ...
    python train.py uuid -h                   every option of a task, with its default there

First what is measured, the base, the method in training and the loop; then what any training script has.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import data
import mora
from model import GPT, PRESETS, GPTConfig, load_file

# ---- What is measured. What there is to learn, and how it becomes batches, is in data.py -----------------------------
@torch.no_grad()
def evaluate(model, dataset):
    """A model's metrics on the validation rows of a data set. FloatingPointError if the loss is not finite.

    A token is right if it is the likeliest after the true ones before it, so a row with all targets right is what
    greedy decoding would write: exact_match is the fraction of such rows, char_accuracy that of right hex digits.
    bits is how many the model knows of the values, in all: 122 random ones in each UUID, less their cross entropy.
    """
    sums = collections.Counter()
    for idx, targets in dataset.validation():
        logits, loss = model(idx, targets)
        counted = targets != -100
        right = (logits.argmax(-1) == targets) | ~counted  # (rows, length)
        sums["targets"] += counted.sum().item()
        sums["loss"] += counted.sum().item() * loss.item()
        sums["rows"] += len(targets)
        sums["exact"] += right.all(dim=1).sum().item()
        if "char_accuracy" in dataset.metrics:
            sums["char"] += right[:, data.HEX_POSITIONS].float().mean(dim=1).sum().item()
    loss = sums["loss"] / sums["targets"]
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite: try a lower --learning_rate")
    metrics = {"char_accuracy": sums["char"] / sums["rows"], "exact_match": sums["exact"] / sums["rows"],
               "bits": 122 * sums["rows"] - sums["loss"] / math.log(2), "val_loss": loss,
               "perplexity": math.exp(min(loss, 700))}
    old_text = getattr(dataset, "old_text", None)  # to measure what was forgotten
    return {name: metrics[name] for name in dataset.metrics} | (
        {"old_loss": evaluate(model, old_text)["val_loss"]} if old_text else {})


def load_dataset(config, tokenizer, context):
    """The data set of the task, for a model with a context of so many tokens."""
    common = dict(batch_size=config.batch_size, seed=config.seed, device=config.device)
    if config.task == "uuid":
        return data.UUIDPairs(config.n_pairs, tokenizer, **common)
    common["block_size"] = config.block_size or context
    if config.task == "pairs":
        dataset = data.PromptPairs(*data.prompt_pairs(config.data, config.val_data), tokenizer, **common)
        say(f"{len(dataset.train):,} pairs to learn, {len(dataset.val):,} held out; {dataset.cut} cut to "
            f"{common['block_size']} tokens, {dataset.dropped} dropped since too long")
        return dataset
    with rank_0_first():
        train, val = (data.c4_tokens(config.c4_url, config.shards, tokenizer, config.cache_dir) if config.task == "c4"
                      else data.text_tokens(config.data, config.val_data, tokenizer, config.cache_dir))
        old = data.token_files(config.old_data, tokenizer, config.cache_dir) if config.old_data else None
    dataset = data.Text(train, val, **common)
    dataset.old_text = data.Text(old, *old, **common) if old else None
    say(f"{sum(map(len, dataset.train)):,} tokens to learn from, {len(dataset.val):,} held out")
    return dataset


# ---- The base: the model that every run starts from ------------------------------------------------------------------
DEMO_BASE = dict(max_steps=300, batch_size=32, learning_rate=3e-3, schedule="linear", warmup_steps=20, eval_every=75)
DEMO_TEXT = 4_000_000  # characters of Python's standard library; half of the base's rows are random pairs


def load_base(args):
    """The model that every run starts from, and its tokenizer."""
    if args.init in ("demo", "scratch"):
        tokenizer = data.get_tokenizer(args.tokenizer or "bytes")
        size = {name: getattr(args, name, None) or value for name, value in PRESETS["demo"].items()}
        config = GPTConfig(**size | {"vocab_size": tokenizer.n_vocab})
        torch.manual_seed(0)
        return GPT(config) if args.init == "scratch" else demo_base(args, config, tokenizer), tokenizer
    with rank_0_first():
        model = GPT.from_pretrained(args.init, args.n_head)
    vocab_size = model.config.vocab_size
    name = args.tokenizer or ("bytes" if vocab_size == data.TOKENIZERS["bytes"] else "gpt2")
    if data.TOKENIZERS[name] > vocab_size:
        raise ValueError(f"--tokenizer {name} has {data.TOKENIZERS[name]} tokens, and {args.init} knows {vocab_size}")
    return model, data.get_tokenizer(name)


def demo_base(args, gpt_config, tokenizer):
    """A small GPT that knows text and what pairs look like. It is pretrained once for each out_dir and size."""
    identity = repr((gpt_config, DEMO_BASE, DEMO_TEXT, args.dtype, sys.version_info[:2]))  # each has another library
    folder = Path(args.out_dir, f"base-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
    if not (folder / "model.pt").exists():
        machine = {name: getattr(args, name) for name in ("device", "dtype", "compile", "resume")}
        config = Config(method="full", **DEMO_BASE, **machine)
        model = GPT(gpt_config).to(config.device)
        mora.find_targets(model, args.targets)  # a wrong name is found before the work
        say("pretraining the demo's base, once, on Python's standard library and random pairs")
        train(model, data.DemoText(DEMO_TEXT, tokenizer, config.batch_size, 0, config.device), config, folder)
        write(folder / "model.pt", model.export)
    with rank_0_first():
        return GPT.from_pretrained(str(folder / "model.pt"))


# ---- The method in training: what trains, at which rate, and when it is merged and reset -----------------------------
def adapt(model, config):
    """Add the adapters that the settings ask for. From scratch, only linear layers can stay frozen at random values:
    norms, embeddings and head train in every method.
    """
    if config.method == "full":
        return model
    options = {"groups": config.groups} if config.groups else {"fold": True} if config.fold else {}
    options |= {} if config.operator else {"alpha": config.alpha, "rslora": config.rslora}  # only MoRA has operators
    options["dropout"] = config.dropout
    mora.add_adapters(model, config.method, config.rank, config.operator, config.targets, **options)
    if config.init == "scratch":
        for module in model.modules():
            if not isinstance(module, (torch.nn.Linear, mora.Adapter)):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    return model


def make_optimizer(model, config):
    """AdamW on what trains. B in LoRA+, and what is in no adapter, have peak learning rates of their own."""
    in_adapters = {parameter for module in model.modules() if isinstance(module, mora.Adapter)
                   for parameter in module.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        is_main = config.method == "full" or parameter in in_adapters
        rate = config.learning_rate if is_main else config.other_learning_rate
        if config.method == "lora+" and name.endswith(".B"):
            rate *= config.lora_plus_ratio
        if parameter.requires_grad:
            groups.setdefault(rate, []).append(parameter)
    return torch.optim.AdamW([{"params": parameters, "peak": rate} for rate, parameters in groups.items()], lr=0.0,
                             weight_decay=config.weight_decay, fused=torch.device(config.device).type == "cuda")


def restarts_before(step, config):  # exercise 18
    """Whether adapters are merged and reset before this step: every `merge_every` steps, in ReLoRA and ReMoRA."""
    return bool(config.merge_every) and step > config.full_warmup and step % config.merge_every == 0


def schedule(step, config):  # exercise 18
    """The learning rate of a step, as a fraction of its peak: linear warm-up to 1, then the fall, if any, to 0.

    Where adapters restart, after a merge or a full-rank warm-up, the rate rises once more, over `restart_warmup` steps,
    back onto that curve: ReLoRA's jagged schedule.
    """
    progress = max(0.0, (step - config.warmup_steps) / (config.max_steps - config.warmup_steps))
    fall = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[config.schedule]
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    last_restart = max(config.full_warmup, step // config.merge_every * config.merge_every if config.merge_every else 0)
    if last_restart and config.method != "full":
        rise = min(rise, (step - last_restart + 1) / max(1, config.restart_warmup))
    return rise * fall


# ---- The loop --------------------------------------------------------------------------------------------------------
class Loss(torch.nn.Module):
    """A model's loss alone. If the compiled model returned the logits too, they would get a gradient, of zeros."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model(idx, targets)[1]


def autocast(config):
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.dtype), config.dtype != "float32")


def train(model, dataset, config, folder, first=0, last=None):
    """Train `model` in place from step `first` to `last`; -> the rows of metrics.csv, one per evaluation, and seconds.
    (Before adapters, a full-rank warm-up is a `train` of its own, up to their `first`.)
    """
    last = last or config.max_steps
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
    optimizer = make_optimizer(model, config)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.compiler.reset()  # its cache is small, and earlier runs' code cannot be reused
    network = torch.compile(Loss(model)) if config.compile else Loss(model)
    rows, losses, seconds_before = [], [], 0.0
    if config.resume and (folder / "checkpoint.pt").exists():
        first, rows, losses, seconds_before = load_checkpoint(folder, config, model, optimizer, scaler)
        say(f"resumed after step {first}")
    if WORLD_SIZE > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)

    tokens, start = 0, time.perf_counter()
    on_signals(request_stop)
    try:
        for step in range(first, last):
            # All randomness is a function of (seed, step) and the process, so a resumed run repeats it exactly
            torch.manual_seed(data.seeded("step", config.seed, step, RANK).initial_seed())

            # Merge
            if restarts_before(step, config):
                mora.merge_and_reset(model, optimizer, data.seeded("merge", config.seed, step))

            # Learning rate
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, config)

            # Forward and backward
            idx, targets = dataset.batch(step)
            model.train()
            losses.append(forward_backward(network, idx, targets, config, scaler))
            tokens += idx.numel()

            # Clip and step
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # Evaluate, save, report
            if step == first:  # it may compile, so it does not count in the speed
                losses[-1].item()
                tokens, timer = 0, time.perf_counter()
            evaluates = (step + 1) % config.eval_every == 0 or step + 1 == last
            if evaluates:
                loss, speed = torch.stack(losses).mean().item(), tokens / (time.perf_counter() - timer)
                with autocast(config):
                    metrics = evaluate(model.eval(), dataset)
                rows.append(dict(step=step + 1, loss=loss, learning_rate=config.learning_rate * schedule(step, config),
                                 tokens_per_second=speed, **metrics))
                losses = []
                left = (time.perf_counter() - start) / (step + 1 - first) * (last - step - 1)
                say(f"step {step + 1:{len(str(config.max_steps))}}/{config.max_steps}  loss {loss:.4f}  "
                    f"{format_metrics(metrics)}  {speed:,.0f} tokens/s  {left:.0f} s left")
                tokens, timer = 0, time.perf_counter()
            stopping = stop_requested()
            if evaluates or stopping:
                seconds = seconds_before + time.perf_counter() - start
                save_checkpoint(folder, step + 1, rows, losses, seconds, config, model, optimizer, scaler)
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}, which is saved: the same command with "
                                        "--resume continues from there")
    finally:
        on_signals(signal.default_int_handler)
    return rows, seconds_before + time.perf_counter() - start


def forward_backward(network, idx, targets, config, scaler):
    """Forward and backward of a batch, in micro-batches; -> its mean loss. A micro-batch counts by its share of the
    targets, so the gradient is that of the whole batch. DDP averages over processes, hence the factor WORLD_SIZE.
    """
    n_targets = (targets != -100).sum()
    mine = slice(RANK, None, WORLD_SIZE)  # of the batch's rows
    micro_batches = list(zip(idx[mine].chunk(config.accumulate), targets[mine].chunk(config.accumulate)))
    total = 0.0
    for i, (idx, targets) in enumerate(micro_batches):
        synchronize = WORLD_SIZE == 1 or i == len(micro_batches) - 1
        with contextlib.nullcontext() if synchronize else network.no_sync():
            with autocast(config):
                loss = network(idx, targets) * (targets != -100).sum() / n_targets
            scaler.scale(loss * WORLD_SIZE).backward()
        total += loss.detach()
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total


def format_metrics(metrics):
    forms = {"char_accuracy": ".1%", "exact_match": ".1%", "bits": ",.0f"}
    return "  ".join(f"{name.replace('_', ' ')} {value:{forms.get(name, '.4f')}}" for name, value in metrics.items())


# ==== A learner may stop here: this was the method. The rest is for whoever runs it ===================================
METHODS, GROUPS = ["full", *mora.METHODS], ("strided", "contiguous", "random", "cycle")
FLAGS = {"method": "methods"}  # options that are called otherwise than their settings
# Peak learning rates for --init demo at r = 2, for scratch at r = 4, from sweeps here, and for given weights at r = 8,
# within what the paper searched for 7B. Adapters' fall as 1 / sqrt(r), as sweeps show; a new operator has rotation's.
LEARNING_RATES = {
    "full": (2e-3, 1e-2, 3e-5), "lora": (2e-2, 1e-2, 2e-4), "lora+": (5e-3, 1e-3, 2e-4), "asylora": (5e-2, 3e-3, 2e-4),
    "dora": (2e-2, 3e-3, 2e-4), "relora": (2e-2, 1e-2, 2e-4), "truncation": (5e-2, 3e-2, 3e-4),
    "sharing": (1e-2, 1e-2, 3e-4), "decoupling": (3e-2, 3e-2, 3e-4), "rotation": (3e-2, 3e-2, 3e-4),
    "overlap": (2e-2, 1e-2, 3e-4),
}


def default_learning_rate(method, operator, init, rank):
    i = {"demo": 0, "scratch": 1}.get(init, 2)
    rate = LEARNING_RATES.get(operator or method, LEARNING_RATES["rotation"])[i]
    return rate if method == "full" else float(f"{rate * math.sqrt((2, 4, 8)[i] / rank):.2g}")


# ---- Options. Each setting of a run is a field of Config and an option of that name ----------------------------------
def option(default, help, **how):
    """`several` values make a run of each; `tasks` have the option; a number is from `least` to `most`."""
    return dataclasses.field(default=default, metadata={"help": help, **how})


@dataclasses.dataclass
class Config:
    """The settings of a run."""
    task: str = "uuid"
    method: str = option("mora", "how to train", several=True, choices=METHODS)
    rank: int = option(8, "LoRA's rank; MoRA's matrix gets at most as many parameters", several=True)
    operator: str = option(None, "MoRA's (default: rotation; sharing for remora)", several=True, choices=mora.OPERATORS)
    groups: str = option(None, "sharing's (default: strided; cycle for remora)", several=True, choices=GROUPS)
    fold: bool = option(False, "let decoupling and rotation add what lies past the outputs instead of cutting it off")
    fast: bool = option(True, "MoRA's layers in one product; --no-fast: as Eq. 2 stands, where breakpoints stop")
    alpha: float = option(None, "LoRA's update is scaled by alpha / rank (default: twice the rank)")
    rslora: bool = option(False, "scale LoRA's update by alpha / sqrt(rank)")
    lora_plus_ratio: float = option(16.0, "B's learning rate in lora+, as a multiple of A's")
    dropout: float = option(0.0, "dropout on the adapters' input", most=1)
    targets: list = option(None, "names of the linear layers to adapt, such as c_attn c_fc (default: all)")
    merge_every: int = option(None, "steps between merges in relora and remora (default: a fifth of max_steps)")
    restart_warmup: int = option(None, "warm-up steps after a merge (default: a hundredth of max_steps)", least=0)
    full_warmup: int = option(0, "steps in which all weights train, at full's rate, before the adapters", least=0)
    init: str = option("scratch", "initial weights: demo (pretrained once), scratch, gpt2, gpt2-medium, ..., or a file")
    tokenizer: str = option(None, "default: that of the initial weights; bytes for scratch", choices=data.TOKENIZERS)
    n_layer: int = option(None, "layers of a demo or scratch model (default: 2)", most=1000)
    n_head: int = option(None, "attention heads (default: 4, or the file's)", most=1000)
    n_embd: int = option(None, "width of a demo or scratch model (default: 128)", most=100_000)
    block_size: int = option(None, "longest sequence in tokens (default: 128, or the file's)", least=2)
    n_pairs: int = option(32, "pairs of UUIDs to memorize; they limit batch_size", most=10_000_000, tasks=["uuid"])
    c4_url: str = option(data.C4_URL, "where C4 is: http(s) or file, with the original's layout", tasks=["c4"])
    shards: int = option(1, "training shards of C4, of about 350 MB each", most=1024, tasks=["c4"])
    data: list = option(None, "files: .txt, or JSON lines; each also .gz", tasks=["text", "pairs"])
    val_data: list = option(None, "held-out files (default: every 20th document or pair)", tasks=["text", "pairs"])
    old_data: list = option(None, "files whose loss is reported too, to see what was forgotten", tasks=["c4", "text"])
    seed: int = option(0, "of pairs, batches and adapters", several=True, least=0, most=2**64 - 1)
    max_steps: int = option(1000, "optimizer steps")
    batch_size: int = option(32, "sequences a step, in all processes together", most=1_000_000)
    accumulate: int = option(1, "micro-batches that a batch is split into, to save memory")
    learning_rate: float = option(None, "peak learning rate (default: LEARNING_RATES in train.py)", several=True)
    other_learning_rate: float = option(3e-2, "that of what is in no adapter, where training starts from scratch")
    schedule: str = option("cosine", "of the learning rate", choices=["linear", "cosine", "constant"])
    warmup_steps: int = option(None, "steps of linear warm-up (default: a tenth of max_steps)", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 is no limit")
    eval_every: int = option(None, "steps between evaluations (default: a quarter of max_steps)")
    out_dir: str = option("out", "where every run has its folder")
    cache_dir: str = option(os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "mora"), "for C4 and tokens")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = option("auto", "of activations and products", choices=["auto", "float32", "bfloat16", "float16"])
    compile: bool = option(None, "torch.compile the model (default: on CUDA, where Triton is)")
    resume: bool = option(False, "continue unfinished runs in out_dir, and keep the finished ones")
    export: bool = option(False, "write every trained model, merged, in GPT-2's format to model.pt, for --init")
    inputs: str = ""  # a digest of the files that are read


TASKS = {
    "uuid": dict(methods=["full", "lora", "mora"], rank=[2], init="demo", schedule="linear", max_steps=500,
                 batch_size=64),
    "c4": dict(methods=["full", "lora", "relora", "mora", "remora"], rank=[4], operator=["sharing"], max_steps=600),
    "text": {}, "pairs": {},
}


def check(right, message):
    if not right:
        raise ValueError(message)


def parse_args(argv=()):
    """The settings, with lists where an option takes several values. ValueError for wrong ones."""
    task = argv[0] if argv and argv[0] in TASKS else "uuid"
    parser = argparse.ArgumentParser(usage=f"train.py [{' | '.join(TASKS)}] [options]", description=f"The task {task}.")
    parser.error = lambda message: check(False, f"{message} (train.py TASK -h has all options)")
    parser.add_argument("task", nargs="?", default="uuid", choices=TASKS, help="uuid: memorize pairs of random UUIDs; "
                        "c4: pretrain on C4; text: on --data; pairs: learn the completions of --data's prompts")
    for field in dataclasses.fields(Config):
        how, flag, several = field.metadata, FLAGS.get(field.name, field.name), field.metadata.get("several")
        if "help" in how and task in how.get("tasks", TASKS):
            default = TASKS[task].get(flag, [field.default] if several and field.default is not None else field.default)
            settings = {"help": how["help"] + (f": {', '.join(how['choices'])}" if "choices" in how else "")}
            if default not in (None, False):
                settings["help"] = re.sub(r" \(default.*?\)", "", settings["help"])
                settings["help"] += f" (default: {' '.join(map(str, default)) if several else default})"
            if field.type is bool:
                settings["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
            else:
                settings |= {"type": str if field.type is list else field.type, "choices": how.get("choices"),
                             "metavar": "X", "nargs": "+" if several or field.type is list else None}
            parser.add_argument(f"--{flag}", default=default, **settings)
        elif f"--{field.name}" in argv:
            parser.error(f"--{field.name} means nothing to the task {task}: it is for {' and '.join(how['tasks'])}")
    args = parser.parse_args(argv)
    check_settings(args, task)
    return args


def check_settings(args, task):
    """Fill in what follows from other settings. ValueError for what is wrong, or wrong together."""
    for field in dataclasses.fields(Config):
        name = FLAGS.get(field.name, field.name)
        values = getattr(args, name, None)
        values = values if isinstance(values, list) else [] if values is None else [values]
        least, most = field.metadata.get("least", 1 if field.type is int else 0), field.metadata.get("most", 10**9)
        for value in values if field.type in (int, float) else ():
            check(least <= value <= most, f"--{name} must be from {least} to {most:,}, not {value}")
        check(len(set(values)) == len(values), f"--{name} names something twice: {' '.join(map(str, values))}")
    for name, n in {"eval_every": 4, "merge_every": 5, "warmup_steps": 10, "restart_warmup": 100}.items():
        if getattr(args, name) is None:
            setattr(args, name, args.max_steps // n if "warmup" in name else math.ceil(args.max_steps / n))
    args.batch_size = min(args.batch_size, args.n_pairs) if task == "uuid" else args.batch_size
    args.cache_dir = os.path.expanduser(args.cache_dir)
    check(args.task == task, f"the task comes first: train.py {args.task} ...")
    check(args.init in ("demo", "scratch") or not (args.n_layer or args.n_embd),
          f"--n_layer and --n_embd are for --init demo or scratch: {args.init} has its own")
    check(args.batch_size % (args.accumulate * WORLD_SIZE) == 0, f"--batch_size {args.batch_size} cannot be split into "
          f"{args.accumulate} micro-batches for each of {WORLD_SIZE} processes")
    check(max(args.warmup_steps, args.full_warmup) < args.max_steps,
          f"--warmup_steps and --full_warmup must leave something of --max_steps {args.max_steps}")
    check(args.restart_warmup < args.merge_every or not {"relora", "remora"} & {*args.methods},
          f"--restart_warmup {args.restart_warmup} must be below --merge_every {args.merge_every}")
    check(task not in ("text", "pairs") or args.data, f"the task {task} needs --data FILE")
    check((args.block_size or 72) >= 72 or task != "uuid" and args.init != "demo",
          f"--block_size {args.block_size} is too short: a pair of UUIDs takes 72 tokens")
    names = args.operator or ["sharing" if "remora" in args.methods else "rotation"]
    names = names if {"mora", "remora"} & {*args.methods} else args.methods
    for name, kind in {"fold": mora.Decoupling, "groups": mora.Sharing}.items():
        check(not getattr(args, name) or all(issubclass(mora.OPERATORS.get(each, object), kind) for each in names),
              f"--{name} means nothing to {' or '.join(names)}")
    files = [file for name in ("data", "val_data", "old_data") for file in getattr(args, name, None) or ()]
    args.inputs = data.fingerprint(files + [args.init] * os.path.isfile(args.init))


# ---- Device and processes --------------------------------------------------------------------------------------------
RANK, WORLD_SIZE = 0, 1  # of the processes, as torch calls them; LoRA's rank is config.rank
if dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def say(text, file=None):
    if RANK == 0:
        print(text, file=file, flush=True)


@contextlib.contextmanager
def rank_0_first():
    """What the first process prepares in this block, the others find when they enter it."""
    if RANK:
        dist.barrier()
    yield
    if not RANK and WORLD_SIZE > 1:
        dist.barrier()


def choose_device(args):
    """Settle args.device, dtype and compile; -> the device's name."""
    if args.device == "auto" and not torch.cuda.is_available():
        args.device = "cpu"
    if args.device in ("auto", "cuda"):
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=args.device).item()
    except Exception as error:  # each device has errors of its own; torch gives the reason in the first sentence
        reason = re.split(r"\. |\n", str(error))[0]
        raise ValueError(f"--device {args.device} cannot be used ({reason}): --device cpu always can") from error
    on_cuda, name = args.device.startswith("cuda"), torch.device(args.device).type
    if on_cuda:
        torch.cuda.set_device(args.device)
        name = torch.cuda.get_device_name(args.device)
    if args.dtype == "auto":
        half = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        args.dtype = half if on_cuda else "float32"
    if args.compile is None:
        args.compile = on_cuda and importlib.util.find_spec("triton") is not None
    say(f"device: {name}, {args.dtype}, {'compiled' if args.compile else 'not compiled'}, torch {torch.__version__}"
        + f", {WORLD_SIZE} processes" * (WORLD_SIZE > 1))
    return name


# ---- Files, stopping and resuming ------------------------------------------------------------------------------------
def write(path, save):
    """Let `save` write to an open file that appears as `path` when it is whole. One process writes for all."""
    if RANK == 0:
        data.write_file(path, save)


@contextlib.contextmanager
def locked(folder):
    """ValueError if another process is in this block with the same folder. A lock ends with its process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "a+") as file:
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = Path(file.name).read_text()
            raise ValueError(f"{folder} is in use by process {owner}: choose another --out_dir") from None
        Path(file.name).write_text(str(os.getpid()))
        yield


stop_requests = []


def request_stop(number, frame):
    """While training, the first signal is only recorded, so that a step can finish; the second stops at once."""
    if stop_requests:
        raise KeyboardInterrupt
    stop_requests.append(number)
    if RANK == 0:  # not by print, which may be interrupted itself
        os.write(2, b"\ntrain.py: stopping when this step is saved; once more stops at once\n")


def on_signals(handler):
    stop_requests.clear()
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # Windows has no SIGHUP
        if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(getattr(signal, name), handler)


def stop_requested():
    """Whether one of the processes was asked to stop: all have to stop after the same step."""
    flag = torch.tensor(len(stop_requests))
    if WORLD_SIZE > 1:
        dist.all_reduce(flag)
    return bool(flag)


def save_checkpoint(folder, step, rows, losses, seconds, config, model, optimizer, scaler):
    """Write metrics.csv, and checkpoint.pt, all that resuming needs."""
    lines = [",".join(map(str, line)) + "\n" for line in [*rows[:1], *(row.values() for row in rows)]]
    state = dict(step=step, rows=rows, losses=losses, seconds=seconds, config=vars(config), model=model.state_dict(),
                 optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    write(folder / "metrics.csv", lambda file: file.write("".join(lines).encode()))
    write(folder / "checkpoint.pt", lambda file: torch.save(state, file))


def load_checkpoint(folder, config, model, optimizer, scaler):
    """Restore a run; -> the number of steps done, the rows so far, the losses since and the seconds."""
    path = folder / "checkpoint.pt"
    state = load_file(path, config.device)
    with reading_saved(path):
        saved = dict(state["config"])
    check_same(path, saved, config)
    with reading_saved(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        for parameter, moments in optimizer.state.items():
            assert parameter.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape, "optimizer state"
        step, rows, losses, seconds = (state[name] for name in ("step", "rows", "losses", "seconds"))
        assert step in range(config.max_steps + 1) and all(row["step"] <= step for row in rows), "steps"
        assert all(loss.dim() == 0 for loss in losses) and seconds >= 0 and isinstance(state["scaler"], dict), "losses"
    return step, rows, losses, seconds


@contextlib.contextmanager
def reading_saved(path):
    """Turn any error while reading a saved file into one line."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"{path} is damaged, or of another model ({reason}): move it away") from error


def check_same(path, saved, config):
    """ValueError if a saved run's settings or inputs are others than `config`'s, but for where and how it runs."""
    now = {name: value for name, value in vars(config).items() if name not in (
        "out_dir", "cache_dir", "device", "compile", "fast", "resume", "eval_every", "export")}
    if config.schedule == "constant" and saved.get("max_steps", 0) <= config.max_steps:
        del now["max_steps"]  # only where the schedule's beginning does not depend on its end can a run be prolonged
    others = [f"--{name} {saved.get(name)} instead of {now[name]}" for name in now if saved.get(name) != now[name]]
    if others:
        raise ValueError(f"{path} was made with {', '.join(others)}: --resume needs the same (--inputs is a checksum "
                         "of the files of --data and --init), or another --out_dir")


# ---- Runs ------------------------------------------------------------------------------------------------------------
def runs(args):
    """A Config for every combination of the options that take several values, as far as they concern the method."""
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)
              if hasattr(args, field.name) and not field.metadata.get("several")}
    for method in args.methods:
        is_mora, restarts = mora.METHODS.get(method) is mora.MoRALinear, method in ("relora", "remora")
        operators = (args.operator or ["sharing" if restarts else "rotation"]) if is_mora else [None]
        for rank, operator in itertools.product([None] if method == "full" else args.rank, operators):
            has_groups = operator and issubclass(mora.OPERATORS[operator], mora.Sharing)
            groupings = (args.groups or ["cycle" if restarts else "strided"]) if has_groups else [None]
            rates = args.learning_rate or [default_learning_rate(method, operator, args.init, rank)]
            for groups, rate, seed in itertools.product(groupings, rates, args.seed):
                config = Config(**shared, method=method, rank=rank, operator=operator, groups=groups, seed=seed,
                                learning_rate=rate)
                config.fold = args.fold and is_mora
                config.merge_every = args.merge_every if restarts else None
                config.restart_warmup = args.restart_warmup if restarts or args.full_warmup else None
                yield config


def label(config):
    """A setting's name, such as "mora rotation fold r2"."""
    groups = config.groups if config.method == "remora" or config.groups != "strided" else None
    words = (config.method, config.operator, groups, config.fold and "fold", config.rank and f"r{config.rank}")
    return " ".join(word for word in words if word)


def run(config, base, tokenizer, device_name):
    """Train a copy of `base` by one method with one seed; -> what its results.json holds."""
    words = [config.task, *label(config).split(), f"lr{config.learning_rate!r}", f"seed{config.seed}"]
    folder = Path(config.out_dir, "-".join(words))
    with locked(folder) if RANK == 0 else contextlib.nullcontext():
        if config.resume and (results := finished(folder, config)):
            say(f"{folder}: done before")
            return results
        say(f"\n{folder}")
        if folder.exists() and not config.resume and RANK == 0:
            paths = (folder.with_name(f"kept-{folder.name}.{i}") for i in itertools.count(1))  # not out/uuid-*
            kept = folder.rename(next(path for path in paths if not path.exists()))
            say(f"starts anew: the earlier run is kept in {kept}; --resume would have continued it")
        dataset, start, first, seconds = load_dataset(config, tokenizer, base.config.block_size), base, 0, 0.0
        if config.full_warmup and config.method != "full":
            start, first = copy.deepcopy(base), config.full_warmup
            warmup = dataclasses.replace(config, method="full", merge_every=None,
                                         learning_rate=default_learning_rate("full", None, config.init, None))
            _, seconds = train(start, dataset, warmup, folder / "full_warmup", last=first)
        torch.manual_seed(config.seed)  # for the adapters' random numbers
        model = adapt(copy.deepcopy(start), config)
        counts = count(model)
        text = "{trainable_parameters:,} of {total_parameters:,} parameters train, {adapter_parameters:,} in adapters"
        say(text.format(**counts) + (f", r̂ = {counts['size']}" if counts["size"] else ""))
        check_start(model, start, dataset, config)
        rows, more_seconds = train(model, dataset, config, folder, first)
        if config.task == "uuid":
            show_completion(model, dataset, tokenizer)
        results = dict(label=label(config), method=config.method, rank=config.rank, operator=config.operator,
                       seed=config.seed, **counts, steps=config.max_steps, seconds=seconds + more_seconds,
                       metrics=rows[-1], rows=rows, update_rank=update_rank(model, base), config=vars(config),
                       torch=torch.__version__, device=device_name)
        if config.method != "full" and config.init != "scratch" and not (config.merge_every or config.full_warmup):
            write(folder / "adapter.pt", lambda file: torch.save(mora.adapter_state_dict(model), file))
        if config.export:
            write(folder / "model.pt", (mora.merge_adapters(model) if config.method != "full" else model).export)
        write(folder / "results.json", lambda file: file.write(json.dumps(results, indent=1, allow_nan=False).encode()))
    return results


def finished(folder, config):
    """The results of a finished run, or None. ValueError if its settings or inputs were others."""
    path = folder / "results.json"
    if not path.exists():
        return None
    with reading_saved(path):
        results = json.loads(path.read_text(encoding="utf-8"))
        saved, done = dict(results["config"]), results["steps"] == config.max_steps
        markdown([table_row(results, seed=str(results["seed"]))])  # what does not fit shows now, not after all runs
    check_same(path, saved, config)
    return results if done and (not config.export or (folder / "model.pt").exists()) else None


def count(model):
    adapters = [module for module in model.modules() if isinstance(module, mora.Adapter)]
    sizes = sorted(adapter.size for adapter in adapters if isinstance(adapter, mora.MoRALinear))
    parameters = {"trainable": [p for p in model.parameters() if p.requires_grad], "total": [*model.parameters()],
                  "adapter": [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]}
    counts = {f"{name}_parameters": sum(p.numel() for p in some) for name, some in parameters.items()}
    return counts | {"size": "-".join(map(str, dict.fromkeys([sizes[0], sizes[-1]]))) if sizes else None}


@torch.no_grad()
def check_start(model, start, dataset, config):
    """RuntimeError unless untrained adapters leave the outputs as they are; prints the metrics at the start."""
    idx, targets = dataset.batch(0)
    few = slice(math.ceil(1000 / idx.shape[1]))  # since logits take much memory
    logits, start_logits = (network.eval()(idx[few], targets[few])[0] for network in (model, start))
    difference = (logits - start_logits).abs().max().item()
    if difference > 1e-4 * start_logits.abs().max():  # not so if both overflow, which `evaluate` will notice
        raise RuntimeError(f"an adapted model must start as its base, but its logits differ by {difference:g}")
    with autocast(config):
        metrics = evaluate(model, dataset)
    say(f"before training: logits differ from the base's by {difference:.1g}  {format_metrics(metrics)}")


def update_rank(model, base):
    """The mean rank of what training added to the linear layers, in all merges together."""
    if base.config.n_embd > 512 and base.wte.weight.device.type == "cpu":
        return None  # takes minutes
    ranks = [torch.linalg.matrix_rank(model.get_submodule(name).weight - layer.weight).item()
             for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)]
    return sum(ranks) / len(ranks)


def show_completion(model, pairs, tokenizer):
    """Print the first pair, and what greedy decoding answers to its key, with wrong characters marked below."""
    (key, value), prompt = pairs.pairs[0], pairs.tokens[:1, :data.UUID_LENGTH + 1]  # with the colon
    answer = model.eval().generate(prompt, data.UUID_LENGTH)[0, data.UUID_LENGTH + 1:]
    answer = tokenizer.decode(answer.clamp(max=tokenizer.eot_token).tolist())  # a model may know more tokens than that
    marks = "".join(" " if a == b else "^" for a, b in zip(answer, value))
    say(f"key    {key}\nvalue  {value}\nanswer {answer}" + f"\n       {marks}" * (answer != value))


def markdown(rows):
    """Dicts as the rows of a Markdown table that reads well as text; "-" where a row lacks a column."""
    keys = dict.fromkeys(key for row in rows for key in row)
    cells = [[*keys], ["-"] * len(keys), *([row.get(key, "-") for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells[1] = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def columns(result):
    """A run's figures, and their digits. For UUIDs, the accuracy in % at four moments, as in the paper's Table 2."""
    rows, last = result["rows"], result["metrics"]
    moments = [rows[math.ceil(len(rows) * i / 4) - 1] for i in (1, 2, 3, 4)] if "char_accuracy" in last else ()
    figures = {f"step {row['step']}": (100 * row["char_accuracy"], 1) for row in moments}
    figures |= {key.replace("_", " "): (last[key], 3) for key in ("val_loss", "perplexity", "old_loss") if key in last}
    figures |= {"exact": (100 * last["exact_match"], 1)} if "exact_match" in last else {}
    figures |= {"bits / parameter": (last["bits"] / result["trainable_parameters"], 2)} if "bits" in last else {}
    figures |= {"rank of ΔW": (result["update_rank"], 0)} if result["update_rank"] is not None else {}
    return figures | {"seconds": (result["seconds"], 0)}


def table_row(result, **more):
    parameters = result["adapter_parameters"] or result["trainable_parameters"]
    return {"method": result["label"], "r̂": result["size"] or "-", "parameters": f"{parameters:,}",
            "peak rate": f"{result['config']['learning_rate']:g}",
            **{name: f"{value:.{digits}f}" for name, (value, digits) in columns(result).items()}, **more}


def run_all(argv):
    """All runs of a command line, then their table; -> the exit status: 2 if one diverged, else 0."""
    args = parse_args(argv)
    device_name = choose_device(args)
    mora.MoRALinear.fast &= args.fast
    if WORLD_SIZE > 1:  # the first process may have data to prepare for hours
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo", timeout=timedelta(days=1))
    write(Path(args.out_dir, ".writable"), lambda file: None)  # whether it can be written to shows now
    base, tokenizer = load_base(args)
    base.to(args.device)
    mora.find_targets(base, args.targets)  # and whether there are such layers
    if args.task == "uuid":
        say(f"{args.n_pairs} pairs to memorize; guessing gets {data.UUID_CHANCE:.1%} of the hex digits right")
    results, status = [], 0
    for config in runs(args):
        try:
            results.append(run(config, base, tokenizer, device_name))
        except FloatingPointError as error:  # one run of several may, at a rate too high
            say(f"train.py: error: {label(config)}: {error}", sys.stderr)
            status = 2
    if results:
        say("\n" + markdown([table_row(result, seed=str(result["seed"])) for result in results]))
        say(f"\nMeans, best rates, spectra and pictures: python tests/compare.py {args.out_dir}/{args.task}-*")
    return status


def main(argv=None):
    """Run the command line and end with status 0, 2 for wrong input or if a run diverged, 130 if stopped."""
    try:
        on_signals(signal.default_int_handler)
        status = run_all(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as interrupt:
        print(f"\ntrain.py: {str(interrupt) or 'stopped: --resume continues from what is saved'}", file=sys.stderr)
        status = 130
    except Exception as error:
        reason, status = str(error).splitlines()[0] if str(error) else "", 2
        if isinstance(error, MemoryError) or re.search("(allocate|out of|enough) memory", str(error)):
            reason = f"not enough memory ({reason[:150]}): try a smaller --batch_size or model, or more --accumulate"
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            reason = f"torch.compile failed ({reason[:150]}): --no-compile does without"
        elif not isinstance(error, (ValueError, OSError, FloatingPointError)) and not (RANK and "gloo" in str(error)):
            raise
        if RANK == 0 or isinstance(error, OSError):  # what all processes find is printed once
            print(f"train.py: error: {reason}", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    sys.stdout and sys.stdout.reconfigure(errors="replace")  # not every terminal has an r̂
    main()
