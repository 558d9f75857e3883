"""FedRCL: clients train apart, held together by contrast within and between classes.

Source: Seo et al., CVPR 2024 (arXiv 2401.04928), with their code (github.com/skynbe/FedRCL).
Clients hold other classes and drift apart; against that each contrasts samples by class beside its
loss, and penalises those of a class that grow too alike, at several layers. A round ends with the
mean of all weights. In their code a sample's contrast is InfoNCE of the least similar of its class
against the two most similar of others; the penalty is log(1 + e^((s - 1) / tau)) at that s, from
0.7 on. The form "paper" is equation 5 as others' code has it: each of the class against all, and
s / tau for those above 0.7, which at equal weights cancels their pull. What differs:
- They classify images. Here the objective is in place of the cross-entropy, both views are samples,
  and classes are articles, clusters, or sentences, whose pull on the other view is then penalised.
- Levels are the last layer and some below, after the head. Theirs: five of a ResNet, before it.
- Equation 5 sums over a class, here is the mean. Of their 100 clients of one size 5 join a round.
- A client trains as any run here: AdamW and other methods begin anew in a round, the rate falls to
  0 within it. They take SGD at an even rate. In both it is multiplied by 0.998 a round."""

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

TEMPERATURE, DECAY, CLUSTERS = 0.05, 0.998, 25


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
    levels: int = 2
    """Layers below the last that count too, >= 0."""
    classes: Classes = "articles"
    """articles, of wiki-mini; clusters, 25 a client, anew in each run; identity: sentences."""

    label = "FedRCL"
    switches = ("rounds", "contrast", "penalty")

    def __post_init__(self) -> None:
        least = {"clients": 1, "rounds": 0, "alpha": 1e-3, "contrast": 0, "penalty": 0}
        for name, x in (least | {"threshold": -1, "levels": 0}).items():
            require(f"fed_rcl.{name}", getattr(self, name), x, below=1e6)
        for name, choices in {"form": get_args(Form), "classes": get_args(Classes)}.items():
            if getattr(self, name) not in choices:
                raise InputError(f"fed_rcl.{name} must be {' or '.join(choices)}")

    def check(self, config: Any) -> None:
        """Raise InputError for more rounds than steps, or another method's head or start."""
        if self.rounds > config.steps:
            raise InputError(f"fed_rcl.rounds must be at most steps, {config.steps}: lower it")
        if self.rounds and any(getattr(x, "batch_norm", False) for x in config.methods):
            raise InputError("fed_rcl averages plain heads: set diffcse.batch_norm to false")
        if self.rounds > 1 and any(x.starts_from is not None for x in config.methods):
            raise InputError("fed_rcl starts a round from the mean: set fed_rcl.rounds to 1")

    def begin(self, start: Start) -> Moments:
        """Find the classes; InputError: see `labels`."""
        return _Relaxed(self, self.labels(start.config, start.encoder))

    def labels(self, config: Any, encoder: Any) -> np.ndarray:
        """Classes of the corpus' n sentences, (n,) integers; InputError: none, or layers lack."""
        if self.levels > (most := encoder.backbone.config.num_hidden_layers - 1):
            raise InputError(f"fed_rcl.levels must be at most {most}, got {self.levels}")
        sentences = load_corpus(config.corpus)
        if self.classes == "clusters":
            most = min(CLUSTERS * self.clients, len(sentences))
            return pseudo_labels(encoder.encode(sentences), most, 1.0, config.seed)
        articles = load_wiki_articles().values() if self.classes == "articles" else zip(sentences)
        of = {x: i for i, article in enumerate(articles) for x in article}
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
        """The config of a round's run, from 1, of a client, from 0, whose text is in a folder."""
        own = replace(self, rounds=0, clients=1)
        on = tuple(own if x.key == self.key else x for x in config.methods)
        begun, end = (config.steps * x // self.rounds for x in (number - 1, number))
        rate = config.learning_rate * DECAY ** (number - 1)
        start, seed = config.encoder, config.seed  # which makes the head that all have in common
        if number > 1:
            start = str(place / "server")
            seed = int(np.random.default_rng((7, seed, number, client)).integers(2**32))
        text, output = place / f"{client}.txt", place / f"round-{number}" / str(client)
        where = {"encoder": start, "corpus": str(text), "output": str(output)}
        usual = {"metric": "last", "checkpoints": False, "learning_rate": rate, "seed": seed}
        return replace(config, methods=on, steps=end - begun, **where, **usual)

    def whole(self, config: Any, train: Any, folder: Any, callback: Any, score: Any) -> bool:
        """Train in rounds, a simulation, on from the last round and clients' runs that ended.

        Scores are of the mean, losses means over clients. InputError: see `shares`; processes."""
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
            values = np.linalg.svd(server.encode(sample, normalize=True), compute_uv=False)
            p = values[values > 0] / values.sum()
            found["effective_rank"] = float(np.exp(-p @ np.log(p)))  # Roy & Vetterli 2007
            folder.log(step=step, **score(server), **{f"fed_rcl.{k}": x for k, x in found.items()})

        folder.claim()
        if folder.record() is not None:
            return True  # by whom we waited for
        print(f"{config.run_name}: {said}", file=sys.stderr)
        place, step, records, kept = folder.path / "clients", 0, [], {}
        if state := folder.start():
            server.load_state_dict(state.tensors)
            step, records, kept = state.step, state.facts["records"], state.facts["kept"]
        else:
            log(0)
        place.mkdir(exist_ok=True)
        for client, share in enumerate(shares):
            (place / f"{client}.txt").write_text("\n".join(share), encoding="utf-8")
        for number in range(1 + len(records) // self.clients, self.rounds + 1):
            before = {name: x.detach().cpu().clone() for name, x in server.state_dict().items()}
            if number > 1:
                with replacing(place / "server") as new:
                    server.save_pretrained(new)
            tell = callback and (lambda i, encoder, begun=step: callback(begun + i, encoder))
            own = [self.of_client(config, number, x, place) for x in range(self.clients)]
            runs = [train(each, tell) for each in own]
            sent = [run.encoder.state_dict() for run in runs]
            server.load_state_dict(mean_weights(sent))
            for losses in zip(*(run.losses for run in runs), strict=True):
                step += 1
                folder.log(step=step, loss=sum(losses) / len(losses))
            size = sum(x.nbytes for x in before.values())
            log(step, **drift(before, sent), bytes_sent=2 * self.clients * size)
            kept = max(folder.metrics()[1][:0:-1], key=lambda x: np.nan_to_num(x[by], nan=-np.inf))
            if kept["step"] == step:
                folder.keep(server)
            if config.checkpoints and number < self.rounds:
                folder.keep_checkpoint(step, server)
            records += [run.record for run in runs]
            facts, tensors = {"records": records, "kept": kept}, server.state_dict()
            folder.keep_state(SimpleNamespace(step=step, tensors=tensors, facts=facts))
            shutil.rmtree(place / f"round-{number}")
        shutil.rmtree(place)
        facts = {x: records[0][x] for x in ("device", "hardware", "precision", "processes")}
        facts |= {x: round(sum(y[x] for y in records), 1) for x in ("wall_time_s", "masked_pairs")}
        facts["corpus"] = {"sentences": len(sentences), "sha256": text_hash(sentences)}
        facts["weights"] = {"first": first, "last": weights_hash(server.backbone)}
        facts["remarks"] = [said, *dict.fromkeys(x for each in records for x in each["remarks"])]
        facts["clients"] = [len(share) for share in shares]
        scores = {name: x for name, x in kept.items() if name != "step" and "." not in name}
        folder.finish(**facts, kept_step=kept["step"], scores=scores)
        return True


class _Relaxed(Moments):
    def __init__(self, settings: FedRCL, known: np.ndarray) -> None:
        self.settings, self.layers, self.known = settings, settings.levels, known

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
            found = torch.stack([terms(x, of, settings.form, settings.threshold) for x in sims])
            return found.mean(dim=0) @ found.new_tensor([settings.contrast, settings.penalty])


def terms(sim: "Tensor", labels: "Tensor", form: Form, threshold: float) -> "Tensor":
    """Contrast and penalty, (2,), of S samples: their cosines, (S, S) float, and classes, (S,)."""
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
        return torch.stack([contrast.mean(), ((s - 1) / TEMPERATURE).exp().log1p().mean()])
    share = others.to(sim) / others.sum(dim=1, keepdim=True).clamp_min(1) / len(sim)
    total = z.masked_fill(same ^ others, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.stack([(share * (total - z)).sum(), (share * (sim > threshold) * z).sum()])


def partition(labels: np.ndarray, clients: int, alpha: float, seed: int) -> np.ndarray:
    """The client, from 0, of each sentence, (n,) integers, by its class, (n,), and the seed."""
    generator = np.random.default_rng((6, seed))
    classes, of = np.unique(labels, return_inverse=True)
    bounds = generator.dirichlet(np.full(clients, alpha), len(classes)).cumsum(axis=1)
    return (generator.random(len(of))[:, None] >= bounds[of, :-1]).sum(axis=1)


def mean_weights(sent: "list[dict[str, Tensor]]") -> "dict[str, Tensor]":
    """The mean of what clients sent, head and buffers too, each client alike, in float64."""
    total: dict[str, Any] = {name: sum(each[name].double() for each in sent) for name in sent[0]}
    return {name: (total[name] / len(sent)).to(x.dtype) for name, x in sent[0].items()}


def drift(before: "dict[str, Tensor]", sent: "list[dict[str, Tensor]]") -> dict[str, float]:
    """The mean norm of clients' updates, and the mean cosine of two of them, 0 where one is all."""
    import torch

    products = torch.zeros(len(sent), len(sent), dtype=torch.float64)
    for name, x in before.items():
        moved = torch.stack([(each[name] - x).flatten() for each in sent]).double()
        products += moved @ moved.T
    norms = products.diagonal().sqrt()
    cosines = (products / norms / norms[:, None]).triu(1).sum()
    pairs = max(1, len(sent) * (len(sent) - 1) / 2)
    return {"drift_norm": norms.mean().item(), "drift_cosine": cosines.item() / pairs}
