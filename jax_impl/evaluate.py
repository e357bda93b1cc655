"""Judge a trained model: generate, compare with the real images, print one JSON line, write DIR/evaluation.json.

python -m jax_impl.evaluate --workdir=runs/digits
"""

from absl import flags

from configs.flags import run, workdir
from evaluation import report
from evaluation.logs import setup_logging
from jax_impl import sample


def evaluate(config, sampler, params):
    """Return {metric: value} of config.evaluation.num_samples samples."""
    images, labels = sample.generate(config, sampler, params, config.evaluation.num_samples)
    return report.evaluate_samples(images, labels, config)


def main():
    """Load, evaluate, report."""
    setup_logging()
    config, graphdef, params = sample.load(workdir(), "", None)
    if flags.FLAGS["num_samples"].present:
        config.evaluation.num_samples = flags.FLAGS.num_samples
    result = evaluate(config, sample.make_sampler(config, graphdef), params)
    print(report.write_evaluation(workdir(), result))


if __name__ == "__main__":
    run(main)
