"""`--resume PATH`: which run a path names, and what is said where it names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import parse
from dsyolo.config.resume import LrEnd, ResumePoint, extension_fault
from dsyolo.config.resume_path import settle_resume
from dsyolo.config.run_config import RunConfig


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, seen from the current one as runs/a."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/a")
    for name in ("weights", "checkpoints/step_00000003", "checkpoints/step_00000006"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("data: data.yaml\nepochs: 7\n", encoding="utf-8")
    for name in ("last", "best"):
        (folder / f"weights/{name}.safetensors").touch()
    Path("yolov5s.pt").touch()
    Path("data.yaml").touch()
    Path("ds.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "project"),
    [
        ("runs/a", "runs"),
        ("runs/a/", "runs"),
        ("runs/a/weights/last.safetensors", "runs"),
        ("runs/a/weights/last.pt", "runs"),  # by the habit of YOLOv5
        ("runs/a/weights", "runs"),
        ("runs/a/checkpoints", "runs"),
        ("runs/a/checkpoints/step_00000006", "runs"),
        ("runs/a/config.yaml", "runs"),
        ("{here}/runs/a", "{here}/runs"),
    ],
)
def test_a_path_in_a_run_resumes_it(run: Path, text: str, project: str) -> None:
    text, project = (one.format(here=Path.cwd()) for one in (text, project))
    found = parse(["--resume", text, "--deepspeed_config", "ds.json"])
    assert (found.resume, found.project, found.name, found.epochs) == ("always", project, "a", 7)


def test_paths_seen_from_inside_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for text in (".", "weights/last.safetensors", "checkpoints/step_00000006", "weights/.."):
        given: dict[str, Any] = {"resume": text}
        assert settle_resume(given, [])
        assert (given["project"], given["name"]) == (str(Path.cwd().parent), "a"), text


@pytest.mark.parametrize(("word", "meant"), [("true", "always"), ("True", "always"), ("0", "never")])
def test_words_of_yes_and_no_are_understood(run: Path, word: str, meant: str) -> None:
    given = {"resume": word}
    assert settle_resume(given, [])
    assert given["resume"] == meant


@pytest.mark.parametrize(
    ("text", "start", "remedy"),
    [
        (
            "alwys",
            "--resume: alwys does not exist, and it must be never, always, auto, or the path",
            "always?",
        ),
        ("runs/b", "--resume: runs/b does not exist", "Give a path that is there."),
        (
            "yolov5s.pt",
            "--resume: yolov5s.pt is a file of PyTorch",
            "from its weights: --weights yolov5s.pt.",
        ),
        ("data.yaml", "--resume: data.yaml belongs to no run: there is no config.yaml", "as runs/train."),
        (
            "",
            "--resume: '' given, but it must be never, always, auto,",
            "the shell's variable that is empty.",
        ),
        ("runs", "--resume: runs belongs to no run", "the runs in it: --resume runs/a, or runs/b."),
        (".", "--resume: . belongs to no run", "as runs/train."),
        ("other/deep", "--resume: other/deep belongs to no run", "as runs/train."),
        ("other/notes.txt", "--resume: other/notes.txt belongs to no run", "as runs/train."),
        (
            "runs/a/weights/best.safetensors",
            "--resume: runs/a/weights/best.safetensors holds weights alone",
            "",
        ),
        (
            "runs/a/checkpoints/step_00000003",
            "--resume: runs/a/checkpoints/step_00000003 is not the newest checkpoint, which is step_00000006",
            "move the newer ones out of runs/a/checkpoints first.",
        ),
        ("x" * 5000, "--resume: xxx", ""),
        ("a\0b", "--resume: ", ""),
    ],
)
def test_a_path_that_resumes_nothing_is_one_problem(run: Path, text: str, start: str, remedy: str) -> None:
    if text == "runs":
        Path("runs/b/logs").mkdir(parents=True)
        Path("runs/b/config.yaml").touch()
    Path("other/deep").mkdir(parents=True)
    for name in ("config.yaml", "notes.txt"):  # some other program's
        Path("other", name).touch()
    with pytest.raises(UserError) as caught:
        parse(["--resume", text])
    (problem,) = caught.value.problems
    assert problem.startswith(start)
    assert problem.endswith(remedy)


def test_name_and_project_may_not_contradict_the_path(run: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--resume", "runs/a", "--name", "b", "--project", "runs", "--deepspeed_config", "ds.json"])
    assert list(caught.value.problems) == [
        "--name: b given, but --resume runs/a is the run runs/a. Leave --name out."
    ]


def test_a_resumed_run_is_not_sent_to_the_json_for_an_optimizer_that_it_keeps(run: Path) -> None:
    for words, remedy in (
        (
            ["--resume", "runs/a"],
            "A resumed run keeps the optimizer that it began with: take this option away",
        ),
        (["--data", "data.yaml"], "Set optimizer.params.lr to 0.1 there"),
    ):
        with pytest.raises(UserError) as caught:
            parse([*words, "--lr0", "0.1", "--deepspeed_config", "ds.json"])
        (problem,) = caught.value.problems
        assert remedy in problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["--name", "../../esc", "--project", "out/runs"],
            "--name: ../../esc given, but it must be a folder inside of --project. Give --project . --name esc.",
        ),
        (["--name", "/else where/x"], "Give --project '/else where' --name x."),
        (
            ["--name", "a\x1b[31m\nb"],
            r"--name: a\x1b[31m\nb given, but it has characters that cannot be shown.",
        ),
        (["--project", "a\tb"], r"--project: a\tb given, but it has characters that cannot be shown."),
    ],
)
def test_a_new_run_stays_in_its_project_and_can_be_named(run: Path, words: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--data", "data.yaml", "--deepspeed_config", "ds.json", *words])
    (found,) = caught.value.problems
    assert problem in found
    for name in ("nested/name", "..a", "实验 1"):
        assert parse(["--data", "data.yaml", "--deepspeed_config", "ds.json", "--name", name]).name == name


@pytest.mark.parametrize(
    ("finished", "epochs", "lr_end", "fault"),
    [
        (True, 7, LrEnd(), None),
        (True, 9, LrEnd(), None),
        (False, 7, LrEnd(), None),
        (False, 9, LrEnd(is_constant=True), None),
        (True, 9, LrEnd(is_constant=True), None),
        (False, 9, LrEnd(), "only a finished run can be extended, as the lr comes down over its epochs"),
        (True, 9, LrEnd(is_zero=True), "the schedule of the run has ended with lr 0,"),
    ],
)
def test_a_finished_run_can_be_extended(
    run: Path, finished: bool, epochs: int, lr_end: LrEnd, fault: str | None
) -> None:
    point = ResumePoint(run, RunConfig.load(run / "config.yaml"), (0, 0, 0), epochs=7, is_finished=finished)
    found = extension_fault(point, epochs, lr_end)
    assert (found is None) == (fault is None)
    if found:
        assert found.startswith(str(fault))
        assert "--weights runs/a/weights/last.safetensors" in found
