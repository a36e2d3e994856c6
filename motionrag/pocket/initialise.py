"""Makes the pocket's weights as training finds them: every part a real library class at a small size, seeded.

The sentence encoder and the text encoder stay as they are made here. Text retrieval works nevertheless: the former is
a bag of random word vectors, weighted so that common words count little, and compares captions by the words that they
share; the latter gives the backbone one random vector for every piece of a word, and codes for displacements.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from motionrag.adapters import AttentionInjection
from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle
from motionrag.encoders import CLIPEncoder, DINOv2Encoder, SentenceEncoder, VideoMAEEncoder
from motionrag.models import CAMA, Resampler
from motionrag.pocket import displacements, world

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEED = 0
LICENCE = "Apache-2.0"
VOCABULARY = 8192
NUM_TOKENS, TOKEN_DIM = 25, 96
SIZE, NUM_FRAMES = 64, 17  # pixels; frames that the backbone makes
MOTION_DIM, CONTEXT_DIM, SENTENCE_DIM = 128, 96, 64
PROMPT_TOKENS = 24
CAPTIONS_SEED, NUM_CAPTIONS, SMOOTHING = 1, 3000, 0.03  # for the sentence encoder
# Between captions with the same made-up verb 95 % are more similar, between others 95 % less.
MIN_SIMILARITY = 0.82


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
    """Random word vectors, shorter the commoner a piece is: by its rank in English (Zipf) and in the world's captions.

    The latter is the weight a / (a + p) of smooth inverse frequency: colours and shapes count little against verbs.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = word_tokenizer()
    tokenizer.post_processor = None
    captions = [world.training_caption(CAPTIONS_SEED, index) for index in range(NUM_CAPTIONS)]
    pieces = [piece for caption in captions for piece in tokenizer.encode(caption).ids]
    frequency = torch.bincount(torch.tensor(pieces), minlength=VOCABULARY) / NUM_CAPTIONS
    rarity = torch.log1p(torch.arange(VOCABULARY, dtype=torch.float32))
    weight = rarity / rarity.max() * SMOOTHING / (SMOOTHING + frequency)
    draw = torch.Generator().manual_seed(SEED)
    vectors = torch.randn(VOCABULARY, SENTENCE_DIM, generator=draw) * weight[:, None]
    return SentenceEncoder(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors.numpy())]))


def video_encoder() -> VideoMAEEncoder:
    """VideoMAE: 16 frames of 64 pixels to 128 positions."""
    from transformers import VideoMAEConfig

    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=16,
        num_frames=16,
        tubelet_size=2,
        hidden_size=MOTION_DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * MOTION_DIM,
        initializer_range=MOTION_DIM**-0.5,  # transformers' 0.02 is meant for six times the width
        use_mean_pooling=False,
    )
    return VideoMAEEncoder.from_pretrained(config)


def image_encoder() -> DINOv2Encoder:
    """DINOv2: 64 pixels to a class token and 64 positions."""
    from transformers import Dinov2Config

    config = Dinov2Config(
        image_size=SIZE,
        patch_size=8,
        hidden_size=CONTEXT_DIM,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=4,
        initializer_range=CONTEXT_DIM**-0.5,
    )
    return DINOv2Encoder.from_pretrained(config)


def clip_encoder() -> CLIPEncoder:
    """open_clip; the text tower is as narrow as it gets, for its vocabulary is fixed at 49 408 pieces."""
    return CLIPEncoder.from_pretrained(
        {
            "embed_dim": 64,
            "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 96, "head_width": 24, "patch_size": 8},
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

    latent_channels, text_dim, spatial_factor = 8, 32, 4
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 64),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        temporal_compression_ratio=1,  # a factor of 4 blurs what moves
        sample_height=SIZE,
        sample_width=SIZE,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        num_layers=5,
        patch_size=4,
        text_embed_dim=text_dim,
        time_embed_dim=64,
        max_text_seq_length=PROMPT_TOKENS,
        sample_height=SIZE // spatial_factor,
        sample_width=SIZE // spatial_factor,
        sample_frames=NUM_FRAMES,
        temporal_compression_ratio=1,
        use_rotary_positional_embeddings=True,  # both, as in CogVideoX-5B-I2V
        use_learned_positional_embeddings=True,
    )
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=VOCABULARY, d_model=text_dim, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )
    text_encoder.resize_token_embeddings(VOCABULARY + len(displacements.WORDS), mean_resizing=False)
    text_encoder.shared.weight.data[VOCABULARY:] = displacements.vectors(text_dim)
    words = word_tokenizer()
    words.add_tokens(displacements.WORDS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",  # noqa: S106 - not a password
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=PROMPT_TOKENS,
    )
    scheduler = CogVideoXDDIMScheduler(
        # The latents of a patch fill half the transformer's width: noise would not fit through beside them.
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
    )
    return CogVideoXImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def initialise(folder: str | Path) -> None:
    """Write the whole pocket: bundle, encoders and backbone, in float32.

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
        "dim": TOKEN_DIM,
        "output_dim": TOKEN_DIM,
        "num_queries": NUM_TOKENS,
        "depth": 2,
        "num_heads": 4,
        "head_dim": 24,
    }
    motion_resampler = {"input_dim": MOTION_DIM, **resampler}
    context_resampler = {"input_dim": CONTEXT_DIM, **resampler}
    cama = {"dim": TOKEN_DIM, "depth": 4, "num_heads": 4, "ff_dim": 4 * TOKEN_DIM, "num_tokens": NUM_TOKENS}
    injection = AttentionInjection.for_model(pipeline.transformer, token_dim=TOKEN_DIM)
    parts: dict[str, Any] = {
        "motion_resampler": _sharp(Resampler(**motion_resampler)),
        "context_resampler": _sharp(Resampler(**context_resampler)),
        "cama": CAMA(**cama),
        "motion_injection": ready(injection),
    }
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
            "motion_resampler": motion_resampler,
            "context_resampler": context_resampler,
            "cama": cama,
            "motion_injection": injection.config(),
        },
        trained=False,
        min_similarity=MIN_SIMILARITY,
        guidance_scale=1.0,
        motion_guidance_scale=4.0,
        num_inference_steps=20,
        licence=LICENCE,
        base_model_licence=LICENCE,
    )
    pipeline.save_pretrained(folder / "backbone")
    for name, encoder in encoders.items():
        encoder.save_pretrained(folder / name)
    unconditional_tokens = torch.zeros(NUM_TOKENS, TOKEN_DIM)  # follow from the trained resampler
    MotionBundle(config, unconditional_tokens=unconditional_tokens, **parts).save_pretrained(folder)


@torch.no_grad()
def _sharp(resampler: Resampler) -> Resampler:
    """Attention that chooses from the start: from nearly uniform attention a short training does not find its way."""
    for layer in resampler.layers:
        layer.attention.to_q.weight.mul_(8)  # type: ignore[union-attr,operator]
    return resampler


@torch.no_grad()
def ready(injection: AttentionInjection) -> AttentionInjection:
    """Queries that choose, and values that are not zero: from zero, queries and keys get no gradient at first."""
    for name, weight in injection.named_parameters():
        if name.endswith("to_q.weight"):
            weight.mul_(8)
        elif name.endswith("to_v.weight"):
            torch.nn.init.normal_(weight, std=0.02)
    return injection
