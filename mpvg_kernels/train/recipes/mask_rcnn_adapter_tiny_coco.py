"""mask_rcnn_adapter_tiny_coco: Mask R-CNN on a ViT-Adapter-Ti, COCO, 3x schedule (36 epochs) with multi-scale images.

    mpvg train --recipe mask_rcnn_adapter_tiny_coco --model.weights runs/deit_tiny --data.root /data/coco
    torchrun --nproc_per_node 8 -m mpvg_kernels train --recipe mask_rcnn_adapter_tiny_coco \\
        --model.weights runs/deit_tiny --data.root /data/coco

--model.weights must be given for the figures below: the run folder of deit_tiny_in1k trained with the same
--model.scheme, or any file of such a model's weights. --data.root has COCO 2017 as it is distributed:
annotations/instances_train2017.json and instances_val2017.json, train2017/ and val2017/.

Hardware: one GPU of 40 GB or eight smaller ones; --dist.micro_batch 2 takes the batch in parts. Time: not measured.
Accuracy (box AP / mask AP in %, reported by the paper, not reproduced here), by --model.scheme: default 45.9 / 41.0,
lape 46.2 / 41.2, pvg 46.1 / 41.2, mpvg 46.5 / 41.4.

The values are those of ViT-Adapter's Mask R-CNN configs in mmdetection, with the paper's batch of 8 (there 16): DETR's
multi-scale augmentation, attention in windows of 14 x 14 tokens but in the layers 2, 5, 8 and 11, AdamW without layer
decay, a learning rate that falls to a tenth at epochs 27 and 33.
"""

from ..config import Adapter, Config, Data, Model, Optim, Sched

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
    data=Data(name="coco", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), workers=8),
    optim=Optim(lr=1e-4, weight_decay=0.05),
    sched=Sched(name="step", decay_at=(27, 33), decay_rate=0.1, warmup_updates=500, warmup_lr=1e-7),
)
