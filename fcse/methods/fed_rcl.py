"""FedRCL: clients train apart, held together by contrast within and between classes.

Source: Seo et al., CVPR 2024 (arXiv 2401.04928), with their code (github.com/skynbe/FedRCL). Their
clients hold other classes, so that weights drift apart. Beside its loss each contrasts samples by
class, against the drift, and penalises those of a class that grow too alike, against collapse, at
several layers. A round ends with the mean of all clients' weights.

In their code a sample's contrast is InfoNCE of the least similar of its class against the two most
similar of others; the penalty is log(1 + e^((s - 1) / tau)) at that s, where it reaches 0.7. The
form "paper" is equation 5, as code of others has it: each of the class against all samples, and
s / tau for those above 0.7, which at equal weights cancels their pull. There it is a sum over the
class, here the mean. Where this differs from the authors:
- They classify images. Here the objective is in place of the cross-entropy, both views are samples,
  and classes are articles, clusters, or sentences, whose pull on the other view is then penalised.
- Levels are the last layer and some below, after the head. Theirs: five of a ResNet, before it.
- All clients join each round; theirs are 5 of 100, all of one size.
- A client trains as every run here: AdamW and other methods begin anew in each round, the rate
  falls to 0 within it. They take SGD at an even rate. Both multiply it by 0.998 a round."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fcse.data import load_corpus, load_wiki_articles, spread, text_hash
from fcse.errors import InputError, replacing
from fcse.methods import Comparison, Method, Moments, Start
from fcse.methods.ifnd import pseudo_labels
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["code", "paper"]
Classes = Literal["articles", "clusters", "identity"]

TEMPERATURE, DECAY = 0.05, 0.998


@dataclass(frozen=True)
class FedRCL(Method):
    """Settings of FedRCL (Seo et al. 2024)."""

    clients: int = 4
    """Clients, each with sentences of its own, >= 1."""
    rounds: int = 4
    """Rounds that the steps of each client are parted into; 0: one run, with the two terms."""
    alpha: float = 0.3
    """Of the Dirichlet draws that deal classes to clients, >= 0.001; larger: more evenly."""
    contrast: float = 1.0
    """Weight of the contrast beside the loss, >= 0."""
    penalty: float = 1.0
    """Weight of the penalty, >= 0; the paper's beta."""
    form: Form = "code"
    """Both terms as in the authors' code, or their paper."""
    threshold: float = 0.7
    """Cosine from which on the penalty counts, >= -1."""
    layers: int = 2
    """Layers below the last that count too, >= 0."""
    classes: Classes = "articles"
    """articles, of wiki-mini alone; clusters, anew in each client's run; identity: sentences."""
    clusters: int = 100
    """Clusters of a corpus, >= 2, no more than sentences; a client makes its share of them."""

    label = "FedRCL"
    switches = ("rounds", "contrast", "penalty")

    def __post_init__(self) -> None:
        least = {"clients": 1, "rounds": 0, "alpha": 1e-3, "contrast": 0, "penalty": 0}
        for name, x in (least | {"threshold": -1, "layers": 0, "clusters": 2}).items():
            require(f"fed_rcl.{name}", getattr(self, name), x, below=1e6)
        for name, choices in {"form": get_args(Form), "classes": get_args(Classes)}.items():
            if (chosen := getattr(self, name)) not in choices:
                said = f"choose from {', '.join(choices)}"
                raise InputError(f"unknown fed_rcl.{name} {chosen!r}: {said}")

    def check(self, config: Any) -> None:
        """Raise InputError for more rounds than steps, or where another method names the start."""
        if self.rounds > config.steps:
            raise InputError(f"fed_rcl.rounds must be at most steps, {config.steps}: lower it")
        if self.rounds > 1 and any(x.starts_from is not None for x in config.methods):
            raise InputError("fed_rcl starts a round from the mean: set fed_rcl.rounds to 1")

    def begin(self, start: Start) -> Moments:
        """Find the classes; InputError: see `labels`."""
        labels = self.labels(start.config, start.encoder)
        return _Relaxed(self, labels) if self.contrast or self.penalty else Moments()

    def labels(self, config: Any, encoder: Any) -> np.ndarray:
        """Classes of the corpus' n sentences, (n,) integers; InputError: none, or layers lack."""
        if self.layers > (most := encoder.backbone.config.num_hidden_layers - 1):
            raise InputError(f"fed_rcl.layers must be at most {most}, got {self.layers}")
        sentences = load_corpus(config.corpus)
        if self.classes == "clusters":
            count = min(self.clusters, len(sentences))
            return pseudo_labels(encoder.encode(sentences), count, 1.0, config.seed)
        if self.classes == "identity":
            return np.unique(sentences, return_inverse=True)[1]
        of = {x: i for i, every in enumerate(load_wiki_articles().values()) for x in every}
        if not of.keys() >= {*sentences}:
            said = f"{config.corpus} has sentences that are in no article of wiki-mini"
            raise InputError(f"{said}: set fed_rcl.classes to clusters")
        return np.array([of[x] for x in sentences])

    def shares(self, config: Any, encoder: Any) -> list[list[str]]:
        """Each client's sentences, as the corpus has them; InputError: fewer than a batch."""
        labels, sentences = self.labels(config, encoder), load_corpus(config.corpus)
        if self.clients > (most := len(np.unique(labels))):
            raise InputError(f"fed_rcl.clients must be at most {most}, the classes: lower it")
        holders = partition(labels, self.clients, self.alpha, config.seed)
        rows = [np.flatnonzero(holders == client) for client in range(self.clients)]
        if (fewest := min(map(len, rows))) < config.batch_size:
            said = f"fed_rcl deals a client {fewest} sentences, fewer than batch_size"
            raise InputError(f"{said}: lower it or fed_rcl.clients, or raise fed_rcl.alpha")
        return [[" ".join(sentences[row].split("\n")) for row in each] for each in rows]

    def of_client(self, config: Any, number: int, client: int, place: Path) -> Any:
        """The config of a client's run in a round, both counted from 1.

        place: has its sentences, and from the second round on the encoder that it starts from."""
        part = replace(self, rounds=0, clients=1, clusters=max(2, self.clusters // self.clients))
        begun, end = (config.steps * x // self.rounds for x in (number - 1, number))
        start, seed = config.encoder, config.seed  # which makes the head that all have in common
        if number > 1:
            start = str(place / "server")
            seed = int(np.random.default_rng((7, seed, number, client)).integers(2**32))
        changed = {
            "encoder": start,
            "corpus": str(place / f"{client}.txt"),
            "output": str(place / f"round-{number}" / str(client)),
            "methods": tuple(part if x.key == self.key else x for x in config.methods),
            "learning_rate": config.learning_rate * DECAY ** (number - 1),
        }
        usual = {"metric": "last", "checkpoints": False}
        return replace(config, steps=end - begun, seed=seed, **usual, **changed)

    def whole(self, config: Any, train: Any, folder: Any, callback: Any, score: Any) -> bool:
        """Train in rounds: a simulation, in which clients take turns on one machine.

        It goes on after the last round that ended, and takes over clients' runs that did. Scores
        are of the mean, losses means over clients, whose steps are all called back. InputError: see
        `shares`, several processes, or what a client's run raises."""
        from fcse import processes
        from fcse.encoder.sentence_encoder import SentenceEncoder, weights_hash

        if processes.world().num_processes > 1:
            raise InputError("fed_rcl trains in one process: start it without accelerate launch")
        if not self.rounds:
            return False
        server = SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed)
        server.to(processes.world().device)
        first, sentences = weights_hash(server.backbone), load_corpus(config.corpus)
        shares, sample = self.shares(config, server), spread(sentences, min(512, len(sentences)))
        by = "step" if config.metric == "last" else config.metric
        said = f"fed_rcl is a simulation: {self.clients} clients take turns on one machine"

        def log(step: int, **found: float) -> None:
            found["effective_rank"] = effective_rank(server.encode(sample, normalize=True))
            folder.log(step=step, **score(server), **{f"fed_rcl.{k}": x for k, x in found.items()})

        def best() -> dict[str, float]:
            scored = reversed(folder.metrics()[1][1:])
            return max(scored, key=lambda scores: (scores[by] == scores[by], scores[by]))

        folder.claim()
        if folder.record() is not None:
            return True  # by whom we waited for
        print(f"{config.run_name}: {said}", file=sys.stderr)
        state, place, step, records = folder.start(), folder.path / "clients", 0, []
        if state is None:
            log(0)
        else:
            server.load_state_dict(state.tensors)
            step, records = state.step, state.facts["records"]
        place.mkdir(exist_ok=True)
        for client, share in enumerate(shares, 1):
            (place / f"{client}.txt").write_text("\n".join(share), encoding="utf-8")
        for number in range(1 + len(records) // self.clients, self.rounds + 1):
            before = {name: x.detach().cpu().clone() for name, x in server.state_dict().items()}
            if number > 1:
                with replacing(place / "server") as new:
                    server.save_pretrained(new)
            later = callback and (lambda i, encoder, begun=step: callback(begun + i, encoder))
            clients = range(1, self.clients + 1)
            runs = [train(self.of_client(config, number, x, place), later) for x in clients]
            sent = [run.encoder.state_dict() for run in runs]
            mean = mean_weights(sent)
            server.load_state_dict(mean)
            for losses in zip(*(run.losses for run in runs), strict=True):
                step += 1
                folder.log(step=step, loss=sum(losses) / len(losses))
            size = sum(x.nbytes for x in mean.values())
            log(step, **drift(before, sent), bytes_sent=2 * self.clients * size)
            if best()["step"] == step:
                folder.keep(server)
            if config.checkpoints and number < self.rounds:
                folder.keep_checkpoint(step, server)
            records += [run.record for run in runs]
            folder.keep_state(SimpleNamespace(step=step, tensors=mean, facts={"records": records}))
            shutil.rmtree(place / f"round-{number}")
        shutil.rmtree(place)
        kept = best()
        folder.finish(
            **{x: records[0][x] for x in ("device", "hardware", "precision", "processes")},
            **{x: sum(each[x] for each in records) for x in ("wall_time_s", "masked_pairs")},
            kept_step=kept["step"],
            scores={name: x for name, x in kept.items() if name != "step" and "." not in name},
            corpus={"sentences": len(sentences), "sha256": text_hash(sentences)},
            remarks=[said, *dict.fromkeys(x for each in records for x in each["remarks"])],
            weights={"first": first, "last": weights_hash(server.backbone)},
            clients=[len(share) for share in shares],
        )
        return True


class _Relaxed(Moments):
    def __init__(self, settings: FedRCL, known: np.ndarray) -> None:
        self.settings, self.layers, self.known = settings, settings.layers, known

    def beside(self, compared: Comparison) -> "Tensor":
        import torch

        from fcse.losses import similarity_matrix

        size, settings = compared.batch.size, self.settings
        levels = [torch.cat([compared.u, compared.v[:size]])]
        if self.layers:  # another method may have asked for more
            lower = compared.lower.unflatten(1, (2, -1))[:, :, : self.layers]
            levels += [*lower.permute(2, 1, 0, 3).flatten(1, 2)]
        labels = self.known[compared.batch.sentences.rows[:size].astype(np.int64)]
        of = torch.from_numpy(labels).repeat(2).to(compared.v.device)
        with torch.autocast(of.device.type, enabled=False):
            sims = [similarity_matrix(x, x) for x in levels]
            found = [terms(sim, of, settings.form, settings.threshold) for sim in sims]
            return sum(settings.contrast * c + settings.penalty * p for c, p in found) / len(sims)


def terms(
    sim: "Tensor", labels: "Tensor", form: Form = "code", threshold: float = 0.7
) -> "tuple[Tensor, Tensor]":
    """Contrast and penalty of S samples, () each: (S, S) float cosines, (S,) classes."""
    import torch

    same = labels[:, None] == labels
    others = same & ~torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    z = sim / TEMPERATURE
    if form == "code":
        far = z.masked_fill(~same, torch.inf).min(dim=1, keepdim=True).values  # alone: itself
        near = z.masked_fill(same, -torch.inf).topk(min(2, len(z)), dim=1).values
        contrast = torch.cat([far, near], dim=1).logsumexp(dim=1, keepdim=True) - far
        s = sim.masked_fill(~others, torch.inf).min(dim=1).values
        s = s.where((s >= threshold) & s.isfinite(), -1)
        return contrast.mean(), torch.nn.functional.softplus((s - 1) / TEMPERATURE).mean()
    share = others / others.sum(dim=1, keepdim=True).clamp_min(1) / len(sim)
    total = z.masked_fill(same ^ others, -torch.inf).logsumexp(dim=1, keepdim=True)
    return (share * (total - z)).sum(), (share * (sim > threshold) * z).sum()


def partition(labels: np.ndarray, clients: int, alpha: float, seed: int) -> np.ndarray:
    """The client, from 0, of each sentence, (n,) integers, by its class, (n,), and the seed.

    A class' Dirichlet draw is the probabilities with which each of its sentences goes where."""
    generator = np.random.default_rng((6, seed))
    classes, of = np.unique(labels, return_inverse=True)
    bounds = generator.dirichlet(np.full(clients, alpha), len(classes)).cumsum(axis=1)
    return (generator.random(len(of))[:, None] >= bounds[of, :-1]).sum(axis=1)


def mean_weights(sent: "list[dict[str, Tensor]]") -> "dict[str, Tensor]":
    """The mean of what clients sent, head and buffers too, each client alike, in float64."""
    import torch

    stacked = {name: torch.stack([each[name] for each in sent]) for name in sent[0]}
    return {name: x.double().mean(dim=0).to(x.dtype) for name, x in stacked.items()}


def drift(before: "dict[str, Tensor]", sent: "list[dict[str, Tensor]]") -> dict[str, float]:
    """The mean norm of clients' updates, and the mean cosine of two of them, 0 where one is all."""
    import torch

    moved = ([(each[name] - x).flatten().double() for each in sent] for name, x in before.items())
    products = sum(torch.stack(part) @ torch.stack(part).T for part in moved)
    norms = products.diagonal().sqrt()
    pairs = max(1, len(sent) * (len(sent) - 1) / 2)
    cosine = (products / norms / norms[:, None]).triu(1).sum() / pairs
    return {"drift_norm": norms.mean().item(), "drift_cosine": cosine.item()}


def effective_rank(x: np.ndarray) -> float:
    """1 to min(n, D): e to the entropy of the singular values' shares (Roy & Vetterli 2007)."""
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-shares @ np.log(shares)))
