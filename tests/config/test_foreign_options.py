"""Options of YOLOv5's and Ultralytics' commands: every name is taken, or answered with something that exists."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

from dsyolo import __version__, cli
from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import read_command_line, wants_cpu
from dsyolo.config.command_parser import canonical
from dsyolo.config.deepspeed.schema import TOP_LEVEL
from dsyolo.config.foreign_commands import without_task
from dsyolo.config.recipe import RECIPE_KEYS
from dsyolo.config.run_config import RUN_KEYS

ROWS = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("foreign_flags.tsv").read_text(encoding="utf-8").splitlines()[1:]
]
OPTION = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
OURS = ("train", "val", "detect")
# Values that people give, where "7" is not one.
VALUES = {
    **{"data": "data.yaml", "weights": "yolov5s.pt", "cfg": "yolov5s.yaml", "hyp": "hyp.scratch-med.yaml"},
    **{
        "device": "0",
        "model": "yolov5s.pt",
        "source": "photos",
        "project": "p",
        "name": "n",
        "task": "segment",
    },
    **{
        "optimizer": "AdamW",
        "cache": "disk",
        "mode": "export",
        "imgsz": "640",
        "img": "640",
        "img_size": "640",
    },
    **{
        "seed": "1",
        "workers": "2",
        "lrf": "0.1",
        "label_smoothing": "0.1",
        "warmup_momentum": "0.8",
        "iou": "0.5",
    },
    **{"conf": "0.3", "conf_thres": "0.3", "iou_thres": "0.5", "pretrained": "True", "split": "test"},
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("data.yaml").write_text("names: [a]\n", encoding="utf-8")
    return ["--data", "data.yaml"]


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command)
    import_module(cli.COMMANDS[command][0]).add_options(parser)
    return parser


def own_keys(command: str) -> set[str]:
    if command == "train":
        return set(RUN_KEYS | RECIPE_KEYS) | {"local_rank", "batch_size"}
    return {canonical(name) for action in parser_of(command)._actions for name in action.option_strings}


def json_keys(block: Any = None) -> set[str]:
    keys = TOP_LEVEL if block is None else getattr(block, "keys", {})
    return {name for key, part in keys.items() for name in (key, *json_keys(part))}


def names_something(answer: str) -> bool:
    """Return whether an answer names an option, a file, a key of the JSON or a command, and all of these exist."""
    known = set().union(*map(own_keys, OURS)) | {"include"}  # --include is the deepspeed launcher's
    answer = answer.partition(": ")[2]  # after the option that was given
    options = {canonical(name) for name in OPTION.findall(answer)}
    files = re.findall(r"\b(?:docs|ds_configs|dsyolo)/[\w.]+\.\w+", answer)
    keys = {key.split(".")[0] for key in re.findall(r"Set ([a-z][\w.]+)", answer)}
    commands = set(re.findall(r"dsyolo (\w+)", answer)) - {"train"}
    assert options <= known, answer
    assert keys <= {*TOP_LEVEL, "optimizer"}, answer
    assert commands <= cli.COMMANDS.keys(), answer
    assert all((ROOT / name).exists() for name in files), answer
    return bool(options or files or keys or commands or "dsyolo train" in answer)


def read(command: str, words: list[str]) -> list[str]:
    """Return the problems of a command line that has all that the command needs, and these words."""
    if command == "train":
        given = [] if any(word.startswith(("data=", "--data")) for word in words) else ["--data", "data.yaml"]
        try:
            read_command_line([*given, *words])
        except UserError as error:
            return list(error.problems)
        return []
    if command == "export":
        with pytest.raises(UserError) as caught:
            cli.parse(["export", *words])
        return list(caught.value.problems)
    needed = (
        {"--weights": "w.safetensors", "--data": "data.yaml"}
        if command == "val"
        else {"--weights": "w.safetensors"}
    )
    start = [part for option, value in needed.items() if option not in words for part in (option, value)]
    try:
        cli.parse([command, *(["image.jpg"] if command == "detect" else []), *start, *words])
    except UserError as error:
        return list(error.problems)
    return []


def problems_of(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_command_line(argv)
    return list(caught.value.problems)


def test_the_list_is_whole() -> None:
    assert len(ROWS) == len(set(ROWS)) == 240
    assert {where for _, where, _ in ROWS} == {*OURS, "export", "any"}


@pytest.mark.parametrize("command", [*OURS, "export"])
def test_every_name_is_taken_or_answered_by_what_exists(command: str, base: list[str]) -> None:
    """Each name is brought to each command, with values that people give: no guess, and no unknown option."""
    faults = []
    for program, _, name in ROWS:
        key = canonical(name)
        value = VALUES.get(key, "7")
        forms = [[f"{name}={value}"], [f"{name}=True"]]
        if program == "yolov5":
            forms = [[name], [name, value], [f"{name}={value}"]]
        for words in forms:
            problems = read(command, words)
            faults += [
                f"{command} {' '.join(words)}: {problem}"
                for problem in problems
                if "Did you mean" in problem
                or "unknown option" in problem
                or not (is_plain(problem) or names_something(problem))
            ]
    assert not faults, "\n".join(faults)


def is_plain(problem: str) -> bool:
    """Return whether a line is about a value of an option of ours, or about a value that a form lacks or has too much."""
    return bool(
        re.search(
            r"expected one argument|: not an option|given, but it must be|does not exist|is a flag", problem
        )
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--img", "320"], {"imgsz": 320}),
        (["--img-size", "320"], {"imgsz": 320}),
        (["imgsz=320", "epochs=50"], {"imgsz": 320, "epochs": 50}),
        (["--cfg", "models/yolov5s.yaml", "--weights", ""], {"model": "yolov5s", "weights": None}),
        (["model=yolov5m6.yaml"], {"model": "yolov5m6"}),
        (["--cos-lr"], {"schedule": "cosine"}),
        (["cos_lr=True"], {"schedule": "cosine"}),
        (["cos_lr=False"], {"schedule": "linear"}),
        (["--hyp", "data/hyps/hyp.scratch-high.yaml"], {"copy_paste": 0.1, "mixup": 0.1}),
        (["--cache"], {"cache": "ram"}),
        (["--cache", "--noval"], {"cache": "ram", "val_every": 1000000}),
        (["cache=False"], {"cache": "none"}),
        (["--nosave", "--sync-bn"], {"save_every": 1000000, "sync_batchnorm": True}),
        (["--save-period", "5"], {"save_every": 5}),
        (["--save-period", "-1"], {"save_every": 1}),
        (["--exist-ok", "--device", "cpu"], {"exist_ok": True, "device": "cpu"}),
        (["exist_ok=True", "multi_scale=True"], {"exist_ok": True, "multi_scale": True}),
        (["--multi-scale=false", "ema=False"], {"multi_scale": False, "ema": False}),
        (["--noautoanchor", "verbose=True", "task=detect", "mode=train", "--freeze", "0"], {"epochs": 300}),
        (["val=False", "conf=0.3", "iou=0.5", "max_det=100"], {"val_every": 1000000, "score_threshold": 0.3}),
        (["amp=False"], {"deepspeed_config": "fp32"}),
        (["--label-smoothing", "0.1", "--patience", "0"], {"label_smoothing": 0.1, "patience": 0}),
        (["pretrained=False"], {"weights": None}),
    ],
)
def test_what_an_alias_sets(base: list[str], argv: list[str], expected: dict[str, Any]) -> None:
    run, _ = read_command_line([*base, *argv])
    values = {**run.model_dump(), **run.recipe.model_dump()}
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (
            ["--rect"],
            "--rect: training images are square mosaics; validation is rectangular already: --rect_val.",
        ),
        (
            ["--optimizer", "AdamW"],
            'set optimizer.type to "AdamW" in the copy, and give it by --deepspeed_config: its ZeRO stage',
        ),
        (["--optimizer", "Adam"], "Or give --deepspeed_config adamw, which is AdamW."),
        (
            ["lr0=0.02"],
            "zero1.json, set optimizer.params.lr to 0.02 in the copy, and give it by --deepspeed_config: its "
            "ZeRO stage and precision then hold, and nothing is planned.",
        ),
        (
            ["lr0=0.02", "--deepspeed_config", "zero2"],
            "lr0=0.02: the DeepSpeed JSON owns it. Set optimizer.params.lr to 0.02 there.",
        ),
        (
            ["--device", "0,1"],
            "the launcher chooses GPUs: deepspeed --include localhost:0,1 dsyolo/train.py.",
        ),
        (["--device", "cuda:0"], "CUDA_VISIBLE_DEVICES=0 in front of the command"),
        (["box=7"], "Ultralytics' gains are for another loss. YOLOv5's is --box 0.05"),
        (["nbs=128"], "the images of a step are --global_batch 128"),
        (
            ["--weights", "yolov5s.pt"],
            "does not exist. Nothing is downloaded: get yolov5s.pt from github.com/ultralytics/",
        ),
        (
            ["model=yolov5s.pt"],
            "--model yolov5s trains from scratch, and --weights yolov5s.pt starts from weights.",
        ),
        (["model=yolov8n.pt"], "only YOLOv5's networks are here: --model yolov5n"),
        (
            ["--hyp", "hyp.VOC.yaml"],
            "hyp.VOC.yaml does not exist; the presets are --hyp low, --hyp med and --hyp high.",
        ),
        (["--cache", "disk"], "disk given, but it must be ram or none. On disk nothing is kept: --cache ram"),
        (["--entity", "us"], "set WANDB_ENTITY=us in the environment, and --wandb online."),
        (["--evolve", "300"], "recipes are not evolved: --hyp FILE.yaml"),
        (["--freeze", "0", "1", "2"], "no layer is frozen"),
        (["--source", "a.jpg"], "dsyolo detect --weights FILE a.jpg."),
    ],
)
def test_what_is_answered(base: list[str], argv: list[str], answer: str) -> None:
    (line,) = problems_of([*base, *argv])
    assert answer in line


def test_all_mistakes_are_reported_together(base: list[str]) -> None:
    argv = [
        *base,
        "--rect",
        "--epochs",
        "0",
        "--cache",
        "--quad",
        "--freeze",
        "10",
        "--mosaik",
        "1",
        "lr0=1",
        "--name",
    ]
    (line,) = problems_of([*base, "epoch=3"])
    assert line == "--epoch: unknown option. Did you mean --epochs?"
    assert [line.partition(":")[0] for line in problems_of(argv)] == [
        *("--rect", "--quad", "--freeze", "--mosaik", "lr0=1", "--name", "--epochs")
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--device", "cpu"], True),
        (["--device=cpu", "--data", "x"], True),
        (["device=cpu"], True),
        (["--device", "cpu", "--device", "auto"], False),
        (["--name", "cpu"], False),
        ([], False),
    ],
)
def test_the_cpu_is_chosen_before_anything_asks_for_a_device(argv: list[str], expected: bool) -> None:
    assert wants_cpu(argv) is expected


def test_options_of_val_and_detect() -> None:
    val = [
        "val",
        "--weights",
        "w",
        "--data",
        "d",
        "--conf-thres",
        "0.2",
        "--iou",
        "0.5",
        "--img",
        "320",
        "--batch-size",
        "4",
    ]
    args = cli.parse([*val, "--device", "cpu", "rect=False", "--verbose"])
    assert (args.score_threshold, args.iou_threshold, args.imgsz, args.batch_size) == (0.2, 0.5, 320, 4)
    assert (args.device, args.rect_val) == ("cpu", False)
    args = cli.parse(["detect", "model=w.safetensors", "--source", "a.jpg", "--max-det", "7", "--exist-ok"])
    assert (args.weights, args.sources, args.max_detections) == (Path("w.safetensors"), [Path("a.jpg")], 7)
    with pytest.raises(UserError) as caught:
        cli.parse(["detect", "--weights", "yolov5s.pt", "--view-img", "--project", "runs/x", "--epochs", "3"])
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        *("--weights", "--view-img", "--project", "--epochs", "SOURCE")
    ]


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["export", "--include", "onnx"], "export: there is no export"),
        (["predict", "model=x.pt"], "predict: the command is dsyolo detect"),
        (["detect", "export", "format=onnx"], "export: there is no export"),
    ],
)
def test_commands_of_other_programs(argv: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("detect train data=x", "train data=x"),
        ("detect predict a.jpg", "detect a.jpg"),
        ("--local_rank=1 train x", "train x"),
        ("detect --weights x", "detect --weights x"),
        ("task=detect mode=train data=a.yaml", "train task=detect data=a.yaml"),
        ("mode=val model=w.safetensors data=a.yaml", "val model=w.safetensors data=a.yaml"),
        ("data=a.yaml mode=train", "train data=a.yaml"),
        ("mode=predict source=a.jpg", "detect source=a.jpg"),
        ("detect mode=train data=a.yaml", "train data=a.yaml"),
        ("train.py --data x", "train --data x"),
        ("yolov5/val.py --data x", "val --data x"),
        ("detect.py --source x", "detect --source x"),
        ("train task=detect mode=train", "train task=detect mode=train"),
        ("help train", "train --help"),
        ("help", "--help"),
        ("segment/train.py --data x", "segment/train.py --data x"),
    ],
)
def test_the_command_comes_first(base: list[str], given: str, expected: str) -> None:
    assert without_task(given.split(), cli.COMMANDS) == expected.split()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("detect train data=data.yaml epochs=3", "train data=data.yaml epochs=3"),
        ("detect train --data data.yaml", "train --data data.yaml"),
        ("detect val model=w.safetensors", "val model=w.safetensors"),
        ("detect train epochs=3", "train epochs=3"),
        ("detect train --weights w.safetensors", "detect train --weights w.safetensors"),
        ("detect train test --weights w --conf 0.3", "detect train test --weights w --conf 0.3"),
        ("detect train model.jpg --weights w", "detect train model.jpg --weights w"),
    ],
)
def test_an_export_has_folders_called_train_and_val(base: list[str], given: str, expected: str) -> None:
    for name in ("train", "val", "test"):
        Path(name).mkdir()
    assert without_task(given.split(), cli.COMMANDS) == expected.split()


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        ("trian --data x", "trian: no such command. Did you mean train? The commands are train, val,"),
        ("nosuch", "nosuch: no such command. The commands are train, val, detect,"),
        ("mode=trian data=x", "trian: no such command. Did you mean train?"),
        (
            "data=a.yaml epochs=3",
            "data=a.yaml: given without a command. Name it first: dsyolo train data=a.yaml",
        ),
        ("hubconf.py", "hubconf.py: there is no hub"),
        ("segment train data=x", "segment: only detectors are trained here: dsyolo train."),
        ("task=segment mode=val data=x", "task=segment: segment given, but the task is detection"),
        ("detect track a.mp4", "track: there is no tracking"),
    ],
)
def test_commands_that_are_none_are_answered(
    base: list[str], argv: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv.split()) == 2
    shown = capsys.readouterr().err
    assert answer in shown
    assert "usage" not in shown


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dsyolo {__version__}\n"


def test_the_page_names_them_all() -> None:
    page = (ROOT / "docs/from_yolov5.md").read_text(encoding="utf-8")
    spans = {
        canonical(part.partition("=")[0])
        for span in re.findall(r"`([^`\n]+)`", page)
        for part in span.split()
    }
    assert not {canonical(name) for _, _, name in ROWS} - spans


def notes_of(argv: list[str]) -> list[str]:
    notes: list[str] = []
    read_command_line(argv, notes=notes)
    return notes


def test_defaults_of_other_programs_are_left_out_in_one_note(base: list[str]) -> None:
    """An args.yaml's lines as words: those with a meaning here are taken, all others stand in one note."""
    taken = "task=detect mode=train epochs=100 time=null patience=100 batch=16 imgsz=640 save_period=-1 cache=False"
    taken += (
        " device=None workers=8 project=None name=train exist_ok=False verbose=True seed=0 deterministic=True"
    )
    taken += " single_cls=False rect=False cos_lr=False resume=False fraction=1.0 profile=False freeze=None compile=False"
    taken += " multi_scale=False dropout=0.0 val=True split=val save_json=False conf=None iou=0.7 max_det=300 half=False"
    taken += " dnn=False source=None vid_stride=1 stream_buffer=False visualize=False augment=False agnostic_nms=False"
    taken += " classes=None retina_masks=False embed=None show=False save_frames=False save_txt=False save_conf=False"
    taken += " save_crop=False show_labels=True show_conf=True show_boxes=True line_width=None keras=False optimize=False"
    taken += " int8=False dynamic=False opset=None workspace=None nms=False lrf=0.01 warmup_epochs=3.0 cls=0.5 bgr=0.0"
    taken += " close_mosaic=10 mosaic=1.0 mixup=0.0 cutmix=0.0 copy_paste=0.0 copy_paste_mode=flip cfg=None plots=1 save=1"
    left_out = "optimizer=auto amp=True overlap_mask=True mask_ratio=4 format=torchscript simplify=True"
    left_out += " lr0=0.01 momentum=0.937 weight_decay=0.0005 box=7.5 dfl=1.5 pose=12.0 kobj=1.0 nbs=64"
    left_out += " auto_augment=randaugment erasing=0.4 tracker=botsort.yaml"
    (note,) = (
        line for line in notes_of([*base, *taken.split(), *left_out.split()]) if "defaults of other" in line
    )
    names, _, rule = note.partition(": ")
    assert names.split(", ") == left_out.split()
    assert rule == "defaults of other programs, left out; dsyolo's own hold (docs/from_yolov5.md)"
    run, _ = read_command_line([*base, *taken.split(), *left_out.split()])
    assert (run.project, run.name, run.iou_threshold, run.save_every, run.recipe.box) == (
        "runs",
        "train",
        0.7,
        1,
        0.05,
    )


