"""The language model grows by the image tokens in a way that is the same in every run, and 4-bit weights stay whole."""

import json
import shutil

import pytest
import torch
from toys import NUM_ROWS, save_llm
from transformers import AutoTokenizer

from vlm_tune.config.schema import Quantize
from vlm_tune.model.parts.llm import add_tokens, load_llm, load_tokenizer
from vlm_tune.model.vlm import ImageTokens

TOKENS = ImageTokens().all


@pytest.fixture
def plain_tokenizer(toys, tmp_path):
    """A tokenizer that has never heard of pictures, as most language models' tokenizers."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(toys.llm, folder)
    for name, change in (("tokenizer.json", drop_from_list), ("tokenizer_config.json", drop_from_config)):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def drop_from_list(content):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < NUM_ROWS]


def drop_from_config(content):
    content.pop("extra_special_tokens", None)
    content.pop("additional_special_tokens", None)
    content.pop("added_tokens_decoder", None)


def llm_of(toys, tmp_path, tied):
    if tied:
        return load_llm(toys.llm, torch.float32)
    save_llm(tmp_path / "untied", tie_word_embeddings=False)
    return load_llm(tmp_path / "untied", torch.float32)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_are_the_mean_of_the_old_ones(toys, tmp_path, plain_tokenizer, tied):
    llm = llm_of(toys, tmp_path, tied)
    old = [table.weight.detach().clone() for table in (llm.get_input_embeddings(), llm.get_output_embeddings())]
    add_tokens(plain_tokenizer, llm, TOKENS)
    for before, table in zip(old, (llm.get_input_embeddings(), llm.get_output_embeddings()), strict=True):
        assert table.weight.shape[0] == NUM_ROWS + len(TOKENS)
        assert torch.equal(table.weight[:NUM_ROWS], before)
        torch.testing.assert_close(table.weight[NUM_ROWS:], before.mean(dim=0).expand(len(TOKENS), -1))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_growing_neither_ties_nor_unties(toys, tmp_path, plain_tokenizer, tied):
    llm = llm_of(toys, tmp_path, tied)
    add_tokens(plain_tokenizer, llm, TOKENS)
    assert (llm.get_input_embeddings().weight is llm.get_output_embeddings().weight) == tied


def test_a_new_token_is_one_special_token(toys, plain_tokenizer):
    add_tokens(plain_tokenizer, load_llm(toys.llm, torch.float32), TOKENS)
    ids = plain_tokenizer("<img><IMG_CONTEXT></img>", add_special_tokens=False)["input_ids"]
    assert ids == [plain_tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "<IMG_CONTEXT>", "</img>")]
    assert plain_tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_known_tokens_are_not_added_again(toys):
    tokenizer, llm = load_tokenizer(toys.llm), load_llm(toys.llm, torch.float32)
    add_tokens(tokenizer, llm, TOKENS)
    sizes = len(tokenizer), llm.get_input_embeddings().weight.shape
    add_tokens(tokenizer, llm, TOKENS)
    assert (len(tokenizer), llm.get_input_embeddings().weight.shape) == sizes


def test_a_table_that_is_large_enough_stays_as_it_is(toys, tmp_path):
    # many models pad their table: the spare rows are for new tokens, and cutting them would change the checkpoint
    save_llm(tmp_path / "padded", vocab_size=2560)
    llm = load_llm(tmp_path / "padded", torch.float32)
    before = llm.get_input_embeddings().weight.detach().clone()
    add_tokens(load_tokenizer(toys.llm), llm, TOKENS)
    assert torch.equal(llm.get_input_embeddings().weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for_and_rotary_frequencies_in_32_bits(toys, dtype):
    llm = load_llm(toys.llm, dtype)
    assert {weight.dtype for weight in llm.parameters()} == {dtype}
    assert llm.model.rotary_emb.inv_freq.dtype is torch.float32  # 16 bits move position 4096 by most of a radian


class TestFourBits:
    """bitsandbytes repacks 4-bit weights at the first pass in eval mode on some CPUs, and never undoes it."""

    @pytest.fixture
    def llm(self, toys):
        llm = load_llm(toys.llm, torch.bfloat16, Quantize.nf4)
        for name, weight in llm.named_parameters():
            weight.requires_grad_("norm" in name)  # as adapters are: trained weights between frozen 4-bit ones
        return llm

    def gradients(self, llm):
        torch.manual_seed(0)
        embeddings = torch.randn(1, 40, 32, dtype=torch.bfloat16)
        llm.train()
        hidden = llm.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        trained = [weight for weight in llm.parameters() if weight.requires_grad]
        return torch.autograd.grad(hidden.float().square().sum(), trained)

    def test_the_layers_are_in_four_bits(self, llm):
        kinds = {type(module).__name__ for name, module in llm.named_modules() if name.endswith("_proj")}
        assert kinds == {"Linear4bit"}

    def test_gradients_are_the_same_after_a_validation(self, llm):
        before = self.gradients(llm)
        llm.eval()
        with torch.no_grad():
            llm.get_decoder()(inputs_embeds=torch.randn(1, 40, 32, dtype=torch.bfloat16), use_cache=False)
        for one, other in zip(before, self.gradients(llm), strict=True):
            assert torch.equal(one, other)

    def test_no_layer_may_repack_its_weights(self, llm):
        # on a CPU without AVX512 nothing repacks, and the test above could not fail
        layers = [module for module in llm.modules() if type(module).__name__ == "Linear4bit"]
        assert layers
        assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers)
