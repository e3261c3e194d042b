"""The graders, graded: an exercise's tests fail while it is taken out, catch the wrong answers of answers.txt, and
accept the right ones there, which have other designs. Then the machinery and the commands of tests/exercise.py.

The changed sources are loaded in this process, under the graders, whose tests are called one by one.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import exercise
import grading
from grading import FILES, ROOT

EXERCISES = (ROOT / "tests" / "EXERCISES.md").read_text(encoding="utf-8")
PROJECT = exercise.Project(ROOT)
PARTS = {part.name: part for part in PROJECT.all_parts}
FOREIGN = PROJECT.foreign_code()
pytestmark = pytest.mark.skipif(bool(FOREIGN), reason=f"for the project's own solutions, and here is {FOREIGN}")
SLIPS = NameError, AttributeError, SyntaxError  # of which a wrong answer would be caught by its own fault


def read_answers(path):
    """[(function, "-" or "+", what, body), ...]"""
    blocks = re.split(r"\n(?=\S+\n[-+] )", path.read_text(encoding="utf-8"))[1:]
    return [(block.split("\n")[0], kind, what, textwrap.dedent(body).strip("\n")) for block in blocks
            for kind, what, body in re.findall(r"(?m)^([-+]) (.*)\n((?:(?:    .*)?\n)+)", block + "\n")]


ANSWERS = read_answers(ROOT / "tests" / "answers.txt")
MAPS = [name for name in PARTS if re.search(r"\.(update|forward|\w*compress|rotate)$", name) and "Product" not in name]
OWED = {"three dimensions only": "a, b, *_ = x.shape\nreturn right(x.flatten(0, 1)).unflatten(0, (a, b))",
        "another type": "return right(x.double())",
        "x changed": "x *= 2\nreturn right(x / 2)",
        "the gradient of x": "return right(x.detach() + 0 * x)",
        "another device": "y = right(x)\nreturn y + torch.zeros(y.shape, dtype=y.dtype)"}


def planted(name, body):
    """(exercise, {file: source}) with this body in a function, whose solution is right_NAME; or with an operator."""
    if name == "OPERATORS":
        own = f"class Own(Truncation):\n{textwrap.indent(body, '    ')}\n\n\nOPERATORS = dict(own=Own, "
        return 24, {"mora.py": PROJECT.sources["mora.py"].replace("\nOPERATORS = dict(", f"\n{own}")}
    part = PARTS[name]
    head, error = exercise.stub(part.text, part.number, part.name).rsplit("\n", 1)
    right = re.sub(r"\bdef ", "def right_", part.text, count=1)
    text = f"{right}\n\n{head}\n{textwrap.indent(body, error[:len(error) - len(error.lstrip())])}"
    return part.number, {part.file: exercise.swap(PROJECT.sources[part.file], {part.name: text})}


def out(numbers):
    """{file: source} with these exercises taken out."""
    stubs = {part.name: part.find("stub") for part in PROJECT.all_parts if part.number in numbers}
    return {file: exercise.swap(source, stubs) for file, source in PROJECT.sources.items()}


def faults(number, sources):
    """Of an exercise's tests, those that fail, and what they raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test, find_fault in grading.outcomes(number, sources):
            if error := find_fault():
                yield test, error


# ----------------------------------------------------------------------------------------------------------------------
# The proof


@pytest.mark.parametrize("number", PROJECT.exercises)
def test_an_exercise_is_graded_by_its_own_tests(number):
    later = dict(faults(number, out(range(number + 1, 99))))
    assert not later, f"with all exercises after {number} taken out, its tests should pass: {later}"
    for test, error in faults(number, out([number])):
        assert isinstance(error, NotImplementedError) and str(error).startswith(f"exercise {number}: "), (
            f"with exercise {number} taken out, {test!r} should end in its NotImplementedError, not in {error!r}")
    taken_out, tests = [*faults(number, out([number]))], grading.outcomes(number, {})
    assert len(taken_out) == len(tests) * bool(PROJECT.parts[number]), f"only {taken_out} fail"


@pytest.mark.parametrize("name, kind, what, body", ANSWERS, ids=[f"{kind} {name}: {what}"
                                                                 for name, kind, what, _ in ANSWERS])
def test_an_answer(name, kind, what, body):
    number, sources = planted(name, body)
    test, error = next(faults(number, sources), (None, None))
    if kind == "+":
        assert not error, f"{what} is right, and {test} says: {error!r}"
    else:
        assert error, f"exercise {number}: {name}, {what}, is not caught"
        assert not isinstance(error, SLIPS), f"{what}: a slip in the answer's text: {error!r}"


