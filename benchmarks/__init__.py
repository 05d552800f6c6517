"""Measurements of speed and memory, each a module with ``run(quick) -> rows``; see ``python -m benchmarks``."""

NAMES: dict[str, str] = {
    "limits": "what this machine can do at most: matrix products, copies, exponentials",
    "loss": "the item loss: fused tiles against stored logits with pairwise KD",
    "roofline": "the item loss on an H100, estimated from bytes and products on shapes alone",
    "step": "a whole training step against the method as the paper writes it, terms switched on one by one",
    "step_wide": "the same at d = 256, terms together",
    "members": "cost of n members, backend by backend",
    "scaling": "a step over catalogue, views, length and batch",
    "memory": "peak memory of the loss and of a step",
    "evaluate": "ranking every user over the whole catalogue, against sorting",
    "serving": "answering requests: ensemble, one network, FAISS, ONNX Runtime",
    "threads": "small requests of 1, 2, 4 and 8 threads on one model",
    "epoch": "seconds of an epoch of the paper's Beauty recipe",
    "stream": "training from 10 million interactions on disk: memory and steps",
    "precision": "the precision that auto chooses, beside real epochs in both, also with AVX2 alone",
    "grow": "a model grown by new items and trained on the newest data, against training from scratch",
}
