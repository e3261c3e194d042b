"""Train a GPT in full, with LoRA and its relatives, or with MoRA and ReMoRA, in one plain loop.

    python train.py                        the demo: memorize UUIDs on a laptop, nothing to download
    python train.py uuid --methods lora mora --operator sharing rotation --rank 2 8 --seed 0 1 2
    python train.py c4 --methods full relora remora --groups cycle random
    torchrun --standalone --nproc_per_node=8 train.py c4 ...
    python train.py uuid -h                every option of a task, with its default

Settings, the model to start from, the method in training, the loop; then files, runs and the table.
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import data
import mora
from model import GPT, PRESETS, GPTConfig, load_file

# Processes, in torch's terms: one, unless torchrun says otherwise. (LoRA's rank is config.rank)
RANK, WORLD_SIZE = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def say(text):
    if RANK == 0:
        print(text, flush=True)

# ---- Settings ------------------------------------------------------------------------------------
METHODS = ["full", *mora.METHODS]
TASKS = {"uuid": {}, "c4": {}, "text": {}, "pairs": {}}  # with the defaults that are a task's own
TASKS["uuid"] = dict(methods=["full", "lora", "mora"], rank=[2], max_steps=500, batch_size=64)
TASKS["uuid"] |= dict(init="demo", schedule="linear")
TASKS["c4"] = dict(methods=["full", "lora", "relora", "mora", "remora"], rank=[4], max_steps=600)
TASKS["c4"] |= dict(operator=["sharing"])

def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number

def parse_args(argv=()):
    """The settings of a command line. ValueError says what is wrong with them."""
    task = argv[0] if argv and argv[0] in TASKS else "uuid"
    parser = argparse.ArgumentParser(usage=f"train.py [{'|'.join(TASKS)}] [options]")
    parser.add_argument("task", nargs="?", default="uuid", choices=TASKS)

    add = parser.add_argument_group("method (several values make a run of each)").add_argument
    kinds = ["strided", "contiguous", "random", "cycle"]
    add("--methods", nargs="+", default=["mora"], choices=METHODS, help="how to train")
    add("--rank", nargs="+", type=positive, default=[8], help="LoRA's; M has as many parameters")
    add("--operator", nargs="+", choices=mora.OPERATORS, help="(rotation; for remora sharing)")
    add("--groups", nargs="+", choices=kinds, help="of sharing (strided; for remora cycle)")
    add("--learning_rate", nargs="+", type=float, help="peak rate (LEARNING_RATES in train.py)")
    add("--seed", nargs="+", type=int, default=[0], help="of pairs, batches and adapters")

    add = parser.add_argument_group("adapters").add_argument
    add("--targets", nargs="+", help="linear layers to adapt, such as c_attn c_fc (all)")
    add("--fold", action="store_true", help="decoupling, rotation: no inputs are lost where k > d")
    add("--no-fast", action="store_false", dest="fast", help="compute Eq. 2 as it is written")
    add("--alpha", type=float, help="LoRA's update is scaled by alpha / rank (2 rank)")
    add("--rslora", action="store_true", help="scale it by alpha / sqrt(rank)")
    add("--lora_plus_ratio", type=float, default=16.0, help="in lora+, B's rate over A's")
    add("--dropout", type=float, default=0.0, help="on the adapters' inputs")
    add("--merge_every", type=positive, help="relora, remora: steps between merges (max_steps / 5)")
    add("--restart_warmup", type=int, help="steps of warm-up after a merge (max_steps / 100)")
    add("--full_warmup", type=int, default=0, help="steps that train all weights, before adapters")

    add = parser.add_argument_group("model").add_argument
    add("--init", default="scratch", help="demo, scratch, gpt2, gpt2-medium, ..., or a file")
    add("--tokenizer", choices=data.TOKENIZERS, help="(that of the weights; from scratch bytes)")
    add("--n_layer", type=positive, help="layers of a demo or scratch model (2)")
    add("--n_head", type=positive, help="attention heads (4, or the file's)")
    add("--n_embd", type=positive, help="width of a demo or scratch model (128)")
    add("--block_size", type=positive, help="longest sequence in tokens (128, or the file's)")

    add = parser.add_argument_group("data").add_argument
    add("--n_pairs", type=positive, default=32, help="uuid: pairs to memorize")
    add("--c4_url", default=data.C4_URL, help="c4: where it is, with the original's file names")
    add("--shards", type=positive, default=1, help="c4: files to train on, 350 MB each")
    add("--data", nargs="+", help="text, pairs: .txt files, or files of JSON lines; also .gz")
    add("--val_data", nargs="+", help="text, pairs: held-out files (every 20th document)")
    add("--old_data", nargs="+", help="c4, text: files whose loss shows what is forgotten")

    add = parser.add_argument_group("training").add_argument
    add("--max_steps", type=positive, default=1000, help="optimizer steps")
    add("--batch_size", type=positive, default=32, help="sequences a step, in all processes")
    add("--accumulate", type=positive, default=1, help="micro-batches a batch, to save memory")
    add("--other_learning_rate", type=float, default=0.03, help="from scratch, of all but adapters")
    add("--schedule", default="cosine", choices=["linear", "cosine", "constant"], help="of the rate")
    add("--warmup_steps", type=int, help="of the rate (max_steps / 10)")
    add("--weight_decay", type=float, default=0.0, help="AdamW's")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 is no limit")
    add("--eval_every", type=positive, help="steps between evaluations (max_steps / 4)")

    add = parser.add_argument_group("run").add_argument
    add("--out_dir", default="out", help="every run has a folder in it")
    add("--cache_dir", default=os.path.expanduser("~/.cache/mora"), help="for C4 and for tokens")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="type")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on CUDA)")
    add("--resume", action="store_true", help="continue what is unfinished in out_dir")
    add("--export", action="store_true", help="write each trained model, merged, for --init")

    parser.set_defaults(**TASKS[task])
    for action in parser._actions:
        if action.default not in (None, False, argparse.SUPPRESS):
            action.help = f"{action.help or 'what to learn'} (%(default)s)"

    def error(message):
        raise ValueError(f"{message} (train.py {task} -h has all options)")

    parser.error = error
    args = parser.parse_args(argv)
    if args.task != task:
        error("the task comes first")
    if (args.data is None) == (task in ("text", "pairs")):
        error("the tasks text and pairs need --data FILE, and no other has it")
    if args.batch_size % (args.accumulate * WORLD_SIZE):
        error(f"--batch_size must be a multiple of {args.accumulate * WORLD_SIZE}")
    shares = dict(eval_every=4, merge_every=5, warmup_steps=10, restart_warmup=100)
    for name, n in shares.items():
        if getattr(args, name) is None:
            share = args.max_steps // n if "warmup" in name else math.ceil(args.max_steps / n)
            setattr(args, name, share)
    if task == "uuid":
        args.batch_size = min(args.batch_size, args.n_pairs)
    return args

def settings(**changes):
    """The settings of one run: the defaults of uuid, with changes."""
    return argparse.Namespace(**vars(parse_args()) | changes)

# ---- The model that every run starts from --------------------------------------------------------
DEMO_TEXT = 4_000_000  # characters
DEMO_BASE = dict(method="full", max_steps=300, batch_size=32, learning_rate=3e-3)
DEMO_BASE |= dict(schedule="linear", warmup_steps=20, eval_every=75, merge_every=None)

def load_base(args):
    """-> the model, and its tokenizer."""
    if args.init in ("demo", "scratch"):
        tokenizer = data.get_tokenizer(args.tokenizer or "bytes")
        size = {name: getattr(args, name, None) or x for name, x in PRESETS["demo"].items()}
        size["vocab_size"] = tokenizer.n_vocab
        torch.manual_seed(0)
        if args.init == "scratch":
            return GPT(GPTConfig(**size)), tokenizer
        return demo_base(args, size, tokenizer), tokenizer
    with rank_0_first():
        model = GPT.from_pretrained(args.init, args.n_head)
    vocab_size = model.config.vocab_size
    name = args.tokenizer or ("bytes" if vocab_size == data.TOKENIZERS["bytes"] else "gpt2")
    if data.TOKENIZERS[name] > vocab_size:
        raise ValueError(f"--tokenizer {name} has more tokens than {args.init}, {vocab_size}")
    return model, data.get_tokenizer(name)

def demo_base(args, size, tokenizer):
    """A small GPT that knows text and what pairs look like, pretrained once for each out_dir."""
    config = settings(**DEMO_BASE, device=args.device, dtype=args.dtype, compile=args.compile)
    key = repr((size, DEMO_BASE, DEMO_TEXT, args.dtype))
    folder = Path(args.out_dir, f"base-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
    if not (folder / "model.pt").exists():
        say("pretraining the demo's base, once, on Python's standard library and random pairs")
        model = GPT(GPTConfig(**size)).to(config.device)
        dataset = data.DemoText(DEMO_TEXT, tokenizer, config.batch_size, 0, config.device)
        train(model, dataset, config, folder)
        write(folder / "model.pt", model.export)
    with rank_0_first():
        return GPT.from_pretrained(str(folder / "model.pt"))

# ---- The method in training: what trains, at which rate, when it is merged and reset -------------
def adapt(model, config):
    """Add the adapters that the settings ask for; -> the model. From scratch, norms, embeddings and
    the head (which is the token embedding) train in every method: only linear layers can be frozen
    at random values."""
    if config.method == "full":
        return model
    options = {"dropout": config.dropout}
    if config.operator is None:
        options |= {"alpha": config.alpha, "rslora": config.rslora}
    elif config.groups:
        options["groups"] = config.groups
    if config.operator and config.fold:
        options["fold"] = True
    names = config.operator, config.targets, config.fast
    mora.add_adapters(model, config.method, config.rank, *names, **options)
    if config.init == "scratch":
        for module in model.modules():
            if not isinstance(module, (torch.nn.Linear, mora.Adapter)):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    return model

def make_optimizer(model, config):
    """AdamW on what trains. B in LoRA+, and what is in no adapter, have peak rates of their own."""
    adapters = [module for module in model.modules() if isinstance(module, mora.Adapter)]
    adapted = {parameter for adapter in adapters for parameter in adapter.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.learning_rate
            if adapters and parameter not in adapted:
                rate = config.other_learning_rate
            if config.method == "lora+" and name.endswith(".B"):
                rate *= config.lora_plus_ratio
            groups.setdefault(rate, []).append(parameter)
    groups = [{"params": parameters, "peak": rate} for rate, parameters in groups.items()]
    fused = torch.device(config.device).type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=fused)

def restarts_before(step, config):  # exercise 18
    """Whether the adapters are merged and reset before this step: every `merge_every` steps."""
    if not config.merge_every or step <= config.full_warmup:
        return False
    return step % config.merge_every == 0

def schedule(step, config):  # exercise 18
    """The learning rate of a step over its peak: linear warm-up, then the fall, if any, to 0. After
    a merge or a full-rank warm-up the rate rises once more, in `restart_warmup` steps, back onto
    that curve: ReLoRA's jagged schedule."""
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    progress = max(0.0, progress)
    falls = {"linear": 1 - progress, "constant": 1.0}
    falls["cosine"] = (1 + math.cos(math.pi * progress)) / 2
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    for i in range(config.restart_warmup):
        restart = step - i
        if restarts_before(restart, config) or 0 < config.full_warmup == restart:
            rise = min(rise, (i + 1) / config.restart_warmup)
    return rise * falls[config.schedule]