@pytest.mark.parametrize("what", OWED)
@pytest.mark.parametrize("name", MAPS)
def test_what_a_map_owes(name, what):
    """One fault in each map that an exercise asks for: the tests of all of them are to notice."""
    first, *more = re.search(r"def \w+\(self, (.*?)\)", PARTS[name].text)[1].split(", ")
    right = f"lambda x: self.right_{name.split('.')[1]}({', '.join(['x', *more])})"
    number, sources = planted(name, f"x, right = {first}, {right}\n{OWED[what]}")
    error = next(faults(number, sources), (None, None))[1]
    assert error and not isinstance(error, SLIPS), f"exercise {number}: {name}, {what}: {error!r}"


def test_every_exercise_has_a_text_a_mark_and_wrong_answers():
    markers = dict(re.findall(r"(?m)^    ex(\d+): (.+)$", (ROOT / "pytest.ini").read_text(encoding="utf-8")))
    assert markers == {str(number): title for number, (title, _) in PROJECT.exercises.items()}, "pytest.ini differs"
    assert list(PROJECT.exercises) == list(range(1, len(PROJECT.exercises) + 1))
    few = [name for name in PARTS if sum((name, "-") == answer[:2] for answer in ANSWERS) < 3]
    assert not few, f"fewer than three wrong answers for {few}"


def test_the_hashes_are_those_of_the_solutions():
    assert exercise.hashes(ROOT) == (ROOT / "tests" / "solutions.json").read_text(encoding="utf-8"), (
        "a solution or a mark was changed, or EXERCISES.md takes it for a student's: python tests/exercise.py --hashes")


def test_every_fault_is_told_in_a_sentence():
    source = "".join((ROOT / path).read_text(encoding="utf-8") for path in grading.GRADERS)
    assert not re.findall(r"(?m)^ *assert [^,\n]*$", source), "an assertion says nothing to the student"


def test_the_experiments_in_python_print_what_the_text_says(capsys):
    printed = ""
    for block in re.findall(r"```python\n(.*?)```", EXERCISES, re.S):
        torch.manual_seed(0)
        exec(block, {})
        printed += capsys.readouterr().out
    lost, folded = map(int, re.findall(r"(?:False|True) (\d+) of 3072", printed))
    assert lost < 1000 and folded == 3072
    assert re.findall(r"lora (\d+) (\d+)", printed) == [("1", "1"), ("2", "2"), ("8", "8")]
    assert "cycle [13, 25, 25, 25, 25, 25, 25, 25, 25, 25]" in printed, "2 r̂ - 1 after the second merge, and no more"
    assert "random [13, 25, 37, 49, 61, 73, 85, 96, 96, 96]" in printed, "t (r̂ - 1) + 1, up to full rank"
    steps = re.findall(r"[-+]0\.\d{3}", printed)
    assert steps == re.findall(r"[-+]0\.\d{3}", EXERCISES) != [], "Adam's first steps after a merge"
    costs = re.findall(r"defined +([\d.]+) .*merged +([\d.]+)", printed)
    saves = [float(defined) > float(merged) for defined, merged in costs]
    assert saves == [False, False, True, True], "merging saves FLOPs from 2 k d / (k + d) = 768 tokens on"
    lost = [[int(share) for share in line] for line in re.findall(r"(\d+)% lost by .*, (\d+)% at random", printed)]
    assert lost[0][0] < lost[0][1] and lost[-1][0] > 5 * lost[-1][1], "random rounding wins in the long run"


# ----------------------------------------------------------------------------------------------------------------------
# The machinery


@pytest.mark.parametrize("file", FILES)
def test_functions_are_found_where_the_source_is_no_python(file):
    source = PROJECT.sources[file]
    assert exercise.functions(source + "\ndef (") == exercise.functions(source)


def test_a_syntax_error_stops_its_own_exercise_only():
    broken = exercise.swap(PROJECT.sources["mora.py"], {"square_size": "def square_size(:\n    return (1"})
    theirs = PROJECT.sources | {"mora.py": broken}
    graded = {number: dict(faults(number, PROJECT.graded(number, theirs))) for number in (4, 5, 6, 24)}
    assert not (graded[4] or graded[6] or graded[24])
    assert isinstance(graded[5]["the code loads"], SyntaxError)


