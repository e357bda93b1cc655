"""Checkpoints of both frameworks: which directories count as one, who reads what of them, and who may change them."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from flax import nnx
from saved import write_run
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from jax_impl import checkpoints as jax_checkpoints
from jax_impl import step as jax_step
from jax_impl import train as jax_train
from jax_impl import weights as jax_weights
from meanflow.commands import checkpoints, snapshots
from meanflow.config import store
from meanflow.errors import UserError
from meanflow.weights import fitting
from parity import convert
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import train as torch_train
from torch_impl import weights as torch_weights

MODULES = {"jax": jax_checkpoints, "torch": torch_checkpoints}
FRAMEWORKS = pytest.mark.parametrize("framework", MODULES)
NAME = "final_layer.linear.bias"
PROGRESS = {"loader": "", "window": []}


@pytest.fixture(scope="module")
def config(tiny):
    return tiny()


def canonical(config, value):
    """Return canonical weights whose last bias is `value`, which no fresh network has."""
    net = torch_step.build_net(config)
    weights = torch_weights.to_canonical(net, dict(net.named_parameters()))
    return weights | {NAME: np.full_like(weights[NAME], value)}


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """Return {framework: work directory with a checkpoint at step 0, of last bias 1}."""
    directory = tmp_path_factory.mktemp("written")
    for framework in MODULES:
        write_run(framework, directory / framework, config, canonical(config, 1))
    return {framework: directory / framework for framework in MODULES}


@pytest.fixture
def run_of(written, tmp_path):
    """Return a function (framework, *steps) -> a work directory with checkpoints of these steps."""

    def make(framework, *steps):
        workdir, source = tmp_path / framework, written[framework]
        workdir.mkdir()
        shutil.copy(source / "config.json", workdir)
        for step in steps:
            shutil.copytree(source / MODULES[framework].DIRECTORY / "0", workdir / path_of(framework, step))
        return workdir

    return make


def path_of(framework, step):
    return f"{MODULES[framework].DIRECTORY}/{step}"


def start(framework, config, workdir):
    """Start a run there, as its trainer does.  Returns the last bias, and whether it was resumed."""
    saver = MODULES[framework].Checkpoints(workdir, config)
    if framework == "jax":
        graphdef, state, progress = jax_train.start_state(config, jax_step.make_mesh(config), saver)
        weights = jax_weights.to_canonical(nnx.merge(graphdef, state.params), state.params)
    else:
        state, progress = torch_train.start_state(config, None, torch.device("cpu"), saver)
        weights = torch_weights.to_canonical(state.net, dict(state.net.named_parameters()))
    saver.open()
    return weights[NAME].ravel()[0], progress is not None


def files_of(framework, kind):
    return {"state": {"jax": "state", "torch": "__0_0.distcp"}, "run": {"jax": "run", "torch": "run.json"}}[kind][
        framework
    ]


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(framework, directory):
    shutil.rmtree(directory)
    directory.mkdir()


CUTS = {
    "no_marker": lambda framework, directory: (directory / MODULES[framework].MARKER).unlink(),
    "empty": empty,
    "only_run": lambda framework, directory: [
        remove(p) for p in directory.iterdir() if p.name != files_of(framework, "run")
    ],
    "temporary_name": lambda _, directory: directory.rename(f"{directory}.orbax-checkpoint-tmp"),
    "a_file": lambda _, directory: (shutil.rmtree(directory), directory.write_text("3")),
}
DAMAGES = {
    "no_run": lambda framework, directory: remove(directory / files_of(framework, "run")),
    "no_arrays": lambda framework, directory: remove(directory / files_of(framework, "state")),
}


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"loader": '{"step": 3, "seed": 0}', "window": [[2, {"loss": 1.0}], [3, {"loss": 0.5}]]}, True),
        ({"loader": 3}, False),
        ({"loader": "zz"}, False),
        ({"loader": "[3]"}, False),
        ({"loader": '{"step": "3"}'}, False),
        ({"window": 5}, False),
        ({"window": [5]}, False),
        ({"window": [["2", {}]]}, False),
        ({"window": [[2, 0.5]]}, False),
    ],
)
def test_what_resuming_needs(change, fits):
    assert checkpoints.can_resume(PROGRESS | change) == fits
    assert not any(checkpoints.can_resume(run) for run in (None, [], {}, "text", {"loader": ""}))


@FRAMEWORKS
@pytest.mark.parametrize("damage", [b"null", b'{"loader": 3, "window": []}', b'{"loader": "", "window": [5]}', b"\xff"])
def test_what_is_kept_beside_the_arrays_may_be_damaged(framework, damage, config, run_of):
    workdir = run_of(framework, 3)
    run = workdir / path_of(framework, 3) / files_of(framework, "run")
    (run / "metadata" if run.is_dir() else run).write_bytes(damage)
    with pytest.raises(UserError, match=r"no checkpoint in .* could be read"):
        start(framework, config, workdir)


@FRAMEWORKS
@pytest.mark.parametrize("cut", CUTS)
def test_an_unfinished_first_save_is_no_checkpoint(framework, cut, config, run_of, tmp_path):
    """The run starts from train.load_from, as it did before it was killed."""
    workdir = run_of(framework, 3)
    CUTS[cut](framework, workdir / path_of(framework, 3))
    torch_weights.save(tmp_path / "start.safetensors", canonical(config, 2), {})
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "start.safetensors")
    assert start(framework, config, workdir) == (2, False)


@FRAMEWORKS
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_first_checkpoint_is_no_reason_to_start_again(framework, damage, config, run_of, tmp_path):
    workdir = run_of(framework, 3)
    DAMAGES[damage](framework, workdir / path_of(framework, 3))
    torch_weights.save(tmp_path / "start.safetensors", canonical(config, 2), {})
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "start.safetensors")
    with pytest.raises(UserError, match="no checkpoint in .* could be read"):
        start(framework, config, workdir)


@FRAMEWORKS
def test_a_resumed_run_needs_no_model_to_start_from(framework, config, run_of, tmp_path):
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "gone.safetensors")
    assert start(framework, config, run_of(framework, 3)) == (1, True)


@FRAMEWORKS
def test_a_model_to_start_from_that_is_gone_is_an_error(framework, config, run_of, tmp_path):
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="gone.safetensors"):
        start(framework, config, run_of(framework))


@FRAMEWORKS
def test_only_a_trainer_sets_a_damaged_checkpoint_aside(framework, config, run_of, caplog):
    workdir = run_of(framework, 3, 6)
    DAMAGES["no_arrays"](framework, workdir / path_of(framework, 6))
    assert start(framework, config, workdir) == (1, True)
    assert "cannot read checkpoint" in caplog.text
    directory = workdir / MODULES[framework].DIRECTORY
    assert {p.name for p in directory.iterdir()} == {"3"}
    assert (directory.parent / f"{framework}_damaged_6").is_dir()


@FRAMEWORKS
@pytest.mark.parametrize("cut", CUTS)
def test_a_trainer_that_resumes_deletes_unfinished_saves(framework, cut, config, run_of):
    """They would stay for ever where no later run saves the same step; each is as large as a whole one."""
    workdir = run_of(framework, 3, 6)
    CUTS[cut](framework, workdir / path_of(framework, 6))
    directory = workdir / MODULES[framework].DIRECTORY
    (directory / "notes").mkdir()
    assert start(framework, config, workdir) == (1, True)
    assert {p.name for p in directory.iterdir()} == {"3", "notes"}


@FRAMEWORKS
def test_an_entry_of_the_progress_is_changed(framework, config, run_of):
    saver = MODULES[framework].Checkpoints(run_of(framework, 3), config)
    saver.note(3, pending=True)
    like = (
        jax_step.create_state(config, jax_step.make_mesh(config))[1]
        if framework == "jax"
        else torch_step.create_state(config, None, torch.device("cpu"))
    )
    _, progress = saver.restore(like)
    assert progress["pending"] is True and progress["window"] == []


def test_a_note_is_written_once_its_step_is_on_disk(config, run_of):
    """By a later look, or at the latest when a save is waited for; nothing is written before."""
    saver = jax_checkpoints.Checkpoints(run_of("jax", 3, 6), config)
    marker, progress = (saver.path / "6" / name for name in (jax_checkpoints.MARKER, "run/metadata"))
    marker.rename(marker.with_name("unfinished"))
    before = progress.read_text()
    saver.note(6, pending=False)
    saver.write_notes()
    assert progress.read_text() == before
    marker.with_name("unfinished").rename(marker)
    saver.tidy()
    assert json.loads(progress.read_text())["pending"] is False and not saver.notes


def listing(directory):
    """Return {path: when it changed} of everything in a directory."""
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in [directory, *directory.rglob("*")]}


@FRAMEWORKS
def test_readers_change_nothing(framework, run_of, caplog):
    """Neither with a damaged newest checkpoint nor with an unfinished one, in a directory that cannot be written."""
    workdir = run_of(framework, 3, 6, 9)
    DAMAGES["no_arrays"](framework, workdir / path_of(framework, 6))
    CUTS["no_marker"](framework, workdir / path_of(framework, 9))
    before = listing(workdir)
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    for ema in (-1, 1):
        _, weights = MODULES[framework].read_weights(workdir, ema)
        assert weights[NAME].ravel()[0] == 1
    assert listing(workdir) == before
    assert "cannot read checkpoint" in caplog.text and "/6" in caplog.text
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


@FRAMEWORKS
@pytest.mark.parametrize("ema", [-1, 0])
def test_readers_read_the_weights_that_they_use_and_nothing_else(framework, ema, config, run_of, monkeypatch):
    """Not the optimizer, not the other EMA: a third or a fifth of a state of Adam with two EMAs."""
    module, asked = MODULES[framework], []
    load = module._load
    monkeypatch.setattr(
        module, "_load", lambda path, wanted, *rest: (asked.append(wanted), load(path, wanted, *rest))[1]
    )
    module.read_weights(run_of(framework, 3), ema)
    names = set(asked[0]) if framework == "jax" else set(module._flat(asked[0]))
    part = "params." if ema < 0 else f"emas.{ema}."
    net = torch_step.build_net(config)
    assert len(names) == len(dict(net.named_parameters())) and all(name.startswith(part) for name in names)


@FRAMEWORKS
def test_a_step_is_chosen(framework, config, run_of):
    read, workdir = MODULES[framework].read_weights, run_of(framework, 3, 6, 9)
    DAMAGES["no_arrays"](framework, workdir / path_of(framework, 6))
    snapshots.write(workdir, config, 4, (canonical(config, v) for v in (4, 5)), torch_weights.save)
    assert read(workdir, 0, 3)[1][NAME].ravel()[0] == 1
    assert read(workdir, 1, 4)[1][NAME].ravel()[0] == 5
    with pytest.raises(UserError, match="no step 5, only checkpoints of steps 3, 6, 9, snapshots of steps 4"):
        read(workdir, 0, 5)
    with pytest.raises(UserError, match="no step 4, only checkpoints of steps 3, 6, 9$"):
        read(workdir, -1, 4)  # snapshots hold EMAs alone
    with pytest.raises(UserError, match="could be read; --step chooses another"):
        read(workdir, 0, 6)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint, snapshots of steps 4; choose one by --step"):
        read(workdir)
    assert read(workdir, 0, 4)[1][NAME].ravel()[0] == 4


def test_snapshots_say_what_they_are(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.latents.update(shift=(0.0,), scale=(0.18215,))
    snapshots.write(tmp_path, config, 40, (canonical(config, v) for v in (1, 2)), torch_weights.save)
    path = tmp_path / "snapshots" / "40"
    assert sorted(p.name for p in path.iterdir()) == ["ema_0.9.safetensors", "ema_0.99.safetensors"]
    for metadata in (torch_weights.metadata, jax_weights.metadata):
        said = metadata(path / "ema_0.99.safetensors")
        assert (said["step"], said["ema"], said["format"]) == ("40", "0.99", "canonical")
        fitting.check_latents(config, "it", said)
        assert store.from_json(said["config"]) == config


def test_a_snapshot_that_cannot_be_written_leaves_nothing(config, tmp_path):
    def save(path, *_):
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*ema_0.9.safetensors: No space left"):
        snapshots.write(tmp_path, config, 40, iter([{}, {}]), save)
    assert not list((tmp_path / "snapshots" / "40").iterdir())


@pytest.mark.parametrize(
    ("keep", "every", "expected"),
    [(2, 0, [0, 10, 20, 30, 40]), (1, 20, [0, 10, 30, 50]), (9, 20, []), (2, 50, [0, 10, 20, 30, 40])],
)
def test_milestones_stay_besides_the_newest(keep, every, expected):
    c = SimpleNamespace(keep_checkpoints=keep, keep_every=every)
    assert checkpoints.expired([0, 10, 20, 30, 40, 50, 60], c) == expected


@FRAMEWORKS
def test_failures_of_the_machine_are_no_damage(framework, config, run_of, monkeypatch):
    """Nothing is passed over and nothing set aside: another try may succeed."""
    module, workdir = MODULES[framework], run_of(framework, 3, 6)
    before = listing(workdir)
    failures = [(PermissionError(13, "Permission denied"), UserError), (OSError(5, "Input/output error"), UserError)]
    failures += [(MemoryError(), MemoryError)]
    if framework == "jax":
        target, name = ocp.PyTreeCheckpointHandler, "restore"
        failures += [(ValueError("RESOURCE_EXHAUSTED: Out of memory"), UserError)]
        failures += [(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), jax.errors.JaxRuntimeError)]
    else:
        target, name = dcp.FileSystemReader, "read_data"
        failures += [(torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError)]
        failures += [(RuntimeError("CUDA error: unknown error"), RuntimeError)]
    for failure, expected in failures:
        monkeypatch.setattr(target, name, mock.Mock(side_effect=failure))
        for act in (lambda: module.read_weights(workdir), lambda: start(framework, config, workdir)):
            with pytest.raises(expected) as raised:
                act()
            assert "could be read" not in str(raised.value)
    assert listing(workdir) == before


@FRAMEWORKS
def test_a_checkpoint_of_another_network_is_no_damage(framework, config, run_of):
    workdir, other = run_of(framework, 3, 6), config.copy_and_resolve_references()
    other.model.width = 32
    with pytest.raises(UserError, match="this network needs"):
        start(framework, other, workdir)
    assert {p.name for p in (workdir / path_of(framework, 3)).parent.iterdir()} == {"3", "6"}


@FRAMEWORKS
def test_what_is_saved_is_the_state_when_it_was_saved(framework, config, tmp_path):
    """Training goes on, in place in PyTorch, while it is written."""
    saver = MODULES[framework].Checkpoints(tmp_path, config)
    saver.open()
    if framework == "jax":
        mesh = jax_step.make_mesh(config)
        _, state = jax_step.create_state(config, mesh)
        saver.save(state, PROGRESS)
        before = [np.array(a) for a in jax.tree.leaves(state)]
        jax.tree.map(lambda a: a.delete(), state)  # as the step does that is given it
        saver.close()
        found, _ = saver.restore(jax_step.abstract_state(config, mesh)[1])
        after = jax.tree.leaves(found)
    else:
        state = torch_step.create_state(config, None, torch.device("cpu"))
        tensors = torch_checkpoints._flat(torch_checkpoints._named(state)).values()
        before = [a.clone() for a in tensors]
        saver.save(state, PROGRESS)
        for a in tensors:
            a.fill_(7)
        saver.close()
        saver.restore(state)
        after = list(tensors)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_pytorch_stages_the_states_own_tensors_once(config, tmp_path, monkeypatch):
    """No copy on the device before the one in host memory."""
    staged = []
    stage = DefaultStager.stage
    monkeypatch.setattr(DefaultStager, "stage", lambda self, s: (staged.append(s), stage(self, s))[1])
    state = torch_step.create_state(config, None, torch.device("cpu"))
    saver = torch_checkpoints.Checkpoints(tmp_path, config)
    saver.save(state, PROGRESS)
    saver.close()
    own = {a.data_ptr() for a in torch_checkpoints._flat(torch_checkpoints._named(state)).values()}
    assert len(staged) == 1 and {a.data_ptr() for a in staged[0].values()} == own


@pytest.fixture
def process(monkeypatch):
    """Return a function (rank, world) that makes this process one of many that do not exist, with a mesh if it asks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank, world):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield become
    dist.destroy_process_group()


