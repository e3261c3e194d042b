"""What a layer and a training step cost, beside a frozen one.

    python tests/experiments/bench.py                     all sections: ten minutes on two cores
    python tests/experiments/bench.py layers --only "768 to 768, r 8"
    python tests/experiments/bench.py memory --preset gpt2-large --batch 4 --dtype bfloat16

Times are medians of repeats in which the candidates take turns, so that what else a machine does
slows all of them down alike. Only ratios within a table mean something.
"""

import argparse
import contextlib
import copy
import functools
import gc
import multiprocessing
import resource
import statistics
import time
import weakref
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop

import controls  # which makes the files of the repository's root known
import data
import mora
import train
from compare import across, markdown
from model import GPT, PRESETS, GPTConfig

OPERATORS = ["truncation", "sharing", "decoupling", "rotation", "overlap"]
METHODS = ["full", "lora", *(f"mora {operator}" for operator in OPERATORS)]

# torch counts the attention of GPUs only
attention = "_scaled_dot_product_flash_attention_for_cpu"
flop_registry[getattr(torch.ops.aten, attention)] = sdpa_flop
flop_registry[getattr(torch.ops.aten, f"{attention}_backward")] = sdpa_backward_flop

# ---- Measuring -----------------------------------------------------------------------------------
def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()

def take_turns(candidates, device, seconds):
    """{name: median seconds} of functions, after one call of each that is not measured."""
    # On a GPU a turn is ten calls, so that they are queued as in training
    n_calls = 10 if device.type == "cuda" else 1
    times = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[name]) < 3:
        for name, function in candidates.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(n_calls):
                function()
            wait(device)
            times[name].append((time.perf_counter() - start) / n_calls)
    return {name: statistics.median(each) for name, each in times.items()}

class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, in blocks of 512 as CUDA's allocator."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()
        gc.collect()
        for each in gc.get_objects():
            if issubclass(type(each), torch.Tensor):
                self.add(each)
        self.before = self.now

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.alive:
            self.alive.add(key)
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, n_bytes)
        return tensor

    def remove(self, key, n_bytes):
        self.alive.discard(key)
        self.now -= n_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self.add, function(*args, **(kwargs or {})))

