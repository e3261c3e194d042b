"""Finds functions in sources, and runs an exercise's graders over given sources: `outcomes` in this
process, `grade` in another one, which may hang or crash. The commands are in exercise.py.
"""

import contextlib
import functools
import itertools
import linecache
import multiprocessing
import os
import re
import sys
import textwrap
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/exercises/"
FILES = ("mora.py", "data.py", "train.py", "tests/experiments/compare.py", HERE + "measure.py")
GRADERS = (HERE + "checks.py", HERE + "test_maps.py", HERE + "test_exercises.py")
LIMIT, START = 60, 300  # seconds that a test may take, and the import of torch before the first
METHOD = "spawn"  # how the other process begins

# ---- Functions in a source -----------------------------------------------------------------------
@functools.lru_cache(maxsize=50)
def functions(source):
    """{"function" or "Class.method": its text, with decorators}. They are found by indentation, so
    that a syntax error in one function does not hide the others."""
    lines, found, owner = source.split("\n"), {}, ""
    for i, line in enumerate(lines):
        if line[:1].strip() and line[0] not in "#)":
            owner = f"{match[1]}." if (match := re.match(r"class (\w+)", line)) else ""
        match = re.match(r"(    )?def (\w+)", line)
        if not match or bool(owner) != bool(match[1]):  # a function in a function is not meant
            continue
        indent, start, end = match[1] or "", i, i + 1
        while lines[start - 1].startswith(f"{indent}@"):
            start -= 1
        while end < len(lines) and re.match(rf"\s*(#|\)|$)|{indent} ", lines[end]):
            end += 1
        while not lines[end - 1].strip() or re.match(rf"(?!{indent} )\s*#", lines[end - 1]):
            end -= 1  # blank lines and comments before the next function
        found[owner + match[2]] = "\n".join(lines[start:end])
    return found

def stub(text, number, name):
    """The function's signature and docstring, with a NotImplementedError as its only statement."""
    lines = text.split("\n")
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    ends = (i + 1 for i in range(first, len(lines)) if re.search(r":\s*(#.*)?$", lines[i]))
    end = next(ends, first + 1)
    if docstring := re.match(r'\s*"""(.|\n)*?"""', "\n".join(lines[end:])):
        end += docstring[0].count("\n") + 1
    indent = re.match(r" *", lines[first])[0] + "    "
    error = f'"exercise {number}: write {name}, as {HERE}README.md says"'
    return "\n".join([*lines[:end], f"{indent}raise NotImplementedError({error})"])

def swap(source, texts):
    """The source with other texts of some of its functions."""
    found = functions(source)
    for name, text in texts.items():
        if name in found and source.count(found[name]) == 1:
            source = source.replace(found[name], text)
    return source

def is_python(text):
    try:
        return bool(compile(textwrap.dedent(text), "", "exec"))
    except (SyntaxError, ValueError):
        return False

# ---- Grading -------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=200)
def compiled(file, source):
    """Code under a name by which a traceback finds the source that was graded."""
    name = f"graded/{file}/{hash(source)}"
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    return compile(source, name, "exec")

def load(sources, root=ROOT):
    """The graders as modules that import these {file: source}. Other files are the project's."""
    files = {Path(file).stem: file for file in FILES + GRADERS}
    before, path = {name: sys.modules.get(name) for name in files}, list(sys.path)
    try:
        for name, file in files.items():
            module = sys.modules[name] = types.ModuleType(name)
            module.__file__ = str(root / file)
            source = sources[file] if file in sources else (root / file).read_text("utf-8")
            exec(compiled(file, source), vars(module))
        return [sys.modules[Path(file).stem] for file in GRADERS]
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module
        sys.path[:] = path

