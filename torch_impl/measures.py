"""What a step says of itself: scalars that do not depend on how its batch was divided."""

import torch

SHARE = " share"  # ends the name of a metric's share of the rows, until `of_kinds`


def measure(loss, aux):
    """Return the scalars of a step that are logged: raw errors are squared and summed over a row.

    raw_error_v: that of the head of v, where the method has one.  Where the flow term has rows of its own, all others
    are the JVP's.  projection: the term of REPA.  kept: the share of couplings that are near enough to be learnt.
    All are means over the rows, so those of the parts of a batch may be averaged; `of_kinds` then makes means over the
    rows of a kind.
    """
    scalars = {"loss": loss, "raw_error": aux["err"].mean()}
    if "du_dt" in aux:
        jvp_row = aux["r"] < aux["t"]
        du_dt_norm = aux["du_dt"].square().sum((1, 2, 3)).sqrt()

        def mean_over(name, rows, a):
            return {name: torch.where(rows, a, 0).mean(), name + SHARE: rows.to(a.dtype).mean()}

        scalars |= mean_over("raw_error_jvp_rows", jvp_row, aux["err"]) | mean_over("du_dt_norm", jvp_row, du_dt_norm)
        if "err_flow" not in aux:
            scalars |= mean_over("raw_error_flow_rows", ~jvp_row, aux["err"])
    if "err_flow" in aux:
        scalars["raw_error_flow_rows"] = aux["err_flow"].mean()
    if "err_v" in aux:
        scalars["raw_error_v"] = aux["err_v"].mean()
    return scalars | {name: aux[name] for name in ("projection", "kept") if name in aux}


def of_kinds(metrics):
    """Return the metrics of a whole batch with those of rows of a kind as means over these rows; 0 if there are none.

    metrics: of `measure`, which has the sum over the rows of a kind divided by the number of all, and their share.
    """
    shares = {name: share for name, share in metrics.items() if name.endswith(SHARE)}
    means = {name: a for name, a in metrics.items() if name not in shares}
    for name, share in shares.items():
        name = name.removesuffix(SHARE)
        means[name] = means[name] / (share or 1)
    return means