# ---- The loop ------------------------------------------------------------------------------------
def train(model, dataset, config, folder, first=0, last=None):
    """Train `model` in place, from step `first` to `last`; -> the rows of metrics.csv, and seconds."""
    last = last or config.max_steps
    optimizer = make_optimizer(model, config)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(config.device, enabled=config.dtype == "float16")
    torch.compiler.reset()  # what was compiled for an earlier run
    network = torch.compile(Loss(model)) if config.compile else Loss(model)
    rows, seconds = [], 0.0
    if config.resume and (folder / "checkpoint.pt").exists():
        first, rows, seconds = load_checkpoint(folder, config, model, optimizer, scaler)
        say(f"resumed after step {first}")
    if WORLD_SIZE > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)

    losses, tokens = [], 0
    start = timer = time.perf_counter()
    for step in range(first, last):
        # All random numbers are a function of (seed, step), so that a resumed run repeats them
        torch.manual_seed(data.seeded("step", config.seed, step, RANK).initial_seed())

        # Merge
        if restarts_before(step, config):
            mora.merge_and_reset(model, optimizer, data.seeded("merge", config.seed, step))

        # Learning rate
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, config)

        # Forward and backward
        model.train()
        idx, targets = dataset.batch(step)
        losses.append(forward_backward(network, idx, targets, config, scaler))

        # Clip and step
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # Time: the first step may compile, and does not count
        tokens += idx.numel()
        if step == first:
            losses[0].item()  # waits for the GPU
            tokens, timer = 0, time.perf_counter()

        # Evaluate, report, save
        if (step + 1) % config.eval_every == 0 or step + 1 == last:
            loss = torch.stack(losses).mean().item()
            speed = tokens / (time.perf_counter() - timer)
            with autocast(config):
                metrics = evaluate(model.eval(), dataset)
            rate = config.learning_rate * schedule(step, config)
            row = dict(step=step + 1, loss=loss, learning_rate=rate, tokens_per_second=speed)
            rows.append(row | metrics)
            elapsed = time.perf_counter() - start
            left = elapsed / (step + 1 - first) * (last - step - 1)
            text = f"step {step + 1}/{config.max_steps}  loss {loss:.4f}  {as_text(metrics)}"
            say(f"{text}  {speed:,.0f} tokens/s  {left:.0f} s left")
            progress = dict(step=step + 1, rows=rows, seconds=seconds + elapsed)
            save_checkpoint(folder, progress, config, model, optimizer, scaler)
            losses, tokens, timer = [], 0, time.perf_counter()
    return rows, seconds + time.perf_counter() - start

