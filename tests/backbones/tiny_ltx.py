"""A tiny real LTX pipeline and clips for it. No test lives here."""

import torch

from tests.encoders.tiny import WORDS

HEIGHT, WIDTH, FRAMES, NUM_TEXT = 64, 96, 17, 6


def tokenizer():
    """Ends every text with `</s>`, as that of T5 does, so the empty prompt has a token too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "</s>", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", model_max_length=NUM_TEXT
    )


def ltx_pipeline():
    """Latents of 4 channels, 32 times smaller and 8 times shorter than the video, as those of LTX-Video."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXImageToVideoPipeline,
        LTXVideoTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    vae.latents_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    vae.latents_std.copy_(torch.tensor([0.5, 1.5, 0.8, 1.2]))
    pipe = LTXImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        vae=vae.eval(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=8,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(  # as published
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
    )
    pipe.text_encoder.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class LTXClips(torch.utils.data.Dataset):
    """Random clips with captions of one to three words."""

    identity = "ltx clips"
    texts = ("a red ball", "falls", "the box")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.videos = torch.rand(len(self.texts), FRAMES, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        return {"video": self.videos[index], "caption": self.texts[index]}