@pytest.mark.parametrize(
    "word",
    [
        *(
            "lr0=0.02",
            "nbs=128",
            "dfl=2",
            "box=5",
            "mask_ratio=2",
            "optimizer=AdamW",
            "time=2",
        ),
        *(
            "rect=True",
            "rect=1",
            "plots=0",
            "plots=False",
            "dropout=0.1",
            "fraction=0.5",
            "freeze=10",
            "classes=0",
        ),
        *(
            "embed=0",
            "stream_buffer=1",
            "vid_stride=2",
            "cos_lr=maybe",
            "rect=maybe",
            "save=False",
            "single_cls=1",
        ),
        *("task=segment", "task=train", "task=val", "mode=val", "split=test", "half=True", "erasing=0.1"),
    ],
)
def test_other_values_than_the_defaults_are_answered(base: list[str], word: str) -> None:
    (line,) = problems_of([*base, word])
    assert line.removeprefix("--").startswith(word.partition("=")[0])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cos_lr=1", {"schedule": "cosine"}),
        ("cos_lr=off", {"schedule": "linear"}),
        ("val=0", {"val_every": 1000000}),
        ("val=1", {"val_every": 1}),
        ("cache=1", {"cache": "ram"}),
        ("cache=no", {"cache": "none"}),
        ("rect=0", {"rect_val": True}),
        ("noautoanchor=yes", {}),
        ("plots=on", {}),
        ("resume=0", {"resume": "never"}),
        ("amp=0", {"deepspeed_config": "fp32"}),
        ("multi_scale=1", {"multi_scale": True}),
    ],
)
def test_flags_with_other_words(base: list[str], word: str, expected: dict[str, Any]) -> None:
    run, _ = read_command_line([*base, word])
    values = {**run.model_dump(), **run.recipe.model_dump()}
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("word", ["--rect=maybe", "cos_lr=maybe", "--nosave=7"])
def test_a_flag_that_is_neither_true_nor_false(base: list[str], word: str) -> None:
    name, _, value = word.removeprefix("--").partition("=")
    rule = f"--{name}: {value} given, but it is a flag: true or false. Write --{name} alone, or leave it out."
    assert problems_of([*base, word]) == [rule]