def forward_backward(network, idx, targets, config, scaler):
    """Forward and backward of a batch, in micro-batches; -> its mean loss. Each counts by its share
    of the targets, so that the gradient is the batch's; DDP averages over processes, hence the
    factor WORLD_SIZE."""
    n_targets = (targets != -100).sum()
    idx = idx[RANK::WORLD_SIZE].chunk(config.accumulate)
    targets = targets[RANK::WORLD_SIZE].chunk(config.accumulate)
    total = 0.0
    for i, (x, y) in enumerate(zip(idx, targets)):
        last = i == len(idx) - 1
        # DDP adds up gradients over processes once, after the last micro-batch
        wait = contextlib.nullcontext() if last or WORLD_SIZE == 1 else network.no_sync()
        with wait:
            with autocast(config):
                loss = network(x, y) * (y != -100).sum() / n_targets
            scaler.scale(loss * WORLD_SIZE).backward()
        total += loss.detach()
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total

class Loss(torch.nn.Module):
    """A model's loss alone: if a compiled model returned logits, they would get a gradient too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model(idx, targets)[1]

def autocast(config):
    device, dtype = torch.device(config.device).type, getattr(torch, config.dtype)
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)

@torch.no_grad()
def evaluate(model, dataset):
    """A model's metrics on the validation rows of a data set. FloatingPointError if it diverged.

    A token is right if it is the likeliest one after the true tokens before it. char_accuracy is the
    fraction of right hex digits, exact_match that of rows with all targets right, which are what
    greedy decoding would write. `bits` is how much of the values is stored: each has 122 random
    bits, less the model's cross entropy on it; guessing is 0, and confidently wrong is below 0."""
    nats, n_targets, n_rows, exact, chars = 0.0, 0, 0, 0.0, 0.0
    for idx, targets in dataset.validation():
        logits, loss = model(idx, targets)
        counted = targets != -100
        right = (logits.argmax(-1) == targets) | ~counted  # (n_rows, length)
        nats += loss.item() * counted.sum().item()
        n_targets += counted.sum().item()
        n_rows += len(targets)
        exact += right.all(dim=1).sum().item()
        if "char_accuracy" in dataset.metrics:
            chars += right[:, data.HEX_POSITIONS].float().mean(dim=1).sum().item()
    loss = nats / n_targets
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite: try a lower --learning_rate")
    metrics = dict(char_accuracy=chars / n_rows, exact_match=exact / n_rows, val_loss=loss)
    metrics["bits"] = 122 * n_rows - nats / math.log(2)
    metrics["perplexity"] = math.exp(min(loss, 700))
    metrics = {name: metrics[name] for name in dataset.metrics}
    if getattr(dataset, "old_text", None):  # to see what was forgotten
        metrics["old_loss"] = evaluate(model, dataset.old_text)["val_loss"]
    return metrics

