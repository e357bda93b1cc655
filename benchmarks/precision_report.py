"""Tables and plots of the precision study."""

import numpy as np

LABELS = {"u": "u", "du_dt": "du/dt", "target": "target", "gradient": "gradient"}
FIGURES = LABELS | {
    "one_minus_cosine": "1 - cosine", "along": "along", "bias": "bias", "error": "error at B",
    "over_noise": "over noise", "worst": "worst tensor",
}  # fmt: skip


def markdown(framework, results, args):
    """Return the tables of all systems."""
    lines = [f"{framework}, batches of {args.batch}, {args.seeds} seeds; relative errors against float64", ""]
    head = ("mode", *FIGURES.values())
    for config, table, scale in ((*result, scale) for result in results.values() for scale in args.scales):
        row, batch_size = table[str(scale)], config.train.batch_size
        sizes = ", ".join(f"{LABELS[name]} {size:.2g}" for name, size in row["sizes"].items())
        lines += [f"**{config.name}**, {args.weights or f'scale {scale}'}; root mean squares: {sizes}; sampling noise"]
        lines += [f"of a gradient of B = {batch_size} rows: {row['noise']:.2g} of the mean gradient", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for mode, figures in row["modes"].items():
            cells = [f"{figures[key]:.1e}" for key in FIGURES]
            lines += [f"| {mode} | " + " | ".join(cells) + f" ({figures['worst_name']}) |"]
        lines.append("")
    return "\n".join(lines)


def plot(path, framework, results, args):
    """Plot the errors of each quantity by mode with the sampling noise, one panel per system and scale."""
    from matplotlib.figure import Figure

    shape = len(results), len(args.scales)
    figure = Figure(figsize=(5 * shape[1], 3 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, sharey=True)
    for i, (config, table) in enumerate(results.values()):
        for j, scale in enumerate(args.scales):
            ax, row = axes[i, j], table[str(scale)]
            for k, (mode, figures) in enumerate(row["modes"].items()):
                places = np.arange(len(LABELS)) + (k - len(args.modes) / 2 + 0.5) * 0.8 / len(args.modes)
                ax.bar(places, [figures[key] for key in LABELS], 0.8 / len(args.modes), label=mode)
            ax.axhline(row["noise"], color="black", linestyle="--", label="sampling noise of a step")
            ax.set(yscale="log", title=f"{config.name}, scale {scale}, {framework}", ylabel="relative error")
            ax.set_xticks(range(len(LABELS)), list(LABELS.values()))
    bars = axes[0, 0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)
