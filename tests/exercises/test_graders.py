"""The graders, graded: an exercise's tests fail while it is taken out, catch the wrong answers of
answers.txt, and accept the right ones there, which have other designs. Then the commands.
"""

import argparse
import csv
import io
import itertools
import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import exercise
import grading
from grading import FILES, HERE, ROOT

README = (ROOT / HERE / "README.md").read_text(encoding="utf-8")
PROJECT = exercise.Project(ROOT)
PARTS = {part.name: part for part in PROJECT.all_parts}
SLIPS = NameError, AttributeError, SyntaxError  # a wrong answer must not be caught by its own slip
pytestmark = pytest.mark.books

def read_answers():
    """[(function, "-", "*" or "+", what, body), ...], as the head of answers.txt says"""
    text = (ROOT / HERE / "answers.txt").read_text(encoding="utf-8")
    answers = []
    for block in text.split("\n=== ")[1:]:
        name = block.split("\n")[0]
        found = re.findall(r"(?m)^([-+*]) ([^:\n]*)(?:: (.*)|\n((?:(?:    .*)?\n)+))", block + "\n")
        for kind, what, short, body in found:
            answers.append((name, kind, what, short or textwrap.dedent(body)))
    return answers

ANSWERS = read_answers()
MAPS = [name for name in PARTS if re.search(r"\.(update|\w*compress)$|[AR]\w+\.forward$", name)]
FAULTS = {
    "three dimensions only": "return right(x.flatten(0, 1)).unflatten(0, x.shape[:2])",
    "another type": "return right(x.double())",
    "x changed": "x *= 2\nreturn right(x / 2)",
    "the gradient of x": "return right(x.detach() + 0 * x)",
    "another device": "y = right(x)\nreturn y + torch.zeros(y.shape, dtype=y.dtype)",
}

def planted(name, body):
    """(exercise, {file: source}) with this body in a function, whose solution is right_NAME, with a
    change of the solution, or with an operator of one's own."""
    body = textwrap.indent(body.strip("\n"), "    ")
    if name == "OPERATORS":
        own = f"\nclass Own(Truncation):\n{body}\n\nOPERATORS = dict(own=Own, "
        return 24, {"mora.py": PROJECT.sources["mora.py"].replace("\nOPERATORS = dict(", own)}
    part, source = PARTS[name], PROJECT.sources[PARTS[name].file]
    if " => " in body:
        old, new = body.strip().split(" => ")
        assert part.text.count(old) == 1, f"{name} has this more than once, or not at all: {old}"
        return part.number, {part.file: exercise.swap(source, {name: part.text.replace(old, new)})}
    head, error = part.find("stub").rsplit("\n", 1)
    body = textwrap.indent(body, error[4:len(error) - len(error.lstrip())])
    text = re.sub(r"\bdef ", "def right_", part.text, count=1) + f"\n\n{head}\n{body}"
    return part.number, {part.file: exercise.swap(source, {part.name: text})}

def out(numbers):
    """{file: source} with these exercises taken out."""
    stubs = {part.name: part.find("stub") for part in PROJECT.all_parts if part.number in numbers}
    return {file: exercise.swap(source, stubs) for file, source in PROJECT.sources.items()}

def faults(number, sources):
    """Of an exercise's tests, those that fail, and what they raise."""
    for _, test, find_fault in grading.outcomes(number, sources):
        if error := find_fault():
            yield test, error

# ---- The proof -----------------------------------------------------------------------------------
@pytest.mark.parametrize("number", PROJECT.exercises)
def test_an_exercise_is_graded_by_its_own_tests(number):
    later = dict(faults(number, out(range(number + 1, 99))))
    assert not later or number == 24, "with all later exercises taken out"
    found = dict(faults(number, out([number])))
    for test, error in found.items() if number != 24 else ():
        own = isinstance(error, NotImplementedError) and f"exercise {number}: " in str(error)
        assert own, f"with exercise {number} taken out, {test} should say so, not {error!r}"
    assert len(found) == len(grading.outcomes(number, {})), "a test does not need it"

@pytest.mark.parametrize("name, kind, what, body", ANSWERS, ids=[" ".join(a[:3]) for a in ANSWERS])
def test_an_answer(name, kind, what, body):
    test, error = next(faults(*planted(name, body)), (None, None))
    if kind == "+":
        assert not error, f"{what} is right, and {test} says: {error!r}"
        return
    if kind == "*":
        tests = grading.outcomes(*planted(name, body))
        share = grading.share([(kind, test, find_fault()) for kind, test, find_fault in tests])
        assert share <= 0.3, f"{what} misses the point, and gets {share:.0%} of it"
    assert error and not isinstance(error, SLIPS), f"{what} is not caught, or slips: {error!r}"