def as_text(metrics):
    forms = {"char_accuracy": ".1%", "exact_match": ".1%", "bits": ",.0f"}
    words = [f"{name.replace('_', ' ')} {x:{forms.get(name, '.4f')}}" for name, x in metrics.items()]
    return "  ".join(words)

# ==== This was the method. The rest is for whoever runs it ========================================
# Peak learning rates: for --init demo at r = 2 and for scratch at r = 4, from sweeps at width 128,
# and for given weights at r = 8, from the paper's at 7B. A new operator has rotation's
LEARNING_RATES = {
    "full": (2e-3, 1e-2, 3e-5), "lora": (2e-2, 1e-2, 2e-4), "lora+": (5e-3, 1e-3, 2e-4),
    "asylora": (5e-2, 3e-3, 2e-4), "dora": (2e-2, 3e-3, 2e-4), "relora": (2e-2, 1e-2, 2e-4),
    "truncation": (5e-2, 3e-2, 3e-4), "sharing": (1e-2, 1e-2, 3e-4),
    "decoupling": (3e-2, 3e-2, 3e-4), "rotation": (3e-2, 3e-2, 3e-4),
}

def default_learning_rate(method, operator, init, rank):
    column = {"demo": 0, "scratch": 1}.get(init, 2)
    rate = LEARNING_RATES.get(operator or method, LEARNING_RATES["rotation"])[column]
    if method == "full":
        return rate
    # Sweeps show that adapters' rates fall as 1 / sqrt(r)
    return float(f"{rate * math.sqrt((2, 4, 8)[column] / rank):.2g}")

