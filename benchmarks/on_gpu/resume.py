"""Kills a run, resumes it, then samples and evaluates: `python -m benchmarks.on_gpu.resume FRAMEWORK DIR STEPS`."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

from benchmarks.on_gpu import trainer

RECIPE = "configs/digits.py"
APART = 0.05  # of the last raw error: sums on a GPU have no fixed order, and the runs drift apart


def main(framework: str, directory: str, num_steps: str) -> dict:
    """Return how far the resumed run is from an undisturbed one, and its score.  Exits if that is too far."""
    shutil.rmtree(directory, ignore_errors=True)
    unbroken, broken = pathlib.Path(directory, "unbroken"), pathlib.Path(directory, "broken")
    steps = int(num_steps)
    changes = {"train.steps": steps, "train.log_every": 10, "train.checkpoint_every": steps // 6,
               "train.sample_every": steps}  # fmt: skip
    trainer.run(trainer.train(framework, RECIPE, unbroken, changes))
    argv = trainer.train(framework, RECIPE, broken, changes)
    killed_at = kill(argv, broken, steps * 5 // 12)
    trainer.run(argv)
    expected, found = (trainer.check_finite(workdir, steps)["raw_error"] for workdir in (unbroken, broken))
    logged = [line["step"] for line in trainer.metrics(broken)]
    if logged != [line["step"] for line in trainer.metrics(unbroken)]:
        sys.exit(f"the resumed run has logged steps {logged}")
    apart = abs(found / expected - 1)
    if apart > APART:
        sys.exit(f"raw errors at step {steps}: {expected} undisturbed, {found} resumed")
    trainer.run(trainer.command(framework, "sample", f"--workdir={broken}"))
    score = trainer.run(trainer.command(framework, "evaluate", f"--workdir={broken}")).splitlines()[-1]
    return {"killed_at": killed_at, "raw_error_apart": apart, "score": score.strip()}


def kill(argv: list[str], workdir: pathlib.Path, at: int) -> int:
    """Start a run, kill it once it has logged the step `at`, and return the last step it had logged."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        logged = trainer.metrics(workdir)
        if logged and logged[-1]["step"] >= at:
            process.kill()
            process.wait()
            return logged[-1]["step"]
        time.sleep(0.02)
    sys.exit(f"the run ended with exit code {process.returncode} before it could be killed")


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
