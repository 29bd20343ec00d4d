"""A tiny causal language model in plain torch, and a tokenizer of characters: what fine-tuning needs of each."""

import torch
from torch import nn
from torch.nn import functional

import lowmem
from lowmem.finetuning.packed_rows import Rows
from lowmem.finetuning.text_examples import Texts, read_examples

VOCABULARY = 64
WIDTH = 32
TEXT = "".join(f"item {n} costs {n * 7 % 10} and {n * 3 % 10}. " for n in range(24))


class Characters:
    """The end, the beginning of a text, and 62 kinds of characters."""

    end = 0

    def encode(self, text, special):
        return [1] * special + [2 + ord(letter) % 62 for letter in text]

    def chat(self, messages):
        for message in messages:
            yield f"<{message['role']}>", False
            yield f"{message['content']};", message["role"] == "assistant"


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask[:, None])
        x = x + mixed.transpose(1, 2).flatten(2)
        return x + self.dropout(self.down(functional.silu(self.up(x))))


class Language(nn.Module):
    """Positions that begin anew begin another text, as in models of transformers."""

    def __init__(self, dropout=0.0, isolates=True, causal=True):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.isolates, self.causal = isolates, causal

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length).expand(rows, length)
        x = self.tokens(input_ids) + self.places(position_ids)
        mask = torch.ones(rows, length, length, dtype=torch.bool)
        if self.causal:
            mask = mask.tril()
        if self.isolates:
            text = (position_ids == 0).cumsum(1)
            mask = mask & (text[:, :, None] == text[:, None, :])
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, :].bool() | torch.eye(length, dtype=torch.bool))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def language(seed=0, technique=None, rank=4, **options):
    """Return a model with an adapter, whose base is stored by ``technique``."""
    torch.manual_seed(seed)
    model = Language(**options)
    if technique is not None:
        lowmem.convert(model, technique)
    return lowmem.add_adapter(model, "default", lowmem.LoRA(rank))


def texts(tmp_path, text=TEXT, length=48, name="text.txt") -> Texts:
    path = tmp_path / name
    path.write_text(text)
    return read_examples(path, Characters(), length)


def rows(model, found: Texts, length=48) -> Rows:
    return Rows.of(model, found.examples, length, VOCABULARY)
