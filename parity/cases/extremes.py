"""The losses again, with draws at the ends of their ranges and exactly at thresholds, in small and odd batches.

Ordinary draws rarely hit a clamp, a tie in a comparison, or times 0 and 1; these hit little else.
"""

import functools

import numpy as np

from parity.cases import objectives, settings
from parity.checks import Case

# Float32 uniforms in [0, 1): the largest, the smallest, the smallest above it.  Normals: some with logistic 0 or 1.
UNIFORMS = (1 - 2.0**-24, 0.0, 0.5, 2.0**-24)
NORMALS = (40.0, -40.0, -6.0, 0.0, 6.0)
# Also times at which something begins or ends: EDM's largest and one beyond it; 1/4 and 3/4, the ends of improved
# MeanFlow's interval for draws of 1/2.
TIMES = (0.995, 0.25, 80 / 81, 0.75, *UNIFORMS)
COINS = {"flow_rows": "coin", "flow_fraction": 0.5, "label_drop_prob": 0.5}
FRONT = {"flow_rows": "front", "flow_fraction": 0.6, "label_drop": "front", "label_drop_prob": 0.5}
QUARTERS = {"guidance_start": 0.25, "guidance_end": 0.75}
RECTIFIED = settings.RE2 | settings.DRAWN_SCALES | COINS
# By case: network, number of rows, settings.
EXTREMES = {
    "meanflow_uniform": ("dit", 12, COINS | QUARTERS | {"time_sampler": "uniform", "omega": 2.5, "kappa": 0.0}),
    "meanflow_normal": ("dit", 5, FRONT | QUARTERS | {"omega": 0.2, "kappa": 0.92}),
    "meanflow_one_row": ("dit", 1, COINS | {"time_sampler": "uniform", "omega": 1.0, "adaptive_power": 0.0}),
    "meanflow_instant": ("dit", 7, FRONT | {"time_sampler": "uniform", "guidance_start": 0.5, "guidance_end": 0.5}),
    "meanflow_clipped": ("dit", 8, COINS | {"time_sampler": "arctan_official", "guidance": False}),
    "meanflow_unclipped": ("dit", 3, COINS | {"time_sampler": "arctan_official", "clip_interval": False}),
    "meanflow_truncated": ("dit", 7, COINS | {"time_order": "truncated", "path": "cosine", "adaptive_power": 0.5}),
    "meanflow_squared": ("dit", 2, FRONT | settings.SQUARED | {"adaptive_power": 0.75, "time_sampler": "arctan"}),
    "improved_uniform": ("imf", 12, COINS | {"time_sampler": "uniform"}),
    "improved_normal": ("imf", 5, FRONT | {"omega_power": 3.0, "adaptive_power": 0.5}),
    "improved_one_row": ("imf", 1, FRONT | {"omega_power": 0.0, "omega_max": 1.0}),
    "decoupled_uniform": ("dmf", 7, QUARTERS | {"time_sampler": "uniform", "omega": 0.6, "label_drop_prob": 0.5}),
    "decoupled_distill": (
        "dmf", 3, QUARTERS | {
            "time_sampler": "uniform", "guidance_type": "distill", "teacher": "TEACHER", "omega": 1.5,
            "log_variance_pairs": "all", "label_drop_prob": 0.5,
        },
    ),
    "decoupled_official": ("dmf", 5, {"time_sampler": "arctan_official", "path": "cosine", "omega": 0.6}),
    "flow_uniform": ("dmf_sit", 1, {"time_sampler": "uniform", "label_drop_prob": 0.5, "repa_coeff": 0.0}),
    "flow_official": ("dmf_sit", 5, {"time_sampler": "arctan_official", "path": "cosine", "label_drop": "front"}),
    "rectified_re2": ("dit", 12, RECTIFIED | {"interval_mean": 0.0}),
    "rectified_uniform": ("dit", 7, RECTIFIED | {"time_sampler": "uniform"}),
    "rectified_clip": ("dit", 5, RECTIFIED | {"distance_clip": 1.0}),
    "rectified_constant": ("dit", 2, RECTIFIED | FRONT | {"omega_sampler": "constant", "omega": 0.0, "kappa": 0.0}),
}  # fmt: skip


def all_cases() -> list[Case]:
    """Return the cases."""
    return [
        Case(
            f"float64/extreme/{name}",
            functools.partial(objectives.loss, network, setting, inputs=Extreme(num_rows)),
            network,
        )
        for name, (network, num_rows, setting) in EXTREMES.items()
    ]


class Extreme:
    """Makes a batch of `num_rows` rows as `objectives.batch` does, but with extreme draws."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __call__(self, cfg) -> tuple[dict, dict]:
        """Return rows and draws by name."""
        rows, draws = ({name: a[: self.num_rows] for name, a in part.items()} for part in objectives.batch(cfg))
        rng = np.random.RandomState(len(draws) + self.num_rows)
        for name, drawn in draws.items():
            if drawn.ndim < 3:  # every end as often as fits, the first ones first
                values, num_columns = ends(name, cfg), drawn[:1].size
                columns = [rng.permutation(np.resize(np.roll(values, -i), self.num_rows)) for i in range(num_columns)]
                draws[name] = np.stack(columns, axis=-1).reshape(drawn.shape)
        if draws["times"].ndim == 2 and self.num_rows > 1:
            draws["times"][0] = draws["times"][0, 0]  # equal draws of t and r
        if cfg.method.time_sampler == "re2_truncate":
            near_the_rules(draws, cfg)
        if cfg.method.name == "rectified" and cfg.method.distance_clip:
            signs = np.where(rng.uniform(size=rows["image"].shape) < 0.5, -1.0, 1.0)
            far = np.array([1.0, 1 - 2.0**-20, 1 + 2.0**-20])[np.arange(self.num_rows) % 3]
            rows["noise"] = rows["image"].round(2) + signs * far[:, None, None, None]
            rows["image"] = rows["image"].round(2)
        return rows, draws


def ends(name: str, cfg) -> tuple[float, ...]:
    """Return the values for the draws called `name`; for uniforms, first the probability they are compared with."""
    c = cfg.method
    if name in ("times", "times_flow"):
        return TIMES if c.time_sampler in ("uniform", "re2_truncate") else NORMALS
    if name == "interval":
        return NORMALS
    first = {
        "coin": lambda: c.flow_fraction, "drop": lambda: c.label_drop_prob, "omega": lambda: 1 / max(c.omega_max - 1, 1)
    }.get(name, lambda: 0.5)  # fmt: skip
    return (first(), *UNIFORMS)


def near_the_rules(draws: dict, cfg) -> None:
    """Put rows just on either side of t = 0.8 and, beyond it, of r = 0.4; one at r of about 0, one beyond t = 80/81."""
    margin = 1e-9
    t = np.array([0.8 - margin, 0.8 + margin, 0.9, 0.9, 0.3, 0.999])[: len(draws["times"])]
    r = np.array([0.2, 0.2, 0.4 - margin, 0.4 + margin, 0.0, 0.5])[: len(t)]
    normals = (np.log((t - r) / (1 - (t - r))) - cfg.method.interval_mean) / cfg.method.interval_std
    near = {"times": np.expm1(4 * (t - 1e-5) / 0.99998) / np.expm1(4), "second": 0.0, "interval": normals, "coin": 1.0}
    for name, values in near.items():
        draws[name][: len(t)] = values
