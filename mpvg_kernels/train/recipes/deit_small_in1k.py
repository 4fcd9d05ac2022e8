"""deit_small_in1k: DeiT-S on ImageNet-1K, from scratch, 224 pixels, 300 epochs.

    mpvg train --recipe deit_small_in1k --data.root /data/imagenet
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe deit_small_in1k --data.root /data/imagenet

Hardware: 8 GPUs with 128 images each; on fewer, --dist.micro_batch 128 takes the same batch in parts. Time: not
measured. Accuracy (top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 79.81, lape 80.39,
pvg 80.38, mpvg 80.61.

All but the model is deit_tiny_in1k's, as in DeiT's script and, where it says so, in the paper.
"""

import dataclasses

from . import deit_tiny_in1k

config = dataclasses.replace(
    deit_tiny_in1k.config, model=dataclasses.replace(deit_tiny_in1k.config.model, name="mpvg_deit_small_patch16_224")
)
