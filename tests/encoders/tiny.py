"""Tiny random models, made by the libraries' own classes."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, VideoMAEConfig


def videomae_config(**changes):
    sizes = {
        "image_size": 32,
        "patch_size": 16,
        "num_frames": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "decoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "hidden_dropout_prob": 0.1,
    }
    return VideoMAEConfig(**{**sizes, **changes})


def dinov2_config(**changes):
    sizes = {
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.1,
    }
    return Dinov2Config(**{**sizes, **changes})


def clip_config():
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }


WORDS = ("a", "red", "blue", "ball", "box", "blicks", "falls", "spins", "slides", "under", "over", "the")


def static_sentence_model(words=WORDS, dim=16):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    table = torch.randn(len(words) + 1, dim)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu")


def edit_weights(path, edit):
    """Rewrite a safetensors file after `edit(tensors)` changed the dict in place."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=metadata)
