"""ceit_tiny_in1k: CeiT-T on ImageNet-1K, from scratch, 224 pixels, 300 epochs.

    mpvg train --recipe ceit_tiny_in1k --data.root /data/imagenet
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe ceit_tiny_in1k --data.root /data/imagenet

Hardware: 8 GPUs with 128 images each; on fewer, --dist.micro_batch 128 takes the same batch in parts. Time: not
measured. Accuracy (top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 76.62, lape 76.89,
pvg 77.14, mpvg 77.20.

All but the model is deit_tiny_in1k's: CeiT's script is DeiT's with the same values. It trains on 4 GPUs with 256 images
each, over which its batch norms take their statistics; here that is what a device takes at once, or all of them with
--dist.sync_bn. What the pooled schemes leave out of CeiT is ours, see docs/models.md.
"""

import dataclasses

from . import deit_tiny_in1k

config = dataclasses.replace(
    deit_tiny_in1k.config, model=dataclasses.replace(deit_tiny_in1k.config.model, name="mpvg_ceit_tiny_patch16_224")
)
