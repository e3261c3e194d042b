"""What a layer and a step cost, against the frozen model's: `python tests/bench.py`, or in two minutes with --quick.

Timings are medians of repeats in which the candidates take turns, so that a machine's moods meet all of them alike;
only ratios within a table mean something. Sections (all, or those you name): errors, layers, steps, merge, tokenize,
start.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import train
from model import GPT, PRESETS, GPTConfig
from mora import OPERATORS, DoRALinear, LoRALinear, MoRALinear, find_adapters, merge_and_reset


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(candidates, device, seconds):
    """Median seconds of each candidate, a dict of functions; about `seconds` altogether, after one call unmeasured.

    On a GPU a turn is ten calls, so that starting them takes its usual place beside the computation.
    """
    times, calls = {name: [] for name in candidates}, 10 if device.type == "cuda" else 1
    for function in candidates.values():
        function()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[name]) < 3:
        for name, function in candidates.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait(device)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def state(model, optimizer):
    """MB that stay from step to step: weights and buffers, and what the optimizer remembers."""
    moments = [tensor for values in optimizer.state.values() for tensor in values.values() if torch.is_tensor(tensor)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments)) / 1e6


def kept_for_backward(function, model):
    """MB that autograd keeps from forward to backward, without the model's own weights."""
    own, kept = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    function(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
    return sum(kept.values()) / 1e6


def peak_memory(function):
    """MB at the peak of a call above what was there before, on CUDA: activations, gradients, and all that is temporary.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def memory(function, model, device):
    """What is measured of a call's memory, and how many MB it is."""
    if device.type == "cuda":
        return "MB more at the peak", peak_memory(function)
    return "MB kept for backward", kept_for_backward(function, model)


@contextlib.contextmanager
def left_out_if_too_large(case):
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"{case}: left out, for there is not enough memory")
    gc.collect()
    torch.cuda.empty_cache()


def chosen(cases, args):
    """Those whose name contains what --only asks for."""
    found = {case: values for case, values in cases.items() if args.only in case}
    if not found:
        print(f"{args.only!r} is in none of the names {'; '.join(cases)}")
    return found


def peak_flops(device, dtype):
    """FLOP/s of a large matrix product: what a step's own are compared with."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind()
    return 2 * n**3 / take_turns({"product": lambda: a @ b}, device, 1)["product"]


# ----------------------------------------------------------------------------------------------------------------------
# One layer: forward and backward, as a ratio to the frozen nn.Linear


class MergedLoRA(torch.autograd.Function):
    """LoRA in one product, as MoRALinear does it, so that the product is not mistaken for the method's merit."""

    @staticmethod
    def forward(ctx, x, A, B, scaling, weight, bias):
        ctx.save_for_backward(x, A, B, weight)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(weight, B, A, alpha=scaling).to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        x, A, B, weight = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        merged = torch.addmm(weight, B, A, alpha=ctx.scaling).to(x.dtype)
        return g @ merged, (g @ b).T @ x * ctx.scaling, g.T @ (x @ a.T) * ctx.scaling, None, None, None


class MergedLoRALinear(LoRALinear):
    def forward(self, x):
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        return MergedLoRA.apply(x, self.A, self.B, self.scaling, self.linear.weight, self.linear.bias)


def layer_candidates(k, d, rank, device):
    torch.manual_seed(0)
    linear = nn.Linear(k, d, device=device)
    layers = {"frozen": copy.deepcopy(linear).requires_grad_(False), "full": copy.deepcopy(linear)}
    layers["lora"] = LoRALinear(copy.deepcopy(linear), rank)
    layers["dora"] = DoRALinear(copy.deepcopy(linear), rank)
    for operator in OPERATORS:
        layers[f"mora {operator}"] = MoRALinear(copy.deepcopy(linear), rank, operator)
    layers["lora, one product"] = MergedLoRALinear(copy.deepcopy(linear), rank)
    for operator in ("sharing", "rotation"):
        layers[f"mora {operator}, as defined"] = MoRALinear(copy.deepcopy(linear), rank, operator)
        layers[f"mora {operator}, as defined"].fast = False
    for layer in layers.values():  # B and M start at zero
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return layers


