"""Small models for dense prediction, for their tests."""

import torch

from mpvg_kernels.models import create_dense

ADAPTER = {
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "deform_num_heads": 2,
    "conv_inplane": 8,
    "img_size": 64,
    "interaction_indexes": [[0, 1], [2, 3]],
}
HEADS = {
    "segmentation": {"width": 16, "aux_width": 8},
    "detection": {"width": 16, "box_width": 32, "rpn_samples": 64, "roi_samples": 64, "proposals": 100},
}
SCHEMES = ("default", "lape", "pvg", "mpvg")


def small(task, scheme="mpvg", head_args=None, **backbone_args):
    """A model for 5 classes on a small ViT-Adapter; no parameter of the adapter's is zero or one."""
    torch.manual_seed(0)
    model = create_dense(
        task,
        "mpvg_vit_adapter_tiny",
        5,
        backbone_args={"scheme": scheme, **ADAPTER, **backbone_args},
        head_args={**HEADS[task], **(head_args or {})},
    )
    for p in model.backbone.parameters():
        p.data.add_(torch.randn(p.shape) * 0.1)
    return model