def test_an_answer_that_hangs_or_ends_the_program(monkeypatch):
    if sys.platform == "linux":
        monkeypatch.setattr(grading, "METHOD", "fork")  # torch is there already
    monkeypatch.setattr(grading, "LIMIT", 1)
    jobs = [planted(name, body) for name, body in [
        ("square_size", "while True:\n    pass"), ("Truncation.compress", "import os\nos._exit(0)"),
        ("Sharing.compress", "raise SystemExit"), ("Sharing.assign", "return self.right_assign(features, kind, None)")]]
    results = grading.grade(jobs)
    assert results[5][0][1] == "it takes more than 1 seconds" and results[5][1][1] == "not run"
    assert "it ends the program" in dict(results[6]).values()
    assert any("SystemExit" in wrong for _, wrong in results[7])
    assert results[8] and not all(wrong for _, wrong in results[8])


def test_what_a_student_is_told():
    number, sources = planted("Sharing.decompress", "return z.nonsense")
    told = [grading.describe(error) for _, error in faults(number, sources)]
    assert any("AttributeError" in line and line.endswith("(in decompress: return z.nonsense)") for line in told), told
    number, sources = planted("Adapter.delta_weight", "return self.right_delta_weight().half().to(self.dtype)")
    told = [grading.describe(error) for _, error in faults(number, sources)]
    assert any(re.search(r"expected -?[\d.]+ at \(\d, \d\), got .* off by \d\.\de-\d+", line) for line in told), told


# ----------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def project(tmp_path):
    """A copy of the project as a downloaded archive is, without git."""
    for pattern in (*exercise.HANDED_OUT, "tests/TEACHER.md", "tests/answers.txt"):
        for path in ROOT.glob(pattern):
            copy = tmp_path / "project" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path / "project"


@pytest.fixture
def tool(project, capsys):
    """Runs exercise.py in the project; -> its exit status, and all that it prints."""
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
    path = project / file
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new), encoding="utf-8")


def state(tool, number):
    return re.search(rf"(?m)^ *{number}  {re.escape(PROJECT.exercises[number][0])} +(.+)$", tool()[1])[1]


ERROR = 'raise NotImplementedError("exercise {}: write {}, as EXERCISES.md says")'


def test_as_a_student_types_it(project, tool, monkeypatch):
    if sys.platform == "linux":
        monkeypatch.setattr(grading, "METHOD", "fork")

    def python(*words):
        run = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True, encoding="utf-8")
        return run.returncode, run.stdout + run.stderr

    assert python("tests/exercise.py", "9")[0] == 0 and state(tool, 9) == "taken out"
    status, text = python("-m", "pytest", "-q", "-m", "ex9", "tests/test_linear_maps.py")
    assert status == 1 and "exercise 9: write Decoupling.compress, as EXERCISES.md says" in text, text
    edit(project, ERROR.format(9, "Decoupling.compress"), "return self.rotate(x.unflatten(-1, (-1, self.size)))")
    status, text = tool("--grade", "9")
    passed, tests = map(int, re.search(r"(\d+) of (\d+) tests passed", text).groups())
    assert status == 0 and 0 < passed < tests and "FAILED  the values of, decoupling compress" in text, text
    assert state(tool, 9) == f"own code, {passed} of {tests} tests"
    edit(project, "unflatten(-1, (-1, self.size))", "unflatten(-1, (-1, self.size, 1))")
    assert state(tool, 9) == "own code", "marks of other code"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_everything_out_and_back_is_what_it_was(project, tool, newline):
    for name in FILES:
        (project / name).write_text((project / name).read_text(encoding="utf-8"), encoding="utf-8", newline=newline)
    before = [(project / name).read_bytes() for name in FILES]
    for _ in range(2):
        assert tool("--all")[0] == 0
    stubs = "".join((project / name).read_text(encoding="utf-8") for name in FILES)
    assert all(ERROR.format(part.number, part.name) in stubs for part in PROJECT.all_parts)
    for name in FILES:
        compile((project / name).read_bytes(), name, "exec")
    for _ in range(2):
        assert tool("--solution", "1-23")[0] == 0
    assert [(project / name).read_bytes() for name in FILES] == before


def test_own_code_is_never_taken_for_the_solution(project, tool):
    tool()
    body = "return min(math.isqrt((in_features + out_features) * rank), in_features, out_features)"
    edit(project, body, "return 1  # by hand, without taking it out")
    assert state(tool, 5) == "own code"
    for i in (1, 2, 3):  # taken out, replaced by the solution, and taken out again
        assert tool(*["--solution"] * (i == 2), "5")[0] == 0
        assert f"return {i}  #" in (project / f"tests/kept/own/5-mora-square_size.{i}.py").read_text(encoding="utf-8")
        if i == 2:
            assert state(tool, 5) == "solution" and "-    return 2" in tool("--diff", "5")[1]
        assert tool("--own", "5")[0] == 0 and state(tool, 5) == "own code"
        edit(project, f"return {i}  #", f"return {i + 1}  #")
    edit(project, "-> int:  # exercise 5", "-> int:")  # the mark lost, and more than the body changed
    assert tool("--solution", "5")[0] == 0
    assert (project / "mora.py").read_bytes() == (ROOT / "mora.py").read_bytes()


