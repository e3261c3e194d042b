"""Takes the functions of an exercise out of the code, grades yours, puts the solution back.

    python tests/exercises/exercise.py               the exercises, and your last marks
    python tests/exercises/exercise.py 5             take exercise 5 out; also 5-8, 5 7, or --all
    python tests/exercises/exercise.py --grade 5     grade it, as python -m pytest -m ex5 does
    python tests/exercises/exercise.py --solution 5  put its solution back; your own code is kept
    python tests/exercises/exercise.py --own 5       put your own code back
    python tests/exercises/exercise.py --diff 5      your own code beside the solution
    python tests/exercises/exercise.py --report [DIR]       grade everything here, or in a folder
    python tests/exercises/exercise.py --student DIR 1-10   a copy to hand out, without solutions
    python tests/exercises/exercise.py --hashes      write solutions.json again, after a change

An exercise is the functions whose `def` line ends in "# exercise 5". solutions.json has the hashes
of their solutions. The folder kept/ gets the solutions, your own code and your marks.
"""

import argparse
import difflib
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import grading
from grading import FILES, HERE, ROOT, functions, is_python, stub, swap

HANDED_OUT = ["*.py", "README.md", "LICENSE", "pytest.ini", "requirements.txt", ".gitignore"]
HANDED_OUT += ["assets/*", "tests/*.py", "tests/experiments/*", f"{HERE}*"]
FOR_TEACHERS = ["TEACHER.md", "answers.txt", "test_graders.py", "test_readme.py"]
SOLUTION, OUT, OWN, LOST = "solution", "taken out", "own code", "def line missing"

def summary(states):
    """The state of an exercise, from those of its functions."""
    return next((state for state in (LOST, OWN, OUT, SOLUTION) if state in states), "not begun")

def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]

def read(path):
    return path.read_text(encoding="utf-8")

def read_json(path):
    return json.loads(read(path)) if path.exists() else {}

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

# ---- A project and its exercises -----------------------------------------------------------------
class Part:
    """One function of an exercise. `text` is what stands in the code, None without its def line."""
    def __init__(self, project, number, file, name, text, hashed):
        self.project, self.number, self.text, self.hashed = project, number, text, hashed
        self.file, self.name, self.key = file, name, f"{file} {name}"
        if text is None:
            self.state = LOST
        elif digest(text) == hashed:
            self.state = SOLUTION
        else:
            self.state = OUT if text == stub(text, number, name) else OWN

    @functools.cached_property
    def solution(self):
        """The text that has the solution's hash, from the code or from kept/, or None."""
        texts = [self.text, self.project.kept.get(self.key)]
        return next((text for text in texts if text and digest(text) == self.hashed), None)

    def own_files(self):
        """The user's own versions that were kept, the oldest first."""
        found = self.project.folder.glob(f"own/{self.number}-{self.name}.*.py")
        return sorted(found, key=lambda path: int(path.name.split(".")[-2]))

    @property
    def own(self):
        """The user's own text: what stands in the code, or else what was kept last, or None."""
        files = self.own_files()
        return self.text if self.state == OWN else read(files[-1]) if files else None

    def find(self, what):
        """The text of the stub, of the solution, or of the user's own code."""
        if self.state == LOST:
            raise ValueError(f"{self.file} has no {self.name} any more: write its def line again")
        if what == "solution" and not self.solution:
            advice = f"get {self.file} from the project again, or ask your teacher"
            raise ValueError(f"the solution of {self.name} is not here: {advice}")
        if what == "stub":
            return stub(self.solution or self.text, self.number, self.name)
        return self.solution if what == "solution" else self.own or self.text

    def put(self, text):
        """Let `text` stand in the function's place. Code of the user's own is kept before."""
        if self.state == OWN and text != self.text:
            name = f"{self.number}-{self.name}.{len(self.own_files()) + 1}.py"
            write(self.project.folder / "own" / name, self.text)
            print(f"your {self.name} is kept in {self.project.folder / 'own' / name}")
        path = self.project.root / self.file
        write(path, swap(read(path), {self.name: text}))

