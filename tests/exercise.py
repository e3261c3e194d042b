"""The exercises of EXERCISES.md: take the body out of an exercise's functions, and put the solution back.

    python tests/exercise.py                    the exercises, and what stands in the code
    python tests/exercise.py 5                  take exercise 5 out; several numbers are fine
    python tests/exercise.py --solution 5       put its solution back
    python -m pytest -m ex5                     grade it

An exercise is the functions whose `def` line ends in the comment "# exercise 5". While it is out, tests/kept/ has its
solution; tests/kept/own/ has whatever of your own a command has replaced.
"""

import argparse
import ast
import itertools
import os
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("mora.py", "model.py", "data.py", "train.py")
IN_PLACE, OUT, OWN = "solution in place", "taken out", "own code"


class Wrong(Exception):
    """What the user is told in one line."""


def functions(source):
    """{"function" or "Class.method": its text, with decorators}"""
    lines, tree = source.split("\n"), ast.parse(source).body
    owners = [("", tree), *((f"{node.name}.", node.body) for node in tree if isinstance(node, ast.ClassDef))]
    return {prefix + node.name: "\n".join(lines[(node.decorator_list or [node])[0].lineno - 1:node.end_lineno])
            for prefix, body in owners for node in body if isinstance(node, ast.FunctionDef)}


def stub(text, number, name):
    """A function's text with its signature and docstring, and nothing else in its body but a NotImplementedError."""
    node = ast.parse(textwrap.dedent(text)).body[0]
    head = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    error = f'{indent}raise NotImplementedError("exercise {number}: write {name}, as EXERCISES.md says")'
    return "\n".join([*text.split("\n")[:head], error])


class Part:
    """One function of an exercise: where it is, its text there, and its solution."""

    def __init__(self, number, path, name, text):
        self.path, self.name, self.text = path, name, text
        self.kept = path.parent / "tests" / "kept" / f"{number}-{path.stem}-{name}.py"
        self.solution = read(self.kept) if self.kept.exists() else text
        self.stub = stub(self.solution, number, name)
        self.state = OUT if text == self.stub else IN_PLACE if text == self.solution else OWN

    def take_out(self):
        if self.state == IN_PLACE:
            write(self.kept, self.text)
        self.put(self.stub)

    def put_back(self):
        if self.solution == self.stub:
            raise Wrong(f"the solution of {self.name} is neither in {self.path.name} nor at {self.kept}: get "
                        f"{self.path.name} from the project again")
        self.put(self.solution)
        self.kept.unlink(missing_ok=True)

    def put(self, text):
        """Let `text` stand in the function's place; code of the user's own is kept before."""
        source = read(self.path)
        if source.count(self.text) > 1:
            raise Wrong(f"the text of {self.name} stands in {self.path.name} more than once: remove the other")
        if self.state == OWN:
            paths = (self.kept.parent / "own" / f"{self.kept.stem}.{i}.py" for i in itertools.count(1))
            own = next(path for path in paths if not path.exists())
            write(own, self.text)
            print(f"your {self.name} is kept in {own}")
        write(self.path, source.replace(self.text, text))


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Wrong(f"{path} cannot be read: {error}") from None


def write(path, text):
    """Write a file with the line ends that it had, under a temporary name first, so that it is never half a file."""
    newline = "\r\n" if path.exists() and b"\r\n" in path.read_bytes() else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline=newline)
    os.replace(temporary, path)


def find_exercises(root=ROOT):
    """({number: title}, {number: parts}): titles from EXERCISES.md, parts from the comments in the sources."""
    headings = re.findall(r"(?m)^### (\d+)\. (.+)$", read(root / "tests" / "EXERCISES.md"))
    titles = {int(number): title for number, title in headings}
    parts = {number: [] for number in titles}
    for path in (root / name for name in FILES):
        try:
            found = functions(read(path))
        except SyntaxError as error:
            raise Wrong(f"{path}:{error.lineno}: {error.msg}: correct this line first") from None
        kept = {file.stem.split("-")[2]: file for file in (root / "tests" / "kept").glob(f"*-{path.stem}-*.py")}
        for name in kept.keys() - found.keys():
            raise Wrong(f"{path} has no {name} any more: write its def line again, or copy all of it from {kept[name]}")
        for name, text in found.items():
            mark = re.search(r"(?m)^ *def .*# exercise (\d+)$", text)
            number = int(mark[1] if mark else kept[name].stem.split("-")[0] if name in kept else 0)
            if number in parts:
                parts[number].append(Part(number, path, name, text))
    return titles, parts


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"exercise.py: error: {message}\n")
    parser.add_argument("--solution", action="store_true", help="put the solution back")
    parser.add_argument("number", nargs="*", type=int, help="of an exercise")
    args = parser.parse_args(argv)
    try:
        titles, parts = find_exercises(root)
        if args.solution and not args.number:
            raise Wrong("--solution needs the number of an exercise")
        for number in args.number:
            if number not in titles:
                raise Wrong(f"there is no exercise {number}: they are {min(titles)} to {max(titles)}")
            if not parts[number]:
                raise Wrong(f"exercise {number} has nothing to take out: EXERCISES.md says what to write, and where")
        for number in dict.fromkeys(args.number):
            for part in parts[number]:
                part.put_back() if args.solution else part.take_out()
            done = IN_PLACE if args.solution else f"{OUT}; python -m pytest -m ex{number} grades what you write"
            print(f"exercise {number}, {titles[number]}: {done}")
        for number, title in titles.items() if not args.number else ():
            states = {part.state for part in parts[number]}
            print(f"{number:2}  {title:34}", next((s for s in (OWN, OUT, IN_PLACE) if s in states), "yours to begin"))
    except (Wrong, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
