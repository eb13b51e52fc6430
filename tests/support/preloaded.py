"""Imports, done once, of the process from which tests fork their ranks and runs (`ranks.forking`)."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks when it is imported

import deepspeed  # noqa: F401
import faster_coco_eval  # noqa: F401
import matplotlib.pyplot  # noqa: F401

import dsyolo.train
import dsyolo.trainer.session  # noqa: F401
