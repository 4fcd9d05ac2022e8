"""t2t_vit_7_in1k: T2T-ViT-7 on ImageNet-1K, from scratch, 224 pixels, 310 epochs.

    mpvg train --recipe t2t_vit_7_in1k --data.root /data/imagenet
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe t2t_vit_7_in1k --data.root /data/imagenet

Hardware: 8 GPUs with 64 images each; on fewer, --dist.micro_batch 64 takes the same batch in parts. Time: not measured.
Accuracy (top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 71.76, lape 72.01, pvg 71.91,
mpvg 72.28.

The values are those of T2T-ViT's script and of its command line for 8 GPUs: a learning rate for each epoch, 300 of
warm-up and cosine and ten more at the least one; training images resized by bilinear or bicubic filters at random. The
script picks its best epoch by the averaged weights. The paper names optimizer, learning rate, weight decay, batch,
epochs and warm-up; that the rest is T2T-ViT's is ours, and so is bf16 in place of fp16 (attention in the T2T module
stays in fp32).
"""

from ..config import Aug, Config, Data, Loss, Model, Optim, Sched

config = Config(
    epochs=300,
    batch=512,
    amp="bf16",
    model=Model(name="mpvg_t2t_vit_7_224", scheme="mpvg", drop_path_rate=0.1),
    data=Data(name="folder", crop_pct=0.9, interpolation="bicubic", workers=8),
    aug=Aug(
        interpolation="random",
        auto_augment="rand-m9-mstd0.5-inc1",
        erase_prob=0.25,
        mixup=0.8,
        cutmix=1.0,
    ),
    optim=Optim(name="adamw", lr=1e-3, weight_decay=0.03, ema_decay=0.99996),
    sched=Sched(name="cosine", per="epoch", warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10),
    loss=Loss(smoothing=0.1),
)
