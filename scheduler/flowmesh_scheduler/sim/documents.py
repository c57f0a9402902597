"""Workflows as tenants write them, compiled by hand: post-training pipelines and agents, made of the catalog's operator types.

What two documents share is only what is written the same in both: an operator is the same work if its type, its parameters,
its model and all that leads to its inputs are. ``Author`` writes the first part of a document in common words, the rest in its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from flowmesh_cas.cid import RAW, cid_from_digest
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Manifest, Operator, Output, Ref, Resources, Source
from flowmesh_scheduler.sim.draws import between, pick
from flowmesh_scheduler.sim.language_models import MODELS, LanguageModel, vram_need_bytes

Made = tuple[int, str]
"""An operator of the document and its output port."""


def dataset(label: str, rows: int = 1000, tokens_per_row: int = 180) -> Ref:
    """Return a file of given content, known by its label."""
    digest = sha256(label.encode()).digest()
    return Ref("file", cid_from_digest(RAW, digest), digest, rows * tokens_per_row * 4, rows)


@dataclass(slots=True)
class Author:
    """Writes one document: the first ``common`` operators in the words of ``everyone``, the others in the author's ``own``."""

    own: str
    everyone: str
    common: int = 0
    operators: list[Operator] = field(default_factory=list)

    @property
    def voice(self) -> str:
        return self.everyone if len(self.operators) < self.common else self.own

    def seed(self) -> int:
        """Return a seed that nobody else would choose for the operator that comes next."""
        return int.from_bytes(sha256(f"{self.voice} {len(self.operators)}".encode()).digest()[:6], "big")

    def between(self, low: int, high: int) -> int:
        """Return a number that the voice in use has chosen."""
        return low + pick(high - low + 1, self.voice, len(self.operators))

    def tokens(self, low: int, high: int) -> int:
        """Return a limit of new tokens as people choose them."""
        usual = [limit for limit in (64, 96, 128, 192, 256, 384, 512) if low <= limit <= high]
        return usual[pick(len(usual), self.voice, len(self.operators), "tokens")]

    def write(
        self,
        kind: str,
        params: dict[str, Any],
        inputs: Mapping[str, Sequence[Made | Ref]],
        model: LanguageModel | None = None,
        priority: int = 0,
    ) -> Made:
        """Add an operator; return its first output."""
        described = CATALOG[kind]
        sources = {port: [self._source(one) for one in found] for port, found in inputs.items() if found}
        needs = Resources()
        if model is not None:
            params = {"model": model.reference, **params}
            needs = Resources(gpus=1, vram_bytes=vram_need_bytes(model, trains=described.executor == "train"))
        self.operators.append(
            Operator(
                f"{kind.split('.')[1]}-{len(self.operators)}",
                kind,
                described.version,
                params,
                sources,
                {"model": model.reference} if model is not None else {},
                determinism=described.determinism_of(params),
                resources=needs,
                priority=priority,
            )
        )
        return len(self.operators) - 1, next(iter(described.outputs))

    def _source(self, one: Made | Ref) -> Source:
        return Source(ref=one) if isinstance(one, Ref) else Source(op=one[0], port=one[1])

    def close(self, name: str, outputs: Sequence[Made]) -> Manifest:
        """Return the finished document."""
        return Manifest(name, self.operators, {f"out{i}": Output(op, port) for i, (op, port) in enumerate(outputs)})

    # --- phrases

    def load(self, rows: int) -> Made:
        return self.write("data.load", {"format": "jsonl", "limit": rows, "columns": []}, {"file": [dataset(self.voice)]})

    def select(self, rows: int, *tables: Made) -> Made:
        """Some rows of one table, or several tables side by side."""
        query = f"SELECT * FROM t0 -- {self.seed()}\nORDER BY 1 LIMIT {rows}"
        return self.write(
            "data.sql",
            {"query": query},
            {f"t{i}": [table] for i, table in enumerate(tables[:1])} | {f"u{i}": [table] for i, table in enumerate(tables[1:])},
        )

    def shape(self, table: Made) -> Made:
        return self.write(
            "data.map", {"columns": {"prompt": f"{{{{ text }}}} {self.seed()}"}, "keep": [], "drop": []}, {"rows": [table]}
        )

    def generate(self, model: LanguageModel, table: Made, tokens: int, samples: int = 1, adapter: Sequence[Made] = ()) -> Made:
        params = {
            "max_new_tokens": tokens, "samples": samples, "temperature": 0.8, "top_p": 1.0, "seed": self.seed(),
            "dtype": "bfloat16",
        }  # fmt: skip
        return self.write("llm.generate", params, {"rows": [table], "adapter": adapter}, model)

    def score(self, model: LanguageModel, table: Made) -> Made:
        return self.write("llm.score", {"column": f"logprob{self.seed() % 97}", "dtype": "bfloat16"}, {"rows": [table]}, model)

    def reward(self, model: LanguageModel, table: Made) -> Made:
        return self.write("reward.score", {"column": f"reward{self.seed() % 97}"}, {"rows": [table]}, model)

    def train(self, kind: str, model: LanguageModel, table: Made, steps: int, batch_size: int, length: int = 512) -> Made:
        params = {
            "steps": steps, "batch_size": batch_size, "learning_rate": 1e-4, "max_length": length, "seed": self.seed(),
            "dtype": "bfloat16",
        }  # fmt: skip
        return self.write(kind, params, {"rows": [table]}, model)

    def call(self, function: str, fixed_s: float, row_s: float, *tables: Made) -> Made:
        args = {"fixed_s": fixed_s, "row_s": row_s, "tag": self.seed()}
        params = {"function": function, "args": args, "returns": "rows"}
        return self.write("python.call", params, {f"t{i}": [table] for i, table in enumerate(tables)})


