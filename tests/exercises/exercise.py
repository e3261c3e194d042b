"""The exercises of EXERCISES.md: take functions out of the code, grade what you write instead, put the solution back.

    python tests/exercise.py                      the exercises, what stands in the code, and your last marks
    python tests/exercise.py 5                    take exercise 5 out; also 5-8, several numbers, or --all
    python tests/exercise.py --grade 5            grade it; python -m pytest -m ex5 runs the same tests
    python tests/exercise.py --solution 5         put its solution back; your own code is kept
    python tests/exercise.py --own 5              put your own code back
    python tests/exercise.py --diff 5             your own code beside the solution
    python tests/exercise.py --report [DIR]       grade everything here, or in a student's folder; --json for Gradescope
    python tests/exercise.py --student DIR 1-10   a copy to hand out, without solutions
    python tests/exercise.py --hashes             for whoever changes a solution: write solutions.json again

An exercise is the functions whose `def` line ends in "# exercise 5". solutions.json has a hash of every solution, so
that no other code is taken for one. tests/kept/ has the solutions, your own code, and your marks.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import grading
from grading import FILES, ROOT, functions, is_python, stub, swap

HANDED_OUT = ("*.py", "README.md", "LICENSE", "pytest.ini", "requirements.txt", ".gitignore", "assets/*", "tests/*.py",
              "tests/solutions.json", "tests/EXERCISES.md", "tests/RESULTS.md")
FOR_TEACHERS = ("test_graders.py", "test_readme.py")
SOLUTION, OUT, OWN, LOST = "solution", "taken out", "own code", "def line missing"


class Wrong(Exception):
    """What the user is told in one line."""


def summary(states):
    """Of an exercise, what most needs attention in its functions' states."""
    return next((state for state in (LOST, OWN, OUT, SOLUTION) if state in states), "yours to begin")


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- Files -----------------------------------------------------------------------------------------------------------
def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Wrong(f"{path} cannot be read: {error}") from None


def read_json(path):
    try:
        return json.loads(read(path)) if path.exists() else {}
    except ValueError:
        raise Wrong(f"{path} is damaged: delete it") from None


def write(path, text):
    """Write a file with the line ends and the mode that it had, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    newline, temporary = "\n", path.with_name(f"{path.name}.tmp")
    if path.exists():
        newline = "\r\n" if b"\r\n" in path.read_bytes() else "\n"
        if not os.access(path, os.W_OK):
            raise Wrong(f"{path} is read-only")
    temporary.write_text(text, encoding="utf-8", newline=newline)
    if path.exists():
        shutil.copymode(path, temporary)
    os.replace(temporary, path)


# ---- A project and its exercises -------------------------------------------------------------------------------------
class Part:
    """One function of an exercise. `text` is what stands in the code, None where its def line is missing."""

    def __init__(self, project, number, file, name, text, hashed):
        self.project, self.number, self.file, self.name, self.text = project, number, file, name, text
        self.key, self.hashed = f"{file} {name}", hashed
        self.state = (LOST if text is None else SOLUTION if digest(text) == hashed else
                      OUT if text == stub(text, number, name) else OWN)
        self.kept = project.folder / "own" / f"{number}-{Path(file).stem}-{name}"

    @functools.cached_property
    def solution(self):
        """The text that has the solution's hash, from the code, tests/kept, or git's last commit; or None."""
        texts = [self.text, self.project.kept.get(self.key)]
        if self.hashed not in [digest(text) for text in texts if text]:
            with contextlib.suppress(OSError):
                git = subprocess.run(["git", "show", f"HEAD:./{self.file}"], cwd=self.project.root, capture_output=True)
                texts.append(functions(git.stdout.decode("utf-8", "replace").replace("\r\n", "\n")).get(self.name))
        return next((text for text in texts if text and digest(text) == self.hashed), None)

    @property
    def own(self):
        """The user's own text: what stands in the code, or else what was kept last; or None."""
        kept = {int(path.name.split(".")[-2]): path for path in self.kept.parent.glob(f"{self.kept.name}.*.py")}
        return self.text if self.state == OWN else read(kept[max(kept)]) if kept else None

    def find(self, what):
        """The text of the stub, the solution, or the user's own code."""
        if self.state == LOST:
            raise Wrong(f"{self.file} has no {self.name} any more: write its def line again, or get the file anew")
        if what == "solution" and not self.solution:
            raise Wrong(f"the solution of {self.name} is not here: " + (
                f"get {self.file} from the project again" if self.project.for_teachers else "ask your teacher"))
        stub_text = stub(self.solution or self.text, self.number, self.name)
        return {"stub": stub_text, "solution": self.solution, "own": self.own or self.text}[what]

    def put(self, text):
        """Let `text` stand in the function's place; code of the user's own is kept before."""
        path = self.project.root / self.file
        source = read(path)
        if source.count(self.text) > 1:
            raise Wrong(f"the text of {self.name} stands in {self.file} more than once: remove the other")
        if self.state == OWN and text != self.text:
            paths = (self.kept.with_name(f"{self.kept.name}.{i}.py") for i in itertools.count(1))
            own = next(path for path in paths if not path.exists())
            write(own, self.text)
            print(f"your {self.name} is kept in {own}")
        write(path, source.replace(self.text, text))


