"""Says of weights that fit no network what they seem to be, and which of their names come nearest to known ones."""

import difflib
import re
from collections.abc import Iterable

# Parts of names and what has them.  Sources: the classes of diffusers and transformers that are named;
# Lyy-iiis/pMF, models/embedder.py; diffusers, loaders/single_file_utils.py and loaders/lora_pipeline.py.
LOOKS = {
    r"\blora_[AB]\b": "a LoRA, which changes another model",
    r"\bx_embedder\W(net\W)?proj[12]\b": "pixel MeanFlow (Lyy-iiis/pMF), which predicts images",
    r"^(model\.)?diffusion_model\.": "Stable Diffusion",
    r"\b(down|up)_blocks\.\d+\.(resnets|attentions)\.": "a U-Net of diffusers (UNet2DConditionModel)",
    r"\btransformer_blocks\.\d+\.attn\d?\.to_q\.": "a transformer of diffusers (DiTTransformer2DModel or PixArt)",
    r"\b(patch_embeddings\.projection|patch_embed\.proj)\.": "a vision transformer, an encoder (DINOv2)",
    r"\bembed_tokens\.": "a language model",
}
# Names by which a network is recognised, of each kind.
KNOWN = (
    "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight",
    "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight", "omega_tokens",
    "u_heads.0.attn.q_proj._flax_linear.weight", "u_final_layer.linear._flax_linear.weight", "map_layer0.weight",
    "enc.32x32_conv.weight",
    "enc.32x32_block0.conv0.weight", "unet.emb_fourier.freqs", "unet.emb_noise.weight", "unet.enc.64x64_conv.weight",
    "unet.enc.64x64_block0.conv_res0.weight",
)  # fmt: skip
MOST = 5  # pairs of names in a message


def describe(found: Iterable[str], wanted: Iterable[str] = KNOWN) -> str:
    """Return what weights of these names seem to be, and the nearest of the names that are wanted, for messages."""
    found = list(found)
    looks = next((what for part, what in LOOKS.items() if any(re.search(part, name) for name in found)), "")
    pairs = nearest(found, wanted)
    return "; ".join(filter(None, (looks and f"it seems to be {looks}", pairs and f"the nearest names are {pairs}")))


def nearest(found: Iterable[str], wanted: Iterable[str]) -> str:
    """Return up to five wanted names, each with the name found that is most like it; blocks count as one."""
    ours, theirs = (
        {re.sub(r"(?<=\.)\d+(?=\.)", "0", name): name for name in sorted(names, reverse=True)}
        for names in (wanted, found)
    )
    pairs = []
    for name in ours:
        for close in difflib.get_close_matches(name, theirs, 1):
            pairs.append((-difflib.SequenceMatcher(None, name, close).ratio(), ours[name], theirs[close]))
    return ", ".join(f"{theirs} (for {ours})" for _, ours, theirs in sorted(pairs)[:MOST])
