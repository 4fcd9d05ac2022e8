"""t2t_vit_7_cifar100: fine-tunes a T2T-ViT-7 of ImageNet-1K on CIFAR-100, 224 pixels, 60 epochs.

    mpvg train --recipe t2t_vit_7_cifar100 --model.weights runs/T2T --data.root /data/cifar --data.download
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe t2t_vit_7_cifar100 --model.weights runs/T2T \\
        --data.root /data/cifar

--model.weights must be given: the run folder of t2t_vit_7_in1k (its last weights; runs/T2T/ema for the averaged ones),
or any file of this model's weights.

Hardware: one GPU; on a small one, --dist.micro_batch 32 takes the same batch in parts. Time: not measured. Accuracy
(top-1 %, reported by the paper, not reproduced here), by --model.scheme: default 83.22, lape 83.41, pvg 83.39, mpvg
83.51.

The values are those of T2T-ViT's transfer script, with the paper's learning rate, batch and epochs: SGD whose learning
rate falls epoch by epoch to 2e-4, from 5e-2 for the head and from a hundredth of it for the rest. The paper says AdamW,
and gives values that are those of the script's SGD: SGD is ours. So is it that the last norm trains, which the script
leaves out of its optimizer by mistake, and that biases and norms are not decayed, which the script does.
"""

from ..config import Aug, Config, Data, Model, Optim, Sched

config = Config(
    epochs=60,
    batch=128,
    model=Model(name="mpvg_t2t_vit_7_224", scheme="mpvg", drop_path_rate=0.1),
    data=Data(
        name="torch/cifar100",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        crop_pct=1.0,
        interpolation="bilinear",
        workers=8,
    ),
    aug=Aug(crop="padded", padding=28, interpolation="bilinear", color_jitter=0.0),
    optim=Optim(name="momentum", lr=5e-2, momentum=0.9, weight_decay=5e-4, backbone_lr_scale=0.01),
    sched=Sched(name="cosine", per="epoch", warmup_epochs=0, min_lr=2e-4),
)
