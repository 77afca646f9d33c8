"""A bits configuration: which pattern wins, what is refused and how it is written down."""

import fnmatch
import json
from pathlib import Path

import numpy as np
import pytest
from encoders import build, inputs_for
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qbert.bits import BitsConfig, longest
from qbert.quantize import quantize_model

LAYER0 = "bert.encoder.layer.0.attention.self.query"
LAYER1 = "bert.encoder.layer.1.attention.self.query"
WORDS = "bert.embeddings.word_embeddings"


def resolved(bits, **defaults):
    return BitsConfig(bits, **defaults).resolve(build("bert"))


def test_one_number_means_all_encoder_matrices() -> None:
    specs = resolved(4)
    assert specs[LAYER0].bits == 4
    assert not any("classifier" in p or "pooler" in p for p in specs)


@pytest.mark.parametrize(
    ("bits", "tables"),
    [(2, 4), (4, 4), (8, 8), ({"encoder.layer.0": 3, "*": 2}, 4), ({"encoder.layer.0": 8, "*": 2}, 8)],
)
def test_tables_have_4_bits_beside_matrices_of_at_most_4(bits, tables: int) -> None:
    assert resolved(bits)[WORDS].bits == tables
    assert resolved(bits, embedding_bits=3)[WORDS].bits == 3


def test_mapping_of_the_readme() -> None:
    specs = resolved({"encoder.layer.0": 8, "embeddings": 4, "*": 2})
    assert (specs[LAYER0].bits, specs[LAYER1].bits, specs[WORDS].bits) == (8, 2, 4)


@pytest.mark.parametrize("pattern", ["encoder.layer.0", "bert.encoder.layer.0", "encoder.layer.0.*", "*layer.0.*"])
def test_prefix_and_glob_with_and_without_the_backbones_name(pattern: str) -> None:
    specs = resolved({pattern: 8, "*": 4})
    assert (specs[LAYER0].bits, specs[LAYER1].bits) == (8, 4)


def test_prefix_ends_at_a_dot() -> None:
    # Layer 1 must not catch layer 10.
    specs = BitsConfig({"encoder.layer.1": 2, "*": 4}).resolve(build("bert", num_hidden_layers=11))
    assert specs["bert.encoder.layer.10.output.dense"].bits == 4


@given(st.permutations(["*", "encoder", "encoder.layer.0", "encoder.layer.0.attention.self.query"]))
def test_the_longest_match_wins_in_any_order(patterns: list[str]) -> None:
    bits = {"*": 8, "encoder": 4, "encoder.layer.0": 3, "encoder.layer.0.attention.self.query": 2}
    specs = resolved({p: bits[p] for p in patterns})
    assert (specs[LAYER0].bits, specs[LAYER1].bits) == (2, 4)
    assert specs["bert.encoder.layer.0.output.dense"].bits == 3


WILDCARDS = ["*", "?", "[0-9]", "[!b]", "[]abc.0-9]", "[a-zA-Z0-9_.]", "[!]]"]


@given(st.data())
def test_a_name_wins_over_every_pattern_with_wildcards_in_its_place(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([LAYER0, "encoder.layer.0", "bert.encoder.layer.11.output.dense"]))
    glob = list(name)
    for place in data.draw(st.sets(st.integers(0, len(name) - 1), min_size=1, max_size=4)):
        glob[place] = data.draw(st.sampled_from(WILDCARDS))
    pattern = "".join(glob) + data.draw(st.sampled_from(["", ".*", "*", "[!-]*"]))
    for both in ([name, pattern], [pattern, name]):
        assert longest(both) == [name]


@pytest.mark.parametrize("bracket", ["[0", "[]", "[!]", "0]"])
def test_a_bracket_that_fnmatch_takes_for_itself_counts_as_characters(bracket: str) -> None:
    both = ["x" * len(bracket), bracket]
    assert fnmatch.fnmatchcase(bracket, bracket) and longest(both) == both


