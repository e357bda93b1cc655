"""Fixtures of optimizers, learning rates and EMAs of the official trainers, checked through our own step functions."""

import re

import numpy as np

from meanflow.config import options
from meanflow.errors import UserError
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure
from parity.golden.network import BOUND

# For the distance moved, since parameters that barely move would hide errors in their updates; it carries their
# rounding, 1e-7 of values some hundred times larger.
MOVED_BOUND = 2e-4
PYMF_WARMUP_FROM = 1e-8  # a constant of py-meanflow's train.py


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return ["ema", "opt"]


def emas(fixture, measure: Measure, every: int = 1) -> None:
    """ema/RULE_DECAY: the EMA after each step, given the parameters after each; all rules are the same mathematics.

    every: steps between EMA updates.
    """
    params, want = fixture.get("in/ema/w"), fixture.under("out/ema/")
    unknown = [key for key in want if not re.fullmatch(r"[a-z]+_0\.\d+", key)]
    if unknown:
        raise UserError(f"the EMA {unknown[0]} is not RULE_DECAY, e.g. jax_0.999")
    decays = {key: float(key.partition("_")[2]) for key in want}
    c = options.get_config().train
    c.learning_rate, c.ema_decays = 0.0, tuple(sorted(set(decays.values())))
    c.ema_every = every
    for name, f in FRAMEWORKS.items():
        _, histories, _ = f.optimize(params[0], np.zeros_like(params[1:]), c, params[1:])
        for key, rows in want.items():
            got = np.concatenate([params[:1], histories[c.ema_decays.index(decays[key])]])
            measure.compare(name, key, got, rows, BOUND)


def learning_rates(fixture, case: str, measure: Measure) -> None:
    """lr/imf_warmup_const or _cosine, with or without _nowarm; lr/pymf: a linear warm-up from almost 0."""
    settings, want = fixture.config, fixture.get(f"out/lr/{case}")
    c = options.get_config().train
    match = re.fullmatch(r"imf_warmup_(const|cosine)(_nowarm)?", case)
    if match:
        c.update(
            learning_rate=settings["lr"], final_factor=settings["fac"], steps=int(settings["ep"] * settings["spe"])
        )
        c.update(warmup_steps=0 if match[2] else int(settings["warm"] * settings["spe"]), cosine_end="early")
        c.schedule = "cosine" if match[1] == "cosine" else "constant"
    elif case == "pymf":
        c.update(learning_rate=settings["pylr"], warmup_steps=settings["pyw"], warmup_from=PYMF_WARMUP_FROM)
    else:
        raise UserError(f"{case} is not a known learning-rate schedule")
    for name, f in FRAMEWORKS.items():
        measure.compare(name, "learning_rate", f.learning_rates(range(len(want)), c), want, BOUND)


def optimizers(fixture, measure: Measure) -> None:
    """opt/LIBRARY_RULE_BETA2, with _clipNORM: the parameters after each step; the betas and norms are in the names."""
    start_at, grads, want = fixture.get("in/opt/p0"), fixture.get("in/opt/g"), fixture.under("out/opt/")
    norms = want.pop("grad_norms")
    for key, rows in want.items():
        c = optimizer_settings(key, start_at, rows)
        for name, f in FRAMEWORKS.items():
            params, _, got_norms = f.optimize(start_at, grads, c)
            measure.compare(name, key, params, rows, BOUND)
            measure.compare(name, f"{key} (moved)", params - start_at, rows - start_at, MOVED_BOUND)
            measure.compare(name, f"{key} (grad_norms)", got_norms, norms, BOUND)


def optimizer_settings(key, start_at, rows):
    """Return `config.train` of an optimizer case, e.g. torch_adamw_095_clip1: b2 0.95, gradients clipped to norm 1."""
    match = re.fullmatch(r"(?:torch|optax)_(adamw?)_(?:b2_)?0(\d+)(?:_clip([\d.]+))?", key)
    if match is None:
        raise UserError(f"{key} is not LIBRARY_RULE_BETA2 or LIBRARY_RULE_BETA2_clipNORM")
    c = options.get_config().train
    # The file does not state the learning rate, but Adam's first step is the rate times the gradient's sign.
    rate = float(f"{np.abs(rows[0] - start_at).max():.3g}")
    c.update(optimizer=match[1], beta2=float(f"0.{match[2]}"), learning_rate=rate, clip_norm=float(match[3] or 0))
    return c


RUNNERS = {"ema": emas, "lr": learning_rates, "opt": optimizers}