@pytest.mark.parametrize(
    ("command", "task", "is_taken"),
    [
        *(
            ("train", "detect", True),
            ("train", "val", False),
            ("train", "train", False),
            ("train", "segment", False),
        ),
        *(("val", "detect", True), ("val", "val", True), ("val", "train", False), ("val", "test", False)),
        *(("val", "speed", False), ("val", "study", False), ("val", "segment", False)),
        *(("detect", "detect", True), ("detect", "val", False), ("detect", "pose", False)),
    ],
)
def test_a_task_of_each_command(base: list[str], command: str, task: str, is_taken: bool) -> None:
    """YOLOv5's `val.py --task train` measures the train split: it must not become a validation of val."""
    for words in (["--task", task], [f"task={task}"]):
        problems = read(command, words)
        assert bool(problems) is not is_taken, problems
        assert all("task" in problem and f"{task} given, but" in problem for problem in problems)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        *((["--img", "640", "640"], 640), (["--imgsz", "320", "320"], 320), (["imgsz=[640,640]"], 640)),
        *(
            (["--img-size", "640x640"], 640),
            (["--imgsz", "[640,", "640]"], 640),
            (["--img", "(320,320)"], 320),
        ),
    ],
)
def test_two_equal_sides_are_one_size(base: list[str], words: list[str], size: int) -> None:
    assert read_command_line([*base, *words, "--epochs", "3"])[0].imgsz == size