# ---- Device and processes ------------------------------------------------------------------------
def device_defaults(capability):
    """(dtype, compile) for a CUDA card of that compute capability, or None for any other device.
    Triton needs 7.0, and bfloat16 is fast from 8.0 on."""
    if capability is None:
        return "float32", False
    return "bfloat16" if capability >= (8, 0) else "float16", capability >= (7, 0)

def choose_device(args):
    """Settle args.device, dtype and compile; -> the device's name."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used: {reason}") from error
    name, capability = args.device, None
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    dtype, compiles = device_defaults(capability)
    args.dtype = dtype if args.dtype == "auto" else args.dtype
    args.compile = compiles if args.compile is None else args.compile
    how = "compiled" if args.compile else "not compiled"
    say(f"device: {name}, {args.dtype}, {how}, torch {torch.__version__}, processes: {WORLD_SIZE}")
    return name

@contextlib.contextmanager
def rank_0_first():
    """What the first process prepares in this block, the others find when they enter it."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()

# ---- Files ---------------------------------------------------------------------------------------
def write(path, save):
    """Let `save` write to an open file that becomes `path`. One process writes for all."""
    if RANK == 0:
        data.write_file(path, save)

def save_checkpoint(folder, progress, config, model, optimizer, scaler):
    """Write metrics.csv, and checkpoint.pt with all that resuming needs."""
    lines = [progress["rows"][0].keys(), *(row.values() for row in progress["rows"])]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    state = progress | dict(config=vars(config), model=model.state_dict())
    state |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    write(folder / "metrics.csv", lambda file: file.write(text.encode()))
    write(folder / "checkpoint.pt", lambda file: torch.save(state, file))

