"""`puna run tiny`: a Llama 3.1 of three million parameters, from raw text to the report, on a laptop's CPU.

`run` below is the whole system in order; each line is a stage that could as well be run alone (`puna stage NAME`), at
any size. `recipe` is its complete configuration: change a number there, or on the command line by its name.
"""

from dataclasses import dataclass, field
from pathlib import Path

from puna.artifacts import Artifact
from puna.curation.curate import CurationConfig, curate
from puna.curation.mix import MixConfig, mix
from puna.evaluation.baselines import BaselineConfig, measure_baselines
from puna.evaluation.contamination import ContaminationConfig
from puna.evaluation.report import ReportConfig, write_report
from puna.model.sizes import LlamaConfig, RopeScaling
from puna.posttrain.evaluation import BitsConfig, EvaluationConfig, check_contamination, evaluate, measure_bits
from puna.posttrain.round import RoundConfig, Start, run_round
from puna.posttrain.sampling import SampleConfig
from puna.posttrain.tasks.build import DialogConfig, build_dialogs
from puna.posttrain.tasks.dialogs_io import read_items
from puna.posttrain.tasks.toolbox import ALL_BUILTIN
from puna.posttrain.tasks.transcripts import TranscriptConfig, build_transcripts
from puna.posttrain.world import WorldConfig, build_world, library, load_world
from puna.quant import QuantConfig, quantise
from puna.recipes.running import running
from puna.serve.companion import Companion
from puna.tokenizer.shards import TokeniseConfig, tokenise
from puna.tokenizer.train import TokenizerConfig, train_tokenizer
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.objectives.sft import SftObjective
from puna.train.optimizers import OptimizerConfig
from puna.train.processes import train_laid_out
from puna.train.schedule import Schedule
from puna.train.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Every setting of every stage, in the order of the line."""

    data: Path | None = None  # the user's own text; None: the corpus that every machine with Python has
    rounds: int = 1
    world: WorldConfig
    curation: CurationConfig
    transcripts: TranscriptConfig
    mix: MixConfig
    tokenizer: TokenizerConfig
    tokenise: TokeniseConfig = field(default_factory=TokeniseConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    pretrain: TrainConfig
    dialogs: DialogConfig
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    sft: TrainConfig
    round: RoundConfig
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    bits_bf16: BitsConfig = field(default_factory=lambda: BitsConfig(bf16=True))
    int8: QuantConfig = field(default_factory=lambda: QuantConfig(bits=8))
    int4: QuantConfig = field(default_factory=lambda: QuantConfig(bits=4))
    report: ReportConfig


def recipe(seed: int = 0, data: Path | None = None, rounds: int = 1) -> Tiny:
    """The configuration for one seed, which decides the world, the dialogs, the first weights and every order."""
    model = LlamaConfig(
        dim=192, n_layers=6, n_heads=3, n_kv_heads=1, head_dim=64, ffn_dim=512, vocab_size=4096, context=512,
        rope_theta=500_000.0, rope_scaling=RopeScaling(original_context=256), tied=True,
    )  # fmt: skip
    muon = OptimizerConfig(kind="muon")
    sft = TrainConfig(
        sft=SftObjective(rows=8), optimizer=muon, steps=160, schedule=Schedule(peak=1e-3, anneal_share=0.5), seed=seed
    )
    own = {} if data else {"python-docstrings": 0.0}  # prose that the code beside it has already
    return Tiny(
        data=data,
        rounds=rounds,
        world=WorldConfig(seed=seed),
        curation=CurationConfig(heldout_share=0.06),
        transcripts=TranscriptConfig(seed=seed),
        mix=MixConfig(weights={"world": 0.1, "dialogs": 0.24, "*": 0.66} | own, max_bytes=3_600_000, seed=seed),
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size, context=model.context, digits=1),
        pretrain=TrainConfig(
            lm=LmObjective(rows=8),
            model=model,
            head_start=True,
            optimizer=muon,
            steps=1100,
            schedule=Schedule(peak=5e-3, warmup_steps=30, anneal_share=0.3, averaged=4),
            seed=seed,
        ),
        dialogs=DialogConfig(seed=seed),
        sft=sft,
        round=RoundConfig(
            sample=SampleConfig(seed=seed, samples=6),
            reward=TrainConfig(reward=RewardObjective(), steps=60, schedule=Schedule(peak=3e-4), seed=seed),
            sft=sft,
            dpo=TrainConfig(dpo=DpoObjective(), steps=60, schedule=Schedule(peak=4e-5), seed=seed),
        ),
        report=ReportConfig(title="Puna tiny", note=f"Seed {seed}."),
    )


def run(c: Tiny, out: Path) -> Artifact:
    """The line. Returns the report; whatever is complete already is not made again."""
    with running("tiny", c, out) as (keep, finish):
        world = keep(build_world(c.world, out=out / "01-world"))
        transcripts = keep(build_transcripts(c.transcripts, world, out=out / "01-transcripts"))
        curated = keep(curate(c.curation, c.data, out=out / "02-curated"))
        text = keep(mix(c.mix, [curated, world, transcripts], out=out / "03-text"))
        tokenizer = keep(train_tokenizer(c.tokenizer, text, out=out / "04-tokenizer"))
        tokens = keep(tokenise(c.tokenise, text, tokenizer, out=out / "05-tokens"))
        keep(measure_baselines(c.baselines, text, tokenizer, out=out / "06-baselines"))

        base = keep(train_laid_out(c.pretrain, tokens, tokenizer, None, out=out / "07-base"))
        keep(measure_bits(c.bits, base, text, out=out / "07-base-bits"))

        dialogs = keep(build_dialogs(c.dialogs, world, out=out / "08-dialogs"))
        keep(check_contamination(c.contamination, dialogs, text, tokenizer, out=out / "08-contamination"))
        keep(evaluate(c.evaluate, base, dialogs, world, out=out / "07-base-evaluation"))
        best = keep(train_laid_out(c.sft, dialogs, tokenizer, base, out=out / "09-sft"))
        score = keep(evaluate(c.evaluate, best, dialogs, world, out=out / "09-sft-evaluation"))
        for number in range(1, c.rounds + 1):
            given = Start(base=base, latest=best, score=score, dialogs=dialogs, world=world, tokenizer=tokenizer)
            best, score, made = run_round(c.round, given, out=out / f"10-round-{number}")
            for artifact in made:
                keep(artifact)

        keep(measure_bits(c.bits_bf16, best, text, out=out / "11-bf16-bits"))
        for bits, config in ((8, c.int8), (4, c.int4)):
            small = keep(quantise(config, best, None, text, out=out / f"12-int{bits}"))
            keep(measure_bits(c.bits, small, text, out=out / f"12-int{bits}-bits"))
        companion(dialogs, world).write(out)
        return finish(write_report, c.report, model=best)


def companion(dialogs: Artifact, world: Artifact) -> Companion:
    """What whoever talks to the model should be offered: a question of each task, and the world's library to search."""
    questions = {
        item.task: item.dialog[-1].content
        for item in read_items(dialogs.file("eval.jsonl"))
        if item.tools == ALL_BUILTIN or not item.tools
    }
    return Companion(examples=tuple(questions.values()), library=tuple(library(load_world(world))))