class Project:
    """The exercises of a folder: titles and points from README.md, functions by solutions.json."""
    def __init__(self, root):
        self.root = root
        self.folder = root / HERE / "kept"
        heading = r"(?m)^### (\d+)\. (.+) \((\d+) points?, \d+ minutes\)$"
        found = re.findall(heading, read(root / HERE / "README.md"))
        self.exercises = {int(number): (title, int(points)) for number, title, points in found}
        self.kept = read_json(self.folder / "solutions.json")
        self.marks = read_json(self.folder / "marks.json")
        self.sources = {file: read(root / file) for file in FILES}
        self.all_parts = []
        for key, (number, hashed) in read_json(root / HERE / "solutions.json").items():
            file, name = key.split()
            text = functions(self.sources[file]).get(name)
            self.all_parts.append(Part(self, number, file, name, text, hashed))

    def parts(self, number):
        return [part for part in self.all_parts if part.number == number]

    def code(self, number):
        """A hash of what stands in the code: marks are good for as long as it does."""
        return digest("".join(part.text or "" for part in self.parts(number)))

    def graded(self, number, theirs):
        """The sources in which an exercise is graded: theirs, with the solutions of all others.
        Where that is no Python or lacks functions, ours with their functions."""
        sources = {}
        for file in FILES:
            source = theirs.get(file, "")
            found, texts = functions(source), {}
            for part in (part for part in self.all_parts if part.file == file):
                empty = stub(part.solution or part.text or "def f():", part.number, part.name)
                text = found.get(part.name, empty)
                if part.number != number and (part.solution or not is_python(text)):
                    text = part.solution or empty
                texts[part.name] = text
            sources[file] = swap(source, texts)
            if not texts.keys() <= found.keys() or not is_python(sources[file]):
                sources[file] = swap(self.sources[file], texts)
        return sources

# ---- Commands ------------------------------------------------------------------------------------
def grade(project, numbers):
    jobs = [(number, project.graded(number, project.sources)) for number in numbers]
    for number, tests in grading.grade(jobs, project.root).items():
        passed = sum(not wrong for _, wrong in tests)
        title = project.exercises[number][0]
        print(f"exercise {number}, {title}: {passed} of {len(tests)} tests passed")
        for name, wrong in tests:
            print(f"  FAILED  {name}\n          {wrong}" if wrong else f"  passed  {name}")
        project.marks[str(number)] = [passed, len(tests), project.code(number)]
    write(project.folder / "marks.json", json.dumps(project.marks))

def report(project, folder, as_json):
    """The points of each exercise, or with --json the results.json that Gradescope reads."""
    theirs = {}
    for file in FILES:
        for path in (folder / Path(file).name, folder / file):
            if path.exists():
                theirs[file] = read(path)
    if not theirs:
        raise ValueError(f"{folder} has none of {', '.join(FILES)}")
    jobs = [(number, project.graded(number, theirs)) for number in project.exercises]
    rows = []
    for number, tests in grading.grade(jobs, project.root).items():
        states = set()
        for part in project.parts(number):
            text = functions(theirs.get(part.file, "")).get(part.name)
            states.add(Part(project, number, part.file, part.name, text, part.hashed).state)
        title, points = project.exercises[number]
        wrong = [f"{test}: {what}" for test, what in tests if what]
        score = round(points * (1 - len(wrong) / len(tests)), 2)
        row = {"name": f"{number}. {title}", "score": score, "max_score": points}
        rows.append(row | {"output": "\n".join(wrong), "extra_data": {"state": summary(states)}})
    score = round(sum(row["score"] for row in rows), 2)
    if as_json:
        return print(json.dumps({"score": score, "tests": rows}, indent=1))
    for row in rows:
        state = row["extra_data"]["state"]
        print(f"{row['name']:40}{state:18}{row['score']:6g} of {row['max_score']} points")
    print(f"{score:64g} of {sum(row['max_score'] for row in rows)} points")

def copy_files(root, folder):
    for path in (path for pattern in HANDED_OUT for path in root.glob(pattern)):
        if path.is_file() and path.name not in FOR_TEACHERS:
            copy = folder / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)

