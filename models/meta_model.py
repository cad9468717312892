"""The meta-model: a backbone f with a base-class head g, scored by cosine to class prototypes.

Prototypes follow Snell et al. 2017 (arXiv 1703.05175); the dense scores, one a location of the query's map,
follow Hou et al. 2019 (arXiv 1910.07677).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.class_learner import ClassLearner
from models.conv4 import Conv4
from models.resnet12 import resnet12

BACKBONES = ("conv4", "resnet12")


def class_prototypes(features: Tensor, labels: Tensor, way: int) -> Tensor:
    """L2-normalised mean feature of each class of each episode.

    Args:
        features: (E, S, D), float.
        labels: (E, S), int in [0, way).
        way: classes an episode.

    Returns:
        (E, way, D), of unit length.

    Raises:
        ValueError: wrong shapes, a label out of range, or a class without an image.
    """
    _check_way(way)
    if features.ndim != 3 or labels.shape != features.shape[:2]:
        got = f"{tuple(features.shape)} with labels {tuple(labels.shape)}"
        raise ValueError(f"support features are {got}, expected (E, S, D) with labels (E, S): give each image a label")
    member = (labels[..., None] == torch.arange(way, device=labels.device)).to(features.dtype)  # (E, S, way)
    counts = member.sum(1)  # (E, way)
    if not bool(((counts > 0).all(1) & (counts.sum(1) == labels.shape[1])).all()):
        raise ValueError(
            f"support labels do not cover 0..{way - 1}: every class of an episode needs an image, no other"
        )
    # The counts cancel in the normalisation, so the sum serves as the mean.
    with _full_precision(features):
        return F.normalize(member.transpose(1, 2) @ features, dim=-1)


def prototype_scores(
    support_embeddings: Tensor, support_labels: Tensor, query_embeddings: Tensor, way: int, scale: float
) -> Tensor:
    """Cosine of each query to each class prototype, times a scale. A query's scores depend on no other query.

    Args:
        support_embeddings: (E, S, D), float; pooled features or their L2-normalised form.
        support_labels: (E, S), int in [0, way).
        query_embeddings: (E, Q, D), float; of any length.
        way: classes an episode.
        scale: of the cosine.

    Returns:
        (E, Q, way), in [-scale, scale].

    Raises:
        ValueError: wrong shapes, a label out of range, or a class without a support image.
    """
    prototypes = class_prototypes(support_embeddings, support_labels, way)
    if query_embeddings.ndim != 3 or query_embeddings.shape[::2] != support_embeddings.shape[::2]:
        got, expected = tuple(query_embeddings.shape), f"({len(prototypes)}, Q, {prototypes.shape[-1]})"
        raise ValueError(f"query embeddings are {got}, expected {expected}: embed both sides of the same episodes")
    with _full_precision(prototypes):
        return scale * F.normalize(query_embeddings, dim=-1) @ prototypes.transpose(1, 2)


def dense_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every location's scores with the image's label, averaged over locations and images.

    Args:
        scores: (N, way, H, W), float.
        labels: (N,) or (E, Q) with E * Q = N, int in [0, way).

    Returns:
        (), float, nats.

    Raises:
        ValueError: wrong shapes.
    """
    if scores.ndim != 4 or labels.numel() != len(scores):
        got = f"{tuple(scores.shape)} with {labels.numel()} labels"
        raise ValueError(f"dense scores are {got}, expected (N, way, H, W) with N labels: give each query a label")
    return F.cross_entropy(scores, labels.reshape(-1, 1, 1).expand(-1, *scores.shape[2:]))


