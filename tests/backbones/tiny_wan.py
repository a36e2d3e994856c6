"""Tiny real Wan pipelines, one for each kind of published model. No test lives here."""

import torch

from tests.encoders.tiny import WORDS

SIZE = 32  # pixels of the clips' sides: what every kind can make
KINDS = ("2.1", "2.2", "2.2 high", "2.2 low", "5b")
Z_DIM, NUM_HEADS, HEAD_DIM = 4, 2, 12


def tokenizer():
    """Words, and an end as the real one has it, so that no prompt is empty."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[END]", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", words["[END]"])])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=224,
        patch_size=56,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return CLIPVisionModel(config).eval()


def vae(*, is_5b):
    from diffusers import AutoencoderKLWan

    changes = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    made = AutoencoderKLWan(
        base_dim=4,
        z_dim=Z_DIM,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[0.5, 0.7, 1.3, 0.9],
        **(changes if is_5b else {}),
    )
    return made.eval()


def transformer(*, in_channels, image_dim=None):
    from diffusers import WanTransformer3DModel

    made = WanTransformer3DModel(
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=in_channels,
        out_channels=Z_DIM,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else NUM_HEADS * HEAD_DIM,
    )
    return made.eval()


def wan_pipeline(kind):
    """A pipeline with random weights.

    "2.1" has an image encoder; "2.2" two transformers, "2.2 high" and "2.2 low" the one or the other of them, with the
    boundary that makes diffusers call it alone; "5b" is given the image as the first latent frame.
    """
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    torch.manual_seed(0)
    is_5b, has_image = kind == "5b", kind == "2.1"
    channels = Z_DIM if is_5b else 2 * Z_DIM + 4
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(is_5b=is_5b),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        image_processor=CLIPImageProcessor() if has_image else None,
        image_encoder=image_encoder() if has_image else None,
        transformer=None
        if kind == "2.2 low"
        else transformer(in_channels=channels, image_dim=16 if has_image else None),
        transformer_2=transformer(in_channels=channels) if kind in ("2.2", "2.2 low") else None,
        boundary_ratio={"2.2": 0.9, "2.2 high": 0.0, "2.2 low": 1.0}.get(kind),
        expand_timesteps=is_5b,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