@pytest.mark.parametrize("words", [["--img", "640", "480"], ["imgsz=[640,480]"], ["--imgsz", "480x640"]])
def test_images_are_square(base: list[str], words: list[str]) -> None:
    for command in OURS:
        (line,) = read(command, words)
        assert line.endswith("but images are square: --imgsz 640, the longer side."), command


def test_a_source_that_is_a_number_stays_one(base: list[str]) -> None:
    Path("2024").mkdir()
    args = cli.parse(["detect", "--weights", "w", "--img", "640", "2024", "7.jpg"])
    assert (args.imgsz, args.sources) == (640, [Path("2024"), Path("7.jpg")])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            "--num_gpus 2",
            "the launcher, and goes before the script: deepspeed --num_gpus 2 dsyolo/train.py ...",
        ),
        ("--hostfile h", "deepspeed --hostfile h dsyolo/train.py ..."),
        ("--master_port=1234", "deepspeed --master_port 1234 dsyolo/train.py ..."),
        ("--nproc_per_node 2", "deepspeed --num_gpus 2 dsyolo/train.py ..."),
        ("--nproc-per-node=2", "deepspeed --num_gpus 2 dsyolo/train.py ..."),
        ("--include localhost:0", "deepspeed --include localhost:0 dsyolo/train.py ..."),
        ("--exclude localhost:1", "deepspeed --exclude localhost:1 dsyolo/train.py ..."),
        ("--nnodes 2", "deepspeed --num_nodes 2 dsyolo/train.py ..."),
        ("--launcher pdsh", "deepspeed --launcher pdsh dsyolo/train.py ..."),
        ("--standalone", "torchrun --nproc_per_node 2 dsyolo/train.py ..."),
        ("--no_ssh", "deepspeed --no_ssh dsyolo/train.py ..."),
        ("--include onnx", "there is no export"),
    ],
)
def test_options_of_a_launcher_go_before_the_script(base: list[str], words: str, answer: str) -> None:
    (line,) = problems_of([*base, *words.split()])
    assert line.startswith(words.partition("=")[0].split()[0] + ": ")
    assert answer in line
    if "onnx" not in words and "--include" not in words:
        assert "are one process, and need no launcher" in read("val", words.split())[0]


