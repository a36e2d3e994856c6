"""Makes the pocket's weights: every part a real library class at a small size, seeded, not trained.

    python -m motionrag.pocket.initialise motionrag/pocket/weights

Text retrieval works nevertheless: the sentence encoder is a bag of random word vectors, weighted so that common words
count little, and compares captions by the words that they share.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from motionrag.adapters import AttentionInjection
from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle
from motionrag.encoders import CLIPEncoder, DINOv2Encoder, SentenceEncoder, VideoMAEEncoder
from motionrag.models import CAMA, Resampler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEED = 0
LICENCE = "Apache-2.0"
VOCABULARY = 8192
NUM_TOKENS, TOKEN_DIM = 25, 64
SIZE, NUM_FRAMES = 64, 17  # pixels; frames that the backbone makes
FEATURE_DIM = 96
PROMPT_TOKENS = 48


def word_tokenizer() -> "Tokenizer":
    """The most frequent 8 192 pieces of CLIP's byte-pair vocabulary, which open_clip ships: any text can be spelled."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    clip = SimpleTokenizer()
    pieces = [piece for piece, _ in sorted(clip.encoder.items(), key=lambda item: item[1])]
    merges = [pair for pair, _ in sorted(clip.bpe_ranks.items(), key=lambda item: item[1])]
    specials = ["<pad>", "</s>", "<unk>"]
    kept = pieces[: VOCABULARY - len(specials)]
    known = set(kept)
    merges = [pair for pair in merges if "".join(pair) in known]
    vocabulary = {piece: index for index, piece in enumerate([*specials, *kept])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def sentence_encoder() -> SentenceEncoder:
    """Random word vectors; their length grows with a word's rarity (Zipf: log of the rank)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = word_tokenizer()
    tokenizer.post_processor = None
    rarity = torch.log1p(torch.arange(VOCABULARY, dtype=torch.float32))
    vectors = torch.randn(VOCABULARY, FEATURE_DIM) * rarity[:, None] / rarity.max()
    return SentenceEncoder(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors.numpy())]))


def video_encoder() -> VideoMAEEncoder:
    """VideoMAE: 16 frames of 64 pixels to 128 positions."""
    from transformers import VideoMAEConfig

    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=16,
        num_frames=16,
        tubelet_size=2,
        hidden_size=FEATURE_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * FEATURE_DIM,
        use_mean_pooling=False,
    )
    return VideoMAEEncoder.from_pretrained(config)


def image_encoder() -> DINOv2Encoder:
    """DINOv2: 56 pixels to a class token and 16 positions."""
    from transformers import Dinov2Config

    config = Dinov2Config(
        image_size=56,
        patch_size=14,
        hidden_size=FEATURE_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
    )
    return DINOv2Encoder.from_pretrained(config)


def clip_encoder() -> CLIPEncoder:
    """open_clip; the text tower is as narrow as it gets, for its vocabulary is fixed at 49 408 pieces."""
    return CLIPEncoder.from_pretrained(
        {
            "embed_dim": 64,
            "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
        }
    )


def backbone() -> Any:
    """A CogVideoX image-to-video pipeline: 64 pixels, 17 frames."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    latent_channels, text_dim, spatial_factor = 4, 32, 4
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 16, 16),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=SIZE,
        sample_width=SIZE,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        num_layers=3,
        text_embed_dim=text_dim,
        time_embed_dim=64,
        max_text_seq_length=PROMPT_TOKENS,
        sample_height=SIZE // spatial_factor,
        sample_width=SIZE // spatial_factor,
        sample_frames=NUM_FRAMES,
        use_rotary_positional_embeddings=True,
    )
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=VOCABULARY, d_model=text_dim, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        pad_token="<pad>",  # noqa: S106 - not a password
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=PROMPT_TOKENS,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
    )
    return CogVideoXImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def initialise(folder: str | Path) -> None:
    """Write the whole pocket: bundle, encoders and backbone, in float16.

    Args:
        folder: Made if it does not exist.
    """
    folder = Path(folder)
    torch.manual_seed(SEED)
    pipeline = backbone()
    encoders: dict[str, Any] = {
        "video_encoder": video_encoder(),
        "image_encoder": image_encoder(),
        "clip_encoder": clip_encoder(),
        "text_encoder": sentence_encoder(),
    }
    resampler = {
        "input_dim": FEATURE_DIM,
        "dim": TOKEN_DIM,
        "output_dim": TOKEN_DIM,
        "num_queries": NUM_TOKENS,
        "depth": 2,
        "num_heads": 4,
        "head_dim": 16,
    }
    cama = {"dim": TOKEN_DIM, "depth": 2, "num_heads": 4, "ff_dim": 4 * TOKEN_DIM, "num_tokens": NUM_TOKENS}
    injection = AttentionInjection.for_model(pipeline.transformer, token_dim=TOKEN_DIM)
    for name, weight in injection.named_parameters():
        if name.endswith("to_v.weight"):  # zero, the start of training, would show nothing
            nn.init.normal_(weight, std=0.02)
    motion_resampler = Resampler(**resampler)
    grey = torch.zeros(1, 16, 3, SIZE, SIZE)
    parts: dict[str, Any] = {
        "motion_resampler": motion_resampler.half().float(),  # the values that will be stored
        "context_resampler": Resampler(**resampler),
        "cama": CAMA(**cama),
        "motion_injection": injection,
    }
    video = encoders["video_encoder"].half().float()
    with torch.no_grad():
        unconditional_tokens = motion_resampler(video(grey))[0]
    config = BundleConfig(
        backbone="cogvideox",
        base_model="backbone",
        encoders={
            "video": EncoderSource("video_encoder", LICENCE),
            "image": EncoderSource("image_encoder", LICENCE),
            "clip": EncoderSource("clip_encoder", LICENCE),
            "text": EncoderSource("text_encoder", LICENCE),
        },
        parts={
            "motion_resampler": resampler,
            "context_resampler": resampler,
            "cama": cama,
            "motion_injection": injection.config(),
        },
        trained=False,
        licence=LICENCE,
        base_model_licence=LICENCE,
    )
    pipeline.to(torch.float16).save_pretrained(folder / "backbone")
    for name, encoder in encoders.items():
        encoder.half().save_pretrained(folder / name)
    halves = {name: part.half() for name, part in parts.items()}
    MotionBundle(config, unconditional_tokens=unconditional_tokens.half(), **halves).save_pretrained(folder)


if __name__ == "__main__":
    initialise(sys.argv[1])
