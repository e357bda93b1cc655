"""The commands of the benchmarks, on networks so small that only their form is measured."""

import json

import pytest

from benchmarks import memory, sample, scaling, step, table
from meanflow.errors import UserError

SET = ["--set", "model.depth=1", "model.width=16", "model.num_heads=2", "train.compile=False"]
TINY = ["--batch=8", "--patch=8", "--runs=2", *SET]
FRAMEWORKS = ("jax", "torch")

pytestmark = pytest.mark.usefixtures("optimize_less")


@pytest.fixture(autouse=True)
def keep_precision():
    """Leave the precision of JAX as it was."""
    import jax

    before = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_step_measures_every_case_and_writes_table_figures_and_plot(framework, tmp_path, capsys):
    paths = [tmp_path / name for name in ("step.json", "step.md", "step.png")]
    flags = [f"--{flag}={path}" for flag, path in zip(("json", "markdown", "plot"), paths, strict=True)]
    batches = {"jax": ["4"], "torch": ["4", "8"]}[framework]  # JAX takes long to compile
    step.main([f"--framework={framework}", *TINY, "--guidance", "none", "--batches", *batches, *flags])
    rows = json.loads(paths[0].read_text())["rows"]
    names = ("flow matching", "p=0.25, guidance none")
    assert [(row["case"], row["batch"]) for row in rows] == [(name, int(batch)) for batch in batches for name in names]
    for row in rows:
        assert row["median_s"] > 0 and row["counted_flops"] > 0 and row["flops_per_s"] > 0
        assert row["tokens"] == 16 and row["framework"] == framework
        assert row["examples_per_s"] == pytest.approx(row["batch"] / row["median_s"])
        assert 0 < row["share_of_matmul_rate"] < 1
    assert {row["ratio"] for row in rows[::2]} == {1}
    if framework == "jax":
        assert all(row["peak_bytes"] > row["state_bytes"] > 0 for row in rows)
    assert paths[1].read_text() == capsys.readouterr().out
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_step_compares_compiled_with_eager_in_pytorch_alone(tmp_path):
    path = tmp_path / "step.json"
    step.main(["--framework=torch", "--eager", *TINY, "--guidance", "none", f"--json={path}"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["", "eager"] * 2
    assert all(("compiled_over_eager" in row) == (row["variant"] == "") for row in rows)
    with pytest.raises(UserError, match="JAX always compiles"):
        step.main(["--framework=jax", "--eager", *TINY])


def test_step_takes_presets_and_refuses_patches_of_a_network_without_them(tmp_path):
    path, sizes = tmp_path / "step.json", ["model.width=4", "model.channel_mult=(1,)", "model.attn_resolutions=()"]
    preset = ["--framework=torch", "--config=configs/digits.py:remeanflow", "--batch=4", "--runs=2"]
    sets = ["--set", *sizes, "train.compile=False"]
    step.main([*preset, "--guidance", "kappa", f"--json={path}", *sets])
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["flow matching", "p=0.25, guidance kappa"]
    assert rows[1]["limit"] == 1.5
    with pytest.raises(UserError, match="no option config.model.patch_size with network edm2"):
        step.main([*preset, "--patch=2", *sets])


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_sample_measures_a_flow_map_and_a_flow_model(framework, tmp_path):
    path = tmp_path / "sample.json"
    flags = [f"--framework={framework}", "--steps", "1", "2", "--flow_steps=3", f"--json={path}"]
    sample.main([*flags, *TINY])
    rows = json.loads(path.read_text())["rows"]
    assert [row["forwards"] for row in rows] == [1, 2, 3, 6]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(8 / row["median_s"])


def test_networks_that_are_no_flow_models_follow_their_own_velocity():
    args = step.parse(["--framework=jax", "--config=configs/imf_imagenet.py:b2"])
    found = sample.make_table(step.make_config(args, 4), (1, 2), 8, 1.5)
    assert [(name, forwards) for name, _, forwards in found] == [("flow map", 1), ("flow map", 2), ("flow model", 8)]
    assert [config.sample.sampler for _, config, _ in found] == ["euler", "euler", "velocity"]
    assert not any(config.model.v_heads for _, config, _ in found)


@pytest.mark.slow
def test_two_devices_take_the_same_step_as_one(in_both, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flow = ["method.flow_fraction=1.0", "method.guidance=False"]  # compiles sooner

    def scenario(framework):
        path = tmp_path / f"{framework}.json"
        scaling.main([f"--framework={framework}", "--devices", "1", "2", f"--json={path}", *TINY, *flow])
        return json.loads(path.read_text())["rows"]

    for framework, rows in in_both(scenario).items():
        assert [row["devices"] for row in rows] == [1, 2], framework
        assert all(row["median_s"] > 0 for row in rows)
        assert max(row["difference_last"] for row in rows) < 1e-4
        assert rows[1]["all_reduces"] >= 1


def test_collectives_are_counted_with_their_bytes():
    from benchmarks.jax_steps import collectives

    program = """
      %a = f32[2,3]{1,0} all-reduce(%x), channel_id=1
      %b = (f32[4]{0}, bf16[8]{0}) all-reduce(%x, %y), channel_id=2
      %c = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=3
      %d = f32[16]{0} all-gather-done(%c)
      %e = f32[16]{0} add(%all-reduce, %d)
    """
    assert collectives(program) == {
        "all-reduce": {"count": 2, "bytes": 24 + 16 + 16}, "all-gather": {"count": 1, "bytes": 64},
    }  # fmt: skip


def test_memory_grows_by_what_a_step_holds():
    held = []
    figures = memory.resident(lambda: held.append(b"1" * 2**26))
    assert 2**26 <= figures["rss_growth_bytes"] < 1.2 * 2**26
    assert figures["rss_peak_bytes"] > figures["rss_growth_bytes"]


def test_memory_of_a_step_is_measured_in_a_process_of_its_own():
    args = step.parse(["--framework=torch", *TINY])
    figures = memory.of_step("torch", step.make_config(args, 8, 8))
    assert figures["peak_bytes"] == figures["state_bytes"] + figures["rss_growth_bytes"]
    assert figures["state_bytes"] > 0


def test_a_table_leaves_out_what_no_row_has():
    text = table.markdown([{"case": "a", "ratio": 1.0}, {"case": "b", "ratio": None, "peak_bytes": 2**21}])
    assert text.splitlines() == [
        "| step | ratio | peak MiB |", "| --- | --- | --- |", "| a | 1.000 | – |", "| b | – | 2 |",
    ]  # fmt: skip


def test_lines_of_a_plot_name_the_other_axis_where_it_varies():
    rows = [{"case": "a", "batch": b, "tokens": n, "median_s": b * n} for b in (8, 4) for n in (16, 64)]
    assert table.lines_of(rows, "batch", "tokens", "median_s") == {
        "a, tokens 16": [(4, 64), (8, 128)], "a, tokens 64": [(4, 256), (8, 512)],
    }  # fmt: skip
    assert list(table.lines_of(rows[::2], "batch", "tokens", "median_s")) == ["a"]
