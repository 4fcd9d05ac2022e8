"""vit_lite_7_4_cifar100: ViT-Lite-7/4 on CIFAR-100, from scratch, 32 pixels, 310 epochs.

    mpvg train --recipe vit_lite_7_4_cifar100 --data.root /data/cifar --data.download
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe vit_lite_7_4_cifar100 --data.root /data/cifar

Hardware: one GPU; the batch of 128 is small for more. Time: not measured. Accuracy (top-1 %, reported by the paper, not
reproduced here), by --model.scheme: default 74.90, lape 75.52, pvg 76.67, mpvg 76.87.

The values are those of Compact-Transformers' config for CIFAR-100: a learning rate for each epoch, 300 of warm-up and
cosine and ten more at the least one; the position embedding is decayed (there the class token is as well, here it is
not). The paper names optimizer, learning rate, weight decay, batch, epochs and warm-up; that the rest is
Compact-Transformers' is ours, and so is bf16 in place of fp16.
"""

from ..config import Aug, Config, Data, Loss, Model, Optim, Sched

config = Config(
    epochs=300,
    batch=128,
    amp="bf16",
    model=Model(name="mpvg_vit_lite_7_4_32", scheme="mpvg", attn_drop_rate=0.1, drop_path_rate=0.1),
    data=Data(
        name="torch/cifar100",
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        crop_pct=1.0,
        interpolation="bicubic",
        workers=8,
    ),
    aug=Aug(
        scale=(0.8, 1.0),
        interpolation="random",
        auto_augment="rand-m9-mstd0.5-inc1",
        erase_prob=0.25,
        mixup=0.8,
        cutmix=1.0,
    ),
    optim=Optim(name="adamw", lr=6e-4, weight_decay=0.06, decay_pos_embed=True),
    sched=Sched(name="cosine", per="epoch", warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10),
    loss=Loss(smoothing=0.1),
)
