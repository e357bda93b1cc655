"""Writes folders of canonical weights and their config: work directories, and with a model card, for the hub."""

import copy
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jax_impl import checkpoints as jax_checkpoints
from meanflow.commands import checkpoints, data_metrics, evaluate, guidance_sweep, snapshots
from meanflow.config import latents, options, paths, store
from meanflow.config.workdir import FILE_NAME, read_workdir
from meanflow.errors import UserError
from meanflow.files import replace_text
from meanflow.weights import files
from parity import agreement as agreements
from torch_impl import checkpoints as torch_checkpoints

CARD = "README.md"
UNCONDITIONAL = ("unet",)  # networks that ignore labels
METHODS = {  # titles and sources
    "meanflow": ("MeanFlow", "https://arxiv.org/abs/2505.13447"),
    "improved": ("Improved MeanFlow", "https://arxiv.org/abs/2512.02012"),
    "decoupled": ("Decoupled MeanFlow", "https://arxiv.org/abs/2510.24474"),
    "rectified": ("Rectified MeanFlow", "https://github.com/Xinxi-Zhang/Re-MeanFlow"),
    "flow": ("Flow matching", "https://arxiv.org/abs/2403.03206"),
}
CARD_TEXT = """\
---
library_name: meanflow
pipeline_tag: unconditional-image-generation
tags:
{tags}
---

# {title}

[{method}]({source}), network `{network}`, {millions:.2f} million parameters, {conditioned}.
Images: {size} x {size}, {channels} channels{of_latents}.

| | |
|---|---|
{facts}
{metrics}
## Use

`model.safetensors` holds canonical weights, the names of the official PyTorch code; `config.json` describes the
network and its training.  Either framework samples from them:

```
python -m jax_impl.sample --weights={weights} --config=config.json --output=samples
python torch_impl/sample.py --weights={weights} --config=config.json --output=samples
```

Both trainers start from them with `--config.train.load_from={weights}`, and this folder is a work directory that
`evaluate` and the other commands read.
"""
METRICS_TEXT = """
From the run's last evaluation, `{source}`; it may have been of another checkpoint of the run.

{table}
"""


class Run(NamedTuple):
    """What is known of the training of some weights; every field may be empty."""

    config: options.Config | None = None
    step: int | None = None
    ema: str = ""  # in words
    metrics: dict[str, Any] = {}  # noqa: RUF012  of evaluation.json
    sweep: tuple[guidance_sweep.Row, ...] = ()  # of sweep.json


def newest_step(source: Any) -> int | None:
    """Return the step of the newest checkpoint in a work directory; None if `source` is something else."""
    path = pathlib.Path(source)
    found = [
        step
        for module in (jax_checkpoints, torch_checkpoints)
        for step in checkpoints.whole_steps(path / module.DIRECTORY, module.MARKER)
    ]
    return max(found, default=None)


def run_of(source: Any, ema: int | None, step: int | None) -> Run:
    """Return what a work directory, or the metadata of a snapshot or hub folder, says of the training of its weights.

    ema, step: those that are read.  Raises UserError if a file is damaged.
    """
    path = pathlib.Path(source)
    if (path / FILE_NAME).is_file() and (path / "checkpoints").is_dir() | (path / "snapshots").is_dir():
        config = read_workdir(path)
        words = "raw parameters" if ema == -1 else f"EMA of decay {config.train.ema_decays[ema or 0]}"
        metrics, sweep = (read_json(path / name) for name in (data_metrics.FILE_NAME, evaluate.JSON_NAME))
        return Run(config, step, words, metrics or {}, tuple(sweep or ()))
    path = path / snapshots.ALONE if (path / snapshots.ALONE).is_file() else path
    if path.is_file() and files.kind_of(path) == "safetensors":
        metadata = files.metadata(path)
        if "config" in metadata:
            config = store.from_json(metadata["config"], f"the config in {path}")
            words = metadata.get("ema", "")
            words = f"EMA of decay {words}" if words[:1].isdigit() else words  # a snapshot has the number
            return Run(config, int(metadata["step"]) if "step" in metadata else None, words)
    return Run()


