"""mask_rcnn_adapter_tiny_coco: ViT-Adapter-T with Mask R-CNN on COCO 2017, multi-scale images, 3x schedule (36 epochs).

    mpvg train --recipe deit_tiny_in1k --data.root /data/imagenet --out runs/deit_tiny
    mpvg train --recipe mask_rcnn_adapter_tiny_coco --data.root /data/coco --model.weights runs/deit_tiny

On several GPUs, with --model.weights as above:

    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe mask_rcnn_adapter_tiny_coco --data.root /data/coco

The backbone starts from a classification run of the same scheme: --model.scheme is for both commands. /data/coco has
annotations/instances_train2017.json and instances_val2017.json, train2017/ and val2017/.

Hardware: 8 GPUs with one image each, whose batch norms take their statistics together, or one GPU with all 8 images.
Time: not measured.
Accuracy (box AP / mask AP in %, reported by the paper, not reproduced here), by --model.scheme: default 45.9 / 41.0,
lape 46.2 / 41.2, pvg 46.1 / 41.2, mpvg 46.5 / 41.4.

The values are those of ViT-Adapter's mask_rcnn_deit_adapter_tiny_fpn_3x_coco: DETR's multi-scale augmentation, windows
of 14 x 14 tokens in all layers but 2, 5, 8 and 11, a learning rate that falls to a tenth at epochs 27 and 33. The paper
names optimizer, learning rate, weight decay, batch, epochs, multi-scale images and the 500 updates of warm-up (its
table says cosine of all of its recipes, while the 3x schedule has steps, as here); that the rest is ViT-Adapter's is
ours, and so is bf16 in place of fp16. The batch is the paper's 8, ViT-Adapter's 16.
"""

from ..config import Adapter, Aug, Config, Data, Detection, Dist, Model, Optim, Sched

config = Config(
    task="detection",
    epochs=36,
    batch=8,
    amp="bf16",
    model=Model(
        name="mpvg_vit_adapter_tiny",
        scheme="mpvg",
        drop_path_rate=0.1,
        adapter=Adapter(pretrain_size=224, window_size=14, global_layers=(2, 5, 8, 11), interactions=4),
    ),
    data=Data(name="coco", workers=8),
    aug=Aug(hflip=0.5),
    optim=Optim(name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
    sched=Sched(name="step", decay_at=(27, 33), decay_rate=0.1, warmup_updates=500, warmup_lr=1e-7),
    detection=Detection(
        short_sides=tuple(range(480, 801, 32)),
        max_side=1333,
        crop_prob=0.5,
        crop_short_sides=(400, 500, 600),
        crop_sides=(384, 600),
        final_crop=(1024, 1024),
        test_short_side=800,
        test_max_side=1333,
    ),
    dist=Dist(sync_bn=True),
)
