"""README and docs: links, files, options and commands exist, and what a page marks `bash run` runs as it stands.

The other commands for one machine are run by test_page_commands.py.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from ranks import long_but
from runs import ROOT, environment
from source_files import FILES, name_of

from dsyolo import cli
from dsyolo.models.yolov5 import VARIANTS

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES += [ROOT / "tests" / "golden" / "data" / "README.md"]
LANGUAGES = {"bash", "bash run", "text", "json", "yaml", "python"}
OWN_COMMAND = re.compile(r"(dsyolo|deepspeed|python|make|launch/[\w.]+|sbatch|kubectl|pip) \S")
OTHER_PROGRAMS = {"pre-commit"}  # nothing of theirs is checked
FOREIGN_OPTIONS = {"--", "--shm-size"}  # the latter is docker's
# YOLOv5's: dsyolo train takes them, or says what to give instead.
FOREIGN_FLAGS = frozenset(
    re.findall(r"--[\w-]+", (ROOT / "tests/config/foreign_flags.tsv").read_text(encoding="utf-8"))
)
OUR_PATHS = re.compile(r"(dsyolo|docs|tests|benchmarks|examples|launch|ds_configs|\.ci|\.github)/[\w./-]*")
READY_JSON = re.compile(r"(zero\d|adamw|bf16|fp16|fp32|pipeline\d|recompute|demo)\w*\.json")
MADE_BY_THE_USER = {"launch/hostfile", "launch/deepspeed_env", "ds_configs/my.json"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ---- reading pages


def fences(page: Path) -> list[tuple[str, str]]:
    """Return (info string, content) of each fenced block."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"), re.MULTILINE)


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def commands(block: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without comments and leading NAME=value."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word in ("&&", "||", "|", ";"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- what exists


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text))


