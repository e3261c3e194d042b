"""Train a GPT in full, with LoRA and its relatives, or with MoRA, in one plain loop.

    python train.py                             the demo: memorize UUID pairs on a laptop, in minutes, without a download
    python train.py uuid --methods lora mora --operator sharing rotation --rank 2 8 --seed 0 1 2
    python train.py uuid --init gpt2 --rank 8 256 --n_pairs 10000 --batch_size 1000 --max_steps 1000       as in the paper
    python train.py -h                          every option

From top to bottom: settings, command line, device, metrics, base model, optimizer, the loop, runs and their results.
"""

import argparse
import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

import data
import mora
from model import GPT, PRESETS, GPTConfig

# ------------------------------------------------------------------------------------------------------------------------------
# Settings: what an option is when it is not given

METHODS = ("full", *mora.METHODS)

# Peak learning rates: on the demo's base from the sweep in the README, on given weights the middle of what the paper searched at 7B.
LEARNING_RATES = {  # method: (demo, given weights)
    "full": (1e-3, 3e-5),
    "lora": (2e-2, 2e-4),
    "lora+": (5e-3, 2e-4),
    "asylora": (2e-2, 2e-4),
    "dora": (2e-2, 2e-4),
    "mora truncation": (1e-2, 2e-4),
    "mora sharing": (1e-2, 1e-4),
    "mora decoupling": (1e-2, 2e-4),
    "mora rotation": (1e-2, 3e-4),
}
DEMO_SIZE = PRESETS["demo"]
DEMO_BASE = dict(seed=0, max_steps=300, warmup_steps=20, batch_size=32, learning_rate=3e-3, text_size=4_000_000)


# ------------------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: error: {message} (python train.py -h explains every option)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def whole(minimum):
    """The type of an option: a whole number of at least `minimum`."""
    def convert(text):
        if not (text.isascii() and text.isdigit() and int(text) >= minimum):
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)
    return convert


def real(minimum, maximum=math.inf):
    """The type of an option: a finite number from `minimum` to `maximum`."""
    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value <= maximum and math.isfinite(value)):
            bounds = f"of at least {minimum:g}" if maximum == math.inf else f"from {minimum:g} to {maximum:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bounds}, not {text!r}")
        return value
    return convert


