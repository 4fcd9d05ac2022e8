"""deit_base_in1k: DeiT-B on ImageNet-1K, from scratch, 224 pixels, 300 epochs.

    mpvg train --recipe deit_base_in1k --data.root /data/imagenet
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe deit_base_in1k --data.root /data/imagenet

Hardware: 8 GPUs with 128 images each; on fewer, --dist.micro_batch 128 takes the same batch in parts. Time: not
measured. Accuracy (top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 81.85, lape 82.15,
pvg 82.21, mpvg 82.42.

All but the model is deit_tiny_in1k's, as in DeiT's script and, where it says so, in the paper.
"""

import dataclasses

from . import deit_tiny_in1k

config = dataclasses.replace(
    deit_tiny_in1k.config, model=dataclasses.replace(deit_tiny_in1k.config.model, name="mpvg_deit_base_patch16_224")
)