def memory(step, device):
    """MB at the peak of a step, above what was there before."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        wait(device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with Memory() as tensors:
        step()
    return (tensors.peak - tensors.before) / 1e6

def cost_rows(steps, n_tokens, seconds, device):
    """A row for each candidate, one of which is "frozen" and one "lora"."""
    times = take_turns(steps, device, seconds)
    rows = []
    for name, step in steps.items():
        row = {"method": name, "tokens/s": f"{n_tokens / times[name]:,.0f}"}
        for other in ("frozen", "full", "lora"):
            row[f"of {other}"] = f"{times[name] / times[other]:.2f}"
        row["MB"] = f"{memory(step, device):,.1f}"
        rows.append(row)
    return rows

def autocast(args):
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)

def maybe_compiled(network, args):
    return torch.compile(network) if args.compile else network

# ---- One layer -----------------------------------------------------------------------------------
class MergedLoRA(torch.autograd.Function):
    """LoRA in one product, as FastMoRALinear, to see what is due to that and what to the method."""
    @staticmethod
    def forward(ctx, x, A, B, scaling, W0, bias):
        y = F.linear(x, torch.addmm(W0, B, A, alpha=scaling), bias)
        ctx.save_for_backward(x.to(y.dtype), A, B, W0)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, g):
        x, A, B, W0 = ctx.saved_tensors
        merged = torch.addmm(W0, B, A, alpha=ctx.scaling)
        grad_A = (g @ B.to(g.dtype)).T @ x * ctx.scaling
        grad_B = g.T @ (x @ A.to(g.dtype).T) * ctx.scaling
        return g @ merged.to(g.dtype), grad_A, grad_B, None, None, None

class MergedLoRALinear(mora.LoRALinear):
    def forward(self, x):
        frozen = self.linear.weight, self.linear.bias
        return MergedLoRA.apply(x, self.A, self.B, self.scaling, *frozen)

def make_layers(k, d, rank, device):
    torch.manual_seed(0)
    linear = functools.partial(nn.Linear, k, d, device=device)
    layers = {"frozen": linear().requires_grad_(False), "full": linear()}
    layers["lora"] = mora.LoRALinear(linear(), rank)
    layers["dora"] = mora.DoRALinear(linear(), rank)
    for operator in OPERATORS:
        layers[f"mora {operator}"] = mora.FastMoRALinear(linear(), rank, operator)
    layers["lora, one product"] = MergedLoRALinear(linear(), rank)
    for operator in ("sharing", "rotation"):
        layers[f"mora {operator}, as defined"] = mora.MoRALinear(linear(), rank, operator)
    for layer in layers.values():  # B and M start at zero
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return layers

def bench_errors(args):
    """The largest relative error of outputs, merged outputs and gradients, against float64."""
    k, d = (48, 36) if args.quick else (768, 2304)
    x = torch.randn(2 * max(k, d), k, dtype=torch.float64)
    g = torch.randn(2 * max(k, d), d, dtype=torch.float64)
    rows = []
    for name, layer in make_layers(k, d, 8, args.device).items():
        exact = copy.deepcopy(layer).to("cpu", torch.float64)
        if isinstance(exact, mora.FastMoRALinear):
            exact.__class__ = mora.MoRALinear  # as defined
        expected = outputs_and_gradients(exact, exact, x, g)
        row = {"relative error": name}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.compiler.reset()
            network = maybe_compiled(layer, args)
            on_device = x.to(args.device, torch.float32), g.to(args.device, torch.float32)
            with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
                found = outputs_and_gradients(network, layer, *on_device)
            errors = []
            for a, b in zip(found, expected):
                errors.append(((a.cpu().double() - b).norm() / b.norm()).item())
            row[str(dtype)] = f"{max(errors):.1e}"
        rows.append(row)
    print(markdown(rows))

def outputs_and_gradients(network, layer, x, g):
    x = x.clone().requires_grad_()
    y = network(x)
    merged = layer.merge() if isinstance(layer, mora.Adapter) else layer
    trainable = [p for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y, [x, *trainable], g.to(y.dtype))
    return [y.detach(), merged(x).detach(), *gradients]

def bench_layers(args):
    """Forward and backward: time as a multiple of the frozen layer's, MB as in `memory`, and FLOPs
    beyond the frozen layer's, per token and parameter of LoRA."""
    shapes = [(768, 768), (3072, 768), (768, 2304), (768, 3072)]
    if args.device.type == "cuda":
        shapes += [(4096, 4096), (4096, 11008), (11008, 4096)]
    cases = {f"{k} to {d}, r {rank}": (k, d, rank) for rank in (8, 128) for k, d in shapes}
    if args.quick:
        cases = dict(list(cases.items())[:2])
    rows = []
    for case, sizes in cases.items():
        if args.only in case:
            rows += [row | {"case": case} for row in layer_rows(*sizes, args)]
    for figure in ("of frozen", "MB", "more FLOPs"):
        print(f"{figure}\n\n" + markdown(across(rows, "case", figure)) + "\n")

def layer_rows(k, d, rank, args):
    n_tokens = 32768 if args.device.type == "cuda" else 4096
    x = torch.randn(n_tokens, k, device=args.device, requires_grad=True)
    g = torch.randn(n_tokens, d, device=args.device).to(args.dtype)

    def make_step(network):
        def step():
            with autocast(args):
                y = network(x)
            y.backward(g)
            for tensor in (x, *network.parameters()):
                tensor.grad = None
        return step

    layers = make_layers(k, d, rank, args.device)
    torch.compiler.reset()
    steps = {name: make_step(maybe_compiled(layer, args)) for name, layer in layers.items()}
    rows = cost_rows(steps, n_tokens, 2 if args.quick else 8, args.device)
    flops = []
    for row, layer in zip(rows, layers.values()):
        with FlopCounterMode(display=False) as counter:
            make_step(layer)()
        flops.append(counter.get_total_flops())  # the first layer is the frozen one
        row["more FLOPs"] = f"{(flops[-1] - flops[0]) / (n_tokens * rank * (k + d)):.1f}"
    return rows

