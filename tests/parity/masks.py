"""The masks against the published code's draws and choices: exact sets, similarities within 5e-6."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from amclip_ds.masks import MaskConfig, MaskInputs, centered, cluster, pgs, salience
from amclip_ds.masks.selection import pixels_of, select
from amclip_ds.objectives import occlusion
from tests.parity.numbers import ALONE, SIMILARITY, Images, Numbers, close, images_of, same


def kept(strategy: str, K: int, grid: int, options: Any = None, views: int = 1, **inputs: Tensor) -> Tensor:
    """What the product keeps of a grid's patches, [B, K]."""
    config = MaskConfig(strategy, keep_ratio=K / grid**2, unit=1)
    if options is not None:
        setattr(config, strategy, options)
    found = select(config, MaskInputs(grid, 1, views, **inputs))
    assert found is not None and found.shape[1] == K
    return found


def removed(keep: Tensor, size: int) -> Tensor:
    """[B, K] -> [B, size]: 1 for a patch that is not kept."""
    return torch.ones(keep.shape[0], size, dtype=torch.int64).scatter_(1, keep.long(), 0)


def side(noise: Tensor) -> int:
    return math.isqrt(noise.shape[1])


def check_flip(numbers: Numbers) -> None:
    for case, facts in numbers.cases.items():
        noise = numbers[f"{case}.noise"]
        keep = kept("random", facts["kept"], side(noise), noise=noise)
        same(keep, numbers[f"{case}.keep"], f"{case}.keep")
        same(removed(keep, noise.shape[1]), numbers[f"{case}.removed"], f"{case}.removed")


def check_centered(numbers: Numbers) -> None:
    for name in numbers.names("density."):
        close(centered.density(int(name.partition(".g")[2]), 0.2), numbers[name], name, atol=1e-12)
    for case, facts in numbers.cases.items():
        grid, K, noise = facts["grid"], facts["kept"], numbers[f"{case}.noise"]
        if case.startswith("plain"):
            same(kept("random", K, grid, noise=-noise), numbers[f"{case}.keep"], f"{case}.keep")
            continue
        same(kept("centered", K, grid, noise=noise), numbers[f"{case}.keep"], f"{case}.keep")
        if (name := f"{case}.keep_by_rank") in numbers:
            order = centered.priority(MaskInputs(grid, 1, 1, noise=noise), centered.Options()).argsort(descending=True)
            same(order[:, :K], numbers[name], name)


def check_centered_frequencies(numbers: Numbers) -> None:
    """Over 40,000 samples; ours are averaged over the square's eight symmetries, which the density has."""
    for case, K in (("g14_p50", 98), ("g14_p75", 49), ("g14_p918", 16)):
        close(_frequencies(K), numbers[f"keep_frequency.{case}"], f"keep_frequency.{case}", atol=0.01)


@cache
def _frequencies(K: int) -> Tensor:
    """[196]"""
    draw = torch.Generator().manual_seed(0)
    keep = kept("centered", K, 14, noise=torch.rand(40_000, 196, generator=draw))
    share = torch.bincount(keep.flatten(), minlength=196).reshape(14, 14) / 40_000
    turned = [torch.rot90(square, k) for square in (share, share.T) for k in range(4)]
    return torch.stack(turned).mean(0).flatten()


def check_images(numbers: Numbers) -> None:
    """Inputs of cluster and pgs: their patches' vectors, as the json says they are."""
    for name in numbers.names():
        x = numbers[name].float()
        side, patch = x.shape[-1] // numbers.meta["patch"], numbers.meta["patch"]
        first = x[0, :, :patch, patch : 2 * patch].permute(1, 2, 0).flatten()
        close(pixels_of(x, side)[0, 1], first, f"the second patch of {name}")


def check_cluster(numbers: Numbers) -> None:
    found = images_of(numbers)
    vectors = found["g6"].vectors
    close(vectors @ vectors.mT, numbers["g6.similarity"], "g6.similarity", atol=SIMILARITY)
    for case, facts in numbers.cases.items():
        if case != "planted":
            check_clusters(numbers, case, facts, found[case.partition("_")[0]])