class Project:
    """The exercises of a folder: titles, points and minutes from EXERCISES.md, functions from solutions.json."""

    def __init__(self, root):
        self.root, self.folder = root, root / "tests" / "kept"
        heading = r"(?m)^### (\d+)\. (.+) \((\d+) points?, (\d+) minutes\)$"
        self.exercises = {int(number): (title, int(points)) for number, title, points, _ in
                          re.findall(heading, read(root / "tests" / "EXERCISES.md"))}
        self.kept, self.marks = (read_json(self.folder / name) for name in ("solutions.json", "marks.json"))
        self.for_teachers = (root / "tests" / "TEACHER.md").exists()
        self.sources = {file: read(root / file) for file in FILES}
        found = {file: functions(source) for file, source in self.sources.items()}
        hashed = [(*key.split(), *value) for key, value in read_json(root / "tests" / "solutions.json").items()]
        self.all_parts = [Part(self, number, file, name, found[file].get(name), hashed)
                          for file, name, number, hashed in hashed]
        self.parts = {number: [part for part in self.all_parts if part.number == number] for number in self.exercises}

    def foreign_code(self):
        """What is not the project's, in words; whoever has never used these commands has changed a solution himself."""
        parts = [part for part in self.all_parts if part.state != SOLUTION]
        used = parts and (self.kept or any(part.state == OUT for part in parts))
        return f"{parts[0].state}, {parts[0].name}" if used else ""

    def code(self, number):
        """A hash of what stands in the code: marks are good for as long as it does."""
        return digest("".join(part.text or "" for part in self.parts[number]))

    def graded(self, number, theirs):
        """The sources that an exercise is graded in: theirs, with the solutions of all others. Where theirs is no
        Python, or its functions are not to be found, ours with their functions.
        """
        sources = {}
        for file in FILES:
            found, texts = functions(theirs.get(file, "")), {}
            parts = [part for part in self.all_parts if part.file == file]
            for part in parts:
                text = found.get(part.name) or stub(part.solution or part.text or "", part.number, part.name)
                if part.number != number and (part.solution or not is_python(text)):
                    text = part.solution or stub(text, part.number, part.name)
                texts[part.name] = text
            sources[file] = swap(theirs.get(file, ""), texts)
            if not all(part.name in found for part in parts) or not is_python(sources[file]):
                sources[file] = swap(self.sources[file], texts)
        return sources


# ---- Commands --------------------------------------------------------------------------------------------------------
def grade(project, numbers):
    jobs = [(number, project.graded(number, project.sources)) for number in numbers]
    for number, tests in grading.grade(jobs, project.root).items():
        passed = sum(not wrong for _, wrong in tests)
        print(f"exercise {number}, {project.exercises[number][0]}: {passed} of {len(tests)} tests passed")
        for name, wrong in tests:
            print(f"  FAILED  {name}\n          {wrong}" if wrong else f"  passed  {name}")
        project.marks[str(number)] = [passed, len(tests), project.code(number)]
    write(project.folder / "marks.json", json.dumps(project.marks))


def report(project, folder, as_json):
    """The points of each exercise, with the solutions of all others in place; as JSON in Gradescope's form."""
    paths = {file: [path for path in (folder / file, folder / Path(file).name) if path.exists()] for file in FILES}
    theirs = {file: read(found[0]) for file, found in paths.items() if found}
    if not theirs:
        raise Wrong(f"{folder} has none of {', '.join(FILES)}")
    graded = grading.grade([(number, project.graded(number, theirs)) for number in project.exercises], project.root)
    rows = []
    for number, (title, points) in project.exercises.items():
        texts = [functions(theirs.get(part.file, "")).get(part.name) for part in project.parts[number]]
        states = {Part(project, number, part.file, part.name, text, part.hashed).state
                  for part, text in zip(project.parts[number], texts)}
        wrong = [f"{test}: {what}" for test, what in graded[number] if what]
        tests = len(graded[number])
        rows.append({"name": f"{number}. {title}", "score": round(points * (1 - len(wrong) / tests), 2),
                     "max_score": points, "output": "\n".join(wrong), "extra_data": {
                         "state": summary(states),
                         "passed": tests - len(wrong), "tests": tests}})
    score, most = (round(sum(row[name] for row in rows), 2) for name in ("score", "max_score"))
    if as_json:
        return print(json.dumps({"score": score, "tests": rows}, indent=1))
    for row in rows:
        state, passed, tests = row["extra_data"].values()
        print(f"{row['name']:40}{state:18}{passed:3} of {tests:2} tests{row['score']:6g} of {row['max_score']} points")
    print(f"{score:78g} of {most} points")


