"""Fills in launch/gke_jobset.yaml and submits it with kubectl.

    python launch/gke.py --name bt-1 --image IMAGE --hosts 4 --chips_per_host 4 \\
        --accelerator tpu-v5-lite-podslice --topology 4x4 --claim runs [--dry_run] \\
        -- train --config reward_model/bradley_terry --workdir /runs/bt-1

The image holds jaxreward with the extra `tpu` installed for `--python`. The claim is a
PersistentVolumeClaim that all hosts can write to; it appears at --mount, and --workdir lies in it.
`--dry_run` prints the manifest and the command, and runs nothing. See docs/launch.md.
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jinja2

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
# Pods are named NAME-worker-0-INDEX-xxxxx, and a label holds 63 characters.
_NAME = (r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", "1 to 40 of a-z, 0-9 and -, from a letter on")
_LABEL = (r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "1 to 63 of a-z, 0-9 and -")
_CHECKS = {
    "name": _NAME,
    "namespace": _LABEL,
    "accelerator": (r"tpu[-a-z0-9]*|ct[-a-z0-9]*", "a GKE name such as tpu-v5-lite-podslice"),
    "topology": (r"\d+x\d+(x\d+)?", "such as 4x4 or 2x2x4"),
    "image": (r"[a-z0-9][\w./:@-]*", "REGISTRY/NAME:TAG"),
    "claim": (r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "the name of a PersistentVolumeClaim"),
    "mount": (r"/[\w./-]+", "an absolute path"),
}


def check(values: dict) -> None:
    """Compares every value with the form that Kubernetes or GKE wants.

    Raises:
      ValueError: naming all that do not fit, what was expected and what came.
    """
    faults = [
        f"--{name}: expected {form}, got {values[name]!r}"
        for name, (pattern, form) in _CHECKS.items()
        if not re.fullmatch(pattern, values[name])
    ]
    for name in ("hosts", "chips_per_host", "lead"):
        if values[name] < 1:
            faults.append(f"--{name}: expected 1 or more, got {values[name]}")
    if not faults:
        chips = math.prod(map(int, values["topology"].split("x")))
        if chips != values["hosts"] * values["chips_per_host"]:
            faults.append(
                f"--topology {values['topology']} has {chips} chips, but --hosts {values['hosts']} "
                f"x --chips_per_host {values['chips_per_host']} are "
                f"{values['hosts'] * values['chips_per_host']}"
            )
    if faults:
        raise ValueError("\n".join(faults))


def render(values: dict, words: list[str]) -> str:
    """The manifest; `words` is the command of jaxreward."""
    check(values)
    logs = f"{values['mount'].rstrip('/')}/launch_logs/{values['name']}"
    start = [values["python"], "-m", "jaxreward.launch", "worker", "--logs", logs]
    start += ["--grace", str(values["lead"]), "--", *words]
    env = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    # Jinja's tojson writes <, >, & and ' as escapes, which JSON and YAML read back.
    text = env.from_string(TEMPLATE.read_text()).render(
        **values, chips=values["chips_per_host"], command=_kubernetes(start)
    )
    return text + "\n"


def _kubernetes(words):
    # Kubernetes would put variables in for $(NAME); $$ stands for one $.
    return [word.replace("$(", "$$(") for word in words]


def main(argv=None) -> int:
    """Renders and submits; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--namespace", default="default", help="default: %(default)s")
    add("--image", required=True, help="container image with jaxreward in it")
    add("--hosts", type=int, required=True, help="hosts of the slice")
    add("--chips_per_host", type=int, default=4, help="default: %(default)s")
    add("--accelerator", required=True, help="value of the label gke-tpu-accelerator")
    add("--topology", required=True, help="value of the label gke-tpu-topology")
    add("--claim", required=True, help="PersistentVolumeClaim that all hosts share")
    add("--mount", default="/runs", help="where it appears (default: %(default)s)")
    add("--python", default="python3", help="in the image (default: %(default)s)")
    add("--restarts", type=int, default=10, help="after failures and preemptions (%(default)s)")
    add("--lead", type=int, default=120, help="seconds to save in (default: %(default)s)")
    add("--spot", action="store_true", help="on spot nodes")
    add("--dry_run", action="store_true", help="print what would run, and stop")
    args = parser.parse_args(argv[:cut])
    words = argv[cut + 1 :]
    if not words:
        parser.error("nothing to run; write: -- train --config NAME --workdir DIR")
    try:
        manifest = render(vars(args), words)
    except ValueError as error:
        print(f"gke.py: {error}", file=sys.stderr)
        return 2
    command = ["kubectl", "apply", "--filename", "-"]
    if args.dry_run:
        print(f"{manifest}# {shlex.join(command)}")
        return 0
    return subprocess.run(command, input=manifest, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