def check_clusters(numbers: Numbers, case: str, facts: dict[str, Any], seen: Images) -> None:
    grid, U = facts["grid"], facts["grid"] ** 2
    draw, cut = numbers[f"{case}.anchor_noise"], numbers[f"{case}.cut_noise"]
    anchors = cluster.anchors(draw, facts["anchor_ratio"])
    same(anchors.sort(-1).values, numbers[f"{case}.anchors"].sort(-1).values, f"{case}.anchors")
    similarity = cluster.similarity_with(seen.vectors, numbers[f"{case}.anchors"].long())
    if (name := f"{case}.anchor_similarity") in numbers:
        close(similarity, numbers[name], name, atol=SIMILARITY)
    hidden = (similarity > facts["threshold"]).any(1)
    same(hidden, numbers[f"{case}.hidden"], f"{case}.hidden")

    def choose(rule: str, K: int) -> Tensor:
        options = cluster.Options(facts["anchor_ratio"], rule, facts["threshold"])
        return kept("cluster", K, grid, options, noise=draw, noise2=cut, pixels=seen.pixels)

    check_filled(numbers, case, facts, choose("fill", facts["K"]), hidden, cut)
    K = facts["K of the two fixed rules"]
    assert int(U * (1 - facts["min_mask_ratio"])) == K
    same(choose("fill", K), numbers[f"{case}.rule_fill.keep"], f"{case}.rule_fill.keep")
    gaps = facts["rule_topk: gap between the last kept and the first removed"]
    theirs, ours = numbers[f"{case}.rule_topk.keep"], choose("topk", K)
    for row in range(len(ours)):
        if gaps is None or gaps[row] > 1e-5:
            same(ours[row], theirs[row], f"{case}.rule_topk.keep of image {row}")


def check_filled(numbers: Numbers, case: str, facts: dict[str, Any], keep: Tensor, hidden: Tensor, cut: Tensor) -> None:
    """What the release keeps: every visible patch and then hidden ones, by the second draw; where more are visible than
    K, any K of them are right."""
    for row, determined in enumerate(facts["keep_is_determined"]):
        theirs = numbers[f"{case}.keep"][row]
        if determined:
            same(keep[row], theirs, f"{case}.keep of image {row}")
        else:
            for name, chosen in (("ours", keep[row]), ("theirs", theirs)):
                assert not hidden[row][chosen.long()].any(), f"{case}.keep of image {row}: {name} has a hidden patch"
    assert [int(row) for row in (~hidden).sum(-1)] == facts["visible"], f"{case}: visible patches"
    if (name := f"{case}.keep_order") in numbers:
        for row, visible in enumerate(facts["visible"]):
            order = numbers[name][row].long()
            same(order.sort().values, numbers[f"{case}.keep"][row].sort().values, f"{name} of image {row}")
            behind = order[min(visible, len(order)) :]
            assert hidden[row][behind].all() and (cut[row][behind].diff() > 0).all(), f"{name} of image {row}"
    visible = (~hidden).sum(-1)
    if (name := f"{case}.final_mask_ratio") in numbers:
        close(1 - visible.clamp(max=facts["K"]) / hidden.shape[1], numbers[name], name, atol=1e-6)
    if (name := f"{case}.bias_between_kept") in numbers:  # meant to hide the filled up ones; never used by the product
        shown = ~hidden.gather(1, numbers[f"{case}.keep_order"].long())
        shown = torch.cat([torch.ones_like(shown[:, :1]), shown], 1)
        same(shown[:, :, None] & shown[:, None], numbers[name], name)


def check_planted_cluster(numbers: Numbers) -> None:
    facts = numbers.cases["planted"]
    pixels = images_of(numbers)["g6"].pixels[:1]
    draw = numbers["planted.anchor_noise"]
    assert sorted(cluster.anchors(draw, 0.05)[0].tolist()) == facts["anchors"]
    keep = kept(
        "cluster",
        facts["K"],
        6,
        cluster.Options(0.05, "fill", facts["threshold"]),
        noise=draw,
        noise2=numbers["planted.cut_noise"],
        pixels=pixels,
    )
    same(keep, numbers["planted.keep"], "planted.keep")
    assert sorted(set(range(36)) - set(keep[0].tolist())) == facts["hidden"]


def check_pgs(numbers: Numbers) -> None:
    seen = images_of(numbers)["g6"]
    pixels, patches = seen.vectors, pgs.of_unit_length(numbers["embeddings"])
    everyone = torch.arange(36).expand(5, 36)
    for name, share in (("pixels", 0.0), ("embeddings", 1.0), ("e0", 0.0), ("e16", 0.5)):
        ours = pgs.mixed(pixels, patches, everyone, torch.tensor(share), "none")
        close(ours, numbers[f"{name}.similarity"], f"{name}.similarity", atol=SIMILARITY)
    close(pgs.edges(seen.pixels, 6, "means"), numbers["edges.patch_means"], "edges.patch_means", atol=1e-5)
    found = pgs.edges_of_image(seen.grey, 6)  # theirs is 2e-5 from fp64 where an image has next to no edges
    close(found, numbers["edges.pixels_inferred"], "edges.pixels_inferred", atol=5e-5)
    for case, facts in numbers.cases.items():
        check_pgs_case(
            numbers,
            case,
            facts,
            pgs.mixed(pixels, patches, everyone, torch.tensor(facts["weight of embeddings"]), "none"),
        )