def load_checkpoint(folder, config, model, optimizer, scaler):
    """Restore a run; -> the steps that are done, their rows, and the seconds that they took."""
    state = load_file(folder / "checkpoint.pt", config.device)
    check_same(folder, state["config"], config)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["rows"], state["seconds"]

def check_same(folder, saved, config):
    """ValueError if a saved run has other settings, but for where and how it runs."""
    free = {"out_dir", "cache_dir", "device", "compile", "fast", "resume", "export", "eval_every"}
    for name, value in vars(config).items():
        if name not in free and saved.get(name) != value:
            other = f"--{name} {saved.get(name)} instead of {value}"
            raise ValueError(f"{folder} was made with {other}: --resume needs the same settings")

# ---- Runs ----------------------------------------------------------------------------------------
def runs(args):
    """The settings of every run: each combination of the options that take several values, as far
    as they concern the method."""
    for method in args.methods:
        restarts = method in ("relora", "remora")
        operators, ranks = [None], args.rank
        if method == "full":
            ranks = [None]
        if method in ("mora", "remora"):
            operators = args.operator or ["sharing" if restarts else "rotation"]
        for rank, operator in itertools.product(ranks, operators):
            groupings = [None]
            if operator and issubclass(mora.OPERATORS[operator], mora.Sharing):
                groupings = args.groups or ["cycle" if restarts else "strided"]
            rates = args.learning_rate
            rates = rates or [default_learning_rate(method, operator, args.init, rank)]
            for groups, rate, seed in itertools.product(groupings, rates, args.seed):
                config = argparse.Namespace(**vars(args))
                del config.methods
                config.method, config.rank, config.operator = method, rank, operator
                config.groups, config.learning_rate, config.seed = groups, rate, seed
                config.merge_every = args.merge_every if restarts else None
                config.full_warmup = args.full_warmup if method != "full" else 0
                yield config

def label(config):
    """A setting's name, such as "mora rotation fold r2"."""
    words = [config.method, config.operator, config.groups]
    if config.method == "mora" and config.groups == "strided":
        words.pop()
    if config.operator and config.fold:
        words.append("fold")
    if config.rank:
        words.append(f"r{config.rank}")
    return " ".join(word for word in words if word)

def load_dataset(config, tokenizer, context):
    """The data set of the task, for a model with a context of so many tokens."""
    common = dict(batch_size=config.batch_size, seed=config.seed, device=config.device)
    if config.task == "uuid":
        return data.UUIDPairs(config.n_pairs, tokenizer, **common)
    common["block_size"] = config.block_size or context
    if config.task == "pairs":
        pairs = data.prompt_pairs(config.data, config.val_data)
        return data.PromptPairs(*pairs, tokenizer, **common)
    with rank_0_first():
        if config.task == "c4":
            files = data.c4_tokens(config.c4_url, config.shards, tokenizer, config.cache_dir)
        else:
            files = data.text_tokens(config.data, config.val_data, tokenizer, config.cache_dir)
        dataset = data.Text(*files, **common)
        if config.old_data:
            old = data.token_file(config.old_data, tokenizer, config.cache_dir)
            dataset.old_text = data.Text(old, old, **common)
    say(f"{len(dataset.train):,} tokens to learn from, {len(dataset.val):,} held out")
    return dataset

