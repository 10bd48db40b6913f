"""amclip_ds: pre-trains CLIP with attentive token removal (A-CLIP) through DeepSpeed, from a laptop to a cluster."""

__version__ = "0.1.0"