# ---- Training steps ------------------------------------------------------------------------------
def make_models(base, task, rank):
    """A model for each method. Frozen is the floor: only the first layer's bias trains, so that the
    gradient passes the whole network, and for c4 what every method trains there."""
    models = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    models["frozen"].h[0].attn.c_attn.bias.requires_grad_(True)
    if task == "c4":
        for module in models["frozen"].modules():
            if isinstance(module, (nn.Embedding, nn.LayerNorm)):
                module.requires_grad_(True)
    for name in METHODS:
        init = "scratch" if task == "c4" else "gpt2"
        models[name] = adapted(copy.deepcopy(base), name, rank, init)
    return models

def adapted(base, name, rank, init, no_fast=False):
    method, _, operator = name.partition(" ")
    config = train.settings(method=method, rank=rank, operator=operator or None, init=init)
    config.no_fast = no_fast
    return train.adapt(base, config)

def bench_steps(args):
    """Forward, backward, clipping and AdamW, as in train.py. The state is what stays from step to
    step: weights, and what AdamW remembers."""
    cases = {"demo uuid": (32, 2), "demo c4": (32, 4), "gpt2 uuid": (16, 8)}
    if args.device.type == "cuda":
        cases |= {"gpt2 uuid": (1000, 8), "gpt2 c4": (32, 8), "gpt2-large c4": (1, 8)}
    for case, (batch_size, rank) in cases.items():
        if args.only in case and not (args.quick and "gpt2" in case):
            print(f"{case}, {batch_size} sequences\n")
            print(markdown(step_rows(*case.split(), batch_size, rank, args)) + "\n", flush=True)

def step_rows(preset, task, batch_size, rank, args):
    torch.manual_seed(0)
    base = GPT(GPTConfig(**PRESETS[preset])).to(args.device)
    length = 2 * data.UUID_LENGTH if task == "uuid" else base.config.block_size
    idx = torch.randint(base.config.vocab_size, (batch_size, length), device=args.device)
    targets = idx[:, -data.UUID_LENGTH :] if task == "uuid" else idx
    models = make_models(base, task, rank)
    torch.compiler.reset()
    steps = {}
    for name, model in models.items():
        optimizer = make_optimizer(model, args.device)
        network = maybe_compiled(train.Loss(model), args)
        steps[name] = make_step(network, optimizer, idx, targets, args)
    rows = cost_rows(steps, idx.numel(), 6 if args.quick else 60, args.device)
    for row, model in zip(rows, models.values()):
        n_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        n_bytes += sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)
        row["MB of state"] = f"{n_bytes / 1e6:,.1f}"
    return rows

def make_optimizer(model, device):
    config = train.settings(method="mora", device=str(device), learning_rate=0.0)
    return train.make_optimizer(model, config)