def bench_errors(args):
    """A table of methods by types: the error of outputs, merged outputs and gradients against float64 on the CPU."""
    k, d, rows = *((48, 36) if args.quick else (768, 2304)), []
    for name, layer in layer_candidates(k, d, 8, args.device).items():
        x, g = torch.randn(2, 100, max(k, d), dtype=torch.float64).unbind()
        exact = copy.deepcopy(layer).to("cpu", torch.float64)
        exact.fast = False
        expected, row = results(exact, x[..., :k], g[..., :d]), {"largest relative error": name}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for compiled in (False, True) if args.compile else (False,):
                torch.compiler.reset()
                run = torch.compile(layer, fullgraph=True) if compiled else layer
                with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
                    got = results(run, *(t.to(args.device, torch.float32) for t in (x[..., :k], g[..., :d])))
                errors = [(a.cpu().double() - b).norm() / b.norm() for a, b in zip(got, expected)]
                row[str(dtype).removeprefix("torch.") + ", compiled" * compiled] = f"{max(errors):.1e}"
        rows.append(row)
    print(train.markdown(rows))
    return rows


def results(layer, x, g):
    """Output, merged output, and the gradients of x and of what trains."""
    x = x.clone().requires_grad_()
    trainable = [p for p in layer.parameters() if p.requires_grad]
    merged = copy.deepcopy(getattr(layer, "_orig_mod", layer))
    merged = merged.merge() if hasattr(merged, "merge") else merged
    y = layer(x)
    return [y.detach(), merged(x).detach(), *torch.autograd.grad(y, [x, *trainable], g.to(y.dtype))]


def bench_layers(args):
    """Tables of methods by shapes: time as a multiple of the frozen layer's and of LoRA's, memory, and FLOPs beyond the
    frozen layer's, per token and parameter of LoRA. The last rows are no options, but show what one product is worth.
    """
    on_gpu = args.device.type == "cuda"
    shapes = [(768, 768), (768, 2304), (768, 3072), (3072, 768)]
    shapes += [(4096, 4096), (4096, 11008), (11008, 4096)] if on_gpu else []
    cases = {f"{k} to {d}, r {rank}": (k, d, rank) for rank in (8, 128) for k, d in shapes}
    if args.quick:
        cases = {case: cases[case] for case in ("768 to 768, r 8", "3072 to 768, r 8")}
    figures = []
    for compiled in ([False, True] if on_gpu else [args.compile]):
        tables = {}
        for case, sizes in chosen(cases, args).items():
            measured = {}
            with left_out_if_too_large(case):
                measured = measure_layers(*sizes, compiled, args)
            for name, (seconds, (what, megabytes), flops) in measured.items():
                frozen, lora = (seconds / measured[other][0] for other in ("frozen", "lora"))
                cells = {"layer": f"{1e3 * seconds:.1f} ms" if name == "frozen" else f"{frozen:.2f}",
                         "of lora": f"{lora:.2f}", what: f"{megabytes:,.1f}", "more FLOPs": f"{flops:.1f}"}
                for title, cell in cells.items():
                    title += ", compiled" * compiled
                    tables.setdefault(title, {}).setdefault(name, {title: name})[case] = cell
        for rows in tables.values():
            print(train.markdown(list(rows.values())) + "\n", flush=True)
            figures += rows.values()
    return figures


