"""The profile record: its JSON, what it refuses, and how it reads between its figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.cluster.devices import DEVICES
from hybridpar.errors import ProfileError
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.record import SCHEMA_VERSION, LayerProfile, Profile
from tests.support.chains import linear_chain

CHAIN = linear_chain((8, 4))


def profile(**changes: object) -> Profile:
    rows = LayerProfile("fc0", ((1.0, 2.0, 4.0), (0.75, 1.5, 3.0)), ((2.0, 4.0, 8.0), (1.5, 3.0, 6.0)))
    layer = LayerProfile(
        "fc0",
        forward_s=((1.0, 2.0, 4.0), (0.5, 1.0)),
        backward_s=((2.0, 4.0, 8.0), (1.0, 2.0)),
        accumulate_s=0.5,
        saved_bytes=((10.0, 20.0), (5.0, 10.0)),
        forward_workspace_bytes=((100.0, 200.0), (50.0, 60.0)),
        backward_workspace_bytes=((300.0, 300.0), (10.0, 20.0)),
        by_rows=rows,
    )
    made = Profile(
        CHAIN.fingerprint,
        "measured",
        "cpu",
        "float32",
        (1, 2, 4),
        (1.0, 0.5),
        (layer,),
        1e-9,
        1e-9,
        described=CHAIN,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_json_and_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    given = profile(notes=("a [b,\n c]", "d"), rank_speeds=(1.0, 0.9), quota=0.45)
    given.save(path)
    assert Profile.load(path) == given
    assert "[1.0, 2.0, 4.0]" in path.read_text().replace("[ ", "[").replace(" ]", "]")


def test_times_between_and_beyond_the_figures() -> None:
    p = profile()
    assert p.forward_time(0, 0) == 0.0
    assert p.forward_time(0, 3) == 3.0
    assert p.forward_time(0, 8) == 8.0
    assert p.forward_time(0, 1, 0.75) == 0.75
    assert p.backward_time(0, 4, 0.5) == 4.0, "a row that ends early goes on along its last segment"


def test_rows_have_their_own_times_and_are_as_columns_where_unknown() -> None:
    p = profile()
    assert p.forward_time(0, 2, 0.5, rows=True) == 1.5
    assert p.backward_time(0, 2, 0.5, rows=True) == 3.0
    bare = replace(p, layers=(replace(p.layers[0], by_rows=None),))
    assert bare.forward_time(0, 2, 0.5, rows=True) == 1.0


def test_bytes_of_a_pass_or_the_greater_of_both_and_zero_where_unknown() -> None:
    p = profile()
    assert p.saved_bytes(0, 3) == 30.0
    assert p.workspace_bytes(0, 2) == 300.0
    assert p.workspace_bytes(0, 2, kind="forward") == 200.0
    assert p.workspace_bytes(0, 1, 0.5) == 50.0
    assert p.workspace_bytes(0, 1, 0.5, rows=True) == 0.0
    assert p.accumulate_time(0, 0.5) == 0.25


def test_a_profile_of_an_earlier_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    data = json.loads(profile().to_json())
    for schema in (1, None, SCHEMA_VERSION + 1):
        path.write_text(json.dumps(data | {"schema": schema, "unheard_of": 1}))
        with pytest.raises(ProfileError, match=rf"old.json: schema: {schema} is not 3; measure the profile again"):
            Profile.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": [2, 1, 4]}, r"micro_batches: \(2, 1, 4\) is not ascending"),
        ({"micro_batches": []}, "micro_batches: .* is not ascending"),
        ({"fractions": [0.5, 1.0]}, "fractions: .* does not descend from 1.0"),
        ({"fractions": [1.0, 0.0]}, "fractions: .* does not descend from 1.0 to above 0"),
        ({"layers": []}, "layers: 0, but the chain has 1"),
        ({"quota": 1.5}, "quota: 1.5"),
        ({"update_s_per_byte": -1.0}, "update_s_per_byte: -1.0 is not a number from 0 up"),
        ({"chain": "another"}, "described: chain .* is not the profile's another"),
        ({"zebra": 1}, "zebra: unknown field"),
        ({"source": "guessed"}, "source: 'guessed' is not one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(json.loads(profile().to_json()) | changes))
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


@pytest.mark.parametrize(
    ("field", "table", "message"),
    [
        ("forward_s", [], "forward_s does not fit fractions x micro_batches"),
        ("forward_s", [[1.0, 2.0, 3.0, 4.0], [1.0]], "rows may only end early"),
        ("backward_s", [[1.0], []], "backward_s does not fit"),
        ("saved_bytes", [[1.0], [1.0], [1.0]], "saved_bytes does not fit"),
        ("backward_s", [[float("nan")], [1.0]], "layer fc0: backward_s: nan is not a number from 0 up"),
        ("accumulate_s", -1.0, "layer fc0: accumulate_s: -1.0"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, field: str, table: object, message: str) -> None:
    path = tmp_path / "profile.json"
    data = json.loads(profile().to_json())
    data["layers"][0][field] = table
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


def test_an_estimate_knows_times_only() -> None:
    p = estimate(CHAIN, DEVICES["P100"])
    assert p.workspace_bytes(0, 4) == p.saved_bytes(0, 4) == p.accumulate_time(0) == 0.0