def test_a_layer_by_name_has_its_own_bits_beside_a_class_of_layers() -> None:
    for pattern in ("encoder.layer.[0-9].*", "encoder.layer.[!5-9].*", "encoder.layer.?.*", "encoder.layer.[01].*"):
        specs = resolved({pattern: 4, "encoder.layer.0": 8})
        assert (specs[LAYER0].bits, specs[LAYER1].bits) == (8, 4), pattern


def test_float_bits_and_unnamed_matrices_stay_float() -> None:
    assert LAYER0 not in resolved({"encoder.layer.0": 32, "*": 4})
    assert LAYER1 not in resolved({"encoder.layer.0": 4})
    assert WORDS not in resolved(4, embedding_bits=32)


def test_heads_only_when_named() -> None:
    assert "classifier" in resolved({"*": 4, "classifier": 8})
    assert "bert.pooler.dense" not in resolved({"*.dense": 4})


def test_settings_of_a_pattern_override_the_defaults() -> None:
    specs = resolved({"encoder.layer.0": {"bits": 2, "groups": 4, "scheme": "symmetric"}, "*": 4}, groups=12)
    assert (specs[LAYER0].groups, specs[LAYER0].scheme) == (4, "symmetric")
    assert (specs[LAYER1].groups, specs[LAYER1].scheme) == (12, "asymmetric")
    assert specs[WORDS].groups is None  # group settings concern matrices; tables have a range per row