def hand_out(project, folder, numbers):
    """A copy for students: these exercises taken out, and nothing in it that has their solutions."""
    if folder.exists():
        raise Wrong(f"{folder} exists already")
    for part in project.all_parts:
        part.find("solution")  # or say that it is not here
    for path in itertools.chain(*map(project.root.glob, HANDED_OUT)):
        if path.name not in FOR_TEACHERS:
            copy = folder / path.relative_to(project.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for file, source in project.sources.items():
        texts = {part.name: part.find("stub" if part.number in numbers else "solution")
                 for part in project.all_parts if part.file == file}
        write(folder / file, swap(source, texts))


def hashes(root):
    """solutions.json, from the marks in the sources."""
    found = [(int(mark[1]), file, name, digest(text)) for file in FILES
             for name, text in functions(read(root / file)).items()
             if (mark := re.search(r"(?m)^ *def .*# exercise (\d+)\b", text))]
    found.sort(key=lambda row: row[0])
    rows = [f'"{file} {name}": [{number}, "{hashed}"]' for number, file, name, hashed in found]
    return "{" + ",\n ".join(rows) + "}\n"


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"exercise.py: error: {message}\n")
    commands = parser.add_mutually_exclusive_group()
    for name in ("grade", "solution", "own", "diff", "hashes"):
        commands.add_argument(f"--{name}", dest="command", action="store_const", const=name)
    commands.add_argument("--report", nargs="?", const=root, type=Path, metavar="DIR")
    commands.add_argument("--student", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("numbers", nargs="*", help="of exercises")
    try:
        run(parser.parse_args(argv), root)
    except BrokenPipeError:  # the reader has enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (Wrong, OSError) as error:
        parser.error(str(error))


def run(args, root):
    if args.command == "hashes":
        return write(root / "tests" / "solutions.json", hashes(root))
    project = Project(root)
    kept = {part.key: part.solution for part in project.all_parts if part.solution}
    if kept != project.kept:  # before they are asked for: the next edit may be made by hand
        write(project.folder / "solutions.json", json.dumps(kept, indent=1))
    known, numbers = project.exercises, []
    for word in args.numbers:
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", word)):
            raise Wrong(f"{word!r} is neither the number of an exercise nor a range, such as 5-8")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
        if not {*numbers} <= {*known}:
            raise Wrong(f"there is no exercise {max({*numbers} - {*known})}: they are {min(known)} to {max(known)}")
    numbers = list(known) if args.all or args.student and not numbers else list(dict.fromkeys(numbers))
    if args.report:
        return report(project, args.report, args.json)
    if args.student:
        return hand_out(project, args.student, numbers)
    if args.command and not numbers:
        raise Wrong(f"--{args.command} needs the number of an exercise")
    if args.command == "grade":
        return grade(project, numbers)
    parts = [part for number in numbers for part in project.parts[number]]
    if len(numbers) == 1 and not parts:
        raise Wrong(f"exercise {numbers[0]} has nothing to take out: EXERCISES.md says what to write, and where")
    if args.command in ("own", "diff") and not any(part.own for part in parts):
        raise Wrong("there is no code of your own")
    if args.command == "diff":
        for part in parts:
            mine, solution = (part.find(what).splitlines() for what in ("own", "solution"))
            print(*difflib.unified_diff(mine, solution, f"your {part.name}", "solution", n=99, lineterm=""), sep="\n")
        return
    texts = [part.find(args.command or "stub") for part in parts]  # before anything is changed
    for part, text in zip(parts, texts):
        part.put(text)
    for number in numbers:
        done = {"solution": "the solution is in place", "own": "your own code is in place"}.get(
            args.command, f"taken out; python tests/exercise.py --grade {number} grades what you write")
        print(f"exercise {number}, {known[number][0]}: {done}")
    for number, (title, _) in known.items() if not numbers else ():
        states = {part.state for part in project.parts[number]}
        passed, tests, code = project.marks.get(str(number), (0, 0, ""))
        marks = f", {passed} of {tests} tests" * (code == project.code(number))
        print(f"{number:2}  {title:38}{summary(states)}{marks}")


if __name__ == "__main__":
    main()