def hand_out(project, folder, numbers):
    """A copy for students with these exercises taken out, and without their solutions."""
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    for part in project.all_parts:
        part.find("solution")  # or say that it is not here
    copy_files(project.root, folder)
    for file, source in project.sources.items():
        parts = [part for part in project.all_parts if part.file == file]
        what = {part: "stub" if part.number in numbers else "solution" for part in parts}
        write(folder / file, swap(source, {part.name: part.find(what[part]) for part in parts}))

def hashes(root):
    """solutions.json, from the marks in the sources."""
    found = []
    for file in FILES:
        for name, text in functions(read(root / file)).items():
            if mark := re.search(r"(?m)^ *def .*# exercise (\d+)\b", text):
                found.append((int(mark[1]), f'"{file} {name}": [{mark[1]}, "{digest(text)}"]'))
    found.sort(key=lambda row: row[0])
    return "{" + ",\n ".join(row for _, row in found) + "}\n"

def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = lambda message: parser.exit(2, f"exercise.py: error: {message}\n")
    commands = parser.add_mutually_exclusive_group()
    for name in ("grade", "solution", "own", "diff", "hashes"):
        commands.add_argument(f"--{name}", dest="command", action="store_const", const=name)
    commands.add_argument("--report", nargs="?", const=root, type=Path, metavar="DIR")
    commands.add_argument("--student", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="of --report, for Gradescope")
    parser.add_argument("--all", action="store_true", help="all exercises")
    parser.add_argument("numbers", nargs="*", help="of exercises, such as 5 or 1-13")
    try:
        run(parser.parse_args(argv), root)
    except (ValueError, OSError) as error:
        parser.error(str(error))

def chosen(args, known):
    """The numbers of the exercises that are meant."""
    numbers = []
    for word in args.numbers:
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", word)):
            raise ValueError(f"{word!r} is neither an exercise's number nor a range such as 5-8")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    for number in numbers:
        if number not in known:
            raise ValueError(f"there is no exercise {number}, only 1 to {max(known)}")
    return list(known) if args.all or args.student and not numbers else numbers

def run(args, root):
    if args.command == "hashes":
        return write(root / HERE / "solutions.json", hashes(root))
    project = Project(root)
    kept = {part.key: part.solution for part in project.all_parts if part.solution}
    write(project.folder / "solutions.json", json.dumps(kept, indent=1))  # before they are lost
    numbers = chosen(args, project.exercises)
    if args.report:
        return report(project, args.report, args.json)
    if args.student:
        return hand_out(project, args.student, numbers)
    if args.command and not numbers:
        raise ValueError(f"--{args.command} needs the number of an exercise")
    if args.command == "grade":
        return grade(project, numbers)
    parts = [part for number in numbers for part in project.parts(number)]
    if len(numbers) == 1 and not parts:
        raise ValueError(f"exercise {numbers[0]} takes nothing out: README.md says what to write")
    if args.command in ("own", "diff") and not any(part.own for part in parts):
        raise ValueError("there is no code of your own")
    if args.command == "diff":
        for part in parts:
            texts = [part.find(what).splitlines() for what in ("own", "solution")]
            names = f"your {part.name}", "solution"
            print(*difflib.unified_diff(*texts, *names, n=99, lineterm=""), sep="\n")
        return
    texts = [part.find(args.command or "stub") for part in parts]  # before anything is changed
    for part, text in zip(parts, texts):
        part.put(text)
    for number in dict.fromkeys(part.number for part in parts):
        done = {"solution": "the solution is in place", "own": "your own code is in place"}
        done = done.get(args.command, f"taken out; grade yours with --grade {number}")
        print(f"exercise {number}, {project.exercises[number][0]}: {done}")
    for number, (title, _) in project.exercises.items() if not numbers else ():
        state = summary({part.state for part in project.parts(number)})
        passed, tests, code = project.marks.get(str(number), (0, 0, ""))
        marks = f", {passed} of {tests} tests" if code == project.code(number) else ""
        print(f"{number:2}  {title:38}{state}{marks}")

if __name__ == "__main__":
    main()