def test_processes_share_what_they_write(config, process):
    """Of a replicated state each stages half, and all of it is staged."""
    tensors = torch_checkpoints._flat(
        torch_checkpoints._named(torch_step.create_state(config, None, torch.device("cpu")))
    )
    total = sum(a.nbytes for a in tensors.values())
    shares = []
    for rank in range(2):
        process(rank, 2)
        shares.append(torch_checkpoints._own(tensors))
    assert not shares[0].keys() & shares[1].keys() and shares[0].keys() | shares[1].keys() == tensors.keys()
    for share in shares:
        assert sum(a.nbytes for a in share.values()) == pytest.approx(total / 2, rel=0.02)


def test_one_replica_of_a_sharded_state_is_written(process):
    """On a mesh of 2 replicas of 2 shards: the processes of a replica write the same names."""
    shares = []
    for rank in range(4):
        process(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "fsdp"))
        sharded = {
            name: DTensor.from_local(torch.zeros(size), mesh, (Replicate(), Shard(0)))
            for name, size in (("a", 4), ("b", 2), ("c", 2))
        }
        shares.append(set(torch_checkpoints._own(sharded | {"step": torch.zeros(())})) - {"step"})
    assert shares == [{"a"}, {"a"}, {"b", "c"}, {"b", "c"}]