def parse_args(argv=None):
    """The settings as a namespace. Wrong ones end the program with one line and exit status 2."""
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("task", nargs="?", default="uuid", choices=["uuid"], help="uuid: memorize pairs of random UUIDs")

    add = parser.add_argument_group("method (an option that takes several values makes a run of each combination)").add_argument
    add("--methods", nargs="+", choices=METHODS, default=["full", "lora", "mora"], metavar="METHOD", help=f"among {', '.join(METHODS)}")
    add("--rank", nargs="+", type=whole(1), default=[2], metavar="R", help="LoRA's rank; MoRA's matrix gets the same number of parameters")
    add("--operator", nargs="+", choices=list(mora.OPERATORS), default=["rotation"], metavar="OP", help=f"MoRA's, among {', '.join(mora.OPERATORS)}")
    add("--groups", choices=["strided", "contiguous", "random", "cycle"], default="strided", help="how sharing deals its groups")
    add("--fold", action="store_true", help="rotation and decoupling add what lies past the outputs instead of cutting it off")
    add("--alpha", type=real(0), help="LoRA's alpha, whose update is scaled by alpha / rank (default: twice the rank)")
    add("--rslora", action="store_true", help="scale LoRA's update by alpha / sqrt(rank)")
    add("--lora_plus_ratio", type=real(0), default=16.0, metavar="X", help="B's learning rate in lora+, as a multiple of A's")
    add("--dropout", type=real(0, 1), default=0.0, help="dropout on the adapters' input")
    add("--targets", nargs="+", metavar="LAYER", help="the linear layers to adapt, such as c_attn c_fc (default: all)")
    add("--learning_rate", nargs="+", type=real(0), metavar="X", help="peak learning rate (default: the method's own)")
    add("--seed", nargs="+", type=whole(0), default=[0], metavar="N", help="seed of the pairs, their order, and the adapters")

    add = parser.add_argument_group("model and data").add_argument
    add("--init", default="demo", help="initial weights: demo (a small base, pretrained once), scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a file")
    add("--tokenizer", choices=["bytes", "gpt2"], help="default: the one that the initial weights were trained with")
    add("--n_layer", type=whole(1), metavar="N", help=f"layers of a demo or scratch model (default: {DEMO_SIZE['n_layer']})")
    add("--n_head", type=whole(1), metavar="N", help=f"its attention heads (default: {DEMO_SIZE['n_head']})")
    add("--n_embd", type=whole(1), metavar="N", help=f"its width (default: {DEMO_SIZE['n_embd']})")
    add("--block_size", type=whole(1), metavar="N", help=f"its longest context in tokens (default: {DEMO_SIZE['block_size']})")
    add("--n_pairs", type=whole(1), default=32, metavar="N", help="how many pairs to memorize")

    add = parser.add_argument_group("training").add_argument
    add("--max_steps", type=whole(1), default=500, metavar="N", help="optimizer steps")
    add("--batch_size", type=whole(1), metavar="N", help="sequences a step (default: 64, or all pairs if fewer)")
    add("--accumulate", type=whole(1), default=1, metavar="N", help="micro-batches that a step's batch is cut into, to save memory")
    add("--warmup_steps", type=whole(0), metavar="N", help="steps over which the learning rate rises, to fall to 0 after (default: max_steps / 10)")
    add("--weight_decay", type=real(0), default=0.0, metavar="X", help="AdamW's weight decay")
    add("--grad_clip", type=real(0), default=1.0, metavar="X", help="largest norm of the gradient; 0 is no limit")
    add("--eval_every", type=whole(1), metavar="N", help="steps between evaluations (default: a quarter of max_steps)")

    add = parser.add_argument_group("running").add_argument
    add("--out_dir", default="out", metavar="DIR", help="where every run gets its folder")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of activations and products; weights stay float32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: on CUDA)")
    add("--resume", action="store_true", help="continue the runs in out_dir where they stopped")
    args = parser.parse_args(argv)

    args.batch_size = args.batch_size or min(64, args.n_pairs)
    args.warmup_steps = args.max_steps // 10 if args.warmup_steps is None else args.warmup_steps
    args.eval_every = args.eval_every or math.ceil(args.max_steps / 4)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args):
    """ValueError for what is wrong with the settings together, each being right by itself."""
    if args.init not in ("demo", "scratch"):
        for name in DEMO_SIZE.keys() - {"vocab_size"}:
            if getattr(args, name):
                raise ValueError(f"--{name} is for --init demo or scratch: {args.init} has its own")
    if args.init == "demo" and args.tokenizer == "gpt2":
        raise ValueError("--init demo reads bytes: --tokenizer gpt2 goes with --init gpt2 or scratch")
    if args.batch_size > args.n_pairs:
        raise ValueError(f"--batch_size {args.batch_size} exceeds the {args.n_pairs} pairs of --n_pairs")
    if args.accumulate > args.batch_size:
        raise ValueError(f"--accumulate {args.accumulate} exceeds the {args.batch_size} sequences of --batch_size")
    if args.warmup_steps >= args.max_steps:
        raise ValueError(f"--warmup_steps {args.warmup_steps} leaves nothing of --max_steps {args.max_steps}")
    for operator in args.operator if args.fold and "mora" in args.methods else []:
        if operator not in ("decoupling", "rotation"):
            raise ValueError(f"--fold is for the operators decoupling and rotation, not {operator}")


# ------------------------------------------------------------------------------------------------------------------------------
# Device


