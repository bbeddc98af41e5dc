"""One value, one text, one hash: by generated examples, the same ones on every run."""

import json
import random
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from runkey.errors import RecipeError
from runkey.hashing import canonical_json, sha256_json
from runkey.identity.code import hash_files
from runkey.identity.key import make_recipe, part_digest
from runkey.params import load_params, parse_params

# tmp_path is shared by the examples of a test; each writes its files anew.
many = settings(
    max_examples=80,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
some = settings(many, max_examples=20)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def typed(value):
    """The value with the type of everything in it: 1, 1.0 and true are three values."""
    if isinstance(value, dict):
        return ("dict", {name: typed(item) for name, item in value.items()})
    if isinstance(value, list):
        return ("list", [typed(item) for item in value])
    return (type(value).__name__, repr(value))


def shuffled(value, chance):
    """The same value with the keys of every dict in another order."""
    if isinstance(value, dict):
        names = chance.sample(list(value), len(value))
        return {name: shuffled(value[name], chance) for name in names}
    return [shuffled(item, chance) for item in value] if isinstance(value, list) else value


@many
@given(values)
def test_the_text_gives_the_value_back_so_two_values_never_share_one(value):
    assert typed(json.loads(canonical_json(value))) == typed(value)


@many
@given(values, values)
def test_hashes_are_equal_exactly_when_the_values_are(one, other):
    assert (sha256_json(one) == sha256_json(other)) == (typed(one) == typed(other))


@pytest.mark.parametrize(
    "pair", [(1, 1.0), (1, True), (0, False), (0.0, -0.0), ("1", 1), (None, "")]
)
def test_neighbours_differ(pair):
    assert sha256_json({"a": pair[0]}) != sha256_json({"a": pair[1]})


@many
@given(values, st.integers())
def test_the_order_of_keys_does_not_matter(value, seed):
    assert canonical_json(shuffled(value, random.Random(seed))) == canonical_json(value)


@many
@given(values, st.sampled_from(["code", "params", "data", "environment"]))
def test_a_part_does_not_pass_for_another(value, part):
    others = {"code", "params", "data", "environment", "recipe"} - {part}
    assert part_digest(part, value) not in {part_digest(other, value) for other in others}


def test_not_a_number_has_no_hash():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            sha256_json(value)


# --- numbers as people write them in params.yaml


@st.composite
def spellings(draw):
    """Two texts of one number in (0, 1]."""
    digits, shift = draw(st.integers(1, 99999)), draw(st.integers(0, 8))
    number = Decimal(digits).scaleb(-5 - shift)
    plain = f"{number:f}"
    exponent = draw(st.integers(-9, 3))
    mantissa = f"{number.scaleb(-exponent):f}"
    sign, e = draw(st.sampled_from(["", "+"])), draw(st.sampled_from("eE"))
    zero = draw(st.sampled_from(["", "0"]))
    power = f"{'-' if exponent < 0 else sign}{zero}{abs(exponent)}"
    forms = [
        f"{sign}{plain}",
        f"{plain}000",
        plain.removeprefix("0") if plain.startswith("0.") else plain,
        f"{mantissa}{e}{power}",
        f"{float(number)!r}",
    ]
    return draw(st.sampled_from(forms)), draw(st.sampled_from(forms))


@many
@given(spellings())
def test_a_rate_is_the_same_however_it_is_written(tmp_path, pair):
    flats = []
    for text in pair:
        (tmp_path / "params.yaml").write_text(f"lr: {text}\nseed: 1\n")
        flats.append(load_params(tmp_path / "params.yaml").flat())
    assert canonical_json(flats[0]) == canonical_json(flats[1])
    assert isinstance(flats[0]["lr"], float)


def test_the_spellings_of_the_issue(project):
    keys = set()
    for text in ("5e-5", "5e-05", "0.00005", ".00005", "5.0E-5", "50e-6", "+5e-5"):
        (project / "params.yaml").write_text(f"lr: {text}\nseed: 1\n")
        keys.add(make_recipe("train", project).key)
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("name", "texts", "kind"),
    [
        ("optimizer.weight_decay", ["1", "1.0", "1e0", "0.1e1"], float),
        ("model.num_queries", ["20", "20.0", "2e1", "0x14", "0o24"], int),
        ("training.micro_batch", ["4", "4.0"], int),
    ],
)
def test_the_schema_and_not_the_text_says_whole_number_or_not(tmp_path, name, texts, kind):
    section, field = name.split(".")
    seen = set()
    for text in texts:
        path = tmp_path / "params.yaml"
        path.write_text(f"lr: 1e-4\nseed: 1\n{section}: {{{field}: {text}}}\n")
        value = load_params(path).flat()[name]
        assert type(value) is kind
        seen.add(canonical_json(value))
    assert len(seen) == 1


# --- files as people and programs write them


@some
@given(st.integers(), st.sampled_from([None, True, False]), st.booleans())
def test_params_in_another_order_and_style_are_the_same(project, seed, flow, crlf):
    plain = load_params(project / "params.yaml")
    tree = shuffled(plain.model_dump(mode="json"), random.Random(seed))
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = flow
    writer.sort_base_mapping_type_on_output = False
    path = project / "written.yaml"
    with path.open("w", newline="\r\n" if crlf else "\n") as file:
        writer.dump(tree, file)
    assert b"\r\n" in path.read_bytes() or not crlf
    assert canonical_json(load_params(path).flat()) == canonical_json(plain.flat())


@many
@given(st.binary(max_size=60))
def test_line_ends_of_other_code_are_one_and_all_other_bytes_count(tmp_path, content):
    unix = content.replace(b"\r", b"")
    (tmp_path / "a.csv").write_bytes(unix)
    (tmp_path / "b.csv").write_bytes(unix.replace(b"\n", b"\r\n"))
    (tmp_path / "c.csv").write_bytes(unix + b"#")
    a, b, c = hash_files(["a.csv", "b.csv", "c.csv"], tmp_path).values()
    assert a == b != c


def test_a_tree_checked_out_with_crlf_has_the_same_key(project):
    before = make_recipe("train", project).key
    for path in project.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert make_recipe("train", project).key == before


@many
@given(st.text(min_size=1))
def test_letters_that_look_alike_are_not_alike(text):
    """Nothing is normalised: a key is of the bytes that are there."""
    composed, taken_apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert (sha256_json(composed) == sha256_json(taken_apart)) == (composed == taken_apart)


def test_an_accent_in_code_counts_as_it_is_written(project):
    keys = []
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "NAME = 'caf\u00e9'\n")
        (project / "runkey/late.py").write_text(text, encoding="utf-8")
        keys.append(make_recipe("train", project).key)
    assert keys[0] != keys[1]


def test_text_that_no_file_can_hold_is_one_line(project):
    """YAML's escape for half a character; UTF-8 has no bytes for it."""
    params = parse_params(
        {"lr": 1e-4, "seed": 1, "model": {"backbone_weights": "none"}, "training": {
            "early_stopping": {"metric": "\ud800"}}}
    )  # fmt: skip
    (project / "dvc.yaml").write_text(
        (project / "dvc.yaml").read_text().replace("model, optimizer]", "model, training]")
    )
    with pytest.raises(RecipeError, match="holds half a character"):
        make_recipe("train", project, params).key  # noqa: B018
