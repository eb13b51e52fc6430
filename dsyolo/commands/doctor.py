"""`dsyolo doctor`: check whether a run can start on its hosts."""

import argparse
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.config.option_checks import cannot_replace_json, model_option, out_of_range, write_json
from dsyolo.config.ready_configs import locate
from dsyolo.config.run_config import AUTO, image_size_fault
from dsyolo.doctor.context import DoctorOptions
from dsyolo.doctor.examine import examine
from dsyolo.doctor.findings import can_start, table, to_json
from dsyolo.models.registry import meta_network


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: what the run would be started with, as far as it can be checked before."""
    add = parser.add_argument
    add("--hostfile", type=Path, metavar="FILE", help="check its hosts (default: this machine)")
    add("--deepspeed_config", type=Path, metavar="FILE", help="DeepSpeed JSON, checked for the hosts' ranks")
    add("--data", type=Path, metavar="FILE", help="data set's YAML file, compared on all hosts")
    text = "variant or FILE.py:FUNCTION, for the size of its checkpoints"
    add("--model", type=model_option, metavar="NAME", help=text)
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default: 640)")
    add("--project", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (default: runs)")
    add("--workers", type=int, metavar="N", help="loader workers per rank (default: as in a run)")
    add("--num_gpus", type=int, metavar="N", help="ranks without a hostfile (default: the GPUs, or 1)")
    add("--master_addr", metavar="ADDRESS", help="the same as for the launcher")
    add("--master_port", type=int, default=29500, metavar="N", help="the same as for the launcher")
    add("--timeout", type=float, default=10, metavar="S", help="seconds for a host to answer (default: 10)")
    add("--fix", action="store_true", help="remove stale build locks")
    add("--json", type=Path, metavar="FILE", help="write the findings to this file")


def run(args: argparse.Namespace) -> int:
    """Print the table; return 0 if the run can start, else 1. Files that are missing are findings."""
    _check(args)
    if args.deepspeed_config:
        is_planned = args.deepspeed_config == Path(AUTO)
        args.deepspeed_config = None if is_planned else locate(args.deepspeed_config)
    renamed = {"image_size_px": args.imgsz, "timeout_s": args.timeout}
    given = {key: value for key, value in vars(args).items() if key in DoctorOptions._fields}
    findings, hosts = examine(DoctorOptions(**given, **renamed))
    print(table(findings))
    if args.json:
        write_json(args.json, to_json(findings, hosts))
    return 0 if can_start(findings) else 1


def _check(args: argparse.Namespace) -> None:
    problems = out_of_range(args, {"master_port": (1, 65535), "timeout": (1, 600), "workers": (0, 1024)})
    model = args.model or "yolov5n"
    if fault := image_size_fault(args.imgsz, model, meta_network(model).size_multiple_px):
        problems.append(f"--imgsz: {fault}")
    if args.num_gpus is not None and (args.num_gpus < 1 or args.hostfile):
        rule = "at least 1, and only without --hostfile, whose slots say how many"
        problems.append(f"--num_gpus: {args.num_gpus} given, but it must be {rule}.")
    if args.json and (fault := cannot_replace_json(args.json, "can_start")):
        problems.append(f"--json: {fault}")
    if problems:
        raise UserError("The command line cannot be used", problems)