def check_pgs_case(numbers: Numbers, case: str, facts: dict[str, Any], similarity: Tensor) -> None:
    """With edges the anchors are an input (the released map is rounding noise), with the released balancing the
    similarity is (its values are accident)."""
    draw, cut, anchors = numbers["anchor_noise"], numbers["cut_noise"], numbers[f"{case}.anchors"].long()
    if facts["edge"]:
        assert int(numbers["edges.release"].isfinite().all())
    else:
        same(cluster.anchors(draw, 0.05).sort(-1).values, anchors.sort(-1).values, f"{case}.anchors")
    if facts["sinkhorn"]:
        similarity = numbers[f"e{facts['epoch']}.similarity_plus_sinkhorn"]
    with_anchors = similarity.take_along_dim(anchors[..., None], 1)
    hidden = (with_anchors > 0.5).any(1)
    same(hidden, numbers[f"{case}.hidden"], f"{case}.hidden")
    priority = cluster.by_rule(pgs.Options(rule="fill"), with_anchors, cut)
    keep = priority.sort(descending=True, stable=True).indices[:, : facts["K"]].sort(-1).values
    check_filled(numbers, case, facts, keep, hidden, cut)


def check_pgs_whole(numbers: Numbers) -> None:
    """The strategy itself, where the release can be replayed: no edges, no balancing."""
    pixels = images_of(numbers)["g6"].pixels
    for case, facts in numbers.cases.items():
        if facts["edge"] or facts["sinkhorn"]:
            continue
        keep = kept(
            "pgs",
            facts["K"],
            6,
            pgs.Options(rule="fill", edges="none"),
            noise=numbers["anchor_noise"],
            noise2=numbers["cut_noise"],
            patches=numbers["embeddings"],
            pixels=pixels,
            progress=torch.tensor(facts["weight of embeddings"]),
        )
        check_filled(numbers, case, facts, keep, numbers[f"{case}.hidden"].bool(), numbers["cut_noise"])


def check_released_balance(numbers: Numbers) -> None:
    for name in ("positive", "balanced"):
        ours = pgs.released_balance(numbers[f"sinkhorn.{name}.in"])
        close(ours, numbers[f"sinkhorn.{name}.out"], f"sinkhorn.{name}.out", rtol=1e-4)
    sums = numbers["sinkhorn.positive.mean_sum_by_iteration"]
    values, ours = numbers["sinkhorn.positive.in"].double(), []
    for _ in range(50):
        ours.append(values.sum(-1).mean())
        values = values / (values.sum(-1, keepdim=True) + 1e-3) / (values.sum(-2, keepdim=True) + 1e-3)
    close(torch.stack(ours), sums, "sinkhorn.positive.mean_sum_by_iteration", rtol=1e-4)


def check_salience(numbers: Numbers) -> None:
    for case, facts in numbers.cases.items():
        tokens = numbers[f"{case}.tokens"]
        noise = numbers[f"{case}.noise"] if f"{case}.noise" in numbers else torch.zeros(tokens.shape[:2])
        N = tokens.shape[1]
        K = int((numbers[f"{case}.removed"][0] == 0).sum())
        keep = kept("salience", K, math.isqrt(N), noise=noise, patches=tokens)
        same(removed(keep, N), numbers[f"{case}.removed"], f"{case}.removed")
        if "kept" in facts:
            same(keep, numbers[f"{case}.keep"], f"{case}.keep")
            found = salience.salience(tokens)
            close(found, numbers[f"{case}.salience"], f"{case}.salience", atol=1e-4)
            unit = salience.from_0_to_1(found)
            close(unit, numbers[f"{case}.salience_unit"], f"{case}.salience_unit", atol=1e-5)


def check_disjoint(numbers: Numbers) -> None:
    for case, facts in numbers.cases.items():
        noise, K = numbers[f"{case}.noise"], facts["per view"]
        keep = kept("disjoint", K, side(noise), views=2, noise=torch.cat([noise, torch.rand_like(noise)]))
        for view, ours in enumerate(keep.chunk(2), start=1):
            same(ours, numbers[f"{case}.view{view}"].sort(-1).values, f"{case}.view{view}")


def check_occlusion(numbers: Numbers) -> None:
    features = numbers["loss.cls_features"].unflatten(0, (-1, 2)).transpose(0, 1)
    loss = occlusion.occlusion(features, 0.07, 1 / 64, ALONE)
    close(loss.reshape(1), numbers["loss.value"], "loss.value", rtol=1e-5)
    logits = occlusion.similarity(numbers["similarity.cosine"], 1 / 64) / 0.07
    close(logits, numbers["similarity.logit"], "similarity.logit", rtol=1e-6)
