"""A tiny real CogVideoX with a bundle, clips, and configs that train on them. No test lives here."""

from pathlib import Path

import pytorch_lightning as lightning
import torch
import yaml
from torch.utils.data import Dataset

from tests.encoders.tiny import WORDS, clip_config, dinov2_config, static_sentence_model, videomae_config

SIZE, FRAMES, NUM_TOKENS, TOKEN_DIM = 32, 5, 3, 16


class Squares(Dataset):
    """Random clips with captions of two words; two clips in a row are cut from one video.

    Their flow is made up: the lower half moves, each clip at a speed of its own.
    """

    reads = 0

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.videos = torch.rand(count, FRAMES, 3, SIZE, SIZE, generator=generator) * 2 - 1
        self.texts = [f"{WORDS[1 + i % 2]} {WORDS[5 + i % 4]}" for i in range(count)]
        self.sources = [str(i // 2) for i in range(count)]
        self.identity = f"squares {count} {seed}"

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        Squares.reads += 1
        flow = torch.zeros(FRAMES, SIZE, SIZE, 2)
        flow[:, SIZE // 2 :] = (torch.arange(FRAMES) * (1.0 + index))[:, None, None, None]
        return {
            "video": self.videos[index],
            "caption": self.texts[index],
            "true_flow": flow,
            "true_visible": torch.ones(FRAMES, SIZE, SIZE, dtype=torch.bool),
        }


class Losses(lightning.Callback):
    """Keeps the loss of every step."""

    seen: list[float] = []  # noqa: RUF012 - a test reads it after the trainer has gone

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        Losses.seen.append(float(outputs["loss"]))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=4)


def pipeline():
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return CogVideoXImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4),
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            temporal_compression_ratio=1,
            sample_height=SIZE,
            sample_width=SIZE,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8,
            out_channels=4,
            num_layers=2,
            text_embed_dim=8,
            time_embed_dim=4,
            max_text_seq_length=4,
            sample_height=SIZE // 4,
            sample_width=SIZE // 4,
            sample_frames=FRAMES,
            temporal_compression_ratio=1,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )


def svd_pipeline(levels: int = 2):
    """A tiny SVD; the autoencoder halves the size one time less than it has levels."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from tests.adapters.denoisers import svd

    unet = svd().model
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        image_size=224,
        patch_size=56,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    return StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=4,
        ),
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        feature_extractor=CLIPImageProcessor(),
    )


def write_bundle(folder: Path, pipe, *, control: bool = False) -> None:
    """A whole bundle: tiny encoders, untrained parts, and the backbone in its folder."""
    from motionrag.adapters import AttentionInjection, FeatureModulation
    from motionrag.backbones import backbone_of_denoiser
    from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle
    from motionrag.encoders import CLIPEncoder, DINOv2Encoder, SentenceEncoder, VideoMAEEncoder
    from motionrag.models import CAMA, Resampler

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    torch.manual_seed(1)
    encoders = {
        "video": VideoMAEEncoder.from_pretrained(videomae_config(hidden_dropout_prob=0.0)),
        "image": DINOv2Encoder.from_pretrained(dinov2_config(hidden_dropout_prob=0.0)),
        "clip": CLIPEncoder.from_pretrained(clip_config()),
        "text": SentenceEncoder(static_sentence_model()),
    }
    for name, encoder in encoders.items():
        encoder.save_pretrained(folder / name)
    pipe.save_pretrained(folder / "backbone")
    resampler = {
        "input_dim": 32,
        "dim": TOKEN_DIM,
        "output_dim": TOKEN_DIM,
        "num_queries": NUM_TOKENS,
        "depth": 1,
        "num_heads": 2,
        "head_dim": 8,
    }
    cama = {"dim": TOKEN_DIM, "depth": 1, "num_heads": 2, "ff_dim": 32, "num_tokens": NUM_TOKENS}
    injection = AttentionInjection.for_model(denoiser, token_dim=TOKEN_DIM)
    for adapter in injection.sites.values():
        torch.nn.init.normal_(adapter.to_v.weight, std=0.5)  # so that gradients reach everything from the first step
    modulation = {"feature_modulation": FeatureModulation.for_model(denoiser)} if control else {}
    for name, weight in [pair for part in modulation.values() for pair in part.named_parameters()]:
        if name.startswith("sites") and ".temporal." in name:
            torch.nn.init.normal_(weight, std=0.1)
    MotionBundle(
        BundleConfig(
            backbone=backbone_of_denoiser(denoiser).name,
            base_model="backbone",
            encoders={name: EncoderSource(name) for name in encoders},
            parts={
                "motion_resampler": resampler,
                "context_resampler": resampler,
                "cama": cama,
                "motion_injection": injection.config(),
                **{name: part.config() for name, part in modulation.items()},
            },
            trained=False,
        ),
        unconditional_tokens=torch.zeros(NUM_TOKENS, TOKEN_DIM),
        motion_resampler=Resampler(**resampler),
        context_resampler=Resampler(**resampler),
        cama=CAMA(**cama),
        motion_injection=injection,
        **modulation,
    ).save_pretrained(folder)


def named(class_path: str, **init_args) -> dict:
    return {"class_path": class_path, "init_args": init_args}


def encoded(
    bundle: Path, cache: Path, features: list[str], *, latents: bool, count: int = 8, flow: str | None = None
) -> dict:
    return named(
        "motionrag.training.EncodedClips",
        clips=named("tests.training.parts.Squares", count=count),
        folder=str(cache),
        bundle=str(bundle),
        features=features,
        flow=flow,
        precision="float32",
        **({"pipeline": str(bundle / "backbone")} if latents else {}),
    )


def stage(name: str, bundle: Path, cache: Path) -> tuple[dict, dict]:
    """Model and training data of a stage."""
    options = {"bundle": str(bundle), "learning_rate": 1e-2, "warmup_steps": 2}
    if name == "injection":
        return (
            named("motionrag.training.InjectionTraining", **options, token_dropout=0.3, prompt_dropout=0.3),
            encoded(bundle, cache, ["motion_features"], latents=True),
        )
    if name.startswith("control"):
        return (
            named(
                "motionrag.training.ControlTraining",
                **options,
                denoiser=name.removeprefix("control_"),
                lora_rank=2,
                control_dropout=0.3,
                token_dropout=0.3,
                drop_ratio=[0.2, 0.5],
            ),
            encoded(bundle, cache, ["motion_features"], latents=True, flow="true"),
        )
    features = (
        ["motion_tokens", "context_features"] if name == "adaptation" else ["motion_features", "context_features"]
    )
    data = named(
        f"motionrag.training.{'RetrievedReferences' if name == 'adaptation' else 'ReferencedClips'}",
        clips=encoded(bundle, cache, features, latents=name == "joint"),
        bundle=str(bundle),
        num_references=3,
    )
    return named(f"motionrag.training.{name.capitalize()}Training", **options), data


def write_config(name: str, bundle: Path, cache: Path, run: Path, *, steps: int = 6) -> Path:
    model, data = stage(name, bundle, cache)
    config = {
        "model": model,
        "data": named("motionrag.training.ClipDataModule", train=data, batch_size=4),
        "trainer": {
            "default_root_dir": str(run),
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                named(
                    "pytorch_lightning.callbacks.ModelCheckpoint",
                    dirpath=str(run),
                    save_last=True,
                    every_n_train_steps=3,
                    save_top_k=0,
                    save_on_train_epoch_end=False,
                ),
                {"class_path": "tests.training.parts.Losses"},
            ],
        },
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path
