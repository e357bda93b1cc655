"""The fit of two time embeddings to an EDM2 teacher's: its error in the network, and what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx

from configs import digits
from jax_impl import time_embedding, weights
from jax_impl.step import abstract_net
from meanflow.commands import time_embedding as shared
from meanflow.errors import UserError

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {
    "input_size": 4, "width": 8, "channel_mult": (1,), "channel_mult_emb": 1, "channel_mult_noise": 1, "num_classes": 3,
    "attn_resolutions": (), "logvar_channels": 4,
}  # fmt: skip


def config_of(**changes):
    config = digits.get_config("edm2_flow")
    config.model.update(SIZES | changes)
    return config


@pytest.fixture(scope="module")
def teacher(optimize_less):
    """Return the config and the canonical weights of a teacher."""
    return config_of(), weights.to_canonical(*fresh(config_of()))


def fresh(config):
    """Return a network and its parameters, drawn here, which is quicker than to compile their drawing."""
    (graphdef, shapes), rng = abstract_net(config), np.random.RandomState(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.randn(*a.shape), a.dtype), shapes)
    return nnx.merge(graphdef, params), params


def mean_squared_error(given, found, t, r):
    """Return by numpy the error of the embeddings of weights `found` to the teacher's, in float64."""
    freqs, phases = (given[f"unet.emb_fourier.{name}"].astype(np.float64) for name in ("freqs", "phases"))

    def embed(weight, a):
        weight = weight.astype(np.float64)
        weight = weight / (1e-4 + np.sqrt(np.square(weight).mean(1, keepdims=True)))
        return 2**0.5 * np.cos(np.outer(a, freqs) + phases) @ weight.T / len(freqs) ** 0.5

    t, r = np.float64(t), np.float64(r)
    of_t, of_r = (embed(found[name], a) for name, a in zip(shared.TWO, (t, r), strict=True))
    return np.square((of_t + of_r) / 2**0.5 - embed(given[shared.ONE], np.log(t / (1 - t)) / 4)).mean()


@pytest.fixture
def write(parse_flags, monkeypatch, teacher, tmp_path):
    """Return a function that runs the command on the teacher's file and returns what it writes."""

    def run():
        config, given = teacher
        source, output = (str(tmp_path / f"{name}.safetensors") for name in ("teacher", "start"))
        weights.save(source, given, {})
        monkeypatch.setattr(shared, "config_flag", lambda: config)
        monkeypatch.setattr("sys.argv", ["program"])
        parse_flags(shared.define_flags, f"--teacher={source}", f"--output={output}")
        time_embedding.main()
        assert flags.FLAGS.output == output
        return weights.load(output)

    return run


def test_the_error_is_that_of_a_formula(teacher):
    config, given = teacher
    times = shared.draw_times(np.random.default_rng(0), 300)
    rng = np.random.default_rng(1)
    found = shared.copied(given) | {name: rng.normal(size=(8, 8)).astype(np.float32) for name in shared.TWO}
    error = time_embedding.error(shared.two_times(config), found, config, given, *times)
    assert error == pytest.approx(mean_squared_error(given, found, *times), rel=1e-4) and error > 0.1


def test_what_is_written_is_the_teacher_but_for_two_embeddings(teacher, write, capsys):
    config, given = teacher
    found = write()
    kept = {name for name in given if name != shared.ONE and not name.startswith("logvar_")}
    assert found.keys() == kept | set(shared.TWO) and len(kept) > 10
    assert all(found[name].tobytes() == given[name].tobytes() for name in kept)
    assert not any(np.array_equal(found[name], given[shared.ONE]) for name in shared.TWO)
    times = shared.draw_times(np.random.default_rng(5), 2000)
    error = time_embedding.error(shared.two_times(config), found, config, given, *times)  # they fit the network
    assert error < time_embedding.error(shared.two_times(config), shared.copied(given), config, given, *times)
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(error, rel=0.1)


def test_weights_that_do_not_fit_are_named(teacher):
    (config, given), times = teacher, shared.draw_times(np.random.default_rng(0), 4)
    with pytest.raises(UserError, match="lack unet.emb_noise"):
        time_embedding.error(shared.two_times(config), given, config, given, *times)


def test_a_network_of_two_times_does_not_start_from_one_of_one(teacher):
    """But from what the fit writes, and without its log-variance from EDM2's own."""
    config, given = teacher
    two, one = shared.two_times(config), config_of(logvar_channels=0)
    with pytest.raises(UserError, match="fit its time embeddings first"):
        adopted(two, given)
    assert adopted(two, shared.copied(given)).keys() == shared.copied(given).keys()
    assert adopted(one, given).keys() == {name for name in given if "logvar" not in name}


def adopted(config, given):
    """Return what a network takes over of weights to start from."""
    return weights.transfer(*fresh(config), given)
