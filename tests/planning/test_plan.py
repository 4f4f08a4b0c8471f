"""The verb `plan`: what it prints, what it needs, and what it proposes."""

from dataclasses import replace

import pytest
import yaml
from toys import save_llm

from vlm_tune.config.parse import load_config
from vlm_tune.errors import ConfigError
from vlm_tune.planning.fit import make_fit
from vlm_tune.planning.longest import MOST, longest, longest_packs, needs_of
from vlm_tune.planning.plan import KNOWN, open_run
from vlm_tune.planning.seconds import find_gpu
from vlm_tune.planning.show import spoken
from vlm_tune.planning.skeleton import make_skeleton

KNOWN_MODELS = {name: facts for name, facts in yaml.safe_load(KNOWN.read_text()).items() if "parameters" in facts}


def test_a_plan_names_each_share_and_says_that_it_fits(toys, run_cli):
    done = run_cli("plan", *toys.arguments("trainer.accelerator=cpu"))
    assert done.code == 0, done.err
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "fits", "TFLOP", "6 steps"):
        assert word in done.out
    assert "26 rows" in done.out
    longest = done.out.partition("longest pack")[2]
    assert [f"llm={way} " in longest for way in ("false", "mlp", "true", "offload")] == [True, True, True, False]


def test_a_plan_that_does_not_fit_ends_with_1(toys, run_cli):
    done = run_cli("plan", *toys.arguments(), "gpu=0.901GB")
    assert done.code == 1
    assert "does not fit" in done.out
    assert "No setting makes it smaller" in done.out  # of a toy: a card's own library is nearly all


def test_fit_refuses_what_nothing_makes_fit(toys, run_cli):
    done = run_cli("plan", *toys.arguments(), "gpu=0.9GB", "fit=true")
    assert (done.code, done.out) == (2, "")
    assert "GiB at least" in done.err


def test_fit_prints_nothing_for_a_run_that_fits(toys, run_cli):
    assert run_cli("plan", *toys.arguments(), "gpu=8GB", "fit=true").out == "\n"


@pytest.mark.parametrize(("own", "said"), [("gpu=abc", "no such card"), ("fit=maybe", "give true or false")])
def test_own_keys_are_checked(toys, run_cli, own, said):
    done = run_cli("plan", *toys.arguments(), own)
    assert done.code == 2
    assert said in done.err


def test_a_model_of_unknown_size_is_an_error_that_says_what_to_fetch(run_cli, toys):
    path = f"data.path={toys.data / 'train.jsonl'}"
    done = run_cli("plan", "model=internvl2_2b", "model.path=nobody/nothing", path, "gpu=24GB")
    assert done.code == 2
    assert "hf download nobody/nothing" in done.err


def test_a_published_model_is_planned_without_its_folder():
    config = load_config(["model=internvl2_2b", "data=own", "data.path=x.jsonl"])
    with open_run(config, on_gpu=True) as run:
        assert "OpenGVLab/InternVL2-2B" in run.notes[0]
        assert run.work.usual.input_ids.shape == (1, config.stage.pack_length)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_known_sizes_add_up_to_the_published_count(name, tmp_path):
    import json

    import torch

    from vlm_tune.config.schema import Quantize

    llava = name.startswith("llava")
    config = load_config(["model=llava_1_5_7b" if llava else "model=internvl2_2b", "data=own", "data.path=x"]).model
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[name]))
    config.path = str(tmp_path)
    vlm = make_skeleton(config, 0, torch.bfloat16, Quantize.none)
    unused = [] if not llava else vlm.vision.unused.values()
    count = sum(weight.numel() for weight in (*vlm.parameters(), *unused)) / 1e9
    published = KNOWN_MODELS[name]["parameters"]
    assert count == pytest.approx(published, rel=0.006) or round(count, 1) == published  # InternVL3.5's have one digit


@pytest.mark.parametrize(("name", "gib"), [("24GB", 24), ("24", 24), ("a100", 80), ("9.5 GiB", 9.5)])
def test_a_card_is_named_or_sized(name, gib):
    assert find_gpu(name).gib == gib


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="no such card"):
        find_gpu("0GB")


def remedies_of(arguments, peaks, gib):
    """Fit a run whose peak is looked up by the settings that are tried: the smallest of those named."""
    config = load_config(["model=internvl2_2b", "data=own", "data.path=x.jsonl", *arguments])
    found = make_fit(config, gib, lambda more: min([40.0, *(peaks[each] for each in more if each in peaks)]), 40.0)
    return [" ".join(each.overrides) for each in found]


def test_a_longest_pack_is_on_the_line_through_two_that_are_counted():
    assert longest(lambda length: 1 + length / 2**15, 5) == 2**17
    assert longest(lambda length: 1 + length / 2**15, 1.0625) == 2**11
    assert longest(lambda length: 1 + length / 2**15, 1) == 0
    assert longest(lambda length: 1, 5) == MOST


@pytest.mark.slow
@pytest.mark.parametrize("on_gpu", [True, False])
def test_longest_packs_are_those_that_are_counted(toys, tmp_path, on_gpu):
    save_llm(tmp_path, num_hidden_layers=4)
    config = load_config(replace(toys, llm=tmp_path).arguments("stage=finetune", "stage.pack_tiles=4"))
    with open_run(config, on_gpu) as run:
        most = needs_of(run, "mlp", 20 * 1024).total
        found = dict(longest_packs(run, most, lambda needs: needs.total))
        assert found["mlp"] == pytest.approx(20 * 1024, rel=0.05)
        assert found[False] <= found["mlp"] < found[True]
        assert ("offload" in found) == on_gpu
        assert needs_of(run, True, found[True]).total == pytest.approx(most, rel=0.02 if on_gpu else 0.05)
        assert not on_gpu or found["offload"] > 1.1 * found[True]


def test_a_cpu_is_offered_no_second_memory(toys):
    with open_run(load_config(toys.arguments("stage=finetune")), on_gpu=False) as run:
        assert dict(longest_packs(run, 0, lambda needs: needs.total)) == {False: 0, "mlp": 0, True: 0}


def test_the_cheapest_setting_that_suffices_is_the_only_one():
    peaks = {"stage.gradient_checkpointing.llm=true": 20.0, "stage.quantize=nf4": 10.0}
    assert remedies_of(["stage=finetune"], peaks, 24) == ["stage.gradient_checkpointing.llm=true"]


def test_a_cheap_setting_that_is_not_needed_beside_another_is_left_out():
    peaks = {"stage.gradient_checkpointing.llm=true": 30.0, "stage.quantize=nf4": 10.0}
    assert remedies_of(["stage=finetune"], peaks, 24) == ["stage.quantize=nf4"]


def test_a_setting_that_gains_nothing_is_not_proposed():
    assert remedies_of(["stage=finetune"], {}, 24) == []


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.42, "0.42 s"), (12.3, "12 s"), (200, "3 min 20 s"), (18600, "5 h 10 min")]
)
def test_times_are_said_as_people_do(seconds, said):
    assert spoken(seconds) == said