def run(config, base, tokenizer, device_name):
    """Train a copy of `base` with one method and seed; -> what its results.json holds."""
    words = [config.task, *label(config).split(), f"lr{config.learning_rate}", f"seed{config.seed}"]
    folder = Path(config.out_dir, "-".join(words))
    finished = folder / "results.json"
    if config.resume and finished.exists():
        results = json.loads(finished.read_text(encoding="utf-8"))
        check_same(folder, results["config"], config)
        say(f"{folder}: done before")
        return results
    say(f"\n{folder}")
    if folder.exists() and not config.resume and RANK == 0:
        kept = folder.rename(folder.with_name(f"kept-{int(time.time())}-{folder.name}"))
        say(f"the earlier run is in {kept} now; --resume would have continued it")

    dataset = load_dataset(config, tokenizer, base.config.block_size)
    start, seconds = base, 0.0
    if config.full_warmup:
        rate = default_learning_rate("full", None, config.init, None)
        full = dict(method="full", learning_rate=rate, merge_every=None, full_warmup=0)
        warmup = argparse.Namespace(**vars(config) | full)
        start = copy.deepcopy(base)
        _, seconds = train(start, dataset, warmup, folder / "full_warmup", last=config.full_warmup)
    torch.manual_seed(config.seed)  # for the adapters' random numbers
    model = adapt(copy.deepcopy(start), config)
    counts = count(model)
    say("{trainable_parameters:,} of {total_parameters:,} parameters train".format(**counts))
    with autocast(config):
        say(f"before training: {as_text(evaluate(model.eval(), dataset))}")
    rows, more = train(model, dataset, config, folder, config.full_warmup)

    results = dict(label=label(config), method=config.method, rank=config.rank)
    results |= dict(operator=config.operator, seed=config.seed, **counts, steps=config.max_steps)
    results |= dict(seconds=seconds + more, metrics=rows[-1], rows=rows, config=vars(config))
    results |= dict(update_rank=update_rank(model, base), torch=torch.__version__)
    results |= dict(device=device_name)
    if config.task == "uuid":
        show_completion(model, dataset, tokenizer)
    # An adapter is worth saving where it rebuilds the model from the base
    changed_base = config.init == "scratch" or config.merge_every or config.full_warmup
    if config.method != "full":
        if not changed_base:
            adapters = mora.adapter_state_dict(model)
            write(folder / "adapter.pt", lambda file: torch.save(adapters, file))
        mora.merge_adapters(model)
    if config.export:
        write(folder / "model.pt", model.export)
    write(finished, lambda file: file.write(json.dumps(results, indent=1).encode()))
    return results

def count(model):
    """Numbers of parameters, and r̂ of the smallest and the largest layer."""
    adapters = [module for module in model.modules() if isinstance(module, mora.Adapter)]
    own = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    trainable = [p for p in model.parameters() if p.requires_grad]
    sizes = sorted(adapter.size for adapter in adapters if isinstance(adapter, mora.MoRALinear))
    return dict(
        trainable_parameters=sum(p.numel() for p in trainable),
        total_parameters=sum(p.numel() for p in model.parameters()),
        adapter_parameters=sum(p.numel() for p in own),
        size=f"{sizes[0]}-{sizes[-1]}" if sizes else None,
    )

@torch.no_grad()
def update_rank(model, base):
    """The mean rank of what training added to the linear layers, in all merges together."""
    if base.config.n_embd > 512 and base.wte.weight.device.type == "cpu":
        return None  # takes minutes
    ranks = []
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            update = model.get_submodule(name).weight - layer.weight
            ranks.append(torch.linalg.matrix_rank(update).item())
    return sum(ranks) / len(ranks)

