"""Takes the functions of an exercise out of the code, grades yours, puts the solution back.

    python tests/exercises/exercise.py               the exercises, and your last marks
    python tests/exercises/exercise.py 5             take exercise 5 out; also 5-8, 5 7, or --all
    python tests/exercises/exercise.py --grade 5     grade it, as python -m pytest -m ex5 does
    python tests/exercises/exercise.py --solution 5  put its solution back; your own code is kept
    python tests/exercises/exercise.py --own 5       put your own code back
    python tests/exercises/exercise.py --diff 5      your own code beside the solution
    python tests/exercises/exercise.py --report [DIR ...]   points, of what is here or in folders
    python tests/exercises/exercise.py --student DIR 1-10   a copy to hand out, without solutions
    python tests/exercises/exercise.py --hashes      write solutions.json again, after a change

An exercise is the functions whose `def` line ends in "# exercise 5". solutions.json has the hashes
of their solutions. The folder kept/ gets the solutions, your own code and your marks.
"""

import argparse
import csv
import difflib
import functools
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import grading
from grading import FILES, HERE, ROOT, functions, is_python, stub, swap

COPIED = ["*.py", "README.md", "LICENSE", "pytest.ini", "requirements.txt", ".gitignore"]
COPIED += ["assets/*", "tests/*.py", "tests/experiments/*", f"{HERE}*"]
FOR_TEACHERS = ["TEACHER.md", "STUDENT.md", "answers.txt", "colab.ipynb", "bench.py", "gpu.sh"]
NUMBER = r"(\d+)(?:-(\d+))?"
SOLUTION, OUT, OWN, LOST = "solution", "taken out", "own code", "def line missing"

def summary(states):
    """The state of an exercise, from those of its functions."""
    if LOST in states:
        return LOST
    return OWN if len(states) > 1 else next(iter(states), "not begun")

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

    def state(self, number):
        return summary({part.state for part in self.parts(number)})

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
    begun = [number for number in numbers if project.state(number) != OUT]
    jobs = [(number, project.graded(number, project.sources)) for number in begun]
    results = grading.grade(jobs, project.root)
    for number in numbers:
        title, points = project.exercises[number]
        if number not in begun:
            print(f"exercise {number}, {title}: nothing is written yet, so it is not graded")
            continue
        tests, told = results[number], set()
        passed = sum(not wrong for _, _, wrong in tests)
        earned = f"{points * grading.share(tests):.2g} of {points} points"
        print(f"exercise {number}, {title}: {earned}, {passed} of {len(tests)} tests passed")
        for kind, name, wrong in tests:
            print(f"  {'FAILED' if wrong else 'passed'}  {kind:8} {name}")
            if wrong and wrong not in told:
                print(f"          {wrong}")
            told.add(wrong)
        project.marks[str(number)] = [passed, len(tests), project.code(number)]
    write(project.folder / "marks.json", json.dumps(project.marks))

def read_theirs(folder):
    """{file: source} of what is handed in, from its place in the project or from the folder."""
    theirs = {}
    for file in FILES:
        for path in (folder / Path(file).name, folder / file):
            if path.exists():
                theirs[file] = path.read_text(encoding="utf-8", errors="replace")
    return theirs

def points_of(project, folder, numbers):
    """{number: {name, score, ...} as Gradescope has it} of a folder. Without numbers these are the
    exercises that were handed out, or else those in whose place the solution does not stand."""
    theirs, states = read_theirs(folder), {}
    for number in project.exercises:
        found = set()
        for part in project.parts(number):
            text = functions(theirs.get(part.file, "")).get(part.name)
            found.add(Part(project, number, part.file, part.name, text, part.hashed).state)
        states[number] = summary(found)
    numbers = numbers or read_json(folder / HERE / "handed_out.json")
    numbers = numbers or [number for number in states if states[number] != SOLUTION]
    begun = [number for number in numbers if theirs and states[number] != OUT]
    results = grading.grade([(n, project.graded(n, theirs)) for n in begun], project.root)
    rows = {}
    for number in numbers:
        title, points = project.exercises[number]
        tests = results.get(number, [("subject", "nothing is written yet", "so it is not graded")])
        wrong = {}
        for _, test, what in tests:
            if what:
                wrong.setdefault(what, f"{test}: {what}")
        row = {"name": f"{number}. {title}", "score": round(points * grading.share(tests), 2)}
        row |= {"max_score": points, "output": "\n".join(wrong.values())}
        rows[number] = row | {"extra_data": {"state": states[number]}}
    return rows