def tests_of(number, graders):
    """[(kind, name, call), ...] of the tests with an exercise's mark, one for each parameter."""
    functions, tests = [], []
    for name, each in itertools.chain(*(vars(module).items() for module in graders)):
        if name.startswith("test_"):
            functions.append((name[5:], each))
        elif name.startswith("Test"):
            methods = [(method[5:], getattr(each(), method)) for method in vars(each)
                       if method.startswith("test_")]
            functions += [(f"{name[4:]}: {method}", call) for method, call in methods]
    for name, function in functions:
        owner = getattr(function, "__self__", None)
        marks = getattr(owner, "pytestmark", []) + getattr(function, "pytestmark", [])
        rows = [({}, {mark.name for mark in marks})]
        for names, values in (mark.args for mark in marks if mark.name == "parametrize"):
            names, wider = re.split(r", *", names), []
            for (chosen, known), value in itertools.product(rows, values):
                more = {mark.name for mark in getattr(value, "marks", ())}
                value = getattr(value, "values", value if len(names) > 1 else [value])
                wider.append((chosen | dict(zip(names, value)), known | more))
            rows = wider
        for chosen, known in rows:
            if f"ex{number}" in known:
                values = list(map(str, chosen.values()))
                values = [value for value in values if re.match(r"\w+ ", value)] or values
                title = ", ".join([name.replace("_", " "), *values])
                kind = next((kind for kind in ("detail", "owed") if kind in known), "subject")
                tests.append((kind, title, functools.partial(function, **chosen)))
    return tests

def fault(call):
    """What a test raises, or None if it passes."""
    import torch  # here, as most commands do not need it
    torch.default_generator.manual_seed(0)
    try:
        call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error

def outcomes(number, sources, root=ROOT):
    """[(kind, test, function that returns what it raises, or None), ...] of an exercise."""
    try:
        tests = tests_of(number, load(sources, root))
    except Exception as error:  # the sources cannot be imported
        return [("subject", "the code loads", lambda error=error: error)]
    if not tests:  # there is one for each operator of exercise 24
        error = AssertionError("OPERATORS has no class yet that is not one of the paper's four")
        return [("subject", "there is an operator of your own", lambda: error)]
    return [(kind, name, functools.partial(fault, call)) for kind, name, call in tests]

def share(tests):
    """What [(kind, test, what is wrong or ""), ...] earn, as a share of an exercise's points."""
    passed = {}
    for kind in ("subject", "detail", "owed"):
        results = [not wrong for other, _, wrong in tests if other == kind]
        passed[kind] = sum(results) / len(results) if results else 1.0
    if passed["subject"] < 1:
        return 0.3 * passed["subject"]
    return 0.5 + 0.25 * passed["detail"] + 0.25 * passed["owed"]

def describe(error):
    """The grader's own sentence, or the exception and the line of the student's code."""
    text = next(iter(str(error).splitlines()), "no reason given")
    if isinstance(error, NotImplementedError):
        return text
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if re.match(r"graded/(?!.*/(test_|checks))", frame.filename)]
    return f"{text} (in {frames[-1].name}: {frames[-1].line})" if frames else text

def work(connection, jobs, root):
    """Of each (number, sources), send the tests' kinds and names, then what is wrong with each."""
    import torch
    torch.set_num_threads(1)
    folders = ("", "tests", "tests/exercises", "tests/experiments")  # as in pytest.ini
    sys.path[:0] = [str(root / folder) for folder in folders]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for number, sources in jobs:
            tests = outcomes(number, sources, root)
            connection.send([(kind, name) for kind, name, _ in tests])
            for _, _, find_fault in tests:
                error = find_fault()
                connection.send(describe(error) if error else "")

def grade(jobs, root=ROOT):
    """{number: [(kind, test, what is wrong or ""), ...]} of [(number, sources), ...]."""
    def receive(limit):
        if not receiver.poll(limit):
            raise TimeoutError(f"it takes more than {limit} seconds")
        return receiver.recv()

    results, jobs, context = {}, list(jobs), multiprocessing.get_context(METHOD)
    while jobs:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, jobs, root), daemon=True)
        process.start()
        sender.close()
        try:
            while jobs:
                names, done = [("subject", "the code loads")], []
                names = receive(START)
                while len(done) < len(names):
                    done.append(receive(LIMIT))
                results[jobs.pop(0)[0]] = [(*name, what) for name, what in zip(names, done)]
        except (EOFError, TimeoutError) as error:  # the rest is graded in a new process
            wrong = str(error) or "it ends the program"
            done += [wrong] + ["not run"] * len(names)
            results[jobs.pop(0)[0]] = [(*name, what) for name, what in zip(names, done)]
        finally:
            process.kill()
            process.join()
    return results