def show_completion(model, pairs, tokenizer):
    """Print the first pair, and what greedy decoding answers, with wrong characters marked below."""
    key, value = pairs.pairs[0]
    prompt = pairs.tokens[:1, : data.UUID_LENGTH + 1]  # with the colon
    answer = model.eval().generate(prompt, data.UUID_LENGTH)[0, data.UUID_LENGTH + 1 :]
    answer = tokenizer.decode(answer.tolist())
    marks = "".join(" " if a == b else "^" for a, b in zip(answer, value))
    say(f"key    {key}\nvalue  {value}\nanswer {answer}\n       {marks}")

def markdown(rows):
    """Dicts as the rows of a Markdown table that reads well as text; "-" where one has no value."""
    keys = dict.fromkeys(key for row in rows for key in row)
    lines = [list(keys), *([str(row.get(key, "-")) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)

def columns(result):
    """A run's figures, and their digits. For UUIDs, the accuracy in % at four moments, as in the
    paper's Table 2."""
    rows, last, figures = result["rows"], result["metrics"], {}
    if "char_accuracy" in last:
        for quarter in (1, 2, 3, 4):
            row = rows[math.ceil(len(rows) * quarter / 4) - 1]
            figures[f"step {row['step']}"] = 100 * row["char_accuracy"], 1
        figures["bits / parameter"] = last["bits"] / result["trainable_parameters"], 2
    for name, digits in dict(exact_match=3, val_loss=3, perplexity=2, old_loss=3).items():
        if name in last:
            figures[name.replace("_", " ")] = last[name], digits
    if result["update_rank"] is not None:
        figures["rank of ΔW"] = result["update_rank"], 0
    return figures | {"seconds": (result["seconds"], 0)}

def table_row(result, **more):
    parameters = result["adapter_parameters"] or result["trainable_parameters"]
    row = {"method": result["label"], "r̂": result["size"] or "-", "parameters": f"{parameters:,}"}
    row["peak rate"] = f"{result['config']['learning_rate']:g}"
    for name, (x, digits) in columns(result).items():
        row[name] = f"{x:.{digits}f}"
    return row | more

def run_all(argv):
    """All runs of a command line, then their table; -> the exit status, 2 if one diverged."""
    args = parse_args(argv)
    device_name = choose_device(args)
    if WORLD_SIZE > 1:  # the first process may prepare data for hours
        backends = "cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo"
        dist.init_process_group(backends, timeout=timedelta(days=1))
    configs = list(runs(args))
    with torch.device("meta"):
        for config in configs:  # a wrong name of a layer or an option shows before the work
            adapt(GPT(GPTConfig(**PRESETS["demo"])), config)
    base, tokenizer = load_base(args)
    base.to(args.device)
    if args.task == "uuid":
        say(f"{args.n_pairs} pairs; guessing gets {data.UUID_CHANCE:.1%} of the hex digits right")
    results, status = [], 0
    for config in configs:
        try:
            results.append(run(config, base, tokenizer, device_name))
        except FloatingPointError as error:  # one of several may diverge, at a rate too high
            say(f"train.py: error: {label(config)}: {error}")
            status = 2
    if results:
        say("\n" + markdown([table_row(result, seed=result["seed"]) for result in results]))
    return status

def main(argv=None):
    """Run a command line; exit status 2 for wrong input or divergence, 130 if interrupted."""
    try:
        status = run_all(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        status, reason = 130, "stopped: --resume continues from the last evaluation"
    except torch.OutOfMemoryError as error:
        status, reason = 2, f"{error}: try a smaller --batch_size, or more --accumulate"
    except (ValueError, OSError) as error:
        status, reason = 2, error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if status and RANK == 0:
        print(f"train.py: error: {str(reason).splitlines()[0]}", file=sys.stderr)
    sys.exit(status)

if __name__ == "__main__":
    main()
