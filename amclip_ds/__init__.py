"""amclip_ds: pre-trains CLIP with attentive token removal (A-CLIP) through DeepSpeed, from a laptop to a cluster."""

from amclip_ds.torchvision_mend import mend_when_imported

__version__ = "0.1.0"

mend_when_imported()  # the one thing that happens at import: timm and open_clip import torchvision
