"""Finds functions in sources, and grades exercises: calls their tests on given sources, and says what is wrong.

`outcomes` does so in this process, and `grade` in another one, which may hang or crash. exercise.py has the commands.
"""

import ast
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
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("mora.py", "data.py", "train.py", "tests/compare.py", "tests/measure.py")
GRADERS = ("tests/test_linear_maps.py", "tests/test_exercises.py")
LIMIT, START = 60, 300  # seconds that a test may take, and the import of torch before the first one
METHOD = "spawn"  # how the other process begins


# ---- Functions in a source -------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=50)
def functions(source):
    """{"function" or "Class.method": its text, with decorators}; found by indentation where the source is no Python."""
    lines, found, owner = source.split("\n"), {}, ""
    with contextlib.suppress(SyntaxError, ValueError):
        tree = ast.parse(source).body
        owners = [("", tree), *((f"{node.name}.", node.body) for node in tree if isinstance(node, ast.ClassDef))]
        return {prefix + node.name: "\n".join(lines[(node.decorator_list or [node])[0].lineno - 1:node.end_lineno])
                for prefix, body in owners for node in body if isinstance(node, ast.FunctionDef)}
    for i, line in enumerate(lines):
        if line[:1].strip() and line[0] not in "#)":
            owner = f"{match[1]}." if (match := re.match(r"class (\w+)", line)) else ""
        if match := re.match(r"(    )?def (\w+)", line):
            indent, start, end = match[1] or "", i, i + 1
            while lines[start - 1].startswith(f"{indent}@"):
                start -= 1
            while end < len(lines) and re.match(rf"\s*(#|\)|$)|{indent} ", lines[end]):
                end += 1
            while not lines[end - 1].strip() or re.match(rf"(?!{indent} )\s*#", lines[end - 1]):
                end -= 1  # what stands before the next function is not this one's
            if bool(owner) == bool(indent):  # else a function in a function
                found[owner + match[2]] = "\n".join(lines[start:end])
    return found


def stub(text, number, name):
    """A function's text with its signature and docstring, and nothing else in its body but a NotImplementedError."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
    end = next((i + 1 for i in range(first, len(lines)) if re.search(r":\s*(#.*)?$", lines[i])), first + 1)
    if docstring := re.match(r'\s*"""(.|\n)*?"""', "\n".join(lines[end:])):
        end += docstring[0].count("\n") + 1
    indent = " " * (len(lines[first]) - len(lines[first].lstrip()) + 4)
    error = f'{indent}raise NotImplementedError("exercise {number}: write {name}, as EXERCISES.md says")'
    return "\n".join([*lines[:end], error])


def swap(source, texts):
    """The source with other texts of some functions. What it has not, or more than once, stays."""
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


# ---- Grading ---------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=200)
def compiled(file, source):
    """Code under a name of its own, by which a traceback finds the source that was graded."""
    name = f"graded/{file}/{hash(source)}"
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    return compile(source, name, "exec")


def load(sources, root=ROOT):
    """The graders as modules, over modules of these {file: source}. What is missing is read from the project."""
    names = [Path(file).stem for file in (*FILES, *GRADERS)]
    before, path = {name: sys.modules[name] for name in names if name in sys.modules}, list(sys.path)
    try:
        for file, name in zip((*FILES, *GRADERS), names):
            module = sys.modules[name] = types.ModuleType(name)
            module.__file__ = str(root / file)
            source = sources[file] if file in sources else (root / file).read_text(encoding="utf-8")
            exec(compiled(file, source), vars(module))
        return [sys.modules[name] for name in names[len(FILES):]]
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        sys.path[:] = path


def tests_of(number, graders):
    """[(name, call), ...] of the tests that carry an exercise's mark; of parametrized ones, each row that does."""
    functions, tests = [], []
    for name, each in itertools.chain(*(vars(module).items() for module in graders)):
        marks = vars(each).get("pytestmark", []) if name.startswith(("test_", "Test")) else []
        if name.startswith("test_"):
            functions.append((name.removeprefix("test_"), each, marks))
        elif name.startswith("Test"):
            functions += [(f"{name[4:]}: {method[5:]}", getattr(each(), method),
                           marks + getattr(test, "pytestmark", []))
                          for method, test in vars(each).items() if method.startswith("test_")]
    for name, function, marks in functions:
        rows = [({}, {mark.name for mark in marks})]
        for names, values in (mark.args for mark in marks if mark.name == "parametrize"):
            names = re.split(r", *", names)
            values = [(value.values, value.marks) if hasattr(value, "marks") else
                      (value if len(names) > 1 else [value], []) for value in values]
            rows = [(chosen | dict(zip(names, value)), known | {mark.name for mark in more})
                    for (chosen, known), (value, more) in itertools.product(rows, values)]
        tests += [(", ".join([name.replace("_", " "), *(str(value) for value in chosen.values() if value != "")]),
                   functools.partial(function, **chosen)) for chosen, known in rows if f"ex{number}" in known]
    return tests


def fault(call):
    """What a test raises, called as pytest would; None if it passes."""
    import torch  # here, as most commands do not need it
    torch.default_generator.manual_seed(0)
    try:
        call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error


def outcomes(number, sources, root=ROOT):
    """[(test, function that says what it raises, or None), ...] of an exercise."""
    def fail(error):
        raise error

    try:
        tests = tests_of(number, load(sources, root))
    except Exception as error:  # of the sources, as they are loaded
        tests = [("the code loads", functools.partial(fail, error))]
    return [(name, functools.partial(fault, call)) for name, call in tests]


def describe(error):
    """The grader's own sentence, or the exception and the line of the student's code."""
    text = next(iter(str(error).splitlines()), "no reason given")
    if isinstance(error, NotImplementedError):
        return text
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith("graded/") and not any(file in frame.filename for file in GRADERS)]
    return f"{text} (in {frames[-1].name}: {frames[-1].line})" if frames else text


def work(connection, jobs, root):
    """Of each (number, sources), send the names of the tests, and then what is wrong with each."""
    import torch
    torch.set_num_threads(1)  # all is small, and threads would wait for each other
    sys.path[:0] = [str(root), str(root / "tests")]
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for number, sources in jobs:
            tests = outcomes(number, sources, root)
            connection.send([name for name, _ in tests])
            for _, find_fault in tests:
                error = find_fault()
                connection.send(describe(error) if error else "")


def receive(connection, limit):
    if not connection.poll(limit):
        raise TimeoutError(f"it takes more than {limit} seconds")
    return connection.recv()


def grade(jobs, root=ROOT):
    """{number: [(test, what is wrong or ""), ...]} of [(number, sources), ...], in another process."""
    results, jobs, context = {}, list(jobs), multiprocessing.get_context(METHOD)
    while jobs:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, jobs, root), daemon=True)
        process.start()
        sender.close()
        try:
            while jobs:
                names, done = ["the code loads"], []
                names = receive(receiver, START)
                while len(done) < len(names):
                    done.append(receive(receiver, LIMIT))
                results[jobs.pop(0)[0]] = list(zip(names, done))
        except (EOFError, TimeoutError) as error:
            wrong = str(error) or "it ends the program"
            results[jobs.pop(0)[0]] = list(zip(names, [*done, wrong] + ["not run"] * len(names)))
        finally:
            process.kill()
            process.join()
    return results
