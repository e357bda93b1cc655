"""Starts commands in a moment: this process has imported the libraries, and forks for each command.

Importing JAX, PyTorch and TensorFlow takes ten seconds, a tiny training run two.  A fork is a process of its own, with
its own signals, output and exit code; it imports this project itself.  One request a line on stdin, one answer a line:
    {"argv": [...], "env": {...}, "cwd": DIR, "stdout": PATH, "stderr": PATH}  ->  process id
    {"poll": process id}                                                       ->  null, or exit code (-N: signal N)
argv[0] is a script, or a module of which `python -m` would be told.
"""

import gc
import importlib
import json
import os
import runpy
import sys

LIBRARIES = (
    "torch.utils.flop_counter",  # loads Triton, if there is one, which crashes if TensorFlow is loaded before it
    "jax", "flax.nnx", "optax", "orbax.checkpoint", "jax.experimental.multihost_utils",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "tensorflow_datasets", "grain", "clu.metric_writers",
    "clu.periodic_actions", "sklearn.svm", "PIL.Image", "safetensors.numpy", "tqdm",
)  # fmt: skip


def serve():
    """Answer requests until stdin ends.  Returns None then, and in each fork its request."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def run(argv, env, cwd, stdout, stderr):
    """Become the command."""
    os.setsid()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(stdout, flags), os.open(stderr, flags))):
        os.dup2(file, number)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    if argv[0].endswith(".py"):
        sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.path[0] = cwd
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # else each fork collects all of the libraries as it ends, and copies their pages, for three seconds
    print(json.dumps("ready"), flush=True)
    command = serve()
    if command is not None:
        run(**command)
