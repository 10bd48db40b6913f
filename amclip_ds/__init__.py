"""amclip_ds: pre-trains CLIP with attentive token removal (A-CLIP) through DeepSpeed, from a laptop to a cluster."""

from amclip_ds.torchvision_mend import mend

__version__ = "0.1.0"

mend()  # the one thing that happens at import: timm and open_clip import torchvision
