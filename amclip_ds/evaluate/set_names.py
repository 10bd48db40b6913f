"""What is known of public sets by their names: their metrics. No torch."""

MAIN_METRIC = {  # CLIP's protocol: data set -> what is reported for it; else acc1
    "fgvc_aircraft": "mean_per_class_recall",
    "pets": "mean_per_class_recall",
    "caltech101": "mean_per_class_recall",
    "flowers": "mean_per_class_recall",
    "hateful_memes": "roc_auc",
}
GROUPED = {  # set -> (metric, the column of its metadata (.npy) that names the group, k): the worst group's top k
    "fmow": ("acc_worst_region", 0, 1),
    "dollar_street": ("acc_top5_wg", 0, 5),
    "geode": ("acc_wg", 0, 1),
}
"""As DataComp's evaluation defines them, on WILDS' groups; a group without images does not count."""


def known_name(name: str) -> str:
    """A set's own name, without what packagers put around it: `wds_vtab-cifar10_test` is `cifar10`."""
    bare = name.removeprefix("wds_").removesuffix("_test").replace("/", "-")
    for collection in ("vtab-", "wilds-", "fairness-", "retrieval-"):
        bare = bare.removeprefix(collection)
    return bare
