"""The metrics of a training step: scalars that do not depend on how its batch was divided."""

import torch

FRACTION = " fraction"  # suffix for the fraction of rows that a mean covers, until `of_kinds`


def measure(loss, aux):
    """Return the scalars of a step to log.  Raw errors are squared and summed over a row.

    raw_error_v: the error of the v head, if the method has one.  raw_error_flow_rows: the rows with r = t, or the
    separate flow term if there is one.  projection: the REPA term.  kept: fraction of pairs within distance_clip.
    All are means over all rows, so they may be averaged over the parts of a batch; `of_kinds` then turns those of one
    kind of rows into means over these rows.
    """
    scalars = {"loss": loss, "raw_error": aux["err"].mean()}
    if "du_dt" in aux:
        jvp_row = aux["r"] < aux["t"]
        du_dt_norm = aux["du_dt"].square().sum((1, 2, 3)).sqrt()

        def mean_over(name, rows, a):
            return {name: torch.where(rows, a, 0).mean(), name + FRACTION: rows.to(a.dtype).mean()}

        scalars |= mean_over("raw_error_jvp_rows", jvp_row, aux["err"]) | mean_over("du_dt_norm", jvp_row, du_dt_norm)
        if "err_flow" not in aux:
            scalars |= mean_over("raw_error_flow_rows", ~jvp_row, aux["err"])
    if "err_flow" in aux:
        scalars["raw_error_flow_rows"] = aux["err_flow"].mean()
    if "err_v" in aux:
        scalars["raw_error_v"] = aux["err_v"].mean()
    return scalars | {name: aux[name] for name in ("projection", "kept") if name in aux}


def of_kinds(metrics):
    """Return the metrics of a whole batch, with those of one kind of rows averaged over these rows; 0 if none.

    metrics: from `measure`, which divides sums over one kind of rows by the number of all rows and also returns the
    fraction of these rows.
    """
    fractions = {name: a for name, a in metrics.items() if name.endswith(FRACTION)}
    means = {name: a for name, a in metrics.items() if name not in fractions}
    for name, fraction in fractions.items():
        name = name.removesuffix(FRACTION)
        means[name] = means[name] / (fraction or 1)
    return means
