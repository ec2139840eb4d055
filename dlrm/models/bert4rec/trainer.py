"""What a training has of BERT4Rec's own: learning rate, mixed precision, ranking metrics, results."""

from collections.abc import Mapping
from typing import Any

from dlrm.models.bert4rec.dataloaders import BertDatasets
from dlrm.models.bert4rec.model import RankingMetrics
from dlrm.trainer import mixed_precision
from dlrm.trainer.trainer import Trainer


class BERT4RecTrainer(Trainer):
    score_metric = "NDCG@10"
    make_metrics = RankingMetrics
    datasets: BertDatasets

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        data = self.datasets.data
        self.run_folder.print_line(
            f"{data.users:,} users, {data.item_count:,} items, {len(data.items):,} ratings, "
            f"{self.datasets.train.batches.source.rows:,} training sequences"
        )

    def enable_mixed_precision(self, kind: str, scale: mixed_precision.LossScale | None) -> None:
        whole: Any = self.model.module
        whole.use_mixed_precision(self.device.type, mixed_precision.TYPES[kind], scale)

    def learning_rate(self) -> float:
        optim, done = self.options.optim, self.progress.step
        rate = optim.lr * optim.gamma ** (self.progress.epoch // optim.decay_step)
        if done < optim.lr_warmup_steps:
            return rate * (done + 1) / optim.lr_warmup_steps
        return rate * (1 - min(1, done / optim.lr_decay_steps)) if optim.lr_decay_steps else rate

    def evaluate(self, split: str) -> dict[str, Any]:
        result, best = super().evaluate(split), self.datasets.reachable
        if split == "test" and best:
            reached = (f"{name} {result[name]:.4f} of {value:.4f}" for name, value in best.items())
            self.run_folder.print_line(
                f"{split}, against what the best guess scores on average: {', '.join(reached)}"
            )
        return result

    def collect_results(self) -> Mapping[str, Any]:
        best = {"reachable": self.datasets.reachable} if self.datasets.reachable else {}
        return {"score": self.score_metric, **best}