class MetaModel(nn.Module):
    """Backbone `base` (f) and base-class head `classifier` (g, a `ClassLearner` used without time).

    Args:
        num_classes: C, base classes.
        scale_cls: factor of the cosine scores.
        backbone: "conv4" (D = 64) or "resnet12" (D = 512).
        drop_rate: of ResNet-12's DropBlock, in [0, 1).
        generator: CPU generator of the initial weights; torch's global one if None.

    Raises:
        ValueError: unknown backbone, or a setting out of range.
    """

    def __init__(
        self,
        num_classes: int,
        scale_cls: float = 7,
        backbone: str = "conv4",
        *,
        drop_rate: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone is '{backbone}', expected one of {', '.join(BACKBONES)}: choose one of these")
        if backbone == "conv4" and drop_rate:
            raise ValueError(f"drop_rate is {drop_rate} with conv4, expected 0: DropBlock is only in resnet12")
        self.scale_cls = scale_cls
        self.base = (
            Conv4(generator=generator) if backbone == "conv4" else resnet12(drop_rate=drop_rate, generator=generator)
        )
        self.classifier = ClassLearner(num_classes, self.base.feature_dim, generator=generator)

    @property
    def feature_dim(self) -> int:
        """D, the width of the features."""
        return self.base.feature_dim

    def pooled(self, images: Tensor) -> Tensor:
        """Backbone features averaged over locations, before normalisation: images (N, 3, H, W) -> (N, D), float32."""
        return self._maps(images).mean((-2, -1))

    def embed(self, images: Tensor) -> Tensor:
        """Pooled, L2-normalised features: the input of both heads.

        Args:
            images: (N, 3, H, W), float in [-1, 1], RGB.

        Returns:
            (N, D), float32, of unit length. In eval mode an image's row depends on no other image.

        Raises:
            ValueError: not float images of that shape.
        """
        return F.normalize(self.pooled(images), dim=-1)

    def scores(self, support: Tensor, support_labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Cosine of pooled query features to class prototypes, times `scale_cls`; needs eval mode.

        Prototypes are means of the pooled features *before* normalisation; `prototype_scores` on `embed`'s
        output, which has forgotten the lengths, differs a little for more than one shot.

        Args:
            support: (E, S, 3, H, W), float in [-1, 1].
            support_labels: (E, S), int in [0, way), each class at least once.
            query: (E, Q, 3, H, W), float in [-1, 1].
            way: classes an episode.

        Returns:
            (E, Q, way), float32.

        Raises:
            ValueError: train mode, wrong shapes or labels.
        """
        if self.training:
            raise ValueError("scores() got a model in train mode, expected eval mode: call eval() on the model first")
        _check_episodes(support, support_labels, query, way)
        support_features, query_features = (
            self.pooled(images.flatten(0, 1)).unflatten(0, images.shape[:2]) for images in (support, query)
        )
        return prototype_scores(support_features, support_labels, query_features, way, self.scale_cls)

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, way: int) -> tuple[Tensor, Tensor]:
        """Both outputs that meta-training needs; in train mode support and query share their batch statistics.

        Args:
            support: (E, S, 3, H, W), float in [-1, 1].
            support_labels: (E, S), int in [0, way), each class at least once.
            query: (E, Q, 3, H, W), float in [-1, 1], images of the support's size.
            way: classes an episode.

        Returns:
            Base-class logits of the queries (E * Q, C), and dense scores (E * Q, way, H', W'): the cosine of
            each location of a query's map to each prototype, times `scale_cls`. Both float32, episode by episode.

        Raises:
            ValueError: wrong shapes or labels.
        """
        _check_episodes(support, support_labels, query, way)
        shots = support.shape[:2]
        maps = self._maps(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
        support_maps, query_maps = maps.split([shots.numel(), len(maps) - shots.numel()])
        logits = self.classifier(F.normalize(query_maps.mean((-2, -1)), dim=-1))  # (E * Q, C)
        prototypes = class_prototypes(support_maps.mean((-2, -1)).unflatten(0, shots), support_labels, way)
        locations = F.normalize(query_maps, dim=1).unflatten(0, query.shape[:2])  # (E, Q, D, H', W')
        with _full_precision(maps):
            scores = self.scale_cls * torch.einsum("eqdhw,ekd->eqkhw", locations, prototypes)
        return logits, scores.flatten(0, 1)

    def _maps(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise ValueError(f"images are {got}, expected (N, 3, H, W) float in [-1, 1]: convert them to RGB floats")
        return self.base(images).float()


def _full_precision(x: Tensor) -> torch.autocast:
    """Cosines near 1 differ in digits that 16-bit products lose."""
    return torch.autocast(x.device.type, enabled=False)


def _check_way(way: int) -> None:
    if way < 2:
        raise ValueError(f"way is {way}, expected at least 2: an episode needs classes to tell apart")


def _check_episodes(support: Tensor, labels: Tensor, query: Tensor, way: int) -> None:
    _check_way(way)
    if support.ndim != 5 or query.ndim != 5 or len(support) != len(query) or support.shape[2:] != query.shape[2:]:
        got = f"support {tuple(support.shape)} and query {tuple(query.shape)}"
        raise ValueError(f"{got}, expected (E, S, 3, H, W) and (E, Q, 3, H, W): stack the same episodes at one size")
    if labels.shape != support.shape[:2]:
        got, expected = tuple(labels.shape), tuple(support.shape[:2])
        raise ValueError(f"support labels are {got}, expected {expected}: give each support image a label")
