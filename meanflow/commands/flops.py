"""Model FLOPs of a training step: forwards that the method needs, times the FLOPs of one forward of the network."""

from meanflow.config import options


def forwards(config: options.Config) -> float:
    """Return the forwards F per row in a step of `config.method`, where a backward pass is 2F and a tangent F.

    Counts what the mathematics needs, so a setting that computes more (flow_rows = coin) has a lower utilisation.  F is
    one forward of u, for improved MeanFlow without its v head.  A teacher counts like the network.
    For Re-MeanFlow, `config` is that of a stage, see `stages`.
    """
    c = config.method
    p = 1 - c.flow_fraction if "flow_fraction" in c else 0.0  # fraction of rows with r < t
    if c.name == "flow":
        return 3
    if c.name == "decoupled":  # 3F for each of the two terms, one tangent, and guidance in both terms
        return {"default": 7, "mg": 10, "distill": 11}[c.guidance_type]
    if c.name == "improved":
        head = config.model.head_depth / config.model.depth
        return 3 + 2 * p + 3 * head + bool(c.guidance)
    if not c.guidance:
        return 3 + p
    needs_both = c.name == "rectified" or c.kappa
    return 4 + 2 * p if needs_both else 4 + p


def of_step(config: options.Config, forward: float) -> float:
    """Return the model FLOPs of one step of the global batch.  forward: FLOPs of one row, see `count_forward`."""
    return forwards(config) * forward * config.train.batch_size
