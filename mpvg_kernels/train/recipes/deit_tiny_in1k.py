"""deit_tiny_in1k: DeiT-Ti on ImageNet-1K, from scratch, 224 pixels, 300 epochs.

    mpvg train --recipe deit_tiny_in1k --data.root /data/imagenet
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe deit_tiny_in1k --data.root /data/imagenet

Hardware: 8 GPUs with 128 images each; on fewer, --dist.micro_batch 128 takes the same batch in parts. Time: not
measured. Accuracy (top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 72.14, lape 72.94,
pvg 73.17, mpvg 73.51.

The values are those of DeiT's script. It gives the scheduler the number of the epoch that has just ended, so that its
first learning rate lasts two epochs and every other comes an epoch late; here epoch e, from 0, has the curve's value at
e. The script ends after 300 epochs in spite of its ten of cool-down, and so does this. It averages the weights, but the
raw ones are reported. The paper names optimizer, learning rate, batch, epochs and warm-up; that the rest is DeiT's is
ours, and so is bf16 in place of fp16.
"""

from ..config import Aug, Config, Data, Loss, Model, Optim, Sched

config = Config(
    epochs=300,
    batch=1024,
    amp="bf16",
    model=Model(name="mpvg_deit_tiny_patch16_224", scheme="mpvg", drop_path_rate=0.1),
    data=Data(name="folder", crop_pct=0.875, interpolation="bicubic", workers=8),
    aug=Aug(
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        repeats=3,
        erase_prob=0.25,
        mixup=0.8,
        cutmix=1.0,
    ),
    optim=Optim(name="adamw", lr=5e-4, lr_base_batch=512, weight_decay=0.05, eps=1e-8, ema_decay=0.99996),
    sched=Sched(name="cosine", per="epoch", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5),
    loss=Loss(smoothing=0.1),
)
