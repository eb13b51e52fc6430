"""Tables of the options that people bring from YOLOv5 7.0 and Ultralytics 8, one for each command of dsyolo."""

from collections.abc import Iterable, Mapping

from dsyolo.config.foreign_options import FLAG, MANY, MAYBE, SIZES, Foreign, Taken, flag, ignored
from dsyolo.config.foreign_values import (
    NO_EXPORT,
    NO_VIDEO,
    PAGE,
    read_batch_share,
    read_cfg,
    read_device,
    read_device_here,
    read_hyp,
    read_model,
    read_model_to_use,
    read_optimizer,
    read_pretrained,
    read_save_period,
    read_sizes,
    read_weights_to_use,
)
from dsyolo.config.json_remedy import JSON_OWNS
from dsyolo.config.launcher_options import launcher_option
from dsyolo.config.recipe import RECIPE_KEYS
from dsyolo.config.run_config import JSON_KNOBS, RUN_KEYS

Table = Mapping[str, Foreign]
NEVER = "1000000"  # epochs between two, for what happens after the last epoch in any case


def foreign_option(command: str, key: str, *, is_key: bool = False) -> Foreign | None:
    """Return what is known of an option `key`, with underscores, on the command line of `command`.

    Args:
        command: `train`, `val`, `detect` or `export`.
        is_key: it was written as `key=value`, which is Ultralytics' way; some names mean another thing there.
    """
    if command not in BY_COMMAND:
        return None
    tables = (BY_KEY if is_key and command == "train" else {}, BY_COMMAND[command], EVERYWHERE)
    found = next((table[key] for table in tables if key in table), None)
    if found is None and command == "train" and key in JSON_KNOBS:
        return _json(JSON_KNOBS[key])
    launcher = launcher_option(command, key)
    return launcher if launcher and (found is None or key == "include") else found


def training_option(command: str, key: str) -> Foreign | None:
    """Return the answer for an option of a training that another command was given; None for other options."""
    if command not in BY_COMMAND or command == "train":
        return None
    entry = TRAIN.get(key)
    if entry is None and key not in RUN_KEYS | RECIPE_KEYS | JSON_KNOBS.keys():
        return None
    answer = f"it belongs to a training, dsyolo train, and not to {command}. Leave it out."
    return Foreign(answer, entry.arity if entry else MAYBE)


def _each(names: str, foreign: Foreign) -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), foreign)


def _json(key: str) -> Foreign:
    def reads(text: str) -> str:
        return f"{JSON_OWNS} Set {key}{f' to {text}' if text and text != 'true' else ''} there."

    return Foreign(reads=reads, arity=MAYBE)


# ---- every command

_no_drawing = (
    f"pictures are drawn with class and score in one style; dsyolo detect writes them to --out. {PAGE}"
)
_no_files = f"dsyolo detect writes label files, tables and crops: --save_txt, --save_csv, --save_crop. {PAGE}"
_no_upload = "nothing is uploaded: copy the run's folder (--project, --name) when it has ended."
_other_task = f"it belongs to another task than detection. {PAGE}"
_other_loss = f"it belongs to a loss that YOLOv5 does not have: its gains are --box, --cls and --obj. {PAGE}"

