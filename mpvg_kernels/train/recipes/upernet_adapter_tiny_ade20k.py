"""upernet_adapter_tiny_ade20k: ViT-Adapter-T with UperNet on ADE20K, crops of 512 pixels, 160,000 updates.

    mpvg train --recipe deit_tiny_in1k --data.root /data/imagenet --out runs/deit_tiny
    mpvg train --recipe upernet_adapter_tiny_ade20k --data.root /data/ade20k --model.weights runs/deit_tiny

On several GPUs, with --model.weights as above:

    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe upernet_adapter_tiny_ade20k --data.root /data/ade20k

The backbone starts from a classification run of the same scheme: --model.scheme is for both commands.

Hardware: 8 GPUs with one image each, whose batch norms take their statistics together, or one GPU with all 8 images.
Time: not measured.
Accuracy (mIoU %, reported by the paper, not reproduced here), by --model.scheme: default 40.55, lape 41.42, pvg 41.07,
mpvg 41.69.

The values are those of ViT-Adapter's upernet_deit_adapter_tiny_512_160k_ade20k: every update has its own learning rate,
1,500 of warm-up and a straight line down to 0, and each layer below the heads has 0.95 of the one above; whole images
are evaluated by windows of 512 pixels that slide by 341, every 16,000 updates. (In the warm-up the rate is at most
0.9 % above mmcv's, which multiplies the line by what rises.) The paper names optimizer, learning rate, weight decay,
batch, updates, warm-up and crop; that the rest is ViT-Adapter's is ours, also where the paper says cosine of all its
recipes, and so is bf16 in place of fp16. The batch is the paper's 8, ViT-Adapter has 16.
"""

from ..config import Adapter, Aug, Config, Data, Dist, Model, Optim, Sched, Segmentation

config = Config(
    task="segmentation",
    epochs=10,
    batch=8,
    amp="bf16",
    model=Model(name="mpvg_vit_adapter_tiny", scheme="mpvg", drop_path_rate=0.1, adapter=Adapter(pretrain_size=224)),
    data=Data(name="masks", img_size=(512, 512), epoch_updates=16_000, workers=8),
    aug=Aug(hflip=0.5),
    optim=Optim(name="adamw", lr=12e-5, weight_decay=0.01, betas=(0.9, 0.999), layer_decay=0.95),
    sched=Sched(name="poly", per="update", warmup_updates=1500, warmup_lr=12e-11, min_lr=0.0, decay_rate=1.0),
    segmentation=Segmentation(
        reduce_zero_label=True,
        short_side=512,
        long_side=2048,
        scale=(0.5, 2.0),
        cat_max_ratio=0.75,
        aux_weight=0.4,
        window=512,
        stride=341,
    ),
    dist=Dist(sync_bn=True),
)