def make_step(network, optimizer, idx, targets, args):
    trainable = [p for p in network.parameters() if p.requires_grad]

    def step():
        with autocast(args):
            loss = network(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step

# ---- Memory --------------------------------------------------------------------------------------
def bench_memory(args):
    """The peak of a training step without torch.compile, which saves memory, and the batches that
    fit, on a straight line through --batch and twice as many: a GB is left for CUDA and gaps."""
    print(f"{args.preset}, r {args.rank}, {args.batch} x {args.length} tokens\n")
    rows = []
    for name in [*METHODS, "dora"]:
        if args.only in name:
            flops, peak, *_ = step_memory(name, args.batch, args)
            more = (step_memory(name, 2 * args.batch, args)[1] - peak) / args.batch
            row = {"method": name, "TFLOP": f"{flops / 1e12:.2f}", "GB": f"{peak / 1e9:.2f}"}
            for card in (16, 24, 80):
                n = args.batch + int((1e9 * (card - 1) - peak) // more)
                row[f"batch in {card} GB"] = str(max(n, 0))
            if args.real:  # in a process of its own, whose peak is this step's
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, spawn, controls.add) as process:
                    _, *real = process.submit(step_memory, name, args.batch, args, False).result()
                row["GB, real tensors"], row["GB, real device"] = (
                    f"{x / 1e9:.2f}" for x in real[:2])
                row["ms"] = f"{real[2]:.1f}"
            rows.append(row)
    print(markdown(rows))

def step_memory(name, batch, args, fake=True):
    """A step's FLOPs, the peak of its tensors, and that as CUDA counts it, compiled if that is asked
    for, or as the process grows. Fake tensors have shapes and no numbers: they need no GPU."""
    device = torch.device("cpu") if fake else args.device
    args = argparse.Namespace(**vars(args) | {"device": device})
    with FakeTensorMode() if fake else contextlib.nullcontext():
        with device:
            base = GPT(GPTConfig(**PRESETS[args.preset]))
            idx = torch.zeros(batch, args.length, dtype=torch.long)
        # On a CPU as on a GPU without torch.compile: as defined
        model = adapted(base, name, args.rank, "gpt2", no_fast=device.type == "cpu")
        optimizer = make_optimizer(model, "cuda")  # as there, in one kernel
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # so that it has its state
        optimizer.zero_grad()
        step = make_step(train.Loss(model), optimizer, idx, idx, args)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on Linux
        with Memory() as tensors, FlopCounterMode(display=False) as flops:
            step()
        more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if device.type == "cuda":
            step = make_step(maybe_compiled(train.Loss(model), args), optimizer, idx, idx, args)
            step()  # compiles, and does not count
            more = 1e6 * memory(step, device)
        ms = 0.0 if fake else 1e3 * take_turns({name: step}, device, 2)[name]
    return flops.get_total_flops(), tensors.peak, tensors.before + more, ms

def bench_merge(args):
    base = GPT(GPTConfig(**PRESETS["demo" if args.quick else "gpt2"])).to(args.device)
    models = make_models(base, "uuid", 8)
    del models["frozen"], models["full"]
    calls = {name: lambda model=model: mora.merge_and_reset(model) for name, model in models.items()}
    for name, seconds in take_turns(calls, args.device, 3).items():
        print(f"merge_and_reset of {name}: {seconds:.3f} s")

SECTIONS = dict(errors=bench_errors, layers=bench_layers, steps=bench_steps, merge=bench_merge,
                memory=bench_memory)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("sections", nargs="*", help=f"among {', '.join(SECTIONS)} (all)")
    add("--quick", action="store_true", help="fewer shapes and repeats: two minutes")
    add("--only", default="", help='layers and steps with this in their name, as "gpt2 c4"')
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="(float32; on CUDA what train.py takes)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(on CUDA)")
    add("--preset", default="gpt2", choices=PRESETS, help="of memory (gpt2)")
    add("--batch", type=int, default=8, help="of memory, in sequences (8)")
    add("--length", type=int, default=1024, help="of these, in tokens (1024)")
    add("--rank", type=int, default=8, help="of memory (8)")
    add("--real", action="store_true", help="memory: take such a step, too, and compare")
    args = parser.parse_args(argv)
    controls.add()
    train.choose_device(args)  # and say what they are
    args.device, args.dtype = torch.device(args.device), getattr(torch, args.dtype)
    for section in args.sections or SECTIONS:
        print(f"\n{section}\n")
        SECTIONS[section](args)

if __name__ == "__main__":
    main()