def choose_device(args):
    """Settle args.device, args.dtype and args.compile; -> a line that says what they are, and why."""
    chosen = args.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch's own reason is clear, in its first line
        raise ValueError(f"--device {chosen} cannot be used: {str(error).splitlines()[0]}") from None
    kind = torch.device(chosen).type
    why = torch.cuda.get_device_name(chosen) if kind == "cuda" else "no CUDA device was found" if args.device == "auto" else "as asked"
    if args.dtype != "auto":
        args.dtype, why_dtype = args.dtype, "as asked"
    elif kind != "cuda":
        args.dtype, why_dtype = "float32", f"mixed precision gains nothing on {kind}"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        args.dtype, why_dtype = "bfloat16", "the card computes in it; weights stay float32"
    else:
        args.dtype, why_dtype = "float16", "the card has no bfloat16; gradients are scaled; weights stay float32"
    args.device, args.device_name = chosen, torch.cuda.get_device_name(chosen) if kind == "cuda" else kind
    args.compile = kind == "cuda" if args.compile is None else args.compile
    return f"device {chosen} ({why}), {args.dtype} ({why_dtype}), {'compiled' if args.compile else 'not compiled'}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------------------------------------
# Metrics


def uuid_metrics(pairs, model):
    """The accuracy on the values' hex digits, as a fraction, and the fraction of values that are right as a whole.

    A digit is right if it is the likeliest after the key and the true digits before it. Where all 32 are, greedy decoding finds them
    from the key alone, so exact match means what it says; the accuracy of decoded values is lower, as one wrong digit misleads the next.
    """
    right = []
    for tokens in pairs.tokens.split(pairs.batch_size):
        answer = tokens[:, -data.UUID_LENGTH:]
        right.append(model(tokens[:, :-1], answer)[0].argmax(-1) == answer)
    right = torch.cat(right)[:, data.HEX_POSITIONS]  # (n_pairs, 32)
    return {"char_accuracy": right.float().mean().item(), "exact_match": right.all(dim=1).float().mean().item()}