def test_another_release_of_a_solution(project, tool):
    assert tool("5")[0] == 0
    edit(project, "isqrt((in_features", "isqrt((0 + in_features", "tests/kept/solutions.json")
    status, text = tool("--solution", "5")
    assert status == 2 and "is not here" in text, "a kept text is no solution if its hash is not"
    shutil.copy(ROOT / "mora.py", project)
    assert state(tool, 5) == "solution"
    (project / "tests" / "kept" / "solutions.json").write_text("")
    status, text = tool()
    assert status == 2 and "solutions.json is damaged: delete it" in text


@pytest.mark.parametrize("words, message", [
    (["99"], "no exercise 99: they are 1 to 24"), (["0"], "no exercise 0"), (["3-99"], "no exercise 99"),
    (["two"], "'two' is neither"), (["24"], "nothing to take out"), (["--solution"], "needs the number"),
    (["--solve", "1"], "--solve"), (["--own", "5"], "no code of your own"), (["1", "99"], "no exercise 99"),
    (["--report", "nowhere"], "has none of mora.py"), (["--student", "."], "exists already")])
def test_wrong_input_gets_one_clear_line(words, message, project, tool, monkeypatch):
    monkeypatch.chdir(project)
    status, error = tool(*words)
    assert status == 2 and message in error and error.count("\n") == 1 and error.startswith("exercise.py: error: ")
    assert (project / "mora.py").read_bytes() == (ROOT / "mora.py").read_bytes(), "an error came after a change"


def test_code_that_is_broken_or_gone_stops_its_own_exercise_only(project, tool):
    assert tool("5", "8")[0] == 0
    edit(project, "def square_size(", "def size(")
    edit(project, ERROR.format(8, "Sharing.assign"), "return (")
    assert (state(tool, 5), state(tool, 8), state(tool, 7)) == ("def line missing", "own code", "solution")
    status, error = tool("--solution", "5")
    assert status == 2 and "mora.py has no square_size any more" in error
    assert tool("7")[0] == tool("--solution", "7", "8")[0] == 0 and state(tool, 8) == "solution"


def test_as_a_teacher_hands_out_and_collects(project, tool, tmp_path, monkeypatch):
    if sys.platform == "linux":
        monkeypatch.setattr(grading, "METHOD", "fork")
    copy = tmp_path / "handout"
    assert tool("--student", copy, "1-10")[0] == 0
    files = (path for path in copy.rglob("*") if path.is_file())
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in files}
    for part in (part for part in PROJECT.all_parts if part.number <= 10):
        body = part.text.split("\n")[part.find("stub").count("\n"):]
        found = [name for name, text in texts.items() if "\n".join(body) in text]
        assert len(body) < 2 or not found, f"the solution of {part.name} is in {found}"
    assert {"EXERCISES.md", "mora.py", "exercise.py"} <= texts.keys()
    assert not {"test_graders.py", "TEACHER.md", "answers.txt"} & texts.keys()
    status, text = tool("--solution", "5", root=copy)
    assert status == 2 and "ask your teacher" in text
    tool(root=copy)
    bad_size = "if rank not in range(1, 99):\n        raise ValueError\n    return 110"
    for number, name, body in [(5, "square_size", bad_size),
                               (6, "Truncation.compress", "return x[..., :self.size]"),
                               (6, "Truncation.decompress", "return F.pad(z, (0, self.out_features - z.shape[-1]))"),
                               (7, "Sharing.decompress", "return (")]:
        edit(copy, ERROR.format(number, name), body)
    status, text = tool("--report", copy, "--json")
    tests = {test["name"].split(".")[0]: test for test in json.loads(text)["tests"]}
    states = [tests[number]["extra_data"]["state"] for number in ("4", "5", "6", "7", "11")]
    assert states == ["taken out", "own code", "own code", "taken out", "solution"] or states[3] == "own code"
    assert 0 < tests["5"]["score"] < tests["5"]["max_score"] and "expected" in tests["5"]["output"]
    assert tests["6"]["score"] == tests["6"]["max_score"] and tests["4"]["score"] == 0 == tests["7"]["score"]
    assert tests["11"]["score"] == tests["11"]["max_score"], "an exercise is graded with the solutions of all others"
    assert "write " in tests["4"]["output"] and "SyntaxError" in tests["7"]["output"]