@pytest.mark.parametrize(
    "name", ["x[1]", "a*b", "a?b", "a\\b", "gs:", "bags:/x", b"\xe4".decode(errors="surrogateescape")]
)
def test_orbax_is_given_no_path_that_it_misreads(name, config, tmp_path):
    """Before anything is written."""
    with pytest.raises(UserError, match="misreads .* rename the directory"):
        jax_checkpoints.Checkpoints(tmp_path / name, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/gs/runs/x", "/s3", "/az/x", "/hf/x"])
def test_orbax_takes_these_for_clouds(path, config):
    with pytest.raises(UserError, match="misreads"):
        jax_checkpoints.Checkpoints(path, config)


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "ünï", "it's", "a:b", "{a}", "$a", "a]b", "gsx", "a,b=c"])
def test_unusual_names_of_work_directories(name, config, tmp_path):
    for framework, module in MODULES.items():
        workdir = tmp_path / framework / name
        write_run(framework, workdir, config, canonical(config, 1))
        assert module.read_weights(workdir)[1][NAME].ravel()[0] == 1


@pytest.mark.parametrize("to", ["run", "jax", "torch"])
def test_a_work_directory_of_weights_alone(to, config, tmp_path):
    """It holds nothing else, serves both frameworks, and a run in it starts from them, as one that names it does."""
    weights = canonical(config, 1)
    jax_weights.save(tmp_path / "w.safetensors", weights, {})
    workdir = tmp_path / "run"
    convert.convert(tmp_path / "w.safetensors", workdir, convert.Options(to=to, config=config))
    assert {path.name for path in workdir.iterdir()} == {"config.json", "model.safetensors"}
    assert (workdir / "model.safetensors").stat().st_size < 1.1 * sum(a.nbytes for a in weights.values()) + 10_000
    named = config.copy_and_resolve_references()
    named.train.load_from = str(workdir)
    for framework, module in MODULES.items():
        for ema, step in ((0, None), (1, None), (-1, 0)):
            found = module.read_weights(workdir, ema, step)[1]
            assert found.keys() == weights.keys() and all(np.array_equal(found[n], a) for n, a in weights.items())
        with pytest.raises(UserError, match="has no step 5, only the weights of step 0"):
            module.read_weights(workdir, step=5)
        assert start(framework, named, tmp_path / framework) == (1, False)
        own = shutil.copytree(workdir, tmp_path / f"{framework}_run")
        assert start(framework, config, own) == (1, False)