def sft(author: Author, base: LanguageModel, teacher: LanguageModel) -> Manifest:
    """Write better answers with a teacher, check them, tune on them, evaluate the result."""
    table = author.shape(author.load(256))
    parts = []
    for _ in range(5):
        prompts = author.select(author.between(16, 32), table)
        parts.append(author.call("verify", 2.0, 0.6, author.generate(teacher, prompts, author.tokens(256, 512))))
    joined = author.write("data.concat", {}, {"rows": parts})
    adapter = author.train("train.sft", base, joined, author.between(12, 16), 8)
    return author.close("sft", [adapter, *evaluation(author, base, MODELS["reward-3b"], table, adapter)])


def evaluation(author: Author, base: LanguageModel, judge: LanguageModel, table: Made, adapter: Made) -> list[Made]:
    """Answer three sets of questions with the tuned model, and judge the answers."""
    found = []
    for _ in range(3):
        answers = author.generate(base, author.select(author.between(12, 24), table), author.tokens(192, 384), adapter=[adapter])
        found.append(author.reward(judge, answers))
    return [author.call("report", 1.0, 0.02, *found)]


def reward(author: Author, base: LanguageModel, policy: LanguageModel, judge: LanguageModel) -> Manifest:
    """Draw pairs of answers, let a judge prefer one, tune a reward model on them."""
    table = author.shape(author.load(256))
    parts = []
    for _ in range(5):
        prompts = author.select(author.between(8, 16), table)
        pairs = author.generate(policy, prompts, author.tokens(256, 512), samples=2)
        parts.append(author.select(32, author.score(judge, pairs)))
    joined = author.write("data.concat", {}, {"rows": parts})
    adapter = author.train("train.sft", base, joined, author.between(12, 20), 8)
    check = author.generate(policy, author.select(24, table), 256)
    report = author.call("report", 1.0, 0.02, author.reward(base, check))
    return author.close("reward", [adapter, report])


def dpo(author: Author, base: LanguageModel, rewards: LanguageModel) -> Manifest:
    """Draw candidates, score them, tune on the best against the worst, evaluate the result."""
    table = author.shape(author.load(256))
    parts = []
    for _ in range(5):
        candidates = author.generate(base, author.select(author.between(8, 16), table), author.tokens(256, 512), samples=2)
        parts.append(author.reward(rewards, candidates))
    pairs = author.select(64, author.write("data.concat", {}, {"rows": parts}))
    adapter = author.train("train.dpo", base, pairs, author.between(6, 10), 8)
    return author.close("dpo", [adapter, *evaluation(author, base, rewards, table, adapter)])


def ppo(author: Author, base: LanguageModel, rewards: LanguageModel, rounds: int) -> Manifest:
    """Rounds of: rollouts of the policy, their tests and rewards beside the reference's log-probabilities, an update on both."""
    table = author.shape(author.load(256))
    adapter: list[Made] = []
    for _ in range(rounds):
        prompts = author.select(author.between(8, 16), table)
        rollouts = author.generate(base, prompts, author.tokens(256, 512), samples=2, adapter=adapter)
        rewarded = author.reward(rewards, author.call("run-tests", 2.0, 0.4, rollouts))
        reference = author.score(base, rollouts)
        adapter = [author.train("train.dpo", base, author.select(32, rewarded, reference), author.between(2, 3), 8)]
    return author.close("ppo", adapter)


def agent(author: Author, worker: LanguageModel, judge: LanguageModel, width: int) -> Manifest:
    """Look at a question, ask it in several ways, use a tool on each answer, and let a judge put one answer together."""
    table = author.load(author.between(2, 6))
    plan = author.generate(worker, table, author.tokens(64, 128))
    found = []
    for _ in range(width):
        found.append(
            author.call(
                "search",
                0.5 + 3.0 * between(0, 1, author.voice, "tool"),
                0.2,
                author.generate(worker, plan, author.tokens(96, 256)),
            )
        )
    joined = author.write("data.concat", {}, {"rows": found})
    return author.close("agent", [author.generate(judge, joined, author.tokens(128, 256))])