@lru_cache
def help_options(program: str) -> frozenset[str]:
    """Return the options that `program --help` names: train, deepspeed, or a command of dsyolo."""
    if program in ("train", "deepspeed"):
        script = (
            ROOT / "dsyolo" / "train.py"
            if program == "train"
            else Path(sys.executable).with_name("deepspeed")
        )
        done = subprocess.run(
            [sys.executable, str(script), "--help"],
            capture_output=True,
            text=True,
            env=environment(ROOT),
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return frozenset(options_in(done.stdout)) | (FOREIGN_FLAGS if program == "train" else frozenset())
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        cli.main([program, "--help"])
    assert end.value.code == 0, f"there is no command `dsyolo {program}`"
    return frozenset(options_in(out.getvalue()))


@lru_cache
def dsyolo_commands() -> tuple[str, ...]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main(["--help"])
    found = tuple(re.findall(r"^ {4}(\w+) ", out.getvalue(), re.MULTILINE))
    assert {"val", "detect", "plan"} <= set(found), out.getvalue()
    return found


def all_options() -> set[str]:
    return {name for program in ("train", "deepspeed", *dsyolo_commands()) for name in help_options(program)}


def faults_of(words: list[str]) -> Iterator[str]:
    """Yield what is wrong with a command: an option, file, target or program that does not exist."""
    program, rest = words[0], words[1:]
    if program in OTHER_PROGRAMS:
        return
    yield from missing_files(words)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        yield from (f"make has no target {word}" for word in rest if word not in targets)
    elif program == "dsyolo":
        if rest and rest[0] not in dsyolo_commands():
            yield f"there is no command `dsyolo {rest[0]}`"
        elif rest:
            end = rest.index("--") if "--" in rest else len(rest)
            yield from unknown(rest[:end], help_options(rest[0]), f"dsyolo {rest[0]}")
            yield from unknown(rest[end + 1 :], help_options("train"), "train.py")
    elif program in ("deepspeed", "python"):
        script = next((i for i, word in enumerate(rest) if word.endswith(".py")), len(rest))
        if program == "deepspeed":
            yield from unknown(rest[:script], help_options("deepspeed"), "deepspeed")
        if rest[script:] and rest[script] == "dsyolo/train.py":
            yield from unknown(rest[script + 1 :], help_options("train"), "train.py")
        elif rest[script:] and (ROOT / rest[script]).is_file():
            known = set(re.findall(r"[\"'](--[\w-]+)[\"']", (ROOT / rest[script]).read_text()))
            yield from unknown(rest[script + 1 :], known, rest[script])
    elif program.startswith("launch/") or program == "sbatch":
        yield from unknown(rest, help_options("train"), "train.py")
    elif program not in ("cp", "kubectl", "pip"):
        yield f"{program}: a program that tests/docs/test_docs.py does not know"


def missing_files(words: list[str]) -> Iterator[str]:
    for flag, word in pairwise(["", *words]):
        if OUR_PATHS.fullmatch(word) and word not in MADE_BY_THE_USER and not (ROOT / word).exists():
            yield f"there is no {word}"
        if flag == "--model" and word not in VARIANTS and ":" not in word:
            yield f"there is no model {word}"
        if flag == "--strategies":
            yield from (
                f"no {n} in ds_configs/"
                for n in word.split(",")
                if not (ROOT / f"ds_configs/{n}.json").is_file()
            )


def unknown(words: list[str], known: set[str] | frozenset[str], program: str) -> Iterator[str]:
    for word in words:
        if word.startswith("--") and word != "--" and word.partition("=")[0] not in known:
            yield f"{program} has no option {word}"


# ---- tests


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 300_000, picture


@each_page
def test_every_fence_says_what_it_holds(page):
    for info, block in fences(page):
        assert info in LANGUAGES, f"```{info}: mark it as one of {sorted(LANGUAGES)}"
        if not info.startswith("bash"):
            shell = [line for line in block.splitlines() if OWN_COMMAND.match(line)]
            assert not shell or info == "python", f"a command in a fence that is not bash: {shell}"


@each_page
def test_links_lead_to_pages_and_headings(page):
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists():
            faults.append(f"{target}: there is no {path}")
        elif anchor and anchor not in slugs(other):
            faults.append(f"{target}: no such heading there")
    assert not faults, "\n".join(faults)


@each_page
def test_commands_name_what_exists(page):
    blocks = [block for info, block in fences(page) if info.startswith("bash")]
    faults = [
        f"{shlex.join(words)}: {fault}"
        for block in blocks
        for words in commands(block)
        for fault in faults_of(words)
    ]
    assert not faults, "\n".join(faults)


@each_page
def test_code_in_sentences_names_what_exists(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names what was")
    faults, known = [], all_options() | FOREIGN_OPTIONS
    for span in code_spans(page):
        words = span.split()
        if words[0] in ("dsyolo", "make", "deepspeed", "python") and len(words) > 1 and "<" not in span:
            faults += [f"`{span}`: {fault}" for fault in faults_of(words)]
        elif words[0] != "yolov5":
            faults += [
                f"`{span}`: no such option" for word in words if word.startswith("--") and word not in known
            ]
        for word in words:
            if OUR_PATHS.fullmatch(word) and word not in MADE_BY_THE_USER and not (ROOT / word).exists():
                faults.append(f"`{span}`: there is no {word}")
            if READY_JSON.fullmatch(word) and not (ROOT / "ds_configs" / word).is_file():
                faults.append(f"`{span}`: there is no such file in ds_configs/")
    assert not faults, "\n".join(faults)


def test_checks_before_a_commit_are_local_and_ci_runs_what_the_makefile_has():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["entry"].startswith(".venv/bin/") for repo in hooks for hook in repo["hooks"])
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert [step for step in steps if ".ci/run" in step]
    assert "make lint" in (ROOT / ".ci" / "run").read_text()


def test_every_ready_json_is_described():
    described = (ROOT / "docs" / "deepspeed_json.md").read_text()
    missing = [
        path.name
        for path in sorted((ROOT / "ds_configs").glob("*.json"))
        if f"`{path.name}`" not in described
    ]
    assert not missing, f"docs/deepspeed_json.md lacks {missing}"


def test_source_files_cite_pages_and_headings_that_exist():
    faults = []
    for path in FILES:
        for name, heading in re.findall(r"(docs/\w+\.md)(?:, ([A-Z]\w+))?", path.read_text(encoding="utf-8")):
            if not (ROOT / name).is_file():
                faults.append(f"{name_of(path)}: there is no {name}")
            elif heading and heading.lower() not in slugs(ROOT / name):
                faults.append(f"{name_of(path)}: {name} has no heading {heading}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "page",
    long_but([ROOT / "README.md"], [page for page in PAGES if "bash run" in dict(fences(page))]),
    ids=lambda page: page.name,
)
def test_what_a_page_marks_as_run_runs(page, tmp_path):
    """Executes the page's `bash run` blocks one after the other, in a folder that looks like a checkout."""
    (tmp_path / "dsyolo").symlink_to(ROOT / "dsyolo")
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    env = {**environment(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for info, block in fences(page):
        if info == "bash run":
            done = subprocess.run(
                ["bash", "-euc", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if page.name == "README.md":
        assert list((tmp_path / "pictures").glob("*.jpg"))


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("dsyolo plan --gpus 8x24GiB", ""),
        ("dsyolo plan --gpu_count 8", "dsyolo plan has no option --gpu_count"),
        ("dsyolo paint", "there is no command `dsyolo paint`"),
        ("deepspeed --num_gpus 2 dsyolo/train.py --data data.yaml", ""),
        ("deepspeed --gpus 2 dsyolo/train.py --data data.yaml", "deepspeed has no option --gpus"),
        (
            "python dsyolo/train.py --deepspeed_config ds_configs/zero9.json",
            "there is no ds_configs/zero9.json",
        ),
        ("A=1 python dsyolo/train.py --dat data.yaml  # a comment", "train.py has no option --dat"),
        ("cp a b && make tea", "make has no target tea"),
        ("python benchmarks/pipeline.py --turns 3", "benchmarks/pipeline.py has no option --turns"),
        ("dsyolo scale --ranks 1 --strategies zero7", "no zero7 in ds_configs/"),
        ("dsyolo scale --ranks 1 -- --cash ram", "train.py has no option --cash"),
        ("python dsyolo/train.py --model yolov9", "there is no model yolov9"),
        ("rm -rf x", "rm: a program that tests/docs/test_docs.py does not know"),
    ],
)
def test_the_check_of_commands_sees_faults(command, fault):
    assert [found for words in commands(command) for found in faults_of(words)] == ([fault] if fault else [])
