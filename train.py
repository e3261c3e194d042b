"""Train a GPT in full, with LoRA and its relatives, or with MoRA and ReMoRA, in one plain loop.

    python train.py                        the demo: memorize UUIDs on a laptop, nothing to download
    python train.py uuid --methods lora mora --operator sharing rotation --rank 2 8 --seed 0 1 2
    python train.py c4 --methods full relora remora --groups cycle random
    torchrun --standalone --nproc_per_node=8 train.py c4 ...
    python train.py uuid -h                every option of a task, with its default
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import data
import mora
from model import GPT, PRESETS, GPTConfig, load_file

# This process's number and how many there are, by torch's names: one, unless torchrun starts more
RANK, WORLD_SIZE = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def say(text):
    if RANK == 0:
        print(text, flush=True)

# ---- Settings ------------------------------------------------------------------------------------
METHODS = ["full", *mora.METHODS]
TASKS = {"uuid": {}, "c4": {}, "text": {}, "pairs": {}}  # and what they set in place of a default below
TASKS["uuid"] = dict(methods=["full", "lora", "mora"], rank=[2], max_steps=500, batch_size=64,
                     init="demo", schedule="linear")
TASKS["c4"] = dict(methods=["full", "lora", "relora", "mora", "remora"], rank=[4], max_steps=600,
                   operator=["sharing"])

def parse_args(argv=()):
    """The settings of a command line. ValueError says what is wrong with them."""
    task = "uuid"
    if argv and not argv[0].startswith("-"):
        task, *argv = argv
    if task not in TASKS:
        refuse(f"there is no task {task!r}, only uuid, c4, text and pairs")
    parser = argparse.ArgumentParser(usage="train.py [uuid|c4|text|pairs] [options]")
    add = parser.add_argument_group("method (several values make a run of each)").add_argument
    add("--methods", nargs="+", default=["mora"], choices=METHODS, help="how to train")
    add("--rank", nargs="+", type=int, default=[8], help="LoRA's; M has as many parameters")
    add("--operator", nargs="+", choices=mora.OPERATORS, help="(rotation; for remora sharing)")
    add("--groups", nargs="+", help="strided contiguous random cycle (strided; for remora cycle)")
    add("--learning_rate", nargs="+", type=float, help="peak rate (LEARNING_RATES in train.py)")
    add("--seed", nargs="+", type=int, default=[0], help="of pairs, batches and adapters")
    add = parser.add_argument_group("adapters").add_argument
    add("--targets", nargs="+", help="linear layers to adapt, such as c_attn c_fc (all)")
    add("--fold", action="store_true", help="decoupling, rotation: no inputs are lost where k > d")
    add("--no-fast", action="store_true", help="compute Eq. 2 as it is written")
    add("--alpha", type=float, help="LoRA's update is scaled by alpha / rank (2 rank)")
    add("--rslora", action="store_true", help="scale it by alpha / sqrt(rank)")
    add("--dropout", type=float, default=0.0, help="on the adapters' inputs")
    add("--merge_every", type=int, help="relora, remora: steps between merges (max_steps / 5)")
    add("--restart_warmup", type=int, help="steps of warm-up after a merge (max_steps / 100)")
    add = parser.add_argument_group("model").add_argument
    add("--init", default="scratch", help="demo, scratch, gpt2, gpt2-medium, ..., or a file")
    add("--tokenizer", choices=data.TOKENIZERS, help="(the weights' own; bytes if from scratch)")
    add("--n_layer", type=int, help="layers of a demo or scratch model (2)")
    add("--n_head", type=int, help="attention heads (4, or the file's)")
    add("--n_embd", type=int, help="width of a demo or scratch model (128)")
    add("--block_size", type=int, help="longest sequence in tokens (128, or the file's)")
    add = parser.add_argument_group("data").add_argument
    add("--n_pairs", type=int, default=32, help="uuid: pairs to memorize")
    add("--c4_url", default=data.C4_URL, help="c4: where it is, with the original's file names")
    add("--shards", type=int, default=1, help="c4: files to train on, 350 MB each")
    add("--data", nargs="+", help="text, pairs: .txt files, or files of JSON lines; also .gz")
    add("--val_data", nargs="+", help="text, pairs: held-out files (every 20th document)")
    add("--old_data", nargs="+", help="c4, text: files whose loss shows what is forgotten")
    add = parser.add_argument_group("training").add_argument
    curves = ["linear", "cosine", "constant"]
    add("--max_steps", type=int, default=1000, help="optimizer steps")
    add("--batch_size", type=int, default=32, help="sequences a step, in all processes")
    add("--accumulate", type=int, default=1, help="micro-batches a batch, to save memory")
    add("--other_learning_rate", type=float, default=0.03, help="from scratch, of all but adapters")
    add("--schedule", choices=curves, default="cosine", help="of the rate")
    add("--warmup_steps", type=int, help="of the rate (max_steps / 10)")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 is no limit")
    add("--eval_every", type=int, help="steps between evaluations (max_steps / 4)")
    add = parser.add_argument_group("run").add_argument
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--out_dir", default="out", help="a folder for each method, rank, rate and seed")
    add("--cache_dir", default=os.path.expanduser("~/.cache/mora"), help="for C4 and for tokens")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", choices=dtypes, default="auto", help="of activations and products")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on CUDA)")
    add("--resume", action="store_true", help="continue what is unfinished in out_dir")
    add("--export", action="store_true", help="write each trained model, merged, for --init")

    parser.set_defaults(task=task, **TASKS[task])
    for action in parser._actions:  # what stands in brackets is the default
        if action.default not in (None, False, argparse.SUPPRESS):
            action.help += " (%(default)s)"
    parser.error = refuse
    args = parser.parse_args(argv)
    if (args.data is None) == (task in ("text", "pairs")):
        refuse("the tasks text and pairs need --data FILE, and the others have none")
    if task == "uuid":
        args.batch_size = min(args.batch_size, args.n_pairs)
    if args.batch_size % (args.accumulate * WORLD_SIZE):
        refuse("--batch_size must be a multiple of --accumulate times the processes")
    for name, n in dict(eval_every=4, merge_every=5, warmup_steps=10, restart_warmup=100).items():
        if getattr(args, name) is None:
            setattr(args, name, math.ceil(args.max_steps / n))
    if min(*args.rank, args.n_pairs, args.batch_size, args.max_steps, args.eval_every) < 1:
        refuse("--rank, --n_pairs, --batch_size, --max_steps and --eval_every must be at least 1")
    return args

def refuse(message):
    raise ValueError(f"{message} (train.py TASK -h has all options)")

def settings(**changes):
    """The settings of one run: the defaults of uuid, with changes."""
    return argparse.Namespace(**vars(parse_args()) | changes)

# ---- The model that every run starts from --------------------------------------------------------
DEMO_TEXT = 4_000_000  # characters
DEMO_BASE = dict(method="full", max_steps=300, batch_size=32, learning_rate=3e-3)
DEMO_BASE |= dict(schedule="linear", warmup_steps=20, eval_every=75, merge_every=None, seed=0)

def load_base(args):
    """-> the model, in the demo before its pretraining, and its tokenizer."""
    if args.init in ("demo", "scratch"):
        tokenizer = data.get_tokenizer(args.tokenizer or "bytes")
        size = {name: getattr(args, name, None) or x for name, x in PRESETS["demo"].items()}
        size["vocab_size"] = tokenizer.n_vocab
        torch.manual_seed(0)
        return GPT(GPTConfig(**size)), tokenizer
    with rank_0_first():
        model = GPT.from_pretrained(args.init, args.n_head)
    name = "gpt2"
    if model.config.vocab_size == data.TOKENIZERS["bytes"]:
        name = "bytes"
    return model, data.get_tokenizer(args.tokenizer or name)

def pretrain_demo(model, tokenizer, args):
    """Teach the model text, and what pairs look like, once for each size and out_dir."""
    config = settings(**DEMO_BASE, device=args.device, dtype=args.dtype, compile=args.compile)
    size = "-".join(map(str, vars(model.config).values()))
    folder = Path(args.out_dir, f"base-{size}-{args.dtype}")
    if not (folder / "model.pt").exists():
        say(f"pretraining the demo's base, once, on Python's standard library ({folder})")
        dataset = data.DemoText(DEMO_TEXT, tokenizer, config.batch_size, 0, config.device)
        train(model.to(config.device), dataset, config, folder)
        write(folder / "model.pt", model.export)
    with rank_0_first():
        return GPT.from_pretrained(str(folder / "model.pt"))

# ---- The method in training: what trains, at which rate, when it is merged and reset -------------
def adapt(model, config):
    """Add adapters as the settings say, and return the model. They are all that trains, but not
    from scratch, where norms and embeddings (which are the head, too) cannot stay at random."""
    if config.method == "full":
        return model
    options = {"dropout": config.dropout}
    if config.operator is None:  # LoRA and its relatives
        options |= {"alpha": config.alpha, "rslora": config.rslora}
    elif config.groups:
        options["groups"] = config.groups
    if config.fold:
        options["fold"] = True
    mora.add_adapters(model, config.method, config.rank, config.operator, config.targets,
                      fast=not config.no_fast, **options)
    if config.init == "scratch":
        for module in model.modules():
            if not isinstance(module, (torch.nn.Linear, mora.Adapter)):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    return model

def make_optimizer(model, config):
    """AdamW. LoRA+'s B has a rate of its own, and so have parameters outside of the adapters."""
    adapters = [module for module in model.modules() if isinstance(module, mora.Adapter)]
    adapted = {parameter for adapter in adapters for parameter in adapter.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        rate = config.learning_rate
        if adapters and parameter not in adapted:
            rate = config.other_learning_rate
        if config.method == "lora+" and name.endswith(".B"):
            rate *= 16  # the LoRA+ paper's ratio
        if parameter.requires_grad:
            groups.setdefault(rate, []).append(parameter)
    groups = [{"peak": rate, "params": parameters} for rate, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused="cuda" in config.device)

def restarts_before(step, config):  # exercise 18
    """Whether the adapters are merged and reset before this step: every `merge_every` steps."""
    return bool(config.merge_every) and step > 0 and step % config.merge_every == 0

def schedule(step, config):  # exercise 18
    """A step's learning rate over its peak. It rises in the warm-up, and then falls to 0. The steps
    after a merge have 1/n, 2/n, ... n/n of that, with n = `restart_warmup` (ReLoRA's schedule)."""
    rise = 1.0
    if step < config.warmup_steps:
        rise = (step + 1) / config.warmup_steps
    for i in range(config.restart_warmup):  # was there a merge i steps ago?
        if restarts_before(step - i, config):
            rise = min(rise, (i + 1) / config.restart_warmup)
    if config.schedule == "constant" or step < config.warmup_steps:
        return rise
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    if config.schedule == "linear":
        return rise * (1 - progress)
    return rise * (1 + math.cos(math.pi * progress)) / 2

# ---- The loop ------------------------------------------------------------------------------------
def train(model, dataset, config, folder):
    """Train `model` in place, and write metrics.csv and checkpoint.pt into `folder`.
    -> {step, rows (one for each evaluation), metrics (of the last), seconds}"""
    optimizer = make_optimizer(model, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler(config.device, enabled=config.dtype == "float16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}  # of a checkpoint
    network = Loss(model)
    if config.compile:
        torch.compiler.reset()  # what was compiled for an earlier run
        network = torch.compile(network)
    progress = {"step": 0, "rows": [], "seconds": 0.0}
    if config.resume and (folder / "checkpoint.pt").exists():
        progress = load_checkpoint(folder, config, parts)
        say(f"resumed after step {progress['step']}")
    if WORLD_SIZE > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)

    first = progress["step"]
    seconds = progress["seconds"]
    losses, tokens = [], 0
    start = timer = time.perf_counter()
    for step in range(first, config.max_steps):
        # Random numbers depend on seed, step and process alone, so that a resumed run repeats them
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
        optimizer.zero_grad()

        # Time: the first step may compile, and does not count
        tokens += idx.numel()
        if step == first:
            losses[0].item()  # waits for the GPU
            tokens, timer = 0, time.perf_counter()

        # Evaluate, report, save
        done = step + 1
        if done % config.eval_every == 0 or done == config.max_steps:
            loss = torch.stack(losses).mean().item()
            speed = tokens / (time.perf_counter() - timer)
            with autocast(config):
                metrics = evaluate(model.eval(), dataset)
            rate = config.learning_rate * schedule(step, config)
            row = {"step": done, "loss": loss, "learning_rate": rate, "tokens_per_second": speed}
            progress["rows"].append(row | metrics)
            elapsed = time.perf_counter() - start
            left = elapsed / (done - first) * (config.max_steps - done)
            say(f"step {done}/{config.max_steps}  loss {loss:.4f}  {as_text(metrics)}  "
                f"{speed:,.0f} tokens/s  {left:.0f} s left")
            progress |= {"step": done, "metrics": metrics, "seconds": seconds + elapsed}
            save_checkpoint(folder, progress, config, parts)
            losses, tokens, timer = [], 0, time.perf_counter()
    return progress

class Loss(torch.nn.Module):
    """A model's loss alone: if a compiled model returned logits, they would get a gradient too."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model(idx, targets)[1]

def autocast(config):
    device = torch.device(config.device).type
    return torch.autocast(device, getattr(torch, config.dtype), config.dtype != "float32")

def forward_backward(network, idx, targets, config, scaler):
    """Forward and backward of a batch in micro-batches; -> its mean loss. Each target counts alike:
    a micro-batch with 30 of 100 targets counts 0.3. DDP takes means, hence the WORLD_SIZE."""
    n_targets = (targets != -100).sum()
    idx = idx[RANK::WORLD_SIZE].chunk(config.accumulate)
    targets = targets[RANK::WORLD_SIZE].chunk(config.accumulate)
    total = 0.0
    for x, y in zip(idx, targets):
        with autocast(config):
            loss = network(x, y) * (y != -100).sum() / n_targets
        scaler.scale(loss * WORLD_SIZE).backward()
        total += loss.detach()
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total

@torch.no_grad()
def evaluate(model, dataset):
    """A model's metrics on the validation rows of a data set. FloatingPointError if it diverged.
    A token is right if it is the likeliest one after the true tokens before it: char_accuracy is of
    hex digits, exact_match of rows with all targets right, as greedy decoding would write them.
    `bits` is how much of the values is stored: each has 122 random bits, minus the model's cross
    entropy on it. Guessing is 0, confidently wrong is below 0."""
    nats, n_targets, exact, chars = 0.0, 0, [], []
    for idx, targets in dataset.validation():
        logits, loss = model(idx, targets)
        counted = targets != -100
        right = (logits.argmax(-1) == targets) | ~counted  # (n_rows, length)
        n = counted.sum().item()
        n_targets += n
        nats += n * loss.item()
        exact.append(right.all(dim=1))
        if "char_accuracy" in dataset.metrics:
            chars.append(right[:, data.HEX_POSITIONS])
    if not math.isfinite(nats):
        raise FloatingPointError("the loss is not finite")
    exact = torch.cat(exact).float()
    metrics = {"exact_match": exact.mean().item(), "val_loss": nats / n_targets}
    metrics["perplexity"] = math.exp(min(metrics["val_loss"], 700))
    if chars:
        metrics["char_accuracy"] = torch.cat(chars).float().mean().item()
        metrics["bits"] = 122 * len(exact) - nats / math.log(2)  # exercise 20
    metrics = {name: metrics[name] for name in dataset.metrics}
    if getattr(dataset, "old_text", None):  # to see what was forgotten
        metrics["old_loss"] = evaluate(model, dataset.old_text)["val_loss"]
    return metrics

def as_text(metrics):
    forms = {"char_accuracy": ".1%", "exact_match": ".1%", "bits": ",.0f"}
    words = (f"{name} {value:{forms.get(name, '.4f')}}" for name, value in metrics.items())
    return "  ".join(words).replace("_", " ")

# ==== This was the method. The rest is for whoever runs it ========================================
# Peak learning rates: for --init demo at r = 2, for scratch at r = 4, both from sweeps at width 128,
# and for given weights at r = 8, between what was best at 7B (the paper) and on SmolLM2
LEARNING_RATES = {
    "full": (2e-3, 1e-2, 3e-5), "lora": (2e-2, 1e-2, 2e-4), "lora+": (5e-3, 1e-3, 2e-4),
    "asylora": (5e-2, 3e-3, 2e-4), "dora": (2e-2, 3e-3, 2e-4), "relora": (2e-2, 1e-2, 2e-4),
    "truncation": (5e-2, 3e-2, 4e-4), "sharing": (1e-2, 1e-2, 1e-4),
    "decoupling": (3e-2, 3e-2, 4e-4), "rotation": (3e-2, 3e-2, 4e-4),
}

def default_learning_rate(config):
    rates = LEARNING_RATES.get(config.operator or config.method, LEARNING_RATES["rotation"])
    column = {"demo": 0, "scratch": 1}.get(config.init, 2)
    if config.method == "full":
        return rates[column]
    # Sweeps show that adapters' rates fall as 1 / sqrt(r)
    rate = rates[column] * math.sqrt((2, 4, 8)[column] / config.rank)
    return float(f"{rate:.2g}")

# ---- Device and processes ------------------------------------------------------------------------
def device_defaults(capability):
    """(dtype, compile) for a CUDA card of this compute capability, or None for any other device."""
    if capability is None:
        return "float32", False
    # bfloat16 is fast from 8.0 on, and Triton needs 7.0
    return "bfloat16" if capability >= (8, 0) else "float16", capability >= (7, 0)

def choose_device(args):
    """Settle args.device, dtype and compile."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used: {error}") from error
    dtype, compiles = device_defaults(None)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        dtype, compiles = device_defaults(torch.cuda.get_device_capability())
    if args.dtype == "auto":
        args.dtype = dtype
    if args.compile is None:
        args.compile = compiles
    say(f"{device_name(args)}, {args.dtype}, compile {args.compile}, torch {torch.__version__}")

def device_name(config):
    return torch.cuda.get_device_name() if "cuda" in config.device else config.device

@contextlib.contextmanager
def rank_0_first():
    """The first process goes through this block, and only then the others, to find what it made."""
    if RANK > 0:
        dist.barrier()  # until the first one arrives at its own barrier below
    yield
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()

# ---- Files ---------------------------------------------------------------------------------------
def write(path, save):
    """Let `save` write to an open file that becomes `path`. One process writes for all."""
    if RANK == 0:
        data.write_file(path, save)

def save_checkpoint(folder, progress, config, parts):
    """Write metrics.csv, and checkpoint.pt with all that resuming needs."""
    rows = progress["rows"]
    lines = [rows[0], *(row.values() for row in rows)]  # the names, and their values
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write(folder / "metrics.csv", lambda file: file.write(text.encode()))
    state = progress | {"config": vars(config)}
    state |= {name: part.state_dict() for name, part in parts.items()}
    write(folder / "checkpoint.pt", lambda file: torch.save(state, file))

def load_checkpoint(folder, config, parts):
    state = load_file(folder / "checkpoint.pt", config.device)
    check_same(folder, state["config"], config)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return {name: state[name] for name in ("step", "rows", "metrics", "seconds")}

def check_same(folder, saved, config):
    """ValueError if a saved run has other settings, but for where and how it runs."""
    may_differ = "methods out_dir cache_dir device compile no_fast resume export eval_every".split()
    for name, value in vars(config).items():
        old = saved.get(name)
        if old != value and name not in may_differ:
            was = f"--{name} {old} instead of {value}"
            raise ValueError(f"{folder} was made with {was}: --resume needs the same settings")

# ---- Runs ----------------------------------------------------------------------------------------
def runs(args):
    """The settings of every run: each combination of what takes several values and concerns it."""
    for method in args.methods:
        restarts = method in ("relora", "remora")
        ranks = [None] if method == "full" else args.rank
        operators = [None]
        if method in ("mora", "remora"):
            operators = args.operator or ["sharing" if restarts else "rotation"]
        for rank, operator in itertools.product(ranks, operators):
            groupings = [None]
            operator_class = mora.OPERATORS.get(operator, object)
            if issubclass(operator_class, mora.Sharing):
                groupings = args.groups or ["cycle" if restarts else "strided"]
            rates = args.learning_rate or [None]
            for groups, rate, seed in itertools.product(groupings, rates, args.seed):
                choice = dict(method=method, rank=rank, operator=operator, groups=groups, seed=seed)
                config = argparse.Namespace(**vars(args) | choice)
                config.fold = args.fold and issubclass(operator_class, mora.Decoupling)
                config.rslora = args.rslora and not operator and method != "full"
                config.merge_every = args.merge_every if restarts else None
                config.learning_rate = default_learning_rate(config) if rate is None else rate
                yield config

def label(config):
    """A setting's name, such as "mora rotation fold r2"."""
    words = [config.method, config.operator, config.groups]
    words += [option for option in ("fold", "rslora") if getattr(config, option)]
    words += [f"r{config.rank}"] if config.rank else []
    return " ".join(filter(None, words))

def load_dataset(config, tokenizer, context):
    """The task's data set. Its rows are block_size tokens long, or the model's `context`."""
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
    return dataset

def run(config, base, tokenizer):
    """Train a copy of `base` with one method and seed; -> what its results.json holds."""
    name = f"{config.task} {label(config)} lr{config.learning_rate} seed{config.seed}"
    folder = Path(config.out_dir, name.replace(" ", "-"))
    finished = folder / "results.json"
    say(f"\n{folder}")
    if config.resume and finished.exists():
        results = json.loads(finished.read_text("utf-8"))
        check_same(folder, results["config"], config)
        return results
    finished.unlink(missing_ok=True)  # of an earlier run, whose files are overwritten
    dataset = load_dataset(config, tokenizer, base.config.block_size)
    torch.manual_seed(config.seed)  # for the adapters' random numbers
    model = adapt(copy.deepcopy(base), config).to(config.device)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{trainable:,} of {total:,} parameters train")
    with autocast(config):
        say(f"before training: {as_text(evaluate(model.eval(), dataset))}")
    progress = train(model, dataset, config, folder)
    results = {name: getattr(config, name) for name in ("method", "rank", "operator", "seed")}
    results |= {"trainable_parameters": trainable, "total_parameters": total}
    results |= progress | {"steps": config.max_steps, "label": label(config)}
    results |= {"torch": torch.__version__, "device": device_name(config), "config": vars(config)}
    if config.task == "uuid":
        show_completion(model, dataset, tokenizer)
    if config.method != "full":
        # The adapters alone rebuild a model in which nothing else has changed
        if config.init != "scratch" and not config.merge_every:
            adapters = mora.adapter_state_dict(model)
            write(folder / "adapter.pt", lambda file: torch.save(adapters, file))
        mora.merge_adapters(model)
    if config.export:
        write(folder / "model.pt", model.export)
    write(finished, lambda file: file.write(json.dumps(results, indent=1).encode()))
    return results

def show_completion(model, pairs, tokenizer):
    """Print the first pair, and what greedy decoding answers, with wrong characters marked."""
    key, value = pairs.pairs[0]
    n = data.UUID_LENGTH + 1  # with the colon
    answer = model.eval().generate(pairs.tokens[:1, :n], data.UUID_LENGTH)[0, n:]
    answer = tokenizer.decode(answer.tolist())
    marks = "".join(" " if a == b else "^" for a, b in zip(answer, value))
    say(f"key    {key}\nvalue  {value}\nanswer {answer}\n       {marks}")

def show_table(results):  # a line for each run
    say("\nsetting                      parameters  learning rate  seed  seconds")
    for result in results:
        rate, metrics = result["config"]["learning_rate"], as_text(result["metrics"])
        say(f"{result['label']:28} {result['trainable_parameters']:10,} {rate:14g} "
            f"{result['seed']:5} {result['seconds']:8.0f}  {metrics}")

def run_all(argv):
    """All runs of a command line, then their table."""
    args = parse_args(argv)
    choose_device(args)
    if WORLD_SIZE > 1:  # the first process may prepare data for hours
        backend = "cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    configs = list(runs(args))
    base, tokenizer = load_base(args)
    for config in configs:  # so that a wrong layer name shows before the first run, not the last
        adapt(copy.deepcopy(base), config)
    if args.init == "demo":
        base = pretrain_demo(base, tokenizer, args)
    if args.task == "uuid":
        say(f"{args.n_pairs} pairs; guessing gets {data.UUID_CHANCE:.1%} of the hex digits right")
    results = []
    for config in configs:
        try:
            results.append(run(config, base, tokenizer))
        except FloatingPointError as error:  # the others may have better rates
            say(error)
    show_table(results)
    if len(results) < len(configs):
        raise FloatingPointError("a loss was not finite: try a lower --learning_rate")

def main(argv=None):
    """Run a command line; exit status 2 if something is wrong, 130 if it is interrupted."""
    status, reason = 0, ""
    try:
        run_all(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        status, reason = 130, "stopped: --resume continues from the last evaluation"
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and not last.line.startswith("raise"):
            raise  # a mistake in the code, which needs its traceback
        status, reason = 2, str(error).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError):
            reason += ": try a smaller --batch_size, or more --accumulate"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if reason and RANK == 0:
        print(f"train.py: error: {reason}", file=sys.stderr)
    sys.exit(status)

if __name__ == "__main__":
    main()
