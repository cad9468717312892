"""The meta-model: a backbone f with a base-class head g, scored by cosine to class prototypes.

Prototypes follow Snell et al. 2017 (arXiv 1703.05175). Dense scores, one per location of the query's feature map,
follow Hou et al. 2019 (arXiv 1910.07677).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import backbones
from models.class_learner import ClassLearner

FEATURES = ("pooled", "map")


def class_prototypes(features: Tensor, labels: Tensor, way: int) -> Tensor:
    """Return the L2-normalised mean feature of each class in each episode.

    Args:
        features: (E, S, D), float.
        labels: (E, S), int in [0, way).
        way: classes per episode.

    Returns:
        (E, way, D), of unit length.

    Raises:
        ValueError: wrong shapes. Labels are not checked, as a check would make every training step wait for the GPU.
    """
    _check_way(way)
    if features.ndim != 3 or labels.shape != features.shape[:2]:
        got = f"{tuple(features.shape)} with labels {tuple(labels.shape)}"
        raise ValueError(f"support features are {got}, expected (E, S, D) with labels (E, S): give each image a label")
    member = _members(labels, way).to(features.dtype)
    # The counts cancel in the normalisation, so the sum serves as the mean.
    with _full_precision(features):
        return F.normalize(member.transpose(1, 2) @ features, dim=-1)


def prototype_scores(
    support_embeddings: Tensor, support_labels: Tensor, query_embeddings: Tensor, way: int, scale: float
) -> Tensor:
    """Return the cosine of each query to each class prototype, times `scale`. Queries do not affect one another.

    Args:
        support_embeddings: (E, S, D), float; features, L2-normalised or not.
        support_labels: (E, S), int in [0, way).
        query_embeddings: (E, Q, D), float; features, L2-normalised or not.
        way: classes per episode.
        scale: factor of the cosine.

    Returns:
        (E, Q, way), in [-scale, scale].

    Raises:
        ValueError: wrong shapes, a label out of range, or a class without a support image.
    """
    prototypes = class_prototypes(support_embeddings, support_labels, way)
    member = _members(support_labels, way)
    if not bool(member.any(1).all() & member.any(2).all()):
        raise ValueError(
            f"support labels do not cover 0..{way - 1}: every class of an episode needs an image, no other"
        )
    if query_embeddings.ndim != 3 or query_embeddings.shape[::2] != support_embeddings.shape[::2]:
        got, expected = tuple(query_embeddings.shape), f"({len(prototypes)}, Q, {prototypes.shape[-1]})"
        raise ValueError(f"query embeddings are {got}, expected {expected}: embed both sides of the same episodes")
    with _full_precision(prototypes):
        return scale * F.normalize(query_embeddings, dim=-1) @ prototypes.transpose(1, 2)


class MetaModel(nn.Module):
    """Backbone `base` (f) and base-class head `classifier` (g).

    With "pooled" features, as in the paper, the feature map is averaged over locations, and g is a `ClassLearner`
    without time on unit-length features. With "map", the features are the whole feature map, and g is linear.

    Args:
        num_classes: C, base classes.
        scale_cls: factor of the cosine scores.
        backbone: a name of `backbones.BACKBONES`, or timm:NAME.
        features: "pooled" (D = channels) or "map" (D = channels * H' * W').
        image_size: side of the images in pixels; it sets the size of the feature map.
        drop_rate: share that DropBlock drops, in [0, 1); 0 for a backbone without DropBlock.
        generator: CPU generator of the initial weights; torch's global one if None.

    Raises:
        ValueError: unknown backbone or features, a setting out of range, or an image size the backbone cannot process.
    """

    def __init__(
        self,
        num_classes: int,
        scale_cls: float = 7,
        backbone: str = "conv4",
        *,
        features: str = "pooled",
        image_size: int = 32,
        drop_rate: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if features not in FEATURES:
            raise ValueError(f"features are '{features}', expected one of {', '.join(FEATURES)}: choose one of these")
        self.scale_cls = scale_cls
        self.features = features
        self.base = backbones.build(backbone, drop_rate=drop_rate, generator=generator)
        side = self.base.map_side(image_size)  # for pooled features too: timm backbones refuse a bad size here
        self.feature_dim = self.channels
        if features == "map":
            self.feature_dim *= side**2
            self.classifier = _linear(self.feature_dim, num_classes, generator)
        else:
            self.classifier = ClassLearner(num_classes, self.channels, generator=generator)

    @property
    def channels(self) -> int:
        """Channels of the feature map."""
        return self.base.feature_dim

    def maps(self, images: Tensor) -> Tensor:
        """Return the feature maps (N, channels, H', W'), float32, of images (N, 3, H, W) float in [-1, 1], RGB.

        In eval mode an image's map depends on no other image. Raises ValueError for images of another shape or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise ValueError(f"images are {got}, expected (N, 3, H, W) float in [-1, 1]: convert them to RGB floats")
        return self.base(images).float()

    def flat(self, maps: Tensor) -> Tensor:
        """Return the features (N, D) of maps (N, channels, H', W'): their means over locations, or all of them."""
        return maps.flatten(1) if self.features == "map" else maps.mean((-2, -1))

    def look(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images, before normalisation. Arguments and errors as for `maps`."""
        return self.flat(self.maps(images))

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images, scaled to unit length. Arguments and errors as for `maps`."""
        return F.normalize(self.look(images), dim=-1)

    def base_logits(self, maps: Tensor) -> Tensor:
        """Return g's logits (N, C), float32, of maps (N, channels, H', W')."""
        features = self.flat(maps)
        if self.features == "map":
            with _full_precision(features):
                return self.classifier(features)
        return self.classifier(F.normalize(features, dim=-1))

    def classify(self, images: Tensor) -> Tensor:
        """Return g's logits (N, C), float32, of images. Arguments and errors as for `maps`."""
        return self.base_logits(self.maps(images))

    def scores(self, support: Tensor, support_labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Return the cosine of query features to class prototypes, times `scale_cls`. Needs eval mode.

        Prototypes are means of the features *before* normalisation. With more than one shot, `prototype_scores` on the
        normalised output of `embed` differs a little.

        Args:
            support: (E, S, 3, H, W), float in [-1, 1].
            support_labels: (E, S), int in [0, way), each class at least once.
            query: (E, Q, 3, H, W), float in [-1, 1].
            way: classes per episode.

        Returns:
            (E, Q, way), float32.

        Raises:
            ValueError: train mode, wrong shapes or labels.
        """
        if self.training:
            raise ValueError("scores() got a model in train mode, expected eval mode: call eval() on the model first")
        _check_episodes(support, support_labels, query, way)
        support_features, query_features = (
            self.look(images.flatten(0, 1)).unflatten(0, images.shape[:2]) for images in (support, query)
        )
        return prototype_scores(support_features, support_labels, query_features, way, self.scale_cls)

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, way: int) -> tuple[Tensor, Tensor]:
        """Return both outputs that meta-training needs. In train mode, support and query share batch statistics.

        Args:
            support: (E, S, 3, H, W), float in [-1, 1].
            support_labels: (E, S), int in [0, way), each class at least once.
            query: (E, Q, 3, H, W), float in [-1, 1], at the size of the support images.
            way: classes per episode.

        Returns:
            Base-class logits of the queries (E * Q, C), and dense scores (E * Q, way, H', W'): the cosine of each
            location of a query's map to each prototype, times `scale_cls`. Both are float32, in the order of episodes.

        Raises:
            ValueError: wrong shapes. Labels are not checked, as in `class_prototypes`.
        """
        _check_episodes(support, support_labels, query, way)
        shots = support.shape[:2]
        maps = self.maps(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
        support_maps, query_maps = maps.split([shots.numel(), len(maps) - shots.numel()])
        logits = self.base_logits(query_maps)  # (E * Q, C)
        prototypes = class_prototypes(support_maps.mean((-2, -1)).unflatten(0, shots), support_labels, way)
        locations = F.normalize(query_maps, dim=1).unflatten(0, query.shape[:2])  # (E, Q, D, H', W')
        with _full_precision(maps):
            scores = self.scale_cls * torch.einsum("eqdhw,ekd->eqkhw", locations, prototypes)
        return logits, scores.flatten(0, 1)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a linear layer with weights and biases uniform in +-1 / sqrt(inputs)."""
    layer = nn.Linear(inputs, outputs)
    for part in (layer.weight, layer.bias):
        nn.init.uniform_(part, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def _full_precision(x: Tensor) -> torch.autocast:
    """Return a context that disables autocast: 16-bit products lose the digits in which cosines near 1 differ."""
    return torch.autocast(x.device.type, enabled=False)


def _members(labels: Tensor, way: int) -> Tensor:
    """Return labels (E, S) as one-hot (E, S, way), bool."""
    return labels[..., None] == torch.arange(way, device=labels.device)


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
