"""What a network starts from: weights of another number of classes, resolution or head."""

import json

import numpy as np
import pytest

from meanflow.errors import UserError
from meanflow.tables import position_table
from meanflow.weights import canonical

DIT, IMF = canonical.CLASSES
EDM2 = canonical.LABELS


def transformer(num_classes=7, side=4, width=8, patch=2, seed=0, classes=DIT, table=position_table, **others):
    """Return some weights of a transformer, whose positions are a grid of `side`, and others by name."""
    rng = np.random.RandomState(seed)
    return {
        "x_embedder.proj.weight": rng.randn(width, 1, patch, patch),
        "blocks.0.mlp.fc1.weight": rng.randn(4 * width, width),
        classes: rng.randn(num_classes + 1, width),
        "pos_embed": table(side, width)[None],
    } | {name.replace("__", "."): rng.randn(width) for name in others}


def edm2(num_classes, seed=0, width=4):
    rng = np.random.RandomState(seed)
    return {"unet.enc.8x8_conv.weight": rng.randn(4, 2, 3, 3), EDM2: rng.randn(width, num_classes)}


def start(own, given, classes=None, tmp_path=None, **options):
    """Return the start of `own` from `given`.  classes: content of the file of classes."""
    if classes is not None:
        (tmp_path / "names.json").write_text(json.dumps(classes))
        options["load_classes"] = str(tmp_path / "names.json")
    return canonical.transfer(own, given, "", **{"resize": True} | options)


def check(own, weights):
    tables = {name: a for name, a in own.items() if name == "pos_embed"}
    canonical.check(weights, {name: a.shape for name, a in own.items()}, tables)


def said(caplog):
    prefix = "of the weights to start from, "
    assert all(record.getMessage().startswith(prefix) for record in caplog.records)
    return [record.getMessage().removeprefix(prefix) for record in caplog.records]


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level("INFO", logger="absl")


@pytest.mark.parametrize("name", [DIT, IMF])
def test_another_number_of_classes_keeps_the_null_label_alone(name, caplog):
    own, given = transformer(3, seed=1, classes=name), transformer(7, classes=name)
    got = start(own, given)
    np.testing.assert_array_equal(got[name], [*own[name][:3], given[name][7]])
    assert all(got[other] is given[other] for other in given if other != name)
    assert said(caplog) == [f"3 are kept; {name} (3 of 3 classes) start fresh; {name} (7 of 7 classes) are left out"]
    check(own, got)


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        ([5, None, 0], ["3 are kept", f"{DIT} (1 of 3 classes) start fresh", f"{DIT} (5 of 7 classes) are left out"]),
        ([5, 2, 2], ["4 are kept", f"{DIT} (5 of 7 classes) are left out"]),
        ({"from": list("abcdefg"), "to": ["f", None, "a"]}, None),
    ],
)
def test_rows_of_the_classes_in_a_file(classes, parts, tmp_path, caplog):
    own, given = transformer(3, seed=1), transformer(7)
    got = start(own, given, classes, tmp_path)[DIT]
    rows = classes if isinstance(classes, list) else [5, None, 0]
    expected = [own[DIT][i] if row is None else given[DIT][row] for i, row in enumerate(rows)]
    np.testing.assert_array_equal(got, [*expected, given[DIT][7]])
    assert parts is None or said(caplog) == ["; ".join(parts)]


def test_rows_of_as_many_classes(tmp_path, caplog):
    """Without a file all stay; with one they are permuted."""
    own, given = transformer(3, seed=1), transformer(3)
    assert start(own, given) == given and not caplog.records
    got = start(own, given, [2, 0, 1], tmp_path)[DIT]
    np.testing.assert_array_equal(got, given[DIT][[2, 0, 1, 3]])
    assert said(caplog) == ["4 are kept"]


def test_classes_of_edm2_are_columns_and_have_no_null_label(tmp_path, caplog):
    own, given = edm2(3, seed=1), edm2(7)
    np.testing.assert_array_equal(start(own, given)[EDM2], own[EDM2])
    got = start(own, given, [5, None, 0], tmp_path)[EDM2]
    np.testing.assert_array_equal(got.T, [given[EDM2][:, 5], own[EDM2][:, 1], given[EDM2][:, 0]])
    assert said(caplog)[1] == f"1 are kept; {EDM2} (1 of 3 classes) start fresh; {EDM2} (5 of 7 classes) are left out"


