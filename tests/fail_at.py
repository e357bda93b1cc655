"""Trains like the command of a framework, but fails in one process: FRAMEWORK PROCESS BATCH KIND [flags].

Process PROCESS raises an error of KIND, `user` or `other`, or is killed (`kill`), when it puts batch number BATCH on
its device.
"""

import os
import signal
import sys

from absl import flags

from meanflow.config.flags import run
from meanflow.errors import UserError

framework, process, batch, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sys.argv[1:] = sys.argv[5:]
if framework == "jax":
    from jax_impl import main, train
    from jax_impl.devices import define_flags

    define_flags()
    number = lambda: flags.FLAGS.process  # noqa: E731
else:
    import torch.distributed as dist

    from torch_impl import train

    main, number = train, dist.get_rank

put, count = train.put_batch, 0


def put_or_fail(*args, **kwargs):
    """Put a batch on its device, or fail."""
    global count
    count += 1
    if count == batch and number() == process:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("this batch is bad") if kind == "user" else ValueError("this step is bad")
    return put(*args, **kwargs)


train.put_batch = put_or_fail
run(main.main)