@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("name", MAPS)
def test_what_every_map_must_do(name, what):
    first, *more = re.search(r"def \w+\(self, (.*?)\)", PARTS[name].text)[1].split(", ")
    right = f"lambda x: self.right_{name.split('.')[1]}({', '.join(['x', *more])})"
    number, sources = planted(name, f"x, right = {first}, {right}\n{FAULTS[what]}")
    error = next(faults(number, sources), (None, None))[1]
    assert error and not isinstance(error, SLIPS), f"exercise {number}: {name}, {what}: {error!r}"

def test_every_exercise_has_a_text_a_mark_and_wrong_answers():
    ini = (ROOT / "pytest.ini").read_text(encoding="utf-8")
    titles = {str(number): title for number, (title, _) in PROJECT.exercises.items()}
    assert dict(re.findall(r"(?m)^    ex(\d+): (.+)$", ini)) == titles, "pytest.ini differs"
    wrong = [name for name, kind, *_ in ANSWERS if kind != "+"]
    few = [name for name in PARTS if wrong.count(name) < 2]
    assert not few, f"fewer than two wrong answers for {few}"

def test_the_hashes_are_those_of_the_solutions():
    same = exercise.hashes(ROOT) == (ROOT / HERE / "solutions.json").read_text(encoding="utf-8")
    assert same, f"a solution or a mark was changed: python {HERE}exercise.py --hashes"

def test_the_experiments_in_python_print_what_the_text_says(capsys):
    printed = ""
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        torch.manual_seed(0)
        exec(block, {})
        printed += capsys.readouterr().out
    assert "False 875 of 3072" in printed and "True 3072 of 3072" in printed
    assert re.findall(r"lora (\d+) (\d+)", printed) == [("1", "1"), ("2", "2"), ("8", "8")]
    assert "cycle [13, 25, 25, 25, 25, 25, 25, 25, 25, 25]" in printed, "2 r̂ - 1 and no more"
    assert "random [13, 25, 37, 49, 61, 73, 85, 96, 96, 96]" in printed, "t (r̂ - 1) + 1"
    steps = re.findall(r"[-+]0\.\d{3}", printed)
    assert steps == re.findall(r"[-+]0\.\d{3}", README) != [], "Adam's first steps after a merge"
    costs = re.findall(r"defined +([\d.]+) .*merged +([\d.]+)", printed)
    saves = [float(defined) > float(merged) for defined, merged in costs]
    assert saves == [False, False, True, True], "from 768 tokens on"
    lost = re.findall(r"(\d+)% lost by .*, (\d+)% at random", printed)
    assert int(lost[0][0]) < int(lost[0][1]) and int(lost[-1][0]) > 5 * int(lost[-1][1])

# ---- The machinery, and the commands -------------------------------------------------------------
def test_an_answer_that_hangs_or_ends_the_program(monkeypatch):
    monkeypatch.setattr(grading, "METHOD", "fork")  # torch is there already
    monkeypatch.setattr(grading, "LIMIT", 1)
    bodies = {"square_size": "while True:\n    pass", "Sharing.compress": "raise SystemExit"}
    bodies |= {"Truncation.compress": "import os\nos._exit(0)"}
    results = grading.grade([planted(name, body) for name, body in bodies.items()])
    assert [wrong for _, _, wrong in results[5]] == ["it takes more than 1 seconds"]
    assert any("SystemExit" in wrong for _, _, wrong in results[7])
    assert "it ends the program" in [wrong for _, _, wrong in results[6]]

def test_what_a_student_is_told():
    patterns = {"z.nonsense": "AttributeError.*in decompress: return z.nonsense"}
    patterns |= {"2 * self.right_decompress(z)": "expected .* at .*, got .* which is off by"}
    for body, pattern in patterns.items():
        found = faults(*planted("Sharing.decompress", f"return {body}"))
        told = [grading.describe(error) for _, error in found]
        assert any(re.search(pattern, line) for line in told), told

@pytest.fixture
def project(tmp_path):
    """A copy of the project as a downloaded archive is, without git."""
    exercise.copy_files(ROOT, tmp_path / "project")
    return tmp_path / "project"

@pytest.fixture
def tool(project, capsys):
    """Runs exercise.py in the project, and returns its exit status and all that it prints."""
    def run(*words, root=project):
        status = 0
        try:
            exercise.main([*map(str, words)], root)
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err
    return run