def test_another_resolution_has_its_own_positions(caplog):
    own, given = transformer(side=3, seed=1), transformer(side=4)
    got = start(own, given)
    assert got["pos_embed"] is own["pos_embed"] and all(got[n] is given[n] for n in given if n != "pos_embed")
    assert said(caplog) == ["3 are kept; pos_embed (16 positions) are left out"]
    check(own, got)
    flat = given | {"pos_embed": given["pos_embed"][0]}  # as some files have it
    check(own, start(own, flat))


def test_both_at_once(caplog):
    own, given = transformer(3, side=3, seed=1), transformer(7, side=4)
    check(own, start(own, given))
    assert said(caplog) == [
        f"2 are kept; {DIT} (3 of 3 classes) start fresh; pos_embed (16 positions), {DIT} (7 of 7 classes) are left out"
    ]


@pytest.mark.parametrize(
    "change",
    [lambda a: a + 0.1, lambda a: a[:, ::-1], lambda a: np.full_like(a, np.nan), lambda a: a[..., :4],
     lambda a: a[:, :14]],
)  # fmt: skip
def test_positions_that_no_resolution_has_are_refused(change):
    """Shifted, permuted, damaged, of another width, not square."""
    own, given = transformer(side=5), transformer(side=4)
    given["pos_embed"] = change(given["pos_embed"])
    with pytest.raises(UserError, match=r"the table pos_embed .*compared with that of [34] x [34] positions"):
        start(own, given)


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ({}, {"width": 16}, r"width 16, config\.model\.num_classes 7, .*this network has .*num_classes 3"),
        ({"side": 4}, {"side": 2, "patch": 4}, r"pos_embed has shape .*patch_size 4, .* network has .*patch_size 2"),
    ],
)
def test_networks_that_differ_otherwise_are_reported_whole(own, given, message):
    """Also what could have been resized."""
    own, given = transformer(3, **own), transformer(7, **given)
    assert start(own, given) == given
    with pytest.raises(UserError, match=message):
        check(own, given)


def test_quantised_classes_are_refused():
    own, given = transformer(3), transformer(7)
    with pytest.raises(UserError, match=f"{DIT} is of type int8"):
        start(own, given | {DIT: given[DIT].astype(np.int8)})


def test_a_damaged_class_embedding_is_left_to_the_check(tmp_path):
    own, given = edm2(3), edm2(7, width=5)
    for classes in (None, [5, None, 0]):
        with pytest.raises(UserError, match=r"emb_label\.weight has shape \(5, 7\)"):
            check(own, start(own, given, classes, tmp_path))


def test_a_teacher_has_the_classes_and_the_resolution_of_its_student():
    own = transformer(3, side=3)
    for given in (transformer(7, side=3), transformer(3, side=4)):
        assert start(own, given, resize=False) == given
        with pytest.raises(UserError, match="num_classes 7|input_size 8"):
            check(own, given)


def test_improved_meanflow_without_the_head_of_v(caplog):
    """As released, with or without its last layer; a head of which a part is missing is damaged."""
    head = dict.fromkeys(("v_heads__0__a", "v_heads__1__a", "v_final_layer__b"))
    own, given = transformer(seed=1, classes=IMF, **head), transformer(classes=IMF)
    names = ["v_final_layer.b", "v_heads.0.a", "v_heads.1.a"]
    got = start(own, given)
    assert all(got[name] is own[name] for name in names) and got.keys() == own.keys()
    last = given | {"v_final_layer.b": np.zeros(8)}
    got = start(own, last)
    assert got["v_final_layer.b"] is last["v_final_layer.b"] and got["v_heads.0.a"] is own["v_heads.0.a"]
    assert said(caplog) == [
        f"4 are kept; {', '.join(names)} start fresh", "5 are kept; v_heads.0.a, v_heads.1.a start fresh"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"the weights lack v_heads\.1\.a \(1 in all\)"):
        check(own, start(own, last | {"v_heads.0.a": np.zeros(8)}))


def test_decoupled_meanflow_without_its_log_variance(caplog):
    own = transformer(3, seed=1, logvar_linear__weight=0, logvar_linear__bias=0)
    got = start(own, transformer(7))
    assert got["logvar_linear.weight"] is own["logvar_linear.weight"]
    assert said(caplog) == [
        f"3 are kept; logvar_linear.bias, logvar_linear.weight, {DIT} (3 of 3 classes) start fresh; "
        f"{DIT} (7 of 7 classes) are left out"
    ]
    check(own, got)
