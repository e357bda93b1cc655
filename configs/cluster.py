"""Hosts and their devices: which of them share a sharded copy of the state."""

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence

from absl import logging

from configs.errors import UserError


def check_groups(hosts: Sequence[Hashable], fsdp: int, kind: str) -> None:
    """Raise UserError unless `train.fsdp` divides the devices into groups that keep hosts whole.

    hosts: the host of each device, in the order in which they form groups.  kind: what the message calls the devices.
    A group either lies within one host or consists of whole hosts; the latter is logged, because parameters then cross
    the network in every step.
    """
    if not _keeps_hosts(hosts, fsdp):
        sizes = [size for size in range(1, len(hosts) + 1) if _keeps_hosts(hosts, size)]
        into = " into groups within a host or of whole hosts" if len(set(hosts)) > 1 else ""
        raise UserError(
            f"config.train.fsdp {fsdp} does not divide the {len(hosts)} {kind}{into}: choose one of "
            f"{', '.join(map(str, sizes))}{_advice(hosts)}"
        )
    spanned = len(set(hosts[:fsdp]))
    if spanned > 1:
        logging.warning(
            "config.train.fsdp %d spans %d hosts: every step gathers the parameters over the network.  %d stays within "
            "a host, if its memory suffices", fsdp, spanned, min(Counter(hosts).values()),
        )  # fmt: skip


def _advice(hosts):
    changes = sum(one != other for one, other in itertools.pairwise(hosts))
    if changes < len(set(hosts)):
        return ""
    return ", or number the processes of a host consecutively (srun --distribution=block)"


def _keeps_hosts(hosts, size):
    total = Counter(hosts)
    groups = [Counter(hosts[first : first + size]) for first in range(0, len(hosts), size)]
    return len(hosts) % size == 0 and all(len(g) == 1 or all(g[host] == total[host] for host in g) for g in groups)
