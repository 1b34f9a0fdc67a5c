"""Run the recipes, two at a time, and print how long each took.

python examples/trainers/run.py                      all of them
python examples/trainers/run.py ddp fsdp2            these
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
MISSING = 77
"""A recipe ends with this where a package is missing, and says which."""
RECIPES = {
    "hf_trainer": 1,
    "trl_sft": 1,
    "lightning_fit": 1,
    "peft_altlora": 1,
    "peft_switchlora": 1,
    "muon_on_lora": 1,
    "timm_layer_decay": 1,
    "accelerate_loop": 1,
    "accelerate_loop, 2 processes": 2,
    "ddp": 2,
    "fsdp2": 2,
    "accelerate_fsdp2": 2,
    "torchtitan_container": 1,
    "in_backward": 1,
    "ema": 1,
}
"""Recipes and their numbers of processes; those that take longest come first."""
SECONDS = 180
"""A recipe takes about ten; after so many it is ended."""


def run(name):
    """(exit code, seconds, output) of one recipe.

    Where a signal has ended a process that had its verdict already, as threads of torch do now and
    then while a process with a process group ends, it runs a second time, and its output says so.
    """
    code, seconds, output = attempt(name)
    if code and "the same bits" in output and "terminate called" in output:
        code, more, again = attempt(name)
        seconds, output = seconds + more, f"{again}\nran twice: a process was aborted after its end"
    return code, seconds, output


def attempt(name):
    """The same, of one try."""
    command = [sys.executable]
    if RECIPES[name] > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(RECIPES[name])]
    command.append(str(HERE / f"{name.split(',')[0]}.py"))
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 1, f"{error.stdout or ''}\nended after {SECONDS} seconds"
    return code, time.perf_counter() - start, output


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="some of: " + "; ".join(RECIPES))
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--verbose", action="store_true", help="print all that they print")
    args = parser.parse_args()
    wanted = [n for n in RECIPES if not args.recipes or n.split(",")[0] in args.recipes]
    unknown = set(args.recipes) - {n.split(",")[0] for n in RECIPES}
    if unknown:
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {'; '.join(RECIPES)}")
    start, failed = time.perf_counter(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, (code, seconds, output) in zip(wanted, pool.map(run, wanted), strict=True):
            lines = [line for line in output.splitlines() if "after" in line or "needs " in line]
            word = {0: "ok", MISSING: "skipped"}.get(code, "FAILED")
            print(f"{word:8}{seconds:5.1f} s  {name}", flush=True)
            print(output if args.verbose or word == "FAILED" else "\n".join(lines), flush=True)
            failed += [name] * (word == "FAILED")
    print(f"{len(wanted)} recipes, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
