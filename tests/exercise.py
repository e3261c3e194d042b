"""The exercises of EXERCISES.md: take the body out of an exercise's functions, and put the solution back.

    python tests/exercise.py                    the exercises, and what stands in the code
    python tests/exercise.py 5                  take exercise 5 out; several numbers are fine
    python tests/exercise.py --solution 5       put its solution back
    python -m pytest -m ex5                     grade it

An exercise is the functions whose `def` line ends in the comment "# exercise 5". tests/kept/ has the solutions that are
out, and under names with a number at the end whatever of your own a command has replaced.
"""

import argparse
import ast
import itertools
import os
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("mora.py", "model.py", "data.py", "train.py")
IN_PLACE, OUT, OWN = "solution in place", "taken out", "own code"


class Wrong(Exception):
    """What the user is told in one line."""


def functions(source):
    """{"Class.method" or "function": its lines in `source`, decorators included, as a slice}, from top to bottom."""
    def span(node):
        return slice(min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1, node.end_lineno)

    tree = ast.parse(source).body
    owners = [("", tree), *((f"{node.name}.", node.body) for node in tree if isinstance(node, ast.ClassDef))]
    return {prefix + node.name: span(node) for prefix, body in owners for node in body
            if isinstance(node, ast.FunctionDef)}


def stub(text, number, name):
    """A function's text with its signature and docstring, and nothing in its body but a NotImplementedError."""
    node = ast.parse(textwrap.dedent(text)).body[0]
    head = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    error = f'{indent}raise NotImplementedError("exercise {number}: write {name}, as EXERCISES.md says")'
    return "\n".join([*text.split("\n")[:head], error])


class Part:
    """One function of an exercise, where it stands now, and the solution: what stands there, or what was kept of it."""

    def __init__(self, number, path, name):
        self.number, self.path, self.name = number, path, name
        self.kept = ROOT / "tests" / "kept" / f"{number}-{path.stem}-{name}.py"
        self.text = "\n".join(self.lines()[self.span()])
        self.solution = self.kept.read_text(encoding="utf-8") if self.kept.exists() else self.text
        self.stub = stub(self.solution, number, name)
        self.state = OUT if self.text == self.stub else IN_PLACE if self.text == self.solution else OWN

    def lines(self):
        return read(self.path).split("\n")

    def span(self):
        found = functions(read(self.path)).get(self.name)
        if found is None:
            raise Wrong(f"{self.path.name} has no {self.name} any more: write its def line again, or copy the function "
                        f"from {self.kept.relative_to(ROOT)}")
        return found

    def put(self, text):
        """Write `text` in the function's place; code of the user's own is kept first."""
        if self.state == OWN:
            names = (self.kept.with_suffix(f".{i}.py") for i in itertools.count(1))
            own = next(name for name in names if not name.exists())
            write(own, self.text)
            print(f"your {self.name} is kept in {own.relative_to(ROOT)}")
        lines = self.lines()
        lines[self.span()] = text.split("\n")
        write(self.path, "\n".join(lines))

    def take_out(self):
        if self.state == IN_PLACE:
            write(self.kept, self.text)
        self.put(self.stub)

    def put_back(self):
        if self.solution == self.stub:
            raise Wrong(f"the solution of {self.name} is neither in {self.path.name} nor in "
                        f"{self.kept.relative_to(ROOT)}: get {self.path.name} from the project again")
        self.put(self.solution)
        self.kept.unlink(missing_ok=True)


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Wrong(f"{path} cannot be read: {error.strerror}") from None


def write(path, text):
    """Write a file under a temporary name first, so that nothing is lost, and with the line ends that it has."""
    newline = "\r\n" if path.exists() and b"\r\n" in path.read_bytes() else "\n"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline=newline)
    os.replace(temporary, path)


def find_exercises():
    """({number: title}, {number: parts}): the titles from EXERCISES.md, the parts from the comments in the sources."""
    titles = {int(number): title for number, title in re.findall(r"(?m)^### (\d+)\. (.+)$", read(ROOT / "EXERCISES.md"))}
    parts = {number: [] for number in titles}
    for path in (ROOT / name for name in FILES):
        source = read(path)
        try:
            spans = functions(source)
        except SyntaxError as error:
            raise Wrong(f"{path.name}:{error.lineno}: {error.msg}: correct this line first") from None
        kept = {file.stem.split("-")[2]: int(file.stem.split("-")[0])
                for file in (ROOT / "tests" / "kept").glob(f"*-{path.stem}-*.py") if not file.stem[-1].isdigit()}
        for name, span in spans.items():
            mark = re.search(r"(?m)^ *def .*# exercise (\d+)$", "\n".join(source.split("\n")[span]))
            number = int(mark[1]) if mark else kept.get(name)
            if number in parts:
                parts[number].append(Part(number, path, name))
        for name in kept.keys() - spans.keys():
            Part(kept[name], path, name)  # says that it is missing
    return titles, parts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"exercise.py: error: {message}\n")
    parser.add_argument("--solution", action="store_true", help="put the solution back")
    parser.add_argument("number", nargs="*", type=int, help="of an exercise")
    args = parser.parse_args(argv)
    try:
        titles, parts = find_exercises()
        if args.solution and not args.number:
            raise Wrong("--solution needs the number of an exercise")
        for number in args.number:
            if number not in titles:
                raise Wrong(f"there is no exercise {number}: they are {min(titles)} to {max(titles)}")
            if not parts[number]:
                raise Wrong(f"exercise {number} has nothing to take out: EXERCISES.md says what to write, and where")
        for number in args.number:
            for part in parts[number]:
                part.put_back() if args.solution else part.take_out()
            done = "its solution is in place" if args.solution else f"grade your code by python -m pytest -m ex{number}"
            print(f"exercise {number}, {titles[number]}: {done}")
        for number, title in titles.items() if not args.number else ():
            states = {part.state for part in parts[number]}
            state = next((state for state in (OWN, OUT, IN_PLACE) if state in states), "yours to begin")
            print(f"{number:2}  {title:34}  {state}")
    except (Wrong, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