def measure_layers(k, d, rank, compiled, args):
    """Of forward and backward, by the name of the layer: (median seconds, memory, FLOPs as in bench_layers)."""
    tokens = 32768 if args.device.type == "cuda" else 4096
    x = torch.randn(tokens, k, device=args.device, requires_grad=True)
    g = torch.randn(tokens, d, device=args.device).to(args.dtype)

    def forward_and_backward(layer, parameters):
        def call(around_forward=contextlib.nullcontext()):
            with args.autocast(), around_forward:
                y = layer(x)
            y.backward(g)
            for tensor in (x, *parameters):
                tensor.grad = None
        return call

    torch.compiler.reset()
    layers = layer_candidates(k, d, rank, args.device)
    calls = {name: forward_and_backward(torch.compile(layer) if compiled else layer, list(layer.parameters()))
             for name, layer in layers.items()}
    seconds = take_turns(calls, args.device, 2 if args.quick else 8)
    flops = {}
    for name, layer in layers.items():
        with FlopCounterMode(display=False) as counter:
            forward_and_backward(layer, list(layer.parameters()))()
        flops[name] = counter.get_total_flops()
    unit = tokens * rank * (k + d)
    return {name: (seconds[name], memory(calls[name], layer, args.device), (flops[name] - flops["frozen"]) / unit)
            for name, layer in layers.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Whole training steps


def step_candidates(base, task, rank):
    """Models that train by each method; `frozen` is the floor: the first layer's bias alone, so that the gradient has
    to pass the whole network, and in c4 what every method trains outside the linear layers.
    """
    settings = ["full", "lora", *(f"mora {operator}" for operator in OPERATORS)]
    models = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    models["frozen"].h[0].attn.c_attn.bias.requires_grad_(True)
    for name, parameter in models["frozen"].named_parameters():
        if task == "c4" and name.split(".")[-2] in ("wte", "wpe", "ln_1", "ln_2", "ln_f"):
            parameter.requires_grad_(True)
    for setting in settings:
        method, _, operator = setting.partition(" ")
        config = train.Config(method=method, rank=rank, operator=operator or None,
                              init="scratch" if task == "c4" else "gpt2")
        models[setting] = train.adapt(copy.deepcopy(base), config)
    return models


def bench_steps(args):
    """Forward, backward, clipping and AdamW. In c4, embeddings and norms train too, as in train.py."""
    on_gpu = args.device.type == "cuda"
    cases = {"demo uuid": (32, 2), "demo c4": (32, 4)}
    cases |= {"gpt2 uuid": (1000 if on_gpu else 16, 8)} if not args.quick else {}
    cases |= {"gpt2 c4": (32, 8), "gpt2-large c4": (1, 8)} if on_gpu and not args.quick else {}
    peak, rows = peak_flops(args.device, args.dtype), []
    print(f"a matrix product's peak: {peak / 1e12:.3g} TFLOP/s")
    for case, (batch_size, rank) in chosen(cases, args).items():
        preset, task = case.split()
        torch.manual_seed(0)
        base = GPT(GPTConfig(**PRESETS[preset])).to(args.device)
        length = 2 * data.UUID_LENGTH if task == "uuid" else base.config.block_size
        idx = torch.randint(base.config.vocab_size, (batch_size, length), device=args.device)
        targets = idx[:, -data.UUID_LENGTH:] if task == "uuid" else idx
        case += f", {batch_size} x {length}"
        with left_out_if_too_large(case):
            rows += step_rows(case, base, task, rank, idx, targets, peak, args)
    return rows


def step_rows(case, base, task, rank, idx, targets, peak, args):
    models, optimizers, steps, first = step_candidates(base, task, rank), {}, {}, {}
    torch.compiler.reset()
    for name, model in models.items():
        config = train.Config(method=name.split()[0], device=str(args.device), learning_rate=0.0)
        optimizer = train.make_optimizer(model, config)
        trainable = [p for p in model.parameters() if p.requires_grad]
        network = torch.compile(train.Loss(model)) if args.compile else train.Loss(model)

        def step(around_forward=contextlib.nullcontext(), network=network, optimizer=optimizer, trainable=trainable):
            with args.autocast(), around_forward:
                loss = network(idx, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        start = time.perf_counter()
        step()
        wait(args.device)
        optimizers[name], steps[name], first[name] = optimizer, step, time.perf_counter() - start
    seconds = take_turns(steps, args.device, 6 if args.quick else 60)
    rows = []
    for name, step in steps.items():
        part = min(8, len(idx))  # of the batch, since what is not compiled takes more memory
        with FlopCounterMode(display=False) as counter:
            with args.autocast():
                models[name](idx[:part], targets[:part])[1].backward()
        models[name].zero_grad(set_to_none=True)
        flops = counter.get_total_flops() * len(idx) / part
        row = {"step": case, "method": name, "tokens/s": f"{idx.numel() / seconds[name]:,.0f}",
               **{f"of {other}": f"{seconds[name] / seconds[other]:.2f}" for other in ("frozen", "full", "lora")},
               "of peak FLOP/s": f"{flops / seconds[name] / peak:.0%}"}
        row["MB of state"] = f"{state(models[name], optimizers[name]):,.1f}"
        what, megabytes = memory(step, models[name], args.device)
        row[what] = f"{megabytes:,.1f}"
        if args.compile:
            row["first step"] = f"{first[name]:.0f} s"
        rows.append(row)
    print("\n" + train.markdown(rows), flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Merging, tokenizing, starting


def bench_merge(args):
    base, rows = GPT(GPTConfig(**PRESETS["demo" if args.quick else "gpt2"])).to(args.device), []
    models = {name: model for name, model in step_candidates(base, "uuid", 8).items() if name not in ("frozen", "full")}
    seconds = take_turns({name: lambda model=model: merge_and_reset(model) for name, model in models.items()},
                         args.device, 3)
    for name, model in models.items():
        layers = str(len(find_adapters(model)))
        rows.append({"merge_and_reset": name, "layers": layers, "seconds": f"{seconds[name]:.3f}"})
    print(train.markdown(rows))
    return rows


def bench_tokenize(args):
    text = data.standard_library_text(2_000_000 if args.quick else 8_000_000)
    documents, rows = [text[i:i + 2_000] for i in range(0, len(text), 2_000)], []
    for name in ("bytes", "gpt2"):
        try:
            tokenizer = data.get_tokenizer(name)
        except ValueError as error:
            print(f"{name}: left out, {error}")
            continue
        seconds = take_turns({
            "tokenize": lambda: data.tokenize(iter(documents), tokenizer, io.BytesIO()),
            "encode_ordinary_batch": lambda: tokenizer.encode_ordinary_batch(documents, num_threads=os.cpu_count()),
        }, torch.device("cpu"), 3)
        share = seconds["encode_ordinary_batch"] / seconds["tokenize"]
        rows.append({"tokenizer": name, "MB/s": f"{len(text) / seconds['tokenize'] / 1e6:.2f}",
                     "of encode_ordinary_batch's speed": f"{share:.0%}"})
    print(train.markdown(rows))
    return rows


def bench_start(args):
    with tempfile.TemporaryDirectory() as folder:
        one_step = ["--init", "scratch", "--methods", "mora", "--max_steps", "1", "--no-compile", "--out_dir", folder]
        commands = {"train.py -h": ["-h"], "one step and its results": one_step}
        seconds = take_turns({name: lambda command=command: subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *command], stdout=subprocess.DEVNULL, check=True)
            for name, command in commands.items()}, torch.device("cpu"), 1)
    rows = [{"start": name, "seconds": f"{value:.1f}"} for name, value in seconds.items()]
    print(train.markdown(rows))
    return rows


SECTIONS = {"errors": bench_errors, "layers": bench_layers, "steps": bench_steps, "merge": bench_merge,
            "tokenize": bench_tokenize, "start": bench_start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"among {', '.join(SECTIONS)} (or all)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats: two minutes on two cores")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the layers and steps with this in their name, "
                        "such as 'gpt2 c4' or '3072 to 768'")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA "
                        "(float16 where the card has none), float32 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    args = parser.parse_args()
    unknown = set(args.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no section is called {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    args.device = torch.device(args.device)
    on_gpu = args.device.type == "cuda"
    half = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    args.dtype = getattr(torch, args.dtype or (half if on_gpu else "float32"))
    args.compile = on_gpu if args.compile is None else args.compile
    args.autocast = lambda: torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    header = (f"{args.device} ({name}), {str(args.dtype).removeprefix('torch.')}, torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads")
    print(header)
    figures = {"device": header}
    if args.json:
        Path(args.json).write_text("")  # whether it can be written shows now
    for section in args.sections:
        print(f"\n{section}\n")
        figures[section] = SECTIONS[section](args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
