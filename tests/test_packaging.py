"""What a user installs and starts: the wheel, scripts/run, the pins; and the style and type checkers, each as one test."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


def ok(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, f"{' '.join(result.args)}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


# --- the wheel --------------------------------------------------------------------------------------------------------------------


def package_files() -> set[str]:
    """Sources as the wheel should name them."""
    found = set()
    for folder in (ROOT / "minllm", ROOT / "kernels/minllm_kernels"):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".typed", ".json", ".md", ".txt", ".yaml", ".textproto", ".cc", ".h"):
                found.add(path.relative_to(folder.parent).as_posix())
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, by way of the sdist and without the network: setuptools leaves its build folder beside the sources, and packs
    what it finds there from an earlier build."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("minllm", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    out = tmp_path_factory.mktemp("wheel")
    ok(run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy))
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == package_files()
    assert {"minllm/py.typed", "minllm_kernels/py.typed"} <= packed
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode())
    assert metadata["Requires-Python"] == ">=3.12"
    assert metadata["License-Expression"] == "MIT"
    core = {Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert "jax" in core
    assert not core & {"torch", "transformers", "tensorflow", "wandb"}, "these are extras"


def test_the_wheel_runs_away_from_the_repository(wheel, tmp_path):
    target = tmp_path / "site"
    ok(run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(target)}}
    found = ok(run(sys.executable, "-c", "import minllm, minllm_kernels; print(minllm.__file__, minllm_kernels.__file__)", **options))
    assert found.split() == [str(target / "minllm/__init__.py"), str(target / "minllm_kernels/__init__.py")]
    assert "--config" in ok(run(sys.executable, "-m", "minllm.train", "--help", **options))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    """Downloads every core dependency."""
    ok(run(sys.executable, "-m", "venv", tmp_path / "venv"))
    python = tmp_path / "venv/bin/python"
    ok(run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel))
    options = {"cwd": tmp_path, "env": {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
    assert "--config" in ok(run(python, "-m", "minllm.train", "--help", **options))
    ok(run(python, "-m", "minllm.train", "--config", ROOT / "configs/quickstart.yaml", "--dry-run", **options))


# --- the pins ---------------------------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)]
    assert not wrong, f"constraints.txt holds NAME==VERSION only, no addresses, paths or hashes: {wrong}"
    return {str(canonicalize_name(name)): version for name, version in (line.split("==") for line in lines)}


def test_every_dependency_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    for line in [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]:
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} of pyproject.toml has no pin in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{line} excludes the pin {version}"


# --- the checkers -----------------------------------------------------------------------------------------------------------------


def test_ruff():
    result = run(sys.executable, "-m", "ruff", "check", "--output-format", "concise", ROOT)
    assert result.returncode == 0, f"ruff check (mend the easy ones with `ruff check --fix`):\n{result.stdout}{result.stderr}"


def test_pyright():
    result = run(sys.executable, "-m", "basedpyright", "--project", ROOT, "--pythonpath", sys.executable, "--level", "error", cwd=ROOT)
    assert result.returncode == 0, f"pyright (`basedpyright` in the repository shows the same):\n{result.stdout}{result.stderr}"


# --- scripts/run ------------------------------------------------------------------------------------------------------------------
# Tried on a machine made of a few shell tools and a Python that only writes down how it was called.

TOOLS = "bash cat dirname env find flock grep head ls mkdir mv readlink rm sed sleep sort touch tr cp".split()
FAKE_PYTHON = """#!/bin/sh
echo "$PWD: $*" >>"$CALLS"
case "$*" in
    *version_info*) exit 0 ;;
    *sys.executable*) echo "$0" ;;
    -V) echo Python 3.12.99 ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg" ;;
    "-m pip install "*) sleep "${PIP_SECONDS:-0}"; exit "${PIP_STATUS:-0}" ;;
