"""The run configuration: command line, recipes, files of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import parse
from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.recipe import Recipe, preset
from dsyolo.config.run_config import MODELS, RENAMED, RunConfig, differences


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The least command line that is whole, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("data.yaml").write_text("names: [a]\n")
    Path("ds.json").write_text("{}")
    return ["--data", "data.yaml", "--deepspeed_config", "ds.json"]


def problems_of(argv: list[str]) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        parse(argv)
    return caught.value.problems


def replacing(base: list[str], argv: list[str]) -> list[str]:
    """The least command line with these words, where what they give replaces its own."""
    own = list(zip(base[::2], base[1::2], strict=True))
    return [word for pair in own if pair[0] not in argv for word in pair] + argv


def test_defaults_are_those_of_the_spec(base: list[str]) -> None:
    run = parse(base)
    assert (run.model, run.imgsz, run.epochs, run.patience, run.seed) == ("yolov5n", 640, 300, 100, 0)
    assert (run.ema, run.ema_decay, run.ema_tau) == (True, 0.9999, 2000)
    assert (run.score_threshold, run.iou_threshold, run.max_detections) == (0.001, 0.6, 300)
    assert run.workers is None
    assert run.threads is None
    assert run.weights is None
    assert run.recipe == Recipe()


def test_presets_hold_the_numbers_of_the_spec() -> None:
    names = ("lrf", "cls", "obj", "scale", "mixup", "copy_paste")
    values = {name: tuple(getattr(preset(name), key) for key in names) for name in ("low", "med", "high")}
    assert values == {
        "low": (0.01, 0.5, 1.0, 0.5, 0.0, 0.0),
        "med": (0.1, 0.3, 0.7, 0.9, 0.1, 0.0),
        "high": (0.1, 0.3, 0.7, 0.9, 0.1, 0.1),
    }
    low = preset("low")
    assert low == Recipe()
    assert (low.warmup_epochs, low.warmup_min_images, low.warmup_bias_lr, low.warmup_momentum) == (
        3.0,
        1600,
        0.1,
        0.8,
    )
    assert (low.hsv_h, low.hsv_s, low.hsv_v, low.translate) == (0.015, 0.7, 0.4, 0.1)
    assert (low.box, low.anchor_t, low.fl_gamma, low.mosaic, low.fliplr) == (0.05, 4.0, 0.0, 1.0, 0.5)


def test_preset_files_name_every_key() -> None:
    folder = Path(sys.modules["dsyolo.config.run_config"].__file__ or "").parent / "presets"
    for path in sorted(folder.glob("*.yaml")):
        assert set(yaml.safe_load(path.read_text())) == set(Recipe.model_fields), path


def test_options_of_every_form(base: list[str]) -> None:
    argv = ["--score-threshold=0.01", "--no-ema", "--no_rect_val", "--multi-scale", "--degrees", "5"]
    run = parse(
        [*base, *argv, "--workers", "auto", "--threads", "3", "--model", "yolov5m6", "--imgsz", "1280"]
    )
    assert (run.score_threshold, run.ema, run.rect_val, run.recipe.multi_scale) == (0.01, False, False, True)
    assert (run.recipe.degrees, run.workers, run.threads) == (5.0, None, 3)
    assert (run.model, run.imgsz) == ("yolov5m6", 1280)


def test_what_launchers_add_is_ignored(base: list[str]) -> None:
    assert parse(["--local_rank=1", *base, "--deepspeed"]) == parse(base)
    assert parse(["--local-rank", "0", *base]) == parse(base)


def test_command_line_wins_over_recipe_file_over_low(base: list[str]) -> None:
    Path("mine.yaml").write_text("mosaic: 0.5\nlrf: 1e-1\n")  # PyYAML reads 1e-1 as text
    recipe = parse([*base, "--hyp", "mine.yaml", "--mosaic", "0.25"]).recipe
    assert recipe == Recipe(mosaic=0.25, lrf=0.1)
    assert parse([*base, "--hyp", "high", "--copy_paste", "0"]).recipe.mixup == 0.1


def test_all_problems_at_once_with_remedies(base: list[str]) -> None:
    argv = [
        "--data",
        "nodata.yaml",
        "--weights",
        "w.pt",
        "--deepspeed_config",
        "zero22.json",
        "--hyp",
        "hihg",
    ]
    argv += ["--mosaik", "0", "--mosaic", "1.5", "--imgsz", "330", "--epochs", "0", "--schedule", "cosin"]
    text = "\n".join(problems_of([*argv, "--lr", "0.1", "--mixup", "nan", "surplus"]))
    for line in (
        "--mosaik: unknown option. Did you mean --mosaic?",
        "--lr: the DeepSpeed JSON owns it. Set optimizer.params.lr to 0.1 there.",
        "surplus: not an option.",
        "--hyp: hihg does not exist, and the presets are low, med, high. Did you mean high?",
        "--mosaic: 1.5 given, but it must be a number, at least 0 and at most 1. Set it to 1, or leave it out.",
        "--mixup: nan given, but it must be a number",
        "--schedule: cosin given, but it must be one of linear, cosine. Did you mean cosine?",
        "--imgsz: 330 given, but the images of yolov5n must be a multiple of 32, and at "
        "least 64. Set it to 320 or 352.",
        "--epochs: 0 given, but it must be a whole number, at least 1. Set it to 1, or leave it out.",
        "--data: nodata.yaml does not exist. Did you mean data.yaml?",
        "--weights: w.pt does not exist.",
        "--deepspeed_config: zero22.json does not exist. Did you mean zero2? The ready ones are adamw,",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--model", "yolov5k"], "Did you mean yolov5x?"),
        (["--model", "YOLOv5n"], "Did you mean yolov5n?"),
        (["--data", "set/"], "--data: set/ is a folder, but it must be a file. Did you mean set/my.yaml?"),
        (["--weights", "set"], "is a folder, but it must be a file. Give the path of a file: weights"),
        (["--weights", "sett"], "sett does not exist. Give the path"),  # not the folder `set`
        (["--deepspeed_config", "set"], "is a folder, but it must be a file. Did you mean set/z.json?"),
        (
            ["--hyp", "mi.yaml"],
            "--hyp: mi.yaml does not exist, and the presets are low, med, high. Did you mean m.yaml?",
        ),
        (
            ["--hyp", "xxxx"],
            "presets are low, med, high. Name one of them, or a YAML file that is there.",
        ),
        (
            ["--hyp", "set"],
            "--hyp: set is a folder, but it must be a file, and the presets are low, med, high.",
        ),
        (["--model", "yolov5n6", "--imgsz", "160"], "Set it to 128 or 192."),
        (["--imgsz", "32"], "Set it to 64."),
        (
            ["--sync_batchnorm", "--freeze_batchnorm"],
            "--freeze_batchnorm leaves nothing to share. Leave one out.",
        ),
        (["--train_batch_size", "16"], "the DeepSpeed JSON owns it. Set train_batch_size to 16 there."),
        (["--gradient_clipping", "1"], "--gradient_clipping: the DeepSpeed JSON owns it."),
        (
            ["--recompute", "4GB"],
            '--recompute: 4GB given, but it must be "none", "blocks" or a budget in GiB like',
        ),
        (["--epochs"], "--epochs: expected one argument. See --help."),
        (["--epochs", "3.5"], "--epochs: 3.5 given, but it must be a whole number"),
        (["--name", ""], "--name:  given, but it must be a name, not empty."),
        (["--multi_scale", "yes"], "yes: not an option."),
        (["--imgs", "320"], "--imgs: unknown option. Did you mean --imgsz?"),  # no abbreviations
    ],
)
def test_single_problems(base: list[str], argv: list[str], problem: str) -> None:
    Path("set").mkdir()
    for name in ("set/my.yaml", "set/z.json", "m.yaml"):
        Path(name).write_text("")
    (line,) = problems_of(replacing(base, argv))
    assert problem in line


def test_what_can_hold_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cannot_hold_files(tmp_path / "a/b") is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left
    assert f"{tmp_path / 'file'} is a file" in (cannot_hold_files(tmp_path / "file") or "")
    assert f"{tmp_path / 'file'} is a file" in (cannot_hold_files(tmp_path / "file/a") or "")
    assert "cannot be written to" in (cannot_hold_files(tmp_path / ("n" * 300)) or "")
    if Path("/proc").is_dir():  # where permissions allow what cannot be done
        assert "/proc cannot be written to" in (cannot_hold_files(Path("/proc/a")) or "")


def test_data_is_asked_for(base: list[str]) -> None:
    (line,) = problems_of(base[2:])
    assert line == "--data: missing. Name the data set's YAML file, as in --data data.yaml."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mosaik: 1\n", "mosaik: unknown key. Did you mean mosaic?"),
        ("lr0: 0.01\n", "lr0: the DeepSpeed JSON owns it. Set optimizer.params.lr there."),
        ("weight_decay: 0\n", "weight_decay: the DeepSpeed JSON owns it."),
        ("imgsz: 320\n", "imgsz: not part of the recipe. Give it on the command line: --imgsz."),
        ("mosaic: -1\n", "mosaic: -1 given, but it must be a number, at least 0 and at most 1. Set it to 0"),
        ("mosaic: [1\n", "not YAML"),
        ("- mosaic\n", "must be a mapping"),
        ("1: 2\n", "1: unknown key."),
    ],
)
def test_faults_of_a_recipe_file(base: list[str], text: str, problem: str) -> None:
    Path("mine.yaml").write_text(text)
    (line,) = problems_of([*base, "--hyp", "mine.yaml"])
    assert line.startswith("--hyp: mine.yaml: ")
    assert problem in line


def test_dump_and_load_are_inverse(base: list[str]) -> None:
    run = parse([*base, "--model", "yolov5s", "--mosaic", "0.5", "--wandb", "offline"])
    Path("config.yaml").write_text(yaml.safe_dump(run.dump()))
    assert RunConfig.load("config.yaml") == run
    assert run.dump()["recipe"]["mosaic"] == 0.5


def test_load_reads_the_names_that_options_had_before(base: list[str]) -> None:
    run = parse([*base, "--rendezvous_timeout_s", "77", "--memory_profile", "off", "--time_profile", "steps"])
    old = {new: key for key, new in RENAMED.items()}
    assert old.keys() == {"rendezvous_timeout_s", "memory_profile", "time_profile"}
    values = {old.get(key, key): value for key, value in run.dump().items()}
    assert {"meet_timeout_s", "memory_account", "time_account"} <= values.keys()
    Path("config.yaml").write_text(yaml.safe_dump(values))
    assert RunConfig.load("config.yaml") == run


def test_load_reports_every_fault() -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.load("nowhere.yaml")
    assert "nowhere.yaml cannot be used" in str(caught.value)
    assert "cannot be read" in str(caught.value)


@pytest.mark.parametrize(("key", "name"), [(None, "None"), (7, "7"), (True, "True")])
def test_a_key_that_is_no_text_is_named(base: list[str], key: object, name: str) -> None:
    dump = parse(base).dump()
    Path("config.yaml").write_text(
        yaml.safe_dump({**dump, "recipe": {**dump["recipe"], key: 1}}, sort_keys=False), encoding="utf-8"
    )
    with pytest.raises(UserError, match=f"recipe.{name}|{name}: "):
        RunConfig.load("config.yaml")


def test_load_names_unknown_keys(base: list[str]) -> None:
    text = yaml.safe_dump({**parse(base).dump(), "epoch": 3, "seed": -1})
    Path("config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        RunConfig.load("config.yaml")
    assert sorted(caught.value.problems) == [
        "epoch: unknown key. Did you mean epochs?",
        "seed: -1 given, but it must be a whole number, at least 0 and below 9223372036854775808. "
        "Set it to 0, or leave it out.",
    ]


def test_resume_takes_the_configuration_of_the_run(base: list[str]) -> None:
    first = parse([*base, "--epochs", "7", "--mosaic", "0", "--name", "a"])
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(yaml.safe_dump(first.dump()))
    again = parse(["--resume", "--name", "a", "--workers", "2"])
    assert again.resume == "always"
    assert differences(first, again) == []
    assert (again.epochs, again.recipe.mosaic, again.workers) == (7, 0.0, 2)
    changed = parse(["--resume", "--name", "a", "--epochs", "9", "--hyp", "med"])
    assert "epochs: 7 -> 9" in differences(first, changed)
    assert "mosaic: 0.0 -> 1.0" in differences(first, changed)


def test_resume_without_a_run(base: list[str]) -> None:
    (line,) = problems_of(["--resume", "--deepspeed_config", "ds.json"])
    assert line.startswith("--resume: runs/train/config.yaml does not exist")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """W&B's own variables, set."""
    for name, value in (("PROJECT", "theirs"), ("NAME", "named"), ("MODE", "offline")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    return monkeypatch


def test_wandbs_variables_win_over_defaults_and_not_over_options(
    base: list[str], wandb: pytest.MonkeyPatch
) -> None:
    run = parse(base)
    assert (run.wandb, run.wandb_project, run.wandb_name) == ("offline", "theirs", "named")
    run = parse([*base, "--wandb", "disabled", "--wandb_project", "mine"])
    assert (run.wandb, run.wandb_project, run.wandb_name) == ("disabled", "mine", "named")


def test_a_resumed_run_stays_in_its_wandb_project(base: list[str], wandb: pytest.MonkeyPatch) -> None:
    first = parse([*base, "--name", "a", "--wandb", "online"])
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(yaml.safe_dump(first.dump()), encoding="utf-8")
    wandb.setenv("WANDB_PROJECT", "another")
    wandb.delenv("WANDB_NAME")
    again = parse(["--resume", "--name", "a"])
    assert (again.wandb, again.wandb_project, again.wandb_name) == ("offline", "theirs", "named")
    wandb.delenv("WANDB_MODE")
    assert parse(["--resume", "--name", "a"]).wandb == "online"


def test_configs_are_frozen(base: list[str]) -> None:
    run = parse(base)
    with pytest.raises(ValueError, match="frozen"):
        run.epochs = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        run.recipe.mosaic = 0.0  # type: ignore[misc]


def test_model_names() -> None:
    assert len(MODELS) == 10
    assert {"yolov5n", "yolov5x6"} <= set(MODELS)


def test_every_field_has_help_and_help_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in [*RunConfig.model_fields, *Recipe.model_fields]:
        assert key == "recipe" or f"--{key}" in text, key
    assert "local_rank" not in text


def test_layer_0_needs_no_torch() -> None:
    code = "import dsyolo.config.run_config, dsyolo.config.deepspeed.config, sys; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_knows_which_of_its_fields_the_user_named(base: list[str]) -> None:
    assert parse(base).recipe.model_fields_set == set()
    assert parse([*base, "--hyp", "med"]).recipe.model_fields_set == set()
    assert parse([*base, "--lrf", "0.01", "--no-multi_scale"]).recipe.model_fields_set == {
        "lrf",
        "multi_scale",
    }
    # an edited copy of a preset names what was edited
    Path("mine.yaml").write_text(yaml.safe_dump({**preset("low").model_dump(), "lrf": 0.3}), encoding="utf-8")
    recipe = parse([*base, "--hyp", "mine.yaml", "--mosaic", "0.5"]).recipe
    assert recipe.model_fields_set == {"lrf", "mosaic"}
    assert (recipe.lrf, recipe.mosaic, recipe.box) == (0.3, 0.5, 0.05)
