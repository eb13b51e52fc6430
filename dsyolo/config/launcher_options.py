"""Answers for options of launchers that stand after the script, where nothing can be launched any more."""

import re

from dsyolo.config.foreign_options import FLAG, MAYBE, Foreign
from dsyolo.config.foreign_values import NO_EXPORT

# deepspeed's own, which have a value.
_VALUES = """
num_gpus num_nodes min_elastic_nodes max_elastic_nodes hostfile include exclude master_port master_addr launcher
launcher_args ssh_port bind_core_list save_pid enable_each_rank_log autotuning venv_script node_rank
"""
_FLAGS = "no_ssh no_ssh_check no_local_rank no_python module force_multi elastic_training bind_cores_to_rank"
# torchrun's, accelerate's and YOLOv5's habits, with deepspeed's name.
_RENAMED = {
    "nproc_per_node": "num_gpus",
    "nproc": "num_gpus",
    "num_processes": "num_gpus",
    "gpus": "num_gpus",
    "ngpus": "num_gpus",
    "nnodes": "num_nodes",
    "num_machines": "num_nodes",
    "machine_rank": "node_rank",
    "main_process_ip": "master_addr",
    "main_process_port": "master_port",
    "rdzv_endpoint": "master_addr",
}
_TORCHRUN = "rdzv_backend rdzv_id rdzv_conf max_restarts monitor_interval start_method standalone"
_EXPORT_FORMATS = re.compile(
    r"(torchscript|onnx|openvino|engine|coreml|saved_model|pb|tflite|edgetpu|tfjs|paddle)\b"
)
ONE_PROCESS = "dsyolo val and dsyolo detect are one process, and need no launcher. Leave it out."


def _goes_before(option: str, example: str) -> Foreign:
    def reads(text: str) -> str | None:
        if option == "include" and _EXPORT_FORMATS.match(text):
            return None
        value = text if text and text != "true" else example
        command = f"deepspeed --{option}{f' {value}' if value else ''} dsyolo/train.py"
        return f"it belongs to the launcher, and goes before the script: {command} ..."

    answer = NO_EXPORT if option == "include" else ""
    return Foreign(answer, MAYBE if example else FLAG, reads=reads)


def _launcher_options() -> dict[str, Foreign]:
    examples = {
        "num_gpus": "2",
        "num_nodes": "2",
        "hostfile": "FILE",
        "include": "localhost:0",
        "master_port": "29501",
    }
    known = {name: _goes_before(name, examples.get(name, "VALUE")) for name in _VALUES.split()}
    known |= {name: _goes_before(name, "") for name in _FLAGS.split()}
    known |= {name: known[ours] for name, ours in _RENAMED.items()}
    answer = (
        "it belongs to torchrun, and goes before the script: torchrun --nproc_per_node 2 dsyolo/train.py ..."
    )
    return known | {name: Foreign(answer, MAYBE) for name in _TORCHRUN.split()}


def launcher_option(command: str, key: str) -> Foreign | None:
    """Return the answer for a launcher's option on the command line of `command`; None for other options."""
    found = _BY_NAME.get(key)
    if found is None or command == "train":
        return found
    return None if key == "include" else Foreign(ONE_PROCESS, found.arity)


_BY_NAME = _launcher_options()