EVERYWHERE: Table = {
    **_each("img img_size imgsz", Foreign(option="imgsz", reads=read_sizes, arity=SIZES)),
    **_each("conf conf_thres", Foreign(option="score_threshold")),
    **_each("iou iou_thres", Foreign(option="iou_threshold")),
    **_each("max_det", Foreign(option="max_detections")),
    "vid_stride": ignored("1", answer=NO_VIDEO),
    "stream_buffer": ignored("false", answer=NO_VIDEO),
    **_each("tracker", Foreign(NO_VIDEO)),
    **_each(
        "dynamic half int8 keras nms optimize simplify inplace", ignored("false", answer=NO_EXPORT, arity=FLAG)
    ),
    **_each("include format opset topk_all topk_per_class workspace quantize", Foreign(NO_EXPORT)),
    **_each("dnn", ignored("false", answer=f"only safetensors are read: --weights FILE. {PAGE}", arity=FLAG)),
    **_each("hide_conf hide_labels", ignored("false", answer=_no_drawing, arity=FLAG)),
    **_each("show_labels show_conf show_boxes", ignored("true", answer=_no_drawing, arity=FLAG)),
    **_each("line_thickness line_width", Foreign(_no_drawing)),
    **_each("view_img show visualize", ignored("false", answer=_no_drawing, arity=FLAG)),
    **_each("save_txt save_conf save_crop save_frames", ignored("false", answer=_no_files, arity=FLAG)),
    "update": ignored("false", answer=f"files of weights are read as they are, and none is updated: --weights. {PAGE}", arity=FLAG),
    "agnostic_nms": ignored(
        "false", answer=f"NMS is for each class; boxes of other classes stay: --iou_threshold. {PAGE}", arity=FLAG
    ),
    "augment": ignored("false", answer=f"there is no test-time augmentation; a larger --imgsz costs as much. {PAGE}", arity=FLAG),
    "classes": ignored("none", answer=f"all classes are found: leave others out of what is printed. {PAGE}", arity=MANY),
    "embed": ignored("none", answer=_other_task),
    "retina_masks": ignored("false", answer=_other_task, arity=FLAG),
    "save_json": ignored(
        "false", answer="dsyolo val --json FILE writes the metrics; predictions in COCO's form are not written.", arity=FLAG
    ),
    "save_hybrid": ignored("false", answer=f"labels are not mixed into predictions: dsyolo val alone. {PAGE}", arity=FLAG),
    "split": ignored("val", answer="the val split is validated: name {value} as `val:` in the data.yaml of --data."),
    "task": ignored("detect", answer=f"{{value}} given, but detection is the only task: dsyolo train. {PAGE}"),
    "single_cls": ignored(
        "false", answer=f"give --data a data.yaml with one name, and class 0 in all label files. {PAGE}", arity=FLAG
    ),
    "source": Foreign("images are given to dsyolo detect: dsyolo detect --weights FILE {value}."),
    "overlap_mask": ignored("false", answer=_other_task),  # without masks nothing overlaps
    **_each("mask_ratio pose kobj rle angle cls_remap", Foreign(_other_task)),
    **_each("dfl", Foreign(_other_loss)),
    "verbose": ignored("true", "false", answer="", arity=FLAG),
    "plots": ignored("true", answer=f"results.png and predictions.jpg are few and drawn beside the training: leave it out. {PAGE}"),
    "noplots": ignored("false", answer=f"results.png and predictions.jpg are few and drawn beside the training: leave it out. {PAGE}", arity=FLAG),
    "pretrained": Foreign(reads=read_pretrained),
    "model": Foreign(reads=read_model),
    "cfg": Foreign(
        f"{{value}} given, but networks are chosen by --model: a variant, or FILE.py:FUNCTION (docs/model.md). {PAGE}",
        reads=read_cfg,
    ),
    "device": Foreign(reads=read_device),
}  # fmt: skip


_a_command = "{value} given, but that is a command: dsyolo train, dsyolo val or dsyolo detect."

# ---- dsyolo train

_writer = "a writer of yours logs anywhere: --writer FILE.py:CLASS (docs/writer.md)."
_hub = f"nothing is sent to or read from Hugging Face. {_no_upload[0].upper()}{_no_upload[1:]}"
_roboflow = "export it there in YOLOv5's format, and give its data.yaml: --data data.yaml (docs/data.md)."
_distill = f"there is no distillation: a smaller --model is trained from the labels, or --weights. {PAGE}"
_mosaic = "--mosaic, --mixup and --copy_paste are the augmentations that mix images."
_kept = "only the best epochs and the last one are saved: a run that is killed goes back to the last of them"