def uuid_summary(rows):
    """What the last table says of a run, in %: the accuracy at four moments, as in the paper's Table 2, and exact matches."""
    moments = [rows[math.ceil(len(rows) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
    return {f"step {row['step']}": 100 * row["char_accuracy"] for row in moments} | {"exact": 100 * rows[-1]["exact_match"]}


def uuid_completions(pairs, model, tokenizer, n=3):
    """What the model says to the first n keys, decoded greedily, as strings."""
    keys = pairs.tokens[:n, :data.UUID_LENGTH + 1]  # with the colon
    return [tokenizer.decode(row[keys.shape[1]:].tolist()) for row in model.generate(keys, data.UUID_LENGTH)]


# ------------------------------------------------------------------------------------------------------------------------------
# The base model


def load_base(args):
    """The model that every run starts from, and its tokenizer."""
    if args.init == "demo":
        return demo_base(args)
    if args.init == "scratch":
        tokenizer = data.get_tokenizer(args.tokenizer or "bytes")
        torch.manual_seed(0)
        return GPT(GPTConfig(**size_of(args) | {"vocab_size": tokenizer.n_vocab})), tokenizer
    model = GPT.from_pretrained(args.init)
    tokenizer = data.get_tokenizer(args.tokenizer or ("bytes" if model.config.vocab_size == 257 else "gpt2"))
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"--tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, and {args.init} knows only {model.config.vocab_size}")
    return model, tokenizer


def size_of(args):
    """The size of a demo or scratch model, as arguments of GPTConfig."""
    return {name: getattr(args, name, None) or value for name, value in DEMO_SIZE.items()}


def demo_base(args):
    """The demo's base and its tokenizer; if out_dir does not hold the base, it is pretrained first."""
    single = dict(method="full", rank=None, accumulate=1, eval_every=DEMO_BASE["max_steps"] // 4, **size_of(args))
    config = argparse.Namespace(**vars(args) | DEMO_BASE | single)
    identity = json.dumps([size_of(args), DEMO_BASE, sys.version_info[:2]])  # the library's text changes with Python's version
    folder = Path(args.out_dir, f"base-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
    tokenizer = data.get_tokenizer("bytes")
    if not (folder / "model.pt").exists():
        print("pretraining the demo's base, once: half Python's standard library, half random pairs", flush=True)
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(**size_of(args))).to(config.device)
        text = data.DemoText(config.text_size, tokenizer, config.batch_size, config.seed, config.device)
        train(model, text, lambda model: {"val_loss": model(*text.batch(-1))[1].item()}, config, folder)
        model.export(folder / "model.pt")
    print(f"base: {folder / 'model.pt'}")
    return GPT.from_pretrained(str(folder / "model.pt")), tokenizer


# ------------------------------------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(model, config):
    """AdamW on what trains. The learning rate of a group is the schedule's times its `multiple`: 1, but for B in LoRA+."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fast = [parameter for name, parameter in trainable.items() if config.method == "lora+" and name.endswith(".B")]
    slow = [parameter for name, parameter in trainable.items() if not (config.method == "lora+" and name.endswith(".B"))]
    groups = [{"params": slow, "multiple": 1.0}, {"params": fast, "multiple": config.lora_plus_ratio}]
    fused = torch.device(config.device).type == "cuda"
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, weight_decay=config.weight_decay, fused=fused)


def learning_rate(step, config):
    """Linear warm-up to the peak over `warmup_steps`, then linear decay, which would reach 0 at `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (config.max_steps - step) / (config.max_steps - config.warmup_steps)


# ------------------------------------------------------------------------------------------------------------------------------
# The loop


def train(model, dataset, evaluate, config, folder):
    """Train `model` in place, writing metrics.csv and checkpoint.pt at every evaluation; -> the rows of metrics.csv as dicts."""
    kind = torch.device(config.device).type
    autocast = torch.autocast(kind, getattr(torch, config.dtype), enabled=config.dtype != "float32")
    scaler = torch.amp.GradScaler(kind, enabled=config.dtype == "float16")
    optimizer = make_optimizer(model, config)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    compiled = torch.compile(model) if config.compile else model
    first, rows = 0, []
    if config.resume and (folder / "checkpoint.pt").exists():
        first, rows = load_checkpoint(folder / "checkpoint.pt", config, model, optimizer, scaler)

    losses, tokens, lap, begin = [], 0, time.perf_counter(), time.perf_counter()
    for step in range(first, config.max_steps):
        # All randomness of a step follows from (seed, step), so that a resumed run draws what an uninterrupted one would have drawn
        torch.manual_seed(data.seeded("step", config.seed, step).initial_seed())
        idx, targets = dataset.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["multiple"]

        # Forward and backward; each micro-batch counts by its share of the targets, so cutting the batch changes nothing
        model.train()
        loss, n_targets = 0.0, (targets != -100).sum()
        for part, part_targets in zip(idx.chunk(config.accumulate), targets.chunk(config.accumulate)):
            with autocast:
                part_loss = compiled(part, part_targets)[1] * (part_targets != -100).sum() / n_targets
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        losses.append(loss)
        tokens += idx.numel()

        # Clip and step
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # Evaluate, save, report
        if (step + 1) % config.eval_every == 0 or step + 1 == config.max_steps:
            rate, loss = learning_rate(step, config), torch.stack(losses).mean().item()
            speed = tokens / (time.perf_counter() - lap)
            if not math.isfinite(loss):
                raise ValueError(f"{folder}: the loss is {loss} at step {step + 1}: try a --learning_rate below {config.learning_rate:g}")
            with torch.no_grad(), autocast:
                metrics = evaluate(model.eval())
            rows.append({"step": step + 1, "loss": loss, "learning_rate": rate, "tokens_per_second": speed} | metrics)
            save_checkpoint(folder, rows, config, model, optimizer, scaler)
            left = (time.perf_counter() - begin) / (step + 1 - first) * (config.max_steps - step - 1)
            print(f"step {step + 1:>{len(str(config.max_steps))}}/{config.max_steps}  loss {loss:.4f}  {show(metrics)}  "
                  f"{speed:,.0f} tokens/s  {left:.0f} s left", flush=True)
            losses, tokens, lap = [], 0, time.perf_counter()
    return rows


def show(metrics):
    """Metrics as people read them."""
    return "  ".join(f"{name.replace('_', ' ')} " + (f"{value:.4f}" if "loss" in name else f"{value:.1%}") for name, value in metrics.items())


def write(path, save):
    """Let `save(path)` write a file under another name first, so that the name never stands for half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
    os.replace(temporary, path)


def save_checkpoint(folder, rows, config, model, optimizer, scaler):
    """Write checkpoint.pt, all that resuming needs, and metrics.csv."""
    state = dict(rows=rows, config=vars(config), model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    write(folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def save_csv(path):
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    write(folder / "metrics.csv", save_csv)


def load_checkpoint(path, config, model, optimizer, scaler):
    """Restore a run; -> its next step and its rows so far. ValueError if its settings were others."""
    try:
        state = torch.load(path, map_location=config.device, weights_only=True)
        rows, saved = state["rows"], state["config"]
    except Exception as error:  # whatever torch.load meets in a damaged file
        raise ValueError(f"{path} is damaged: delete it to start the run again") from error
    check_same(path, saved, config)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return rows[-1]["step"], rows


def check_same(path, saved, config):
    """ValueError if a run's saved settings differ from `config` in anything but where it runs."""
    for name in vars(config).keys() - {"out_dir", "device", "device_name", "compile", "resume"}:
        if saved.get(name) != getattr(config, name):
            raise ValueError(f"{path} was made with {name} = {saved.get(name)}, and now it is {getattr(config, name)}: "
                             "--resume needs the same settings, or another --out_dir")


# ------------------------------------------------------------------------------------------------------------------------------
# Runs and their results


def runs(args):
    """A configuration for every combination of the options that take several values, as far as they concern the method."""
    for method in args.methods:
        for rank in args.rank if method != "full" else [None]:
            for operator in args.operator if method == "mora" else [None]:
                own = LEARNING_RATES[f"{method} {operator}" if operator else method][args.init != "demo"]
                for rate, seed in itertools.product(args.learning_rate or [own], args.seed):
                    single = dict(method=method, rank=rank, operator=operator, learning_rate=rate, seed=seed)
                    config = argparse.Namespace(**vars(args) | single)
                    del config.methods
                    yield config


def label(config):
    """The setting's name, such as "mora rotation fold r2"."""
    fold = config.fold and config.operator in ("decoupling", "rotation")
    return " ".join(part for part in (config.method, config.operator, fold and "fold", config.rank and f"r{config.rank}") if part)


def adapt(model, config):
    """Give the model the adapters that the settings ask for."""
    if config.method == "full":
        return model
    names = {"truncation": [], "sharing": ["groups"], "decoupling": ["fold"], "rotation": ["fold"], None: ["alpha", "rslora"]}
    options = {name: getattr(config, name) for name in names[config.operator]}
    return mora.add_adapters(model, config.method, config.rank, config.operator, config.targets, dropout=config.dropout, **options)


def run(config, base, tokenizer):
    """Train a copy of `base` by one method with one seed, and write adapter.pt and results.json; -> what results.json holds."""
    folder = Path(config.out_dir, "-".join([config.task, *label(config).split(), f"lr{config.learning_rate:g}", f"seed{config.seed}"]))
    if config.resume and (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        check_same(folder / "results.json", results["config"], config)
        print(f"\n{folder}: finished before")
        return results
    pairs = data.UUIDPairs(config.n_pairs, tokenizer, config.batch_size, config.seed, config.device)
    evaluate = functools.partial(uuid_metrics, pairs)
    torch.manual_seed(config.seed)  # for the adapters' random numbers
    model = adapt(copy.deepcopy(base), config)
    trainable, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (False, True))
    sizes = [adapter.operator.size for adapter in mora.find_adapters(model).values()] if config.operator else []
    size = "-".join(str(side) for side in sorted({min(sizes), max(sizes)})) if sizes else None
    print(f"\n{folder}\n{trainable:,} of {total:,} parameters train" + (f", r̂ = {size}" if size else ""))
    with torch.no_grad():
        batch = pairs.batch(0)
        logits, base_logits = (network.eval()(*batch)[0] for network in (model, base))
        difference = (logits - base_logits).abs().max().item()
    if not difference <= 1e-4 * base_logits.abs().max():
        raise RuntimeError(f"an adapted model must start as its base, but its logits differ by {difference:g}")
    print(f"before training: logits differ from the base's by {difference:.1g}, {show(evaluate(model))}", flush=True)

    start = time.perf_counter()
    rows = train(model, pairs, evaluate, config, folder)
    results = {"method": config.method, "rank": config.rank, "operator": config.operator, "seed": config.seed, "size": size,
               "trainable_parameters": trainable, "total_parameters": total, "steps": config.max_steps,
               "seconds": time.perf_counter() - start, "metrics": rows[-1], "rows": rows, "summary": uuid_summary(rows),
               "update_rank": update_rank(model, base), "completions": uuid_completions(pairs, model.eval(), tokenizer),
               "config": vars(config), "torch": torch.__version__, "device": config.device_name}
    if config.method != "full":
        write(folder / "adapter.pt", lambda path: torch.save(mora.adapter_state_dict(model), path))
    write(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=1, ensure_ascii=False)))
    return results


@torch.no_grad()
def update_rank(model, base):
    """The rank of what training added to a weight, as a mean over the linear layers that it changed."""
    ranks = []
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            tuned = model.get_submodule(name)
            weight = tuned.merged_weight() if isinstance(tuned, mora.Adapter) else tuned.weight
            ranks.append(torch.linalg.matrix_rank(weight - layer.weight).item())
    return statistics.mean(rank for rank in ranks if rank)


def table(results):
    """The results as a Markdown table, a row for all seeds of a setting: the mean, and ± the standard deviation over the seeds."""
    settings = {}
    for result in results:
        config = argparse.Namespace(**result["config"])
        settings.setdefault((label(config), config.learning_rate), []).append(result)

    def over_seeds(values, digits=1):
        return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

    rows = []
    for (name, rate), group in settings.items():
        rows.append({"method": name, "r̂": group[0]["size"] or "-", "parameters": f"{group[0]['trainable_parameters']:,}", "peak rate": f"{rate:g}"}
                    | {key: over_seeds([result["summary"][key] for result in group]) for key in group[0]["summary"]}
                    | {"rank of ΔW": over_seeds([result["update_rank"] for result in group], 0),
                       "seconds": f"{statistics.mean(result['seconds'] for result in group):.0f}"})
    widths = {key: max(len(row[key]) for row in [{key: key}, *rows]) for key in rows[0]}
    lines = [{key: key for key in widths}, {key: "-" * width for key, width in widths.items()}, *rows]
    return "\n".join("| " + " | ".join(line[key].ljust(width) for key, width in widths.items()) + " |" for line in lines)


def completions(results, pairs):
    """The pairs, and what every run's model says to their keys, wrong characters marked below."""
    names = [label(argparse.Namespace(**result["config"])) for result in results]
    lines, width = [], max(map(len, ["value", *names]))
    for i, (key, value) in enumerate(pairs):
        lines += ["", f"{'key':{width}}  {key}", f"{'value':{width}}  {value}"]
        for name, result in zip(names, results):
            guess = result["completions"][i]
            lines.append(f"{name:{width}}  {guess}")
            if guess != value:
                lines.append(" " * (width + 2) + "".join(" " if a == b else "^" for a, b in zip(guess, value)))
    return "\n".join(lines)


NEXT = """
Next, for example:
  python train.py --methods mora --operator truncation sharing decoupling rotation           the four operators
  python train.py --rank 1 8                                                                 a smaller and a larger budget
  python train.py --seed 0 1 2                                                               the spread over seeds
  python train.py --init gpt2 --rank 8 --n_pairs 10000 --batch_size 1000 --max_steps 1000    the paper's setting, on a GPU"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        print(choose_device(args))
        base, tokenizer = load_base(args)
        base.to(args.device)
        print(f"{args.n_pairs} pairs to memorize; guessing gets {data.UUID_CHANCE:.1%} of the hex digits right", flush=True)
        results = [run(config, base, tokenizer) for config in runs(args)]
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n" + table(results))
    print(completions([result for result in results if result["seed"] == args.seed[0]], data.uuid_pairs(args.n_pairs, args.seed[0])[:3]))
    if not argv:
        print(NEXT)


if __name__ == "__main__":
    main()