def read_json(path: pathlib.Path) -> Any:
    """Return the content of a JSON file, None if it does not exist.  Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete it and evaluate again") from error


def write(
    dest: pathlib.Path, weights: dict[str, np.ndarray], metadata: dict[str, str], config: options.Config, run: Run
) -> None:
    """Write a folder for the hub.  metadata: text for the weights.  Raises UserError if it cannot be written.

    The metadata also say the system, config, step and EMA, and how far both frameworks agree on the written weights.
    """
    public = without_paths(config)
    write_weights(dest, weights, metadata, public, run)
    agreement = agreements.measure(dest / snapshots.ALONE, config)
    write_weights(dest, weights, metadata | {"parity": agreement.to_json()}, public, run)
    replace_text(dest / CARD, card(config, run, sum(a.size for a in weights.values()), agreement))


def write_weights(
    dest: pathlib.Path, weights: dict[str, np.ndarray], metadata: dict[str, str], config: options.Config, run: Run
) -> None:
    """Write a work directory of weights alone, see `snapshots`.  Raises UserError if it cannot be written."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {dest}: {error.strerror}") from error
    known = {"step": "" if run.step is None else str(run.step), "ema": run.ema}
    metadata = metadata | {"system": config.method.name, "network": config.model.name}
    metadata |= {key: text for key, text in known.items() if text} | {"config": store.to_json(config)}
    files.save(dest / snapshots.ALONE, weights, metadata)
    replace_text(dest / FILE_NAME, metadata["config"])


def without_paths(config: options.Config) -> options.Config:
    """Return a copy of the config whose paths are reduced to names: others do not have them, nor need to know them."""
    config, flat = copy.deepcopy(config), store.flatten(config)
    config.update_from_flattened_dict({key: name_of(flat[key]) for key in paths.OPTIONS if key in flat})
    return config


def name_of(path: str) -> str:
    """Return the last part of an absolute path; other names, such as those on the hub, as they are."""
    return pathlib.PurePath(path).name if pathlib.PurePath(path).is_absolute() else path


def card(config: options.Config, run: Run, num_parameters: int, agreement: agreements.Agreement) -> str:
    """Return the model card, Markdown with YAML in front."""
    method, source = METHODS[config.method.name]
    c, convention = config.model, latents.of(config)
    tags = ["meanflow", config.method.name, c.name, "image-generation", "jax", "pytorch"]
    tags += ["one-step-generation"] if config.method.name != "flow" else []
    rows = facts(config, run) | {"JAX and PyTorch differ by": str(agreement)}
    conditioned = "unconditional" if c.name in UNCONDITIONAL else f"conditioned on {c.num_classes} classes"
    return CARD_TEXT.format(
        tags="\n".join(f"- {tag}" for tag in dict.fromkeys(tags)),
        title=f"{method}: {config.name or c.name}",
        method=method, source=source, network=c.name, millions=num_parameters / 1e6, conditioned=conditioned,
        size=c.input_size, channels=c.channels, weights=snapshots.ALONE,
        of_latents=f", latents of the convention {latents.describe(convention)}" if convention else "",
        facts="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        metrics=metrics_text(run),
    )  # fmt: skip


def facts(config: options.Config, run: Run) -> dict[str, str]:
    """Return the rows of the card's table: of the run if it is known, otherwise of its config."""
    t, m, s = config.train, config.method, config.sample
    rows = {
        "data": f"{name_of(config.data.name)}, split {config.data.split}",
        "trained for": f"{run.step} steps of {t.steps}" if run.step is not None else f"{t.steps} steps by its config",
        "batch size": str(t.batch_size),
        "optimizer": f"{t.optimizer}, learning rate {t.learning_rate:g}",
        "weights": run.ema or "not known: EMA or raw parameters",
    }
    guidance = {key: m[key] for key in ("guidance", "omega", "kappa", "guidance_start", "guidance_end") if key in m}
    if guidance:
        rows["guidance in training"] = ", ".join(f"{key} {value}" for key, value in guidance.items())
    rows["sampler"] = f"{s.sampler}, {s.steps} step{'s' if s.steps != 1 else ''}"
    if "omega" in s:
        rows["guidance in sampling"] = f"omega {s.omega:g}, interval {s.interval[0]:g} to {s.interval[1]:g}"
    return rows


def metrics_text(run: Run) -> str:
    """Return the section on metrics, '' without any."""
    texts = []
    if run.metrics:
        rows = [
            f"| {name} | {f'{value:.5g}' if isinstance(value, float) else name_of(str(value))} |"
            for name, value in run.metrics.items()
        ]
        table = "\n".join(["| metric | value |", "|---|---|", *rows])
        texts.append(METRICS_TEXT.format(source=data_metrics.FILE_NAME, table=table))
    if run.sweep:
        rows = [row | {"interval": tuple(row["interval"])} for row in run.sweep]
        texts.append(METRICS_TEXT.format(source=evaluate.JSON_NAME, table=guidance_sweep.table(rows)))
    return "".join(["\n## Metrics\n", *texts] if texts else [])