TRAIN: Table = {
    "weights": Foreign(by_value={"": ("--weights=none",)}),
    "batch_size": Foreign(reads=read_batch_share),
    "hyp": Foreign(reads=read_hyp),
    "cos_lr": flag("--schedule=cosine", "--schedule=linear"),
    "sync_bn": flag("--sync_batchnorm", "--no-sync_batchnorm"),
    "noautoanchor": flag("", ""),  # anchors are never changed here
    "nosave": flag(f"--save_every={NEVER}", note=_kept),
    "noval": flag(f"--val_every={NEVER}", note="validated after the last epoch alone"),
    "save_period": Foreign(reads=read_save_period),
    "cache": Foreign(
        "{value} given, but it must be ram or none. On disk nothing is kept: --cache ram, or --cache none.",
        MAYBE,
        by_value={
            "true": ("--cache=ram",),
            "ram": ("--cache=ram",),
            "false": ("--cache=none",),
            "none": ("--cache=none",),
        },
    ),
    "optimizer": Foreign(reads=read_optimizer),
    "rect": ignored(
        "false", answer=f"training images are square mosaics; validation is rectangular already: --rect_val. {PAGE}", arity=FLAG
    ),
    "quad": ignored("false", answer=f"batches are not tiled: --imgsz 1280 or --multi_scale. {PAGE}", arity=FLAG),
    "image_weights": ignored("false", answer=f"every image comes once an epoch: --cls_pw weighs positives. {PAGE}", arity=FLAG),
    "evolve": Foreign(f"recipes are not evolved: --hyp FILE.yaml, and any value on the command line. {PAGE}", MANY),
    "freeze": Foreign(
        "no layer is frozen: fine-tune all from --weights FILE.safetensors; --freeze_batchnorm keeps BatchNorm's statistics.",
        MANY,
        by_value={"0": (), "none": (), "false": ()},
    ),
    "bbox_interval": ignored("-1", answer="predictions.jpg is written at the end; --val_every sets when is validated."),
    "entity": ignored("none", "", answer="set WANDB_ENTITY={value} in the environment, and --wandb online."),
    "artifact_alias": ignored("latest", answer="data sets are files, no W&B artifacts: --data data.yaml. --wandb online logs the run."),
    "upload_dataset": Foreign("data sets are not uploaded to W&B: --data data.yaml. --wandb online logs the run.", MAYBE),
    **_each("neptune_project neptune_resume_id neptune_token", Foreign(_writer)),
    **_each("hf_dataset_id hf_model_id hf_token", Foreign(_hub)),
    "hf_private": ignored("false", answer=_hub, arity=FLAG),
    **_each("roboflow_token", Foreign(_roboflow)),
    "roboflow_upload": ignored("false", answer=_roboflow, arity=FLAG),
    **_each("bucket s3_upload_dir", Foreign(_no_upload)),
    "mode": ignored("train", answer=_a_command),
    "time": Foreign("a time is no end of a run here: --epochs N, or --patience N. SIGTERM ends and saves at any time."),
    "save": ignored("true", answer=f"weights are always saved at the end: --save_every {NEVER} saves no others but the best."),
    "deterministic": ignored("true", "false", answer=""),
    "amp": Foreign(
        by_value={"false": ("--deepspeed_config=fp32",)},
        reads=lambda text: JSON_OWNS + ' Set torch_autocast to {"enabled": true, "dtype": "bfloat16"} there; --deepspeed_config auto does.',
        note="read as --deepspeed_config fp32",
    ),
    "half": ignored("false", answer=JSON_OWNS + ' Set bf16 to {"enabled": true} there, or give --deepspeed_config bf16.', arity=FLAG),
    "fraction": ignored("1", "1.0", answer="all images are trained on: name fewer in a list file, as `train:` of --data (docs/data.md)."),
    "profile": ignored("false", answer="--time_profile and --memory_profile measure a run, and dsyolo plan predicts it."),
    "multi_scale": Foreign(by_value={"0.0": (), "0": ("--no-multi_scale",), "0.5": ("--multi_scale",)}, arity=FLAG),
    "compile": ignored("false", answer=f"networks run uncompiled. {PAGE}"),
    "channels_last": ignored("false", "true", answer=""),  # a matter of speed alone
    "dropout": ignored("0", "0.0", answer=f"YOLOv5's networks have no dropout: --label_smoothing, or stronger augmentation (--hyp high). {PAGE}"),
    "val": Foreign("{value} given, but it must be true or false: --val_every N.", by_value={"true": (), "false": (f"--val_every={NEVER}",)}),
    "nbs": Foreign("the images of a step are --global_batch {value}, or train_batch_size in the DeepSpeed JSON."),
    **_each("distill_model dis dlog dgrad dlam", Foreign(_distill)),
    **_each("bgr cutmix erasing", ignored("0", "0.0", answer=_mosaic)),
    "auto_augment": ignored("none", "false", answer=f"it belongs to classification. {_mosaic}"),
    "copy_paste_mode": ignored("flip", answer="objects are pasted in one way: --copy_paste."),
}  # fmt: skip
# Names that Ultralytics has for something else: YOLOv5's are options.
BY_KEY: Table = {
    "batch": Foreign(option="batch_size", reads=read_batch_share),
    "box": Foreign(
        "{value} given, but Ultralytics' gains are for another loss. YOLOv5's is --box 0.05, which is the default."
    ),
    "cls": ignored(
        "0.5", answer="{value} given, but Ultralytics' gains are for another loss. YOLOv5's is --cls 0.5."
    ),
    "cls_pw": ignored(
        "0", "0.0", answer="{value} given, but here it is the weight of positives: --cls_pw {value}."
    ),
    "multi_scale": Foreign(by_value={"0.0": (), "0": (), "0.5": ("--multi_scale",)}),
    "resume": Foreign(by_value={"true": ("--resume=always",), "false": ("--resume=never",)}),
}
# ---- dsyolo val, dsyolo detect, and no export