def report(project, folders, numbers, form):
    if len(folders) == 1 and not read_theirs(folders[0]):
        raise ValueError(f"{folders[0]} has none of {', '.join(FILES)}")
    if form == "json" and len(folders) > 1:
        raise ValueError("--json takes one folder, and --csv takes several")
    found = {folder: points_of(project, folder, numbers) for folder in folders}
    if form == "csv":
        columns = sorted({number for rows in found.values() for number in rows})
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["name", *(f"exercise {number}" for number in columns), "points"])
        most = [project.exercises[number][1] for number in columns]
        table.writerow(["possible", *most, sum(most)])
    for folder, rows in found.items():
        scores = {number: row["score"] for number, row in rows.items()}
        total = round(sum(scores.values()), 2)
        if form == "json":
            print(json.dumps({"score": total, "tests": [*rows.values()]}, indent=1))
        elif form == "csv":
            scores = [scores.get(number, "") for number in columns]
            table.writerow([folder.resolve().name, *scores, total])
        else:
            for row in rows.values():
                state, most = row["extra_data"]["state"], row["max_score"]
                print(f"{row['name']:40}{state:18}{row['score']:6g} of {most} points")
            most = sum(row["max_score"] for row in rows.values())
            print(f"{total:64g} of {most} points: {folder.resolve().name}")

def copy_files(root, folder, without=()):
    for path in (path for pattern in COPIED for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        if path.is_file() and path.name not in without and name not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)

def hand_out(project, folder, numbers):
    """A copy for students with these exercises taken out, and without their solutions."""
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    for part in project.all_parts:
        part.find("solution")  # or say that it is not here
    tests = [path.relative_to(project.root) for path in project.root.glob("tests/**/test_*")]
    without = {*FOR_TEACHERS, *(path.as_posix() for path in tests)} - {*grading.GRADERS}
    copy_files(project.root, folder, without)
    for file, source in project.sources.items():
        parts = [part for part in project.all_parts if part.file == file]
        what = {part: "stub" if part.number in numbers else "solution" for part in parts}
        source = swap(source, {part.name: part.find(what[part]) for part in parts})
        for number in numbers:  # a line of another function that has the exercise's mark
            line = rf'(?m)^( +[\w."[\]]+ = ).*(# exercise {number})$'
            source = re.sub(line, r"\1math.nan  \2", source)
        write(folder / file, source)
    write(folder / HERE / "handed_out.json", json.dumps(numbers))
    text = read(project.root / HERE / "STUDENT.md")
    titles = [f"- exercise {number}: {project.exercises[number][0]}" for number in numbers]
    write(folder / "README.md", text.replace("EXERCISES", "\n".join(titles)))
    ini, marks = read(folder / "pytest.ini"), " or ".join(f"ex{number}" for number in numbers)
    write(folder / "pytest.ini", re.sub(r"(?m)^# .*\n(addopts = -m ).*", rf'\1"{marks}"', ini))

def hashes(root):
    """solutions.json, from the marks in the sources."""
    lines = {}
    for file in FILES:
        for name, text in functions(read(root / file)).items():
            if mark := re.search(r"(?m)^ *def .*# exercise (\d+)\b", text):
                one = f'"{file} {name}": [{mark[1]}, "{digest(text)}"]'
                lines.setdefault(int(mark[1]), []).append(one)
    return "{" + ",\n ".join(", ".join(lines[number]) for number in sorted(lines)) + "}\n"

def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = lambda message: parser.exit(2, f"exercise.py: error: {message}\n")
    commands = parser.add_mutually_exclusive_group()
    for name in ("grade", "solution", "own", "diff", "hashes"):
        commands.add_argument(f"--{name}", dest="command", action="store_const", const=name)
    commands.add_argument("--report", nargs="*", metavar="DIR")
    commands.add_argument("--student", type=Path, metavar="DIR")
    for form, what in {"json": "of --report, for Gradescope", "csv": "of --report"}.items():
        parser.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=what)
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
        if not (match := re.fullmatch(NUMBER, word)):
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
    if args.report is not None:  # its words are folders, and numbers after them
        args.numbers += [word for word in args.report if re.fullmatch(NUMBER, word)]
        folders = [Path(word) for word in args.report if word not in args.numbers] or [root]
    numbers = chosen(args, project.exercises)
    if args.report is not None:
        return report(project, folders, numbers, args.form)
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
        state = project.state(number)
        passed, tests, code = project.marks.get(str(number), (0, 0, ""))
        marks = f", {passed} of {tests} tests" if code == project.code(number) else ""
        print(f"{number:2}  {title:38}{state}{marks}")

if __name__ == "__main__":
    main()