def edit(project, old, new, file="mora.py"):
    source = (project / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    (project / file).write_text(source.replace(old, new), encoding="utf-8")

def state(tool, number):
    return re.search(rf"(?m)^ *{number}  .{{38}}(.+)$", tool()[1])[1]

def error(number):
    return PROJECT.parts(number)[0].find("stub").split("\n")[-1].strip()

def test_as_a_student_types_it(project, tool, monkeypatch):
    monkeypatch.setattr(grading, "METHOD", "fork")
    assert tool("9")[0] == 0 and state(tool, 9) == "taken out"
    words = [sys.executable, "-m", "pytest", "-q", "-m", "ex9", HERE + "test_maps.py"]
    run = subprocess.run(words, cwd=project, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 1 and "exercise 9: write Decoupling.compress, as" in run.stdout
    edit(project, error(9), "return x.unflatten(-1, (-1, self.size))")
    status, text = tool("--grade", "9")
    passed, tests = map(int, re.search(r"(\d+) of (\d+) tests passed", text).groups())
    assert status == 0 and 0 < passed < tests and "FAILED  subject  the values of, deco" in text
    assert state(tool, 9) == f"own code, {passed} of {tests} tests"
    edit(project, "unflatten(-1, (-1, self.size))", "unflatten(-1, (-1, self.size, 1))")
    assert state(tool, 9) == "own code", "marks of other code"
    assert tool("--solution", "9")[0] == 0 and state(tool, 9) == "solution"
    assert "+        x = F.pad(x" in tool("--diff", "9")[1] and tool("--own", "9")[0] == 0
    assert state(tool, 9) == "own code", "the own code is back"

def test_everything_out_and_back_is_what_it_was(project, tool):
    before = [(project / name).read_bytes() for name in FILES]
    assert tool("--all")[0] == tool("--all")[0] == 0
    for name in FILES:
        compile((project / name).read_bytes(), name, "exec")
    assert {state(tool, number) for number in range(1, 24)} == {"taken out"}
    assert tool("--solution", "1-23")[0] == 0
    assert [(project / name).read_bytes() for name in FILES] == before

@pytest.mark.parametrize("words, message", [
    (["99"], "no exercise 99"), (["two"], "'two' is neither"), (["24"], "takes nothing out"),
    (["--solution"], "needs the number"), (["--own", "5"], "no code of your own"),
    (["--solve", "1"], "--solve"), (["--report", "nowhere"], "has none of mora.py"),
])
def test_wrong_input_gets_one_clear_line(words, message, project, tool):
    status, text = tool(*words)
    assert status == 2 and message in text and text.count("\n") == 1
    assert (project / "mora.py").read_bytes() == (ROOT / "mora.py").read_bytes()

@pytest.fixture
def handout(project, tool, tmp_path, monkeypatch):
    """A function that makes a copy without some exercises."""
    monkeypatch.setattr(grading, "METHOD", "fork")
    def make(name, *numbers):
        assert tool("--student", tmp_path / name, *numbers) == (0, "")
        return tmp_path / name
    return make

def test_a_handout_has_no_solution_and_no_dead_link(handout):
    folder = handout("handout", "1-24")
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".md")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    assert not {path.name for path in folder.rglob("*")} & {*exercise.FOR_TEACHERS}
    for part in PROJECT.all_parts:
        lines = part.text.split("\n")[part.find("stub").count("\n"):]
        lines = [line.split("  #")[0].strip() for line in lines]
        for line, (path, text) in itertools.product(lines, texts.items()):
            assert len(line) < 25 or line not in text, f"{path.name} solves {part.name}: {line}"
    assert 'metrics["bits"] = math.nan  # exercise 20' in texts[folder / "train.py"]
    for path in folder.rglob("*.md"):
        for link in re.findall(r"\]\(((?!http)[^)#]+)\)", texts[path]):
            assert (path.parent / link).exists(), f"{path} has a link to {link}"

def test_a_handout_runs_its_exercises_and_nothing_else(handout, tool):
    folder = handout("handout", "5", "9")
    words = [sys.executable, "-m", "pytest", "-q", "--color=no"]
    run = subprocess.run(words, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    tests = len(grading.outcomes(5, {}) + grading.outcomes(9, {}))
    assert f"{tests} failed" in run.stdout and " passed" not in run.stdout, run.stdout
    assert "Warning" not in run.stdout, "such as a mark that pytest.ini does not have"
    assert "ask your teacher" in tool("--solution", "5", root=folder)[1]
    assert "0 of 2 points" in tool("--report", folder)[1], "an untouched handout earns nothing"
    assert "nothing is written yet" in tool("--grade", "5", root=folder)[1]

def test_what_is_handed_in_is_collected(handout, tool, tmp_path):
    folder, other = handout("ada", "4-8", "11"), handout("empty", "4-8", "11")
    for path in other.rglob("*.py"):
        path.unlink()
    edit(folder, error(5), "return 110")
    edit(folder, error(6), "return x[..., : self.size]")
    edit(folder, "def assign(", "def deal(")
    edit(folder, error(7), "return (")
    edit(folder, error(11), PARTS["Rotation.compress"].text.split("\n", 1)[1].strip())
    tests = {int(test["name"].split(".")[0]): test
             for test in json.loads(tool("--report", folder, "--json")[1])["tests"]}
    states = [tests[number]["extra_data"]["state"] for number in (4, 5, 7, 8, 11)]
    assert states == ["taken out", "own code", "own code", "def line missing", "solution"]
    assert [tests[number]["score"] for number in (4, 5, 7, 8)] == [0] * 4
    assert 0 < tests[6]["score"] <= 0.3 and tests[11]["score"] == tests[11]["max_score"]
    assert "got 110" in tests[5]["output"] and "SyntaxError" in tests[7]["output"]
    assert tests[4]["output"] == "nothing is written yet: so it is not graded"
    table = tool("--report", folder, other, "--csv")[1]
    head, possible, ada, empty = csv.reader(io.StringIO(table))
    assert head == ["name", *(f"exercise {n}" for n in (4, 5, 6, 7, 8, 11)), "points"]
    assert ada[0] == "ada" and float(ada[-1]) == sum(map(float, ada[1:-1])) > 3
    assert empty[0] == "empty" and not any(map(float, empty[1:]))
    text = tool("--report", folder, "5-6")[1]
    assert "of 2 points: ada" in text and "Merging" not in text, "numbers choose"
    (folder / HERE / "handed_out.json").unlink()
    text = tool("--report", folder)[1]
    assert "Merging" in text and "Rotation" not in text, "a solution in place is left out"

def test_points_are_minutes():
    rows = re.findall(r"(?m)^### (\d+)\. .* \((\d+) points?, (\d+) minutes\)$", README)
    points = {int(number): int(points) for number, points, _ in rows}
    assert all(10 * int(points) == int(minutes) for _, points, minutes in rows)
    teacher = (ROOT / HERE / "TEACHER.md").read_text(encoding="utf-8")
    for numbers, said, hours in re.findall(r"(?m)^\|[^|]+\| ([-\d, ]+) \| (\d+) \| (\d+)", teacher):
        args = argparse.Namespace(numbers=numbers.split(", "), all=False, student=None)
        total = sum(points[number] for number in exercise.chosen(args, points))
        assert (total, round(total / 6)) == (int(said), int(hours)), numbers

BOTH = {"score", "output", "output_format", "name_format", "visibility", "extra_data"}
RESULTS = BOTH | {"execution_time", "test_output_format", "stdout_visibility", "tests"}
TESTS = BOTH | {"max_score", "status", "name", "number", "tags"}

def test_gradescopes_script_writes_its_json(project, handout, tmp_path):
    """The keys and types are those of Gradescope's documentation of results.json."""
    teacher = (ROOT / HERE / "TEACHER.md").read_text(encoding="utf-8")
    script = re.findall(r"```bash\n(#!.*?)```", teacher, re.S)[1].replace("python3", sys.executable)
    script = script.replace("/autograder", str(tmp_path))
    for name in ("source", "results", "submission"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/mora").symlink_to(project)
    found = []
    for i in range(2):  # nothing is handed in, and then mora.py
        subprocess.run(["bash", "-c", script], check=True, stderr=subprocess.DEVNULL)
        found.append(json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8")))
        folder = handout(f"handout{i}", "1-13")
        edit(folder, error(5), PARTS["square_size"].text.split('"""')[2].strip())
        (folder / "mora.py").replace(tmp_path / "submission/mora.py")
    nothing, results = found
    assert nothing["score"] == 0 and {*nothing, *results} <= RESULTS
    assert len(results["tests"]) == 13 and results["score"] == 1
    for test in results["tests"]:
        assert {*test} <= TESTS and isinstance(test["name"] + test["output"], str)
        assert 0 <= test["score"] <= test["max_score"]

def test_the_notebook_runs(project, tmp_path, monkeypatch, capfd):
    text = (ROOT / HERE / "colab.ipynb").read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    for words in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *words.split()], cwd=project, check=True)
    monkeypatch.chdir(tmp_path)
    small = '"train.py", "--max_steps=2", "--n_pairs=2", "--n_layer=1", "--n_embd=8", "--n_head=1"'
    names = {}
    for cell in (cell["source"] for cell in cells if cell["cell_type"] == "code"):
        cell = cell.replace("https://github.com/OWNER/PROJECT", f"file://{project}")
        exec(cell.replace('"train.py"', small), names)
    printed = capfd.readouterr().out
    assert len(cells) <= 10 and "pip install torch" not in text and "requirements" not in text
    for what in (f"torch {torch.__version__}", "step 2/2", "got 111", "math.isqrt"):
        assert what in printed, printed