def test_a_run_goes_on_from_its_checkpoint_and_not_from_the_weights_it_began_with(config, tmp_path):
    for framework, module in MODULES.items():
        workdir = tmp_path / framework
        write_run(framework, workdir, config, canonical(config, 1))
        jax_weights.save(workdir / snapshots.ALONE, canonical(config, 2), {})
        assert start(framework, config, workdir) == (1, True)
        assert module.read_weights(workdir)[1][NAME].ravel()[0] == 1


KEEPING = {
    "train.steps": 7, "train.checkpoint_every": 1, "train.keep_checkpoints": 2, "train.keep_every": 3,
    "train.snapshot_every": 2, "train.checkpoint_at_start": True, "data.num_workers": 0,
}  # fmt: skip


def test_what_a_run_keeps_is_there_for_every_command(in_both, launcher, options, tmp_path):
    """A start, milestones, the newest and snapshots; `sample`, `train.load_from` and `convert` read them."""
    trainers = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
    samplers = {"jax": "jax_impl.sample", "torch": "torch_impl/sample.py"}

    def scenario(framework):
        workdir, small = tmp_path / framework, tmp_path / f"{framework}.safetensors"
        command = launcher.run(trainers[framework], *options(KEEPING), f"--workdir={workdir}")
        assert command.wait() == 0, command.stderr
        steps = {p.name for p in (workdir / MODULES[framework].DIRECTORY).iterdir()}
        assert steps == {"3", "6", "7"}  # 0 too, until there were two newer ones
        assert {p.name for p in (workdir / "snapshots").iterdir()} == {"2", "4", "6"}
        for step in (3, 4):
            output = f"--output={tmp_path / f'{framework}{step}'}"
            command = launcher.run(samplers[framework], f"--workdir={workdir}", f"--step={step}", output)
            assert command.wait() == 0, command.stderr
        command = launcher.run("parity/convert.py", workdir, small, "--step", "6", "--ema", "1")
        assert command.wait() == 0, command.stderr
        snapshot = workdir / "snapshots" / "6" / "ema_0.99.safetensors"
        (a, b) = torch_weights.load(small), torch_weights.load(snapshot)
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        changes = KEEPING | {"train.load_from": snapshot, "train.steps": 1}
        command = launcher.run(trainers[framework], *options(changes), f"--workdir={workdir}_next")
        assert command.wait() == 0, command.stderr
        first = MODULES[framework].read_weights(f"{workdir}_next", -1, 0)[1]  # saved before the first step
        assert all(np.array_equal(first[name], b[name]) for name in b)
        command = launcher.run(samplers[framework], f"--workdir={workdir}", "--step=5")
        assert (
            command.wait() == 2 and "has no step 5, only checkpoints of steps 3, 6, 7, snapshots of" in command.stderr
        )

    in_both(scenario)


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "fsdp"), [("jax", 2), ("torch", 1), ("torch", 2)])
def test_two_processes_save_on_the_way_and_one_goes_on(framework, fsdp, launcher, options, tmp_path):
    """Saves and gradients do not wait for each other; each process writes a part."""
    trainers = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
    trainer, other = trainers[framework], {"jax": "torch", "torch": "jax"}[framework]
    changes, workdir = {"train.checkpoint_every": 1, "train.fsdp": fsdp}, tmp_path / "run"
    for command in launcher.start_two(framework, trainer, *options(changes), f"--workdir={workdir}"):
        assert command.wait() == 0, command.stderr
    newest = workdir / path_of(framework, 5)
    parts = list(newest.glob("*.distcp" if framework == "torch" else "state/ocdbt.process_*"))
    assert len(parts) == 2
    convert.main([str(workdir), str(tmp_path / "there"), "--to", other])
    command = launcher.run(trainer, *options({"train.steps": 6}), f"--workdir={workdir}")
    assert command.wait() == 0 and "resuming from step 5" in command.stderr
    more = options(changes | {"train.steps": 6})
    for command in launcher.start_two(other, trainers[other], *more, f"--workdir={tmp_path / 'there'}"):
        assert command.wait() == 0, command.stderr
    assert MODULES[other].read_state(tmp_path / "there")[1].step == 6
