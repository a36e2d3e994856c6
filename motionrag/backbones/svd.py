"""Stable Video Diffusion: facts for the adapters. Generating with it is not wired into the pipeline yet.

Every spatial cross-attention (`attn2`) sees one image token, so its output, and with it what motion injection adds,
is the same at every position, frame and step of a sample.
"""

import re

from motionrag.backbones.backbone import Backbone

SVD = Backbone(
    name="svd",
    denoiser_class="UNetSpatioTemporalConditionModel",
    denoiser="unet",
    # The 16 spatial attn2; `temporal_transformer_blocks` does not match.
    injection_sites=re.compile(
        r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_out\.0"
    ),
    published_prefix="unet.",
    fps=7,
)
