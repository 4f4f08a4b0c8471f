"""Features of a frozen encoder are found again, whole, and never those of another encoder or picture."""

import torch

from vlm_tune.data.pictures.feature_cache import FeatureCache, fingerprint


def test_features_come_back_bit_for_bit(tmp_path):
    cache = FeatureCache(tmp_path)
    features = torch.randn(3, 4, 8).to(torch.bfloat16)
    cache.write("ab12", features)
    assert cache.has("ab12")
    assert torch.equal(cache.read("ab12"), features)


def test_a_picture_under_another_tile_limit_has_another_key(tmp_path):
    cache = FeatureCache(tmp_path)
    assert len({cache.key(b"one", 1), cache.key(b"one", 6), cache.key(b"two", 1)}) == 3


def test_nothing_but_whole_files_lies_in_the_cache(tmp_path):
    FeatureCache(tmp_path).write("ab12", torch.zeros(1, 2, 2))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.safetensors"]


def test_the_fingerprint_tells_weights_dtypes_and_settings_apart():
    weights = {"layer": torch.ones(2, 2), "batches_tracked": torch.tensor(3)}
    changed = weights | {"layer": torch.full((2, 2), 1.5)}
    cast = weights | {"layer": torch.ones(2, 2, dtype=torch.bfloat16)}
    prints = {fingerprint(weights, "a"), fingerprint(weights, "b"), fingerprint(changed, "a"), fingerprint(cast, "a")}
    assert len(prints) == 4
    assert fingerprint(dict(reversed(weights.items())), "a") == fingerprint(weights, "a")
