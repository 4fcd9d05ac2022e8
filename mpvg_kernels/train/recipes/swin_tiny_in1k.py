"""swin_tiny_in1k: Swin-T on ImageNet-1K, from scratch, 224 pixels, 300 epochs.

    mpvg train --recipe swin_tiny_in1k --data.root /data/imagenet
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe swin_tiny_in1k --data.root /data/imagenet

Hardware: 8 GPUs with 128 images each; on fewer, --dist.micro_batch 128 takes the same batch in parts. Time: not
measured. Accuracy (top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 81.37, lape 81.48,
pvg 81.52, mpvg 81.64.

The values are those of Swin's config: every learning rate is for a batch of 512 and scaled to 1e-3 at the peak, the
warm-up comes before the cosine, which takes the other 280 epochs, and both change at every update. The default too has
the learned absolute position embedding. The paper names optimizer, learning rate, batch, epochs and warm-up; that the
rest is Swin's is ours, and so is bf16 in place of fp16.
"""

from ..config import Aug, Config, Data, Loss, Model, Optim, Sched

config = Config(
    epochs=300,
    batch=1024,
    amp="bf16",
    model=Model(name="mpvg_swin_tiny_patch4_window7_224", scheme="mpvg", drop_path_rate=0.2),
    data=Data(name="folder", crop_pct=0.875, interpolation="bicubic", workers=8),
    aug=Aug(
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        erase_prob=0.25,
        mixup=0.8,
        cutmix=1.0,
    ),
    optim=Optim(
        name="adamw", lr=5e-4, lr_base_batch=512, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, clip_grad=5.0
    ),
    sched=Sched(
        name="cosine",
        per="update",
        warmup_epochs=20,
        warmup_prefix=True,
        warmup_lr=5e-7,
        min_lr=5e-6,
        scale_with_batch=True,
    ),
    loss=Loss(smoothing=0.1),
)