_use: Table = {
    "model": Foreign(reads=read_model_to_use),
    "weights": Foreign(reads=read_weights_to_use),
    "device": Foreign(reads=read_device_here),
    "local_rank": Foreign(
        "dsyolo val and dsyolo detect are one process, and need no launcher. Leave it out."
    ),
    "half": ignored("false", answer=f"weights of --weights are used in fp32. {PAGE}", arity=FLAG),
    "plots": ignored(
        "false", answer=f"dsyolo val --pictures DIR draws curves and the confusion matrix. {PAGE}"
    ),
}
VAL: Table = {
    **_use,
    "task": ignored(
        "detect",
        "val",
        answer="{value} given, but the task is detection, and the split is the `val:` of --data. Name another split there as `val:`.",
    ),
    "batch": Foreign(option="batch_size"),
    "rect": flag("--rect_val", "--no-rect_val"),
    "mode": ignored("val", answer=_a_command),
    **_each("project name", Foreign("nothing but the table is written: --json FILE writes its figures.")),
    "exist_ok": flag("", ""),
    "save": ignored("true", "false", answer=""),
    "val": ignored("true", answer="this is dsyolo val: it validates `val:` of --data."),
}
DETECT: Table = {
    **_use,
    "source": Foreign(reads=lambda text: Taken((text,))),
    "mode": ignored("predict", answer=_a_command),
    "project": Foreign("pictures go to one folder, which is --project and --name in one: --out {value}/NAME."),
    "name": Foreign("pictures go to one folder, which is --project and --name in one: --out PROJECT/{value}."),
    "exist_ok": flag("", ""),
    **{key: flag(f"--{key}", "") for key in ("save_txt", "save_conf", "save_json", "save_csv", "save_crop")},
    "nosave": ignored("false", answer="pictures are always written: --out DIR says where.", arity=FLAG),
    "save": ignored("true", answer="pictures are always written: --out DIR says where."),
    "data": Foreign("class names lie in the weights: --weights is enough. Leave it out."),
    **_each("batch batch_size workers", Foreign("images are read one by one; --imgsz is what costs memory. Leave it out.")),
}  # fmt: skip


def _as_answers(names: Iterable[str], answer: str) -> dict[str, Foreign]:
    return dict.fromkeys(names, Foreign(answer))


EXPORT: Table = {
    **_as_answers(("weights", "data", "device", "img", "img_size", "imgsz", "batch_size"), NO_EXPORT),
    **_as_answers(("conf_thres", "iou_thres", "agnostic_nms", "verbose"), NO_EXPORT),
}
BY_COMMAND: Mapping[str, Table] = {
    "train": TRAIN,
    "val": VAL,
    "detect": DETECT,
    "export": EXPORT,
}
