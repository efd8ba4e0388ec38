"""Tokenizers are saved under a class name that transformers 4 knows."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from tests.support.models import make_byte_tokenizer
from trainer.tokenizers import save_tokenizer


def test_a_generic_tokenizer_is_saved_under_the_name_that_both_versions_of_transformers_read(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()

    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)

    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("héllo").input_ids == tokenizer("héllo").input_ids
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.chat_template == tokenizer.chat_template