@pytest.mark.parametrize(
    ("bits", "defaults", "message"),
    [
        ({"encoder.layr.0": 4}, {}, r"encoder\.layr\.0.*matches no tensor.*encoder\.layer\.0"),
        (5, {}, r"bits=5.*2, 3, 4 or 8 \(nearest: 4\)"),
        ({"*": 4.0}, {}, "bits=4.0"),
        ({"*": True}, {}, "bits=True"),
        ({}, {}, "empty"),
        ({"*": {"bits": 4, "group": 3}}, {}, "unknown setting 'group'"),
        (4, {"group": 3}, "unknown setting 'group'"),
        (4, {"groups": 5}, r"groups=5 does not divide its 48 rows.*nearest valid: 4"),
        (4, {"groups": 3}, r"groups=3 .*in 4 heads"),
        (4, {"groups": 0}, "groups=0"),
        (4, {"input_group_size": 7}, r"input_group_size=7.*nearest valid: 6"),
        (4, {"scheme": "affine"}, "scheme='affine'"),
        (4, {"range_method": "kl"}, "range_method='kl'"),
        (4, {"percentile": 30.0}, r"percentile=30\.0"),
        (4, {"activation_bits": 5}, "activation_bits=5"),
        (4, {"activation_bits": 8.0}, r"activation_bits=8\.0"),
        (4, {"percentile": "99"}, "percentile='99'"),
        (4, {"embedding_bits": 6}, "embedding_bits=6"),
        ({"*": 32}, {"embedding_bits": 32}, "left in float"),
        ({"*.query": 2, "*.q*uery": 3, "*": 4}, {}, "equal length but differ"),
    ],
)
def test_impossible_requests_are_refused_by_name(bits, defaults, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(bits, **defaults)


def test_wrong_type_and_nothing_to_quantize() -> None:
    with pytest.raises(TypeError, match="bits"):
        BitsConfig([4, 4])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no matrix or table"):
        BitsConfig(4).resolve(nn.Sequential(nn.ReLU()))


def test_numpy_integers_are_integers(tmp_path: Path) -> None:
    eight, four = np.int64(8), np.int32(4)
    config = BitsConfig({"encoder.layer.0": {"bits": eight, "groups": four}, "*": four}, embedding_bits=eight)
    assert config == BitsConfig({"encoder.layer.0": {"bits": 8, "groups": 4}, "*": 4})
    assert BitsConfig(four, groups=four) == BitsConfig(4, groups=4)
    config.save(tmp_path / "bits.json")
    assert BitsConfig.load(tmp_path / "bits.json") == config


def test_default_groups_fit_any_width() -> None:
    # 312 rows (TinyBERT) are not divisible by 128; the default then makes near-equal groups.
    assert BitsConfig(4).resolve(build("bert", hidden_size=312, num_attention_heads=12))


@given(
    st.dictionaries(
        st.sampled_from(["*", "encoder.layer.0", "embeddings", "encoder.layer.1.output.dense"]),
        st.sampled_from([2, 3, 4, 8]) | st.fixed_dictionaries({"bits": st.sampled_from([2, 4]), "groups": st.just(4)}),
        min_size=1,
    ),
    st.sampled_from([4, 8, 32]),
)
def test_json_round_trip(bits, embedding_bits: int) -> None:
    config = BitsConfig(bits, embedding_bits=embedding_bits, scheme="symmetric")
    assert BitsConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("text", "without_data", "with_data"),
    [
        # As the first format was written, whose defaults were 8-bit tables and symmetric ranges per token.
        (
            '{"format": "qbert.bits/1", "bits": {"encoder.layer.0": 8, "*": 4}, "embedding_bits": 8}',
            "dynamic",
            "static",
        ),
        ('{"format": "qbert.bits/1", "bits": {"*": {"bits": 2, "activation_range": null}}}', "dynamic", "static"),
        ('{"format": "qbert.bits/1", "bits": {"*": 3}, "activation_range": "dynamic"}', "dynamic", "dynamic"),
        ('{"format": "qbert.bits/1", "bits": {"*": 3}, "rounding": "compensated"}', "asymmetric", "asymmetric"),
    ],
)
@pytest.mark.filterwarnings("ignore:rounding='compensated'", "ignore:calibration_data has")
def test_configurations_of_the_first_format_mean_what_they_meant(
    text: str, without_data: str, with_data: str, tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text(text)
    old = BitsConfig.load(tmp_path / "old.json")
    old.save(tmp_path / "new.json")
    model = build("bert")
    assert old.resolve(model)[WORDS].bits == 8
    for config in (old, BitsConfig.load(tmp_path / "new.json")):
        for data, wanted in ((None, without_data), ([inputs_for("bert")], with_data)):
            student = quantize_model(model, config, calibration_data=data)
            assert student.get_submodule(LAYER1).activation_quantizer.mode == wanted


@pytest.mark.parametrize(("data", "wanted"), [(False, "asymmetric"), (True, "static")])
def test_activations_have_asymmetric_ranges_a_token_or_calibrated_ones(data: bool, wanted: str) -> None:
    batches = [inputs_for("bert")] if data else None
    student = quantize_model(build("bert"), 4, calibration_data=batches)
    assert student.get_submodule(LAYER1).activation_quantizer.mode == wanted


def test_every_accepted_form_of_a_bits_config(tmp_path: Path) -> None:
    config = BitsConfig({"*": 4})
    config.save(tmp_path / "bits.json")
    (tmp_path / "plain.json").write_text('{"*": 4}')
    forms = [4, {"*": 4}, config, config.to_dict(), tmp_path / "bits.json", str(tmp_path / "plain.json")]
    assert all(BitsConfig.parse(form) == config for form in forms)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits.json", "plain.json"]


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        BitsConfig.load(path)
    path.write_text('{"format": "other/1", "bits": 4}')
    with pytest.raises(ValueError, match="format"):
        BitsConfig.load(path)
    for text in ('{"*": "4"}', '{"format": "qbert.bits/1", "bits": "x"}', "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bits_config: .*bits\.json cannot be used: "):
            BitsConfig.load(path)
    for missing in (tmp_path / "missing.json", tmp_path, "4"):
        with pytest.raises(FileNotFoundError, match=r"bits_config: there is no file .*; pass a number, a mapping"):
            BitsConfig.parse(missing)
