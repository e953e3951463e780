"""A round of post-training, the paper's loop (arXiv 2407.21783, figure 7), with a gate after each step that could harm.

    latest model --answers prompts--> samples --verifier--> preferences --> reward model
    samples + reward model --rejection--> dialogs --SFT, from base--> rejection-sampled model   promoted?
    its own samples --> fresh preferences --DPO--> preferred model --average with its start-->   promoted?

The first round's "latest model" is the one fine-tuned on demonstrations; each later round's is the last round's result.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from puna import log
from puna.artifacts import Artifact
from puna.posttrain.averaging import AverageConfig, average
from puna.posttrain.evaluation import EvaluationConfig, evaluate
from puna.posttrain.preferences import PreferenceConfig, prefer
from puna.posttrain.promotion import PromotionConfig, promote
from puna.posttrain.rejection import RejectionConfig, reject
from puna.posttrain.sampling import SampleConfig, sample
from puna.train.processes import train_laid_out
from puna.train.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """The stages of a round."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    prefer: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: TrainConfig
    reject: RejectionConfig = field(default_factory=RejectionConfig)
    sft: TrainConfig
    dpo: TrainConfig
    average: AverageConfig = field(default_factory=AverageConfig)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
    promote: PromotionConfig = field(default_factory=PromotionConfig)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a round starts from."""

    base: Artifact  # the pretrained checkpoint: every fine-tuning starts here
    latest: Artifact  # the checkpoint that answers, and that is to be improved upon
    score: Artifact  # the evaluation of `latest`
    dialogs: Artifact
    world: Artifact
    tokenizer: Artifact


def run_round(config: RoundConfig, start: Start, *, out: Path) -> tuple[Artifact, Artifact, list[Artifact]]:
    """One round, each stage in a folder of `out`: the promoted checkpoint, its evaluation, and all artifacts made."""
    made: list[Artifact] = []

    def keep(artifact: Artifact) -> Artifact:
        made.append(artifact)
        return artifact

    def judged(checkpoint: Artifact) -> Artifact:
        return keep(
            evaluate(config.evaluate, checkpoint, start.dialogs, start.world, out=_beside(checkpoint, "evaluation"))
        )

    samples = keep(sample(config.sample, start.latest, start.dialogs, start.world, out=out / "1-samples"))
    pairs = keep(prefer(config.prefer, samples, out=out / "2-preferences"))
    if not pairs.metrics["preferences"]:
        return start.latest, start.score, _nothing_to_prefer(start.latest, made)
    reward = keep(train_laid_out(config.reward, pairs, start.tokenizer, start.base, out=out / "3-reward"))
    chosen = keep(reject(config.reject, samples, start.dialogs, reward, pairs, out=out / "4-rejection"))
    sft = keep(train_laid_out(config.sft, chosen, start.tokenizer, start.base, out=out / "5-sft"))
    sft_score = judged(sft)
    better = keep(promote(config.promote, [start.latest, sft], [start.score, sft_score], out=out / "6-promoted"))
    better_score = sft_score if better.metrics["chosen"] == sft.path.name else start.score

    again = replace(config.sample, seed=config.sample.seed + 1)
    fresh = keep(sample(again, better, start.dialogs, start.world, out=out / "7-samples"))
    fresh_pairs = keep(prefer(config.prefer, fresh, out=out / "8-preferences"))
    if not fresh_pairs.metrics["preferences"]:
        return better, better_score, _nothing_to_prefer(better, made)
    dpo = keep(train_laid_out(config.dpo, fresh_pairs, start.tokenizer, better, out=out / "9-dpo"))
    mean = keep(average(config.average, [better, dpo], out=out / "10-average"))
    rivals = [better, dpo, mean]
    scores = [better_score, judged(dpo), judged(mean)]
    final = keep(promote(config.promote, rivals, scores, out=out / "11-promoted"))
    names = [s.metrics["checkpoint"] for s in scores]
    return final, scores[names.index(final.metrics["chosen"])], made


def _nothing_to_prefer(kept: Artifact, made: list[Artifact]) -> list[Artifact]:
    log.warn(f"no prompt got both an answer that passed and one that failed: the round ends here with {kept.path.name}")
    return made


def _beside(checkpoint: Artifact, what: str) -> Path:
    return checkpoint.path.with_name(f"{checkpoint.path.name}-{what}")
