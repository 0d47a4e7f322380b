"""Makes the two small tokenizers of this folder and what the Python package encodes with them.

    python tests/hf/make_tokenizers.py            (tokenizers)

WordPiece as BERT has it, and byte-level BPE as GPT-2 has it (its splitting rule needs a regular
expression with look-ahead). Both are trained on the demo's sentences.
"""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
SENTENCES = HERE.parent.parent / "demo" / "sentences.txt"
TEXTS = ["The kernel runs.", "Naïve café, 東京: it's 42 don'ts  and   spaces!", "a", ""]
MOST = 12


def wordpiece():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    t.train([str(SENTENCES)], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    t.decoder = decoders.WordPiece()
    # What a file prescribes must not matter.
    t.enable_padding(length=64)
    t.enable_truncation(5)
    return t


def bytes_bpe():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train([str(SENTENCES)],
            trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return t


for name, tokenizer in [("wordpiece", wordpiece()), ("bytes", bytes_bpe())]:
    out = HERE / "tokenizers" / name
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    whole = [len(e.ids) for e in tokenizer.encode_batch(TEXTS)]
    tokenizer.enable_padding(pad_id=0)
    tokenizer.enable_truncation(MOST)
    batch = tokenizer.encode_batch(TEXTS)
    expected = {
        "texts": TEXTS,
        "max_tokens": MOST,
        "vocabulary": tokenizer.get_vocab_size(),
        "input_ids": [e.ids for e in batch],
        "attention_mask": [e.attention_mask for e in batch],
    }
    (out / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")
    print(name, whole, expected["input_ids"])
