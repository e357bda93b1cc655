"""Judge a trained model: generate, compare with the real images, print one JSON line, write DIR/evaluation.json.

python -m jax_impl.evaluate --workdir=runs/digits
"""

from absl import flags

from configs.flags import run, workdir
from evaluation import report
from evaluation.logs import setup_logging
from jax_impl import sample


def evaluate(config, sampler, params, features=None):
    """Return {metric: value} of config.evaluation.num_samples samples.  features: see `report.evaluate_samples`."""
    images, labels = sample.generate(config, sampler, params, config.evaluation.num_samples)
    return report.evaluate_samples(images, labels, config, features)


def evaluate_emas(config, sampler, emas, features=None):
    """Return {metric_ema_DECAY: value} of each of config.train.ema_decays, and {metric: value} of the sampled one."""
    results = [evaluate(config, sampler, ema, features) for ema in emas]
    named = zip(config.train.ema_decays, results, strict=True)
    values = {
        f"{name}_ema_{d}": value for d, result in named for name, value in result.items() if name != "num_samples"
    }
    return values | (results[config.sample.ema] if config.sample.ema >= 0 else {})


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