esac
"""


class Machine:
    def __init__(self, folder: Path):
        self.clone, self.bin, self.calls_file, self.elsewhere = (folder / name for name in ("clone", "bin", "calls", "elsewhere"))
        for path in (self.clone / "scripts", self.clone / "minllm", self.bin, self.elsewhere):
            path.mkdir(parents=True)
        for name in ("scripts/run", "constraints.txt", "pyproject.toml", "realweights.txt"):
            shutil.copy(ROOT / name, self.clone / name)
        (self.clone / "minllm/train.py").write_text('if __name__ == "__main__":\n    main()\n')
        (self.clone / "minllm/spec.py").write_text("")
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.calls_file.touch()
        self.environment = {"PATH": str(self.bin), "HOME": str(folder), "CALLS": str(self.calls_file), "MINLLM_ACCELERATOR": "cpu"}

    def python(self, name: str = "python3.12", text: str = FAKE_PYTHON) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen([self.clone / "scripts/run", *arguments], cwd=self.elsewhere, env={**self.environment, **environment},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        """Exit status, what it said, and the calls of Python that change or run something."""
        self.calls_file.write_text("")
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err, self.calls()

    def calls(self) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if re.search(r": -m (venv|pip install|pytest|minllm)|\.py", line)]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_run_makes_the_environment_once(machine):
    machine.python()
    status, said, calls = machine.run("train", "--config", "a b.yaml", "x.y=1")
    assert status == 0, said
    assert "the CPU version" in said
    assert [call.split(": -m ")[1].split()[0] for call in calls] == ["venv", "pip", "pip", "minllm_kernels.native", "minllm.train"]
    assert f"-c {machine.clone}/constraints.txt" in calls[2]
    assert calls[2].endswith(f"-e {machine.clone}[cpu]")
    assert calls[4] == f"{machine.elsewhere}: -m minllm.train --config a b.yaml x.y=1", "the command runs where the user stands"
    status, said, calls = machine.run("train")
    assert (status, said, calls) == (0, "", [f"{machine.elsewhere}: -m minllm.train"])


def test_run_installs_the_tests_on_first_need_and_keeps_them(machine):
    machine.python()
    machine.run("train")
    status, said, calls = machine.run("test", "-k", "law")
    assert status == 0, said
    assert calls[1].endswith("[cpu,test]")
    assert "--no-deps" in calls[3] and calls[3].endswith(f"-r {machine.clone}/realweights.txt")
    assert calls[4].startswith(f"{machine.clone}: -m pytest ")
    assert calls[4].endswith(" -k law")
    assert len(machine.run("train")[2]) == 1
    assert len(machine.run("test")[2]) == 1


def test_run_brings_a_changed_environment_up_to_date(machine):
    machine.python()
    machine.run("test")
    with open(machine.clone / "constraints.txt", "a") as file:
        file.write("novelty==1.0\n")
    calls = machine.run("train")[2]
    assert len(calls) == 5
    assert calls[1].endswith("[cpu,test]"), "an update keeps the tests"
    assert machine.run("train", MINLLM_ACCELERATOR="gpu")[2][1].endswith("[gpu,test]")


def test_run_does_not_take_a_half_made_environment_for_ready(machine):
    machine.python()
    status, said, calls = machine.run("train", PIP_STATUS="1")
    assert status == 1
    assert "run this again" in said.splitlines()[-1]
    assert not any("minllm.train" in call for call in calls)
    process = machine.start("train", PIP_SECONDS="2")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.kill()
    process.communicate()
    status, said, calls = machine.run("train")
    assert status == 0, said
    assert sum(" pip install " in call for call in calls) == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock two first runs at once are not kept apart")
def test_two_first_runs_at_once_install_once(machine):
    machine.python()
    processes = [machine.start("train", PIP_SECONDS="0.5") for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(" pip install " in call for call in machine.calls()) == 2, "setuptools and the project, once"
    assert sum("waiting for another run" in text for text in said) == 1


def test_run_tries_each_python_it_finds(machine):
    for name in ("python3.12", "python3"):
        machine.python(name, "#!/bin/sh\necho 'pyenv: not switched on' >&2\nexit 127\n")
    status, said, calls = machine.run("train")
    assert (status, calls) == (2, [])
    assert "needs Python 3.12 or newer" in said.splitlines()[-1]
    machine.python("python3.14")
    assert machine.run("train")[0] == 0


def test_run_finds_the_pythons_of_pyenv(machine):
    folder = machine.elsewhere.parent / ".pyenv/versions/3.12.7/bin"
    folder.mkdir(parents=True)
    machine.python()
    shutil.move(machine.bin / "python3.12", folder / "python")
    assert machine.run("train")[0] == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["trian"], "there is no command 'trian'; choose from: test train"),
    (["spec"], "there is no command 'spec'"),
    (["nothing.py"], "there is no file nothing.py"),
])
def test_run_refuses_before_it_installs(machine, arguments, message):
    machine.python()
    status, said, calls = machine.run(*arguments)
    assert (status, calls) == (2, [])
    assert message in said


def test_run_does_not_touch_a_folder_that_is_no_environment(machine):
    machine.python()
    (machine.elsewhere / "thesis.tex").write_text("years of work")
    status, said, _ = machine.run("train", MINLLM_VENV=str(machine.elsewhere))
    assert status == 2
    assert "not an environment" in said
    assert (machine.elsewhere / "thesis.tex").read_text() == "years of work"


def test_run_without_arguments_explains_itself(machine):
    status, said, calls = machine.run()
    assert (status, calls) == (0, [])
    assert "usage: scripts/run COMMAND" in said
    assert "commands: train" in said


def test_stale_results_are_listed(tmp_path):
    (tmp_path / "tests/results").mkdir(parents=True)
    (tmp_path / "kernels/bench/results").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    source = tmp_path / "source.py"
    source.write_text("x = 1")
    good = {"sources": {"source.py": hashlib.sha256(source.read_bytes()).hexdigest()}, "seconds": 1.5}
    (tmp_path / "tests/results/grid.json").write_text(json.dumps(good))
    command = (sys.executable, "-m", "pytest", "-n", "2", "--stale")
    assert ok(run(*command, cwd=tmp_path)).strip() == "0 stale results"
    source.write_text("x = 2")
    (tmp_path / "kernels/bench/results/a.json").write_text(json.dumps({"sources": {"lost.py": "0"}}))
    (tmp_path / "kernels/bench/results/b.json").write_text(json.dumps({"seconds": 1}))
    result = run(*command, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        "tests/results/grid.json: source.py changed",
        "kernels/bench/results/a.json: lost.py is gone",
        "kernels/bench/results/b.json: names no sources, so nobody can tell whether it still holds",
        "3 stale results",
    ]