def test_an_alias_for_a_flag_does_not_take_the_next_word(base: list[str]) -> None:
    run, _ = read_command_line([*base, "--cache", "epochs=3", "resume=False"])
    assert (run.cache, run.epochs, run.resume) == ("ram", 3, "never")
    (line,) = problems_of([*base, "resume=True", "epochs=3"])
    assert "so there is no run to resume" in line


def test_batch_size_takes_what_batch_does(base: list[str]) -> None:
    assert read_command_line([*base, "--batch-size", "auto"])[0].batch == -1


@pytest.mark.parametrize("words", [["--model", "net.py:build"], ["model=net.py:build"]])
def test_a_network_of_your_own_is_no_weights_file(base: list[str], words: list[str]) -> None:
    args = cli.parse(["val", "--weights", "w.safetensors", "--data", "d", *words])
    assert (args.weights, args.model) == (Path("w.safetensors"), "net.py:build")


def test_weights_of_a_release_without_a_suffix(base: list[str]) -> None:
    (line,) = problems_of([*base, "--weights", "yolov5s"])
    assert "Nothing is downloaded: get yolov5s.pt from github.com/ultralytics/" in line
    assert "yolov5s does not exist" in read("val", ["--weights", "yolov5s"])[0]


@pytest.mark.parametrize(
    ("given", "meant"), [("ZERO2", "zero2"), ("zero_2", "zero2"), ("adamW.json", "adamw")]
)
def test_ready_files_by_almost_their_names(base: list[str], given: str, meant: str) -> None:
    (line,) = problems_of([*base, "--deepspeed_config", given])
    assert f"{given} does not exist. Did you mean {meant}? The ready ones are adamw," in line
